// Augmentations of uint8 images, in place: colour jitter, grayscale, blur, solarize, flip (fastssl/ops/augment.py).
//
// An image is processed row by row: the three channels of a row are converted to float32, stay in the L1 cache through
// all steps, and are rounded to bytes once, at the end. The blur keeps as many rows as its radius needs. So memory is
// read and written as bytes only, and the order of the steps costs one branch per row.
//
// Contrast needs the mean of the whole image, so the steps before it run twice, once for the mean. Storing their result
// instead, three planes of float32 that exceed the L2 cache, would take about as long.
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

// Clamps to [0, high]. The limits are read from volatile memory because GCC compiles the minimum of a vector and a
// known constant to two instructions.
struct Clamp {
  Floats low, high;

  explicit Clamp(float high_limit) {
    volatile float limits[] = {0, high_limit};
    low = splat<float>(limits[0]);
    high = splat<float>(limits[1]);
  }
  Floats operator()(Floats x) const { return min(max(x, low), high); }
};

template <typename V>  // a vector or a scalar
inline V luma(V red, V green, V blue, float red_weight = 0.299f) {
  return red * red_weight + green * 0.587f + blue * 0.114f;
}

// Conversions that vec.h does not have, as loops over kBytes values, which the compiler vectorises.
constexpr int kBytes = kVectorBytes;

inline void widen_bytes(const uint8_t* __restrict src, float* __restrict dst) {
  for (int i = 0; i < kBytes; ++i) dst[i] = src[i];
}

// Rounds to nearest even: after adding 1.5 * 2^23 the low bits hold the integer.
inline void round_to_bytes(const float* __restrict src, uint8_t* __restrict dst) {
  for (int i = 0; i < kBytes; ++i) dst[i] = uint8_t(std::bit_cast<uint32_t>(src[i] + 12582912.0f));
}

inline void invert_bright_bytes(uint8_t* x) {
  for (int i = 0; i < kBytes; ++i) x[i] = x[i] < 128 ? x[i] : 255 - x[i];
}

// Resizes `buffer` and returns space for n values at the start of a cache line, so that vectors do not cross cache
// lines.
inline float* aligned(std::vector<float>& buffer, int64_t n) {
  buffer.resize(n + 16);
  return reinterpret_cast<float*>(round_up<uintptr_t>(reinterpret_cast<uintptr_t>(buffer.data()), 64));
}

// ---- Parameters of one image

// The columns of `jitter`, then their variants in the same order.
enum Kind : int64_t { kBrightness, kContrast, kSaturation, kHue, kOffset, kChannelContrast, kHsvSaturation };

struct Step {
  int64_t kind;
  float factor;
  std::array<float, 3> mean{};  // contrast: of the image after the steps before, its mean luma or that of each channel
};

struct Parameters {
  std::array<Step, 4> steps;
  int count = 0;  // number of steps that have an effect
  bool grey, grey_first, tensorflow, solarize, flip;
  double sigma;

  bool grey_last() const { return grey && !grey_first; }
  float red_weight() const { return tensorflow ? 0.2989f : 0.299f; }
};

template <typename T>
T parameter_at(const Tensor& parameters, int64_t b, int64_t column = 0) {
  const int64_t offset = b * parameters.stride(0) + (parameters.dim() == 2 ? column * parameters.stride(1) : 0);
  return static_cast<const T*>(parameters.const_data_ptr())[offset];
}

struct Image {
  uint8_t* data;
  int64_t channel_stride, row_stride, column_stride;

  uint8_t* row(int64_t c, int64_t y) const { return data + c * channel_stride + y * row_stride; }
};

// ---- Steps on a row of pixels

struct Pixels {
  float* channel[3];
  int64_t width;  // readable and writable to the next multiple of kLane

  template <typename Function>
  void for_each_vector(const Function& function) const {
    for (int64_t i = 0; i < width; i += kLane) {
      Floats red = load(channel[0] + i), green = load(channel[1] + i), blue = load(channel[2] + i);
      function(red, green, blue);
      store(channel[0] + i, red);
      store(channel[1] + i, green);
      store(channel[2] + i, blue);
    }
  }

  double sum_of_luma() const {  // float32 is enough for a lane's few terms
    const auto& [red, green, blue] = channel;
    Floats lanes{};
    double remainder = 0;
    int64_t i = 0;
    for (; i + kLane <= width; i += kLane) lanes += luma(load(red + i), load(green + i), load(blue + i));
    for (; i < width; ++i) remainder += luma(red[i], green[i], blue[i]);
    return remainder + sum<float>(lanes);
  }

  double sum_of_channel(int c) const {
    Floats lanes{};
    double remainder = 0;
    int64_t i = 0;
    for (; i + kLane <= width; i += kLane) lanes += load(channel[c] + i);
    for (; i < width; ++i) remainder += channel[c][i];
    return remainder + sum<float>(lanes);
  }
};

// Rotates the hue, as a conversion to HSV and back would: each pixel keeps its largest and its smallest value, and a
// channel's value between them follows from the distance of the hue (in sixths of a turn, [0, 6]) to the hue of the
// pure channel: 0 or 6 for red, 2 for green, 4 for blue.
inline void rotate_hue(Floats& red, Floats& green, Floats& blue, float sixths, const Clamp& unit) {
  const Floats max_value = max(max(red, green), blue), range = max_value - min(min(red, green), blue);
  Floats hue = max_value == red ? green - blue : max_value == green ? blue - red + 2 * range : red - green + 4 * range;
  hue = hue / max(range, splat(std::numeric_limits<float>::min())) + sixths;  // grey pixels: 0 / min = 0
  hue = hue < 0.0f ? hue + 6 : hue;
  hue = hue >= 6.0f ? hue - 6 : hue;
  red = max_value - range * unit(2 - absolute(hue - 3));
  green = max_value - range * unit(absolute(hue - 2) - 1);
  blue = max_value - range * unit(absolute(hue - 4) - 1);
}

void apply_step(const Pixels& pixels, const Step& step) {
  const float factor = step.factor;
  const Clamp clamped(255);
  const auto blended = [=](Floats x, Floats reference) { return clamped((x - reference) * factor + reference); };
  switch (step.kind) {
    case kBrightness:
      return pixels.for_each_vector([=](auto& red, auto& green, auto& blue) {
        for (Floats* x : {&red, &green, &blue}) *x = clamped(*x * factor);
      });
    case kOffset:
      return pixels.for_each_vector([=, offset = 255 * (factor - 1)](auto& red, auto& green, auto& blue) {
        for (Floats* x : {&red, &green, &blue}) *x = clamped(*x + offset);
      });
    case kContrast:
    case kChannelContrast:
      return pixels.for_each_vector([=, mean = step.mean](auto& red, auto& green, auto& blue) {
        red = blended(red, splat(mean[0]));
        green = blended(green, splat(mean[1]));
        blue = blended(blue, splat(mean[2]));
      });
    case kSaturation:
      return pixels.for_each_vector([=](auto& red, auto& green, auto& blue) {
        const Floats grey = luma(red, green, blue);
        for (Floats* x : {&red, &green, &blue}) *x = blended(*x, grey);
      });
    case kHsvSaturation:  // the distances to the largest channel change in proportion; the smallest stays at least 0
      return pixels.for_each_vector([=](auto& red, auto& green, auto& blue) {
        const Floats top = max(max(red, green), blue), range = top - min(min(red, green), blue);
        const Floats scale = min(top / max(range, splat(std::numeric_limits<float>::min())), splat(factor));
        for (Floats* x : {&red, &green, &blue}) *x = clamped(top - (top - *x) * scale);
      });
    case kHue:
      return pixels.for_each_vector([=, sixths = 6 * (factor - std::floor(factor)),
                                     unit = Clamp(1)](auto&... channels) { rotate_hue(channels..., sixths, unit); });
  }
}

// ---- Blur

// One axis of a separable Gaussian blur: result = w[0] centre + Σ_k w[k] (before_k + after_k), in vectors.
struct Filter {
  int64_t radius;
  std::vector<float> weights;
  std::vector<std::array<const float*, 2>> neighbours;  // [k] = (before_k, after_k), k ≥ 1

  static int64_t radius_of(double sigma, int64_t size) { return int64_t(std::min(std::ceil(3 * sigma), size - 1.0)); }

  Filter(double sigma, int64_t radius) : radius(radius) {
    std::vector<double> unnormalised(radius + 1);
    double total = 0;
    for (int64_t k = 0; k <= radius; ++k) {
      unnormalised[k] = std::exp(-0.5 * (k / sigma) * (k / sigma));
      total += k ? 2 * unnormalised[k] : unnormalised[k];
    }
    for (const double weight : unnormalised) weights.push_back(float(weight / total));
    neighbours.resize(radius + 1);
  }

  template <int N>  // N vectors at a time share the loads of weights and addresses
  void apply_vectors(const float* centre, int64_t i, float* out) const {
    Floats sums[N];
    for (int v = 0; v < N; ++v) sums[v] = load(centre + i + v * kLane) * weights[0];
    for (int64_t k = 1; k <= radius; ++k) {
      const auto [before, after] = neighbours[k];
      const Floats weight = splat(weights[k]);
      for (int v = 0; v < N; ++v) sums[v] += weight * (load(before + i + v * kLane) + load(after + i + v * kLane));
    }
    for (int v = 0; v < N; ++v) store(out + i + v * kLane, sums[v]);
  }

  void apply(const float* centre, int64_t n, float* out) const {  // n results, rounded up to whole vectors
    int64_t i = 0;
    for (; i + 4 * kLane <= n; i += 4 * kLane) apply_vectors<4>(centre, i, out);
    for (; i < n; i += kLane) apply_vectors<1>(centre, i, out);
  }
};

// ---- Augmenting images

class Augmenter {
 public:
  Augmenter(int64_t height, int64_t width)
      : height_(height), width_(width), padded_(round_up<int64_t>(width, kBytes)), bytes_(padded_), mirrored_(width) {}

  void run(const Image& image, Parameters parameters) {
    if (parameters.count == 0 && !parameters.grey && !(parameters.sigma > 0)) return augment_bytes(image, parameters);
    for (int s = 0; s < parameters.count; ++s) {
      Step& step = parameters.steps[s];
      if (step.kind == kContrast || step.kind == kChannelContrast) step.mean = means(image, parameters, s);
    }
    if (parameters.sigma > 0) return blur(image, parameters);
    for (int64_t y = 0; y < height_; ++y) store_row(image, y, transform_row(image, y, parameters, 0), parameters);
  }

 private:
  void augment_bytes(const Image& image, const Parameters& parameters) {
    if (!parameters.solarize && !parameters.flip) return;
    for (int64_t c = 0; c < 3; ++c)
      for (int64_t y = 0; y < height_; ++y) {
        copy_row(bytes_.data(), image.row(c, y), image.column_stride, width_);
        store_bytes(finish_bytes(parameters), image.row(c, y), image.column_stride);
      }
  }

  // Row y as float32, after grayscale (if that comes first) and `count` steps of the jitter. `margin`: number of
  // free values before and after each channel's row.
  Pixels jitter_row(const Image& image, int64_t y, const Parameters& parameters, int count, int64_t margin) {
    const int64_t stride = padded_ + 2 * margin;
    float* const row_start = aligned(values_, 3 * stride) + margin;
    const Pixels pixels{{row_start, row_start + stride, row_start + 2 * stride}, width_};
    for (int64_t c = 0; c < 3; ++c) {
      copy_row(bytes_.data(), image.row(c, y), image.column_stride, width_);
      for (int64_t i = 0; i < padded_; i += kBytes) widen_bytes(bytes_.data() + i, pixels.channel[c] + i);
    }
    if (parameters.grey && parameters.grey_first)
      pixels.for_each_vector([weight = parameters.red_weight()](auto& red, auto& green, auto& blue) {
        red = green = blue = luma(red, green, blue, weight);
      });
    for (int s = 0; s < count; ++s) apply_step(pixels, parameters.steps[s]);
    return pixels;
  }

  // Row y after all steps and grayscale (if that comes last), which leaves one channel in place of three.
  Pixels transform_row(const Image& image, int64_t y, const Parameters& parameters, int64_t margin) {
    Pixels pixels = jitter_row(image, y, parameters, parameters.count, margin);
    if (parameters.grey_last()) {
      pixels.for_each_vector([weight = parameters.red_weight()](auto& red, auto& green, auto& blue) {
        red = luma(red, green, blue, weight);
      });
      pixels.channel[1] = pixels.channel[2] = pixels.channel[0];
    }
    return pixels;
  }

  // What the contrast, step `count`, keeps: the mean luma, or the mean of each channel.
  std::array<float, 3> means(const Image& image, const Parameters& parameters, int count) {
    const bool by_channel = parameters.steps[count].kind == kChannelContrast;
    std::array<double, 3> totals{};
    for (int64_t y = 0; y < height_; ++y) {
      const Pixels pixels = jitter_row(image, y, parameters, count, 0);
      for (int c = 0; c < (by_channel ? 3 : 1); ++c)
        totals[c] += by_channel ? pixels.sum_of_channel(c) : pixels.sum_of_luma();
    }
    std::array<float, 3> result;
    for (int c = 0; c < 3; ++c) result[c] = float(totals[by_channel ? c : 0] / double(height_ * width_));
    return result;
  }

  // Rows are blurred along the width and kept in a ring buffer, from which row y is blurred along the height.
  void blur(const Image& image, const Parameters& parameters) {
    const bool zeros = parameters.tensorflow;  // beyond the border
    const auto radius = [&](int64_t size) { return zeros ? height_ / 20 : Filter::radius_of(parameters.sigma, size); };
    Filter horizontal(parameters.sigma, radius(width_)), vertical(parameters.sigma, radius(height_));
    const int64_t margin = round_up<int64_t>(horizontal.radius, 16), planes = parameters.grey_last() ? 1 : 3;
    const int64_t ring_rows = std::min(2 * vertical.radius + 1, height_);
    float* const ring = aligned(ring_, ring_rows * planes * padded_);
    float* const result = aligned(result_, planes * padded_);
    zeros_.assign(zeros ? planes * padded_ : 0, 0.0f);
    const auto ring_row = [&](int64_t y) -> float* {
      if (zeros && (y < 0 || y >= height_)) return zeros_.data();
      y = y < 0 ? -y : y < height_ ? y : 2 * (height_ - 1) - y;  // reflected, as with padding_mode="reflect"
      return ring + y % ring_rows * planes * padded_;
    };
    int64_t next_row = 0;
    for (int64_t y = 0; y < height_; ++y) {
      for (; next_row <= std::min(y + vertical.radius, height_ - 1); ++next_row) {
        const Pixels pixels = transform_row(image, next_row, parameters, margin);
        for (int64_t c = 0; c < planes; ++c)
          blur_row(pixels.channel[c], horizontal, zeros, ring_row(next_row) + c * padded_);
      }
      for (int64_t k = 1; k <= vertical.radius; ++k) vertical.neighbours[k] = {ring_row(y - k), ring_row(y + k)};
      vertical.apply(ring_row(y), planes * padded_, result);
      const int64_t plane_stride = planes == 1 ? 0 : padded_;
      store_row(image, y, {{result, result + plane_stride, result + 2 * plane_stride}, width_}, parameters);
    }
  }

  void blur_row(float* row, Filter& horizontal, bool zeros, float* out) const {
    for (int64_t k = 1; k <= horizontal.radius; ++k) {
      row[-k] = zeros ? 0 : row[k];
      row[width_ - 1 + k] = zeros ? 0 : row[width_ - 1 - k];
      horizontal.neighbours[k] = {row - k, row + k};
    }
    horizontal.apply(row, width_, out);
  }

  // Rounds row y to bytes and stores it. Channels that share memory are rounded once.
  void store_row(const Image& image, int64_t y, const Pixels& pixels, const Parameters& parameters) {
    const uint8_t* row = nullptr;
    for (int64_t c = 0; c < 3; ++c) {
      const float* channel = pixels.channel[c];
      if (c == 0 || channel != pixels.channel[0]) {
        for (int64_t i = 0; i < padded_; i += kBytes) round_to_bytes(channel + i, bytes_.data() + i);
        row = finish_bytes(parameters);
      }
      store_bytes(row, image.row(c, y), image.column_stride);
    }
  }

  // The row in `bytes_`, solarized and flipped.
  const uint8_t* finish_bytes(const Parameters& parameters) {
    if (parameters.solarize)
      for (int64_t i = 0; i < padded_; i += kBytes) invert_bright_bytes(bytes_.data() + i);
    if (!parameters.flip) return bytes_.data();
    std::reverse_copy(bytes_.data(), bytes_.data() + width_, mirrored_.data());
    return mirrored_.data();
  }

  void store_bytes(const uint8_t* row, uint8_t* dst, int64_t column_stride) const {
    if (column_stride == 1) return copy_row(dst, row, 1, width_);
    for (int64_t x = 0; x < width_; ++x) dst[x * column_stride] = row[x];
  }

  int64_t height_, width_, padded_;  // padded_: width rounded up to whole vectors of bytes
  std::vector<uint8_t> bytes_, mirrored_;
  std::vector<float> values_, ring_, result_, zeros_;
};

void augment_(Tensor images, Tensor jitter, Tensor order, Tensor grey, Tensor sigma, Tensor solarize, Tensor flip,
              bool grey_first, bool additive, bool tensorflow) {
  const int64_t batch = images.size(0), height = images.size(2), width = images.size(3);
  std::vector<Parameters> parameters(batch);
  for (int64_t b = 0; b < batch; ++b) {
    Parameters& image = parameters[b];
    for (int s = 0; s < 4; ++s) {
      const int64_t kind = parameter_at<int64_t>(order, b, s);
      if (kind < 0 || kind > 3)
        throw std::runtime_error("augment_: order must be between 0 and 3, got " + std::to_string(kind));
      const float factor = parameter_at<float>(jitter, b, kind);
      if (factor == (kind == kHue ? 0.0f : 1.0f)) continue;
      const bool varies = kind == kBrightness ? additive : tensorflow && kind != kHue;
      image.steps[image.count++] = {varies ? kind + kOffset : kind, factor};
    }
    image.grey = parameter_at<bool>(grey, b);
    image.grey_first = grey_first;
    image.tensorflow = tensorflow;
    image.sigma = parameter_at<float>(sigma, b);
    image.solarize = parameter_at<bool>(solarize, b);
    image.flip = parameter_at<bool>(flip, b);
  }
  if (images.numel() == 0) return;
  const Image first{data<uint8_t>(images), images.stride(1), images.stride(2), images.stride(3)};
  torch::stable::parallel_for(0, batch, grain(8 * 3 * height * width), [&](int64_t begin, int64_t end) {
    Augmenter augmenter(height, width);
    for (int64_t b = begin; b < end; ++b)
      augmenter.run({first.data + b * images.stride(0), first.channel_stride, first.row_stride, first.column_stride},
                    parameters[b]);
  });
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) { m.impl("augment_", TORCH_BOX(&fastssl::augment_)); }
