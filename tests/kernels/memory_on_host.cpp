// csrc/ema.cuh and all that leads to its launch, for a CPU: called by test_memory_cuda.py through ctypes.
#include "cuda_on_host.h"

#include "ema.cuh"

namespace {

using fastssl::Chunk;
using fastssl::Dims;
using fastssl::Dtype;
using fastssl::Row;

struct Array {  // a tensor, as Python describes it
  void* data;
  const int64_t *shape, *steps;
  int64_t dims, count;
  int32_t dtype;

  void* mutable_data_ptr() const { return data; }
  Dims sizes() const { return {shape, size_t(dims)}; }
  Dims strides() const { return {steps, size_t(dims)}; }
  int64_t numel() const { return count; }
  int8_t scalar_type() const { return int8_t(dtype); }
};

std::vector<Row> rows_of(int count, const Array* targets, const Array* sources, const Array* shadows) {
  const auto list = [count](const Array* first) {
    return first ? std::vector<Array>(first, first + count) : std::vector<Array>();
  };
  const auto is_here = [](const Array&) { return true; };
  return fastssl::rows_of(fastssl::entries_of(list(targets), list(sources), list(shadows), is_here));
}

struct Table {
  int number;
  bool keep;
};

fastssl::TableCache<Table> cache;
int tables = 0;

}  // namespace

// Null, or why the tensors were refused.
extern "C" const char* ema_update(int count, const Array* targets, const Array* sources, const Array* shadows,
                                  double momentum) {
  static std::string refusal;
  try {
    const std::vector<Row> rows = rows_of(count, targets, sources, shadows);
    const std::vector<Chunk> chunks = fastssl::chunks_of(rows);
    const double weight = 1.0 - momentum;
    host::launch(fastssl::ema_update, unsigned(chunks.size()), fastssl::kThreads, rows.data(), chunks.data(),
                 static_cast<float>(weight), weight);
    return nullptr;
  } catch (const std::exception& error) {
    return (refusal = error.what()).c_str();
  }
}

// The number of the table that serves these tensors: a new one where the cache has none.
extern "C" int table_of(int count, const Array* targets, const Array* sources, const Array* shadows, bool keep) {
  std::vector<Row> rows = rows_of(count, targets, sources, shadows);
  Table* table = cache.find(rows);
  if (!table) table = cache.put(std::move(rows), {tables++, false});
  table->keep |= keep;
  return table->number;
}

// How a row is walked: 0 packed, 1 scalar, 2 strided.
extern "C" int path_of(const Array* target, const Array* source, const Array* shadow) {
  return int(rows_of(1, target, source, shadow)[0].path);
}

// (row, first element, end) of each block, into `out`; how many there are.
extern "C" int64_t chunks_of(int count, const int64_t* numels, int64_t* out) {
  std::vector<Row> rows(count);
  for (int i = 0; i < count; ++i) rows[i].numel = numels[i];
  const std::vector<Chunk> chunks = fastssl::chunks_of(rows);
  if (out)
    for (const Chunk& chunk : chunks) {
      const int64_t begin = chunk.index * fastssl::kEmaChunk;
      *out++ = chunk.row;
      *out++ = begin;
      *out++ = std::min(begin + fastssl::kEmaChunk, numels[chunk.row]);
    }
  return int64_t(chunks.size());
}
