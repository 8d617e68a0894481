// The plain C++ twin of the tile instructions, for tests/kernels/test_tiles.py.
#include "../../csrc/tiles.h"

using Tiles = fastssl::TwinTiles;

// sums += A B with tiles of `rows` rows and of `a_bytes` and `b_bytes` bytes in a row; all strides are 64 bytes.
extern "C" void multiply(const void* a, const void* b, void* sums, int rows, int a_bytes, int b_bytes) {
  fastssl::TileConfig config;
  for (int tile = 0; tile < 3; ++tile) config.rows[tile] = tile == 2 ? a_bytes / 4 : rows;
  config.row_bytes[0] = config.row_bytes[2] = b_bytes;
  config.row_bytes[1] = a_bytes;
  Tiles::configure(config);
  Tiles::load<0>(sums, 64);
  Tiles::load<1>(a, 64);
  Tiles::load<2>(b, 64);
  Tiles::multiply_add<0, 1, 2>();
  Tiles::store<0>(sums, 64);
  Tiles::release();
}

// C [16 R, 16 N] = A B or C += A B by multiply_tiles.
extern "C" void multiply_block(const uint32_t* a, const uint32_t* b, float* c, int rows, int lanes, int depth,
                               bool accumulate) {
  Tiles::configure(fastssl::TileConfig::whole());
  const auto multiply = [&]<int R, int N>() {
    if (accumulate)
      fastssl::multiply_tiles<Tiles, R, N, true>(depth, a, depth, b, 16 * N, c, 16 * N);
    else
      fastssl::multiply_tiles<Tiles, R, N, false>(depth, a, depth, b, 16 * N, c, 16 * N);
  };
  if (rows == 32 && lanes == 32) multiply.operator()<2, 2>();
  if (rows == 32 && lanes == 16) multiply.operator()<2, 1>();
  if (rows == 16 && lanes == 32) multiply.operator()<1, 2>();
  if (rows == 16 && lanes == 16) multiply.operator()<1, 1>();
  Tiles::release();
}

extern "C" bool multiplies_correctly() { return fastssl::multiplies_correctly<Tiles>(); }
