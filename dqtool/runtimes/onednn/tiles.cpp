// Tiles of accumulators, the part of the int8 products that depends on the instruction set. After kernels.cpp, one unit with it.
//
// A packed weight is cut into blocks of BLOCK columns, [block][tap][channels / 4][columns][4]. With AVX512-VNNI one instruction
// multiplies and sums four bytes into 32 bits. AVX2 sums pairs of products in 16 bits, which saturate: `group` says how many
// such pairs fit there for the codes at hand (0: not even one), so that every sum is exact.
#if defined(__AVX512VNNI__) || defined(__AVX2__)
#define DQ_PRODUCTS 1
namespace {

struct Epilogue {  // y = (acc * scale + bias + residual) * post
  const float* scale;
  float input_scale;
  const float* bias;
  i64 bias_stride;  // 0: one bias for all samples
  const float* residual;
  float post;
};

#if defined(__AVX512VNNI__)

constexpr int LANES = 16, ROWS = 6, BLOCK = 64;  // a tile of accumulators: 6 rows x 4 registers of 16 columns

// One tile: c[i][j] = start[i][j] + sum over channels of row i (unsigned, `a[i] + offset`) times the packed block b (signed).
// `start_stride` 0 gives all rows the same start. Weights `ahead` bytes further on are fetched meanwhile. Never inlined: in a larger function the accumulators lose their registers.
template <int M, int NB>
__attribute__((noinline)) void tile(const uint8_t* const* a, i64 offset, i64 quads, const int8_t* b, const int32_t* start,
                                    i64 start_stride, int32_t* c, i64 stride, i64 ahead, i64) {
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

using Tile = void (*)(const uint8_t* const*, i64, i64, const int8_t*, const int32_t*, i64, int32_t*, i64, i64, i64);

constexpr Tile TILES[ROWS][4] = {
    {tile<1, 1>, tile<1, 2>, tile<1, 3>, tile<1, 4>}, {tile<2, 1>, tile<2, 2>, tile<2, 3>, tile<2, 4>},
    {tile<3, 1>, tile<3, 2>, tile<3, 3>, tile<3, 4>}, {tile<4, 1>, tile<4, 2>, tile<4, 3>, tile<4, 4>},
    {tile<5, 1>, tile<5, 2>, tile<5, 3>, tile<5, 4>}, {tile<6, 1>, tile<6, 2>, tile<6, 3>, tile<6, 4>}};

inline __mmask16 tail(i64 left) {
  return left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
}

inline void finish(__m512 acc, const Epilogue& e, i64 n, i64 pixel, i64 channel, i64 Co, float* out, __mmask16 mask) {
  __m512 s = _mm512_mul_ps(_mm512_set1_ps(e.input_scale), _mm512_maskz_loadu_ps(mask, e.scale + channel));
  __m512 y;
  if (e.bias)
    y = _mm512_fmadd_ps(acc, s, _mm512_maskz_loadu_ps(mask, e.bias + n * e.bias_stride + channel));
  else
    y = _mm512_mul_ps(acc, s);
  if (e.residual) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, e.residual + pixel * Co + channel));
  if (e.post != 1.0f) y = _mm512_mul_ps(y, _mm512_set1_ps(e.post));
  _mm512_mask_storeu_ps(out + pixel * Co + channel, mask, y);
}

// One row of finished accumulators, 16 columns at a time.
inline void finish_row(const int32_t* acc, int nb, const Epilogue& e, i64 n, i64 pixel, i64 first, i64 Co, float* out) {
  for (int j = 0; j < nb; ++j)
    finish(_mm512_cvtepi32_ps(_mm512_load_si512(acc + j * 16)), e, n, pixel, first + j * 16, Co, out, tail(Co - first - j * 16));
}

#else  // AVX2

constexpr int LANES = 8, ROWS = 6, BLOCK = 16;  // a tile of accumulators: 6 rows x 2 registers of 8 columns

// One tile: c[i][j] = start[i][j] + sum over channels of row i (unsigned, `a[i] + offset`) times the packed block b (signed).
// `start_stride` 0 gives all rows the same start. Three forms of the same sums, by how many fit 16 bits.
template <int M, int NB>
__attribute__((noinline)) void tile_nested(const uint8_t* const* a, i64 offset, i64 quads, const int8_t* b,
                                           const int32_t* start, i64 start_stride, int32_t* c, i64 stride, i64 group) {
  const uint8_t* row[M];
  for (int i = 0; i < M; ++i) {
    row[i] = a[i] + offset;
    for (int j = 0; j < NB; ++j)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(c + i * stride + j * 8),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start + i * start_stride + j * 8)));
  }
  const __m256i ones = _mm256_set1_epi16(1);
  for (i64 from = 0; from < quads; from += group) {
    i64 to = std::min(quads, from + group);
    __m256i acc[M][NB];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < NB; ++j) acc[i][j] = _mm256_setzero_si256();
    for (i64 k = from; k < to; ++k) {
      __m256i w[NB];
#pragma GCC unroll 2
      for (int j = 0; j < NB; ++j) w[j] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + j * 32));
      b += NB * 32;
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        int32_t quad;
        std::memcpy(&quad, row[i] + 4 * k, 4);
        __m256i x = _mm256_set1_epi32(quad);
#pragma GCC unroll 2
        for (int j = 0; j < NB; ++j) acc[i][j] = _mm256_add_epi16(acc[i][j], _mm256_maddubs_epi16(x, w[j]));
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < NB; ++j) {
        __m256i* sum = reinterpret_cast<__m256i*>(c + i * stride + j * 8);
        _mm256_storeu_si256(sum, _mm256_add_epi32(_mm256_loadu_si256(sum), _mm256_madd_epi16(acc[i][j], ones)));
      }
  }
}

// Every pair is widened at once: fewer than four fit 16 bits.
template <int M, int NB>
__attribute__((noinline)) void tile_single(const uint8_t* const* a, i64 offset, i64 quads, const int8_t* b,
                                           const int32_t* start, i64 start_stride, int32_t* c, i64 stride) {
  const uint8_t* row[M];
  __m256i acc[M][NB];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    row[i] = a[i] + offset;
#pragma GCC unroll 2
    for (int j = 0; j < NB; ++j)
      acc[i][j] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start + i * start_stride + j * 8));
  }
  const __m256i ones = _mm256_set1_epi16(1);
  for (i64 k = 0; k < quads; ++k) {
    __m256i w[NB];
#pragma GCC unroll 2
    for (int j = 0; j < NB; ++j) w[j] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + j * 32));
    b += NB * 32;
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      int32_t quad;
      std::memcpy(&quad, row[i] + 4 * k, 4);
      __m256i x = _mm256_set1_epi32(quad);
#pragma GCC unroll 2
      for (int j = 0; j < NB; ++j)
        acc[i][j] = _mm256_add_epi32(acc[i][j], _mm256_madd_epi16(_mm256_maddubs_epi16(x, w[j]), ones));
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NB; ++j) _mm256_storeu_si256(reinterpret_cast<__m256i*>(c + i * stride + j * 8), acc[i][j]);
}

// Both operands as 16-bit numbers, even and odd bytes apart: any codes.
template <int M, int NB>
__attribute__((noinline)) void tile_wide(const uint8_t* const* a, i64 offset, i64 quads, const int8_t* b,
                                         const int32_t* start, i64 start_stride, int32_t* c, i64 stride) {
  const __m256i low = _mm256_set1_epi16(0xff);
  for (int j = 0; j < NB; ++j) {
    __m256i acc[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
      acc[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start + i * start_stride + j * 8));
    for (i64 k = 0; k < quads; ++k) {
      __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + (k * NB + j) * 32));
      __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), odd = _mm256_srai_epi16(w, 8);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        int32_t quad;
        std::memcpy(&quad, a[i] + offset + 4 * k, 4);
        __m256i x = _mm256_set1_epi32(quad);
        __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(_mm256_and_si256(x, low), even),
                                       _mm256_madd_epi16(_mm256_srli_epi16(x, 8), odd));
        acc[i] = _mm256_add_epi32(acc[i], sum);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(c + i * stride + j * 8), acc[i]);
  }
}

template <int M, int NB>
void tile(const uint8_t* const* a, i64 offset, i64 quads, const int8_t* b, const int32_t* start, i64 start_stride,
          int32_t* c, i64 stride, i64, i64 group) {
  if (group >= 4)
    tile_nested<M, NB>(a, offset, quads, b, start, start_stride, c, stride, group);
  else if (group > 0)
    tile_single<M, NB>(a, offset, quads, b, start, start_stride, c, stride);
  else
    tile_wide<M, NB>(a, offset, quads, b, start, start_stride, c, stride);
}

using Tile = void (*)(const uint8_t* const*, i64, i64, const int8_t*, const int32_t*, i64, int32_t*, i64, i64, i64);

// Columns come in sixteens, so a block is always two registers wide.
constexpr Tile TILES[ROWS][2] = {{nullptr, tile<1, 2>}, {nullptr, tile<2, 2>}, {nullptr, tile<3, 2>},
                                 {nullptr, tile<4, 2>}, {nullptr, tile<5, 2>}, {nullptr, tile<6, 2>}};

// One row of finished accumulators, 8 columns at a time.
inline void finish_row(const int32_t* acc, int nb, const Epilogue& e, i64 n, i64 pixel, i64 first, i64 Co, float* out) {
  for (int j = 0; j < nb; ++j) {
    i64 channel = first + j * 8, left = Co - channel;
    if (left <= 0) return;
    __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(std::min<i64>(left, 8))), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256 s = _mm256_mul_ps(_mm256_set1_ps(e.input_scale), _mm256_maskload_ps(e.scale + channel, mask));
    __m256 y = _mm256_cvtepi32_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(acc + j * 8)));
    y = e.bias ? _mm256_fmadd_ps(y, s, _mm256_maskload_ps(e.bias + n * e.bias_stride + channel, mask)) : _mm256_mul_ps(y, s);
    if (e.residual) y = _mm256_add_ps(y, _mm256_maskload_ps(e.residual + pixel * Co + channel, mask));
    if (e.post != 1.0f) y = _mm256_mul_ps(y, _mm256_set1_ps(e.post));
    _mm256_maskstore_ps(out + pixel * Co + channel, mask, y);
  }
}

#endif

// How many pairs of products of codes up to `largest` with weights up to `weight` fit 16 bits.
inline i64 pairs_in_16_bits(i64 largest, i64 weight) { return weight ? 32767 / (2 * largest * weight) : 1 << 20; }

}  // namespace
#endif  // DQ_PRODUCTS
