// The kernel of csrc/ema.cuh and the code that prepares its launch, compiled for a CPU. test_ema_cuda.py calls it by
// ctypes.
#include "cuda_on_host.h"

#include "ema.cuh"

namespace {

using fastssl::Chunk;
using fastssl::Dims;
using fastssl::Dtype;
using fastssl::Row;

struct Array {  // a tensor passed from Python
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
  const auto is_on_device = [](const Array&) { return true; };
  return fastssl::rows_of(fastssl::entries_of(list(targets), list(sources), list(shadows), is_on_device));
}

struct Table {
  int number;
  bool keep;
};

fastssl::TableCache<Table> cache;
int tables = 0;

}  // namespace

// Returns null, or the error message.
extern "C" const char* ema_update(int count, const Array* targets, const Array* sources, const Array* shadows,
                                  double momentum) {
  static std::string message;
  try {
    const std::vector<Row> rows = rows_of(count, targets, sources, shadows);
    const std::vector<Chunk> chunks = fastssl::chunks_of(rows);
    const double weight = 1.0 - momentum;
    host::launch(fastssl::ema_update, unsigned(chunks.size()), fastssl::kThreads, rows.data(), chunks.data(),
                 static_cast<float>(weight), weight);
    return nullptr;
  } catch (const std::exception& error) {
    return (message = error.what()).c_str();
  }
}

// Number of the table of these tensors, which is made if it is not in the cache.
extern "C" int table_of(int count, const Array* targets, const Array* sources, const Array* shadows, bool keep) {
  std::vector<Row> rows = rows_of(count, targets, sources, shadows);
  Table* table = cache.find(rows);
  if (!table) table = cache.insert(std::move(rows), {tables++, false});
  table->keep |= keep;
  return table->number;
}

// The path of a row: 0 packed, 1 scalar, 2 strided.
extern "C" int path_of(const Array* target, const Array* source, const Array* shadow) {
  return int(rows_of(1, target, source, shadow)[0].path);
}

// Writes (row, first element, end) of each block to `out` unless it is null, and returns their number.
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
