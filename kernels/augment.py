"""Photometric augmentation of bytes: jitter and grayscale, then for some images a Gaussian blur, rounding, flip.

One pass for the means that the contrast step needs, one that applies all steps to a block of pixels, whose three
channels a program holds in registers, and two for the blurred images: along the rows, from and to float32, then along
the columns. The parameters of an image are the same for all its pixels, so that branches on them do not diverge.
Results go to a tensor of their own, since a flip in place would overwrite pixels that other programs have not read.

    bytes        6 an image's pixel for the steps and 6 for the copy, 3 for the means; a blurred one 36 more, and its
                 neighbours from the caches
    operations   some twenty for each value and a few for each neighbour: nothing beside the bytes

Tile sizes: 1,024 pixels on 4 warps, 8 a thread in three channels. Not measured.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import ARCHITECTURES, Launch, card, power_of_2

AUGMENT = dict.fromkeys(ARCHITECTURES, Launch(4, 4096))  # warps of a program, bytes of a channel's float32 in its tile

# Columns of the table of parameters, a row an image: 0 to 3 the factors of the jitter, 4 to 7 its order, and these
GREY_BEFORE, SIGMA, SOLARIZE, FLIP, SLOT, GREY_AFTER = 8, 9, 10, 11, 12, 13
COLUMNS = 16


@triton.jit
def _luma(r, g, b, RED: tl.constexpr):
    return r * RED + g * 0.587 + b * 0.114


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 255.0)


@triton.jit
def _hue_channel(n, hue, largest, chroma):
    """A channel of a pixel with this hue in sixths of a turn; n is 5, 3, 1 for red, green, blue."""
    k = hue + n
    k = k - tl.floor(k / 6.0) * 6.0
    return largest - chroma * tl.minimum(tl.maximum(tl.minimum(k, 4.0 - k), 0.0), 1.0)


@triton.jit
def _jitter_step(r, g, b, step, factor, mean_r, mean_g, mean_b, ADDITIVE: tl.constexpr, TENSORFLOW: tl.constexpr):
    """One step of the jitter on the channels of some pixels."""
    if (step == 0) & (factor != 1.0):
        if ADDITIVE:
            shift = 255.0 * (factor - 1.0)
            r, g, b = _clamp(r + shift), _clamp(g + shift), _clamp(b + shift)
        else:
            r, g, b = _clamp(r * factor), _clamp(g * factor), _clamp(b * factor)
    if (step == 1) & (factor != 1.0):
        r = _clamp((r - mean_r) * factor + mean_r)
        g = _clamp((g - mean_g) * factor + mean_g)
        b = _clamp((b - mean_b) * factor + mean_b)
    largest = tl.maximum(tl.maximum(r, g), b)
    chroma = largest - tl.minimum(tl.minimum(r, g), b)
    if (step == 2) & (factor != 1.0):
        if TENSORFLOW:
            scale = tl.minimum(largest / tl.where(chroma > 0, chroma, 1.0), factor)
            r = _clamp(largest - (largest - r) * scale)
            g = _clamp(largest - (largest - g) * scale)
            b = _clamp(largest - (largest - b) * scale)
        else:
            luma = _luma(r, g, b, 0.299)
            r = _clamp((r - luma) * factor + luma)
            g = _clamp((g - luma) * factor + luma)
            b = _clamp((b - luma) * factor + luma)
    if (step == 3) & (factor != 0.0):
        sixths = tl.where(largest == r, g - b, tl.where(largest == g, b - r + 2.0 * chroma, r - g + 4.0 * chroma))
        hue = sixths / tl.where(chroma > 0, chroma, 1.0) + 6.0 * factor
        r = _hue_channel(5.0, hue, largest, chroma)
        g = _hue_channel(3.0, hue, largest, chroma)
        b = _hue_channel(1.0, hue, largest, chroma)
    return r, g, b


@triton.jit
def _load_pixels(images_ptr, image, pixel, mask, pixels):
    """Red, green and blue of some pixels of an image, as float32."""
    start = images_ptr + image.to(tl.int64) * 3 * pixels + pixel
    r = tl.load(start, mask=mask, other=0).to(tl.float32)
    g = tl.load(start + pixels, mask=mask, other=0).to(tl.float32)
    b = tl.load(start + 2 * pixels, mask=mask, other=0).to(tl.float32)
    return r, g, b


@triton.jit
def augment_mean_kernel(
    images_ptr,  # [B, 3, pixels] uint8
    table_ptr,  # [B, 16] float32
    sums_ptr,  # [B, blocks, 3] float32, written
    pixels,
    blocks,
    ADDITIVE: tl.constexpr,
    TENSORFLOW: tl.constexpr,
    RED: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Sums over a block of pixels of the channels, or of luma in all three, as they are before the contrast step."""
    image, block = tl.program_id(1), tl.program_id(0)  # the first axis of a grid may be long
    pixel = block * PIXELS + tl.arange(0, PIXELS)
    mask, row = pixel < pixels, table_ptr + image * 16
    r, g, b = _load_pixels(images_ptr, image, pixel, mask, pixels)
    if tl.load(row + 8) > 0:
        luma = _luma(r, g, b, RED)
        r, g, b = luma, luma, luma
    reached = 0
    for position in tl.static_range(4):
        step = tl.load(row + 4 + position).to(tl.int32)
        reached = tl.where(step == 1, 1, reached)
        if reached == 0:
            r, g, b = _jitter_step(r, g, b, step, tl.load(row + step), 0.0, 0.0, 0.0, ADDITIVE, TENSORFLOW)
    at = sums_ptr + (image * blocks + block) * 3
    if not TENSORFLOW:
        luma = _luma(r, g, b, 0.299)
        r, g, b = luma, luma, luma
    tl.store(at, tl.sum(tl.where(mask, r, 0.0), 0))
    tl.store(at + 1, tl.sum(tl.where(mask, g, 0.0), 0))
    tl.store(at + 2, tl.sum(tl.where(mask, b, 0.0), 0))


@triton.jit
def _store_byte(result_ptr, offset, value, solarize, mask):
    """Rounds half to even (to an integer below 2²³, in which float32 has no fractions), inverts, and stores."""
    value = (value + 8388608.0) - 8388608.0
    if solarize > 0:
        value = tl.where(value >= 128.0, 255.0 - value, value)
    tl.store(result_ptr + offset, value.to(tl.uint8), mask=mask)


@triton.jit
def augment_kernel(
    images_ptr,  # [B, 3, pixels] uint8
    table_ptr,  # [B, 16] float32
    means_ptr,  # [B, 3] float32
    result_ptr,  # [B, 3, pixels] uint8, written for images without blur
    scratch_ptr,  # [blurred images, 3, pixels] float32, written for images with blur
    width,
    pixels,
    ADDITIVE: tl.constexpr,
    TENSORFLOW: tl.constexpr,
    RED: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Jitter and grayscale of a block of pixels; without blur also rounding, solarization and flip."""
    image, block = tl.program_id(1), tl.program_id(0)  # the first axis of a grid may be long
    pixel = block * PIXELS + tl.arange(0, PIXELS)
    mask, row = pixel < pixels, table_ptr + image * 16
    r, g, b = _load_pixels(images_ptr, image, pixel, mask, pixels)
    if tl.load(row + 8) > 0:
        luma = _luma(r, g, b, RED)
        r, g, b = luma, luma, luma
    mean_r, mean_g, mean_b = (
        tl.load(means_ptr + image * 3),
        tl.load(means_ptr + image * 3 + 1),
        tl.load(means_ptr + image * 3 + 2),
    )
    for position in tl.static_range(4):
        step = tl.load(row + 4 + position).to(tl.int32)
        r, g, b = _jitter_step(r, g, b, step, tl.load(row + step), mean_r, mean_g, mean_b, ADDITIVE, TENSORFLOW)
    if tl.load(row + 13) > 0:
        luma = _luma(r, g, b, RED)
        r, g, b = luma, luma, luma
    slot = tl.load(row + 12).to(tl.int64)
    if slot >= 0:
        start = scratch_ptr + slot * 3 * pixels + pixel
        tl.store(start, r, mask=mask)
        tl.store(start + pixels, g, mask=mask)
        tl.store(start + 2 * pixels, b, mask=mask)
    else:
        solarize = tl.load(row + 10)
        column = pixel % width
        column = tl.where(tl.load(row + 11) > 0, width - 1 - column, column)
        at = image.to(tl.int64) * 3 * pixels + (pixel // width) * width + column
        _store_byte(result_ptr, at, r, solarize, mask)
        _store_byte(result_ptr, at + pixels, g, solarize, mask)
        _store_byte(result_ptr, at + 2 * pixels, b, solarize, mask)


@triton.jit
def _neighbour(x_ptr, start, place, stride, length, mask, REFLECT: tl.constexpr):
    """Values at `place` along an axis; beyond the border the reflection about the edge, or 0."""
    if REFLECT:
        place = tl.where(place < 0, -place, place)
        place = tl.where(place >= length, 2 * (length - 1) - place, place)
        return tl.load(x_ptr + start + place * stride, mask=mask, other=0.0)
    return tl.load(x_ptr + start + place * stride, mask=mask & (place >= 0) & (place < length), other=0.0)


@triton.jit
def augment_blur_kernel(
    x_ptr,  # [blurred images, 3, pixels] float32
    table_ptr,  # [B, 16] float32
    blurred_ptr,  # [blurred images] int64, numbers of the blurred images
    radius_ptr,  # [blurred images] int32, along this axis
    out_ptr,  # [blurred images, 3, pixels] float32, or the result [B, 3, pixels] uint8, written
    width,
    pixels,
    length,  # of the axis
    stride,  # of the axis
    REFLECT: tl.constexpr,
    LAST: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Blur of a block of pixels of one channel along one axis; along the last also rounding, solarization and flip."""
    slot, channel = tl.program_id(1) // 3, tl.program_id(1) % 3
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    mask, image = pixel < pixels, tl.load(blurred_ptr + slot)
    row = table_ptr + image * 16
    sigma, radius = tl.load(row + 9), tl.load(radius_ptr + slot)
    place = (pixel // stride) % length
    start = (slot * 3 + channel).to(tl.int64) * pixels + pixel - place * stride
    value, total = tl.load(x_ptr + start + place * stride, mask=mask, other=0.0), 1.0
    for i in range(1, radius + 1):
        ratio = i / sigma
        weight = tl.exp(-0.5 * ratio * ratio)
        value += weight * (
            _neighbour(x_ptr, start, place - i, stride, length, mask, REFLECT)
            + _neighbour(x_ptr, start, place + i, stride, length, mask, REFLECT)
        )
        total += 2.0 * weight
    value = value / total
    if LAST:
        column = pixel % width
        column = tl.where(tl.load(row + 11) > 0, width - 1 - column, column)
        at = (image * 3 + channel) * pixels + (pixel // width) * width + column
        _store_byte(out_ptr, at, value, tl.load(row + 10), mask)
    else:
        tl.store(out_ptr + (slot * 3 + channel).to(tl.int64) * pixels + pixel, value, mask=mask)


def augment_(
    images: Tensor,
    jitter: Tensor,
    order: Tensor,
    grey: Tensor,
    sigma: Tensor,
    solarize: Tensor,
    flip: Tensor,
    grey_first: bool,
    additive: bool,
    tensorflow: bool,
) -> None:
    if order.numel() and not 0 <= (least := int(order.min())) <= (most := int(order.max())) < 4:
        got = least if least < 0 else most
        raise RuntimeError(f"augment_: order must be between 0 and 3, got {got}")
    if not images.numel():
        return
    (B, _, H, W), launch, device = images.shape, AUGMENT[card(images).arch], images.device
    source, tile, pixels = images.contiguous(), launch.bytes // 4, H * W
    blurred = (sigma > 0).nonzero().flatten()
    table = torch.zeros(B, COLUMNS)
    table[:, :4], table[:, 4:8], table[:, GREY_BEFORE if grey_first else GREY_AFTER], table[:, SIGMA] = (
        jitter,
        order,
        grey,
        sigma,
    )
    table[:, SOLARIZE], table[:, FLIP], table[:, SLOT] = solarize, flip, -1
    table[blurred, SLOT] = torch.arange(len(blurred), dtype=torch.float32)
    table = table.to(device, non_blocking=True)
    law = {
        "ADDITIVE": additive,
        "TENSORFLOW": tensorflow,
        "RED": 0.2989 if tensorflow else 0.299,
        "PIXELS": min(tile, power_of_2(pixels)),
        "num_warps": launch.warps,
    }
    blocks = triton.cdiv(pixels, law["PIXELS"])
    means = torch.empty(B, 3, device=device)
    if bool((jitter[:, 1] != 1).any()):
        sums = torch.empty(B, blocks, 3, device=device)
        augment_mean_kernel[(blocks, B)](source, table, sums, pixels, blocks, **law)
        torch.sum(sums, 1, out=means).div_(pixels)
    result = torch.empty_like(source)
    scratch = torch.empty(2, len(blurred), 3, pixels, device=device)
    augment_kernel[(blocks, B)](source, table, means, result, scratch, W, pixels, **law)
    if len(blurred):
        numbers = blurred.to(device, non_blocking=True)
        for last, (length, stride, x, out) in enumerate(((W, 1, *scratch), (H, W, scratch[1], result))):
            radii = [H // 20 if tensorflow else math.ceil(min(3 * s, length - 1)) for s in sigma[blurred].tolist()]
            radius = torch.tensor(radii, dtype=torch.int32).to(device, non_blocking=True)
            augment_blur_kernel[(blocks, 3 * len(blurred))](
                x,
                table,
                numbers,
                radius,
                out,
                W,
                pixels,
                length,
                stride,
                REFLECT=not tensorflow,
                LAST=bool(last),
                PIXELS=law["PIXELS"],
                num_warps=launch.warps,
            )
    images.copy_(result)
