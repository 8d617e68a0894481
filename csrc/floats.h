// Conversion between bfloat16 and float32 in integer arithmetic, which compilers vectorise: the same code on the CPU
// and on a GPU. Includes nothing of torch, so that CUDA kernels and their tests compile without torch.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTSSL_HOST_DEVICE __host__ __device__
#else
#define FASTSSL_HOST_DEVICE
#endif

namespace fastssl {

// __builtin_bit_cast because std::bit_cast is a host function, which device code cannot call.
FASTSSL_HOST_DEVICE inline float bfloat16_to_float(uint16_t bits) {
  return __builtin_bit_cast(float, uint32_t(bits) << 16);
}

// Rounds to nearest even; a NaN stays a NaN.
FASTSSL_HOST_DEVICE inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t nan = 0x7fc0;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

}  // namespace fastssl
