// Attention on integer codes: both products and the softmax between them. Compiled after products.cpp, in the same
// translation unit.
#ifdef DQ_PRODUCTS
namespace {

#if defined(__AVX512VNNI__)

inline __m512i signed_codes(const float* x, __mmask16 mask, float m, float lo, float hi) {
  __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x), _mm512_set1_ps(m));
  y = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  y = _mm512_min_ps(_mm512_max_ps(y, _mm512_set1_ps(lo)), _mm512_set1_ps(hi));
  return _mm512_maskz_cvtps_epi32(mask, y);
}

// Packs one block of columns (`live` of `width`) of a right-hand operand as signed codes in the layout of a packed weight,
// [K / 4][columns][4], and sets starts = -zp * (sums over K). Rows of x become columns (k: x is [columns, K]).
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

// Packs one block of columns of x [K, columns] (v), in the same layout.
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

// Returns 2^x for x <= 0 with a relative error below 2e-7: a polynomial of degree 5 on [-1/2, 1/2], exact at 0. Returns
// 2^-126 for x < -126.
inline __m512 exp2_of_negative(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
  __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.326472731e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.671512991e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550733581e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402224243e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931470037e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// Writes the codes of softmax(sums * scale (+ add)) over `n` sums, with zero point 0. Overwrites `sums`, which is aligned to
// registers and padded to a whole number of them. Codes from `n` to `padded` are zeros.
void softmax_codes(int32_t* sums, i64 n, i64 padded, float scale, const float* add, float m, float hi, uint8_t* codes) {
  float* s = reinterpret_cast<float*>(sums);
  const __m512 factor = _mm512_set1_ps(scale * 1.44269504088896341f);  // base 2 instead of e
  const i64 whole = n / 16 * 16;
  const __mmask16 rest = tail(n - whole);
  __m512 total = _mm512_setzero_ps();
  if (!add && scale > 0) {  // the largest sum has the largest score, and integer differences are exact
    __m512i top = _mm512_set1_epi32(INT32_MIN);
    for (i64 j = 0; j < whole; j += 16) top = _mm512_max_epi32(top, _mm512_load_si512(sums + j));
    if (rest) top = _mm512_mask_max_epi32(top, rest, top, _mm512_load_si512(sums + whole));
    top = _mm512_set1_epi32(_mm512_reduce_max_epi32(top));
    auto power = [&](i64 j) {
      __m512i below = _mm512_sub_epi32(_mm512_load_si512(sums + j), top);
      return exp2_of_negative(_mm512_mul_ps(_mm512_cvtepi32_ps(below), factor));
    };
    for (i64 j = 0; j < whole; j += 16) {
      __m512 y = power(j);
      _mm512_store_ps(s + j, y);
      total = _mm512_add_ps(total, y);
    }
    if (rest) {
      __m512 y = _mm512_maskz_mov_ps(rest, power(whole));
      _mm512_store_ps(s + whole, y);
      total = _mm512_add_ps(total, y);
    }
  } else {
    const __m512 of_add = _mm512_set1_ps(1.44269504088896341f);
    __m512 top = _mm512_set1_ps(-INFINITY);
    for (i64 j = 0; j < n; j += 16) {
      __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + j)), factor);
      if (add) y = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(tail(n - j), add + j), of_add, y);
      _mm512_store_ps(s + j, y);
      top = _mm512_mask_max_ps(top, tail(n - j), top, y);
    }
    top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (i64 j = 0; j < n; j += 16) {
      __m512 y = _mm512_maskz_mov_ps(tail(n - j), exp2_of_negative(_mm512_sub_ps(_mm512_load_ps(s + j), top)));
      _mm512_store_ps(s + j, y);
      total = _mm512_add_ps(total, y);
    }
  }
  const __m512 to_code = _mm512_set1_ps(m / _mm512_reduce_add_ps(total));
  const __m512i largest = _mm512_set1_epi32(int(hi));
  i64 j = 0;
  for (; j < whole; j += 16) {  // the conversion rounds to nearest, ties to even
    __m512i c = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(s + j), to_code));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + j), _mm512_cvtepi32_epi8(_mm512_min_epi32(c, largest)));
  }
  if (rest) {  // powers after `n` are zeros
    __m512i c = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(s + j), to_code));
    _mm_mask_storeu_epi8(codes + j, tail(padded - j), _mm512_cvtepi32_epi8(_mm512_min_epi32(c, largest)));
  }
}

#else

// Portable form: the compiler chooses the instructions.
void softmax_codes(int32_t* sums, i64 n, i64 padded, float scale, const float* add, float m, float hi, uint8_t* codes) {
  float* s = reinterpret_cast<float*>(sums);
#pragma omp simd
  for (i64 j = 0; j < n; ++j) {  // in place: each integer is replaced by its float
    int32_t sum;
    std::memcpy(&sum, s + j, 4);
    s[j] = float(sum) * scale + (add ? add[j] : 0.0f);
  }
  float top = -INFINITY, total = 0;
#pragma omp simd reduction(max : top)
  for (i64 j = 0; j < n; ++j) top = std::max(top, s[j]);
#pragma omp simd reduction(+ : total)
  for (i64 j = 0; j < n; ++j) {
    s[j] = exp_(s[j] - top);
    total += s[j];
  }
  float inverse = 1.0f / total;
#pragma omp simd
  for (i64 j = 0; j < n; ++j) codes[j] = code(s[j] * inverse * m, 0.0f, hi, 0);
  for (i64 j = n; j < padded; ++j) codes[j] = 0;
}

inline void signed_codes(const float* x, i64 n, float m, float lo, float hi, int8_t* out) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) out[i] = static_cast<int8_t>(code(x[i] * m, lo, hi, 0));
}

// Packs one block of columns (`live` of `width`) of a right-hand operand as signed codes in the layout of a packed weight,
// [K / 4][columns][4], and sets starts = -zp * (sums over K). Rows of x become columns (k: x is [columns, K]).
void pack_rows(const float* x, i64 stride, i64 K, i64 live, i64 width, float m, float lo, float hi, int zp, int8_t* block,
               int32_t* starts) {
  i64 quads = (K + 3) / 4;
  int8_t* row = scratch_a.get<int8_t>(quads * 4);
  for (i64 j = 0; j < width; ++j) {
    int sum = 0;
    if (j < live)
      signed_codes(x + j * stride, K, m, lo, hi, row);
    else
      std::memset(row, 0, K);
    for (i64 k = K; k < quads * 4; ++k) row[k] = 0;
    for (i64 k = 0; k < K; ++k) sum += row[k];
    for (i64 q = 0; q < quads; ++q) std::memcpy(block + (q * width + j) * 4, row + q * 4, 4);
    starts[j] = -zp * sum;
  }
}

// Packs one block of columns of x [K, columns] (v), in the same layout.
void pack_columns(const float* x, i64 stride, i64 K, i64 live, i64 width, float m, float lo, float hi, int zp,
                  int8_t* block, int32_t* starts) {
  int8_t row[4][BLOCK] = {};
  int32_t sums[BLOCK] = {};
  for (i64 k = 0; k < K; k += 4) {
    for (i64 r = 0; r < 4; ++r) {
      if (k + r < K)
        signed_codes(x + (k + r) * stride, live, m, lo, hi, row[r]);
      else
        std::memset(row[r], 0, BLOCK);
    }
    int8_t* dst = block + k * width;
    for (i64 j = 0; j < width; ++j)
      for (i64 r = 0; r < 4; ++r) dst[j * 4 + r] = row[r][j], sums[j] += row[r][j];
  }
  for (i64 j = 0; j < width; ++j) starts[j] = -zp * sums[j];
}

#endif

}  // namespace

// Computes both attention products on codes and the softmax between them.
//
// q, k, v: floats [N, H, S, D] with strides (sample, head, position) and contiguous channels. tables: 4 x 3 x H floats,
// (multiplier, lowest code, highest code) of q, k, v and probs. scores = acc * score_scale[h] (+ mask). out = acc *
// out_scale[h], [N, Sq, H D]. probs have zero point 0. mask: additive, with strides (sample, head, query), or null.
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
                std::min(width, Sk - first), width, tk[h], tk[H + h], tk[2 * H + h], -int(tq[H + h]), dst + first * Dp, start + first);
    } else {
      i64 first = (blk - k_blocks) * BLOCK, width = std::min<i64>(BLOCK, Dc - first);
      pack_columns(v + n * v_strides[0] + h * v_strides[1] + first, v_strides[2], Sk, std::min(width, D - first), width,
                   tv[h], tv[H + h], tv[2 * H + h], 0, dst + k_bytes + first * Sp, start + Sc + first);
    }
  }
  i64 rows = std::max<i64>(ROWS, std::min<i64>(24, 262144 / (Sc * 5) / ROWS * ROWS));
  if (RowProducts::on_tiles(Dp) || RowProducts::on_tiles(Sp)) rows = Sc * 5 * 32 <= 1 << 20 ? 32 : 16;
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
    // Codes of q count from the smallest code and codes of probs from 0: both are unsigned and as small as possible.
    int zq = -int(tq[H + h]), largest_q = zq + int(tq[2 * H + h]);
    auto magnitude = [&](const float* t) { return i64(std::max(-t[H + h], t[2 * H + h])); };
    i64 group_k = pairs_in_16_bits(std::max(1, largest_q), magnitude(tk));
    i64 group_v = pairs_in_16_bits(std::max<i64>(1, i64(tp[2 * H + h])), magnitude(tv));
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
  }
}
#endif  // DQ_PRODUCTS
