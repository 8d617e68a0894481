// Products of all pairs of rows of two matrices, tile by tile, for losses whose logits serve both sides: NT-Xent, where
// the matrices are the same views, and the pairwise sigmoid loss of images and texts.
//
// Rows are divided into groups. A task takes a pair of groups: it computes their logits a block of keys at a time, lets
// the caller replace them by weights, and adds the weighted sums of the keys to the queries' and those of the queries
// to the keys'. Pairs are scheduled so that no two tasks at a time have a group in common; so results need no locks,
// and are the same bits on any number of threads. Memory: packed copies of both matrices, and one tile of logits per
// thread.
#pragma once

#include "stream.h"

namespace fastssl {

// The tiles of the processor, held while a task multiplies bfloat16; nothing for other operands.
template <typename P>
using PairScope = std::conditional_t<std::is_same_v<P, Bf16x2>, TileScope, int>;

// A matrix [N, D] as an operand of products with all rows of another.
template <typename P>
struct PairOperand {
  using T = Accumulator<P>;
  static constexpr bool kPairs = std::is_same_v<P, Bf16x2>;
  static constexpr int64_t kBlock = kKeyBlock<T>;  // keys of a tile of logits
  static constexpr int64_t kMaxGroup = 4 * kGroup<T>;
  static constexpr int64_t kAlignment = kPairs ? std::max(32, kPanelWidth<P>) : kPanelWidth<P>;  // of groups
  // Values of a thread's tile: logits, and in bfloat16 their weights as pairs, twice.
  static constexpr int64_t kTileSize = kBlock * kMaxGroup * (kPairs ? 2 : 1);
  T* rows;      // [N, D]
  P* operands;  // the rows as pairs, [padded N, padded D / 2]; else `rows`
  P* panels;    // rows times `sign`, packed as lanes, [padded N / kPanelWidth][depth][kPanelWidth]
  P* columns;   // columns packed in panels, [padded D / kPanelWidth][N, or pairs of rows][kPanelWidth]
  int64_t count, width, padded, padded_count, depth, group, groups;

  static int64_t size(int64_t count, int64_t width) {
    const int64_t padded = padded_width<P>(width), padded_count = round_up(count, kAlignment);
    if (kPairs) return count * width + 3 * padded_count * padded / 2;
    return (count + padded_count) * width + count * padded;
  }
  PairOperand(const Matrix& z, T sign, T* memory)
      : rows(memory), count(z.rows), width(z.width), padded(padded_width<P>(z.width)),
        padded_count(round_up(count, kAlignment)), depth(kPairs ? padded / 2 : width), group(choose_group(z.rows)),
        groups((z.rows + group - 1) / group) {
    operands = reinterpret_cast<P*>(rows + (kPairs ? count * width : 0));
    panels = operands + (kPairs ? padded_count : count) * depth;
    columns = panels + padded_count * depth;
    for_tasks(padded_count / kAlignment, 50.0 * count * width, rows, 0, [&](int64_t task, T*) {
      const int64_t first = task * kAlignment, row_count = std::min(kAlignment, count - first);
      widen(z, first, row_count, rows + first * width);
      if constexpr (kPairs) {
        P* pairs = operands + first * depth;
        copy_pairs(z, first, row_count, kAlignment, sign, pairs);
        for (int64_t p = 0; p < kAlignment; p += kPanelWidth<P>)
          pack_rows(pairs + p * depth, depth, kPanelWidth<P>, depth, P(1), panels + (first + p) * depth);
        copy_pairs(z, first, row_count, kAlignment, 1, pairs);
        pack_row_pairs(pairs, depth, kAlignment, columns + first / 2 * kPanelWidth<P>, padded_count / 2);
      } else {
        pack_rows(rows + first * width, width, row_count, width, sign, panels + first * width);
        pack_columns(rows + first * width, row_count, width, columns + first * kPanelWidth<P>, count);
      }
    });
  }
  // Size of a group. There are 4 groups, or 8, 16, …, until a group has at most kMaxGroup rows: about as many tasks run
  // at a time as there are groups, or half as many.
  static int64_t choose_group(int64_t count) {
    int64_t groups = 4;
    while (count > groups * kMaxGroup) groups *= 2;
    return std::max(kAlignment, round_up<int64_t>((count + groups - 1) / groups, kAlignment));
  }
  int64_t first(int64_t g) const { return g * group; }
  int64_t end(int64_t g) const { return std::min(count, (g + 1) * group); }
};

// Values of the depth that are summed at a time: short sums round less than one long chain. A factor of 100, as in CLIP
// and SigLIP, turns the rounding of a logit into that of its weight.
constexpr int64_t kDepth = 128;

// Calls body(logits [keys, queries.group], first key, keys, first query, queries) for each tile of logits between two
// groups.
template <typename P, typename T = Accumulator<P>, typename Body>
void for_each_tile(const PairOperand<P>& q, const PairOperand<P>& k, int64_t query_group, int64_t key_group, T* logits,
                   const Body& body) {
  const int64_t query = q.first(query_group), queries = q.end(query_group) - query;
  for (int64_t key = k.first(key_group); key < k.end(key_group); key += q.kBlock) {
    const int64_t keys = std::min(q.kBlock, k.end(key_group) - key);
    for (int64_t p = 0; p < queries; p += kPanelWidth<P>)
      if constexpr (q.kPairs)
        multiply_bf16<false>(round_up<int64_t>(keys, kTileRows16), q.depth, k.operands + key * k.depth, k.depth,
                             q.panels + (query + p) * q.depth, logits + p, q.group);
      else
        for (int64_t d = 0; d == 0 || d < q.width; d += kDepth) {  // rows without values have logits of 0
          const auto multiply = d ? multiply_panel<true, 2, T> : multiply_panel<false, 2, T>;
          multiply(keys, std::min(kDepth, q.width - d), Operand<T>{k.rows + key * k.width + d, k.width, 1},
                   q.panels + (query + p) * q.width + d * kPanelWidth<T>, kPanelWidth<T>, logits + p, q.group);
        }
    body(logits, key, keys, query, queries);
  }
}

// query_sums[query] += Σ_key weights[key, query] k[key], and unless key_sums is null key_sums[key] += Σ_query
// weights[key, query] q[query]. The weights are [keys, q.group]; the rest of the tile is scratch.
template <typename P, typename T = Accumulator<P>>
void add_products(const PairOperand<P>& q, const PairOperand<P>& k, T* weights, int64_t key, int64_t keys,
                  int64_t query, int64_t queries, T* query_sums, T* key_sums) {
  const int64_t padded = q.padded;
  if constexpr (q.kPairs) {
    const int64_t padded_keys = round_up<int64_t>(keys, 32), padded_queries = round_up<int64_t>(queries, 32);
    P *by_key = reinterpret_cast<P*>(weights + q.kBlock * q.kMaxGroup), *by_query = by_key + q.kBlock * q.kMaxGroup / 2;
    round_rows(weights, q.group, keys, padded_keys, queries, padded_queries, by_key);
    transpose_bf16(by_key, padded_queries / 2, padded_keys, padded_queries / 2, by_query, padded_keys / 2);
    for (int64_t c = 0; c < padded; c += kPanelWidth<P>) {
      multiply_bf16<true>(padded_queries, padded_keys / 2, by_query, padded_keys / 2,
                          k.columns + c * k.padded_count / 2 + key / 2 * kPanelWidth<P>,
                          query_sums + query * padded + c, padded);
      if (key_sums)
        multiply_bf16<true>(padded_keys, padded_queries / 2, by_key, padded_queries / 2,
                            q.columns + c * q.padded_count / 2 + query / 2 * kPanelWidth<P>,
                            key_sums + key * padded + c, padded);
    }
  } else {
    for (int64_t c = 0; c < padded; c += kPanelWidth<P>) {
      multiply_panel<true>(queries, keys, Operand<T>{weights, 1, q.group},
                           k.columns + c * k.count + key * kPanelWidth<P>, kPanelWidth<P>,
                           query_sums + query * padded + c, padded);
      if (key_sums)
        multiply_panel<true>(keys, queries, Operand<T>{weights, q.group, 1},
                             q.columns + c * q.count + query * kPanelWidth<P>, kPanelWidth<P>,
                             key_sums + key * padded + c, padded);
    }
  }
}

}  // namespace fastssl
