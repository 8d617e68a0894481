// Logits and weighted sums of keys for a block of queries, one block of keys at a time, as in flash attention: the
// logits of one block of keys are all that is stored. Lanes are queries: exponentials, maxima and sums over keys are
// lane-wise operations, the keys are read in their own layout, and only the queries are packed.
//
// Operands P are float, double, or Bf16x2: pairs of bfloat16 values along the depth, for the products of
// bf16_products.h, whose sums are float.
#pragma once

#include "bf16_products.h"

namespace fastssl {

// Panels of a group of queries. With AVX2, 3 x 16 queries are 8 whole tiles of 6 rows in the second product; in
// bfloat16 one panel, whose logits stay in the first cache beside a larger block of keys.
template <typename P>
constexpr int kGroupPanels = std::is_same_v<P, Bf16x2> ? 1 : 3;
template <typename P>
constexpr int kGroup = kGroupPanels<P> * kPanelWidth<P>;
// Keys of a block, a multiple of every tile height. At D = 128 a block takes 48 kB of rows and 48 kB of panels, and the
// weights of a group take 18 kB. In bfloat16 larger blocks save loads and stores of sums, which tiles do slowly.
template <typename P>
constexpr int64_t kKeyBlock = std::is_same_v<P, Bf16x2> ? 256 : 96;

// Width of rows, padded to whole panels, and in bfloat16 to whole tiles too.
template <typename P>
constexpr int64_t padded_width(int64_t width) {
  return round_up<int64_t>(width, std::is_same_v<P, Bf16x2> ? std::max(32, kPanelWidth<P>) : kPanelWidth<P>);
}

struct Matrix {  // a tensor [rows, width] of any floating dtype and strides
  const void* data;
  ScalarType dtype;
  int64_t rows, width, row_stride, column_stride;

  Matrix(const Tensor& tensor)
      : data(tensor.const_data_ptr()), dtype(tensor.scalar_type()), rows(tensor.size(0)), width(tensor.size(1)),
        row_stride(tensor.stride(0)), column_stride(tensor.stride(1)) {}
};

// Calls body(P{}) with the type of the operands: pairs of bfloat16 values where all tensors are bfloat16 and the
// processor multiplies these, else the compute type of `like`.
template <typename Body>
auto with_operand_type(const Tensor& like, std::initializer_list<const Tensor*> tensors, const Body& body) {
  const auto is_bf16 = [](const Tensor* x) { return x->scalar_type() == ScalarType::BFloat16; };
  if (uses_bf16_products() && like.scalar_type() != ScalarType::Double &&
      std::all_of(tensors.begin(), tensors.end(), is_bf16))
    return body(Bf16x2{});
  return with_compute_type(like, body);
}

// Rows [first, first + count) of a matrix.
inline Matrix part_of(Matrix matrix, int64_t first, int64_t count) {
  with_float_type(matrix.dtype, "rows", [&](auto type) {
    matrix.data = static_cast<const decltype(type)*>(matrix.data) + first * matrix.row_stride;
  });
  matrix.rows = count;
  return matrix;
}

// Converts the rows [first, first + count) to contiguous values of type T.
template <typename T, typename S>
void widen(const Matrix& src, int64_t first, int64_t count, T* dst) {
  for (int64_t r = 0; r < count; ++r, dst += src.width) {
    const S* row = static_cast<const S*>(src.data) + (first + r) * src.row_stride;
    widen(row, src.column_stride, src.width, dst);
  }
}

template <typename T>
void widen(const Matrix& src, int64_t first, int64_t count, T* dst) {
  with_float_type(src.dtype, "rows", [&](auto type) { widen<T, decltype(type)>(src, first, count, dst); });
}

// Packs columns into panels: [count, width] -> [panel_count(width)][panel_rows][kPanelWidth], with zeros beyond the
// last column. The rows may be a part of a matrix with `panel_rows` rows.
template <typename T>
void pack_columns(const T* rows, int64_t count, int64_t width, T* dst, int64_t panel_rows) {
  for (int64_t first = 0; first < width; first += kPanelWidth<T>, dst += panel_rows * kPanelWidth<T>) {
    const int64_t valid = std::min<int64_t>(kPanelWidth<T>, width - first);
    T* panels = dst;
    for (int64_t r = 0; r < count; ++r, panels += kPanelWidth<T>) {
      const T* src = rows + r * width + first;
      if (valid == kPanelWidth<T>) {
        store(panels, load(src));
        store(panels + kLanes<T>, load(src + kLanes<T>));
      } else {
        std::fill(std::copy(src, src + valid, panels), panels + kPanelWidth<T>, T(0));
      }
    }
  }
}

// Copies the rows [first, first + count) of a bfloat16 matrix as pairs, [rows][padded width / 2], times `sign`, with
// zeros beyond the last row and column.
inline void copy_pairs(const Matrix& src, int64_t first, int64_t count, int64_t rows, float sign, Bf16x2* dst) {
  const int64_t words = padded_width<Bf16x2>(src.width) / 2;
  const Bf16x2 flip = sign < 0 ? 0x80008000 : 0;
  for (int64_t r = 0; r < rows; ++r, dst += words) {
    std::fill(dst, dst + words, Bf16x2(0));
    if (r >= count) continue;
    const auto* row = static_cast<const BFloat16*>(src.data) + (first + r) * src.row_stride;
    if (src.column_stride == 1)
      std::memcpy(dst, row, src.width * sizeof(BFloat16));
    else
      for (int64_t d = 0; d < src.width; ++d) dst[d / 2] |= Bf16x2(row[d * src.column_stride].x) << (d % 2 ? 16 : 0);
    for (int64_t w = 0; flip && w < words; ++w) dst[w] ^= flip;
  }
}

// Packs the rows [first, first + count) as lanes of panels, times `sign`; `rows` receives them as the first copy, of
// `count` rows.
template <typename P>
void pack_lanes(const Matrix& src, int64_t first, int64_t count, Accumulator<P> sign, P* rows, P* panels) {
  if constexpr (std::is_same_v<P, Bf16x2>) {
    const int64_t words = padded_width<P>(src.width) / 2;
    copy_pairs(src, first, count, count, sign, rows);
    pack_rows(rows, words, count, words, P(1), panels);
  } else {
    widen(src, first, count, rows);
    pack_rows(rows, src.width, count, src.width, sign, panels);
  }
}

// A thread's memory for `stream`: rows and panels of one block of keys, weights of one group of queries.
template <typename P>
struct Scratch {
  P *rows, *columns, *weights;

  static int64_t size(int64_t width) { return kKeyBlock<P> * (width + padded_width<P>(width) + kGroup<P>); }
  Scratch(P* memory, int64_t width)
      : rows(memory + kKeyBlock<P> * kGroup<P>), columns(rows + kKeyBlock<P> * width), weights(memory) {}
};

// The same in bfloat16, in float: `columns` are the transposed rows. The stride of a column is no power of two, so that
// the rows of a tile lie in different sets of the cache.
template <>
struct Scratch<Bf16x2> {
  static constexpr int64_t kColumnStride = kKeyBlock<Bf16x2> / 2 + 16;
  Bf16x2 *rows, *columns;
  float* weights;

  static int64_t size(int64_t width) {
    const int64_t padded = padded_width<Bf16x2>(width);
    return kKeyBlock<Bf16x2> * (padded / 2 + kGroup<Bf16x2>)+padded * kColumnStride;
  }
  Scratch(float* memory, int64_t width)
      : rows(reinterpret_cast<Bf16x2*>(memory + kKeyBlock<Bf16x2> * kGroup<Bf16x2>)),
        columns(rows + kKeyBlock<Bf16x2> * padded_width<Bf16x2>(width) / 2), weights(memory) {}
};

// The sums of `stream`: row-major, [queries, padded width]; in bfloat16 columns of panels, [panels][padded width]
// [kPanelWidth].
template <typename P>
struct Sums {
  using T = Accumulator<P>;
  static constexpr bool kColumns = std::is_same_v<P, Bf16x2>;
  T* data;  // null: no sums
  int64_t padded;

  // Multiplies the sums of a vector of queries, each by its factor.
  void scale(int64_t first, Vec<T> factor) const {
    if constexpr (kColumns) {
      T* column = data + first / kPanelWidth<P> * padded * kPanelWidth<P> + first % kPanelWidth<P>;
      for (int64_t d = 0; d < padded; ++d, column += kPanelWidth<P>) store(column, load(column) * factor);
    } else {
      for (int64_t i = 0; i < kLanes<T>; ++i)
        if (factor[i] != T(1))
          for (int64_t d = 0; d < padded; ++d) data[(first + i) * padded + d] *= factor[i];
    }
  }
  // Copies the sums of `queries` to rows.
  void copy_rows(int64_t queries, int64_t width, T* dst, int64_t stride) const {
    if constexpr (kColumns) {
      for (int64_t i = 0; i < queries; i += kLanes<T>)
        for (int64_t d = 0; d < width; d += kLanes<T>) {
          Vec<T> square[kLanes<T>];
          const T* column = data + i / kPanelWidth<P> * padded * kPanelWidth<P> + i % kPanelWidth<P>;
          for (int64_t j = 0; j < kLanes<T>; ++j) square[j] = load(column + (d + j) * kPanelWidth<P>);
          transpose<T>(square);
          for (int64_t j = 0; j < std::min<int64_t>(kLanes<T>, queries - i); ++j)
            store_part<T>(dst + (i + j) * stride + d, square[j], width - d);
        }
    } else {
      for (int64_t i = 0; i < queries; ++i) std::copy(data + i * padded, data + i * padded + width, dst + i * stride);
    }
  }
};

// Replaces the logits of one panel by weights(logits, vector of the panel), in bfloat16 by pairs of keys: [count,
// kGroup]
// -> [count / 2 rounded up, kGroup].
template <typename P, typename Weights>
void store_weights(Accumulator<P>* logits, int64_t count, const Weights& weights) {
  using T = Accumulator<P>;
  if constexpr (std::is_same_v<P, Bf16x2>) {
    auto* pairs = reinterpret_cast<P*>(logits);  // written as vectors only, which may alias
    for (int64_t j = 0; j < count; j += 2)
      for (int v = 0; v < 2; ++v) {
        const T* logit = logits + j * kGroup<P> + v * kLanes<T>;
        const Vec<T> first = weights(load(logit), v);
        const Vec<T> second = j + 1 < count ? weights(load(logit + kGroup<P>), v) : Vec<T>{};
        store(pairs + j / 2 * kGroup<P> + v * kLanes<T>, round_to_pairs(first, second));
      }
  } else {
    for (int64_t j = 0; j < count; ++j)
      for (int v = 0; v < 2; ++v) {
        T* logit = logits + j * kGroup<P> + v * kLanes<T>;
        store(logit, weights(load(logit), v));
      }
  }
}

// For each block of the keys [begin, end) and each group of `panels` panels of queries:
//   logits[key, query] = key · query                        [kKeyBlock, kGroup]
//   epilogue(logits, first key, keys, first query, panels)  replaces the logits by weights, as store_weights does
//   sums[query] += Σ_key weights[key, query] key            unless sums.data is null
template <typename T, typename Epilogue>
void stream(const Matrix& keys, int64_t begin, int64_t end, const T* query_panels, int64_t queries, Sums<T> sums,
            Scratch<T> scratch, const Epilogue& epilogue) {
  const int64_t width = keys.width;
  const bool in_place = keys.dtype == kDtype<T> && keys.column_stride == 1 && keys.row_stride == width;
  for (int64_t first = begin; first < end; first += kKeyBlock<T>) {
    const int64_t count = std::min(kKeyBlock<T>, end - first);
    const T* rows = in_place ? static_cast<const T*>(keys.data) + first * width : scratch.rows;
    if (!in_place) widen(keys, first, count, scratch.rows);
    if (sums.data) pack_columns(rows, count, width, scratch.columns, count);
    for (int64_t query = 0; query < queries; query += kGroup<T>) {
      const int64_t group_queries = std::min<int64_t>(kGroup<T>, queries - query),
                    panels = panel_count<T>(group_queries);
      for (int64_t p = 0; p < panels; ++p)
        multiply_panel<false>(count, width, Operand<T>{rows, width, 1},
                              query_panels + (p * kPanelWidth<T> + query) * width, kPanelWidth<T>,
                              scratch.weights + p * kPanelWidth<T>, kGroup<T>);
      epilogue(scratch.weights, first, count, query, panels);
      if (sums.data)
        for (int64_t c = 0; c < sums.padded; c += kPanelWidth<T>)
          multiply_panel<true>(group_queries, count, Operand<T>{scratch.weights, 1, kGroup<T>},
                               scratch.columns + c * count, kPanelWidth<T>, sums.data + query * sums.padded + c,
                               sums.padded);
    }
  }
}

// The same in bfloat16. Both products take keys as rows, as they lie in memory and transposed; weights are rounded to
// bfloat16 for the second product.
template <typename Epilogue>
void stream(const Matrix& keys, int64_t begin, int64_t end, const Bf16x2* query_panels, int64_t queries,
            Sums<Bf16x2> sums, Scratch<Bf16x2> scratch, const Epilogue& epilogue) {
  constexpr int64_t kPanel = kPanelWidth<Bf16x2>, kBlock = kKeyBlock<Bf16x2>;
  const TileScope tiles;
  const int64_t padded = padded_width<Bf16x2>(keys.width), words = padded / 2;
  const bool whole_rows = keys.column_stride == 1 && keys.width == padded && keys.row_stride % 2 == 0 &&
                          reinterpret_cast<uintptr_t>(keys.data) % sizeof(Bf16x2) == 0;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = std::min(kBlock, end - first), padded_count = round_up<int64_t>(count, 32);
    const bool in_place = whole_rows && count == padded_count;
    const Bf16x2* rows = scratch.rows;
    if (in_place)
      rows = reinterpret_cast<const Bf16x2*>(static_cast<const BFloat16*>(keys.data) + first * keys.row_stride);
    else
      copy_pairs(keys, first, count, padded_count, 1, scratch.rows);
    const int64_t stride = in_place ? keys.row_stride / 2 : words;
    if (sums.data) transpose_bf16(rows, stride, padded_count, words, scratch.columns, Scratch<Bf16x2>::kColumnStride);
    for (int64_t query = 0; query < queries; query += kPanel) {
      multiply_bf16<false>(padded_count, words, rows, stride, query_panels + query * words, scratch.weights, kPanel);
      epilogue(scratch.weights, first, count, query, 1);
      if (!sums.data) continue;
      auto* weights = reinterpret_cast<Bf16x2*>(scratch.weights);
      for (int64_t i = (count + 1) / 2 * kPanel; i < padded_count / 2 * kPanel; i += kLanes<float>)
        store(weights + i, Vec<Bf16x2>{});
      multiply_bf16<true>(padded, padded_count / 2, scratch.columns, Scratch<Bf16x2>::kColumnStride, weights,
                          sums.data + query * padded, kPanel);
    }
  }
}

}  // namespace fastssl
