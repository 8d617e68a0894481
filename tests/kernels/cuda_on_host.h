// The part of CUDA that is needed to compile a kernel with a C++ compiler and to run its threads on a CPU, one after
// the other.
//
// For kernels whose threads are independent: __syncthreads and shuffles are not defined, so that a kernel that uses
// them does not compile. Memory order and speed are not modelled; indices, bounds, alignment and arithmetic are those
// of the device, so AddressSanitizer and UndefinedBehaviorSanitizer find the kernel's errors.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __builtin_assume(...)

namespace host {

struct Index {
  unsigned x;
};
inline Index thread, block;  // of the running thread

struct Half {
  uint16_t bits;
};

// kernel<<<blocks, threads>>>(args...)
template <typename Kernel, typename... Args>
void launch(Kernel kernel, unsigned blocks, unsigned threads, Args... args) {
  for (block.x = 0; block.x < blocks; ++block.x)
    for (thread.x = 0; thread.x < threads; ++thread.x) kernel(args...);
}

}  // namespace host

#define threadIdx host::thread
#define blockIdx host::block

inline host::Half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(host::Half x) { return x.bits; }
inline float __half2float(host::Half x) { return torch::headeronly::detail::fp16_ieee_to_fp32_value(x.bits); }
inline host::Half __float2half_rn(float x) { return {torch::headeronly::detail::fp16_ieee_from_fp32_value(x)}; }
