// Enough of CUDA to compile a kernel header with a C++ compiler and run it on a CPU, one thread after the other.
//
// For kernels whose threads do not wait for each other: __syncthreads and shuffles are left out, so that a kernel which
// needs them does not compile. Memory order and speed are not modelled; indices, bounds, alignment and arithmetic are
// the kernel's own, so AddressSanitizer and UndefinedBehaviorSanitizer see what they would do on a device.
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
inline Index thread, block;  // of the one thread that runs

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
