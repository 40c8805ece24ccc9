// Grouped Hadamard rotation of channels, in the order of additions that `dqtool/core/rotation.py` fixes: the floats are the same,
// bit for bit.

namespace {

constexpr i64 WIDTH = 16;
using Vector = float __attribute__((vector_size(4 * WIDTH)));
using Indices = int __attribute__((vector_size(4 * WIDTH)));

// Adds and subtracts the values that are HALF lanes apart: the lower gets a + b, the upper a - b.
template <int HALF>
inline Vector within(Vector x) {
  Indices order{};
  Vector sign{};
  for (int i = 0; i < WIDTH; ++i) {
    order[i] = i ^ HALF;
    sign[i] = i & HALF ? -1.0f : 1.0f;
  }
  return __builtin_shuffle(x, order) + x * sign;
}

template <i64 SIZE>
inline void rotate_group(const float* x, float* out, float factor) {
  constexpr i64 PARTS = SIZE / WIDTH;
  Vector v[PARTS];
  for (i64 p = 0; p < PARTS; ++p) {
    std::memcpy(&v[p], x + p * WIDTH, sizeof(Vector));
    v[p] = within<8>(within<4>(within<2>(within<1>(v[p]))));
  }
  for (i64 half = 1; half < PARTS; half *= 2)
    for (i64 p = 0; p < PARTS; ++p)
      if (!(p & half)) {
        Vector low = v[p], high = v[p + half];
        v[p] = low + high;
        v[p + half] = low - high;
      }
  for (i64 p = 0; p < PARTS; ++p) {
    v[p] *= factor;
    std::memcpy(out + p * WIDTH, &v[p], sizeof(Vector));
  }
}

}  // namespace

// Rotates `count` groups of `size` floats (16, 32 or 64), which lie one after the other; `x` and `out` may be the same.
EXPORT void dq_rotate(const float* x, float* out, i64 count, i64 size, float factor) {
  parallel_for(count, EVEN, count * size > 16384, [&](i64 i) {
    const float* from = x + i * size;
    float* to = out + i * size;
    if (size == 16) rotate_group<16>(from, to, factor);
    else if (size == 32) rotate_group<32>(from, to, factor);
    else rotate_group<64>(from, to, factor);
  });
}
