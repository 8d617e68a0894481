// Batch norm in training, optionally followed by an addition and ReLU (fastssl/ops/batchnorm.py).
//
// Tensors are channels_last: [B, P, C] in memory, with P pixels. Bound by memory bandwidth, so each pass reads its
// tensors once, in memory order: forward, x for the statistics, then x (and residual) again and y; backward, dy and x
// (or y) for the sums, then dy and x again and dx. Several rows are processed at a time where that does not disturb the
// hardware prefetcher, so that per-channel values (sums, scales) are loaded from the L1 cache once for several rows.
// The second pass of a thread runs in reverse order and starts with what the first pass left in the caches.
#include "rows.h"

#include <cmath>
#include <optional>
#include <tuple>

namespace fastssl {
namespace {

// The hardware prefetcher follows one stream of reads per page: alternating between several rows of one page stops it
// and takes 1.7 times as long (measured with 256 to 2048 bytes per row).
constexpr int64_t kPage = 4096;
constexpr int64_t kTaskValues = 128 << 10;       // minimum of values per task: many times the size of its sums
constexpr int64_t kChunkValues = 16 << 10;       // about as many values are summed in T before double
constexpr int64_t kMinRows = 16, kMaxRows = 64;  // rows of a chunk

// An uninitialised tensor with x's shape, dtype and strides.
inline Tensor empty_strided_like(const Tensor& x) {
  return empty_strided(x.sizes().data(), x.strides().data(), x.dim(), x.scalar_type());
}

template <int N>
using Count = std::integral_constant<int, N>;

// The splits of the batch: split s consists of the samples s, s + splits, s + 2 splits, …, and is divided into tasks.
struct BatchSplits {
  int64_t splits, pixels, channels, rows, tasks;  // rows and tasks of one split
  int64_t bytes;                                  // of a row

  BatchSplits(const Tensor& x, int64_t splits)
      : splits(splits), pixels(x.numel() / (x.size(0) * x.size(1))), channels(x.size(1)) {
    bytes = channels * int64_t(x.element_size());
    rows = x.size(0) / splits * pixels;
    if (splits == 1) pixels = rows;
    tasks = std::max<int64_t>(1, rows * channels / kTaskValues);
  }

  int64_t padded() const { return round_up<int64_t>(channels, 64); }  // channels, to whole vectors and cache lines
  int64_t chunk() const { return std::clamp(kChunkValues / std::max<int64_t>(1, channels), kMinRows, kMaxRows); }

  // Runs body(split, begin, end, task) for the rows begin..end-1 of a split, in parallel.
  template <typename Body>
  void for_tasks(bool reverse, const Body& body) const {
    torch::stable::parallel_for(0, splits * tasks, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t task = reverse ? first + last - 1 - i : i, n = task % tasks;
        body(task / tasks, rows * n / tasks, rows * (n + 1) / tasks, task);
      }
    });
  }

  // Runs body(Count<N>, offset, channel, lanes) for the rows begin..end-1 of a split, N rows and a vector of channels
  // at a time: the vector of the first row is at `offset`, and `lanes` of its channels exist. kCached: the rows are in
  // a cache, where the prefetcher does not matter.
  template <typename T, bool kCached = false, typename Body>
  void for_vectors(int64_t split, int64_t begin, int64_t end, const Body& body) const {
    while (begin < end) {
      const int64_t sample = begin / pixels, pixel = begin % pixels;
      const int64_t sample_rows = std::min(pixels - pixel, end - begin);
      int64_t row = (sample * splits + split) * pixels + pixel;
      const int64_t stop = row + sample_rows;
      if (kCached || bytes >= kPage)
        for (; row + 4 <= stop; row += 4) for_row_vectors<T, 4>(row * channels, body);
      else if (bytes <= kPage / 16)
        for (; row + 2 <= stop; row += 2) for_row_vectors<T, 2>(row * channels, body);
      for (; row < stop; ++row) for_row_vectors<T, 1>(row * channels, body);
      begin += sample_rows;
    }
  }

 private:
  template <typename T, int N, typename Body>
  void for_row_vectors(int64_t offset, const Body& body) const {
    int64_t c = 0;
    for (; c + kLanes<T> <= channels; c += kLanes<T>) body(Count<N>{}, offset + c, c, Count<kLanes<T>>{});
    if (c < channels) body(Count<N>{}, offset + c, c, channels - c);
  }
};

template <typename T>
Vec<T> relu(Vec<T> x) {
  return x < T(0) ? Vec<T>{} : x;  // a NaN stays a NaN
}

template <typename T>
Vec<T> relu_backward(Vec<T> gradient, Vec<T> y) {  // gradient of the input of y = relu(…)
  return y <= T(0) ? Vec<T>{} : gradient;
}

// ---- Statistics

// Mean of `count` values in each channel, and their sum of squared distances to it.
struct Moments {
  double *mean, *squares;
  int64_t count = 0;

  // Merges `other_count` values per channel (Chan, Golub and LeVeque, 1979); values(c) returns their mean and sum of
  // squares.
  void merge(int64_t channels, int64_t other_count, const auto& values) {
    const double weight = double(other_count) / double(count + other_count), product = weight * double(count);
    for (int64_t c = 0; c < channels; ++c) {
      const auto [other_mean, other_squares] = values(c);
      const double distance = other_mean - mean[c];
      mean[c] += distance * weight;
      squares[c] += other_squares + distance * distance * product;
    }
    count += other_count;
  }
};

// Adds a chunk to the moments. The chunk is read twice, the second time from the cache: sums of distances to the
// chunk's own mean lose no precision by cancellation.
template <typename T, typename S>
void add_chunk(const BatchSplits& batch, const S* x, int64_t split, int64_t begin, int64_t end, T* scratch,
               Moments& moments) {
  T *chunk_mean = scratch, *residual = scratch + batch.padded(), *squares = scratch + 2 * batch.padded();
  std::fill(scratch, scratch + 3 * batch.padded(), T(0));
  batch.for_vectors<T>(split, begin, end, [&](auto rows, int64_t offset, int64_t c, auto lanes) {
    Vec<T> total{};
    for (int i = 0; i < rows; ++i) total += load_part<T>(x + offset + i * batch.channels, lanes);
    store(chunk_mean + c, load(chunk_mean + c) + total);
  });
  const double inverse_count = 1.0 / double(end - begin);
  for (int64_t c = 0; c < batch.channels; ++c) chunk_mean[c] *= T(inverse_count);
  batch.for_vectors<T, true>(split, begin, end, [&](auto rows, int64_t offset, int64_t c, auto lanes) {
    const Vec<T> centre = load(chunk_mean + c);
    Vec<T> total{}, total_squares{};
    for (int i = 0; i < rows; ++i) {
      const Vec<T> distance = load_part<T>(x + offset + i * batch.channels, lanes) - centre;
      total += distance;
      total_squares = distance * distance + total_squares;
    }
    store(residual + c, load(residual + c) + total);
    store(squares + c, load(squares + c) + total_squares);
  });
  moments.merge(batch.channels, end - begin, [&](int64_t c) {
    const double sum = residual[c];
    return std::pair(double(chunk_mean[c]) + sum * inverse_count, double(squares[c]) - sum * sum * inverse_count);
  });
}

template <typename T, typename S>
void statistics(const BatchSplits& batch, const S* x, double eps, T* mean, T* invstd, T* var) {
  const int64_t channels = batch.channels;
  const Tensor sums = empty({batch.splits * batch.tasks * 2 * channels}, ScalarType::Double);
  const auto task_moments = [&](int64_t task) {
    double* task_sums = data<double>(sums) + task * 2 * channels;
    return Moments{task_sums, task_sums + channels};
  };
  batch.for_tasks(false, [&](int64_t split, int64_t begin, int64_t end, int64_t task) {
    std::vector<T> scratch(3 * batch.padded());
    Moments moments = task_moments(task);
    std::fill(moments.mean, moments.mean + 2 * channels, 0.0);
    for (int64_t row = begin; row < end; row += batch.chunk())
      add_chunk(batch, x, split, row, std::min(row + batch.chunk(), end), scratch.data(), moments);
  });
  for (int64_t split = 0; split < batch.splits; ++split) {
    Moments total = task_moments(split * batch.tasks);
    total.count = batch.rows / batch.tasks;
    for (int64_t n = 1; n < batch.tasks; ++n) {
      const Moments other = task_moments(split * batch.tasks + n);
      total.merge(channels, batch.rows * (n + 1) / batch.tasks - batch.rows * n / batch.tasks,
                  [&](int64_t c) { return std::pair(other.mean[c], other.squares[c]); });
    }
    for (int64_t c = 0, index = split * channels; c < channels; ++c, ++index) {
      mean[index] = T(total.mean[c]);
      invstd[index] = T(1 / std::sqrt(total.squares[c] / double(batch.rows) + eps));
      var[index] = T(total.squares[c] / double(batch.rows - 1));
    }
  }
}

// ---- Forward

// Per-channel values of one split that the passes read, padded to whole vectors. For the backward pass, with g the
// gradient before the ReLU: `gradient` is mean(g), `slope` is mean(g (x − mean)) / (variance + eps).
template <typename T>
struct Channels {
  T *mean, *scale, *bias, *gradient, *slope;

  Channels(T* memory, int64_t padded)
      : mean(memory), scale(mean + padded), bias(scale + padded), gradient(bias + padded), slope(gradient + padded) {}
};

// The per-channel values of all splits.
template <typename T>
struct AllChannels {
  Tensor memory;
  int64_t padded;

  AllChannels(const BatchSplits& batch, const T* weight, const T* bias, const T* mean, const T* invstd)
      : memory(empty({batch.splits * 5 * batch.padded()}, kDtype<T>)), padded(batch.padded()) {
    std::fill(data<T>(memory), data<T>(memory) + memory.numel(), T(0));
    for (int64_t split = 0, index = 0; split < batch.splits; ++split) {
      const Channels<T> values = of_split(split);
      for (int64_t c = 0; c < batch.channels; ++c, ++index) {
        values.mean[c] = mean[index];
        values.scale[c] = weight[c] * invstd[index];
        values.bias[c] = bias[c];
      }
    }
  }
  Channels<T> of_split(int64_t split) const { return {data<T>(memory) + split * 5 * padded, padded}; }
};

// Returns y = relu(norm(x) + residual), and mean, 1/√(variance + eps) and unbiased variance, each [splits, C].
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_fwd(Tensor x, Tensor weight, Tensor bias,
                                                          std::optional<Tensor> residual, double eps, int64_t splits,
                                                          bool with_relu) {
  const BatchSplits batch(x, splits);
  const ScalarType compute_dtype = weight.scalar_type();
  const Tensor y = empty_strided_like(x);
  Tensor mean = empty({splits, batch.channels}, compute_dtype), invstd = empty({splits, batch.channels}, compute_dtype);
  Tensor var = empty({splits, batch.channels}, compute_dtype);
  with_float_type(x.scalar_type(), "batch_norm: x", [&](auto type) {
    using S = decltype(type);
    using T = ComputeType<S>;
    const S *input = data<S>(x), *residual_data = residual ? data<S>(*residual) : nullptr;
    S* output = data<S>(y);
    statistics(batch, input, eps, data<T>(mean), data<T>(invstd), data<T>(var));
    const AllChannels<T> channels(batch, data<T>(weight), data<T>(bias), data<T>(mean), data<T>(invstd));
    batch.for_tasks(true, [&](int64_t split, int64_t begin, int64_t end, int64_t) {
      const Channels<T> values = channels.of_split(split);
      batch.for_vectors<T>(split, begin, end, [&](auto rows, int64_t offset, int64_t c, auto lanes) {
        const Vec<T> centre = load(values.mean + c), scale = load(values.scale + c), shift = load(values.bias + c);
        for (int i = 0; i < rows; ++i, offset += batch.channels) {
          Vec<T> value = (load_part<T>(input + offset, lanes) - centre) * scale + shift;
          if (residual_data) value += load_part<T>(residual_data + offset, lanes);
          store_part<T>(output + offset, with_relu ? relu<T>(value) : value, lanes);
        }
      });
    });
  });
  return {y, mean, invstd, var};
}

// ---- Backward

// Σ g and Σ g (x − mean) of each task, [tasks][2][C], where g is the gradient before the ReLU. If y is given, g is
// computed from y and also written to `dresidual`; otherwise the ReLU's input is computed again.
template <typename T, typename S>
void gradient_sums(const BatchSplits& batch, const S* dy, const S* x, const S* y, bool with_relu,
                   const AllChannels<T>& channels, S* dresidual, double* sums) {
  batch.for_tasks(false, [&](int64_t split, int64_t begin, int64_t end, int64_t task) {
    const Channels<T> values = channels.of_split(split);
    std::vector<T> scratch(2 * batch.padded());
    T *gradients = scratch.data(), *products = gradients + batch.padded();
    double* task_sums = sums + task * 2 * batch.channels;
    std::fill(task_sums, task_sums + 2 * batch.channels, 0.0);
    for (int64_t row = begin; row < end; row += kMinRows) {
      std::fill(scratch.begin(), scratch.end(), T(0));
      batch.for_vectors<T>(
          split, row, std::min(row + kMinRows, end), [&](auto rows, int64_t offset, int64_t c, auto lanes) {
            const Vec<T> centre = load(values.mean + c), scale = load(values.scale + c), shift = load(values.bias + c);
            Vec<T> total{}, total_products{};
            for (int i = 0; i < rows; ++i, offset += batch.channels) {
              const Vec<T> distance = load_part<T>(x + offset, lanes) - centre;
              Vec<T> g = load_part<T>(dy + offset, lanes);
              if (y) {
                g = relu_backward<T>(g, load_part<T>(y + offset, lanes));
                store_part<T>(dresidual + offset, g, lanes);
              } else if (with_relu) {
                g = relu_backward<T>(g, distance * scale + shift);
              }
              total += g;
              total_products = g * distance + total_products;
            }
            store(gradients + c, load(gradients + c) + total);
            store(products + c, load(products + c) + total_products);
          });
      for (int64_t c = 0; c < batch.channels; ++c) {
        task_sums[c] += gradients[c];
        task_sums[batch.channels + c] += products[c];
      }
    }
  });
}

// Adds up the sums of all tasks, to the gradients of weight and bias and to the per-channel means that dx needs.
template <typename T>
void add_task_sums(const BatchSplits& batch, double* sums, const T* invstd, const AllChannels<T>& all_channels,
                   T* dweight, T* dbias) {
  const int64_t channels = batch.channels;
  std::vector<double> parameter_sums(2 * channels);
  for (int64_t split = 0; split < batch.splits; ++split) {
    double* total = sums + split * batch.tasks * 2 * channels;
    for (int64_t n = 1; n < batch.tasks; ++n)
      for (int64_t c = 0; c < 2 * channels; ++c) total[c] += total[n * 2 * channels + c];
    const Channels<T> values = all_channels.of_split(split);
    for (int64_t c = 0; c < channels; ++c) {
      const double slope = total[channels + c] * double(invstd[split * channels + c]);
      values.gradient[c] = T(total[c] / double(batch.rows));
      values.slope[c] = T(slope * double(invstd[split * channels + c]) / double(batch.rows));
      parameter_sums[c] += slope;
      parameter_sums[channels + c] += total[c];
    }
  }
  std::copy(parameter_sums.begin(), parameter_sums.begin() + channels, dweight);
  std::copy(parameter_sums.begin() + channels, parameter_sums.end(), dbias);
}

// Returns dx, dweight, dbias and dresidual. If y is given, the output of the ReLU after an addition, dresidual is dy
// where y > 0; otherwise it is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_bwd(Tensor dy, Tensor x, std::optional<Tensor> y, Tensor weight,
                                                          Tensor bias, Tensor mean, Tensor invstd, bool with_relu) {
  const BatchSplits batch(x, mean.size(0));
  const Tensor dx = empty_strided_like(x);
  Tensor dresidual = y ? empty_strided_like(x) : empty({0}, x.scalar_type());
  Tensor dweight = empty({batch.channels}, weight.scalar_type()), dbias = empty({batch.channels}, weight.scalar_type());
  const Tensor sums = empty({batch.splits * batch.tasks * 2 * batch.channels}, ScalarType::Double);
  with_float_type(x.scalar_type(), "batch_norm: x", [&](auto type) {
    using S = decltype(type);
    using T = ComputeType<S>;
    const S* input = data<S>(x);
    const AllChannels<T> channels(batch, data<T>(weight), data<T>(bias), data<T>(mean), data<T>(invstd));
    gradient_sums(batch, data<S>(dy), input, y ? data<S>(*y) : nullptr, with_relu, channels, data<S>(dresidual),
                  data<double>(sums));
    add_task_sums(batch, data<double>(sums), data<T>(invstd), channels, data<T>(dweight), data<T>(dbias));
    const S* gradient = data<S>(y ? dresidual : dy);  // dresidual is already the gradient before the ReLU
    const bool mask = with_relu && !y;
    S* output = data<S>(dx);
    batch.for_tasks(true, [&](int64_t split, int64_t begin, int64_t end, int64_t) {
      const Channels<T> values = channels.of_split(split);
      batch.for_vectors<T>(split, begin, end, [&](auto rows, int64_t offset, int64_t c, auto lanes) {
        const Vec<T> centre = load(values.mean + c), scale = load(values.scale + c), shift = load(values.bias + c);
        const Vec<T> mean_gradient = load(values.gradient + c), slope = load(values.slope + c);
        for (int i = 0; i < rows; ++i, offset += batch.channels) {
          const Vec<T> distance = load_part<T>(input + offset, lanes) - centre;
          Vec<T> g = load_part<T>(gradient + offset, lanes);
          if (mask) g = relu_backward<T>(g, distance * scale + shift);
          store_part<T>(output + offset, (g - mean_gradient - distance * slope) * scale, lanes);
        }
      });
    });
  });
  return {dx, dweight, dbias, dresidual};
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("batch_norm_fwd", TORCH_BOX(&fastssl::batch_norm_fwd));
  m.impl("batch_norm_bwd", TORCH_BOX(&fastssl::batch_norm_bwd));
}
