// Contrast with sampled rows of a memory bank, and the bank's update (fastssl/ops/bank.py).
//
// A query reads each of its rows once: kLanes rows give a vector of logits and weights, and are added to the gradient
// while they are in the L1 cache. At B = 256, m = 4,096, D = 128 in float32 that is 537 MB from random places, which
// bounds the time, so the rows of the next group are prefetched. Queries are the tasks: a query is summed by one thread
// in a fixed order, so results are bit-equal on any number of threads.
#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>

#include "rows.h"

namespace fastssl {
namespace {

enum class Kind { kSoftmax, kNce };

// Results of one query; dq may be null.
template <typename T>
struct QueryResults {
  T *loss, *lse, *dq;
  int64_t* rank;
};

// The bank, and a query that is padded with zeros to whole vectors.
template <typename T, typename S>
struct Sampled {
  const S* bank;
  int64_t row_stride, width;
  const T* query;

  const S* row(int64_t index) const { return bank + index * row_stride; }

  void prefetch(int64_t index) const {
    const char* bytes = reinterpret_cast<const char*>(row(index));
    for (int64_t offset = 0; offset < width * int64_t(sizeof(S)); offset += 64)
      __builtin_prefetch(bytes + offset, 0, 2);
  }

  // Lane-wise parts of the dot product of a row with the query.
  Vec<T> dot_lanes(const S* values) const {
    constexpr int kLane = kLanes<T>;
    Vec<T> sums[4] = {};
    int64_t d = 0;
    for (; d + 4 * kLane <= width; d += 4 * kLane)
      for (int v = 0; v < 4; ++v) sums[v] += load_wide(values + d + v * kLane) * load(query + d + v * kLane);
    for (; d < width; d += kLane) sums[0] += load_part<T>(values + d, width - d) * load(query + d);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  // Dot products of kLanes rows with the query; those beyond `count` are 0. Each is summed in the same order.
  Vec<T> dots(const S* const* rows, int64_t count) const {
    Vec<T> sums[kLanes<T>];
    for (int i = 0; i < kLanes<T>; ++i) sums[i] = i < count ? dot_lanes(rows[i]) : Vec<T>{};
    transpose<T>(sums);
    for (int i = 1; i < kLanes<T>; ++i) sums[0] += sums[i];
    return sums[0];
  }

  // weighted += Σ_i weights[i] · rows[i]. The sum of a group is added as a whole, so that errors grow slowly.
  void accumulate(const S* const* rows, const T* weights, int64_t count, T* weighted) const {
    for (int64_t d = 0; d < width; d += kLanes<T>) {
      Vec<T> sum{};
      if (d + kLanes<T> <= width)
        for (int64_t i = 0; i < count; ++i) sum += load_wide(rows[i] + d) * weights[i];
      else
        for (int64_t i = 0; i < count; ++i) sum += load_part<T>(rows[i] + d, width - d) * weights[i];
      store(weighted + d, load(weighted + d) + sum);
    }
  }
};

// Σ log(1 + e_j) for 0 ≤ e_j ≤ 1. Of floats the factors 1 + e_j are multiplied in double, exact to 1e-16, and one
// logarithm is taken of 32 of them: their product is at most 2^32.
template <typename T>
struct SumOfLog1p {
  double total = 0, product[kLanes<T>];
  int factors = 0;

  SumOfLog1p() { std::fill(product, product + kLanes<T>, 1.0); }
  void add(const T* e, int64_t count) {
    if constexpr (std::is_same_v<T, double>) {
      for (int64_t i = 0; i < count; ++i) total += std::log1p(e[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) product[i] *= 1.0 + double(e[i]);
      if (++factors == 32) flush();
    }
  }
  double flush() {
    for (double& value : product) total += std::log(std::exchange(value, 1.0));
    factors = 0;
    return total;
  }
};

// Running maximum and sum of exponentials of logits that are not yet divided by τ.
struct RunningSum {
  double shift = std::numeric_limits<float>::lowest(), sum = 0;  // the maximum of no logits: finite, since ∞ − ∞ is NaN
};

// Softmax cross entropy of one query, as in info_nce.h: the positive's weight is the sum of the others.
template <typename T, typename S>
void softmax_query(const Sampled<T, S>& sampled, const int64_t* ids, int64_t count, double tau, T* weighted,
                   const QueryResults<T>& out) {
  constexpr int kLane = kLanes<T>;
  const S *positive_row = sampled.row(ids[0]), *rows[kLane];
  const T positive = sampled.dots(&positive_row, 1)[0];
  const double scale = kLog2E / std::abs(tau);
  RunningSum negatives;
  int64_t rank = 0;
  for (int64_t first = 1; first < count; first += kLane) {
    const int64_t group = std::min<int64_t>(kLane, count - first);
    for (int64_t i = first + kLane; i < std::min(count, first + 2 * kLane); ++i) sampled.prefetch(ids[i]);
    for (int64_t i = 0; i < group; ++i) rows[i] = sampled.row(ids[first + i]);
    const Vec<T> logits = sampled.dots(rows, group);
    double largest = negatives.shift;
    for (int64_t i = 0; i < group; ++i) {
      rank += logits[i] > positive;
      largest = double(logits[i]) > largest ? double(logits[i]) : largest;
    }
    if (largest > negatives.shift) {
      const double decay = std::exp2((negatives.shift - largest) * scale);
      negatives = {largest, negatives.sum * decay};
      for (int64_t d = 0; weighted && d < sampled.width; ++d) weighted[d] *= T(decay);
    }
    T weights[kLane];
    store(weights, exp2((logits - T(negatives.shift)) * T(scale)));
    for (int64_t i = 0; i < group; ++i) negatives.sum += double(weights[i]);
    if (weighted) sampled.accumulate(rows, weights, group, weighted);
  }
  const double gap = double(positive) == INFINITY ? NAN : (negatives.shift - double(positive)) * scale;
  const double total = gap <= 0 ? 1 + negatives.sum * std::exp2(gap) : negatives.sum + std::exp2(-gap);
  *out.loss = T(gap <= 0 ? std::log1p(negatives.sum * std::exp2(gap)) : gap * kLn2 + std::log(total));
  *out.rank = rank;
  if (!weighted) return;
  const double unit = (gap <= 0 ? std::exp2(gap) : 1) / total;  // softmax probability of a logit equal to the shift
  const T factor = T(unit / tau), positive_factor = T(negatives.sum * unit / tau);
  for (int64_t d = 0; d < sampled.width; ++d)
    out.dq[d] = factor * weighted[d] - positive_factor * T(to_float(positive_row[d]));
}

// Noise-contrastive estimation of one query: softplus(shift − s_0) + Σ_j softplus(s_j − shift).
template <typename T, typename S>
void nce_query(const Sampled<T, S>& sampled, const int64_t* ids, int64_t count, double tau, double shift, T* weighted,
               const QueryResults<T>& out) {
  constexpr int kLane = kLanes<T>;
  const S *positive_row = sampled.row(ids[0]), *rows[kLane];
  const T positive = sampled.dots(&positive_row, 1)[0], inverse = T(1 / std::abs(tau));
  const double scale = kLog2E / std::abs(tau);
  RunningSum all{double(positive) > std::numeric_limits<float>::lowest() ? double(positive) : RunningSum{}.shift, 1};
  if (double(positive) != double(positive)) all.sum = NAN;
  SumOfLog1p<T> logs;
  double linear = 0;  // Σ max(s_j − shift, 0)
  int64_t rank = 0;
  for (int64_t first = 1; first < count; first += kLane) {
    const int64_t group = std::min<int64_t>(kLane, count - first);
    for (int64_t i = first + kLane; i < std::min(count, first + 2 * kLane); ++i) sampled.prefetch(ids[i]);
    for (int64_t i = 0; i < group; ++i) rows[i] = sampled.row(ids[first + i]);
    const Vec<T> dots = sampled.dots(rows, group), logits = dots * inverse - T(shift);
    double largest = all.shift;
    for (int64_t i = 0; i < group; ++i) {
      rank += dots[i] > positive;
      largest = double(dots[i]) > largest ? double(dots[i]) : largest;
    }
    if (largest > all.shift) all = {largest, all.sum * std::exp2((all.shift - largest) * scale)};
    T exponentials[kLane], decays[kLane], weights[kLane];
    store(exponentials, exp2((dots - T(all.shift)) * T(scale)));
    const Vec<T> decay = exp2((logits > T(0) ? -logits : logits) * T(kLog2E));
    const Vec<T> weight = (logits > T(0) ? splat(T(1)) : decay) / (decay + T(1));
    store(decays, decay);
    store(weights, weight);
    for (int64_t i = 0; i < group; ++i) {
      all.sum += double(exponentials[i]);
      linear += logits[i] > T(0) ? double(logits[i]) : 0;
    }
    logs.add(decays, group);
    if (weighted) sampled.accumulate(rows, weights, group, weighted);
  }
  const double logit = double(positive) / std::abs(tau) - shift, decay = std::exp(-std::abs(logit));
  *out.loss = T(std::max(-logit, 0.0) + std::log1p(decay) + (linear + logs.flush()));
  *out.lse = T(all.shift / std::abs(tau) + std::log(all.sum));
  *out.rank = rank;
  if (!weighted) return;
  const T factor = T(1 / tau), positive_factor = T((logit > 0 ? decay : 1) / (1 + decay) / tau);
  for (int64_t d = 0; d < sampled.width; ++d)
    out.dq[d] = factor * weighted[d] - positive_factor * T(to_float(positive_row[d]));
}

// An index outside the bank; threads note one, and the caller raises.
struct BadIndex {
  std::atomic<bool> found{false};
  std::atomic<int64_t> value{0};
  void note(int64_t index) {
    value = index;
    found = true;
  }
  void raise(const char* argument, int64_t length) const {
    if (found)
      throw std::runtime_error(std::string(argument) + " must be between 0 and N-1=" + std::to_string(length - 1) +
                               ", got " + std::to_string(value));
  }
};

// Copies a row of indices and checks it, because another process may change a tensor in shared memory after its check.
bool copy_ids(const int64_t* src, int64_t stride, int64_t count, int64_t length, int64_t* dst, BadIndex& bad) {
  copy_row(dst, src, stride, count);
  for (int64_t i = 0; i < count; ++i)
    if (uint64_t(dst[i]) >= uint64_t(length)) {
      bad.note(dst[i]);
      return false;
    }
  return true;
}

template <typename T>
struct Results {
  Tensor loss, rank, lse, dq;
  Results(const Tensor& q, bool with_grad)
      : loss(empty({q.size(0)}, kDtype<T>)), rank(empty({q.size(0)}, ScalarType::Long)),
        lse(empty({q.size(0)}, kDtype<T>)),
        dq(with_grad ? empty({q.size(0), q.size(1)}, kDtype<T>) : empty({0}, kDtype<T>)) {}
};

template <Kind kKind, typename T>
Results<T> sampled_fwd(const char* argument, const Tensor& q, const Tensor& bank, const Tensor& indices, double tau,
                       double shift, bool with_grad) {
  const Results<T> results(q, with_grad);
  const int64_t batch = q.size(0), width = q.size(1), count = indices.size(1),
                padded = round_up<int64_t>(width, kLanes<T>);
  const auto* ids = static_cast<const int64_t*>(indices.const_data_ptr());
  std::vector<T> queries(batch * padded, T(0));
  with_float_type(q.scalar_type(), "q", [&](auto type) {
    const Rows<decltype(type)> rows(q);
    for (int64_t b = 0; b < batch; ++b) {
      T* query = queries.data() + b * padded;
      widen(rows.row(0, b), rows.column_stride, width, query);
      for (int64_t d = 0; tau < 0 && d < width; ++d) query[d] = -query[d];
    }
  });
  BadIndex bad;
  with_float_type(bank.scalar_type(), "bank", [&](auto type) {
    using S = decltype(type);
    // A bank in another compute type than the queries is converted row by row, as the plain-torch body does.
    constexpr bool kNative = std::is_same_v<ComputeType<S>, T>;
    const auto* source = static_cast<const S*>(bank.const_data_ptr());
    torch::stable::parallel_for(0, batch, grain(2 * count * width), [&](int64_t begin, int64_t end) {
      std::vector<T> weighted(with_grad ? padded : 0), converted(kNative ? 0 : count * width);
      std::vector<int64_t> row_ids(count);
      for (int64_t b = begin; b < end; ++b) {
        if (!copy_ids(ids + b * indices.stride(0), indices.stride(1), count, bank.size(0), row_ids.data(), bad)) return;
        std::fill(weighted.begin(), weighted.end(), T(0));
        const QueryResults<T> out{data<T>(results.loss) + b, data<T>(results.lse) + b,
                                  with_grad ? data<T>(results.dq) + b * width : nullptr,
                                  data<int64_t>(results.rank) + b};
        const auto run = [&](const auto& sampled) {
          if constexpr (kKind == Kind::kSoftmax)
            softmax_query(sampled, row_ids.data(), count, tau, with_grad ? weighted.data() : nullptr, out);
          else
            nce_query(sampled, row_ids.data(), count, tau, shift, with_grad ? weighted.data() : nullptr, out);
        };
        const T* query = queries.data() + b * padded;
        if constexpr (kNative) {
          run(Sampled<T, S>{source, bank.stride(0), width, query});
        } else {
          for (int64_t i = 0; i < count; ++i) {
            const S* row = source + row_ids[i] * bank.stride(0);
            for (int64_t d = 0; d < width; ++d) converted[i * width + d] = T(to_float(row[d]));
            row_ids[i] = i;
          }
          run(Sampled<T, T>{converted.data(), width, width, query});
        }
      }
    });
  });
  bad.raise(argument, bank.size(0));
  return results;
}

std::tuple<Tensor, Tensor, Tensor> sampled_info_nce_fwd(Tensor q, Tensor bank, Tensor indices, Tensor tau,
                                                        bool with_grad) {
  return with_compute_type(q, [&](auto type) {
    const auto results = sampled_fwd<Kind::kSoftmax, decltype(type)>("sampled_info_nce: indices", q, bank, indices,
                                                                     tau_value(tau), 0, with_grad);
    return std::make_tuple(results.loss, results.rank, results.dq);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sampled_nce_fwd(Tensor q, Tensor bank, Tensor indices, Tensor tau,
                                                           Tensor shift, bool with_grad) {
  return with_compute_type(q, [&](auto type) {
    const auto results = sampled_fwd<Kind::kNce, decltype(type)>("sampled_nce: indices", q, bank, indices,
                                                                 tau_value(tau), tau_value(shift), with_grad);
    return std::make_tuple(results.loss, results.rank, results.lse, results.dq);
  });
}

// Moves one row towards a feature and normalises it; a row whose new norm is 0 or not finite stays as it is.
template <typename T, typename S, typename F>
void update_row(S* row, const F* feature, int64_t stride, int64_t width, double momentum, T* scratch) {
  const T old_share = T(momentum), new_share = T(1 - momentum);
  for (int64_t d = 0; d < width; ++d)
    scratch[d] = T(to_float(row[d])) * old_share + T(to_float(feature[d * stride])) * new_share;
  T square = 0;
  for (int64_t d = 0; d < width; ++d) square += scratch[d] * scratch[d];
  const T norm = std::sqrt(square);
  if (norm == 0 || !std::isfinite(norm)) return;
  for (int64_t d = 0; d < width; ++d) row[d] = from_float<S>(static_cast<ComputeType<S>>(scratch[d] / norm));
}

void update_bank_(Tensor bank, Tensor indices, Tensor features, double momentum) {
  const int64_t count = indices.size(0), width = bank.size(1);
  std::vector<int64_t> ids(count), order(count);
  BadIndex bad;
  copy_ids(static_cast<const int64_t*>(indices.const_data_ptr()), indices.stride(0), count, bank.size(0), ids.data(),
           bad);
  bad.raise("update_bank_: indices", bank.size(0));
  for (int64_t i = 0; i < count; ++i) order[i] = i;
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return std::pair(ids[a], a) < std::pair(ids[b], b); });
  with_float_type(bank.scalar_type(), "update_bank_: bank", [&](auto bank_type) {
    with_float_type(features.scalar_type(), "update_bank_: features", [&](auto features_type) {
      using S = decltype(bank_type);
      using F = decltype(features_type);
      using T = std::conditional_t<std::is_same_v<S, double> || std::is_same_v<F, double>, double, float>;
      const Rows<F> rows(features);
      std::vector<T> scratch(width);
      S* target = static_cast<S*>(bank.mutable_data_ptr());
      for (int64_t i = 0; i < count; ++i)
        if (i + 1 == count || ids[order[i + 1]] != ids[order[i]])  // the last occurrence of an index
          update_row<T>(target + ids[order[i]] * bank.stride(0), rows.row(0, order[i]), rows.column_stride, width,
                        momentum, scratch.data());
    });
  });
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("sampled_info_nce_fwd", TORCH_BOX(&fastssl::sampled_info_nce_fwd));
  m.impl("sampled_nce_fwd", TORCH_BOX(&fastssl::sampled_nce_fwd));
  m.impl("update_bank_", TORCH_BOX(&fastssl::update_bank_));
}
