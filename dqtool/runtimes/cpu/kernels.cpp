// Fused channels-last kernels of the `cpu` runtime that PyTorch has no single operation for.
//
// The interface is plain C with raw pointers and without PyTorch's headers: it compiles in seconds and does not depend on
// PyTorch's ABI. Element-wise code is portable C++ that the compiler vectorises. The int8 products need AVX512-VNNI or AVX2
// (`dq_features` returns what was compiled in).
//
// Codes are unsigned bytes u = c + zp, where c is the centred code and zp a constant (128), or an 8-bit layer's zero point.
// A product's accumulators start at -zp * sum(w), so that they end as exactly sum(c * w).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>
#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

// Returns e^x for |x| < 87 with a relative error below 2e-7. Free of branches, so that loops around it vectorise.
inline float exp_(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  float n = std::nearbyint(x * 1.44269504088896341f);
  float f = std::fma(n, -0.693145751953125f, x);
  f = std::fma(n, -1.428606765330187e-6f, f);
  float p = 1.9875691500e-4f;
  p = std::fma(p, f, 1.3981999507e-3f);
  p = std::fma(p, f, 8.3334519073e-3f);
  p = std::fma(p, f, 4.1665795894e-2f);
  p = std::fma(p, f, 1.6666665459e-1f);
  p = std::fma(p, f, 5.0000001201e-1f);
  p = std::fma(p, f * f, f + 1.0f);
  int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}

inline float silu(float y) { return y / (1.0f + exp_(-y)); }

// GELU by tanh: 0.5 y (1 + tanh(z)) = y * sigmoid(2 z) with z = sqrt(2/pi) (y + 0.044715 y^3)
inline float gelu_tanh(float y) {
  float u = 1.5957691216057308f * (y + 0.044715f * y * y * y);
  return y / (1.0f + exp_(-u));
}

// GELU by erf, with Abramowitz & Stegun 7.1.26: an absolute error of 1.5e-7 is far below one code.
inline float gelu_erf(float y) {
  float x = std::fabs(y) * 0.70710678118654752f;
  float t = 1.0f / std::fma(0.3275911f, x, 1.0f);
  float p = 1.061405429f;
  p = std::fma(p, t, -1.453152027f);
  p = std::fma(p, t, 1.421413741f);
  p = std::fma(p, t, -0.284496736f);
  p = std::fma(p, t, 0.254829592f);
  float erf = 1.0f - p * t * exp_(-x * x);
  return 0.5f * y * (1.0f + std::copysign(erf, y));
}

enum Act { NONE = 0, SILU = 1, GELU_TANH = 2, GELU_ERF = 3, GEGLU = 4 };  // GEGLU: value * gelu(gate), in geglu_row

template <int ACT>
inline float act(float y) {
  if constexpr (ACT == SILU) return silu(y);
  if constexpr (ACT == GELU_TANH) return gelu_tanh(y);
  if constexpr (ACT == GELU_ERF) return gelu_erf(y);
  return y;
}

inline uint8_t code(float scaled, float lo, float hi, int zp) {
  float r = std::nearbyint(scaled);
  r = std::min(std::max(r, lo), hi);
  return static_cast<uint8_t>(static_cast<int32_t>(r) + zp);
}

// Quantizes one pixel of C channels. a, b: affine map before the activation, or null. m: multiplier, one or per channel.
template <int ACT, bool AFFINE, bool PER_CHANNEL>
void quantize_row(const float* __restrict x, uint8_t* __restrict out, i64 C, const float* __restrict a,
                  const float* __restrict b, const float* __restrict m, float lo, float hi, int zp) {
  float m0 = m[0];
#pragma omp simd
  for (i64 c = 0; c < C; ++c) {
    float y = x[c];
    if (AFFINE) y = std::fma(y, a[c], b[c]);
    y = act<ACT>(y);
    out[c] = code(y * (PER_CHANNEL ? m[c] : m0), lo, hi, zp);
  }
}

using RowFn = void (*)(const float*, uint8_t*, i64, const float*, const float*, const float*, float, float, int);

template <int ACT>
RowFn row_fn(bool affine, bool per_channel) {
  if (affine) return per_channel ? quantize_row<ACT, true, true> : quantize_row<ACT, true, false>;
  return per_channel ? quantize_row<ACT, false, true> : quantize_row<ACT, false, false>;
}

RowFn row_fn(int act, bool affine, bool per_channel) {
  switch (act) {
    case SILU: return row_fn<SILU>(affine, per_channel);
    case GELU_TANH: return row_fn<GELU_TANH>(affine, per_channel);
    case GELU_ERF: return row_fn<GELU_ERF>(affine, per_channel);
    default: return row_fn<NONE>(affine, per_channel);
  }
}

// Writes one row of C codes of value * gelu(gate).
void geglu_row(const float* __restrict value, const float* __restrict gate, uint8_t* __restrict out, i64 C, const float* m,
               bool per_channel, float lo, float hi, int zp) {
  float m0 = m[0];
  if (per_channel) {
#pragma omp simd
    for (i64 c = 0; c < C; ++c) out[c] = code(value[c] * gelu_erf(gate[c]) * m[c], lo, hi, zp);
  } else {
#pragma omp simd
    for (i64 c = 0; c < C; ++c) out[c] = code(value[c] * gelu_erf(gate[c]) * m0, lo, hi, zp);
  }
}

struct Scratch {  // one buffer per thread; grows, never shrinks
  void* data = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(data); }
  template <class T>
  T* get(size_t n) {
    size_t bytes = (n * sizeof(T) + 4095) / 4096 * 4096;
    if (bytes > size) {
      std::free(data);
      data = std::aligned_alloc(4096, bytes);
      size = bytes;
    }
    return static_cast<T*>(data);
  }
};
thread_local Scratch scratch_a, scratch_b, scratch_c;

// Quantizes channels [N, H, W, C] to padded codes [N, top + up H + bottom, left + up W + right, Cp]. The padding is zp, the
// code of zero. `up` repeats pixels: nearest upsampling commutes with the quantizer.
void quantize_padded(const float* x, uint8_t* out, i64 N, i64 H, i64 W, i64 C, i64 Cp, i64 top, i64 bottom, i64 left,
                     i64 right, i64 up, const float* a, const float* b, int act, const float* m, bool per_channel,
                     float lo, float hi, int zp) {
  RowFn fn = row_fn(act, a != nullptr, per_channel);
  H *= up, W *= up;
  i64 Hp = top + H + bottom, Wp = left + W + right;
  bool flat = Wp == W && Cp == C && a == nullptr && !per_channel && up == 1;
  parallel_for(N * Hp, EVEN, N * H * W * C > 16384, [&](i64 i) {
    i64 n = i / Hp, y = i % Hp - top;
    uint8_t* row = out + i * Wp * Cp;
    if (y < 0 || y >= H) {
      std::memset(row, zp, Wp * Cp);
      return;
    }
    std::memset(row, zp, left * Cp);
    std::memset(row + (left + W) * Cp, zp, right * Cp);
    const float* src = x + (n * (H / up) + y / up) * (W / up) * C;
    if (flat) {
      fn(src, row, W * C, nullptr, nullptr, m, lo, hi, zp);
      return;
    }
    for (i64 p = 0; p < W; ++p) {
      uint8_t* dst = row + (left + p) * Cp;
      if (p % up) {
        std::memcpy(dst, dst - Cp, Cp);
        continue;
      }
      fn(src + p / up * C, dst, C, a ? a + n * C : nullptr, b ? b + n * C : nullptr, m, lo, hi, zp);
      for (i64 c = C; c < Cp; ++c) dst[c] = static_cast<uint8_t>(zp);
    }
  });
}

}  // namespace

// Returns a bit set: 1 if int8 products are compiled in; 2 if they use AVX512-VNNI, which multiplies codes of any width at the
// same speed.
EXPORT int dq_features() {
#if defined(__AVX512VNNI__)
  return 3;
#elif defined(__AVX2__)
  return 1;
#else
  return 0;
#endif
}

EXPORT void dq_quantize(const float* x, uint8_t* out, i64 N, i64 H, i64 W, i64 C, i64 Cp, i64 top, i64 bottom, i64 left,
                        i64 right, i64 up, int act, const float* m, int per_channel, float lo, float hi, int zp) {
  quantize_padded(x, out, N, H, W, C, Cp, top, bottom, left, right, up, nullptr, nullptr, act, m, per_channel, lo, hi, zp);
}

// Applies group norm (G groups; gamma, beta [C] or null; extra_scale, extra_shift [N, C] or null: y = y (1 + scale) + shift),
// the activation and the quantizer. Statistics are float sums over short runs, added up in double.
EXPORT void dq_group_norm_quantize(const float* x, uint8_t* out, i64 N, i64 H, i64 W, i64 C, i64 Cp, i64 top, i64 bottom,
                                   i64 left, i64 right, i64 G, float eps, const float* gamma, const float* beta,
                                   const float* extra_scale, const float* extra_shift, int act, const float* m,
                                   int per_channel, float lo, float hi, int zp) {
  i64 pixels = H * W;
  // Chunks do not depend on the number of threads, so that sums have the same bits with any.
  i64 per = std::max<i64>(1, (pixels + 16 * 32 - 1) / (16 * 32)) * 32, chunks = std::max<i64>(1, (pixels + per - 1) / per);
  std::vector<double> sums(N * chunks * 2 * C, 0.0);
  parallel_for(N * chunks, EVEN, N * pixels * C > 16384, [&](i64 i) {
    i64 n = i / chunks, from = (i % chunks) * per, to = std::min(pixels, from + per);
    double* sum = sums.data() + i * 2 * C;
    double* square = sum + C;
    float* part = scratch_a.get<float>(2 * C);
    float* part2 = part + C;
    for (i64 p0 = from; p0 < to; p0 += 32) {
      std::memset(part, 0, 2 * C * sizeof(float));
      for (i64 p = p0; p < std::min(to, p0 + 32); ++p) {
        const float* row = x + (n * pixels + p) * C;
#pragma omp simd
        for (i64 c = 0; c < C; ++c) {
          part[c] += row[c];
          part2[c] = std::fma(row[c], row[c], part2[c]);
        }
      }
      for (i64 c = 0; c < C; ++c) sum[c] += part[c], square[c] += part2[c];
    }
  });
  std::vector<float> affine(2 * N * C);
  float *a = affine.data(), *b = a + N * C;
  i64 width = C / G;
  for (i64 n = 0; n < N; ++n)
    for (i64 g = 0; g < G; ++g) {
      double s = 0, q = 0;
      for (i64 k = 0; k < chunks; ++k) {
        const double* sum = sums.data() + (n * chunks + k) * 2 * C;
        for (i64 c = g * width; c < (g + 1) * width; ++c) s += sum[c], q += sum[C + c];
      }
      double count = double(pixels) * width, mean = s / count;
      double rstd = 1.0 / std::sqrt(std::max(0.0, q / count - mean * mean) + eps);
      for (i64 c = g * width; c < (g + 1) * width; ++c) {
        double scale = rstd * (gamma ? gamma[c] : 1.0f), shift = (beta ? beta[c] : 0.0f) - mean * scale;
        if (extra_scale) {
          double e = 1.0 + extra_scale[n * C + c];
          scale *= e;
          shift = shift * e + extra_shift[n * C + c];
        }
        a[n * C + c] = float(scale);
        b[n * C + c] = float(shift);
      }
    }
  quantize_padded(x, out, N, H, W, C, Cp, top, bottom, left, right, 1, a, b, act, m, per_channel, lo, hi, zp);
}

// Applies layer norm over the last dimension of [N, S, C] (gamma, beta [C] or null), then y (1 + scale[n]) + shift[n] (adaLN,
// or null), then the quantizer. Writes [N, S, Cp].
EXPORT void dq_layer_norm_quantize(const float* x, uint8_t* out, i64 N, i64 S, i64 C, i64 Cp, float eps,
                                   const float* gamma, const float* beta, const float* extra_scale,
                                   const float* extra_shift, const float* m, int per_channel, float lo, float hi, int zp) {
  RowFn fn = row_fn(NONE, true, per_channel);
  parallel_for(N * S, EVEN, N * S * C > 16384, [&](i64 i) {
    float* a = scratch_a.get<float>(2 * C);
    float* b = a + C;
    i64 n = i / S;
    const float* row = x + i * C;
    float sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 c = 0; c < C; ++c) sum += row[c];
    float mean = sum / C;
#pragma omp simd reduction(+ : square)
    for (i64 c = 0; c < C; ++c) {
      float d = row[c] - mean;
      square = std::fma(d, d, square);
    }
    float rstd = 1.0f / std::sqrt(square / C + eps);
    const float* es = extra_scale ? extra_scale + n * C : nullptr;
    const float* eb = extra_scale ? extra_shift + n * C : nullptr;
#pragma omp simd
    for (i64 c = 0; c < C; ++c) {
      float scale = rstd * (gamma ? gamma[c] : 1.0f), shift = (beta ? beta[c] : 0.0f) - mean * scale;
      float e = es ? 1.0f + es[c] : 1.0f;
      a[c] = scale * e;
      b[c] = std::fma(shift, e, eb ? eb[c] : 0.0f);
    }
    uint8_t* dst = out + i * Cp;
    fn(row, dst, C, a, b, m, lo, hi, zp);
    for (i64 c = C; c < Cp; ++c) dst[c] = static_cast<uint8_t>(zp);
  });
}

// Quantizes GEGLU: from rows [M, 2 C] = (value, gate) to codes [M, Cp] of value * gelu(gate).
EXPORT void dq_geglu_quantize(const float* x, uint8_t* out, i64 M, i64 C, i64 Cp, const float* m, int per_channel,
                              float lo, float hi, int zp) {
  parallel_for(M, EVEN, M * C > 16384, [&](i64 i) {
    uint8_t* dst = out + i * Cp;
    geglu_row(x + i * 2 * C, x + (i * 2 + 1) * C, dst, C, m, per_channel, lo, hi, zp);
    for (i64 c = C; c < Cp; ++c) dst[c] = static_cast<uint8_t>(zp);
  });
}
