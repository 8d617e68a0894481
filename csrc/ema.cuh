// The CUDA kernel of ema_update_: one launch moves all tensors of a call.
//
// Bound by memory bandwidth. A float32 parameter costs 12 bytes (read target and source, write target), 10 with a
// bfloat16 source, and 2 more for a bfloat16 shadow; the arithmetic is a handful of instructions beside that.
//
// Block b looks up chunk b: a row of the table (ema_table.h) and a range of 16,384 of its elements. Dtypes and the way
// through memory are the row's, hence uniform over the block: branches on them diverge nowhere, and float32 and float64
// targets with any sources and shadows fit into one launch. Only the target's type is a template parameter; the other
// two are a switch around the loads and around the stores, 4 + 4 cases instead of 4 * 5 kernels.
//
// A thread moves packs of 16 bytes of the target: 4 floats or 2 doubles. Sources and shadows follow with the same
// elements, 8 bytes of bfloat16, so that one index serves all three. (8 bfloat16 would fill a load of 16 bytes, but
// then neighbours' packs of the target would lie 32 bytes apart.) Threads of a warp load neighbouring packs: 512
// consecutive bytes of the target, 256 of a bfloat16 source, whole sectors in both. A thread loads kUnroll = 4 packs of
// target and of source before it uses the first, 128 bytes in flight in float32. A multiprocessor needs some 20 to
// 45 kB in flight (its share of bandwidth times latency): 2 blocks of 256 threads have that already, and registers are
// kept few enough for 4. Pointers that are not aligned, and the last elements of a tensor, go one element at a time; so
// do tensors that are stored in different orders, with a division a dimension.
//
// Nothing in here needs torch or CUDA's headers but cuda_fp16.h: tests/kernels/cuda_on_host.h runs it on a CPU.
#pragma once

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

#include <type_traits>

#include "ema_table.h"

namespace fastssl {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;  // that a multiprocessor has registers for: at most 64 a thread
constexpr int kUnroll = 4;  // packs of target and of source that a thread has in flight

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

__device__ inline float widen(Bf16 x) { return bfloat16_to_float(x.bits); }
__device__ inline float widen(Fp16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }

// Rounds to nearest even; from double by way of float, as torch does.
template <typename To, typename From>
__device__ inline To narrow(From x) {
  if constexpr (std::is_same_v<To, Bf16>)
    return {float_to_bfloat16(static_cast<float>(x))};
  else if constexpr (std::is_same_v<To, Fp16>)
    return {__half_as_ushort(__float2half_rn(static_cast<float>(x)))};
  else
    return static_cast<To>(x);
}

// Calls body(T{}) with the type of a dtype.
template <typename Body>
__device__ inline void with_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::Float: return body(float{});
    case Dtype::BFloat16: return body(Bf16{});
    case Dtype::Half: return body(Fp16{});
    default: return body(double{});
  }
}

// W elements, which one instruction loads or stores (two, for 4 doubles).
template <typename T, int W>
struct alignas(W * sizeof(T) < kWidestLoad ? W * sizeof(T) : kWidestLoad) Pack {
  T of[W];
};

// What of its row a thread holds in registers. Left in memory, the row would be read again after each store, since the
// compiler can't know that a store does not change it.
template <typename T>
struct Place {
  void *target, *source, *shadow;  // shadow: null where there is none
  Dtype source_dtype, shadow_dtype;
  T weight;
};

// Elements from `offset` on of an array in global memory. Saying so makes plain global loads and stores of them; of a
// pointer that comes from a table the compiler doesn't know it, and would have each of them find out.
template <typename T>
__device__ inline T* array_at(void* array, int64_t offset) {
  T* const first = static_cast<T*>(array) + offset;
  __builtin_assume(__isGlobal(first));
  return first;
}

// Moves U packs of W elements: the first at these offsets, the next `step` elements behind it. All loads come before
// the first use of any.
template <typename T, int W, int U>
__device__ inline void move(const Place<T>& place, Offsets at, int64_t step) {
  T* const first = array_at<T>(place.target, at.target);
  Pack<T, W> target[U], source[U];
#pragma unroll
  for (int u = 0; u < U; ++u) target[u] = *reinterpret_cast<const Pack<T, W>*>(first + u * step);
  with_type(place.source_dtype, [&](auto type) {
    using S = decltype(type);
    const S* const from = array_at<const S>(place.source, at.source);
    Pack<S, W> read[U];
#pragma unroll
    for (int u = 0; u < U; ++u) read[u] = *reinterpret_cast<const Pack<S, W>*>(from + u * step);
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int w = 0; w < W; ++w) source[u].of[w] = static_cast<T>(widen(read[u].of[w]));
  });
#pragma unroll
  for (int u = 0; u < U; ++u) {
#pragma unroll
    for (int w = 0; w < W; ++w) target[u].of[w] = lerp(target[u].of[w], source[u].of[w], place.weight);
    *reinterpret_cast<Pack<T, W>*>(first + u * step) = target[u];
  }
  if (!place.shadow) return;
  with_type(place.shadow_dtype, [&](auto type) {
    using H = decltype(type);
    H* const to = array_at<H>(place.shadow, at.shadow);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      Pack<H, W> rounded;
#pragma unroll
      for (int w = 0; w < W; ++w) rounded.of[w] = narrow<H>(target[u].of[w]);
      *reinterpret_cast<Pack<H, W>*>(to + u * step) = rounded;
    }
  });
}

template <typename T, int W>
__device__ inline void move_flat(const Place<T>& place, int64_t begin, int64_t end) {
  constexpr int64_t step = kThreads * W;
  int64_t i = begin + int64_t(threadIdx.x) * W;
  for (; i + (kUnroll - 1) * step + W <= end; i += kUnroll * step) move<T, W, kUnroll>(place, {i, i, i}, step);
  for (; i + W <= end; i += step) move<T, W, 1>(place, {i, i, i}, step);
  if constexpr (W > 1) {
    i = end - (end - begin) % W + threadIdx.x;
    if (i < end) move<T, 1, 1>(place, {i, i, i}, step);
  }
}

template <typename T, typename Index>
__device__ inline void move_strided(const Place<T>& place, const Row& row, int64_t begin, int64_t end) {
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const Offsets at = offsets_of(static_cast<Index>(i), row.dims, row.sizes, row.target_strides, row.source_strides,
                                  row.shadow_strides);
    move<T, 1, 1>(place, at, 0);
  }
}

template <typename T>
__device__ inline void move_chunk(const Row& row, int64_t begin, T weight) {
  const int64_t end = row.numel - begin < kEmaChunk ? row.numel : begin + kEmaChunk;
  const Place<T> place{row.target, row.source, row.shadow, row.source_dtype, row.shadow_dtype, weight};
  switch (row.path) {
    case Path::Packed: return move_flat<T, pack_width(sizeof(T))>(place, begin, end);
    case Path::Scalar: return move_flat<T, 1>(place, begin, end);
    case Path::Strided:
      if (row.numel <= UINT32_MAX) return move_strided<T, uint32_t>(place, row, begin, end);
      return move_strided<T, int64_t>(place, row, begin, end);
  }
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    ema_update(const Row* rows, const Chunk* chunks, float weight, double weight_of_doubles) {
  const Chunk chunk = chunks[blockIdx.x];
  const Row& row = rows[chunk.row];
  const int64_t begin = chunk.index * kEmaChunk;
  if (row.target_dtype == Dtype::Double)
    move_chunk<double>(row, begin, weight_of_doubles);
  else
    move_chunk<float>(row, begin, weight);
}

}  // namespace fastssl
