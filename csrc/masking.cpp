// MAE's masking: ranking random noise, gathering the kept tokens, and restoring the order with mask tokens.
//
// All kernels but the ranking move rows and are bound by memory bandwidth: each row is read once and written once, in
// the order of the output. So no buffer is zeroed for a scatter, no index is expanded to the width of a row, and no two
// threads write the same row.
#include "rows.h"

#include <array>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>

namespace fastssl {
namespace {

// ---- Ranks of the noise

template <typename T>
using SortKey = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;

// An integer key in the order of the noise: -0.0 and 0.0 are equal, all NaN are equal and last. Key + 1 does not
// overflow.
template <typename W>
inline SortKey<W> sort_key(W noise) {
  using K = SortKey<W>;
  constexpr K kLast = std::numeric_limits<K>::max();
  const K bits = std::bit_cast<K>(noise + W(0));  // -0.0 + 0.0 is 0.0
  return noise != noise ? kLast - 1 : bits < 0 ? K(bits ^ kLast) : bits;
}

// The results of one sample.
struct MaskingOutputs {
  int64_t *ids_keep, *ids_masked, *ids_restore;
  float* mask;
  int64_t keep;

  void place(int64_t token, int64_t rank) const {
    const bool masked = rank >= keep;
    *(masked ? ids_masked + (rank - keep) : ids_keep + rank) = token;
    ids_restore[token] = rank;
    mask[token] = masked;
  }
};

// Ranks by counting: a token's rank is the number of tokens with smaller noise, or equal noise and smaller index. Lanes
// are tokens, kCounted of them at a time; `keys` must be readable up to a multiple of kCounted.
template <typename K>
constexpr int kCounted = 4 * kLanes<K>;

// The longest row that is ranked by counting, in O(length²). Longer rows are sorted, which is faster (measured with and
// without AVX2, in float and double).
template <typename K>
constexpr int64_t kLongestCounted = 32 * kLanes<K>;

template <typename K>
void rank_by_counting(const K* keys, int64_t length, const MaskingOutputs& outputs) {
  constexpr int kLane = kLanes<K>, kVectors = kCounted<K> / kLane;
  Vec<K> lane;
  for (int i = 0; i < kLane; ++i) lane[i] = i;
  for (int64_t first = 0; first < length; first += kCounted<K>) {
    Vec<K> key[kVectors], rank[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      key[v] = load(keys + first + v * kLane) + 1;  // +1: equal noise of an earlier token also counts
      rank[v] = Vec<K>{};
    }
    const int64_t end = std::min(first + kCounted<K>, length);
    for (int64_t j = 0; j < first; ++j)
      for (int v = 0; v < kVectors; ++v) rank[v] -= key[v] > keys[j];  // true is -1
    for (int64_t j = first; j < end; ++j)
      for (int v = 0; v < kVectors; ++v) {
        const Vec<K> is_not_before = lane <= splat(K(j - first - v * kLane));
        rank[v] -= key[v] + is_not_before > keys[j];
      }
    for (int v = 0; v < kVectors; ++v) key[v] -= 1;
    for (int64_t j = end; j < length; ++j)
      for (int v = 0; v < kVectors; ++v) rank[v] -= key[v] > keys[j];
    K ranks[kCounted<K>];
    for (int v = 0; v < kVectors; ++v) store(ranks + v * kLane, rank[v]);
    for (int64_t i = first; i < end; ++i) outputs.place(i, ranks[i - first]);
  }
}

template <typename K>
struct RankedToken {
  std::make_unsigned_t<K> key;  // in the order of the signed key
  int64_t token;

  int byte(int n) const { return key >> (8 * n) & 255; }
};

// Ranks by a radix sort, byte by byte from the lowest: stable, and as fast for any distribution.
template <typename K>
void rank_by_sorting(const K* keys, int64_t length, std::vector<RankedToken<K>>& tokens,
                     std::vector<RankedToken<K>>& buffer, const MaskingOutputs& outputs) {
  constexpr int kBytes = sizeof(K);
  std::array<std::array<int64_t, 256>, kBytes> starts{};
  for (int64_t i = 0; i < length; ++i) {
    tokens[i] = {std::make_unsigned_t<K>(keys[i] ^ std::numeric_limits<K>::min()), i};
    for (int n = 0; n < kBytes; ++n) ++starts[n][tokens[i].byte(n)];
  }
  for (int n = 0; n < kBytes; ++n) {
    if (starts[n][tokens[0].byte(n)] == length) continue;  // all keys have this byte in common, as with bfloat16 noise
    int64_t offset = 0;
    for (int64_t& start : starts[n]) offset += std::exchange(start, offset);
    for (const RankedToken<K>& token : tokens) buffer[starts[n][token.byte(n)]++] = token;
    std::swap(tokens, buffer);
  }
  for (int64_t rank = 0; rank < length; ++rank) outputs.place(tokens[rank].token, rank);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> random_masking(Tensor noise, int64_t keep) {
  const int64_t batch = noise.size(0), length = noise.size(1);
  Tensor ids_keep = empty({batch, keep}, ScalarType::Long);
  Tensor ids_masked = empty({batch, length - keep}, ScalarType::Long);
  Tensor ids_restore = empty({batch, length}, ScalarType::Long), mask = empty({batch, length}, ScalarType::Float);
  const MaskingOutputs outputs{
      static_cast<int64_t*>(ids_keep.mutable_data_ptr()), static_cast<int64_t*>(ids_masked.mutable_data_ptr()),
      static_cast<int64_t*>(ids_restore.mutable_data_ptr()), static_cast<float*>(mask.mutable_data_ptr()), keep};
  with_float_type(noise.scalar_type(), "random_masking: noise", [&](auto type) {
    using T = decltype(type);
    using K = SortKey<T>;
    const T* values = static_cast<const T*>(noise.const_data_ptr());
    const int64_t batch_stride = noise.stride(0), stride = noise.stride(1);
    const bool counted = length <= kLongestCounted<K>;
    torch::stable::parallel_for(0, batch, grain(8 * length), [&](int64_t begin, int64_t end) {
      std::vector<K> keys(round_up<int64_t>(length, kCounted<K>));
      std::vector<RankedToken<K>> tokens(counted ? 0 : length), buffer(counted ? 0 : length);
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t i = 0; i < length; ++i) keys[i] = sort_key(to_float(values[b * batch_stride + i * stride]));
        const MaskingOutputs sample{outputs.ids_keep + b * keep, outputs.ids_masked + b * (length - keep),
                                    outputs.ids_restore + b * length, outputs.mask + b * length, keep};
        if (counted)
          rank_by_counting(keys.data(), length, sample);
        else
          rank_by_sorting(keys.data(), length, tokens, buffer, sample);
      }
    });
  });
  return {ids_keep, ids_masked, ids_restore, mask};
}

// ---- Rows of tokens

ScalarType promoted(ScalarType a, ScalarType b) {
  if (a == b) return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// True where every value of S is representable in O, which holds for promoted dtypes.
template <typename S, typename O>
constexpr bool kRepresentable =
    std::is_same_v<S, O> || std::is_same_v<O, double> || (std::is_same_v<O, float> && !std::is_same_v<S, double>);

// Calls body(S{}, O{}) with the types of the source and of the dtype it is promoted to.
template <typename Body>
void with_promoted_types(ScalarType source, ScalarType output, const Body& body) {
  with_float_type(source, "tokens", [&](auto s) {
    using S = decltype(s);  // not in the inner lambda, where GCC 12 makes decltype(s) const
    with_float_type(output, "tokens", [&](auto o) {
      if constexpr (kRepresentable<S, decltype(o)>) body(S{}, o);
    });
  });
}

// src + pos, added in the compute type and rounded once, as torch does; src alone if pos is null.
template <typename S, typename O>
void add_position(O* out, const S* src, int64_t column_stride, const O* pos, int64_t width) {
  using W = ComputeType<O>;
  if constexpr (std::is_same_v<S, O>)
    if (!pos) return copy_row(out, src, column_stride, width);
  int64_t d = 0;
  if constexpr (std::is_same_v<W, ComputeType<S>>)
    if (column_stride == 1)
      for (; d + kLanes<W> <= width; d += kLanes<W>)
        store_narrow(out + d, pos ? load_wide(src + d) + load_wide(pos + d) : load_wide(src + d));
  for (; d < width; ++d) {
    const W value = to_float(src[d * column_stride]);
    out[d] = from_float<O>(pos ? value + to_float(pos[d]) : value);
  }
}

// pos [N, D] in the output's dtype with contiguous rows, because it is read once per sample.
Tensor converted_positions(const Tensor& pos, ScalarType dtype) {
  const bool is_converted = pos.scalar_type() == dtype && pos.stride(1) == 1;
  return is_converted ? pos : as_contiguous(as_dtype(pos, dtype));
}

Tensor keep_tokens_fwd(Tensor x, Tensor ids_keep, std::optional<Tensor> pos) {
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(2), kept = ids_keep.size(1);
  const Ids ids(ids_keep, "keep_tokens: ids_keep", length);
  const ScalarType dtype = pos ? promoted(x.scalar_type(), pos->scalar_type()) : x.scalar_type();
  Tensor out = empty({batch, kept, width}, dtype);
  if (out.numel() == 0) return out;
  if (pos) pos = converted_positions(*pos, dtype);
  with_promoted_types(x.scalar_type(), dtype, [&](auto source, auto output) {
    using S = decltype(source);
    using O = decltype(output);
    const Rows<S> tokens(x);
    const Rows<O> rows(out), positions(pos ? *pos : out);
    torch::stable::parallel_for(0, batch * kept, grain(width), [&](int64_t begin, int64_t end) {
      std::vector<O> scratch(prefers_non_temporal(out) ? width : 0);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / kept, m = i % kept, l = ids(b, m);
        const O* position = pos ? positions.row(0, l) : nullptr;
        write_row(rows.row(b, m), width, scratch,
                  [&](O* row) { add_position(row, tokens.row(b, l), tokens.column_stride, position, width); });
      }
      fence_non_temporal();
    });
  });
  return out;
}

// The rows that were gathered from each place. A place has one row or none, unless ids are repeated.
struct Sources {
  std::vector<int64_t> first, next;  // first row of a place, and the row after another of the same place; -1 for none

  Sources(int64_t places, int64_t rows) : first(places), next(rows) {}
  void clear() { std::fill(first.begin(), first.end(), -1); }
  void add(int64_t place, int64_t row) { next[row] = std::exchange(first[place], row); }
};

// Sums the rows of sample b that were gathered from `place`: nearly always a copy of one row, or zeros.
template <typename T>
void sum_sources(T* dst, const Rows<T>& src, int64_t b, const Sources& sources, int64_t place, int64_t width) {
  const int64_t first = sources.first[place];
  if (first < 0) {
    std::memset(static_cast<void*>(dst), 0, width * sizeof(T));
  } else if (sources.next[first] < 0) {
    copy_row<T>(dst, src.row(b, first), src.column_stride, width);
  } else {
    for (int64_t d = 0; d < width; ++d) {
      double sum = 0;
      for (int64_t row = first; row >= 0; row = sources.next[row])
        sum += to_float(src.row(b, row)[d * src.column_stride]);
      dst[d] = from_float<T>(sum);
    }
  }
}

Tensor keep_tokens_bwd(Tensor dkept, Tensor ids_keep, int64_t length) {
  const int64_t batch = dkept.size(0), kept = dkept.size(1), width = dkept.size(2);
  const Ids ids(ids_keep, "keep_tokens: ids_keep", length);
  Tensor dx = empty({batch, length, width}, dkept.scalar_type());
  if (dx.numel() == 0) return dx;
  with_float_type(dkept.scalar_type(), "keep_tokens: the gradient", [&](auto type) {
    using T = decltype(type);
    const Rows<T> src(dkept), dst(dx);
    torch::stable::parallel_for(0, batch * length, grain(width), [&](int64_t begin, int64_t end) {
      Sources sources(length, kept);
      std::vector<T> scratch(prefers_non_temporal(dx) ? width : 0);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / length, l = i % length;
        if (i == begin || l == 0) {
          sources.clear();
          for (int64_t m = 0; m < kept; ++m) sources.add(ids(b, m), m);
        }
        write_row(dst.row(b, l), width, scratch, [&](T* row) { sum_sources(row, src, b, sources, l, width); });
      }
      fence_non_temporal();
    });
  });
  return dx;
}

Tensor restore_tokens_fwd(Tensor x, Tensor mask_token, Tensor ids_restore, std::optional<Tensor> pos, int64_t prefix) {
  const int64_t batch = x.size(0), kept = x.size(1) - prefix, width = x.size(2), length = ids_restore.size(1);
  const Ids ids(ids_restore, "restore_tokens: ids_restore", length);
  ScalarType dtype = promoted(x.scalar_type(), mask_token.scalar_type());
  if (pos) dtype = promoted(dtype, pos->scalar_type());
  Tensor out = empty({batch, prefix + length, width}, dtype);
  if (out.numel() == 0) return out;
  if (pos) pos = converted_positions(*pos, dtype);
  mask_token = as_contiguous(as_dtype(mask_token, dtype));
  with_promoted_types(x.scalar_type(), dtype, [&](auto source, auto output) {
    using S = decltype(source);
    using O = decltype(output);
    const Rows<S> tokens(x);
    const Rows<O> rows(out), positions(pos ? *pos : out);
    const O* mask_row = static_cast<const O*>(mask_token.const_data_ptr());
    torch::stable::parallel_for(0, batch * (prefix + length), grain(width), [&](int64_t begin, int64_t end) {
      std::vector<O> scratch(prefers_non_temporal(out) ? width : 0);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / (prefix + length), t = i % (prefix + length);
        const int64_t place = t < prefix ? t - prefix : ids(b, t - prefix);  // position in x after its prefix
        const O* position = pos ? positions.row(0, t) : nullptr;
        write_row(rows.row(b, t), width, scratch, [&](O* row) {
          if (place < kept)
            add_position(row, tokens.row(b, prefix + place), tokens.column_stride, position, width);
          else
            add_position(row, mask_row, 1, position, width);
        });
      }
      fence_non_temporal();
    });
  });
  return out;
}

constexpr int kRowsAtOnce = 8;       // rows added at a time, with one load and one store of the sums
constexpr int64_t kMaxGroups = 256;  // groups of samples with separate sums, whatever the number of threads

// Adds N rows to `sums`, in double: the gradients of an image nearly cancel, so float would leave rounding errors.
template <int N, typename T>
void add_rows(const T* const* rows, int64_t column_stride, double* sums, int64_t width) {
  constexpr int kVector = kLanes<ComputeType<T>>;
  using Doubles = VecOf<double, kVector * sizeof(double)>;
  int64_t d = 0;
  if (column_stride == 1)
    for (; d + kVector <= width; d += kVector) {
      auto* dst = reinterpret_cast<typename Doubles::unaligned*>(sums + d);
      typename Doubles::type total = *dst;
#pragma GCC unroll 8
      for (int r = 0; r < N; ++r) total += __builtin_convertvector(load_wide(rows[r] + d), typename Doubles::type);
      *dst = total;
    }
  for (; d < width; ++d)
    for (int r = 0; r < N; ++r) sums[d] += to_float(rows[r][d * column_stride]);
}

// Gradients of one sample's tokens, and the sum of the gradients of its mask tokens.
template <typename T>
struct RestoreBackward {
  Rows<T> dout, dx;
  const Ids& ids;
  int64_t length, prefix, kept, width;

  // `sources` is scratch: the rows of dout for each row of dx.
  void sample(int64_t b, Sources& sources, double* sums) const {
    const T* masked_rows[kRowsAtOnce];
    int pending = 0;
    sources.clear();
    for (int64_t t = 0; t < prefix; ++t) sources.add(t, t);
    for (int64_t l = 0; l < length; ++l) {
      const int64_t place = ids(b, l);
      if (place < kept) {
        sources.add(prefix + place, prefix + l);
      } else {
        masked_rows[pending++] = dout.row(b, prefix + l);
        if (pending == kRowsAtOnce) add_rows<kRowsAtOnce>(masked_rows, dout.column_stride, sums, width), pending = 0;
      }
    }
    for (int h = 0; h < pending; ++h) add_rows<1>(masked_rows + h, dout.column_stride, sums, width);
    for (int64_t t = 0; t < prefix + kept; ++t) sum_sources(dx.row(b, t), dout, b, sources, t, width);
  }
};

std::tuple<Tensor, Tensor> restore_tokens_bwd(Tensor dout, Tensor ids_restore, int64_t prefix, int64_t kept) {
  const int64_t batch = dout.size(0), width = dout.size(2), length = ids_restore.size(1);
  const Ids ids(ids_restore, "restore_tokens: ids_restore", length);
  const ScalarType dtype = dout.scalar_type();
  const int64_t groups = std::min(batch, kMaxGroups), group_size = groups ? (batch + groups - 1) / groups : 0;
  Tensor dx = empty({batch, prefix + kept, width}, dtype);
  Tensor dmask_token = empty({width}, promoted(dtype, ScalarType::Float));
  if (width == 0) return {dx, dmask_token};
  with_float_type(dtype, "restore_tokens: dout", [&](auto type) {
    using T = decltype(type);
    using W = ComputeType<T>;
    const RestoreBackward<T> restore_backward{Rows<T>(dout), Rows<T>(dx), ids, length, prefix, kept, width};
    std::vector<double> sums(std::max<int64_t>(groups, 1) * width);
    torch::stable::parallel_for(0, groups, grain(group_size * length * width), [&](int64_t begin, int64_t end) {
      Sources sources(prefix + kept, prefix + length);
      for (int64_t g = begin; g < end; ++g)
        for (int64_t b = g * group_size; b < std::min((g + 1) * group_size, batch); ++b)
          restore_backward.sample(b, sources, sums.data() + g * width);
    });
    for (int64_t g = 1; g < groups; ++g)
      for (int64_t d = 0; d < width; ++d) sums[d] += sums[g * width + d];
    std::copy_n(sums.data(), width, static_cast<W*>(dmask_token.mutable_data_ptr()));
  });
  return {dx, dmask_token};
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("random_masking", TORCH_BOX(&fastssl::random_masking));
  m.impl("keep_tokens_fwd", TORCH_BOX(&fastssl::keep_tokens_fwd));
  m.impl("keep_tokens_bwd", TORCH_BOX(&fastssl::keep_tokens_bwd));
  m.impl("restore_tokens_fwd", TORCH_BOX(&fastssl::restore_tokens_fwd));
  m.impl("restore_tokens_bwd", TORCH_BOX(&fastssl::restore_tokens_bwd));
}
