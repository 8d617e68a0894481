// Windows of uint8 images, resampled into a batch (fastssl/ops/crops.py).
//
// Rows of the image are resampled along the width, one row in each 128-bit lane, and rounded to bytes. They stay in a
// ring of a few rows in the cache, from which each row of the result is resampled along the height. So an image is read
// once, only where the window is, and the result is written once.
//
// A step of the first pass loads 16 bytes of each row, picks from them two pairs of neighbouring pixels for each of four
// sums (red, green and blue of one pixel of the result, or four pixels of a plane), and adds the pairs times their
// weights. Which bytes are picked is a table of the width, made once a window.
#include "lanes.h"
#include "rows.h"

#include <array>
#include <limits>

namespace fastssl {
namespace {

// ---- Weights of one axis

// A product that is rounded by itself: the compiler may not fuse it with an addition, because the weights must not
// depend on the instruction set.
inline double product(double a, double b) {
  double x = a * b;
#if defined(__SSE2__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

inline double triangle(double x) { return x < 1 ? 1 - x : 0; }

inline double cubic(double x) {
  constexpr double a = -0.5;
  if (x < 1) return product(product(product(a + 2, x) - (a + 3), x), x) + 1;
  if (x < 2) return product(product(product(a, x) - 5 * a, x) + 8 * a, x) - 4 * a;
  return 0;
}

// The window along one axis, in pixels of a plane, and the size of the result.
struct Span {
  double begin, length;
  int64_t size;
};

// Pixels [first, first + count) of the plane and their weights, for each pixel of the result.
struct Axis {
  std::vector<int64_t> first;
  std::vector<int32_t> count;
  std::vector<int16_t> weights;  // `most` for each pixel of the result
  int64_t most;                  // the largest count, even
  int bits;                      // of the weights after the point

  const int16_t* weights_of(int64_t i) const { return weights.data() + i * most; }

  // The formulas of `axis_weights` in fastssl/ops/crops.py, operation by operation.
  void build(const Span& span, bool bicubic) {
    const double pixel = std::floor(span.begin), offset = span.begin - pixel;
    const int64_t origin = int64_t(pixel), pixels = int64_t(std::ceil(offset + span.length));
    const double scale = span.length / double(span.size), inverse = scale >= 1 ? 1 / scale : 1;
    const double support = (bicubic ? 2 : 1) * std::max(scale, 1.0);
    const int64_t widest = 2 * int64_t(std::ceil(float(support))) + 1;
    first.resize(span.size);
    count.resize(span.size);
    most = round_up<int64_t>(std::min(widest, pixels), 2);
    values_.assign(span.size * most, 0);
    double largest = 0;
    for (int64_t i = 0; i < span.size; ++i) {
      const double centre = offset + product(scale, double(i) + 0.5);
      const int64_t begin = std::max<int64_t>(int64_t(centre - support + 0.5), 0);
      const int64_t end = std::min(std::min(int64_t(centre + support + 0.5), pixels), begin + widest);
      double* values = values_.data() + i * most;
      double total = 0;
      for (int64_t k = begin; k < end; ++k) {
        const double distance = std::abs(product(double(k) - centre + 0.5, inverse));
        values[k - begin] = bicubic ? cubic(distance) : triangle(distance);
        total += values[k - begin];
      }
      for (int64_t k = 0; k < end - begin; ++k) {
        if (total != 0) values[k] /= total;
        largest = std::max(largest, values[k]);
      }
      first[i] = origin + begin;
      count[i] = int32_t(end - begin);
    }
    round_weights(largest);
  }

 private:
  std::vector<double> values_;

  void round_weights(double largest) {
    for (bits = 0; bits < 22 && int64_t(0.5 + largest * double(int64_t(2) << bits)) < (1 << 15); ++bits) {}
    const double unit = double(int64_t(1) << bits);
    weights.resize(values_.size());
    for (size_t i = 0; i < values_.size(); ++i) {
      const double scaled = values_[i] * unit;
      weights[i] = int16_t(int32_t(scaled < 0 ? scaled - 0.5 : scaled + 0.5));
    }
  }
};

// ---- Along the width

constexpr int64_t kBlock = 16;  // pixels of the result are computed by blocks: the width of a row in the ring is padded

// Bytes to pick from the 16 that were loaded, for four sums of two products each, and the weights.
struct Pick {
  std::array<uint8_t, kLaneBytes> control;
  std::array<int16_t, 8> weights;
};

// The steps of all groups of four sums; each group has the same number of steps, each of two picks.
struct Steps {
  std::vector<int32_t> offsets;  // of the bytes to load, from the start of the row
  std::vector<Pick> picks;
  int64_t per_group;

  // kChannels: 3 for a group per pixel (red, green, blue and nothing), 1 for a group per four pixels.
  template <int kChannels>
  void build(const Axis& axis, int64_t row_bytes) {
    const int64_t size = int64_t(axis.first.size()), padded = round_up(size, kBlock);
    const int64_t groups = kChannels == 3 ? padded : padded / 4;
    for (per_group = (axis.most + 3) / 4;; per_group *= 2) {
      offsets.assign(groups * per_group, 0);
      picks.resize(groups * per_group * 2);
      int64_t g = 0;
      while (g < groups && fill_group<kChannels>(axis, row_bytes, g)) ++g;
      if (g == groups) return;
    }
  }

 private:
  // False where the group needs more steps.
  template <int kChannels>
  bool fill_group(const Axis& axis, int64_t row_bytes, int64_t group) {
    const int64_t size = int64_t(axis.first.size());
    struct Sum {
      int64_t position, left;  // of the next pixel's byte in the row, and pixels that are left
      const int16_t* weights;
    } sums[4];
    for (int lane = 0; lane < 4; ++lane) {
      const int64_t i = kChannels == 3 ? group : 4 * group + lane;
      const bool used = i < size && lane < (kChannels == 3 ? 3 : 4);
      sums[lane] = used ? Sum{axis.first[i] * kChannels + (kChannels == 3 ? lane : 0), axis.count[i], axis.weights_of(i)}
                        : Sum{0, 0, nullptr};
    }
    for (int64_t s = group * per_group; s < (group + 1) * per_group; ++s) {
      int64_t begin = row_bytes;
      for (const Sum& sum : sums)
        if (sum.left) begin = std::min(begin, sum.position);
      begin = std::min(begin, row_bytes - kLaneBytes);
      offsets[s] = int32_t(begin);
      for (int p = 0; p < 2; ++p) fill_pick<kChannels>(sums, begin, picks[2 * s + p]);
    }
    return std::none_of(sums, sums + 4, [](const Sum& sum) { return sum.left != 0; });
  }

  template <int kChannels, typename Sum>
  static void fill_pick(Sum (&sums)[4], int64_t begin, Pick& pick) {
    pick.control.fill(0x80);  // zero
    pick.weights.fill(0);
    for (int lane = 0; lane < 4; ++lane)
      for (int k = 0; k < 2; ++k) {
        Sum& sum = sums[lane];
        if (!sum.left || sum.position - begin >= kLaneBytes) break;
        pick.control[4 * lane + 2 * k] = uint8_t(sum.position - begin);
        pick.weights[2 * lane + k] = *sum.weights++;
        sum.position += kChannels;
        --sum.left;
      }
  }
};

// Sums of a group, for kLaneCount rows, rounded: 32 bits each.
inline Lanes sums_of_group(const uint8_t* const* rows, const int32_t* offsets, const Pick* picks, int64_t steps,
                           Lanes half, int bits) {
  Lanes sums = half;
  for (int64_t s = 0; s < steps; ++s) {
    const Lanes pixels = load_rows(rows, offsets[s]);
    for (int p = 0; p < 2; ++p) {
      const Pick& pick = picks[2 * s + p];
      const Lanes pairs = shuffle_bytes(pixels, broadcast_lane(pick.control.data()));
      sums = add32(sums, multiply_pairs(pairs, broadcast_lane(pick.weights.data())));
    }
  }
  return shift_right32(sums, bits);
}

// Bytes of four groups, for kLaneCount rows.
inline Lanes bytes_of_groups(const uint8_t* const* rows, const Steps& steps, int64_t group, Lanes half, int bits) {
  Lanes sums[4];
  for (int g = 0; g < 4; ++g) {
    const int64_t s = (group + g) * steps.per_group;
    sums[g] = sums_of_group(rows, &steps.offsets[s], &steps.picks[2 * s], steps.per_group, half, bits);
  }
  return pack16(pack32(sums[0], sums[1]), pack32(sums[2], sums[3]));
}

// Resamples kLaneCount rows along the width. Row r of channel c begins at dst + r * row_stride + c * channel_stride.
template <int kChannels>
void resample_rows(const uint8_t* const* rows, const Steps& steps, int bits, int64_t width, uint8_t* dst,
                   int64_t row_stride, int64_t channel_stride) {
  const Lanes half = splat32(1 << bits >> 1);
  if constexpr (kChannels == 1) {
    for (int64_t x = 0; x < width; x += kBlock)
      store_rows(dst + x, row_stride, bytes_of_groups(rows, steps, x / 4, half, bits));
  } else {
    constexpr uint8_t kByChannel[] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    const Lanes by_channel = broadcast_lane(kByChannel);
    for (int64_t x = 0; x < width; x += kBlock) {
      Lanes fours[4];  // of pixels: four values of red, of green, of blue, and of nothing
      for (int i = 0; i < 4; ++i)
        fours[i] = shuffle_bytes(bytes_of_groups(rows, steps, x + 4 * i, half, bits), by_channel);
      const Lanes red_green[] = {zip32_low(fours[0], fours[1]), zip32_low(fours[2], fours[3])};
      const Lanes blue[] = {zip32_high(fours[0], fours[1]), zip32_high(fours[2], fours[3])};
      store_rows(dst + x, row_stride, zip64_low(red_green[0], red_green[1]));
      store_rows(dst + x + channel_stride, row_stride, zip64_high(red_green[0], red_green[1]));
      store_rows(dst + x + 2 * channel_stride, row_stride, zip64_low(blue[0], blue[1]));
    }
  }
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
  int64_t row_stride, row_bytes;
};

struct Window {
  double top, left, height, width;
};

// Resamples a window row by row, from top to bottom.
template <int kChannels>
class Resampler {
 public:
  // Begins a window. Its rows are then computed in order.
  void begin(const Source& source, const Window& window, int64_t height, int64_t width, bool bicubic) {
    source_ = source;
    width_ = width;
    rows_.build({window.top, window.height, height}, bicubic);
    columns_.build({window.left, window.width, width}, bicubic);
    steps_.template build<kChannels>(columns_, std::max<int64_t>(source.row_bytes, kLaneBytes));
    last_ = 0;
    for (int64_t i = 0; i < height; ++i) last_ = std::max(last_, rows_.first[i] + rows_.count[i] - 1);
    next_ = rows_.first[0];
    mask_ = int64_t(std::bit_ceil(uint64_t(rows_.most + kLaneCount))) - 1;
    origin_ = next_;
    channel_stride_ = std::max<int64_t>(round_up(width, kBlock), kVectorBytes);
    ring_.resize(size_t(mask_ + 1) * row_stride());
    if (source.row_bytes < kLaneBytes) short_rows_.assign(kLaneCount * kLaneBytes, 0);
    sum_.bits = rows_.bits;
  }

  // Row y of the result, of channel c at the same place of rows(c).
  const RowSum& row(int64_t y) {
    const int64_t count = rows_.count[y], even = round_up<int64_t>(count, 2);
    while (next_ < rows_.first[y] + count) fill_ring();
    sum_.rows.resize(even);
    sum_.pairs.resize(even / 2);
    for (int64_t k = 0; k < even; ++k) sum_.rows[k] = slot(rows_.first[y] + std::min(k, count - 1));
    std::memcpy(sum_.pairs.data(), rows_.weights_of(y), even * sizeof(int16_t));
    return sum_;
  }

  // The same rows in the next channel.
  const RowSum& next_channel() {
    for (const uint8_t*& row : sum_.rows) row += channel_stride_;
    return sum_;
  }

 private:
  int64_t row_stride() const { return kChannels * channel_stride_; }
  uint8_t* slot(int64_t row) { return ring_.data() + ((row - origin_) & mask_) * row_stride(); }

  // Resamples the next kLaneCount rows of the source along the width.
  void fill_ring() {
    const uint8_t* rows[kLaneCount];
    for (int i = 0; i < kLaneCount; ++i) {
      rows[i] = source_.data + std::min(next_ + i, last_) * source_.row_stride;
      if (source_.row_bytes < kLaneBytes) {
        std::memcpy(short_rows_.data() + i * kLaneBytes, rows[i], source_.row_bytes);
        rows[i] = short_rows_.data() + i * kLaneBytes;
      }
    }
    resample_rows<kChannels>(rows, steps_, columns_.bits, width_, slot(next_), row_stride(), channel_stride_);
    next_ += kLaneCount;
  }

  Source source_;
  int64_t width_, next_, last_, origin_, mask_, channel_stride_;
  Axis rows_, columns_;
  Steps steps_;
  RowSum sum_;
  std::vector<uint8_t> ring_, short_rows_;
};

// ---- Images

// YCbCr → RGB of half a vector, 16 bits each, by the integers of libjpeg: 1.402, 0.34414, 0.71414, 1.772 in units of
// 2^-16, rounded, in forms that fit 16 bits.
struct ToRgb {
  Lanes centre = splat16(128), one = splat16(1), half = splat32(1 << 15);
  Lanes red = splat16(91881 - 65536), blue = splat16(116130 - 2 * 65536);
  Lanes green = splat32(int32_t((uint32_t(65536 - 46802) << 16) | uint16_t(-22554)));

  // y + (v·factor + 2^15 >> 16) for twice the chroma and a factor of 16 bits
  Lanes scaled(Lanes twice, Lanes factor) const { return halve16(add16(multiply_high(twice, factor), one)); }

  void operator()(Lanes& y, Lanes& u, Lanes& v) const {
    u = subtract16(u, centre);
    v = subtract16(v, centre);
    const Lanes twice_u = add16(u, u), twice_v = add16(v, v);
    const Lanes low = shift_right32(add32(multiply_pairs(zip16_low(u, v), green), half), 16);
    const Lanes high = shift_right32(add32(multiply_pairs(zip16_high(u, v), green), half), 16);
    const Lanes r = add16(add16(y, v), scaled(twice_v, red)), b = add16(add16(y, twice_u), scaled(twice_u, blue));
    const Lanes g = add16(subtract16(y, v), pack32(low, high));
    y = r;
    u = g;
    v = b;
  }
};

struct Image {
  const uint8_t* data;
  int64_t height, width, row_stride;
  bool planes;
};

class Cropper {
 public:
  Cropper(int64_t height, int64_t width, bool bicubic) : height_(height), width_(width), bicubic_(bicubic) {}

  void run(const Image& image, const Window& window, uint8_t* out) {
    if (image.planes)
      crop_planes(image, window, out);
    else
      crop_rgb(image, window, out);
  }

 private:
  void crop_rgb(const Image& image, const Window& window, uint8_t* out) {
    rgb_.begin({image.data, image.row_stride, 3 * image.width}, window, height_, width_, bicubic_);
    for (int64_t y = 0; y < height_; ++y) {
      const RowSum* sum = &rgb_.row(y);
      for (int64_t c = 0; c < 3; ++c, sum = &rgb_.next_channel()) {
        uint8_t* row = out + (c * height_ + y) * width_;
        sum->run(width_, [&](int64_t x, Lanes bytes) { store_bytes(row + x, bytes, width_ - x); });
      }
    }
  }

  void crop_planes(const Image& image, const Window& window, uint8_t* out) {
    const int64_t half_width = image.width / 2, luma = image.height * image.width, chroma = luma / 4;
    const Window half{window.top / 2, window.left / 2, window.height / 2, window.width / 2};
    planes_[0].begin({image.data, image.width, image.width}, window, height_, width_, bicubic_);
    for (int64_t p = 0; p < 2; ++p)
      planes_[1 + p].begin({image.data + luma + p * chroma, half_width, half_width}, half, height_, width_, bicubic_);
    const ToRgb to_rgb;
    const Lanes zero = splat32(0);
    rows_.resize(3 * (width_ + kVectorBytes));
    uint8_t* const rows[] = {&rows_[0], &rows_[width_ + kVectorBytes], &rows_[2 * (width_ + kVectorBytes)]};
    for (int64_t y = 0; y < height_; ++y) {
      for (int64_t p = 0; p < 2; ++p)
        planes_[p].row(y).run(width_, [&](int64_t x, Lanes bytes) { store_lanes(rows[p] + x, bytes); });
      planes_[2].row(y).run(width_, [&](int64_t x, Lanes v) {
        const Lanes luma = load_lanes(rows[0] + x), u = load_lanes(rows[1] + x);
        Lanes low[] = {zip8_low(luma, zero), zip8_low(u, zero), zip8_low(v, zero)};
        Lanes high[] = {zip8_high(luma, zero), zip8_high(u, zero), zip8_high(v, zero)};
        to_rgb(low[0], low[1], low[2]);
        to_rgb(high[0], high[1], high[2]);
        for (int64_t c = 0; c < 3; ++c)
          store_bytes(out + (c * height_ + y) * width_ + x, pack16(low[c], high[c]), width_ - x);
      });
    }
  }

  int64_t height_, width_;
  bool bicubic_;
  Resampler<3> rgb_;
  Resampler<1> planes_[3];
  std::vector<uint8_t> rows_;
};

// ---- The op

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error("resized_crops_: " + message); }

Image image_of(const Tensor& tensor, size_t i) {
  const bool planes = tensor.dim() == 2;
  const auto dense = [&](int64_t d, int64_t stride) { return tensor.size(d) <= 1 || tensor.stride(d) == stride; };
  const bool fits = tensor.is_cpu() && tensor.scalar_type() == ScalarType::Byte &&
                    (planes ? tensor.size(0) % 3 == 0 && tensor.size(1) % 2 == 0 && tensor.is_contiguous()
                            : tensor.dim() == 3 && tensor.size(2) == 3 && dense(2, 1) && dense(1, 3));
  if (!fits)
    fail("images[" + std::to_string(i) + "] must be uint8 on the CPU, [H, W, 3] or planes [3·H/2, W], with "
         "contiguous pixels");
  const int64_t height = planes ? tensor.size(0) / 3 * 2 : tensor.size(0);
  return {static_cast<const uint8_t*>(tensor.const_data_ptr()), height, tensor.size(1), tensor.stride(0), planes};
}

// Window i; its numbers are of type T, int64 or float64.
template <typename T>
Window window_of(const Tensor& windows, const Image& image, int64_t i) {
  T numbers[4];
  copy_row(numbers, static_cast<const T*>(windows.const_data_ptr()) + i * windows.stride(0), windows.stride(1), 4);
  const auto [top, left, height, width] = numbers;
  const auto inside = [](T begin, T length, T size) {
    return begin >= 0 && begin < size && length >= 1 && length <= size - begin;
  };
  if (!inside(top, height, T(image.height)) || !inside(left, width, T(image.width)))
    fail("windows[" + std::to_string(i) + "] must be inside its image of " + std::to_string(image.height) + "×" +
         std::to_string(image.width) + " pixels and have at least one, got [" + std::to_string(top) + ", " +
         std::to_string(left) + ", " + std::to_string(height) + ", " + std::to_string(width) + "]");
  return {double(top), double(left), double(height), double(width)};
}

void resized_crops_(Tensor out, std::vector<Tensor> images, Tensor windows, bool bicubic) {
  const int64_t batch = out.size(0), height = out.size(2), width = out.size(3);
  if (int64_t(images.size()) != batch || windows.size(0) != batch || !windows.is_cpu())
    fail("images and windows must have a row for each of out, windows on the CPU");
  std::vector<Image> sources;
  std::vector<Window> places;
  for (int64_t b = 0; b < batch; ++b) {
    sources.push_back(image_of(images[b], b));
    places.push_back(windows.scalar_type() == ScalarType::Double ? window_of<double>(windows, sources[b], b)
                                                                 : window_of<int64_t>(windows, sources[b], b));
  }
  if (out.numel() == 0) return;
  torch::stable::parallel_for(0, batch, grain(3 * height * width), [&](int64_t begin, int64_t end) {
    Cropper cropper(height, width, bicubic);
    for (int64_t b = begin; b < end; ++b) cropper.run(sources[b], places[b], data<uint8_t>(out) + b * out.stride(0));
  });
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) { m.impl("resized_crops_", TORCH_BOX(&fastssl::resized_crops_)); }
