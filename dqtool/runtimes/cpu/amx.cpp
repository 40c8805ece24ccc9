// Matrix products on AMX tiles: the same packed weights and the same accumulators as tiles.cpp. Compiled after tiles.cpp, in
// the same translation unit.
//
// A tile holds up to 16 rows of up to 64 bytes. One instruction multiplies 16 rows of 64 codes with 64 x 16 packed weights,
// the work of 64 AVX512-VNNI instructions. The rows of a tile have a constant stride in memory, so positions are cut into
// stretches with a constant stride.
#if defined(__AVX512VNNI__) && (defined(__AMX_INT8__) || defined(DQ_TILE_LOAD))
#define DQ_AMX 1

#ifndef DQ_TILE_LOAD  // the tests put an emulation here
#include <sys/syscall.h>
#include <unistd.h>
// Every macro is a memory barrier: the compiler must not move loads or stores across tile instructions. Operands are tile
// numbers.
#define DQ_TILE_LOAD(tile, base, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(base), "r"(i64(stride)) : "memory")
#define DQ_TILE_STORE(tile, base, stride) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(base), "r"(i64(stride)) : "memory")
#define DQ_TILE_MULTIPLY(sum, codes, weights) \
  asm volatile("tdpbusd %%tmm" #weights ", %%tmm" #codes ", %%tmm" #sum : : : "memory")
#define DQ_TILES_GET(config) asm volatile("sttilecfg %0" : "=m"(config) : : "memory")
#define DQ_TILES_SET(config) asm volatile("ldtilecfg %0" : : "m"(config) : "memory")
#define DQ_TILES_GRANTED() (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0)
#endif

namespace {

bool use_amx = false;  // set by dq_use_amx

constexpr int TALL = 16;          // rows of a tile
constexpr i64 DEEP = 64;          // bytes of a row
constexpr i64 SHALLOW = 32;       // smallest depth at which tiles are faster than vectors
constexpr i64 FEW = 4;            // number of rows up to which vectors are as fast
constexpr int PANEL = 2 * TALL;   // rows of accumulators for one load of weights: 2 x 2 tiles

struct alignas(64) TileConfig {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// Sets the tile shapes of this thread. The destructor restores the earlier shapes, because other libraries rely on theirs.
class Tiles {
 public:
  Tiles() = default;
  ~Tiles() {
    if (now_.palette) DQ_TILES_SET(before_);
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  // `rows` rows of codes of `depth` bytes. Tiles 0 to 3 hold sums, 4 and 5 codes, 6 and 7 weights.
  void shape(i64 rows, i64 depth) {
    if (now_.palette && now_.rows[4] == rows && now_.row_bytes[4] == depth) return;
    if (!now_.palette) DQ_TILES_GET(before_);
    now_.palette = 1;
    for (int t = 0; t < 8; ++t) {
      now_.rows[t] = static_cast<uint8_t>(t < 6 ? rows : depth / 4);
      now_.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? depth : 64);
    }
    DQ_TILES_SET(now_);
  }

 private:
  TileConfig before_, now_;
};

// Returns the number of bytes of K that one tile takes: a divisor of K and a multiple of 4. Returns 0 if vectors are faster.
inline i64 tile_depth(i64 K) {
  for (i64 depth = DEEP; depth >= SHALLOW; depth -= 4)
    if (K % depth == 0) return depth;
  return 0;
}

// Cuts positions with a constant stride into tiles of `rows` rows. The last tile may overlap the one before.
struct Cut {
  i64 length, tiles, rows;
  explicit Cut(i64 length) : length(length), tiles((length + TALL - 1) / TALL), rows((length + tiles - 1) / tiles) {}
  i64 first(i64 tile) const { return std::min(tile * rows, length - rows); }
};

// Computes c = start + sum over taps and K for two tiles of rows (at a0 and a1) and two tiles of columns, or one of each.
// `quad`: bytes from the weights of four channels to those of the next four. `slice`: bytes from one tap to the next. The
// sums of the second tile of rows follow those of the first.
template <bool TWO_ROWS, bool TWO_COLUMNS>
void multiply_tiles(const uint8_t* a0, const uint8_t* a1, i64 distance, const i64* taps, int n_taps, i64 K, i64 depth,
                    const int8_t* b, i64 slice, i64 quad, const int32_t* start, i64 rows, int32_t* c, i64 ldc) {
  DQ_TILE_LOAD(0, start, 0);  // stride 0: all rows have the same start
  if constexpr (TWO_COLUMNS) DQ_TILE_LOAD(1, start + 16, 0);
  if constexpr (TWO_ROWS) DQ_TILE_LOAD(2, start, 0);
  if constexpr (TWO_ROWS && TWO_COLUMNS) DQ_TILE_LOAD(3, start + 16, 0);
  for (int t = 0; t < n_taps; ++t) {
    const int8_t* w = b + t * slice;
    for (i64 k = 0; k < K; k += depth, w += depth / 4 * quad) {
      DQ_TILE_LOAD(4, a0 + taps[t] + k, distance);
      DQ_TILE_LOAD(6, w, quad);
      DQ_TILE_MULTIPLY(0, 4, 6);
      if constexpr (TWO_COLUMNS) {
        DQ_TILE_LOAD(7, w + 64, quad);
        DQ_TILE_MULTIPLY(1, 4, 7);
      }
      if constexpr (TWO_ROWS) {
        DQ_TILE_LOAD(5, a1 + taps[t] + k, distance);
        DQ_TILE_MULTIPLY(2, 5, 6);
        if constexpr (TWO_COLUMNS) DQ_TILE_MULTIPLY(3, 5, 7);
      }
    }
  }
  int32_t* below = c + rows * ldc;
  DQ_TILE_STORE(0, c, ldc * 4);
  if constexpr (TWO_COLUMNS) DQ_TILE_STORE(1, c + 16, ldc * 4);
  if constexpr (TWO_ROWS) DQ_TILE_STORE(2, below, ldc * 4);
  if constexpr (TWO_ROWS && TWO_COLUMNS) DQ_TILE_STORE(3, below + 16, ldc * 4);
}

// Computes the sums of a block of `width` columns. A null a1 means one tile of rows.
inline void multiply_block(const uint8_t* a0, const uint8_t* a1, i64 distance, const i64* taps, int n_taps, i64 K, i64 depth,
                           const int8_t* block, i64 width, const int32_t* start, i64 rows, int32_t* c, i64 ldc) {
  for (i64 j = 0; j < width; j += 32) {
    auto run = width - j > 16 ? (a1 ? multiply_tiles<true, true> : multiply_tiles<false, true>)
                              : (a1 ? multiply_tiles<true, false> : multiply_tiles<false, false>);
    run(a0, a1, distance, taps, n_taps, K, depth, block + j * 4, K * width, width * 4, start + j, rows, c + j, ldc);
  }
}

// Does the work of `multiply_rows` on tiles. K must have a tile depth.
inline void multiply_rows(Tiles& tiles, const uint8_t* a, i64 lda, i64 rows, const int8_t* packed, const int32_t* starts,
                          i64 columns, i64 K, int32_t* c, i64 ldc) {
  Cut cut(rows);
  i64 padded = (columns + 15) / 16 * 16, depth = tile_depth(K), tap = 0;
  tiles.shape(cut.rows, depth);
  for (i64 first = 0; first < padded; first += BLOCK)
    for (i64 tile = 0; tile < cut.tiles;) {
      i64 row = cut.first(tile);
      bool two = tile + 1 < cut.tiles && cut.first(tile + 1) == row + cut.rows;
      multiply_block(a + row * lda, two ? a + (row + cut.rows) * lda : nullptr, lda, &tap, 1, K, depth, packed + first * K,
                     std::min<i64>(BLOCK, padded - first), starts + first, cut.rows, c + row * ldc + first, ldc);
      tile += two ? 2 : 1;
    }
}

// Layout of a convolution's positions: `count` stretches of `cut.length` positions, `per_image` stretches in an image. Of
// every `width` positions of a stretch, the first `useful` are results and the rest lie over the padding.
struct Stretches {
  Cut cut;
  i64 count, per_image, width, useful;
  i64 cost() const { return count * cut.tiles * (TALL + cut.rows); }
};

inline Stretches stretches(i64 N, i64 Hp, i64 Wp, i64 Ho, i64 Wo, i64 sy, i64 sx) {
  if (sy == 1 && sx == 1 && Hp == Ho && Wp == Wo) return {Cut(N * Ho * Wo), 1, 1, N * Ho * Wo, N * Ho * Wo};
  Stretches rows{Cut(Wo), N * Ho, Ho, Wo, Wo};
  if (sy != 1 || sx != 1) return rows;
  Stretches images{Cut((Ho - 1) * Wp + Wo), N, 1, Wp, Wo};  // small images: a stretch runs over the padding into the next row
  return images.cost() < rows.cost() ? images : rows;
}

// Does the work of `convolve` on tiles. Returns false, with nothing done, if vectors are as fast.
bool conv_on_tiles(const uint8_t* in, const int8_t* w, const int32_t* sums, int zp, i64 N, i64 Hp, i64 Wp, i64 Cp, i64 Ho,
                   i64 Wo, i64 Cop, const i64* taps, int n_taps, i64 sy, i64 sx, i64 sample_pixels, i64 stripe,
                   const Results& results) {
  const i64 depth = tile_depth(Cp);
  if (!use_amx || !depth || N * Ho * Wo < FEW) return false;
  const Stretches s = stretches(N, Hp, Wp, Ho, Wo, sy, sx);
  if (s.cut.length < FEW) return false;
  const i64 stripes = (Cop + stripe - 1) / stripe, image = Ho * Wo;
  const i64 in_stretch = (s.cut.tiles + 1) / 2, panels = s.count * in_stretch;
  const i64 pixels_of_one = s.cut.length / s.width * s.useful + std::min(s.cut.length % s.width, s.useful);
  const i64 group = std::max<i64>(1, std::min<i64>(8, panels * stripes / (4 * thread_count())));
  const i64 groups = (panels + group - 1) / group;
  parallel_for(groups * stripes, 1, N * image * Cop * Cp * n_taps > 200000, [&](i64 item) {
    Tiles tiles;
    tiles.shape(s.cut.rows, depth);
    alignas(64) int32_t acc[PANEL * BLOCK], start[WIDEST];
    float* room = scratch_a.get<float>(PANEL * WIDEST);
    const i64 left = item % stripes * stripe, right = std::min(Cop, left + stripe), from = item / stripes * group;
    for (i64 j = left; j < right; ++j) start[j - left] = -zp * sums[j];
    for (i64 panel = from; panel < std::min(panels, from + group); ++panel) {
      const i64 stretch = panel / in_stretch, tile = panel % in_stretch * 2;
      const bool two = tile + 1 < s.cut.tiles;
      const uint8_t* base = in + (stretch / s.per_image * Hp * Wp + stretch % s.per_image * sy * Wp) * Cp;
      auto codes = [&](i64 t) { return base + s.cut.first(t) * sx * Cp; };
      const i64 rows = (two ? 2 : 1) * s.cut.rows;
      i64 pixels[PANEL], samples[PANEL];  // destination of each row of sums; -1: dropped
      for (i64 i = 0; i < rows; ++i) {
        i64 t = tile + i / s.cut.rows, position = s.cut.first(t) + i % s.cut.rows;
        bool new_one = position >= t * s.cut.rows && position % s.width < s.useful;
        pixels[i] = new_one ? stretch * pixels_of_one + position / s.width * s.useful + position % s.width : -1;
        samples[i] = pixels[i] / (sample_pixels ? sample_pixels : image);
      }
      for (i64 first = left; first < right; first += BLOCK) {
        const i64 width = std::min<i64>(BLOCK, right - first);
        multiply_block(codes(tile), two ? codes(tile + 1) : nullptr, sx * Cp, taps, n_taps, Cp, depth,
                       w + first * Cp * n_taps, width, start + first - left, s.cut.rows, acc, BLOCK);
        results.block(acc, int(rows), int(width / LANES), samples, pixels, first, left, right, room);
      }
      for (i64 i = 0; i < rows; ++i)
        if (pixels[i] >= 0) results.row(pixels[i], left, right, room + i * WIDEST);
    }
  });
  return true;
}

}  // namespace
#endif

#ifdef DQ_PRODUCTS
namespace {

// Multiplies rows [rows, K] of unsigned bytes with packed columns: on tiles if AMX is in use and K suits them, else on vectors.
class RowProducts {
 public:
  static bool on_tiles([[maybe_unused]] i64 K) {
#ifdef DQ_AMX
    return use_amx && tile_depth(K);
#else
    return false;
#endif
  }

  // `group`: defined in tiles.cpp.
  void multiply(const uint8_t* a, i64 K, i64 rows, const int8_t* packed, const int32_t* starts, i64 columns, int32_t* c,
                i64 ldc, i64 group) {
#ifdef DQ_AMX
    if (on_tiles(K)) return multiply_rows(tiles_, a, K, rows, packed, starts, columns, K, c, ldc);
#endif
    multiply_rows(a, K, rows, packed, starts, columns, K / 4, c, ldc, group);
  }

 private:
#ifdef DQ_AMX
  Tiles tiles_;
#endif
};

}  // namespace
#endif

// Switches matrix tiles on or off. They are on if `wanted`, compiled in, and granted by the operating system (asked here).
EXPORT void dq_use_amx([[maybe_unused]] int wanted) {
#ifdef DQ_AMX
  use_amx = wanted && DQ_TILES_GRANTED();
#endif
}

// Returns true if products over K bytes run on tiles.
EXPORT int dq_on_tiles([[maybe_unused]] i64 K) {
#ifdef DQ_PRODUCTS
  return RowProducts::on_tiles(K);
#else
  return 0;
#endif
}
