// Winograd convolutions on integers. Compiled after kernels.cpp, tiles.cpp and products.cpp, in the same translation unit.
#ifdef __AVX512VNNI__
namespace {

// Transforms one row of weights [Ci, 9] by (2G) w (2G)^T into u[x][column][channels], 16 planes `stride` bytes apart. Writes 16
// registers of partial sums. Returns false if a value needs more than a byte. `planes` is a buffer of 9 * channels bytes.
// `channels` is Ci rounded up to 32.
inline bool transform_weight(const int8_t* row, i64 Ci, i64 channels, int8_t* planes, int8_t* u, i64 stride, int32_t* sums) {
  for (i64 c = 0; c < Ci; ++c)
    for (int s = 0; s < 9; ++s) planes[s * channels + c] = row[c * 9 + s];
  for (int s = 0; s < 9; ++s) std::memset(planes + s * channels + Ci, 0, size_t(channels - Ci));
  const __m512i ones = _mm512_set1_epi16(1);
  __m512i low = _mm512_setzero_si512(), high = low, total[16] = {};
  for (i64 c = 0; c < channels; c += 32) {
    __m512i half[4][3];
#pragma GCC unroll 3
    for (int s = 0; s < 3; ++s) {
      __m512i g[3];
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r)
        g[r] = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(planes + (r * 3 + s) * channels + c)));
      __m512i ends = _mm512_add_epi16(g[0], g[2]);
      half[0][s] = _mm512_add_epi16(g[0], g[0]), half[1][s] = _mm512_add_epi16(ends, g[1]);
      half[2][s] = _mm512_sub_epi16(ends, g[1]), half[3][s] = _mm512_add_epi16(g[2], g[2]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const __m512i* h = half[r];
      __m512i ends = _mm512_add_epi16(h[0], h[2]);
      __m512i v[4] = {_mm512_add_epi16(h[0], h[0]), _mm512_add_epi16(ends, h[1]), _mm512_sub_epi16(ends, h[1]),
                      _mm512_add_epi16(h[2], h[2])};
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) {
        low = _mm512_min_epi16(low, v[x]), high = _mm512_max_epi16(high, v[x]);
        total[r * 4 + x] = _mm512_add_epi32(total[r * 4 + x], _mm512_madd_epi16(v[x], ones));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(u + (r * 4 + x) * stride + c), _mm512_cvtepi16_epi8(v[x]));
      }
    }
  }
  for (int x = 0; x < 16; ++x) sums[x] = _mm512_reduce_add_epi32(total[x]);
  const __mmask32 outside = _mm512_cmplt_epi16_mask(low, _mm512_set1_epi16(-128)) |
                            _mm512_cmpgt_epi16_mask(high, _mm512_set1_epi16(127));
  return !outside;
}

}  // namespace

// Transforms a weight for Winograd F(2x2, 3x3) on integers: U = (2G) w (2G)^T, V = B^T d B, 4 y = A^T (U V) A, all exact.
// Returns 0 if U does not fit int8. Needs |V| <= 127, which codes of at most 5 bits ensure.
EXPORT int dq_winograd_pack(const int8_t* codes, const uint8_t* words, i64 row_bytes, int bits, const uint8_t* zero_points,
                            int8_t* packed, int32_t* starts, i64 Co, i64 Ci, int) {
  Weight weight{codes, words, row_bytes, bits, zero_points};
  i64 quads = (Ci + 3) / 4, Cop = (Co + 15) / 16 * 16, channels = (Ci + 31) / 32 * 32;
  std::atomic<int> ok = 1;
  parallel_for(Cop / 16, BLOCK / 16, true, [&](i64 strip) {  // strips as in dq_pack
    i64 from = strip * 16, first = from / BLOCK * BLOCK, width = std::min<i64>(BLOCK, Cop - first), j = from - first;
    int8_t* base = packed + first * 16 * quads * 4 + j * 4;
    int32_t* start = starts + first * 16 + j;
    int8_t* u = scratch_b.get<int8_t>((16 * 16 + 9) * channels);
    int8_t* buffer = scratch_a.get<int8_t>(Ci * 9);
    for (i64 column = 0; column < 16; ++column) {
      int32_t sums[16] = {};
      if (from + column < Co) {
        const int8_t* row = weight.row(from + column, Ci * 9, buffer);
        if (!transform_weight(row, Ci, channels, u + 256 * channels, u + column * channels, 16 * channels, sums)) ok = 0;
      } else
        for (int x = 0; x < 16; ++x) std::memset(u + (x * 16 + column) * channels, 0, size_t(channels));
      for (int x = 0; x < 16; ++x) start[x * width + column] = -128 * sums[x];
    }
    const __m512i apart = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                             _mm512_set1_epi32(int(channels)));
    for (int x = 0; x < 16; ++x)
      for (i64 q = 0; q < quads; ++q) {
        __m512i quad = _mm512_i32gather_epi32(apart, u + x * 16 * channels + q * 4, 1);
        _mm512_storeu_si512(base + (x * quads + q) * width * 4, quad);
      }
  });
  return ok;
}

namespace {

// Transforms one 4x4 tile of codes (u = c + 128) for all channels: v[x * stride + c] = B^T d B + 128.
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
      t[1][x] = _mm512_add_epi8(d[1], d[2]);  // twice the offset 128 is zero modulo 256
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

// Computes a 3x3 convolution with stride 1 of codes with zp 128, padded so that Hp >= 2 ceil(Ho / 2) + 2 and Wp likewise.
EXPORT void dq_winograd(const uint8_t* in, const int8_t* w, const int32_t* starts, const int8_t*, int, int, i64 N, i64 Hp, i64 Wp, i64 Cp,
                        i64 Ho, i64 Wo, i64 Co, const float* scale, float input_scale, const float* bias, i64 bias_stride,
                        const float* residual, float post, float* out) {
  Epilogue e{scale, input_scale * 0.25f, bias, bias_stride, nullptr, 0, residual, post};
  i64 rows = (Ho + 1) / 2, cols = (Wo + 1) / 2, tiles = N * rows * cols;
  i64 quads = Cp / 4, Cop = (Co + 15) / 16 * 16, blocks = (Cop + BLOCK - 1) / BLOCK;
  int threads = thread_count();
  i64 most = std::max<i64>(2 * ROWS, std::min<i64>(72, 448 * 1024 / (16 * Cp) / ROWS * ROWS));
  bool by_columns = tiles < 2 * ROWS * threads && blocks > 1;
  i64 share = by_columns ? tiles : (tiles + threads - 1) / threads;
  i64 passes = std::max<i64>(1, (share + most - 1) / most);
  i64 size = ((share + passes - 1) / passes + ROWS - 1) / ROWS * ROWS;
  i64 groups = (tiles + size - 1) / size;
  i64 splits = by_columns ? std::min<i64>(blocks, threads) : 1;
  parallel_for(groups * splits, 1, true, [&](i64 item) {
    const i64 group = item / splits, split = item % splits;
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
          // The first tile prefetches the next transform's weights: they come from memory, and each is used once per group.
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
          const i64 channel = first + j * 16;
          __mmask16 mask = tail(Co - channel);
#pragma GCC unroll 2
          for (int r = 0; r < 2; ++r) {
            if (2 * y + r >= Ho) continue;
            __m512i left = _mm512_add_epi32(_mm512_add_epi32(s[r][0], s[r][1]), s[r][2]);
            __m512i right = _mm512_sub_epi32(_mm512_sub_epi32(s[r][1], s[r][2]), s[r][3]);
            i64 pixel = (n * Ho + 2 * y + r) * Wo + 2 * x;
            finish(_mm512_cvtepi32_ps(left), e, n, pixel, channel, Co, out + pixel * Co + channel, mask);
            if (2 * x + 1 < Wo)
              finish(_mm512_cvtepi32_ps(right), e, n, pixel + 1, channel, Co, out + (pixel + 1) * Co + channel, mask);
          }
        }
      }
    }
  });
}
#endif  // __AVX512VNNI__
