// Products of blocks of bfloat16, summed in float32, by whatever the processor has: tiles (AMX) or the bf16 dot product
// of AVX-512. Both take pairs along the depth, so kernels written for one layout run on either, and in tests on tiles
// in plain C++ at every instruction set.
//
// Rows of A are contiguous: pairs of neighbours. B is packed in panels, [depth][kPanelWidth] pairs each. Rows, lanes
// and depth are padded with zeros to whole tiles: 16 rows, kPanelWidth lanes, 16 pairs.
#pragma once

#include "microkernel.h"
#include "tiles.h"

#if defined(__AVX512BF16__)
#include "avx512_bf16.h"
#endif

namespace fastssl {

inline bool uses_bf16_products() { return bf16_products.load(std::memory_order_relaxed) != Bf16Products::kNone; }

// Loads the configuration of the tiles for the calling thread and releases them at the end of the scope: torch and its
// libraries use tiles too, and a thread that holds tiles takes longer to switch.
class TileScope {
 public:
  TileScope() : products_(bf16_products.load(std::memory_order_relaxed)) {
    TileConfig config = TileConfig::whole();
    if (kPanelWidth<Bf16x2> < kTileWords)  // tiles of sums and of B have the lanes of a panel
      for (const int t : {0, 1, 2, 3, 6, 7}) config.row_bytes[t] = 4 * kPanelWidth<Bf16x2>;
#if defined(FASTSSL_TILES)
    if (products_ == Bf16Products::kTiles) HardwareTiles::configure(config);
#endif
    if (products_ == Bf16Products::kTwin) TwinTiles::configure(config);
  }
  ~TileScope() {
#if defined(FASTSSL_TILES)
    if (products_ == Bf16Products::kTiles) HardwareTiles::release();
#endif
    if (products_ == Bf16Products::kTwin) TwinTiles::release();
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  Bf16Products products_;
};

template <typename Tiles, bool kAccumulate>
void multiply_panel_on_tiles(int64_t rows, int64_t depth, const Bf16x2* a, int64_t a_stride, const Bf16x2* b, float* c,
                             int64_t c_stride, int64_t b_stride) {
  constexpr int kWidth = kPanelWidth<Bf16x2>, N = kWidth > kTileWords ? 2 : 1;
  for (; rows > kTileRows16; rows -= 2 * kTileRows16, a += 2 * kTileRows16 * a_stride, c += 2 * kTileRows16 * c_stride)
    multiply_tiles<Tiles, 2, N, kAccumulate>(depth, a, a_stride, b, b_stride, c, c_stride);
  if (rows > 0) multiply_tiles<Tiles, 1, N, kAccumulate>(depth, a, a_stride, b, b_stride, c, c_stride);
}

// C[rows, kPanelWidth] = A[rows, depth] B[depth, kPanelWidth], or C += A B, inside a TileScope.
template <bool kAccumulate>
void multiply_bf16(int64_t rows, int64_t depth, const Bf16x2* a, int64_t a_stride, const Bf16x2* b, float* c,
                   int64_t c_stride, int64_t b_stride = kPanelWidth<Bf16x2>) {
  switch (bf16_products.load(std::memory_order_relaxed)) {
    case Bf16Products::kNone: return;
    case Bf16Products::kDot:
#if defined(FASTSSL_BF16_DOT)
      multiply_panel<kAccumulate>(rows, depth, Operand<Bf16x2>{a, a_stride, 1}, b, b_stride, c, c_stride);
#endif
      return;
    case Bf16Products::kTiles:
#if defined(FASTSSL_TILES)
      multiply_panel_on_tiles<HardwareTiles, kAccumulate>(rows, depth, a, a_stride, b, c, c_stride, b_stride);
#endif
      return;
    case Bf16Products::kTwin:
      return multiply_panel_on_tiles<TwinTiles, kAccumulate>(rows, depth, a, a_stride, b, c, c_stride, b_stride);
  }
}

// Pairs of values rounded to bfloat16: lane i holds (first[i], second[i]).
inline Vec<Bf16x2> round_to_pairs(Vec<float> first, Vec<float> second) {
#if defined(FASTSSL_BF16_DOT)
  return to_bf16_pairs(first, second);
#else
  return bfloat16_bits(first) | bfloat16_bits(second) << 16;
#endif
}

// Packs rows as pairs of rows: [count, words] -> panels [2 words / kPanelWidth][panel_rows][kPanelWidth], of which this
// fills count / 2 rows.
inline void pack_row_pairs(const Bf16x2* rows, int64_t words, int64_t count, Bf16x2* panels, int64_t panel_rows) {
  constexpr int n = kLanes<Bf16x2>;
  using Indices = std::make_integer_sequence<int, n>;
  for (int64_t i = 0; i < count / 2; ++i, rows += 2 * words)
    for (int64_t w = 0; w < words; w += n) {
      const Vec<Bf16x2> a = load(rows + w), b = load(rows + words + w);
      const Vec<Bf16x2> even = (a & 0xffff) | b << 16, odd = a >> 16 | (b & 0xffff0000);
      Bf16x2* dst = panels + w / n * panel_rows * 2 * n + i * 2 * n;
      store(dst, zip<false, Bf16x2>(even, odd, Indices{}));
      store(dst + n, zip<true, Bf16x2>(even, odd, Indices{}));
    }
}

// Rounds rows of float32 to pairs of neighbours, [padded_rows, padded_width / 2], with zeros beyond `rows` and `width`.
inline void round_rows(const float* src, int64_t stride, int64_t rows, int64_t padded_rows, int64_t width,
                       int64_t padded_width, Bf16x2* dst) {
  for (int64_t r = 0; r < padded_rows; ++r, src += stride, dst += padded_width / 2)
    for (int64_t i = 0; i < padded_width; i += 2 * kLanes<float>) {
      const auto part = [&](int64_t c) {
        return r < rows && c < width ? load_part<float>(src + c, width - c) : Vec<float>{};
      };
#if defined(FASTSSL_BF16_DOT)
      store(dst + i / 2, to_bf16(part(i), part(i + kLanes<float>)));
#else
      store_narrow(reinterpret_cast<BFloat16*>(dst) + i, part(i));
      store_narrow(reinterpret_cast<BFloat16*>(dst) + i + kLanes<float>, part(i + kLanes<float>));
#endif
    }
}

// Transposes values of 16 bits: rows [count, 2 words] -> columns [2 words, count], where `count` and the width are
// multiples of 32. Pairs of values above each other are zipped from two rows, and squares of these pairs transposed.
inline void transpose_bf16(const Bf16x2* rows, int64_t row_stride, int64_t count, int64_t words, Bf16x2* columns,
                           int64_t column_stride) {
  constexpr int n = kLanes<Bf16x2>;
  for (int64_t first = 0; first < count; first += 2 * n)
    for (int64_t word = 0; word < words; word += n) {
      Vec<Bf16x2> even[n], odd[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) {
        const Bf16x2* row = rows + (first + 2 * i) * row_stride + word;
        const Vec<Bf16x2> a = load(row), b = load(row + row_stride);
        even[i] = (a & 0xffff) | b << 16;
        odd[i] = a >> 16 | (b & 0xffff0000);
      }
      transpose<Bf16x2>(even);
      transpose<Bf16x2>(odd);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) {
        Bf16x2* column = columns + 2 * (word + i) * column_stride + first / 2;
        store(column, even[i]);
        store(column + column_stride, odd[i]);
      }
    }
}

}  // namespace fastssl
