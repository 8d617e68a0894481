// GEMM micro-kernel of InfoNCE, attention and gemm.h: C = A B, with a tile of C in registers.
//
// A tile has kTileRows rows and the width of one panel, two vectors. Its 2 kTileRows accumulators, two vectors of B and
// one broadcast value of A fill the registers: 6 x 2 accumulators of 16 registers (SSE, AVX2), 12 x 2 of 32 (AVX-512).
// Each step along the depth takes 2 + kTileRows loads and 2 kTileRows multiply-adds, so the two multiply-add units are
// the limit. Values of A are broadcast one at a time, so A may have any strides and is not packed.
#pragma once

#include "vec.h"

#include <atomic>

namespace fastssl {

template <typename T>
constexpr int kPanelWidth = 2 * kLanes<T>;
constexpr int kTileRows = kVectorBytes == 64 ? 12 : 6;

template <typename T>
struct Operand {  // matrix with element (row, depth) at data[row * row_stride + depth * depth_stride]
  const T* data;
  int64_t row_stride, depth_stride;
  Operand skip_depth(int64_t depth) const { return {data + depth * depth_stride, row_stride, depth_stride}; }
};

// One tile: C[R, N vectors] = A[R, depth] B[depth, N vectors], or C += A B with kAccumulate. The product is summed from
// zero and then added to C, because short sums round less than one long chain. The fields of A are separate arguments:
// a struct would be passed through memory, written by field and read as a whole, which stalls store forwarding.
template <int R, int N, bool kAccumulate, typename T>
__attribute__((noinline)) void compute_tile(int64_t depth, const T* a, int64_t a_row_stride, int64_t a_depth_stride,
                                            const T* b, int64_t b_stride, Accumulator<T>* c, int64_t c_stride) {
  Vec<Accumulator<T>> sums[R][N] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Vec<T> b_row[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) b_row[n] = load(b + d * b_stride + n * kLanes<T>);
    const T* a_column = a + d * a_depth_stride;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<T> value = splat(a_column[r * a_row_stride]);
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) sums[r][n] = multiply_add(value, b_row[n], sums[r][n]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      Accumulator<T>* dst = c + r * c_stride + n * kLanes<T>;
      store(dst, kAccumulate ? load(dst) + sums[r][n] : sums[r][n]);
    }
}

// Calls compute_tile for `rows` rows, at most R, which are not known at compile time.
template <int R, int N, bool kAccumulate, typename T>
void dispatch_tile(int64_t rows, int64_t depth, const T* a, int64_t a_row_stride, int64_t a_depth_stride, const T* b,
                   int64_t b_stride, Accumulator<T>* c, int64_t c_stride) {
  if constexpr (R > 0) {
    if (rows == R)
      return compute_tile<R, N, kAccumulate>(depth, a, a_row_stride, a_depth_stride, b, b_stride, c, c_stride);
    dispatch_tile<R - 1, N, kAccumulate>(rows, depth, a, a_row_stride, a_depth_stride, b, b_stride, c, c_stride);
  }
}

// C[rows, N vectors] = A[rows, depth] B[depth, N vectors], or C += A B with kAccumulate. N = 2 is a whole panel.
template <bool kAccumulate, int N = 2, typename T>
void multiply_panel(int64_t rows, int64_t depth, Operand<T> a, const T* b, int64_t b_stride, Accumulator<T>* c,
                    int64_t c_stride) {
  while (rows > 0) {
    // The last two tiles are of equal height: a tile of one or two rows is limited by the latency of its multiply-adds.
    const int64_t tile_rows =
        rows >= 2 * kTileRows || rows <= kTileRows ? std::min<int64_t>(rows, kTileRows) : (rows + 1) / 2;
    dispatch_tile<kTileRows, N, kAccumulate>(tile_rows, depth, a.data, a.row_stride, a.depth_stride, b, b_stride, c,
                                             c_stride);
    a.data += tile_rows * a.row_stride;
    c += tile_rows * c_stride;
    rows -= tile_rows;
  }
}

template <typename T>
constexpr int64_t panel_count(int64_t n) {
  return (n + kPanelWidth<T> - 1) / kPanelWidth<T>;
}

// Packs rows into panels whose lanes are the rows, times `factor`: [count, width] -> [panel_count(count)][width]
// [kPanelWidth]. Lanes beyond the last row are zero.
template <typename T>
void pack_rows(const T* rows, int64_t row_stride, int64_t count, int64_t width, T factor, T* panels) {
  constexpr int kVector = kLanes<T>;
  for (int64_t first = 0; first < count; first += kPanelWidth<T>, panels += width * kPanelWidth<T>)
    for (int64_t lane = 0; lane < kPanelWidth<T>; lane += kVector) {
      const T* src = rows + (first + lane) * row_stride;
      const int64_t valid = std::clamp<int64_t>(count - first - lane, 0, kVector);
      int64_t d = 0;
      for (; valid == kVector && d + kVector <= width; d += kVector) {
        Vec<T> square[kVector];
        for (int i = 0; i < kVector; ++i) square[i] = load(src + i * row_stride + d);
        transpose<T>(square);
        for (int i = 0; i < kVector; ++i) store(panels + (d + i) * kPanelWidth<T> + lane, square[i] * factor);
      }
      for (; d < width; ++d)
        for (int64_t i = 0; i < kVector; ++i)
          panels[d * kPanelWidth<T> + lane + i] = i < valid ? src[i * row_stride + d] * factor : T(0);
    }
}

// Runs body(task, scratch) for every task, where `scratch` has `size` values and belongs to the running thread;
// `memory` must hold get_num_threads() times as many. Tasks are assigned dynamically, so that no thread waits for one
// that was descheduled. Below 2e6 operations the calling thread runs all tasks.
template <typename T, typename Body>
void for_tasks(int64_t tasks, double operations, T* memory, int64_t size, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, operations < 2e6 ? threads : 1, [&](int64_t thread, int64_t) {
    for (int64_t task; (task = next++) < tasks;) body(task, memory + thread * size);
  });
}

}  // namespace fastssl
