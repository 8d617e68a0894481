// Attention of bfloat16 heads with AVX-512's bf16 dot product, written with intrinsics because the compiler's vector
// extension has no such operation. Lanes are queries, as in attention.cpp.
//
// The instruction multiplies two bfloat16 values of a lane with two others and adds both products to one float32 sum.
// So every operand is packed in pairs along the depth of its product: pairs of neighbours in a row where the depth is
// the head's width, pairs of two rows where it is the tokens. As on a GPU, softmax weights and gradients of scores are
// rounded to bfloat16 for the next product; scores, softmax and sums are float32.
//
// Forward, for a panel of 32 queries at a time: scores and their maxima, then unnormalised weights in pairs of keys;
// the outputs are divided by the sums of the weights at the end. Backward: weights are computed from the scores and the
// log-sum-exp (whose rounding to float32 is negligible beside bfloat16's) in the registers that hold the scores, and
// only their bfloat16 values are stored.
#pragma once

#include "avx512_bf16.h"
#include "heads.h"
#include "microkernel.h"

#if defined(FASTSSL_BF16_DOT)

namespace fastssl {
namespace {

constexpr int64_t kVector = kLanes<Bf16x2>;      // 16
constexpr int64_t kWidth = kPanelWidth<Bf16x2>;  // 32: queries of a panel, and bfloat16 values of a vector
constexpr int64_t kMaxGradientGroup = 128;  // largest group of queries in the backward pass, whose weights are stored
constexpr int64_t kScoreTileKeys = 12;      // keys of a tile of scores
constexpr int64_t kGradientTileKeys =
    6;  // keys of a tile of scores and products: as many accumulators as 12 keys of scores

// Pairs (a, b) of the values of two rows: the first or the last 16 of 32.
template <bool kLast>
inline Vec<Bf16x2> zip_pairs(Vec<Bf16x2> a, Vec<Bf16x2> b) {
  const Vec<Bf16x2> lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Vec<Bf16x2> index = lane + (kLast ? 16 : 0) + ((lane + (kLast ? 48 : 32)) << 16);
  return Vec<Bf16x2>(_mm512_permutex2var_epi16(__m512i(a), __m512i(index), __m512i(b)));
}

// A mask with the lowest min(count, 32) bits set.
inline uint32_t first_bits(int64_t count) { return uint32_t((uint64_t(1) << std::min<int64_t>(count, 32)) - 1); }

struct Bf16Rows {  // rows of one head, each contiguous
  const BFloat16* data;
  int64_t stride, count, width;

  // Mask of the 32 columns from `column` on, set where a column exists.
  uint32_t mask(int64_t column) const { return first_bits(width - column); }
  // 32 values of a row from `column` on; zeros outside the mask and beyond the last row.
  Vec<Bf16x2> load(int64_t row, int64_t column, uint32_t mask) const {
    return Vec<Bf16x2>(_mm512_maskz_loadu_epi16(row < count ? mask : 0, data + row * stride + column));
  }
};

struct Arena {  // allocates from a thread's scratch memory; with a null base it only adds up the sizes
  char* base;
  int64_t used = 0;

  template <typename T>
  T* allocate(int64_t count) {
    T* data = reinterpret_cast<T*>(base + used);
    used += round_up<int64_t>(count * sizeof(T), 64);
    return data;
  }
};

// The rows of one head of `x`, copied to `copy` only where they are not contiguous.
inline Bf16Rows bf16_rows(const Heads& x, int64_t sample, int64_t head, BFloat16* copy) {
  const BFloat16* src = x.head<BFloat16>(sample, head);
  if (x.strides[3] == 1 || x.width == 1) return {src, x.strides[1], x.length, x.width};
  for (int64_t l = 0; l < x.length; ++l)
    for (int64_t e = 0; e < x.width; ++e) copy[l * x.width + e] = src[l * x.strides[1] + e * x.strides[3]];
  return {copy, x.width, x.length, x.width};
}

inline int64_t copy_size(const Heads& x) { return x.strides[3] == 1 || x.width == 1 ? 0 : x.length * x.width; }

// Packs pairs of neighbours in a row: [count, width] -> [count rounded up to even][padded / 2], padded with zeros.
inline void pack_width_pairs(const Bf16Rows& x, int64_t padded, Bf16x2* dst) {
  for (int64_t e = 0; e < padded; e += kWidth, dst += kVector) {
    const uint32_t mask = x.mask(e);
    for (int64_t row = 0; row < round_up<int64_t>(x.count, 2); ++row)
      store(dst + row * padded / 2, x.load(row, e, mask));
  }
}

// Packs pairs of two rows: [count, width] -> [count / 2 rounded up][padded], padded with zeros.
inline void pack_row_pairs(const Bf16Rows& x, int64_t padded, Bf16x2* dst) {
  for (int64_t e = 0; e < padded; e += kWidth, dst += kWidth) {
    const uint32_t mask = x.mask(e);
    for (int64_t row = 0; row < x.count; row += 2) {
      const Vec<Bf16x2> a = x.load(row, e, mask), b = x.load(row + 1, e, mask);
      store(dst + row / 2 * padded, zip_pairs<false>(a, b));
      store(dst + row / 2 * padded + kVector, zip_pairs<true>(a, b));
    }
  }
}

// Packs the 32 rows from `first` on as lanes, in pairs along the width: -> [width / 2 rounded up][32].
inline void pack_queries(const Bf16Rows& x, int64_t first, Bf16x2* dst) {
  const int64_t depth = (x.width + 1) / 2;
  for (int64_t lane = 0; lane < kWidth; lane += kVector)
    for (int64_t d = 0; d < depth; d += kVector) {
      Vec<Bf16x2> square[kVector];
      const uint32_t mask = x.mask(2 * d);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kVector; ++i) square[i] = x.load(first + lane + i, 2 * d, mask);
      transpose<Bf16x2>(square);
      for (int64_t i = 0; i < std::min(kVector, depth - d); ++i) store(dst + (d + i) * kWidth + lane, square[i]);
    }
}

// Rounds `count` rows of float32 to bfloat16, each multiplied by its factor unless `factor` is null.
inline void store_rows(const float* src, int64_t padded, int64_t count, int64_t width, const float* factor,
                       BFloat16* dst, int64_t stride) {
  for (int64_t row = 0; row < count; ++row, src += padded, dst += stride)
    for (int64_t e = 0; e < width; e += kWidth) {
      Vec<float> first = load(src + e), second = load(src + e + kVector);
      if (factor) first *= factor[row], second *= factor[row];
      _mm512_mask_storeu_epi16(dst + e, first_bits(width - e), __m512i(to_bf16(first, second)));
    }
}

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

// Weights 2^((score − maximum) · scale) as pairs of two keys, [keys / 2 rounded up][32], and their sums over the keys.
template <int N>
void compute_weights(const float* scores, int64_t keys, const float* max, float scale, Bf16x2* weights, float* sums) {
  const Vec<Bf16x2> lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Vec<Bf16x2> pair_order = lane + ((lane + 16) << 16);
  Vec<float> sum[N] = {}, maximum[N];
  for (int n = 0; n < N; ++n) maximum[n] = load(max + n * kVector);
  for (int64_t j = 0; j < keys; j += 2, scores += 2 * kWidth, weights += kWidth)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      const Vec<float> first = exp2_bf16((load(scores + n * kVector) - maximum[n]) * scale);
      Vec<float> second{};
      if (j + 1 < keys) second = exp2_bf16((load(scores + kWidth + n * kVector) - maximum[n]) * scale);
      sum[n] += first + second;
      store(weights + n * kVector,
            Vec<Bf16x2>(_mm512_permutexvar_epi16(__m512i(pair_order), __m512i(to_bf16(first, second)))));
    }
  for (int n = 0; n < N; ++n) store(sums + n * kVector, sum[n]);
}

// C[rows, padded] = A[rows, depth] B[depth, padded], or C += A B.
inline void multiply_panels(bool accumulate, int64_t rows, int64_t depth, Operand<Bf16x2> a, const Bf16x2* b,
                            int64_t padded, float* c) {
  for (int64_t e = 0; e < padded; e += kWidth)
    (accumulate ? multiply_panel<true, 2, Bf16x2> : multiply_panel<false, 2, Bf16x2>)(rows, depth, a, b + e, padded,
                                                                                      c + e, padded);
}

struct ForwardScratch {
  Bf16x2 *queries, *keys, *values, *weights;
  float *scores, *outputs, *max, *sums;
  BFloat16* copies[3];

  ForwardScratch(const Heads& q, const Heads& k, const Heads& v, Arena& arena) {
    const int64_t padded = round_up<int64_t>(q.width, kWidth), even_keys = round_up<int64_t>(k.length, 2);
    queries = arena.allocate<Bf16x2>(padded / 2 * kWidth);
    keys = arena.allocate<Bf16x2>(even_keys * padded / 2);
    values = arena.allocate<Bf16x2>(even_keys / 2 * padded);
    weights = arena.allocate<Bf16x2>(even_keys / 2 * kWidth);
    scores = arena.allocate<float>(k.length * kWidth);
    outputs = arena.allocate<float>(kWidth * padded);
    max = arena.allocate<float>(kWidth);
    sums = arena.allocate<float>(kWidth);
    const Heads* inputs[] = {&q, &k, &v};
    for (int i = 0; i < 3; ++i) copies[i] = arena.allocate<BFloat16>(copy_size(*inputs[i]));
  }
};

inline void forward_bf16(const Heads& q, const Heads& k, const Heads& v, int64_t task, double scale, BFloat16* out,
                         float* lse, char* scratch) {
  const int64_t sample = task / q.heads, head = task % q.heads, width = q.width;
  const int64_t padded = round_up<int64_t>(width, kWidth), depth = (width + 1) / 2, stride = q.heads * width;
  Arena arena{scratch};
  const ForwardScratch s(q, k, v, arena);
  const Bf16Rows queries = bf16_rows(q, sample, head, s.copies[0]);
  pack_width_pairs(bf16_rows(k, sample, head, s.copies[1]), padded, s.keys);
  pack_row_pairs(bf16_rows(v, sample, head, s.copies[2]), padded, s.values);
  for (int64_t first = 0; first < q.length; first += kWidth) {
    const int64_t count = std::min(kWidth, q.length - first);
    pack_queries(queries, first, s.queries);
    const bool one_vector = count <= kVector;
    (one_vector ? score_panel<1> : score_panel<2>)(k.length, depth, s.keys, padded / 2, s.queries,
                                                   scale < 0 ? -1.0f : 1.0f, s.scores, s.max);
    (one_vector ? compute_weights<1> : compute_weights<2>)(s.scores, k.length, s.max, float(std::abs(scale) * kLog2E),
                                                           s.weights, s.sums);
    multiply_panels(false, count, (k.length + 1) / 2, {s.weights, 1, kWidth}, s.values, padded, s.outputs);
    for (int64_t i = 0; i < count; ++i) {
      lse[task * q.length + first + i] = float(double(s.max[i]) * std::abs(scale) + std::log(double(s.sums[i])));
      s.sums[i] = 1.0f / s.sums[i];
    }
    BFloat16* dst = out + (sample * q.length + first) * stride + head * width;
    store_rows(s.outputs, padded, count, width, s.sums, dst, stride);
  }
}

inline int64_t forward_bf16_bytes(const Heads& q, const Heads& k, const Heads& v) {
  Arena arena{nullptr};
  ForwardScratch(q, k, v, arena);
  return arena.used;
}

// Size of the groups of queries: all but the last have this size, a whole number of panels.
inline int64_t backward_group(int64_t length) {
  const int64_t groups = std::max<int64_t>(1, (length + kMaxGradientGroup - 1) / kMaxGradientGroup);
  return std::max<int64_t>(kWidth, round_up<int64_t>((length + groups - 1) / groups, kWidth));
}

// True where log-sum-exps in float32 have enough decimals for softmax weights in bfloat16.
inline bool are_exact(const float* lse, int64_t count) {
  return std::all_of(lse, lse + count, [](float x) { return !(std::abs(x) >= 4096.0f); });  // a NaN may propagate
}

struct BackwardScratch {
  int64_t group;
  Bf16x2 *queries, *upstream;                     // panels of a group of queries
  Bf16x2 *keys, *values;                          // pairs along the width
  Bf16x2 *query_rows, *upstream_rows, *key_rows;  // pairs of rows
  Bf16x2 *weights, *gradients;                    // of a group, pairs of queries: [keys][group / 2]
  Bf16x2* gradient_pairs;                         // of a group, pairs of keys: [keys / 2][group]
  float *lse, *row_dot, *dq, *dk, *dv;
  BFloat16* copies[5];

  BackwardScratch(const Heads& q, const Heads& k, const Heads& v, const Heads& out, const Heads& dout, Arena& arena) {
    group = backward_group(q.length);
    const int64_t padded = round_up<int64_t>(q.width, kWidth), even_keys = round_up<int64_t>(k.length, 2);
    for (Bf16x2** panels : {&queries, &upstream}) *panels = arena.allocate<Bf16x2>(padded / 2 * group);
    for (Bf16x2** rows : {&query_rows, &upstream_rows}) *rows = arena.allocate<Bf16x2>((q.length + 1) / 2 * padded);
    for (Bf16x2** rows : {&keys, &values, &key_rows}) *rows = arena.allocate<Bf16x2>(even_keys * padded / 2);
    for (Bf16x2** products : {&weights, &gradients, &gradient_pairs})
      *products = arena.allocate<Bf16x2>(even_keys * group / 2);
    for (float** lanes : {&lse, &row_dot}) *lanes = arena.allocate<float>(group);
    dq = arena.allocate<float>(group * padded);
    for (float** sums : {&dk, &dv}) *sums = arena.allocate<float>(k.length * padded);
    const Heads* inputs[] = {&q, &k, &v, &out, &dout};
    for (int i = 0; i < 5; ++i) copies[i] = arena.allocate<BFloat16>(copy_size(*inputs[i]));
  }
};

struct Panel {  // 32 queries with their upstream gradients
  int64_t depth, stride, group;
  const Bf16x2 *queries, *upstream;
  const float *lse, *row_dot;
  float scale;
  uint32_t valid;  // mask of the queries that exist

  // Weights and gradients of the scores for two keys. `products` are upstream gradient · value; without `has_second`
  // only the first key exists.
  void store_gradients(Vec<float> (&scores)[2][2], Vec<float> (&products)[2][2], bool has_second, Bf16x2* weights,
                       Bf16x2* gradients, Bf16x2* gradient_pairs) const {
    Vec<Bf16x2> rounded[2] = {};
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      Vec<float> weight[2], gradient[2];
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n) {
        const Vec<float> score = scores[h][n] * float(scale * kLog2E) - load(lse + n * kVector);
        const __mmask16 mask = h == 0 || has_second ? uint16_t(valid >> (n * kVector)) : 0;
        weight[n] = Vec<float>(_mm512_maskz_mov_ps(mask, __m512(exp2_bf16(score))));
        gradient[n] = Vec<float>(
            _mm512_maskz_mul_ps(mask, __m512(weight[n] * scale), __m512(products[h][n] - load(row_dot + n * kVector))));
      }
      store(weights + h * group / 2, to_bf16(weight[0], weight[1]));
      rounded[h] = to_bf16(gradient[0], gradient[1]);
      store(gradients + h * group / 2, rounded[h]);
    }
    store(gradient_pairs, zip_pairs<false>(rounded[0], rounded[1]));
    store(gradient_pairs + kVector, zip_pairs<true>(rounded[0], rounded[1]));
  }
};

// Weights and gradients of the scores for R keys, an even number, and a panel. The last key may be padding.
template <int R>
__attribute__((noinline)) void gradient_tile(const Panel& panel, const Bf16x2* keys, const Bf16x2* values,
                                             int64_t count, Bf16x2* weights, Bf16x2* gradients,
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
    panel.store_gradients(scores[r], products[r], 2 * r + 1 < count, weights + r * panel.group,
                          gradients + r * panel.group, gradient_pairs + r * panel.group);
}

template <int R>
void dispatch_gradient_tile(int64_t rows, const Panel& panel, const Bf16x2* keys, const Bf16x2* values, int64_t count,
                            Bf16x2* weights, Bf16x2* gradients, Bf16x2* gradient_pairs) {
  if constexpr (R > 0) {
    if (rows == R) return gradient_tile<R>(panel, keys, values, count, weights, gradients, gradient_pairs);
    dispatch_gradient_tile<R - 2>(rows, panel, keys, values, count, weights, gradients, gradient_pairs);
  }
}

inline void gradient_panel(const Panel& panel, const BackwardScratch& s, int64_t lane, int64_t keys) {
  for (int64_t j = 0; j < keys;) {
    const int64_t rows = round_up<int64_t>(next_tile_rows(keys - j, kGradientTileKeys), 2), offset = j * s.group / 2;
    dispatch_gradient_tile<kGradientTileKeys>(rows, panel, s.keys + j * panel.stride, s.values + j * panel.stride,
                                              keys - j, s.weights + offset + lane / 2, s.gradients + offset + lane / 2,
                                              s.gradient_pairs + offset + lane);
    j += rows;
  }
}

// Dot product of row `row` of `a` and row `row` of `b`.
inline float dot_rows(const Bf16Rows& a, const Bf16Rows& b, int64_t row) {
  Vec<float> sum{};
  for (int64_t e = 0; e < a.width; e += kWidth)
    sum = multiply_add(a.load(row, e, a.mask(e)), b.load(row, e, a.mask(e)), sum);
  return _mm512_reduce_add_ps(__m512(sum));
}

inline void backward_bf16(const Heads& dout, const Heads& q, const Heads& k, const Heads& v, const Heads& out,
                          const float* lse, int64_t task, double scale, const Gradients<BFloat16>& gradients,
                          char* scratch) {
  const int64_t sample = task / q.heads, head = task % q.heads, width = q.width;
  const int64_t padded = round_up<int64_t>(width, kWidth), depth = (width + 1) / 2;
  Arena arena{scratch};
  const BackwardScratch s(q, k, v, out, dout, arena);
  const Bf16Rows queries = bf16_rows(q, sample, head, s.copies[0]), keys = bf16_rows(k, sample, head, s.copies[1]);
  const Bf16Rows values = bf16_rows(v, sample, head, s.copies[2]), outputs = bf16_rows(out, sample, head, s.copies[3]);
  const Bf16Rows upstream = bf16_rows(dout, sample, head, s.copies[4]);
  pack_width_pairs(keys, padded, s.keys);
  pack_width_pairs(values, padded, s.values);
  pack_row_pairs(keys, padded, s.key_rows);
  pack_row_pairs(queries, padded, s.query_rows);
  pack_row_pairs(upstream, padded, s.upstream_rows);
  for (int64_t first = 0; first < q.length; first += s.group) {
    const int64_t count = std::min(s.group, q.length - first);
    for (int64_t lane = 0; lane < count; lane += kWidth) {
      const int64_t panel_queries = std::min(kWidth, count - lane);
      Bf16x2 *q_panel = s.queries + lane * depth, *dout_panel = s.upstream + lane * depth;
      pack_queries(queries, first + lane, q_panel);
      pack_queries(upstream, first + lane, dout_panel);
      for (int64_t i = 0; i < kWidth; ++i) {
        const int64_t row = first + lane + i;
        s.lse[lane + i] = i < panel_queries ? lse[task * q.length + row] * float(kLog2E) : 0.0f;
        s.row_dot[lane + i] = i < panel_queries ? dot_rows(outputs, upstream, row) : 0.0f;
      }
      const float *panel_lse = s.lse + lane, *panel_dot = s.row_dot + lane;
      const Panel panel{depth,     padded / 2,   s.group,
                        q_panel,   dout_panel,   panel_lse,
                        panel_dot, float(scale), first_bits(panel_queries)};
      gradient_panel(panel, s, lane, k.length);
    }
    const Operand<Bf16x2> weights{s.weights, s.group / 2, 1}, score_gradients{s.gradients, s.group / 2, 1};
    const int64_t pairs = (count + 1) / 2, row = first / 2 * padded;
    multiply_panels(first > 0, k.length, pairs, weights, s.upstream_rows + row, padded, s.dv);
    multiply_panels(first > 0, k.length, pairs, score_gradients, s.query_rows + row, padded, s.dk);
    multiply_panels(false, count, (k.length + 1) / 2, {s.gradient_pairs, 1, s.group}, s.key_rows, padded, s.dq);
    BFloat16* dq = gradients.q + gradients.offset(q, sample, first, head);
    store_rows(s.dq, padded, count, width, nullptr, dq, gradients.token_stride);
  }
  const int64_t key_offset = gradients.offset(k, sample, 0, head);
  store_rows(s.dk, padded, k.length, width, nullptr, gradients.k + key_offset, gradients.token_stride);
  store_rows(s.dv, padded, k.length, width, nullptr, gradients.v + key_offset, gradients.token_stride);
}

inline int64_t backward_bf16_bytes(const Heads& q, const Heads& k, const Heads& v, const Heads& out,
                                   const Heads& dout) {
  Arena arena{nullptr};
  BackwardScratch(q, k, v, out, dout, arena);
  return arena.used;
}

}  // namespace
}  // namespace fastssl

#endif
