// Log-sum-exp over prototypes, and cross entropy against soft and hard targets (fastssl/ops/prototypes.py).
//
// With N features, M teachers and P prototypes the forward pass takes 2·(N + M)·P·D operations; the backward pass
// computes logits and targets again, and multiplies the gradient of the logits with the prototypes and the features:
// 2·(3N + M)·P·D. Exponentials and the rest of the work on tiles are a few percent of that.
//
// Memory beyond inputs and results: packed features, and for one chunk of prototypes the packed prototypes, the targets
// [M, chunk] and the gradients of the logits [N, chunk]. Every sum has a fixed order that depends on the shapes alone,
// so results are bit-equal on any number of threads.
#include "prototypes_bf16.h"

#include <optional>
#include <stdexcept>
#include <string>

namespace fastssl {
namespace {

// A copy of indices, each of which was checked to be in 0..length-1 or `special`: they are used as addresses, and
// another thread may change the tensor.
std::vector<int64_t> checked_indices(const Tensor& indices, const char* argument, int64_t special, int64_t length,
                                     const char* letter) {
  const int64_t columns = indices.dim() == 2 ? indices.size(1) : 1;
  const auto* source = static_cast<const int64_t*>(indices.const_data_ptr());
  std::vector<int64_t> values(indices.numel());
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t row = int64_t(i) / columns, column = int64_t(i) % columns;
    values[i] = source[row * indices.stride(0) + (indices.dim() == 2 ? column * indices.stride(1) : 0)];
    if (values[i] != special && uint64_t(values[i]) >= uint64_t(length))
      throw std::runtime_error(std::string(argument) + " must be " + std::to_string(special) + " or between 0 and " +
                               letter + "-1=" + std::to_string(length - 1) + ", got " + std::to_string(values[i]));
  }
  return values;
}

// A contiguous copy of a vector of any stride.
template <typename T>
std::vector<T> values_of(const Tensor& vector) {
  std::vector<T> values(vector.size(0));
  for (int64_t i = 0; i < vector.size(0); ++i) values[i] = data<T>(vector)[i * vector.stride(0)];
  return values;
}

int64_t slots_for(int64_t rows, int64_t chunk) {
  return std::clamp<int64_t>(kRowTasks / std::max<int64_t>(1, row_block_count(rows)), 1, block_count(chunk));
}

// No targets, for log-sum-exps.
template <typename T>
struct NoTargets {
  static constexpr bool kHasTargets = false;
  void load_chunk(int64_t, int64_t) {}
  const T* row(int64_t, int64_t, T*) const { return nullptr; }
};

// The targets of one chunk of prototypes, [blocks][M, kColumns].
template <typename S>
class SoftTargets {
 public:
  static constexpr bool kHasTargets = true;
  using T = typename Logits<S>::T;

  SoftTargets(const Tensor& teacher, const Tensor& weight, const Tensor& tau, const Tensor& row_offset,
              const Tensor& column_offset, const std::optional<Tensor>& rows, int64_t chunk)
      : logits_(teacher, weight, chunk), tau_(tau_value(tau)), row_offset_(values_of<T>(row_offset)),
        column_offset_(values_of<T>(column_offset)),
        targets_(empty({block_count(chunk) * logits_.tile_rows() * kColumns}, kDtype<T>)),
        scratch_(empty({torch::stable::get_num_threads() * kTileScratch}, kDtype<T>)),
        group_(rows ? rows->size(1) : 1) {
    if (rows) rows_ = checked_indices(*rows, "soft_cross_entropy: rows", -1, logits_.rows(), "M");
  }

  void load_chunk(int64_t first, int64_t size) {
    logits_.load_chunk(first, size);
    const auto place = [&](int64_t row, int64_t block, T*) { return block_row(row, block); };
    const auto exponentiate = [&](int64_t row, int64_t count, int64_t block, int64_t columns, int64_t, T* tile) {
      const T* offset = column_offset_.data() + first + block * kColumns;
      for (int64_t i = 0; i < count; ++i, tile += kColumns)
        for_each_vector<T>(columns, [&](int64_t c, int64_t n) {
          store(tile + c, exp(tau_(load(tile + c)) + load_part<T>(offset + c, n) + row_offset_[row + i]));
        });
    };
    for_each_tile(logits_, size, block_count(size), data<T>(scratch_), place, exponentiate);
  }

  // The targets of student i in one block, summed over its teachers; `sums` is scratch of kColumns values.
  const T* row(int64_t i, int64_t block, T* sums) const {
    if (rows_.empty() && group_ == 1) return block_row(i, block);
    const int64_t* teachers = rows_.data() + i * group_;
    const T* first = nullptr;
    for (int64_t g = 0; g < group_; ++g) {
      if (teachers[g] < 0) continue;
      const T* targets = block_row(teachers[g], block);
      if (!first) {
        first = targets;
        continue;
      }
      for (int64_t c = 0; c < kColumns; c += kLanes<T>) store(sums + c, load(first + c) + load(targets + c));
      first = sums;
    }
    if (first) return first;
    std::fill(sums, sums + kColumns, T(0));
    return sums;
  }

 private:
  Logits<S> logits_;
  Divisor<T> tau_;
  std::vector<T> row_offset_, column_offset_;
  Tensor targets_, scratch_;
  int64_t group_;
  std::vector<int64_t> rows_;

  T* block_row(int64_t row, int64_t block) const {
    return data<T>(targets_) + (block * logits_.tile_rows() + row) * kColumns;
  }
};

// Calls body(row, first column, columns, logits, targets) for each row of each tile, after its logits were added to
// the sums.
template <typename S, typename Targets, typename Body>
RowSums<typename Logits<S>::T> sum_rows(const Tensor& x, const Tensor& weight, double tau,
                                        const typename Logits<S>::T* offset, Targets& targets, int64_t chunk,
                                        const Body& body) {
  using T = typename Logits<S>::T;
  Logits<S> logits(x, weight, chunk);
  const int64_t prototypes = weight.size(0), slots = slots_for(logits.rows(), chunk);
  const Tensor scratch = empty({torch::stable::get_num_threads() * kTileScratch}, kDtype<T>);
  RowSums<T> sums(logits.rows(), slots, Targets::kHasTargets);
  const Divisor<T> divisor(tau);
  for (int64_t first = 0; first < prototypes; first += chunk) {
    const int64_t size = std::min(chunk, prototypes - first);
    logits.load_chunk(first, size);
    targets.load_chunk(first, size);
    for_each_tile(
        logits, size, slots, data<T>(scratch), [](int64_t, int64_t, T* memory) { return memory; },
        [&](int64_t row, int64_t count, int64_t block, int64_t columns, int64_t slot, T* tile) {
          T target_sums[kColumns];
          const int64_t column = first + block * kColumns;
          for (int64_t i = 0; i < count; ++i, tile += kColumns) {
            sums.add(row + i, slot, tile, columns, divisor, offset ? offset + column : nullptr,
                     targets.row(row + i, block, target_sums));
            body(row + i, column, columns, tile);
          }
        });
  }
  return sums;
}

template <typename T>
void store_lse(T* lse, int64_t rows, int64_t row, ShiftAndRest value) {
  lse[row] = T(value.shift);
  lse[rows + row] = T(value.rest + (value.shift - double(T(value.shift))));
}

Tensor prototype_lse(Tensor x, Tensor weight, Tensor tau, std::optional<Tensor> offset, int64_t dim) {
  if (dim == 0) std::swap(x, weight);  // the logits of the prototypes against the features
  Tensor lse;
  with_elements(x.scalar_type(), "prototype_lse: x", [&](auto type) {
    using S = decltype(type);
    using T = typename Logits<S>::T;
    lse = empty({x.size(0)}, kDtype<T>);
    const std::vector<T> offsets = offset ? values_of<T>(*offset) : std::vector<T>();
    NoTargets<T> targets;
    const auto sums = sum_rows<S>(x, weight, tau_value(tau), offset ? offsets.data() : nullptr, targets,
                                  chunk_size<T>(0, weight.size(0)), [](auto...) {});
    T* dst = data<T>(lse);
    torch::stable::parallel_for(0, x.size(0), grain(8 * kLanes<T>), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const ShiftAndRest row = sums.lse(i);
        dst[i] = T(row.shift + row.rest);
      }
    });
  });
  return lse;
}

std::tuple<Tensor, Tensor, Tensor> soft_cross_entropy_fwd(Tensor student, Tensor weight, Tensor tau, Tensor teacher,
                                                          Tensor teacher_weight, Tensor teacher_tau, Tensor row_offset,
                                                          Tensor column_offset, std::optional<Tensor> rows) {
  Tensor loss, lse, mass;
  const int64_t count = student.size(0);
  with_elements(student.scalar_type(), "soft_cross_entropy: student", [&](auto type) {
    using S = decltype(type);
    using T = typename Logits<S>::T;
    loss = empty({count}, kDtype<T>), lse = empty({2, count}, kDtype<T>), mass = empty({count}, kDtype<T>);
    const int64_t chunk = chunk_size<T>(teacher.size(0), weight.size(0));
    SoftTargets<S> targets(teacher, teacher_weight, teacher_tau, row_offset, column_offset, rows, chunk);
    const auto sums = sum_rows<S>(student, weight, tau_value(tau), nullptr, targets, chunk, [](auto...) {});
    for (int64_t i = 0; i < count; ++i) {
      const ShiftAndRest row_lse = sums.lse(i);
      store_lse(data<T>(lse), count, i, row_lse);
      data<T>(mass)[i] = T(sums.mass(i));
      data<T>(loss)[i] = T(sums.mass(i) * row_lse.rest + (sums.mass(i) * row_lse.shift - sums.cross(i)));
    }
  });
  return {loss, lse, mass};
}

std::tuple<Tensor, Tensor> linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor tau, Tensor target) {
  constexpr int64_t kIgnored = -100;
  const std::vector<int64_t> targets =
      checked_indices(target, "linear_cross_entropy: target", kIgnored, weight.size(0), "P");
  Tensor loss, lse;
  const int64_t count = x.size(0);
  with_elements(x.scalar_type(), "linear_cross_entropy: x", [&](auto type) {
    using S = decltype(type);
    using T = typename Logits<S>::T;
    loss = empty({count}, kDtype<T>), lse = empty({2, count}, kDtype<T>);
    NoTargets<T> none;
    std::vector<T> picked(count);
    const auto sums = sum_rows<S>(x, weight, tau_value(tau), nullptr, none, chunk_size<T>(0, weight.size(0)),
                                  [&](int64_t i, int64_t column, int64_t columns, const T* logits) {
                                    const int64_t place = targets[i] - column;
                                    if (0 <= place && place < columns) picked[i] = logits[place];
                                  });
    for (int64_t i = 0; i < count; ++i) {
      const ShiftAndRest row_lse = sums.lse(i);
      store_lse(data<T>(lse), count, i, row_lse);
      data<T>(loss)[i] = targets[i] == kIgnored ? T(0) : T(row_lse.rest + (row_lse.shift - double(picked[i])));
    }
  });
  return {loss, lse};
}

// dx and dweight from the gradients of the logits, factor_i (mass_i softmax_ij − targets_ij). `change(row, first
// column, columns, gradients)` is called for each row of each tile; `mass` may be null, for a mass of 1.
template <typename S, typename Targets, typename Change>
void compute_gradients(const Tensor& x, const Tensor& weight, double tau, const Tensor& lse, const Tensor* mass,
                       const typename Logits<S>::T* factors, Targets& targets, int64_t chunk, typename Logits<S>::T* dx,
                       typename Logits<S>::T* dweight, const Change& change) {
  using T = typename Logits<S>::T;
  Logits<S> logits(x, weight, chunk);
  const LogitGradients<S> gradients(logits, chunk, dx, dweight);
  const int64_t prototypes = weight.size(0), slots = slots_for(logits.rows(), chunk);
  const Tensor scratch = empty({torch::stable::get_num_threads() * kTileScratch}, kDtype<T>);
  const T* lse_values = data<T>(lse);
  const Divisor<T> divisor(tau);
  for (int64_t first = 0; first < prototypes; first += chunk) {
    const int64_t size = std::min(chunk, prototypes - first);
    logits.load_chunk(first, size);
    targets.load_chunk(first, size);
    for_each_tile(
        logits, size, slots, data<T>(scratch),
        [&](int64_t row, int64_t block, T* memory) { return gradients.place(row, block, memory); },
        [&](int64_t row, int64_t count, int64_t block, int64_t columns, int64_t, T* tile) {
          T target_sums[kColumns];
          for (int64_t i = 0; i < count; ++i) {
            T* values = tile + i * kColumns;
            const T* target = targets.row(row + i, block, target_sums);
            const T shift = lse_values[(row + i) * lse.stride(1)], factor = factors[row + i];
            const T rest = lse_values[lse.stride(0) + (row + i) * lse.stride(1)];
            const T mass_i = mass ? data<T>(*mass)[(row + i) * mass->stride(0)] : T(1);
            for_each_vector<T>(columns, [&](int64_t c, int64_t n) {
              Vec<T> gradient = exp(divisor(load(values + c)) - shift - rest) * mass_i;
              if (target) gradient -= load(target + c);
              store(values + c, keep_part(gradient * factor, n, T(0)));
            });
            change(row + i, first + block * kColumns, columns, values);
          }
          gradients.store_tile(row, count, block, columns, tile);
        });
    gradients.multiply_chunk(first, size);
  }
  gradients.finish();
}

// Factors dloss / τ.
template <typename T>
std::vector<T> upstream_factors(const Tensor& dloss, const Tensor& tau) {
  std::vector<T> factors = values_of<T>(dloss);
  for (T& factor : factors) factor /= T(tau_value(tau));
  return factors;
}

template <typename T>
Tensor empty_gradient(const Tensor& like, bool needed) {
  return needed ? empty({like.size(0), like.size(1)}, kDtype<T>) : empty({0}, kDtype<T>);
}

std::tuple<Tensor, Tensor> soft_cross_entropy_bwd(Tensor dloss, Tensor student, Tensor weight, Tensor tau,
                                                  Tensor teacher, Tensor teacher_weight, Tensor teacher_tau,
                                                  Tensor row_offset, Tensor column_offset, std::optional<Tensor> rows,
                                                  Tensor lse, Tensor mass, bool needs_student, bool needs_weight) {
  Tensor dstudent, dweight;
  with_elements(student.scalar_type(), "soft_cross_entropy: student", [&](auto type) {
    using S = decltype(type);
    using T = typename Logits<S>::T;
    dstudent = empty_gradient<T>(student, needs_student), dweight = empty_gradient<T>(weight, needs_weight);
    const int64_t chunk = chunk_size<T>(student.size(0) + teacher.size(0), weight.size(0));
    SoftTargets<S> targets(teacher, teacher_weight, teacher_tau, row_offset, column_offset, rows, chunk);
    compute_gradients<S>(student, weight, tau_value(tau), lse, &mass, upstream_factors<T>(dloss, tau).data(), targets,
                         chunk, needs_student ? data<T>(dstudent) : nullptr, needs_weight ? data<T>(dweight) : nullptr,
                         [](auto...) {});
  });
  return {dstudent, dweight};
}

std::tuple<Tensor, Tensor> linear_cross_entropy_bwd(Tensor dloss, Tensor x, Tensor weight, Tensor tau, Tensor target,
                                                    Tensor lse, bool needs_x, bool needs_weight) {
  constexpr int64_t kIgnored = -100;
  const std::vector<int64_t> indices =
      checked_indices(target, "linear_cross_entropy: target", kIgnored, weight.size(0), "P");
  Tensor dx, dweight;
  with_elements(x.scalar_type(), "linear_cross_entropy: x", [&](auto type) {
    using S = decltype(type);
    using T = typename Logits<S>::T;
    dx = empty_gradient<T>(x, needs_x), dweight = empty_gradient<T>(weight, needs_weight);
    std::vector<T> factors = upstream_factors<T>(dloss, tau);
    for (size_t i = 0; i < factors.size(); ++i)
      if (indices[i] == kIgnored) factors[i] = 0;
    NoTargets<T> none;
    compute_gradients<S>(x, weight, tau_value(tau), lse, nullptr, factors.data(), none,
                         chunk_size<T>(x.size(0), weight.size(0)), needs_x ? data<T>(dx) : nullptr,
                         needs_weight ? data<T>(dweight) : nullptr,
                         [&](int64_t i, int64_t column, int64_t columns, T* gradients) {
                           const int64_t place = indices[i] - column;
                           if (0 <= place && place < columns) gradients[place] -= factors[i];
                         });
  });
  return {dx, dweight};
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("prototype_lse", TORCH_BOX(&fastssl::prototype_lse));
  m.impl("soft_cross_entropy_fwd", TORCH_BOX(&fastssl::soft_cross_entropy_fwd));
  m.impl("soft_cross_entropy_bwd", TORCH_BOX(&fastssl::soft_cross_entropy_bwd));
  m.impl("linear_cross_entropy_fwd", TORCH_BOX(&fastssl::linear_cross_entropy_fwd));
  m.impl("linear_cross_entropy_bwd", TORCH_BOX(&fastssl::linear_cross_entropy_bwd));
}
