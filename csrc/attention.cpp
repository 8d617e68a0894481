// Softmax attention of short sequences, forward and backward (fastssl/ops/attention.py).
//
// A task is one head of one sample. Scores are computed for one group of queries at a time and stored as [keys,
// queries]: lanes are queries, so the softmax over keys is lane-wise. q, k and v are read through their strides; 16-bit
// dtypes are converted to float32 first, except bfloat16 on processors with tiles (AMX) or AVX-512's bf16 dot product
// (attention_bf16.h).
//
// Operations: 4 B H Lq Lk E forward, 10 B H Lq Lk E backward. Memory per thread: scores of one group of queries, and
// the converted rows of one head.
//
// The backward pass computes the softmax again from q and k alone. It does not use the stored log-sum-exp, whose
// rounding to float32 would double the error of the weights. Each task sums dk and dv of its own head: no atomics, and
// the same bits on any number of threads.
#include "attention_bf16.h"
#include "attention_bf16_backward.h"
#include "attention_bias.h"
#include "microkernel.h"

namespace fastssl {
namespace {

constexpr int64_t kSumChunk = 64;  // longer sums are split into chunks of this many terms, which rounds less
constexpr int64_t kMaxGroup = 96;  // largest group of queries: with 197 keys 76 kB of scores

template <typename T>
struct HeadRows {  // rows of one head in the compute type; copied rows are padded to whole panels
  const T* data;
  int64_t stride;
  const T* row(int64_t l) const { return data + l * stride; }
  Operand<T> operand() const { return {data, stride, 1}; }
};

template <typename T>
constexpr int64_t padded_width(int64_t width) {
  return round_up<int64_t>(width, kPanelWidth<T>);
}

// Rows of one head: the tensor itself where dtype and width allow it, else a copy in `scratch`, [length, padded width].
template <typename T, typename S>
HeadRows<T> head_rows(const Heads& x, int64_t sample, int64_t head, T* scratch) {
  const S* src = x.head<S>(sample, head);
  if constexpr (std::is_same_v<T, S>)
    if (x.strides[3] == 1 && x.width % kPanelWidth<T> == 0) return {src, x.strides[1]};
  for (int64_t l = 0; l < x.length; ++l) {
    T* dst = scratch + l * padded_width<T>(x.width);
    widen(src + l * x.strides[1], x.strides[3], x.width, dst);
    // Results of the padding are not used, but denormal numbers in it would be slow.
    std::fill(dst + x.width, dst + padded_width<T>(x.width), T(0));
  }
  return {scratch, padded_width<T>(x.width)};
}

// Size of the groups of queries: all but the last have this size, a whole number of panels.
template <typename T>
int64_t group_size(int64_t length) {
  const int64_t groups = std::max<int64_t>(1, (length + kMaxGroup - 1) / kMaxGroup);
  return std::max<int64_t>(kPanelWidth<T>, round_up<int64_t>((length + groups - 1) / groups, kPanelWidth<T>));
}

// scores[key, query] = key · query for `lanes` queries, a whole number of vectors.
template <typename T>
void compute_scores(HeadRows<T> keys, int64_t count, int64_t width, const T* query_panels, int64_t lanes, T* scores,
                    int64_t group) {
  for (int64_t lane = 0; lane < lanes; lane += kPanelWidth<T>) {
    const T* panel = query_panels + lane * width;
    if (lanes - lane >= kPanelWidth<T>)
      multiply_panel<false>(count, width, keys.operand(), panel, kPanelWidth<T>, scores + lane, group);
    else
      multiply_panel<false, 1>(count, width, keys.operand(), panel, kPanelWidth<T>, scores + lane, group);
  }
}

// Softmax over keys for `lanes` queries: replaces scores by weights that sum to 1, and writes log Σ e^(score · scale)
// to `log_sums`; scale ≥ 0 unless there is a bias. The maximum is subtracted before the multiplication: beside products
// of 10^9 their rounding error would be an exponent of tens. Where there is a bias (`kBiased`), scores are multiplied
// and it is added first; the exponential is e^x then, which is 0 for −∞.
template <bool kBiased, typename T>
void softmax(T* scores, int64_t keys, int64_t group, int64_t lanes, double scale, const HeadBias<T>& bias,
             T* log_sums) {
  [[maybe_unused]] const T factor = T(scale * kLog2E);
  for (int64_t lane = 0; lane < lanes; lane += kLanes<T>, scores += kLanes<T>) {
    Vec<T> max = load(scores), sum{};
    if constexpr (kBiased) {
      max = add_bias<T>(scores - lane, keys, group, lane, T(scale), bias);
    } else {
      for (int64_t j = 1; j < keys; ++j) {
        const Vec<T> score = load(scores + j * group);
        max = score > max ? score : max;  // a NaN does not reach the maximum, but it reaches the sum
      }
    }
    for (int64_t begin = 0; begin < keys; begin += kSumChunk) {
      Vec<T> chunk{};
      for (int64_t j = begin; j < std::min(keys, begin + kSumChunk); ++j) {
        const Vec<T> difference = load(scores + j * group) - max;
        const Vec<T> weight = kBiased ? exp(difference) : exp2(difference * factor);
        chunk += weight;
        store(scores + j * group, weight);
      }
      sum += chunk;
    }
    const Vec<T> inverse = T(1) / sum, correction = (T(1) - inverse * sum) * inverse;  // rounding error of `inverse`
    for (int64_t j = 0; j < keys; ++j) {
      const Vec<T> weight = load(scores + j * group);
      store(scores + j * group, weight * inverse + weight * correction);
    }
    for (int64_t i = 0; i < kLanes<T>; ++i)
      log_sums[lane + i] = T(double(max[i]) * (kBiased ? 1 : scale) + std::log(double(sum[i])));
  }
}

// Rows of one head of a result: computed in the tensor itself where dtype and width allow it, else in `scratch`, from
// which store_converted copies them.
template <typename T, typename S>
struct OutputRows {
  S* tensor;
  T* scratch;
  int64_t stride, width;  // of the tensor's rows

  static constexpr bool kSameType = std::is_same_v<T, S>;
  bool in_place() const { return kSameType && width % kPanelWidth<T> == 0; }
  T* data() const { return in_place() ? reinterpret_cast<T*>(tensor) : scratch; }
  int64_t data_stride() const { return in_place() ? stride : padded_width<T>(width); }
  void store_converted(int64_t count) const {
    for (int64_t l = 0; !in_place() && l < count; ++l) {
      const T* src = scratch + l * padded_width<T>(width);
      S* dst = tensor + l * stride;
      int64_t e = 0;
      for (; e + kLanes<T> <= width; e += kLanes<T>) store_narrow(dst + e, load(src + e));
      for (; e < width; ++e) dst[e] = from_float<S>(src[e]);
    }
  }
};

// One panel of C = A B, or C += A B, with the sum over the depth split into chunks.
template <typename T>
void multiply_chunked(bool accumulate, int64_t rows, int64_t depth, Operand<T> a, const T* b, int64_t b_stride, T* c,
                      int64_t c_stride) {
  for (int64_t begin = 0; begin < depth; begin += kSumChunk, accumulate = true)
    (accumulate ? multiply_panel<true, 2, T> : multiply_panel<false, 2, T>)(rows, std::min(kSumChunk, depth - begin),
                                                                            a.skip_depth(begin), b + begin * b_stride,
                                                                            b_stride, c, c_stride);
}

// The scores of `compute_scores`, whose queries were multiplied by the sign of the scale unless there is a bias, become
// weights, as by `softmax`.
template <typename T>
void compute_weights(T* scores, int64_t keys, int64_t group, int64_t lanes, double scale, const HeadBias<T>& bias,
                     T* log_sums) {
  if (bias)
    softmax<true>(scores, keys, group, lanes, scale, bias, log_sums);
  else
    softmax<false>(scores, keys, group, lanes, std::abs(scale), bias, log_sums);
}

template <typename T, typename S>
void forward_head(const Heads& q, const Heads& k, const Heads& v, int64_t task, double scale, const HeadBias<T>& bias,
                  S* out, T* lse, T* scratch) {
  const int64_t sample = task / q.heads, head = task % q.heads, width = q.width, padded = padded_width<T>(width);
  const int64_t group = group_size<T>(q.length), stride = q.heads * width;
  T *scores = scratch, *panels = scores + k.length * group, *outputs = panels + group * width;
  T *log_sums = outputs + group * padded, *copies = log_sums + group;
  const HeadRows<T> queries = head_rows<T, S>(q, sample, head, copies);
  const HeadRows<T> keys = head_rows<T, S>(k, sample, head, copies + q.length * padded);
  const HeadRows<T> values = head_rows<T, S>(v, sample, head, copies + (q.length + k.length) * padded);
  for (int64_t first = 0; first < q.length; first += group) {
    const int64_t count = std::min(group, q.length - first), lanes = round_up<int64_t>(count, kLanes<T>);
    pack_rows(queries.row(first), queries.stride, count, width, T(!bias && scale < 0 ? -1 : 1), panels);
    const int64_t visible = bias.visible(first, count, k.length);
    compute_scores(keys, visible, width, panels, lanes, scores, group);
    compute_weights(scores, visible, group, lanes, scale, bias.from(first), log_sums);
    const OutputRows<T, S> output{out + ((sample * q.length + first) * q.heads + head) * width, outputs, stride, width};
    for (int64_t c = 0; c < padded; c += kPanelWidth<T>)
      multiply_chunked(false, count, visible, Operand<T>{scores, 1, group}, values.data + c, values.stride,
                       output.data() + c, output.data_stride());
    output.store_converted(count);
    for (int64_t i = 0; i < count; ++i) lse[task * q.length + first + i] = log_sums[i];
  }
}

template <typename T>
int64_t forward_scratch(const Heads& q, const Heads& k) {
  const int64_t group = group_size<T>(q.length), padded = padded_width<T>(q.width);
  return group * (k.length + q.width + padded + 1) + (q.length + 2 * k.length) * padded + 16;
}

// Gradient of the products, p (dp − Σ dout·out) scale, in place: `dweights` holds dp. Adds that of the scores to the
// bias's.
template <typename T>
void softmax_backward(const T* weights, T* dweights, int64_t keys, int64_t group, int64_t lanes, T scale,
                      const T* row_dot, const HeadBias<T>& bias) {
  for (int64_t j = 0; j < keys; ++j)
    for (int64_t i = 0; i < lanes; i += kLanes<T>) {
      T* gradient = dweights + j * group + i;
      const Vec<T> dscore = load(weights + j * group + i) * (load(gradient) - load(row_dot + i));
      store(gradient, dscore * scale);
      if (!bias.gradient) continue;
      T* sum = bias.gradient + j * bias.stride + i;
      store(sum, load(sum) + dscore);
    }
}

template <typename T, typename S>
void backward_head(const Heads& dout, const Heads& q, const Heads& k, const Heads& v, const Heads& out, int64_t task,
                   double scale, const HeadBias<T>& bias, const Gradients<S>& gradients, T* scratch) {
  const int64_t sample = task / q.heads, head = task % q.heads, width = q.width, padded = padded_width<T>(width);
  const int64_t group = group_size<T>(q.length);
  T *scores = scratch, *dweights = scores + k.length * group, *q_panels = dweights + k.length * group;
  T *dout_panels = q_panels + group * width, *log_sums = dout_panels + group * width, *row_dot = log_sums + group;
  T *sums_q = row_dot + group, *sums_k = sums_q + group * padded, *sums_v = sums_k + k.length * padded;
  T* copies = sums_v + k.length * padded;
  const auto rows = [&](const Heads& x) {
    const HeadRows<T> loaded = head_rows<T, S>(x, sample, head, copies);
    copies += x.length * padded;
    return loaded;
  };
  const HeadRows<T> queries = rows(q), keys = rows(k), values = rows(v), outputs = rows(out), upstream = rows(dout);
  const int64_t key_offset = gradients.offset(k, sample, 0, head);
  const OutputRows<T, S> output_k{gradients.k + key_offset, sums_k, gradients.token_stride, width};
  const OutputRows<T, S> output_v{gradients.v + key_offset, sums_v, gradients.token_stride, width};
  std::fill(row_dot, row_dot + group, T(0));  // including the lanes beyond the last query
  for (int64_t first = 0; first < q.length; first += group) {
    const int64_t count = std::min(group, q.length - first), lanes = round_up<int64_t>(count, kLanes<T>);
    pack_rows(queries.row(first), queries.stride, count, width, T(!bias && scale < 0 ? -1 : 1), q_panels);
    pack_rows(upstream.row(first), upstream.stride, count, width, T(1), dout_panels);
    for (int64_t i = 0; i < count; ++i) row_dot[i] = T(dot(upstream.row(first + i), outputs.row(first + i), width));
    const int64_t visible = bias.visible(first, count, k.length), seen = bias.seen(first, k.length);
    compute_scores(keys, visible, width, q_panels, lanes, scores, group);
    compute_scores(values, visible, width, dout_panels, lanes, dweights, group);
    compute_weights(scores, visible, group, lanes, scale, bias.from(first), log_sums);
    softmax_backward(scores, dweights, visible, group, lanes, T(scale), row_dot, bias.from(first));
    const OutputRows<T, S> output_q{gradients.q + gradients.offset(q, sample, first, head), sums_q,
                                    gradients.token_stride, width};
    for (int64_t c = 0; c < padded; c += kPanelWidth<T>) {
      // The first group that sees a key writes its sums, later ones add to them.
      for (const auto& [begin, end] : {std::pair(int64_t(0), seen), std::pair(seen, visible)}) {
        if (begin == end) continue;
        multiply_chunked(end == seen, end - begin, count, Operand<T>{scores + begin * group, group, 1},
                         upstream.row(first) + c, upstream.stride, output_v.data() + begin * output_v.data_stride() + c,
                         output_v.data_stride());
        multiply_chunked(end == seen, end - begin, count, Operand<T>{dweights + begin * group, group, 1},
                         queries.row(first) + c, queries.stride, output_k.data() + begin * output_k.data_stride() + c,
                         output_k.data_stride());
      }
      multiply_chunked(false, count, visible, Operand<T>{dweights, 1, group}, keys.data + c, keys.stride,
                       output_q.data() + c, output_q.data_stride());
    }
    output_q.store_converted(count);
  }
  output_k.store_converted(k.length);
  output_v.store_converted(k.length);
}

template <typename T>
int64_t backward_scratch(const Heads& q, const Heads& k) {
  const int64_t group = group_size<T>(q.length), padded = padded_width<T>(q.width);
  return group * (2 * k.length + 2 * q.width + 2 + padded) + (4 * k.length + 3 * q.length) * padded + 16;
}

// Runs body(task, bias of its head, scratch) for every head of every sample, with `bytes` of scratch. `operations` is
// the number of operations per query and per element of the head's width.
template <typename T, typename Body>
void for_each_head(const Heads& q, const BiasOf& bias, double operations, int64_t bytes, const Body& body) {
  const int64_t tasks = q.batch * q.heads, size = round_up<int64_t>(bytes, 64);
  operations *= double(tasks) * q.length * q.width;
  if (bias.input) return for_each_biased_head<T>(q, Bias(*bias.input), bias.gradient, operations, bytes, body);
  const Tensor workspace = empty({torch::stable::get_num_threads() * size}, ScalarType::Byte);
  for_tasks(tasks, operations, data<char>(workspace), size,
            [&](int64_t task, char* scratch) { body(task, HeadBias<T>{nullptr, nullptr, 0, bias.causal}, scratch); });
}

std::tuple<Tensor, Tensor> forward(const Heads& q, const Heads& k, const Heads& v, ScalarType dtype, double scale,
                                   const BiasOf& bias = {}) {
  Tensor out = empty({q.batch, q.length, q.heads, q.width}, dtype), lse;
  with_float_type(dtype, "attention: q", [&](auto type) {
    using S = decltype(type);
    using T = ComputeType<S>;
    lse = empty({q.batch, q.heads, q.length}, kDtype<T>);
    S* output = data<S>(out);
    T* log_sums = data<T>(lse);
    if constexpr (std::is_same_v<S, BFloat16>)
      if (uses_bf16_products())
        return with_bf16_products([&](auto tiles) {
          for_each_head<T>(q, bias, 4.0 * k.length, forward_bf16_bytes<tiles>(q, k, v),
                           [&](int64_t task, const HeadBias<T>& head_bias, char* scratch) {
                             forward_bf16<tiles>(q, k, v, task, scale, head_bias, output, log_sums, scratch);
                           });
        });
    for_each_head<T>(q, bias, 4.0 * k.length, forward_scratch<T>(q, k) * sizeof(T),
                     [&](int64_t task, const HeadBias<T>& head_bias, char* scratch) {
                       forward_head<T, S>(q, k, v, task, scale, head_bias, output, log_sums,
                                          reinterpret_cast<T*>(scratch));
                     });
  });
  return {out, lse};
}

template <typename S>
void backward(const Heads& dout, const Heads& q, const Heads& k, const Heads& v, const Heads& out, const Tensor& lse,
              double scale, const Gradients<S>& gradients, const BiasOf& bias = {}) {
  using T = ComputeType<S>;
  if (q.length == 0) {  // without queries the gradients are zero
    for (S* gradient : {gradients.k, gradients.v}) std::fill_n(gradient, k.batch * k.length * k.heads * k.width, S(0));
    return;
  }
  const auto backward_task = [&](int64_t task, const HeadBias<T>& head_bias, char* scratch) {
    backward_head<T, S>(dout, q, k, v, out, task, scale, head_bias, gradients, reinterpret_cast<T*>(scratch));
  };
  const int64_t bytes = backward_scratch<T>(q, k) * sizeof(T);
  if constexpr (std::is_same_v<S, BFloat16>)
    if (uses_bf16_products()) {
      STD_TORCH_CHECK(lse.is_contiguous(), "attention: lse must be contiguous");
      const float* log_sums = static_cast<const float*>(lse.const_data_ptr());
      return with_bf16_products([&](auto tiles) {
        for_each_head<T>(q, bias, 10.0 * k.length, std::max(backward_bf16_bytes<tiles>(q, k, v, out, dout), bytes),
                         [&](int64_t task, const HeadBias<T>& head_bias, char* scratch) {
                           if (are_exact(log_sums + task * q.length, q.length))
                             backward_bf16<tiles>(dout, q, k, v, out, log_sums, task, scale, head_bias, gradients,
                                                  scratch);
                           else  // computes the softmax again, without them
                             backward_task(task, head_bias, scratch);
                         });
      });
    }
  for_each_head<T>(q, bias, 10.0 * k.length, bytes, backward_task);
}

std::tuple<Tensor, Tensor> attention_fwd(Tensor q, Tensor k, Tensor v, double scale) {
  return forward(q, k, v, q.scalar_type(), scale);
}

std::tuple<Tensor, Tensor> attention_bias_fwd(Tensor q, Tensor k, Tensor v, Tensor bias, double scale) {
  return forward(q, k, v, q.scalar_type(), scale, {&bias, nullptr, false});
}

std::tuple<Tensor, Tensor> attention_causal_fwd(Tensor q, Tensor k, Tensor v, double scale) {
  return forward(q, k, v, q.scalar_type(), scale, {nullptr, nullptr, true});
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& out, const Tensor& lse, double scale,
                                            const BiasOf& bias = {}) {
  const auto empty_like = [](const Tensor& x) {
    return empty({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type());
  };
  Tensor dq = empty_like(q), dk = empty_like(k), dv = empty_like(v);
  with_float_type(q.scalar_type(), "attention: q", [&](auto type) {
    using S = decltype(type);
    backward<S>(dout, q, k, v, out, lse, scale, {data<S>(dq), data<S>(dk), data<S>(dv), q.size(2) * q.size(3)}, bias);
  });
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                                 double scale) {
  return backward(dout, q, k, v, out, lse, scale);
}

std::tuple<Tensor, Tensor, Tensor> attention_causal_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out,
                                                        Tensor lse, double scale) {
  return backward(dout, q, k, v, out, lse, scale, {nullptr, nullptr, true});
}

// An uninitialised gradient of the bias; without `wanted` an empty tensor.
Tensor empty_gradient(const Tensor& bias, bool wanted) {
  if (!wanted) return empty({0}, bias.scalar_type());
  if (bias.dim() == 3) return empty({bias.size(0), bias.size(1), bias.size(2)}, bias.scalar_type());
  return empty({bias.size(0), bias.size(1), bias.size(2), bias.size(3)}, bias.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bias_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor bias,
                                                              Tensor out, Tensor lse, double scale, bool with_dbias) {
  Tensor dbias = empty_gradient(bias, with_dbias);
  auto [dq, dk, dv] =
      backward(dout, q, k, v, out, lse, scale, {&bias, with_dbias ? dbias.mutable_data_ptr() : nullptr, false});
  return {dq, dk, dv, dbias};
}

std::tuple<Tensor, Tensor> attention_packed_fwd(Tensor qkv, double scale) {
  return forward({qkv, 0}, {qkv, 1}, {qkv, 2}, qkv.scalar_type(), scale);
}

std::tuple<Tensor, Tensor> attention_packed_bias_fwd(Tensor qkv, Tensor bias, double scale) {
  return forward({qkv, 0}, {qkv, 1}, {qkv, 2}, qkv.scalar_type(), scale, {&bias, nullptr, false});
}

Tensor backward_packed(const Tensor& dout, const Tensor& qkv, const Tensor& out, const Tensor& lse, double scale,
                       const BiasOf& bias = {}) {
  const int64_t part_width = qkv.size(3) * qkv.size(4);
  Tensor dqkv = empty({qkv.size(0), qkv.size(1), 3, qkv.size(3), qkv.size(4)}, qkv.scalar_type());
  with_float_type(qkv.scalar_type(), "attention: qkv", [&](auto type) {
    using S = decltype(type);
    S* gradient = data<S>(dqkv);
    backward<S>(dout, {qkv, 0}, {qkv, 1}, {qkv, 2}, out, lse, scale,
                {gradient, gradient + part_width, gradient + 2 * part_width, 3 * part_width}, bias);
  });
  return dqkv;
}

Tensor attention_packed_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, double scale) {
  return backward_packed(dout, qkv, out, lse, scale);
}

std::tuple<Tensor, Tensor> attention_packed_bias_bwd(Tensor dout, Tensor qkv, Tensor bias, Tensor out, Tensor lse,
                                                     double scale, bool with_dbias) {
  Tensor dbias = empty_gradient(bias, with_dbias);
  void* gradient = with_dbias ? dbias.mutable_data_ptr() : nullptr;
  return {backward_packed(dout, qkv, out, lse, scale, {&bias, gradient, false}), dbias};
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&fastssl::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&fastssl::attention_bwd));
  m.impl("attention_packed_fwd", TORCH_BOX(&fastssl::attention_packed_fwd));
  m.impl("attention_packed_bwd", TORCH_BOX(&fastssl::attention_packed_bwd));
  m.impl("attention_causal_fwd", TORCH_BOX(&fastssl::attention_causal_fwd));
  m.impl("attention_causal_bwd", TORCH_BOX(&fastssl::attention_causal_bwd));
  m.impl("attention_bias_fwd", TORCH_BOX(&fastssl::attention_bias_fwd));
  m.impl("attention_bias_bwd", TORCH_BOX(&fastssl::attention_bias_bwd));
  m.impl("attention_packed_bias_fwd", TORCH_BOX(&fastssl::attention_packed_bias_fwd));
  m.impl("attention_packed_bias_bwd", TORCH_BOX(&fastssl::attention_packed_bias_bwd));
}
