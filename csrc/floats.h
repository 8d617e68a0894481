// bfloat16 by integer arithmetic, which compilers vectorise: the same on the CPU and on a GPU. No torch in here, so
// that a kernel can be compiled, and its tests run, without it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTSSL_BOTH __host__ __device__  // a function of both sides
#else
#define FASTSSL_BOTH
#endif

namespace fastssl {

// __builtin_bit_cast is what std::bit_cast calls; device code may not call the latter.
FASTSSL_BOTH inline float bfloat16_to_float(uint16_t bits) { return __builtin_bit_cast(float, uint32_t(bits) << 16); }

// Rounds to nearest even, keeps NaN a NaN.
FASTSSL_BOTH inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t nan = 0x7fc0;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

}  // namespace fastssl
