// What the CPU kernel and the CUDA kernel of ema_update_ share: what a tensor's storage is like, which tensors fit
// together, where an element lies, and the formula. No torch in here (tensors are a template parameter).
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "floats.h"

namespace fastssl {

using Dims = std::span<const int64_t>;

enum class Dtype : int8_t { Half = 5, Float = 6, Double = 7, BFloat16 = 15 };  // the numbers of torch's ScalarType

struct Strided {
  void* data = nullptr;
  Dims strides;
  Dtype dtype = Dtype::Float;
};

struct Entry {  // one target with its source and, where its data is not null, its shadow
  Strided target, source, shadow;
  Dims sizes;
  int64_t numel;
  bool flat;  // all in the same dense order of storage: element i of one belongs to element i of the others
};

inline bool is_contiguous(Dims sizes, Dims strides) {
  int64_t expected = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// True where the tensor's elements fill numel consecutive cells, in any order of dimensions.
inline bool is_dense(Dims sizes, Dims strides) {
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

inline bool same_order(Dims sizes, Dims a, Dims b) {
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && a[d] != b[d]) return false;
  return true;
}

inline bool is_wide(Dtype dtype) { return dtype == Dtype::Float || dtype == Dtype::Double; }
inline bool is_floating(Dtype dtype) { return is_wide(dtype) || dtype == Dtype::BFloat16 || dtype == Dtype::Half; }

template <typename Tensor>
Strided strided(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.strides(), Dtype(tensor.scalar_type())};
}

// An entry for each target; throws where tensors do not fit together, so that nothing has been written by then. What
// does not fit is refused in one word: which tensor, and why, the caller finds out (it would cost more to ask in Python
// each time than small lists take). `is_here(tensor)`: does it lie where the kernel runs?
template <typename Tensor, typename IsHere>
std::vector<Entry> entries_of(const std::vector<Tensor>& targets, const std::vector<Tensor>& sources,
                              const std::vector<Tensor>& shadows, const IsHere& is_here) {
  const bool shadowed = !shadows.empty();
  if (sources.size() != targets.size() || (shadowed && shadows.size() != targets.size()))
    throw std::runtime_error("ema_update_: the lists differ in length");
  std::vector<Entry> entries;
  entries.reserve(targets.size());
  for (size_t i = 0; i < targets.size(); ++i) {
    const Dims sizes = targets[i].sizes();
    const auto fits = [&](const Tensor& other) {
      const Dims own = other.sizes();
      return is_floating(Dtype(other.scalar_type())) && is_here(other) && std::ranges::equal(own, sizes);
    };
    if (!is_wide(Dtype(targets[i].scalar_type())) || !is_here(targets[i]) || !fits(sources[i]) ||
        (shadowed && !fits(shadows[i])))
      throw std::runtime_error("ema_update_: tensors do not fit together at " + std::to_string(i));
    Entry entry{strided(targets[i]), strided(sources[i]), shadowed ? strided(shadows[i]) : Strided{},
                sizes, targets[i].numel(), false};
    entry.flat = is_dense(sizes, entry.target.strides) &&
                 same_order(sizes, entry.target.strides, entry.source.strides) &&
                 (!shadowed || same_order(sizes, entry.target.strides, entry.shadow.strides));
    entries.push_back(entry);
  }
  return entries;
}

struct Offsets {
  int64_t target = 0, source = 0, shadow = 0;
};

// Where element `index` (row-major) of each lies. Index is a type wide enough for it: 64-bit division is slow on a GPU.
// No shadow, no strides: null.
template <typename Index>
FASTSSL_BOTH inline Offsets offsets_of(Index index, int dims, const int64_t* sizes, const int64_t* target,
                                       const int64_t* source, const int64_t* shadow) {
  Offsets offsets;
  for (int d = dims; d-- > 0;) {
    const Index size = static_cast<Index>(sizes[d]);
    const int64_t position = static_cast<int64_t>(index % size);
    index /= size;
    offsets.target += position * target[d];
    offsets.source += position * source[d];
    if (shadow) offsets.shadow += position * shadow[d];
  }
  return offsets;
}

// t + w (s - t), from the nearer end, as torch.lerp has it: exact at w = 0 and w = 1.
template <typename T>
FASTSSL_BOTH inline T lerp(T t, T s, T w) {
  return w < T(0.5) ? t + w * (s - t) : s - (s - t) * (T(1) - w);
}

}  // namespace fastssl
