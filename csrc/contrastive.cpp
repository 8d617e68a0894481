// InfoNCE over a queue and within a batch, and NT-Xent (fastssl/ops/contrastive.py).
//
// InfoNCE with its gradient is attention whose values are the keys: info_nce.h. NT-Xent's logits are symmetric, so each
// is computed once for both views: for N views of width D, N² D operations forward and 3 N² D backward. Without the
// symmetry they would be 2 N² D and 4 N² D. Memory: packed copies of the views, and one tile of logits per thread.
#include "info_nce.h"
#include "pairs.h"

namespace fastssl {
namespace {

// Queries of info_nce_fwd at once: their packed copies and partial results take 5 MB at D = 128. Tasks have at most
// kMaxQueries of them in any case, so the keys are not read more often.
constexpr int64_t kRowsAtOnce = 2048;

std::tuple<Tensor, Tensor, Tensor> info_nce_fwd(Tensor q, Tensor k, Tensor queue, Tensor tau, bool with_grad) {
  return with_operand_type(q, {&q, &k, &queue}, [&](auto type) {
    using P = decltype(type);
    using T = Accumulator<P>;
    Tensor loss = empty({q.size(0)}, kDtype<T>), rank = empty({q.size(0)}, ScalarType::Long);
    Tensor dq = with_grad ? empty({q.size(0), q.size(1)}, kDtype<T>) : empty({0}, kDtype<T>);
    for (int64_t first = 0, count; first < q.size(0); first += count) {
      count = std::min(kRowsAtOnce, q.size(0) - first);
      info_nce<P>(
          part_of(q, first, count), part_of(k, first, count), {0, count, false}, queue, false, tau_value(tau),
          {data<T>(loss) + first, with_grad ? data<T>(dq) + first * q.size(1) : nullptr, data<int64_t>(rank) + first});
    }
    return std::make_tuple(loss, rank, dq);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_info_nce_fwd(Tensor q, Tensor keys, Tensor tau, int64_t label_offset,
                                                              bool with_grad) {
  return with_operand_type(q, {&q, &keys}, [&](auto type) {
    using P = decltype(type);
    using T = Accumulator<P>;
    Tensor loss = empty({q.size(0)}, kDtype<T>), rank = empty({q.size(0)}, ScalarType::Long);
    Tensor dq = with_grad ? empty({q.size(0), q.size(1)}, kDtype<T>) : empty({0}, kDtype<T>);
    Tensor lse = empty({q.size(0)}, kDtype<T>);
    std::vector<LogSum> log_sums(q.size(0));
    info_nce<P>(q, keys, {label_offset, keys.size(0), false}, keys, true, tau_value(tau),
                {data<T>(loss), with_grad ? data<T>(dq) : nullptr, data<int64_t>(rank), log_sums.data()});
    store_lse(log_sums, tau_value(tau), data<T>(lse));
    return std::make_tuple(loss, rank, dq, lse);
  });
}

// A double as the sum of two T, for factors and shifts of exponents: their rounding error would be common to all
// weights and would not average out.
template <typename T>
struct SplitDouble {
  T high, low;
  SplitDouble(double value) : high(T(value)), low(T(value - double(T(value)))) {}
};

// A log-sum-exp in units of log 2.
template <typename T>
struct Shift {
  T logit, rest;
  Shift(const LogSum& lse) : logit(T(lse.logit)), rest(T(lse.rest * kLog2E)) {}
};

// The softmax of logits: 2^((logit − shift) · scale − rest). The difference comes before the product, as in
// update_softmax.
template <typename T>
Vec<T> softmax_weight(Vec<T> logit, const SplitDouble<T>& scale, Vec<T> shift, Vec<T> rest) {
  const Vec<T> difference = logit - shift;
  return exp2(difference * scale.high + (difference * scale.low - rest));
}

// The log-sum-exps of queries, as the forward pass stored them. A number in the thousands has lost its decimals in
// float32, and with them the softmax: then `compute(Outputs)` computes them again.
template <typename T, typename Compute>
std::vector<LogSum> exact_lse(const Tensor& stored, double tau, const Compute& compute) {
  const int64_t rows = stored.size(0);
  std::vector<LogSum> lse(rows);
  double largest = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const double value = data<T>(stored)[i * stored.stride(0)], logit = T(value * std::abs(tau));
    lse[i] = {logit, value - logit / std::abs(tau)};
    if (std::isfinite(value)) largest = std::max(largest, std::abs(value));
  }
  if (largest < (std::is_same_v<T, double> ? 1e12 : 4096)) return lse;
  std::vector<T> loss(rows);
  std::vector<int64_t> rank(rows);
  compute(Outputs<T>{loss.data(), nullptr, rank.data(), lse.data()});
  return lse;
}

// ∂loss/∂keys. The roles of queries and keys are swapped: keys are lanes, and queries are processed block by block, so
// each row of the result is summed by one task.
template <typename P, typename T = Accumulator<P>>
void batch_dkeys(const Matrix& q, const Matrix& keys, double tau, int64_t label_offset, const LogSum* lse,
                 const T* dloss, T* dkeys) {
  const int64_t width = q.width, padded = padded_width<P>(width);
  const int64_t block = std::clamp<int64_t>(round_up<int64_t>(keys.rows / 8, kGroup<P>), kGroup<P>, kMaxQueries);
  const int64_t scratch_size = Scratch<P>::size(width) + block * 3 * padded;
  const int64_t tasks = (keys.rows + block - 1) / block;
  const Tensor workspace = empty({torch::stable::get_num_threads() * scratch_size}, kDtype<T>);
  const T sign = tau < 0 ? T(-1) : T(1), inverse = T(1 / tau);
  const SplitDouble<T> scale(kLog2E / std::abs(tau));
  for_tasks(tasks, 4.0 * q.rows * keys.rows * width, data<T>(workspace), scratch_size, [&](int64_t task, T* scratch) {
    const int64_t first_key = task * block, count = std::min(block, keys.rows - first_key);
    T* memory = scratch + Scratch<P>::size(width);
    P *key_rows = reinterpret_cast<P*>(memory), *panels = key_rows + block * padded;
    const Sums<P> sums{memory + 2 * block * padded, padded};
    pack_lanes(keys, first_key, count, sign, key_rows, panels);
    std::fill(sums.data, sums.data + block * padded, T(0));
    stream(q, 0, q.rows, panels, count, sums, Scratch<P>(scratch, width),
           [&](T* logits, int64_t query, int64_t queries, int64_t key, int64_t key_panels) {
             for (int64_t i = 0; i < queries; ++i) {
               T* row = logits + i * kGroup<P>;
               const Shift<T> shift(lse[query + i]);
               const T upstream = dloss[query + i] * inverse;
               for (int64_t lane = 0; lane < key_panels * kPanelWidth<P>; lane += kLanes<T>)
                 store(row + lane,
                       softmax_weight<T>(load(row + lane), scale, splat(shift.logit), splat(shift.rest)) * upstream);
               const int64_t positive = label_offset + query + i - first_key - key;
               if (0 <= positive && positive < key_panels * kPanelWidth<P>) row[positive] -= upstream;
             }
             if constexpr (std::is_same_v<P, Bf16x2>)
               store_weights<P>(logits, queries, [](Vec<T> weight, int) { return weight; });
           });
    sums.copy_rows(count, width, dkeys + first_key * width, width);
  });
}

Tensor batch_info_nce_dkeys(Tensor q, Tensor keys, Tensor tau, int64_t label_offset, Tensor lse, Tensor dloss) {
  return with_operand_type(lse, {&q, &keys}, [&](auto type) {
    using P = decltype(type);
    using T = Accumulator<P>;
    Tensor dkeys = empty({keys.size(0), keys.size(1)}, kDtype<T>);
    std::vector<T> upstream(dloss.size(0));  // the upstream gradient may be an expanded scalar
    for (int64_t i = 0; i < dloss.size(0); ++i) upstream[i] = data<T>(dloss)[i * dloss.stride(0)];
    const auto compute = [&](const Outputs<T>& out) {
      info_nce<P>(q, keys, {label_offset, keys.size(0), false}, keys, true, tau_value(tau), out);
    };
    batch_dkeys<P>(q, keys, tau_value(tau), label_offset, exact_lse<T>(lse, tau_value(tau), compute).data(),
                   upstream.data(), data<T>(dkeys));
    return dkeys;
  });
}

// A round-robin tournament of all pairs of groups of views (circle method): in a round each group occurs in one pair,
// so the task of a pair may add to the results of both groups, in an order that does not depend on the threads. Calls
// run_round(number of pairs, pair) for each round, where pair(i) returns two groups. With an odd number of groups one
// pair of each round contains group number `groups`, which does not exist.
template <typename RunRound>
void tournament(int64_t groups, const RunRound& run_round) {
  run_round(groups, [](int64_t i) { return std::pair(i, i); });
  const int64_t players = groups + groups % 2;
  for (int64_t round = 0; round < players - 1; ++round)
    run_round(players / 2, [=](int64_t i) {
      const int64_t last = players - 1, first = (round + i) % last, second = i ? (round + last - i) % last : last;
      return std::pair(std::min(first, second), std::max(first, second));
    });
}

// The views, as operands of their products with each other.
template <typename P>
struct Views : PairOperand<P> {
  using T = Accumulator<P>;
  double scale;  // log2 e / |τ|

  Views(const Matrix& z, double tau, T* memory)
      : PairOperand<P>(z, tau < 0 ? T(-1) : T(1), memory), scale(kLog2E / std::abs(tau)) {}
  int64_t positive(int64_t i) const { return (i + this->count / 2) % this->count; }

  // Calls body(a, b, logits) for every pair a ≤ b of groups, in the rounds of a tournament.
  template <typename Body>
  void for_each_pair(T* tiles, const Body& body) const {
    const int64_t groups = this->groups, group = this->group;
    tournament(groups, [&](int64_t pairs, const auto& pair) {
      const double operations = 2.0 * pairs * group * group * this->width;
      for_tasks(pairs, operations, tiles, PairOperand<P>::kTileSize, [&](int64_t index, T* logits) {
        const auto [a, b] = pair(index);
        [[maybe_unused]] const PairScope<P> scope{};
        if (b < groups) body(a, b, logits);
      });
    });
  }
};

// sums[view] += Σ 2^(logit − shift) over the negatives of each view, with one shift for all views. Accurate where all
// logits (in units of log 2) are between −60 and 60 and the shift is their bound.
template <typename P, typename T = Accumulator<P>>
void sum_negatives(const Views<P>& z, T shift, T* tiles, T* sums) {
  z.for_each_pair(tiles, [&](int64_t a, int64_t b, T* memory) {
    for_each_tile(z, z, a, b, memory, [&](T* logits, int64_t key, int64_t keys, int64_t query, int64_t queries) {
      for (int64_t i = 0; i < queries; ++i)
        for (const int64_t excluded : {z.positive(query + i), query + i})
          if (key <= excluded && excluded < key + keys) logits[(excluded - key) * z.group + i] = T(kExcluded);
      T query_sums[Views<P>::kMaxGroup] = {};
      const int64_t whole_vectors = queries / kLanes<T> * kLanes<T>;
      for (int64_t j = 0; j < keys; ++j) {
        const T* row = logits + j * z.group;
        Vec<T> key_sum{};
        for (int64_t i = 0; i < whole_vectors; i += kLanes<T>) {
          const Vec<T> weight = exp2(load(row + i) * T(z.scale) - shift);
          key_sum += weight;
          store(query_sums + i, load(query_sums + i) + weight);
        }
        T remainder = 0;
        if (whole_vectors < queries) {
          const Vec<T> weight = exp2(load(row + whole_vectors) * T(z.scale) - shift);
          store(query_sums + whole_vectors, load(query_sums + whole_vectors) + weight);
          for (int64_t i = whole_vectors; i < queries; ++i) remainder += weight[i - whole_vectors];
        }
        if (a != b) sums[key + j] += sum<T>(key_sum) + remainder;
      }
      for (int64_t i = 0; i < queries; ++i) sums[query + i] += query_sums[i];
    });
  });
}

// ∂loss/∂z. With p_ij the softmax of view i's logits, minus 1 at its positive, the coefficient of z_j in ∂loss/∂z_i is
// (p_ij dloss_i + p_ji dloss_j) / τ, which is symmetric in i and j.
template <typename P, typename T = Accumulator<P>>
void nt_xent_gradient(const Views<P>& z, const T* shift, const T* rest, const T* upstream, T* tiles, T* sums) {
  const SplitDouble<T> scale(z.scale);
  z.for_each_pair(tiles, [&](int64_t a, int64_t b, T* memory) {
    for_each_tile(z, z, a, b, memory, [&](T* weights, int64_t key, int64_t keys, int64_t query, int64_t queries) {
      const int64_t lanes = round_up<int64_t>(queries, kLanes<T>);
      for (int64_t j = 0; j < keys; ++j) {
        T* row = weights + j * z.group;
        const Vec<T> key_shift = splat(shift[key + j]), key_rest = splat(rest[key + j]);
        const T key_upstream = upstream[key + j];
        for (int64_t i = 0; i < lanes; i += kLanes<T>) {
          const Vec<T> logit = load(row + i), query_shift = load(shift + query + i);
          const Vec<T> query_weight = softmax_weight<T>(logit, scale, query_shift, load(rest + query + i));
          const Vec<T> key_weight = softmax_weight<T>(logit, scale, key_shift, key_rest);
          store(row + i, query_weight * load(upstream + query + i) + key_weight * key_upstream);
        }
      }
      for (int64_t i = 0; i < queries; ++i) {
        const int64_t self = query + i - key, positive = z.positive(query + i) - key;
        if (0 <= positive && positive < keys)
          weights[positive * z.group + i] -= upstream[query + i] + upstream[key + positive];
        if (0 <= self && self < keys) weights[self * z.group + i] = 0;
      }
      add_products(z, z, weights, key, keys, query, queries, sums, a == b ? nullptr : sums);
    });
  });
}

// The largest possible |logit · log2 e / τ|, from the length of the longest vector.
template <typename P>
double largest_logit(const Views<P>& z) {
  double largest = 0;
  for (int64_t i = 0; i < z.count; ++i) {
    const auto* row = z.rows + i * z.width;
    const double squared_length = dot(row, row, z.width);
    largest = squared_length <= largest ? largest : squared_length;  // a NaN is kept
  }
  return largest * z.scale;
}

// NT-Xent of vectors of any length, by the algorithm of InfoNCE.
template <typename P>
void nt_xent_of_any_length(const Matrix& z, double tau, const Outputs<Accumulator<P>>& out) {
  info_nce<P>(z, z, {z.rows / 2, z.rows, true}, z, true, tau, out);
}

std::tuple<Tensor, Tensor> nt_xent_fwd(Tensor z_tensor, Tensor tau_tensor) {
  return with_operand_type(z_tensor, {&z_tensor}, [&](auto type) {
    using P = decltype(type);
    using T = Accumulator<P>;
    const Matrix z(z_tensor);
    const double tau = tau_value(tau_tensor);
    const int64_t tiles_size = torch::stable::get_num_threads() * Views<P>::kTileSize;
    Tensor loss = empty({z.rows}, kDtype<T>), lse = empty({z.rows}, kDtype<T>);
    const Tensor workspace = empty({Views<P>::size(z.rows, z.width) + tiles_size + z.rows}, kDtype<T>);
    T* memory = data<T>(workspace);
    const Views<P> views(z, tau, memory);
    T *tiles = memory + Views<P>::size(z.rows, z.width), *sums = tiles + tiles_size;
    const double bound = largest_logit(views);
    if (!(bound <= 60)) {
      std::vector<int64_t> rank(z.rows);
      std::vector<LogSum> log_sums(z.rows);
      nt_xent_of_any_length<P>(z, tau, {data<T>(loss), nullptr, rank.data(), log_sums.data()});
      store_lse(log_sums, tau, data<T>(lse));
      return std::make_tuple(loss, lse);
    }
    std::fill(sums, sums + z.rows, T(0));
    sum_negatives(views, T(bound), tiles, sums);
    const double sign = tau < 0 ? -1 : 1;
    for (int64_t i = 0; i < z.rows; ++i) {
      const T *row = views.rows + i * z.width, *positive_row = views.rows + views.positive(i) * z.width;
      const double positive = sign * dot(row, positive_row, z.width) * views.scale, shift = double(T(bound));
      const double value = std::log1p(sums[i] * std::exp2(shift - positive));  // exponent at most 120
      data<T>(loss)[i] = T(value);
      data<T>(lse)[i] = T(value + positive * kLn2);
    }
    return std::make_tuple(loss, lse);
  });
}

Tensor nt_xent_bwd(Tensor z_tensor, Tensor tau_tensor, Tensor lse, Tensor dloss) {
  return with_operand_type(lse, {&z_tensor}, [&](auto type) {
    using P = decltype(type);
    using T = Accumulator<P>;
    const Matrix z(z_tensor);
    const double tau = tau_value(tau_tensor);
    const int64_t tiles_size = torch::stable::get_num_threads() * Views<P>::kTileSize;
    const int64_t padded = padded_width<P>(z.width), padded_rows = round_up(z.rows, Views<P>::kAlignment);
    const int64_t lanes = padded_rows + kGroup<T>;
    Tensor dz = empty({z.rows, z.width}, kDtype<T>);
    const bool in_place = padded == z.width && (padded_rows == z.rows || !Views<P>::kPairs);
    const int64_t sums_size = in_place ? 0 : padded_rows * padded;
    const Tensor workspace = empty({Views<P>::size(z.rows, z.width) + tiles_size + 3 * lanes + sums_size}, kDtype<T>);
    T* memory = data<T>(workspace);
    const Views<P> views(z, tau, memory);
    T *tiles = memory + Views<P>::size(z.rows, z.width), *shift = tiles + tiles_size, *rest = shift + lanes;
    T *upstream = rest + lanes, *sums = in_place ? data<T>(dz) : upstream + lanes;
    std::fill(shift, shift + 3 * lanes, T(0));
    const std::vector<LogSum> log_sums =
        exact_lse<T>(lse, tau, [&](const Outputs<T>& out) { nt_xent_of_any_length<P>(z, tau, out); });
    for (int64_t i = 0; i < z.rows; ++i) {
      const Shift<T> parts(log_sums[i]);
      shift[i] = parts.logit;
      rest[i] = parts.rest;
      upstream[i] = data<T>(dloss)[i * dloss.stride(0)] * T(1 / tau);
    }
    std::fill(sums, sums + (in_place ? z.rows : padded_rows) * padded, T(0));
    nt_xent_gradient(views, shift, rest, upstream, tiles, sums);
    for (int64_t i = 0; !in_place && i < z.rows; ++i)
      std::copy(sums + i * padded, sums + i * padded + z.width, data<T>(dz) + i * z.width);
    return dz;
  });
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("info_nce_fwd", TORCH_BOX(&fastssl::info_nce_fwd));
  m.impl("batch_info_nce_fwd", TORCH_BOX(&fastssl::batch_info_nce_fwd));
  m.impl("batch_info_nce_dkeys", TORCH_BOX(&fastssl::batch_info_nce_dkeys));
  m.impl("nt_xent_fwd", TORCH_BOX(&fastssl::nt_xent_fwd));
  m.impl("nt_xent_bwd", TORCH_BOX(&fastssl::nt_xent_bwd));
}
