// Vectors as wide as the instruction set's registers, by the compiler's vector extension: code is written once and
// works on 16 floats with AVX-512, 8 with AVX2, 4 elsewhere (x86-64, ARM). The compiler contracts `a * b + c` to a
// fused multiply-add if the processor has one.
#pragma once

#include "common.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <cmath>
#include <utility>

namespace fastssl {

// -DFASTSSL_VECTOR_BYTES=64 compiles AVX-512's tile sizes for a processor without AVX-512 (tests/sanitize.py): the
// compiler splits each vector.
#if !defined(FASTSSL_VECTOR_BYTES)
#if defined(__AVX512F__)
#define FASTSSL_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTSSL_VECTOR_BYTES 32
#else
#define FASTSSL_VECTOR_BYTES 16
#endif
#endif
constexpr int kVectorBytes = FASTSSL_VECTOR_BYTES;

// A vector type of kBytes bytes. `unaligned` is for loads and stores at any address.
template <typename T, int kBytes = kVectorBytes>
struct VecOf {
  typedef T type __attribute__((vector_size(kBytes)));
  typedef T unaligned __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
};
template <typename T>
using Vec = typename VecOf<T>::type;

template <typename T>
using Mask = Vec<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>>;  // result of a comparison: 0 or -1
template <typename T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

// The type in which values of dtype T are computed and summed: double for double, else float.
template <typename T>
using ComputeType = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
inline Vec<T> load(const T* src) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(src);
}

template <typename T>
inline void store(T* dst, Vec<T> x) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(dst) = x;
}

template <typename T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}

// Loads a vector of values of any floating dtype, converted to the compute type.
inline Vec<float> load_wide(const float* src) { return load(src); }
inline Vec<double> load_wide(const double* src) { return load(src); }
inline Vec<float> load_wide(const BFloat16* src) {
  typedef uint16_t Short __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  typedef uint16_t Packed __attribute__((vector_size(kVectorBytes / 2)));
  const Packed bits = *reinterpret_cast<const Short*>(src);
  return Vec<float>(__builtin_convertvector(bits, Vec<uint32_t>) << 16);
}
inline Vec<float> load_wide(const Half* src) {
#if defined(__AVX512F__) && FASTSSL_VECTOR_BYTES == 64
  return Vec<float>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src))));
#elif defined(__F16C__) && FASTSSL_VECTOR_BYTES == 32
  return Vec<float>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src))));
#else
  Vec<float> x;
  for (int i = 0; i < kLanes<float>; ++i) x[i] = to_float(src[i]);
  return x;
#endif
}

// Converts n values of any floating dtype and stride to contiguous values of type T.
template <typename T, typename S>
inline void widen(const S* src, int64_t stride, int64_t n, T* dst) {
  int64_t i = 0;
  if constexpr (std::is_same_v<ComputeType<S>, T>)
    if (stride == 1)
      for (; i + kLanes<T> <= n; i += kLanes<T>) store(dst + i, load_wide(src + i));
  for (; i < n; ++i) dst[i] = T(to_float(src[i * stride]));
}

// Stores a vector in any floating dtype, rounded to nearest even.
inline void store_narrow(float* dst, Vec<float> x) { store(dst, x); }
inline void store_narrow(double* dst, Vec<double> x) { store(dst, x); }
inline Vec<uint32_t> bfloat16_bits(Vec<float> x) {  // rounded, in the low half of each lane
  const Vec<uint32_t> bits = Vec<uint32_t>(x);
  const Vec<uint32_t> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Vec<uint32_t> nan = Vec<uint32_t>(x != x);
  return (rounded & ~nan) | (nan & 0x7fc0);
}
inline void store_narrow(BFloat16* dst, Vec<float> x) {
  typedef uint16_t Short __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  typedef uint16_t Packed __attribute__((vector_size(kVectorBytes / 2)));
  *reinterpret_cast<Short*>(dst) = __builtin_convertvector(bfloat16_bits(x), Packed);
}
inline void store_narrow(Half* dst, Vec<float> x) {
#if defined(__AVX512F__) && FASTSSL_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), _mm512_cvtps_ph(__m512(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && FASTSSL_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm256_cvtps_ph(__m256(x), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) dst[i] = from_float<Half>(x[i]);
#endif
}

// a * b + c in each lane. With AVX-512's bf16 dot product a lane of a and b may hold two bfloat16 values, whose two
// products are added to c.
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) { return a * b + c; }
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) { return a * b + c; }
using Bf16x2 = uint32_t;  // two bfloat16 values, the first in the low half
#if defined(__AVX512BF16__) && FASTSSL_VECTOR_BYTES == 64
#define FASTSSL_BF16_DOT
inline Vec<float> multiply_add(Vec<Bf16x2> a, Vec<Bf16x2> b, Vec<float> c) {
  return Vec<float>(_mm512_dpbf16_ps(__m512(c), __m512bh(__m512i(a)), __m512bh(__m512i(b))));
}
#endif
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, Bf16x2>, float, T>;  // type of a sum of products of T

// Loads the first n values of a vector, converted to the compute type; the other lanes are zero. n may exceed a vector.
template <typename T, typename S>
inline Vec<T> load_part(const S* src, int64_t n) {
  if (n >= kLanes<T>) return load_wide(src);
  S part[kLanes<T>] = {};
  std::copy(src, src + n, part);
  return load_wide(part);
}

// Stores the first n values of a vector, rounded to S. n may exceed a vector.
template <typename T, typename S>
inline void store_part(S* dst, Vec<T> x, int64_t n) {
  if (n >= kLanes<T>) return store_narrow(dst, x);
  S part[kLanes<T>];
  store_narrow(part, x);
  std::copy(part, part + n, dst);
}

template <typename T>
inline T sum(Vec<T> x) {  // adds the upper half to the lower, until one lane is left
  T lanes[kLanes<T>];
  store(lanes, x);
  for (int width = kLanes<T> / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// Σ a·b: whole vectors are summed in T, the remaining values in double.
template <typename T>
inline double dot(const T* a, const T* b, int64_t n) {
  Vec<T> lanes{};
  double remainder = 0;
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) lanes = load(a + i) * load(b + i) + lanes;
  for (; i < n; ++i) remainder += double(a[i]) * double(b[i]);
  return remainder + double(sum<T>(lanes));
}

// Loads a vector if V is a vector type, one value if V is a scalar type, converted to the compute type: the same code
// serves whole vectors and the remainder of a row.
template <typename V, typename T>
inline V read(const T* src) {
  if constexpr (sizeof(V) == sizeof(ComputeType<T>))
    return to_float(*src);
  else
    return load_wide(src);
}

// Stores a vector or one value, rounded to T.
template <typename V, typename T>
inline void write(T* dst, V value) {
  if constexpr (sizeof(V) == sizeof(ComputeType<T>))
    *dst = from_float<T>(value);
  else
    store_narrow(dst, value);
}

// Calls step(V{}, i) for i = 0..n-1: with a vector type V for all values in a vector from i on, with a scalar type for
// each value of the remainder.
template <typename W, typename Step>
inline void for_each(int64_t n, Step step) {
  int64_t i = 0;
  for (; i + kLanes<W> <= n; i += kLanes<W>) step(Vec<W>{}, i);
  for (; i < n; ++i) step(W{}, i);
}

// Σ term(i) for i = 0..n-1. term(V{}, i) returns the terms in a vector from i on, or one term of the remainder. Terms
// are summed in W within a block of 64 steps, and the sums of blocks in double, so the rounding error does not grow
// with n.
template <typename W, typename Term>
double sum_over(int64_t n, Term term) {
  constexpr int64_t kLane = kLanes<W>, kStep = 4 * kLane, kBlock = 64 * kStep;
  double total = 0;
  int64_t i = 0;
  while (i + kLane <= n) {
    const int64_t end = std::min(i + kBlock, n);
    Vec<W> sums[4] = {};
    for (; i + kStep <= end; i += kStep)
      for (int v = 0; v < 4; ++v) sums[v] += term(Vec<W>{}, i + v * kLane);
    for (; i + kLane <= end; i += kLane) sums[0] += term(Vec<W>{}, i);
    total += sum<W>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  for (; i < n; ++i) total += term(W{}, i);
  return total;
}

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// 2^f for f in [-1/2, 1/2]. Minimax polynomial of degree 6: relative error 1.6e-8.
inline Vec<float> exp2_fraction(Vec<float> f) {
  Vec<float> p = splat(1.534581243e-4f);
  p = p * f + 1.339993090e-3f;
  p = p * f + 9.618489072e-3f;
  p = p * f + 5.550328642e-2f;
  p = p * f + 2.402264625e-1f;
  p = p * f + 6.931471825e-1f;
  return p * f + 1.0f;
}

constexpr float kRoundingShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits

// 2^n for an integer n in [-126, 128], as n + kRoundingShift; 2^128 is ∞.
inline Vec<float> exp2_integer(Vec<float> shifted) {
  return Vec<float>((Vec<int32_t>(shifted) - Vec<int32_t>(splat(kRoundingShift)) + 127) << 23);
}

// 2^x for x ≤ 126. Below -126 the result is 2^-126, negligible in a sum that contains 1. A NaN stays a NaN.
inline Vec<float> exp2(Vec<float> x) {
  x = x < -126.0f ? splat(-126.0f) : x;
  const Vec<float> shifted = x + kRoundingShift;
  return exp2_fraction(x - (shifted - kRoundingShift)) * exp2_integer(shifted);
}
inline Vec<double> exp2(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

// e^x with the relative error of one rounding, also far from zero: 0 below -87.33, ∞ above 88.72. A NaN stays a NaN.
inline Vec<float> exp(Vec<float> x) {
#if defined(__AVX512F__) && FASTSSL_VECTOR_BYTES == 64
  const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-104.0f), _mm512_min_ps(_mm512_set1_ps(89.0f), __m512(x)));
  const Vec<float> n = Vec<float>(_mm512_roundscale_ps(_mm512_mul_ps(bounded, _mm512_set1_ps(float(kLog2E))), 8));
  const Vec<float> remainder = (Vec<float>(bounded) - n * 0.693359375f) + n * 2.12194440e-4f;
  return Vec<float>(_mm512_scalef_ps(__m512(exp2_fraction(remainder * float(kLog2E))), __m512(n)));
#else
  const Vec<float> bounded = x < -87.33f ? splat(-87.33f) : x > 89.0f ? splat(89.0f) : x;
  const Vec<float> shifted = bounded * float(kLog2E) + kRoundingShift, n = shifted - kRoundingShift;
  // log 2 in two parts, of which the first has so few bits that its product with n is exact.
  const Vec<float> remainder = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  const Vec<float> result = exp2_fraction(remainder * float(kLog2E)) * exp2_integer(shifted);
  return x < -87.33f ? Vec<float>{} : result;
#endif
}
inline Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// Interleaves the lower or the upper halves of two vectors: (a0, b0, a1, b1, …).
template <bool kUpper, typename T, int... I>
inline Vec<T> zip(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  constexpr int kFirst = kUpper ? kLanes<T> / 2 : 0;
  return __builtin_shufflevector(a, b, (kFirst + I / 2 + I % 2 * kLanes<T>)...);
}

// Transposes a square of kLanes x kLanes values in place, one row per vector: log2 n stages, each of which zips row i
// with row i + n/2.
template <typename T>
inline void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  using Indices = std::make_integer_sequence<int, n>;
#pragma GCC unroll 4
  for (int stage = 1; stage < n; stage *= 2) {
    Vec<T> zipped[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      zipped[2 * i] = zip<false, T>(rows[i], rows[i + n / 2], Indices{});
      zipped[2 * i + 1] = zip<true, T>(rows[i], rows[i + n / 2], Indices{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = zipped[i];
  }
}

template <typename I>
constexpr I round_up(I n, I multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

}  // namespace fastssl
