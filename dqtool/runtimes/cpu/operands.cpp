// Operands of attention as codes: keys and values in the layout of a packed weight. Compiled after softmax.cpp, in the same
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

#else

inline __m256i signed_codes(__m256 x, float m, float lo, float hi) {
  __m256 y = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(m)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(y, _mm256_set1_ps(lo)), _mm256_set1_ps(hi)));
}

// Packs one block of columns (`live` of `width`) of a right-hand operand as signed codes in the layout of a packed weight,
// [K / 4][columns][4], and sets starts = -zp * (sums over K). Rows of x become columns (k: x is [columns, K]).
void pack_rows(const float* x, i64 stride, i64 K, i64 live, i64 width, float m, float lo, float hi, int zp, int8_t* block,
               int32_t* starts) {
  const i64 quads = (K + 3) / 4;
  int32_t* words = reinterpret_cast<int32_t*>(block);
  const __m256i low_bytes = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  for (i64 j = 0; j < width; ++j) {
    __m256i sum = _mm256_setzero_si256();
    for (i64 k = 0; k < K; k += 8) {
      __m256i c = _mm256_setzero_si256();
      if (j < live)  // codes of zero are zeros
        c = signed_codes(K - k >= 8 ? _mm256_loadu_ps(x + j * stride + k) : _mm256_maskload_ps(x + j * stride + k, lanes(K - k)), m, lo, hi);
      sum = _mm256_add_epi32(sum, c);
      __m256i bytes = _mm256_shuffle_epi8(c, low_bytes);
      words[k / 4 * width + j] = _mm256_extract_epi32(bytes, 0);
      if (k / 4 + 1 < quads) words[(k / 4 + 1) * width + j] = _mm256_extract_epi32(bytes, 4);
    }
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    starts[j] = -zp * (_mm_cvtsi128_si32(half) + _mm_extract_epi32(half, 1));
  }
}

// Packs one block of columns of x [K, columns] (v), in the same layout.
void pack_columns(const float* x, i64 stride, i64 K, i64 live, i64 width, float m, float lo, float hi, int zp,
                  int8_t* block, int32_t* starts) {
  const __m256i byte = _mm256_set1_epi32(0xff);
  for (i64 j = 0; j < width; j += 8) {
    const __m256i mask = lanes(live - j);
    __m256i sum = _mm256_setzero_si256();
    for (i64 k = 0; k < K; k += 4) {
      __m256i word = _mm256_setzero_si256();
      for (i64 r = 0; r < std::min<i64>(4, K - k); ++r) {
        __m256i c = signed_codes(_mm256_maskload_ps(x + (k + r) * stride + j, mask), m, lo, hi);
        sum = _mm256_add_epi32(sum, c);
        word = _mm256_or_si256(word, _mm256_sllv_epi32(_mm256_and_si256(c, byte), _mm256_set1_epi32(int(8 * r))));
      }
      store(block + (k / 4 * width + j) * 4, word);
    }
    store(starts + j, _mm256_mullo_epi32(sum, _mm256_set1_epi32(-zp)));
  }
}

#endif

}  // namespace
#endif  // DQ_PRODUCTS
