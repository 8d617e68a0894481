// Attention-like streaming: a block of queries stays at hand while the keys pass by in blocks, and neither logits nor
// weights of more than one block ever exist. Lanes are queries: a logit's exponential, its maximum and its sum are then
// taken lane by lane, the keys are read as they lie, and only the queries are packed.
#pragma once

#include "gemm.h"

namespace fastssl {

constexpr int kGroupPanels = 3;  // 48 queries of AVX2's 16 a panel: 8 tiles of 6 rows, no remainder in the second product
template <typename T>
constexpr int kGroup = kGroupPanels * kPanel<T>;
constexpr int64_t kKeyBlock = 96;  // whole tiles; at D = 128 rows and panels take 48 kB each, a group's weights 18 kB

struct Matrix {  // rows of any floating dtype and strides
  const void* data;
  ScalarType dtype;
  int64_t rows, width, row_stride, column_stride;

  Matrix(const Tensor& tensor)
      : data(tensor.const_data_ptr()), dtype(tensor.scalar_type()), rows(tensor.size(0)), width(tensor.size(1)),
        row_stride(tensor.stride(0)), column_stride(tensor.stride(1)) {}
};

// Rows [first, first + count) as T, contiguous.
template <typename T, typename S>
void widen(const Matrix& from, int64_t first, int64_t count, T* to) {
  for (int64_t r = 0; r < count; ++r, to += from.width) {
    const S* row = static_cast<const S*>(from.data) + (first + r) * from.row_stride;
    widen(row, from.column_stride, from.width, to);
  }
}

template <typename T>
void widen(const Matrix& from, int64_t first, int64_t count, T* to) {
  with_float_type(from.dtype, "rows", [&](auto type) { widen<T, decltype(type)>(from, first, count, to); });
}

// [count, width] -> [panels_of(width)][of][kPanel]: columns cut into panels, the last filled up with zeros. The rows may
// be some of a matrix of `of` rows.
template <typename T>
void pack_columns(const T* rows, int64_t count, int64_t width, T* to, int64_t of) {
  for (int64_t first = 0; first < width; first += kPanel<T>, to += of * kPanel<T>) {
    const int64_t filled = std::min<int64_t>(kPanel<T>, width - first);
    T* panels = to;
    for (int64_t r = 0; r < count; ++r, panels += kPanel<T>) {
      const T* from = rows + r * width + first;
      if (filled == kPanel<T>) {
        store(panels, load(from));
        store(panels + kLanes<T>, load(from + kLanes<T>));
      } else {
        std::fill(std::copy(from, from + filled, panels), panels + kPanel<T>, T(0));
      }
    }
  }
}

// What one thread needs while it streams.
template <typename T>
struct Scratch {
  T *rows, *columns, *weights;

  static int64_t size(int64_t width) {
    return kKeyBlock * (width + panels_of<T>(width) * kPanel<T> + kGroup<T>);
  }
  Scratch(T* memory, int64_t width)
      : rows(memory + kKeyBlock * kGroup<T>), columns(rows + kKeyBlock * width), weights(memory) {}
};

// For the keys [begin, end), block by block and group of queries by group:
//   weights[key, query] = key · query         [block, kGroup], for `panels` panels of queries
//   weigh(weights, first key, keys, first query, panels)   turns logits into weights, in place
//   sums[query] += Σ_key weights[key, query] key           [queries, panels_of(width) * kPanel], not where it is null
template <typename T, typename Weigh>
void stream(const Matrix& keys, int64_t begin, int64_t end, const T* query_panels, int64_t queries, T* sums,
            Scratch<T> scratch, const Weigh& weigh) {
  const int64_t width = keys.width, sums_stride = panels_of<T>(width) * kPanel<T>;
  const bool in_place = keys.dtype == kDtype<T> && keys.column_stride == 1 && keys.row_stride == width;
  for (int64_t first = begin; first < end; first += kKeyBlock) {
    const int64_t count = std::min(kKeyBlock, end - first);
    const T* rows = in_place ? static_cast<const T*>(keys.data) + first * width : scratch.rows;
    if (!in_place) widen(keys, first, count, scratch.rows);
    if (sums) pack_columns(rows, count, width, scratch.columns, count);
    for (int64_t query = 0; query < queries; query += kGroup<T>) {
      const int64_t left = std::min<int64_t>(kGroup<T>, queries - query), panels = panels_of<T>(left);
      for (int64_t p = 0; p < panels; ++p)
        multiply<false>(count, width, Operand<T>{rows, width, 1}, query_panels + (query + p * kPanel<T>) * width,
                        kPanel<T>, scratch.weights + p * kPanel<T>, kGroup<T>);
      weigh(scratch.weights, first, count, query, panels);
      if (sums)
        for (int64_t c = 0; c < sums_stride; c += kPanel<T>)
          multiply<true>(left, count, Operand<T>{scratch.weights, 1, kGroup<T>}, scratch.columns + c * count, kPanel<T>,
                         sums + query * sums_stride + c, sums_stride);
    }
  }
}

}  // namespace fastssl
