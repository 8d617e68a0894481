// Logits of bfloat16 features against bfloat16 prototypes, and their gradients, by the products of bf16_products.h:
// the parts of prototypes.h for pairs of bfloat16. Gradients of logits are rounded to bfloat16.
//
// A of each product has rows of pairs: features, gradients, and transposed gradients. B is packed in panels: prototypes
// as lanes, and pairs of prototypes and of features with the columns as lanes. Rows are padded to whole tiles, 16 as
// rows of A and 32 along the depth.
#pragma once

#include "prototypes.h"
#include "stream.h"

namespace fastssl {

constexpr int64_t kPairPanel = kPanelWidth<Bf16x2>;
constexpr int64_t kPairsChunk = 512;  // pairs of the depth that are summed at a time

inline int64_t whole_depth(int64_t values) { return round_up<int64_t>(values, 2 * kTileWords); }
inline int64_t whole_rows(int64_t rows) { return round_up<int64_t>(rows, kTileRows16); }

inline Tensor empty_pairs(int64_t count) { return empty({count}, ScalarType::Float); }

// Words of a row of A with `pairs` pairs: no power of two, with which all rows would map to the same sets of the cache.
inline int64_t row_stride_of(int64_t pairs) { return pairs % 256 ? pairs : pairs + kTileWords; }

// C[rows, panels · kPairPanel] = A B, or C += A B, inside a TileScope; the rows are rounded up to whole tiles.
inline void multiply_pairs(int64_t rows, int64_t panels, int64_t depth, const Bf16x2* a, int64_t a_stride,
                           const Bf16x2* b, int64_t panel_stride, bool accumulate, float* c, int64_t c_stride) {
  for (int64_t i = 0; depth == 0 && !accumulate && i < rows; ++i)
    std::fill_n(c + i * c_stride, panels * kPairPanel, 0.0f);
  for (int64_t d = 0; d < depth; d += kPairsChunk) {
    const auto multiply = d || accumulate ? multiply_bf16<true> : multiply_bf16<false>;
    for (int64_t p = 0; p < panels; ++p)
      multiply(whole_rows(rows), std::min(kPairsChunk, depth - d), a + d, a_stride,
               b + p * panel_stride + d * kPairPanel, c + p * kPairPanel, c_stride, kPairPanel);
  }
}

template <>
class Logits<Bf16x2> {
 public:
  using T = float;
  using Scope = TileScope;

  Logits(const Tensor& features, const Tensor& prototypes, int64_t chunk)
      : features_(features), prototypes_(prototypes), words_(padded_width<Bf16x2>(features.size(1)) / 2),
        stride_(row_stride_of(words_)), rows_(empty_pairs(whole_depth(rows()) * stride_)),
        panels_(empty_pairs(chunk * words_)) {
    torch::stable::parallel_for(0, whole_depth(rows()), grain(words_), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        copy_pairs(features_, r, rows() - r, 1, 1, data<Bf16x2>(rows_) + r * stride_);
    });
  }

  int64_t rows() const { return features_.rows; }
  int64_t tile_rows() const { return whole_rows(rows()); }
  int64_t width() const { return features_.width; }
  int64_t words() const { return words_; }
  const Matrix& features() const { return features_; }
  const Matrix& prototypes() const { return prototypes_; }

  void load_chunk(int64_t first, int64_t count) {
    const Tensor scratch = empty_pairs(torch::stable::get_num_threads() * kPairPanel * words_);
    for_tasks(panel_count<Bf16x2>(count), 1e9, data<Bf16x2>(scratch), kPairPanel * words_,
              [&](int64_t panel, Bf16x2* rows) {
                const int64_t column = panel * kPairPanel;
                copy_pairs(prototypes_, first + column, count - column, kPairPanel, 1, rows);
                pack_rows(rows, words_, kPairPanel, words_, Bf16x2(1), data<Bf16x2>(panels_) + column * words_);
              });
  }

  void multiply(int64_t row, int64_t count, int64_t column, int64_t columns, float* tile) const {
    multiply_pairs(count, panel_count<Bf16x2>(columns), words_, data<Bf16x2>(rows_) + row * stride_, stride_,
                   data<Bf16x2>(panels_) + column * words_, words_ * kPairPanel, false, tile, kColumns);
  }

 private:
  Matrix features_, prototypes_;
  int64_t words_, stride_;
  Tensor rows_, panels_;
};

// Packs pairs of the rows [first, first + count) with columns as lanes: -> [2 words / kPairPanel][whole_depth(count) /
// 2] [kPairPanel].
inline void pack_pairs_of_rows(const Matrix& src, int64_t first, int64_t count, int64_t words, Bf16x2* panels) {
  constexpr int64_t kRows = 2 * kTileWords;
  const Tensor scratch = empty_pairs(torch::stable::get_num_threads() * kRows * words);
  const int64_t depth = whole_depth(count);
  for_tasks(depth / kRows, 1e9, data<Bf16x2>(scratch), kRows * words, [&](int64_t task, Bf16x2* rows) {
    const int64_t row = task * kRows;
    copy_pairs(src, first + row, count - row, kRows, 1, rows);
    pack_row_pairs(rows, words, kRows, panels + row / 2 * kPairPanel, depth / 2);
  });
}

template <>
class LogitGradients<Bf16x2> {
 public:
  LogitGradients(const Logits<Bf16x2>& logits, int64_t chunk, float* dx, float* dweight)
      : logits_(logits), rows_(logits.rows()), depth_(whole_depth(rows_)), width_(logits.width()),
        padded_(2 * logits.words()), column_stride_(row_stride_of(depth_ / 2)), dx_(dx), dweight_(dweight),
        by_row_(empty_pairs(block_count(chunk) * depth_ * kColumns / 2)),
        by_column_(empty_pairs(dweight ? block_count(chunk) * kColumns * column_stride_ : 0)),
        prototype_panels_(empty_pairs(dx ? padded_ * chunk / 2 : 0)),
        feature_panels_(empty_pairs(dweight ? padded_ * depth_ / 2 : 0)),
        padded_dx_(empty({dx ? depth_ * padded_ : 0}, ScalarType::Float)) {
    if (dweight) pack_pairs_of_rows(logits.features(), 0, rows_, logits.words(), data<Bf16x2>(feature_panels_));
  }

  float* place(int64_t, int64_t, float* scratch) const { return scratch; }

  // Stores a tile of gradients as pairs, beside its neighbours in the row and beside those below.
  void store_tile(int64_t row, int64_t count, int64_t block, int64_t columns, const float* tile) const {
    const int64_t padded_count = whole_depth(count);
    Bf16x2* by_row = data<Bf16x2>(by_row_) + (block * depth_ + row) * kColumns / 2;
    round_rows(tile, kColumns, count, padded_count, columns, kColumns, by_row);
    if (dweight_)
      transpose_bf16(by_row, kColumns / 2, padded_count, kColumns / 2,
                     data<Bf16x2>(by_column_) + block * kColumns * column_stride_ + row / 2, column_stride_);
  }

  void multiply_chunk(int64_t first, int64_t size) const {
    if (dx_) pack_pairs_of_rows(logits_.prototypes(), first, size, logits_.words(), data<Bf16x2>(prototype_panels_));
    for_gradient_tasks<float>(
        dx_ ? rows_ : 0, dweight_ ? size : 0, 4.0 * rows_ * size * width_, padded_,
        [&](int64_t row, float*) { multiply_prototypes(row, first, size); },
        [&](int64_t column, int64_t columns, float* memory) { multiply_features(column, columns, first, memory); });
  }

  void finish() const {
    for (int64_t i = 0; dx_ && i < rows_; ++i)
      std::copy_n(data<float>(padded_dx_) + i * padded_, width_, dx_ + i * width_);
  }

 private:
  const Logits<Bf16x2>& logits_;
  int64_t rows_, depth_, width_, padded_, column_stride_;
  float *dx_, *dweight_;
  Tensor by_row_, by_column_, prototype_panels_, feature_panels_, padded_dx_;

  void multiply_prototypes(int64_t row, int64_t first, int64_t size) const {
    const TileScope scope;
    for (int64_t column = 0; column < size; column += kColumns)
      multiply_pairs(std::min(kBlockRows, rows_ - row), padded_ / kPairPanel,
                     whole_depth(std::min(kColumns, size - column)) / 2,
                     data<Bf16x2>(by_row_) + (column / kColumns * depth_ + row) * kColumns / 2, kColumns / 2,
                     data<Bf16x2>(prototype_panels_) + column / 2 * kPairPanel, whole_depth(size) / 2 * kPairPanel,
                     first + column > 0, data<float>(padded_dx_) + row * padded_, padded_);
  }

  void multiply_features(int64_t column, int64_t columns, int64_t first, float* memory) const {
    const TileScope scope;
    float* result = dweight_ + (first + column) * width_;
    const bool in_place = padded_ == width_ && columns == whole_rows(columns);
    float* dst = in_place ? result : memory;
    multiply_pairs(columns, padded_ / kPairPanel, depth_ / 2, data<Bf16x2>(by_column_) + column * column_stride_,
                   column_stride_, data<Bf16x2>(feature_panels_), depth_ / 2 * kPairPanel, false, dst, padded_);
    for (int64_t j = 0; !in_place && j < columns; ++j) std::copy_n(dst + j * padded_, width_, result + j * width_);
  }
};

// Calls body(S{}) with what the products of a tensor take: pairs of bfloat16 where this library multiplies them, else
// its dtype.
template <typename Body>
void with_elements(ScalarType dtype, const char* argument, const Body& body) {
  if (dtype == ScalarType::BFloat16 && uses_bf16_products()) return body(Bf16x2{});
  with_float_type(dtype, argument, body);
}

}  // namespace fastssl
