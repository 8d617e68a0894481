// The logistic loss of all pairs (fastssl/ops/pairwise.py), by pairs.h: 2·B·M·D operations for the logits, and 4·B·M·D
// for the gradients of both sides, in one pass. Exponential, logarithm and division take a few percent of that at D =
// 512.
#include "pairs.h"
#include "rows.h"

namespace fastssl {
namespace {

// log(1 + t) for t in [0, 1], relative error 2e-8, by 2·artanh(u) with u = t / (2 + t).
inline Vec<float> log1p_of_fraction(Vec<float>, Vec<float> u) {
  const Vec<float> square = u * u;
  Vec<float> p = splat(1.0f / 13);
  p = p * square + 1.0f / 11;
  p = p * square + 1.0f / 9;
  p = p * square + 1.0f / 7;
  p = p * square + 1.0f / 5;
  p = p * square + 1.0f / 3;
  return 2 * u * (p * square + 1.0f);
}
inline Vec<double> log1p_of_fraction(Vec<double> t, Vec<double>) {
  for (int i = 0; i < kLanes<double>; ++i) t[i] = std::log1p(t[i]);
  return t;
}

// log(1 + e^x) and σ(x).
template <typename T>
struct Softplus {
  Vec<T> value, slope;
  explicit Softplus(Vec<T> x) {
    const Vec<T> t = exp(x > 0 ? -x : x);                  // a NaN stays one
    const Vec<T> reciprocal = T(1) / ((t + 1) * (t + 2));  // one division for both quotients
    value = (x < 0 ? Vec<T>{} : x) + log1p_of_fraction(t, t * (t + 1) * reciprocal);
    slope = (x > 0 ? splat(T(1)) : t) * (t + 2) * reciprocal;
  }
};

struct Logit {
  double scale, bias;
};

// The sums of a loss over all pairs.
template <typename P>
class PairwiseSigmoid {
 public:
  using T = Accumulator<P>;

  PairwiseSigmoid(const Tensor& q, const Tensor& keys, Logit logit, int64_t label_offset, bool with_grad)
      : q_matrix_(q), k_matrix_(keys), logit_(logit), label_offset_(label_offset), with_grad_(with_grad),
        workspace_(empty({workspace_size()}, kDtype<T>)), q_(q_matrix_, T(1), data<T>(workspace_)),
        k_(k_matrix_, T(1), data<T>(workspace_) + Operand::size(q_.count, q_.width)), losses_(q_.count),
        slopes_(q_.count) {
    tiles_ = data<T>(workspace_) + Operand::size(q_.count, q_.width) + Operand::size(k_.count, k_.width);
    q_sums_ = tiles_ + torch::stable::get_num_threads() * Operand::kTileSize;
    k_sums_ = q_sums_ + (with_grad ? q_.padded_count * q_.padded : 0);
    if (with_grad) std::fill(q_sums_, k_sums_ + k_.padded_count * k_.padded, T(0));
    // In round r group a of the side with fewer groups meets group a + r of the other, which no other group meets then.
    const bool more_keys = k_.groups >= q_.groups;
    const int64_t few = std::min(q_.groups, k_.groups), many = std::max(q_.groups, k_.groups);
    const double operations = 6.0 * few * q_.group * k_.group * q_.width;
    for (int64_t round = 0; round < many; ++round)
      for_tasks(few, operations, tiles_, Operand::kTileSize, [&](int64_t a, T* tile) {
        [[maybe_unused]] const PairScope<P> scope{};
        const int64_t b = (a + round) % many;
        for_each_tile(q_, k_, more_keys ? a : b, more_keys ? b : a, tile,
                      [&](T* logits, int64_t key, int64_t keys, int64_t query, int64_t queries) {
                        process_tile(logits, key, keys, query, queries);
                      });
      });
  }

  T loss() const { return T(total(losses_)); }
  T dbias() const { return T(total(slopes_)); }
  T dscale() const {
    double sum = 0;
    for (int64_t i = 0; i < q_.count; ++i) sum += dot(q_.rows + i * q_.width, q_sums_ + i * q_.padded, q_.width);
    return T(sum / q_.count);
  }
  void store_gradients(T* dq, T* dkeys) const {
    store_rows(q_sums_, q_, dq);
    store_rows(k_sums_, k_, dkeys);
  }

 private:
  using Operand = PairOperand<P>;
  Matrix q_matrix_, k_matrix_;
  Logit logit_;
  int64_t label_offset_;
  bool with_grad_;
  Tensor workspace_;
  Operand q_, k_;
  T *tiles_, *q_sums_, *k_sums_;
  std::vector<double> losses_, slopes_;  // of each query: Σ over keys

  int64_t workspace_size() const {
    const int64_t width = q_matrix_.width, padded = padded_width<P>(width);
    const int64_t rows = round_up(q_matrix_.rows, Operand::kAlignment) + round_up(k_matrix_.rows, Operand::kAlignment);
    return Operand::size(q_matrix_.rows, width) + Operand::size(k_matrix_.rows, width) +
           torch::stable::get_num_threads() * Operand::kTileSize + (with_grad_ ? rows * padded : 0);
  }
  double total(const std::vector<double>& sums) const {
    double sum = 0;
    for (const double x : sums) sum += x;
    return sum / q_.count;
  }
  void store_rows(const T* sums, const Operand& x, T* dst) const {
    const T factor = T(logit_.scale / q_.count);
    torch::stable::parallel_for(0, x.count, grain(x.width), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t d = 0; d < x.width; ++d) dst[i * x.width + d] = sums[i * x.padded + d] * factor;
    });
  }

  // Adds the losses of a tile, replaces its logits by their derivatives, and adds the weighted sums.
  void process_tile(T* logits, int64_t key, int64_t keys, int64_t query, int64_t queries) {
    const int64_t lanes = round_up<int64_t>(queries, kLanes<T>);
    T losses[Operand::kMaxGroup] = {}, slopes[Operand::kMaxGroup] = {};
    const T scale = T(logit_.scale), bias = T(logit_.bias);
    for (int64_t j = 0; j < keys; ++j) {
      T* row = logits + j * q_.group;
      const int64_t positive = key + j - label_offset_ - query;
      const bool has_positive = 0 <= positive && positive < queries;
      const double x = has_positive ? double(row[positive]) * logit_.scale + logit_.bias : 0;
      for (int64_t i = 0; i < lanes; i += kLanes<T>) {
        const Softplus<T> pair(load(row + i) * scale + bias);
        if (has_positive && i <= positive && positive < i + kLanes<T>) {  // counted below: it must not cancel
          Vec<T> value = pair.value, slope = pair.slope;
          value[positive - i] = 0;
          slope[positive - i] = 0;
          add(losses + i, slopes + i, row + i, value, slope);
        } else {
          add(losses + i, slopes + i, row + i, pair.value, pair.slope);
        }
      }
      if (!has_positive) continue;
      const double t = std::exp(-std::abs(x)), slope = -(x > 0 ? t : 1.0) / (1 + t);
      losses_[query + positive] += (x > 0 ? 0.0 : -x) + std::log1p(t);
      slopes_[query + positive] += slope;
      row[positive] = T(slope);
    }
    for (int64_t i = 0; i < queries; ++i) {
      losses_[query + i] += losses[i];
      slopes_[query + i] += slopes[i];
    }
    if (with_grad_) add_products(q_, k_, logits, key, keys, query, queries, q_sums_, k_sums_);
  }
  static void add(T* losses, T* slopes, T* row, Vec<T> value, Vec<T> slope) {
    store(losses, load(losses) + value);
    store(slopes, load(slopes) + slope);
    store(row, slope);
  }
};

double scalar(const Tensor& x) { return tau_value(x); }

template <typename T>
Tensor scalar_tensor(T value) {
  Tensor x = empty({}, kDtype<T>);
  *data<T>(x) = value;
  return x;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pairwise_sigmoid_fwd(Tensor q, Tensor keys, Tensor scale,
                                                                        Tensor bias, int64_t label_offset,
                                                                        bool with_grad) {
  return with_operand_type(q, {&q, &keys}, [&](auto type) {
    using P = decltype(type);
    using T = Accumulator<P>;
    const PairwiseSigmoid<P> sums(q, keys, {scalar(scale), scalar(bias)}, label_offset, with_grad);
    const auto none = [] { return empty({0}, kDtype<T>); };
    if (!with_grad) return std::make_tuple(scalar_tensor(sums.loss()), none(), none(), none(), none());
    Tensor dq = empty({q.size(0), q.size(1)}, kDtype<T>), dkeys = empty({keys.size(0), q.size(1)}, kDtype<T>);
    sums.store_gradients(data<T>(dq), data<T>(dkeys));
    return std::make_tuple(scalar_tensor(sums.loss()), dq, dkeys, scalar_tensor(sums.dscale()),
                           scalar_tensor(sums.dbias()));
  });
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("pairwise_sigmoid_fwd", TORCH_BOX(&fastssl::pairwise_sigmoid_fwd));
}
