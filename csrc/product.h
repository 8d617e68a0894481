// Large matrix products: both matrices are packed into panels, blocks of the result are tasks.
//
// C[M, N] = A[M, depth] B[depth, N]. A micro-kernel holds kRows x kPanel sums in registers; for each step into the depth
// it reads kRows values of A, which it broadcasts, and a panel's row of B. With AVX-512's bf16 dot product a step is a
// pair of values, which doubles the rate. The depth is cut into chunks that are summed apart, since short sums round less
// than one long chain, and so that what a block reads again stays in the L2 cache.
//
// Packing changes what it reads: it widens, rounds to bf16 pairs, applies GELU. So neither a cast of a weight nor the
// result of an activation is ever written to memory as a matrix.
#pragma once

#include "gelu.h"
#include "gemm.h"
#include "pairs.h"
#include "rows.h"

namespace fastssl {

template <typename P>
constexpr int64_t kDeep = std::is_same_v<P, Pair> ? 2 : 1;  // values of the depth in a packed element

#if defined(FASTSSL_PAIRS)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// How dtype S is multiplied.
template <typename S>
using Packed = std::conditional_t<kHasPairs && std::is_same_v<S, BFloat16>, Pair, Wide<S>>;

constexpr int64_t kBlockRows = 96, kBlockColumns = 256;  // of the result: sums of 98 kB
template <typename P>
constexpr int64_t kChunk = std::is_same_v<P, Pair> ? 256 : 128;  // steps: a block's chunk of A has at most 98 kB

template <typename P>
int64_t steps_of(int64_t depth) {
  return (depth + kDeep<P> - 1) / kDeep<P>;
}

// A packed: element (row, step) at data[row / kRows * panel + row % kRows * row_stride + step * step_stride].
template <typename P>
struct Left {
  const P* data;
  int64_t panel, row_stride, step_stride;
  const P* at(int64_t row, int64_t step) const { return data + row / kRows * panel + step * step_stride; }
};

// Runs finish(row, column, rows, columns, sums, stride) for every block of the product A B, where b is packed in panels
// [N / kPanel][steps][kPanel].
template <typename P, typename Finish>
void product(int64_t rows, int64_t columns, int64_t steps, Left<P> a, const P* b, const Finish& finish) {
  using T = Sum<P>;
  const int64_t across = (columns + kBlockColumns - 1) / kBlockColumns, down = (rows + kBlockRows - 1) / kBlockRows;
  const Tensor workspace = empty({torch::stable::get_num_threads() * kBlockRows * kBlockColumns}, kDtype<T>);
  for_tasks(across * down, 2.0 * rows * columns * steps, data<T>(workspace), kBlockRows * kBlockColumns,
            [&](int64_t task, T* sums) {
              const int64_t row = task / across * kBlockRows, column = task % across * kBlockColumns;
              const int64_t high = std::min(kBlockRows, rows - row), wide = std::min(kBlockColumns, columns - column);
              for (int64_t step = 0; step < steps; step += kChunk<P>)
                for (int64_t j = 0; j < wide; j += kPanel<T>) {
                  const P* panel = b + (column + j) * steps + step * kPanel<T>;
                  const auto multiply_rows = step ? tile_of<kRows, 2, true, P> : tile_of<kRows, 2, false, P>;
                  for (int64_t i = 0; i < high; i += kRows)
                    multiply_rows(std::min<int64_t>(kRows, high - i), std::min(kChunk<P>, steps - step),
                                  a.at(row + i, step), a.row_stride, a.step_stride, panel, kPanel<T>,
                                  sums + i * kBlockColumns + j, kBlockColumns);
                }
              finish(row, column, high, wide, sums, kBlockColumns);
            });
}

// What packing does to each value.
template <typename T>
struct Change {
  bool gelu = false, round = false;  // round: to bfloat16
  Vec<T> operator()(Vec<T> x) const {
    if constexpr (std::is_same_v<T, float>)
      if (round) x = Vec<float>(bfloat16_bits(x) << 16);
    return gelu ? fastssl::gelu(x) : x;
  }
};

// The same of two vectors whose values become pairs, which rounds them.
inline Vec<Pair> changed_pairs(Change<float> change, Vec<float> first, Vec<float> second) {
#if defined(FASTSSL_PAIRS)
  return change.gelu ? narrow_pairs(gelu_rounded(first), gelu_rounded(second)) : narrow_pairs(first, second);
#else
  return bfloat16_bits(change(first)) | bfloat16_bits(change(second)) << 16;
#endif
}

inline void store_changed(Change<float> change, Vec<float> x, BFloat16* to) {
#if defined(FASTSSL_PAIRS)
  const __m256bh narrow = _mm512_cvtneps_pbh(__m512(change.gelu ? gelu_rounded(x) : x));
  std::memcpy(to, &narrow, sizeof narrow);
#else
  store_narrow(to, change(x));
#endif
}

// Length of a packed row whose depth lies side by side: whole vectors, and no power of two, whose rows would share sets
// of the L1 cache.
template <typename P>
int64_t row_of(int64_t depth) {
  return round_up<int64_t>(steps_of<P>(depth), 16) + 16;
}

// `depth` values side by side, packed; zeros up to a whole vector.
template <typename P, typename S>
void pack_row(const S* from, int64_t depth, Change<Sum<P>> change, P* to) {
  using T = Sum<P>;
  if (std::is_same_v<P, Pair> && std::is_same_v<S, BFloat16> && !change.gelu) {
    std::memcpy(to, from, depth * sizeof(S));
    std::memset(reinterpret_cast<BFloat16*>(to) + depth, 0, (round_up<int64_t>(depth, kLanes<T>) - depth) * sizeof(S));
    return;
  }
  for (int64_t d = 0; d < depth; d += kLanes<T>) {
    const Vec<T> x = load_part<T>(from + d, depth - d);
    if constexpr (std::is_same_v<P, Pair>)
      store_changed(change, x, reinterpret_cast<BFloat16*>(to) + d);
    else
      store(to + d, change(x));
  }
}

// True where rows of A can be multiplied where they lie: whole packed elements, as they are, and not a multiple of 4 kB
// apart, for such rows share sets of the L1 cache.
template <typename P, typename S>
bool lies_packed(int64_t stride, int64_t depth, Change<Sum<P>> change) {
  constexpr bool kSame = std::is_same_v<P, S> || (std::is_same_v<P, Pair> && std::is_same_v<S, BFloat16>);
  const bool whole = depth % kDeep<P> == 0 && stride % kDeep<P> == 0;
  return kSame && whole && !change.gelu && !change.round && stride * int64_t(sizeof(S)) % 4096 != 0;
}

// A from rows whose depth lies side by side: [rows, depth]. What needs no packing stays where it is.
template <typename P, typename S>
Left<P> pack_left(const S* from, int64_t from_stride, int64_t rows, int64_t depth, Change<Sum<P>> change, P* to) {
  if (lies_packed<P, S>(from_stride, depth, change)) {
    const int64_t step = from_stride / kDeep<P>;
    return {reinterpret_cast<const P*>(from), kRows * step, step, 1};
  }
  const int64_t stride = row_of<P>(depth);
  torch::stable::parallel_for(0, rows, grain(depth), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) pack_row(from + r * from_stride, depth, change, to + r * stride);
  });
  return {to, kRows * stride, stride, 1};
}

// B from its transpose, whose depth lies side by side: [columns, depth] -> [columns / kPanel][steps][kPanel].
template <typename P, typename S>
void pack_right(const S* from, int64_t from_stride, int64_t columns, int64_t depth, Change<Sum<P>> change, P* to) {
  using T = Sum<P>;
  constexpr int64_t n = kLanes<T>;
  const int64_t steps = steps_of<P>(depth), stride = row_of<P>(depth);
  const Tensor workspace = empty({torch::stable::get_num_threads() * n * stride}, kDtype<T>);
  for_tasks(panels_of<T>(columns), 1e9, data<T>(workspace), n * stride, [&](int64_t panel, T* rows) {
    for (int64_t lane = 0; lane < kPanel<T>; lane += n) {
      const int64_t first = panel * kPanel<T> + lane;
      for (int64_t i = 0; i < n; ++i)
        if (first + i < columns)
          pack_row(from + (first + i) * from_stride, depth, change, reinterpret_cast<P*>(rows + i * stride));
        else
          std::fill(rows + i * stride, rows + (i + 1) * stride, T(0));
      T* panel_rows = reinterpret_cast<T*>(to) + panel * steps * kPanel<T> + lane;
      for (int64_t s = 0; s < steps; s += n) {
        Vec<T> square[n];
        for (int64_t i = 0; i < n; ++i) square[i] = load(rows + i * stride + s);
        transpose<T>(square);
        for (int64_t i = 0; i < std::min(n, steps - s); ++i) store(panel_rows + (s + i) * kPanel<T>, square[i]);
      }
    }
  });
}

// Pairs of values that are bfloat16.
inline Vec<Pair> exact_pairs(Vec<float> first, Vec<float> second) { return Vec<Pair>(first) >> 16 | Vec<Pair>(second); }

// A step of up to kLaneGroup lanes from one row of the depth, or from the two of a pair, packed; added to `sums` as they
// were.
constexpr int64_t kLaneGroup = 96;  // whole panels of any width
template <typename P, typename S>
inline void pack_step(const S* first, const S* second, int64_t lanes, Change<Sum<P>> change, P* to, Vec<Sum<P>>* sums) {
  using T = Sum<P>;
#pragma GCC unroll 6
  for (int64_t lane = 0; lane < kLaneGroup; lane += kLanes<T>) {
    if (lane >= lanes) break;
    const Vec<T> x = load_part<T>(first + lane, lanes - lane);
    Vec<T> y{};
    if constexpr (std::is_same_v<P, Pair>) {
      if (second) y = load_part<T>(second + lane, lanes - lane);
      const bool exact = std::is_same_v<S, BFloat16> && !change.gelu;
      store(to + lane, exact ? exact_pairs(x, y) : changed_pairs(change, x, y));
    } else {
      store(to + lane, change(x));
    }
    sums[lane / kLanes<T>] += x + y;
  }
}

// Either matrix from rows in which its lanes lie side by side, [depth, lanes] -> [lanes / kWidth][steps][kWidth]: A with
// kWidth = kRows, B with kPanel. `totals`, where given, gets the sum of each lane over the depth. Threads share the depth
// and not the lanes, so that each reads whole rows.
template <int kWidth, typename P, typename S>
void pack_lanes(const S* from, int64_t from_stride, int64_t lanes, int64_t depth, Change<Sum<P>> change, P* to,
                double* totals = nullptr) {
  using T = Sum<P>;
  constexpr int64_t kVectors = kLaneGroup / kLanes<T>;
  constexpr int64_t kSteps = 16;  // packed before they are dealt out to panels: what was just stored is slow to load
  const int64_t steps = steps_of<P>(depth), parts = (steps + kSteps - 1) / kSteps;
  const Tensor sums_of_parts = empty({totals ? parts * lanes : 0}, kDtype<T>);
  T* part_sums = data<T>(sums_of_parts);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    P rows[kSteps][kLaneGroup] = {};
    for (int64_t part = begin; part < end; ++part) {
      const int64_t step = part * kSteps, some = std::min(kSteps, steps - step);
      for (int64_t first = 0; first < lanes; first += kLaneGroup) {
        const int64_t here = std::min(kLaneGroup, lanes - first);
        Vec<T> sums[kVectors] = {};
        for (int64_t s = 0; s < some; ++s) {
          const int64_t d = (step + s) * kDeep<P>;
          const S* row = from + d * from_stride + first;
          const S* next = d + 1 < depth ? row + from_stride : nullptr;
          if (here == kLaneGroup && next)  // nearly always: the compiler then knows how many, and unrolls
            pack_step<P>(row, row + from_stride, kLaneGroup, change, rows[s], sums);
          else
            pack_step<P>(row, next, here, change, rows[s], sums);
        }
        for (int64_t lane = 0; totals && lane < here; lane += kLanes<T>)
          store_part<T>(part_sums + part * lanes + first + lane, sums[lane / kLanes<T>], here - lane);
        for (int64_t lane = 0; lane < here; lane += kWidth)
          for (int64_t s = 0; s < some; ++s)
            std::memcpy(to + (first + lane) * steps + (step + s) * kWidth, rows[s] + lane, kWidth * sizeof(P));
      }
    }
  });
  if (totals) {
    std::fill(totals, totals + lanes, 0.0);
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t lane = 0; lane < lanes; ++lane) totals[lane] += part_sums[part * lanes + lane];
  }
}

}  // namespace fastssl
