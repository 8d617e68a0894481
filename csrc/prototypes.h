// Logits of features against prototypes, in tiles: the parts of the kernels in prototypes.cpp.
//
// Prototypes are processed in chunks, and a chunk in blocks of kColumns. A tile of logits, kBlockRows features times
// one block of prototypes, stays in the L2 cache. Logits lie with the prototypes as lanes, so that what is added to a
// feature's logits is a row of another matrix: the targets of any of the teachers.
#pragma once

#include "avx512_bf16.h"
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

template <typename P>
Tensor empty_packed(int64_t elements) {
  return empty({elements}, std::is_same_v<P, Bf16x2> ? ScalarType::Float : kDtype<Accumulator<P>>);
}

// Features [N, D] and prototypes [P, D] of dtype S, packed for the product of features and a chunk of prototypes.
template <typename S>
class Logits {
 public:
  using P = Packed<S>;
  using T = Accumulator<P>;

  Logits(const Tensor& features, const Tensor& prototypes, int64_t chunk)
      : features_(with_contiguous_rows(features)), prototypes_(with_contiguous_rows(prototypes)),
        width_(features.size(1)), steps_(steps_of<P>(width_)),
        packed_features_(empty_packed<P>(is_in_place() ? 0 : rows() * packed_row_length<P>(width_))),
        panels_(empty_packed<P>(panel_count<T>(chunk) * kPanelWidth<T> * steps_)),
        a_(pack_a<P>(data<S>(features_), features_.stride(0), rows(), width_, data<P>(packed_features_))) {}

  int64_t rows() const { return features_.size(0); }
  int64_t width() const { return width_; }
  const S* features() const { return data<S>(features_); }
  int64_t feature_stride() const { return features_.stride(0); }
  const S* prototype(int64_t column) const { return data<S>(prototypes_) + column * prototypes_.stride(0); }
  int64_t prototype_stride() const { return prototypes_.stride(0); }

  // Packs the prototypes of a chunk.
  void load_chunk(int64_t first, int64_t count) {
    pack_b<P>(prototype(first), prototype_stride(), count, width_, data<P>(panels_));
  }

  // Products of `count` features with `columns` prototypes from `column` of the chunk on: tile[count, kColumns].
  void multiply(int64_t row, int64_t count, int64_t column, int64_t columns, T* tile) const {
    multiply_block<P>(count, panel_count<T>(columns), steps_, a_.from(row), data<P>(panels_) + column * steps_,
                      steps_ * kPanelWidth<T>, false, tile, kColumns);
  }

  // Calls body(row, count, block, columns, slot, tile) for each tile of a chunk of `size` prototypes, where
  // place(row, block, scratch) returns the memory of the tile. Block b belongs to slot b % slots; the tiles of one
  // range of rows and one slot are computed in order by one thread.
  template <typename Place, typename Body>
  void for_each_tile(int64_t size, int64_t slots, T* scratch, const Place& place, const Body& body) const {
    const double operations = 2.0 * rows() * size * width_;
    for_tasks(row_block_count(rows()) * slots, operations, scratch, kScratch, [&](int64_t task, T* memory) {
      const int64_t row = task / slots * kBlockRows, slot = task % slots, count = std::min(kBlockRows, rows() - row);
      for (int64_t block = slot; block < block_count(size); block += slots) {
        const int64_t columns = std::min(kColumns, size - block * kColumns);
        T* tile = place(row, block, memory);
        multiply(row, count, block * kColumns, columns, tile);
        body(row, count, block, columns, slot, tile);
      }
    });
  }
  static constexpr int64_t kScratch = kBlockRows * kColumns;  // a thread's memory in for_each_tile

 private:
  Tensor features_, prototypes_;
  int64_t width_, steps_;
  Tensor packed_features_, panels_;
  PackedA<P> a_;

  bool is_in_place() const { return is_usable_in_place<P, S>(features_.stride(0), width_); }
};

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

// Gradients of the logits of one chunk, and their products with prototypes and features. Where products take pairs of
// bfloat16, each gradient is stored twice: beside its neighbour in the row, and beside the one below.
template <typename S>
class LogitGradients {
 public:
  using P = Packed<S>;
  using T = Accumulator<P>;
  static constexpr bool kPairs = std::is_same_v<P, Bf16x2>;

  // dx [N, D] and dweight [P, D] are written unless they are null.
  LogitGradients(const Logits<S>& logits, int64_t chunk, T* dx, T* dweight)
      : logits_(logits), rows_(logits.rows()), row_steps_(steps_of<P>(rows_)), width_(logits.width()),
        padded_(panel_count<T>(width_) * kPanelWidth<T>), dx_(dx), dweight_(dweight),
        by_row_(empty_packed<P>(block_count(chunk) * row_size())),
        by_column_(empty_packed<P>(kPairs && dweight ? block_count(chunk) * column_size() : 0)),
        prototype_panels_(empty_packed<P>(dx ? padded_ * steps_of<P>(chunk) : 0)),
        feature_panels_(empty_packed<P>(dweight ? padded_ * row_steps_ : 0)),
        padded_dx_(empty({dx && padded_ != width_ ? rows_ * padded_ : 0}, kDtype<T>)) {
    if (dweight)
      pack_contiguous_lanes<P>(logits.features(), logits.feature_stride(), width_, rows_, data<P>(feature_panels_));
  }

  // The memory of a tile.
  T* place(int64_t row, int64_t block, T* scratch) const {
    if constexpr (kPairs)
      return scratch;
    else
      return data<T>(by_row_) + block * row_size() + row * kColumns;
  }

  // Stores a tile of gradients. Those beyond the last column must be zero up to a whole vector.
  void store_tile([[maybe_unused]] int64_t row, [[maybe_unused]] int64_t count, [[maybe_unused]] int64_t block,
                  [[maybe_unused]] int64_t columns, [[maybe_unused]] T* tile) const {
#if defined(FASTSSL_BF16_DOT)
    if constexpr (kPairs) {
      if (count % 2) std::fill(tile + count * kColumns, tile + (count + 1) * kColumns, T(0));
      P* by_row = data<P>(by_row_) + block * row_size() + row * (kColumns / 2);
      P* by_column = data<P>(by_column_) + block * column_size() + row / 2 * kColumns;
      for (int64_t i = 0; i < count; ++i, tile += kColumns)
        for (int64_t c = 0; c < columns; c += 2 * kLanes<T>) {
          const bool whole = columns - c > kLanes<T>;
          const Vec<T> first = load(tile + c), second = whole ? load(tile + c + kLanes<T>) : Vec<T>{};
          if (dx_) store(by_row + i * (kColumns / 2) + c / 2, to_bf16(first, second));
          if (!dweight_ || i % 2) continue;
          const T* below = tile + kColumns + c;
          store(by_column + i / 2 * kColumns + c, to_bf16_pairs(first, load(below)));
          if (whole)
            store(by_column + i / 2 * kColumns + c + kLanes<T>, to_bf16_pairs(second, load(below + kLanes<T>)));
        }
    }
#endif
  }

  // Adds the products of the chunk of `size` prototypes from `first` on, whose tiles are all stored.
  void multiply_chunk(int64_t first, int64_t size) const {
    const int64_t steps = steps_of<P>(size), dx_tasks = dx_ ? row_block_count(rows_) : 0;
    // A task of few blocks takes a part of one, so that there are enough tasks for many threads.
    const int64_t part = block_count(size) < 8 ? kColumns / 4 : kColumns;
    if (dx_)
      pack_contiguous_lanes<P>(logits_.prototype(first), logits_.prototype_stride(), width_, size,
                               data<P>(prototype_panels_));
    const int64_t scratch_size = dweight_ && padded_ != width_ ? kColumns * padded_ : 0;
    const Tensor scratch = empty({torch::stable::get_num_threads() * scratch_size}, kDtype<T>);
    for_tasks(dx_tasks + (dweight_ ? (size + part - 1) / part : 0), 4.0 * rows_ * size * width_, data<T>(scratch),
              scratch_size, [&](int64_t task, T* memory) {
                if (task < dx_tasks)
                  multiply_prototypes(task * kBlockRows, first, size, steps);
                else
                  multiply_features((task - dx_tasks) * part, part, first, size, memory);
              });
  }

  // Copies dx to its place after the last chunk.
  void finish() const {
    for (int64_t i = 0; dx_ && padded_ != width_ && i < rows_; ++i)
      std::copy_n(data<T>(padded_dx_) + i * padded_, width_, dx_ + i * width_);
  }

 private:
  const Logits<S>& logits_;
  int64_t rows_, row_steps_, width_, padded_;
  T *dx_, *dweight_;
  Tensor by_row_, by_column_, prototype_panels_, feature_panels_, padded_dx_;

  int64_t row_size() const { return (rows_ + 1) * kColumns / kDepthPerElement<P>; }
  int64_t column_size() const { return row_steps_ * kColumns; }

  void multiply_prototypes(int64_t row, int64_t first, int64_t size, int64_t steps) const {
    constexpr int64_t kStride = kColumns / kDepthPerElement<P>;
    T* dst = (padded_ == width_ ? dx_ : data<T>(padded_dx_)) + row * padded_;
    for (int64_t block = 0; block < block_count(size); ++block) {
      const PackedA<P> a{data<P>(by_row_) + block * row_size() + row * kStride, kTileRows * kStride, kStride, 1};
      const int64_t columns = std::min(kColumns, size - block * kColumns);
      multiply_block<P>(std::min(kBlockRows, rows_ - row), panel_count<T>(width_), steps_of<P>(columns), a,
                        data<P>(prototype_panels_) + block * kStride * kPanelWidth<T>, steps * kPanelWidth<T>,
                        first + block > 0, dst, padded_);
    }
  }

  void multiply_features(int64_t column, int64_t part, int64_t first, int64_t size, T* memory) const {
    const int64_t block = column / kColumns, columns = std::min(part, size - column);
    const P* gradients =
        (kPairs ? data<P>(by_column_) + block * column_size() : data<P>(by_row_) + block * row_size()) +
        column % kColumns;
    T *result = dweight_ + (first + column) * width_, *dst = padded_ == width_ ? result : memory;
    multiply_block<P>(columns, panel_count<T>(width_), row_steps_, {gradients, kTileRows, 1, kColumns},
                      data<P>(feature_panels_), row_steps_ * kPanelWidth<T>, false, dst, padded_);
    for (int64_t j = 0; dst != result && j < columns; ++j) std::copy_n(dst + j * padded_, width_, result + j * width_);
  }
};

}  // namespace fastssl
