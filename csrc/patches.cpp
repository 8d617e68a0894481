// Images as patches: cutting, putting together, taking only the kept ones, and MAE's loss on the masked ones.
//
// A patch is a row of P = p·p·C values: pixel row p, pixel column q, channel c, the channel last. In an image of usual
// layout the channels lie far apart, so cutting interleaves C runs of p pixels; channels-last images are cut by
// copying.
#include "rows.h"

#include <optional>
#include <tuple>
#include <utility>

namespace fastssl {
namespace {

// How images [B, C, H, W] of any strides are cut; L is numbered row by row.
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

// One patch, wherever its values lie: strides of pixel row, pixel column and channel.
template <typename T>
struct Patch {
  T* data;
  int64_t row, column, channel;
};

template <typename T>
struct Images {
  T* data;
  Grid grid;
  int64_t batch, channel, row, column;  // strides

  Images(const Tensor& images, const Grid& grid)
      : data(static_cast<T*>(const_cast<void*>(images.const_data_ptr()))), grid(grid), batch(images.stride(0)),
        channel(images.stride(1)), row(images.stride(2)), column(images.stride(3)) {}
  Patch<T> at(int64_t b, int64_t l) const {
    const int64_t top = l / grid.columns() * grid.patch, left = l % grid.columns() * grid.patch;
    return {data + b * batch + top * row + left * column, row, column, channel};
  }
};

// A patch that is row n of sample b.
template <typename T>
Patch<T> patch_in(const Rows<T>& rows, int64_t b, int64_t n, const Grid& grid) {
  const int64_t pixel = grid.channels * rows.column;
  return {rows.at(b, n), grid.patch * pixel, pixel, rows.column};
}

// Three vectors of one channel each become vectors of whole pixels: result number `kPart` of three.
template <int kPart, typename T, int... I>
inline Vec<T> interleave(Vec<T> red, Vec<T> green, Vec<T> blue, std::integer_sequence<int, I...>) {
  constexpr int n = kLanes<T>;
  constexpr auto value = [](int i) { return kPart * n + i; };  // in the pixels' order: channel value % 3 of value / 3
  const Vec<T> red_green =
      __builtin_shufflevector(red, green, (value(I) % 3 == 2 ? 0 : value(I) / 3 + value(I) % 3 * n)...);
  return __builtin_shufflevector(red_green, blue, (value(I) % 3 == 2 ? n + value(I) / 3 : I)...);
}

// The same for a row of pixels, a vector of them at a time; returns how many are done.
template <typename T>
int64_t interleave(T* to, const T* red, const T* green, const T* blue, int64_t pixels) {
  int64_t q = 0;
  if constexpr (sizeof(T) == 4 || sizeof(T) == 8) {
    using Lanes = std::make_integer_sequence<int, kLanes<T>>;
    for (; q + kLanes<T> <= pixels; q += kLanes<T>) {
      const Vec<T> r = load(red + q), g = load(green + q), b = load(blue + q);
      store(to + 3 * q, interleave<0, T>(r, g, b, Lanes{}));
      store(to + 3 * q + kLanes<T>, interleave<1, T>(r, g, b, Lanes{}));
      store(to + 3 * q + 2 * kLanes<T>, interleave<2, T>(r, g, b, Lanes{}));
    }
  }
  return q;
}

// One row of pixels.
template <typename T>
void copy_pixels(const Patch<T>& to_patch, const Patch<T>& from_patch, int64_t row, int64_t pixels, int64_t channels) {
  T* __restrict to = to_patch.data + row * to_patch.row;
  const T* __restrict from = from_patch.data + row * from_patch.row;
  const auto is_run = [&](const Patch<T>& patch) {  // the values lie side by side, the channel last
    return patch.column == channels && (patch.channel == 1 || channels == 1);
  };
  if (is_run(to_patch) && is_run(from_patch)) {
    std::memcpy(static_cast<void*>(to), from, pixels * channels * sizeof(T));
  } else if (channels == 3 && is_run(to_patch) && from_patch.column == 1) {
    const T *red = from, *green = from + from_patch.channel, *blue = from + 2 * from_patch.channel;
    for (int64_t q = interleave(to, red, green, blue, pixels); q < pixels; ++q) {
      to[3 * q] = red[q];
      to[3 * q + 1] = green[q];
      to[3 * q + 2] = blue[q];
    }
  } else if (channels == 3 && is_run(from_patch) && to_patch.column == 1) {
    T *red = to, *green = to + to_patch.channel, *blue = to + 2 * to_patch.channel;
    for (int64_t q = 0; q < pixels; ++q) {
      red[q] = from[3 * q];
      green[q] = from[3 * q + 1];
      blue[q] = from[3 * q + 2];
    }
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t q = 0; q < pixels; ++q)
        to[c * to_patch.channel + q * to_patch.column] = from[c * from_patch.channel + q * from_patch.column];
  }
}

template <typename T>
void copy_patch(const Patch<T>& to, const Patch<T>& from, const Grid& grid) {
  for (int64_t row = 0; row < grid.patch; ++row) copy_pixels(to, from, row, grid.patch, grid.channels);
}

// Calls move(b, n) for `count` patches of each sample, on several threads where that pays.
template <typename Move>
void for_each_patch(const Grid& grid, int64_t count, const Move& move) {
  torch::stable::parallel_for(0, grid.batch * count, grain(grid.values()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) move(i / count, i % count);
  });
}

// Row m of sample b becomes patch number(b, m).
template <typename T, typename Number>
void cut(const Images<T>& from, const Tensor& out, int64_t count, const Number& number) {
  const Grid& grid = from.grid;
  const Rows<T> to(out);
  const int64_t pixel = grid.channels;
  torch::stable::parallel_for(0, grid.batch * count, grain(grid.values()), [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(goes_past_cache(out) ? grid.values() : 0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / count, m = i % count;
      write_row(to.at(b, m), grid.values(), scratch, [&](T* row) {
        copy_patch(Patch<T>{row, grid.patch * pixel, pixel, 1}, from.at(b, number(b, m)), grid);
      });
    }
    finish_past_cache();
  });
}

Tensor patchify(Tensor images, int64_t patch) {
  const Grid grid = grid_of(images, patch);
  Tensor out = empty({grid.batch, grid.length(), grid.values()}, images.scalar_type());
  if (out.numel() == 0) return out;
  with_size_of(images, [&](auto type) {
    using T = decltype(type);
    cut(Images<T>(images, grid), out, grid.length(), [](int64_t, int64_t l) { return l; });
  });
  return out;
}

Tensor unpatchify(Tensor patches, int64_t patch, int64_t height, int64_t width) {
  const Grid grid = grid_of(patches, patch, height, width);
  Tensor out = empty({grid.batch, grid.channels, height, width}, patches.scalar_type());
  if (out.numel() == 0) return out;
  with_size_of(patches, [&](auto type) {
    using T = decltype(type);
    const Rows<T> from(patches);
    const Images<T> to(out, grid);
    for_each_patch(grid, grid.length(),
                   [&](int64_t b, int64_t l) { copy_patch(to.at(b, l), patch_in(from, b, l, grid), grid); });
  });
  return out;
}

Tensor keep_patches_fwd(Tensor images, Tensor ids_keep, int64_t patch) {
  const Grid grid = grid_of(images, patch);
  const Ids ids(ids_keep, "keep_patches: ids_keep", grid.length());
  const int64_t kept = ids_keep.size(1);
  Tensor out = empty({grid.batch, kept, grid.values()}, images.scalar_type());
  if (out.numel() == 0) return out;
  with_size_of(images, [&](auto type) {
    using T = decltype(type);
    cut(Images<T>(images, grid), out, kept, [&](int64_t b, int64_t m) { return ids(b, m); });
  });
  return out;
}

// Each image is zeroed while it is in the cache: its patches' rows of pixels are too short to zero one by one.
Tensor keep_patches_bwd(Tensor dkept, Tensor ids_keep, int64_t patch, int64_t height, int64_t width) {
  const Grid grid = grid_of(dkept, patch, height, width);
  const Ids ids(ids_keep, "keep_patches: ids_keep", grid.length());
  const int64_t kept = ids_keep.size(1), pixels = grid.channels * height * width;
  Tensor out = empty({grid.batch, grid.channels, height, width}, dkept.scalar_type());
  if (out.numel() == 0) return out;
  with_size_of(dkept, [&](auto type) {
    using T = decltype(type);
    const Rows<T> from(dkept);
    const Images<T> to(out, grid);
    torch::stable::parallel_for(0, grid.batch, grain(pixels), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        std::memset(static_cast<void*>(to.data + b * to.batch), 0, pixels * sizeof(T));
        for (int64_t m = 0; m < kept; ++m) copy_patch(to.at(b, ids(b, m)), patch_in(from, b, m, grid), grid);
      }
    });
  });
  return out;
}

// ---- The loss on masked patches

// Subtracts the mean of a row from it; gives what it is then to be multiplied by: 1 / sqrt(variance + 1e-6).
template <typename W>
W centre(W* row, int64_t n) {
  const auto subtract = [=](W shift, auto result) {
    return sum_over<W>(n, [=](auto zero, int64_t i) {
      using V = decltype(zero);
      const V value = read<V>(row + i) - shift;
      write(row + i, value);
      return result(value);
    });
  };
  const auto itself = [](auto x) { return x; };
  const double sum = subtract(0, itself);
  const double rest = subtract(W(sum / n), itself);  // what rounding left of the mean: much in a bright, flat patch
  const double squares = subtract(W(rest / n), [](auto x) { return x * x; });
  return W(1 / std::sqrt(squares / (n - 1) + 1e-6));  // NaN for a single value, as torch's unbiased variance
}

// Sum of (pred - scale * row)²; leaves the difference times dscale in dpred unless that is null.
template <typename S, typename W>
double compare(const S* pred, const W* row, W scale, W* dpred, W dscale, int64_t n) {
  const auto square = [=](auto zero, int64_t i) {
    using V = decltype(zero);
    const V difference = read<V>(pred + i) - read<V>(row + i) * scale;
    if (dpred) write(dpred + i, difference * dscale);
    return difference * difference;
  };
  return sum_over<W>(n, square);
}

// One value after the other as W.
template <typename W, typename T>
void widen(W* to, const T* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<T, uint8_t>)
      to[i] = from[i];
    else
      to[i] = W(to_float(from[i]));
  }
}

template <typename T, typename S>
std::tuple<Tensor, Tensor> masked_patch_mse_of(const Tensor& pred, const Tensor& images, const Ids& ids,
                                               const Grid& grid, bool norm_pix, bool with_grad) {
  using W = Wide<S>;
  const int64_t masked = pred.size(1), values = grid.values(), numel = grid.batch * masked * values;
  Tensor loss = empty({}, kDtype<W>);
  Tensor dpred = with_grad ? empty({grid.batch, masked, values}, kDtype<W>) : empty({0}, kDtype<W>);
  W* const gradient = with_grad ? static_cast<W*>(dpred.mutable_data_ptr()) : nullptr;
  const W dscale = W(2.0 / std::max<int64_t>(1, numel));
  const Images<T> pixels(images, grid);
  const Rows<S> predictions(pred);
  std::vector<double> sums(grid.batch * masked);  // of each patch, so that threads change no bit of the loss
  torch::stable::parallel_for(0, numel ? grid.batch * masked : 0, grain(values), [&](int64_t begin, int64_t end) {
    std::vector<W> row(values);
    std::vector<T> other(std::is_same_v<T, W> ? 0 : values);  // pixels of another dtype are moved first, then widened
    T* const moved = std::is_same_v<T, W> ? reinterpret_cast<T*>(row.data()) : other.data();
    std::vector<S> contiguous(predictions.column == 1 ? 0 : values);
    std::vector<W> scratch(with_grad && goes_past_cache(dpred) ? values : 0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / masked, m = i % masked;
      copy_patch(Patch<T>{moved, grid.patch * grid.channels, grid.channels, 1}, pixels.at(b, ids(b, m)), grid);
      if constexpr (!std::is_same_v<T, W>) widen(row.data(), moved, values);
      const S* prediction = predictions.at(b, m);
      if (predictions.column != 1) {
        copy_row(contiguous.data(), prediction, predictions.column, values);
        prediction = contiguous.data();
      }
      const W scale = norm_pix ? centre(row.data(), values) : W(1);
      if (gradient)
        write_row(gradient + i * values, values, scratch, [&](W* difference) {
          sums[i] = compare(prediction, row.data(), scale, difference, dscale, values);
        });
      else
        sums[i] = compare<S, W>(prediction, row.data(), scale, nullptr, dscale, values);
    }
    finish_past_cache();
  });
  double sum = 0;
  for (const double of_patch : sums) sum += of_patch;
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
      default: return run(Wide<S>{}, torch::stable::to(images, kDtype<Wide<S>>));  // rare: other integers, bool
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
