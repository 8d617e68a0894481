// Attention of bfloat16 heads, on tiles (AMX) or by AVX-512's bf16 dot product. Lanes are queries, as in attention.cpp.
//
// Both multiply two bfloat16 values of a lane with two others and add both products to one float32 sum. So every
// operand is packed in pairs along the depth of its product: pairs of neighbours in a row where the depth is the head's
// width, pairs of two rows where it is the tokens. As on a GPU, softmax weights and gradients of scores are rounded to
// bfloat16 for the next product; scores, softmax and sums are float32.
//
// Forward (here), for a panel of 32 queries at a time: scores and their maxima, then unnormalised weights in pairs of
// keys; the outputs are divided by the sums of the weights at the end. Backward (attention_bf16_backward.h): weights
// are computed from the scores and the log-sum-exp, whose rounding to float32 is negligible beside bfloat16's, and only
// their bfloat16 values are stored.
//
// The dot product leaves the scores in registers, where maxima and weights are computed; this is written with
// intrinsics, because the compiler's vector extension has no such operation. Tiles write them to memory. Tiles take the
// weights as their second operand, whose pairs lie in lanes as the softmax leaves them; so the outputs and dq are
// transposed, [width, queries].
#pragma once

#include "attention_bias.h"
#include "bf16_heads.h"

namespace fastssl {
namespace {

// Calls body(std::true_type{}) where bfloat16 is multiplied on tiles, body(std::false_type{}) where by the dot product.
template <typename Body>
void with_bf16_products(const Body& body) {
#if defined(FASTSSL_BF16_DOT)
  if (bf16_products.load(std::memory_order_relaxed) == Bf16Products::kDot) return body(std::false_type{});
#endif
  body(std::true_type{});
}

// The tokens of a packed operand, with rows of zeros: a whole number of tiles, or of pairs.
template <bool kTiles>
int64_t padded_length(int64_t tokens) {
  return kTiles ? whole_tiles(tokens) : round_up<int64_t>(tokens, 2);
}

// Stride of transposed rows: no power of two, so that the rows of a tile lie in different sets of the cache.
inline int64_t column_stride(int64_t rows) { return whole_tiles(rows) / 2 + kTileWords; }

// Weights 2^((score − maximum) · scale) as pairs of two keys, [keys / 2 rounded up][kWidth], and their sums over the
// keys, for N vectors of queries.
template <int N>
void compute_weights(const float* scores, int64_t keys, const float* max, float scale, Bf16x2* weights, float* sums) {
  Vec<float> sum[N] = {}, maximum[N];
  for (int n = 0; n < N; ++n) maximum[n] = load(max + n * kVector);
  for (int64_t j = 0; j < keys; j += 2, scores += 2 * kWidth, weights += kWidth)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      const Vec<float> first = exp2_bf16((load(scores + n * kVector) - maximum[n]) * scale);
      Vec<float> second{};
      if (j + 1 < keys) second = exp2_bf16((load(scores + kWidth + n * kVector) - maximum[n]) * scale);
      sum[n] += first + second;
      store(weights + n * kVector, round_to_pairs(first, second));
    }
  for (int n = 0; n < N; ++n) store(sums + n * kVector, sum[n]);
}

// Multiplies the scores of a panel by `sign`, that of the scale, and finds their maxima over the keys.
inline void find_maxima(float* scores, int64_t keys, float sign, float* maxima) {
  for (int64_t lane = 0; lane < kWidth; lane += kVector) {
    Vec<float> max = splat(-INFINITY);
    for (int64_t j = 0; j < keys; ++j) {
      const Vec<float> score = load(scores + j * kWidth + lane) * sign;
      max = score > max ? score : max;  // a NaN does not reach the maximum, but it reaches the sum
      store(scores + j * kWidth + lane, score);
    }
    store(maxima + lane, max);
  }
}

// C[rows, padded] = A[rows, depth] B[depth, padded], or C += A B. On tiles, rows and depth are rounded up to whole
// ones.
template <bool kTiles>
void multiply_panels(bool accumulate, int64_t rows, int64_t depth, Operand<Bf16x2> a, const Bf16x2* b, int64_t padded,
                     float* c) {
#if defined(FASTSSL_BF16_DOT)
  if constexpr (!kTiles) {
    for (int64_t e = 0; e < padded; e += kWidth)
      (accumulate ? multiply_panel<true, 2, Bf16x2> : multiply_panel<false, 2, Bf16x2>)(rows, depth, a, b + e, padded,
                                                                                        c + e, padded);
    return;
  }
#endif
  for (int64_t e = 0; e < padded; e += kWidth)
    (accumulate ? multiply_bf16<true> : multiply_bf16<false>)(rows, depth, a.data, a.row_stride, b + e, c + e, padded,
                                                              padded);
}

#if defined(FASTSSL_BF16_DOT)

constexpr int64_t kScoreTileKeys = 12;  // keys of a block of scores in registers

// Scores of R keys and N vectors of queries times `sign`, that of the scale; updates the maximum of each query.
template <int R, int N>
__attribute__((noinline)) void score_tile(int64_t depth, const Bf16x2* keys, int64_t stride, const Bf16x2* queries,
                                          float sign, float* scores, float* max) {
  Vec<float> sums[R][N] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Vec<Bf16x2> lanes[N];
    for (int n = 0; n < N; ++n) lanes[n] = load(queries + d * kWidth + n * kVector);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<Bf16x2> key = splat(keys[r * stride + d]);
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) sums[r][n] = multiply_add(key, lanes[n], sums[r][n]);
    }
  }
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) {
    __m512 updated = __m512(load(max + n * kVector));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<float> score = sums[r][n] * sign;
      updated = _mm512_max_ps(__m512(score), updated);  // a NaN does not reach the maximum, but it reaches the sum
      store(scores + r * kWidth + n * kVector, score);
    }
    store(max + n * kVector, Vec<float>(updated));
  }
}

template <int R, int N>
void dispatch_score_tile(int64_t rows, int64_t depth, const Bf16x2* keys, int64_t stride, const Bf16x2* queries,
                         float sign, float* scores, float* max) {
  if constexpr (R > 0) {
    if (rows == R) return score_tile<R, N>(depth, keys, stride, queries, sign, scores, max);
    dispatch_score_tile<R - 1, N>(rows, depth, keys, stride, queries, sign, scores, max);
  }
}

// Rows of the next tile. The last two tiles are of equal height: a tile of one or two rows is limited by the latency of
// its multiply-adds.
inline int64_t next_tile_rows(int64_t remaining, int64_t max_rows) {
  return remaining >= 2 * max_rows || remaining <= max_rows ? std::min(remaining, max_rows) : (remaining + 1) / 2;
}

template <int N>
void score_panel(int64_t count, int64_t depth, const Bf16x2* keys, int64_t stride, const Bf16x2* queries, float sign,
                 float* scores, float* max) {
  std::fill(max, max + N * kVector, -INFINITY);
  for (int64_t j = 0; j < count;) {
    const int64_t rows = next_tile_rows(count - j, kScoreTileKeys);
    dispatch_score_tile<kScoreTileKeys, N>(rows, depth, keys + j * stride, stride, queries, sign, scores + j * kWidth,
                                           max);
    j += rows;
  }
}

#endif

template <bool kTiles>
struct ForwardScratch {
  Bf16x2* queries;          // one panel, pairs along the width
  Bf16x2 *keys, *values;    // pairs along the width; pairs of rows, on tiles transposed
  Bf16x2* weights;          // of a panel, pairs of keys: [keys / 2][kWidth]
  float *scores, *outputs;  // of a panel: [keys][kWidth]; [kWidth][padded], on tiles [padded][kWidth]
  float *max, *sums;
  BFloat16* copies[3];

  ForwardScratch(const Heads& q, const Heads& k, const Heads& v, Arena& arena) {
    const int64_t padded = whole_tiles(q.width), padded_keys = padded_length<kTiles>(k.length);
    queries = arena.allocate<Bf16x2>(padded / 2 * kWidth);
    keys = arena.allocate<Bf16x2>(padded_keys * padded / 2);
    values = arena.allocate<Bf16x2>(padded * column_stride(k.length));
    weights = arena.allocate<Bf16x2>(padded_keys / 2 * kWidth);
    scores = arena.allocate<float>(padded_keys * kWidth);
    outputs = arena.allocate<float>(kWidth * padded);
    max = arena.allocate<float>(kWidth);
    sums = arena.allocate<float>(kWidth);
    const Heads* inputs[] = {&q, &k, &v};
    for (int i = 0; i < 3; ++i) copies[i] = arena.allocate<BFloat16>(copy_size(*inputs[i]));
  }
};

// Rows beyond the last key are zero.
template <bool kTiles>
void pack_keys_and_values(const Bf16Rows& keys, const Bf16Rows& values, int64_t padded,
                          const ForwardScratch<kTiles>& s) {
  const int64_t padded_keys = padded_length<kTiles>(keys.count);
  if constexpr (kTiles) {
    pack_width_pairs(values, padded_keys, padded, s.keys);
    transpose_bf16(s.keys, padded / 2, padded_keys, padded / 2, s.values, column_stride(keys.count));
    std::fill(s.weights + (keys.count + 1) / 2 * kWidth, s.weights + padded_keys / 2 * kWidth, 0);
  } else {
    pack_row_pairs(values, padded_keys, padded, s.values);
  }
  pack_width_pairs(keys, padded_keys, padded, s.keys);
}

// The scores of one panel times `sign`, and their maxima.
template <bool kTiles>
void compute_scores(int64_t keys, [[maybe_unused]] int64_t queries, int64_t depth, int64_t padded, float sign,
                    const ForwardScratch<kTiles>& s) {
#if defined(FASTSSL_BF16_DOT)
  if constexpr (!kTiles)
    return (queries <= kVector ? score_panel<1> : score_panel<2>)(keys, depth, s.keys, padded / 2, s.queries, sign,
                                                                  s.scores, s.max);
#endif
  multiply_bf16<false>(whole_tiles(keys), depth, s.keys, padded / 2, s.queries, s.scores, kWidth);
  find_maxima(s.scores, keys, sign, s.max);
}

// The outputs of one panel, rounded, each query's divided by the sum of its weights; the first `keys` have weights.
template <bool kTiles>
void store_outputs(int64_t all_keys, int64_t keys, int64_t queries, int64_t width, const ForwardScratch<kTiles>& s,
                   BFloat16* out, int64_t stride) {
  const int64_t padded = whole_tiles(width);
  alignas(64) float factors[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) factors[i] = 1.0f / s.sums[i];
#if defined(FASTSSL_BF16_DOT)
  if constexpr (!kTiles) {
    multiply_panels<false>(false, queries, (keys + 1) / 2, {s.weights, 1, kWidth}, s.values, padded, s.outputs);
    return store_rows(s.outputs, padded, queries, width, factors, out, stride);
  }
#endif
  multiply_bf16<false>(padded, whole_tiles(keys) / 2, s.values, column_stride(all_keys), s.weights, s.outputs, kWidth);
  store_columns(s.outputs, queries, width, factors, out, stride);
}

template <bool kTiles>
void forward_bf16(const Heads& q, const Heads& k, const Heads& v, int64_t task, double scale,
                  const HeadBias<float>& bias, BFloat16* out, float* lse, char* scratch) {
  const int64_t sample = task / q.heads, head = task % q.heads, width = q.width, padded = whole_tiles(width);
  const int64_t depth = kTiles ? padded / 2 : (width + 1) / 2, stride = q.heads * width;
  Arena arena{scratch};
  const ForwardScratch<kTiles> s(q, k, v, arena);
  const TileScope tiles;
  const Bf16Rows queries = bf16_rows(q, sample, head, s.copies[0]);
  pack_keys_and_values<kTiles>(bf16_rows(k, sample, head, s.copies[1]), bf16_rows(v, sample, head, s.copies[2]), padded,
                               s);
  for (int64_t first = 0; first < q.length; first += kWidth) {
    const int64_t count = std::min(kWidth, q.length - first), lanes = count <= kVector ? kVector : kWidth;
    pack_lanes(queries, first, depth, s.queries);
    const int64_t visible = bias.visible(first, count, k.length);
    if (kTiles && bias.causal)
      std::fill(s.weights + (visible + 1) / 2 * kWidth, s.weights + whole_tiles(visible) / 2 * kWidth, 0);
    compute_scores<kTiles>(visible, count, depth, padded, !bias && scale < 0 ? -1.0f : 1.0f, s);
    for (int64_t lane = 0; bias && lane < lanes; lane += kVector)
      store(s.max + lane, add_bias(s.scores, visible, kWidth, lane, float(scale), bias.from(first)));
    const double factor = bias ? 1 : std::abs(scale);  // of the scores
    (count <= kVector ? compute_weights<1> : compute_weights<2>)(s.scores, visible, s.max, float(factor * kLog2E),
                                                                 s.weights, s.sums);
    for (int64_t i = 0; i < count; ++i)
      lse[task * q.length + first + i] = float(double(s.max[i]) * factor + std::log(double(s.sums[i])));
    BFloat16* dst = out + (sample * q.length + first) * stride + head * width;
    store_outputs<kTiles>(k.length, visible, count, width, s, dst, stride);
  }
}

template <bool kTiles>
int64_t forward_bf16_bytes(const Heads& q, const Heads& k, const Heads& v) {
  Arena arena{nullptr};
  ForwardScratch<kTiles>(q, k, v, arena);
  return arena.used;
}

}  // namespace
}  // namespace fastssl
