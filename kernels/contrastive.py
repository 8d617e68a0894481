"""InfoNCE over a queue, in the batch, and NT-Xent: attention whose values are its keys.

Forward, two launches. `_stream` is flash attention with V = K: a program holds BLOCK_B queries, takes BLOCK_K keys at a
time, and keeps for each query the running maximum of its logits, the sum of exp(logit − maximum), the sum of the keys
so weighted, and how many logits exceed the positive's. A batch has few blocks of queries (two at B = 256), so the keys
too are cut, into as many parts as fill the card; `_merge` joins the parts of a query in a fixed order, adds the
positive, and leaves loss, rank and the whole gradient of q behind. The positive is no part of the stream: it is skipped
where it is among the keys, so its weight 1 − p is a sum of what it is made of and does not cancel.

Backward, for keys that learn (one launch, and a sum over its parts): `_gather` runs the same loop with roles swapped. A
program holds BLOCK_B keys and passes over the queries, whose softmax is known from the forward pass: no atomics, no
logits in memory. NT-Xent's rows are queries and keys at once, so there one pass gives both gradients.

    bytes        stream: keys once from memory (once a block of queries from the L2 cache), B·D of queries, and
                 parts·B·(D + 3)·4 of partial results, written and read once
    operations   stream 4·B·K·D with the gradient and 2·B·K·D without; gather 4·B·M·D
    limit        B = 256, D = 128, K = 65,536 in 16 bits: 16.8 MB and 8.6 GFLOP, so tensor cores, not memory

Why the tiles are as they are: D = 128 in 16 bits takes 128 queries by 64 keys on 8 warps. The float32 sums of 128 × 128
are 64 registers a thread, the logits 32, and two warp groups of 64 rows are what Hopper's instructions want (Ampere's
take their operands from registers, which leaves room for 32 keys). Fewer queries would read the queue from L2 more
often, more would write more partial results. float32 is multiplied as three products of tf32 parts, which holds every
operand twice: smaller tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import (
    LN2,
    LOG2E,
    LOWEST,
    TRITON_DTYPES,
    Card,
    card,
    choose,
    operand,
    power_of_2,
    precision,
    rows,
    splits,
    wide,
)

# {architecture: {bytes of an operand: {widest D: (BLOCK_B, BLOCK_K, CHUNK, warps, stages, programs a multiprocessor)}}}
# A wider D is cut into parts as wide as the last row, one program each, which all compute the same logits. CHUNK is how
# much of D a product of logits takes at a time, 0 for all: then the queries are held from the first tile to the last.
TILES = {
    "sm_80": {
        2: {
            64: (128, 64, 0, 8, 3, 2),
            128: (128, 32, 0, 8, 3, 1),
            256: (64, 64, 0, 8, 2, 1),
            512: (32, 32, 0, 8, 2, 1),
        },
        4: {128: (64, 32, 16, 8, 2, 1), 256: (32, 32, 32, 8, 2, 1)},
        8: {64: (32, 32, 0, 4, 1, 2), 128: (32, 16, 0, 8, 1, 1)},
    },
    "sm_90": {
        2: {
            64: (128, 64, 0, 8, 3, 2),
            128: (128, 64, 0, 8, 3, 1),
            256: (64, 64, 0, 8, 2, 1),
            512: (64, 32, 128, 8, 2, 1),
        },
        4: {64: (64, 32, 32, 8, 2, 1), 128: (64, 32, 16, 8, 2, 1), 256: (32, 32, 32, 8, 2, 1)},
        8: {64: (32, 32, 0, 4, 1, 2), 128: (32, 16, 0, 8, 1, 1)},
    },
}
TILES["sm_100"] = TILES["sm_90"] | {2: TILES["sm_90"][2] | {512: (64, 32, 256, 8, 2, 1)}}
TILES["sm_120"] = TILES["sm_80"] | {
    2: TILES["sm_80"][2] | {64: (128, 32, 0, 8, 3, 2)},
    4: {128: (32, 32, 32, 8, 2, 2), 256: (32, 32, 32, 8, 2, 1)},
    8: {128: (16, 16, 32, 8, 1, 2)},  # no tensor cores for float64
}
TILES["gfx942"] = TILES["sm_80"] | {
    2: {32: (128, 32, 32, 8, 2, 1), 128: (128, 64, 32, 8, 2, 1), 256: (64, 32, 32, 4, 2, 1), 512: (64, 32, 64, 8, 2, 1)}
}

QUEUE, BATCH, VIEWS = (tl.constexpr(i) for i in range(3))  # where the positive of a row is, and what a row must skip


@triton.jit
def _positive_of(row, B, first, KIND: tl.constexpr):
    """The row of the keys' tensor that is the positive of each query."""
    if KIND == QUEUE:
        return row
    elif KIND == BATCH:
        return row + first
    else:
        return (row + B // 2) % B


@triton.jit
def _rows(x_ptr, row, in_row, column, stride, D):
    """[rows, columns] of a matrix, zeros outside."""
    offset = row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(x_ptr + offset, mask=in_row[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def _dots(
    a_ptr,
    a_row,
    in_a,
    stride_a,
    b_ptr,
    b_row,
    in_b,
    stride_b,
    D,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """a · bᵀ of rows that are too wide to be held in registers: CHUNK columns at a time."""
    dots = tl.zeros([a_row.shape[0], b_row.shape[0]], WIDE)
    for start in range(0, D, CHUNK):
        column = start + tl.arange(0, CHUNK)
        a = _rows(a_ptr, a_row, in_a, column, stride_a, D).to(OPERAND)
        b = _rows(b_ptr, b_row, in_b, column, stride_b, D).to(OPERAND)
        dots = tl.dot(a, tl.trans(b), dots, input_precision=PRECISION, out_dtype=WIDE)
    return dots


@triton.jit
def _stream(
    q_ptr,
    keys_ptr,
    positives_ptr,
    tau_ptr,
    top_ptr,
    sum_ptr,
    above_ptr,
    weighted_ptr,
    B,
    K,
    D,
    first,
    each,
    stride_q,
    stride_keys,
    stride_positives,
    KIND: tl.constexpr,
    GRAD: tl.constexpr,
    CHUNK: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One part of the keys for one block of queries. Logits are in units of ln 2, so that exp2 serves them."""
    part = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_b = row < B
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)  # of the weighted sum; a wide D has several chunks
    scale = 1 / tl.load(tau_ptr).to(WIDE) * LOG2E

    positive = _positive_of(row, B, first, KIND)
    positive_score = tl.zeros([BLOCK_B], WIDE)
    for start in range(0, D, BLOCK_D):
        at = start + tl.arange(0, BLOCK_D)
        own = _rows(q_ptr, row, in_b, at, stride_q, D).to(WIDE)
        positive_score += tl.sum(own * _rows(positives_ptr, positive, in_b, at, stride_positives, D).to(WIDE), 1)
    positive_score *= scale

    if CHUNK == 0:
        q = _rows(q_ptr, row, in_b, column, stride_q, D).to(OPERAND)  # [BLOCK_B, BLOCK_D]
    top = tl.full([BLOCK_B], LOWEST, WIDE)
    total = tl.zeros([BLOCK_B], WIDE)
    above = tl.zeros([BLOCK_B], tl.int32)
    weighted = tl.zeros([BLOCK_B, BLOCK_D], WIDE)
    for tile in range(part * each, tl.minimum((part + 1) * each, tl.cdiv(K, BLOCK_K))):
        key = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        in_k = key < K
        if CHUNK == 0:
            keys = _rows(keys_ptr, key, in_k, column, stride_keys, D).to(OPERAND)  # [BLOCK_K, BLOCK_D]
            scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION, out_dtype=WIDE)
        else:
            scores = _dots(
                q_ptr, row, in_b, stride_q, keys_ptr, key, in_k, stride_keys, D, OPERAND, WIDE, PRECISION, CHUNK
            )
            if GRAD:
                keys = _rows(keys_ptr, key, in_k, column, stride_keys, D).to(OPERAND)
        taken = in_k[None, :]
        if KIND != QUEUE:
            taken = taken & (key[None, :] != positive[:, None])
        if KIND == VIEWS:
            taken = taken & (key[None, :] != row[:, None])
        scores = tl.where(taken, scores * scale, float("-inf"))
        above += tl.sum((scores > positive_score[:, None]).to(tl.int32), 1)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])  # [BLOCK_B, BLOCK_K]
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        if GRAD:
            weighted = tl.dot(
                weights.to(OPERAND), keys, weighted * shrink[:, None], input_precision=PRECISION, out_dtype=WIDE
            )
        top = new_top

    at = part.to(tl.int64) * B + row
    if tl.program_id(2) == 0:
        tl.store(top_ptr + at, top, mask=in_b)
        tl.store(sum_ptr + at, total, mask=in_b)
        tl.store(above_ptr + at, above, mask=in_b)
    if GRAD:
        tl.store(weighted_ptr + at[:, None] * D + column[None, :], weighted, mask=in_b[:, None] & (column < D)[None, :])


@triton.jit
def _merge(
    q_ptr,
    positives_ptr,
    tau_ptr,
    top_ptr,
    sum_ptr,
    above_ptr,
    weighted_ptr,
    loss_ptr,
    rank_ptr,
    lse_ptr,
    dq_ptr,
    B,
    D,
    first,
    parts,
    stride_q,
    stride_positives,
    KIND: tl.constexpr,
    GRAD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One query: joins its parts, in order, with its positive."""
    row = tl.program_id(0)
    positive = _positive_of(row, B, first, KIND).to(tl.int64)
    own = q_ptr + row.to(tl.int64) * stride_q
    tau = tl.load(tau_ptr).to(WIDE)

    score = tl.zeros([BLOCK_D], WIDE)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        q = tl.load(own + column, mask=column < D, other=0.0).to(WIDE)
        k = tl.load(positives_ptr + positive * stride_positives + column, mask=column < D, other=0.0).to(WIDE)
        score += q * k
    score = tl.sum(score, 0) * (1 / tau * LOG2E)

    tops = tl.full([BLOCK_S], LOWEST, WIDE)
    for start in range(0, parts, BLOCK_S):
        part = start + tl.arange(0, BLOCK_S)
        at = part.to(tl.int64) * B + row
        tops = tl.maximum(tops, tl.load(top_ptr + at, mask=part < parts, other=LOWEST))
    top = tl.maximum(tl.max(tops, 0), score)

    totals, aboves = tl.zeros([BLOCK_S], WIDE), tl.zeros([BLOCK_S], tl.int64)
    for start in range(0, parts, BLOCK_S):
        part = start + tl.arange(0, BLOCK_S)
        at = part.to(tl.int64) * B + row
        share = tl.exp2(tl.load(top_ptr + at, mask=part < parts, other=LOWEST) - top)
        totals += share * tl.load(sum_ptr + at, mask=part < parts, other=0.0)
        aboves += tl.load(above_ptr + at, mask=part < parts, other=0)
    others = tl.sum(totals, 0)  # of the negatives, the positive's own term is exp2(score − top)
    every = others + tl.exp2(score - top)
    tl.store(loss_ptr + row, (tl.log2(every) + (top - score)) * LN2)
    tl.store(rank_ptr + row, tl.sum(aboves, 0))
    tl.store(lse_ptr + row, (tl.log2(every) + top) * LN2)
    if GRAD:
        for start in range(0, D, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            dq = tl.zeros([BLOCK_S, BLOCK_D], WIDE)
            for begin in range(0, parts, BLOCK_S):
                part = begin + tl.arange(0, BLOCK_S)
                at = part.to(tl.int64) * B + row
                share = tl.exp2(tl.load(top_ptr + at, mask=part < parts, other=LOWEST) - top)
                dq += share[:, None] * _rows(weighted_ptr, at, part < parts, column, D, D)
            k = tl.load(positives_ptr + positive * stride_positives + column, mask=column < D, other=0.0).to(WIDE)
            dq = (tl.sum(dq, 0) - others * k) / every / tau
            tl.store(dq_ptr + row.to(tl.int64) * D + column, dq, mask=column < D)


@triton.jit
def _gather(
    own_ptr,
    others_ptr,
    tau_ptr,
    lse_ptr,
    dloss_ptr,
    unit_ptr,
    grad_ptr,
    R,
    C,
    D,
    first,
    each,
    stride_own,
    stride_others,
    KIND: tl.constexpr,
    CHUNK: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of BLOCK_B of the R rows `own` through one part of the C rows `others`, by whose softmax they count.

    With weight_rc = dloss_c · (softmax_c at r, less 1 where r is the positive of c) it is Σ_c weight_rc · others_c / τ.
    """
    part = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_r = row < R
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    tau = tl.load(tau_ptr).to(WIDE)
    unit = tl.load(unit_ptr).to(WIDE)  # weights are divided by it before they are rounded to 16 bits
    per_unit = 1 / unit
    if CHUNK == 0:
        own = _rows(own_ptr, row, in_r, column, stride_own, D).to(OPERAND)  # [BLOCK_B, BLOCK_D]
    if KIND == VIEWS:
        own_lse = tl.load(lse_ptr + row, mask=in_r, other=0.0)
        own_dloss = tl.load(dloss_ptr + row, mask=in_r, other=0.0).to(WIDE) * per_unit
    grad = tl.zeros([BLOCK_B, BLOCK_D], WIDE)
    for tile in range(part * each, tl.minimum((part + 1) * each, tl.cdiv(C, BLOCK_K))):
        other = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        in_c = other < C
        if CHUNK == 0:
            others = _rows(others_ptr, other, in_c, column, stride_others, D).to(OPERAND)  # [BLOCK_K, BLOCK_D]
            scores = tl.dot(own, tl.trans(others), input_precision=PRECISION, out_dtype=WIDE)
        else:
            scores = _dots(
                own_ptr,
                row,
                in_r,
                stride_own,
                others_ptr,
                other,
                in_c,
                stride_others,
                D,
                OPERAND,
                WIDE,
                PRECISION,
                CHUNK,
            )
            others = _rows(others_ptr, other, in_c, column, stride_others, D).to(OPERAND)
        scores = scores * (1 / tau)
        lse = tl.load(lse_ptr + other, mask=in_c, other=float("inf"))
        dloss = tl.load(dloss_ptr + other, mask=in_c, other=0.0).to(WIDE) * per_unit
        is_positive = row[:, None] == _positive_of(other, C, first, KIND)[None, :]
        weights = tl.exp2((scores - lse[None, :]) * LOG2E) * dloss[None, :]
        positive_weights = dloss[None, :]
        if KIND == VIEWS:
            weights += tl.exp2((scores - own_lse[:, None]) * LOG2E) * own_dloss[:, None]
            positive_weights += own_dloss[:, None]
        weights = tl.where(is_positive, weights - positive_weights, weights)
        taken = in_c[None, :]
        if KIND == VIEWS:
            taken = taken & (other[None, :] != row[:, None])
        weights = tl.where(taken, weights, 0.0)  # also where a row that does not exist made a NaN
        grad = tl.dot(weights.to(OPERAND), others, grad, input_precision=PRECISION, out_dtype=WIDE)
    at = part.to(tl.int64) * R + row
    tl.store(
        grad_ptr + at[:, None] * D + column[None, :], grad * (unit / tau), mask=in_r[:, None] & (column < D)[None, :]
    )


def info_nce_fwd(q: Tensor, k: Tensor, queue: Tensor, tau: Tensor, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    loss, rank, _, dq = _forward(q, queue, k, tau, 0, QUEUE, with_grad)
    return loss, rank, dq


def batch_info_nce_fwd(
    q: Tensor, keys: Tensor, tau: Tensor, first: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, rank, lse, dq = _forward(q, keys, keys, tau, first, BATCH, with_grad)
    return loss, rank, dq, lse


def nt_xent_fwd(z: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    loss, _, lse, _ = _forward(z, z, z, tau, 0, VIEWS, False)
    return loss, lse


def batch_info_nce_dkeys(q: Tensor, keys: Tensor, tau: Tensor, first: int, lse: Tensor, dloss: Tensor) -> Tensor:
    return _backward(keys, q, tau, first, lse, dloss, BATCH)


def nt_xent_bwd(z: Tensor, tau: Tensor, lse: Tensor, dloss: Tensor) -> Tensor:
    return _backward(z, z, tau, 0, lse, dloss, VIEWS)


class Plan(NamedTuple):
    """How a launch of `_stream` or `_gather` is cut."""

    grid: tuple[int, int, int]  # blocks of rows, parts of the keys, parts of the columns
    each: int  # tiles a part
    block_b: int
    block_k: int
    chunk: int
    width: int
    warps: int
    stages: int

    def options(self, multiplied: torch.dtype, dtype: torch.dtype) -> dict:
        return {
            "OPERAND": TRITON_DTYPES[multiplied],
            "WIDE": TRITON_DTYPES[dtype],
            "PRECISION": precision(multiplied),
            "BLOCK_B": self.block_b,
            "BLOCK_K": self.block_k,
            "BLOCK_D": self.width,
            "CHUNK": self.chunk,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def plan(B: int, K: int, D: int, size: int, on: Card) -> Plan:
    """The cut of B rows against K keys of D values, in `size` bytes where they are multiplied."""
    table = TILES[on.arch][size]
    width = min(power_of_2(D, 32), max(table))
    block_b, block_k, chunk, warps, stages, programs = choose(table, width)
    chunk = min(chunk or width, width) if chunk or width < D else 0
    blocks, columns = triton.cdiv(B, block_b), max(1, triton.cdiv(D, width))
    parts, each = splits(blocks * columns, triton.cdiv(K, block_k), programs * on.multiprocessors)
    return Plan((blocks, parts, columns), each, block_b, block_k, chunk, width, warps, stages)


def _forward(
    q: Tensor, keys: Tensor, positives: Tensor, tau: Tensor, first: int, kind: tl.constexpr, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, rank, lse, dq or nothing)"""
    (B, D), K, dtype = q.shape, keys.shape[0], wide(q.dtype)
    loss, lse = q.new_empty(B, dtype=dtype), q.new_empty(B, dtype=dtype)
    rank = q.new_empty(B, dtype=torch.int64)
    dq = q.new_empty((B, D) if with_grad else 0, dtype=dtype)
    if B == 0:
        return loss, rank, lse, dq
    q, keys, positives = rows(q), rows(keys), rows(positives)
    multiplied = operand(dtype, q, keys)
    if multiplied == torch.float64:  # Triton fails to compile a product of float64 made from 16 bits
        q, keys = q.double(), keys.double()
    cut = plan(B, K, D, multiplied.itemsize, card(q))
    parts = cut.grid[1]
    top, total = q.new_empty(parts, B, dtype=dtype), q.new_empty(parts, B, dtype=dtype)
    above = q.new_empty(parts, B, dtype=torch.int32)
    weighted = q.new_empty((parts, B, D) if with_grad else 0, dtype=dtype)
    _stream[cut.grid](
        q,
        keys,
        positives,
        tau,
        top,
        total,
        above,
        weighted,
        B,
        K,
        D,
        first,
        cut.each,
        q.stride(0),
        keys.stride(0),
        positives.stride(0),
        KIND=kind.value,
        GRAD=with_grad,
        **cut.options(multiplied, dtype),
    )
    _merge[(B, 1, 1)](
        q,
        positives,
        tau,
        top,
        total,
        above,
        weighted,
        loss,
        rank,
        lse,
        dq,
        B,
        D,
        first,
        parts,
        q.stride(0),
        positives.stride(0),
        KIND=kind.value,
        GRAD=with_grad,
        WIDE=TRITON_DTYPES[dtype],
        BLOCK_S=16,
        BLOCK_D=min(128, cut.width),
        num_warps=4,
    )
    return loss, rank, lse, dq


def _backward(
    own: Tensor, others: Tensor, tau: Tensor, first: int, lse: Tensor, dloss: Tensor, kind: tl.constexpr
) -> Tensor:
    (R, D), C = own.shape, others.shape[0]
    grad = own.new_empty(R, D, dtype=lse.dtype)
    if R == 0:
        return grad
    own, others, dloss = rows(own), rows(others), dloss.contiguous()
    multiplied = operand(lse.dtype, own, others)
    if multiplied == torch.float64:  # as above
        own, others = own.double(), others.double()
    cut = plan(R, C, D, multiplied.itemsize, card(own))
    parts = cut.grid[1]
    # float16 has no room for softmax times a loss's gradient: the largest weight is made 256 there.
    unit = (dloss.abs().max() / 256).clamp(min=1e-30) if multiplied == torch.float16 and C else dloss.new_ones(())
    partial = grad if parts == 1 else own.new_empty(parts, R, D, dtype=lse.dtype)
    _gather[cut.grid](
        own,
        others,
        tau,
        lse,
        dloss,
        unit,
        partial,
        R,
        C,
        D,
        first,
        cut.each,
        own.stride(0),
        others.stride(0),
        KIND=kind.value,
        **cut.options(multiplied, lse.dtype),
    )
    return grad if parts == 1 else partial.sum(0)
