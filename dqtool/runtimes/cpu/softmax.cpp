// Softmax of attention scores, to codes. Compiled after results.cpp, in the same translation unit.
#ifdef DQ_PRODUCTS
namespace {

#if defined(__AVX512VNNI__)

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

// The same operations in the same order as on AVX512, with two registers for each of its own: sums have the same bits.

struct Pair {
  __m256 low, high;
};

inline __m256i load_sums(const int32_t* from) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(from)); }

// Returns ones in the first `left` lanes.
inline __m256i lanes(i64 left) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(std::min<i64>(left, 8))), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline float add_all(Pair x) {
  __m256 a = _mm256_add_ps(x.high, x.low);
  __m128 b = _mm_add_ps(_mm256_extractf128_ps(a, 1), _mm256_castps256_ps128(a));
  b = _mm_add_ps(_mm_movehl_ps(b, b), b);
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

inline float largest_of(__m256 a) {
  __m128 b = _mm_max_ps(_mm256_extractf128_ps(a, 1), _mm256_castps256_ps128(a));
  b = _mm_max_ps(_mm_movehl_ps(b, b), b);
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}

inline int32_t largest_of(__m256i a) {
  __m128i b = _mm_max_epi32(_mm256_extracti128_si256(a, 1), _mm256_castsi256_si128(a));
  b = _mm_max_epi32(_mm_shuffle_epi32(b, 0x4e), b);
  return _mm_cvtsi128_si32(_mm_max_epi32(_mm_shuffle_epi32(b, 0xb1), b));
}

// Returns 2^x for x <= 0 with a relative error below 2e-7: a polynomial of degree 5 on [-1/2, 1/2], exact at 0. Returns
// 2^-126 for x < -126.
inline __m256 exp2_of_negative(__m256 x) {
  x = _mm256_max_ps(x, _mm256_set1_ps(-126.0f));
  const __m256 magic = _mm256_set1_ps(12582912.0f);  // 1.5 * 2^23: the sum's last bits are x rounded to an integer
  __m256 n = _mm256_add_ps(x, magic);
  __m256 f = _mm256_sub_ps(x, _mm256_sub_ps(n, magic));
  __m256 p = _mm256_set1_ps(1.326472731e-3f);
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.671512991e-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.550733581e-2f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.402224243e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.931470037e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
}

// Writes the codes of softmax(sums * scale (+ add)) over `n` sums, with zero point 0. Overwrites `sums`, which is aligned to
// registers and padded to a whole number of them. Codes from `n` to `padded` are zeros.
void softmax_codes(int32_t* sums, i64 n, i64 padded, float scale, const float* add, float m, float hi, uint8_t* codes) {
  float* s = reinterpret_cast<float*>(sums);
  const __m256 factor = _mm256_set1_ps(scale * 1.44269504088896341f);  // base 2 instead of e
  const i64 whole = n / 16 * 16;
  Pair total{_mm256_setzero_ps(), _mm256_setzero_ps()};
  auto each = [&](auto value) {  // stores 2^value(j) for all j, and adds it up
    for (i64 j = 0; j < whole; j += 16) {
      __m256 low = exp2_of_negative(value(j)), high = exp2_of_negative(value(j + 8));
      _mm256_store_ps(s + j, low), _mm256_store_ps(s + j + 8, high);
      total.low = _mm256_add_ps(total.low, low), total.high = _mm256_add_ps(total.high, high);
    }
    for (i64 j = whole; j < n; j += 8) {
      __m256 y = _mm256_and_ps(exp2_of_negative(value(j)), _mm256_castsi256_ps(lanes(n - j)));
      _mm256_store_ps(s + j, y);
      __m256& sum = j == whole ? total.low : total.high;
      sum = _mm256_add_ps(sum, y);
    }
  };
  if (!add && scale > 0) {  // the largest sum has the largest score, and integer differences are exact
    const __m256i least = _mm256_set1_epi32(INT32_MIN);
    __m256i low = least, high = least;
    for (i64 j = 0; j < whole; j += 16)
      low = _mm256_max_epi32(low, load_sums(sums + j)), high = _mm256_max_epi32(high, load_sums(sums + j + 8));
    for (i64 j = whole; j < n; j += 8)
      low = _mm256_max_epi32(low, _mm256_blendv_epi8(least, load_sums(sums + j), lanes(n - j)));
    const __m256i top = _mm256_set1_epi32(largest_of(_mm256_max_epi32(low, high)));
    each([&](i64 j) { return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(load_sums(sums + j), top)), factor); });
  } else {
    const __m256 of_add = _mm256_set1_ps(1.44269504088896341f), least = _mm256_set1_ps(-INFINITY);
    __m256 top = least;
    for (i64 j = 0; j < n; j += 8) {
      const __m256i mask = lanes(n - j);
      __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(load_sums(sums + j)), factor);
      if (add) y = _mm256_fmadd_ps(_mm256_maskload_ps(add + j, mask), of_add, y);
      _mm256_store_ps(s + j, y);
      top = _mm256_max_ps(top, _mm256_blendv_ps(least, y, _mm256_castsi256_ps(mask)));
    }
    const __m256 largest = _mm256_set1_ps(largest_of(top));
    each([&](i64 j) { return _mm256_sub_ps(_mm256_load_ps(s + j), largest); });
  }
  const __m256 to_code = _mm256_set1_ps(m / add_all(total));
  const __m256i most = _mm256_set1_epi16(int16_t(hi)), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  auto words = [&](i64 j) {  // the conversion rounds to nearest, ties to even
    __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(s + j), to_code));
    __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(s + j + 8), to_code));
    return _mm256_min_epi16(_mm256_packs_epi32(low, high), most);
  };
  i64 j = 0;
  for (; j + 32 <= n; j += 32) {
    __m256i bytes = _mm256_packus_epi16(words(j), words(j + 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + j), _mm256_permutevar8x32_epi32(bytes, order));
  }
  for (; j < n; j += 8) {  // powers after `n` are zeros
    __m256i c = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(s + j), to_code));
    __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
    half = _mm_min_epi16(half, _mm256_castsi256_si128(most));
    uint64_t bytes = uint64_t(_mm_cvtsi128_si64(_mm_packus_epi16(half, half)));
    std::memcpy(codes + j, &bytes, size_t(std::min<i64>(8, padded - j)));
  }
}

#endif

}  // namespace
#endif  // DQ_PRODUCTS
