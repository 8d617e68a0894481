// ema_update_ on CUDA devices: one launch of the kernel in ema.cuh. The table of tensors stays on the device between
// calls, so that the host's work for a call is to read the tensors' addresses and compare them with the table's.
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>

#include "common.h"
#include "ema.cuh"

namespace fastssl {
namespace {

// A table on the device: its rows, then its chunks, in one allocation of torch's caching allocator.
struct DeviceTable {
  Tensor memory;
  size_t rows, chunks;
  cudaStream_t stream;  // the stream on which the memory was allocated
  bool used_on_other_stream = false;
  bool keep = false;  // true once a CUDA graph has captured a launch: each replay reads the table

  DeviceTable(Tensor memory, size_t rows, size_t chunks, cudaStream_t stream)
      : memory(std::move(memory)), rows(rows), chunks(chunks), stream(stream) {}
  DeviceTable(DeviceTable&&) = default;

  // The allocator reuses freed memory on `stream`, where work runs in order; work on other streams must have finished.
  ~DeviceTable() {
    if (used_on_other_stream) cudaDeviceSynchronize();
  }
};

Tensor empty_bytes(int32_t device, int64_t size) {
  const int64_t stride = 1;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(),
                                                         aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

// Returns after the copy has finished, so that launches on any stream may read the table. (cudaMemcpy would not
// suffice: from pageable memory it may return before the last bytes have arrived, and torch's streams do not wait for
// the default stream.)
DeviceTable upload(const std::vector<Row>& rows, int32_t device, cudaStream_t stream) {
  const std::vector<Chunk> chunks = chunks_of(rows);
  const size_t bytes_of_rows = rows.size() * sizeof(Row), bytes_of_chunks = chunks.size() * sizeof(Chunk);
  DeviceTable table(empty_bytes(device, bytes_of_rows + bytes_of_chunks), rows.size(), chunks.size(), stream);
  char* const dst = static_cast<char*>(table.memory.mutable_data_ptr());
  STD_CUDA_CHECK(cudaMemcpyAsync(dst, rows.data(), bytes_of_rows, cudaMemcpyHostToDevice, stream));
  STD_CUDA_CHECK(cudaMemcpyAsync(dst + bytes_of_rows, chunks.data(), bytes_of_chunks, cudaMemcpyHostToDevice, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  return table;
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

void launch(std::vector<Row> rows, double weight, int32_t device, cudaStream_t stream) {
  // The caches are never destroyed, because torch's allocator may be destroyed before them when the process ends. The
  // lock is held until the launch, so that no other thread evicts the table.
  static std::mutex mutex;
  static auto& caches = *new std::map<int32_t, TableCache<DeviceTable>>;
  const std::lock_guard lock(mutex);
  const bool capturing = is_capturing(stream);
  DeviceTable* table = caches[device].find(rows);
  if (!table) {
    if (capturing)
      throw std::runtime_error(
          "ema_update_: call it once with the same tensors before a CUDA graph captures it: the table of their "
          "addresses can't be copied to the GPU during a capture");
    DeviceTable uploaded = upload(rows, device, stream);
    table = caches[device].insert(std::move(rows), std::move(uploaded));
  }
  table->used_on_other_stream |= stream != table->stream;
  table->keep |= capturing;
  const Row* const device_rows = static_cast<const Row*>(table->memory.const_data_ptr());
  const Chunk* const chunks = reinterpret_cast<const Chunk*>(device_rows + table->rows);
  const dim3 blocks(static_cast<unsigned>(table->chunks));
  ema_update<<<blocks, kThreads, 0, stream>>>(device_rows, chunks, static_cast<float>(weight), weight);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void ema_update_(std::vector<Tensor> targets, std::vector<Tensor> sources, double momentum,
                 std::vector<Tensor> shadows) {
  if (targets.empty() && sources.empty()) return;
  const int32_t device = (targets.empty() ? sources : targets)[0].get_device_index();
  const auto is_on_device = [device](const Tensor& tensor) {
    return tensor.is_cuda() && tensor.get_device_index() == device;
  };
  if (!std::ranges::all_of(targets, is_on_device))
    throw std::runtime_error("ema_update_: targets must all be on one device");
  std::vector<Row> rows = rows_of(entries_of(targets, sources, shadows, is_on_device));
  std::erase_if(rows, [](const Row& row) { return row.numel == 0; });
  if (rows.empty()) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  launch(std::move(rows), 1.0 - momentum, device, static_cast<cudaStream_t>(stream));
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CUDA, m) { m.impl("ema_update_", TORCH_BOX(&fastssl::ema_update_)); }
