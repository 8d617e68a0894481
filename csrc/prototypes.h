// Logits of features against prototypes, in tiles: the parts of the kernels in prototypes.cpp.
//
// Prototypes are processed in chunks, and a chunk in blocks of kColumns. A tile of logits, kBlockRows features times
// one block of prototypes, stays in the L2 cache. Logits lie with the prototypes as lanes, so that what is added to a
// feature's logits is a row of another matrix: the targets of any of the teachers.
#pragma once

#include "gemm.h"

#include <cmath>
#include <limits>

namespace fastssl {

constexpr int64_t kColumns = 192;         // prototypes of a block: a multiple of all panel widths and tile heights
constexpr int64_t kChunkBytes = 4 << 20;  // size of what a chunk stores for each feature and prototype, if possible
constexpr int64_t kRowTasks = 24;         // number of tasks that a chunk is divided into, if possible

inline int64_t block_count(int64_t columns) { return (columns + kColumns - 1) / kColumns; }
inline int64_t row_block_count(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

// Prototypes of a chunk, when `values` numbers are stored for each.
template <typename T>
int64_t chunk_size(int64_t values, int64_t prototypes) {
  const int64_t blocks = kChunkBytes / (std::max<int64_t>(1, values) * kColumns * int64_t(sizeof(T)));
  return std::min(std::clamp<int64_t>(blocks, 2, 16), std::max<int64_t>(1, block_count(prototypes))) * kColumns;
}

inline Tensor with_contiguous_rows(const Tensor& x) {
  return x.stride(1) == 1 || x.size(1) <= 1 ? x : torch::stable::contiguous(x);
}

// Features [N, D] and prototypes [P, D] of dtype S, packed for the product of features and a chunk of prototypes.
// Pairs of bfloat16 are in prototypes_bf16.h.
template <typename S>
class Logits {
 public:
  using T = ComputeType<S>;
  using Scope = int;  // nothing to hold during products

  Logits(const Tensor& features, const Tensor& prototypes, int64_t chunk)
      : features_(with_contiguous_rows(features)), prototypes_(with_contiguous_rows(prototypes)),
        width_(features.size(1)),
        packed_features_(empty({is_in_place() ? 0 : rows() * packed_row_length(width_)}, kDtype<T>)),
        panels_(empty({panel_count<T>(chunk) * kPanelWidth<T> * width_}, kDtype<T>)),
        a_(pack_a<T>(data<S>(features_), features_.stride(0), rows(), width_, data<T>(packed_features_))) {}

  int64_t rows() const { return features_.size(0); }
  int64_t tile_rows() const { return rows(); }  // rows that `multiply` writes, in all
  int64_t width() const { return width_; }
  const S* features() const { return data<S>(features_); }
  int64_t feature_stride() const { return features_.stride(0); }
  const S* prototype(int64_t column) const { return data<S>(prototypes_) + column * prototypes_.stride(0); }
  int64_t prototype_stride() const { return prototypes_.stride(0); }

  // Packs the prototypes of a chunk.
  void load_chunk(int64_t first, int64_t count) {
    pack_b(prototype(first), prototype_stride(), count, width_, data<T>(panels_));
  }

  // Products of `count` features with `columns` prototypes from `column` of the chunk on: tile[count, kColumns].
  void multiply(int64_t row, int64_t count, int64_t column, int64_t columns, T* tile) const {
    multiply_block<T>(count, panel_count<T>(columns), width_, a_.from(row), data<T>(panels_) + column * width_,
                      width_ * kPanelWidth<T>, false, tile, kColumns);
  }

 private:
  Tensor features_, prototypes_;
  int64_t width_;
  Tensor packed_features_, panels_;
  PackedA<T> a_;

  bool is_in_place() const { return is_usable_in_place<T, S>(features_.stride(0)); }
};

constexpr int64_t kTileScratch = kBlockRows * kColumns;  // a thread's memory in for_each_tile

// Calls body(row, count, block, columns, slot, tile) for each tile of a chunk of `size` prototypes, where
// place(row, block, scratch) returns the memory of the tile. Block b belongs to slot b % slots; the tiles of one range
// of rows and one slot are computed in order by one thread.
template <typename S, typename Place, typename Body>
void for_each_tile(const Logits<S>& logits, int64_t size, int64_t slots, typename Logits<S>::T* scratch,
                   const Place& place, const Body& body) {
  const double operations = 2.0 * logits.rows() * size * logits.width();
  for_tasks(row_block_count(logits.rows()) * slots, operations, scratch, kTileScratch, [&](int64_t task, auto* memory) {
    [[maybe_unused]] const typename Logits<S>::Scope scope{};
    const int64_t row = task / slots * kBlockRows, slot = task % slots,
                  count = std::min(kBlockRows, logits.rows() - row);
    for (int64_t block = slot; block < block_count(size); block += slots) {
      const int64_t columns = std::min(kColumns, size - block * kColumns);
      auto* tile = place(row, block, memory);
      logits.multiply(row, count, block * kColumns, columns, tile);
      body(row, count, block, columns, slot, tile);
    }
  });
}

// The first n lanes of x, and `other` in the rest. n may exceed a vector.
template <typename T>
inline Vec<T> keep_part(Vec<T> x, int64_t n, T other) {
  if (n >= kLanes<T>) return x;
  for (int64_t i = n; i < kLanes<T>; ++i) x[i] = other;
  return x;
}

// Calls step(c, n) for each vector of `columns` values, of which the first n count: all but in the last one.
template <typename T, typename Step>
inline void for_each_vector(int64_t columns, const Step& step) {
  int64_t c = 0;
  for (; c + kLanes<T> <= columns; c += kLanes<T>) step(c, int64_t(kLanes<T>));
  if (c < columns) step(c, columns - c);
}

// Division by a temperature, rounded as x / tau is: with a fused multiply-add without the slow division.
template <typename T>
class Divisor {
 public:
  explicit Divisor(double tau) : tau_(T(tau)), inverse_(T(1) / T(tau)) {}
  Vec<T> operator()(Vec<T> x) const {
#if defined(__FMA__) || defined(__aarch64__)
    const Vec<T> quotient = x * inverse_;
    return (x - quotient * tau_) * inverse_ + quotient;
#else
    return x / tau_;
#endif
  }

 private:
  T tau_;
  [[maybe_unused]] T inverse_;
};

// A log-sum-exp as two numbers, their sum: the largest logit, and the rest.
struct ShiftAndRest {
  double shift, rest;
};

// Running sums of each row, by lane, so that nothing is summed across lanes before the end: the largest logit, the sum
// of exponentials relative to it, and with targets Σ target · logit and Σ target. A row has one set for each slot.
template <typename T>
class RowSums {
 public:
  RowSums(int64_t rows, int64_t slots, bool has_targets)
      : slots_(slots), set_((has_targets ? 4 : 2) * kLanes<T>), memory_(empty({rows * slots * set_}, kDtype<T>)) {
    T* values = data<T>(memory_);
    for (int64_t i = 0; i < rows * slots; ++i, values += set_) {
      std::fill(values, values + kLanes<T>, std::numeric_limits<T>::lowest());  // finite, since ∞ − ∞ is NaN
      std::fill(values + kLanes<T>, values + set_, T(0));
    }
  }

  // Adds one block of products, which are replaced by logits; `offset` and `targets` may be null.
  void add(int64_t row, int64_t slot, T* products, int64_t columns, Divisor<T> tau, const T* offset,
           const T* targets) const {
    T* values = data<T>(memory_) + (row * slots_ + slot) * set_;
    const Vec<T> old_shift = load(values);
    Vec<T> shift = old_shift, sum{}, cross{}, mass{};
    for_each_vector<T>(columns, [&](int64_t c, int64_t n) {
      Vec<T> logit = tau(load(products + c));
      if (offset) logit += load_part<T>(offset + c, n);
      store(products + c, logit);
      logit = keep_part(logit, n, -std::numeric_limits<T>::infinity());
      shift = logit > shift ? logit : shift;  // a NaN does not reach the maximum, but it reaches the sum
    });
    for_each_vector<T>(columns, [&](int64_t c, int64_t n) {
      const Vec<T> logit = keep_part(load(products + c), n, T(0));
      sum += keep_part(exp(logit - shift), n, T(0));
      if (!targets) return;
      const Vec<T> target = keep_part(load(targets + c), n, T(0));
      cross += target * logit;
      mass += target;
    });
    store(values, shift);
    store(values + kLanes<T>, load(values + kLanes<T>) * exp(old_shift - shift) + sum);
    if (!targets) return;
    store(values + 2 * kLanes<T>, load(values + 2 * kLanes<T>) + cross);
    store(values + 3 * kLanes<T>, load(values + 3 * kLanes<T>) + mass);
  }

  ShiftAndRest lse(int64_t row) const {
    const T* values = data<T>(memory_) + row * slots_ * set_;
    T shift = std::numeric_limits<T>::lowest();
    for (int64_t slot = 0; slot < slots_; ++slot)
      for (int64_t i = 0; i < kLanes<T>; ++i) shift = std::max(shift, values[slot * set_ + i]);
    double sum = 0;
    for (int64_t slot = 0; slot < slots_; ++slot, values += set_) {
      const Vec<T> parts = load(values + kLanes<T>) * exp(load(values) - shift);
      for (int64_t i = 0; i < kLanes<T>; ++i) sum += parts[i];
    }
    return {shift, std::log(sum)};
  }
  double cross(int64_t row) const { return total(row, 2); }
  double mass(int64_t row) const { return total(row, 3); }

 private:
  int64_t slots_, set_;  // set_: size of one set
  Tensor memory_;

  double total(int64_t row, int64_t part) const {
    const T* values = data<T>(memory_) + row * slots_ * set_ + part * kLanes<T>;
    double sum = 0;
    for (int64_t slot = 0; slot < slots_; ++slot, values += set_)
      for (int64_t i = 0; i < kLanes<T>; ++i) sum += values[i];
    return sum;
  }
};

// Runs of_rows(first row, memory) for blocks of rows and of_columns(first column, columns, memory) for blocks of
// columns, where `memory` is the running thread's, of kColumns rows of `width` values.
template <typename T, typename OfRows, typename OfColumns>
void for_gradient_tasks(int64_t rows, int64_t columns, double operations, int64_t width, const OfRows& of_rows,
                        const OfColumns& of_columns) {
  // A task of few blocks takes a part of one, so that there are enough tasks for many threads.
  const int64_t part = block_count(columns) < 8 ? kColumns / 4 : kColumns, row_tasks = row_block_count(rows);
  const Tensor scratch = empty({torch::stable::get_num_threads() * kColumns * width}, kDtype<T>);
  for_tasks(row_tasks + (columns + part - 1) / part, operations, data<T>(scratch), kColumns * width,
            [&](int64_t task, T* memory) {
              const int64_t column = (task - row_tasks) * part;
              if (task < row_tasks)
                of_rows(task * kBlockRows, memory);
              else
                of_columns(column, std::min(part, columns - column), memory);
            });
}

// Gradients of the logits of one chunk, and their products with prototypes and features.
template <typename S>
class LogitGradients {
 public:
  using T = ComputeType<S>;

  // dx [N, D] and dweight [P, D] are written unless they are null.
  LogitGradients(const Logits<S>& logits, int64_t chunk, T* dx, T* dweight)
      : logits_(logits), rows_(logits.rows()), width_(logits.width()), padded_(panel_count<T>(width_) * kPanelWidth<T>),
        dx_(dx), dweight_(dweight), gradients_(empty({block_count(chunk) * block_size()}, kDtype<T>)),
        prototype_panels_(empty({dx ? padded_ * chunk : 0}, kDtype<T>)),
        feature_panels_(empty({dweight ? padded_ * rows_ : 0}, kDtype<T>)),
        padded_dx_(empty({dx && padded_ != width_ ? rows_ * padded_ : 0}, kDtype<T>)) {
    if (dweight)
      pack_contiguous_lanes(logits.features(), logits.feature_stride(), width_, rows_, data<T>(feature_panels_));
  }

  // The memory of a tile.
  T* place(int64_t row, int64_t block, T*) const { return data<T>(gradients_) + block * block_size() + row * kColumns; }

  // Stores a tile of gradients, which are in their place already.
  void store_tile(int64_t, int64_t, int64_t, int64_t, T*) const {}

  // Adds the products of the chunk of `size` prototypes from `first` on, whose tiles are all stored.
  void multiply_chunk(int64_t first, int64_t size) const {
    if (dx_)
      pack_contiguous_lanes(logits_.prototype(first), logits_.prototype_stride(), width_, size,
                            data<T>(prototype_panels_));
    for_gradient_tasks<T>(
        dx_ ? rows_ : 0, dweight_ ? size : 0, 4.0 * rows_ * size * width_, padded_ == width_ ? 0 : padded_,
        [&](int64_t row, T*) { multiply_prototypes(row, first, size); },
        [&](int64_t column, int64_t columns, T* memory) { multiply_features(column, columns, first, memory); });
  }

  // Copies dx to its place after the last chunk.
  void finish() const {
    for (int64_t i = 0; dx_ && padded_ != width_ && i < rows_; ++i)
      std::copy_n(data<T>(padded_dx_) + i * padded_, width_, dx_ + i * width_);
  }

 private:
  const Logits<S>& logits_;
  int64_t rows_, width_, padded_;
  T *dx_, *dweight_;
  Tensor gradients_, prototype_panels_, feature_panels_, padded_dx_;

  int64_t block_size() const { return rows_ * kColumns; }

  void multiply_prototypes(int64_t row, int64_t first, int64_t size) const {
    T* dst = (padded_ == width_ ? dx_ : data<T>(padded_dx_)) + row * padded_;
    for (int64_t block = 0; block < block_count(size); ++block) {
      const PackedA<T> a{data<T>(gradients_) + block * block_size() + row * kColumns, kTileRows * kColumns, kColumns,
                         1};
      multiply_block<T>(std::min(kBlockRows, rows_ - row), panel_count<T>(width_),
                        std::min(kColumns, size - block * kColumns), a,
                        data<T>(prototype_panels_) + block * kColumns * kPanelWidth<T>, size * kPanelWidth<T>,
                        first + block > 0, dst, padded_);
    }
  }

  void multiply_features(int64_t column, int64_t columns, int64_t first, T* memory) const {
    const T* gradients = data<T>(gradients_) + column / kColumns * block_size() + column % kColumns;
    T *result = dweight_ + (first + column) * width_, *dst = padded_ == width_ ? result : memory;
    multiply_block<T>(columns, panel_count<T>(width_), rows_, {gradients, kTileRows, 1, kColumns},
                      data<T>(feature_panels_), rows_ * kPanelWidth<T>, false, dst, padded_);
    for (int64_t j = 0; dst != result && j < columns; ++j) std::copy_n(dst + j * padded_, width_, result + j * width_);
  }
};

}  // namespace fastssl
