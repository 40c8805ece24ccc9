// Winograd convolutions on integers for AVX2. Compiled after kernels.cpp, tiles.cpp and products.cpp, in the same translation
// unit.
//
// U = (2G) w (2G)^T, V = B^T d B and 4 y = A^T (U V) A, all exact. Codes go from 0 to L, so that V goes from -2L to 2L, and the
// plane whose V is a sum of four codes from 0 to 4L. V is stored as unsigned bytes, with 2L added to the other planes.
//
// Sums are added up in 16 bits over windows of channels. The longest window that can't overflow comes from the weights at
// hand: V lies between 0 and 4L, so a sum lies between 4L times the negative and 4L times the positive ones of its weights.
//
// Codes above NARROW have a second form, in which V and U have 16 bits. U would take 32 bytes for 9 weights, so it is made of the
// blocks that `dq_pack` makes, each time a group of tiles needs one. Sums may wrap: 4 y fits 32 bits. U of a compact weight is
// made in the same way.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
namespace {

constexpr i64 TILES_AT_ONCE = 48, WIDE_AT_ONCE = 96;  // tiles of a group, for which blocks of weights are read once
constexpr i64 WORTH_TRANSFORMING = 8;  // tiles from which on transforming a block of weights pays
constexpr int NARROW = 63;  // largest code L whose 4L fits a byte
constexpr int SUM_PLANE = 5;  // the plane whose V is a sum of four codes

// Transforms one row of weights [Ci, 9] into u[x][channels], 16 planes `stride` bytes apart, and writes their sums. Returns
// false if a value needs more than a byte. `planes` is a buffer of 9 * channels bytes. `channels` is Ci rounded up to 16.
inline bool transform_weight(const int8_t* row, i64 Ci, i64 channels, int8_t* planes, int8_t* u, i64 stride, int32_t* sums) {
  for (i64 c = 0; c < Ci; ++c)
    for (int s = 0; s < 9; ++s) planes[s * channels + c] = row[c * 9 + s];
  for (int s = 0; s < 9; ++s) std::memset(planes + s * channels + Ci, 0, size_t(channels - Ci));
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i low = _mm256_setzero_si256(), high = low, total[16] = {};
  for (i64 c = 0; c < channels; c += 16) {
    __m256i half[4][3];
#pragma GCC unroll 3
    for (int s = 0; s < 3; ++s) {
      __m256i g[3];
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r)
        g[r] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(planes + (r * 3 + s) * channels + c)));
      __m256i ends = _mm256_add_epi16(g[0], g[2]);
      half[0][s] = _mm256_add_epi16(g[0], g[0]), half[1][s] = _mm256_add_epi16(ends, g[1]);
      half[2][s] = _mm256_sub_epi16(ends, g[1]), half[3][s] = _mm256_add_epi16(g[2], g[2]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const __m256i* h = half[r];
      __m256i ends = _mm256_add_epi16(h[0], h[2]);
      __m256i v[4] = {_mm256_add_epi16(h[0], h[0]), _mm256_add_epi16(ends, h[1]), _mm256_sub_epi16(ends, h[1]),
                      _mm256_add_epi16(h[2], h[2])};
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) {
        low = _mm256_min_epi16(low, v[x]), high = _mm256_max_epi16(high, v[x]);
        total[r * 4 + x] = _mm256_add_epi32(total[r * 4 + x], _mm256_madd_epi16(v[x], ones));
        __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(v[x]), _mm256_extracti128_si256(v[x], 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(u + (r * 4 + x) * stride + c), bytes);
      }
    }
  }
  for (int x = 0; x < 16; ++x) {
    alignas(32) int32_t parts[8];
    store(parts, total[x]);
    sums[x] = 0;
    for (int32_t part : parts) sums[x] += part;
  }
  const __m256i outside = _mm256_or_si256(_mm256_cmpgt_epi16(_mm256_set1_epi16(-128), low),
                                          _mm256_cmpgt_epi16(high, _mm256_set1_epi16(127)));
  return _mm256_testz_si256(outside, outside);
}

// Returns whether sums over windows of `window` quads fit 16 bits: in each lane the positive and the negative ones of `quads`
// times 16 columns of weights add up to `limit` at most.
inline bool windows_fit(const int8_t* block, i64 quads, i64 window, int limit) {
  const __m256i zero = _mm256_setzero_si256(), ones = _mm256_set1_epi8(1);
  __m256i most = zero;
  for (i64 from = 0; from < quads; from += window)
    for (int half = 0; half < 2; ++half) {
      __m256i above = zero, below = zero;
      for (i64 q = from; q < std::min(quads, from + window); ++q) {
        __m256i x = load(block + q * 64 + half * 32);
        __m256i positive = _mm256_max_epi8(x, zero), negative = _mm256_sub_epi8(positive, x);  // 128 is a byte
        above = _mm256_adds_epi16(above, _mm256_maddubs_epi16(positive, ones));
        below = _mm256_adds_epi16(below, _mm256_maddubs_epi16(negative, ones));
      }
      most = _mm256_max_epi16(most, _mm256_max_epi16(above, below));
    }
  return _mm256_testz_si256(_mm256_cmpgt_epi16(most, _mm256_set1_epi16(int16_t(limit))), _mm256_set1_epi8(-1));
}

// Returns the longest window, of equal windows, whose sums fit 16 bits.
inline i64 longest_window(const int8_t* block, i64 quads, int largest) {
  for (i64 parts = 1;; ++parts) {
    const i64 window = (quads + parts - 1) / parts;
    if (window < 4) return windows_fit(block, quads, 1, 32767 / largest);
    if (windows_fit(block, quads, window, 32767 / largest)) return window;
  }
}

}  // namespace

// Transforms a weight: blocks of 16 columns, [block][x][Ci / 4][columns][4]. Writes the sums of columns, [block][x][columns], and
// behind them the windows [block][x]. Returns 0 if a transformed weight does not fit a byte, or a sum of two products 16 bits.
EXPORT int dq_winograd_pack(const int8_t* codes, const uint8_t* words, i64 row_bytes, int bits, const uint8_t* zero_points,
                            int8_t* packed, int32_t* sums, i64 Co, i64 Ci, int largest_code) {
  Weight weight{codes, words, row_bytes, bits, zero_points};
  i64 quads = (Ci + 3) / 4, Cop = (Co + 15) / 16 * 16, channels = (Ci + 15) / 16 * 16;
  std::atomic<int> ok = 1;
  parallel_for(Cop / 16, 1, true, [&](i64 blk) {
    int8_t* base = packed + blk * 256 * quads * 4;
    int8_t* u = scratch_b.get<int8_t>((16 * 16 + 9) * channels);
    int8_t* buffer = scratch_a.get<int8_t>(Ci * 9);
    for (i64 column = 0; column < 16; ++column) {
      int32_t totals[16] = {};
      if (blk * 16 + column < Co) {
        const int8_t* row = weight.row(blk * 16 + column, Ci * 9, buffer);
        if (!transform_weight(row, Ci, channels, u + 256 * channels, u + column * channels, 16 * channels, totals)) ok = 0;
      } else
        for (int x = 0; x < 16; ++x) std::memset(u + (x * 16 + column) * channels, 0, size_t(channels));
      for (int x = 0; x < 16; ++x) sums[(blk * 16 + x) * 16 + column] = totals[x];
    }
    for (int x = 0; x < 16; ++x) {
      int8_t* block = base + x * quads * 64;
      for (i64 q = 0; q < quads; ++q)
        for (i64 column = 0; column < 16; ++column)
          std::memcpy(block + q * 64 + column * 4, u + (x * 16 + column) * channels + q * 4, 4);
      const i64 window = longest_window(block, quads, 4 * largest_code);
      if (!window) ok = 0;
      sums[Cop * 16 + blk * 16 + x] = int32_t(window);
    }
  });
  return ok;
}

namespace {

// Transforms one 4x4 tile of codes for all channels: v[x * stride + c] = B^T d B, plus `offset` outside SUM_PLANE. Writes up to 31
// bytes behind the channels.
inline void transform_input(const uint8_t* in, i64 Wp, i64 Cp, uint8_t* v, i64 stride, int offset) {
  const __m256i up = _mm256_set1_epi8(char(offset));
  for (i64 c = 0; c < Cp; c += 32) {
    const i64 left = Cp - c;
    auto get = [&](int r, int x) {
      const uint8_t* from = in + (r * Wp + x) * Cp + c;
      if (left >= 32) return load(from);
      alignas(32) uint8_t bytes[32] = {};
      std::memcpy(bytes, from, size_t(left));
      return load(bytes);
    };
    __m256i t[4][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      __m256i d[4] = {get(0, x), get(1, x), get(2, x), get(3, x)};
      t[0][x] = _mm256_sub_epi8(d[0], d[2]), t[1][x] = _mm256_add_epi8(d[1], d[2]);
      t[2][x] = _mm256_sub_epi8(d[2], d[1]), t[3][x] = _mm256_sub_epi8(d[1], d[3]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      uint8_t* to = v + r * 4 * stride + c;
      __m256i sum = _mm256_add_epi8(t[r][1], t[r][2]);
      store(to, _mm256_add_epi8(_mm256_sub_epi8(t[r][0], t[r][2]), up));
      store(to + stride, r == SUM_PLANE / 4 ? sum : _mm256_add_epi8(sum, up));
      store(to + 2 * stride, _mm256_add_epi8(_mm256_sub_epi8(t[r][2], t[r][1]), up));
      store(to + 3 * stride, _mm256_add_epi8(_mm256_sub_epi8(t[r][1], t[r][3]), up));
    }
  }
}

// The same in 16 bits, with the codes of each quad in the order of `widen_codes`. Nothing is added. Cp is a multiple of four.
inline void transform_words(const uint8_t* in, i64 Wp, i64 Cp, uint8_t* v, i64 stride) {
  const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  for (i64 c = 0; c < Cp; c += 16) {
    const i64 left = Cp - c;
    auto get = [&](int r, int x) {
      const uint8_t* from = in + (r * Wp + x) * Cp + c;
      alignas(16) uint8_t bytes[16] = {};
      if (left < 16) std::memcpy(bytes, from, size_t(left)), from = bytes;
      return _mm256_cvtepu8_epi16(_mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), order));
    };
    __m256i t[4][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      __m256i d[4] = {get(0, x), get(1, x), get(2, x), get(3, x)};
      t[0][x] = _mm256_sub_epi16(d[0], d[2]), t[1][x] = _mm256_add_epi16(d[1], d[2]);
      t[2][x] = _mm256_sub_epi16(d[2], d[1]), t[3][x] = _mm256_sub_epi16(d[1], d[3]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      uint8_t* to = v + r * 4 * stride + 2 * c;
      store(to, _mm256_sub_epi16(t[r][0], t[r][2])), store(to + stride, _mm256_add_epi16(t[r][1], t[r][2]));
      store(to + 2 * stride, _mm256_sub_epi16(t[r][2], t[r][1])), store(to + 3 * stride, _mm256_sub_epi16(t[r][1], t[r][3]));
    }
  }
}

// Transforms a block of `dq_pack`, [tap][quads][16 columns][4] bytes, to U in 16 bits, [x][quads][even and odd channels][columns][2].
void transform_block(const int8_t* block, i64 quads, int8_t* u) {
  const i64 tap = quads * 64, plane = quads * 128;
  for (i64 at = 0; at < tap; at += 32)
    for (int odd = 0; odd < 2; ++odd) {
      __m256i half[4][3];
#pragma GCC unroll 3
      for (int s = 0; s < 3; ++s) {
        __m256i g[3];
#pragma GCC unroll 3
        for (int r = 0; r < 3; ++r) {
          __m256i bytes = load(block + (r * 3 + s) * tap + at);
          g[r] = _mm256_srai_epi16(odd ? bytes : _mm256_slli_epi16(bytes, 8), 8);
        }
        __m256i ends = _mm256_add_epi16(g[0], g[2]);
        half[0][s] = _mm256_add_epi16(g[0], g[0]), half[1][s] = _mm256_add_epi16(ends, g[1]);
        half[2][s] = _mm256_sub_epi16(ends, g[1]), half[3][s] = _mm256_add_epi16(g[2], g[2]);
      }
      int8_t* to = u + at / 64 * 128 + odd * 64 + at % 64;
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r, to += 4 * plane) {
        const __m256i* h = half[r];
        __m256i ends = _mm256_add_epi16(h[0], h[2]);
        store(to, _mm256_add_epi16(h[0], h[0])), store(to + plane, _mm256_add_epi16(ends, h[1]));
        store(to + 2 * plane, _mm256_sub_epi16(ends, h[1])), store(to + 3 * plane, _mm256_add_epi16(h[2], h[2]));
      }
    }
}

// Transforms a block of `dq_pack` to U in bytes, [x][quads][columns][4], which is known to fit them.
void transform_bytes(const int8_t* block, i64 quads, int8_t* u) {
  const i64 tap = quads * 64;
  for (i64 at = 0; at < tap; at += 32) {
    __m256i half[4][3];
#pragma GCC unroll 3
    for (int s = 0; s < 3; ++s) {
      __m256i g[3] = {load(block + s * tap + at), load(block + (3 + s) * tap + at), load(block + (6 + s) * tap + at)};
      __m256i ends = _mm256_add_epi8(g[0], g[2]);
      half[0][s] = _mm256_add_epi8(g[0], g[0]), half[1][s] = _mm256_add_epi8(ends, g[1]);
      half[2][s] = _mm256_sub_epi8(ends, g[1]), half[3][s] = _mm256_add_epi8(g[2], g[2]);
    }
    int8_t* to = u + at;
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r, to += 4 * tap) {
      const __m256i* h = half[r];
      __m256i ends = _mm256_add_epi8(h[0], h[2]);
      store(to, _mm256_add_epi8(h[0], h[0])), store(to + tap, _mm256_add_epi8(ends, h[1]));
      store(to + 2 * tap, _mm256_sub_epi8(ends, h[1])), store(to + 3 * tap, _mm256_add_epi8(h[2], h[2]));
    }
  }
}

// Writes 4 y = A^T m A of one tile and 8 columns: four rows of `acc`, in the order of pixels. Planes of m are `plane` apart.
inline void transform_output(const int32_t* m, i64 plane, int32_t* acc) {
  __m256i s[2][4];
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    __m256i r0 = load(m + c * plane), r1 = load(m + (4 + c) * plane), r2 = load(m + (8 + c) * plane);
    s[0][c] = _mm256_add_epi32(_mm256_add_epi32(r0, r1), r2);
    s[1][c] = _mm256_sub_epi32(_mm256_sub_epi32(r1, r2), load(m + (12 + c) * plane));
  }
#pragma GCC unroll 2
  for (int r = 0; r < 2; ++r) {
    store(acc + 2 * r * BLOCK, _mm256_add_epi32(_mm256_add_epi32(s[r][0], s[r][1]), s[r][2]));
    store(acc + (2 * r + 1) * BLOCK, _mm256_sub_epi32(_mm256_sub_epi32(s[r][1], s[r][2]), s[r][3]));
  }
}

}  // namespace

// Computes a 3x3 convolution with stride 1 of codes from 0 to `largest_code`, with the zero point zp, padded so that Hp >=
// 2 ceil(Ho / 2) + 2 and Wp likewise. The weight is that of `dq_winograd_pack`, above NARROW that of `dq_pack`, with `lows` that of
// `dq_compact`; the sums are of `dq_winograd_pack`, above NARROW of `dq_pack`.
EXPORT void dq_winograd(const uint8_t* in, const int8_t* w, const int32_t* sums, const int8_t* lows, int zp, int largest_code,
                        i64 N, i64 Hp, i64 Wp, i64 Cp, i64 Ho, i64 Wo, i64 Co, const float* scale, float input_scale, const float* bias,
                        i64 bias_stride, const float* residual, float post, float* out) {
  constexpr i64 TOGETHER = 8;  // tiles whose results are written together
  const bool wide = largest_code > NARROW;
  const Epilogue e{scale, input_scale * 0.25f, bias, bias_stride, nullptr, 0, residual, post};
  const i64 rows = (Ho + 1) / 2, cols = (Wo + 1) / 2, tiles = N * rows * cols;
  if (wide && tiles < WORTH_TRANSFORMING) {
    Results results{};
    results.e = {scale, input_scale, bias, bias_stride, nullptr, 0, residual, post};
    results.Co = Co, results.out = out;
    return convolve(in, w, sums, lows, zp, largest_code, 128, N, Hp, Wp, Cp, Ho, Wo, Co, 3, 3, 1, 1, 1, 1, 0, results);
  }
  const i64 row = wide ? 2 * Cp : Cp, steps = row / 4;  // bytes of a tile's row, and of four at a time
  const i64 Cop = (Co + 15) / 16 * 16, blocks = Cop / 16, threads = thread_count();
  const bool in_call = wide || lows;
  const i64 block_bytes = 9 * Cp * BLOCK, most = in_call ? WIDE_AT_ONCE : TILES_AT_ONCE;
  const bool by_columns = tiles < 2 * ROWS * threads && blocks > 1;
  const i64 share = by_columns ? tiles : (tiles + threads - 1) / threads;
  const i64 passes = std::max<i64>(1, (share + most - 1) / most);
  const i64 size = ((share + passes - 1) / passes + ROWS - 1) / ROWS * ROWS;
  const i64 groups = (tiles + size - 1) / size, splits = by_columns ? std::min<i64>(blocks, threads) : 1;
  parallel_for(groups * splits, 1, true, [&](i64 item) {
    const i64 group = item / splits, split = item % splits;
    const i64 from = group * size, count = std::min(tiles - from, size), stride = size * row + 32, plane = size * BLOCK;
    uint8_t* v = scratch_a.get<uint8_t>(16 * stride + (in_call ? 16 * BLOCK * row + block_bytes : 0));
    int8_t* u = reinterpret_cast<int8_t*>(v + 16 * stride);
    int8_t* unpacked = u + 16 * BLOCK * row;
    int32_t* m = scratch_b.get<int32_t>(16 * plane);
    i64* samples = scratch_c.get<i64>(2 * 4 * size);  // of the results, four for each tile
    i64* pixels = samples + 4 * size;
    for (i64 t = 0; t < count; ++t) {
      const i64 q = from + t, n = q / (rows * cols), y = q % (rows * cols) / cols * 2, x = q % cols * 2;
      const uint8_t* tile = in + ((n * Hp + y) * Wp + x) * Cp;
      if (wide)
        transform_words(tile, Wp, Cp, v + t * row, stride);
      else
        transform_input(tile, Wp, Cp, v + t * row, stride, 2 * largest_code);
      for (i64 i = 0; i < 4; ++i) {
        const i64 py = y + i / 2, px = x + i % 2;
        samples[t * 4 + i] = n;
        pixels[t * 4 + i] = py < Ho && px < Wo ? (n * Ho + py) * Wo + px : -1;
      }
    }
    for (i64 blk = split; blk < blocks; blk += splits) {
      const i64 first = blk * BLOCK, none = 0;
      const int8_t* source = w + blk * block_bytes;
      if (lows) {
        unpack_codes(reinterpret_cast<const uint8_t*>(w) + blk * (block_bytes / 2), block_bytes / 64, lows + first, unpacked);
        source = unpacked;
      }
      if (in_call) (wide ? transform_block : transform_bytes)(source, Cp / 4, u);
      for (int x = 0; x < 16; ++x) {
        const int8_t* block = in_call ? u + x * row * BLOCK : w + (blk * 16 + x) * row * BLOCK;
        const int32_t* sum = sums + (wide ? blk : blk * 16 + x) * BLOCK;  // of nine taps, which are those of SUM_PLANE
        const i64 window = wide ? WORDS : sums[Cop * 16 + blk * 16 + x];
        const int offset = x == SUM_PLANE ? 4 * zp : wide ? 0 : 2 * largest_code;
        alignas(32) int32_t start[BLOCK];
        for (int j = 0; j < BLOCK; ++j) start[j] = -offset * sum[j];
        for (i64 t = 0; t < count; t += ROWS) {
          const int left = int(std::min<i64>(ROWS, count - t));
          const uint8_t* a[ROWS];
          for (int i = 0; i < left; ++i) a[i] = v + x * stride + (t + i) * row;
          tile_taps(left, 2, a, &none, 1, steps, block, start, m + x * plane + t * BLOCK, BLOCK, 0, window);
        }
      }
      for (i64 t = 0; t < count; t += TOGETHER) {
        const i64 here = std::min(TOGETHER, count - t);
        alignas(32) int32_t acc[4 * TOGETHER * BLOCK];
        for (i64 i = 0; i < here; ++i)
          for (int j = 0; j < BLOCK; j += 8) transform_output(m + (t + i) * BLOCK + j, plane, acc + i * 4 * BLOCK + j);
        const Place to{out + first, Co, true};
        if (post != 1.0f)
          finish_block<false>(acc, int(4 * here), 2, e, samples + 4 * t, pixels + 4 * t, first, Co, to);
        else
          finish_block<true>(acc, int(4 * here), 2, e, samples + 4 * t, pixels + 4 * t, first, Co, to);
      }
    }
  });
}
#endif  // AVX2
