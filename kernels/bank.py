"""Contrast with sampled rows of a memory bank (softmax and NCE), and the bank's update.

Forward, two launches. A program of `sampled_fwd_kernel` takes a part of the rows that were drawn for one query: it
gathers ROWS rows at a time, multiplies them with the query, and adds them, weighted, to the query's gradient while they
are in registers, so each row is read once and none is stored. For the softmax it keeps the running maximum of the
logits, the sum of exp(logit − maximum) and the number of logits above the positive's; for NCE, where the weights need
no maximum, also the sum of log(1 + exp(logit − shift)). `sampled_combine_kernel` adds the parts of a query in a fixed
order and its positive, and writes loss, rank, log-sum-exp and gradient.

`update_bank_kernel` moves one row a program: no program writes a row whose index occurs again later, so that the last
occurrence counts, in any order of the programs.

    bytes        forward B·m·(D·s + 8) of rows and indices, and parts·B·(D + 4)·4 of partial results, written and read
                 once; update B·(2·D·s_bank + D·s_features), and 8·B² of indices, which come from the L2 cache
    operations   forward 4·B·m·D, on the ordinary units: a row belongs to one query, so there is no matrix product
    limit        memory: B = 256, m = 4,096, D = 128 in float32 are 545 MB, from random places of 512 bytes

Tile sizes: a row of 128 float32 is one word of 16 bytes for each lane of a warp. A tile of 8 kB on 4 warps is 64 bytes
for each thread; eight such programs fit on a multiprocessor, 64 kB in flight, where latency times bandwidth asks for 10
to 40 kB. Parts are as many as leave 8 programs for each multiprocessor.

Indices are not checked here: to read one on the host would stop it until the GPU is done. One outside the bank gives a
row of zeros, or is ignored by the update; nothing outside the tensors is read or written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import (
    ARCHITECTURES,
    LN2,
    LOG2E,
    LOWEST,
    TRITON_DTYPES,
    Launch,
    acc_dtype,
    card,
    cast_via,
    contiguous_rows,
    power_of_2,
    split_loop,
    two_floats,
)

SAMPLED = dict.fromkeys(ARCHITECTURES, Launch(4, 8192))  # {architecture: configuration of sampled_fwd_kernel}
UPDATE = dict.fromkeys(ARCHITECTURES, 2)  # {architecture: warps of update_bank_kernel}
PROGRAMS = 8  # of sampled_fwd_kernel, for each multiprocessor
INDICES = 256  # that update_bank_kernel compares at a time


@triton.jit
def _load_row(bank_ptr, index, column, stride, N, D, ACC_DTYPE: tl.constexpr):
    """The row of an index [1] of the bank, zeros outside."""
    mask = (column < D) & (index >= 0) & (index < N)
    return tl.load(bank_ptr + index * stride + column, mask=mask, other=0.0).to(ACC_DTYPE)


@triton.jit
def _log1p(x):
    """log(1 + x) for 0 ≤ x ≤ 1: the rounding error of the sum is divided out, so it is exact for small x too."""
    rounded = 1 + x
    is_lost = rounded == 1
    return tl.where(is_lost, x, tl.log2(rounded) * LN2 * (x / tl.where(is_lost, 1.0, rounded - 1)))


@triton.jit
def sampled_fwd_kernel(
    q_ptr,  # [B, D], rows contiguous
    bank_ptr,  # [N, D], rows contiguous
    indices_ptr,  # [B, 1+m] int64
    tau_ptr,  # one value
    shift_ptr,  # one value with NCE
    max_ptr,  # [parts, B], written: largest logit of a part's rows
    sum_ptr,  # [parts, B], written: Σ exp(logit − largest)
    log_sum_ptr,  # [parts, B], written with NCE: Σ log(1 + exp(logit − shift))
    part_rank_ptr,  # [parts, B] int32, written: logits above the positive's
    weighted_ptr,  # [parts, B, D], written with WITH_GRAD: Σ weight·row
    B,
    N,
    M,  # 1 + m
    D,
    tiles_per_part,
    stride_qb,
    stride_bank_n,
    stride_indices_b,
    stride_indices_m,
    NCE: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One part of the negatives of one query. Logits are in units of ln 2, so that exp2 serves them."""
    query, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK_D)
    scale = 1 / tl.load(tau_ptr).to(ACC_DTYPE) * LOG2E
    q = tl.load(q_ptr + query * stride_qb + column, mask=column < D, other=0.0).to(ACC_DTYPE)
    row_ptr = indices_ptr + query * stride_indices_b
    first = tl.load(row_ptr + tl.arange(0, 1))  # the positive
    positive = tl.sum(_load_row(bank_ptr, first, column, stride_bank_n, N, D, ACC_DTYPE) * q, 0) * scale
    if NCE:
        shift = tl.load(shift_ptr).to(ACC_DTYPE) * LOG2E

    running_max = tl.full([1], LOWEST, ACC_DTYPE)
    total = tl.zeros([1], ACC_DTYPE)
    log_sums = tl.zeros([ROWS], ACC_DTYPE)
    part_rank = tl.zeros([1], tl.int32)
    weighted = tl.zeros([BLOCK_D], ACC_DTYPE)
    for tile in range(part * tiles_per_part, tl.minimum((part + 1) * tiles_per_part, tl.cdiv(M - 1, ROWS))):
        m = 1 + tile * ROWS + tl.arange(0, ROWS)
        in_m = m < M
        index = tl.load(row_ptr + m.to(tl.int64) * stride_indices_m, mask=in_m, other=0)
        mask = (in_m & (index >= 0) & (index < N))[:, None] & (column < D)[None, :]
        rows = tl.load(bank_ptr + index[:, None] * stride_bank_n + column[None, :], mask=mask, other=0.0).to(ACC_DTYPE)
        logits = tl.where(in_m, tl.sum(rows * q[None, :], 1) * scale, float("-inf"))
        part_rank += tl.sum(((logits > positive) & (index != first)).to(tl.int32), 0)
        new_max = tl.maximum(running_max, tl.max(logits, 0))
        weights = tl.exp2(logits - new_max)
        rescale = tl.exp2(running_max - new_max)
        total = total * rescale + tl.sum(weights, 0)
        running_max = new_max
        if NCE:
            above = logits - shift
            decay = tl.exp2(-tl.abs(above))  # at most 1
            log_sums += tl.where(in_m, tl.maximum(above, 0.0) * LN2 + _log1p(decay), 0.0)
            weights = tl.where(in_m, tl.where(above > 0, 1.0, decay) / (1 + decay), 0.0)
            rescale = tl.full([1], 1.0, ACC_DTYPE)
        if WITH_GRAD:
            weighted = weighted * rescale + tl.sum(weights[:, None] * rows, 0)

    partial = part.to(tl.int64) * B + query
    one = partial + tl.arange(0, 1)
    tl.store(max_ptr + one, running_max)
    tl.store(sum_ptr + one, total)
    tl.store(part_rank_ptr + one, part_rank)
    if NCE:
        tl.store(log_sum_ptr + partial, tl.sum(log_sums, 0))
    if WITH_GRAD:
        tl.store(weighted_ptr + partial * D + column, weighted, mask=column < D)


@triton.jit
def sampled_combine_kernel(
    q_ptr,  # [B, D], rows contiguous
    bank_ptr,  # [N, D], rows contiguous
    indices_ptr,  # [B, 1+m] int64
    tau_ptr,  # one value
    shift_ptr,  # one value with NCE
    max_ptr,  # [parts, B]
    sum_ptr,  # [parts, B]
    log_sum_ptr,  # [parts, B] with NCE
    part_rank_ptr,  # [parts, B] int32
    weighted_ptr,  # [parts, B, D] with WITH_GRAD
    loss_ptr,  # [B], written
    rank_ptr,  # [B] int64, written
    lse_ptr,  # [B], written with NCE: log-sum-exp of all logits
    dq_ptr,  # [B, D], written with WITH_GRAD: gradient for an upstream gradient of 1
    B,
    N,
    D,
    parts,
    stride_qb,
    stride_bank_n,
    stride_indices_b,
    NCE: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Combines the parts of one query, in order, with its positive."""
    query = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    tau = tl.load(tau_ptr).to(ACC_DTYPE)
    scale = 1 / tau * LOG2E
    q = tl.load(q_ptr + query * stride_qb + column, mask=column < D, other=0.0).to(ACC_DTYPE)
    first = tl.load(indices_ptr + query * stride_indices_b + tl.arange(0, 1))
    positive_row = _load_row(bank_ptr, first, column, stride_bank_n, N, D, ACC_DTYPE)
    positive = tl.sum(q * positive_row, 0) * scale

    largest = positive
    for part in range(parts):
        largest = tl.maximum(largest, tl.load(max_ptr + part * B + query))
    negatives, log_sum, rank = positive * 0, positive * 0, query * 0
    for part in range(parts):
        partial = part * B + query
        negatives += tl.load(sum_ptr + partial) * tl.exp2(tl.load(max_ptr + partial) - largest)
        rank += tl.load(part_rank_ptr + partial).to(tl.int64)
        if NCE:
            log_sum += tl.load(log_sum_ptr + partial)
    total = negatives + tl.exp2(positive - largest)
    lse = (tl.log2(total) + largest) * LN2
    if NCE:
        above = positive - tl.load(shift_ptr).to(ACC_DTYPE) * LOG2E
        decay = tl.exp2(-tl.abs(above))
        loss = tl.maximum(-above, 0.0) * LN2 + _log1p(decay) + log_sum
        positive_weight = tl.where(above > 0, decay, 1.0) / (1 + decay)
        tl.store(lse_ptr + query, lse)
    else:
        loss = (tl.log2(total) + (largest - positive)) * LN2
        positive_weight = negatives / total
    tl.store(loss_ptr + query, loss)
    tl.store(rank_ptr + query, rank)
    if WITH_GRAD:
        dq = tl.zeros([BLOCK_D], ACC_DTYPE)
        for part in range(parts):
            partial = part * B + query
            weighted = tl.load(weighted_ptr + partial * D + column, mask=column < D, other=0.0)
            if NCE:
                dq += weighted
            else:
                dq += weighted * (tl.exp2(tl.load(max_ptr + partial) - largest) / total)
        dq = (dq - positive_weight * positive_row) / tau
        tl.store(dq_ptr + query * D + column, dq, mask=column < D)


@triton.jit
def update_bank_kernel(
    bank_ptr,  # [N, D], rows contiguous, changed
    indices_ptr,  # [B] int64
    features_ptr,  # [B, D], rows contiguous
    momentum,
    momentum_rest,  # what rounding to float32 took from it
    B,
    N,
    D,
    stride_bank_n,
    stride_indices_b,
    stride_features_b,
    ACC_DTYPE: tl.constexpr,
    CAST_VIA: tl.constexpr,  # see tile.cast_via
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Moves the row of one index, unless the index occurs again later."""
    position = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    index = tl.load(indices_ptr + position * stride_indices_b)  # [1]
    later = tl.zeros([1], tl.int32)
    for start in range(0, B, CHUNK):
        other = start + tl.arange(0, CHUNK).to(tl.int64)
        indices = tl.load(indices_ptr + other * stride_indices_b, mask=other < B, other=-1)
        later += tl.sum(((indices == index) & (other > position)).to(tl.int32), 0)
    is_moved = (later == 0) & (index >= 0) & (index < N)
    column = tl.arange(0, BLOCK_D)
    mask = (column < D) & is_moved
    row_ptr = bank_ptr + index * stride_bank_n + column
    old = tl.load(row_ptr, mask=mask, other=0.0).to(ACC_DTYPE)
    new = tl.load(features_ptr + position * stride_features_b + column, mask=mask, other=0.0).to(ACC_DTYPE)
    share = tl.zeros([BLOCK_D], ACC_DTYPE) + momentum + momentum_rest
    row = old * share + new * (1 - share)
    norm = tl.sqrt(tl.zeros([BLOCK_D], ACC_DTYPE) + tl.sum(row * row, 0))
    is_written = mask & (norm > 0) & (norm < float("inf"))
    value = row / tl.where(norm > 0, norm, 1.0)
    tl.store(row_ptr, value.to(CAST_VIA).to(bank_ptr.dtype.element_ty), mask=is_written)


def plan(B: int, M: int, D: int, size: int, arch_card) -> tuple[int, int, int, int]:
    """(parts, tiles of a part, rows of a tile, columns) of sampled_fwd_kernel, for `size` bytes of a bank's value."""
    columns = power_of_2(D)
    rows = max(1, min(SAMPLED[arch_card.arch].bytes // (columns * size), power_of_2(M - 1, 1)))
    parts, tiles = split_loop(B, triton.cdiv(M - 1, rows), PROGRAMS * arch_card.multiprocessors)
    return parts, tiles, rows, columns


def _sampled_fwd(q: Tensor, bank: Tensor, indices: Tensor, tau: Tensor, shift: Tensor | None, with_grad: bool):
    """(loss, rank, lse, dq); lse is empty without shift."""
    (B, D), M, N, dtype = q.shape, indices.shape[1], bank.shape[0], acc_dtype(q.dtype)
    loss, rank = q.new_empty(B, dtype=dtype), q.new_empty(B, dtype=torch.int64)
    lse = q.new_empty(B if shift is not None else 0, dtype=dtype)
    dq = q.new_empty((B, D) if with_grad else 0, dtype=dtype)
    if B == 0:
        return loss, rank, lse, dq
    q, where = contiguous_rows(q), card(bank)
    parts, tiles, rows, columns = plan(B, M, D, bank.element_size(), where)
    largest, total = q.new_empty(2, parts, B, dtype=dtype)
    log_sum = q.new_empty(parts if shift is not None else 0, B, dtype=dtype)
    part_rank = q.new_empty(parts, B, dtype=torch.int32)
    weighted = q.new_empty(parts if with_grad else 0, B, D, dtype=dtype)
    shift = tau if shift is None else shift
    partial = (largest, total, log_sum, part_rank, weighted)
    kinds = {"NCE": lse.numel() > 0, "WITH_GRAD": with_grad, "ACC_DTYPE": TRITON_DTYPES[dtype], "BLOCK_D": columns}
    strides = q.stride(0), bank.stride(0), indices.stride(0)
    sampled_fwd_kernel[(B, parts)](
        *(q, bank, indices, tau, shift, *partial, B, N, M, D, tiles, *strides, indices.stride(1)),
        ROWS=rows,
        num_warps=SAMPLED[where.arch].warps,
        **kinds,
    )
    sampled_combine_kernel[(B,)](
        *(q, bank, indices, tau, shift, *partial, loss, rank, lse, dq, B, N, D, parts, *strides), num_warps=4, **kinds
    )
    return loss, rank, lse, dq


def sampled_info_nce_fwd(q: Tensor, bank: Tensor, indices: Tensor, tau: Tensor, with_grad: bool):
    loss, rank, _, dq = _sampled_fwd(q, bank, indices, tau, None, with_grad)
    return loss, rank, dq


def sampled_nce_fwd(q: Tensor, bank: Tensor, indices: Tensor, tau: Tensor, shift: Tensor, with_grad: bool):
    return _sampled_fwd(q, bank, indices, tau, shift, with_grad)


def update_bank_(bank: Tensor, indices: Tensor, features: Tensor, momentum: float) -> None:
    (N, D), B = bank.shape, indices.shape[0]
    if B == 0 or D == 0:
        return
    features = contiguous_rows(features)
    dtype = torch.promote_types(acc_dtype(bank.dtype), features.dtype)
    update_bank_kernel[(B,)](
        *(bank, indices, features, *two_floats(momentum), B, N, D),
        *(bank.stride(0), indices.stride(0), features.stride(0)),
        ACC_DTYPE=TRITON_DTYPES[dtype],
        CAST_VIA=cast_via(bank.dtype),
        CHUNK=min(INDICES, power_of_2(B)),
        BLOCK_D=power_of_2(D),
        num_warps=UPDATE[card(bank).arch],
    )
