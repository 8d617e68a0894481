// InfoNCE of queries against keys: info_nce, batch_info_nce, and nt_xent for vectors too long for its own algorithm.
//
// Online softmax over blocks of keys (Milakov and Gimelshein, 2018). The forward pass with the gradient of the queries
// is bound by two products of 2·B·K·D operations each, 8.6 GFLOP in all at B = 256, K = 65,536, D = 128; the
// exponentials take a few percent. The running maximum of each query costs one load and one comparison per logit, less
// than one percent, so it is always used and the length of the vectors need not be bounded.
//
// Memory: the packed queries and the partial softmaxes, 2 MB at MoCo's sizes. The partition into tasks depends on the
// shapes alone and partial results are merged in a fixed order, so results are bit-equal on any number of threads.
#pragma once

#include "stream.h"

#include <cmath>
#include <limits>

namespace fastssl {

constexpr int64_t kTargetTasks = 16;   // number of tasks, if the shapes allow it
constexpr int64_t kMaxQueries = 256;   // queries of a task, at most: they share one reading and packing of the keys
constexpr int64_t kMinKeys = 192;      // keys of a task, at least
constexpr int64_t kMaxKeys = 1 << 22;  // keys of a task, at most: ranks are counted in float32
constexpr float kLowest = std::numeric_limits<float>::lowest();  // the maximum of no logits: finite, since ∞ − ∞ is NaN
constexpr float kExcluded = -std::numeric_limits<float>::infinity();  // logit of a key that is no negative

// The partition of B queries and K keys into tasks: blocks of queries times ranges of keys.
struct Partition {
  int64_t queries, keys, query_blocks, query_block, key_ranges, key_range;

  Partition(int64_t queries, int64_t keys, int64_t lanes, int64_t key_block) : queries(queries), keys(keys) {
    const int64_t max_key_ranges = 1 + keys / kMinKeys;
    const int64_t min_query_blocks = kTargetTasks / std::min(kTargetTasks, max_key_ranges);  // above 1 if keys are few
    query_blocks = std::max(
        {int64_t(1), (queries + kMaxQueries - 1) / kMaxQueries, std::min(min_query_blocks, queries / (3 * lanes))});
    query_block = round_up(std::max<int64_t>(1, (queries + query_blocks - 1) / query_blocks), lanes);
    query_blocks = std::max<int64_t>(1, (queries + query_block - 1) / query_block);
    const int64_t target = std::clamp<int64_t>(kTargetTasks / query_blocks, 1 + keys / kMaxKeys, max_key_ranges);
    key_range = round_up(std::max<int64_t>(1, (keys + target - 1) / target), key_block);
    key_ranges = std::max<int64_t>(1, (keys + key_range - 1) / key_range);
  }
  int64_t tasks() const { return query_blocks * key_ranges; }
};

// Softmax of a block of queries over one range of keys.
template <typename T>
struct PartialSoftmax {
  T* shift;          // [block] maximum of the logits, not yet divided by τ
  T* sum;            // [block] Σ 2^((logit − shift) · scale), with scale = log2 e / |τ|
  T* rank;           // [block] number of logits above the positive's
  T* weighted_keys;  // [block, padded width] Σ 2^((logit − shift) · scale) key
  static int64_t size(int64_t block, int64_t sums_width) { return block * (3 + sums_width); }
  PartialSoftmax(T* memory, int64_t block)
      : shift(memory), sum(memory + block), rank(memory + 2 * block), weighted_keys(memory + 3 * block) {}
};

// Updates the partial softmax with one block of keys for one panel of queries, and replaces the logits by weights. The
// maximum is subtracted before the division by τ: beside logits of 10^10 the rounding error of a quotient would be an
// exponent of hundreds. Two vectors of queries are interleaved, because the maxima and sums of one form a dependency
// chain.
template <typename P, typename T = Accumulator<P>>
void update_softmax(T* logits, int64_t count, int64_t query, T scale, const T* positive, PartialSoftmax<T> partial,
                    Sums<P> sums) {
  constexpr int kVector = kLanes<T>;
  const Vec<T> positives[2] = {load(positive + query), load(positive + query + kVector)};
  const Vec<T> old_shift[2] = {load(partial.shift + query), load(partial.shift + query + kVector)};
  Vec<T> shift[2] = {old_shift[0], old_shift[1]}, sum[2] = {};
  Mask<T> rank[2] = {};
  for (int64_t j = 0; j < count; ++j)
    for (int v = 0; v < 2; ++v) {
      const Vec<T> logit = load(logits + j * kGroup<P> + v * kVector);
      shift[v] = logit > shift[v] ? logit : shift[v];  // a NaN does not reach the maximum, but it reaches the sum
      rank[v] -= logit > positives[v];
    }
  store_weights<P>(logits, count, [&](Vec<T> logit, int v) {
    const Vec<T> weight = exp2((logit - shift[v]) * scale);
    sum[v] += weight;
    return weight;
  });
  for (int v = 0; v < 2; ++v) {
    const int64_t first = query + v * kVector;
    const Vec<T> decay = exp2((old_shift[v] - shift[v]) * scale);
    store(partial.shift + first, shift[v]);
    store(partial.sum + first, load(partial.sum + first) * decay + sum[v]);
    store(partial.rank + first, load(partial.rank + first) + __builtin_convertvector(rank[v], Vec<T>));
    bool decays = false;
    for (int64_t i = 0; i < kVector; ++i) decays |= decay[i] != T(1);
    if (sums.data && decays) sums.scale(first, decay);
  }
}

// The positive key of each query. With `excludes_itself`, key i is query i itself and does not count as its negative.
struct Positives {
  int64_t label_offset, keys;
  bool excludes_itself;
  int64_t key_of(int64_t query) const { return (label_offset + query) % keys; }
};

template <typename P>
struct Queries {
  using T = Accumulator<P>;
  T* positive_keys;  // [B, D]
  P* q_panels;       // packed queries
  T* positive;       // [padded B] q · positive key, summed in the same order as in a tile
};

// Scratch values that pack_queries needs.
template <typename P>
int64_t packing_size(int64_t width) {
  if constexpr (std::is_same_v<P, Bf16x2>)
    return std::max(kTileRows16, kPanelWidth<P>) * (padded_width<P>(width) + kPanelWidth<P>);
  else
    return 2 * kPanelWidth<P> * width;
}

// Fills `queries` for the panel of queries from `first` on.
template <typename P, typename T = Accumulator<P>>
void pack_queries(const Matrix& q, const Matrix& positive_keys, const Positives& positives, int64_t first, T sign,
                  const Queries<P>& queries, T* scratch) {
  const int64_t width = q.width, count = std::min<int64_t>(kPanelWidth<P>, q.rows - first);
  T* key_rows = queries.positive_keys + first * width;
  for (int64_t i = 0; i < count; ++i) widen(positive_keys, positives.key_of(first + i), 1, key_rows + i * width);
  if constexpr (std::is_same_v<P, Bf16x2>) {
    constexpr int64_t kRows = std::max(kTileRows16, kPanelWidth<P>);
    const TileScope tiles;
    const int64_t words = padded_width<P>(width) / 2;
    auto *q_rows = reinterpret_cast<P*>(scratch), *key_pairs = q_rows + kRows * words;
    T* products = reinterpret_cast<T*>(key_pairs + kRows * words);
    P* q_panel = queries.q_panels + first * words;
    pack_lanes(q, first, count, sign, q_rows, q_panel);
    std::fill(key_pairs, key_pairs + kRows * words, P(0));
    for (int64_t i = 0; i < count; ++i)
      copy_pairs(positive_keys, positives.key_of(first + i), 1, 1, 1, key_pairs + i * words);
    multiply_bf16<false>(kRows, words, key_pairs, words, q_panel, products, kPanelWidth<P>);
    for (int64_t i = 0; i < kPanelWidth<P>; ++i) queries.positive[first + i] = products[i * kPanelWidth<P> + i];
  } else {
    T *q_rows = scratch, *key_panel = scratch + kPanelWidth<P> * width, *q_panel = queries.q_panels + first * width;
    pack_lanes(q, first, count, sign, q_rows, q_panel);
    pack_rows(key_rows, width, count, width, T(1), key_panel);
    for (int64_t lane = 0; lane < kPanelWidth<P>; lane += kLanes<T>) {
      Vec<T> dot{};  // summed as in a tile, so that a key equal to the positive has exactly the positive's logit
      for (int64_t d = 0; d < width; ++d)
        dot = load(key_panel + d * kPanelWidth<P> + lane) * load(q_panel + d * kPanelWidth<P> + lane) + dot;
      store(queries.positive + first + lane, dot);
    }
  }
}

// A log-sum-exp of logits that are divided by τ, as logit / |τ| + rest: their sum would lose the rest beside 10^10.
struct LogSum {
  double logit, rest;
};

// The log-sum-exps as single numbers.
template <typename T>
void store_lse(const std::vector<LogSum>& lse, double tau, T* dst) {
  for (const LogSum& value : lse) *dst++ = T(value.logit / std::abs(tau) + value.rest);
}

template <typename T>
struct Outputs {
  T *loss, *dq;  // dq may be null
  int64_t* rank;
  LogSum* lse = nullptr;
};

// Computes loss, rank, lse and dq of query i from its partial softmaxes and its positive.
template <typename T>
void merge_partials(int64_t i, const Partition& partition, const T* partials, int64_t sums_width, double scale,
                    double tau, const T* positives, const T* positive_keys, int64_t width, const Outputs<T>& out) {
  const int64_t size = PartialSoftmax<T>::size(partition.query_block, sums_width), slot = i % partition.query_block;
  const auto partial = [&](int64_t range) {
    return PartialSoftmax<T>(
        const_cast<T*>(partials) + (i / partition.query_block * partition.key_ranges + range) * size,
        partition.query_block);
  };
  const double positive = double(positives[i]);
  double shift = kLowest, negatives = 0, rank = 0;
  for (int64_t range = 0; range < partition.key_ranges; ++range)
    shift = std::max(shift, double(partial(range).shift[slot]));
  for (int64_t range = 0; range < partition.key_ranges; ++range) {
    negatives += double(partial(range).sum[slot]) * std::exp2((double(partial(range).shift[slot]) - shift) * scale);
    rank += double(partial(range).rank[slot]);
  }
  // Computed relative to the larger of maximum and positive; log1p keeps a loss near zero accurate.
  const double gap = positive == INFINITY ? NAN : (shift - positive) * scale;  // as in plain torch, where ∞ − ∞ is NaN
  const double loss =
      gap <= 0 ? std::log1p(negatives * std::exp2(gap)) : gap * kLn2 + std::log(negatives + std::exp2(-gap));
  out.loss[i] = T(loss);
  out.rank[i] = int64_t(rank);
  if (out.lse) out.lse[i] = gap <= 0 ? LogSum{positive, loss} : LogSum{shift, loss - gap * kLn2};
  if (!out.dq) return;
  const double total = gap <= 0 ? 1 + negatives * std::exp2(gap) : negatives + std::exp2(-gap);
  const double unit = gap <= 0 ? std::exp2(gap) / total : 1 / total;  // softmax probability of a logit equal to `shift`
  T* dq = out.dq + i * width;
  const T positive_weight = T(negatives * unit / tau);
  for (int64_t d = 0; d < width; ++d) dq[d] = -positive_weight * positive_keys[i * width + d];
  for (int64_t range = 0; range < partition.key_ranges; ++range) {
    const T factor = T(std::exp2((double(partial(range).shift[slot]) - shift) * scale) * unit / tau);
    const T* weighted_keys = partial(range).weighted_keys + slot * sums_width;
    for (int64_t d = 0; d < width; ++d) dq[d] += factor * weighted_keys[d];
  }
}

// Sets the logits of each query's positive, and of the query itself, to kExcluded, so that they do not count as
// negatives.
template <typename P>
void mask_positives(Accumulator<P>* logits, const Positives& positives, int64_t first_key, int64_t count,
                    int64_t first_query, int64_t panels) {
  for (int64_t i = 0; i < panels * kPanelWidth<P>; ++i)
    for (const int64_t key : {positives.key_of(first_query + i), positives.excludes_itself ? first_query + i : -1})
      if (first_key <= key && key < first_key + count)
        logits[(key - first_key) * kGroup<P> + i] = Accumulator<P>(kExcluded);
}

// Computes loss and rank of queries against keys, and lse and dq unless they are null. With `keys_contain_positives`
// the positives are excluded from the sum over the keys, which keeps 1 − p accurate.
template <typename P, typename T = Accumulator<P>>
void info_nce(const Matrix& q, const Matrix& positive_keys, const Positives& positives, const Matrix& keys,
              bool keys_contain_positives, double tau, const Outputs<T>& out) {
  constexpr bool kSumsApart = Sums<P>::kColumns;
  const int64_t width = q.width, padded = padded_width<P>(width), sums_width = out.dq ? padded : 0;
  const Partition partition(q.rows, keys.rows, kPanelWidth<P>, kKeyBlock<P>);
  const int64_t padded_queries = partition.query_blocks * partition.query_block,
                threads = torch::stable::get_num_threads();
  const int64_t partial_size = PartialSoftmax<T>::size(partition.query_block, sums_width);
  const int64_t stream_size = std::max(Scratch<P>::size(width), packing_size<P>(width)),
                scratch_size = stream_size + (kSumsApart ? partition.query_block * sums_width : 0);
  const int64_t panels_size = padded_queries * (kSumsApart ? padded / 2 : width);
  const Tensor workspace =
      empty({padded_queries * (width + 1) + panels_size + partition.tasks() * partial_size + threads * scratch_size},
            kDtype<T>);
  T* memory = data<T>(workspace);
  const Queries<P> queries{memory, reinterpret_cast<P*>(memory + padded_queries * width),
                           memory + padded_queries * width + panels_size};
  T *partials = queries.positive + padded_queries, *scratches = partials + partition.tasks() * partial_size;
  const T sign = tau < 0 ? T(-1) : T(1);
  const double scale = kLog2E / std::abs(tau);
  for_tasks(panel_count<P>(q.rows), 16.0 * q.rows * width, scratches, scratch_size, [&](int64_t panel, T* scratch) {
    pack_queries(q, positive_keys, positives, panel * kPanelWidth<P>, sign, queries, scratch);
  });

  const double operations = 4.0 * q.rows * keys.rows * width;
  for_tasks(partition.tasks(), operations, scratches, scratch_size, [&](int64_t task, T* scratch) {
    const int64_t first_query = task / partition.key_ranges * partition.query_block,
                  key_range = task % partition.key_ranges;
    const int64_t count = std::min(partition.query_block, q.rows - first_query);
    PartialSoftmax<T> partial(partials + task * partial_size, partition.query_block);
    std::fill(partial.shift, partial.shift + partition.query_block, T(kLowest));
    std::fill(partial.sum, partial.sum + 2 * partition.query_block, T(0));
    const Sums<P> sums{!out.dq ? nullptr : kSumsApart ? scratch + stream_size : partial.weighted_keys, padded};
    std::fill(sums.data, sums.data + partition.query_block * sums_width, T(0));
    stream(keys, key_range * partition.key_range, std::min(keys.rows, (key_range + 1) * partition.key_range),
           queries.q_panels + first_query * panels_size / padded_queries, count, sums, Scratch<P>(scratch, width),
           [&](T* logits, int64_t key, int64_t keys, int64_t query, int64_t panels) {
             if (keys_contain_positives) mask_positives<P>(logits, positives, key, keys, first_query + query, panels);
             for (int64_t p = 0; p < panels; ++p)
               update_softmax<P>(logits + p * kPanelWidth<P>, keys, query + p * kPanelWidth<P>, T(scale),
                                 queries.positive + first_query, partial, sums);
           });
    if (kSumsApart && out.dq) sums.copy_rows(count, padded, partial.weighted_keys, padded);
  });
  for_tasks(q.rows, 4.0 * q.rows * partition.key_ranges * padded, memory, 0, [&](int64_t i, T*) {
    merge_partials(i, partition, partials, sums_width, scale, tau, queries.positive, queries.positive_keys, width, out);
  });
}

}  // namespace fastssl
