// CUDA kernel of ema_update_: one launch updates all tensors of a call.
//
// Bound by memory bandwidth. A float32 parameter costs 12 bytes (read target and source, write target), 10 with a
// bfloat16 source, and 2 more for a bfloat16 shadow; the arithmetic takes a few instructions.
//
// Block b processes chunk b: 16,384 elements of one row of the table (ema_table.h). Dtypes and memory layout belong to
// the row and are uniform over the block, so branches on them do not diverge, and float32 and float64 targets with any
// sources and shadows fit into one launch. Only the target's dtype is a template parameter; the other two are switches
// around the loads and the stores, 4 + 4 cases instead of 4 * 5 kernels.
//
// A thread loads packs of 16 bytes of the target: 4 floats or 2 doubles. Packs of sources and shadows have the same
// number of elements (8 bytes of bfloat16), so that one index serves all three. (8 bfloat16 would fill a load of 16
// bytes, but then the packs of neighbouring threads in the target would be 32 bytes apart.) The threads of a warp load
// neighbouring packs: 512 consecutive bytes of the target, 256 of a bfloat16 source, whole sectors in both. A thread
// loads kUnroll = 4 packs of target and of source before it uses the first: 128 bytes in flight in float32. A
// multiprocessor needs 20 to 45 kB in flight (its part of the bandwidth times the latency); 2 blocks of 256 threads
// provide that, and the number of registers allows 4. Unaligned tensors and the last elements of a tensor are processed
// one element at a time; so are tensors with different memory layouts, with one division per dimension.
//
// Includes nothing of torch, and of CUDA's headers only cuda_fp16.h, so that tests/kernels/cuda_on_host.h can run it on
// a CPU.
#pragma once

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

#include <type_traits>

#include "ema_table.h"

namespace fastssl {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;  // per multiprocessor: at most 64 registers per thread
constexpr int kUnroll = 4;  // packs of target and of source in flight per thread

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

// Rounds to nearest even; double to 16 bits by way of float, as torch does.
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

// W elements, loaded or stored by one instruction (two, for 4 doubles).
template <typename T, int W>
struct alignas(W * sizeof(T) < kWidestLoad ? W * sizeof(T) : kWidestLoad) Pack {
  T values[W];
};

// The fields of a row that a thread keeps in registers. The compiler cannot prove that a store to a tensor leaves the
// row unchanged, and would read it from memory again after each store.
template <typename T>
struct Tensors {
  void *target, *source, *shadow;  // shadow: null if there is none
  Dtype source_dtype, shadow_dtype;
  T weight;
};

// The address of element `offset` of an array in global memory. The assumption makes the compiler emit global loads and
// stores: for a pointer read from a table it would emit generic ones, which determine the address space at run time.
template <typename T>
__device__ inline T* array_at(void* array, int64_t offset) {
  T* const first = static_cast<T*>(array) + offset;
  __builtin_assume(__isGlobal(first));
  return first;
}

// Updates U packs of W elements, `step` elements apart; `offsets` are those of the first. All loads precede the first
// use.
template <typename T, int W, int U>
__device__ inline void update(const Tensors<T>& tensors, Offsets offsets, int64_t step) {
  T* const first = array_at<T>(tensors.target, offsets.target);
  Pack<T, W> target[U], source[U];
#pragma unroll
  for (int u = 0; u < U; ++u) target[u] = *reinterpret_cast<const Pack<T, W>*>(first + u * step);
  with_type(tensors.source_dtype, [&](auto type) {
    using S = decltype(type);
    const S* const source_data = array_at<const S>(tensors.source, offsets.source);
    Pack<S, W> loaded[U];
#pragma unroll
    for (int u = 0; u < U; ++u) loaded[u] = *reinterpret_cast<const Pack<S, W>*>(source_data + u * step);
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int w = 0; w < W; ++w) source[u].values[w] = static_cast<T>(widen(loaded[u].values[w]));
  });
#pragma unroll
  for (int u = 0; u < U; ++u) {
#pragma unroll
    for (int w = 0; w < W; ++w) target[u].values[w] = lerp(target[u].values[w], source[u].values[w], tensors.weight);
    *reinterpret_cast<Pack<T, W>*>(first + u * step) = target[u];
  }
  if (!tensors.shadow) return;
  with_type(tensors.shadow_dtype, [&](auto type) {
    using H = decltype(type);
    H* const shadow_data = array_at<H>(tensors.shadow, offsets.shadow);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      Pack<H, W> rounded;
#pragma unroll
      for (int w = 0; w < W; ++w) rounded.values[w] = narrow<H>(target[u].values[w]);
      *reinterpret_cast<Pack<H, W>*>(shadow_data + u * step) = rounded;
    }
  });
}

template <typename T, int W>
__device__ inline void update_flat(const Tensors<T>& tensors, int64_t begin, int64_t end) {
  constexpr int64_t step = kThreads * W;
  int64_t i = begin + int64_t(threadIdx.x) * W;
  for (; i + (kUnroll - 1) * step + W <= end; i += kUnroll * step) update<T, W, kUnroll>(tensors, {i, i, i}, step);
  for (; i + W <= end; i += step) update<T, W, 1>(tensors, {i, i, i}, step);
  if constexpr (W > 1) {
    i = end - (end - begin) % W + threadIdx.x;
    if (i < end) update<T, 1, 1>(tensors, {i, i, i}, step);
  }
}

template <typename T, typename Index>
__device__ inline void update_strided(const Tensors<T>& tensors, const Row& row, int64_t begin, int64_t end) {
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const Offsets offsets = offsets_of(static_cast<Index>(i), row.dims, row.sizes, row.target_strides,
                                       row.source_strides, row.shadow_strides);
    update<T, 1, 1>(tensors, offsets, 0);
  }
}

template <typename T>
__device__ inline void update_chunk(const Row& row, int64_t begin, T weight) {
  const int64_t end = row.numel - begin < kEmaChunk ? row.numel : begin + kEmaChunk;
  const Tensors<T> tensors{row.target, row.source, row.shadow, row.source_dtype, row.shadow_dtype, weight};
  switch (row.path) {
    case Path::Packed: return update_flat<T, pack_width(sizeof(T))>(tensors, begin, end);
    case Path::Scalar: return update_flat<T, 1>(tensors, begin, end);
    case Path::Strided:
      if (row.numel <= UINT32_MAX) return update_strided<T, uint32_t>(tensors, row, begin, end);
      return update_strided<T, int64_t>(tensors, row, begin, end);
  }
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    ema_update(const Row* rows, const Chunk* chunks, float weight, double double_weight) {
  const Chunk chunk = chunks[blockIdx.x];
  const Row& row = rows[chunk.row];
  const int64_t begin = chunk.index * kEmaChunk;
  if (row.target_dtype == Dtype::Double)
    update_chunk<double>(row, begin, double_weight);
  else
    update_chunk<float>(row, begin, weight);
}

}  // namespace fastssl
