// GELU, and its gradient together with GELU itself (fastssl/ops/gelu.py).
//
// Bound by memory bandwidth where the result is rounded to 16 bits, else by one exponential and one division a value.
#include "gelu.h"
#include "avx512_bf16.h"
#include "rows.h"

namespace fastssl {
namespace {

template <typename T>
struct Gelu {
  Vec<T> value, derivative;
};

// GELU and its derivative; accurate to bfloat16 where they are rounded to it.
template <typename S>
inline Gelu<ComputeType<S>> gelu_and_derivative(Vec<ComputeType<S>> x) {
  constexpr float kDensity = 0.3989422804f;  // of the normal distribution at 0
#if defined(FASTSSL_BF16_DOT)
  if constexpr (std::is_same_v<S, BFloat16>) {
    const NormalBf16 n = normal_bf16(x);
    return {x * n.distribution, n.distribution + x * n.exponential * kDensity};
  }
#endif
  if constexpr (std::is_same_v<S, double>) {
    return {gelu(x), gelu_derivative(x)};
  } else {
    const Normal n = normal(x);
    return {x * n.distribution, n.distribution + x * n.exponential * kDensity};
  }
}

// Calls body(S{}, row) for each row of a matrix [M, K] with contiguous rows.
template <typename Body>
void for_rows(const Tensor& x, const Body& body) {
  with_float_type(x.scalar_type(), "gelu: x", [&](auto type) {
    torch::stable::parallel_for(0, x.size(0), grain(x.size(1)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) body(type, row);
    });
  });
}

Tensor gelu_fwd(Tensor x) {
  const int64_t width = x.size(1), stride = x.stride(0);
  Tensor y = empty({x.size(0), width}, x.scalar_type());
  for_rows(x, [&](auto type, int64_t row) {
    using S = decltype(type);
    using T = ComputeType<S>;
    const S* src = data<S>(x) + row * stride;
    S* dst = data<S>(y) + row * width;
    for (int64_t k = 0; k < width; k += kLanes<T>)
      store_part<T>(dst + k, gelu_and_derivative<S>(load_part<T>(src + k, width - k)).value, width - k);
  });
  return y;
}

Tensor gelu_bwd_(Tensor dy, Tensor x) {
  const int64_t width = x.size(1), stride = x.stride(0), dy_stride = dy.stride(0);
  Tensor y = empty({x.size(0), width}, x.scalar_type());
  for_rows(x, [&](auto type, int64_t row) {
    using S = decltype(type);
    using T = ComputeType<S>;
    const S* src = data<S>(x) + row * stride;
    S* gradient = data<S>(dy) + row * dy_stride;
    S* dst = data<S>(y) + row * width;
    for (int64_t k = 0; k < width; k += kLanes<T>) {
      const Gelu<T> g = gelu_and_derivative<S>(load_part<T>(src + k, width - k));
      store_part<T>(gradient + k, load_part<T>(gradient + k, width - k) * g.derivative, width - k);
      store_part<T>(dst + k, g.value, width - k);
    }
  });
  return y;
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("gelu_fwd", TORCH_BOX(&fastssl::gelu_fwd));
  m.impl("gelu_bwd_", TORCH_BOX(&fastssl::gelu_bwd_));
}
