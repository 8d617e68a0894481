// Patches of images: patchify, unpatchify, gathering the kept patches, and MAE's loss on the masked patches.
//
// A patch is a row of P = p·p·C values in the order (pixel row, pixel column, channel). In a contiguous image the
// channels are far apart, so that a row of pixels interleaves C runs of p values; of a channels_last image it is a
// plain copy. Bound by memory bandwidth: pixels are read once and results are written once.
#include "rows.h"

#include <atomic>
#include <optional>
#include <tuple>
#include <utility>

namespace fastssl {
namespace {

// The grid of patches of images [B, C, H, W]; patches are numbered row by row.
struct Grid {
  int64_t batch, channels, height, width, patch;

  int64_t columns() const { return width / patch; }
  int64_t length() const { return height / patch * columns(); }
  int64_t values() const { return patch * patch * channels; }
};

Grid grid_of(const Tensor& images, int64_t patch) {
  return {images.size(0), images.size(1), images.size(2), images.size(3), patch};
}

Grid grid_of(const Tensor& patches, int64_t patch, int64_t height, int64_t width) {
  return {patches.size(0), patches.size(2) / (patch * patch), height, width, patch};
}

// One patch, in an image or as a row of patches, with the strides of pixel rows, pixel columns and channels.
template <typename T>
struct Patch {
  T* data;
  int64_t row_stride, column_stride, channel_stride;
};

template <typename T>
struct Images {
  T* data;
  Grid grid;
  int64_t batch_stride, channel_stride, row_stride, column_stride;

  Images(const Tensor& images, const Grid& grid)
      : data(static_cast<T*>(const_cast<void*>(images.const_data_ptr()))), grid(grid), batch_stride(images.stride(0)),
        channel_stride(images.stride(1)), row_stride(images.stride(2)), column_stride(images.stride(3)) {}
  Patch<T> patch(int64_t b, int64_t l) const {
    const int64_t top = l / grid.columns() * grid.patch, left = l % grid.columns() * grid.patch;
    return {data + b * batch_stride + top * row_stride + left * column_stride, row_stride, column_stride,
            channel_stride};
  }
};

// The patch that is row n of sample b.
template <typename T>
Patch<T> patch_in_row(const Rows<T>& rows, int64_t b, int64_t n, const Grid& grid) {
  const int64_t pixel = grid.channels * rows.column_stride;
  return {rows.row(b, n), grid.patch * pixel, pixel, rows.column_stride};
}

// Interleaves one vector of each of three channels to three vectors of pixels, of which it returns number kPart.
template <int kPart, typename T, int... I>
inline Vec<T> interleave(Vec<T> red, Vec<T> green, Vec<T> blue, std::integer_sequence<int, I...>) {
  constexpr int n = kLanes<T>;
  constexpr auto value = [](int i) { return kPart * n + i; };  // number i is channel value % 3 of pixel value / 3
  const Vec<T> red_green =
      __builtin_shufflevector(red, green, (value(I) % 3 == 2 ? 0 : value(I) / 3 + value(I) % 3 * n)...);
  return __builtin_shufflevector(red_green, blue, (value(I) % 3 == 2 ? n + value(I) / 3 : I)...);
}

// Interleaves a row of pixels, a vector at a time, and returns the number of interleaved pixels: whole vectors.
template <typename T>
int64_t interleave(T* dst, const T* red, const T* green, const T* blue, int64_t pixels) {
  int64_t q = 0;
  if constexpr (sizeof(T) == 4 || sizeof(T) == 8) {
    using Lanes = std::make_integer_sequence<int, kLanes<T>>;
    for (; q + kLanes<T> <= pixels; q += kLanes<T>) {
      const Vec<T> r = load(red + q), g = load(green + q), b = load(blue + q);
      store(dst + 3 * q, interleave<0, T>(r, g, b, Lanes{}));
      store(dst + 3 * q + kLanes<T>, interleave<1, T>(r, g, b, Lanes{}));
      store(dst + 3 * q + 2 * kLanes<T>, interleave<2, T>(r, g, b, Lanes{}));
    }
  }
  return q;
}

// Copies one row of pixels.
template <typename T>
void copy_pixels(const Patch<T>& dst_patch, const Patch<T>& src_patch, int64_t row, int64_t pixels, int64_t channels) {
  T* __restrict dst = dst_patch.data + row * dst_patch.row_stride;
  const T* __restrict src = src_patch.data + row * src_patch.row_stride;
  const auto is_contiguous = [&](const Patch<T>& patch) {  // contiguous values, channel last
    return patch.column_stride == channels && (patch.channel_stride == 1 || channels == 1);
  };
  if (is_contiguous(dst_patch) && is_contiguous(src_patch)) {
    std::memcpy(static_cast<void*>(dst), src, pixels * channels * sizeof(T));
  } else if (channels == 3 && is_contiguous(dst_patch) && src_patch.column_stride == 1) {
    const T *red = src, *green = src + src_patch.channel_stride, *blue = src + 2 * src_patch.channel_stride;
    for (int64_t q = interleave(dst, red, green, blue, pixels); q < pixels; ++q) {
      dst[3 * q] = red[q];
      dst[3 * q + 1] = green[q];
      dst[3 * q + 2] = blue[q];
    }
  } else if (channels == 3 && is_contiguous(src_patch) && dst_patch.column_stride == 1) {
    T *red = dst, *green = dst + dst_patch.channel_stride, *blue = dst + 2 * dst_patch.channel_stride;
    for (int64_t q = 0; q < pixels; ++q) {
      red[q] = src[3 * q];
      green[q] = src[3 * q + 1];
      blue[q] = src[3 * q + 2];
    }
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t q = 0; q < pixels; ++q)
        dst[c * dst_patch.channel_stride + q * dst_patch.column_stride] =
            src[c * src_patch.channel_stride + q * src_patch.column_stride];
  }
}

template <typename T>
void copy_patch(const Patch<T>& dst, const Patch<T>& src, const Grid& grid) {
  for (int64_t row = 0; row < grid.patch; ++row) copy_pixels(dst, src, row, grid.patch, grid.channels);
}

// Adds a patch, value by value: for patches that were taken twice.
template <typename T>
void add_patch(const Patch<T>& dst, const Patch<T>& src, const Grid& grid) {
  for (int64_t row = 0; row < grid.patch; ++row)
    for (int64_t column = 0; column < grid.patch; ++column)
      for (int64_t c = 0; c < grid.channels; ++c) {
        T& sum = dst.data[row * dst.row_stride + column * dst.column_stride + c * dst.channel_stride];
        sum = from_float<T>(
            to_float(sum) +
            to_float(src.data[row * src.row_stride + column * src.column_stride + c * src.channel_stride]));
      }
}

// Calls move(b, n) for `count` patches of each sample, in parallel.
template <typename Move>
void for_each_patch(const Grid& grid, int64_t count, const Move& move) {
  torch::stable::parallel_for(0, grid.batch * count, grain(grid.values()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) move(i / count, i % count);
  });
}

// Copies patch number(b, m) of the images to row m of sample b.
template <typename T, typename Number>
void extract_patches(const Images<T>& src, const Tensor& out, int64_t count, const Number& number) {
  const Grid& grid = src.grid;
  const Rows<T> dst(out);
  const int64_t pixel = grid.channels;
  torch::stable::parallel_for(0, grid.batch * count, grain(grid.values()), [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(prefers_non_temporal(out) ? grid.values() : 0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / count, m = i % count;
      write_row(dst.row(b, m), grid.values(), scratch, [&](T* row) {
        copy_patch(Patch<T>{row, grid.patch * pixel, pixel, 1}, src.patch(b, number(b, m)), grid);
      });
    }
    fence_non_temporal();
  });
}

Tensor patchify(Tensor images, int64_t patch) {
  const Grid grid = grid_of(images, patch);
  Tensor out = empty({grid.batch, grid.length(), grid.values()}, images.scalar_type());
  if (out.numel() == 0) return out;
  with_element_size(images, [&](auto type) {
    using T = decltype(type);
    extract_patches(Images<T>(images, grid), out, grid.length(), [](int64_t, int64_t l) { return l; });
  });
  return out;
}

Tensor unpatchify(Tensor patches, int64_t patch, int64_t height, int64_t width) {
  const Grid grid = grid_of(patches, patch, height, width);
  Tensor out = empty({grid.batch, grid.channels, height, width}, patches.scalar_type());
  if (out.numel() == 0) return out;
  with_element_size(patches, [&](auto type) {
    using T = decltype(type);
    const Rows<T> src(patches);
    const Images<T> dst(out, grid);
    for_each_patch(grid, grid.length(),
                   [&](int64_t b, int64_t l) { copy_patch(dst.patch(b, l), patch_in_row(src, b, l, grid), grid); });
  });
  return out;
}

Tensor keep_patches_fwd(Tensor images, Tensor ids_keep, int64_t patch) {
  const Grid grid = grid_of(images, patch);
  const Ids ids(ids_keep, "keep_patches: ids_keep", grid.length());
  const int64_t kept = ids_keep.size(1);
  Tensor out = empty({grid.batch, kept, grid.values()}, images.scalar_type());
  if (out.numel() == 0) return out;
  with_element_size(images, [&](auto type) {
    using T = decltype(type);
    extract_patches(Images<T>(images, grid), out, kept, [&](int64_t b, int64_t m) { return ids(b, m); });
  });
  return out;
}

// Adds the patches that were taken before: copying them would lose their first gradient.
void add_repeated_patches(const Tensor& dkept, const Ids& ids, const Grid& grid, const Tensor& out) {
  with_float_type(dkept.scalar_type(), "keep_patches: a gradient with repeated ids", [&](auto type) {
    using T = decltype(type);
    const Rows<T> src(dkept);
    const Images<T> dst(out, grid);
    std::vector<char> written(grid.length());
    for (int64_t b = 0; b < grid.batch; ++b) {
      std::fill(written.begin(), written.end(), 0);
      for (int64_t m = 0; m < dkept.size(1); ++m)
        if (std::exchange(written[ids(b, m)], 1))
          add_patch(dst.patch(b, ids(b, m)), patch_in_row(src, b, m, grid), grid);
    }
  });
}

// Zeroes each image and then copies the kept patches: the rows of pixels in a patch are too short to be zeroed one by
// one.
Tensor keep_patches_bwd(Tensor dkept, Tensor ids_keep, int64_t patch, int64_t height, int64_t width) {
  const Grid grid = grid_of(dkept, patch, height, width);
  const Ids ids(ids_keep, "keep_patches: ids_keep", grid.length());
  const int64_t kept = ids_keep.size(1), pixels = grid.channels * height * width;
  Tensor out = empty({grid.batch, grid.channels, height, width}, dkept.scalar_type());
  if (out.numel() == 0) return out;
  std::atomic<bool> repeated = false;
  with_element_size(dkept, [&](auto type) {
    using T = decltype(type);
    const Rows<T> src(dkept);
    const Images<T> dst(out, grid);
    torch::stable::parallel_for(0, grid.batch, grain(pixels), [&](int64_t begin, int64_t end) {
      std::vector<char> written(grid.length());
      for (int64_t b = begin; b < end; ++b) {
        std::fill(written.begin(), written.end(), 0);
        std::memset(static_cast<void*>(dst.data + b * dst.batch_stride), 0, pixels * sizeof(T));
        for (int64_t m = 0; m < kept; ++m)
          if (std::exchange(written[ids(b, m)], 1))
            repeated = true;
          else
            copy_patch(dst.patch(b, ids(b, m)), patch_in_row(src, b, m, grid), grid);
      }
    });
  });
  if (repeated) add_repeated_patches(dkept, ids, grid, out);
  return out;
}

// ---- The loss on masked patches

// Subtracts the mean of a row from it and returns the factor that normalises it, 1 / √(variance + 1e-6).
template <typename W>
W centre_row(W* row, int64_t n) {
  const auto subtract = [=](W shift, auto result) {
    return sum_over<W>(n, [=](auto zero, int64_t i) {
      using V = decltype(zero);
      const V value = read<V>(row + i) - shift;
      write(row + i, value);
      return result(value);
    });
  };
  const auto identity = [](auto x) { return x; };
  const double sum = subtract(0, identity);
  // The rounding error of the mean, large in a bright patch without contrast, is subtracted in a second pass.
  const double residual_sum = subtract(W(sum / n), identity);
  const double squares = subtract(W(residual_sum / n), [](auto x) { return x * x; });
  return W(1 / std::sqrt(squares / (n - 1) + 1e-6));  // NaN for a single value, as torch's unbiased variance
}

// Returns Σ (pred − scale · row)², and writes the difference times dscale to dpred unless that is null.
template <typename S, typename W>
double squared_error(const S* pred, const W* row, W scale, W* dpred, W dscale, int64_t n) {
  const auto square = [=](auto zero, int64_t i) {
    using V = decltype(zero);
    const V difference = read<V>(pred + i) - read<V>(row + i) * scale;
    if (dpred) write(dpred + i, difference * dscale);
    return difference * difference;
  };
  return sum_over<W>(n, square);
}

// Converts n values to W.
template <typename W, typename T>
void widen(W* dst, const T* src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<T, uint8_t>)
      dst[i] = src[i];
    else
      dst[i] = W(to_float(src[i]));
  }
}

template <typename T, typename S>
std::tuple<Tensor, Tensor> masked_patch_mse_of(const Tensor& pred, const Tensor& images, const Ids& ids,
                                               const Grid& grid, bool norm_pix, bool with_grad) {
  using W = ComputeType<S>;
  const int64_t masked = pred.size(1), values = grid.values(), numel = grid.batch * masked * values;
  Tensor loss = empty({}, kDtype<W>);
  Tensor dpred = with_grad ? empty({grid.batch, masked, values}, kDtype<W>) : empty({0}, kDtype<W>);
  W* const gradient = with_grad ? static_cast<W*>(dpred.mutable_data_ptr()) : nullptr;
  const W dscale = W(2.0 / std::max<int64_t>(1, numel));
  const Images<T> pixels(images, grid);
  const Rows<S> predictions(pred);
  std::vector<double> sums(grid.batch * masked);  // one per patch, so that the loss does not depend on the threads
  torch::stable::parallel_for(0, numel ? grid.batch * masked : 0, grain(values), [&](int64_t begin, int64_t end) {
    std::vector<W> row(values);
    // Pixels of another dtype are copied first and then converted.
    std::vector<T> buffer(std::is_same_v<T, W> ? 0 : values);
    T* const patch_pixels = std::is_same_v<T, W> ? reinterpret_cast<T*>(row.data()) : buffer.data();
    std::vector<S> contiguous_prediction(predictions.column_stride == 1 ? 0 : values);
    std::vector<W> scratch(with_grad && prefers_non_temporal(dpred) ? values : 0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / masked, m = i % masked;
      copy_patch(Patch<T>{patch_pixels, grid.patch * grid.channels, grid.channels, 1}, pixels.patch(b, ids(b, m)),
                 grid);
      if constexpr (!std::is_same_v<T, W>) widen(row.data(), patch_pixels, values);
      const S* prediction = predictions.row(b, m);
      if (predictions.column_stride != 1) {
        copy_row(contiguous_prediction.data(), prediction, predictions.column_stride, values);
        prediction = contiguous_prediction.data();
      }
      const W scale = norm_pix ? centre_row(row.data(), values) : W(1);
      if (gradient)
        write_row(gradient + i * values, values, scratch, [&](W* difference) {
          sums[i] = squared_error(prediction, row.data(), scale, difference, dscale, values);
        });
      else
        sums[i] = squared_error<S, W>(prediction, row.data(), scale, nullptr, dscale, values);
    }
    fence_non_temporal();
  });
  double sum = 0;
  for (const double patch_sum : sums) sum += patch_sum;
  *static_cast<W*>(loss.mutable_data_ptr()) = W(sum / numel);  // NaN for an empty batch, as torch's mean
  return {loss, dpred};
}

std::tuple<Tensor, Tensor> masked_patch_mse_fwd(Tensor pred, Tensor images, Tensor ids_masked, int64_t patch,
                                                bool norm_pix, bool with_grad) {
  const Grid grid = grid_of(images, patch);
  const Ids ids(ids_masked, "masked_patch_mse: ids", grid.length());
  std::optional<std::tuple<Tensor, Tensor>> result;
  with_float_type(pred.scalar_type(), "masked_patch_mse: pred", [&](auto pred_type) {
    using S = decltype(pred_type);
    const auto run = [&](auto pixel, const Tensor& readable) {
      result = masked_patch_mse_of<decltype(pixel), S>(pred, readable, ids, grid, norm_pix, with_grad);
    };
    switch (images.scalar_type()) {
      case ScalarType::Byte: return run(uint8_t{}, images);
      case ScalarType::Float: return run(float{}, images);
      case ScalarType::Double: return run(double{}, images);
      case ScalarType::BFloat16: return run(BFloat16{}, images);
      case ScalarType::Half: return run(Half{}, images);
      default:
        return run(ComputeType<S>{}, torch::stable::to(images, kDtype<ComputeType<S>>));  // rare: other integers, bool
    }
  });
  return *result;
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("patchify", TORCH_BOX(&fastssl::patchify));
  m.impl("unpatchify", TORCH_BOX(&fastssl::unpatchify));
  m.impl("keep_patches_fwd", TORCH_BOX(&fastssl::keep_patches_fwd));
  m.impl("keep_patches_bwd", TORCH_BOX(&fastssl::keep_patches_bwd));
  m.impl("masked_patch_mse_fwd", TORCH_BOX(&fastssl::masked_patch_mse_fwd));
}
