// What the kernels that move tokens and patches share: rows of any strides, ids that are checked before use, and when
// more than one thread is worth waking.
#pragma once

#include "vec.h"

#include <stdexcept>
#include <string>
#include <vector>

namespace fastssl {

// How many items of so many elements each a thread must have: waking the pool costs microseconds, in which one thread
// moves about this much.
inline int64_t grain(int64_t elements_each) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_each));
}

// Results of this many bytes are written past the caches, which could not hold them: an ordinary store first reads what
// it overwrites, a third of the traffic of a copy.
constexpr int64_t kPastCache = 16 << 20;

inline bool goes_past_cache(const Tensor& x) { return x.numel() * int64_t(x.element_size()) >= kPastCache; }

// As memcpy. The last of them is to be followed by `finish_past_cache` in the same thread.
inline void copy_past_cache([[maybe_unused]] void* to, const void* from, int64_t bytes) {
#if defined(__SSE2__)
  auto* target = static_cast<char*>(to);
  const auto* source = static_cast<const char*>(from);
  const int64_t head = std::min<int64_t>(bytes, -uintptr_t(target) % 16), whole = (bytes - head) / 16 * 16;
  std::memcpy(target, source, head);
  for (int64_t i = head; i < head + whole; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
  std::memcpy(target + head + whole, source + head + whole, bytes - head - whole);
#else
  std::memcpy(to, from, bytes);
#endif
}

inline void finish_past_cache() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Calls write(row) with where row `to` is to be written: itself, or a scratch row that is then moved past the caches.
template <typename T, typename Write>
void write_row(T* to, int64_t width, std::vector<T>& scratch, const Write& write) {
  if (scratch.empty()) return write(to);
  write(scratch.data());
  copy_past_cache(to, scratch.data(), width * sizeof(T));
}

// A tensor [B, N, D] of any strides; [N, D] is one whose batch stride is 0.
template <typename T>
struct Rows {
  T* data;
  int64_t batch, row, column;  // strides in elements

  explicit Rows(const Tensor& x)
      : data(static_cast<T*>(const_cast<void*>(x.const_data_ptr()))),
        batch(x.dim() == 3 ? x.stride(0) : 0),
        row(x.stride(x.dim() - 2)),
        column(x.stride(x.dim() - 1)) {}
  T* at(int64_t b, int64_t n) const { return data + b * batch + n * row; }
};

// Ids [B, M] of any strides, each known to lie in 0..length-1: a kernel reads and writes through them.
struct Ids {
  const int64_t* data;
  int64_t batch, column;

  Ids(const Tensor& ids, const char* what, int64_t length)
      : data(static_cast<const int64_t*>(ids.const_data_ptr())), batch(ids.stride(0)), column(ids.stride(1)) {
    const int64_t rows = ids.size(0), columns = ids.size(1);
    for (int64_t b = 0; b < rows; ++b) {
      uint64_t outside = 0;  // no early end, so that the loop is vectorised
      for (int64_t m = 0; m < columns; ++m) outside |= uint64_t((*this)(b, m)) >= uint64_t(length);
      for (int64_t m = 0; outside && m < columns; ++m) check((*this)(b, m), what, length);
    }
  }
  int64_t operator()(int64_t b, int64_t m) const { return data[b * batch + m * column]; }

 private:
  static void check(int64_t id, const char* what, int64_t length) {
    if (uint64_t(id) < uint64_t(length)) return;
    throw std::runtime_error(std::string(what) + " must be between 0 and L-1=" + std::to_string(length - 1) +
                             ", got " + std::to_string(id));
  }
};

// Calls body with a value whose type has the size of a dtype: for kernels that only move elements.
template <typename Body>
void with_size_of(const Tensor& x, const Body& body) {
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

template <typename T>
void copy_row(T* to, const T* from, int64_t column, int64_t width) {
  if (width == 0) return;  // memcpy wants a pointer even for nothing
  if (column == 1) {
    std::memcpy(to, from, width * sizeof(T));
  } else {
    for (int64_t d = 0; d < width; ++d) to[d] = from[d * column];
  }
}

}  // namespace fastssl
