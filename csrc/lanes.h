// Integers in vectors whose 128-bit lanes are independent: the instructions that shuffle, interleave, multiply and pack
// bytes and 16-bit integers work within such lanes. 4 lanes with AVX-512, 2 with AVX2, 1 elsewhere, in plain C++.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own AVX-512 intrinsics
#endif

#include "vec.h"

#include <limits>

namespace fastssl {

constexpr int kLaneBytes = 16;
constexpr int kLaneCount = kVectorBytes / kLaneBytes;

#if defined(__AVX512BW__) && FASTSSL_VECTOR_BYTES == 64

using Lanes = __m512i;

// 16 bytes a lane, from places `stride` bytes apart.
inline Lanes load_apart(const uint8_t* src, int64_t stride) {
  const auto load = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i * stride)); };
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(load(0)), load(1), 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(load(2)), load(3), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
inline Lanes load_lanes(const uint8_t* src) { return _mm512_loadu_si512(src); }
inline void store_lanes(uint8_t* dst, Lanes x) { _mm512_storeu_si512(dst, x); }
inline Lanes broadcast_lane(const void* src) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(src)));
}
inline Lanes splat32(int32_t x) { return _mm512_set1_epi32(x); }
inline Lanes splat16(int16_t x) { return _mm512_set1_epi16(x); }
inline Lanes either(Lanes a, Lanes b) { return _mm512_or_si512(a, b); }
inline Lanes shuffle_bytes(Lanes x, Lanes control) { return _mm512_shuffle_epi8(x, control); }
inline Lanes multiply_pairs(Lanes a, Lanes b) { return _mm512_madd_epi16(a, b); }
inline Lanes multiply_high(Lanes a, Lanes b) { return _mm512_mulhi_epi16(a, b); }
inline Lanes add32(Lanes a, Lanes b) { return _mm512_add_epi32(a, b); }
inline Lanes add16(Lanes a, Lanes b) { return _mm512_add_epi16(a, b); }
inline Lanes subtract16(Lanes a, Lanes b) { return _mm512_sub_epi16(a, b); }
inline Lanes shift_right32(Lanes x, int bits) { return _mm512_sra_epi32(x, _mm_cvtsi32_si128(bits)); }
inline Lanes halve16(Lanes x) { return _mm512_srai_epi16(x, 1); }
inline Lanes pack32(Lanes a, Lanes b) { return _mm512_packs_epi32(a, b); }
inline Lanes pack16(Lanes a, Lanes b) { return _mm512_packus_epi16(a, b); }
inline Lanes zip8_low(Lanes a, Lanes b) { return _mm512_unpacklo_epi8(a, b); }
inline Lanes zip8_high(Lanes a, Lanes b) { return _mm512_unpackhi_epi8(a, b); }
inline Lanes zip16_low(Lanes a, Lanes b) { return _mm512_unpacklo_epi16(a, b); }
inline Lanes zip16_high(Lanes a, Lanes b) { return _mm512_unpackhi_epi16(a, b); }

// Bytes as 16 bits each.
inline Lanes widen_bytes(const uint8_t* src) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)));
}
inline Lanes permute16(Lanes x, Lanes index) { return _mm512_permutexvar_epi16(index, x); }
// Exchanges lanes and 32-bit values of a lane: lane i of the result is value i of each lane.
inline Lanes gather_quarters(Lanes x) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
}
// Stores the quarters of a vector at places `stride` bytes apart.
inline void store_quarters(uint8_t* dst, int64_t stride, Lanes x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm512_castsi512_si128(x));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + stride), _mm512_extracti32x4_epi32(x, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + 2 * stride), _mm512_extracti32x4_epi32(x, 2));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + 3 * stride), _mm512_extracti32x4_epi32(x, 3));
}

#elif defined(__AVX2__) && FASTSSL_VECTOR_BYTES == 32

using Lanes = __m256i;

inline Lanes load_apart(const uint8_t* src, int64_t stride) {
  const auto load = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i * stride)); };
  return _mm256_inserti128_si256(_mm256_castsi128_si256(load(0)), load(1), 1);
}
inline Lanes load_lanes(const uint8_t* src) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)); }
inline void store_lanes(uint8_t* dst, Lanes x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), x); }
inline Lanes broadcast_lane(const void* src) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(src)));
}
inline Lanes splat32(int32_t x) { return _mm256_set1_epi32(x); }
inline Lanes splat16(int16_t x) { return _mm256_set1_epi16(x); }
inline Lanes either(Lanes a, Lanes b) { return _mm256_or_si256(a, b); }
inline Lanes shuffle_bytes(Lanes x, Lanes control) { return _mm256_shuffle_epi8(x, control); }
inline Lanes multiply_pairs(Lanes a, Lanes b) { return _mm256_madd_epi16(a, b); }
inline Lanes multiply_high(Lanes a, Lanes b) { return _mm256_mulhi_epi16(a, b); }
inline Lanes add32(Lanes a, Lanes b) { return _mm256_add_epi32(a, b); }
inline Lanes add16(Lanes a, Lanes b) { return _mm256_add_epi16(a, b); }
inline Lanes subtract16(Lanes a, Lanes b) { return _mm256_sub_epi16(a, b); }
inline Lanes shift_right32(Lanes x, int bits) { return _mm256_sra_epi32(x, _mm_cvtsi32_si128(bits)); }
inline Lanes halve16(Lanes x) { return _mm256_srai_epi16(x, 1); }
inline Lanes pack32(Lanes a, Lanes b) { return _mm256_packs_epi32(a, b); }
inline Lanes pack16(Lanes a, Lanes b) { return _mm256_packus_epi16(a, b); }
inline Lanes zip8_low(Lanes a, Lanes b) { return _mm256_unpacklo_epi8(a, b); }
inline Lanes zip8_high(Lanes a, Lanes b) { return _mm256_unpackhi_epi8(a, b); }
inline Lanes zip16_low(Lanes a, Lanes b) { return _mm256_unpacklo_epi16(a, b); }
inline Lanes zip16_high(Lanes a, Lanes b) { return _mm256_unpackhi_epi16(a, b); }

inline Lanes gather_quarters(Lanes x) {
  return _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
inline void store_quarters(uint8_t* dst, int64_t stride, Lanes x) {
  const __m128i low = _mm256_castsi256_si128(x), high = _mm256_extracti128_si256(x, 1);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(dst), low);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(dst + stride), _mm_unpackhi_epi64(low, low));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(dst + 2 * stride), high);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(dst + 3 * stride), _mm_unpackhi_epi64(high, high));
}

#else

struct Lanes {
  alignas(kVectorBytes) uint8_t bytes[kVectorBytes];
};

// Values of type T of a vector of lanes, as an array, and back.
template <typename T>
struct LaneValues {
  static constexpr int kCount = kVectorBytes / int(sizeof(T)), kOfLane = kLaneBytes / int(sizeof(T));
  T values[kCount];

  LaneValues() = default;
  explicit LaneValues(const Lanes& x) { std::memcpy(values, x.bytes, kVectorBytes); }
  Lanes lanes() const {
    Lanes x;
    std::memcpy(x.bytes, values, kVectorBytes);
    return x;
  }
};

template <typename T, typename Function>
inline Lanes each(const Lanes& a, const Lanes& b, const Function& function) {
  const LaneValues<T> x(a), y(b);
  LaneValues<T> result;
  for (int i = 0; i < result.kCount; ++i) result.values[i] = T(function(x.values[i], y.values[i]));
  return result.lanes();
}

template <typename T, bool kHigh>
inline Lanes zip_lanes(const Lanes& a, const Lanes& b) {
  const LaneValues<T> x(a), y(b);
  LaneValues<T> result;
  constexpr int n = LaneValues<T>::kOfLane;
  for (int lane = 0; lane < result.kCount; lane += n)
    for (int i = 0; i < n / 2; ++i) {
      result.values[lane + 2 * i] = x.values[lane + (kHigh ? n / 2 : 0) + i];
      result.values[lane + 2 * i + 1] = y.values[lane + (kHigh ? n / 2 : 0) + i];
    }
  return result.lanes();
}

template <typename T, typename Narrow>
inline Lanes pack_lanes(const Lanes& a, const Lanes& b) {  // saturated
  const LaneValues<T> x(a), y(b);
  LaneValues<Narrow> result;
  constexpr int n = LaneValues<T>::kOfLane;
  constexpr T low = std::numeric_limits<Narrow>::min(), high = std::numeric_limits<Narrow>::max();
  for (int lane = 0; lane < x.kCount; lane += n)
    for (int i = 0; i < n; ++i) {
      result.values[2 * lane + i] = Narrow(std::clamp(x.values[lane + i], low, high));
      result.values[2 * lane + n + i] = Narrow(std::clamp(y.values[lane + i], low, high));
    }
  return result.lanes();
}

inline Lanes load_apart(const uint8_t* src, int64_t stride) {
  Lanes x;
  for (int i = 0; i < kLaneCount; ++i) std::memcpy(x.bytes + i * kLaneBytes, src + i * stride, kLaneBytes);
  return x;
}
inline Lanes load_lanes(const uint8_t* src) {
  Lanes x;
  std::memcpy(x.bytes, src, kVectorBytes);
  return x;
}
inline void store_lanes(uint8_t* dst, const Lanes& x) { std::memcpy(dst, x.bytes, kVectorBytes); }
inline Lanes broadcast_lane(const void* src) {
  Lanes x;
  for (int i = 0; i < kLaneCount; ++i) std::memcpy(x.bytes + i * kLaneBytes, src, kLaneBytes);
  return x;
}
template <typename T>
inline Lanes splat_lanes(T value) {
  LaneValues<T> x;
  std::fill(x.values, x.values + x.kCount, value);
  return x.lanes();
}
inline Lanes splat32(int32_t x) { return splat_lanes(x); }
inline Lanes splat16(int16_t x) { return splat_lanes(x); }
inline Lanes either(const Lanes& a, const Lanes& b) {
  return each<uint8_t>(a, b, [](uint8_t x, uint8_t y) { return x | y; });
}
inline Lanes shuffle_bytes(const Lanes& x, const Lanes& control) {
  Lanes result;
  for (int i = 0; i < kVectorBytes; ++i) {
    const int from = i / kLaneBytes * kLaneBytes + (control.bytes[i] & 15);
    result.bytes[i] = control.bytes[i] < 128 ? x.bytes[from] : 0;
  }
  return result;
}
inline Lanes multiply_pairs(const Lanes& a, const Lanes& b) {
  const LaneValues<int16_t> x(a), y(b);
  LaneValues<int32_t> result;
  for (int i = 0; i < result.kCount; ++i)
    result.values[i] = x.values[2 * i] * y.values[2 * i] + x.values[2 * i + 1] * y.values[2 * i + 1];
  return result.lanes();
}
inline Lanes multiply_high(const Lanes& a, const Lanes& b) {
  return each<int16_t>(a, b, [](int32_t x, int32_t y) { return (x * y) >> 16; });
}
inline Lanes add32(const Lanes& a, const Lanes& b) {
  return each<int32_t>(a, b, [](int32_t x, int32_t y) { return x + y; });
}
inline Lanes add16(const Lanes& a, const Lanes& b) {
  return each<int16_t>(a, b, [](int32_t x, int32_t y) { return x + y; });
}
inline Lanes subtract16(const Lanes& a, const Lanes& b) {
  return each<int16_t>(a, b, [](int32_t x, int32_t y) { return x - y; });
}
inline Lanes shift_right32(const Lanes& x, int bits) {
  return each<int32_t>(x, x, [bits](int32_t value, int32_t) { return value >> bits; });
}
inline Lanes halve16(const Lanes& x) {
  return each<int16_t>(x, x, [](int32_t value, int32_t) { return value >> 1; });
}
inline Lanes pack32(const Lanes& a, const Lanes& b) { return pack_lanes<int32_t, int16_t>(a, b); }
inline Lanes pack16(const Lanes& a, const Lanes& b) { return pack_lanes<int16_t, uint8_t>(a, b); }
inline Lanes zip8_low(const Lanes& a, const Lanes& b) { return zip_lanes<uint8_t, false>(a, b); }
inline Lanes zip8_high(const Lanes& a, const Lanes& b) { return zip_lanes<uint8_t, true>(a, b); }
inline Lanes zip16_low(const Lanes& a, const Lanes& b) { return zip_lanes<uint16_t, false>(a, b); }
inline Lanes zip16_high(const Lanes& a, const Lanes& b) { return zip_lanes<uint16_t, true>(a, b); }

inline Lanes widen_bytes(const uint8_t* src) {
  LaneValues<uint16_t> result;
  for (int i = 0; i < result.kCount; ++i) result.values[i] = src[i];
  return result.lanes();
}
inline Lanes permute16(const Lanes& x, const Lanes& index) {
  const LaneValues<uint16_t> values(x), places(index);
  LaneValues<uint16_t> result;
  for (int i = 0; i < result.kCount; ++i) result.values[i] = values.values[places.values[i]];
  return result.lanes();
}
inline Lanes gather_quarters(const Lanes& x) {
  const LaneValues<uint32_t> values(x);
  LaneValues<uint32_t> result;
  for (int i = 0; i < result.kCount; ++i) result.values[i] = values.values[i % kLaneCount * 4 + i / kLaneCount];
  return result.lanes();
}
inline void store_quarters(uint8_t* dst, int64_t stride, const Lanes& x) {
  for (int i = 0; i < 4; ++i) std::memcpy(dst + i * stride, x.bytes + i * kVectorBytes / 4, kVectorBytes / 4);
}

#endif

}  // namespace fastssl
