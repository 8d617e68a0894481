"""The residual addition and the layer norm of its sum: one pass over the values forward, one backward.

Forward. A program holds a few whole rows: it writes their sum, takes the moments of the values in its registers, and
writes the normalised rows in the dtype of the next matrix product.

    bytes        N·D·(2·s_x + s_delta + s_normed), 2 numbers a row; without a delta N·D·(s_x + s_normed)
    operations   a few for each value: nothing beside the bytes

Backward. Programs take blocks of rows in turn, as many programs as fill the card. Each sums its rows' gradients of
weight and bias in registers and writes them once; torch adds these partial sums up. Which rows meet in a partial sum
depends on the card alone, so the same card always gives the same bits.

    bytes        N·D·(s_normed + 3·s_x + s_delta), 2 numbers a row, and two partial sums [D] a program
    operations   a few for each value

Tile sizes: whole rows, since both directions need sums over a row before they can write it; 1,024 values on 2 warps are
16 a thread, of which the backward pass holds four tensors. On an H200 all sizes are equally fast forward. Backward this
size is the fastest, with 8 programs per multiprocessor; larger tiles take up to four times as long. A row of more than
16,384 values would not fit the registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import ARCHITECTURES, TRITON_DTYPES, Launch, acc_dtype, card, cast_via, power_of_2, two_floats

# {architecture: warps of a program that holds one tile, and the bytes of float32 in it}; wider rows take more warps
NORM = dict.fromkeys(ARCHITECTURES, Launch(2, 4096))
PROGRAMS = 8  # programs of the backward pass per multiprocessor
WIDEST = 16384  # largest number of values in a row


@triton.jit
def _load(x_ptr, offsets, mask, ACC_DTYPE: tl.constexpr):
    """Values converted to the dtype of sums, zeros where masked out."""
    return tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC_DTYPE)


@triton.jit
def residual_norm_fwd_kernel(
    x_ptr,  # [N, D]
    delta_ptr,  # [N, D], or None
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    total_ptr,  # [N, D], written where there is a delta
    normed_ptr,  # [N, D], written
    mean_ptr,  # [N], written
    rstd_ptr,  # [N], written: 1 / √(variance + eps)
    N,
    D,
    eps,
    eps_rest,  # rounding error of `eps` as float32
    WITH_DELTA: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    CAST_VIA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS whole rows."""
    eps = tl.cast(eps, ACC_DTYPE) + tl.cast(eps_rest, ACC_DTYPE)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (row < N)[:, None] & (column < D)[None, :]
    offsets = row.to(tl.int64)[:, None] * D + column[None, :]
    x = _load(x_ptr, offsets, mask, ACC_DTYPE)
    if WITH_DELTA:
        total = (x + _load(delta_ptr, offsets, mask, ACC_DTYPE)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offsets, total, mask=mask)
        x = total.to(ACC_DTYPE)
    mean = tl.sum(x, 1) / D
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    weight = _load(weight_ptr, column, column < D, ACC_DTYPE)
    bias = _load(bias_ptr, column, column < D, ACC_DTYPE)
    normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + offsets, normed.to(CAST_VIA).to(normed_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean, mask=row < N)
    tl.store(rstd_ptr + row, rstd, mask=row < N)


@triton.jit
def residual_norm_bwd_kernel(
    dnormed_ptr,  # [N, D]
    dsum_ptr,  # [N, D], or None
    total_ptr,  # [N, D]
    mean_ptr,  # [N]
    rstd_ptr,  # [N]
    weight_ptr,  # [D]
    dx_ptr,  # [N, D], written
    ddelta_ptr,  # [N, D], written where delta has another dtype than x
    dweight_ptr,  # [programs, D], written: partial sums
    dbias_ptr,  # [programs, D], written: partial sums
    N,
    D,
    programs,
    WITH_SUM: tl.constexpr,
    WITH_DELTA: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    CAST_VIA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Every `programs`-th block of ROWS whole rows."""
    column = tl.arange(0, COLUMNS)
    weight = _load(weight_ptr, column, column < D, ACC_DTYPE)
    dweight = tl.zeros([COLUMNS], ACC_DTYPE)
    dbias = tl.zeros([COLUMNS], ACC_DTYPE)
    for start in range(tl.program_id(0) * ROWS, N, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < N)[:, None] & (column < D)[None, :]
        offsets = row.to(tl.int64)[:, None] * D + column[None, :]
        dnormed = _load(dnormed_ptr, offsets, mask, ACC_DTYPE)
        total = _load(total_ptr, offsets, mask, ACC_DTYPE)
        mean = tl.load(mean_ptr + row, mask=row < N, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < N, other=0.0)
        standardised = (total - mean[:, None]) * rstd[:, None]  # not valid outside the rows, where dnormed is 0
        dweight += tl.sum(dnormed * standardised, 0)
        dbias += tl.sum(dnormed, 0)
        scaled = dnormed * weight[None, :]
        shift = tl.sum(scaled, 1) / D
        slope = tl.sum(scaled * standardised, 1) / D
        dx = (scaled - shift[:, None] - standardised * slope[:, None]) * rstd[:, None]
        if WITH_SUM:
            dx += _load(dsum_ptr, offsets, mask, ACC_DTYPE)
        rounded = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + offsets, rounded, mask=mask)
        if WITH_DELTA:
            tl.store(ddelta_ptr + offsets, rounded.to(CAST_VIA).to(ddelta_ptr.dtype.element_ty), mask=mask)
    partial = tl.program_id(0) * D + column
    tl.store(dweight_ptr + partial, dweight, mask=column < D)
    tl.store(dbias_ptr + partial, dbias, mask=column < D)


def norm_tile(D: int, launch: Launch) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program."""
    if D > WIDEST:
        raise ValueError(
            f"residual_norm: x must have at most {WIDEST} values a row on a GPU, got {D}; add and call F.layer_norm, "
            "or run it in plain torch: `with fastssl.ops.dispatch.reference(): …`"
        )
    columns = power_of_2(D)
    rows = max(1, launch.bytes // (4 * columns))
    return rows, columns, min(16, max(launch.warps, columns * 4 * launch.warps // launch.bytes))


def norm_programs(N: int, rows: int, multiprocessors: int) -> int:
    """Number of programs of the backward pass."""
    return max(1, min(triton.cdiv(N, rows), PROGRAMS * multiprocessors))


def residual_norm_fwd(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, delta = x.contiguous(), None if delta is None else delta.contiguous()
    (B, L, D), sum_dtype = x.shape, acc_dtype(x.dtype)
    total, normed = x.new_empty(0 if delta is None else x.shape), x.new_empty(x.shape, dtype=dtype)
    mean, rstd = x.new_empty(B, L, dtype=sum_dtype), x.new_empty(B, L, dtype=sum_dtype)
    if mean.numel():
        rows, columns, warps = norm_tile(D, NORM[card(x).arch])
        residual_norm_fwd_kernel[(triton.cdiv(B * L, rows),)](
            x,
            delta,
            weight.contiguous(),
            bias.contiguous(),
            total,
            normed,
            mean,
            rstd,
            B * L,
            D,
            *two_floats(eps),
            WITH_DELTA=delta is not None,
            ACC_DTYPE=TRITON_DTYPES[sum_dtype],
            CAST_VIA=cast_via(dtype),
            ROWS=rows,
            COLUMNS=columns,
            num_warps=warps,
        )
    return total, normed, mean, rstd


def residual_norm_bwd(
    dnormed: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    delta_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dnormed, dsum, total = dnormed.contiguous(), None if dsum is None else dsum.contiguous(), total.contiguous()
    (B, L, D), sum_dtype = total.shape, acc_dtype(total.dtype)
    with_delta = delta_dtype != total.dtype
    dx, ddelta = total.new_empty(total.shape), total.new_empty(total.shape if with_delta else 0, dtype=delta_dtype)
    if not mean.numel():
        return dx, ddelta, total.new_zeros(D, dtype=sum_dtype), total.new_zeros(D, dtype=sum_dtype)
    gpu = card(total)
    rows, columns, warps = norm_tile(D, NORM[gpu.arch])
    programs = norm_programs(B * L, rows, gpu.multiprocessors)
    partial_sums = total.new_empty(2, programs, D, dtype=sum_dtype)  # of dweight and dbias
    residual_norm_bwd_kernel[(programs,)](
        dnormed,
        dsum,
        total,
        mean.contiguous(),
        rstd.contiguous(),
        weight.contiguous(),
        dx,
        ddelta,
        *partial_sums,
        B * L,
        D,
        programs,
        WITH_SUM=dsum is not None,
        WITH_DELTA=with_delta,
        ACC_DTYPE=TRITON_DTYPES[sum_dtype],
        CAST_VIA=cast_via(delta_dtype),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=warps,
    )
    return dx, ddelta, *partial_sums.sum(1)
