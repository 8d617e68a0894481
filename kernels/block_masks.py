"""Block-wise masks of BEiT, iBOT and DINOv2.

`block_mask_kernel` draws the mask of one sample: a program keeps it in registers, tries one block after the other, and
writes it once. Blocks depend on those before, so a sample cannot be cut; its steps are a few dozen integers and four
functions in float64, which are exact or rounded alike on every device, as the op's file explains.

    bytes        16·B + B·h·w
    operations   no matrix product; a DINOv2 mask takes 20 to 40 blocks
    limit        latency: about as many dependent steps as blocks are tried, all samples at once

Warps: a thread holds up to 16 patches of the mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import power_of_2

PATCHES_PER_WARP = 512  # of a mask; a power of 2

_GOLDEN, _DOMAIN = tl.constexpr(0x9E3779B97F4A7C15), tl.constexpr(0x626C6F636B)
_FIRST, _SECOND = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)
_UNIT, _ASPECTS = tl.constexpr(256), tl.constexpr(4096)  # as in the op's file


@triton.jit
def _scramble(state):
    """SplitMix64's output function, of uint64."""
    state = (state ^ (state >> 30)) * _FIRST
    state = (state ^ (state >> 27)) * _SECOND
    return state ^ (state >> 31)


@triton.jit
def _side(area, exponent):
    """Number of patches along a side: √(area · aspect), rounded; the area in units of 1/256 patch."""
    aspect = tl.floor(tl.exp(exponent) * 65536.0 + 0.5)
    return tl.floor(tl.sqrt(area.to(tl.float64) * aspect) * (1.0 / 4096) + 0.5).to(tl.int64)


@triton.jit
def block_mask_kernel(
    seed_ptr,  # [B] int64
    target_ptr,  # [B] int64, in units of 1/256 patch
    mask_ptr,  # [B, rows·columns] uint8, written
    rows,
    columns,
    low,
    high,
    step,
    attempts,
    stream,
    stride_seed_b,
    stride_target_b,
    BLOCK: tl.constexpr,
):
    """The mask of one sample."""
    sample = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, BLOCK)
    row, column = position // columns, position % columns
    target = tl.load(target_ptr + sample * stride_target_b)
    counter = tl.load(seed_ptr + sample * stride_seed_b).to(tl.uint64, bitcast=True) + _GOLDEN
    counter = _scramble(_scramble(_scramble(counter) + _GOLDEN + stream) + _DOMAIN)
    mask = tl.zeros([BLOCK], tl.int32)
    masked = target * 0  # patches, in units
    failed = target * 0
    while (masked < target) & (failed < attempts):
        counter += _GOLDEN
        shape = _scramble(counter).to(tl.int64, bitcast=True)
        counter += _GOLDEN
        place = _scramble(counter).to(tl.int64, bitcast=True)
        limit = tl.minimum(target - masked, high)
        area = low + (((limit - low) * (shape & 0xFFFFFF)) >> 24)
        aspect = 2 * ((shape >> 24) & (_ASPECTS - 1)) + 1 - _ASPECTS
        exponent = (aspect * step).to(tl.float64) * (1.0 / 1099511627776)  # 2⁻⁴⁰
        height, width = _side(area, exponent), _side(area, -exponent)
        top = ((place & 0x7FFFFFFF) * (rows - height + 1)) >> 31
        left = (((place >> 31) & 0x7FFFFFFF) * (columns - width + 1)) >> 31
        inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
        before = tl.sum(tl.where(inside, mask, 0), 0)
        added = (height * width - before) * _UNIT
        taken = (height < rows) & (width < columns) & (added > 0) & (added <= limit)
        mask = tl.where(inside & taken, 1, mask)
        masked += tl.where(taken, added, 0)
        failed = tl.where(taken, 0, failed + 1)
    length = rows * columns
    tl.store(mask_ptr + sample * length + position, mask.to(tl.uint8), mask=position < length)


def block_mask(
    seed: Tensor, target: Tensor, rows: int, columns: int, limits: list[int], step: int, attempts: int, stream: int
) -> Tensor:
    mask = seed.new_empty(len(seed), rows * columns, dtype=torch.bool)
    if len(seed):
        block_mask_kernel[(len(seed),)](
            seed,
            target,
            mask.view(torch.uint8),
            rows,
            columns,
            *limits,
            step,
            attempts,
            stream,
            seed.stride(0),
            target.stride(0),
            BLOCK=power_of_2(rows * columns, 32),
            num_warps=warps(rows * columns),
        )
    return mask


def warps(patches: int) -> int:
    """Warps of the program that draws a mask of so many patches."""
    return max(1, power_of_2(patches) // PATCHES_PER_WARP)
