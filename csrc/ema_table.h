// The table of tensors that the CUDA kernel of ema_update_ reads, so that one launch updates all tensors of a call.
//
// A row holds everything the kernel reads about a tensor: addresses, dtypes, sizes and strides. Each call builds its
// rows on the host, which takes less time than the kernel, and compares them with those of the cached device tables; if
// any field differs, a new table is made. Includes nothing of torch or CUDA.
#pragma once

#include <cstdint>
#include <iterator>
#include <list>
#include <stdexcept>
#include <utility>
#include <vector>

#include "ema.h"

namespace fastssl {

// Elements of one thread block. ViT-B's 86.6 million parameters make over 5,000 blocks, dozens per multiprocessor of
// a large GPU, so that the last wave, in which some multiprocessors are idle, is a small part. Smaller chunks would
// read the table more often.
constexpr int64_t kEmaChunk = 1 << 14;
constexpr int kMaxDims = 8;
constexpr int64_t kWidestLoad = 16;  // bytes of the widest load instruction

enum class Path : int8_t { Packed, Scalar, Strided };  // flat and aligned, flat, any strides

struct Row {
  void *target = nullptr, *source = nullptr, *shadow = nullptr;  // shadow: null if there is none
  int64_t numel = 0;
  Path path = Path::Scalar;
  Dtype target_dtype = Dtype::Float, source_dtype = Dtype::Float, shadow_dtype = Dtype::Float;
  int32_t dims = 0;  // this and the following fields: for Path::Strided only
  int64_t sizes[kMaxDims] = {};
  int64_t target_strides[kMaxDims] = {}, source_strides[kMaxDims] = {}, shadow_strides[kMaxDims] = {};

  bool operator==(const Row&) const = default;
};

struct Chunk {  // work of one block: elements [index * kEmaChunk, (index + 1) * kEmaChunk) of a row
  int32_t row, index;
};

// Elements of a pack: 16 bytes of the target.
FASTSSL_HOST_DEVICE constexpr int pack_width(int64_t bytes_of_target) { return int(kWidestLoad / bytes_of_target); }

// True where the address is aligned for loads of `width` elements by one instruction (two, for 32 bytes).
inline bool is_aligned(const Storage& tensor, int width) {
  const int64_t bytes = std::min(kWidestLoad, width * bytes_of(tensor.dtype));
  return reinterpret_cast<uintptr_t>(tensor.data) % bytes == 0;  // a missing shadow (null) is aligned
}

// Sizes and strides, with neighbouring dimensions merged where the strides of all tensors allow it, which saves
// divisions.
inline void set_strides(Row& row, const Entry& entry) {
  for (size_t d = 0; d < entry.sizes.size(); ++d) {
    const int64_t size = entry.sizes[d], target = entry.target.strides[d], source = entry.source.strides[d];
    const int64_t shadow = entry.shadow.data ? entry.shadow.strides[d] : 0;
    if (size == 1) continue;
    int last = row.dims - 1;
    if (last >= 0 && row.target_strides[last] == size * target && row.source_strides[last] == size * source &&
        row.shadow_strides[last] == size * shadow) {
      row.sizes[last] *= size;
    } else {
      if (row.dims == kMaxDims)
        throw std::runtime_error(
            "ema_update_: on a GPU, a tensor that is not stored in the same dense order as its target must have at "
            "most 8 "
            "dimensions: make it contiguous");
      last = row.dims++;
      row.sizes[last] = size;
    }
    row.target_strides[last] = target;
    row.source_strides[last] = source;
    row.shadow_strides[last] = shadow;
  }
}

inline Row row_of(const Entry& entry) {
  Row row;
  row.target = entry.target.data;
  row.source = entry.source.data;
  row.shadow = entry.shadow.data;
  row.numel = entry.numel;
  row.target_dtype = entry.target.dtype;
  row.source_dtype = entry.source.dtype;
  row.shadow_dtype = entry.shadow.dtype;
  const int width = pack_width(bytes_of(entry.target.dtype));
  if (!entry.flat) {
    row.path = Path::Strided;
    set_strides(row, entry);
  } else if (is_aligned(entry.target, width) && is_aligned(entry.source, width) && is_aligned(entry.shadow, width)) {
    row.path = Path::Packed;
  }
  return row;
}

inline std::vector<Row> rows_of(const std::vector<Entry>& entries) {
  std::vector<Row> rows;
  rows.reserve(entries.size());
  for (const Entry& entry : entries) rows.push_back(row_of(entry));
  return rows;
}

inline std::vector<Chunk> chunks_of(const std::vector<Row>& rows) {
  std::vector<Chunk> chunks;
  for (size_t row = 0; row < rows.size(); ++row)
    for (int64_t index = 0; index * kEmaChunk < rows[row].numel; ++index)
      chunks.push_back({static_cast<int32_t>(row), static_cast<int32_t>(index)});
  return chunks;
}

// The tables of a device, most recently used first. A table with `keep` set is never evicted.
template <typename Table>
class TableCache {
 public:
  // The table of exactly these rows, or null. Valid until the next insert.
  Table* find(const std::vector<Row>& rows) {
    for (auto slot = slots_.begin(); slot != slots_.end(); ++slot)
      if (slot->first == rows) {
        slots_.splice(slots_.begin(), slots_, slot);
        return &slot->second;
      }
    return nullptr;
  }

  Table* insert(std::vector<Row> rows, Table table) {
    size_t evictable = 0;
    for (auto slot = slots_.begin(); slot != slots_.end();)
      slot = slot->second.keep || ++evictable < kTables ? std::next(slot) : slots_.erase(slot);
    slots_.emplace_front(std::move(rows), std::move(table));
    return &slots_.front().second;
  }

 private:
  static constexpr size_t kTables = 8;  // a run uses one table per momentum encoder, or two, with and without shadows
  std::list<std::pair<std::vector<Row>, Table>> slots_;
};

}  // namespace fastssl
