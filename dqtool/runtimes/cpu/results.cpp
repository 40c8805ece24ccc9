// Results of the int8 products: where the sums of tiles go. Compiled after the tiles, in the same translation unit.
#ifdef DQ_PRODUCTS
namespace {

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

  // Takes the sums of `count` rows of the block at `first`, within the columns [left, right). `pixels` are their destinations
  // (negative: dropped), `samples` their samples. `room` holds the floats of these columns, WIDEST for each row.
  void block(const int32_t* acc, int count, int nb, const i64* samples, const i64* pixels, i64 first, i64 left, i64 right,
             float* room) const {
    const i64 from = channel(first), at = first - left;
    const i64 place = gates ? at / (2 * BLOCK) * BLOCK + (at / BLOCK % 2 ? (right - left) / 2 : 0) : at;
    const Place to{out ? out + from : room + place, out ? Co : WIDEST, bool(out)};
    if (e.gate || e.post != 1.0f)
      finish_block<false>(acc, count, nb, e, samples, pixels, from, Co, to);
    else
      finish_block<true>(acc, count, nb, e, samples, pixels, from, Co, to);
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
  const i64 padded = (columns + LANES - 1) / LANES * LANES, tap = 0;
  if (code_bytes(group) == 2) {
    uint8_t* wide = scratch_c.get<uint8_t>(rows * quads * 8);
    for (i64 r = 0; r < rows; ++r) widen_codes(a + r * lda, quads * 4, wide + r * quads * 8);
    a = wide, lda = quads * 8;
  }
  i64 from = 0;
#if !defined(__AVX512VNNI__)
  if (group >= std::max<i64>(4, quads)) {
    const i64 blocks = padded / BLOCK;
    from = blocks * BLOCK;
    for (i64 r = 0; r < rows && blocks; r += ROWS) {
      const int m = int(std::min<i64>(ROWS, rows - r));
      const uint8_t* row[ROWS];
      for (int i = 0; i < m; ++i) row[i] = a + (r + i) * lda;
      BLOCKS[m - 1](row, quads, packed, starts, c + r * ldc, ldc, blocks);
    }
  }
#endif
  for (i64 first = from; first < padded; first += BLOCK)
    for (i64 r = 0; r < rows; r += ROWS) {
      int m = int(std::min<i64>(ROWS, rows - r)), nb = int(std::min<i64>(BLOCK, padded - first) / LANES);
      const uint8_t* row[ROWS];
      for (int i = 0; i < m; ++i) row[i] = a + (r + i) * lda;
      tile_taps(m, nb, row, &tap, 1, quads, packed + first * quads * 4, starts + first, c + r * ldc + first, ldc, 0, group);
    }
}

// Returns how many pairs of products of codes up to `largest` with weights up to `weight` fit 16 bits.
inline i64 pairs_in_16_bits(i64 largest, i64 weight) { return weight ? 32767 / (2 * largest * weight) : 1 << 20; }

// Returns the same for probabilities, codes up to `largest` of numbers that add up to `total`. A code is at most twice its number,
// because smaller numbers than a half have the code 0, and two codes are at most one more than their numbers. All the sums of a
// row of `pairs` fit if twice the total does. Numbers add up to the total but for the rounding of sums, far below 0.001.
inline i64 pairs_of_probabilities(i64 largest, float total, i64 weight, i64 pairs) {
  const i64 known = pairs_in_16_bits(std::max<i64>(1, largest), weight);
  if (pairs > 1 << 15) return known;
  if (2.001 * total * double(weight) <= 32767) return std::max(known, pairs);
  return !known && (1.001 * total + 1) * double(weight) <= 32767 ? 1 : known;
}

}  // namespace
#endif  // DQ_PRODUCTS
