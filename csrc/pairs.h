// With AVX-512's bf16 dot product: how values become bfloat16, and functions that are exact enough for what is rounded
// to it. Denormal numbers become zero, as the instructions have it.
#pragma once

#include "vec.h"

#if defined(FASTSSL_PAIRS)

namespace fastssl {

// 32 values rounded to bfloat16, in order.
inline Vec<Pair> narrow(Vec<float> first, Vec<float> second) {
  return Vec<Pair>(__m512i(_mm512_cvtne2ps_pbh(__m512(second), __m512(first))));
}

// Pairs (first, second) of values rounded to bfloat16.
inline Vec<Pair> narrow_pairs(Vec<float> first, Vec<float> second) {
  const Vec<Pair> lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Vec<Pair> order = lane | (lane + 16) << 16;
  return Vec<Pair>(_mm512_permutexvar_epi16(__m512i(order), __m512i(narrow(first, second))));
}

// 2^x in three instructions and a polynomial of degree 4: relative error 2.6e-6, where bfloat16 has 2e-3. A NaN stays.
inline Vec<float> exp2_rounded(Vec<float> x) {
  const Vec<float> f = Vec<float>(_mm512_maskz_reduce_ps(0xffff, __m512(x), _MM_FROUND_TO_NEG_INF));  // x − ⌊x⌋
  Vec<float> p = splat(1.353416791e-02f);
  p = p * f + 5.201146059e-02f;
  p = p * f + 2.414427565e-01f;
  p = p * f + 6.930038352e-01f;
  p = p * f + 1.000002592e+00f;
  return Vec<float>(_mm512_maskz_scalef_ps(0xffff, __m512(p), __m512(x)));
}

// Φ(x) and e^(-x²/2) as in gelu.h, with a relative error of 2^-12: the reciprocal is the processor's estimate, R has
// degree 4 in 1 / (1 + 0.4 t).
struct RoundedNormal {
  Vec<float> distribution, exponential;
};

inline RoundedNormal normal_rounded(Vec<float> x) {
  const Vec<float> t = x < 0.0f ? -x : x;
  const Vec<float> u = Vec<float>(_mm512_rcp14_ps(__m512(t * 0.4f + 1.0f)));
  Vec<float> r = splat(-8.475709e-2f);
  r = r * u + 1.4404329e-1f;
  r = r * u + 1.2058357e-1f;
  r = r * u + 1.6050998e-1f;
  r = r * u + 1.5957282e-1f;
  const Vec<float> exponential = exp2_rounded(x * x * float(-0.5 * kLog2E));
  const Vec<float> tail = exponential * (r * u);
  return {x < 0.0f ? tail : 1.0f - tail, exponential};
}

inline Vec<float> gelu_rounded(Vec<float> x) { return x * normal_rounded(x).distribution; }

inline Vec<float> gelu_slope_rounded(Vec<float> x) {
  const RoundedNormal at = normal_rounded(x);
  return at.distribution + x * at.exponential * 0.3989422804f;
}

}  // namespace fastssl

#endif
