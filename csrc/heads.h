// Addresses of attention's operands: one head of one sample at a time, with any strides.
#pragma once

#include "vec.h"

namespace fastssl {

// A tensor [B, L, H, E], or q, k or v as a part of a packed tensor [B, L, 3, H, E].
struct Heads {
  const void* data;
  int64_t batch, length, heads, width, strides[4];

  Heads(const Tensor& x)
      : data(x.const_data_ptr()), batch(x.size(0)), length(x.size(1)), heads(x.size(2)), width(x.size(3)),
        strides{x.stride(0), x.stride(1), x.stride(2), x.stride(3)} {}

  Heads(const Tensor& qkv, int64_t part)  // part: 0 for q, 1 for k, 2 for v
      : data(static_cast<const char*>(qkv.const_data_ptr()) + part * qkv.stride(2) * qkv.element_size()),
        batch(qkv.size(0)), length(qkv.size(1)), heads(qkv.size(3)), width(qkv.size(4)),
        strides{qkv.stride(0), qkv.stride(1), qkv.stride(3), qkv.stride(4)} {}

  template <typename S>
  const S* head(int64_t sample, int64_t head) const {
    return static_cast<const S*>(data) + sample * strides[0] + head * strides[2];
  }
};

// The gradients of q, k and v. The heads of a token are contiguous; tokens are `token_stride` elements apart.
template <typename S>
struct Gradients {
  S *q, *k, *v;
  int64_t token_stride;

  int64_t offset(const Heads& x, int64_t sample, int64_t token, int64_t head) const {
    return (sample * x.length + token) * token_stride + head * x.width;
  }
};

}  // namespace fastssl
