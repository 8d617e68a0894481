// Attention of bfloat16 heads by AVX-512's bf16 dot product, which has no form in the compiler's vector types.
//
// Its lanes hold pairs: two values that are multiplied with two others and added to one float32 sum. So every operand
// is packed in pairs along the depth of its product: neighbours of a row where that is the head's width, two rows
// zipped into one where it is the tokens. Softmax weights and the gradients of scores are rounded to bfloat16 to be
// multiplied again, as on a GPU; scores, softmax and sums stay float32. The layout is that of attention.cpp: lanes are
// queries.
//
// Forward, a panel of 32 queries at a time: scores and their maxima, then weights that need no division yet (the sum of
// a query divides its result), zipped along the keys. Backward, weights come from the scores and the log-sum-exp, whose
// rounding is nothing beside bfloat16's, in the registers that hold the scores; they never exist as float32.
#pragma once

#include "gemm.h"
#include "heads.h"
#include "pairs.h"

#if defined(FASTSSL_PAIRS)

namespace fastssl {
namespace {

constexpr int64_t kLane = kLanes<Pair>;    // 16
constexpr int64_t kSide = kPanel<Pair>;    // 32: queries of a panel, and bfloat16 values of a vector
constexpr int64_t kDeepest = 128;          // queries whose weights a backward pass holds, at most
constexpr int64_t kKeyRows = 12;           // keys of a tile of scores
constexpr int64_t kGradientRows = 6;       // and where it makes gradients too: as many sums

// Two rows of bfloat16 as pairs (a, b): the first or the last 16 of 32.
template <bool kLast>
inline Vec<Pair> zip_pairs(Vec<Pair> a, Vec<Pair> b) {
  const Vec<Pair> lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Vec<Pair> index = lane + (kLast ? 16 : 0) + ((lane + (kLast ? 48 : 32)) << 16);
  return Vec<Pair>(_mm512_permutex2var_epi16(__m512i(a), __m512i(index), __m512i(b)));
}

inline uint32_t first_bits(int64_t count) { return uint32_t((uint64_t(1) << std::min<int64_t>(count, 32)) - 1); }

struct ShortRows {  // of one head, bfloat16 side by side in each
  const BFloat16* data;
  int64_t stride, count, width;

  // Which of 32 values from a column on there are.
  uint32_t mask(int64_t column) const { return first_bits(width - column); }
  // 32 values of a row from a column on, zeros where the mask, and beyond the last row.
  Vec<Pair> at(int64_t row, int64_t column, uint32_t mask) const {
    return Vec<Pair>(_mm512_maskz_loadu_epi16(row < count ? mask : 0, data + row * stride + column));
  }
};

struct Memory {  // a thread's own, given out piece by piece; counts only where there is none
  char* base;
  int64_t taken = 0;

  template <typename T>
  T* take(int64_t count) {
    T* from = reinterpret_cast<T*>(base + taken);
    taken += round_up<int64_t>(count * sizeof(T), 64);
    return from;
  }
};

// The rows of one head of `x`, which are copied only where their values lie apart.
inline ShortRows short_rows(const Heads& x, int64_t sample, int64_t head, BFloat16* copy) {
  const BFloat16* from = x.head<BFloat16>(sample, head);
  if (x.strides[3] == 1 || x.width == 1) return {from, x.strides[1], x.length, x.width};
  for (int64_t l = 0; l < x.length; ++l)
    for (int64_t e = 0; e < x.width; ++e) copy[l * x.width + e] = from[l * x.strides[1] + e * x.strides[3]];
  return {copy, x.width, x.length, x.width};
}

inline int64_t copy_size(const Heads& x) { return x.strides[3] == 1 || x.width == 1 ? 0 : x.length * x.width; }

// [count, width] -> [count up to even][wide / 2] pairs along the width, zeros where nothing is.
inline void copy_rows(const ShortRows& x, int64_t wide, Pair* to) {
  for (int64_t e = 0; e < wide; e += kSide, to += kLane) {
    const uint32_t mask = x.mask(e);
    for (int64_t row = 0; row < round_up<int64_t>(x.count, 2); ++row) store(to + row * wide / 2, x.at(row, e, mask));
  }
}

// [count, width] -> [count / 2, rounded up][wide] pairs of two rows.
inline void zip_rows(const ShortRows& x, int64_t wide, Pair* to) {
  for (int64_t e = 0; e < wide; e += kSide, to += kSide) {
    const uint32_t mask = x.mask(e);
    for (int64_t row = 0; row < x.count; row += 2) {
      const Vec<Pair> a = x.at(row, e, mask), b = x.at(row + 1, e, mask);
      store(to + row / 2 * wide, zip_pairs<false>(a, b));
      store(to + row / 2 * wide + kLane, zip_pairs<true>(a, b));
    }
  }
}

// 32 rows from `first` on become lanes: -> [width / 2, rounded up][32] pairs along the width.
inline void pack_lanes(const ShortRows& x, int64_t first, Pair* to) {
  const int64_t depth = (x.width + 1) / 2;
  for (int64_t lane = 0; lane < kSide; lane += kLane)
    for (int64_t d = 0; d < depth; d += kLane) {
      Vec<Pair> square[kLane];
      const uint32_t mask = x.mask(2 * d);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLane; ++i) square[i] = x.at(first + lane + i, 2 * d, mask);
      transpose<Pair>(square);
      for (int64_t i = 0; i < std::min(kLane, depth - d); ++i) store(to + (d + i) * kSide + lane, square[i]);
    }
}

// `count` rows of float32 become rows of bfloat16, each times its factor where there are any.
inline void finish_rows(const float* from, int64_t wide, int64_t count, int64_t width, const float* factor,
                        BFloat16* to, int64_t stride) {
  for (int64_t row = 0; row < count; ++row, from += wide, to += stride)
    for (int64_t e = 0; e < width; e += kSide) {
      Vec<float> first = load(from + e), second = load(from + e + kLane);
      if (factor) first *= factor[row], second *= factor[row];
      _mm512_mask_storeu_epi16(to + e, first_bits(width - e), __m512i(narrow(first, second)));
    }
}

// Scaled scores of R keys and N vectors of queries, and the largest so far of each query.
template <int R, int N>
__attribute__((noinline)) void score_tile(int64_t depth, const Pair* keys, int64_t stride, const Pair* queries,
                                          float scale, float* scores, float* top) {
  Vec<float> sums[R][N] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Vec<Pair> lanes[N];
    for (int n = 0; n < N; ++n) lanes[n] = load(queries + d * kSide + n * kLane);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<Pair> key = splat(keys[r * stride + d]);
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) sums[r][n] = multiply_add(key, lanes[n], sums[r][n]);
    }
  }
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) {
    __m512 largest = __m512(load(top + n * kLane));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<float> score = sums[r][n] * scale;
      largest = _mm512_max_ps(__m512(score), largest);  // a NaN is passed over here and taken in by the sum
      store(scores + r * kSide + n * kLane, score);
    }
    store(top + n * kLane, Vec<float>(largest));
  }
}

template <int R, int N>
void score_rows(int64_t rows, int64_t depth, const Pair* keys, int64_t stride, const Pair* queries, float scale,
                float* scores, float* top) {
  if constexpr (R > 0) {
    if (rows == R) return score_tile<R, N>(depth, keys, stride, queries, scale, scores, top);
    score_rows<R - 1, N>(rows, depth, keys, stride, queries, scale, scores, top);
  }
}

// Rows of the next tile: two even ones at the end, since one of a row or two would wait for its own sums.
inline int64_t next_rows(int64_t left, int64_t most) {
  return left >= 2 * most || left <= most ? std::min(left, most) : (left + 1) / 2;
}

template <int N>
void score_panel(int64_t count, int64_t depth, const Pair* keys, int64_t stride, const Pair* queries, float scale,
                 float* scores, float* top) {
  std::fill(top, top + N * kLane, -INFINITY);
  for (int64_t j = 0; j < count;) {
    const int64_t rows = next_rows(count - j, kKeyRows);
    score_rows<kKeyRows, N>(rows, depth, keys + j * stride, stride, queries, scale, scores + j * kSide, top);
    j += rows;
  }
}

// Scores become weights relative to the largest, [keys / 2, rounded up][32] pairs of two keys, and their sums.
template <int N>
void weigh(const float* scores, int64_t keys, const float* top, Pair* weights, float* sums) {
  const Vec<Pair> lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, zipped = lane + ((lane + 16) << 16);
  Vec<float> sum[N] = {}, largest[N];
  for (int n = 0; n < N; ++n) largest[n] = load(top + n * kLane);
  for (int64_t j = 0; j < keys; j += 2, scores += 2 * kSide, weights += kSide)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      const Vec<float> first = exp2_rounded(load(scores + n * kLane) - largest[n]);
      Vec<float> second{};
      if (j + 1 < keys) second = exp2_rounded(load(scores + kSide + n * kLane) - largest[n]);
      sum[n] += first + second;
      store(weights + n * kLane, Vec<Pair>(_mm512_permutexvar_epi16(__m512i(zipped), __m512i(narrow(first, second)))));
    }
  for (int n = 0; n < N; ++n) store(sums + n * kLane, sum[n]);
}

// c[rows, wide] = a[rows, depth] b[depth, wide], or added to c.
inline void multiply_pairs(bool add, int64_t rows, int64_t depth, Operand<Pair> a, const Pair* b, int64_t wide,
                           float* c) {
  for (int64_t e = 0; e < wide; e += kSide)
    (add ? multiply<true, 2, Pair> : multiply<false, 2, Pair>)(rows, depth, a, b + e, wide, c + e, wide);
}

struct ForwardMemory {
  Pair *queries, *keys, *values, *weights;
  float *scores, *mean, *top, *sums;
  BFloat16* copies[3];

  ForwardMemory(const Heads& q, const Heads& k, const Heads& v, Memory& memory) {
    const int64_t wide = round_up<int64_t>(q.width, kSide), even = round_up<int64_t>(k.length, 2);
    queries = memory.take<Pair>(wide / 2 * kSide);
    keys = memory.take<Pair>(even * wide / 2);
    values = memory.take<Pair>(even / 2 * wide);
    weights = memory.take<Pair>(even / 2 * kSide);
    scores = memory.take<float>(k.length * kSide);
    mean = memory.take<float>(kSide * wide);
    top = memory.take<float>(kSide);
    sums = memory.take<float>(kSide);
    const Heads* inputs[] = {&q, &k, &v};
    for (int i = 0; i < 3; ++i) copies[i] = memory.take<BFloat16>(copy_size(*inputs[i]));
  }
};

inline void forward_pairs(const Heads& q, const Heads& k, const Heads& v, int64_t task, double scale, BFloat16* out,
                          float* lse, char* scratch) {
  const int64_t sample = task / q.heads, head = task % q.heads, width = q.width, wide = round_up<int64_t>(width, kSide);
  const int64_t depth = (width + 1) / 2, stride = q.heads * width;
  Memory memory{scratch};
  const ForwardMemory m(q, k, v, memory);
  const ShortRows queries = short_rows(q, sample, head, m.copies[0]);
  copy_rows(short_rows(k, sample, head, m.copies[1]), wide, m.keys);
  zip_rows(short_rows(v, sample, head, m.copies[2]), wide, m.values);
  for (int64_t first = 0; first < q.length; first += kSide) {
    const int64_t count = std::min(kSide, q.length - first);
    pack_lanes(queries, first, m.queries);
    const bool one = count <= kLane;
    (one ? score_panel<1> : score_panel<2>)(k.length, depth, m.keys, wide / 2, m.queries, float(scale * kLog2E),
                                            m.scores, m.top);
    (one ? weigh<1> : weigh<2>)(m.scores, k.length, m.top, m.weights, m.sums);
    multiply_pairs(false, count, (k.length + 1) / 2, {m.weights, 1, kSide}, m.values, wide, m.mean);
    for (int64_t i = 0; i < count; ++i) {
      lse[task * q.length + first + i] = (m.top[i] + std::log2(m.sums[i])) * float(kLn2);
      m.sums[i] = 1.0f / m.sums[i];
    }
    BFloat16* to = out + (sample * q.length + first) * stride + head * width;
    finish_rows(m.mean, wide, count, width, m.sums, to, stride);
  }
}

inline int64_t forward_pairs_bytes(const Heads& q, const Heads& k, const Heads& v) {
  Memory memory{nullptr};
  ForwardMemory(q, k, v, memory);
  return memory.taken;
}

// Queries are taken in groups of equal size, a whole number of panels.
inline int64_t deep_group(int64_t length) {
  const int64_t groups = std::max<int64_t>(1, (length + kDeepest - 1) / kDeepest);
  return std::max<int64_t>(kSide, round_up<int64_t>((length + groups - 1) / groups, kSide));
}

struct BackwardMemory {
  int64_t group;
  Pair *queries, *upstream, *query_rows, *upstream_rows;  // panels of a group; rows of a head, zipped
  Pair *keys, *values, *key_rows;                         // rows; rows, zipped
  Pair *weights, *gradients, *zipped;  // of a group: [keys][group / 2], pairs of queries; [keys / 2][group], of keys
  float *lse, *row_dot, *dq, *dk, *dv;
  BFloat16* copies[5];

  BackwardMemory(const Heads& q, const Heads& k, const Heads& v, const Heads& out, const Heads& dout, Memory& memory) {
    group = deep_group(q.length);
    const int64_t wide = round_up<int64_t>(q.width, kSide), even = round_up<int64_t>(k.length, 2);
    for (Pair** panels : {&queries, &upstream}) *panels = memory.take<Pair>(wide / 2 * group);
    for (Pair** rows : {&query_rows, &upstream_rows}) *rows = memory.take<Pair>((q.length + 1) / 2 * wide);
    for (Pair** rows : {&keys, &values, &key_rows}) *rows = memory.take<Pair>(even * wide / 2);
    for (Pair** products : {&weights, &gradients, &zipped}) *products = memory.take<Pair>(even * group / 2);
    for (float** lanes : {&lse, &row_dot}) *lanes = memory.take<float>(group);
    dq = memory.take<float>(group * wide);
    for (float** sums : {&dk, &dv}) *sums = memory.take<float>(k.length * wide);
    const Heads* inputs[] = {&q, &k, &v, &out, &dout};
    for (int i = 0; i < 5; ++i) copies[i] = memory.take<BFloat16>(copy_size(*inputs[i]));
  }
};

struct Panel {  // 32 queries that meet all keys
  int64_t depth, stride, group;
  const Pair *queries, *upstream;
  const float *lse, *row_dot;
  float scale;
  uint32_t there;  // a bit for each query

  // Weights and gradients of two keys, from their scores and the products of upstream and values.
  void finish(Vec<float> (&scores)[2][2], Vec<float> (&products)[2][2], bool both, Pair* weights, Pair* gradients,
              Pair* zipped) const {
    Vec<Pair> rows[2] = {};
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      Vec<float> weight[2], gradient[2];
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n) {
        const Vec<float> score = scores[h][n] * float(scale * kLog2E) - load(lse + n * kLane);
        const __mmask16 mask = h == 0 || both ? uint16_t(there >> (n * kLane)) : 0;
        weight[n] = Vec<float>(_mm512_maskz_mov_ps(mask, __m512(exp2_rounded(score))));
        gradient[n] = Vec<float>(_mm512_maskz_mul_ps(
            mask, __m512(weight[n] * scale), __m512(products[h][n] - load(row_dot + n * kLane))));
      }
      store(weights + h * group / 2, narrow(weight[0], weight[1]));
      rows[h] = narrow(gradient[0], gradient[1]);
      store(gradients + h * group / 2, rows[h]);
    }
    store(zipped, zip_pairs<false>(rows[0], rows[1]));
    store(zipped + kLane, zip_pairs<true>(rows[0], rows[1]));
  }
};

// R keys, an even number of which the last need not exist, meet a panel.
template <int R>
__attribute__((noinline)) void gradient_tile(const Panel& panel, const Pair* keys, const Pair* values, int64_t count,
                                             Pair* weights, Pair* gradients, Pair* zipped) {
  const int64_t depth = panel.depth, stride = panel.stride;
  const Pair *queries = panel.queries, *upstream = panel.upstream;
  Vec<float> scores[R / 2][2][2] = {}, products[R / 2][2][2] = {};
  for (int64_t d = 0; d < depth; ++d) {
    const Vec<Pair> q0 = load(queries + d * kSide), q1 = load(queries + d * kSide + kLane);
    const Vec<Pair> u0 = load(upstream + d * kSide), u1 = load(upstream + d * kSide + kLane);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Vec<float>(&score)[2] = scores[r / 2][r % 2], (&product)[2] = products[r / 2][r % 2];
      const Vec<Pair> key = splat(keys[r * stride + d]), value = splat(values[r * stride + d]);
      score[0] = multiply_add(key, q0, score[0]);
      score[1] = multiply_add(key, q1, score[1]);
      product[0] = multiply_add(value, u0, product[0]);
      product[1] = multiply_add(value, u1, product[1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R / 2; ++r)
    panel.finish(scores[r], products[r], 2 * r + 1 < count, weights + r * panel.group, gradients + r * panel.group,
                 zipped + r * panel.group);
}

template <int R>
void gradient_rows(int64_t rows, const Panel& panel, const Pair* keys, const Pair* values, int64_t count,
                   Pair* weights, Pair* gradients, Pair* zipped) {
  if constexpr (R > 0) {
    if (rows == R) return gradient_tile<R>(panel, keys, values, count, weights, gradients, zipped);
    gradient_rows<R - 2>(rows, panel, keys, values, count, weights, gradients, zipped);
  }
}

inline void gradient_panel(const Panel& panel, const BackwardMemory& m, int64_t lane, int64_t keys) {
  for (int64_t j = 0; j < keys;) {
    const int64_t rows = round_up<int64_t>(next_rows(keys - j, kGradientRows), 2), at = j * m.group / 2;
    gradient_rows<kGradientRows>(rows, panel, m.keys + j * panel.stride, m.values + j * panel.stride, keys - j,
                                 m.weights + at + lane / 2, m.gradients + at + lane / 2, m.zipped + at + lane);
    j += rows;
  }
}

// Σ a·b of two rows.
inline float dot_rows(const ShortRows& a, const ShortRows& b, int64_t row) {
  Vec<float> sum{};
  for (int64_t e = 0; e < a.width; e += kSide)
    sum = multiply_add(a.at(row, e, a.mask(e)), b.at(row, e, a.mask(e)), sum);
  return _mm512_reduce_add_ps(__m512(sum));
}

inline void backward_pairs(const Heads& dout, const Heads& q, const Heads& k, const Heads& v, const Heads& out,
                           const float* lse, int64_t task, double scale, const Gradients<BFloat16>& to,
                           char* scratch) {
  const int64_t sample = task / q.heads, head = task % q.heads, width = q.width, wide = round_up<int64_t>(width, kSide);
  const int64_t depth = (width + 1) / 2;
  Memory memory{scratch};
  const BackwardMemory m(q, k, v, out, dout, memory);
  const ShortRows queries = short_rows(q, sample, head, m.copies[0]), keys = short_rows(k, sample, head, m.copies[1]);
  const ShortRows values = short_rows(v, sample, head, m.copies[2]), means = short_rows(out, sample, head, m.copies[3]);
  const ShortRows upstream = short_rows(dout, sample, head, m.copies[4]);
  copy_rows(keys, wide, m.keys);
  copy_rows(values, wide, m.values);
  zip_rows(keys, wide, m.key_rows);
  zip_rows(queries, wide, m.query_rows);
  zip_rows(upstream, wide, m.upstream_rows);
  for (int64_t first = 0; first < q.length; first += m.group) {
    const int64_t count = std::min(m.group, q.length - first);
    for (int64_t lane = 0; lane < count; lane += kSide) {
      const int64_t some = std::min(kSide, count - lane);
      Pair *q_panel = m.queries + lane * depth, *dout_panel = m.upstream + lane * depth;
      pack_lanes(queries, first + lane, q_panel);
      pack_lanes(upstream, first + lane, dout_panel);
      for (int64_t i = 0; i < kSide; ++i) {
        const int64_t row = first + lane + i;
        m.lse[lane + i] = i < some ? lse[task * q.length + row] * float(kLog2E) : 0.0f;
        m.row_dot[lane + i] = i < some ? dot_rows(means, upstream, row) : 0.0f;
      }
      const Panel panel{depth, wide / 2, m.group, q_panel, dout_panel, m.lse + lane, m.row_dot + lane, float(scale),
                        first_bits(some)};
      gradient_panel(panel, m, lane, k.length);
    }
    const Operand<Pair> weights{m.weights, m.group / 2, 1}, gradients{m.gradients, m.group / 2, 1};
    const int64_t pairs = (count + 1) / 2, row = first / 2 * wide;
    multiply_pairs(first > 0, k.length, pairs, weights, m.upstream_rows + row, wide, m.dv);
    multiply_pairs(first > 0, k.length, pairs, gradients, m.query_rows + row, wide, m.dk);
    multiply_pairs(false, count, (k.length + 1) / 2, {m.zipped, 1, m.group}, m.key_rows, wide, m.dq);
    finish_rows(m.dq, wide, count, width, nullptr, to.q + to.at(q, sample, first, head), to.row);
  }
  finish_rows(m.dk, wide, k.length, width, nullptr, to.k + to.at(k, sample, 0, head), to.row);
  finish_rows(m.dv, wide, k.length, width, nullptr, to.v + to.at(k, sample, 0, head), to.row);
}

inline int64_t backward_pairs_bytes(const Heads& q, const Heads& k, const Heads& v, const Heads& out,
                                    const Heads& dout) {
  Memory memory{nullptr};
  BackwardMemory(q, k, v, out, dout, memory);
  return memory.taken;
}

}  // namespace
}  // namespace fastssl

#endif
