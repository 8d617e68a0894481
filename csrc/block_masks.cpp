// Block-wise masks of BEiT, iBOT and DINOv2 (fastssl/ops/block_masks.py).
//
// A mask is a loop of a few dozen short steps, each of which depends on the one before, so a sample is the work of one
// thread. Every number is an integer or an exact double, and no product is added to another number: the same masks with
// and without fused multiply-add, and on a GPU.
#include "rows.h"

#include <cmath>
#include <sstream>

namespace fastssl {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15, kDomain = 0x626C6F636B;
constexpr int64_t kUnit = 256, kAspects = 4096;  // as in the op's file
constexpr double kAspectScale = 65536, kAreaScale = 1.0 / 4096, kExponentScale = 1.0 / (int64_t(1) << 40);

// SplitMix64's output function.
inline uint64_t scramble(uint64_t state) {
  state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9;
  state = (state ^ state >> 27) * 0x94D049BB133111EB;
  return state ^ state >> 31;
}

struct Grid {
  int64_t rows, columns, low, high, step, attempts;
  uint64_t stream;
};

// Number of patches along a side: √(area · aspect), rounded; the area in units.
inline int64_t side(int64_t area, double exponent) {
  const double aspect = std::floor(std::exp(exponent) * kAspectScale + 0.5);
  return int64_t(std::floor(std::sqrt(double(area) * aspect) * kAreaScale + 0.5));
}

// `mask` is zeros on entry.
void draw_mask(uint8_t* mask, uint64_t seed, int64_t target, const Grid& grid) {
  const uint64_t key = scramble(scramble(scramble(seed + kGolden) + kGolden + grid.stream) + kDomain);
  uint64_t counter = key;
  for (int64_t masked = 0, failed = 0; masked < target && failed < grid.attempts;) {
    const uint64_t shape = scramble(counter += kGolden), place = scramble(counter += kGolden);
    const int64_t limit = std::min(target - masked, grid.high);
    const int64_t area = grid.low + ((limit - grid.low) * int64_t(shape & 0xFFFFFF) >> 24);
    const int64_t aspect = 2 * int64_t(shape >> 24 & (kAspects - 1)) + 1 - kAspects;
    const double exponent = double(aspect * grid.step) * kExponentScale;
    const int64_t height = side(area, exponent), width = side(area, -exponent);
    ++failed;
    if (height >= grid.rows || width >= grid.columns) continue;
    const int64_t top = int64_t(place & 0x7FFFFFFF) * (grid.rows - height + 1) >> 31;
    const int64_t left = int64_t(place >> 31 & 0x7FFFFFFF) * (grid.columns - width + 1) >> 31;
    int64_t before = 0;
    for (int64_t row = top; row < top + height; ++row)
      for (int64_t column = left; column < left + width; ++column) before += mask[row * grid.columns + column];
    const int64_t added = (height * width - before) * kUnit;
    if (added <= 0 || added > limit) continue;
    for (int64_t row = top; row < top + height; ++row) std::memset(mask + row * grid.columns + left, 1, width);
    masked += added;
    failed = 0;
  }
}

[[noreturn]] void refuse(double count, int64_t length) {
  std::ostringstream sentence;
  sentence << "block_mask: count must be between 0 and h·w=" << length << ", got " << count;
  throw std::runtime_error(sentence.str());
}

Tensor block_mask(Tensor seed, Tensor target, int64_t rows, int64_t columns, std::vector<int64_t> limits, int64_t step,
                  int64_t attempts, int64_t stream) {
  const int64_t batch = seed.size(0), length = rows * columns;
  const Grid grid{rows, columns, limits.at(0), limits.at(1), step, attempts, uint64_t(stream)};
  Tensor mask = empty({batch, length}, ScalarType::Bool);
  const auto* seeds = static_cast<const int64_t*>(seed.const_data_ptr());
  const auto* targets = static_cast<const int64_t*>(target.const_data_ptr());
  const int64_t seed_stride = seed.stride(0), target_stride = target.stride(0);
  std::vector<int64_t> checked(batch);  // a copy: another thread may change the tensor after the check
  for (int64_t b = 0; b < batch; ++b) {
    checked[b] = targets[b * target_stride];
    if (checked[b] < 0 || checked[b] > length * kUnit) refuse(double(checked[b]) / kUnit, length);
  }
  auto* masks = static_cast<uint8_t*>(mask.mutable_data_ptr());
  torch::stable::parallel_for(0, batch, 16, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      std::memset(masks + b * length, 0, length);
      draw_mask(masks + b * length, uint64_t(seeds[b * seed_stride]), checked[b], grid);
    }
  });
  return mask;
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) { m.impl("block_mask", TORCH_BOX(&fastssl::block_mask)); }
