// Shared by all CPU kernels: dispatch on dtypes, conversion of 16-bit floats, allocation of tensors.
//
// setup.py compiles every .cpp file once per instruction set into a library of its own, and Python loads one of these
// libraries, so no kernel tests at run time which instructions the processor has. Only torch's stable ABI is used:
// docs/architecture.md gives the reasons.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "floats.h"

namespace fastssl {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline float to_float(BFloat16 x) { return bfloat16_to_float(x.x); }
inline float to_float(Half x) { return static_cast<float>(x); }
inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }

template <typename T>
inline T from_float(std::conditional_t<std::is_same_v<T, double>, double, float> x) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return BFloat16(float_to_bfloat16(x), BFloat16::from_bits());
  else
    return T(x);
}

// Calls body(T{}) with the C++ type of a floating dtype; the error names `argument`.
template <typename Body>
void with_float_type(ScalarType dtype, const char* argument, const Body& body) {
  switch (dtype) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::BFloat16: return body(BFloat16{});
    case ScalarType::Half: return body(Half{});
    default: STD_TORCH_CHECK(false, argument, " must be float32, float64, bfloat16 or float16");
  }
}

template <typename T>
constexpr ScalarType kDtype = std::is_same_v<T, float>      ? ScalarType::Float
                              : std::is_same_v<T, double>   ? ScalarType::Double
                              : std::is_same_v<T, BFloat16> ? ScalarType::BFloat16
                              : std::is_same_v<T, Half>     ? ScalarType::Half
                                                            : ScalarType::Long;

// Results from this size on are asked for in pages of 2 MB. The C library gets large blocks from the system and returns
// them, so that their first writes fault at every call, 0.5 µs for 4 kB: 38 MB take 6 ms instead of 20.
constexpr int64_t kHugePageBytes = 4 << 20;

inline void ask_for_huge_pages([[maybe_unused]] const Tensor& x) {
#if defined(__linux__)
  const int64_t bytes = x.numel() * int64_t(x.element_size()), page = 4096;
  if (bytes < kHugePageBytes) return;
  char* begin = static_cast<char*>(x.mutable_data_ptr());
  const int64_t head = -reinterpret_cast<intptr_t>(begin) & (page - 1);
  madvise(begin + head, (bytes - head) / page * page, MADV_HUGEPAGE);  // a kernel without such pages refuses: no matter
#endif
}

// An uninitialised tensor on the CPU.
inline Tensor empty_strided(const int64_t* sizes, const int64_t* strides, size_t dimensions, ScalarType dtype) {
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(dimensions), sizes, strides, code, aoti_torch_device_type_cpu(), 0, &handle));
  Tensor x(handle);
  ask_for_huge_pages(x);
  return x;
}

// An uninitialised contiguous tensor on the CPU.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[8], stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes.begin()[d], 1);
  }
  return empty_strided(sizes.begin(), strides, sizes.size(), dtype);
}

// The tensor itself where it has the dtype, and is contiguous: torch's functions take a microsecond to find that out.
inline Tensor as_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}
inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// The temperature: the value of a 0-d tensor.
inline double tau_value(const Tensor& tau) {
  double value = 0;
  with_float_type(tau.scalar_type(), "tau",
                  [&](auto type) { value = to_float(*static_cast<const decltype(type)*>(tau.const_data_ptr())); });
  return value;
}

// Calls body(T{}) with the type in which values of the tensor's dtype are computed: double for double, else float.
template <typename Body>
auto with_compute_type(const Tensor& tensor, const Body& body) {
  return tensor.scalar_type() == ScalarType::Double ? body(double{}) : body(float{});
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace fastssl
