// Shared by the kernels that move tokens and patches: rows of tensors with any strides, indices checked before use,
// non-temporal stores, and the grain size of parallel loops.
#pragma once

#include "vec.h"

#include <stdexcept>
#include <string>
#include <vector>

namespace fastssl {

// Grain size of a parallel loop over items of `elements` elements. Fewer items are not worth another thread: waking the
// thread pool takes microseconds, in which one thread moves about 32,768 elements.
inline int64_t grain(int64_t elements) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements)); }

// Results of at least this many bytes are written with non-temporal stores, which bypass the caches. An ordinary store
// first reads the cache line that it overwrites: a third of the traffic of a copy.
constexpr int64_t kNonTemporalBytes = 16 << 20;

inline bool prefers_non_temporal(const Tensor& x) { return x.numel() * int64_t(x.element_size()) >= kNonTemporalBytes; }

// memcpy with non-temporal stores. After its last copy a thread must call fence_non_temporal.
inline void copy_non_temporal([[maybe_unused]] void* dst, const void* src, int64_t bytes) {
#if defined(__SSE2__)
  auto* target = static_cast<char*>(dst);
  const auto* source = static_cast<const char*>(src);
  const int64_t head = std::min<int64_t>(bytes, -uintptr_t(target) % 16), aligned = (bytes - head) / 16 * 16;
  std::memcpy(target, source, head);
  for (int64_t i = head; i < head + aligned; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
  std::memcpy(target + head + aligned, source + head + aligned, bytes - head - aligned);
#else
  std::memcpy(dst, src, bytes);
#endif
}

inline void fence_non_temporal() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Calls write(row) for the destination row itself where `scratch` is empty, else for `scratch`, which is then copied to
// the destination with non-temporal stores.
template <typename T, typename Write>
void write_row(T* dst, int64_t width, std::vector<T>& scratch, const Write& write) {
  if (scratch.empty()) return write(dst);
  write(scratch.data());
  copy_non_temporal(dst, scratch.data(), width * sizeof(T));
}

// Rows of a tensor [B, N, D], or of [N, D] (batch stride 0), with any strides, in elements.
template <typename T>
struct Rows {
  T* data;
  int64_t batch_stride, row_stride, column_stride;

  explicit Rows(const Tensor& x)
      : data(static_cast<T*>(const_cast<void*>(x.const_data_ptr()))), batch_stride(x.dim() == 3 ? x.stride(0) : 0),
        row_stride(x.stride(x.dim() - 2)), column_stride(x.stride(x.dim() - 1)) {}
  T* row(int64_t b, int64_t n) const { return data + b * batch_stride + n * row_stride; }
};

// Copies a row with any column stride to a contiguous one.
template <typename T>
void copy_row(T* dst, const T* src, int64_t column_stride, int64_t width) {
  if (width == 0) return;  // memcpy does not accept null pointers, not even for 0 bytes
  if (column_stride == 1) {
    std::memcpy(dst, src, width * sizeof(T));
  } else {
    for (int64_t d = 0; d < width; ++d) dst[d] = src[d * column_stride];
  }
}

// A copy of indices [B, M], each of which was checked to be in 0..length-1, because kernels use them as addresses. A
// copy, because another process or thread may change a tensor in shared memory after its check.
struct Ids {
  Ids(const Tensor& ids, const char* argument, int64_t length) : columns_(ids.size(1)), values_(ids.numel()) {
    const auto* source = static_cast<const int64_t*>(ids.const_data_ptr());
    const int64_t rows = ids.size(0), row_stride = ids.stride(0), column_stride = ids.stride(1);
    for (int64_t b = 0; b < rows; ++b) {
      int64_t* row = values_.data() + b * columns_;
      copy_row(row, source + b * row_stride, column_stride, columns_);
      uint64_t has_invalid = 0;  // no early exit, so that the loop is vectorised
      for (int64_t m = 0; m < columns_; ++m) has_invalid |= uint64_t(row[m]) >= uint64_t(length);
      for (int64_t m = 0; has_invalid && m < columns_; ++m) check(row[m], argument, length);
    }
  }
  int64_t operator()(int64_t b, int64_t m) const { return values_[b * columns_ + m]; }

 private:
  int64_t columns_;
  std::vector<int64_t> values_;

  static void check(int64_t id, const char* argument, int64_t length) {
    if (uint64_t(id) < uint64_t(length)) return;
    throw std::runtime_error(std::string(argument) + " must be between 0 and L-1=" + std::to_string(length - 1) +
                             ", got " + std::to_string(id));
  }
};

// Calls body with a value of a type that is as large as the tensor's elements: for kernels that only move elements.
template <typename Body>
void with_element_size(const Tensor& x, const Body& body) {
  struct Bytes16 {
    uint64_t low, high;
  };
  switch (x.element_size()) {
    case 1: return body(uint8_t{});
    case 2: return body(uint16_t{});
    case 4: return body(uint32_t{});
    case 8: return body(uint64_t{});
    default: return body(Bytes16{});
  }
}

}  // namespace fastssl
