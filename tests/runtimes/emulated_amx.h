// AMX's matrix tiles in plain C++, for processors without them: what the instructions of `amx.cpp` do, and what they refuse.
// Goes before the kernels (`-include`).
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

inline thread_local Config config;  // zeros: no tiles
inline thread_local uint8_t tiles[8][16][64];
inline long multiplications;

inline void demand(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "a processor would refuse this: %s\n", what);
  std::abort();
}

inline void set(const Config& wanted) {
  if (wanted.palette) {
    demand(wanted.palette == 1 && wanted.start_row == 0, "a palette that is not 1");
    for (int i = 0; i < 16; ++i) {
      demand(i < 14 ? !wanted.reserved[i] : true, "reserved bytes that are not zero");
      demand(wanted.rows[i] <= 16 && wanted.row_bytes[i] <= 64, "a tile larger than 16 rows of 64 bytes");
      demand(!wanted.rows[i] == !wanted.row_bytes[i], "a tile with one side of zero");
      demand(i < 8 || !wanted.rows[i], "a ninth tile");
    }
  }
  config = wanted.palette ? wanted : Config{};
  std::memset(tiles, 0, sizeof(tiles));
}

inline void there(int tile) { demand(config.palette && config.rows[tile], "a tile that is not configured"); }

inline void load(int tile, const void* base, int64_t stride) {
  there(tile);
  std::memset(tiles[tile], 0, sizeof(tiles[tile]));
  for (int r = 0; r < config.rows[tile]; ++r)
    std::memcpy(tiles[tile][r], static_cast<const char*>(base) + r * stride, config.row_bytes[tile]);
}

inline void store(int tile, void* base, int64_t stride) {
  there(tile);
  for (int r = 0; r < config.rows[tile]; ++r)
    std::memcpy(static_cast<char*>(base) + r * stride, tiles[tile][r], config.row_bytes[tile]);
}

// TDPBUSD: unsigned bytes of `a` times signed bytes of `b`, four products to one 32-bit sum.
inline void multiply(int sum, int a, int b) {
  there(sum), there(a), there(b);
  demand(config.rows[a] == config.rows[sum], "codes and sums of different rows");
  demand(config.row_bytes[b] == config.row_bytes[sum], "weights and sums of different columns");
  demand(config.row_bytes[a] == 4 * config.rows[b], "codes and weights of different depths");
  __atomic_fetch_add(&multiplications, 1, __ATOMIC_RELAXED);
  for (int m = 0; m < config.rows[sum]; ++m)
    for (int n = 0; n < config.row_bytes[sum] / 4; ++n) {
      int32_t total;
      std::memcpy(&total, tiles[sum][m] + 4 * n, 4);
      for (int k = 0; k < config.row_bytes[a]; ++k)
        total += int(tiles[a][m][k]) * int(static_cast<int8_t>(tiles[b][k / 4][4 * n + k % 4]));
      std::memcpy(tiles[sum][m] + 4 * n, &total, 4);
    }
}

}  // namespace emulated

#define DQ_TILE_LOAD(tile, base, stride) emulated::load(tile, base, stride)
#define DQ_TILE_STORE(tile, base, stride) emulated::store(tile, base, stride)
#define DQ_TILE_MULTIPLY(sum, codes, weights) emulated::multiply(sum, codes, weights)
#define DQ_TILES_GET(to) std::memcpy(&(to), &emulated::config, sizeof(to))
#define DQ_TILES_SET(from) emulated::set(reinterpret_cast<const emulated::Config&>(from))
#define DQ_TILES_GRANTED() true

#define DQ_EMULATED extern "C" __attribute__((visibility("default")))
DQ_EMULATED long emulated_multiplications() { return emulated::multiplications; }
DQ_EMULATED void emulated_get(void* to) { std::memcpy(to, &emulated::config, sizeof(emulated::Config)); }
DQ_EMULATED void emulated_set(const void* from) { emulated::set(*static_cast<const emulated::Config*>(from)); }
