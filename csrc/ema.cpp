// Exponential moving average of parameters, for momentum encoders (fastssl/ops/ema.py).
//
// Bound by memory bandwidth: it reads target and source and writes target, 12 bytes per parameter in float32, 10 with a
// bfloat16 source, and 2 more for a bfloat16 shadow. All tensors of a call are processed in one parallel loop over
// chunks of equal size, so that threads are equally loaded for tensors of any sizes.
#include <algorithm>

#include "common.h"
#include "ema.h"

namespace fastssl {
namespace {

constexpr int64_t kChunk = 1 << 15;  // elements: 128 kB of float32, which fit into the L2 cache

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
      const Offsets offsets = offsets_of(i, dims, entry.sizes.data(), entry.target.strides.data(),
                                         entry.source.strides.data(), shadow ? entry.shadow.strides.data() : nullptr);
      step(offsets.target, offsets.source, offsets.shadow);
    }
  }
}

template <typename T>
void ema_chunk(const Entry& entry, int64_t begin, int64_t end, T weight) {
  with_float_type(ScalarType(entry.source.dtype), "ema_update_: sources", [&](auto source) {
    using S = decltype(source);
    if (!entry.shadow.data) return ema_chunk<T, S, void>(entry, begin, end, weight);
    with_float_type(ScalarType(entry.shadow.dtype), "ema_update_: shadows",
                    [&](auto shadow) { ema_chunk<T, S, decltype(shadow)>(entry, begin, end, weight); });
  });
}

void ema_update_(std::vector<Tensor> targets, std::vector<Tensor> sources, double momentum,
                 std::vector<Tensor> shadows) {
  const auto is_on_device = [](const Tensor& tensor) { return tensor.is_cpu(); };
  const std::vector<Entry> entries = entries_of(targets, sources, shadows, is_on_device);
  std::vector<int64_t> first_chunk{0};  // number of each entry's first chunk
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
      const int64_t first = (chunk - first_chunk[e]) * kChunk, stop = std::min(first + kChunk, entries[e].numel);
      if (entries[e].target.dtype == Dtype::Double)
        ema_chunk<double>(entries[e], first, stop, weight);
      else
        ema_chunk<float>(entries[e], first, stop, static_cast<float>(weight));
    }
  };
  // Waking the thread pool takes microseconds: for at most one chunk, the calling thread alone is faster.
  const int64_t grain = numel <= kChunk ? first_chunk.back() + 1 : 1;
  torch::stable::parallel_for(0, first_chunk.back(), grain, run);
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) { m.impl("ema_update_", TORCH_BOX(&fastssl::ema_update_)); }
