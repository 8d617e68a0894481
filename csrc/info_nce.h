// InfoNCE of queries against keys: the engine of info_nce, batch_info_nce, and of nt_xent where its own does not fit.
//
// Two products of 2·B·K·D operations each bound the forward pass with its gradient, 8.6 GFLOP at B = 256, K = 65,536,
// D = 128; the exponentials between them are a few in a hundred of that. A running maximum per query, rescaled when it
// rises, costs one more load and compare a logit, under one in a hundred: it is taken always, so that no bound on the
// length of the vectors has to hold.
//
// The work is cut by the shapes alone, never by the number of threads, and partial results are joined in a fixed order:
// the same bits come out on any number of threads.
#pragma once

#include "stream.h"

#include <cmath>

namespace fastssl {

constexpr int64_t kTasks = 16;          // pieces, where there is work for so many: 2 MB of partial sums at MoCo's sizes
constexpr int64_t kQueryBlock = 256;    // queries of one piece, at most: the keys are read and packed once for them
constexpr int64_t kShortest = 2 * kKeyBlock;  // keys of one piece, at least
constexpr int64_t kLongest = 1 << 22;   // keys of one piece, at most: their rank is counted in float
constexpr float kLowest = -1e30f;       // below every logit; finite, so that differences stay numbers

// How B queries and K keys are cut into pieces: blocks of queries times stretches of keys.
struct Cut {
  int64_t queries, keys, blocks, block, stretches, stretch;

  Cut(int64_t queries, int64_t keys, int64_t lanes) : queries(queries), keys(keys) {
    const int64_t most_stretches = 1 + keys / kShortest;
    const int64_t few = kTasks / std::min(kTasks, most_stretches);  // blocks that make up for too few keys
    blocks = std::max({int64_t(1), (queries + kQueryBlock - 1) / kQueryBlock, std::min(few, queries / (3 * lanes))});
    block = round_up(std::max<int64_t>(1, (queries + blocks - 1) / blocks), lanes);
    blocks = std::max<int64_t>(1, (queries + block - 1) / block);
    const int64_t wanted = std::clamp<int64_t>(kTasks / blocks, 1 + keys / kLongest, most_stretches);
    stretch = round_up(std::max<int64_t>(1, (keys + wanted - 1) / wanted), kKeyBlock);
    stretches = std::max<int64_t>(1, (keys + stretch - 1) / stretch);
  }
  int64_t pieces() const { return blocks * stretches; }
};

// Softmax of a block of queries over a stretch of keys, before it is joined with those over the other stretches.
template <typename T>
struct Partial {
  T *shift, *sum, *above, *mean;  // maximum of logit · log2 e / τ, Σ 2^(logit − shift), how many beat the positive,
                                  // Σ 2^(logit − shift) key [block, padded width]
  static int64_t size(int64_t block, int64_t mean_width) { return block * (3 + mean_width); }
  Partial(T* memory, int64_t block)
      : shift(memory), sum(memory + block), above(memory + 2 * block), mean(memory + 3 * block) {}
};

// Logits of one panel of queries and one block of keys become weights, and the partial softmax takes them in. Two
// vectors at a time, so that one's chain of maxima and sums hides behind the other's.
template <typename T>
void take_in(T* logits, int64_t count, int64_t query, T scale, const T* positive, Partial<T> partial,
             int64_t mean_width) {
  constexpr int kWide = kLanes<T>;
  const Vec<T> beaten[2] = {load(positive + query), load(positive + query + kWide)};
  const Vec<T> old_shift[2] = {load(partial.shift + query), load(partial.shift + query + kWide)};
  Vec<T> shift[2] = {old_shift[0], old_shift[1]}, sum[2] = {};
  Mask<T> above[2] = {};
  for (int64_t j = 0; j < count; ++j)
    for (int v = 0; v < 2; ++v) {
      const Vec<T> logit = load(logits + j * kGroup<T> + v * kWide), scaled = logit * scale;
      shift[v] = scaled > shift[v] ? scaled : shift[v];  // a NaN is passed over here and taken in by the sum
      above[v] -= logit > beaten[v];
    }
  for (int64_t j = 0; j < count; ++j)
    for (int v = 0; v < 2; ++v) {
      T* at = logits + j * kGroup<T> + v * kWide;
      const Vec<T> weight = exp2(load(at) * scale - shift[v]);
      sum[v] += weight;
      store(at, weight);
    }
  for (int v = 0; v < 2; ++v) {
    const int64_t at = query + v * kWide;
    const Vec<T> kept = exp2(old_shift[v] - shift[v]);
    store(partial.shift + at, shift[v]);
    store(partial.sum + at, load(partial.sum + at) * kept + sum[v]);
    store(partial.above + at, load(partial.above + at) + __builtin_convertvector(above[v], Vec<T>));
    for (int64_t i = 0; mean_width && i < kWide; ++i)
      if (kept[i] != T(1))
        for (int64_t d = 0; d < mean_width; ++d) partial.mean[(at + i) * mean_width + d] *= kept[i];
  }
}

// Which key is the positive of query i, and whether key i is the query itself, which is then no negative.
struct Positives {
  int64_t first, keys;
  bool excludes_itself;
  int64_t of(int64_t i) const { return (first + i) % keys; }
};

// What a query's loss and gradient are made of.
template <typename T>
struct Queries {
  T *q, *positive_keys;           // [B, D]
  T *q_panels, *positive;         // packed queries; q · positive key, summed in the order of the tiles [padded B]
};

// Fills `rows` for the panel of queries that begins at `from`; `key_panel` holds [D, kPanel].
template <typename T>
void prepare(const Matrix& q, const Matrix& positive_keys, const Positives& positives, int64_t from, T sign,
             const Queries<T>& rows, T* key_panel) {
  const int64_t width = q.width, count = std::min<int64_t>(kPanel<T>, q.rows - from);
  T *own = rows.q + from * width, *keys = rows.positive_keys + from * width, *panel = rows.q_panels + from * width;
  widen(q, from, count, own);
  for (int64_t i = 0; i < count; ++i) widen(positive_keys, positives.of(from + i), 1, keys + i * width);
  pack_rows(own, width, count, width, sign, panel);
  pack_rows(keys, width, count, width, T(1), key_panel);
  for (int64_t lane = 0; lane < kPanel<T>; lane += kLanes<T>) {
    Vec<T> dot{};  // as a tile sums it, so that a key equal to the positive is not above it
    for (int64_t d = 0; d < width; ++d)
      dot = load(key_panel + d * kPanel<T> + lane) * load(panel + d * kPanel<T> + lane) + dot;
    store(rows.positive + from + lane, dot);
  }
}

template <typename T>
struct Outputs {
  T *loss, *lse, *dq;  // lse and dq may be null
  int64_t* rank;
};

// Joins the partial softmaxes of query i with its positive.
template <typename T>
void join(int64_t i, const Cut& cut, const T* partials, int64_t mean_width, double scale, double tau,
          const Queries<T>& rows, int64_t width, const Outputs<T>& out) {
  const int64_t size = Partial<T>::size(cut.block, mean_width), at = i % cut.block;
  const auto partial = [&](int64_t s) {
    return Partial<T>(const_cast<T*>(partials) + (i / cut.block * cut.stretches + s) * size, cut.block);
  };
  const double positive = double(rows.positive[i]) * scale;
  double shift = kLowest, negatives = 0, above = 0;
  for (int64_t s = 0; s < cut.stretches; ++s) shift = std::max(shift, double(partial(s).shift[at]));
  for (int64_t s = 0; s < cut.stretches; ++s) {
    negatives += double(partial(s).sum[at]) * std::exp2(double(partial(s).shift[at]) - shift);
    above += double(partial(s).above[at]);
  }
  // Relative to whichever is larger; log1p keeps a loss near zero exact.
  const double gap = shift - positive;
  const double loss = gap <= 0 ? std::log1p(negatives * std::exp2(gap))
                               : gap * kLn2 + std::log(negatives + std::exp2(-gap));
  out.loss[i] = T(loss);
  out.rank[i] = int64_t(above);
  if (out.lse) out.lse[i] = T(loss + positive * kLn2);
  if (!out.dq) return;
  const double total = gap <= 0 ? 1 + negatives * std::exp2(gap) : negatives + std::exp2(-gap);
  const double unit = gap <= 0 ? std::exp2(gap) / total : 1 / total;  // probability of a weight of 1 at `shift`
  T* dq = out.dq + i * width;
  const T pulled = T(negatives * unit / tau);
  for (int64_t d = 0; d < width; ++d) dq[d] = -pulled * rows.positive_keys[i * width + d];
  for (int64_t s = 0; s < cut.stretches; ++s) {
    const T factor = T(std::exp2(double(partial(s).shift[at]) - shift) * unit / tau);
    const T* mean = partial(s).mean + at * mean_width;
    for (int64_t d = 0; d < width; ++d) dq[d] += factor * mean[d];
  }
}

// Logits of a query and its own positive, or itself, are taken out of a block.
template <typename T>
void exclude(T* logits, const Positives& positives, int64_t first_key, int64_t count, int64_t first_query,
             int64_t panels) {
  for (int64_t i = 0; i < panels * kPanel<T>; ++i)
    for (const int64_t key : {positives.of(first_query + i), positives.excludes_itself ? first_query + i : -1})
      if (first_key <= key && key < first_key + count) logits[(key - first_key) * kGroup<T> + i] = T(kLowest);
}

// Loss, rank, and maybe lse and dq, of queries against keys. Where the positives are among the keys (`in_keys`), they
// are left out of the sum of the others, which keeps 1 − p exact.
template <typename T>
void info_nce(const Matrix& q, const Matrix& positive_keys, const Positives& positives, const Matrix& keys, bool in_keys,
              double tau, const Outputs<T>& out) {
  const int64_t width = q.width, padded = panels_of<T>(width) * kPanel<T>, mean_width = out.dq ? padded : 0;
  const Cut cut(q.rows, keys.rows, kPanel<T>);
  const int64_t queries = cut.blocks * cut.block, threads = torch::stable::get_num_threads();
  const int64_t partial = Partial<T>::size(cut.block, mean_width), scratch = Scratch<T>::size(width);
  const Tensor workspace = empty({queries * (3 * width + 1) + cut.pieces() * partial + threads * scratch}, kDtype<T>);
  T* memory = data<T>(workspace);
  const Queries<T> rows{memory, memory + queries * width, memory + 2 * queries * width, memory + 3 * queries * width};
  T *partials = rows.positive + queries, *scratches = partials + cut.pieces() * partial;
  const T sign = tau < 0 ? T(-1) : T(1);
  const double scale = kLog2E / std::abs(tau);
  for_tasks(panels_of<T>(q.rows), 16.0 * q.rows * width, scratches, scratch, [&](int64_t panel, T* own) {
    prepare(q, positive_keys, positives, panel * kPanel<T>, sign, rows, own);
  });

  const double operations = 4.0 * q.rows * keys.rows * width;
  for_tasks(cut.pieces(), operations, scratches, scratch, [&](int64_t piece, T* own) {
    const int64_t first_query = piece / cut.stretches * cut.block, stretch = piece % cut.stretches;
    Partial<T> mine(partials + piece * partial, cut.block);
    std::fill(mine.shift, mine.shift + cut.block, T(kLowest));
    std::fill(mine.sum, mine.sum + partial - cut.block, T(0));
    stream(keys, stretch * cut.stretch, std::min(keys.rows, (stretch + 1) * cut.stretch),
           rows.q_panels + first_query * width, std::min(cut.block, q.rows - first_query),
           out.dq ? mine.mean : nullptr, Scratch<T>(own, width),
           [&](T* logits, int64_t key, int64_t count, int64_t query, int64_t panels) {
             if (in_keys) exclude(logits, positives, key, count, first_query + query, panels);
             for (int64_t p = 0; p < panels; ++p)
               take_in(logits + p * kPanel<T>, count, query + p * kPanel<T>, T(scale), rows.positive + first_query,
                       mine, mean_width);
           });
  });
  for_tasks(q.rows, 4.0 * q.rows * cut.stretches * padded, memory, 0,
            [&](int64_t i, T*) { join(i, cut, partials, mean_width, scale, tau, rows, width, out); });
}

}  // namespace fastssl
