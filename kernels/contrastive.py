"""InfoNCE over a queue, in the batch, and NT-Xent: attention whose values are its keys.

Forward, two launches. `info_nce_fwd_kernel` is flash attention with V = K: a program holds BLOCK_B queries, takes
BLOCK_K keys at a time, and keeps for each query the running maximum of its logits, the sum of exp(logit − maximum), the
sum of the keys with these weights, and the number of logits above the positive's. A batch has few blocks of queries
(two at B = 256), so the keys are cut too, into as many parts as fill the card, as in flash decoding;
`info_nce_combine_kernel` combines the parts of a query in a fixed order, adds the positive, and writes loss, rank and
the whole gradient of q. The positive is not in any part: it is skipped where it is among the keys, so its weight 1 − p
is the sum of the other weights and does not cancel.

Backward, for keys with a gradient (one launch, and a sum over its parts): `info_nce_bwd_kernel` runs the same loop with
the roles exchanged. A program holds BLOCK_B keys and passes over the queries, whose softmax is known from the forward
pass: no atomics, no logits in memory. NT-Xent's rows are queries and keys at once, so there one pass gives both
gradients.

    bytes        forward: keys once from memory (once for each block of queries from the L2 cache), B·D of queries, and
                 parts·B·(D + 3)·4 of partial results, written and read once
    operations   forward 4·B·K·D with the gradient and 2·B·K·D without; backward 4·B·M·D
    limit        B = 256, D = 128, K = 65,536 in 16 bits: 16.8 MB and 8.6 GFLOP, so tensor cores, not memory

Tile sizes: D = 128 in 16 bits takes 128 queries by 64 keys on 8 warps. The float32 sums of 128 × 128 are 64 registers
per thread, the logits 32, and two warp groups of 64 rows are what Hopper's instructions want (Ampere's take their
operands from registers, which leaves room for 32 keys). Fewer queries would read the queue from L2 more often, more
would write more partial results. float32 is multiplied as three products of tf32 parts, which holds every operand
twice: smaller tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contrastive_plan import plan
from .tile import (
    LN2,
    LOG2E,
    LOWEST,
    TRITON_DTYPES,
    acc_dtype,
    card,
    contiguous_rows,
    dot_in_chunks,
    load_tile,
    operand_dtype,
)

# The kind of loss: InfoNCE over a queue, InfoNCE in the batch, or NT-Xent. It decides which key is a query's positive,
# and which keys do not count as negatives.
QUEUE, BATCH, VIEWS = (tl.constexpr(i) for i in range(3))


@triton.jit
def _positive_of(row, B, label_offset, KIND: tl.constexpr):
    """The row of each query's positive in the tensor of positives."""
    if KIND == QUEUE:
        return row
    elif KIND == BATCH:
        return row + label_offset
    else:
        return (row + B // 2) % B


@triton.jit
def info_nce_fwd_kernel(
    q_ptr,  # [B, D], rows contiguous
    keys_ptr,  # [K, D], rows contiguous
    positives_ptr,  # [B, D] for QUEUE, else the keys
    tau_ptr,  # one value
    max_ptr,  # [parts, B], written: largest logit of the negatives in a part
    sum_ptr,  # [parts, B], written: Σ exp(logit − largest)
    part_rank_ptr,  # [parts, B] int32, written: logits above the positive's
    weighted_ptr,  # [parts, B, D], written with WITH_GRAD: Σ exp(logit − largest)·key
    B,
    K,
    D,
    label_offset,
    tiles_per_part,
    stride_qb,
    stride_keys_k,
    stride_positives_b,
    KIND: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    CHUNK: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One part of the keys for one block of queries. Logits are in units of ln 2, so that exp2 serves them."""
    part = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_b = row < B
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)  # of the weighted sum; a wide D has several blocks
    scale = 1 / tl.load(tau_ptr).to(ACC_DTYPE) * LOG2E

    positive = _positive_of(row, B, label_offset, KIND)
    positive_logit = tl.zeros([BLOCK_B], ACC_DTYPE)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        q_d = load_tile(q_ptr, row, in_b, d, stride_qb, D).to(ACC_DTYPE)
        k_d = load_tile(positives_ptr, positive, in_b, d, stride_positives_b, D).to(ACC_DTYPE)
        positive_logit += tl.sum(q_d * k_d, 1)
    positive_logit *= scale

    if CHUNK == 0:
        q = load_tile(q_ptr, row, in_b, column, stride_qb, D).to(OPERAND)  # [BLOCK_B, BLOCK_D]
    running_max = tl.full([BLOCK_B], LOWEST, ACC_DTYPE)
    total = tl.zeros([BLOCK_B], ACC_DTYPE)
    part_rank = tl.zeros([BLOCK_B], tl.int32)
    weighted = tl.zeros([BLOCK_B, BLOCK_D], ACC_DTYPE)
    for tile in range(part * tiles_per_part, tl.minimum((part + 1) * tiles_per_part, tl.cdiv(K, BLOCK_K))):
        key = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        in_k = key < K
        if CHUNK == 0:
            keys = load_tile(keys_ptr, key, in_k, column, stride_keys_k, D).to(OPERAND)  # [BLOCK_K, BLOCK_D]
            logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC_DTYPE)
        else:
            logits = dot_in_chunks(
                q_ptr, row, in_b, stride_qb, keys_ptr, key, in_k, stride_keys_k, D, OPERAND, ACC_DTYPE, PRECISION, CHUNK
            )
            if WITH_GRAD:
                keys = load_tile(keys_ptr, key, in_k, column, stride_keys_k, D).to(OPERAND)
        is_negative = in_k[None, :]
        if KIND != QUEUE:
            is_negative = is_negative & (key[None, :] != positive[:, None])
        if KIND == VIEWS:
            is_negative = is_negative & (key[None, :] != row[:, None])
        logits = tl.where(is_negative, logits * scale, float("-inf"))
        part_rank += tl.sum((logits > positive_logit[:, None]).to(tl.int32), 1)
        new_max = tl.maximum(running_max, tl.max(logits, 1))
        weights = tl.exp2(logits - new_max[:, None])  # [BLOCK_B, BLOCK_K]
        rescale = tl.exp2(running_max - new_max)
        total = total * rescale + tl.sum(weights, 1)
        if WITH_GRAD:
            weighted = tl.dot(
                weights.to(OPERAND), keys, weighted * rescale[:, None], input_precision=PRECISION, out_dtype=ACC_DTYPE
            )
        running_max = new_max

    partial = part.to(tl.int64) * B + row
    if tl.program_id(2) == 0:
        tl.store(max_ptr + partial, running_max, mask=in_b)
        tl.store(sum_ptr + partial, total, mask=in_b)
        tl.store(part_rank_ptr + partial, part_rank, mask=in_b)
    if WITH_GRAD:
        mask = in_b[:, None] & (column < D)[None, :]
        tl.store(weighted_ptr + partial[:, None] * D + column[None, :], weighted, mask=mask)


@triton.jit
def info_nce_combine_kernel(
    q_ptr,  # [B, D], rows contiguous
    positives_ptr,  # [B, D] or the keys, rows contiguous
    tau_ptr,  # one value
    max_ptr,  # [parts, B]
    sum_ptr,  # [parts, B]
    part_rank_ptr,  # [parts, B] int32
    weighted_ptr,  # [parts, B, D] with WITH_GRAD
    loss_ptr,  # [B], written
    rank_ptr,  # [B] int64, written
    lse_ptr,  # [B], written: log-sum-exp of all logits
    dq_ptr,  # [B, D], written with WITH_GRAD: gradient for an upstream gradient of 1
    B,
    D,
    label_offset,
    parts,
    stride_qb,
    stride_positives_b,
    KIND: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Combines the parts of one query, in order, with its positive."""
    row = tl.program_id(0)
    positive = _positive_of(row, B, label_offset, KIND).to(tl.int64)
    q_row_ptr = q_ptr + row.to(tl.int64) * stride_qb
    k_row_ptr = positives_ptr + positive * stride_positives_b
    tau = tl.load(tau_ptr).to(ACC_DTYPE)

    products = tl.zeros([BLOCK_D], ACC_DTYPE)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        q = tl.load(q_row_ptr + column, mask=column < D, other=0.0).to(ACC_DTYPE)
        k = tl.load(k_row_ptr + column, mask=column < D, other=0.0).to(ACC_DTYPE)
        products += q * k
    positive_logit = tl.sum(products, 0) * (1 / tau * LOG2E)

    maxima = tl.full([BLOCK_PARTS], LOWEST, ACC_DTYPE)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        partial = part.to(tl.int64) * B + row
        maxima = tl.maximum(maxima, tl.load(max_ptr + partial, mask=part < parts, other=LOWEST))
    max_logit = tl.maximum(tl.max(maxima, 0), positive_logit)

    totals, part_ranks = tl.zeros([BLOCK_PARTS], ACC_DTYPE), tl.zeros([BLOCK_PARTS], tl.int64)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        partial = part.to(tl.int64) * B + row
        rescale = tl.exp2(tl.load(max_ptr + partial, mask=part < parts, other=LOWEST) - max_logit)
        totals += rescale * tl.load(sum_ptr + partial, mask=part < parts, other=0.0)
        part_ranks += tl.load(part_rank_ptr + partial, mask=part < parts, other=0)
    negatives_sum = tl.sum(totals, 0)
    sum_of_all = negatives_sum + tl.exp2(positive_logit - max_logit)
    tl.store(loss_ptr + row, (tl.log2(sum_of_all) + (max_logit - positive_logit)) * LN2)
    tl.store(rank_ptr + row, tl.sum(part_ranks, 0))
    tl.store(lse_ptr + row, (tl.log2(sum_of_all) + max_logit) * LN2)
    if WITH_GRAD:
        for start in range(0, D, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            dq = tl.zeros([BLOCK_PARTS, BLOCK_D], ACC_DTYPE)
            for part_start in range(0, parts, BLOCK_PARTS):
                part = part_start + tl.arange(0, BLOCK_PARTS)
                partial = part.to(tl.int64) * B + row
                rescale = tl.exp2(tl.load(max_ptr + partial, mask=part < parts, other=LOWEST) - max_logit)
                dq += rescale[:, None] * load_tile(weighted_ptr, partial, part < parts, column, D, D)
            k = tl.load(k_row_ptr + column, mask=column < D, other=0.0).to(ACC_DTYPE)
            dq = (tl.sum(dq, 0) - negatives_sum * k) / sum_of_all / tau
            tl.store(dq_ptr + row.to(tl.int64) * D + column, dq, mask=column < D)


@triton.jit
def info_nce_bwd_kernel(
    keys_ptr,  # [R, D], rows contiguous: the rows whose gradient is computed
    queries_ptr,  # [C, D], rows contiguous; for VIEWS the keys
    tau_ptr,  # one value
    lse_ptr,  # [C], log-sum-exp of each query's logits
    dloss_ptr,  # [C], gradient of each query's loss
    unit_ptr,  # one value, by which weights are divided before they are rounded to 16 bits
    dkeys_ptr,  # [parts, R, D], written
    R,
    C,
    D,
    label_offset,
    tiles_per_part,
    stride_keys_r,
    stride_queries_c,
    KIND: tl.constexpr,
    CHUNK: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of BLOCK_B of the keys through one part of the queries.

    With weight_rc = dloss_c · (softmax of query c at key r, less 1 where r is the positive of c) the gradient of key r
    is Σ_c weight_rc · query_c / τ. For VIEWS a row is a query too, which adds the same sum with weight_cr.
    """
    part = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_r = row < R
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    tau = tl.load(tau_ptr).to(ACC_DTYPE)
    unit = tl.load(unit_ptr).to(ACC_DTYPE)
    per_unit = 1 / unit
    if CHUNK == 0:
        keys = load_tile(keys_ptr, row, in_r, column, stride_keys_r, D).to(OPERAND)  # [BLOCK_B, BLOCK_D]
    if KIND == VIEWS:
        row_lse = tl.load(lse_ptr + row, mask=in_r, other=0.0)
        row_dloss = tl.load(dloss_ptr + row, mask=in_r, other=0.0).to(ACC_DTYPE) * per_unit
    dkeys = tl.zeros([BLOCK_B, BLOCK_D], ACC_DTYPE)
    for tile in range(part * tiles_per_part, tl.minimum((part + 1) * tiles_per_part, tl.cdiv(C, BLOCK_K))):
        query = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        in_c = query < C
        if CHUNK == 0:
            queries = load_tile(queries_ptr, query, in_c, column, stride_queries_c, D).to(OPERAND)
            logits = tl.dot(keys, tl.trans(queries), input_precision=PRECISION, out_dtype=ACC_DTYPE)
        else:
            logits = dot_in_chunks(
                keys_ptr,
                row,
                in_r,
                stride_keys_r,
                queries_ptr,
                query,
                in_c,
                stride_queries_c,
                D,
                OPERAND,
                ACC_DTYPE,
                PRECISION,
                CHUNK,
            )
            queries = load_tile(queries_ptr, query, in_c, column, stride_queries_c, D).to(OPERAND)
        logits = logits * (1 / tau)  # [BLOCK_B, BLOCK_K]
        lse = tl.load(lse_ptr + query, mask=in_c, other=float("inf"))
        dloss = tl.load(dloss_ptr + query, mask=in_c, other=0.0).to(ACC_DTYPE) * per_unit
        is_positive = row[:, None] == _positive_of(query, C, label_offset, KIND)[None, :]
        weights = tl.exp2((logits - lse[None, :]) * LOG2E) * dloss[None, :]
        positive_weights = dloss[None, :]
        if KIND == VIEWS:
            weights += tl.exp2((logits - row_lse[:, None]) * LOG2E) * row_dloss[:, None]
            positive_weights += row_dloss[:, None]
        weights = tl.where(is_positive, weights - positive_weights, weights)
        is_pair = in_c[None, :]
        if KIND == VIEWS:
            is_pair = is_pair & (query[None, :] != row[:, None])
        weights = tl.where(is_pair, weights, 0.0)  # also where a row beyond the end made a NaN
        dkeys = tl.dot(weights.to(OPERAND), queries, dkeys, input_precision=PRECISION, out_dtype=ACC_DTYPE)
    partial = part.to(tl.int64) * R + row
    mask = in_r[:, None] & (column < D)[None, :]
    tl.store(dkeys_ptr + partial[:, None] * D + column[None, :], dkeys * (unit / tau), mask=mask)


def info_nce_fwd(q: Tensor, k: Tensor, queue: Tensor, tau: Tensor, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    loss, rank, _, dq = launch_info_nce_fwd(q, queue, k, tau, 0, QUEUE, with_grad)
    return loss, rank, dq


def batch_info_nce_fwd(
    q: Tensor, keys: Tensor, tau: Tensor, label_offset: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, rank, lse, dq = launch_info_nce_fwd(q, keys, keys, tau, label_offset, BATCH, with_grad)
    return loss, rank, dq, lse


def nt_xent_fwd(z: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    loss, _, lse, _ = launch_info_nce_fwd(z, z, z, tau, 0, VIEWS, False)
    return loss, lse


def batch_info_nce_dkeys(q: Tensor, keys: Tensor, tau: Tensor, label_offset: int, lse: Tensor, dloss: Tensor) -> Tensor:
    return launch_info_nce_bwd(keys, q, tau, label_offset, lse, dloss, BATCH)


def nt_xent_bwd(z: Tensor, tau: Tensor, lse: Tensor, dloss: Tensor) -> Tensor:
    return launch_info_nce_bwd(z, z, tau, 0, lse, dloss, VIEWS)


def launch_info_nce_fwd(
    q: Tensor, keys: Tensor, positives: Tensor, tau: Tensor, label_offset: int, kind: tl.constexpr, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, rank, lse, dq); dq is empty without `with_grad`."""
    (B, D), K, sum_dtype = q.shape, keys.shape[0], acc_dtype(q.dtype)
    loss, lse = q.new_empty(B, dtype=sum_dtype), q.new_empty(B, dtype=sum_dtype)
    rank = q.new_empty(B, dtype=torch.int64)
    dq = q.new_empty((B, D) if with_grad else 0, dtype=sum_dtype)
    if B == 0:
        return loss, rank, lse, dq
    q, keys, positives = contiguous_rows(q), contiguous_rows(keys), contiguous_rows(positives)
    operand = operand_dtype(sum_dtype, q, keys)
    if operand == torch.float64:  # Triton fails to compile a product of float64 made from 16 bits
        q, keys = q.double(), keys.double()
    launch_plan = plan(B, K, D, operand.itemsize, card(q))
    parts = launch_plan.grid[1]
    part_max, total = q.new_empty(parts, B, dtype=sum_dtype), q.new_empty(parts, B, dtype=sum_dtype)
    part_rank = q.new_empty(parts, B, dtype=torch.int32)
    weighted = q.new_empty((parts, B, D) if with_grad else 0, dtype=sum_dtype)
    info_nce_fwd_kernel[launch_plan.grid](
        q,
        keys,
        positives,
        tau,
        part_max,
        total,
        part_rank,
        weighted,
        B,
        K,
        D,
        label_offset,
        launch_plan.tiles_per_part,
        q.stride(0),
        keys.stride(0),
        positives.stride(0),
        KIND=kind.value,
        WITH_GRAD=with_grad,
        **launch_plan.options(operand, sum_dtype),
    )
    info_nce_combine_kernel[(B, 1, 1)](
        q,
        positives,
        tau,
        part_max,
        total,
        part_rank,
        weighted,
        loss,
        rank,
        lse,
        dq,
        B,
        D,
        label_offset,
        parts,
        q.stride(0),
        positives.stride(0),
        KIND=kind.value,
        WITH_GRAD=with_grad,
        ACC_DTYPE=TRITON_DTYPES[sum_dtype],
        BLOCK_PARTS=16,
        BLOCK_D=min(128, launch_plan.block_d),
        num_warps=4,
    )
    return loss, rank, lse, dq


def launch_info_nce_bwd(
    keys: Tensor, queries: Tensor, tau: Tensor, label_offset: int, lse: Tensor, dloss: Tensor, kind: tl.constexpr
) -> Tensor:
    """Gradient of the keys [R, D], in the dtype of lse."""
    (R, D), C = keys.shape, queries.shape[0]
    dkeys = keys.new_empty(R, D, dtype=lse.dtype)
    if R == 0:
        return dkeys
    keys, queries, dloss = contiguous_rows(keys), contiguous_rows(queries), dloss.contiguous()
    operand = operand_dtype(lse.dtype, keys, queries)
    if operand == torch.float64:  # as in launch_info_nce_fwd
        keys, queries = keys.double(), queries.double()
    launch_plan = plan(R, C, D, operand.itemsize, card(keys))
    parts = launch_plan.grid[1]
    # Softmax times a loss's gradient may lie outside float16's range: there `unit` brings the largest gradient to 256.
    unit = (dloss.abs().max() / 256).clamp(min=1e-30) if operand == torch.float16 and C else dloss.new_ones(())
    partial_sums = dkeys if parts == 1 else keys.new_empty(parts, R, D, dtype=lse.dtype)
    info_nce_bwd_kernel[launch_plan.grid](
        keys,
        queries,
        tau,
        lse,
        dloss,
        unit,
        partial_sums,
        R,
        C,
        D,
        label_offset,
        launch_plan.tiles_per_part,
        keys.stride(0),
        queries.stride(0),
        KIND=kind.value,
        **launch_plan.options(operand, lse.dtype),
    )
    return dkeys if parts == 1 else partial_sums.sum(0)
