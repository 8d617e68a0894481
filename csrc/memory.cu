// ema_update_ on CUDA devices: one launch of the kernel in ema.cuh, with a table of the tensors that stays on the
// device from call to call. What a call costs the host is reading the tensors' addresses and comparing them with the
// table's.
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>

#include "common.h"
#include "ema.cuh"

namespace fastssl {
namespace {

// Rows, then chunks, in one piece of memory from torch's allocator.
struct DeviceTable {
  Tensor memory;
  size_t rows, chunks;
  cudaStream_t home;       // the stream that the memory was allocated on
  bool elsewhere = false;  // was it used on another one?
  bool keep = false;       // a captured graph reads it at each replay

  DeviceTable(Tensor memory, size_t rows, size_t chunks, cudaStream_t home)
      : memory(std::move(memory)), rows(rows), chunks(chunks), home(home) {}
  DeviceTable(DeviceTable&&) = default;

  // The allocator gives freed memory to the next who asks on its home stream, and there alone is that in order.
  ~DeviceTable() {
    if (elsewhere) cudaDeviceSynchronize();
  }
};

Tensor bytes_on(int32_t device, int64_t size) {
  const int64_t stride = 1;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(),
                                                         aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

// Waits until the copy is done, so that a launch on any stream may read the table from now on. (cudaMemcpy would not
// do: from pageable memory it returns before the last bytes arrive, and torch's streams don't wait for the one it uses.)
DeviceTable upload(const std::vector<Row>& rows, int32_t device, cudaStream_t stream) {
  const std::vector<Chunk> chunks = chunks_of(rows);
  const size_t bytes_of_rows = rows.size() * sizeof(Row), bytes_of_chunks = chunks.size() * sizeof(Chunk);
  DeviceTable table(bytes_on(device, bytes_of_rows + bytes_of_chunks), rows.size(), chunks.size(), stream);
  char* const to = static_cast<char*>(table.memory.mutable_data_ptr());
  STD_CUDA_CHECK(cudaMemcpyAsync(to, rows.data(), bytes_of_rows, cudaMemcpyHostToDevice, stream));
  STD_CUDA_CHECK(
      cudaMemcpyAsync(to + bytes_of_rows, chunks.data(), bytes_of_chunks, cudaMemcpyHostToDevice, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  return table;
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

void launch(std::vector<Row> rows, double weight, int32_t device, cudaStream_t stream) {
  // Never destroyed: when a process ends, torch's allocator may be gone before. The lock is held until the launch, lest
  // another thread throw the table out.
  static std::mutex mutex;
  static auto& caches = *new std::map<int32_t, TableCache<DeviceTable>>;
  const std::lock_guard lock(mutex);
  const bool capturing = is_capturing(stream);
  DeviceTable* table = caches[device].find(rows);
  if (!table) {
    if (capturing)
      throw std::runtime_error("ema_update_: call it once with the same tensors before a CUDA graph captures it: the "
                               "table of their addresses can't be copied to the GPU during a capture");
    DeviceTable made = upload(rows, device, stream);
    table = caches[device].put(std::move(rows), std::move(made));
  }
  table->elsewhere |= stream != table->home;
  table->keep |= capturing;
  const Row* const on_device = static_cast<const Row*>(table->memory.const_data_ptr());
  const Chunk* const chunks = reinterpret_cast<const Chunk*>(on_device + table->rows);
  const dim3 blocks(static_cast<unsigned>(table->chunks));
  ema_update<<<blocks, kThreads, 0, stream>>>(on_device, chunks, static_cast<float>(weight), weight);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void ema_update_(std::vector<Tensor> targets, std::vector<Tensor> sources, double momentum,
                 std::vector<Tensor> shadows) {
  if (targets.empty() && sources.empty()) return;
  const int32_t device = (targets.empty() ? sources : targets)[0].get_device_index();
  const auto is_here = [device](const Tensor& tensor) {
    return tensor.is_cuda() && tensor.get_device_index() == device;
  };
  if (!std::ranges::all_of(targets, is_here))
    throw std::runtime_error("ema_update_: targets must all be on one device");
  std::vector<Row> rows = rows_of(entries_of(targets, sources, shadows, is_here));
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
