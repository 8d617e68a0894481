// The residual addition and the layer norm behind it, both ways.
//
// Bound by memory bandwidth, so a row is read once: its sum, its moments and what the next matrix product wants of it,
// in that product's dtype, are made while it is in the L1 cache. The mean is taken first and the variance of what then
// remains, because E[x²] − mean² would cancel.
#include "rows.h"

#include <array>
#include <optional>
#include <tuple>

namespace fastssl {
namespace {

// Rows [B, L, D] whose values lie side by side.
Tensor side_by_side(const Tensor& x) {
  return x.size(2) == 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

// The same in another dtype where it is not computed in W: double beside float, which is rare.
template <typename W>
Tensor computed_in(const Tensor& x) {
  const bool is_double = x.scalar_type() == ScalarType::Double;
  return side_by_side(is_double == std::is_same_v<W, double> ? x : torch::stable::to(x, kDtype<W>));
}

// A vector [D] as W.
template <typename W>
Tensor vector_of(const Tensor& x) {
  return torch::stable::contiguous(x.scalar_type() == kDtype<W> ? x : torch::stable::to(x, kDtype<W>));
}

// Calls body(T{}) where values of a dtype are computed in W.
template <typename W, typename Body>
void with_type_in(ScalarType dtype, const Body& body) {
  with_float_type(dtype, "residual_norm: every tensor", [&](auto type) {
    if constexpr (std::is_same_v<Wide<decltype(type)>, W>) body(type);
  });
}

// Two sums over a row, as sum_over makes one: term(V{}, i) gives a pair.
template <typename W, typename Term>
std::pair<double, double> sums_over(int64_t n, Term term) {
  constexpr int64_t kLane = kLanes<W>, kStep = 2 * kLane, kBlock = 128 * kStep;
  double first = 0, second = 0;
  int64_t i = 0;
  while (i + kLane <= n) {
    const int64_t end = std::min(i + kBlock, n);
    Vec<W> firsts[2] = {}, seconds[2] = {};
    const auto add = [&](int v, int64_t from) {
      const auto [one, other] = term(Vec<W>{}, from);
      firsts[v] += one, seconds[v] += other;
    };
    for (; i + kStep <= end; i += kStep) add(0, i), add(1, i + kLane);
    for (; i + kLane <= end; i += kLane) add(0, i);
    first += sum<W>(firsts[0] + firsts[1]), second += sum<W>(seconds[0] + seconds[1]);
  }
  for (; i < n; ++i) {
    const auto [one, other] = term(W{}, i);
    first += one, second += other;
  }
  return {first, second};
}

// ---- Forward

// Writes x + delta, rounded, to `total` and as it then is to `row`, which may be the same; returns its sum.
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

// The same without delta; x in W may be the row itself.
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
  W mean, rest, rstd;  // rest: what rounding took from the mean, much in a row far from zero
};

template <typename W>
Moments<W> moments_of(const W* row, double sum, double eps, int64_t n) {
  const W about = W(sum / n);
  const auto [off, squares] = sums_over<W>(n, [=](auto zero, int64_t i) {
    const auto centred = read<decltype(zero)>(row + i) - about;
    return std::pair(centred, centred * centred);
  });
  const double mean = about + off / n, variance = std::max(0.0, squares - off * off / n) / n;
  return {W(mean), W(mean - W(mean)), W(1 / std::sqrt(variance + eps))};
}

template <typename W, typename O>
[[gnu::noinline]] void normalise(const W* row, Moments<W> moments, const W* weight, const W* bias, O* to, int64_t n) {
  const auto [mean, rest, rstd] = moments;
  if constexpr (std::is_same_v<Wide<O>, W>)
    for_each<W>(n, [=](auto zero, int64_t i) {
      using V = decltype(zero);
      write(to + i, ((read<V>(row + i) - mean) - rest) * rstd * read<V>(weight + i) + read<V>(bias + i));
    });
  else
    for (int64_t i = 0; i < n; ++i)
      to[i] = from_float<O>(Wide<O>(((row[i] - mean) - rest) * rstd * weight[i] + bias[i]));
}

using Normed = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // sum, normed, mean, rstd

template <typename S, typename D>
Normed forward(const Tensor& x, const std::optional<Tensor>& delta, const Tensor& weight, const Tensor& bias,
               double eps, ScalarType dtype) {
  using W = Wide<S>;
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(2);
  Tensor total = delta ? empty({batch, length, width}, kDtype<S>) : empty({0}, kDtype<S>);
  Tensor normed = empty({batch, length, width}, dtype);
  Tensor means = empty({batch, length}, kDtype<W>), rstds = empty({batch, length}, kDtype<W>);
  const Rows<S> from(x);
  const Rows<D> deltas(delta ? *delta : x);
  W *mean = data<W>(means), *rstd = data<W>(rstds);
  const W *factors = data<W>(weight), *offsets = data<W>(bias);
  torch::stable::parallel_for(0, batch * length, grain(4 * width), [&](int64_t begin, int64_t end) {
    const bool past_cache = delta && goes_past_cache(total);
    std::vector<W> wide(std::is_same_v<S, W> ? 0 : width);
    std::vector<S> scratch(past_cache ? width : 0);
    for (int64_t i = begin; i < end; ++i) {
      const S* source = from.at(i / length, i % length);
      S* to = delta ? past_cache ? scratch.data() : data<S>(total) + i * width : const_cast<S*>(source);
      W* row = std::is_same_v<S, W> ? reinterpret_cast<W*>(to) : wide.data();
      const double sum = delta ? add_row(source, deltas.at(i / length, i % length), to, row, width)
                               : sum_row(source, row, width);
      const Moments<W> moments = moments_of(row, sum, eps, width);
      mean[i] = moments.mean, rstd[i] = moments.rstd;
      with_float_type(dtype, "residual_norm: dtype", [&](auto type) {
        using O = decltype(type);
        normalise(row, moments, factors, offsets, data<O>(normed) + i * width, width);
      });
      if (past_cache) copy_past_cache(data<S>(total) + i * width, to, width * sizeof(S));
    }
    finish_past_cache();
  });
  return {total, normed, means, rstds};
}

Normed residual_norm_fwd(Tensor x, std::optional<Tensor> delta, Tensor weight, Tensor bias, double eps,
                         ScalarType dtype) {
  std::optional<Normed> result;
  with_wide_type(x, [&](auto wide) {
    using W = decltype(wide);
    x = side_by_side(x);
    if (delta) delta = computed_in<W>(*delta);
    weight = vector_of<W>(weight), bias = vector_of<W>(bias);
    with_type_in<W>(x.scalar_type(), [&](auto source) {
      using S = decltype(source);
      with_type_in<W>(delta ? delta->scalar_type() : kDtype<S>, [&](auto other) {
        result = forward<S, decltype(other)>(x, delta, weight, bias, eps, dtype);
      });
    });
  });
  return *result;
}

// ---- Backward: with x̂ = (sum − mean) · rstd and g = dnormed · weight,
//      dx = dsum + rstd · (g − mean(g) − x̂ · mean(g · x̂)),  dweight = Σ dnormed · x̂,  dbias = Σ dnormed

// So many rows are taken at once that the sums over rows are loaded and stored seldom.
constexpr int kGroup = 4;

// Rows whose share of dweight and dbias is summed by itself: a matter of shapes, so threads change no bit.
int64_t chunk_of(int64_t rows) { return std::max<int64_t>(32, round_up<int64_t>((rows + 127) / 128, kGroup)); }

// A row of the backward pass; upstream is dsum or null.
template <typename S, typename G>
struct Row {
  using W = Wide<S>;
  const S *total, *upstream;
  const G* dnormed;
  S* dx;
  W mean, rstd;
  W shift = 0, slope = 0;  // rstd · mean(g), rstd² · mean(g · x̂)

  void find_means(const W* weight, int64_t n) {
    const auto [sum, product] = sums_over<W>(n, [this, weight](auto zero, int64_t i) {
      using V = decltype(zero);
      __builtin_prefetch(dx + i, 1);  // several rows at once are more than processors foresee
      if (upstream) __builtin_prefetch(upstream + i);
      const V g = read<V>(dnormed + i) * read<V>(weight + i);
      return std::pair(g, g * (read<V>(total + i) - mean));
    });
    shift = W(sum / n * rstd);
    slope = W(product / n * rstd * rstd * rstd);
  }
};

// Writes dx of some rows and adds their share to dweight and dbias.
template <int kRows, typename S, typename G, typename W>
void take_back(const Row<S, G>* group, const W* weight, W* dweight, W* dbias, int64_t n) {
  std::array<Row<S, G>, kRows> rows;
  std::copy_n(group, kRows, rows.begin());
  const bool has_upstream = rows[0].upstream;
  for_each<W>(n, [&](auto zero, int64_t i) {
    using V = decltype(zero);
    const V factor = read<V>(weight + i);
    V of_weight = read<V>(dweight + i), of_bias = read<V>(dbias + i);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Row<S, G>& row = rows[r];
      const V dy = read<V>(row.dnormed + i), centred = read<V>(row.total + i) - row.mean;
      of_weight += dy * (centred * row.rstd);
      of_bias += dy;
      V dx = dy * factor * row.rstd - row.shift - centred * row.slope;
      if (has_upstream) dx += read<V>(row.upstream + i);
      write(row.dx + i, dx);
    }
    write(dweight + i, of_weight);
    write(dbias + i, of_bias);
  });
}

template <typename S, typename D>
[[gnu::noinline]] void narrow_row(const S* from, D* to, int64_t n) {
  if constexpr (std::is_same_v<Wide<S>, Wide<D>>)
    for_each<Wide<S>>(n, [=](auto zero, int64_t i) { write(to + i, read<decltype(zero)>(from + i)); });
  else
    for (int64_t i = 0; i < n; ++i) to[i] = from_float<D>(Wide<D>(to_float(from[i])));
}

// Sums over the chunks [chunks, 2, D], in their order.
template <typename W>
std::tuple<Tensor, Tensor> joined(const std::vector<W>& parts, int64_t chunks, int64_t width) {
  std::vector<double> sums(2 * width);
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t d = 0; d < 2 * width; ++d) sums[d] += parts[c * 2 * width + d];
  Tensor dweight = empty({width}, kDtype<W>), dbias = empty({width}, kDtype<W>);
  std::copy_n(sums.begin(), width, data<W>(dweight));
  std::copy_n(sums.begin() + width, width, data<W>(dbias));
  return {dweight, dbias};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // dx, ddelta, dweight, dbias

template <typename S, typename G>
Gradients backward(const Tensor& dnormed, const std::optional<Tensor>& dsum, const Tensor& total, const Tensor& mean,
                   const Tensor& rstd, const Tensor& weight, ScalarType narrow) {
  using W = Wide<S>;
  const int64_t batch = total.size(0), length = total.size(1), width = total.size(2), rows = batch * length;
  const bool with_ddelta = narrow != kDtype<S>;
  Tensor dx = empty({batch, length, width}, kDtype<S>);
  Tensor ddelta = with_ddelta ? empty({batch, length, width}, narrow) : empty({0}, narrow);
  const Rows<S> totals(total), upstream(dsum ? *dsum : total);
  const Rows<G> from(dnormed);
  const W* factors = data<W>(weight);
  const int64_t chunk = chunk_of(rows), chunks = (rows + chunk - 1) / chunk;
  std::vector<W> parts(chunks * 2 * width);
  const auto row_at = [&](int64_t i) -> Row<S, G> {
    const int64_t b = i / length, n = i % length;
    return {totals.at(b, n), dsum ? upstream.at(b, n) : nullptr, from.at(b, n), data<S>(dx) + i * width,
            data<W>(mean)[i], data<W>(rstd)[i]};
  };
  torch::stable::parallel_for(0, chunks, grain(4 * chunk * width), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      W *dweight = parts.data() + c * 2 * width, *dbias = dweight + width;
      const int64_t last = std::min(rows, (c + 1) * chunk);
      for (int64_t i = c * chunk; i < last; i += kGroup) {
        const int64_t count = std::min<int64_t>(kGroup, last - i);
        Row<S, G> group[kGroup];
        for (int r = 0; r < count; ++r) {
          group[r] = row_at(i + r);
          group[r].find_means(factors, width);
        }
        if (count == kGroup)
          take_back<kGroup>(group, factors, dweight, dbias, width);
        else
          for (int r = 0; r < count; ++r) take_back<1>(group + r, factors, dweight, dbias, width);
        if (with_ddelta)
          with_float_type(narrow, "residual_norm: delta", [&](auto type) {
            using D = decltype(type);
            narrow_row(group[0].dx, data<D>(ddelta) + i * width, count * width);  // rows of dx lie side by side
          });
      }
    }
  });
  return std::tuple_cat(std::tuple(dx, ddelta), joined(parts, chunks, width));
}

Gradients residual_norm_bwd(Tensor dnormed, std::optional<Tensor> dsum, Tensor total, Tensor mean, Tensor rstd,
                            Tensor weight, ScalarType narrow) {
  std::optional<Gradients> result;
  with_wide_type(total, [&](auto wide) {
    using W = decltype(wide);
    total = side_by_side(total), dnormed = computed_in<W>(dnormed), weight = vector_of<W>(weight);
    if (dsum) dsum = side_by_side(torch::stable::to(*dsum, total.scalar_type()));
    with_type_in<W>(total.scalar_type(), [&](auto source) {
      with_type_in<W>(dnormed.scalar_type(), [&](auto gradient) {
        result = backward<decltype(source), decltype(gradient)>(dnormed, dsum, total, mean, rstd, weight, narrow);
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
