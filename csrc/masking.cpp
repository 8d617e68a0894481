// MAE's masking: which tokens stay, taking them out, and putting them back in their places.
//
// All but the ranking is moving rows, bound by memory bandwidth, so each row is read once and written once, in the
// order of the output: no zeroed buffer to scatter into, no index written out for every value, and no two threads that
// write the same row.
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
using Key = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;

// An integer in the order of the noise: -0.0 equal to 0.0, all NaN equal and last, and one more never overflows.
template <typename W>
inline Key<W> key_of(W noise) {
  using K = Key<W>;
  constexpr K kLast = std::numeric_limits<K>::max();
  const K bits = std::bit_cast<K>(noise + W(0));  // -0.0 + 0.0 is 0.0
  return noise != noise ? kLast - 1 : bits < 0 ? K(bits ^ kLast) : bits;
}

// Where row b of the results is written, token by token.
struct MaskingRow {
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

// A token's rank is how many stand before it: those of smaller noise, and of equal noise those of smaller index. Tokens
// lie in the lanes; `keys` is readable to the next multiple of kCounted.
template <typename K>
constexpr int kCounted = 4 * kLanes<K>;

// Longer rows are sorted. Measured on AVX2 and on its absence, in float and double: both are level about here.
template <typename K>
constexpr int64_t kLongestCounted = 32 * kLanes<K>;

template <typename K>
void rank_by_counting(const K* keys, int64_t length, const MaskingRow& row) {
  constexpr int kLane = kLanes<K>, kVectors = kCounted<K> / kLane;
  Vec<K> lane;
  for (int i = 0; i < kLane; ++i) lane[i] = i;
  for (int64_t first = 0; first < length; first += kCounted<K>) {
    Vec<K> key[kVectors], rank[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      key[v] = load(keys + first + v * kLane) + 1;  // tokens before these also count where they are equal
      rank[v] = Vec<K>{};
    }
    const int64_t end = std::min(first + kCounted<K>, length);
    for (int64_t j = 0; j < first; ++j)
      for (int v = 0; v < kVectors; ++v) rank[v] -= key[v] > keys[j];  // true is -1
    for (int64_t j = first; j < end; ++j)
      for (int v = 0; v < kVectors; ++v) {
        const Vec<K> not_before = lane <= splat(K(j - first - v * kLane));
        rank[v] -= key[v] + not_before > keys[j];
      }
    for (int v = 0; v < kVectors; ++v) key[v] -= 1;
    for (int64_t j = end; j < length; ++j)
      for (int v = 0; v < kVectors; ++v) rank[v] -= key[v] > keys[j];
    K ranks[kCounted<K>];
    for (int v = 0; v < kVectors; ++v) store(ranks + v * kLane, rank[v]);
    for (int64_t i = first; i < end; ++i) row.place(i, ranks[i - first]);
  }
}

template <typename K>
struct Ranked {
  std::make_unsigned_t<K> key;  // in the same order as the signed one
  int64_t token;

  int byte(int n) const { return key >> (8 * n) & 255; }
};

// Radix sort, byte by byte from the lowest: keeps the order of equal keys and does not depend on the distribution.
template <typename K>
void rank_by_sorting(const K* keys, int64_t length, std::vector<Ranked<K>>& from, std::vector<Ranked<K>>& to,
                     const MaskingRow& row) {
  constexpr int kBytes = sizeof(K);
  std::array<std::array<int64_t, 256>, kBytes> starts{};
  for (int64_t i = 0; i < length; ++i) {
    from[i] = {std::make_unsigned_t<K>(keys[i] ^ std::numeric_limits<K>::min()), i};
    for (int n = 0; n < kBytes; ++n) ++starts[n][from[i].byte(n)];
  }
  for (int n = 0; n < kBytes; ++n) {
    if (starts[n][from[0].byte(n)] == length) continue;  // the same in all keys, as in bfloat16 noise
    int64_t before = 0;
    for (int64_t& start : starts[n]) before += std::exchange(start, before);
    for (const Ranked<K>& token : from) to[starts[n][token.byte(n)]++] = token;
    std::swap(from, to);
  }
  for (int64_t rank = 0; rank < length; ++rank) row.place(from[rank].token, rank);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> random_masking(Tensor noise, int64_t keep) {
  const int64_t batch = noise.size(0), length = noise.size(1);
  Tensor ids_keep = empty({batch, keep}, ScalarType::Long);
  Tensor ids_masked = empty({batch, length - keep}, ScalarType::Long);
  Tensor ids_restore = empty({batch, length}, ScalarType::Long), mask = empty({batch, length}, ScalarType::Float);
  const MaskingRow first{static_cast<int64_t*>(ids_keep.mutable_data_ptr()),
                         static_cast<int64_t*>(ids_masked.mutable_data_ptr()),
                         static_cast<int64_t*>(ids_restore.mutable_data_ptr()),
                         static_cast<float*>(mask.mutable_data_ptr()), keep};
  with_float_type(noise.scalar_type(), "random_masking: noise", [&](auto type) {
    using T = decltype(type);
    using K = Key<T>;
    const T* values = static_cast<const T*>(noise.const_data_ptr());
    const int64_t batch_stride = noise.stride(0), stride = noise.stride(1);
    const bool counted = length <= kLongestCounted<K>;
    torch::stable::parallel_for(0, batch, grain(8 * length), [&](int64_t begin, int64_t end) {
      std::vector<K> keys(round_up<int64_t>(length, kCounted<K>));
      std::vector<Ranked<K>> from(counted ? 0 : length), to(counted ? 0 : length);
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t i = 0; i < length; ++i) keys[i] = key_of(to_float(values[b * batch_stride + i * stride]));
        const MaskingRow row{first.ids_keep + b * keep, first.ids_masked + b * (length - keep),
                             first.ids_restore + b * length, first.mask + b * length, keep};
        if (counted)
          rank_by_counting(keys.data(), length, row);
        else
          rank_by_sorting(keys.data(), length, from, to, row);
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

// True where every value of S is one of O, which is what promotion makes sure of.
template <typename S, typename O>
constexpr bool kWidens = std::is_same_v<S, O> || std::is_same_v<O, double> ||
                         (std::is_same_v<O, float> && !std::is_same_v<S, double>);

// Calls body(S{}, O{}) for a source and the output it is promoted to.
template <typename Body>
void with_promotion(ScalarType source, ScalarType output, const Body& body) {
  with_float_type(source, "tokens", [&](auto s) {
    using S = decltype(s);  // here: inside the next lambda GCC 12 takes decltype(s) in a condition for const
    with_float_type(output, "tokens", [&](auto o) {
      if constexpr (kWidens<S, decltype(o)>) body(S{}, o);
    });
  });
}

// from + pos, added in float and rounded once, as torch does; from alone where pos is null.
template <typename S, typename O>
void add_row(O* out, const S* from, int64_t column, const O* pos, int64_t width) {
  using W = Wide<O>;
  if constexpr (std::is_same_v<S, O>)
    if (!pos) return copy_row(out, from, column, width);
  int64_t d = 0;
  if constexpr (std::is_same_v<W, Wide<S>>)
    if (column == 1)
      for (; d + kLanes<W> <= width; d += kLanes<W>)
        store_narrow(out + d, pos ? load_wide(from + d) + load_wide(pos + d) : load_wide(from + d));
  for (; d < width; ++d) {
    const W value = to_float(from[d * column]);
    out[d] = from_float<O>(pos ? value + to_float(pos[d]) : value);
  }
}

// pos [N, D] in the output's dtype with its columns side by side: it is read once for every sample.
Tensor ready(const Tensor& pos, ScalarType dtype) {
  const bool is_ready = pos.scalar_type() == dtype && pos.stride(1) == 1;
  return is_ready ? pos : torch::stable::contiguous(torch::stable::to(pos, dtype));
}

Tensor keep_tokens_fwd(Tensor x, Tensor ids_keep, std::optional<Tensor> pos) {
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(2), kept = ids_keep.size(1);
  const Ids ids(ids_keep, "keep_tokens: ids_keep", length);
  const ScalarType dtype = pos ? promoted(x.scalar_type(), pos->scalar_type()) : x.scalar_type();
  Tensor out = empty({batch, kept, width}, dtype);
  if (out.numel() == 0) return out;
  if (pos) pos = ready(*pos, dtype);
  with_promotion(x.scalar_type(), dtype, [&](auto source, auto output) {
    using S = decltype(source);
    using O = decltype(output);
    const Rows<S> tokens(x);
    const Rows<O> rows(out), positions(pos ? *pos : out);
    torch::stable::parallel_for(0, batch * kept, grain(width), [&](int64_t begin, int64_t end) {
      std::vector<O> scratch(goes_past_cache(out) ? width : 0);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / kept, m = i % kept, l = ids(b, m);
        const O* position = pos ? positions.at(0, l) : nullptr;
        write_row(rows.at(b, m), width, scratch,
                  [&](O* row) { add_row(row, tokens.at(b, l), tokens.column, position, width); });
      }
      finish_past_cache();
    });
  });
  return out;
}

// For each token its place among the first `kept` ids of sample b, or -1.
void invert(const Ids& ids, int64_t b, int64_t count, std::vector<int64_t>& place) {
  std::fill(place.begin(), place.end(), -1);
  for (int64_t m = 0; m < count; ++m) place[ids(b, m)] = m;
}

// Row `place` of sample b, or zeros where there is none.
template <typename T>
void copy_or_zero(T* to, const Rows<T>& from, int64_t b, int64_t place, int64_t width) {
  if (place < 0)
    std::memset(static_cast<void*>(to), 0, width * sizeof(T));
  else
    copy_row<T>(to, from.at(b, place), from.column, width);
}

Tensor keep_tokens_bwd(Tensor dkept, Tensor ids_keep, int64_t length) {
  const int64_t batch = dkept.size(0), kept = dkept.size(1), width = dkept.size(2);
  const Ids ids(ids_keep, "keep_tokens: ids_keep", length);
  Tensor dx = empty({batch, length, width}, dkept.scalar_type());
  if (dx.numel() == 0) return dx;
  with_size_of(dkept, [&](auto type) {
    using T = decltype(type);
    const Rows<T> from(dkept), to(dx);
    torch::stable::parallel_for(0, batch * length, grain(width), [&](int64_t begin, int64_t end) {
      std::vector<int64_t> place(length);
      std::vector<T> scratch(goes_past_cache(dx) ? width : 0);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / length, l = i % length;
        if (i == begin || l == 0) invert(ids, b, kept, place);
        write_row(to.at(b, l), width, scratch, [&](T* row) { copy_or_zero(row, from, b, place[l], width); });
      }
      finish_past_cache();
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
  if (pos) pos = ready(*pos, dtype);
  mask_token = torch::stable::contiguous(torch::stable::to(mask_token, dtype));
  with_promotion(x.scalar_type(), dtype, [&](auto source, auto output) {
    using S = decltype(source);
    using O = decltype(output);
    const Rows<S> tokens(x);
    const Rows<O> rows(out), positions(pos ? *pos : out);
    const O* hole = static_cast<const O*>(mask_token.const_data_ptr());
    torch::stable::parallel_for(0, batch * (prefix + length), grain(width), [&](int64_t begin, int64_t end) {
      std::vector<O> scratch(goes_past_cache(out) ? width : 0);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / (prefix + length), t = i % (prefix + length);
        const int64_t place = t < prefix ? t - prefix : ids(b, t - prefix);  // among x's tokens after the prefix
        const O* position = pos ? positions.at(0, t) : nullptr;
        write_row(rows.at(b, t), width, scratch, [&](O* row) {
          if (place < kept)
            add_row(row, tokens.at(b, prefix + place), tokens.column, position, width);
          else
            add_row(row, hole, 1, position, width);
        });
      }
      finish_past_cache();
    });
  });
  return out;
}

constexpr int kSummed = 8;           // rows that are added up before the sums are loaded and stored
constexpr int64_t kMostGroups = 256;  // shares of the batch with a sum each: fixed, so that threads change no bit

// Adds N rows to sums, in double: an image's gradients nearly cancel, and rounding in float would be what remains.
template <int N, typename T>
void add_rows(const T* const* rows, int64_t column, double* sums, int64_t width) {
  constexpr int kWide = kLanes<Wide<T>>;
  using Doubles = VecOf<double, kWide * sizeof(double)>;
  int64_t d = 0;
  if (column == 1)
    for (; d + kWide <= width; d += kWide) {
      auto* to = reinterpret_cast<typename Doubles::unaligned*>(sums + d);
      typename Doubles::type total = *to;
#pragma GCC unroll 8
      for (int r = 0; r < N; ++r) total += __builtin_convertvector(load_wide(rows[r] + d), typename Doubles::type);
      *to = total;
    }
  for (; d < width; ++d)
    for (int r = 0; r < N; ++r) sums[d] += to_float(rows[r][d * column]);
}

// The gradient of one sample's tokens, and the sum of what came back from its holes.
template <typename T>
struct Unrestore {
  Rows<T> dout, dx;
  const Ids& ids;
  int64_t length, prefix, kept, width;

  void sample(int64_t b, std::vector<int64_t>& source, double* sums) const {
    const T* holes[kSummed];
    int found = 0;
    std::fill(source.begin(), source.end(), -1);
    for (int64_t t = 0; t < prefix; ++t) source[t] = t;
    for (int64_t l = 0; l < length; ++l) {
      const int64_t place = ids(b, l);
      if (place < kept) {
        source[prefix + place] = prefix + l;
      } else {
        holes[found++] = dout.at(b, prefix + l);
        if (found == kSummed) add_rows<kSummed>(holes, dout.column, sums, width), found = 0;
      }
    }
    for (int h = 0; h < found; ++h) add_rows<1>(holes + h, dout.column, sums, width);
    for (int64_t t = 0; t < prefix + kept; ++t) copy_or_zero(dx.at(b, t), dout, b, source[t], width);
  }
};

std::tuple<Tensor, Tensor> restore_tokens_bwd(Tensor dout, Tensor ids_restore, int64_t prefix, int64_t kept) {
  const int64_t batch = dout.size(0), width = dout.size(2), length = ids_restore.size(1);
  const Ids ids(ids_restore, "restore_tokens: ids_restore", length);
  const ScalarType dtype = dout.scalar_type();
  const int64_t groups = std::min(batch, kMostGroups), share = groups ? (batch + groups - 1) / groups : 0;
  Tensor dx = empty({batch, prefix + kept, width}, dtype);
  Tensor dmask_token = empty({width}, promoted(dtype, ScalarType::Float));
  if (width == 0) return {dx, dmask_token};
  with_float_type(dtype, "restore_tokens: dout", [&](auto type) {
    using T = decltype(type);
    using W = Wide<T>;
    const Unrestore<T> unrestore{Rows<T>(dout), Rows<T>(dx), ids, length, prefix, kept, width};
    std::vector<double> sums(std::max<int64_t>(groups, 1) * width);
    torch::stable::parallel_for(0, groups, grain(share * length * width), [&](int64_t begin, int64_t end) {
      std::vector<int64_t> source(prefix + kept);
      for (int64_t g = begin; g < end; ++g)
        for (int64_t b = g * share; b < std::min((g + 1) * share, batch); ++b)
          unrestore.sample(b, source, sums.data() + g * width);
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
