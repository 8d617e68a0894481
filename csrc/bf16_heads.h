// Rows of bfloat16 heads, packed for products of bfloat16 blocks (bf16_products.h): with 32 zeros at most beyond the
// last row and the last value, so that products may take whole tiles.
#pragma once

#include "bf16_products.h"
#include "heads.h"

#include <bit>

namespace fastssl {
namespace {

constexpr int64_t kVector = kLanes<Bf16x2>;      // 16 with AVX-512
constexpr int64_t kWidth = kPanelWidth<Bf16x2>;  // queries of a panel, and bfloat16 values of a vector: 32 with AVX-512
constexpr int64_t kTileDepth = 2 * kTileWords;   // values of a tile along the depth of a product
static_assert(kTileDepth % kWidth == 0);

inline int64_t whole_tiles(int64_t count) { return round_up<int64_t>(count, kTileDepth); }

// A mask with the lowest min(count, kWidth) bits set.
inline uint32_t first_bits(int64_t count) { return uint32_t((uint64_t(1) << std::min(count, kWidth)) - 1); }

#if defined(FASTSSL_BF16_DOT)

// The first values of a vector, as many as `mask` has bits, and zeros.
inline Vec<Bf16x2> load_bf16(const BFloat16* src, uint32_t mask) {
  return Vec<Bf16x2>(_mm512_maskz_loadu_epi16(mask, src));
}

// Stores the first values of a vector, as many as `mask` has bits.
inline void store_bf16(BFloat16* dst, Vec<Bf16x2> x, uint32_t mask) { _mm512_mask_storeu_epi16(dst, mask, __m512i(x)); }

// Zeros in the lanes whose bits are not set.
inline Vec<float> masked(Vec<float> x, uint16_t bits) { return Vec<float>(_mm512_maskz_mov_ps(bits, __m512(x))); }

inline float sum_lanes(Vec<float> x) { return _mm512_reduce_add_ps(__m512(x)); }

// Pairs (a, b) of the values of two rows: the first or the last half.
template <bool kLast>
inline Vec<Bf16x2> zip_pairs(Vec<Bf16x2> a, Vec<Bf16x2> b) {
  const Vec<Bf16x2> lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Vec<Bf16x2> index = lane + (kLast ? 16 : 0) + ((lane + (kLast ? 48 : 32)) << 16);
  return Vec<Bf16x2>(_mm512_permutex2var_epi16(__m512i(a), __m512i(index), __m512i(b)));
}

#else  // the same and what avx512_bf16.h has, for tests of tiles in plain C++

inline Vec<Bf16x2> load_bf16(const BFloat16* src, uint32_t mask) {
  Vec<Bf16x2> x{};
  std::memcpy(&x, src, std::popcount(mask) * sizeof(BFloat16));
  return x;
}

inline void store_bf16(BFloat16* dst, Vec<Bf16x2> x, uint32_t mask) {
  std::memcpy(dst, &x, std::popcount(mask) * sizeof(BFloat16));
}

inline Vec<float> masked(Vec<float> x, uint16_t bits) {
  for (int i = 0; i < kVector; ++i) x[i] = bits >> i & 1 ? x[i] : 0.0f;
  return x;
}

template <bool kLast>
inline Vec<Bf16x2> zip_pairs(Vec<Bf16x2> a, Vec<Bf16x2> b) {
  return zip<kLast, Bf16x2>((a & 0xffff) | b << 16, a >> 16 | (b & 0xffff0000),
                            std::make_integer_sequence<int, kVector>{});
}

inline Vec<Bf16x2> to_bf16(Vec<float> first, Vec<float> second) {
  BFloat16 values[kWidth];
  store_narrow(values, first);
  store_narrow(values + kVector, second);
  return load_bf16(values, first_bits(kWidth));
}

inline Vec<float> multiply_add(Vec<Bf16x2> a, Vec<Bf16x2> b, Vec<float> c) {
  return Vec<float>(a << 16) * Vec<float>(b << 16) + (Vec<float>(a & 0xffff0000) * Vec<float>(b & 0xffff0000) + c);
}

inline float sum_lanes(Vec<float> x) { return sum<float>(x); }

inline Vec<float> exp2_bf16(Vec<float> x) { return x < -126.0f ? Vec<float>{} : exp2(x); }

#endif

struct Bf16Rows {  // rows of one head, each contiguous
  const BFloat16* data;
  int64_t stride, count, width;

  // Mask of a vector of columns from `column` on, set where a column exists. A short vector may lie in the padding.
  uint32_t mask(int64_t column) const {
    return first_bits(kWidth < kTileDepth ? std::max<int64_t>(0, width - column) : width - column);
  }
  // A vector of values of a row from `column` on; zeros outside the mask and beyond the last row.
  Vec<Bf16x2> load(int64_t row, int64_t column, uint32_t mask) const {
    return load_bf16(data + row * stride + column, row < count ? mask : 0);
  }
};

struct Arena {  // allocates from a thread's scratch memory; with a null base it only adds up the sizes
  char* base;
  int64_t used = 0;

  template <typename T>
  T* allocate(int64_t count) {
    T* data = reinterpret_cast<T*>(base + used);
    used += round_up<int64_t>(count * sizeof(T), 64);
    return data;
  }
};

// The rows of one head of `x`, copied to `copy` only where they are not contiguous.
inline Bf16Rows bf16_rows(const Heads& x, int64_t sample, int64_t head, BFloat16* copy) {
  const BFloat16* src = x.head<BFloat16>(sample, head);
  if (x.strides[3] == 1 || x.width == 1) return {src, x.strides[1], x.length, x.width};
  for (int64_t l = 0; l < x.length; ++l)
    for (int64_t e = 0; e < x.width; ++e) copy[l * x.width + e] = src[l * x.strides[1] + e * x.strides[3]];
  return {copy, x.width, x.length, x.width};
}

inline int64_t copy_size(const Heads& x) { return x.strides[3] == 1 || x.width == 1 ? 0 : x.length * x.width; }

// Packs pairs of neighbours in a row: [count, width] -> [rows][padded / 2], padded with zeros.
inline void pack_width_pairs(const Bf16Rows& x, int64_t rows, int64_t padded, Bf16x2* dst) {
  for (int64_t e = 0; e < padded; e += kWidth, dst += kVector) {
    const uint32_t mask = x.mask(e);
    for (int64_t row = 0; row < rows; ++row) store(dst + row * padded / 2, x.load(row, e, mask));
  }
}

// Packs pairs of two rows: [count, width] -> [rows / 2][padded], padded with zeros.
inline void pack_row_pairs(const Bf16Rows& x, int64_t rows, int64_t padded, Bf16x2* dst) {
  for (int64_t e = 0; e < padded; e += kWidth, dst += kWidth) {
    const uint32_t mask = x.mask(e);
    for (int64_t row = 0; row < rows; row += 2) {
      const Vec<Bf16x2> a = x.load(row, e, mask), b = x.load(row + 1, e, mask);
      store(dst + row / 2 * padded, zip_pairs<false>(a, b));
      store(dst + row / 2 * padded + kVector, zip_pairs<true>(a, b));
    }
  }
}

// Packs a panel of rows from `first` on as lanes, in pairs along the width: -> [depth][kWidth], padded with zeros.
inline void pack_lanes(const Bf16Rows& x, int64_t first, int64_t depth, Bf16x2* dst) {
  for (int64_t lane = 0; lane < kWidth; lane += kVector)
    for (int64_t d = 0; d < depth; d += kVector) {
      Vec<Bf16x2> square[kVector];
      const uint32_t mask = x.mask(2 * d);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kVector; ++i) square[i] = x.load(first + lane + i, 2 * d, mask);
      transpose<Bf16x2>(square);
      for (int64_t i = 0; i < std::min(kVector, depth - d); ++i) store(dst + (d + i) * kWidth + lane, square[i]);
    }
}

// Dot product of row `row` of `a` and row `row` of `b`.
inline float dot_rows(const Bf16Rows& a, const Bf16Rows& b, int64_t row) {
  Vec<float> products{};
  for (int64_t e = 0; e < a.width; e += kWidth)
    products = multiply_add(a.load(row, e, a.mask(e)), b.load(row, e, a.mask(e)), products);
  return sum_lanes(products);
}

// Rounds `count` rows of float32 to bfloat16, each multiplied by its factor unless `factor` is null.
inline void store_rows(const float* src, int64_t padded, int64_t count, int64_t width, const float* factor,
                       BFloat16* dst, int64_t stride) {
  for (int64_t row = 0; row < count; ++row, src += padded, dst += stride)
    for (int64_t e = 0; e < width; e += kWidth) {
      Vec<float> first = load(src + e), second = load(src + e + kVector);
      if (factor) first *= factor[row], second *= factor[row];
      store_bf16(dst + e, to_bf16(first, second), first_bits(width - e));
    }
}

// The same from columns, [padded width][kWidth].
inline void store_columns(const float* src, int64_t count, int64_t width, const float* factor, BFloat16* dst,
                          int64_t stride) {
  for (int64_t row = 0; row < count; row += kVector)
    for (int64_t e = 0; e < width; e += kWidth) {
      Vec<float> halves[2][kVector];
      for (int h = 0; h < 2; ++h) {
        for (int64_t i = 0; i < kVector; ++i) {
          halves[h][i] = load(src + (e + h * kVector + i) * kWidth + row);
          if (factor) halves[h][i] *= load(factor + row);
        }
        transpose<float>(halves[h]);
      }
      for (int64_t i = 0; i < std::min(kVector, count - row); ++i)
        store_bf16(dst + (row + i) * stride + e, to_bf16(halves[0][i], halves[1][i]), first_bits(width - e));
    }
}

}  // namespace
}  // namespace fastssl
