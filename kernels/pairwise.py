"""The logistic loss of all pairs, tile by tile.

`pairwise_sigmoid_kernel` holds BLOCK_B rows of one side and takes BLOCK_K rows of the other at a time, as
`info_nce_fwd_kernel` does: it adds up the losses and derivatives of each row, and the other side's rows with the
derivatives as weights, which is the row's gradient. No maximum runs along, since there is no softmax. A second launch
with the sides exchanged gives the other gradient: no atomics, no logits in memory.

    bytes        the other side's rows once for each block of rows, from the L2 cache; parts·R·(D + 2)·4 of partial
                 results, written and read once
    operations   8·B·M·D with gradients, 2·B·M·D without; a width beyond the last row of TILES repeats the logits for
                 each part of the columns
    limit        B = M = 32,768, D = 512: 4.4 TFLOP, so tensor cores

Tile sizes are those of the contrastive kernels, whose two products are the same, with a few that need fewer registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contrastive_plan import PAIR_TILES, plan
from .tile import LOG2E, acc_dtype, card, contiguous_rows, dot_in_chunks, load_tile, operand_dtype

# Derivatives lie between −1 and 1, most of them near 0: in float16 they are multiplied by this, so that few are below
# its normal numbers.
FLOAT16_UNIT = 16384.0


@triton.jit
def _softplus(x, ACC_DTYPE: tl.constexpr):
    """log(1 + e^x) and its derivative σ(x)."""
    t = tl.exp2(-tl.abs(x) * LOG2E)
    if tl.float64 == ACC_DTYPE:
        one_and_t = 1 + t
        log1p = tl.where(one_and_t == 1, t, tl.log(one_and_t) * t / tl.where(one_and_t == 1, 1, one_and_t - 1))
    else:  # 2·artanh(t / (2 + t)), since a GPU's logarithm is inexact near 1
        u = t / (2 + t)
        square = u * u
        p = 1 / 13
        p = p * square + 1 / 11
        p = p * square + 1 / 9
        p = p * square + 1 / 7
        p = p * square + 1 / 5
        p = p * square + 1 / 3
        log1p = 2 * u * (p * square + 1)
    return tl.where(x < 0, 0.0, x) + log1p, tl.where(x > 0, 1.0, t) / (1 + t)


@triton.jit
def pairwise_sigmoid_kernel(
    rows_ptr,  # [R, D], rows contiguous
    others_ptr,  # [C, D], rows contiguous
    scale_ptr,  # one value
    bias_ptr,  # one value
    loss_ptr,  # [parts, R], written with WITH_LOSS: losses of each row's pairs
    slope_ptr,  # [parts, R], written with WITH_LOSS: their derivatives with respect to the logits
    sums_ptr,  # [parts, R, D], written with WITH_SUMS: the other side's rows times these derivatives
    R,
    C,
    D,
    offset,  # row i and the other side's row i + offset belong together
    tiles_per_part,
    unit,  # by which derivatives are multiplied before they are rounded to 16 bits
    stride_rows_r,
    stride_others_c,
    WITH_LOSS: tl.constexpr,
    WITH_SUMS: tl.constexpr,
    CHUNK: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One part of the other side's rows for one block of rows."""
    part = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_r = row < R
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)  # of the sums; a wide D has several blocks
    scale, bias = tl.load(scale_ptr).to(ACC_DTYPE), tl.load(bias_ptr).to(ACC_DTYPE)
    if CHUNK == 0:
        rows = load_tile(rows_ptr, row, in_r, column, stride_rows_r, D).to(OPERAND)  # [BLOCK_B, BLOCK_D]
    losses, slopes = tl.zeros([BLOCK_B], ACC_DTYPE), tl.zeros([BLOCK_B], ACC_DTYPE)
    sums = tl.zeros([BLOCK_B, BLOCK_D], ACC_DTYPE)
    for tile in range(part * tiles_per_part, tl.minimum((part + 1) * tiles_per_part, tl.cdiv(C, BLOCK_K))):
        other = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        in_c = other < C
        if CHUNK == 0:
            others = load_tile(others_ptr, other, in_c, column, stride_others_c, D).to(OPERAND)  # [BLOCK_K, BLOCK_D]
            logits = tl.dot(rows, tl.trans(others), input_precision=PRECISION, out_dtype=ACC_DTYPE)
        else:
            logits = dot_in_chunks(
                rows_ptr,
                row,
                in_r,
                stride_rows_r,
                others_ptr,
                other,
                in_c,
                stride_others_c,
                D,
                OPERAND,
                ACC_DTYPE,
                PRECISION,
                CHUNK,
            )
            if WITH_SUMS:
                others = load_tile(others_ptr, other, in_c, column, stride_others_c, D).to(OPERAND)
        logits = logits * scale + bias  # [BLOCK_B, BLOCK_K]
        is_positive = other[None, :] == row[:, None] + offset
        loss, slope = _softplus(tl.where(is_positive, -logits, logits), ACC_DTYPE)
        slope = tl.where(in_c[None, :], tl.where(is_positive, -slope, slope), 0.0)
        if WITH_LOSS:
            losses += tl.sum(tl.where(in_c[None, :], loss, 0.0), 1)
            slopes += tl.sum(slope, 1)
        if WITH_SUMS:
            weights = (slope * unit).to(OPERAND)
            sums = tl.dot(weights, others, sums, input_precision=PRECISION, out_dtype=ACC_DTYPE)
    partial = part.to(tl.int64) * R + row
    if WITH_LOSS:  # noqa: SIM102 - the condition of the compiler apart from that of the program
        if tl.program_id(2) == 0:
            tl.store(loss_ptr + partial, losses, mask=in_r)
            tl.store(slope_ptr + partial, slopes, mask=in_r)
    if WITH_SUMS:
        mask = in_r[:, None] & (column < D)[None, :]
        tl.store(sums_ptr + partial[:, None] * D + column[None, :], sums / unit, mask=mask)


def pairwise_sigmoid_fwd(
    q: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, label_offset: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, B = acc_dtype(q.dtype), q.shape[0]
    losses, slopes, q_sums = launch_pairwise_sigmoid(q, keys, scale, bias, label_offset, True, with_grad)
    loss = losses.sum() / B
    if not with_grad:
        return loss, *(q.new_empty(0, dtype=dtype) for _ in range(4))
    _, _, key_sums = launch_pairwise_sigmoid(keys, q, scale, bias, -label_offset, False, True, dtype)
    factor = scale.to(dtype) / B
    return loss, q_sums * factor, key_sums * factor, (q.to(dtype) * q_sums).sum() / B, slopes.sum() / B


def launch_pairwise_sigmoid(
    rows: Tensor,
    others: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int,
    with_loss: bool,
    with_sums: bool,
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [parts, R], derivatives [parts, R], sums [R, D]); empty where they are not asked for."""
    (R, D), C, sum_dtype = rows.shape, others.shape[0], sum_dtype or acc_dtype(rows.dtype)
    rows, others = contiguous_rows(rows), contiguous_rows(others)
    operand = operand_dtype(sum_dtype, rows, others)
    if operand == torch.float64:  # Triton fails to compile a product of float64 made from 16 bits
        rows, others = rows.double(), others.double()
    launch_plan = plan(R, C, D, operand.itemsize, card(rows), PAIR_TILES)
    parts = launch_plan.grid[1]
    losses, slopes = (rows.new_empty((parts, R) if with_loss else 0, dtype=sum_dtype) for _ in range(2))
    sums = rows.new_empty((parts, R, D) if with_sums else 0, dtype=sum_dtype)
    pairwise_sigmoid_kernel[launch_plan.grid](
        rows,
        others,
        scale,
        bias,
        losses,
        slopes,
        sums,
        R,
        C,
        D,
        offset,
        launch_plan.tiles_per_part,
        FLOAT16_UNIT if operand == torch.float16 else 1.0,
        rows.stride(0),
        others.stride(0),
        WITH_LOSS=with_loss,
        WITH_SUMS=with_sums,
        **launch_plan.options(operand, sum_dtype),
    )
    return losses, slopes, (sums[0] if parts == 1 else sums.sum(0)) if with_sums else sums
