"""The residual addition and the layer norm behind it: one pass over the values forward, one backward.

Forward. A program holds a few whole rows: their sum is written, its moments are taken of the values in the registers,
and the normalised rows are written in the dtype of the next matrix product.

    bytes        N·D·(2·s_x + s_delta + s_normed), 2 numbers a row; without a delta N·D·(s_x + s_normed)
    operations   none of note

Backward. Programs take rows in turn, as many programs as fill the card. Each keeps the sums for the gradients of weight
and bias of its rows in registers and writes them once; torch adds them up. Which rows meet in a sum depends on the card
alone, so the same card always gives the same bits.

    bytes        N·D·(s_normed + 3·s_x + s_delta), 2 numbers a row, and two partial sums [D] a program
    operations   none of note

Why the tiles are as they are: whole rows, since both directions need sums over a row before they can write it, and
1,024 values on 2 warps, 16 a thread, of which the backward pass holds four tensors. Forward all sizes are alike on an
H200; backward this one is the fastest there, on 8 programs a multiprocessor, and larger tiles take up to four times as
long. A row of more than 16,384 values would not fit the registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import ARCHITECTURES, TRITON_DTYPES, Launch, card, power_of_2, two_floats, wide

# {architecture: warps of a program that holds one tile, and the bytes of float32 in it}; wider rows take more warps
NORM = dict.fromkeys(ARCHITECTURES, Launch(2, 4096))
PROGRAMS = 8  # of the backward pass, a multiprocessor
WIDEST = 16384


@triton.jit
def _values(ptr, at, inside, DTYPE: tl.constexpr):
    return tl.load(ptr + at, mask=inside, other=0.0).to(DTYPE)


@triton.jit
def _norm(
    x_ptr,
    delta_ptr,
    weight_ptr,
    bias_ptr,
    total_ptr,
    normed_ptr,
    mean_ptr,
    rstd_ptr,
    N,
    D,
    eps,
    rest,
    WITH_DELTA: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    eps = tl.cast(eps, WIDE) + tl.cast(rest, WIDE)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < N)[:, None] & (column < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    x = _values(x_ptr, at, inside, WIDE)
    if WITH_DELTA:
        total = (x + _values(delta_ptr, at, inside, WIDE)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, total, mask=inside)
        x = total.to(WIDE)
    mean = tl.sum(x, 1) / D
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    weight = _values(weight_ptr, column, column < D, WIDE)
    bias = _values(bias_ptr, column, column < D, WIDE)
    normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + at, normed.to(NARROW).to(normed_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean, mask=row < N)
    tl.store(rstd_ptr + row, rstd, mask=row < N)


@triton.jit
def _norm_bwd(
    dnormed_ptr,
    dsum_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    dx_ptr,
    ddelta_ptr,
    dweight_ptr,
    dbias_ptr,
    N,
    D,
    programs,
    WITH_SUM: tl.constexpr,
    WITH_DELTA: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    weight = _values(weight_ptr, column, column < D, WIDE)
    dweight = tl.zeros([COLUMNS], WIDE)
    dbias = tl.zeros([COLUMNS], WIDE)
    for start in range(tl.program_id(0) * ROWS, N, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < N)[:, None] & (column < D)[None, :]
        at = row.to(tl.int64)[:, None] * D + column[None, :]
        dnormed = _values(dnormed_ptr, at, inside, WIDE)
        total = _values(total_ptr, at, inside, WIDE)
        mean = tl.load(mean_ptr + row, mask=row < N, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < N, other=0.0)
        normal = (total - mean[:, None]) * rstd[:, None]  # wrong outside, where dnormed is 0
        dweight += tl.sum(dnormed * normal, 0)
        dbias += tl.sum(dnormed, 0)
        scaled = dnormed * weight[None, :]
        shift = tl.sum(scaled, 1) / D
        slope = tl.sum(scaled * normal, 1) / D
        dx = (scaled - shift[:, None] - normal * slope[:, None]) * rstd[:, None]
        if WITH_SUM:
            dx += _values(dsum_ptr, at, inside, WIDE)
        rounded = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + at, rounded, mask=inside)
        if WITH_DELTA:
            tl.store(ddelta_ptr + at, rounded.to(NARROW).to(ddelta_ptr.dtype.element_ty), mask=inside)
    own = tl.program_id(0) * D + column
    tl.store(dweight_ptr + own, dweight, mask=column < D)
    tl.store(dbias_ptr + own, dbias, mask=column < D)


def norm_tile(D: int, launch: Launch) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program."""
    if D > WIDEST:
        raise ValueError(
            f"residual_norm: on a GPU rows of up to {WIDEST} values, got {D}: add, then use F.layer_norm, or run it "
            "under fastssl.ops.dispatch.reference()"
        )
    columns = power_of_2(D)
    rows = max(1, launch.bytes // (4 * columns))
    return rows, columns, min(16, max(launch.warps, columns * 4 * launch.warps // launch.bytes))


def norm_programs(N: int, rows: int, multiprocessors: int) -> int:
    """Of the backward pass."""
    return max(1, min(triton.cdiv(N, rows), PROGRAMS * multiprocessors))


def _narrow(dtype: torch.dtype) -> tl.dtype:
    """The dtype through which torch converts to `dtype`: float32 to 16 bits, from float64 too."""
    return TRITON_DTYPES[dtype if dtype.itemsize > 2 else torch.float32]


def residual_norm_fwd(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, delta = x.contiguous(), None if delta is None else delta.contiguous()
    (B, L, D), kind = x.shape, wide(x.dtype)
    total, normed = x.new_empty(0 if delta is None else x.shape), x.new_empty(x.shape, dtype=dtype)
    mean, rstd = x.new_empty(B, L, dtype=kind), x.new_empty(B, L, dtype=kind)
    if mean.numel():
        rows, columns, warps = norm_tile(D, NORM[card(x).arch])
        _norm[(triton.cdiv(B * L, rows),)](
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
            WIDE=TRITON_DTYPES[kind],
            NARROW=_narrow(dtype),
            ROWS=rows,
            COLUMNS=columns,
            num_warps=warps,
        )
    return total, normed, mean, rstd


def residual_norm_bwd(
    dnormed: Tensor, dsum: Tensor | None, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, narrow: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dnormed, dsum, total = dnormed.contiguous(), None if dsum is None else dsum.contiguous(), total.contiguous()
    (B, L, D), kind = total.shape, wide(total.dtype)
    apart = narrow != total.dtype
    dx, ddelta = total.new_empty(total.shape), total.new_empty(total.shape if apart else 0, dtype=narrow)
    if not mean.numel():
        return dx, ddelta, total.new_zeros(D, dtype=kind), total.new_zeros(D, dtype=kind)
    of = card(total)
    rows, columns, warps = norm_tile(D, NORM[of.arch])
    programs = norm_programs(B * L, rows, of.multiprocessors)
    sums = total.new_empty(2, programs, D, dtype=kind)
    _norm_bwd[(programs,)](
        dnormed,
        dsum,
        total,
        mean.contiguous(),
        rstd.contiguous(),
        weight.contiguous(),
        dx,
        ddelta,
        *sums,
        B * L,
        D,
        programs,
        WITH_SUM=dsum is not None,
        WITH_DELTA=apart,
        WIDE=TRITON_DTYPES[kind],
        NARROW=_narrow(narrow),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=warps,
    )
    return dx, ddelta, *sums.sum(1)
