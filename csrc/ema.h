// Shared by the CPU kernel and the CUDA kernel of ema_update_: checks of the tensor lists, memory layouts, offsets of
// elements, and the formula. Includes nothing of torch: the tensor type is a template parameter.
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

enum class Dtype : int8_t { Half = 5, Float = 6, Double = 7, BFloat16 = 15 };  // as in torch's ScalarType

struct Storage {
  void* data = nullptr;
  Dims strides;
  Dtype dtype = Dtype::Float;
};

struct Entry {  // a target, its source, and its shadow, whose data is null if there is none
  Storage target, source, shadow;
  Dims sizes;
  int64_t numel;
  // True where all tensors are dense in the same order of dimensions, so that the elements at position i in their
  // memory correspond to each other.
  bool flat;
};

inline bool is_contiguous(Dims sizes, Dims strides) {
  int64_t expected = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// True where the elements fill numel consecutive places in memory, in any order of dimensions.
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

inline bool have_same_strides(Dims sizes, Dims a, Dims b) {
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && a[d] != b[d]) return false;
  return true;
}

inline bool is_wide(Dtype dtype) { return dtype == Dtype::Float || dtype == Dtype::Double; }
inline bool is_floating(Dtype dtype) { return is_wide(dtype) || dtype == Dtype::BFloat16 || dtype == Dtype::Half; }

template <typename Tensor>
Storage storage_of(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.strides(), Dtype(tensor.scalar_type())};
}

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::Double ? 8 : dtype == Dtype::Float ? 4 : 2; }

// True where two elements may lie in one place of memory.
inline bool overlaps_itself(Dims sizes, Dims strides) {
  if (is_contiguous(sizes, strides)) return false;
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1) dims.emplace_back(strides[d], sizes[d]);
  std::sort(dims.begin(), dims.end());
  int64_t extent = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= extent) return true;
    extent += (size - 1) * stride;
  }
  return false;
}

// Memory of a tensor: all of it where the tensor is dense, else its first element, since views such as the columns of
// one matrix may interleave without sharing an element. torch's own ops draw the same line.
struct Extent {
  const char *begin, *end;
  size_t entry;
  bool written;
};

inline Extent extent_of(const Storage& storage, const Entry& entry, size_t index, bool written) {
  const char* begin = static_cast<const char*>(storage.data);
  const int64_t numel = is_dense(entry.sizes, storage.strides) ? entry.numel : 1;
  return {begin, begin + numel * bytes_of(storage.dtype), index, written};
}

// Throws where a tensor that is written shares memory with itself or with another one: threads would race for it. Only
// a target that is its own source is no race.
inline void check_separate(const std::vector<Entry>& entries) {
  const auto fail = [](size_t index) {
    throw std::runtime_error("ema_update_: targets and shadows must not share memory, got others at index " +
                             std::to_string(index));
  };
  std::vector<Extent> extents;
  extents.reserve(3 * entries.size());
  for (size_t i = 0; i < entries.size(); ++i) {
    const Entry& entry = entries[i];
    if (entry.numel == 0) continue;
    for (const Storage* storage : {&entry.target, &entry.source, &entry.shadow}) {
      if (!storage->data) continue;
      const bool written = storage != &entry.source;
      if (written && overlaps_itself(entry.sizes, storage->strides)) fail(i);
      const bool is_target = storage == &entry.source && storage->data == entry.target.data &&
                             storage->dtype == entry.target.dtype &&
                             have_same_strides(entry.sizes, storage->strides, entry.target.strides);
      if (!is_target) extents.push_back(extent_of(*storage, entry, i, written));
    }
  }
  std::ranges::sort(extents, {}, &Extent::begin);
  const char *end = nullptr, *written_end = nullptr;  // of the extents so far
  for (const Extent& extent : extents) {
    if (extent.begin < (extent.written ? end : written_end)) fail(extent.entry);
    end = std::max(end, extent.end);
    if (extent.written) written_end = std::max(written_end, extent.end);
  }
}

// One entry for each target. Throws, before anything is written, if shapes, dtypes or devices do not match; the error
// is short, because the Python caller then checks the lists again and raises the sentence for the user (checking in
// Python on each call would take longer than the kernel on short lists). `is_on_device(tensor)`
// tells whether a tensor is on the kernel's device.
template <typename Tensor, typename IsOnDevice>
std::vector<Entry> entries_of(const std::vector<Tensor>& targets, const std::vector<Tensor>& sources,
                              const std::vector<Tensor>& shadows, const IsOnDevice& is_on_device) {
  const bool shadowed = !shadows.empty();
  if (sources.size() != targets.size() || (shadowed && shadows.size() != targets.size()))
    throw std::runtime_error("ema_update_: sources, and shadows if given, must have as many tensors as targets, got " +
                             std::to_string(targets.size()) + " targets, " + std::to_string(sources.size()) +
                             " sources and " + std::to_string(shadows.size()) + " shadows");
  std::vector<Entry> entries;
  entries.reserve(targets.size());
  for (size_t i = 0; i < targets.size(); ++i) {
    const Dims sizes = targets[i].sizes();
    const auto fits = [&](const Tensor& tensor) {
      const Dims tensor_sizes = tensor.sizes();
      return is_floating(Dtype(tensor.scalar_type())) && is_on_device(tensor) &&
             std::ranges::equal(tensor_sizes, sizes);
    };
    if (!is_wide(Dtype(targets[i].scalar_type())) || !is_on_device(targets[i]) || !fits(sources[i]) ||
        (shadowed && !fits(shadows[i])))
      throw std::runtime_error(
          "ema_update_: targets must be float32 or float64, and sources and shadows floating-point tensors of their "
          "target's shape and device, got others at index " +
          std::to_string(i));
    const Storage shadow = shadowed ? storage_of(shadows[i]) : Storage{};
    Entry entry{storage_of(targets[i]), storage_of(sources[i]), shadow, sizes, targets[i].numel(), false};
    entry.flat = is_dense(sizes, entry.target.strides) &&
                 have_same_strides(sizes, entry.target.strides, entry.source.strides) &&
                 (!shadowed || have_same_strides(sizes, entry.target.strides, entry.shadow.strides));
    entries.push_back(entry);
  }
  check_separate(entries);
  return entries;
}

struct Offsets {
  int64_t target = 0, source = 0, shadow = 0;
};

// Offsets of element `index` (row-major). Index: uint32_t where it suffices, because 64-bit division is slow on a GPU.
// `shadow` is null if there is no shadow.
template <typename Index>
FASTSSL_HOST_DEVICE inline Offsets offsets_of(Index index, int dims, const int64_t* sizes, const int64_t* target,
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

// t + w (s − t), computed from the nearer end like torch.lerp, so that the result is exact at w = 0 and w = 1.
template <typename T>
FASTSSL_HOST_DEVICE inline T lerp(T t, T s, T w) {
  return w < T(0.5) ? t + w * (s - t) : s - (s - t) * (T(1) - w);
}

}  // namespace fastssl
