"""Resized crops of images of any sizes, RGB and YUV 4:2:0.

`crop_weights_kernel` makes torch's integer weights of both axes of every window: in float64, as torch makes them on a
CPU, since they are few. Two passes follow, as torch has them, each rounding to bytes: `crop_rows_kernel` resamples the
rows of a window into scratch memory, `crop_columns_kernel` the columns of that, and for YUV converts to RGB. So bytes
equal those of the CPU. Images are found through a table of addresses and strides: one launch for all of a batch.

    bytes        a window once; 6 for each of its rows times the crop's width, written and read again as scratch; the
                 crop once; weights, two bytes each, from the caches
    operations   a multiplication and an addition for each weight and value. Loads from the caches: rows a byte at a
                 time, at 32 a clock and multiprocessor half as long as the bytes take for triangles, as long for
                 cubics, 1.5 times for Lanczos; columns eight bytes at a time, where the width is a multiple of 16

Scratch or one pass: a program that makes a tile of the crop from its part of the window writes no scratch, and repeats
the rows that tiles share. That saves 6 of 13 bytes of a window of 380² for a crop of 224² (predicted on an H100, 256 of
them: 45 µs instead of 84), and needs a sum for each row of the tile where two suffice, since Triton has no rows that
a program picks from registers. A step takes 500 times as long: two passes, whose work grows with the weights alone.

Tile sizes: 1,024 values on 4 warps, 8 a thread. Not measured.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import ARCHITECTURES, Launch, card, power_of_2

TOUCH = 2**-20  # least part of a pixel that counts: less may be an error of rounding
CROPS = dict.fromkeys(ARCHITECTURES, Launch(4, 1024))  # warps of a program, bytes that it writes of a channel

# Columns of the tables of `Plan`:
# axes    where the window begins in its first pixel, and its length in pixels, both as the bits of float64; pixels that
#         it touches, pixels of the crop, weights of one of them, place of the first weight
# planes  address of the window, strides of rows, pixels and channels, channels, rows, axis of its rows, first row in
#         the scratch memory
# crops   1 for YUV, first rows of the three channels in the scratch memory, axes of their columns, 0
_CHROMA = tl.constexpr(128)
_PI = tl.constexpr(math.pi)


_SERIES = tl.constexpr(tuple((-1) ** n / math.factorial(2 * n + 1) for n in reversed(range(12))))


@triton.jit
def _sine(angle):
    """The sine of an angle from 0 to π, by its series around 0: the library's, for any angle, would spill registers."""
    angle = tl.minimum(angle, angle * -1.0 + _PI)
    square = angle * angle
    total = square * 0.0
    for n in tl.static_range(12):
        total = total * square + _SERIES[n]
    return angle * total


@triton.jit
def _weight(distance, KERNEL: tl.constexpr):
    """The filter at a distance in pixels of the smaller of both scales: 0 a triangle, 1 Keys' cubic of a = −1/2, 2
    Lanczos' of three lobes."""
    x = tl.abs(distance)
    if KERNEL == 2:
        angle = x * _PI
        sine = _sine(angle / 3.0)
        square = sine * sine
        lobes = square * (9.0 - 12.0 * square) / tl.where(x == 0.0, 1.0, angle * angle)
        return tl.where(x == 0.0, 1.0, tl.where(x < 3.0, lobes, 0.0))
    if KERNEL == 1:
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
        return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    return tl.where(x < 1.0, 1.0 - x, 0.0)


@triton.jit
def crop_weights_kernel(
    axes_ptr,  # [A, 6] int64
    weights_ptr,  # int16, written: for each axis [weights, crop's pixels]
    starts_ptr,  # [A, longest] int32, written: the first pixel of each pixel of the crop
    bits_ptr,  # [A] int32, written: binary places of an axis's weights
    longest,
    KERNEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weights of an axis of a window: all have as many binary places as 16 bits leave to the largest."""
    axis = tl.program_id(0).to(tl.int64)
    row = axes_ptr + axis * 6
    fraction, length = tl.load(row).to(tl.float64, bitcast=True), tl.load(row + 1).to(tl.float64, bitcast=True)
    size, out, taps, first = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    scale = length / out.to(tl.float64)
    wide = tl.maximum(scale, 1.0)
    inverse, support = 1.0 / wide, wide * (KERNEL + 1.0)
    largest = scale * 0.0
    bits, power = axis.to(tl.int32) * 0, scale * 0.0 + 1.0
    for writes in tl.static_range(2):
        for begin in range(0, out, BLOCK):
            x = begin + tl.arange(0, BLOCK)
            mask = x < out
            centre = fraction + scale * (x.to(tl.float64) + 0.5)
            start = tl.maximum((centre - support + 0.5).to(tl.int64), 0)
            count = tl.minimum((centre + support + 0.5).to(tl.int64), size) - start
            count = tl.minimum(count, taps)
            total, top = centre * 0.0, centre * 0.0
            for tap in range(0, taps):
                weight = _weight(((start + tap).to(tl.float64) - centre + 0.5) * inverse, KERNEL)
                weight = tl.where(mask & (tap < count), weight, 0.0)
                total += weight
                top = tl.maximum(top, weight)
            total = tl.where(total == 0.0, 1.0, total)
            if writes:
                tl.store(starts_ptr + axis * longest + x, start.to(tl.int32), mask=mask)
                for tap in range(0, taps):
                    weight = _weight(((start + tap).to(tl.float64) - centre + 0.5) * inverse, KERNEL)
                    weight = tl.where(tap < count, weight, 0.0) / total
                    rounded = (tl.where(weight < 0.0, -0.5, 0.5) + weight * power).to(tl.int32)
                    tl.store(weights_ptr + first + tap * out + x, rounded.to(tl.int16), mask=mask)
            else:
                largest = tl.maximum(largest, tl.max(top / total, 0))
        if not writes:
            for place in range(1, 23):
                more = (bits == place - 1) & (0.5 + largest * power * 2.0 < 32768.0)
                bits = tl.where(more, place, bits)
                power = tl.where(more, power * 2.0, power)
            tl.store(bits_ptr + axis, bits)


@triton.jit
def _to_byte(total, bits):
    return tl.minimum(tl.maximum(total >> bits, 0), 255)


@triton.jit
def crop_rows_kernel(
    memory_ptr,  # uint8: addresses of the images count from here
    planes_ptr,  # [planes, 8] int64
    axes_ptr,  # [A, 6] int64
    weights_ptr,  # int16
    starts_ptr,  # [A, longest] int32
    bits_ptr,  # [A] int32
    scratch_ptr,  # uint8, written: for each plane [channels, rows, width]
    width,  # of the crops
    longest,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Resamples a block of a window along its rows: the three channels of RGB, Y, or U and V."""
    blocks = tl.cdiv(width, COLUMNS)
    first_row = tl.program_id(0) // blocks * ROWS
    row = planes_ptr + tl.program_id(1).to(tl.int64) * 8
    rows = tl.load(row + 5)
    if first_row < rows:
        address, down, right, deep = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
        channels, axis, place = tl.load(row + 4), tl.load(row + 6), tl.load(row + 7)
        size, taps, first = (
            tl.load(axes_ptr + axis * 6 + 2),
            tl.load(axes_ptr + axis * 6 + 4),
            tl.load(axes_ptr + axis * 6 + 5),
        )
        y = (first_row + tl.arange(0, ROWS)).to(tl.int64)
        x = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
        in_row, in_column = (y < rows)[:, None], x < width
        start = tl.load(starts_ptr + axis * longest + x, mask=in_column, other=0).to(tl.int64)
        bits = tl.load(bits_ptr + axis)
        for channel in range(0, channels):
            source = memory_ptr + (address + channel * deep + y * down)[:, None]
            total = tl.zeros([ROWS, COLUMNS], tl.int32) + (1 << (bits - 1))
            for tap in range(0, taps):
                mask = in_column & (start + tap < size)
                weight = tl.load(weights_ptr + first + tap * width + x, mask=mask, other=0).to(tl.int32)
                value = tl.load(source + ((start + tap) * right)[None, :], mask=in_row & mask[None, :], other=0)
                total += value.to(tl.int32) * weight[None, :]
            target = scratch_ptr + ((place + channel * rows + y) * width)[:, None] + x[None, :]
            tl.store(target, _to_byte(total, bits).to(tl.uint8), mask=in_row & in_column[None, :])


@triton.jit
def _column(
    channel, scratch_ptr, row, axes_ptr, weights_ptr, starts_ptr, bits_ptr, y, x, height, width, longest
):  # fmt: skip
    """Bytes as int32 of a block of one channel, resampled along its columns; `row` is that of the crop."""
    place, axis = tl.load(row + 1 + channel), tl.load(row + 4 + channel)
    size, taps, first = (
        tl.load(axes_ptr + axis * 6 + 2),
        tl.load(axes_ptr + axis * 6 + 4),
        tl.load(axes_ptr + axis * 6 + 5),
    )
    in_row, bits = y < height, tl.load(bits_ptr + axis)
    start = tl.load(starts_ptr + axis * longest + y, mask=in_row, other=0).to(tl.int64)
    total, in_column = tl.zeros([y.shape[0], x.shape[0]], tl.int32) + (1 << (bits - 1)), (x < width)[None, :]
    for tap in range(0, taps):
        inside = in_row & (start + tap < size)
        weight = tl.load(weights_ptr + first + tap * height + y, mask=inside, other=0).to(tl.int32)
        source = scratch_ptr + ((place + start + tap) * width)[:, None] + x[None, :]
        value = tl.load(source, mask=in_column & inside[:, None], other=0)
        total += value.to(tl.int32) * weight[:, None]
    return _to_byte(total, bits)


@triton.jit
def crop_columns_kernel(
    scratch_ptr,  # uint8
    crops_ptr,  # [B, 8] int64
    axes_ptr,  # [A, 6] int64
    weights_ptr,  # int16
    starts_ptr,  # [A, longest] int32
    bits_ptr,  # [A] int32
    out_ptr,  # [B, 3, height, width] uint8, written
    height,
    width,
    longest,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of a crop, resampled along its columns; Y, U and V become RGB, of full range, as in JPEG."""
    blocks, image = tl.cdiv(width, COLUMNS), tl.program_id(1).to(tl.int64)
    y = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    x = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    mask, row = (y < height)[:, None] & (x < width)[None, :], crops_ptr + image * 8
    channels = scratch_ptr, row, axes_ptr, weights_ptr, starts_ptr, bits_ptr, y, x, height, width, longest
    r, g, b = _column(0, *channels), _column(1, *channels), _column(2, *channels)
    if tl.load(row) > 0:
        luma, blue, red = r, g - _CHROMA, b - _CHROMA
        r = _to_byte((luma << 16) + 91881 * red + 32768, 16)
        g = _to_byte((luma << 16) - 22554 * blue - 46802 * red + 32768, 16)
        b = _to_byte((luma << 16) + 116130 * blue + 32768, 16)
    out = out_ptr + image * stride_b + y.to(tl.int64)[:, None] * stride_h + x.to(tl.int64)[None, :] * stride_w
    tl.store(out, r.to(tl.uint8), mask=mask)
    tl.store(out + stride_c, g.to(tl.uint8), mask=mask)
    tl.store(out + 2 * stride_c, b.to(tl.uint8), mask=mask)


def resized_crops_(out: Tensor, images: Sequence[Tensor], windows: Tensor, kernel: int) -> None:
    _check_windows(images, windows)
    if not out.numel():
        return
    (B, _, H, W), device, launch = out.shape, out.device, CROPS[card(out).arch]
    axes, planes, crops, weights, scratch = plan(images, windows, (H, W), kernel)
    tables = torch.cat([axes.flatten(), planes.flatten(), crops.flatten()])
    tables = (tables.pin_memory() if out.is_cuda else tables).to(device, non_blocking=True)
    axes_table, planes_table, crops_table = tables.split([axes.numel(), planes.numel(), crops.numel()])
    longest = max(H, W)
    filters = (
        torch.empty(weights, dtype=torch.int16, device=device),
        torch.empty(len(axes), longest, dtype=torch.int32, device=device),
        torch.empty(len(axes), dtype=torch.int32, device=device),
    )
    crop_weights_kernel[(len(axes),)](
        axes_table,
        *filters,
        longest,
        KERNEL=kernel,
        BLOCK=min(256, power_of_2(longest)),
        num_warps=launch.warps,
        enable_fp_fusion=False,
    )
    across, most = min(128, power_of_2(W)), int(planes[:, 5].max())
    down, blocks = launch.bytes // across, triton.cdiv(W, across)
    tile = {"ROWS": down, "COLUMNS": across, "num_warps": launch.warps}
    between = torch.empty(scratch, W, dtype=torch.uint8, device=device)
    crop_rows_kernel[(triton.cdiv(most, down) * blocks, len(planes))](
        images[0], planes_table, axes_table, *filters, between, W, longest, **tile
    )
    crop_columns_kernel[(triton.cdiv(H, down) * blocks, B)](
        between, crops_table, axes_table, *filters, out, H, W, longest, *out.stride(), **tile
    )


def taps(length: float, out: int, kernel: int) -> int:
    """Weights of a pixel of the crop, along an axis of a window of this length."""
    return 2 * math.ceil((kernel + 1) * max(length / out, 1)) + 1


def _check_windows(images: Sequence[Tensor], windows: Tensor) -> None:
    """Raises unless every window has pixels and lies inside its image: the kernels read what it names."""
    sizes = torch.tensor([(x.shape[0] if x.ndim == 3 else x.shape[0] // 3 * 2, x.shape[1]) for x in images])
    corner, size = windows[:, :2], windows[:, 2:]
    wrong = ~((corner >= 0) & (size >= 1) & (corner + size <= sizes.view(-1, 2))).all(1)  # NaN is wrong too
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        inside = f"inside its image of {sizes[i, 0]}×{sizes[i, 1]} pixels and have at least one"
        raise RuntimeError(f"resized_crops_: windows[{i}] must be {inside}, got {windows[i].tolist()}")


class Plan(NamedTuple):
    """Tables that the kernels read; all numbers are int64."""

    axes: Tensor  # [A, 6]: two axes of each plane, rows (along the width) and columns
    planes: Tensor  # [P, 8]: RGB is one plane of three channels; of YUV, Y is one, and U and V are one of two channels
    crops: Tensor  # [B, 8]
    weights: int  # number of weights
    scratch: int  # rows of the scratch memory, as wide as the crops


def plan(images: Sequence[Tensor], windows: Tensor, size: tuple[int, int], kernel: int) -> Plan:
    """The tables for windows [B, 4] of images and crops of this size (height, width)."""
    B, yuv = len(images), [i for i, image in enumerate(images) if image.ndim == 2]
    origin = images[0].data_ptr()
    facts = [(x.data_ptr() - origin, x.stride(0), *x.shape[:2], 3 if x.ndim == 3 else 1) for x in images]
    address, stride, height, width, channels = torch.tensor(facts).unbind(1)
    one, none = torch.ones_like(address), torch.zeros_like(address)
    x, y, axes = _axes(windows.double())
    planes = torch.stack([address + y * stride + x * channels, stride, channels, one, channels, axes[:, 1, 2]], 1)
    if yuv:  # U and V have a quarter of the pixels
        luma, stride = height * 2 // 3 * width, width // 2
        x, y, halves = _axes(windows.double() / 2)
        chroma = torch.stack([address + luma + y * stride + x, stride, one, luma // 4, 2 * one, halves[:, 1, 2]], 1)
        planes, axes = torch.cat([planes, chroma[yuv]]), torch.cat([axes, halves[yuv]])
    outputs = torch.tensor([size[1], size[0]]).expand(len(axes), 2)
    support = (kernel + 1) * (axes.view(torch.float64)[..., 1] / outputs).clamp(min=1)
    counts = 2 * support.float().ceil().long() + 1  # in float32, as torch has it
    first, weights = _places(counts * outputs)
    axes = torch.cat([axes, torch.stack([outputs, counts, first], -1)], -1)
    channel = planes[:, 5]  # rows of a channel in the scratch memory
    place, scratch = _places(planes[:, 4] * channel)
    planes = torch.cat([planes, torch.stack([2 * torch.arange(len(planes)), place], 1)], 1)
    number, is_yuv = torch.arange(B), none.clone()  # of the plane that has the second and third channel
    number[yuv], is_yuv[yuv] = torch.arange(B, len(planes)), 1
    second = place[number] + (1 - is_yuv) * channel[number]
    axis, third = 2 * number + 1, second + channel[number]
    crops = torch.stack([is_yuv, place[:B], second, third, 2 * torch.arange(B) + 1, axis, axis, none], 1)
    return Plan(axes.view(-1, 6), planes, crops, weights, scratch)


def _axes(windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First column and first row of windows [B, 4] float64, and the first columns [B, 2, 3] of the table of axes."""
    begin, length = windows[:, :2].flip(1), windows[:, 2:].flip(1)
    fraction = begin - begin.floor()
    floats = torch.stack([fraction, length], -1).view(torch.int64)
    x, y = begin.long().unbind(1)
    return x, y, torch.cat([floats, (fraction + length - TOUCH).ceil().long()[..., None]], -1)


def _places(sizes: Tensor) -> tuple[Tensor, int]:
    """Where each of several parts begins in memory that holds them one after the other, and how large it is."""
    ends = sizes.flatten().cumsum(0)
    return (ends - sizes.flatten()).view(sizes.shape), int(ends[-1])
