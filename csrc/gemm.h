// The matrix product inside InfoNCE and attention: a micro-kernel that keeps a tile of the result in registers.
//
// One panel is as wide as two vectors. kRows x 2 accumulators, two vectors of B and one value of A fill the register
// file: 6 x 2 of 16 registers (SSE, AVX2), 12 x 2 of 32 (AVX-512). For each value of the depth a tile loads 2 + kRows
// times and multiplies 2 * kRows times, so the two multiply-add units stay busy. A is read by broadcasting single
// values, so its rows and columns may have any stride and it is never packed.
#pragma once

#include "vec.h"

#include <atomic>

namespace fastssl {

template <typename T>
constexpr int kPanel = 2 * kLanes<T>;
constexpr int kRows = kVectorBytes == 64 ? 12 : 6;

template <typename T>
struct Operand {  // a matrix whose element (row, depth) lies at data[row * row_stride + depth * depth_stride]
  const T* data;
  int64_t row_stride, depth_stride;
  Operand deeper(int64_t depth) const { return {data + depth * depth_stride, row_stride, depth_stride}; }
};

// C[R, N vectors] = A[R, depth] B[depth, N vectors], added to C with kAdd: a sum of its own first, since short sums round
// less than one long chain. A's parts come one by one: as a struct they would go through memory, stored in pieces and
// loaded whole, which stalls.
template <int R, int N, bool kAdd, typename T>
__attribute__((noinline)) void tile(int64_t depth, const T* a, int64_t a_row, int64_t a_depth, const T* b,
                                    int64_t b_stride, Sum<T>* c, int64_t c_stride) {
  Vec<Sum<T>> sums[R][N] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Vec<T> right[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) right[n] = load(b + d * b_stride + n * kLanes<T>);
    const T* column = a + d * a_depth;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<T> value = splat(column[r * a_row]);
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) sums[r][n] = multiply_add(value, right[n], sums[r][n]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      Sum<T>* to = c + r * c_stride + n * kLanes<T>;
      store(to, kAdd ? load(to) + sums[r][n] : sums[r][n]);
    }
}

template <int R, int N, bool kAdd, typename T>
void tile_of(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_depth, const T* b, int64_t b_stride,
             Sum<T>* c, int64_t c_stride) {
  if constexpr (R > 0) {
    if (rows == R) return tile<R, N, kAdd>(depth, a, a_row, a_depth, b, b_stride, c, c_stride);
    tile_of<R - 1, N, kAdd>(rows, depth, a, a_row, a_depth, b, b_stride, c, c_stride);
  }
}

// C[rows, N vectors] = A[rows, depth] B[depth, N vectors], added to C with kAdd. N = 2 is a panel.
template <bool kAdd, int N = 2, typename T>
void multiply(int64_t rows, int64_t depth, Operand<T> a, const T* b, int64_t b_stride, Sum<T>* c, int64_t c_stride) {
  while (rows > 0) {
    // Two even tiles at the end: one of a row or two would wait for its own sums.
    const int64_t some = rows >= 2 * kRows || rows <= kRows ? std::min<int64_t>(rows, kRows) : (rows + 1) / 2;
    tile_of<kRows, N, kAdd>(some, depth, a.data, a.row_stride, a.depth_stride, b, b_stride, c, c_stride);
    a.data += some * a.row_stride;
    c += some * c_stride;
    rows -= some;
  }
}

template <typename T>
constexpr int64_t panels_of(int64_t n) {
  return (n + kPanel<T> - 1) / kPanel<T>;
}

// Rows become lanes: [count, width] -> [panels_of(count)][width][kPanel], times `factor`; missing rows are zero.
template <typename T>
void pack_rows(const T* rows, int64_t row_stride, int64_t count, int64_t width, T factor, T* panels) {
  constexpr int kWide = kLanes<T>;
  for (int64_t first = 0; first < count; first += kPanel<T>, panels += width * kPanel<T>)
    for (int64_t lane = 0; lane < kPanel<T>; lane += kWide) {
      const T* from = rows + (first + lane) * row_stride;
      const int64_t there = std::clamp<int64_t>(count - first - lane, 0, kWide);
      int64_t d = 0;
      for (; there == kWide && d + kWide <= width; d += kWide) {
        Vec<T> square[kWide];
        for (int i = 0; i < kWide; ++i) square[i] = load(from + i * row_stride + d);
        transpose<T>(square);
        for (int i = 0; i < kWide; ++i) store(panels + (d + i) * kPanel<T> + lane, square[i] * factor);
      }
      for (; d < width; ++d)
        for (int64_t i = 0; i < kWide; ++i)
          panels[d * kPanel<T> + lane + i] = i < there ? from[i * row_stride + d] * factor : T(0);
    }
}

// Runs body(task, scratch) for every task, each thread with scratch of its own out of `memory`, which must hold
// get_num_threads() times `size` values. A thread takes the next task when it is done with one, so that none waits for
// another that lost its core for a while. With few operations the calling thread does all.
template <typename T, typename Body>
void for_tasks(int64_t tasks, double operations, T* memory, int64_t size, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, operations < 2e6 ? threads : 1, [&](int64_t thread, int64_t) {
    for (int64_t task; (task = next++) < tasks;) body(task, memory + thread * size);
  });
}

}  // namespace fastssl
