// The state that a momentum method carries from step to step: EMA of parameters, queue of keys.
//
// Both are bound by memory bandwidth. EMA reads target and source and writes target: 12 bytes a parameter in float32,
// 10 with a bfloat16 source; about 90 GB/s of that is what two cores move. So all tensors go through one parallel
// region, cut into chunks that keep every thread busy however unequal the tensors are.
#include "common.h"

#include <algorithm>

namespace fastssl {
namespace {

constexpr int64_t kChunk = 1 << 15;  // elements: 128 kB of float32, a fair share of L2, and long enough to hide the call

using Dims = torch::headeronly::IntHeaderOnlyArrayRef;

struct Strided {
  void* data;
  Dims strides;
};

struct Entry {  // one target with its source and, maybe, its shadow
  Strided target, source, shadow;
  ScalarType source_dtype, shadow_dtype;
  Dims sizes;
  int64_t numel;
  bool flat;  // all in the same dense order of storage: element i of one belongs to element i of the others
};

bool is_contiguous(Dims sizes, Dims strides) {
  int64_t expected = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// True where the tensor's elements fill numel consecutive cells, in any order of dimensions.
bool is_dense(Dims sizes, Dims strides) {
  if (is_contiguous(sizes, strides)) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1) dims.emplace_back(strides[d], sizes[d]);
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool same_order(Dims sizes, Dims a, Dims b) {
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && a[d] != b[d]) return false;
  return true;
}

bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

bool fits(const Tensor& other, Dims sizes) {
  const Dims own = other.sizes();
  return is_floating(other.scalar_type()) && other.is_cpu() && own.size() == sizes.size() &&
         std::equal(own.begin(), own.end(), sizes.begin());
}

Strided strided(const Tensor& tensor) { return {tensor.mutable_data_ptr(), tensor.strides()}; }

// Where element `index` (row-major) of a tensor lies.
int64_t offset_of(int64_t index, Dims sizes, Dims strides) {
  int64_t offset = 0;
  for (size_t d = sizes.size(); d-- > 0;) {
    offset += index % sizes[d] * strides[d];
    index /= sizes[d];
  }
  return offset;
}

// t + w (s - t), from the nearer end, as torch.lerp has it: exact at w = 0 and w = 1.
template <typename T>
inline T lerp(T t, T s, T w) {
  return w < T(0.5) ? t + w * (s - t) : s - (s - t) * (T(1) - w);
}

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
    for (int64_t i = begin; i < end; ++i)
      step(offset_of(i, entry.sizes, entry.target.strides), offset_of(i, entry.sizes, entry.source.strides),
           shadow ? offset_of(i, entry.sizes, entry.shadow.strides) : 0);
  }
}

template <typename T>
void ema_chunk(const Entry& entry, int64_t begin, int64_t end, T weight) {
  with_float_type(entry.source_dtype, "ema_update_: sources", [&](auto source) {
    using S = decltype(source);
    if (!entry.shadow.data) return ema_chunk<T, S, void>(entry, begin, end, weight);
    with_float_type(entry.shadow_dtype, "ema_update_: shadows", [&](auto shadow) {
      ema_chunk<T, S, decltype(shadow)>(entry, begin, end, weight);
    });
  });
}

template <typename T>
void ema_all(const std::vector<Entry>& entries, T weight) {
  std::vector<int64_t> first_chunk{0};  // of each entry, in one common numbering
  int64_t numel = 0;
  for (const Entry& entry : entries) {
    first_chunk.push_back(first_chunk.back() + (entry.numel + kChunk - 1) / kChunk);
    numel += entry.numel;
  }
  const auto run = [&](int64_t begin, int64_t end) {
    size_t e = std::upper_bound(first_chunk.begin(), first_chunk.end(), begin) - first_chunk.begin() - 1;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (chunk >= first_chunk[e + 1]) ++e;
      const int64_t from = (chunk - first_chunk[e]) * kChunk;
      ema_chunk<T>(entries[e], from, std::min(from + kChunk, entries[e].numel), weight);
    }
  };
  // Waking the pool costs microseconds: below one chunk's worth of work the caller's thread is faster.
  const int64_t grain = numel <= kChunk ? first_chunk.back() + 1 : 1;
  torch::stable::parallel_for(0, first_chunk.back(), grain, run);
}

// Looks at everything before it writes anything. What does not fit is refused in one word: which tensor, and why, the
// caller finds out (it would cost more to ask in Python each time than small lists take).
void ema_update_(std::vector<Tensor> targets, std::vector<Tensor> sources, double momentum,
                 std::vector<Tensor> shadows) {
  const bool shadowed = !shadows.empty();
  STD_TORCH_CHECK(sources.size() == targets.size() && (!shadowed || shadows.size() == targets.size()),
                  "ema_update_: the lists differ in length");
  std::vector<Entry> of_float, of_double;
  of_float.reserve(targets.size());
  for (size_t i = 0; i < targets.size(); ++i) {
    const Dims sizes = targets[i].sizes();
    const ScalarType dtype = targets[i].scalar_type();
    STD_TORCH_CHECK((dtype == ScalarType::Float || dtype == ScalarType::Double) && targets[i].is_cpu() &&
                        fits(sources[i], sizes) && (!shadowed || fits(shadows[i], sizes)),
                    "ema_update_: tensors do not fit together at ", i);
    Entry entry{strided(targets[i]), strided(sources[i]), shadowed ? strided(shadows[i]) : Strided{nullptr, {}},
                sources[i].scalar_type(), shadowed ? shadows[i].scalar_type() : ScalarType::Float,
                sizes, targets[i].numel(), false};
    entry.flat = is_dense(sizes, entry.target.strides) &&
                 same_order(sizes, entry.target.strides, entry.source.strides) &&
                 (!shadowed || same_order(sizes, entry.target.strides, entry.shadow.strides));
    (dtype == ScalarType::Double ? of_double : of_float).push_back(entry);
  }
  ema_all<float>(of_float, static_cast<float>(1.0 - momentum));
  ema_all<double>(of_double, 1.0 - momentum);
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
