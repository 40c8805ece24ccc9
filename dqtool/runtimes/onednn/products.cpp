// int8 products on AVX512-VNNI: implicit-GEMM convolution, Winograd convolution of 4-bit codes, fused attention.
// One translation unit with kernels.cpp, after it.
#ifdef __AVX512VNNI__
namespace {

constexpr int ROWS = 6, BLOCK = 64;  // a tile of accumulators: 6 rows x 4 registers of 16 columns

struct Epilogue {  // y = (acc * scale + bias + residual) * post
  const float* scale;
  float input_scale;
  const float* bias;
  i64 bias_stride;  // 0: one bias for all samples
  const float* residual;
  float post;
};

// One tile: c[i][j] = start[i][j] + sum over channels of row i (unsigned, `a[i] + offset`) times the packed block b (signed).
// `start_stride` 0 gives all rows the same start. Weights `ahead` bytes further on are fetched meanwhile. Never inlined: in a larger function the accumulators lose their registers.
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

}  // namespace

// Bytes of a packed weight.
EXPORT i64 dq_packed_bytes(i64 Co, i64 Ci, i64 taps) { return (Co + 15) / 16 * 16 * ((Ci + 3) / 4 * 4) * taps; }

// w [Co, Ci, taps] int8 to blocks of 64 columns, [block][tap][Ci / 4][columns][4]; sums[Co rounded up to 16].
EXPORT void dq_pack(const int8_t* w, int8_t* packed, int32_t* sums, i64 Co, i64 Ci, i64 taps) {
  i64 quads = (Ci + 3) / 4, Cop = (Co + 15) / 16 * 16;
  std::memset(sums, 0, Cop * sizeof(int32_t));
#pragma omp parallel for schedule(static)
  for (i64 blk = 0; blk < (Cop + BLOCK - 1) / BLOCK; ++blk) {
    i64 from = blk * BLOCK, width = std::min<i64>(BLOCK, Cop - from);
    int8_t* dst = packed + from * quads * 4 * taps;
    for (i64 t = 0; t < taps; ++t)
      for (i64 q = 0; q < quads; ++q)
        for (i64 j = 0; j < width; ++j)
          for (i64 r = 0; r < 4; ++r) {
            i64 co = from + j, ci = q * 4 + r;
            int8_t v = co < Co && ci < Ci ? w[(co * Ci + ci) * taps + t] : 0;
            *dst++ = v;
            sums[co] += v;
          }
  }
}

// Convolution of padded codes [N, Hp, Wp, Cp] with a packed weight; float32 out [N, Ho, Wo, Co]. A linear layer is a
// convolution with N = 1, Hp = 1, Wp = rows.
EXPORT void dq_conv(const uint8_t* in, const int8_t* w, const int32_t* sums, int zp, i64 N, i64 Hp, i64 Wp, i64 Cp,
                    i64 Ho, i64 Wo, i64 Co, i64 kh, i64 kw, i64 sy, i64 sx, i64 dy, i64 dx, const float* scale,
                    float input_scale, const float* bias, i64 bias_stride, i64 bias_pixels, const float* residual, float post, float* out) {
  Epilogue e{scale, input_scale, bias, bias_stride, residual, post};
  i64 pixels = N * Ho * Wo, quads = Cp / 4, Cop = (Co + 15) / 16 * 16, blocks = (Cop + BLOCK - 1) / BLOCK;
  int n_taps = int(kh * kw);
  std::vector<i64> taps(n_taps);
  for (i64 r = 0; r < kh; ++r)
    for (i64 s = 0; s < kw; ++s) taps[r * kw + s] = (r * dy * Wp + s * dx) * Cp;
  // Work is cut into (pixels x 64 columns); runs of pixels keep a block of weights in cache.
  int threads = omp_get_max_threads();
  i64 run = std::max<i64>(ROWS, std::min<i64>(96, (pixels * blocks / (4 * threads) / ROWS + 1) * ROWS));
  if (n_taps == 1) run = std::min<i64>(run, 48);
  i64 runs = (pixels + run - 1) / run;
  i64 image = Ho * Wo;
  bool parallel = pixels * Cop * Cp * n_taps > 200000;
#pragma omp parallel for schedule(dynamic, 1) if (parallel)
  for (i64 item = 0; item < runs * blocks; ++item) {
    // Neighbouring items share pixels when weights fit the cache, else weights.
    i64 blk = item % blocks, from = item / blocks * run;
    i64 first = blk * BLOCK;
    int nb = int(std::min<i64>(4, (Cop - first) / 16));
    const int8_t* block = w + first * Cp * n_taps;
    i64 to = std::min(pixels, from + run);
    alignas(64) int32_t start[BLOCK];
    for (int j = 0; j < nb * 16; ++j) start[j] = -zp * sums[first + j];
    i64 n = from / image, y = from % image / Wo, x = from % Wo;
    for (i64 p = from; p < to; p += ROWS) {
      int m = int(std::min<i64>(ROWS, to - p));
      const uint8_t* rows[ROWS];
      i64 sample[ROWS];
      for (int i = 0; i < m; ++i) {
        rows[i] = in + ((n * Hp + y * sy) * Wp + x * sx) * Cp;
        sample[i] = bias_pixels ? (p + i) / bias_pixels : n;
        if (++x == Wo) {
          x = 0;
          if (++y == Ho) y = 0, ++n;
        }
      }
      alignas(64) int32_t acc[ROWS * BLOCK];
      Tile run_tile = TILES[m - 1][nb - 1];
      i64 slice = Cp * nb * 16, ahead = p == from ? slice : 0;
      run_tile(rows, taps[0], quads, block, start, 0, acc, BLOCK, ahead);
      for (int t = 1; t < n_taps; ++t) run_tile(rows, taps[t], quads, block + t * slice, acc, BLOCK, acc, BLOCK, ahead);
      for (int i = 0; i < m; ++i)
        for (int j = 0; j < nb; ++j)
          finish(_mm512_cvtepi32_ps(_mm512_load_si512(acc + i * BLOCK + j * 16)), e, sample[i], p + i, first + j * 16, Co,
                 out, tail(Co - first - j * 16));
    }
  }
}

// Winograd F(2x2, 3x3) on integers: U = (2G) w (2G)^T, V = B^T d B, 4 y = A^T (U V) A, all exact. Needs U in int8
// (returns 0 where it is not) and |V| <= 127, that is, codes of at most 5 bits.
EXPORT int dq_winograd_pack(const int8_t* w, int8_t* packed, int32_t* starts, i64 Co, i64 Ci) {
  i64 quads = (Ci + 3) / 4, Cop = (Co + 15) / 16 * 16;
  std::memset(starts, 0, 16 * Cop * sizeof(int32_t));
  std::memset(packed, 0, 16 * Cop * quads * 4);
  int ok = 1;
#pragma omp parallel for schedule(static) reduction(min : ok)
  for (i64 co = 0; co < Co; ++co) {
    i64 blk = co / BLOCK, first = blk * BLOCK, width = std::min<i64>(BLOCK, Cop - first), j = co - first;
    int8_t* base = packed + first * 16 * quads * 4;
    for (i64 ci = 0; ci < Ci; ++ci) {
      const int8_t* k = w + (co * Ci + ci) * 9;
      int half[4][3], u[4][4];
      for (int s = 0; s < 3; ++s) {
        int g0 = k[s], g1 = k[3 + s], g2 = k[6 + s];
        half[0][s] = 2 * g0, half[1][s] = g0 + g1 + g2, half[2][s] = g0 - g1 + g2, half[3][s] = 2 * g2;
      }
      for (int r = 0; r < 4; ++r) {
        int g0 = half[r][0], g1 = half[r][1], g2 = half[r][2];
        u[r][0] = 2 * g0, u[r][1] = g0 + g1 + g2, u[r][2] = g0 - g1 + g2, u[r][3] = 2 * g2;
      }
      for (int x = 0; x < 16; ++x) {
        int v = u[x / 4][x % 4];
        if (v < -128 || v > 127) ok = 0;
        base[((x * quads + ci / 4) * width + j) * 4 + ci % 4] = static_cast<int8_t>(v);
        starts[first * 16 + x * width + j] -= 128 * v;
      }
    }
  }
  return ok;
}

namespace {

// V = B^T d B of one 4x4 tile of codes (u = c + 128), for all channels: v[x * stride + c] = V + 128.
inline void transform_input(const uint8_t* in, i64 Wp, i64 Cp, uint8_t* v, i64 stride) {
  const __m512i flip = _mm512_set1_epi8(char(0x80));
  for (i64 c = 0; c < Cp; c += 64) {
    __mmask64 mask = Cp - c >= 64 ? ~0ull : (1ull << (Cp - c)) - 1;
    __m512i t[4][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      __m512i d[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) d[r] = _mm512_maskz_loadu_epi8(mask, in + (r * Wp + x) * Cp + c);
      t[0][x] = _mm512_sub_epi8(d[0], d[2]);
      t[1][x] = _mm512_add_epi8(d[1], d[2]);  // twice the offset 128: none, modulo 256
      t[2][x] = _mm512_sub_epi8(d[2], d[1]);
      t[3][x] = _mm512_sub_epi8(d[1], d[3]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      __m512i y[4] = {_mm512_sub_epi8(t[r][0], t[r][2]), _mm512_add_epi8(t[r][1], t[r][2]),
                      _mm512_sub_epi8(t[r][2], t[r][1]), _mm512_sub_epi8(t[r][1], t[r][3])};
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x)
        _mm512_mask_storeu_epi8(v + (r * 4 + x) * stride + c, mask, _mm512_xor_si512(y[x], flip));
    }
  }
}

}  // namespace

// 3x3 convolution, stride 1, of codes with zp 128, padded so that Hp >= 2 ceil(Ho / 2) + 2 (and so for the width).
EXPORT void dq_winograd(const uint8_t* in, const int8_t* w, const int32_t* starts, i64 N, i64 Hp, i64 Wp, i64 Cp, i64 Ho,
                        i64 Wo, i64 Co, const float* scale, float input_scale, const float* bias, i64 bias_stride,
                        const float* residual, float post, float* out) {
  Epilogue e{scale, input_scale * 0.25f, bias, bias_stride, residual, post};
  i64 rows = (Ho + 1) / 2, cols = (Wo + 1) / 2, tiles = N * rows * cols;
  i64 quads = Cp / 4, Cop = (Co + 15) / 16 * 16, blocks = (Cop + BLOCK - 1) / BLOCK;
  int threads = omp_get_max_threads();
  i64 most = std::max<i64>(2 * ROWS, std::min<i64>(48, 448 * 1024 / (16 * Cp) / ROWS * ROWS));
  bool by_columns = tiles < 2 * ROWS * threads && blocks > 1;
  i64 share = by_columns ? tiles : (tiles + threads - 1) / threads;
  i64 passes = std::max<i64>(1, (share + most - 1) / most);
  i64 size = ((share + passes - 1) / passes + ROWS - 1) / ROWS * ROWS;
  i64 groups = (tiles + size - 1) / size;
  i64 splits = by_columns ? std::min<i64>(blocks, threads) : 1;
#pragma omp parallel for schedule(dynamic, 1) collapse(2)
  for (i64 group = 0; group < groups; ++group)
    for (i64 split = 0; split < splits; ++split) {
      i64 from = group * size, count = std::min(tiles - from, size), stride = size * Cp;
      uint8_t* v = scratch_a.get<uint8_t>(16 * stride);
      int32_t* m = scratch_b.get<int32_t>(16 * size * BLOCK);
      for (i64 t = 0; t < count; ++t) {
        i64 q = from + t, n = q / (rows * cols), y = q % (rows * cols) / cols, x = q % cols;
        transform_input(in + ((n * Hp + 2 * y) * Wp + 2 * x) * Cp, Wp, Cp, v + t * Cp, stride);
      }
      for (i64 blk = split; blk < blocks; blk += splits) {
        i64 first = blk * BLOCK, width = std::min<i64>(BLOCK, Cop - first);
        int nb = int(width / 16);
        for (int x = 0; x < 16; ++x) {
          const int8_t* block = w + first * 16 * Cp + x * Cp * width;
          const int32_t* start = starts + first * 16 + x * width;
          for (i64 t = 0; t < count; t += ROWS) {
            int left = int(std::min<i64>(ROWS, count - t));
            const uint8_t* a[ROWS];
            for (int i = 0; i < left; ++i) a[i] = v + x * stride + (t + i) * Cp;
            // The first tile fetches the next transform's weights: they come from memory, and each is needed once per group.
            TILES[left - 1][nb - 1](a, 0, quads, block, start, 0, m + (x * size + t) * BLOCK, BLOCK, t ? 0 : Cp * width);
          }
        }
        for (i64 t = 0; t < count; ++t) {
          i64 q = from + t, n = q / (rows * cols), y = q % (rows * cols) / cols, x = q % cols;
          for (int j = 0; j < nb; ++j) {
            const int32_t* src = m + t * BLOCK + j * 16;
            __m512i s[2][4];
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c) {
              __m512i r0 = _mm512_load_si512(src + (0 + c) * size * BLOCK), r1 = _mm512_load_si512(src + (4 + c) * size * BLOCK);
              __m512i r2 = _mm512_load_si512(src + (8 + c) * size * BLOCK), r3 = _mm512_load_si512(src + (12 + c) * size * BLOCK);
              s[0][c] = _mm512_add_epi32(_mm512_add_epi32(r0, r1), r2);
              s[1][c] = _mm512_sub_epi32(_mm512_sub_epi32(r1, r2), r3);
            }
            __mmask16 mask = tail(Co - first - j * 16);
#pragma GCC unroll 2
            for (int r = 0; r < 2; ++r) {
              if (2 * y + r >= Ho) continue;
              __m512i left = _mm512_add_epi32(_mm512_add_epi32(s[r][0], s[r][1]), s[r][2]);
              __m512i right = _mm512_sub_epi32(_mm512_sub_epi32(s[r][1], s[r][2]), s[r][3]);
              i64 pixel = (n * Ho + 2 * y + r) * Wo + 2 * x;
              finish(_mm512_cvtepi32_ps(left), e, n, pixel, first + j * 16, Co, out, mask);
              if (2 * x + 1 < Wo) finish(_mm512_cvtepi32_ps(right), e, n, pixel + 1, first + j * 16, Co, out, mask);
            }
          }
        }
      }
    }
}
namespace {

inline __m512i signed_codes(const float* x, __mmask16 mask, float m, float lo, float hi) {
  __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x), _mm512_set1_ps(m));
  y = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  y = _mm512_min_ps(_mm512_max_ps(y, _mm512_set1_ps(lo)), _mm512_set1_ps(hi));
  return _mm512_maskz_cvtps_epi32(mask, y);
}

// One block of columns (`live` of `width`) of a right-hand operand as signed codes in the layout of a packed weight,
// [K / 4][columns][4]; starts = -zp * (sums over K). Rows of x are the columns here (k: x is [columns, K]).
void pack_rows(const float* x, i64 stride, i64 K, i64 live, i64 width, float m, float lo, float hi, int zp, int8_t* block,
               int32_t* starts) {
  i64 quads = (K + 3) / 4;
  int32_t* words = reinterpret_cast<int32_t*>(block);
  alignas(64) int32_t row[4];
  for (i64 j = 0; j < width; ++j) {
    __m512i sum = _mm512_setzero_si512();
    for (i64 k = 0; k < K; k += 16) {
      i64 here = std::min<i64>(4, quads - k / 4);
      __m512i c = _mm512_setzero_si512();
      if (j < live) c = signed_codes(x + j * stride + k, tail(K - k), m, lo, hi);
      sum = _mm512_add_epi32(sum, c);
      _mm_store_si128(reinterpret_cast<__m128i*>(row), _mm512_cvtepi32_epi8(c));
      for (i64 q = 0; q < here; ++q) words[(k / 4 + q) * width + j] = row[q];
    }
    starts[j] = -zp * _mm512_reduce_add_epi32(sum);
  }
}

// The same for x [K, columns] (v).
void pack_columns(const float* x, i64 stride, i64 K, i64 live, i64 width, float m, float lo, float hi, int zp,
                  int8_t* block, int32_t* starts) {
  const __m512i byte = _mm512_set1_epi32(0xff);
  for (i64 j = 0; j < width; j += 16) {
    __mmask16 mask = tail(live - j);
    __m512i sum = _mm512_setzero_si512();
    for (i64 k = 0; k < K; k += 4) {
      __m512i word = _mm512_setzero_si512();
      for (i64 r = 0; r < std::min<i64>(4, K - k); ++r) {
        __m512i c = signed_codes(x + (k + r) * stride + j, mask, m, lo, hi);
        sum = _mm512_add_epi32(sum, c);
        word = _mm512_or_si512(word, _mm512_sllv_epi32(_mm512_and_si512(c, byte), _mm512_set1_epi32(int(8 * r))));
      }
      _mm512_storeu_si512(block + (k / 4 * width + j) * 4, word);
    }
    _mm512_storeu_si512(starts + j, _mm512_mullo_epi32(sum, _mm512_set1_epi32(-zp)));
  }
}

void multiply_rows(const uint8_t* a, i64 lda, i64 rows, const int8_t* packed, const int32_t* starts, i64 columns, i64 quads,
                   int32_t* c, i64 ldc) {
  i64 padded = (columns + 15) / 16 * 16;
  for (i64 first = 0; first < padded; first += BLOCK) {
    int nb = int(std::min<i64>(4, (padded - first) / 16));
    for (i64 r = 0; r < rows; r += ROWS) {
      int m = int(std::min<i64>(ROWS, rows - r));
      const uint8_t* row[ROWS];
      for (int i = 0; i < m; ++i) row[i] = a + (r + i) * lda;
      TILES[m - 1][nb - 1](row, 0, quads, packed + first * quads * 4, starts + first, 0, c + r * ldc + first, ldc, 0);
    }
  }
}

}  // namespace

// Both attention products on codes, and the softmax between them. q, k, v: [N, H, S, D] floats with strides (sample, head,
// position), channels contiguous. tables: 4 x 3 x H floats, (m, lo, hi) of q, k, v, probs; scores = acc * score_scale[h] (+ mask), out = acc *
// out_scale[h], [N, Sq, H D]. probs have zero point 0. mask: additive with strides for sample, head, query; or null.
EXPORT void dq_attention(const float* q, const i64* q_strides, const float* k, const i64* k_strides, const float* v,
                         const i64* v_strides, i64 N, i64 H, i64 Sq, i64 Sk, i64 D, const float* tables,
                         const float* score_scale, const float* out_scale, const float* mask, i64 mask_n, i64 mask_h,
                         i64 mask_q, float* out) {
  i64 Dp = (D + 3) / 4 * 4, Dc = (D + 15) / 16 * 16, Sp = (Sk + 3) / 4 * 4, Sc = (Sk + 15) / 16 * 16;
  i64 k_bytes = Sc * Dp, v_bytes = Dc * Sp;
  std::unique_ptr<int8_t[]> packed(new int8_t[N * H * (k_bytes + v_bytes)]);
  std::vector<int32_t> starts(N * H * (Sc + Dc));
  const float *tq = tables, *tk = tables + 3 * H, *tv = tables + 6 * H, *tp = tables + 9 * H;
  i64 k_blocks = (Sc + BLOCK - 1) / BLOCK, v_blocks = (Dc + BLOCK - 1) / BLOCK, per_head = k_blocks + v_blocks;
#pragma omp parallel for schedule(static) if (Sk * D * N * H > 16384)
  for (i64 i = 0; i < N * H * per_head; ++i) {
    i64 nh = i / per_head, n = nh / H, h = nh % H, blk = i % per_head;
    int8_t* dst = packed.get() + nh * (k_bytes + v_bytes);
    int32_t* start = starts.data() + nh * (Sc + Dc);
    if (blk < k_blocks) {
      i64 first = blk * BLOCK, width = std::min<i64>(BLOCK, Sc - first);
      pack_rows(k + n * k_strides[0] + h * k_strides[1] + first * k_strides[2], k_strides[2], D,
                std::min(width, Sk - first), width, tk[h], tk[H + h], tk[2 * H + h], 128, dst + first * Dp, start + first);
    } else {
      i64 first = (blk - k_blocks) * BLOCK, width = std::min<i64>(BLOCK, Dc - first);
      pack_columns(v + n * v_strides[0] + h * v_strides[1] + first, v_strides[2], Sk, std::min(width, D - first), width,
                   tv[h], tv[H + h], tv[2 * H + h], 0, dst + k_bytes + first * Sp, start + Sc + first);
    }
  }
  i64 rows = std::max<i64>(ROWS, std::min<i64>(24, 262144 / (Sc * 5) / ROWS * ROWS));
  i64 runs = (Sq + rows - 1) / rows;
#pragma omp parallel for schedule(dynamic, 1) if (Sq * Sk * D * N * H > 100000)
  for (i64 item = 0; item < N * H * runs; ++item) {
    i64 nh = item / runs, n = nh / H, h = nh % H, from = item % runs * rows, count = std::min(rows, Sq - from);
    uint8_t* codes = scratch_a.get<uint8_t>(rows * (Dp + Sp));
    uint8_t* probs = codes + rows * Dp;
    int32_t* scores = scratch_b.get<int32_t>(rows * (Sc + Dc));
    int32_t* result = scores + rows * Sc;
    const int8_t* keys = packed.get() + nh * (k_bytes + v_bytes);
    const int32_t* start = starts.data() + nh * (Sc + Dc);
    for (i64 r = 0; r < count; ++r) {
      uint8_t* row = codes + r * Dp;
      quantize_row<NONE, false, false>(q + n * q_strides[0] + h * q_strides[1] + (from + r) * q_strides[2], row, D, nullptr,
                                       nullptr, tq + h, tq[H + h], tq[2 * H + h], 128);
      for (i64 d = D; d < Dp; ++d) row[d] = 128;
    }
    multiply_rows(codes, Dp, count, keys, start, Sk, Dp / 4, scores, Sc);
    float scale = score_scale[h], m = tp[h], lo = tp[H + h], hi = tp[2 * H + h];
    for (i64 r = 0; r < count; ++r) {
      float* s = reinterpret_cast<float*>(scores + r * Sc);
      const float* add = mask ? mask + n * mask_n + h * mask_h + (from + r) * mask_q : nullptr;
      for (i64 j = 0; j < Sc; j += 16) {
        __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(s + j)), _mm512_set1_ps(scale));
        if (add) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(tail(Sk - j), add + j));
        _mm512_storeu_ps(s + j, y);
      }
      float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
      for (i64 j = 0; j < Sk; ++j) top = std::max(top, s[j]);
#pragma omp simd reduction(+ : sum)
      for (i64 j = 0; j < Sk; ++j) {
        s[j] = exp_(s[j] - top);
        sum += s[j];
      }
      float inverse = 1.0f / sum;
      uint8_t* row = probs + r * Sp;
#pragma omp simd
      for (i64 j = 0; j < Sk; ++j) row[j] = code(s[j] * inverse * m, lo, hi, 0);
      for (i64 j = Sk; j < Sp; ++j) row[j] = 0;
    }
    multiply_rows(probs, Sp, count, keys + k_bytes, start + Sc, D, Sp / 4, result, Dc);
    for (i64 r = 0; r < count; ++r) {
      float* row = out + ((n * Sq + from + r) * H + h) * D;
      for (i64 d = 0; d < D; ++d) row[d] = float(result[r * Dc + d]) * out_scale[h];
    }
  }
}
#endif  // __AVX512VNNI__
