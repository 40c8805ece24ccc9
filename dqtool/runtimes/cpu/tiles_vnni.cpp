// Tiles of accumulators on AVX512-VNNI: one instruction multiplies four bytes and adds the products into 32 bits. Compiled
// after tiles.cpp, in the same translation unit.
#if defined(__AVX512VNNI__)
namespace {

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

// Returns the bytes of a code in the rows that tiles read.
inline i64 code_bytes(i64) { return 1; }
inline void widen_codes(const uint8_t*, i64, uint8_t*) {}

// Adds up all taps of one tile of `m` rows and `nb` registers of columns.
inline void tile_taps(int m, int nb, const uint8_t* const* rows, const i64* taps, int n_taps, i64 quads, const int8_t* block,
                      const int32_t* start, int32_t* acc, i64 stride, i64 ahead, i64) {
  Tile run = TILES[m - 1][nb - 1];
  const i64 slice = quads * 4 * nb * LANES;
  run(rows, taps[0], quads, block, start, 0, acc, stride, ahead);
  for (int t = 1; t < n_taps; ++t) run(rows, taps[t], quads, block + t * slice, acc, stride, acc, stride, ahead);
}

// Finishes `count` rows of a block, from `first` on, `nb` registers of columns. PLAIN: there is no gate and no factor.
template <bool PLAIN>
void finish_block(const int32_t* acc, int count, int nb, const Epilogue& e, const i64* samples, const i64* pixels, i64 first,
                  i64 Co, Place to) {
  for (int j = 0; j < nb; ++j, first += 16, acc += 16, to.base += 16) {
    const __mmask16 mask = tail(Co - first);
    const __m512 s = _mm512_mul_ps(_mm512_set1_ps(e.input_scale), _mm512_maskz_loadu_ps(mask, e.scale + first));
    __m512 bias = _mm512_setzero_ps();
    if (e.bias) bias = _mm512_maskz_loadu_ps(mask, e.bias + first);
    for (int i = 0; i < count; ++i) {
      const i64 n = samples[i], pixel = pixels[i];
      if (pixel < 0) continue;
      __m512 y = _mm512_cvtepi32_ps(_mm512_load_si512(acc + i * BLOCK));
      if (e.bias_stride) bias = _mm512_maskz_loadu_ps(mask, e.bias + n * e.bias_stride + first);
      y = e.bias ? _mm512_fmadd_ps(y, s, bias) : _mm512_mul_ps(y, s);
      if constexpr (!PLAIN)
        if (e.gate) y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(mask, e.gate + n * e.gate_stride + first));
      if (e.residual) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, e.residual + pixel * Co + first));
      if constexpr (!PLAIN) y = _mm512_mul_ps(y, _mm512_set1_ps(e.post));
      _mm512_mask_storeu_ps(to.row(i, pixel), mask, y);
    }
  }
}

}  // namespace
#endif
