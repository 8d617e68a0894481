// Softmax attention of short sequences, forward and backward (fastssl/ops/attention.py).
//
// One head of one sample is a task. Its scores exist for one group of queries at a time, transposed: lanes are queries,
// so the softmax works lane by lane over all keys at once, and q, k and v are read through their strides where they lie
// (16-bit dtypes are widened first, but for bfloat16 where the processor multiplies it: attention_pairs.h). The
// backward pass makes the weights again from q and k, not from the log-sum-exp, whose rounding in float would double
// their error, and adds up dk and dv in the task that owns them: no atomics, the same bits on any number of threads.
#include "attention_pairs.h"
#include "gemm.h"
#include "heads.h"

namespace fastssl {
namespace {

constexpr int64_t kPiece = 64;  // sums of more terms than this are made in pieces, which rounds less
constexpr int64_t kLongestGroup = 96;  // queries of a group, at most: the scores of 197 keys take 76 kB

template <typename T>
struct Rows {  // of one head, widened; columns filled up to whole panels where they were copied
  const T* data;
  int64_t stride;
  const T* row(int64_t l) const { return data + l * stride; }
  Operand<T> operand() const { return {data, stride, 1}; }
};

template <typename T>
constexpr int64_t padded(int64_t width) {
  return round_up<int64_t>(width, kPanel<T>);
}

// One head's rows: as they lie where that will do, else copied to `scratch`, [length, padded width].
template <typename T, typename S>
Rows<T> rows_of(const Heads& x, int64_t sample, int64_t head, T* scratch) {
  const S* from = x.head<S>(sample, head);
  if constexpr (std::is_same_v<T, S>)
    if (x.strides[3] == 1 && x.width % kPanel<T> == 0) return {from, x.strides[1]};
  for (int64_t l = 0; l < x.length; ++l) {
    T* to = scratch + l * padded<T>(x.width);
    widen(from + l * x.strides[1], x.strides[3], x.width, to);
    std::fill(to + x.width, to + padded<T>(x.width), T(0));  // their results are dropped, but denormals would be slow
  }
  return {scratch, padded<T>(x.width)};
}

// Queries are taken in groups of equal size, a whole number of panels.
template <typename T>
int64_t group_size(int64_t length) {
  const int64_t groups = std::max<int64_t>(1, (length + kLongestGroup - 1) / kLongestGroup);
  return std::max<int64_t>(kPanel<T>, round_up<int64_t>((length + groups - 1) / groups, kPanel<T>));
}

// products[key, lane] = key · query, for `lanes` queries, a whole number of vectors.
template <typename T>
void products(Rows<T> keys, int64_t count, int64_t width, const T* query_panels, int64_t lanes, T* out, int64_t group) {
  for (int64_t lane = 0; lane < lanes; lane += kPanel<T>) {
    const T* panel = query_panels + lane * width;
    if (lanes - lane >= kPanel<T>)
      multiply<false>(count, width, keys.operand(), panel, kPanel<T>, out + lane, group);
    else
      multiply<false, 1>(count, width, keys.operand(), panel, kPanel<T>, out + lane, group);
  }
}

// Scores of `lanes` queries become weights that sum to 1; their log-sum-exp, in units of log 2, is written for each.
template <typename T>
void softmax(T* scores, int64_t keys, int64_t group, int64_t lanes, T scale, T* lse) {
  for (int64_t lane = 0; lane < lanes; lane += kLanes<T>, scores += kLanes<T>) {
    Vec<T> top = load(scores) * scale, sum{};
    for (int64_t j = 1; j < keys; ++j) {
      const Vec<T> score = load(scores + j * group) * scale;
      top = score > top ? score : top;  // a NaN is passed over here and taken in by the sum
    }
    for (int64_t from = 0; from < keys; from += kPiece) {
      Vec<T> piece{};
      for (int64_t j = from; j < std::min(keys, from + kPiece); ++j) {
        const Vec<T> weight = exp2(load(scores + j * group) * scale - top);
        piece += weight;
        store(scores + j * group, weight);
      }
      sum += piece;
    }
    const Vec<T> share = T(1) / sum, rest = (T(1) - share * sum) * share;  // what the rounding of share leaves out
    for (int64_t j = 0; j < keys; ++j) {
      const Vec<T> weight = load(scores + j * group);
      store(scores + j * group, weight * share + weight * rest);
    }
    for (int64_t i = 0; i < kLanes<T>; ++i) lse[lane + i] = top[i] + std::log2(sum[i]);
  }
}

// Where one head's rows of a result go: straight to the tensor where they need no narrowing, else by way of `scratch`.
template <typename T, typename S>
struct Result {
  S* tensor;
  T* scratch;
  int64_t stride, width;  // of the tensor's rows

  static constexpr bool kSame = std::is_same_v<T, S>;
  bool direct() const { return kSame && width % kPanel<T> == 0; }
  T* data() const { return direct() ? reinterpret_cast<T*>(tensor) : scratch; }
  int64_t data_stride() const { return direct() ? stride : padded<T>(width); }
  void finish(int64_t count) const {
    for (int64_t l = 0; !direct() && l < count; ++l) {
      const T* from = scratch + l * padded<T>(width);
      S* to = tensor + l * stride;
      int64_t e = 0;
      for (; e + kLanes<T> <= width; e += kLanes<T>) store_narrow(to + e, load(from + e));
      for (; e < width; ++e) to[e] = from_float<S>(from[e]);
    }
  }
};

// One panel of C = A B, or added to C, in pieces.
template <typename T>
void multiply_deep(bool add, int64_t rows, int64_t depth, Operand<T> a, const T* b, int64_t b_stride, T* c,
                   int64_t c_stride) {
  for (int64_t from = 0; from < depth; from += kPiece, add = true)
    (add ? multiply<true, 2, T> : multiply<false, 2, T>)(rows, std::min(kPiece, depth - from), a.deeper(from),
                                                         b + from * b_stride, b_stride, c, c_stride);
}

template <typename T, typename S>
void forward_head(const Heads& q, const Heads& k, const Heads& v, int64_t task, double scale, S* out, T* lse,
                  T* scratch) {
  const int64_t sample = task / q.heads, head = task % q.heads, width = q.width, wide = padded<T>(width);
  const int64_t group = group_size<T>(q.length), stride = q.heads * width;
  T *scores = scratch, *panels = scores + k.length * group, *mean = panels + group * width;
  T *sums = mean + group * wide, *copies = sums + group;
  const Rows<T> queries = rows_of<T, S>(q, sample, head, copies);
  const Rows<T> keys = rows_of<T, S>(k, sample, head, copies + q.length * wide);
  const Rows<T> values = rows_of<T, S>(v, sample, head, copies + (q.length + k.length) * wide);
  for (int64_t first = 0; first < q.length; first += group) {
    const int64_t count = std::min(group, q.length - first), lanes = round_up<int64_t>(count, kLanes<T>);
    pack_rows(queries.row(first), queries.stride, count, width, T(1), panels);
    products(keys, k.length, width, panels, lanes, scores, group);
    softmax(scores, k.length, group, lanes, T(scale * kLog2E), sums);
    const Result<T, S> result{out + ((sample * q.length + first) * q.heads + head) * width, mean, stride, width};
    for (int64_t c = 0; c < wide; c += kPanel<T>)
      multiply_deep(false, count, k.length, Operand<T>{scores, 1, group}, values.data + c, values.stride,
                    result.data() + c, result.data_stride());
    result.finish(count);
    for (int64_t i = 0; i < count; ++i) lse[task * q.length + first + i] = sums[i] * T(kLn2);
  }
}

template <typename T>
int64_t forward_scratch(const Heads& q, const Heads& k) {
  const int64_t group = group_size<T>(q.length), wide = padded<T>(q.width);
  return group * (k.length + q.width + wide + 1) + (q.length + 2 * k.length) * wide + 16;
}

// Gradients of the scores, p (dp − Σ dout·out) scale, in place of dp.
template <typename T>
void softmax_gradient(const T* weights, T* dweights, int64_t keys, int64_t group, int64_t lanes, T scale,
                      const T* row_dot) {
  for (int64_t j = 0; j < keys; ++j)
    for (int64_t i = 0; i < lanes; i += kLanes<T>) {
      T* at = dweights + j * group + i;
      store(at, load(weights + j * group + i) * (load(at) - load(row_dot + i)) * scale);
    }
}

template <typename T, typename S>
void backward_head(const Heads& dout, const Heads& q, const Heads& k, const Heads& v, const Heads& out, int64_t task,
                   double scale, const Gradients<S>& to, T* scratch) {
  const int64_t sample = task / q.heads, head = task % q.heads, width = q.width, wide = padded<T>(width);
  const int64_t group = group_size<T>(q.length);
  T *scores = scratch, *dweights = scores + k.length * group, *q_panels = dweights + k.length * group;
  T *dout_panels = q_panels + group * width, *lse = dout_panels + group * width, *row_dot = lse + group;
  T *sums_q = row_dot + group, *sums_k = sums_q + group * wide, *sums_v = sums_k + k.length * wide;
  T* copies = sums_v + k.length * wide;
  const auto rows = [&](const Heads& x) {
    const Rows<T> found = rows_of<T, S>(x, sample, head, copies);
    copies += x.length * wide;
    return found;
  };
  const Rows<T> queries = rows(q), keys = rows(k), values = rows(v), outputs = rows(out), upstream = rows(dout);
  const int64_t key_row = to.at(k, sample, 0, head);
  const Result<T, S> result_k{to.k + key_row, sums_k, to.row, width}, result_v{to.v + key_row, sums_v, to.row, width};
  std::fill(row_dot, row_dot + group, T(0));  // of the lanes beyond the last query too
  for (int64_t first = 0; first < q.length; first += group) {
    const int64_t count = std::min(group, q.length - first), lanes = round_up<int64_t>(count, kLanes<T>);
    pack_rows(queries.row(first), queries.stride, count, width, T(1), q_panels);
    pack_rows(upstream.row(first), upstream.stride, count, width, T(1), dout_panels);
    for (int64_t i = 0; i < count; ++i) row_dot[i] = T(dot(upstream.row(first + i), outputs.row(first + i), width));
    products(keys, k.length, width, q_panels, lanes, scores, group);
    products(values, k.length, width, dout_panels, lanes, dweights, group);
    softmax(scores, k.length, group, lanes, T(scale * kLog2E), lse);
    softmax_gradient(scores, dweights, k.length, group, lanes, T(scale), row_dot);
    const Result<T, S> result_q{to.q + to.at(q, sample, first, head), sums_q, to.row, width};
    for (int64_t c = 0; c < wide; c += kPanel<T>) {
      multiply_deep(first > 0, k.length, count, Operand<T>{scores, group, 1}, upstream.row(first) + c, upstream.stride,
                    result_v.data() + c, result_v.data_stride());
      multiply_deep(first > 0, k.length, count, Operand<T>{dweights, group, 1}, queries.row(first) + c, queries.stride,
                    result_k.data() + c, result_k.data_stride());
      multiply_deep(false, count, k.length, Operand<T>{dweights, 1, group}, keys.data + c, keys.stride,
                    result_q.data() + c, result_q.data_stride());
    }
    result_q.finish(count);
  }
  result_k.finish(k.length);
  result_v.finish(k.length);
}

template <typename T>
int64_t backward_scratch(const Heads& q, const Heads& k) {
  const int64_t group = group_size<T>(q.length), wide = padded<T>(q.width);
  return group * (2 * k.length + 2 * q.width + 2 + wide) + (4 * k.length + 3 * q.length) * wide + 16;
}

// Runs body(task, its memory) for every head of every sample; `operations` of one query and one value of its width.
template <typename Body>
void for_heads(const Heads& q, double operations, int64_t bytes, const Body& body) {
  const int64_t tasks = q.batch * q.heads, own = round_up<int64_t>(bytes, 64);
  const Tensor workspace = empty({torch::stable::get_num_threads() * own}, ScalarType::Byte);
  for_tasks(tasks, operations * tasks * q.length * q.width, data<char>(workspace), own, body);
}

std::tuple<Tensor, Tensor> forward(const Heads& q, const Heads& k, const Heads& v, ScalarType dtype, double scale) {
  Tensor out = empty({q.batch, q.length, q.heads, q.width}, dtype), lse;
  with_float_type(dtype, "attention: q", [&](auto type) {
    using S = decltype(type);
    using T = Wide<S>;
    lse = empty({q.batch, q.heads, q.length}, kDtype<T>);
    S* to = data<S>(out);
    T* sums = data<T>(lse);
#if defined(FASTSSL_PAIRS)
    if constexpr (std::is_same_v<S, BFloat16>)
      return for_heads(q, 4.0 * k.length, forward_pairs_bytes(q, k, v),
                       [&](int64_t task, char* own) { forward_pairs(q, k, v, task, scale, to, sums, own); });
#endif
    for_heads(q, 4.0 * k.length, forward_scratch<T>(q, k) * sizeof(T), [&](int64_t task, char* own) {
      forward_head<T, S>(q, k, v, task, scale, to, sums, reinterpret_cast<T*>(own));
    });
  });
  return {out, lse};
}

template <typename S>
void backward(const Heads& dout, const Heads& q, const Heads& k, const Heads& v, const Heads& out,
              [[maybe_unused]] const Tensor& lse, double scale, const Gradients<S>& to) {
  using T = Wide<S>;
  if (q.length == 0) {  // no query looks at any token
    for (S* none : {to.k, to.v}) std::fill_n(none, k.batch * k.length * k.heads * k.width, S(0));
    return;
  }
#if defined(FASTSSL_PAIRS)
  if constexpr (std::is_same_v<S, BFloat16>) {
    STD_TORCH_CHECK(lse.is_contiguous(), "attention: lse must be contiguous");
    const float* sums = static_cast<const float*>(lse.const_data_ptr());
    return for_heads(q, 10.0 * k.length, backward_pairs_bytes(q, k, v, out, dout), [&](int64_t task, char* own) {
      backward_pairs(dout, q, k, v, out, sums, task, scale, to, own);
    });
  }
#endif
  for_heads(q, 10.0 * k.length, backward_scratch<T>(q, k) * sizeof(T), [&](int64_t task, char* own) {
    backward_head<T, S>(dout, q, k, v, out, task, scale, to, reinterpret_cast<T*>(own));
  });
}

std::tuple<Tensor, Tensor> attention_fwd(Tensor q, Tensor k, Tensor v, double scale) {
  return forward(q, k, v, q.scalar_type(), scale);
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                                 double scale) {
  const auto like = [](const Tensor& x) {
    return empty({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type());
  };
  Tensor dq = like(q), dk = like(k), dv = like(v);
  with_float_type(q.scalar_type(), "attention: q", [&](auto type) {
    using S = decltype(type);
    backward<S>(dout, q, k, v, out, lse, scale, {data<S>(dq), data<S>(dk), data<S>(dv), q.size(2) * q.size(3)});
  });
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> attention_packed_fwd(Tensor qkv, double scale) {
  return forward({qkv, 0}, {qkv, 1}, {qkv, 2}, qkv.scalar_type(), scale);
}

Tensor attention_packed_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, double scale) {
  const int64_t row = qkv.size(3) * qkv.size(4);
  Tensor dqkv = empty({qkv.size(0), qkv.size(1), 3, qkv.size(3), qkv.size(4)}, qkv.scalar_type());
  with_float_type(qkv.scalar_type(), "attention: qkv", [&](auto type) {
    using S = decltype(type);
    S* to = data<S>(dqkv);
    backward<S>(dout, {qkv, 0}, {qkv, 1}, {qkv, 2}, out, lse, scale, {to, to + row, to + 2 * row, 3 * row});
  });
  return dqkv;
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&fastssl::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&fastssl::attention_bwd));
  m.impl("attention_packed_fwd", TORCH_BOX(&fastssl::attention_packed_fwd));
  m.impl("attention_packed_bwd", TORCH_BOX(&fastssl::attention_packed_bwd));
}
