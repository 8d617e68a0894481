// Integer weights of antialiased resampling along one axis, as torch computes them for uint8 (fastssl/ops/crops.py).
#pragma once

#include "vec.h"

namespace fastssl {

constexpr double kTouch = 0x1p-20;  // least part of a pixel that counts: less may be an error of rounding

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

// sin(πx) / (πx) · sin(πx/3) / (πx/3), with the triple angle: one sine for each weight.
inline double lanczos(double x) {
  if (x == 0) return 1;
  if (x >= 3) return 0;
  const double angle = M_PI * x, sine = std::sin(angle / 3), square = product(sine, sine);
  return product(square, 9 - product(12, square)) / product(angle, angle);
}

// The kernels by the numbers that ops/crops.py gives them. Each reaches one pixel further than the one before.
enum Kernel : int64_t { kTriangle, kCubic, kLanczos };

inline double kernel_at(Kernel kernel, double x) {
  return kernel == kTriangle ? triangle(x) : kernel == kCubic ? cubic(x) : lanczos(x);
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
  int64_t origin, pixels;        // the pixels that the window touches

  const int16_t* weights_of(int64_t i) const { return weights.data() + i * most; }

  // The formulas of `axis_weights` in fastssl/ops/crops.py, operation by operation.
  void build(const Span& span, Kernel kernel) {
    const double pixel = std::floor(span.begin), offset = span.begin - pixel;
    origin = int64_t(pixel);
    pixels = int64_t(std::ceil(offset + span.length - kTouch));
    const double scale = span.length / double(span.size), inverse = scale >= 1 ? 1 / scale : 1;
    const double support = double(kernel + 1) * std::max(scale, 1.0);
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
        values[k - begin] = kernel_at(kernel, distance);
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
    for (bits = 0; bits < 22 && int64_t(0.5 + largest * double(int64_t(2) << bits)) < (1 << 15); ++bits) {
    }
    const double unit = double(int64_t(1) << bits);
    weights.resize(values_.size());
    for (size_t i = 0; i < values_.size(); ++i) {
      const double scaled = values_[i] * unit;
      weights[i] = int16_t(int32_t(scaled < 0 ? scaled - 0.5 : scaled + 0.5));
    }
  }
};

}  // namespace fastssl
