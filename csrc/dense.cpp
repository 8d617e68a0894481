// The linear layer, forward and backward, with its bias and the GELU before it (fastssl/ops/dense.py).
#include "product.h"

#include <optional>

namespace fastssl {
namespace {

// Weights as they are multiplied: rounded to the dtype of the activations.
template <typename S, typename W>
constexpr Change<Sum<Packed<S>>> kWeight{false, std::is_same_v<S, BFloat16> && std::is_same_v<W, float>};

// Calls body(S{}, W{}) with the types of the activations and of the weight: the same, or bfloat16 beside float masters.
template <typename Body>
void with_types(const Tensor& x, const Tensor& weight, const Body& body) {
  with_float_type(x.scalar_type(), "linear: x", [&](auto type) {
    using S = decltype(type);
    if (weight.scalar_type() == kDtype<S>) return body(S{}, S{});
    STD_TORCH_CHECK((std::is_same_v<S, BFloat16> && weight.scalar_type() == ScalarType::Float),
                    "linear: weight must have x's dtype, or be float32 where that is bfloat16");
    if constexpr (std::is_same_v<S, BFloat16>) body(S{}, float{});
  });
}

template <typename P>
Tensor packed(int64_t lanes, int64_t length) {
  return empty({lanes * length}, std::is_same_v<P, Pair> ? ScalarType::Float : kDtype<Sum<P>>);
}

// Writes make(row, column, sums, n) for every vector of a block; n of them are inside.
template <typename T, typename S, typename Make>
void write_block(S* to, int64_t stride, int64_t row, int64_t column, int64_t high, int64_t wide, const T* sums,
                 int64_t sums_stride, const Make& make) {
  for (int64_t i = 0; i < high; ++i)
    for (int64_t j = 0; j < wide; j += kLanes<T>)
      store_part<T>(to + (row + i) * stride + column + j,
                    make(row + i, column + j, load(sums + i * sums_stride + j), wide - j), wide - j);
}

// Of GELU; of pairs for a gradient that is rounded to bfloat16.
template <typename P>
Vec<Sum<P>> slope(Vec<Sum<P>> x) {
#if defined(FASTSSL_PAIRS)
  if constexpr (std::is_same_v<P, Pair>) return gelu_slope_rounded(x);
#endif
  return gelu_slope(x);
}

// y[M, N] = gelu(x)[M, K] weight[N, K]ᵀ + bias
Tensor linear_fwd(Tensor x, Tensor weight, std::optional<Tensor> bias, bool gelu) {
  const int64_t rows = x.size(0), depth = x.size(1), columns = weight.size(0);
  Tensor y = empty({rows, columns}, x.scalar_type());
  with_types(x, weight, [&](auto x_type, auto weight_type) {
    using S = decltype(x_type);
    using W = decltype(weight_type);
    using P = Packed<S>;
    using T = Sum<P>;
    const bool there = lies_packed<P, S>(x.stride(0), depth, Change<T>{gelu});
    const Tensor left = packed<P>(there ? 0 : rows, row_of<P>(depth));
    const Tensor right = packed<P>(panels_of<T>(columns) * kPanel<T>, steps_of<P>(depth));
    const auto a = pack_left<P>(data<S>(x), x.stride(0), rows, depth, Change<T>{gelu}, data<P>(left));
    pack_right<P>(data<W>(weight), weight.stride(0), columns, depth, kWeight<S, W>, data<P>(right));
    const W* add = bias ? data<W>(*bias) : nullptr;
    S* to = data<S>(y);
    product<P>(rows, columns, steps_of<P>(depth), a, data<P>(right), [&](auto row, auto column, auto... block) {
      write_block<T>(to, columns, row, column, block..., [&](int64_t, int64_t n, Vec<T> sum, int64_t inside) {
        return add ? sum + load_part<T>(add + n, inside) : sum;
      });
    });
  });
  return y;
}

// dx[M, K] = dy[M, N] weight[N, K], times the slope of GELU at x where there is one
Tensor linear_dx(Tensor dy, Tensor weight, std::optional<Tensor> x) {
  const int64_t rows = dy.size(0), depth = dy.size(1), columns = weight.size(1);
  Tensor dx = empty({rows, columns}, dy.scalar_type());
  with_types(dy, weight, [&](auto x_type, auto weight_type) {
    using S = decltype(x_type);
    using W = decltype(weight_type);
    using P = Packed<S>;
    using T = Sum<P>;
    const bool there = lies_packed<P, S>(dy.stride(0), depth, Change<T>{});
    const Tensor left = packed<P>(there ? 0 : rows, row_of<P>(depth));
    const Tensor right = packed<P>(panels_of<T>(columns) * kPanel<T>, steps_of<P>(depth));
    const auto a = pack_left<P>(data<S>(dy), dy.stride(0), rows, depth, Change<T>{}, data<P>(left));
    pack_lanes<kPanel<T>, P>(data<W>(weight), weight.stride(0), columns, depth, kWeight<S, W>, data<P>(right));
    const S* at = x ? data<S>(*x) : nullptr;
    const int64_t stride = x ? x->stride(0) : 0;
    S* to = data<S>(dx);
    product<P>(rows, columns, steps_of<P>(depth), a, data<P>(right), [&](auto row, auto column, auto... block) {
      write_block<T>(to, columns, row, column, block..., [&](int64_t m, int64_t k, Vec<T> sum, int64_t inside) {
        return at ? sum * slope<P>(load_part<T>(at + m * stride + k, inside)) : sum;
      });
    });
  });
  return dx;
}

// dweight[N, K] = dy[M, N]ᵀ gelu(x)[M, K], and dbias[N] = Σ dy over M
std::tuple<Tensor, Tensor> linear_dweight(Tensor dy, Tensor x, Tensor weight, bool gelu) {
  const int64_t rows = dy.size(1), depth = dy.size(0), columns = x.size(1);
  Tensor dweight = empty({rows, columns}, weight.scalar_type()), dbias = empty({rows}, weight.scalar_type());
  with_types(x, weight, [&](auto x_type, auto weight_type) {
    using S = decltype(x_type);
    using W = decltype(weight_type);
    using P = Packed<S>;
    using T = Sum<P>;
    const int64_t steps = steps_of<P>(depth);
    const Tensor left = packed<P>(round_up<int64_t>(rows, kRows), steps), totals = empty({rows}, ScalarType::Double);
    const Tensor right = packed<P>(panels_of<T>(columns) * kPanel<T>, steps);
    pack_lanes<kRows, P>(data<S>(dy), dy.stride(0), rows, depth, Change<T>{}, data<P>(left), data<double>(totals));
    pack_lanes<kPanel<T>, P>(data<S>(x), x.stride(0), columns, depth, Change<T>{gelu}, data<P>(right));
    const Left<P> a{data<P>(left), kRows * steps, 1, kRows};
    W* to = data<W>(dweight);
    product<P>(rows, columns, steps, a, data<P>(right), [&](auto row, auto column, auto... block) {
      write_block<T>(to, columns, row, column, block..., [](int64_t, int64_t, Vec<T> sum, int64_t) { return sum; });
    });
    for (int64_t n = 0; n < rows; ++n) data<W>(dbias)[n] = from_float<W>(data<double>(totals)[n]);
  });
  return {dweight, dbias};
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&fastssl::linear_fwd));
  m.impl("linear_dx", TORCH_BOX(&fastssl::linear_dx));
  m.impl("linear_dweight", TORCH_BOX(&fastssl::linear_dweight));
}
