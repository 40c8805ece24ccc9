// Tiles of accumulators: the part of the int8 products that depends on the instruction set. Compiled after kernels.cpp, in the
// same translation unit.
//
// A packed weight is cut into blocks of BLOCK columns, [block][tap][channels / 4][columns][4]. With AVX512-VNNI one instruction
// multiplies four bytes and adds the products into 32 bits. AVX2 adds pairs of products in 16 bits, and saturates. `group` is
// the number of such pairs that fit 16 bits for the codes at hand (0: not even one), so that every sum is exact.
#if defined(__AVX512VNNI__) || defined(__AVX2__)
#define DQ_PRODUCTS 1
namespace {

// Largest number of columns of a work item, and largest size of their weights in bytes, where writing results takes as long
// as multiplying.
#if defined(__AVX512VNNI__)
constexpr int WIDEST = 640;
#else
constexpr int WIDEST = 128;
#endif
constexpr i64 STRIPE_BYTES = 256 << 10;

struct Epilogue {  // y = ((acc * scale + bias) * gate + residual) * post
  const float* scale;
  float input_scale;
  const float* bias;
  i64 bias_stride;  // 0: all samples have the same bias
  const float* gate;
  i64 gate_stride;
  const float* residual;
  float post;
};

#if defined(__AVX512VNNI__)

constexpr int LANES = 16, ROWS = 6, BLOCK = 64;  // a tile of accumulators: 6 rows x 4 registers of 16 columns

// Computes one tile: c[i][j] = start[i][j] + sum over channels of row i (unsigned, `a[i] + offset`) times the packed block b
// (signed). `start_stride` 0 gives all rows the same start. Prefetches the weights `ahead` bytes further on. Never inlined: in a
// larger function the compiler spills the accumulators.
template <int M, int NB>
__attribute__((noinline)) void tile(const uint8_t* const* a, i64 offset, i64 quads, const int8_t* b, const int32_t* start,
                                    i64 start_stride, int32_t* c, i64 stride, i64 ahead) {
  __m512i acc[M][NB];
  const uint8_t* row[M];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    row[i] = a[i] + offset;
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) acc[i][j] = _mm512_loadu_si512(start + i * start_stride + j * 16);
  }
  for (i64 k = 0; k < quads; ++k) {
    __m512i w[NB];
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) {
      w[j] = _mm512_loadu_si512(b + j * 64);
      _mm_prefetch(reinterpret_cast<const char*>(b + j * 64 + ahead), _MM_HINT_T1);
    }
    b += NB * 64;
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      int32_t quad;
      std::memcpy(&quad, row[i] + 4 * k, 4);
      __m512i x = _mm512_set1_epi32(quad);
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], x, w[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) _mm512_storeu_si512(c + i * stride + j * 16, acc[i][j]);
}

using Tile = void (*)(const uint8_t* const*, i64, i64, const int8_t*, const int32_t*, i64, int32_t*, i64, i64);

constexpr Tile TILES[ROWS][4] = {
    {tile<1, 1>, tile<1, 2>, tile<1, 3>, tile<1, 4>}, {tile<2, 1>, tile<2, 2>, tile<2, 3>, tile<2, 4>},
    {tile<3, 1>, tile<3, 2>, tile<3, 3>, tile<3, 4>}, {tile<4, 1>, tile<4, 2>, tile<4, 3>, tile<4, 4>},
    {tile<5, 1>, tile<5, 2>, tile<5, 3>, tile<5, 4>}, {tile<6, 1>, tile<6, 2>, tile<6, 3>, tile<6, 4>}};

inline __mmask16 tail(i64 left) {
  return left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
}

// Finishes sixteen columns, from `channel` on, of one pixel of sample `n`.
inline void finish(__m512 acc, const Epilogue& e, i64 n, i64 pixel, i64 channel, i64 Co, float* to, __mmask16 mask) {
  __m512 s = _mm512_mul_ps(_mm512_set1_ps(e.input_scale), _mm512_maskz_loadu_ps(mask, e.scale + channel));
  __m512 y;
  if (e.bias)
    y = _mm512_fmadd_ps(acc, s, _mm512_maskz_loadu_ps(mask, e.bias + n * e.bias_stride + channel));
  else
    y = _mm512_mul_ps(acc, s);
  if (e.gate) y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(mask, e.gate + n * e.gate_stride + channel));
  if (e.residual) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, e.residual + pixel * Co + channel));
  if (e.post != 1.0f) y = _mm512_mul_ps(y, _mm512_set1_ps(e.post));
  _mm512_mask_storeu_ps(to, mask, y);
}

// Adds up all taps of one tile. Each tap has `slice` bytes of weights.
inline void tile_taps(int m, int nb, const uint8_t* const* rows, const i64* taps, int n_taps, i64 quads, const int8_t* block,
                      i64 slice, const int32_t* start, int32_t* acc, i64 ahead, i64) {
  Tile run = TILES[m - 1][nb - 1];
  run(rows, taps[0], quads, block, start, 0, acc, BLOCK, ahead);
  for (int t = 1; t < n_taps; ++t) run(rows, taps[t], quads, block + t * slice, acc, BLOCK, acc, BLOCK, ahead);
}

// Writes one row of finished accumulators, 16 columns at a time, from `channel` on.
inline void finish_row(const int32_t* acc, int nb, const Epilogue& e, i64 n, i64 pixel, i64 channel, i64 Co, float* to) {
  for (int j = 0; j < nb; ++j)
    finish(_mm512_cvtepi32_ps(_mm512_load_si512(acc + j * 16)), e, n, pixel, channel + j * 16, Co, to + j * 16,
           tail(Co - channel - j * 16));
}

#else  // AVX2

constexpr int LANES = 8, ROWS = 6, BLOCK = 16;  // a tile of accumulators: 6 rows x 2 registers of 8 columns

alignas(32) const int16_t ONES[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// Multiplies the four bytes at `from`, broadcast, with two registers of weights. Written in assembly, because compilers load
// the bytes of all rows first and then spill accumulators: sixteen registers are just enough.
inline void add_pairs(const uint8_t* from, __m256i w0, __m256i w1, __m256i& a0, __m256i& a1) {  // 16-bit sums
  __m256i x, y;
  asm("vpbroadcastd %[from], %[x]\n\tvpmaddubsw %[w0], %[x], %[y]\n\tvpaddw %[y], %[a0], %[a0]\n\t"
      "vpmaddubsw %[w1], %[x], %[x]\n\tvpaddw %[x], %[a1], %[a1]"
      : [a0] "+x"(a0), [a1] "+x"(a1), [x] "=&x"(x), [y] "=&x"(y)
      : [from] "m"(*reinterpret_cast<const int32_t*>(from)), [w0] "x"(w0), [w1] "x"(w1));
}

inline void add_quads(const uint8_t* from, __m256i w0, __m256i w1, __m256i& a0, __m256i& a1) {  // 32-bit sums
  __m256i x, y;
  asm("vpbroadcastd %[from], %[x]\n\tvpmaddubsw %[w0], %[x], %[y]\n\tvpmaddwd %[ones], %[y], %[y]\n\tvpaddd %[y], %[a0], %[a0]\n\t"
      "vpmaddubsw %[w1], %[x], %[x]\n\tvpmaddwd %[ones], %[x], %[x]\n\tvpaddd %[x], %[a1], %[a1]"
      : [a0] "+x"(a0), [a1] "+x"(a1), [x] "=&x"(x), [y] "=&x"(y)
      : [from] "m"(*reinterpret_cast<const int32_t*>(from)), [w0] "x"(w0), [w1] "x"(w1), [ones] "m"(ONES));
}

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline void store(void* to, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(to), x); }

// The accumulators of a tile are single variables, because compilers keep an array of them in memory.
#define DQ_ROWS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)

// Computes one tile of 16 columns: c[i] = start + sum over `n_taps` taps (bytes from a[i]) and channels of row i (unsigned)
// times the packed block b (signed). Three forms compute the same sums. This one adds `group` pairs in 16 bits, then widens.
template <int M>
__attribute__((noinline)) void tile_nested(const uint8_t* const* a, const i64* taps, int n_taps, i64 quads, const int8_t* b,
                                           const int32_t* start, int32_t* c, i64 stride, i64 group) {
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < 16; j += 8) store(c + i * stride + j, load(start + j));
  const __m256i ones = _mm256_set1_epi16(1);
#define DQ_CLEAR(i) __m256i x##i = _mm256_setzero_si256(), y##i = _mm256_setzero_si256();
  DQ_ROWS(DQ_CLEAR)
  i64 room = group;
  for (int t = 0; t < n_taps; ++t) {
#define DQ_POINT(i) const uint8_t* r##i = a[i < M ? i : 0] + taps[t];
    DQ_ROWS(DQ_POINT)
    for (i64 k = 0; k < quads;) {
      i64 to = std::min(quads, k + room);
      room -= to - k;
      for (; k < to; ++k, b += 64) {
        __m256i w0 = load(b), w1 = load(b + 32);
#define DQ_ADD(i) \
  if constexpr (M > i) add_pairs(r##i + 4 * k, w0, w1, x##i, y##i);
        DQ_ROWS(DQ_ADD)
      }
      if (room && (k < quads || t + 1 < n_taps)) continue;
      room = group;
#define DQ_WIDEN(i)                                                                 \
  if constexpr (M > i) {                                                            \
    int32_t* sum = c + i * stride;                                                  \
    store(sum, _mm256_add_epi32(load(sum), _mm256_madd_epi16(x##i, ones)));         \
    store(sum + 8, _mm256_add_epi32(load(sum + 8), _mm256_madd_epi16(y##i, ones))); \
    x##i = y##i = _mm256_setzero_si256();                                           \
  }
      DQ_ROWS(DQ_WIDEN)
    }
  }
#undef DQ_CLEAR
#undef DQ_ADD
#undef DQ_WIDEN
}

// Widens every pair at once, for codes of which fewer than four pairs fit 16 bits.
template <int M>
__attribute__((noinline)) void tile_single(const uint8_t* const* a, const i64* taps, int n_taps, i64 quads, const int8_t* b,
                                           const int32_t* start, int32_t* c, i64 stride) {
#define DQ_BEGIN(i) __m256i x##i = load(start), y##i = load(start + 8);
  DQ_ROWS(DQ_BEGIN)
  for (int t = 0; t < n_taps; ++t) {
    DQ_ROWS(DQ_POINT)
    for (i64 k = 0; k < quads; ++k, b += 64) {
      __m256i w0 = load(b), w1 = load(b + 32);
#define DQ_ADD(i) \
  if constexpr (M > i) add_quads(r##i + 4 * k, w0, w1, x##i, y##i);
      DQ_ROWS(DQ_ADD)
    }
  }
#define DQ_END(i) \
  if constexpr (M > i) store(c + i * stride, x##i), store(c + i * stride + 8, y##i);
  DQ_ROWS(DQ_END)
#undef DQ_POINT
#undef DQ_BEGIN
#undef DQ_ADD
#undef DQ_END
#undef DQ_ROWS
}

// Multiplies 16-bit numbers, even and odd bytes apart, for codes of any width.
template <int M>
__attribute__((noinline)) void tile_wide(const uint8_t* const* a, const i64* taps, int n_taps, i64 quads, const int8_t* b,
                                         const int32_t* start, int32_t* c, i64 stride) {
  const __m256i low = _mm256_set1_epi16(0xff);
  for (int j = 0; j < 16; j += 8) {
    __m256i acc[M];
    const int8_t* from = b + j * 4;
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) acc[i] = load(start + j);
    for (int t = 0; t < n_taps; ++t)
      for (i64 k = 0; k < quads; ++k, from += 64) {
        __m256i w = load(from);
        __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), odd = _mm256_srai_epi16(w, 8);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
          int32_t quad;
          std::memcpy(&quad, a[i] + taps[t] + 4 * k, 4);
          __m256i x = _mm256_set1_epi32(quad);
          __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(_mm256_and_si256(x, low), even),
                                         _mm256_madd_epi16(_mm256_srli_epi16(x, 8), odd));
          acc[i] = _mm256_add_epi32(acc[i], sum);
        }
      }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) store(c + i * stride + j, acc[i]);
  }
}

template <int M>
void tile(const uint8_t* const* a, const i64* taps, int n_taps, i64 quads, const int8_t* b, const int32_t* start, int32_t* c,
          i64 stride, i64 group) {
  if (group >= 4)
    tile_nested<M>(a, taps, n_taps, quads, b, start, c, stride, group);
  else if (group > 0)
    tile_single<M>(a, taps, n_taps, quads, b, start, c, stride);
  else
    tile_wide<M>(a, taps, n_taps, quads, b, start, c, stride);
}

using Tile = void (*)(const uint8_t* const*, const i64*, int, i64, const int8_t*, const int32_t*, int32_t*, i64, i64);

constexpr Tile TILES[ROWS] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

// Adds up all taps of one tile. The number of columns is a multiple of sixteen, so a block is always two registers wide.
inline void tile_taps(int m, int, const uint8_t* const* rows, const i64* taps, int n_taps, i64 quads, const int8_t* block,
                      i64, const int32_t* start, int32_t* acc, i64, i64 group) {
  TILES[m - 1](rows, taps, n_taps, quads, block, start, acc, BLOCK, group);
}

// Writes one row of finished accumulators, 8 columns at a time, from `first` on.
inline void finish_row(const int32_t* acc, int nb, const Epilogue& e, i64 n, i64 pixel, i64 first, i64 Co, float* to) {
  for (int j = 0; j < nb; ++j) {
    i64 channel = first + j * 8, left = Co - channel;
    if (left <= 0) return;
    __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(std::min<i64>(left, 8))), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256 s = _mm256_mul_ps(_mm256_set1_ps(e.input_scale), _mm256_maskload_ps(e.scale + channel, mask));
    __m256 y = _mm256_cvtepi32_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(acc + j * 8)));
    y = e.bias ? _mm256_fmadd_ps(y, s, _mm256_maskload_ps(e.bias + n * e.bias_stride + channel, mask)) : _mm256_mul_ps(y, s);
    if (e.gate) y = _mm256_mul_ps(y, _mm256_maskload_ps(e.gate + n * e.gate_stride + channel, mask));
    if (e.residual) y = _mm256_add_ps(y, _mm256_maskload_ps(e.residual + pixel * Co + channel, mask));
    if (e.post != 1.0f) y = _mm256_mul_ps(y, _mm256_set1_ps(e.post));
    _mm256_maskstore_ps(to + j * 8, mask, y);
  }
}

#endif

// Destination of a product's sums: floats [pixels, Co], or the codes of the next layer's input, [pixels, Cp].
//
// `gates` > 0 means GEGLU. The first `gates` columns are values and the other `gates` columns are their gates (`gates` is a
// multiple of BLOCK, Co = 2 `gates`). Packed blocks alternate between values and gates, so that a work item has both.
struct Results {
  Epilogue e;
  i64 Co, gates;
  float* out;  // null: write codes instead
  uint8_t* codes;
  i64 Cp;
  int act;
  const float* m;
  bool per_channel;
  float lo, hi;
  int zp;

  // Returns the first channel of the packed block at column `first`.
  i64 channel(i64 first) const { return gates ? (first / BLOCK % 2 ? gates : 0) + first / (2 * BLOCK) * BLOCK : first; }

  // Returns the number of columns of a work item, close to `wanted`.
  i64 stripe(i64 wanted) const { return gates ? std::max<i64>(2 * BLOCK, wanted / (2 * BLOCK) * (2 * BLOCK)) : wanted; }

  // Takes the sums of the block at `first`, within the columns [left, right) of one pixel. `room` holds the floats of these
  // columns.
  void block(const int32_t* acc, int nb, i64 n, i64 pixel, i64 first, i64 left, i64 right, float* room) const {
    i64 from = channel(first), at = first - left;
    if (out)
      finish_row(acc, nb, e, n, pixel, from, Co, out + pixel * Co + from);
    else
      finish_row(acc, nb, e, n, pixel, from, Co,
                 room + (gates ? at / (2 * BLOCK) * BLOCK + (at / BLOCK % 2 ? (right - left) / 2 : 0) : at));
  }

  // Finishes the columns [left, right) after their last block.
  void row(i64 pixel, i64 left, i64 right, const float* room) const {
    if (out) return;
    const i64 from = gates ? left / 2 : left, count = gates ? (right - left) / 2 : std::min(right, Co) - left;
    uint8_t* dst = codes + pixel * Cp;
    const float* multiplier = per_channel ? m + from : m;
    if (gates)
      geglu_row(room, room + count, dst + from, count, multiplier, per_channel, lo, hi, zp);
    else
      row_fn(act, false, per_channel)(room, dst + from, count, nullptr, nullptr, multiplier, lo, hi, zp);
    const i64 end = gates ? gates : Co;
    if (from + count == end) std::memset(dst + end, zp, size_t(Cp - end));
  }
};

// Multiplies rows [rows, K] of unsigned bytes with packed columns. Writes the sums to c.
inline void multiply_rows(const uint8_t* a, i64 lda, i64 rows, const int8_t* packed, const int32_t* starts, i64 columns,
                          i64 quads, int32_t* c, i64 ldc, i64 group) {
  i64 padded = (columns + 15) / 16 * 16;
  for (i64 first = 0; first < padded; first += BLOCK)
    for (i64 r = 0; r < rows; r += ROWS) {
      int m = int(std::min<i64>(ROWS, rows - r));
      const uint8_t* row[ROWS];
      for (int i = 0; i < m; ++i) row[i] = a + (r + i) * lda;
#if defined(__AVX512VNNI__)
      int nb = int(std::min<i64>(BLOCK, padded - first) / LANES);
      TILES[m - 1][nb - 1](row, 0, quads, packed + first * quads * 4, starts + first, 0, c + r * ldc + first, ldc, 0);
#else
      const i64 tap = 0;
      TILES[m - 1](row, &tap, 1, quads, packed + first * quads * 4, starts + first, c + r * ldc + first, ldc, group);
#endif
    }
}

// Returns how many pairs of products of codes up to `largest` with weights up to `weight` fit 16 bits.
inline i64 pairs_in_16_bits(i64 largest, i64 weight) { return weight ? 32767 / (2 * largest * weight) : 1 << 20; }

}  // namespace
#endif  // DQ_PRODUCTS
