// Logits and weighted sums of keys for a block of queries, one block of keys at a time, as in flash attention: the
// logits of one block of keys are all that is stored. Lanes are queries: exponentials, maxima and sums over keys are
// lane-wise operations, the keys are read in their own layout, and only the queries are packed.
#pragma once

#include "microkernel.h"

namespace fastssl {

constexpr int kGroupPanels = 3;  // with AVX2, 3 x 16 queries are 8 whole tiles of 6 rows in the second product
template <typename T>
constexpr int kGroup = kGroupPanels * kPanelWidth<T>;
// Keys of a block, a multiple of every tile height. At D = 128 a block takes 48 kB of rows and 48 kB of panels, and the
// weights of a group take 18 kB.
constexpr int64_t kKeyBlock = 96;

struct Matrix {  // a tensor [rows, width] of any floating dtype and strides
  const void* data;
  ScalarType dtype;
  int64_t rows, width, row_stride, column_stride;

  Matrix(const Tensor& tensor)
      : data(tensor.const_data_ptr()), dtype(tensor.scalar_type()), rows(tensor.size(0)), width(tensor.size(1)),
        row_stride(tensor.stride(0)), column_stride(tensor.stride(1)) {}
};

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

// A thread's memory for `stream`: rows and panels of one block of keys, weights of one group of queries.
template <typename T>
struct Scratch {
  T *rows, *columns, *weights;

  static int64_t size(int64_t width) {
    return kKeyBlock * (width + panel_count<T>(width) * kPanelWidth<T> + kGroup<T>);
  }
  Scratch(T* memory, int64_t width)
      : rows(memory + kKeyBlock * kGroup<T>), columns(rows + kKeyBlock * width), weights(memory) {}
};

// For each block of the keys [begin, end) and each group of `panels` panels of queries:
//   logits[key, query] = key · query                        [kKeyBlock, kGroup]
//   epilogue(logits, first key, keys, first query, panels)  replaces the logits by weights
//   sums[query] += Σ_key weights[key, query] key            [queries, padded width], unless `sums` is null
template <typename T, typename Epilogue>
void stream(const Matrix& keys, int64_t begin, int64_t end, const T* query_panels, int64_t queries, T* sums,
            Scratch<T> scratch, const Epilogue& epilogue) {
  const int64_t width = keys.width, sums_stride = panel_count<T>(width) * kPanelWidth<T>;
  const bool in_place = keys.dtype == kDtype<T> && keys.column_stride == 1 && keys.row_stride == width;
  for (int64_t first = begin; first < end; first += kKeyBlock) {
    const int64_t count = std::min(kKeyBlock, end - first);
    const T* rows = in_place ? static_cast<const T*>(keys.data) + first * width : scratch.rows;
    if (!in_place) widen(keys, first, count, scratch.rows);
    if (sums) pack_columns(rows, count, width, scratch.columns, count);
    for (int64_t query = 0; query < queries; query += kGroup<T>) {
      const int64_t group_queries = std::min<int64_t>(kGroup<T>, queries - query),
                    panels = panel_count<T>(group_queries);
      for (int64_t p = 0; p < panels; ++p)
        multiply_panel<false>(count, width, Operand<T>{rows, width, 1},
                              query_panels + (p * kPanelWidth<T> + query) * width, kPanelWidth<T>,
                              scratch.weights + p * kPanelWidth<T>, kGroup<T>);
      epilogue(scratch.weights, first, count, query, panels);
      if (sums)
        for (int64_t c = 0; c < sums_stride; c += kPanelWidth<T>)
          multiply_panel<true>(group_queries, count, Operand<T>{scratch.weights, 1, kGroup<T>},
                               scratch.columns + c * count, kPanelWidth<T>, sums + query * sums_stride + c,
                               sums_stride);
    }
  }
}

}  // namespace fastssl
