// Tiles of accumulators: the part of the int8 products that depends on the instruction set. Compiled after kernels.cpp, in the
// same translation unit.
//
// A packed weight is cut into blocks of BLOCK columns, [block][tap][channels / 4][columns][4]. With AVX512-VNNI one instruction
// multiplies four bytes and adds the products into 32 bits. AVX2 adds pairs of products in 16 bits, and saturates. `group` is
// the number of such pairs that fit 16 bits for the codes at hand, so that every sum is exact. With 0 (not even one pair fits)
// AVX2 reads codes in 16 bits.
#if defined(__AVX512VNNI__) || defined(__AVX2__)
#define DQ_PRODUCTS 1
namespace {

// Largest number of columns of a work item, and largest size of their weights in bytes, where writing results takes as long
// as multiplying.
#if defined(__AVX512VNNI__)
constexpr int WIDEST = 640;
#else
constexpr int WIDEST = 128;
#endif
constexpr i64 STRIPE_BYTES = 256 << 10;

struct Epilogue {  // y = ((acc * scale + bias) * gate + residual) * post
  const float* scale;
  float input_scale;
  const float* bias;
  i64 bias_stride;  // 0: all samples have the same bias
  const float* gate;
  i64 gate_stride;
  const float* residual;
  float post;
};

// Destination of a block's rows: row i goes to `base + apart * (pixel of row i, or i)`.
struct Place {
  float* base;
  i64 apart;
  bool by_pixel;
  float* row(i64 i, i64 pixel) const { return base + apart * (by_pixel ? pixel : i); }
};

}  // namespace
#endif
