// Attention on integer codes: both products and the softmax between them. Compiled after operands.cpp, in the same
// translation unit.
#ifdef DQ_PRODUCTS
// Computes both attention products on codes and the softmax between them.
//
// q, k, v: floats [N, H, S, D] with strides (sample, head, position) and contiguous channels. tables: 4 x 3 x H floats,
// (multiplier, lowest code, highest code) of q, k, v and probs. scores = acc * score_scale[h] (+ mask). out = acc *
// out_scale[h], [N, Sq, H D]. probs have zero point 0. mask: additive, with strides (sample, head, query), or null.
EXPORT void dq_attention(const float* q, const i64* q_strides, const float* k, const i64* k_strides, const float* v,
                         const i64* v_strides, i64 N, i64 H, i64 Sq, i64 Sk, i64 D, const float* tables,
                         const float* score_scale, const float* out_scale, const float* mask, i64 mask_n, i64 mask_h,
                         i64 mask_q, float* out) {
  i64 Dp = (D + 3) / 4 * 4, Dc = (D + LANES - 1) / LANES * LANES, Sp = (Sk + 3) / 4 * 4, Sc = (Sk + LANES - 1) / LANES * LANES;
  i64 k_bytes = Sc * Dp, v_bytes = Dc * Sp;
  std::unique_ptr<int8_t[]> packed(new int8_t[N * H * (k_bytes + v_bytes)]);
  std::vector<int32_t> starts(N * H * (Sc + Dc));
  const float *tq = tables, *tk = tables + 3 * H, *tv = tables + 6 * H, *tp = tables + 9 * H;
  i64 k_blocks = (Sc + BLOCK - 1) / BLOCK, v_blocks = (Dc + BLOCK - 1) / BLOCK, per_head = k_blocks + v_blocks;
  parallel_for(N * H * per_head, EVEN, Sk * D * N * H > 16384, [&](i64 i) {
    i64 nh = i / per_head, n = nh / H, h = nh % H, blk = i % per_head;
    int8_t* dst = packed.get() + nh * (k_bytes + v_bytes);
    int32_t* start = starts.data() + nh * (Sc + Dc);
    if (blk < k_blocks) {
      i64 first = blk * BLOCK, width = std::min<i64>(BLOCK, Sc - first);
      pack_rows(k + n * k_strides[0] + h * k_strides[1] + first * k_strides[2], k_strides[2], D,
                std::min(width, Sk - first), width, tk[h], tk[H + h], tk[2 * H + h], -int(tq[H + h]), dst + first * Dp, start + first);
    } else {
      i64 first = (blk - k_blocks) * BLOCK, width = std::min<i64>(BLOCK, Dc - first);
      pack_columns(v + n * v_strides[0] + h * v_strides[1] + first, v_strides[2], Sk, std::min(width, D - first), width,
                   tv[h], tv[H + h], tv[2 * H + h], 0, dst + k_bytes + first * Sp, start + Sc + first);
    }
  });
  i64 rows = std::max<i64>(ROWS, std::min<i64>(24, 262144 / (Sc * 5) / ROWS * ROWS));
  if (RowProducts::on_tiles(Dp) || RowProducts::on_tiles(Sp)) rows = Sc * 5 * 32 <= 1 << 20 ? 32 : 16;
  i64 runs = (Sq + rows - 1) / rows;
  parallel_for(N * H * runs, 1, Sq * Sk * D * N * H > 100000, [&](i64 item) {
    i64 nh = item / runs, n = nh / H, h = nh % H, from = item % runs * rows, count = std::min(rows, Sq - from);
    uint8_t* codes = scratch_a.get<uint8_t>(rows * (Dp + Sp));
    uint8_t* probs = codes + rows * Dp;
    int32_t* scores = scratch_b.get<int32_t>(rows * (Sc + Dc));
    int32_t* result = scores + rows * Sc;
    const int8_t* keys = packed.get() + nh * (k_bytes + v_bytes);
    const int32_t* start = starts.data() + nh * (Sc + Dc);
    // Codes of q count from the smallest code and codes of probs from 0: both are unsigned and as small as possible.
    int zq = -int(tq[H + h]), largest_q = zq + int(tq[2 * H + h]);
    auto magnitude = [&](const float* t) { return i64(std::max(-t[H + h], t[2 * H + h])); };
    i64 group_k = pairs_in_16_bits(std::max(1, largest_q), magnitude(tk));
    i64 group_v = pairs_of_probabilities(i64(tp[2 * H + h]), tp[h], magnitude(tv), Sp / 4);
    for (i64 r = 0; r < count; ++r) {
      uint8_t* row = codes + r * Dp;
      quantize_row<NONE, false, false>(q + n * q_strides[0] + h * q_strides[1] + (from + r) * q_strides[2], row, D, nullptr,
                                       nullptr, tq + h, tq[H + h], tq[2 * H + h], zq);
      for (i64 d = D; d < Dp; ++d) row[d] = static_cast<uint8_t>(zq);
    }
    RowProducts rows_times;
    rows_times.multiply(codes, Dp, count, keys, start, Sk, scores, Sc, group_k);
    for (i64 r = 0; r < count; ++r)
      softmax_codes(scores + r * Sc, Sk, Sp, score_scale[h],
                    mask ? mask + n * mask_n + h * mask_h + (from + r) * mask_q : nullptr, tp[h], tp[2 * H + h], probs + r * Sp);
    rows_times.multiply(probs, Sp, count, keys + k_bytes, start + Sc, D, result, Dc, group_v);
    for (i64 r = 0; r < count; ++r) {
      float* row = out + ((n * Sq + from + r) * H + h) * D;
      for (i64 d = 0; d < D; ++d) row[d] = float(result[r * Dc + d]) * out_scale[h];
    }
  });
}
#endif  // DQ_PRODUCTS
