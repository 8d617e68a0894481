// What every CPU kernel file shares: dtype dispatch, 16-bit floats, the way into torch's thread pool.
//
// Each file is compiled once per instruction set (setup.py) into its own library, and Python loads one of them, so
// nothing here asks at run time which instructions there are. Only torch's stable ABI is used: see
// docs/architecture.md for why.
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

// Calls body(T{}) with the C++ type of a floating dtype; `what` begins the error sentence.
template <typename Body>
void with_float_type(ScalarType dtype, const char* what, const Body& body) {
  switch (dtype) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::BFloat16: return body(BFloat16{});
    case ScalarType::Half: return body(Half{});
    default: STD_TORCH_CHECK(false, what, " must be float32, float64, bfloat16 or float16");
  }
}

template <typename T>
constexpr ScalarType kDtype = std::is_same_v<T, float>      ? ScalarType::Float
                              : std::is_same_v<T, double>   ? ScalarType::Double
                              : std::is_same_v<T, BFloat16> ? ScalarType::BFloat16
                              : std::is_same_v<T, Half>     ? ScalarType::Half
                                                            : ScalarType::Long;

// A new contiguous tensor on the CPU, uninitialised.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[8], stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes.begin()[d], 1);
  }
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides, code,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The value of a 0-d tensor.
inline double value_of(const Tensor& scalar) {
  double value = 0;
  with_float_type(scalar.scalar_type(), "tau", [&](auto type) {
    value = to_float(*static_cast<const decltype(type)*>(scalar.const_data_ptr()));
  });
  return value;
}

// Calls body(T{}) with the type in which an op computes: double for double, else float.
template <typename Body>
auto with_wide_type(const Tensor& tensor, const Body& body) {
  return tensor.scalar_type() == ScalarType::Double ? body(double{}) : body(float{});
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace fastssl
