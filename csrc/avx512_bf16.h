// AVX-512's bf16 instructions: conversion to bfloat16, and functions that are accurate enough where the result is
// rounded to bfloat16. These instructions treat denormal numbers as zero.
#pragma once

#include "vec.h"

#if defined(FASTSSL_BF16_DOT)

namespace fastssl {

// 32 values rounded to bfloat16: those of `first`, then those of `second`.
inline Vec<Bf16x2> to_bf16(Vec<float> first, Vec<float> second) {
  return Vec<Bf16x2>(__m512i(_mm512_cvtne2ps_pbh(__m512(second), __m512(first))));
}

// 16 pairs of values rounded to bfloat16: lane i holds (first[i], second[i]).
inline Vec<Bf16x2> to_bf16_pairs(Vec<float> first, Vec<float> second) {
  const Vec<Bf16x2> lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Vec<Bf16x2> order = lane | (lane + 16) << 16;
  return Vec<Bf16x2>(_mm512_permutexvar_epi16(__m512i(order), __m512i(to_bf16(first, second))));
}

// 2^x: three instructions and a polynomial of degree 4, with relative error 2.6e-6 (rounding to bfloat16: 2e-3). A NaN
// stays a NaN.
inline Vec<float> exp2_bf16(Vec<float> x) {
  const Vec<float> f = Vec<float>(_mm512_maskz_reduce_ps(0xffff, __m512(x), _MM_FROUND_TO_NEG_INF));  // x − ⌊x⌋
  Vec<float> p = splat(1.353416791e-02f);
  p = p * f + 5.201146059e-02f;
  p = p * f + 2.414427565e-01f;
  p = p * f + 6.930038352e-01f;
  p = p * f + 1.000002592e+00f;
  return Vec<float>(_mm512_maskz_scalef_ps(0xffff, __m512(p), __m512(x)));
}

// Φ(x) and e^(-x²/2) as in gelu.h, with relative error 2^-12: the reciprocal is the processor's approximation, and R
// has degree 4 in 1 / (1 + 0.4 t).
struct NormalBf16 {
  Vec<float> distribution, exponential;
};

inline NormalBf16 normal_bf16(Vec<float> x) {
  const Vec<float> t = x < 0.0f ? -x : x;
  const Vec<float> u = Vec<float>(_mm512_rcp14_ps(__m512(t * 0.4f + 1.0f)));
  Vec<float> r = splat(-8.475709e-2f);
  r = r * u + 1.4404329e-1f;
  r = r * u + 1.2058357e-1f;
  r = r * u + 1.6050998e-1f;
  r = r * u + 1.5957282e-1f;
  const Vec<float> exponential = exp2_bf16(x * x * float(-0.5 * kLog2E));
  const Vec<float> tail = exponential * (r * u);
  return {x < 0.0f ? tail : 1.0f - tail, exponential};
}

}  // namespace fastssl

#endif
