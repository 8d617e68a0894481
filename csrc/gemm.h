// Parts of a GEMM for kernels with an epilogue between two products (prototypes.h): C[M, N] = A[M, depth] B[depth, N].
// Both are packed into panels, and a block of C is computed with the micro-kernel. Products without an epilogue are
// torch's (fastssl/ops/products.py).
//
// A step of the micro-kernel reads kTileRows values of A and one row of a panel of B. The depth is split into chunks
// that are summed separately: short sums round less than one long chain, and a chunk of A stays in the L2 cache.
//
// Packing also converts 16 bits to float32. Products of bfloat16 pairs are in bf16_products.h.
#pragma once

#include "microkernel.h"
#include "rows.h"

namespace fastssl {

constexpr int64_t kBlockRows = 96;    // of a block of C
constexpr int64_t kDepthChunk = 128;  // values of a chunk of the depth

// Packed A: element (row, step) is at data[row / kTileRows * panel_stride + row % kTileRows * row_stride
// + step * step_stride].
template <typename T>
struct PackedA {
  const T* data;
  int64_t panel_stride, row_stride, step_stride;
  const T* element(int64_t row, int64_t step) const {
    return data + row / kTileRows * panel_stride + step * step_stride;
  }
  PackedA from(int64_t row) const { return {element(row, 0), panel_stride, row_stride, step_stride}; }  // whole panels
};

// C[rows, panels · kPanelWidth] = A B, or C += A B. B is packed as [panels][panel_stride], each panel as
// [steps][kPanelWidth].
template <typename T>
void multiply_block(int64_t rows, int64_t panels, int64_t steps, PackedA<T> a, const T* b, int64_t panel_stride,
                    bool accumulate, T* c, int64_t c_stride) {
  for (int64_t i = 0; steps == 0 && !accumulate && i < rows; ++i)
    std::fill_n(c + i * c_stride, panels * kPanelWidth<T>, T(0));
  for (int64_t step = 0; step < steps; step += kDepthChunk) {
    const auto multiply_rows =
        step || accumulate ? dispatch_tile<kTileRows, 2, true, T> : dispatch_tile<kTileRows, 2, false, T>;
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t i = 0; i < rows; i += kTileRows)
        multiply_rows(std::min<int64_t>(kTileRows, rows - i), std::min(kDepthChunk, steps - step), a.element(i, step),
                      a.row_stride, a.step_stride, b + p * panel_stride + step * kPanelWidth<T>, kPanelWidth<T>,
                      c + i * c_stride + p * kPanelWidth<T>, c_stride);
  }
}

// Length of a packed row with contiguous depth: whole vectors, plus 16 so that the length is not a power of two, with
// which all rows would map to the same sets of the L1 cache.
inline int64_t packed_row_length(int64_t depth) { return round_up<int64_t>(depth, 16) + 16; }

// Packs `depth` contiguous values, padded with zeros to a whole vector.
template <typename T, typename S>
void pack_row(const S* src, int64_t depth, T* dst) {
  for (int64_t d = 0; d < depth; d += kLanes<T>) store(dst + d, load_part<T>(src + d, depth - d));
}

// True where A can be multiplied without packing: its values need no conversion, and the stride of its rows is not a
// multiple of 4 kB, with which all rows would map to the same sets of the L1 cache.
template <typename T, typename S>
bool is_usable_in_place(int64_t stride) {
  return std::is_same_v<T, S> && stride * int64_t(sizeof(S)) % 4096 != 0;
}

// Packs A from [rows, depth] with contiguous depth, or returns A itself where is_usable_in_place is true.
template <typename T, typename S>
PackedA<T> pack_a(const S* src, int64_t src_stride, int64_t rows, int64_t depth, T* dst) {
  if (is_usable_in_place<T, S>(src_stride))
    return {reinterpret_cast<const T*>(src), kTileRows * src_stride, src_stride, 1};
  const int64_t stride = packed_row_length(depth);
  torch::stable::parallel_for(0, rows, grain(depth), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) pack_row(src + r * src_stride, depth, dst + r * stride);
  });
  return {dst, kTileRows * stride, stride, 1};
}

// Packs B from its transpose with contiguous depth: [columns, depth] -> [columns / kPanelWidth][depth][kPanelWidth].
template <typename T, typename S>
void pack_b(const S* src, int64_t src_stride, int64_t columns, int64_t depth, T* dst) {
  constexpr int64_t n = kLanes<T>;
  const int64_t stride = packed_row_length(depth);
  const Tensor workspace = empty({torch::stable::get_num_threads() * n * stride}, kDtype<T>);
  for_tasks(panel_count<T>(columns), 1e9, data<T>(workspace), n * stride, [&](int64_t panel, T* rows) {
    for (int64_t lane = 0; lane < kPanelWidth<T>; lane += n) {
      const int64_t first = panel * kPanelWidth<T> + lane;
      for (int64_t i = 0; i < n; ++i)
        if (first + i < columns)
          pack_row(src + (first + i) * src_stride, depth, rows + i * stride);
        else
          std::fill(rows + i * stride, rows + (i + 1) * stride, T(0));
      T* panel_rows = dst + panel * depth * kPanelWidth<T> + lane;
      for (int64_t d = 0; d < depth; d += n) {
        Vec<T> square[n];
        for (int64_t i = 0; i < n; ++i) square[i] = load(rows + i * stride + d);
        transpose<T>(square);
        for (int64_t i = 0; i < std::min(n, depth - d); ++i) store(panel_rows + (d + i) * kPanelWidth<T>, square[i]);
      }
    }
  });
}

constexpr int64_t kLaneGroup = 96;  // lanes packed at a time: a multiple of every panel width

// Packs B with contiguous lanes: [depth, lanes] -> [lanes / kPanelWidth][depth][kPanelWidth]. Tasks are ranges of the
// depth, so that each thread reads whole rows.
template <typename T, typename S>
void pack_contiguous_lanes(const S* src, int64_t src_stride, int64_t lanes, int64_t depth, T* dst) {
  constexpr int kWidth = kPanelWidth<T>;
  constexpr int64_t kSteps = 16;  // packed before they are copied, because loading a value just stored is slow
  const int64_t tasks = (depth + kSteps - 1) / kSteps;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    T rows[kSteps][kLaneGroup] = {};
    for (int64_t step = begin * kSteps; step < std::min(end * kSteps, depth); step += kSteps) {
      const int64_t task_steps = std::min(kSteps, depth - step);
      for (int64_t first = 0; first < lanes; first += kLaneGroup) {
        const int64_t group_lanes = std::min(kLaneGroup, lanes - first);
        for (int64_t s = 0; s < task_steps; ++s) {
          const S* row = src + (step + s) * src_stride + first;
          for (int64_t lane = 0; lane < group_lanes; lane += kLanes<T>)
            store(rows[s] + lane, load_part<T>(row + lane, group_lanes - lane));
        }
        for (int64_t lane = 0; lane < group_lanes; lane += kWidth)
          for (int64_t s = 0; s < task_steps; ++s)
            std::memcpy(dst + (first + lane) * depth + (step + s) * kWidth, rows[s] + lane, kWidth * sizeof(T));
      }
    }
  });
}

}  // namespace fastssl
