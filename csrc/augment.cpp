// The photometric half of an augmentation, in place on bytes: jitter, grayscale, blur, solarize, flip.
//
// An image goes through row by row: three rows of bytes become three rows of floats, which stay in the L1 cache from
// the first step to the last and are rounded once, when they leave. The blur keeps as many rows as its radius needs. So
// memory is touched as bytes alone, and the order of the steps costs one branch a row.
//
// Contrast must know the whole image first, so the steps before it are run twice, once for the mean. To keep what they
// made instead, three planes of floats that L2 does not hold, would take about as long.
#include "rows.h"

#include <array>
#include <limits>

namespace fastssl {
namespace {

constexpr int kLane = kLanes<float>;
using Floats = Vec<float>;

inline Floats min(Floats a, Floats b) { return a < b ? a : b; }
inline Floats max(Floats a, Floats b) { return a > b ? a : b; }
inline Floats absolute(Floats x) { return Floats(Vec<uint32_t>(x) & 0x7fffffff); }

// To [0, most]. The limits are hidden from GCC, which makes two instructions of the minimum of a vector and a constant.
struct Clamp {
  Floats low, high;

  explicit Clamp(float most) {
    volatile float limits[] = {0, most};
    low = splat<float>(limits[0]);
    high = splat<float>(limits[1]);
  }
  Floats operator()(Floats x) const { return min(max(x, low), high); }
};

template <typename V>  // a vector, or one value
inline V luma(V red, V green, V blue) {
  return red * 0.299f + green * 0.587f + blue * 0.114f;
}

// Loops that the compiler turns into vectors, where vec.h has no conversion. So many values at a time:
constexpr int kBytes = kVectorBytes;

inline void widen_bytes(const uint8_t* __restrict from, float* __restrict to) {
  for (int i = 0; i < kBytes; ++i) to[i] = from[i];
}

inline void round_to_bytes(const float* __restrict from, uint8_t* __restrict to) {  // to nearest even
  for (int i = 0; i < kBytes; ++i) to[i] = uint8_t(std::bit_cast<uint32_t>(from[i] + 12582912.0f));  // 1.5 * 2^23
}

inline void invert_bright_bytes(uint8_t* x) {
  for (int i = 0; i < kBytes; ++i) x[i] = x[i] < 128 ? x[i] : 255 - x[i];
}

// Room for n values from the edge of a cache line on: of unaligned vectors many would lie in two lines.
inline float* aligned(std::vector<float>& store, int64_t n) {
  store.resize(n + 16);
  return reinterpret_cast<float*>(round_up<uintptr_t>(reinterpret_cast<uintptr_t>(store.data()), 64));
}

// ---- What is done to one image

enum Kind : int64_t { kBrightness, kContrast, kSaturation, kHue };  // columns of `jitter`

struct Step {
  int64_t kind;
  float factor;
  float mean = 0;  // of contrast: the image's luma when its turn comes
};

struct Draws {
  std::array<Step, 4> steps;
  int count = 0;  // of the steps that change anything
  bool grey, grey_first, solarize, flip;
  double sigma;

  bool grey_last() const { return grey && !grey_first; }
};

template <typename T>
T value_at(const Tensor& draws, int64_t b, int64_t column = 0) {
  const int64_t offset = b * draws.stride(0) + (draws.dim() == 2 ? column * draws.stride(1) : 0);
  return static_cast<const T*>(draws.const_data_ptr())[offset];
}

struct Image {
  uint8_t* data;
  int64_t channel, row, column;  // strides

  uint8_t* at(int64_t c, int64_t y) const { return data + c * channel + y * row; }
};

// ---- Steps on a row of pixels

struct Pixels {
  float* channel[3];
  int64_t width;  // readable and writable to the next multiple of kLane

  template <typename Change>
  void each(const Change& change) const {
    for (int64_t i = 0; i < width; i += kLane) {
      Floats red = load(channel[0] + i), green = load(channel[1] + i), blue = load(channel[2] + i);
      change(red, green, blue);
      store(channel[0] + i, red);
      store(channel[1] + i, green);
      store(channel[2] + i, blue);
    }
  }

  double sum_of_luma() const {  // lanes in float, as they have few terms each
    const auto& [red, green, blue] = channel;
    Floats lanes{};
    double rest = 0;
    int64_t i = 0;
    for (; i + kLane <= width; i += kLane) lanes += luma(load(red + i), load(green + i), load(blue + i));
    for (; i < width; ++i) rest += luma(red[i], green[i], blue[i]);
    return rest + sum<float>(lanes);
  }
};

// RGB to HSV, turned, and back: of each pixel the largest and the smallest value stay, and where a channel lies between
// them follows from the distance of the hue (sixths of a turn, in [0, 6]) to its own: 0 or 6, 2, 4.
inline void turn_hue(Floats& red, Floats& green, Floats& blue, float sixths, const Clamp& unit) {
  const Floats top = max(max(red, green), blue), spread = top - min(min(red, green), blue);
  Floats hue = top == red ? green - blue : top == green ? blue - red + 2 * spread : red - green + 4 * spread;
  hue = hue / max(spread, splat(std::numeric_limits<float>::min())) + sixths;  // grey: 0 / min
  hue = hue < 0.0f ? hue + 6 : hue;
  hue = hue >= 6.0f ? hue - 6 : hue;
  red = top - spread * unit(2 - absolute(hue - 3));
  green = top - spread * unit(absolute(hue - 2) - 1);
  blue = top - spread * unit(absolute(hue - 4) - 1);
}

void change(const Pixels& pixels, const Step& step) {
  const float factor = step.factor;
  const Clamp clamped(255);
  const auto blended = [=](Floats x, Floats other) { return clamped((x - other) * factor + other); };
  switch (step.kind) {
    case kBrightness:
      return pixels.each([=](auto& red, auto& green, auto& blue) {
        for (Floats* x : {&red, &green, &blue}) *x = clamped(*x * factor);
      });
    case kContrast:
      return pixels.each([=, mean = splat(step.mean)](auto& red, auto& green, auto& blue) {
        for (Floats* x : {&red, &green, &blue}) *x = blended(*x, mean);
      });
    case kSaturation:
      return pixels.each([=](auto& red, auto& green, auto& blue) {
        const Floats grey = luma(red, green, blue);
        for (Floats* x : {&red, &green, &blue}) *x = blended(*x, grey);
      });
    case kHue:
      return pixels.each([=, sixths = 6 * (factor - std::floor(factor)), unit = Clamp(1)](auto&... channels) {
        turn_hue(channels..., sixths, unit);
      });
  }
}

// ---- Blur

// One axis of a Gaussian: a vector of results at a time is weighed from rows that lie k before and k after it.
struct Filter {
  int64_t radius;
  std::vector<float> weights;
  std::vector<std::array<const float*, 2>> around;  // for each k from 1 on

  Filter(double sigma, int64_t size) : radius(int64_t(std::min(std::ceil(3 * sigma), double(size - 1)))) {
    std::vector<double> exact(radius + 1);
    double total = 0;
    for (int64_t k = 0; k <= radius; ++k) {
      exact[k] = std::exp(-0.5 * (k / sigma) * (k / sigma));
      total += k ? 2 * exact[k] : exact[k];
    }
    for (const double weight : exact) weights.push_back(float(weight / total));
    around.resize(radius + 1);
  }

  template <int N>  // so many vectors share the loads of weights and addresses
  void apply_to(const float* centre, int64_t i, float* out) const {
    Floats sums[N];
    for (int v = 0; v < N; ++v) sums[v] = load(centre + i + v * kLane) * weights[0];
    for (int64_t k = 1; k <= radius; ++k) {
      const auto [before, after] = around[k];
      const Floats weight = splat(weights[k]);
      for (int v = 0; v < N; ++v) sums[v] += weight * (load(before + i + v * kLane) + load(after + i + v * kLane));
    }
    for (int v = 0; v < N; ++v) store(out + i + v * kLane, sums[v]);
  }

  void apply(const float* centre, int64_t n, float* out) const {  // n results, to the next multiple of kLane
    int64_t i = 0;
    for (; i + 4 * kLane <= n; i += 4 * kLane) apply_to<4>(centre, i, out);
    for (; i < n; i += kLane) apply_to<1>(centre, i, out);
  }
};

// ---- One image after the other

class Augmenter {
 public:
  Augmenter(int64_t height, int64_t width)
      : height_(height), width_(width), padded_(round_up<int64_t>(width, kBytes)), bytes_(padded_), mirrored_(width) {}

  void run(const Image& image, Draws draws) {
    if (draws.count == 0 && !draws.grey && !(draws.sigma > 0)) return only_bytes(image, draws);
    for (int s = 0; s < draws.count; ++s)
      if (draws.steps[s].kind == kContrast) draws.steps[s].mean = mean_luma(image, draws, s);
    if (draws.sigma > 0) return blur(image, draws);
    for (int64_t y = 0; y < height_; ++y) put(image, y, coloured(image, y, draws, 0), draws);
  }

 private:
  void only_bytes(const Image& image, const Draws& draws) {
    if (!draws.solarize && !draws.flip) return;
    for (int64_t c = 0; c < 3; ++c)
      for (int64_t y = 0; y < height_; ++y) {
        copy_row(bytes_.data(), image.at(c, y), image.column, width_);
        put_bytes(finished(draws), image.at(c, y), image.column);
      }
  }

  // Row y as floats, after the grayscale that comes first and `count` steps.
  Pixels jittered(const Image& image, int64_t y, const Draws& draws, int count, int64_t margin) {
    const int64_t stride = padded_ + 2 * margin;
    float* const first = aligned(values_, 3 * stride) + margin;
    const Pixels pixels{{first, first + stride, first + 2 * stride}, width_};
    for (int64_t c = 0; c < 3; ++c) {
      copy_row(bytes_.data(), image.at(c, y), image.column, width_);
      for (int64_t i = 0; i < padded_; i += kBytes) widen_bytes(bytes_.data() + i, pixels.channel[c] + i);
    }
    if (draws.grey && draws.grey_first)
      pixels.each([](auto& red, auto& green, auto& blue) { red = green = blue = luma(red, green, blue); });
    for (int s = 0; s < count; ++s) change(pixels, draws.steps[s]);
    return pixels;
  }

  // After all steps and the grayscale that comes last, which leaves one channel for three.
  Pixels coloured(const Image& image, int64_t y, const Draws& draws, int64_t margin) {
    Pixels pixels = jittered(image, y, draws, draws.count, margin);
    if (draws.grey_last()) {
      pixels.each([](auto& red, auto& green, auto& blue) { red = luma(red, green, blue); });
      pixels.channel[1] = pixels.channel[2] = pixels.channel[0];
    }
    return pixels;
  }

  float mean_luma(const Image& image, const Draws& draws, int count) {
    double total = 0;
    for (int64_t y = 0; y < height_; ++y) total += jittered(image, y, draws, count, 0).sum_of_luma();
    return float(total / double(height_ * width_));
  }

  // Rows are blurred along the width as they come and wait in a ring; those around row y make up its result.
  void blur(const Image& image, const Draws& draws) {
    Filter across(draws.sigma, width_), down(draws.sigma, height_);
    const int64_t margin = round_up<int64_t>(across.radius, 16), planes = draws.grey_last() ? 1 : 3;
    const int64_t kept = std::min(2 * down.radius + 1, height_);
    float* const ring = aligned(ring_, kept * planes * padded_);
    float* const result = aligned(result_, planes * padded_);
    const auto waiting = [&](int64_t y) {  // the border is mirrored about its pixels
      y = y < 0 ? -y : y < height_ ? y : 2 * (height_ - 1) - y;
      return ring + y % kept * planes * padded_;
    };
    int64_t arrived = 0;
    for (int64_t y = 0; y < height_; ++y) {
      for (; arrived <= std::min(y + down.radius, height_ - 1); ++arrived) {
        const Pixels pixels = coloured(image, arrived, draws, margin);
        for (int64_t c = 0; c < planes; ++c) blur_row(pixels.channel[c], across, waiting(arrived) + c * padded_);
      }
      for (int64_t k = 1; k <= down.radius; ++k) down.around[k] = {waiting(y - k), waiting(y + k)};
      down.apply(waiting(y), planes * padded_, result);
      const int64_t next = planes == 1 ? 0 : padded_;
      put(image, y, {{result, result + next, result + 2 * next}, width_}, draws);
    }
  }

  void blur_row(float* row, Filter& across, float* out) const {
    for (int64_t k = 1; k <= across.radius; ++k) {
      row[-k] = row[k];
      row[width_ - 1 + k] = row[width_ - 1 - k];
      across.around[k] = {row - k, row + k};
    }
    across.apply(row, width_, out);
  }

  // Row y as it leaves. Channels that are one and the same are rounded once.
  void put(const Image& image, int64_t y, const Pixels& pixels, const Draws& draws) {
    const uint8_t* row = nullptr;
    for (int64_t c = 0; c < 3; ++c) {
      const float* channel = pixels.channel[c];
      if (c == 0 || channel != pixels.channel[0]) {
        for (int64_t i = 0; i < padded_; i += kBytes) round_to_bytes(channel + i, bytes_.data() + i);
        row = finished(draws);
      }
      put_bytes(row, image.at(c, y), image.column);
    }
  }

  // The row of bytes, solarized and flipped.
  const uint8_t* finished(const Draws& draws) {
    if (draws.solarize)
      for (int64_t i = 0; i < padded_; i += kBytes) invert_bright_bytes(bytes_.data() + i);
    if (!draws.flip) return bytes_.data();
    std::reverse_copy(bytes_.data(), bytes_.data() + width_, mirrored_.data());
    return mirrored_.data();
  }

  void put_bytes(const uint8_t* row, uint8_t* to, int64_t column) const {
    if (column == 1) return copy_row(to, row, 1, width_);
    for (int64_t x = 0; x < width_; ++x) to[x * column] = row[x];
  }

  int64_t height_, width_, padded_;  // padded: to whole vectors of bytes
  std::vector<uint8_t> bytes_, mirrored_;
  std::vector<float> values_, ring_, result_;
};

void augment_(Tensor images, Tensor jitter, Tensor order, Tensor grey, Tensor sigma, Tensor solarize, Tensor flip,
              bool grey_first) {
  const int64_t batch = images.size(0), height = images.size(2), width = images.size(3);
  if (images.numel() == 0) return;
  std::vector<Draws> draws(batch);
  for (int64_t b = 0; b < batch; ++b) {
    Draws& image = draws[b];
    for (int s = 0; s < 4; ++s) {
      const int64_t kind = value_at<int64_t>(order, b, s);
      STD_TORCH_CHECK(kind >= 0 && kind < 4, "augment_: order must be between 0 and 3, got ", kind);
      const float factor = value_at<float>(jitter, b, kind);
      if (factor != (kind == kHue ? 0.0f : 1.0f)) image.steps[image.count++] = {kind, factor};
    }
    image.grey = value_at<bool>(grey, b);
    image.grey_first = grey_first;
    image.sigma = value_at<float>(sigma, b);
    image.solarize = value_at<bool>(solarize, b);
    image.flip = value_at<bool>(flip, b);
  }
  const Image first{data<uint8_t>(images), images.stride(1), images.stride(2), images.stride(3)};
  torch::stable::parallel_for(0, batch, grain(8 * 3 * height * width), [&](int64_t begin, int64_t end) {
    Augmenter augmenter(height, width);
    for (int64_t b = begin; b < end; ++b)
      augmenter.run({first.data + b * images.stride(0), first.channel, first.row, first.column}, draws[b]);
  });
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) { m.impl("augment_", TORCH_BOX(&fastssl::augment_)); }
