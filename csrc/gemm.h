// Parts of a GEMM for kernels with an epilogue between two products (prototypes.h): C[M, N] = A[M, depth] B[depth, N].
// Both are packed into panels, and a block of C is computed with the micro-kernel. Products without an epilogue are
// torch's (fastssl/ops/products.py).
//
// A step of the micro-kernel reads kTileRows values of A and one row of a panel of B. With AVX-512's bf16 dot product a
// step covers two values of the depth, which doubles the rate. The depth is split into chunks that are summed
// separately: short sums round less than one long chain, and a chunk of A stays in the L2 cache.
//
// Packing also converts, to float32 or to pairs of bfloat16.
#pragma once

#include "microkernel.h"
#include "rows.h"

namespace fastssl {

template <typename P>
constexpr int64_t kDepthPerElement = std::is_same_v<P, Bf16x2> ? 2 : 1;  // values of the depth in a packed element

#if defined(FASTSSL_BF16_DOT)
constexpr bool kHasBf16Dot = true;
#else
constexpr bool kHasBf16Dot = false;
#endif

// The packed element type for values of dtype S.
template <typename S>
using Packed = std::conditional_t<kHasBf16Dot && std::is_same_v<S, BFloat16>, Bf16x2, ComputeType<S>>;

constexpr int64_t kBlockRows = 96;  // of a block of C
template <typename P>
constexpr int64_t kDepthChunk =
    std::is_same_v<P, Bf16x2> ? 256 : 128;  // steps of a chunk: a block of A has at most 98 kB

template <typename P>
int64_t steps_of(int64_t depth) {
  return (depth + kDepthPerElement<P> - 1) / kDepthPerElement<P>;
}

// Packed A: element (row, step) is at data[row / kTileRows * panel_stride + row % kTileRows * row_stride
// + step * step_stride].
template <typename P>
struct PackedA {
  const P* data;
  int64_t panel_stride, row_stride, step_stride;
  const P* element(int64_t row, int64_t step) const {
    return data + row / kTileRows * panel_stride + step * step_stride;
  }
  PackedA from(int64_t row) const { return {element(row, 0), panel_stride, row_stride, step_stride}; }  // whole panels
};

// C[rows, panels · kPanelWidth] = A B, or C += A B. B is packed as [panels][panel_stride], each panel as
// [steps][kPanelWidth].
template <typename P>
void multiply_block(int64_t rows, int64_t panels, int64_t steps, PackedA<P> a, const P* b, int64_t panel_stride,
                    bool accumulate, Accumulator<P>* c, int64_t c_stride) {
  using T = Accumulator<P>;
  for (int64_t i = 0; steps == 0 && !accumulate && i < rows; ++i)
    std::fill_n(c + i * c_stride, panels * kPanelWidth<T>, T(0));
  for (int64_t step = 0; step < steps; step += kDepthChunk<P>) {
    const auto multiply_rows =
        step || accumulate ? dispatch_tile<kTileRows, 2, true, P> : dispatch_tile<kTileRows, 2, false, P>;
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t i = 0; i < rows; i += kTileRows)
        multiply_rows(std::min<int64_t>(kTileRows, rows - i), std::min(kDepthChunk<P>, steps - step),
                      a.element(i, step), a.row_stride, a.step_stride, b + p * panel_stride + step * kPanelWidth<T>,
                      kPanelWidth<T>, c + i * c_stride + p * kPanelWidth<T>, c_stride);
  }
}

// Length of a packed row with contiguous depth, in elements: whole vectors, plus 16 so that the length is not a power
// of two, with which all rows would map to the same sets of the L1 cache.
template <typename P>
int64_t packed_row_length(int64_t depth) {
  return round_up<int64_t>(steps_of<P>(depth), 16) + 16;
}

// Packs `depth` contiguous values, padded with zeros to a whole vector.
template <typename P, typename S>
void pack_row(const S* src, int64_t depth, P* dst) {
  using T = Accumulator<P>;
  if constexpr (std::is_same_v<P, Bf16x2>) {
    std::memcpy(dst, src, depth * sizeof(S));
    std::memset(reinterpret_cast<S*>(dst) + depth, 0, (round_up<int64_t>(depth, kLanes<T>) - depth) * sizeof(S));
  } else {
    for (int64_t d = 0; d < depth; d += kLanes<T>) store(dst + d, load_part<T>(src + d, depth - d));
  }
}

// True where A can be multiplied without packing: its values need no conversion, its rows consist of whole packed
// elements, and their stride is not a multiple of 4 kB, with which all rows would map to the same sets of the L1 cache.
template <typename P, typename S>
bool is_usable_in_place(int64_t stride, int64_t depth) {
  constexpr bool kSameDtype = std::is_same_v<P, S> || (std::is_same_v<P, Bf16x2> && std::is_same_v<S, BFloat16>);
  const bool is_whole = depth % kDepthPerElement<P> == 0 && stride % kDepthPerElement<P> == 0;
  return kSameDtype && is_whole && stride * int64_t(sizeof(S)) % 4096 != 0;
}

// Packs A from [rows, depth] with contiguous depth, or returns A itself where is_usable_in_place is true.
template <typename P, typename S>
PackedA<P> pack_a(const S* src, int64_t src_stride, int64_t rows, int64_t depth, P* dst) {
  if (is_usable_in_place<P, S>(src_stride, depth)) {
    const int64_t step = src_stride / kDepthPerElement<P>;
    return {reinterpret_cast<const P*>(src), kTileRows * step, step, 1};
  }
  const int64_t stride = packed_row_length<P>(depth);
  torch::stable::parallel_for(0, rows, grain(depth), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) pack_row(src + r * src_stride, depth, dst + r * stride);
  });
  return {dst, kTileRows * stride, stride, 1};
}

// Packs B from its transpose with contiguous depth: [columns, depth] -> [columns / kPanelWidth][steps][kPanelWidth].
template <typename P, typename S>
void pack_b(const S* src, int64_t src_stride, int64_t columns, int64_t depth, P* dst) {
  using T = Accumulator<P>;
  constexpr int64_t n = kLanes<T>;
  const int64_t steps = steps_of<P>(depth), stride = packed_row_length<P>(depth);
  const Tensor workspace = empty({torch::stable::get_num_threads() * n * stride}, kDtype<T>);
  for_tasks(panel_count<T>(columns), 1e9, data<T>(workspace), n * stride, [&](int64_t panel, T* rows) {
    for (int64_t lane = 0; lane < kPanelWidth<T>; lane += n) {
      const int64_t first = panel * kPanelWidth<T> + lane;
      for (int64_t i = 0; i < n; ++i)
        if (first + i < columns)
          pack_row(src + (first + i) * src_stride, depth, reinterpret_cast<P*>(rows + i * stride));
        else
          std::fill(rows + i * stride, rows + (i + 1) * stride, T(0));
      T* panel_rows = reinterpret_cast<T*>(dst) + panel * steps * kPanelWidth<T> + lane;
      for (int64_t s = 0; s < steps; s += n) {
        Vec<T> square[n];
        for (int64_t i = 0; i < n; ++i) square[i] = load(rows + i * stride + s);
        transpose<T>(square);
        for (int64_t i = 0; i < std::min(n, steps - s); ++i) store(panel_rows + (s + i) * kPanelWidth<T>, square[i]);
      }
    }
  });
}

// Pairs of values that are exactly representable in bfloat16.
inline Vec<Bf16x2> exact_pairs(Vec<float> first, Vec<float> second) {
  return Vec<Bf16x2>(first) >> 16 | Vec<Bf16x2>(second);
}

constexpr int64_t kLaneGroup = 96;  // lanes packed at a time: a multiple of every panel width

// Packs a step of `lanes` lanes, from one row of the depth or, for pairs, from two.
template <typename P, typename S>
inline void pack_step(const S* first, const S* second, int64_t lanes, P* dst) {
  using T = Accumulator<P>;
#pragma GCC unroll 6
  for (int64_t lane = 0; lane < kLaneGroup; lane += kLanes<T>) {
    if (lane >= lanes) break;
    const Vec<T> x = load_part<T>(first + lane, lanes - lane);
    if constexpr (std::is_same_v<P, Bf16x2>) {
      const Vec<T> y = second ? load_part<T>(second + lane, lanes - lane) : Vec<T>{};
      store(dst + lane, exact_pairs(x, y));
    } else {
      store(dst + lane, x);
    }
  }
}

// Packs B with contiguous lanes: [depth, lanes] -> [lanes / kPanelWidth][steps][kPanelWidth]. Tasks are ranges of the
// depth, so that each thread reads whole rows.
template <typename P, typename S>
void pack_contiguous_lanes(const S* src, int64_t src_stride, int64_t lanes, int64_t depth, P* dst) {
  constexpr int kWidth = kPanelWidth<Accumulator<P>>;
  constexpr int64_t kSteps = 16;  // packed before they are copied, because loading a value just stored is slow
  const int64_t steps = steps_of<P>(depth), tasks = (steps + kSteps - 1) / kSteps;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    P rows[kSteps][kLaneGroup] = {};
    for (int64_t step = begin * kSteps; step < std::min(end * kSteps, steps); step += kSteps) {
      const int64_t task_steps = std::min(kSteps, steps - step);
      for (int64_t first = 0; first < lanes; first += kLaneGroup) {
        const int64_t group_lanes = std::min(kLaneGroup, lanes - first);
        for (int64_t s = 0; s < task_steps; ++s) {
          const int64_t d = (step + s) * kDepthPerElement<P>;
          const S* row = src + d * src_stride + first;
          const S* next = d + 1 < depth ? row + src_stride : nullptr;
          if (group_lanes == kLaneGroup && next)  // the common case: the compiler unrolls the constant count
            pack_step<P>(row, row + src_stride, kLaneGroup, rows[s]);
          else
            pack_step<P>(row, next, group_lanes, rows[s]);
        }
        for (int64_t lane = 0; lane < group_lanes; lane += kWidth)
          for (int64_t s = 0; s < task_steps; ++s)
            std::memcpy(dst + (first + lane) * steps + (step + s) * kWidth, rows[s] + lane, kWidth * sizeof(P));
      }
    }
  });
}

}  // namespace fastssl
