// GEMM: C[M, N] = A[M, depth] B[depth, N] for large matrices. Both are packed into panels, and a task computes a block
// of C with the micro-kernel.
//
// A step of the micro-kernel reads kTileRows values of A and one row of a panel of B. With AVX-512's bf16 dot product a
// step covers two values of the depth, which doubles the rate. The depth is split into chunks that are summed
// separately: short sums round less than one long chain, and a chunk of A stays in the L2 cache.
//
// Packing also converts: to float32, to pairs of bfloat16, through GELU. So neither a cast of the weights nor the
// result of the activation is written to memory as a matrix of its own.
//
// Operations: 2 M N depth. Memory: the packed matrices, and 98 kB of sums per thread.
#pragma once

#include "avx512_bf16.h"
#include "gelu.h"
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

constexpr int64_t kBlockRows = 96, kBlockColumns = 256;  // a block of C: 98 kB of float32
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

// Computes A B, with B packed as [N / kPanelWidth][steps][kPanelWidth], and calls
// epilogue(row, column, rows, columns, sums, stride) for each block of the result.
template <typename P, typename Epilogue>
void gemm(int64_t rows, int64_t columns, int64_t steps, PackedA<P> a, const P* b, const Epilogue& epilogue) {
  using T = Accumulator<P>;
  const int64_t column_blocks = (columns + kBlockColumns - 1) / kBlockColumns;
  const int64_t row_blocks = (rows + kBlockRows - 1) / kBlockRows;
  const Tensor workspace = empty({torch::stable::get_num_threads() * kBlockRows * kBlockColumns}, kDtype<T>);
  for_tasks(column_blocks * row_blocks, 2.0 * rows * columns * steps, data<T>(workspace), kBlockRows * kBlockColumns,
            [&](int64_t task, T* sums) {
              const int64_t row = task / column_blocks * kBlockRows, column = task % column_blocks * kBlockColumns;
              const int64_t block_rows = std::min(kBlockRows, rows - row);
              const int64_t block_columns = std::min(kBlockColumns, columns - column);
              multiply_block<P>(block_rows, panel_count<T>(block_columns), steps, a.from(row), b + column * steps,
                                steps * kPanelWidth<T>, false, sums, kBlockColumns);
              epilogue(row, column, block_rows, block_columns, sums, kBlockColumns);
            });
}

// Conversion of values while they are packed.
template <typename T>
struct PackTransform {
  bool gelu = false, round = false;  // `round`: to bfloat16
  Vec<T> operator()(Vec<T> x) const {
    if constexpr (std::is_same_v<T, float>)
      if (round) x = Vec<float>(bfloat16_bits(x) << 16);
    return gelu ? fastssl::gelu(x) : x;
  }
};

// Transforms two vectors to pairs of bfloat16.
inline Vec<Bf16x2> transform_to_pairs(PackTransform<float> transform, Vec<float> first, Vec<float> second) {
#if defined(FASTSSL_BF16_DOT)
  return transform.gelu ? to_bf16_pairs(gelu_bf16(first), gelu_bf16(second)) : to_bf16_pairs(first, second);
#else
  return bfloat16_bits(transform(first)) | bfloat16_bits(transform(second)) << 16;
#endif
}

// Transforms a vector and stores it as bfloat16.
inline void store_transformed(PackTransform<float> transform, Vec<float> x, BFloat16* dst) {
#if defined(FASTSSL_BF16_DOT)
  const __m256bh rounded = _mm512_cvtneps_pbh(__m512(transform.gelu ? gelu_bf16(x) : x));
  std::memcpy(dst, &rounded, sizeof rounded);
#else
  store_narrow(dst, transform(x));
#endif
}

// Length of a packed row with contiguous depth, in elements: whole vectors, plus 16 so that the length is not a power
// of two, with which all rows would map to the same sets of the L1 cache.
template <typename P>
int64_t packed_row_length(int64_t depth) {
  return round_up<int64_t>(steps_of<P>(depth), 16) + 16;
}

// Packs `depth` contiguous values, padded with zeros to a whole vector.
template <typename P, typename S>
void pack_row(const S* src, int64_t depth, PackTransform<Accumulator<P>> transform, P* dst) {
  using T = Accumulator<P>;
  if (std::is_same_v<P, Bf16x2> && std::is_same_v<S, BFloat16> && !transform.gelu) {
    std::memcpy(dst, src, depth * sizeof(S));
    std::memset(reinterpret_cast<BFloat16*>(dst) + depth, 0, (round_up<int64_t>(depth, kLanes<T>) - depth) * sizeof(S));
    return;
  }
  for (int64_t d = 0; d < depth; d += kLanes<T>) {
    const Vec<T> x = load_part<T>(src + d, depth - d);
    if constexpr (std::is_same_v<P, Bf16x2>)
      store_transformed(transform, x, reinterpret_cast<BFloat16*>(dst) + d);
    else
      store(dst + d, transform(x));
  }
}

// True where A can be multiplied without packing: its values need no conversion, its rows consist of whole packed
// elements, and their stride is not a multiple of 4 kB, with which all rows would map to the same sets of the L1 cache.
template <typename P, typename S>
bool is_usable_in_place(int64_t stride, int64_t depth, PackTransform<Accumulator<P>> transform) {
  constexpr bool kSameDtype = std::is_same_v<P, S> || (std::is_same_v<P, Bf16x2> && std::is_same_v<S, BFloat16>);
  const bool is_whole = depth % kDepthPerElement<P> == 0 && stride % kDepthPerElement<P> == 0;
  return kSameDtype && is_whole && !transform.gelu && !transform.round && stride * int64_t(sizeof(S)) % 4096 != 0;
}

// Packs A from [rows, depth] with contiguous depth, or returns A itself where is_usable_in_place is true.
template <typename P, typename S>
PackedA<P> pack_a(const S* src, int64_t src_stride, int64_t rows, int64_t depth,
                  PackTransform<Accumulator<P>> transform, P* dst) {
  if (is_usable_in_place<P, S>(src_stride, depth, transform)) {
    const int64_t step = src_stride / kDepthPerElement<P>;
    return {reinterpret_cast<const P*>(src), kTileRows * step, step, 1};
  }
  const int64_t stride = packed_row_length<P>(depth);
  torch::stable::parallel_for(0, rows, grain(depth), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) pack_row(src + r * src_stride, depth, transform, dst + r * stride);
  });
  return {dst, kTileRows * stride, stride, 1};
}

// Packs B from its transpose with contiguous depth: [columns, depth] -> [columns / kPanelWidth][steps][kPanelWidth].
template <typename P, typename S>
void pack_b(const S* src, int64_t src_stride, int64_t columns, int64_t depth, PackTransform<Accumulator<P>> transform,
            P* dst) {
  using T = Accumulator<P>;
  constexpr int64_t n = kLanes<T>;
  const int64_t steps = steps_of<P>(depth), stride = packed_row_length<P>(depth);
  const Tensor workspace = empty({torch::stable::get_num_threads() * n * stride}, kDtype<T>);
  for_tasks(panel_count<T>(columns), 1e9, data<T>(workspace), n * stride, [&](int64_t panel, T* rows) {
    for (int64_t lane = 0; lane < kPanelWidth<T>; lane += n) {
      const int64_t first = panel * kPanelWidth<T> + lane;
      for (int64_t i = 0; i < n; ++i)
        if (first + i < columns)
          pack_row(src + (first + i) * src_stride, depth, transform, reinterpret_cast<P*>(rows + i * stride));
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

// Packs a step of `lanes` lanes, from one row of the depth or, for pairs, from two, and adds the unconverted values to
// `sums`.
template <typename P, typename S>
inline void pack_step(const S* first, const S* second, int64_t lanes, PackTransform<Accumulator<P>> transform, P* dst,
                      Vec<Accumulator<P>>* sums) {
  using T = Accumulator<P>;
#pragma GCC unroll 6
  for (int64_t lane = 0; lane < kLaneGroup; lane += kLanes<T>) {
    if (lane >= lanes) break;
    const Vec<T> x = load_part<T>(first + lane, lanes - lane);
    Vec<T> y{};
    if constexpr (std::is_same_v<P, Bf16x2>) {
      if (second) y = load_part<T>(second + lane, lanes - lane);
      const bool exact = std::is_same_v<S, BFloat16> && !transform.gelu;
      store(dst + lane, exact ? exact_pairs(x, y) : transform_to_pairs(transform, x, y));
    } else {
      store(dst + lane, transform(x));
    }
    sums[lane / kLanes<T>] += x + y;
  }
}

// Packs a matrix with contiguous lanes: [depth, lanes] -> [lanes / kWidth][steps][kWidth], with kWidth = kTileRows for
// A and kPanelWidth for B. `totals`, unless null, receives the sum of each lane over the depth. Tasks are ranges of the
// depth, so that each thread reads whole rows.
template <int kWidth, typename P, typename S>
void pack_contiguous_lanes(const S* src, int64_t src_stride, int64_t lanes, int64_t depth,
                           PackTransform<Accumulator<P>> transform, P* dst, double* totals = nullptr) {
  using T = Accumulator<P>;
  constexpr int64_t kVectors = kLaneGroup / kLanes<T>;
  constexpr int64_t kSteps = 16;  // packed before they are copied, because loading a value just stored is slow
  const int64_t steps = steps_of<P>(depth), tasks = (steps + kSteps - 1) / kSteps;
  const Tensor workspace = empty({totals ? tasks * lanes : 0}, kDtype<T>);
  T* task_sums = data<T>(workspace);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    P rows[kSteps][kLaneGroup] = {};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t step = task * kSteps, task_steps = std::min(kSteps, steps - step);
      for (int64_t first = 0; first < lanes; first += kLaneGroup) {
        const int64_t group_lanes = std::min(kLaneGroup, lanes - first);
        Vec<T> sums[kVectors] = {};
        for (int64_t s = 0; s < task_steps; ++s) {
          const int64_t d = (step + s) * kDepthPerElement<P>;
          const S* row = src + d * src_stride + first;
          const S* next = d + 1 < depth ? row + src_stride : nullptr;
          if (group_lanes == kLaneGroup && next)  // the common case: the compiler unrolls the constant count
            pack_step<P>(row, row + src_stride, kLaneGroup, transform, rows[s], sums);
          else
            pack_step<P>(row, next, group_lanes, transform, rows[s], sums);
        }
        for (int64_t lane = 0; totals && lane < group_lanes; lane += kLanes<T>)
          store_part<T>(task_sums + task * lanes + first + lane, sums[lane / kLanes<T>], group_lanes - lane);
        for (int64_t lane = 0; lane < group_lanes; lane += kWidth)
          for (int64_t s = 0; s < task_steps; ++s)
            std::memcpy(dst + (first + lane) * steps + (step + s) * kWidth, rows[s] + lane, kWidth * sizeof(P));
      }
    }
  });
  if (totals) {
    std::fill(totals, totals + lanes, 0.0);
    for (int64_t task = 0; task < tasks; ++task)
      for (int64_t lane = 0; lane < lanes; ++lane) totals[lane] += task_sums[task * lanes + lane];
  }
}

}  // namespace fastssl
