// Vectors as wide as the instruction set has them, in the compiler's own vector types: arithmetic is written once and is
// 16 floats wide with AVX-512, 8 with AVX2, 4 elsewhere (x86-64, ARM). Compilers fuse `a * b + c` into one instruction.
#pragma once

#include "common.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <cmath>
#include <utility>

namespace fastssl {

// FASTSSL_VECTOR_BYTES=64 runs the code as AVX-512 has it on a processor without: the compiler splits the vectors.
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

template <typename T, int kBytes = kVectorBytes>
struct VecOf {
  typedef T type __attribute__((vector_size(kBytes)));
  typedef T unaligned __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
};
template <typename T>
using Vec = typename VecOf<T>::type;

template <typename T>
using Mask = Vec<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>>;  // what a comparison gives: 0 or -1
template <typename T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

// The type in which a dtype is computed and summed: float, and double for double.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
inline Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(from);
}

template <typename T>
inline void store(T* to, Vec<T> x) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(to) = x;
}

template <typename T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}

// kLanes<Wide<S>> values of dtype S, widened.
inline Vec<float> load_wide(const float* from) { return load(from); }
inline Vec<double> load_wide(const double* from) { return load(from); }
inline Vec<float> load_wide(const BFloat16* from) {
  typedef uint16_t Short __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  typedef uint16_t Packed __attribute__((vector_size(kVectorBytes / 2)));
  const Packed bits = *reinterpret_cast<const Short*>(from);
  return Vec<float>(__builtin_convertvector(bits, Vec<uint32_t>) << 16);
}
inline Vec<float> load_wide(const Half* from) {
#if defined(__AVX512F__) && FASTSSL_VECTOR_BYTES == 64
  return Vec<float>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__) && FASTSSL_VECTOR_BYTES == 32
  return Vec<float>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  Vec<float> x;
  for (int i = 0; i < kLanes<float>; ++i) x[i] = to_float(from[i]);
  return x;
#endif
}

// n values of any dtype and stride as T, side by side.
template <typename T, typename S>
inline void widen(const S* from, int64_t stride, int64_t n, T* to) {
  int64_t i = 0;
  if constexpr (std::is_same_v<Wide<S>, T>)
    if (stride == 1)
      for (; i + kLanes<T> <= n; i += kLanes<T>) store(to + i, load_wide(from + i));
  for (; i < n; ++i) to[i] = T(to_float(from[i * stride]));
}

// Rounds to nearest even where S is narrower.
inline void store_narrow(float* to, Vec<float> x) { store(to, x); }
inline void store_narrow(double* to, Vec<double> x) { store(to, x); }
inline Vec<uint32_t> bfloat16_bits(Vec<float> x) {  // in the low halves
  const Vec<uint32_t> bits = Vec<uint32_t>(x);
  const Vec<uint32_t> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Vec<uint32_t> nan = Vec<uint32_t>(x != x);
  return (rounded & ~nan) | (nan & 0x7fc0);
}
inline void store_narrow(BFloat16* to, Vec<float> x) {
  typedef uint16_t Short __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  typedef uint16_t Packed __attribute__((vector_size(kVectorBytes / 2)));
  *reinterpret_cast<Short*>(to) = __builtin_convertvector(bfloat16_bits(x), Packed);
}
inline void store_narrow(Half* to, Vec<float> x) {
#if defined(__AVX512F__) && FASTSSL_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(__m512(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && FASTSSL_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(__m256(x), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) to[i] = from_float<Half>(x[i]);
#endif
}

// a * b + c, lane by lane. Where there is an instruction for it, also for two bfloat16 a lane, whose products are summed.
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) { return a * b + c; }
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) { return a * b + c; }
using Pair = uint32_t;  // the first in the lower half
#if defined(__AVX512BF16__) && FASTSSL_VECTOR_BYTES == 64
#define FASTSSL_PAIRS
inline Vec<float> multiply_add(Vec<Pair> a, Vec<Pair> b, Vec<float> c) {
  return Vec<float>(_mm512_dpbf16_ps(__m512(c), __m512bh(__m512i(a)), __m512bh(__m512i(b))));
}
#endif
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, Pair>, float, T>;  // the type in which products of T are summed

// Up to a vector of values of dtype S, widened, zeros behind the n-th.
template <typename T, typename S>
inline Vec<T> load_part(const S* from, int64_t n) {
  if (n >= kLanes<T>) return load_wide(from);
  S part[kLanes<T>] = {};
  std::copy(from, from + n, part);
  return load_wide(part);
}

template <typename T, typename S>
inline void store_part(S* to, Vec<T> x, int64_t n) {
  if (n >= kLanes<T>) return store_narrow(to, x);
  S part[kLanes<T>];
  store_narrow(part, x);
  std::copy(part, part + n, to);
}

template <typename T>
inline T sum(Vec<T> x) {  // by halves, as the compiler would shuffle it
  T lanes[kLanes<T>];
  store(lanes, x);
  for (int width = kLanes<T> / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// Σ a·b: whole vectors in T, their lanes and what is left in double.
template <typename T>
inline double dot(const T* a, const T* b, int64_t n) {
  Vec<T> lanes{};
  double rest = 0;
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) lanes = load(a + i) * load(b + i) + lanes;
  for (; i < n; ++i) rest += double(a[i]) * double(b[i]);
  return rest + double(sum<T>(lanes));
}

// A vector or, at the end of a row, one value: V says which.
template <typename V, typename T>
inline V read(const T* from) {
  if constexpr (sizeof(V) == sizeof(Wide<T>))
    return to_float(*from);
  else
    return load_wide(from);
}
template <typename V, typename T>
inline void write(T* to, V value) {  // rounded to T
  if constexpr (sizeof(V) == sizeof(Wide<T>))
    *to = from_float<T>(value);
  else
    store_narrow(to, value);
}

// Calls step(V{}, i) for all i < n, where V has room for those from i on.
template <typename W, typename Step>
inline void for_each(int64_t n, Step step) {
  int64_t i = 0;
  for (; i + kLanes<W> <= n; i += kLanes<W>) step(Vec<W>{}, i);
  for (; i < n; ++i) step(W{}, i);
}

// Sum of term(i) for all i < n, where term(V{}, i) gives those from i on that V has room for. Terms are added in W only
// within a block; blocks are added in double, so long rows lose nothing.
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

// 2^x for x of at most 126. Below -126 it is 2^-126: small enough to be nothing beside a sum that holds a 1. NaN stays.
// The polynomial is the minimax one of degree 6 on [-1/2, 1/2]: relative error 1.6e-8.
inline Vec<float> exp2(Vec<float> x) {
  x = x < -126.0f ? splat(-126.0f) : x;
  const Vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  const Vec<float> shifted = x + magic;
  const Vec<float> f = x - (shifted - magic);
  Vec<float> p = splat(1.534581243e-4f);
  p = p * f + 1.339993090e-3f;
  p = p * f + 9.618489072e-3f;
  p = p * f + 5.550328642e-2f;
  p = p * f + 2.402264625e-1f;
  p = p * f + 6.931471825e-1f;
  p = p * f + 1.0f;
  return p * Vec<float>((Vec<int32_t>(shifted) - Vec<int32_t>(magic) + 127) << 23);
}
inline Vec<double> exp2(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

// The lower and the upper half of two vectors, taken in turn: (a0, b0, a1, b1, …).
template <bool kUpper, typename T, int... I>
inline Vec<T> zip(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  constexpr int kFrom = kUpper ? kLanes<T> / 2 : 0;
  return __builtin_shufflevector(a, b, (kFrom + I / 2 + I % 2 * kLanes<T>)...);
}

// A square of kLanes x kLanes values, rows in vectors, becomes its transpose: zipping row i with row i + n/2, log n times.
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

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

template <typename I>
constexpr I round_up(I n, I multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

}  // namespace fastssl
