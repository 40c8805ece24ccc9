// int8 products on packed weights: a convolution as an implicit matrix product. Compiled after tiles.cpp, in the same
// translation unit.
#ifdef DQ_PRODUCTS
namespace {

// Spreads eight dense codes of B bits to one byte each, by moving halves apart three times.
template <int B>
inline uint64_t spread(uint64_t x) {
  if constexpr (B == 8) return x;
  constexpr uint64_t one = 1;
  constexpr uint64_t m4 = (one << (4 * B % 64)) - 1, m2 = ((one << 2 * B) - 1) * 0x0000000100000001, m1 = ((one << B) - 1) * 0x0001000100010001;
  x = (x & m4) | (x >> (4 * B % 64) & m4) << 32;
  x = (x & m2) | (x >> 2 * B & m2) << 16;
  return (x & m1) | (x >> B & m1) << 8;
}

template <int B>
void unpack_row(const uint8_t* words, i64 bytes, i64 n, int zero_point, int8_t* out) {
  i64 count = (n + 7) / 8;
  for (i64 i = 0; i < count; ++i) {
    uint64_t x = 0;
    std::memcpy(&x, words + i * B, size_t(std::min<i64>(8, bytes - i * B)));
    x = spread<B>(x);
    if (i * 8 + 8 <= n)
      std::memcpy(out + i * 8, &x, 8);
    else
      std::memcpy(out + i * 8, &x, size_t(n - i * 8));
  }
  for (i64 i = 0; i < n; ++i) out[i] = static_cast<int8_t>(static_cast<uint8_t>(out[i]) - zero_point);
}

// A weight [Co, K]: centred int8 codes, or the packed codes of the file (core/packing.py), `row_bytes` bytes a row.
struct Weight {
  const int8_t* codes;
  const uint8_t* words;
  i64 row_bytes;
  int bits;
  const uint8_t* zero_points;

  // Returns the centred codes of one row. Unpacks them into `buffer` if they are packed.
  const int8_t* row(i64 co, i64 K, int8_t* buffer) const {
    if (codes) return codes + co * K;
    const uint8_t* from = words + co * row_bytes;
    int zp = zero_points[co];
    switch (bits) {
      case 1: unpack_row<1>(from, row_bytes, K, zp, buffer); break;
      case 2: unpack_row<2>(from, row_bytes, K, zp, buffer); break;
      case 3: unpack_row<3>(from, row_bytes, K, zp, buffer); break;
      case 4: unpack_row<4>(from, row_bytes, K, zp, buffer); break;
      case 5: unpack_row<5>(from, row_bytes, K, zp, buffer); break;
      case 6: unpack_row<6>(from, row_bytes, K, zp, buffer); break;
      case 7: unpack_row<7>(from, row_bytes, K, zp, buffer); break;
      default: unpack_row<8>(from, row_bytes, K, zp, buffer);
    }
    return buffer;
  }
};

}  // namespace

// Packs a weight [Co, Ci, taps] into blocks of BLOCK columns, [block][tap][Ci / 4][columns][4], and writes the sums of its
// columns, sums[Co rounded up to 16]. Returns the largest magnitude of a code. `gates`: defined at Results in tiles.cpp.
EXPORT int dq_pack(const int8_t* codes, const uint8_t* words, i64 row_bytes, int bits, const uint8_t* zero_points,
                   int8_t* packed, int32_t* sums, i64 Co, i64 Ci, i64 taps, i64 gates) {
  Weight weight{codes, words, row_bytes, bits, zero_points};
  i64 quads = (Ci + 3) / 4, Cop = (Co + 15) / 16 * 16, K = Ci * taps;
  Results order{};
  order.gates = gates;
  std::atomic<int> largest = 0;
  // A strip is 16 columns: a whole cache line for each four channels. One thread packs all strips of a block, because they
  // share pages.
  parallel_for(Cop / 16, BLOCK / 16, Co * K > 65536, [&](i64 strip) {
    i64 from = strip * 16, first = from / BLOCK * BLOCK, width = std::min<i64>(BLOCK, Cop - first);
    int8_t* block = packed + first * quads * 4 * taps + (from - first) * 4;
    int8_t* buffer = scratch_a.get<int8_t>(17 * K);
    int largest_here = 0;
    std::memset(buffer + 16 * K, 0, size_t(K));
    const int8_t* rows[16];
    const i64 channel = order.channel(first) + from - first;
    for (i64 j = 0; j < 16; ++j) {
      rows[j] = channel + j < Co ? weight.row(channel + j, K, buffer + j * K) : buffer + 16 * K;
      const int8_t* row = rows[j];
      int sum = 0, low = 0, high = 0;
#pragma omp simd reduction(+ : sum) reduction(min : low) reduction(max : high)
      for (i64 k = 0; k < K; ++k) {
        sum += row[k];
        low = std::min(low, int(row[k]));
        high = std::max(high, int(row[k]));
      }
      sums[from + j] = sum;
      largest_here = std::max(largest_here, std::max(-low, high));
    }
    for (i64 t = 0; t < taps; ++t)
      for (i64 q = 0; q < quads; ++q) {
        int8_t* dst = block + (t * quads + q) * width * 4;
        i64 here = std::min<i64>(4, Ci - q * 4), src = q * 4 * taps + t;
        if (taps == 1 && here == 4)
          for (i64 j = 0; j < 16; ++j) std::memcpy(dst + j * 4, rows[j] + src, 4);
        else
          for (i64 j = 0; j < 16; ++j)
            for (i64 c = 0; c < 4; ++c) dst[j * 4 + c] = c < here ? rows[j][src + c * taps] : int8_t(0);
      }
    for (int seen = largest; seen < largest_here && !largest.compare_exchange_weak(seen, largest_here);) {}
  });
  return largest;
}

// Packs blocks of 16 columns of `dq_pack` again, `rows` of 64 codes each, into half of the bytes. Writes the lowest code of each
// column. Returns 0 if the codes of a column lie further apart than 15, or where no product reads this form.
EXPORT int dq_compact(const int8_t* packed, uint8_t* compact, int8_t* lows, i64 blocks, i64 rows) {
#if defined(__AVX512VNNI__)
  return 0;
#else
  std::atomic<int> ok = 1;
  parallel_for(blocks, 1, true, [&](i64 blk) {
    const int8_t* from = packed + blk * rows * 64;
    uint8_t* to = compact + blk * rows * 32;
    int8_t low[64] = {}, high[64] = {};
    for (i64 r = 0; r < rows; ++r)
      for (int i = 0; i < 64; ++i) low[i] = std::min(low[i], from[r * 64 + i]), high[i] = std::max(high[i], from[r * 64 + i]);
    for (int i = 0; i < 64; ++i) {
      low[i / 4 * 4] = std::min(low[i / 4 * 4], low[i]), high[i / 4 * 4] = std::max(high[i / 4 * 4], high[i]);
      if (i % 4 == 3 && high[i / 4 * 4] - low[i / 4 * 4] > 15) ok = 0;
    }
    for (int i = 0; i < 64; ++i) low[i] = low[i / 4 * 4], lows[blk * 16 + i / 4] = low[i];
    for (i64 r = 0; r < rows; ++r)
      for (int i = 0; i < 32; ++i)
        to[r * 32 + i] = uint8_t((from[r * 64 + i] - low[i]) | (from[r * 64 + 32 + i] - low[32 + i]) << 4);
  });
  return ok;
#endif
}

namespace {

// Convolves padded codes [N, Hp, Wp, Cp] with a packed weight, which is compact if `lows` is given. Writes results [N, Ho, Wo, Co].
void convolve(const uint8_t* in, const int8_t* w, const int32_t* sums, [[maybe_unused]] const int8_t* lows, int zp, int largest_code, int largest_weight, i64 N,
              i64 Hp, i64 Wp, i64 Cp, i64 Ho, i64 Wo, i64 Co, i64 kh, i64 kw, i64 sy, i64 sx, i64 dy, i64 dx,
              i64 sample_pixels, const Results& results) {
  i64 group = pairs_in_16_bits(largest_code, largest_weight);
  i64 pixels = N * Ho * Wo, quads = Cp / 4, Cop = (Co + 15) / 16 * 16;
  int n_taps = int(kh * kw);
  std::vector<i64> taps(n_taps);
  for (i64 r = 0; r < kh; ++r)
    for (i64 s = 0; s < kw; ++s) taps[r * kw + s] = (r * dy * Wp + s * dx) * Cp;
  // A work item is a run of pixels times a stripe of columns, whose weights stay in the cache. With one tap, writing results
  // takes as long as multiplying, so the stripe is as wide as the cache allows and results are written in long pieces.
  const i64 widest = std::max<i64>(BLOCK, std::min<i64>(WIDEST, STRIPE_BYTES / Cp / BLOCK * BLOCK));
  const i64 stripe = results.stripe(n_taps == 1 ? widest : BLOCK), stripes = (Cop + stripe - 1) / stripe;
#ifdef DQ_AMX
  if (conv_on_tiles(in, w, sums, zp, N, Hp, Wp, Cp, Ho, Wo, Cop, taps.data(), n_taps, sy, sx, sample_pixels, stripe, results))
    return;
#endif
  const i64 bytes = code_bytes(group), positions = N * Hp * Wp;
  std::unique_ptr<uint8_t[]> wide;
  if (bytes == 2) {
    wide.reset(new uint8_t[positions * Cp * 2]);
    parallel_for(positions, EVEN, positions * Cp > 65536,
                 [&](i64 i) { widen_codes(in + i * Cp, Cp, wide.get() + i * Cp * 2); });
    in = wide.get();
    for (i64& tap : taps) tap *= 2;
  }
  int threads = thread_count();
  i64 run = std::max<i64>(ROWS, std::min<i64>(96, (pixels * stripes / (4 * threads) / ROWS + 1) * ROWS));
  if (n_taps == 1 && !lows) run = std::min<i64>(run, 48);
  i64 runs = (pixels + run - 1) / run;
  i64 image = Ho * Wo;
  parallel_for(runs * stripes, 1, pixels * Cop * Cp * n_taps > 200000, [&](i64 item) {
    // Neighbouring items share pixels if the weights fit the cache, else they share weights.
    i64 left = item % stripes * stripe, right = std::min(Cop, left + stripe), from = item / stripes * run;
    i64 to = std::min(pixels, from + run);
    alignas(64) int32_t start[WIDEST];
    alignas(64) float room[ROWS * WIDEST];
    for (i64 j = left; j < right; ++j) start[j - left] = -zp * sums[j];
    const int8_t* weights = w + left * Cp * n_taps;
#if !defined(__AVX512VNNI__)
    if (lows) {
      const i64 bytes_of_block = BLOCK * Cp * n_taps;
      int8_t* unpacked = scratch_b.get<int8_t>((right - left) / BLOCK * bytes_of_block);
      for (i64 first = left; first < right; first += BLOCK)
        unpack_codes(reinterpret_cast<const uint8_t*>(w) + first / BLOCK * (bytes_of_block / 2), bytes_of_block / 64, lows + first,
                     unpacked + (first - left) / BLOCK * bytes_of_block);
      weights = unpacked;
    }
#endif
    i64 n = from / image, y = from % image / Wo, x = from % Wo;
    for (i64 p = from; p < to; p += ROWS) {
      int m = int(std::min<i64>(ROWS, to - p));
      const uint8_t* rows[ROWS];
      i64 sample[ROWS], pixel[ROWS];
      for (int i = 0; i < m; ++i) {
        rows[i] = in + ((n * Hp + y * sy) * Wp + x * sx) * Cp * bytes;
        pixel[i] = p + i;
        sample[i] = sample_pixels ? (p + i) / sample_pixels : n;
        if (++x == Wo) {
          x = 0;
          if (++y == Ho) y = 0, ++n;
        }
      }
      alignas(64) int32_t acc[ROWS * BLOCK];
      for (i64 first = left; first < right; first += BLOCK) {
        i64 columns = std::min<i64>(BLOCK, right - first), slice = Cp * columns;
        int nb = int(columns / LANES);
        tile_taps(m, nb, rows, taps.data(), n_taps, quads, weights + (first - left) * Cp * n_taps, start + first - left, acc, BLOCK,
                  p == from ? slice : 0, group);
        results.block(acc, m, nb, sample, pixel, first, left, right, room);
      }
      for (int i = 0; i < m; ++i) results.row(p + i, left, right, room + i * WIDEST);
    }
  });
}

}  // namespace

// Convolves codes and writes float32 [N, Ho, Wo, Co]. A linear layer is a convolution with N = 1, Hp = 1, Wp = rows, and
// `sample_pixels` rows in a sample. `largest_code` bounds the codes of `in`. `largest_weight` is the value that `dq_pack`
// returned. `lows`: of a compact weight, or null. `gate`: [N, Co] or null.
EXPORT void dq_conv(const uint8_t* in, const int8_t* w, const int32_t* sums, const int8_t* lows, int zp, int largest_code, int largest_weight,
                    i64 N, i64 Hp, i64 Wp, i64 Cp, i64 Ho, i64 Wo, i64 Co, i64 kh, i64 kw, i64 sy, i64 sx, i64 dy, i64 dx,
                    const float* scale, float input_scale, const float* bias, i64 bias_stride, i64 sample_pixels,
                    const float* gate, i64 gate_stride, const float* residual, float post, i64 gates, float* out) {
  Results results{};
  results.e = {scale, input_scale, bias, bias_stride, gate, gate_stride, residual, post};
  results.Co = Co, results.gates = gates, results.out = out;
  convolve(in, w, sums, lows, zp, largest_code, largest_weight, N, Hp, Wp, Cp, Ho, Wo, Co, kh, kw, sy, sx, dy, dx, sample_pixels,
           results);
}

// Applies a linear layer to codes [rows, Cp], then an activation and the next layer's quantizer. Writes codes [rows, next_Cp].
EXPORT void dq_linear_codes(const uint8_t* in, const int8_t* w, const int32_t* sums, const int8_t* lows, int zp, int largest_code,
                            int largest_weight, i64 rows, i64 Cp, i64 Co, const float* scale, float input_scale,
                            const float* bias, i64 gates, uint8_t* codes, i64 next_Cp, int act, const float* m,
                            int per_channel, float lo, float hi, int next_zp) {
  Results results{};
  results.e = {scale, input_scale, bias, 0, nullptr, 0, nullptr, 1.0f};
  results.Co = Co, results.gates = gates;
  results.codes = codes, results.Cp = next_Cp, results.act = act;
  results.m = m, results.per_channel = per_channel, results.lo = lo, results.hi = hi, results.zp = next_zp;
  convolve(in, w, sums, lows, zp, largest_code, largest_weight, 1, 1, rows, Cp, 1, rows, Co, 1, 1, 1, 1, 1, 1, 0, results);
}
#endif  // DQ_PRODUCTS
