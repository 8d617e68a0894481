// GELU with the exact normal distribution, x Φ(x), and its derivative (Hendrycks and Gimpel, 2016).
#pragma once

#include "vec.h"

#include <cmath>

namespace fastssl {

// Φ(x) and e^(-x²/2): GELU and its derivative are products and sums of these two.
//
// For t = |x|, Φ(-t) = e^(-t²/2) R(t), where R decreases slowly from 1/2. R is computed as a polynomial in
// 1 / (1 + 0.275 t), fitted so that the absolute error of Φ is at most 1.1e-8. One exponential and no branch.
struct Normal {
  Vec<float> distribution, exponential;
};

inline Normal normal(Vec<float> x) {
  const Vec<float> t = x < 0.0f ? -x : x;
  const Vec<float> u = 1.0f / (t * 0.275f + 1.0f);
  Vec<float> r = splat(-1.141655298e-1f);
  r = r * u + 4.491644536e-1f;
  r = r * u - 3.263884848e-1f;
  r = r * u + 3.302193195e-1f;
  r = r * u + 4.359672264e-2f;
  r = r * u + 1.175735296e-1f;
  const Vec<float> exponential = exp2(x * x * float(-0.5 * kLog2E));
  const Vec<float> tail = exponential * (r * u);
  return {x < 0.0f ? tail : 1.0f - tail, exponential};
}

inline Vec<double> gelu(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] *= 0.5 * std::erfc(-x[i] * M_SQRT1_2);
  return x;
}

inline Vec<double> gelu_derivative(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i)
    x[i] = 0.5 * std::erfc(-x[i] * M_SQRT1_2) + x[i] * std::exp(-0.5 * x[i] * x[i]) * 0.3989422804014327;
  return x;
}

}  // namespace fastssl
