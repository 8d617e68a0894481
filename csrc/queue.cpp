// MoCo's queue of keys, a ring buffer: enqueue_ writes keys over its oldest rows (fastssl/ops/queue.py).
//
// Bound by memory bandwidth: each key is read once and written once. It runs on one thread, because MoCo's 256 keys of
// width 128 are 128 kB, for which waking the thread pool takes longer than the copy.
#include <algorithm>

#include "common.h"

namespace fastssl {
namespace {

// Copies rows of keys to contiguous rows of the queue, converted to its dtype.
template <typename Q, typename K>
void copy_rows(Q* queue, const K* keys, int64_t rows, int64_t width, int64_t queue_stride, int64_t row_stride,
               int64_t column_stride) {
  for (int64_t row = 0; row < rows && width > 0; ++row) {
    Q* dst = queue + row * queue_stride;
    const K* src = keys + row * row_stride;
    if constexpr (std::is_same_v<Q, K>)
      if (column_stride == 1) {
        std::memmove(dst, src, width * sizeof(Q));  // keys may be rows of the queue itself
        continue;
      }
    for (int64_t d = 0; d < width; ++d) dst[d] = from_float<Q>(to_float(src[d * column_stride]));
  }
}

void enqueue_(Tensor queue, Tensor ptr, Tensor keys) {
  const int64_t length = queue.size(0), width = queue.size(1);
  const int64_t count = keys.size(0), written = std::min(count, length);
  int64_t* position = static_cast<int64_t*>(ptr.mutable_data_ptr());
  const int64_t first = (*position % length + length) % length;  // like torch.remainder: never negative
  const int64_t start =
      (first + count - written) % length;  // if there are more keys than rows, the first keys are skipped
  const int64_t before_wrap = std::min(written, length - start);
  const int64_t queue_stride = queue.stride(0), row_stride = keys.stride(0), column_stride = keys.stride(1);
  with_float_type(queue.scalar_type(), "enqueue_: queue", [&](auto queue_type) {
    with_float_type(keys.scalar_type(), "enqueue_: keys", [&](auto keys_type) {
      using Q = decltype(queue_type);
      using K = decltype(keys_type);
      Q* queue_rows = static_cast<Q*>(queue.mutable_data_ptr());
      const K* key_rows = static_cast<const K*>(keys.const_data_ptr()) + (count - written) * row_stride;
      copy_rows(queue_rows + start * queue_stride, key_rows, before_wrap, width, queue_stride, row_stride,
                column_stride);
      copy_rows(queue_rows, key_rows + before_wrap * row_stride, written - before_wrap, width, queue_stride, row_stride,
                column_stride);
    });
  });
  *position = (first + count) % length;
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) { m.impl("enqueue_", TORCH_BOX(&fastssl::enqueue_)); }
