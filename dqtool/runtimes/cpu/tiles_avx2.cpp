// Tiles of accumulators on AVX2, which adds pairs of products in 16 bits and saturates. Compiled after tiles.cpp, in the same
// translation unit.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
namespace {

constexpr int LANES = 8, ROWS = 6, BLOCK = 16;  // a tile of accumulators: 6 rows x 2 registers of 8 columns

alignas(32) const int16_t ONES[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// Multiplies the four bytes at `from`, broadcast, with one or two registers of weights. Written in assembly, because compilers
// load the bytes of all rows first and then spill accumulators: sixteen registers are just enough.
template <int NB>
inline void add_pairs(const uint8_t* from, __m256i w0, __m256i w1, __m256i& a0, __m256i& a1) {  // 16-bit sums
  __m256i x, y;
  if constexpr (NB == 2)
    asm("vpbroadcastd %[from], %[x]\n\tvpmaddubsw %[w0], %[x], %[y]\n\tvpaddw %[y], %[a0], %[a0]\n\t"
        "vpmaddubsw %[w1], %[x], %[x]\n\tvpaddw %[x], %[a1], %[a1]"
        : [a0] "+x"(a0), [a1] "+x"(a1), [x] "=&x"(x), [y] "=&x"(y)
        : [from] "m"(*reinterpret_cast<const int32_t*>(from)), [w0] "x"(w0), [w1] "x"(w1));
  else
    asm("vpbroadcastd %[from], %[x]\n\tvpmaddubsw %[w0], %[x], %[x]\n\tvpaddw %[x], %[a0], %[a0]"
        : [a0] "+x"(a0), [x] "=&x"(x)
        : [from] "m"(*reinterpret_cast<const int32_t*>(from)), [w0] "x"(w0));
}

template <int NB>
inline void add_quads(const uint8_t* from, __m256i w0, __m256i w1, __m256i& a0, __m256i& a1) {  // 32-bit sums
  __m256i x, y;
  if constexpr (NB == 2)
    asm("vpbroadcastd %[from], %[x]\n\tvpmaddubsw %[w0], %[x], %[y]\n\tvpmaddwd %[ones], %[y], %[y]\n\t"
        "vpaddd %[y], %[a0], %[a0]\n\tvpmaddubsw %[w1], %[x], %[x]\n\tvpmaddwd %[ones], %[x], %[x]\n\tvpaddd %[x], %[a1], %[a1]"
        : [a0] "+x"(a0), [a1] "+x"(a1), [x] "=&x"(x), [y] "=&x"(y)
        : [from] "m"(*reinterpret_cast<const int32_t*>(from)), [w0] "x"(w0), [w1] "x"(w1), [ones] "m"(ONES));
  else
    asm("vpbroadcastd %[from], %[x]\n\tvpmaddubsw %[w0], %[x], %[x]\n\tvpmaddwd %[ones], %[x], %[x]\n\tvpaddd %[x], %[a0], %[a0]"
        : [a0] "+x"(a0), [x] "=&x"(x)
        : [from] "m"(*reinterpret_cast<const int32_t*>(from)), [w0] "x"(w0), [ones] "m"(ONES));
}

template <int NB>
inline void add_words(const uint8_t* from, __m256i w0, __m256i w1, __m256i& a0, __m256i& a1) {  // two 16-bit codes
  __m256i x, y;
  if constexpr (NB == 2)
    asm("vpbroadcastd %[from], %[x]\n\tvpmaddwd %[w0], %[x], %[y]\n\tvpaddd %[y], %[a0], %[a0]\n\t"
        "vpmaddwd %[w1], %[x], %[x]\n\tvpaddd %[x], %[a1], %[a1]"
        : [a0] "+x"(a0), [a1] "+x"(a1), [x] "=&x"(x), [y] "=&x"(y)
        : [from] "m"(*reinterpret_cast<const int32_t*>(from)), [w0] "x"(w0), [w1] "x"(w1));
  else
    asm("vpbroadcastd %[from], %[x]\n\tvpmaddwd %[w0], %[x], %[x]\n\tvpaddd %[x], %[a0], %[a0]"
        : [a0] "+x"(a0), [x] "=&x"(x)
        : [from] "m"(*reinterpret_cast<const int32_t*>(from)), [w0] "x"(w0));
}

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline void store(void* to, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(to), x); }

// The accumulators of a tile are single variables, because compilers keep an array of them in memory.
#define DQ_ROWS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define DQ_POINT(i) const uint8_t* r##i = a[i < M ? i : 0] + taps[t];
#define DQ_BEGIN(i) __m256i x##i = load(start), y##i = NB == 2 ? load(start + 8) : x##i;
#define DQ_END(i)                                                   \
  if constexpr (M > i) {                                            \
    store(c + i * stride, x##i);                                    \
    if constexpr (NB == 2) store(c + i * stride + 8, y##i);         \
  }

// Computes one tile of 8 NB columns: c[i] = start + sum over `n_taps` taps (bytes from a[i]) and channels of row i (unsigned)
// times the packed block b (signed). Three forms compute the same sums. This one adds `group` pairs in 16 bits, then widens.
template <int M, int NB>
__attribute__((noinline)) void tile_nested(const uint8_t* const* a, const i64* taps, int n_taps, i64 quads, const int8_t* b,
                                           const int32_t* start, int32_t* c, i64 stride, i64 group) {
  const int32_t* sums = start;  // and after the first group c
  i64 apart = 0;
#define DQ_CLEAR(i) __m256i x##i = _mm256_setzero_si256(), y##i = _mm256_setzero_si256();
  DQ_ROWS(DQ_CLEAR)
  i64 room = group;
  for (int t = 0; t < n_taps; ++t) {
    DQ_ROWS(DQ_POINT)
    for (i64 k = 0; k < quads;) {
      i64 to = std::min(quads, k + room);
      room -= to - k;
      for (; k < to; ++k, b += 32 * NB) {
        __m256i w0 = load(b), w1 = NB == 2 ? load(b + 32) : w0;
#define DQ_ADD(i) \
  if constexpr (M > i) add_pairs<NB>(r##i + 4 * k, w0, w1, x##i, y##i);
        DQ_ROWS(DQ_ADD)
      }
      if (room && (k < quads || t + 1 < n_taps)) continue;
      room = group;
      const __m256i ones = load(ONES);
#define DQ_WIDEN(i)                                                                                        \
  if constexpr (M > i) {                                                                                   \
    store(c + i * stride, _mm256_add_epi32(load(sums + i * apart), _mm256_madd_epi16(x##i, ones)));        \
    if constexpr (NB == 2)                                                                                 \
      store(c + i * stride + 8, _mm256_add_epi32(load(sums + i * apart + 8), _mm256_madd_epi16(y##i, ones))); \
    x##i = y##i = _mm256_setzero_si256();                                                                  \
  }
      DQ_ROWS(DQ_WIDEN)
      sums = c, apart = stride;
    }
  }
#undef DQ_CLEAR
#undef DQ_ADD
#undef DQ_WIDEN
}

// Computes the tiles of `blocks` blocks of 16 columns that lie one after another, for sums that fit 16 bits as a whole: the form of
// few channels, where calls and long sums would take as long as products.
template <int M>
__attribute__((noinline)) void tile_blocks(const uint8_t* const* a, i64 quads, const int8_t* b, const int32_t* start, int32_t* c,
                                           i64 stride, i64 blocks) {
  constexpr int NB = 2;
  const i64 none = 0, *taps = &none, t = 0;
  DQ_ROWS(DQ_POINT)
  for (i64 blk = 0; blk < blocks; ++blk, start += 16, c += 16) {
#define DQ_CLEAR(i) __m256i x##i = _mm256_setzero_si256(), y##i = _mm256_setzero_si256();
    DQ_ROWS(DQ_CLEAR)
    for (i64 k = 0; k < quads; ++k, b += 64) {
      __m256i w0 = load(b), w1 = load(b + 32);
#define DQ_ADD(i) \
  if constexpr (M > i) add_pairs<NB>(r##i + 4 * k, w0, w1, x##i, y##i);
      DQ_ROWS(DQ_ADD)
    }
    const __m256i ones = load(ONES), first = load(start), second = load(start + 8);
#define DQ_WIDEN(i)                                                                       \
  if constexpr (M > i) {                                                                  \
    store(c + i * stride, _mm256_add_epi32(first, _mm256_madd_epi16(x##i, ones)));        \
    store(c + i * stride + 8, _mm256_add_epi32(second, _mm256_madd_epi16(y##i, ones)));   \
  }
    DQ_ROWS(DQ_WIDEN)
  }
#undef DQ_CLEAR
#undef DQ_ADD
#undef DQ_WIDEN
}

// Widens every pair at once, for codes of which fewer than four pairs fit 16 bits.
template <int M, int NB>
__attribute__((noinline)) void tile_single(const uint8_t* const* a, const i64* taps, int n_taps, i64 quads, const int8_t* b,
                                           const int32_t* start, int32_t* c, i64 stride, i64) {
  DQ_ROWS(DQ_BEGIN)
  for (int t = 0; t < n_taps; ++t) {
    DQ_ROWS(DQ_POINT)
    for (i64 k = 0; k < quads; ++k, b += 32 * NB) {
      __m256i w0 = load(b), w1 = NB == 2 ? load(b + 32) : w0;
#define DQ_ADD(i) \
  if constexpr (M > i) add_quads<NB>(r##i + 4 * k, w0, w1, x##i, y##i);
      DQ_ROWS(DQ_ADD)
#undef DQ_ADD
    }
  }
  DQ_ROWS(DQ_END)
}

// Multiplies 16-bit numbers, even and odd bytes of a quad apart, for codes of any width. Rows are those of `widen_codes`.
template <int M, int NB>
__attribute__((noinline)) void tile_wide(const uint8_t* const* a, const i64* taps, int n_taps, i64 quads, const int8_t* b,
                                         const int32_t* start, int32_t* c, i64 stride, i64) {
  DQ_ROWS(DQ_BEGIN)
  for (int t = 0; t < n_taps; ++t) {
    DQ_ROWS(DQ_POINT)
    for (i64 k = 0; k < quads; ++k, b += 32 * NB) {
      __m256i w0 = _mm256_srai_epi16(_mm256_slli_epi16(load(b), 8), 8), w1 = w0;
      if constexpr (NB == 2) w1 = _mm256_srai_epi16(_mm256_slli_epi16(load(b + 32), 8), 8);
#define DQ_ADD(i) \
  if constexpr (M > i) add_words<NB>(r##i + 8 * k, w0, w1, x##i, y##i);
      DQ_ROWS(DQ_ADD)
#undef DQ_ADD
      w0 = _mm256_srai_epi16(load(b), 8);
      if constexpr (NB == 2) w1 = _mm256_srai_epi16(load(b + 32), 8);
#define DQ_ADD(i) \
  if constexpr (M > i) add_words<NB>(r##i + 8 * k + 4, w0, w1, x##i, y##i);
      DQ_ROWS(DQ_ADD)
#undef DQ_ADD
    }
  }
  DQ_ROWS(DQ_END)
}

// Multiplies 16-bit numbers of both operands. `quads` counts pairs of channels.
template <int M, int NB>
__attribute__((noinline)) void tile_words(const uint8_t* const* a, const i64* taps, int n_taps, i64 quads, const int8_t* b,
                                          const int32_t* start, int32_t* c, i64 stride, i64) {
  DQ_ROWS(DQ_BEGIN)
  for (int t = 0; t < n_taps; ++t) {
    DQ_ROWS(DQ_POINT)
    for (i64 k = 0; k < quads; ++k, b += 32 * NB) {
      __m256i w0 = load(b), w1 = NB == 2 ? load(b + 32) : w0;
#define DQ_ADD(i) \
  if constexpr (M > i) add_words<NB>(r##i + 4 * k, w0, w1, x##i, y##i);
      DQ_ROWS(DQ_ADD)
#undef DQ_ADD
    }
  }
  DQ_ROWS(DQ_END)
}
#undef DQ_POINT
#undef DQ_BEGIN
#undef DQ_END
#undef DQ_ROWS

using Tile = void (*)(const uint8_t* const*, const i64*, int, i64, const int8_t*, const int32_t*, int32_t*, i64, i64);

#define DQ_FORMS(form)                                                                                         \
  {{form<1, 1>, form<1, 2>}, {form<2, 1>, form<2, 2>}, {form<3, 1>, form<3, 2>}, {form<4, 1>, form<4, 2>},     \
   {form<5, 1>, form<5, 2>}, {form<6, 1>, form<6, 2>}}
constexpr Tile TILES[4][ROWS][2] = {DQ_FORMS(tile_wide), DQ_FORMS(tile_single), DQ_FORMS(tile_nested), DQ_FORMS(tile_words)};
#undef DQ_FORMS

// Writes rows of 64 codes, 16 columns of four, from compact ones: 32 bytes hold codes of the first eight columns in their lower
// halves and of the others in their upper halves, counted from the lowest code of each column.
inline void unpack_codes(const uint8_t* from, i64 rows, const int8_t* lows, int8_t* to) {
  alignas(32) int8_t low[64];
  for (int i = 0; i < 64; ++i) low[i] = lows[i / 4];
  const __m256i first = load(low), second = load(low + 32), half = _mm256_set1_epi8(15);
  for (i64 r = 0; r < rows; ++r) {
    __m256i x = load(from + r * 32);
    store(to + r * 64, _mm256_add_epi8(_mm256_and_si256(x, half), first));
    store(to + r * 64 + 32, _mm256_add_epi8(_mm256_and_si256(_mm256_srli_epi16(x, 4), half), second));
  }
}

constexpr i64 WORDS = -1;  // a `group`: both operands have 16 bits already

using Blocks = void (*)(const uint8_t* const*, i64, const int8_t*, const int32_t*, int32_t*, i64, i64);
constexpr Blocks BLOCKS[ROWS] = {tile_blocks<1>, tile_blocks<2>, tile_blocks<3>, tile_blocks<4>, tile_blocks<5>, tile_blocks<6>};

// Returns the bytes of a code in the rows that tiles read, where `group` pairs fit 16 bits.
inline i64 code_bytes(i64 group) { return group ? 1 : 2; }

// Writes `count` codes, a multiple of four, in 16 bits each: first the even, then the odd codes of each quad.
inline void widen_codes(const uint8_t* from, i64 count, uint8_t* to) {
  const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  i64 i = 0;
  for (; i + 16 <= count; i += 16) {
    __m128i x = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)), order);
    store(to + 2 * i, _mm256_cvtepu8_epi16(x));
  }
  for (; i < count; i += 4) {
    int32_t quad;
    std::memcpy(&quad, from + i, 4);
    __m128i x = _mm_shuffle_epi8(_mm_cvtsi32_si128(quad), order);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 2 * i), _mm_cvtepu8_epi16(x));
  }
}

// Adds up all taps of one tile of `m` rows and `nb` registers of columns.
inline void tile_taps(int m, int nb, const uint8_t* const* rows, const i64* taps, int n_taps, i64 quads, const int8_t* block,
                      const int32_t* start, int32_t* acc, i64 stride, i64, i64 group) {
  TILES[group == WORDS ? 3 : group >= 4 ? 2 : group > 0][m - 1][nb - 1](rows, taps, n_taps, quads, block, start, acc, stride, group);
}

// Finishes `count` rows of a block, from `first` on, `nb` registers of columns. PLAIN: there is no gate and no factor.
template <bool PLAIN>
void finish_block(const int32_t* acc, int count, int nb, const Epilogue& e, const i64* samples, const i64* pixels, i64 first,
                  i64 Co, Place to) {
  for (int j = 0; j < nb; ++j, first += 8, acc += 8, to.base += 8) {
    const i64 left = Co - first;
    if (left <= 0) return;
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(std::min<i64>(left, 8))), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const bool whole = left >= 8;
    auto get = [&](const float* from) { return whole ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, mask); };
    const __m256 s = _mm256_mul_ps(_mm256_set1_ps(e.input_scale), get(e.scale + first));
    __m256 bias = _mm256_setzero_ps();
    if (e.bias) bias = get(e.bias + first);
    for (int i = 0; i < count; ++i) {
      const i64 n = samples[i], pixel = pixels[i];
      if (pixel < 0) continue;
      __m256 y = _mm256_cvtepi32_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(acc + i * BLOCK)));
      if (e.bias_stride) bias = get(e.bias + n * e.bias_stride + first);
      y = e.bias ? _mm256_fmadd_ps(y, s, bias) : _mm256_mul_ps(y, s);
      if constexpr (!PLAIN)
        if (e.gate) y = _mm256_mul_ps(y, get(e.gate + n * e.gate_stride + first));
      if (e.residual) y = _mm256_add_ps(y, get(e.residual + pixel * Co + first));
      if constexpr (!PLAIN) y = _mm256_mul_ps(y, _mm256_set1_ps(e.post));
      float* row = to.row(i, pixel);
      if (whole)
        _mm256_storeu_ps(row, y);
      else
        _mm256_maskstore_ps(row, mask, y);
    }
  }
}

}  // namespace
#endif
