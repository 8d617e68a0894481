// InfoNCE over a queue and in the batch, NT-Xent: attention whose values are its keys (fastssl/ops/contrastive.py).
#include "info_nce.h"

namespace fastssl {
namespace {

std::tuple<Tensor, Tensor, Tensor> info_nce_fwd(Tensor q, Tensor k, Tensor queue, Tensor tau, bool with_grad) {
  return with_wide_type(q, [&](auto type) {
    using T = decltype(type);
    Tensor loss = empty({q.size(0)}, kDtype<T>), rank = empty({q.size(0)}, ScalarType::Long);
    Tensor dq = with_grad ? empty({q.size(0), q.size(1)}, kDtype<T>) : empty({0}, kDtype<T>);
    info_nce<T>(q, k, {0, q.size(0), false}, queue, false, value_of(tau),
                {data<T>(loss), nullptr, with_grad ? data<T>(dq) : nullptr, data<int64_t>(rank)});
    return std::make_tuple(loss, rank, dq);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_info_nce_fwd(Tensor q, Tensor keys, Tensor tau, int64_t first,
                                                              bool with_grad) {
  return with_wide_type(q, [&](auto type) {
    using T = decltype(type);
    Tensor loss = empty({q.size(0)}, kDtype<T>), rank = empty({q.size(0)}, ScalarType::Long);
    Tensor dq = with_grad ? empty({q.size(0), q.size(1)}, kDtype<T>) : empty({0}, kDtype<T>);
    Tensor lse = empty({q.size(0)}, kDtype<T>);
    info_nce<T>(q, keys, {first, keys.size(0), false}, keys, true, value_of(tau),
                {data<T>(loss), data<T>(lse), with_grad ? data<T>(dq) : nullptr, data<int64_t>(rank)});
    return std::make_tuple(loss, rank, dq, lse);
  });
}

// A factor or a shift of exponents as two numbers, whose rounding would otherwise go the same way in every weight.
template <typename T>
struct Precise {
  T main, rest;
  Precise(double value) : main(T(value)), rest(T(value - double(T(value)))) {}
};

// 2^(logit · scale − shift), for logits as they come from a product.
template <typename T>
Vec<T> weight_of(Vec<T> logit, const Precise<T>& scale, Vec<T> shift, Vec<T> shift_rest) {
  return exp2((logit * scale.main - shift) + (logit * scale.rest - shift_rest));
}

// ∂loss/∂keys: the keys are the lanes and the queries stream by, so each row of the result has one owner.
template <typename T>
void batch_dkeys(const Matrix& q, const Matrix& keys, double tau, int64_t first, const T* lse, const T* dloss, T* dkeys) {
  const int64_t width = q.width, padded = panels_of<T>(width) * kPanel<T>;
  const int64_t block = std::clamp<int64_t>(round_up<int64_t>(keys.rows / 8, kGroup<T>), kGroup<T>, kQueryBlock);
  const int64_t scratch = Scratch<T>::size(width) + block * (2 * width + padded), tasks = (keys.rows + block - 1) / block;
  const Tensor workspace = empty({torch::stable::get_num_threads() * scratch}, kDtype<T>);
  const T sign = tau < 0 ? T(-1) : T(1), inverse = T(1 / tau);
  const Precise<T> scale(kLog2E / std::abs(tau));
  for_tasks(tasks, 4.0 * q.rows * keys.rows * width, data<T>(workspace), scratch, [&](int64_t task, T* own) {
    const int64_t first_key = task * block, count = std::min(block, keys.rows - first_key);
    T *rows = own + Scratch<T>::size(width), *panels = rows + block * width, *sums = panels + block * width;
    widen(keys, first_key, count, rows);
    pack_rows(rows, width, count, width, sign, panels);
    std::fill(sums, sums + count * padded, T(0));
    stream(q, 0, q.rows, panels, count, sums, Scratch<T>(own, width),
           [&](T* logits, int64_t query, int64_t queries, int64_t key, int64_t key_panels) {
             for (int64_t i = 0; i < queries; ++i) {
               T* row = logits + i * kGroup<T>;
               const Precise<T> shift(double(lse[query + i]) * kLog2E);
               const T upstream = dloss[query + i] * inverse;
               for (int64_t lane = 0; lane < key_panels * kPanel<T>; lane += kLanes<T>)
                 store(row + lane,
                       weight_of<T>(load(row + lane), scale, splat(shift.main), splat(shift.rest)) * upstream);
               const int64_t positive = first + query + i - first_key - key;
               if (0 <= positive && positive < key_panels * kPanel<T>) row[positive] -= upstream;
             }
           });
    for (int64_t i = 0; i < count; ++i)
      std::copy(sums + i * padded, sums + i * padded + width, dkeys + (first_key + i) * width);
  });
}

Tensor batch_info_nce_dkeys(Tensor q, Tensor keys, Tensor tau, int64_t first, Tensor lse, Tensor dloss) {
  return with_wide_type(lse, [&](auto type) {
    using T = decltype(type);
    Tensor dkeys = empty({keys.size(0), keys.size(1)}, kDtype<T>);
    const auto rows = [](const Tensor& vector) {  // an upstream gradient may be one expanded number
      std::vector<T> values(vector.size(0));
      for (int64_t i = 0; i < vector.size(0); ++i) values[i] = data<T>(vector)[i * vector.stride(0)];
      return values;
    };
    batch_dkeys<T>(q, keys, value_of(tau), first, rows(lse).data(), rows(dloss).data(), data<T>(dkeys));
    return dkeys;
  });
}

// NT-Xent compares every view with every other, so its logits are symmetric, and each is computed once: views are cut
// into groups, and the pairs of groups play a round-robin tournament. In a round no group plays twice, so a pair's task
// may write to both its groups, in an order that does not depend on the threads.
template <typename Play>
void tournament(int64_t groups, const Play& play) {
  play(groups, [](int64_t i) { return std::pair(i, i); });
  const int64_t players = groups + groups % 2;  // one more that nobody meets, if odd
  for (int64_t round = 0; round < players - 1; ++round)
    play(players / 2, [=](int64_t i) {
      const int64_t ring = players - 1, one = (round + i) % ring, other = i ? (round + ring - i) % ring : ring;
      return std::pair(std::min(one, other), std::max(one, other));
    });
}

template <typename T>
struct Views {
  static constexpr int64_t kLargestGroup = 4 * kGroup<T>;
  T *rows, *panels, *columns;  // [N, D], as lanes, and cut into panels of columns, [c][N][kPanel]
  int64_t count, width, padded, group, groups;
  double scale;  // log2 e / |τ|

  static int64_t size(int64_t count, int64_t width) {
    return (count + kPanel<T>) * width * 2 + count * panels_of<T>(width) * kPanel<T>;
  }
  Views(const Matrix& z, double tau, T* memory)
      : rows(memory), panels(rows + z.rows * z.width), columns(panels + (z.rows + kPanel<T>) * z.width), count(z.rows),
        width(z.width), padded(panels_of<T>(z.width) * kPanel<T>),
        group(group_of(z.rows)), groups((z.rows + group - 1) / group), scale(kLog2E / std::abs(tau)) {
    for_tasks(panels_of<T>(count), 50.0 * count * width, rows, 0, [&](int64_t p, T*) {
      const int64_t from = p * kPanel<T>, some = std::min<int64_t>(kPanel<T>, count - from);
      widen(z, from, some, rows + from * width);
      pack_rows(rows + from * width, width, some, width, T(tau < 0 ? -1 : 1), panels + from * width);
      pack_columns(rows + from * width, some, width, columns + from * kPanel<T>, count);
    });
  }
  // Four groups, or eight, …: as many games a round as there may be threads, of at most 192 views each (AVX2).
  static int64_t group_of(int64_t count) {
    int64_t groups = 4;
    while (count > groups * kLargestGroup) groups *= 2;
    return std::max<int64_t>(kPanel<T>, round_up<int64_t>((count + groups - 1) / groups, kPanel<T>));
  }
  int64_t first(int64_t g) const { return g * group; }
  int64_t last(int64_t g) const { return std::min(count, (g + 1) * group); }
  int64_t positive(int64_t i) const { return (i + count / 2) % count; }

  // body(tile [keys, group] of logits, first key, keys, first query, queries) for all of two groups' views.
  template <typename Body>
  void tiles(int64_t queries_of, int64_t keys_of, T* tile, const Body& body) const {
    const int64_t query = first(queries_of), queries = last(queries_of) - query;
    for (int64_t key = first(keys_of); key < last(keys_of); key += kKeyBlock) {
      const int64_t keys = std::min(kKeyBlock, last(keys_of) - key);
      for (int64_t p = 0; p < queries; p += kPanel<T>)
        multiply<false>(keys, width, Operand<T>{rows + key * width, width, 1}, panels + (query + p) * width, kPanel<T>,
                        tile + p, group);
      body(tile, key, keys, query, queries);
    }
  }
  int64_t tile() const { return kKeyBlock * group; }
  // Calls body(a, b, tile) for every pair a ≤ b of groups, as a tournament.
  template <typename Body>
  void pairs(T* tiles, const Body& body) const {
    tournament(groups, [&](int64_t games, const auto& players) {
      for_tasks(games, 2.0 * games * group * group * width, tiles, tile(), [&](int64_t game, T* tile) {
        const auto [a, b] = players(game);
        if (b < groups) body(a, b, tile);
      });
    });
  }
};

// Σ of 2^(logit − shift) over the negatives of each view, one shift for all: safe where no logit differs from it by more
// than 2^±60.
template <typename T>
void negatives(const Views<T>& z, T shift, T* tiles, T* sums) {
  z.pairs(tiles, [&](int64_t a, int64_t b, T* memory) {
    z.tiles(a, b, memory, [&](T* tile, int64_t key, int64_t keys, int64_t query, int64_t queries) {
      for (int64_t i = 0; i < queries; ++i)
        for (const int64_t other : {z.positive(query + i), query + i})
          if (key <= other && other < key + keys) tile[(other - key) * z.group + i] = T(kLowest);
      T by_query[Views<T>::kLargestGroup] = {};
      const int64_t whole = queries / kLanes<T> * kLanes<T>;
      for (int64_t j = 0; j < keys; ++j) {
        const T* row = tile + j * z.group;
        Vec<T> by_key{};
        for (int64_t i = 0; i < whole; i += kLanes<T>) {
          const Vec<T> weight = exp2(load(row + i) * T(z.scale) - shift);
          by_key += weight;
          store(by_query + i, load(by_query + i) + weight);
        }
        T rest = 0;
        if (whole < queries) {
          const Vec<T> weight = exp2(load(row + whole) * T(z.scale) - shift);
          store(by_query + whole, load(by_query + whole) + weight);
          for (int64_t i = whole; i < queries; ++i) rest += weight[i - whole];
        }
        if (a != b) sums[key + j] += sum<T>(by_key) + rest;
      }
      for (int64_t i = 0; i < queries; ++i) sums[query + i] += by_query[i];
    });
  });
}

// ∂loss/∂z: with p the softmax of a view's logits, and 1 at its positive taken from it, the weight between two views is
// p_ij dloss_i + p_ji dloss_j, the same for both.
template <typename T>
void nt_xent_gradient(const Views<T>& z, const T* shift, const T* shift_rest, const T* upstream, T* tiles, T* sums) {
  const Precise<T> scale(z.scale);
  z.pairs(tiles, [&](int64_t a, int64_t b, T* memory) {
    z.tiles(a, b, memory, [&](T* tile, int64_t key, int64_t keys, int64_t query, int64_t queries) {
      const int64_t lanes = round_up<int64_t>(queries, kLanes<T>);
      for (int64_t j = 0; j < keys; ++j) {
        T* row = tile + j * z.group;
        const Vec<T> key_shift = splat(shift[key + j]), key_rest = splat(shift_rest[key + j]);
        const T key_upstream = upstream[key + j];
        for (int64_t i = 0; i < lanes; i += kLanes<T>) {
          const Vec<T> logit = load(row + i), query_shift = load(shift + query + i);
          const Vec<T> by_query = weight_of<T>(logit, scale, query_shift, load(shift_rest + query + i));
          const Vec<T> by_key = weight_of<T>(logit, scale, key_shift, key_rest);
          store(row + i, by_query * load(upstream + query + i) + by_key * key_upstream);
        }
      }
      for (int64_t i = 0; i < queries; ++i) {
        const int64_t itself = query + i - key, positive = z.positive(query + i) - key;
        if (0 <= positive && positive < keys)
          tile[positive * z.group + i] -= upstream[query + i] + upstream[key + positive];
        if (0 <= itself && itself < keys) tile[itself * z.group + i] = 0;
      }
      for (int64_t c = 0; c < z.padded; c += kPanel<T>) {
        const T* columns = z.columns + c * z.count;
        multiply<true>(queries, keys, Operand<T>{tile, 1, z.group}, columns + key * kPanel<T>, kPanel<T>,
                       sums + query * z.padded + c, z.padded);
        if (a != b)
          multiply<true>(keys, queries, Operand<T>{tile, z.group, 1}, columns + query * kPanel<T>, kPanel<T>,
                         sums + key * z.padded + c, z.padded);
      }
    });
  });
}

// The largest |logit · log2 e / τ| that vectors of this length can have.
template <typename T>
double largest_logit(const Views<T>& z) {
  double square = 0;
  for (int64_t i = 0; i < z.count; ++i) {
    const T* row = z.rows + i * z.width;
    const double own = dot(row, row, z.width);
    square = own <= square ? square : own;  // a NaN stays
  }
  return square * z.scale;
}

std::tuple<Tensor, Tensor> nt_xent_fwd(Tensor z_tensor, Tensor tau_tensor) {
  return with_wide_type(z_tensor, [&](auto type) {
    using T = decltype(type);
    const Matrix z(z_tensor);
    const double tau = value_of(tau_tensor);
    const int64_t tile = torch::stable::get_num_threads() * kKeyBlock * Views<T>::kLargestGroup;
    Tensor loss = empty({z.rows}, kDtype<T>), lse = empty({z.rows}, kDtype<T>);
    const Tensor workspace = empty({Views<T>::size(z.rows, z.width) + tile + z.rows}, kDtype<T>);
    T* memory = data<T>(workspace);
    const Views<T> views(z, tau, memory);
    T *tiles = memory + Views<T>::size(z.rows, z.width), *sums = tiles + tile;
    const double bound = largest_logit(views);
    if (!(bound <= 60)) {
      const Tensor rank = empty({z.rows}, ScalarType::Long);
      info_nce<T>(z, z, {z.rows / 2, z.rows, true}, z, true, tau,
                  {data<T>(loss), data<T>(lse), nullptr, data<int64_t>(rank)});
      return std::make_tuple(loss, lse);
    }
    std::fill(sums, sums + z.rows, T(0));
    negatives(views, T(bound), tiles, sums);
    const double sign = tau < 0 ? -1 : 1;
    for (int64_t i = 0; i < z.rows; ++i) {
      const T *own = views.rows + i * z.width, *other = views.rows + views.positive(i) * z.width;
      const double positive = sign * dot(own, other, z.width) * views.scale, shift = double(T(bound));
      const double value = std::log1p(sums[i] * std::exp2(shift - positive));  // at most 2^120 times as large
      data<T>(loss)[i] = T(value);
      data<T>(lse)[i] = T(value + positive * kLn2);
    }
    return std::make_tuple(loss, lse);
  });
}

Tensor nt_xent_bwd(Tensor z_tensor, Tensor tau_tensor, Tensor lse, Tensor dloss) {
  return with_wide_type(lse, [&](auto type) {
    using T = decltype(type);
    const Matrix z(z_tensor);
    const double tau = value_of(tau_tensor);
    const int64_t tile = torch::stable::get_num_threads() * kKeyBlock * Views<T>::kLargestGroup;
    const int64_t lanes = z.rows + kGroup<T>, padded = panels_of<T>(z.width) * kPanel<T>;
    Tensor dz = empty({z.rows, z.width}, kDtype<T>);
    const bool in_place = padded == z.width;
    const Tensor workspace = empty(
        {Views<T>::size(z.rows, z.width) + tile + 3 * lanes + (in_place ? 0 : z.rows * padded)}, kDtype<T>);
    T* memory = data<T>(workspace);
    const Views<T> views(z, tau, memory);
    T *tiles = memory + Views<T>::size(z.rows, z.width), *shift = tiles + tile, *shift_rest = shift + lanes;
    T *upstream = shift_rest + lanes, *sums = in_place ? data<T>(dz) : upstream + lanes;
    std::fill(shift, shift + 3 * lanes, T(0));
    for (int64_t i = 0; i < z.rows; ++i) {
      const Precise<T> precise(double(data<T>(lse)[i * lse.stride(0)]) * kLog2E);
      shift[i] = precise.main;
      shift_rest[i] = precise.rest;
      upstream[i] = data<T>(dloss)[i * dloss.stride(0)] * T(1 / tau);
    }
    std::fill(sums, sums + z.rows * padded, T(0));
    nt_xent_gradient(views, shift, shift_rest, upstream, tiles, sums);
    for (int64_t i = 0; !in_place && i < z.rows; ++i)
      std::copy(sums + i * padded, sums + i * padded + z.width, data<T>(dz) + i * z.width);
    return dz;
  });
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("info_nce_fwd", TORCH_BOX(&fastssl::info_nce_fwd));
  m.impl("batch_info_nce_fwd", TORCH_BOX(&fastssl::batch_info_nce_fwd));
  m.impl("batch_info_nce_dkeys", TORCH_BOX(&fastssl::batch_info_nce_dkeys));
  m.impl("nt_xent_fwd", TORCH_BOX(&fastssl::nt_xent_fwd));
  m.impl("nt_xent_bwd", TORCH_BOX(&fastssl::nt_xent_bwd));
}
