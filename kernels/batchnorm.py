"""Batch norm in training with the addition and the ReLU after it, on values in channels_last order.

Forward: moments of each channel, then one pass that normalises, adds and clips. Backward: two sums of each channel,
then one pass that writes the gradients. A program of the first pass of either direction takes every `programs`-th block
of rows (pixels) of one part of the batch and of one block of channels, and writes its result once; a small kernel
merges the moments, and torch adds up the sums. So the same card always gives the same bits.

    bytes        forward R·C·3·s, with a residual 4·s; backward R·C·5·s, with a residual and a ReLU 8·s (R rows, s bytes
                 of an element); the partial results are small
    operations   a few for each value: nothing beside the bytes

Moments are those of the differences from the part's first row, merged block by block by the formula of Chan et al.
(1979): E[x²] − mean² would cancel where the mean is far from zero.

Tile sizes: 2,048 values on 4 warps, 16 a thread; up to 128 channels, whose 16-bit values are two sectors of 128 bytes.
Not measured.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import ARCHITECTURES, TRITON_DTYPES, Launch, acc_dtype, card, cast_via, power_of_2, two_floats

BATCH_NORM = dict.fromkeys(ARCHITECTURES, Launch(4, 8192))  # warps of a program, bytes of the sums' dtype in its tile
PROGRAMS = 8  # programs of a first pass per multiprocessor
MOST_PARTIAL_RESULTS = 256  # of a channel in a part of the batch, which one program merges


@triton.jit
def _tile_of(block, column_block, part, splits, pixels, count, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(offsets, mask) of a block of rows of a part, and (columns, mask) of a block of channels.

    Row j of part s is pixel j mod `pixels` of sample (j // pixels)·splits + s.
    """
    j = block * ROWS + tl.arange(0, ROWS)
    row = ((j // pixels) * splits + part).to(tl.int64) * pixels + j % pixels
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    return row[:, None] * C + column[None, :], (j < count)[:, None] & (column < C)[None, :], column, column < C


@triton.jit
def _load_channels(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, part, column, C):
    """Mean, 1 / √(variance + eps), weight and bias of some channels of a part."""
    mask = column < C
    mean = tl.load(mean_ptr + part * C + column, mask=mask, other=0.0)
    invstd = tl.load(invstd_ptr + part * C + column, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0)
    bias = tl.load(bias_ptr + column, mask=mask, other=0.0)
    return mean, invstd, weight, bias


@triton.jit
def batch_norm_fwd_kernel(
    x_ptr,  # [B, pixels, C]
    mean_ptr,  # [splits, programs, C], written: means of the differences from the part's first row
    square_ptr,  # [splits, programs, C], written: sums of squares around that mean
    count,  # rows of a part
    pixels,
    C,
    splits,
    programs,
    ACC_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Moments of every `programs`-th block of rows of a part, in a block of channels."""
    part, column = tl.program_id(1), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(x_ptr + part.to(tl.int64) * pixels * C + column, mask=column < C, other=0.0).to(ACC_DTYPE)
    mean = tl.zeros([COLUMNS], ACC_DTYPE)
    square = tl.zeros([COLUMNS], ACC_DTYPE)
    seen = tl.full([], 0.0, ACC_DTYPE)
    for block in range(tl.program_id(0), tl.cdiv(count, ROWS), programs):
        offsets, mask, _, _ = _tile_of(block, tl.program_id(2), part, splits, pixels, count, C, ROWS, COLUMNS)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC_DTYPE)
        x = tl.where(mask, x - first[None, :], 0.0)
        rows = tl.minimum(count - block * ROWS, ROWS).to(ACC_DTYPE)
        block_mean = tl.sum(x, 0) / rows
        centred = tl.where(mask, x - block_mean[None, :], 0.0)
        difference, total = block_mean - mean, seen + rows
        square += tl.sum(centred * centred, 0) + difference * difference * (seen * rows / total)
        mean += difference * (rows / total)
        seen = total
    at = (part * programs + tl.program_id(0)) * C + column
    tl.store(mean_ptr + at, mean, mask=column < C)
    tl.store(square_ptr + at, square, mask=column < C)


@triton.jit
def batch_norm_merge_kernel(
    x_ptr,  # [B, pixels, C]
    partial_mean_ptr,  # [splits, programs, C]
    partial_square_ptr,  # [splits, programs, C]
    mean_ptr,  # [splits, C], written
    invstd_ptr,  # [splits, C], written: 1 / √(variance + eps)
    var_ptr,  # [splits, C], written: unbiased
    count,
    pixels,
    C,
    programs,
    eps,
    eps_rest,  # rounding error of `eps` as float32
    ACC_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,  # of a block of batch_norm_fwd_kernel
    PROGRAMS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Moments of a block of channels of a part, from those of its programs."""
    part, program = tl.program_id(1), tl.arange(0, PROGRAMS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (program < programs)[:, None] & (column < C)[None, :]
    at = (part * programs + program)[:, None] * C + column[None, :]
    means = tl.load(partial_mean_ptr + at, mask=mask, other=0.0)
    squares = tl.load(partial_square_ptr + at, mask=mask, other=0.0)
    blocks = tl.cdiv(count, ROWS)
    rows = (blocks - program + programs - 1) // programs * ROWS  # of each program, if all blocks were whole
    rows -= tl.where(program == (blocks - 1) % programs, blocks * ROWS - count, 0)
    weights = tl.where(program < programs, rows, 0).to(ACC_DTYPE)[:, None]
    total = tl.cast(count, ACC_DTYPE)
    mean = tl.sum(weights * means, 0) / total
    centred = tl.where(mask, means - mean[None, :], 0.0)
    square = tl.sum(squares + weights * centred * centred, 0)
    first = tl.load(x_ptr + part.to(tl.int64) * pixels * C + column, mask=column < C, other=0.0).to(ACC_DTYPE)
    at = part * C + column
    tl.store(mean_ptr + at, first + mean, mask=column < C)
    tl.store(
        invstd_ptr + at,
        1.0 / tl.sqrt(square / total + (tl.cast(eps, ACC_DTYPE) + tl.cast(eps_rest, ACC_DTYPE))),
        mask=column < C,
    )
    tl.store(var_ptr + at, square / (total - 1.0), mask=column < C)


@triton.jit
def batch_norm_apply_kernel(
    x_ptr,  # [B, pixels, C]
    residual_ptr,  # [B, pixels, C], or None
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    mean_ptr,  # [splits, C]
    invstd_ptr,  # [splits, C]
    y_ptr,  # [B, pixels, C], written
    count,
    pixels,
    C,
    splits,
    WITH_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    CAST_VIA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One block of rows of a part, in a block of channels."""
    part = tl.program_id(1)
    offsets, mask, column, _ = _tile_of(
        tl.program_id(0), tl.program_id(2), part, splits, pixels, count, C, ROWS, COLUMNS
    )
    mean, invstd, weight, bias = _load_channels(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, part, column, C)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC_DTYPE)
    y = (x - mean[None, :]) * invstd[None, :] * weight[None, :] + bias[None, :]
    if WITH_RESIDUAL:
        y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(ACC_DTYPE)
    if RELU:
        y = tl.where(y <= 0, 0.0, y)  # NaN stays NaN
    tl.store(y_ptr + offsets, y.to(CAST_VIA).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradient(
    dy_ptr, x_ptr, y_ptr, offsets, mask, mean, invstd, weight, bias, WITH_Y: tl.constexpr, RELU: tl.constexpr
):
    """(gradient before the ReLU, standardised x) of a tile, in the dtype of the moments."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(mean.dtype)
    gradient = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(mean.dtype)
    standardised = (x - mean[None, :]) * invstd[None, :]
    if RELU:
        if WITH_Y:
            clipped = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(mean.dtype)
        else:
            clipped = standardised * weight[None, :] + bias[None, :]
        gradient = tl.where(clipped <= 0, 0.0, gradient)
    return gradient, standardised


@triton.jit
def batch_norm_bwd_kernel(
    dy_ptr,  # [B, pixels, C]
    x_ptr,  # [B, pixels, C]
    y_ptr,  # [B, pixels, C], or None
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    mean_ptr,  # [splits, C]
    invstd_ptr,  # [splits, C]
    dweight_ptr,  # [splits, programs, C], written: partial sums
    dbias_ptr,  # [splits, programs, C], written: partial sums
    count,
    pixels,
    C,
    splits,
    programs,
    WITH_Y: tl.constexpr,
    RELU: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums over every `programs`-th block of rows of a part, in a block of channels."""
    part, column = tl.program_id(1), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    mean, invstd, weight, bias = _load_channels(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, part, column, C)
    dweight = tl.zeros([COLUMNS], ACC_DTYPE)
    dbias = tl.zeros([COLUMNS], ACC_DTYPE)
    for block in range(tl.program_id(0), tl.cdiv(count, ROWS), programs):
        offsets, mask, _, _ = _tile_of(block, tl.program_id(2), part, splits, pixels, count, C, ROWS, COLUMNS)
        gradient, standardised = _gradient(
            dy_ptr, x_ptr, y_ptr, offsets, mask, mean, invstd, weight, bias, WITH_Y, RELU
        )
        dweight += tl.sum(tl.where(mask, gradient * standardised, 0.0), 0)
        dbias += tl.sum(gradient, 0)
    at = (part * programs + tl.program_id(0)) * C + column
    tl.store(dweight_ptr + at, dweight, mask=column < C)
    tl.store(dbias_ptr + at, dbias, mask=column < C)


@triton.jit
def batch_norm_dx_kernel(
    dy_ptr,  # [B, pixels, C]
    x_ptr,  # [B, pixels, C]
    y_ptr,  # [B, pixels, C], or None
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    mean_ptr,  # [splits, C]
    invstd_ptr,  # [splits, C]
    dweight_ptr,  # [splits, C]
    dbias_ptr,  # [splits, C]
    dx_ptr,  # [B, pixels, C], written
    dresidual_ptr,  # [B, pixels, C], written where y is given
    count,
    pixels,
    C,
    splits,
    WITH_Y: tl.constexpr,
    RELU: tl.constexpr,
    CAST_VIA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One block of rows of a part, in a block of channels."""
    part = tl.program_id(1)
    offsets, mask, column, inside = _tile_of(
        tl.program_id(0), tl.program_id(2), part, splits, pixels, count, C, ROWS, COLUMNS
    )
    mean, invstd, weight, bias = _load_channels(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, part, column, C)
    gradient, standardised = _gradient(dy_ptr, x_ptr, y_ptr, offsets, mask, mean, invstd, weight, bias, WITH_Y, RELU)
    total = tl.cast(count, mean.dtype)
    shift = tl.load(dbias_ptr + part * C + column, mask=inside, other=0.0) / total
    slope = tl.load(dweight_ptr + part * C + column, mask=inside, other=0.0) / total
    dx = (gradient - shift[None, :] - standardised * slope[None, :]) * (invstd * weight)[None, :]
    tl.store(dx_ptr + offsets, dx.to(CAST_VIA).to(dx_ptr.dtype.element_ty), mask=mask)
    if WITH_Y:
        tl.store(dresidual_ptr + offsets, gradient.to(CAST_VIA).to(dresidual_ptr.dtype.element_ty), mask=mask)


def batch_norm_tile(C: int, size: int, launch: Launch) -> tuple[int, int]:
    """(rows, channels) of a program's tile, for sums of `size` bytes."""
    columns = min(128, power_of_2(C))
    return max(1, launch.bytes // (size * columns)), columns


def batch_norm_programs(count: int, C: int, splits: int, tile: tuple[int, int], multiprocessors: int) -> int:
    """Programs of a first pass for each part and block of channels."""
    rows, columns = tile
    target = PROGRAMS * multiprocessors // (splits * triton.cdiv(C, columns))
    return max(1, min(triton.cdiv(count, rows), target, MOST_PARTIAL_RESULTS))


def _plan(x: Tensor, splits: int) -> tuple[tuple[int, int, int, int], dict, int, int]:
    """(rows of a part, pixels, channels, parts), tile and warps of the launches, programs, blocks of channels."""
    gpu, C = card(x), x.shape[1]
    pixels, launch = x[0, 0].numel(), BATCH_NORM[gpu.arch]
    count = x.shape[0] // splits * pixels
    tile = batch_norm_tile(C, acc_dtype(x.dtype).itemsize, launch)
    programs = batch_norm_programs(count, C, splits, tile, gpu.multiprocessors)
    return (
        (count, pixels, C, splits),
        {"ROWS": tile[0], "COLUMNS": tile[1], "num_warps": launch.warps},
        programs,
        (triton.cdiv(C, tile[1])),
    )


def batch_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, splits: int, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes, tile, programs, column_blocks = _plan(x, splits)
    count, pixels, C, _ = sizes
    acc = TRITON_DTYPES[weight.dtype]
    partial = weight.new_empty(2, splits, programs, C)
    batch_norm_fwd_kernel[(programs, splits, column_blocks)](x, *partial, *sizes, programs, ACC_DTYPE=acc, **tile)
    mean, invstd, var = (weight.new_empty(splits, C) for _ in range(3))
    batch_norm_merge_kernel[(triton.cdiv(C, 16), splits)](
        x,
        *partial,
        mean,
        invstd,
        var,
        count,
        pixels,
        C,
        programs,
        *two_floats(eps),
        ACC_DTYPE=acc,
        ROWS=tile["ROWS"],
        PROGRAMS=power_of_2(programs),
        COLUMNS=16,
        num_warps=4,
    )
    y = torch.empty_like(x)
    batch_norm_apply_kernel[(triton.cdiv(count, tile["ROWS"]), splits, column_blocks)](
        x,
        residual,
        weight,
        bias,
        mean,
        invstd,
        y,
        *sizes,
        WITH_RESIDUAL=residual is not None,
        RELU=relu,
        ACC_DTYPE=acc,
        CAST_VIA=cast_via(x.dtype),
        **tile,
    )
    return y, mean, invstd, var


def batch_norm_bwd(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes, tile, programs, column_blocks = _plan(x, len(mean))
    count, _, C, splits = sizes
    options = {"WITH_Y": y is not None, "RELU": relu}
    partial = weight.new_empty(2, splits, programs, C)
    tensors = (dy, x, y, weight, bias, mean, invstd)
    batch_norm_bwd_kernel[(programs, splits, column_blocks)](
        *tensors, *partial, *sizes, programs, ACC_DTYPE=TRITON_DTYPES[weight.dtype], **options, **tile
    )
    sums = partial.sum(2)  # of dweight and dbias, [2, splits, C]
    dx, dresidual = torch.empty_like(x), x.new_empty(0) if y is None else torch.empty_like(x)
    batch_norm_dx_kernel[(triton.cdiv(count, tile["ROWS"]), splits, column_blocks)](
        *tensors, *sums, dx, dresidual, *sizes, CAST_VIA=cast_via(x.dtype), **options, **tile
    )
    return dx, *sums.sum(1), dresidual
