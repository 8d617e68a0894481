// The bias of attention's scores, [H, L, M] for all samples or [B, H, L, M], and its gradient.
//
// Kernels hold scores as [keys, queries], so a bias is transposed first, into [keys, lanes] in the compute type: once a
// call where the samples share it, else by the task that needs it. Tasks run head by head, so that the threads' caches
// hold the bias of one head.
//
// The gradient of a shared bias is a sum over the samples. A task owns a head and some samples, and adds their
// gradients to a sum of its own in their order; then the sums are added. How many samples a task owns depends on the
// shape alone: the same bits on any number of threads, and no [B, H, L, M] in memory.
#pragma once

#include "heads.h"
#include "microkernel.h"

namespace fastssl {
namespace {

// Tasks of a head's samples: at least so many where there are enough samples, and none with more samples than this,
// which bounds the rounding error of a sum.
constexpr int64_t kSumTasks = 64, kMostSamples = 64;

constexpr int64_t kBiasLanes = 32;  // a transposed bias has whole panels of queries
static_assert(kBiasLanes % kPanelWidth<float> == 0);

// What is added to the scores of one head: a bias, transposed, [keys, stride], or −∞ for the keys after a query, or
// nothing.
template <typename T>
struct HeadBias {
  const T* values = nullptr;
  T* gradient = nullptr;  // to which the kernel adds; null where it is not needed
  int64_t stride = 0;
  bool causal = false;
  int64_t first = 0;  // the query of the first lane

  explicit operator bool() const { return values || causal; }
  HeadBias from(int64_t query) const {
    HeadBias bias = *this;
    bias.first = query;
    if (values) bias.values += query;
    if (gradient) bias.gradient += query;
    return bias;
  }
  // The keys that `count` queries from `query` on see, of `keys`.
  int64_t visible(int64_t query, int64_t count, int64_t keys) const {
    return causal ? std::min(keys, query + count) : keys;
  }
  // The keys that the queries before `query` saw.
  int64_t seen(int64_t query, int64_t keys) const { return causal || query == 0 ? query : keys; }
};

// Replaces the scores of a vector of queries, from `lane` on, by score · scale + bias; returns their maxima over the
// keys.
template <typename T>
Vec<T> add_bias(T* scores, int64_t keys, int64_t group, int64_t lane, T scale, const HeadBias<T>& bias) {
  Vec<T> max = splat(T(-INFINITY)), index;
  for (int i = 0; i < kLanes<T>; ++i) index[i] = T(bias.first + lane + i);
  for (int64_t j = 0; j < keys; ++j) {
    Vec<T> score = load(scores + j * group + lane) * scale;
    if (bias.values) score += load(bias.values + j * bias.stride + lane);
    if (bias.causal) score = index < T(j) ? splat(T(-INFINITY)) : score;
    max = score > max ? score : max;  // a NaN does not reach the maximum, but it reaches the sum
    store(scores + j * group + lane, score);
  }
  return max;
}

struct Bias {
  const void* data;
  ScalarType dtype;
  bool shared;                                // by all samples
  int64_t queries, keys, stride, strides[4];  // strides of samples, heads, queries and keys

  explicit Bias(const Tensor& x)
      : data(x.const_data_ptr()), dtype(x.scalar_type()), shared(x.dim() == 3), queries(x.size(x.dim() - 2)),
        keys(x.size(x.dim() - 1)), stride(round_up<int64_t>(queries, kBiasLanes)),
        strides{shared ? 0 : x.stride(0), x.stride(x.dim() - 3), x.stride(x.dim() - 2), x.stride(x.dim() - 1)} {}

  int64_t size() const { return keys * stride; }  // of one transposed head

  // Transposes one head; lanes beyond the last query are zero.
  template <typename T>
  void transpose_head(int64_t sample, int64_t head, T* dst) const {
    with_float_type(dtype, "attention: bias", [&](auto type) {
      using S = decltype(type);
      const S* src = static_cast<const S*>(data) + sample * strides[0] + head * strides[1];
      for (int64_t query = 0; query < stride; query += kLanes<T>)
        for (int64_t key = 0; key < keys; key += kLanes<T>)
          transpose_square<T>(src + query * strides[2] + key * strides[3], queries - query, keys - key,
                              dst + key * stride + query);
    });
  }

  // Adds `count` sums of one head, each [keys, lanes], and writes them to its gradient, [queries, keys] contiguous;
  // only the queries from `query` on, as many as a vector has lanes.
  template <typename T>
  void store_gradient(const T* sums, int64_t count, int64_t distance, int64_t query, void* gradient,
                      int64_t head) const {
    with_float_type(dtype, "attention: bias", [&](auto type) {
      using S = decltype(type);
      S* dst = static_cast<S*>(gradient) + (head * queries + query) * keys;
      for (int64_t key = 0; key < keys; key += kLanes<T>) {
        const int64_t columns = std::min<int64_t>(kLanes<T>, keys - key);
        Vec<T> square[kLanes<T>] = {};
        for (int64_t j = 0; j < columns; ++j)
          for (int64_t i = 0; i < count; ++i) square[j] += load(sums + i * distance + (key + j) * stride + query);
        transpose<T>(square);
        for (int64_t i = 0; i < std::min<int64_t>(kLanes<T>, queries - query); ++i) {
          if constexpr (std::is_same_v<ComputeType<S>, T>)
            store_part<T>(dst + i * keys + key, square[i], columns);
          else
            for (int64_t j = 0; j < columns; ++j) dst[i * keys + key + j] = S(square[i][j]);
        }
      }
    });
  }

 private:
  template <typename T, typename S>
  void transpose_square(const S* src, int64_t rows, int64_t columns, T* dst) const {
    Vec<T> square[kLanes<T>] = {};
    for (int64_t i = 0; i < std::min<int64_t>(kLanes<T>, rows); ++i, src += strides[2]) {
      if constexpr (std::is_same_v<ComputeType<S>, T>)
        if (strides[3] == 1) {
          square[i] = load_part<T>(src, columns);
          continue;
        }
      for (int64_t j = 0; j < std::min<int64_t>(kLanes<T>, columns); ++j)
        square[i][j] = T(to_float(src[j * strides[3]]));
    }
    transpose<T>(square);
    for (int64_t j = 0; j < std::min<int64_t>(kLanes<T>, columns); ++j) store(dst + j * stride, square[j]);
  }
};

struct BiasOf {  // a call's bias and the memory of its gradient, null where there is none; or a causal mask
  const Tensor* input = nullptr;
  void* gradient = nullptr;
  bool causal = false;
};

// Runs body(task, bias of its head, scratch) for every head of every sample, with `bytes` of scratch, and writes the
// gradient of the bias unless `gradient` is null. `operations` is that of all tasks.
template <typename T, typename Body>
void for_each_biased_head(const Heads& q, const Bias& bias, void* gradient, double operations, int64_t bytes,
                          const Body& body) {
  const int64_t size = bias.size(), heads = q.heads, threads = torch::stable::get_num_threads();
  const bool sums_samples = gradient && bias.shared;
  const Tensor shared_values = empty({bias.shared ? heads * size : 0}, kDtype<T>);
  T* values = data<T>(shared_values);
  if (bias.shared)
    for_tasks(heads, double(heads * size), values, 0,
              [&](int64_t head, T*) { bias.transpose_head<T>(0, head, values + head * size); });

  const int64_t samples = sums_samples ? std::clamp<int64_t>(q.batch * heads / kSumTasks, 1, kMostSamples) : 1;
  const int64_t parts = (q.batch + samples - 1) / samples;
  const Tensor all_sums = empty({sums_samples ? heads * parts * size : 0}, kDtype<T>);
  T* sums = data<T>(all_sums);
  const int64_t scratch_bytes = round_up<int64_t>(bytes, 64);
  const int64_t thread_bytes = scratch_bytes + (bias.shared ? 0 : round_up<int64_t>(2 * size * sizeof(T), 64));
  const Tensor workspace = empty({threads * thread_bytes}, ScalarType::Byte);
  for_tasks(heads * parts, operations, data<char>(workspace), thread_bytes, [&](int64_t task, char* scratch) {
    const int64_t head = task / parts, first = task % parts * samples;
    T* own = reinterpret_cast<T*>(scratch + scratch_bytes);
    HeadBias<T> head_bias;
    head_bias.values = bias.shared ? values + head * size : own;
    head_bias.stride = bias.stride;
    if (gradient) {
      head_bias.gradient = bias.shared ? sums + task * size : own + size;
      std::fill_n(head_bias.gradient, size, T(0));
    }
    for (int64_t sample = first; sample < std::min(q.batch, first + samples); ++sample) {
      if (!bias.shared) bias.transpose_head<T>(sample, head, own);
      body(sample * heads + head, head_bias, scratch);
    }
    if (gradient && !bias.shared)
      for (int64_t query = 0; query < q.length; query += kLanes<T>)
        bias.store_gradient<T>(head_bias.gradient, 1, 0, query, gradient, first * heads + head);
  });
  if (!sums_samples) return;
  const int64_t blocks = (q.length + kLanes<T> - 1) / kLanes<T>;
  for_tasks(heads * blocks, double(heads * parts * size), sums, 0, [&](int64_t task, T*) {
    const int64_t head = task / blocks;
    bias.store_gradient<T>(sums + head * parts * size, parts, size, task % blocks * kLanes<T>, gradient, head);
  });
}

}  // namespace
}  // namespace fastssl
