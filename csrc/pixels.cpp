// Bytes of images as normalised floats (fastssl/ops/pixels.py).
//
// Bound by memory: 5 bytes a value in float32, 3 in 16 bits. The formula is that of plain torch, so results are the
// same to the bit: the division is hidden behind the memory.
#include "rows.h"

#include <array>

namespace fastssl {
namespace {

constexpr int kLane = kLanes<float>;

// The compiler would convert byte by byte.
inline Vec<float> widen_bytes(const uint8_t* src) {
#if defined(__AVX512F__) && FASTSSL_VECTOR_BYTES == 64
  return Vec<float>(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)))));
#elif defined(__AVX2__) && FASTSSL_VECTOR_BYTES == 32
  return Vec<float>(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(src)))));
#else
  Vec<float> x;
  for (int i = 0; i < kLane; ++i) x[i] = src[i];
  return x;
#endif
}

// n values of one channel.
template <typename T>
void normalise_row(const uint8_t* src, int64_t n, float offset, float scale, T* dst) {
  int64_t i = 0;
  for (; i + kLane <= n; i += kLane) store_narrow(dst + i, (widen_bytes(src + i) - offset) / scale);
  for (; i < n; ++i) dst[i] = from_float<T>((float(src[i]) - offset) / scale);
}

struct Channel {
  float offset, scale;
};

template <typename T>
void normalise_images(const Tensor& pixels, const std::array<Channel, 3>& channels, const Tensor& out) {
  const int64_t height = pixels.size(2), width = pixels.size(3), plane = height * width;
  const auto* const src = static_cast<const uint8_t*>(pixels.const_data_ptr());
  T* const dst = data<T>(out);
  const bool dense = pixels.stride(3) == 1 && pixels.stride(2) == width;  // a plane is one row
  const int64_t rows = dense ? 1 : height, length = dense ? plane : width;
  // A result larger than the caches is written around them, in pieces of the size of the L1 cache.
  constexpr int64_t kPiece = 4096;
  const bool around = prefers_non_temporal(out);
  torch::stable::parallel_for(0, pixels.size(0) * 3 * rows, grain(length), [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(around ? std::min(kPiece, length) : 0);
    std::vector<uint8_t> bytes(pixels.stride(3) == 1 ? 0 : length);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / (3 * rows), c = i / rows % 3, y = i % rows;
      const uint8_t* row = src + b * pixels.stride(0) + c * pixels.stride(1) + y * pixels.stride(2);
      if (!bytes.empty()) {
        copy_row(bytes.data(), row, pixels.stride(3), length);
        row = bytes.data();
      }
      T* const result = dst + i * length;
      const auto [offset, scale] = channels[c];
      for (int64_t x = 0; x < length; x += kPiece) {
        const int64_t n = std::min(kPiece, length - x);
        write_row(result + x, n, scratch, [&](T* piece) { normalise_row(row + x, n, offset, scale, piece); });
      }
    }
    if (around) fence_non_temporal();
  });
}

Tensor normalise(Tensor pixels, std::vector<double> offset, std::vector<double> scale, ScalarType dtype) {
  Tensor out = empty({pixels.size(0), pixels.size(1), pixels.size(2), pixels.size(3)}, dtype);
  std::array<Channel, 3> channels;
  for (int c = 0; c < 3; ++c) channels[c] = {float(offset[c]), float(scale[c])};
  if (out.numel() == 0) return out;
  switch (dtype) {
    case ScalarType::Float: normalise_images<float>(pixels, channels, out); break;
    case ScalarType::BFloat16: normalise_images<BFloat16>(pixels, channels, out); break;
    case ScalarType::Half: normalise_images<Half>(pixels, channels, out); break;
    default: throw std::runtime_error("normalise: dtype must be float32, bfloat16 or float16");
  }
  return out;
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) { m.impl("normalise", TORCH_BOX(&fastssl::normalise)); }
