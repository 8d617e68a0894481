// Linear layer, forward and backward, with a bias and optionally GELU of its input (fastssl/ops/dense.py).
//
// Each product is one GEMM of 2 M N K operations (gemm.h). GELU is computed while x is packed; the bias, or GELU's
// derivative, is applied in the epilogue.
#include "gemm.h"

#include <optional>

namespace fastssl {
namespace {

// Transform of the weights: those in float32 are rounded to bfloat16 if the activations are bfloat16.
template <typename S, typename W>
constexpr PackTransform<Accumulator<Packed<S>>> kWeightTransform{
    false, std::is_same_v<S, BFloat16> && std::is_same_v<W, float>};

// Calls body(S{}, W{}) with the types of the activations and of the weight: the same, or bfloat16 and float.
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
Tensor empty_packed(int64_t lanes, int64_t length) {
  return empty({lanes * length}, std::is_same_v<P, Bf16x2> ? ScalarType::Float : kDtype<Accumulator<P>>);
}

// Stores value(row, column, sums, n) for each vector of a block, of which the first n lanes belong to the block.
template <typename T, typename S, typename Value>
void write_block(S* dst, int64_t stride, int64_t row, int64_t column, int64_t block_rows, int64_t block_columns,
                 const T* sums, int64_t sums_stride, const Value& value) {
  for (int64_t i = 0; i < block_rows; ++i)
    for (int64_t j = 0; j < block_columns; j += kLanes<T>)
      store_part<T>(dst + (row + i) * stride + column + j,
                    value(row + i, column + j, load(sums + i * sums_stride + j), block_columns - j), block_columns - j);
}

// Derivative of GELU; accurate to bfloat16 where the gradient is rounded to it.
template <typename P>
Vec<Accumulator<P>> activation_derivative(Vec<Accumulator<P>> x) {
#if defined(FASTSSL_BF16_DOT)
  if constexpr (std::is_same_v<P, Bf16x2>) return gelu_derivative_bf16(x);
#endif
  return gelu_derivative(x);
}

// y[M, N] = gelu(x)[M, K] weight[N, K]ᵀ + bias
Tensor linear_fwd(Tensor x, Tensor weight, std::optional<Tensor> bias, bool gelu) {
  const int64_t rows = x.size(0), depth = x.size(1), columns = weight.size(0);
  Tensor y = empty({rows, columns}, x.scalar_type());
  with_types(x, weight, [&](auto x_type, auto weight_type) {
    using S = decltype(x_type);
    using W = decltype(weight_type);
    using P = Packed<S>;
    using T = Accumulator<P>;
    const bool in_place = is_usable_in_place<P, S>(x.stride(0), depth, PackTransform<T>{gelu});
    const Tensor packed_a = empty_packed<P>(in_place ? 0 : rows, packed_row_length<P>(depth));
    const Tensor packed_b = empty_packed<P>(panel_count<T>(columns) * kPanelWidth<T>, steps_of<P>(depth));
    const auto a = pack_a<P>(data<S>(x), x.stride(0), rows, depth, PackTransform<T>{gelu}, data<P>(packed_a));
    pack_b<P>(data<W>(weight), weight.stride(0), columns, depth, kWeightTransform<S, W>, data<P>(packed_b));
    const W* bias_data = bias ? data<W>(*bias) : nullptr;
    S* dst = data<S>(y);
    gemm<P>(rows, columns, steps_of<P>(depth), a, data<P>(packed_b), [&](auto row, auto column, auto... block) {
      write_block<T>(dst, columns, row, column, block..., [&](int64_t, int64_t n, Vec<T> sum, int64_t lanes) {
        return bias_data ? sum + load_part<T>(bias_data + n, lanes) : sum;
      });
    });
  });
  return y;
}

// dx[M, K] = dy[M, N] weight[N, K], times the derivative of GELU at x if x is given
Tensor linear_dx(Tensor dy, Tensor weight, std::optional<Tensor> x) {
  const int64_t rows = dy.size(0), depth = dy.size(1), columns = weight.size(1);
  Tensor dx = empty({rows, columns}, dy.scalar_type());
  with_types(dy, weight, [&](auto x_type, auto weight_type) {
    using S = decltype(x_type);
    using W = decltype(weight_type);
    using P = Packed<S>;
    using T = Accumulator<P>;
    const bool in_place = is_usable_in_place<P, S>(dy.stride(0), depth, PackTransform<T>{});
    const Tensor packed_a = empty_packed<P>(in_place ? 0 : rows, packed_row_length<P>(depth));
    const Tensor packed_b = empty_packed<P>(panel_count<T>(columns) * kPanelWidth<T>, steps_of<P>(depth));
    const auto a = pack_a<P>(data<S>(dy), dy.stride(0), rows, depth, PackTransform<T>{}, data<P>(packed_a));
    pack_contiguous_lanes<kPanelWidth<T>, P>(data<W>(weight), weight.stride(0), columns, depth, kWeightTransform<S, W>,
                                             data<P>(packed_b));
    const S* inputs = x ? data<S>(*x) : nullptr;
    const int64_t stride = x ? x->stride(0) : 0;
    S* dst = data<S>(dx);
    gemm<P>(rows, columns, steps_of<P>(depth), a, data<P>(packed_b), [&](auto row, auto column, auto... block) {
      write_block<T>(dst, columns, row, column, block..., [&](int64_t m, int64_t k, Vec<T> sum, int64_t lanes) {
        return inputs ? sum * activation_derivative<P>(load_part<T>(inputs + m * stride + k, lanes)) : sum;
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
    using T = Accumulator<P>;
    const int64_t steps = steps_of<P>(depth);
    const Tensor packed_a = empty_packed<P>(round_up<int64_t>(rows, kTileRows), steps);
    const Tensor totals = empty({rows}, ScalarType::Double);
    const Tensor packed_b = empty_packed<P>(panel_count<T>(columns) * kPanelWidth<T>, steps);
    pack_contiguous_lanes<kTileRows, P>(data<S>(dy), dy.stride(0), rows, depth, PackTransform<T>{}, data<P>(packed_a),
                                        data<double>(totals));
    pack_contiguous_lanes<kPanelWidth<T>, P>(data<S>(x), x.stride(0), columns, depth, PackTransform<T>{gelu},
                                             data<P>(packed_b));
    const PackedA<P> a{data<P>(packed_a), kTileRows * steps, 1, kTileRows};
    W* dst = data<W>(dweight);
    gemm<P>(rows, columns, steps, a, data<P>(packed_b), [&](auto row, auto column, auto... block) {
      write_block<T>(dst, columns, row, column, block..., [](int64_t, int64_t, Vec<T> sum, int64_t) { return sum; });
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
