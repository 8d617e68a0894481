// Residual addition followed by layer norm, forward and backward (fastssl/ops/norm.py).
//
// Bound by memory bandwidth, so each row is read once: the sum, its moments and the normalised row, in the dtype of the
// next matrix product, are computed while the row is in the L1 cache. The variance is computed from the centred row,
// because E[x²] − mean² would lose precision by cancellation.
#include "rows.h"

#include <array>
#include <optional>
#include <tuple>

namespace fastssl {
namespace {

// [B, L, D] with contiguous rows.
Tensor with_contiguous_rows(const Tensor& x) { return x.size(2) == 1 || x.stride(2) == 1 ? x : as_contiguous(x); }

// [B, L, D] with contiguous rows, converted where its compute type is not W (double beside float, which is rare).
template <typename W>
Tensor rows_of(const Tensor& x) {
  const bool is_double = x.scalar_type() == ScalarType::Double;
  return with_contiguous_rows(is_double == std::is_same_v<W, double> ? x : as_dtype(x, kDtype<W>));
}

// A contiguous vector [D] of type W.
template <typename W>
Tensor vector_of(const Tensor& x) {
  return as_contiguous(as_dtype(x, kDtype<W>));
}

// Calls body(T{}) with the type of a dtype, for dtypes whose compute type is W.
template <typename W, typename Body>
void with_type_of(ScalarType dtype, const Body& body) {
  with_float_type(dtype, "residual_norm: every tensor", [&](auto type) {
    if constexpr (std::is_same_v<ComputeType<decltype(type)>, W>) body(type);
  });
}

// Two sums over a row, like sum_over: term(V{}, i) returns a pair.
template <typename W, typename Term>
std::pair<double, double> sums_over(int64_t n, Term term) {
  constexpr int64_t kLane = kLanes<W>, kStep = 2 * kLane, kBlock = 128 * kStep;
  double first = 0, second = 0;
  int64_t i = 0;
  while (i + kLane <= n) {
    const int64_t end = std::min(i + kBlock, n);
    Vec<W> firsts[2] = {}, seconds[2] = {};
    const auto accumulate = [&](int v, int64_t index) {
      const auto [first_term, second_term] = term(Vec<W>{}, index);
      firsts[v] += first_term, seconds[v] += second_term;
    };
    for (; i + kStep <= end; i += kStep) accumulate(0, i), accumulate(1, i + kLane);
    for (; i + kLane <= end; i += kLane) accumulate(0, i);
    first += sum<W>(firsts[0] + firsts[1]), second += sum<W>(seconds[0] + seconds[1]);
  }
  for (; i < n; ++i) {
    const auto [first_term, second_term] = term(W{}, i);
    first += first_term, second += second_term;
  }
  return {first, second};
}

// ---- Forward

// Writes x + delta, rounded, to `total`, and the rounded values to `row`, which may be the same memory. Returns their
// sum.
template <typename S, typename D, typename W>
double add_row(const S* x, const D* delta, S* total, W* row, int64_t n) {
  return sum_over<W>(n, [=](auto zero, int64_t i) {
    using V = decltype(zero);
    const V exact = read<V>(x + i) + read<V>(delta + i);
    write(total + i, exact);
    if constexpr (std::is_same_v<S, W>) {
      if (row != total) write(row + i, exact);
      return exact;
    } else {
      const V rounded = read<V>(total + i);
      write(row + i, rounded);
      return rounded;
    }
  });
}

// Like add_row without delta: x is the total. If S is W, `row` is not written, because it is x.
template <typename S, typename W>
double sum_row(const S* x, W* row, int64_t n) {
  return sum_over<W>(n, [=](auto zero, int64_t i) {
    using V = decltype(zero);
    const V value = read<V>(x + i);
    if constexpr (!std::is_same_v<S, W>) write(row + i, value);
    return value;
  });
}

template <typename W>
struct Moments {
  W mean, mean_low, rstd;  // mean_low: rounding error of `mean`, large in a row far from zero
};

template <typename W>
Moments<W> moments_of(const W* row, double sum, double eps, int64_t n) {
  const W centre = W(sum / n);
  const auto [offset, squares] = sums_over<W>(n, [=](auto zero, int64_t i) {
    const auto centred = read<decltype(zero)>(row + i) - centre;
    return std::pair(centred, centred * centred);
  });
  const double mean = centre + offset / n, variance = std::max(0.0, squares - offset * offset / n) / n;
  return {W(mean), W(mean - W(mean)), W(1 / std::sqrt(variance + eps))};
}

template <typename W, typename O>
[[gnu::noinline]] void normalise(const W* row, Moments<W> moments, const W* weight, const W* bias, O* dst, int64_t n) {
  const auto [mean, mean_low, rstd] = moments;
  if constexpr (std::is_same_v<ComputeType<O>, W>)
    for_each<W>(n, [=](auto zero, int64_t i) {
      using V = decltype(zero);
      write(dst + i, ((read<V>(row + i) - mean) - mean_low) * rstd * read<V>(weight + i) + read<V>(bias + i));
    });
  else
    for (int64_t i = 0; i < n; ++i)
      dst[i] = from_float<O>(ComputeType<O>(((row[i] - mean) - mean_low) * rstd * weight[i] + bias[i]));
}

using Normed = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // sum, normed, mean, rstd

template <typename S, typename D>
Normed forward(const Tensor& x, const std::optional<Tensor>& delta, const Tensor& weight, const Tensor& bias,
               double eps, ScalarType dtype) {
  using W = ComputeType<S>;
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(2);
  Tensor totals = delta ? empty({batch, length, width}, kDtype<S>) : empty({0}, kDtype<S>);
  Tensor normed = empty({batch, length, width}, dtype);
  Tensor means = empty({batch, length}, kDtype<W>), rstds = empty({batch, length}, kDtype<W>);
  const Rows<S> inputs(x);
  const Rows<D> deltas(delta ? *delta : x);
  W *mean = data<W>(means), *rstd = data<W>(rstds);
  const W *factors = data<W>(weight), *offsets = data<W>(bias);
  torch::stable::parallel_for(0, batch * length, grain(4 * width), [&](int64_t begin, int64_t end) {
    const bool non_temporal = delta && prefers_non_temporal(totals);
    std::vector<W> wide_row(std::is_same_v<S, W> ? 0 : width);
    std::vector<S> scratch(non_temporal ? width : 0);
    for (int64_t i = begin; i < end; ++i) {
      const S* input = inputs.row(i / length, i % length);
      S* total_row = delta ? non_temporal ? scratch.data() : data<S>(totals) + i * width : const_cast<S*>(input);
      W* row = std::is_same_v<S, W> ? reinterpret_cast<W*>(total_row) : wide_row.data();
      const double sum = delta ? add_row(input, deltas.row(i / length, i % length), total_row, row, width)
                               : sum_row(input, row, width);
      const Moments<W> moments = moments_of(row, sum, eps, width);
      mean[i] = moments.mean, rstd[i] = moments.rstd;
      with_float_type(dtype, "residual_norm: dtype", [&](auto type) {
        using O = decltype(type);
        normalise(row, moments, factors, offsets, data<O>(normed) + i * width, width);
      });
      if (non_temporal) copy_non_temporal(data<S>(totals) + i * width, total_row, width * sizeof(S));
    }
    fence_non_temporal();
  });
  return {totals, normed, means, rstds};
}

Normed residual_norm_fwd(Tensor x, std::optional<Tensor> delta, Tensor weight, Tensor bias, double eps,
                         ScalarType dtype) {
  std::optional<Normed> result;
  with_compute_type(x, [&](auto compute) {
    using W = decltype(compute);
    x = with_contiguous_rows(x);
    if (delta) delta = rows_of<W>(*delta);
    weight = vector_of<W>(weight), bias = vector_of<W>(bias);
    with_type_of<W>(x.scalar_type(), [&](auto x_type) {
      using S = decltype(x_type);
      with_type_of<W>(delta ? delta->scalar_type() : kDtype<S>, [&](auto delta_type) {
        result = forward<S, decltype(delta_type)>(x, delta, weight, bias, eps, dtype);
      });
    });
  });
  return *result;
}

// ---- Backward: with x̂ = (sum − mean) · rstd and g = dnormed · weight,
//      dx = dsum + rstd · (g − mean(g) − x̂ · mean(g · x̂)),  dweight = Σ dnormed · x̂,  dbias = Σ dnormed

// Rows of a chunk, whose contributions to dweight and dbias are summed separately. It depends on the shape alone, so
// that results do not depend on the threads.
int64_t chunk_of(int64_t rows) { return std::max<int64_t>(32, (rows + 127) / 128); }

// A row of the backward pass; `upstream` is dsum, or null.
template <typename S, typename G>
struct Row {
  using W = ComputeType<S>;
  const S *total, *upstream;
  const G* dnormed;
  S* dx;
  W mean, rstd;

  // Writes dx and adds the row's contributions to dweight and dbias. One row at a time: four at a time need a fourth of
  // the loads and stores of the sums, but 16 streams of memory, which no prefetcher follows, and took 1.8 times as
  // long.
  void backward(const W* weight, W* dweight, W* dbias, int64_t n) const {
    const auto [sum, product] = sums_over<W>(n, [&](auto zero, int64_t i) {
      using V = decltype(zero);
      const V g = read<V>(dnormed + i) * read<V>(weight + i);
      return std::pair(g, g * (read<V>(total + i) - mean));
    });
    const W shift = W(sum / n * rstd), slope = W(product / n * rstd * rstd * rstd);
    for_each<W>(n, [&](auto zero, int64_t i) {
      using V = decltype(zero);
      const V dy = read<V>(dnormed + i), centred = read<V>(total + i) - mean;
      write(dweight + i, read<V>(dweight + i) + dy * (centred * rstd));
      write(dbias + i, read<V>(dbias + i) + dy);
      V value = dy * read<V>(weight + i) * rstd - shift - centred * slope;
      if (upstream) value += read<V>(upstream + i);
      write(dx + i, value);
    });
  }
};

template <typename S, typename D>
[[gnu::noinline]] void convert_row(const S* src, D* dst, int64_t n) {
  if constexpr (std::is_same_v<ComputeType<S>, ComputeType<D>>)
    for_each<ComputeType<S>>(n, [=](auto zero, int64_t i) { write(dst + i, read<decltype(zero)>(src + i)); });
  else
    for (int64_t i = 0; i < n; ++i) dst[i] = from_float<D>(ComputeType<D>(to_float(src[i])));
}

// dweight and dbias: sums over the chunks [chunks, 2, D], in order.
template <typename W>
std::tuple<Tensor, Tensor> sum_chunks(const std::vector<W>& chunk_sums, int64_t chunks, int64_t width) {
  std::vector<double> sums(2 * width);
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t d = 0; d < 2 * width; ++d) sums[d] += chunk_sums[c * 2 * width + d];
  Tensor dweight = empty({width}, kDtype<W>), dbias = empty({width}, kDtype<W>);
  std::copy_n(sums.begin(), width, data<W>(dweight));
  std::copy_n(sums.begin() + width, width, data<W>(dbias));
  return {dweight, dbias};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // dx, ddelta, dweight, dbias

template <typename S, typename G>
Gradients backward(const Tensor& dnormed, const std::optional<Tensor>& dsum, const Tensor& total, const Tensor& mean,
                   const Tensor& rstd, const Tensor& weight, ScalarType ddelta_dtype) {
  using W = ComputeType<S>;
  const int64_t batch = total.size(0), length = total.size(1), width = total.size(2), rows = batch * length;
  const bool with_ddelta = ddelta_dtype != kDtype<S>;
  Tensor dx = empty({batch, length, width}, kDtype<S>);
  Tensor ddelta = with_ddelta ? empty({batch, length, width}, ddelta_dtype) : empty({0}, ddelta_dtype);
  const Rows<S> totals(total), upstream(dsum ? *dsum : total);
  const Rows<G> gradients(dnormed);
  const W* factors = data<W>(weight);
  const int64_t chunk = chunk_of(rows), chunks = (rows + chunk - 1) / chunk;
  std::vector<W> chunk_sums(chunks * 2 * width);
  const auto row_at = [&](int64_t i) -> Row<S, G> {
    const int64_t b = i / length, n = i % length;
    const S* upstream_row = dsum ? upstream.row(b, n) : nullptr;
    const W row_mean = data<W>(mean)[i], row_rstd = data<W>(rstd)[i];
    return {totals.row(b, n), upstream_row, gradients.row(b, n), data<S>(dx) + i * width, row_mean, row_rstd};
  };
  torch::stable::parallel_for(0, chunks, grain(4 * chunk * width), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      W *dweight = chunk_sums.data() + c * 2 * width, *dbias = dweight + width;
      const int64_t last = std::min(rows, (c + 1) * chunk);
      for (int64_t i = c * chunk; i < last; ++i) {
        const Row<S, G> row = row_at(i);
        row.backward(factors, dweight, dbias, width);
        if (with_ddelta)
          with_float_type(ddelta_dtype, "residual_norm: delta", [&](auto type) {
            using D = decltype(type);
            convert_row(row.dx, data<D>(ddelta) + i * width, width);
          });
      }
    }
  });
  return std::tuple_cat(std::tuple(dx, ddelta), sum_chunks(chunk_sums, chunks, width));
}

Gradients residual_norm_bwd(Tensor dnormed, std::optional<Tensor> dsum, Tensor total, Tensor mean, Tensor rstd,
                            Tensor weight, ScalarType ddelta_dtype) {
  std::optional<Gradients> result;
  with_compute_type(total, [&](auto compute) {
    using W = decltype(compute);
    total = with_contiguous_rows(total), dnormed = rows_of<W>(dnormed), weight = vector_of<W>(weight);
    if (dsum) dsum = with_contiguous_rows(as_dtype(*dsum, total.scalar_type()));
    with_type_of<W>(total.scalar_type(), [&](auto source) {
      with_type_of<W>(dnormed.scalar_type(), [&](auto gradient) {
        result = backward<decltype(source), decltype(gradient)>(dnormed, dsum, total, mean, rstd, weight, ddelta_dtype);
      });
    });
  });
  return *result;
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("residual_norm_fwd", TORCH_BOX(&fastssl::residual_norm_fwd));
  m.impl("residual_norm_bwd", TORCH_BOX(&fastssl::residual_norm_bwd));
}
