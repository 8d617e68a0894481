// The backward pass of attention_bf16.h.
#pragma once

#include "attention_bf16.h"

namespace fastssl {
namespace {

constexpr int64_t kMaxGradientGroup = 128;  // largest group of queries, whose weights are stored

#if defined(FASTSSL_BF16_DOT)

constexpr int64_t kGradientTileKeys = 6;  // keys of a block of scores and products: as many registers as of scores

#endif

// Size of the groups of queries: all but the last have this size, a whole number of tiles.
inline int64_t backward_group(int64_t length) {
  const int64_t groups = std::max<int64_t>(1, (length + kMaxGradientGroup - 1) / kMaxGradientGroup);
  return std::max(kTileDepth, whole_tiles((length + groups - 1) / groups));
}

// True where log-sum-exps in float32 have enough decimals for softmax weights in bfloat16.
inline bool are_exact(const float* lse, int64_t count) {
  return std::all_of(lse, lse + count, [](float x) { return !(std::abs(x) >= 4096.0f); });  // a NaN may propagate
}

template <bool kTiles>
struct BackwardScratch {
  int64_t group;
  Bf16x2 *queries, *upstream;          // panels of a group of queries
  Bf16x2 *keys, *values;               // pairs along the width
  Bf16x2 *query_rows, *upstream_rows;  // pairs of rows
  Bf16x2* key_rows;                    // pairs of rows, on tiles transposed
  Bf16x2 *weights, *gradients;         // of a group, pairs of queries: [keys][group / 2]
  Bf16x2* gradient_pairs;              // of a group, pairs of keys: [keys / 2][group]
  float *scores, *products;            // of a panel, on tiles only: [keys][kWidth]
  float *lse, *row_dot, *dq, *dk, *dv;
  BFloat16* copies[5];

  BackwardScratch(const Heads& q, const Heads& k, const Heads& v, const Heads& out, const Heads& dout, Arena& arena) {
    group = backward_group(q.length);
    const int64_t padded = whole_tiles(q.width), padded_keys = padded_length<kTiles>(k.length);
    for (Bf16x2** panels : {&queries, &upstream}) *panels = arena.allocate<Bf16x2>(padded / 2 * group);
    for (Bf16x2** rows : {&query_rows, &upstream_rows})
      *rows = arena.allocate<Bf16x2>(padded_length<kTiles>(q.length) / 2 * padded);
    for (Bf16x2** rows : {&keys, &values}) *rows = arena.allocate<Bf16x2>(padded_keys * padded / 2);
    key_rows = arena.allocate<Bf16x2>(kTiles ? padded * column_stride(k.length) : padded_keys * padded / 2);
    for (Bf16x2** products : {&weights, &gradients, &gradient_pairs})
      *products = arena.allocate<Bf16x2>(padded_keys * group / 2);
    for (float** panel : {&scores, &products}) *panel = arena.allocate<float>(kTiles ? padded_keys * kWidth : 0);
    for (float** lanes : {&lse, &row_dot}) *lanes = arena.allocate<float>(group);
    dq = arena.allocate<float>(group * padded);
    for (float** sums : {&dk, &dv}) *sums = arena.allocate<float>(padded_keys * padded);
    const Heads* inputs[] = {&q, &k, &v, &out, &dout};
    for (int i = 0; i < 5; ++i) copies[i] = arena.allocate<BFloat16>(copy_size(*inputs[i]));
  }
};

struct Panel {  // a panel of queries with their upstream gradients
  int64_t depth, stride, group;
  const Bf16x2 *queries, *upstream;
  const float *lse, *row_dot;
  float scale;
  uint32_t valid;        // mask of the queries that exist
  HeadBias<float> bias;  // from the panel's first query on

  // Weights and gradients of the scores for the keys j and j + 1. `products` are upstream gradient · value; without
  // `has_second` only the first key exists.
  void store_gradients(Vec<float> (&scores)[2][2], Vec<float> (&products)[2][2], int64_t j, bool has_second,
                       Bf16x2* weights, Bf16x2* gradients, Bf16x2* gradient_pairs) const {
    Vec<Bf16x2> rounded[2] = {};
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      Vec<float> weight[2], gradient[2];
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n) {
        uint16_t bits = h == 0 || has_second ? uint16_t(valid >> (n * kVector)) : 0;
        if (bias.causal) bits &= ~first_bits(std::max<int64_t>(0, j + h - bias.first - n * kVector));
        const int64_t place = (j + h) * bias.stride + n * kVector;  // in the bias
        Vec<float> score = scores[h][n] * float(scale * kLog2E) - load(lse + n * kVector);
        if (bias.values && bits) score += load(bias.values + place) * float(kLog2E);
        const Vec<float> difference = products[h][n] - load(row_dot + n * kVector);
        weight[n] = masked(exp2_bf16(score), bits);
        gradient[n] = masked(weight[n] * scale * difference, bits);
        if (bias.gradient && bits)
          store(bias.gradient + place, load(bias.gradient + place) + masked(weight[n] * difference, bits));
      }
      store(weights + h * group / 2, to_bf16(weight[0], weight[1]));
      rounded[h] = to_bf16(gradient[0], gradient[1]);
      store(gradients + h * group / 2, rounded[h]);
    }
    store(gradient_pairs, zip_pairs<false>(rounded[0], rounded[1]));
    store(gradient_pairs + kVector, zip_pairs<true>(rounded[0], rounded[1]));
  }
};

#if defined(FASTSSL_BF16_DOT)

// Weights and gradients of the scores for R keys from `first` on, an even number, and a panel. The last key may be
// padding: `count` exist.
template <int R>
__attribute__((noinline)) void gradient_tile(const Panel& panel, const Bf16x2* keys, const Bf16x2* values,
                                             int64_t first, int64_t count, Bf16x2* weights, Bf16x2* gradients,
                                             Bf16x2* gradient_pairs) {
  const int64_t depth = panel.depth, stride = panel.stride;
  const Bf16x2 *queries = panel.queries, *upstream = panel.upstream;
  Vec<float> scores[R / 2][2][2] = {}, products[R / 2][2][2] = {};
  for (int64_t d = 0; d < depth; ++d) {
    const Vec<Bf16x2> q0 = load(queries + d * kWidth), q1 = load(queries + d * kWidth + kVector);
    const Vec<Bf16x2> u0 = load(upstream + d * kWidth), u1 = load(upstream + d * kWidth + kVector);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Vec<float>(&score)[2] = scores[r / 2][r % 2], (&product)[2] = products[r / 2][r % 2];
      const Vec<Bf16x2> key = splat(keys[r * stride + d]), value = splat(values[r * stride + d]);
      score[0] = multiply_add(key, q0, score[0]);
      score[1] = multiply_add(key, q1, score[1]);
      product[0] = multiply_add(value, u0, product[0]);
      product[1] = multiply_add(value, u1, product[1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R / 2; ++r)
    panel.store_gradients(scores[r], products[r], first + 2 * r, 2 * r + 1 < count, weights + r * panel.group,
                          gradients + r * panel.group, gradient_pairs + r * panel.group);
}

template <int R>
void dispatch_gradient_tile(int64_t rows, const Panel& panel, const Bf16x2* keys, const Bf16x2* values, int64_t first,
                            int64_t count, Bf16x2* weights, Bf16x2* gradients, Bf16x2* gradient_pairs) {
  if constexpr (R > 0) {
    if (rows == R) return gradient_tile<R>(panel, keys, values, first, count, weights, gradients, gradient_pairs);
    dispatch_gradient_tile<R - 2>(rows, panel, keys, values, first, count, weights, gradients, gradient_pairs);
  }
}

inline void gradient_panel(const Panel& panel, const BackwardScratch<false>& s, int64_t lane, int64_t keys) {
  for (int64_t j = 0; j < keys;) {
    const int64_t rows = round_up<int64_t>(next_tile_rows(keys - j, kGradientTileKeys), 2), offset = j * s.group / 2;
    dispatch_gradient_tile<kGradientTileKeys>(rows, panel, s.keys + j * panel.stride, s.values + j * panel.stride, j,
                                              keys - j, s.weights + offset + lane / 2, s.gradients + offset + lane / 2,
                                              s.gradient_pairs + offset + lane);
    j += rows;
  }
}

#endif

// Weights and gradients of the scores of a panel whose first query is `lane` of its group.
template <bool kTiles>
void compute_gradients(const Panel& panel, const BackwardScratch<kTiles>& s, int64_t lane, int64_t keys) {
#if defined(FASTSSL_BF16_DOT)
  if constexpr (!kTiles) return gradient_panel(panel, s, lane, keys);
#endif
  const int64_t rows = whole_tiles(keys);
  multiply_bf16<false>(rows, panel.depth, s.keys, panel.stride, panel.queries, s.scores, kWidth);
  multiply_bf16<false>(rows, panel.depth, s.values, panel.stride, panel.upstream, s.products, kWidth);
  for (int64_t j = 0; j < keys; j += 2) {
    Vec<float> scores[2][2], products[2][2];
    for (int i = 0; i < 4; ++i) {
      scores[i / 2][i % 2] = load(s.scores + j * kWidth + i * kVector);
      products[i / 2][i % 2] = load(s.products + j * kWidth + i * kVector);
    }
    const int64_t offset = j * s.group / 2;
    panel.store_gradients(scores, products, j, j + 1 < keys, s.weights + offset + lane / 2,
                          s.gradients + offset + lane / 2, s.gradient_pairs + offset + lane);
  }
}

// dq of the `count` queries of a group, of which the first `keys` have gradients.
template <bool kTiles>
void store_query_gradients(int64_t all_keys, int64_t keys, int64_t count, int64_t width,
                           const BackwardScratch<kTiles>& s, BFloat16* dq, int64_t stride) {
  const int64_t padded = whole_tiles(width);
#if defined(FASTSSL_BF16_DOT)
  if constexpr (!kTiles) {
    multiply_panels<false>(false, count, (keys + 1) / 2, {s.gradient_pairs, 1, s.group}, s.key_rows, padded, s.dq);
    return store_rows(s.dq, padded, count, width, nullptr, dq, stride);
  }
#endif
  for (int64_t lane = 0; lane < count; lane += kWidth) {
    multiply_bf16<false>(padded, whole_tiles(keys) / 2, s.key_rows, column_stride(all_keys), s.gradient_pairs + lane,
                         s.dq, kWidth, s.group);
    store_columns(s.dq, std::min(kWidth, count - lane), width, nullptr, dq + lane * stride, stride);
  }
}

// Packs the rows of one head; rows beyond the last are zero.
template <bool kTiles>
void pack_head(const Bf16Rows& queries, const Bf16Rows& keys, const Bf16Rows& values, const Bf16Rows& upstream,
               const BackwardScratch<kTiles>& s) {
  const int64_t padded = whole_tiles(keys.width), padded_keys = padded_length<kTiles>(keys.count);
  pack_width_pairs(keys, padded_keys, padded, s.keys);
  pack_width_pairs(values, padded_keys, padded, s.values);
  pack_row_pairs(queries, padded_length<kTiles>(queries.count), padded, s.query_rows);
  pack_row_pairs(upstream, padded_length<kTiles>(queries.count), padded, s.upstream_rows);
  if constexpr (!kTiles) return pack_row_pairs(keys, padded_keys, padded, s.key_rows);
  transpose_bf16(s.keys, padded / 2, padded_keys, padded / 2, s.key_rows, column_stride(keys.count));
  const int64_t first = round_up<int64_t>(keys.count, 2) * s.group / 2, end = padded_keys * s.group / 2;
  for (Bf16x2* products : {s.weights, s.gradients, s.gradient_pairs}) std::fill(products + first, products + end, 0);
}

template <bool kTiles>
void backward_bf16(const Heads& dout, const Heads& q, const Heads& k, const Heads& v, const Heads& out,
                   const float* lse, int64_t task, double scale, const HeadBias<float>& bias,
                   const Gradients<BFloat16>& gradients, char* scratch) {
  const int64_t sample = task / q.heads, head = task % q.heads, width = q.width, padded = whole_tiles(width);
  const int64_t depth = kTiles ? padded / 2 : (width + 1) / 2;
  Arena arena{scratch};
  const BackwardScratch<kTiles> s(q, k, v, out, dout, arena);
  const TileScope tiles;
  const Bf16Rows queries = bf16_rows(q, sample, head, s.copies[0]), keys = bf16_rows(k, sample, head, s.copies[1]);
  const Bf16Rows values = bf16_rows(v, sample, head, s.copies[2]), outputs = bf16_rows(out, sample, head, s.copies[3]);
  const Bf16Rows upstream = bf16_rows(dout, sample, head, s.copies[4]);
  pack_head<kTiles>(queries, keys, values, upstream, s);
  for (int64_t first = 0; first < q.length; first += s.group) {
    const int64_t count = std::min(s.group, q.length - first), padded_count = whole_tiles(count);
    const int64_t visible = bias.visible(first, count, k.length), seen = bias.seen(first, k.length);
    for (int64_t lane = 0; lane < padded_count; lane += kWidth) {
      const int64_t panel_queries = std::clamp<int64_t>(count - lane, 0, kWidth);
      Bf16x2 *q_panel = s.queries + lane * depth, *dout_panel = s.upstream + lane * depth;
      pack_lanes(queries, first + lane, depth, q_panel);
      pack_lanes(upstream, first + lane, depth, dout_panel);
      for (int64_t i = 0; i < kWidth; ++i) {
        const int64_t row = first + lane + i;
        s.lse[lane + i] = i < panel_queries ? lse[task * q.length + row] * float(kLog2E) : 0.0f;
        s.row_dot[lane + i] = i < panel_queries ? dot_rows(outputs, upstream, row) : 0.0f;
      }
      const float *panel_lse = s.lse + lane, *panel_dot = s.row_dot + lane;
      const Panel panel{depth,
                        padded / 2,
                        s.group,
                        q_panel,
                        dout_panel,
                        panel_lse,
                        panel_dot,
                        float(scale),
                        first_bits(panel_queries),
                        bias.from(first + lane)};
      compute_gradients<kTiles>(panel, s, lane, visible);
    }
    const int64_t pairs = kTiles ? padded_count / 2 : (count + 1) / 2, row = first / 2 * padded;
    // The first group that sees a key writes its sums, later ones add to them.
    for (const auto& [begin, end] : {std::pair(int64_t(0), seen), std::pair(seen, visible)}) {
      if (begin == end) continue;
      const int64_t offset = begin * s.group / 2;
      multiply_panels<kTiles>(end == seen, end - begin, pairs, {s.weights + offset, s.group / 2, 1},
                              s.upstream_rows + row, padded, s.dv + begin * padded);
      multiply_panels<kTiles>(end == seen, end - begin, pairs, {s.gradients + offset, s.group / 2, 1},
                              s.query_rows + row, padded, s.dk + begin * padded);
    }
    BFloat16* dq = gradients.q + gradients.offset(q, sample, first, head);
    store_query_gradients<kTiles>(k.length, visible, count, width, s, dq, gradients.token_stride);
  }
  const int64_t key_offset = gradients.offset(k, sample, 0, head);
  store_rows(s.dk, padded, k.length, width, nullptr, gradients.k + key_offset, gradients.token_stride);
  store_rows(s.dv, padded, k.length, width, nullptr, gradients.v + key_offset, gradients.token_stride);
}

template <bool kTiles>
int64_t backward_bf16_bytes(const Heads& q, const Heads& k, const Heads& v, const Heads& out, const Heads& dout) {
  Arena arena{nullptr};
  BackwardScratch<kTiles>(q, k, v, out, dout, arena);
  return arena.used;
}

}  // namespace
}  // namespace fastssl
