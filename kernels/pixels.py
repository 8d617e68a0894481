"""Bytes of images as normalised floats: one pass.

    bytes        1 + the size of the dtype for each value
    operations   a subtraction and a division for each value, rounded as on a CPU: nothing beside the bytes

Tile sizes: 4,096 values on 4 warps, 32 a thread, so that a thread reads bytes 16 at a time. Not measured.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import ARCHITECTURES, Launch, card, power_of_2

NORMALISE = dict.fromkeys(ARCHITECTURES, Launch(4, 4096))  # warps of a program, bytes that it reads


@triton.jit
def normalise_kernel(
    pixels_ptr,  # [B, 3, pixels] uint8
    out_ptr,  # [B, 3, pixels], written
    pixels,
    blocks,
    offset_r,
    offset_g,
    offset_b,
    scale_r,
    scale_g,
    scale_b,
    PIXELS: tl.constexpr,
):
    """A block of pixels of one channel."""
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)
    channel, mask = plane % 3, pixel < pixels
    offset = tl.where(channel == 0, offset_r, tl.where(channel == 1, offset_g, offset_b))
    scale = tl.where(channel == 0, scale_r, tl.where(channel == 1, scale_g, scale_b))
    value = tl.load(pixels_ptr + plane * pixels + pixel, mask=mask, other=0).to(tl.float32)
    value = tl.div_rn(value - offset, tl.zeros([PIXELS], tl.float32) + scale)
    tl.store(out_ptr + plane * pixels + pixel, value.to(out_ptr.dtype.element_ty), mask=mask)


def normalise(pixels: Tensor, offset: list[float], scale: list[float], dtype: torch.dtype) -> Tensor:
    out = torch.empty(pixels.shape, dtype=dtype, device=pixels.device)
    if not pixels.numel():
        return out
    launch, count = NORMALISE[card(pixels).arch], pixels.shape[2] * pixels.shape[3]
    tile = min(launch.bytes, power_of_2(count))
    blocks = triton.cdiv(count, tile)
    normalise_kernel[(blocks * 3 * len(pixels),)](
        pixels.contiguous(), out, count, blocks, *offset, *scale, PIXELS=tile, num_warps=launch.warps
    )
    return out
