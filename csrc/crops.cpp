// Windows of uint8 images, resampled into a batch (fastssl/ops/crops.py).
//
// Rows of the image are resampled along the width, a few at a time, and rounded to bytes. They stay in a
// ring of a few rows in the cache, from which each row of the result is resampled along the height. So an image is read
// once, only where the window is, and the result is written once.
//
// The first pass works on planes, into which rows of RGB are split. It loads neighbouring pixels, picks two for each of
// several sums, multiplies them by their weights and adds, until the sums are complete. Which are picked is a table of
// the width, made once a window.
#include "lanes.h"
#include "resampling.h"
#include "rows.h"
#include "ycbcr.h"

#include <array>
#include <limits>

namespace fastssl {
namespace {

// ---- Along the width

constexpr int kStrip = 4;  // rows that are resampled together

// How a group of sums, of neighbouring pixels of the result, gets its pixels. AVX-512 loads 32 pixels of a row as 16
// bits each, from which a sum may take any; AVX2 loads 16 bytes for each four sums. Elsewhere there are no groups.
#if FASTSSL_VECTOR_BYTES == 64
constexpr int kSums = 16, kLoads = 1, kLoadBytes = 32;
#elif defined(__AVX2__)
constexpr int kSums = 8, kLoads = 2, kLoadBytes = 16;
#else
constexpr int kSums = 1, kLoads = 1, kLoadBytes = 1;
#endif

// Two pixels for each sum, of those that were loaded, and their weights.
struct alignas(kVectorBytes) Pick {
#if FASTSSL_VECTOR_BYTES == 64
  std::array<uint16_t, 2 * kSums> control;
  void set(int sum, int k, int64_t place) { control[2 * sum + k] = uint16_t(place); }
#else
  std::array<uint8_t, 4 * kSums> control;
  void set(int sum, int k, int64_t place) { control[4 * sum + 2 * k] = uint8_t(place); }
#endif
  std::array<int16_t, 2 * kSums> weights;

  void clear() {
    control.fill(0);
    if constexpr (sizeof(control[0]) == 1)
      for (size_t i = 1; i < control.size(); i += 2) control[i] = 0x80;  // the high byte of 16 bits is zero
    weights.fill(0);
  }
};

// The picks of all groups. A group has the same number of steps, each with loads of its own and the same number of
// picks.
struct Steps {
  std::vector<int32_t> offsets;  // kLoads for each step: places of the loads in the row
  std::vector<Pick> picks;
  int64_t per_group, picks_per_step;

  // Pixels begin at place `origin` of the plane, and `readable` of them may be read, at least kLoadBytes.
  void build(const Axis& axis, int64_t origin, int64_t readable) {
    if (kSums == 1) return;
    const int64_t groups = (int64_t(axis.first.size()) + kSums - 1) / kSums;
    picks_per_step = std::min<int64_t>(axis.most / 2, 4);
    for (per_group = (axis.most / 2 + picks_per_step - 1) / picks_per_step;; per_group *= 2) {
      offsets.resize(groups * per_group * kLoads);
      picks.resize(groups * per_group * picks_per_step);
      int64_t group = 0;
      while (group < groups && fill_group(axis, origin, readable, group)) ++group;
      if (group == groups) return;
    }
  }

 private:
  struct Sum {
    int64_t place, left;  // of the next pixel, and pixels that are left
    const int16_t* weights;
  };

  // False where the group needs more steps.
  bool fill_group(const Axis& axis, int64_t origin, int64_t readable, int64_t group) {
    constexpr int kOfLoad = kSums / kLoads;
    const int64_t size = axis.first.size();
    Sum sums[kSums];
    int64_t left = 0;
    for (int i = 0; i < kSums; ++i) {
      const int64_t x = group * kSums + i;
      sums[i] = x < size ? Sum{axis.first[x] - origin, axis.count[x], axis.weights_of(x)} : Sum{0, 0, nullptr};
      left += sums[i].left;
    }
    for (int64_t step = group * per_group; step < (group + 1) * per_group; ++step) {
      int64_t begin[kLoads];
      for (int load = 0; load < kLoads; ++load) {
        begin[load] = readable - kLoadBytes;
        for (int i = load * kOfLoad; i < (load + 1) * kOfLoad; ++i)
          if (sums[i].left) begin[load] = std::min(begin[load], sums[i].place);
        offsets[step * kLoads + load] = int32_t(begin[load]);
      }
      for (int64_t p = step * picks_per_step; p < (step + 1) * picks_per_step; ++p) {
        picks[p].clear();
        for (int i = 0; i < kSums; ++i) {
          Sum& sum = sums[i];
          const int64_t first = begin[i / kOfLoad];
          for (int k = 0; k < 2 && sum.left && sum.place - first < kLoadBytes; ++k, ++sum.place, --sum.left, --left) {
            picks[p].set(i, k, sum.place - first);
            picks[p].weights[2 * i + k] = *sum.weights++;
          }
        }
      }
    }
    return left == 0;
  }
};

#if FASTSSL_VECTOR_BYTES == 64

inline Lanes load_pixels(const uint8_t* row, const int32_t* offsets) { return widen_bytes(row + offsets[0]); }
inline Lanes pick_pairs(Lanes pixels, const Pick& pick) {
  return permute16(pixels, load_lanes(reinterpret_cast<const uint8_t*>(pick.control.data())));
}

#elif defined(__AVX2__)

inline Lanes load_pixels(const uint8_t* row, const int32_t* offsets) {
  return load_apart(row + offsets[0], offsets[1] - offsets[0]);
}
inline Lanes pick_pairs(Lanes pixels, const Pick& pick) {
  return shuffle_bytes(pixels, load_lanes(pick.control.data()));
}

#endif

#if FASTSSL_VECTOR_BYTES == 64 || defined(__AVX2__)

// Resamples kStrip rows of a plane along the width. Row r begins at dst + r * stride; writes whole groups.
inline void resample_strip(const uint8_t* const* rows, const Axis& axis, const Steps& steps, int64_t, uint8_t* dst,
                           int64_t stride) {
  const Lanes half = splat32(1 << axis.bits >> 1);
  const int64_t width = axis.first.size();
  const int32_t* offsets = steps.offsets.data();
  const Pick* pick = steps.picks.data();
  for (int64_t x = 0; x < width; x += kSums) {
    Lanes sums[kStrip] = {half, half, half, half};
    for (int64_t s = 0; s < steps.per_group; ++s, offsets += kLoads) {
      Lanes pixels[kStrip];
      for (int r = 0; r < kStrip; ++r) pixels[r] = load_pixels(rows[r], offsets);
      for (int64_t p = 0; p < steps.picks_per_step; ++p, ++pick) {
        const Lanes weights = load_lanes(reinterpret_cast<const uint8_t*>(pick->weights.data()));
        for (int r = 0; r < kStrip; ++r)
          sums[r] = add32(sums[r], multiply_pairs(pick_pairs(pixels[r], *pick), weights));
      }
    }
    for (Lanes& sum : sums) sum = shift_right32(sum, axis.bits);
    // each lane has four bytes of each row
    const Lanes bytes = pack16(pack32(sums[0], sums[1]), pack32(sums[2], sums[3]));
    store_quarters(dst + x, stride, gather_quarters(bytes));
  }
}

#else

inline void resample_strip(const uint8_t* const* rows, const Axis& axis, const Steps&, int64_t origin, uint8_t* dst,
                           int64_t stride) {
  const int64_t width = axis.first.size();
  for (int64_t x = 0; x < width; ++x) {
    const int16_t* const weights = axis.weights_of(x);
    int32_t sums[kStrip] = {};
    for (int64_t k = 0; k < axis.count[x]; ++k)
      for (int r = 0; r < kStrip; ++r) sums[r] += weights[k] * rows[r][axis.first[x] - origin + k];
    for (int r = 0; r < kStrip; ++r)
      dst[r * stride + x] = uint8_t(std::clamp((sums[r] + (1 << axis.bits >> 1)) >> axis.bits, 0, 255));
  }
}

#endif

// Splits RGB pixels into planes `stride` bytes apart, kVectorBytes pixels at a time: `src` and `dst` must have room.
inline void split_rgb(const uint8_t* src, int64_t pixels, uint8_t* dst, int64_t stride) {
#if FASTSSL_VECTOR_BYTES == 64 || defined(__AVX2__)
  alignas(kLaneBytes) static constexpr auto kControls = [] {
    std::array<std::array<std::array<uint8_t, kLaneBytes>, 3>, 3> controls{};  // of channel and third of 48 bytes
    for (int channel = 0; channel < 3; ++channel)
      for (int third = 0; third < 3; ++third)
        for (int pixel = 0; pixel < kLaneBytes; ++pixel) {
          const int place = 3 * pixel + channel - kLaneBytes * third;
          controls[channel][third][pixel] = place >= 0 && place < kLaneBytes ? uint8_t(place) : uint8_t(0x80);
        }
    return controls;
  }();
  for (int64_t x = 0; x < pixels; x += kVectorBytes) {
    Lanes thirds[3];
    for (int i = 0; i < 3; ++i) thirds[i] = load_apart(src + 3 * x + i * kLaneBytes, 3 * kLaneBytes);
    for (int c = 0; c < 3; ++c) {
      Lanes parts[3];
      for (int i = 0; i < 3; ++i) parts[i] = shuffle_bytes(thirds[i], broadcast_lane(kControls[c][i].data()));
      store_lanes(dst + c * stride + x, either(either(parts[0], parts[1]), parts[2]));
    }
  }
#else
  for (int64_t x = 0; x < pixels; ++x)
    for (int64_t c = 0; c < 3; ++c) dst[c * stride + x] = src[3 * x + c];
#endif
}

// ---- Along the height

// A weighted sum of rows, as bytes.
struct RowSum {
  std::vector<const uint8_t*> rows;  // an even number
  std::vector<int32_t> pairs;        // of weights, the first in the low half
  int bits;

  Lanes at(int64_t x, Lanes half) const {
    Lanes sums[4] = {half, half, half, half};
    const Lanes zero = splat32(0);
    for (size_t k = 0; k < pairs.size(); ++k) {
      const Lanes one = load_lanes(rows[2 * k] + x), other = load_lanes(rows[2 * k + 1] + x), pair = splat32(pairs[k]);
      const Lanes low = zip8_low(one, other), high = zip8_high(one, other);
      sums[0] = add32(sums[0], multiply_pairs(zip8_low(low, zero), pair));
      sums[1] = add32(sums[1], multiply_pairs(zip8_high(low, zero), pair));
      sums[2] = add32(sums[2], multiply_pairs(zip8_low(high, zero), pair));
      sums[3] = add32(sums[3], multiply_pairs(zip8_high(high, zero), pair));
    }
    for (Lanes& sum : sums) sum = shift_right32(sum, bits);
    return pack16(pack32(sums[0], sums[1]), pack32(sums[2], sums[3]));
  }

  // Calls store(x, bytes) for vectors at x = 0, … that cover the width; the last one may overlap the one before, or
  // begin at 0 and exceed the width.
  template <typename Store>
  void run(int64_t width, const Store& store) const {
    const Lanes half = splat32(1 << bits >> 1);
    for (int64_t x = 0; x + kVectorBytes <= width; x += kVectorBytes) store(x, at(x, half));
    if (width % kVectorBytes) {
      const int64_t x = std::max<int64_t>(width - kVectorBytes, 0);
      store(x, at(x, half));
    }
  }
};

// Writes the first bytes of a vector.
inline void store_bytes(uint8_t* dst, Lanes x, int64_t bytes) {
  if (bytes >= kVectorBytes) return store_lanes(dst, x);
  uint8_t all[kVectorBytes];
  store_lanes(all, x);
  std::memcpy(dst, all, bytes);
}

// ---- A plane, or three that are interleaved

struct Source {
  const uint8_t* data;
  int64_t row_stride, width, channels;
};

struct Window {
  double top, left, height, width;
};

// The weights of a window for a size of the result.
struct Plan {
  Axis rows, columns;
  Steps steps;
  bool copies;  // rows are copied, because they are interleaved or too short to load from

  void build(const Source& source, const Window& window, int64_t height, int64_t width, Kernel kernel) {
    rows.build({window.top, window.height, height}, kernel);
    columns.build({window.left, window.width, width}, kernel);
    copies = source.channels == 3 || source.width < kLoadBytes;
    steps.build(columns, origin(), copies ? std::max<int64_t>(columns.pixels, kLoadBytes) : source.width);
  }

  int64_t origin() const { return copies ? columns.origin : 0; }  // place of a row's first pixel in the plane
};

// Resamples a window row by row, from top to bottom.
class Resampler {
 public:
  // Begins a window. Its rows are then computed in order.
  void begin(const Source& source, const Plan& plan) {
    source_ = source;
    plan_ = &plan;
    next_ = plan.rows.origin;
    mask_ = int64_t(std::bit_ceil(uint64_t(plan.rows.most + kStrip))) - 1;
    const int64_t width = plan.columns.first.size();
    channel_stride_ = round_up<int64_t>(width, kVectorBytes);
    ring_.resize(size_t(mask_ + 1) * row_stride());
    copy_stride_ = round_up<int64_t>(plan.columns.pixels, kVectorBytes);
    if (plan.copies) copies_.resize(kStrip * 3 * copy_stride_ + 3 * kVectorBytes);
    sum_.bits = plan.rows.bits;
  }

  // The sum that is row y of the result, of the first channel.
  const RowSum& row(int64_t y) {
    const Axis& rows = plan_->rows;
    const int64_t count = rows.count[y], even = round_up<int64_t>(count, 2);
    while (next_ < rows.first[y] + count) fill_ring();
    sum_.rows.resize(even);
    sum_.pairs.resize(even / 2);
    for (int64_t k = 0; k < even; ++k) sum_.rows[k] = slot(rows.first[y] + std::min(k, count - 1));
    std::memcpy(sum_.pairs.data(), rows.weights_of(y), even * sizeof(int16_t));
    return sum_;
  }

  // The same row of the next channel.
  const RowSum& next_channel() {
    for (const uint8_t*& row : sum_.rows) row += channel_stride_;
    return sum_;
  }

 private:
  int64_t row_stride() const { return source_.channels * channel_stride_; }
  uint8_t* slot(int64_t row) { return ring_.data() + ((row - plan_->rows.origin) & mask_) * row_stride(); }

  // Resamples the next kStrip rows of the source along the width.
  void fill_ring() {
    const int64_t last = plan_->rows.origin + plan_->rows.pixels - 1;
    const uint8_t* rows[kStrip];
    for (int r = 0; r < kStrip; ++r) {
      rows[r] = source_.data + std::min(next_ + r, last) * source_.row_stride;
      if (plan_->copies) rows[r] = copy_row(rows[r], copies_.data() + r * 3 * copy_stride_);
    }
    for (int64_t c = 0; c < source_.channels; ++c) {
      resample_strip(rows, plan_->columns, plan_->steps, plan_->origin(), slot(next_) + c * channel_stride_,
                     row_stride());
      for (const uint8_t*& row : rows) row += copy_stride_;
    }
    next_ += kStrip;
  }

  // The pixels of the window in a row, as planes.
  const uint8_t* copy_row(const uint8_t* row, uint8_t* dst) {
    const int64_t pixels = plan_->columns.pixels, whole = pixels / kVectorBytes * kVectorBytes;
    const uint8_t* const src = row + plan_->origin() * source_.channels;
    if (source_.channels == 1) {
      std::memcpy(dst, src, pixels);
    } else {
      split_rgb(src, whole, dst, copy_stride_);
      uint8_t* const rest = copies_.data() + kStrip * 3 * copy_stride_;
      std::memcpy(rest, src + 3 * whole, 3 * (pixels - whole));
      if (pixels > whole) split_rgb(rest, pixels - whole, dst + whole, copy_stride_);
    }
    return dst;
  }

  Source source_;
  const Plan* plan_;
  int64_t next_, mask_, channel_stride_, copy_stride_;
  RowSum sum_;
  std::vector<uint8_t> ring_, copies_;
};

// ---- Images

struct Image {
  const uint8_t* data;
  int64_t height, width, row_stride;
  bool planes;
};

class Cropper {
 public:
  Cropper(int64_t height, int64_t width, Kernel kernel) : height_(height), width_(width), kernel_(kernel) {}

  void run(const Image& image, const Window& window, uint8_t* out) {
    if (image.planes)
      crop_planes(image, window, out);
    else
      crop_rgb(image, window, out);
  }

 private:
  void crop_rgb(const Image& image, const Window& window, uint8_t* out) {
    const Source source{image.data, image.row_stride, image.width, 3};
    plans_[0].build(source, window, height_, width_, kernel_);
    resamplers_[0].begin(source, plans_[0]);
    for (int64_t y = 0; y < height_; ++y) {
      const RowSum* sum = &resamplers_[0].row(y);
      for (int64_t c = 0; c < 3; ++c, sum = &resamplers_[0].next_channel()) {
        uint8_t* row = out + (c * height_ + y) * width_;
        sum->run(width_, [&](int64_t x, Lanes bytes) { store_bytes(row + x, bytes, width_ - x); });
      }
    }
  }

  void crop_planes(const Image& image, const Window& window, uint8_t* out) {
    const int64_t half_width = image.width / 2, pixels = image.height * image.width;
    const Window half{window.top / 2, window.left / 2, window.height / 2, window.width / 2};
    const uint8_t* const u = image.data + pixels;
    const Source sources[] = {{image.data, image.width, image.width, 1},
                              {u, half_width, half_width, 1},
                              {u + pixels / 4, half_width, half_width, 1}};
    plans_[0].build(sources[0], window, height_, width_, kernel_);
    plans_[1].build(sources[1], half, height_, width_, kernel_);
    for (int p = 0; p < 3; ++p) resamplers_[p].begin(sources[p], plans_[p > 0]);
    const int64_t stride = width_ + kVectorBytes;
    rows_.resize(2 * stride);
    for (int64_t y = 0; y < height_; ++y) {
      for (int p = 0; p < 2; ++p)
        resamplers_[p].row(y).run(width_, [&](int64_t x, Lanes bytes) { store_lanes(&rows_[p * stride + x], bytes); });
      resamplers_[2].row(y).run(width_, [&](int64_t x, Lanes v) {
        store_rgb(load_lanes(&rows_[x]), load_lanes(&rows_[stride + x]), v, out + y * width_ + x, width_ - x);
      });
    }
  }

  // Converts a vector of pixels and writes the first of them; `out` is the place in the plane of red.
  void store_rgb(Lanes y, Lanes u, Lanes v, uint8_t* out, int64_t pixels) const {
    const Lanes zero = splat32(0);
    Lanes low[] = {zip8_low(y, zero), zip8_low(u, zero), zip8_low(v, zero)};
    Lanes high[] = {zip8_high(y, zero), zip8_high(u, zero), zip8_high(v, zero)};
    to_rgb_(low[0], low[1], low[2]);
    to_rgb_(high[0], high[1], high[2]);
    for (int64_t c = 0; c < 3; ++c) store_bytes(out + c * height_ * width_, pack16(low[c], high[c]), pixels);
  }

  int64_t height_, width_;
  Kernel kernel_;
  Plan plans_[2];
  Resampler resamplers_[3];
  std::vector<uint8_t> rows_;
  ToRgb to_rgb_;
};

// ---- The op

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error("resized_crops_: " + message); }

Image image_of(const Tensor& tensor, size_t i) {
  const bool planes = tensor.dim() == 2;
  const auto dense = [&](int64_t d, int64_t stride) { return tensor.size(d) <= 1 || tensor.stride(d) == stride; };
  const bool fits = tensor.is_cpu() && tensor.scalar_type() == ScalarType::Byte &&
                    (planes ? tensor.size(0) % 3 == 0 && tensor.size(1) % 2 == 0 && tensor.is_contiguous()
                            : tensor.dim() == 3 && tensor.size(2) == 3 && dense(2, 1) && dense(1, 3));
  if (!fits) fail("images[" + std::to_string(i) + "] must be uint8 on the CPU, RGB or planes, with contiguous pixels");
  const int64_t height = planes ? tensor.size(0) / 3 * 2 : tensor.size(0);
  return {static_cast<const uint8_t*>(tensor.const_data_ptr()), height, tensor.size(1), tensor.stride(0), planes};
}

template <typename T>  // of the numbers: int64 or float64
Window window_of(const Tensor& windows, const Image& image, int64_t i) {
  T numbers[4];
  copy_row(numbers, static_cast<const T*>(windows.const_data_ptr()) + i * windows.stride(0), windows.stride(1), 4);
  const auto [top, left, height, width] = numbers;
  const auto inside = [](T begin, T length, T size) { return begin >= 0 && length >= 1 && length <= size - begin; };
  if (!inside(top, height, T(image.height)) || !inside(left, width, T(image.width)))
    fail("windows[" + std::to_string(i) + "] must be inside its image of " + std::to_string(image.height) + "×" +
         std::to_string(image.width) + " pixels and have at least one, got [" + std::to_string(top) + ", " +
         std::to_string(left) + ", " + std::to_string(height) + ", " + std::to_string(width) + "]");
  return {double(top), double(left), double(height), double(width)};
}

void resized_crops_(Tensor out, std::vector<Tensor> images, Tensor windows, int64_t kernel) {
  const int64_t batch = out.size(0), height = out.size(2), width = out.size(3);
  if (int64_t(images.size()) != batch || windows.size(0) != batch || !windows.is_cpu())
    fail("images and windows must have a row for each of out, windows on the CPU");
  if (kernel < kTriangle || kernel > kLanczos) fail("kernel must be from 0 to 2, got " + std::to_string(kernel));
  std::vector<Image> sources;
  std::vector<Window> places;
  for (int64_t b = 0; b < batch; ++b) {
    sources.push_back(image_of(images[b], b));
    places.push_back(windows.scalar_type() == ScalarType::Double ? window_of<double>(windows, sources[b], b)
                                                                 : window_of<int64_t>(windows, sources[b], b));
  }
  if (out.numel() == 0) return;
  torch::stable::parallel_for(0, batch, grain(3 * height * width), [&](int64_t begin, int64_t end) {
    Cropper cropper(height, width, Kernel(kernel));
    for (int64_t b = begin; b < end; ++b) cropper.run(sources[b], places[b], data<uint8_t>(out) + b * out.stride(0));
  });
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) { m.impl("resized_crops_", TORCH_BOX(&fastssl::resized_crops_)); }
