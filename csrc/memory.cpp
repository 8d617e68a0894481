// The state that a momentum method carries from step to step: EMA of parameters, queue of keys.
//
// Both are bound by memory bandwidth. EMA reads target and source and writes target: 12 bytes a parameter in float32,
// 10 with a bfloat16 source; about 90 GB/s of that is what two cores move. So all tensors go through one parallel
// region, cut into chunks that keep every thread busy however unequal the tensors are.
#include <algorithm>

#include "common.h"
#include "ema.h"

namespace fastssl {
namespace {

constexpr int64_t kChunk = 1 << 15;  // elements: 128 kB of float32, a fair share of L2, and long enough to hide the call

static_assert(Dtype(ScalarType::Half) == Dtype::Half && Dtype(ScalarType::Float) == Dtype::Float &&
              Dtype(ScalarType::Double) == Dtype::Double && Dtype(ScalarType::BFloat16) == Dtype::BFloat16);

template <typename T, typename S, typename H>
void ema_chunk(const Entry& entry, int64_t begin, int64_t end, T weight) {
  T* target = static_cast<T*>(entry.target.data);
  const S* source = static_cast<const S*>(entry.source.data);
  H* shadow = static_cast<H*>(entry.shadow.data);
  const auto step = [&](int64_t t, int64_t s, int64_t h) {
    const T value = lerp<T>(target[t], T(to_float(source[s])), weight);
    target[t] = value;
    if constexpr (!std::is_void_v<H>) shadow[h] = from_float<H>(value);
  };
  if (entry.flat) {
    for (int64_t i = begin; i < end; ++i) step(i, i, i);
  } else {
    const int dims = static_cast<int>(entry.sizes.size());
    for (int64_t i = begin; i < end; ++i) {
      const Offsets at = offsets_of(i, dims, entry.sizes.data(), entry.target.strides.data(),
                                    entry.source.strides.data(), shadow ? entry.shadow.strides.data() : nullptr);
      step(at.target, at.source, at.shadow);
    }
  }
}

template <typename T>
void ema_chunk(const Entry& entry, int64_t begin, int64_t end, T weight) {
  with_float_type(ScalarType(entry.source.dtype), "ema_update_: sources", [&](auto source) {
    using S = decltype(source);
    if (!entry.shadow.data) return ema_chunk<T, S, void>(entry, begin, end, weight);
    with_float_type(ScalarType(entry.shadow.dtype), "ema_update_: shadows", [&](auto shadow) {
      ema_chunk<T, S, decltype(shadow)>(entry, begin, end, weight);
    });
  });
}

void ema_update_(std::vector<Tensor> targets, std::vector<Tensor> sources, double momentum,
                 std::vector<Tensor> shadows) {
  const auto is_here = [](const Tensor& tensor) { return tensor.is_cpu(); };
  const std::vector<Entry> entries = entries_of(targets, sources, shadows, is_here);
  std::vector<int64_t> first_chunk{0};  // of each entry, in one common numbering
  int64_t numel = 0;
  for (const Entry& entry : entries) {
    first_chunk.push_back(first_chunk.back() + (entry.numel + kChunk - 1) / kChunk);
    numel += entry.numel;
  }
  const double weight = 1.0 - momentum;
  const auto run = [&](int64_t begin, int64_t end) {
    size_t e = std::upper_bound(first_chunk.begin(), first_chunk.end(), begin) - first_chunk.begin() - 1;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (chunk >= first_chunk[e + 1]) ++e;
      const int64_t from = (chunk - first_chunk[e]) * kChunk, to = std::min(from + kChunk, entries[e].numel);
      if (entries[e].target.dtype == Dtype::Double)
        ema_chunk<double>(entries[e], from, to, weight);
      else
        ema_chunk<float>(entries[e], from, to, static_cast<float>(weight));
    }
  };
  // Waking the pool costs microseconds: below one chunk's worth of work the caller's thread is faster.
  const int64_t grain = numel <= kChunk ? first_chunk.back() + 1 : 1;
  torch::stable::parallel_for(0, first_chunk.back(), grain, run);
}

template <typename Q, typename K>
void copy_rows(Q* queue, const K* keys, int64_t rows, int64_t width, int64_t queue_stride, int64_t row_stride,
               int64_t column_stride) {
  for (int64_t row = 0; row < rows && width > 0; ++row) {
    Q* to = queue + row * queue_stride;
    const K* from = keys + row * row_stride;
    if constexpr (std::is_same_v<Q, K>)
      if (column_stride == 1) {
        std::memmove(to, from, width * sizeof(Q));  // keys may be rows of the queue itself
        continue;
      }
    for (int64_t d = 0; d < width; ++d) to[d] = from_float<Q>(to_float(from[d * column_stride]));
  }
}

// One thread: MoCo's 256 keys of width 128 are 128 kB, less than it costs to share them out.
void enqueue_(Tensor queue, Tensor ptr, Tensor keys) {
  const int64_t length = queue.size(0), width = queue.size(1);
  const int64_t arriving = keys.size(0), kept = std::min(arriving, length);
  int64_t* position = static_cast<int64_t*>(ptr.mutable_data_ptr());
  const int64_t first = (*position % length + length) % length;  // as torch's remainder: never negative
  const int64_t start = (first + arriving - kept) % length;  // keys that would be overwritten at once are skipped
  const int64_t before_wrap = std::min(kept, length - start);
  const int64_t queue_stride = queue.stride(0), row_stride = keys.stride(0), column_stride = keys.stride(1);
  with_float_type(queue.scalar_type(), "enqueue_: queue", [&](auto queue_type) {
    with_float_type(keys.scalar_type(), "enqueue_: keys", [&](auto keys_type) {
      using Q = decltype(queue_type);
      using K = decltype(keys_type);
      Q* cells = static_cast<Q*>(queue.mutable_data_ptr());
      const K* rows = static_cast<const K*>(keys.const_data_ptr()) + (arriving - kept) * row_stride;
      copy_rows(cells + start * queue_stride, rows, before_wrap, width, queue_stride, row_stride, column_stride);
      copy_rows(cells, rows + before_wrap * row_stride, kept - before_wrap, width, queue_stride, row_stride,
                column_stride);
    });
  });
  *position = (first + arriving) % length;
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("ema_update_", TORCH_BOX(&fastssl::ema_update_));
  m.impl("enqueue_", TORCH_BOX(&fastssl::enqueue_));
}
