// Batch norm in training, with the addition and the ReLU that may follow it (fastssl/ops/batchnorm.py).
//
// Tensors lie in channels_last order, [B, P, C] with P pixels. All is bound by memory, so each pass reads its tensors
// once, in the order in which they lie. Where that costs nothing, it takes some rows at a time, so that what is kept for
// each channel (sums, scales) comes from the L1 cache once for several values. The second pass of a thread goes
// backwards, from what the first has left in the caches.
#include "rows.h"

#include <cmath>
#include <optional>
#include <tuple>

namespace fastssl {
namespace {

// A page, in which a processor looks ahead for one stream of reads: several rows of one page read in turn stop that, and
// measured 1.7 times as long (256 to 2048 bytes a row).
constexpr int64_t kPage = 4096;
constexpr int64_t kTaskValues = 128 << 10;  // least values of a task: more than its sums by far
constexpr int64_t kChunkValues = 16 << 10;  // about as many are summed in T before their sum is added in double
constexpr int64_t kFewestRows = 16, kMostRows = 64;  // of a chunk

// A new tensor of x's shape, dtype and strides, uninitialised.
inline Tensor like(const Tensor& x) {
  AtenTensorHandle handle;
  const auto sizes = x.sizes(), strides = x.strides();
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(x.scalar_type()));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(x.dim(), sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <int N>
using Count = std::integral_constant<int, N>;

// Which rows belong together: part s of the batch is samples s, s + parts, s + 2 parts, …, and a part is cut into tasks.
struct Parts {
  int64_t parts, pixels, channels, rows, tasks;  // rows and tasks of one part
  int64_t bytes;                                 // of a row

  Parts(const Tensor& x, int64_t splits)
      : parts(splits), pixels(x.numel() / (x.size(0) * x.size(1))), channels(x.size(1)) {
    bytes = channels * int64_t(x.element_size());
    rows = x.size(0) / parts * pixels;
    if (parts == 1) pixels = rows;
    tasks = std::max<int64_t>(1, rows * channels / kTaskValues);
  }

  int64_t padded() const { return round_up<int64_t>(channels, 64); }  // channels in whole vectors and cache lines
  int64_t chunk() const { return std::clamp(kChunkValues / std::max<int64_t>(1, channels), kFewestRows, kMostRows); }

  // Runs body(part, begin, end, task) for the rows begin..end-1 of a part, in parallel.
  template <typename Body>
  void for_tasks(bool backwards, const Body& body) const {
    torch::stable::parallel_for(0, parts * tasks, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t task = backwards ? first + last - 1 - i : i, n = task % tasks;
        body(task / tasks, rows * n / tasks, rows * (n + 1) / tasks, task);
      }
    });
  }

  // Runs body(Count, offset, channel, inside) for every vector of channels of the rows begin..end-1 of a part: the same
  // channels of Count rows, the first of them at `offset`; `inside` of the vector's channels exist. With kCached the rows
  // are known to lie in a cache.
  template <typename T, bool kCached = false, typename Body>
  void for_vectors(int64_t part, int64_t begin, int64_t end, const Body& body) const {
    while (begin < end) {
      const int64_t sample = begin / pixels, pixel = begin % pixels, count = std::min(pixels - pixel, end - begin);
      int64_t row = (sample * parts + part) * pixels + pixel;
      const int64_t stop = row + count;
      if (kCached || bytes >= kPage)
        for (; row + 4 <= stop; row += 4) across<T, 4>(row * channels, body);
      else if (bytes <= kPage / 16)
        for (; row + 2 <= stop; row += 2) across<T, 2>(row * channels, body);
      for (; row < stop; ++row) across<T, 1>(row * channels, body);
      begin += count;
    }
  }

 private:
  template <typename T, int N, typename Body>
  void across(int64_t offset, const Body& body) const {
    int64_t c = 0;
    for (; c + kLanes<T> <= channels; c += kLanes<T>) body(Count<N>{}, offset + c, c, Count<kLanes<T>>{});
    if (c < channels) body(Count<N>{}, offset + c, c, channels - c);
  }
};

template <typename T>
Vec<T> relu(Vec<T> x) {
  return x < T(0) ? Vec<T>{} : x;  // NaN stays
}

template <typename T>
Vec<T> masked(Vec<T> gradient, Vec<T> y) {  // through the ReLU that made y
  return y <= T(0) ? Vec<T>{} : gradient;
}

// ---- Statistics

// Mean and sum of squares about it, of so many values in each channel.
struct Moments {
  double *mean, *squares;
  int64_t count = 0;

  // Adds `more` values of channel c with their sum of squares about their mean.
  void add(int64_t channels, int64_t more, const auto& values) {
    const double share = double(more) / double(count + more), between = share * double(count);
    for (int64_t c = 0; c < channels; ++c) {
      const auto [new_mean, new_squares] = values(c);
      const double distance = new_mean - mean[c];
      mean[c] += distance * share;
      squares[c] += new_squares + distance * distance * between;
    }
    count += more;
  }
};

// A chunk is read twice, the second time from the cache: sums about its own mean do not cancel.
template <typename T, typename S>
void add_chunk(const Parts& cut, const S* x, int64_t part, int64_t begin, int64_t end, T* scratch, Moments& moments) {
  T *centre = scratch, *rest = scratch + cut.padded(), *squares = scratch + 2 * cut.padded();
  std::fill(scratch, scratch + 3 * cut.padded(), T(0));
  cut.for_vectors<T>(part, begin, end, [&](auto rows, int64_t at, int64_t c, auto inside) {
    Vec<T> total{};
    for (int i = 0; i < rows; ++i) total += load_part<T>(x + at + i * cut.channels, inside);
    store(centre + c, load(centre + c) + total);
  });
  const double one = 1.0 / double(end - begin);
  for (int64_t c = 0; c < cut.channels; ++c) centre[c] *= T(one);
  cut.for_vectors<T, true>(part, begin, end, [&](auto rows, int64_t at, int64_t c, auto inside) {
    const Vec<T> about = load(centre + c);
    Vec<T> total{}, total_squares{};
    for (int i = 0; i < rows; ++i) {
      const Vec<T> distance = load_part<T>(x + at + i * cut.channels, inside) - about;
      total += distance;
      total_squares = distance * distance + total_squares;
    }
    store(rest + c, load(rest + c) + total);
    store(squares + c, load(squares + c) + total_squares);
  });
  moments.add(cut.channels, end - begin, [&](int64_t c) {
    const double left = rest[c];
    return std::pair(double(centre[c]) + left * one, double(squares[c]) - left * left * one);
  });
}

template <typename T, typename S>
void statistics(const Parts& cut, const S* x, double eps, T* mean, T* invstd, T* var) {
  const int64_t channels = cut.channels;
  const Tensor sums = empty({cut.parts * cut.tasks * 2 * channels}, ScalarType::Double);
  const auto of_task = [&](int64_t task) {
    double* own = data<double>(sums) + task * 2 * channels;
    return Moments{own, own + channels};
  };
  cut.for_tasks(false, [&](int64_t part, int64_t begin, int64_t end, int64_t task) {
    std::vector<T> scratch(3 * cut.padded());
    Moments moments = of_task(task);
    std::fill(moments.mean, moments.mean + 2 * channels, 0.0);
    for (int64_t row = begin; row < end; row += cut.chunk())
      add_chunk(cut, x, part, row, std::min(row + cut.chunk(), end), scratch.data(), moments);
  });
  for (int64_t part = 0; part < cut.parts; ++part) {
    Moments all = of_task(part * cut.tasks);
    all.count = cut.rows / cut.tasks;
    for (int64_t n = 1; n < cut.tasks; ++n) {
      const Moments more = of_task(part * cut.tasks + n);
      all.add(channels, cut.rows * (n + 1) / cut.tasks - cut.rows * n / cut.tasks,
              [&](int64_t c) { return std::pair(more.mean[c], more.squares[c]); });
    }
    for (int64_t c = 0, to = part * channels; c < channels; ++c, ++to) {
      mean[to] = T(all.mean[c]);
      invstd[to] = T(1 / std::sqrt(all.squares[c] / double(cut.rows) + eps));
      var[to] = T(all.squares[c] / double(cut.rows - 1));
    }
  }
}

// ---- Forward

// What the passes read of each channel, from memory that is readable to whole vectors.
template <typename T>
struct Channels {
  T *mean, *scale, *bias, *gradient, *slope;

  Channels(T* memory, int64_t padded)
      : mean(memory), scale(mean + padded), bias(scale + padded), gradient(bias + padded), slope(gradient + padded) {}
};

template <typename T>
struct AllChannels {
  Tensor memory;
  int64_t padded;

  AllChannels(const Parts& cut, const T* weight, const T* bias, const T* mean, const T* invstd)
      : memory(empty({cut.parts * 5 * cut.padded()}, kDtype<T>)), padded(cut.padded()) {
    std::fill(data<T>(memory), data<T>(memory) + memory.numel(), T(0));
    for (int64_t part = 0, from = 0; part < cut.parts; ++part) {
      const Channels<T> to = of(part);
      for (int64_t c = 0; c < cut.channels; ++c, ++from) {
        to.mean[c] = mean[from];
        to.scale[c] = weight[c] * invstd[from];
        to.bias[c] = bias[c];
      }
    }
  }
  Channels<T> of(int64_t part) const { return {data<T>(memory) + part * 5 * padded, padded}; }
};

// (y = relu(norm(x) + residual), mean, 1/√(variance + eps), unbiased variance: [splits, C])
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_fwd(Tensor x, Tensor weight, Tensor bias,
                                                          std::optional<Tensor> residual, double eps, int64_t splits,
                                                          bool with_relu) {
  const Parts cut(x, splits);
  const ScalarType wide = weight.scalar_type();
  const Tensor y = like(x);
  Tensor mean = empty({splits, cut.channels}, wide), invstd = empty({splits, cut.channels}, wide);
  Tensor var = empty({splits, cut.channels}, wide);
  with_float_type(x.scalar_type(), "batch_norm: x", [&](auto type) {
    using S = decltype(type);
    using T = Wide<S>;
    const S *from = data<S>(x), *add = residual ? data<S>(*residual) : nullptr;
    S* to = data<S>(y);
    statistics(cut, from, eps, data<T>(mean), data<T>(invstd), data<T>(var));
    const AllChannels<T> all(cut, data<T>(weight), data<T>(bias), data<T>(mean), data<T>(invstd));
    cut.for_tasks(true, [&](int64_t part, int64_t begin, int64_t end, int64_t) {
      const Channels<T> of = all.of(part);
      cut.for_vectors<T>(part, begin, end, [&](auto rows, int64_t at, int64_t c, auto inside) {
        const Vec<T> centre = load(of.mean + c), scale = load(of.scale + c), shift = load(of.bias + c);
        for (int i = 0; i < rows; ++i, at += cut.channels) {
          Vec<T> value = (load_part<T>(from + at, inside) - centre) * scale + shift;
          if (add) value += load_part<T>(add + at, inside);
          store_part<T>(to + at, with_relu ? relu<T>(value) : value, inside);
        }
      });
    });
  });
  return {y, mean, invstd, var};
}

// ---- Backward

// Σ g and Σ g (x - mean) of each task, [tasks][2][C], where g is dy through the ReLU: by y, which then also writes g to
// `dresidual`, or else by what made y.
template <typename T, typename S>
void gradient_sums(const Parts& cut, const S* dy, const S* x, const S* y, bool with_relu, const AllChannels<T>& all,
                   S* dresidual, double* sums) {
  cut.for_tasks(false, [&](int64_t part, int64_t begin, int64_t end, int64_t task) {
    const Channels<T> of = all.of(part);
    std::vector<T> scratch(2 * cut.padded());
    T *gradients = scratch.data(), *products = gradients + cut.padded();
    double* own = sums + task * 2 * cut.channels;
    std::fill(own, own + 2 * cut.channels, 0.0);
    for (int64_t row = begin; row < end; row += kFewestRows) {
      std::fill(scratch.begin(), scratch.end(), T(0));
      cut.for_vectors<T>(part, row, std::min(row + kFewestRows, end), [&](auto rows, int64_t at, int64_t c, auto inside) {
        const Vec<T> centre = load(of.mean + c), scale = load(of.scale + c), shift = load(of.bias + c);
        Vec<T> total{}, total_products{};
        for (int i = 0; i < rows; ++i, at += cut.channels) {
          const Vec<T> distance = load_part<T>(x + at, inside) - centre;
          Vec<T> g = load_part<T>(dy + at, inside);
          if (y) {
            g = masked<T>(g, load_part<T>(y + at, inside));
            store_part<T>(dresidual + at, g, inside);
          } else if (with_relu) {
            g = masked<T>(g, distance * scale + shift);
          }
          total += g;
          total_products = g * distance + total_products;
        }
        store(gradients + c, load(gradients + c) + total);
        store(products + c, load(products + c) + total_products);
      });
      for (int64_t c = 0; c < cut.channels; ++c) {
        own[c] += gradients[c];
        own[cut.channels + c] += products[c];
      }
    }
  });
}

// Joins the tasks' sums into the gradients of weight and bias, and into what dx needs of each channel.
template <typename T>
void join_sums(const Parts& cut, double* sums, const T* invstd, const AllChannels<T>& all, T* dweight, T* dbias) {
  const int64_t channels = cut.channels;
  std::vector<double> both(2 * channels);
  for (int64_t part = 0; part < cut.parts; ++part) {
    double* total = sums + part * cut.tasks * 2 * channels;
    for (int64_t n = 1; n < cut.tasks; ++n)
      for (int64_t c = 0; c < 2 * channels; ++c) total[c] += total[n * 2 * channels + c];
    const Channels<T> of = all.of(part);
    for (int64_t c = 0; c < channels; ++c) {
      const double slope = total[channels + c] * double(invstd[part * channels + c]);
      of.gradient[c] = T(total[c] / double(cut.rows));
      of.slope[c] = T(slope * double(invstd[part * channels + c]) / double(cut.rows));
      both[c] += slope;
      both[channels + c] += total[c];
    }
  }
  std::copy(both.begin(), both.begin() + channels, dweight);
  std::copy(both.begin() + channels, both.end(), dbias);
}

// (dx, dweight, dbias, dresidual). With y, the result of a ReLU of a sum, dresidual is dy where y > 0; else it is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_bwd(Tensor dy, Tensor x, std::optional<Tensor> y, Tensor weight,
                                                          Tensor bias, Tensor mean, Tensor invstd, bool with_relu) {
  const Parts cut(x, mean.size(0));
  const Tensor dx = like(x);
  Tensor dresidual = y ? like(x) : empty({0}, x.scalar_type());
  Tensor dweight = empty({cut.channels}, weight.scalar_type()), dbias = empty({cut.channels}, weight.scalar_type());
  const Tensor sums = empty({cut.parts * cut.tasks * 2 * cut.channels}, ScalarType::Double);
  with_float_type(x.scalar_type(), "batch_norm: x", [&](auto type) {
    using S = decltype(type);
    using T = Wide<S>;
    const S* from = data<S>(x);
    const AllChannels<T> all(cut, data<T>(weight), data<T>(bias), data<T>(mean), data<T>(invstd));
    gradient_sums(cut, data<S>(dy), from, y ? data<S>(*y) : nullptr, with_relu, all, data<S>(dresidual),
                  data<double>(sums));
    join_sums(cut, data<double>(sums), data<T>(invstd), all, data<T>(dweight), data<T>(dbias));
    const S* gradient = data<S>(y ? dresidual : dy);  // the former is through the ReLU already
    const bool mask = with_relu && !y;
    S* to = data<S>(dx);
    cut.for_tasks(true, [&](int64_t part, int64_t begin, int64_t end, int64_t) {
      const Channels<T> of = all.of(part);
      cut.for_vectors<T>(part, begin, end, [&](auto rows, int64_t at, int64_t c, auto inside) {
        const Vec<T> centre = load(of.mean + c), scale = load(of.scale + c), shift = load(of.bias + c);
        const Vec<T> mean_gradient = load(of.gradient + c), slope = load(of.slope + c);
        for (int i = 0; i < rows; ++i, at += cut.channels) {
          const Vec<T> distance = load_part<T>(from + at, inside) - centre;
          Vec<T> g = load_part<T>(gradient + at, inside);
          if (mask) g = masked<T>(g, distance * scale + shift);
          store_part<T>(to + at, (g - mean_gradient - distance * slope) * scale, inside);
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
