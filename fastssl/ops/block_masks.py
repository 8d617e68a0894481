"""Block-wise masks of BEiT, iBOT and DINOv2, from random numbers by counter."""

import math

import torch
from torch import Tensor

from . import check
from .dispatch import fake, op, register_triton

# Every number is an integer or an exact float64, so that all implementations draw the same masks.
UNIT = 256  # areas are counted in units of 1/256 patch
ASPECTS = 4096  # number of aspects, equally spaced in their logarithm
ASPECT_BITS, EXPONENT_BITS = 16, 40  # fractional bits of an aspect, and of its logarithm
LARGEST_GRID = 4096  # patches; a GPU program holds the mask of a whole grid
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_DOMAIN = 0x626C6F636B  # keeps masks independent of the augmentation, which draws from the same seeds


def _kernels():
    """The Triton kernels, imported at the first call on a GPU."""
    from fastssl.kernels import block_masks

    return block_masks


def block_mask(
    seed: Tensor,
    count: Tensor,
    grid: tuple[int, int],
    min_patches: float,
    max_patches: float | None = None,
    min_aspect: float = 0.3,
    attempts: int = 10,
    stream: int = 0,
) -> Tensor:
    """Masks rectangular blocks of patches, at random places, until about `count` patches of a sample are masked.

    For each sample, with `rest` the patches that are still to be masked, a block has an area uniform between
    `min_patches` and min(rest, max_patches), and an aspect whose logarithm is uniform; its sides are √(area · aspect)
    and √(area / aspect), rounded, and its place is uniform. It is taken if it is smaller than the grid in both
    directions and masks at least one new patch and at most min(rest, max_patches). The mask is complete once `rest` is
    0, or after `attempts` blocks in a row that were not taken: so a mask may have fewer patches than `count`, never
    more.

    BEiT: count 75 of 14 × 14, min_patches 16. DINOv2: min_patches 4, max_patches half of the grid. iBOT: count
    ratio · h · w, not rounded, min_patches (min(h, w) // 3)².

    Args:
        seed: [B] int64, such as `Batch.seed`. A mask depends on its seed, its count and the other arguments alone: not
            on the batch, the device or the rank.
        count: [B] floating or int64, number of patches to mask, 0 to h · w, rounded down to 1/256 patch; 0 gives an
            empty mask.
        grid: (h, w), rows and columns of patches, at most 4,096 in all.
        min_patches: smallest area of a block, 1 to 4,096. Where `rest` is smaller, the area is between `rest` and this.
        max_patches: largest area of a block, and of what it masks, 1 to 4,096; None for no limit beyond `count`.
        min_aspect: smallest aspect height / width, 0.01 to 1; the largest is its reciprocal.
        attempts: number of blocks to try before the mask ends, 1 to 1,000.
        stream: number of the mask among those with one seed, 0 ≤ stream < 2³¹: of one image's crops.

    Returns: [B, h · w] bool, True where a patch is masked. No gradient.

    Raises:
        ValueError: a shape, device or number does not fit.
        TypeError: seed is not int64, count neither floating nor int64, or a number not an integer.
        RuntimeError: a count is outside 0..h · w, on CPUs; on GPUs, where the host does not read it, as many patches
            are masked as fit.

    Memory: none beyond the result.

    Source: Bao et al., "BEiT: BERT Pre-Training of Image Transformers", 2021, algorithm 1. Numbers by SplitMix64 in
    counter mode; the aspect is one of 4,096.
    """
    rows, columns, high = _check_arguments(seed, count, grid, min_patches, max_patches, min_aspect, attempts, stream)
    target = (count.detach().double() * UNIT).floor().clamp(-(2**40), 2**40).long()
    step = round(-math.log(min_aspect) * 2**EXPONENT_BITS / ASPECTS)
    return _block_mask(seed, target, rows, columns, [int(min_patches * UNIT), int(high * UNIT)], step, attempts, stream)


def _check_arguments(seed, count, grid, min_patches, max_patches, min_aspect, attempts, stream) -> tuple:
    """(rows, columns, largest area of a block)"""
    name = "block_mask"
    check.tensor(name, "seed", seed, "B")
    check.tensor(name, "count", count, "B", B=seed.shape[0])
    check.index(name, seed=seed)
    if count.dtype != torch.int64 and count.dtype not in check.FLOATS:
        check.fail(name, f"count must be int64 or floating, got {check.dtype_name(count.dtype)}", TypeError)
    check.same_device(name, seed=seed, count=count)
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        check.fail(name, f"grid must be (rows, columns) of patches, got {grid!r}", TypeError)
    rows, columns = grid
    check.integer(name, rows=rows, columns=columns, attempts=attempts, stream=stream)
    if rows < 1 or columns < 1 or rows * columns > LARGEST_GRID:
        check.fail(name, f"grid must have 1 to {LARGEST_GRID:,} patches, got {rows} × {columns}")
    high = rows * columns if max_patches is None else max_patches
    check.number(name, min_patches=min_patches, max_patches=high, min_aspect=min_aspect)
    for argument, value, least, most in (
        ("min_patches", min_patches, 1, LARGEST_GRID),
        ("max_patches", high, 1, LARGEST_GRID),
        ("min_aspect", min_aspect, 0.01, 1),
        ("attempts", attempts, 1, 1000),
        ("stream", stream, 0, 2**31 - 1),
    ):
        if not least <= value <= most:
            check.fail(name, f"{argument} must be between {least} and {most}, got {value}")
    return rows, columns, high


@op("block_mask")
def _block_mask(
    seed: Tensor, target: Tensor, rows: int, columns: int, limits: list[int], step: int, attempts: int, stream: int
) -> Tensor:
    """A turn of the loop tries one block of every sample that is not complete. Areas in units of 1/256 patch."""
    outside = target[(target < 0) | (target > rows * columns * UNIT)] if target.is_cpu else target[:0]
    if len(outside):
        got = int(outside[0]) / UNIT
        check.fail("block_mask", f"count must be between 0 and h·w={rows * columns}, got {got:g}", RuntimeError)
    low, high = limits
    key = _scramble(_scramble(_scramble(seed + _signed(_GOLDEN)) + _signed(_GOLDEN + stream)) + _DOMAIN)
    row = torch.arange(rows, device=seed.device)[None, :, None]
    column = torch.arange(columns, device=seed.device)[None, None, :]
    mask = torch.zeros(len(seed), rows, columns, dtype=torch.bool, device=seed.device)
    masked, failed, tried = (torch.zeros_like(seed, memory_format=torch.contiguous_format) for _ in range(3))
    while ((masked < target) & (failed < attempts)).any():
        incomplete = (masked < target) & (failed < attempts)
        limit = (target - masked).clamp(max=high)
        height, width = _sides(_draw(key, 2 * tried), low, limit, step)
        place = _draw(key, 2 * tried + 1)
        top = (place & 0x7FFFFFFF) * (rows - height + 1) >> 31
        left = (place >> 31 & 0x7FFFFFFF) * (columns - width + 1) >> 31
        fits = incomplete & (height < rows) & (width < columns)
        inside = (row >= _wide(top)) & (row < _wide(top + height))
        inside = inside & (column >= _wide(left)) & (column < _wide(left + width))
        new = (inside & ~mask).sum((1, 2)) * UNIT
        taken = fits & (new > 0) & (new <= limit)
        mask |= inside & _wide(taken)
        masked += torch.where(taken, new, 0)
        failed = torch.where(taken, 0, failed + 1)
        tried += 1
    return mask.flatten(1)


def _sides(random: Tensor, low: int, limit: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Height and width of a block. The products under the roots are exact, and a root is rounded alike everywhere."""
    area = low + ((limit - low) * (random & 0xFFFFFF) >> 24)
    exponent = (2 * (random >> 24 & (ASPECTS - 1)) + 1 - ASPECTS) * step * 2.0**-EXPONENT_BITS
    sides = []
    for sign in (1, -1):
        aspect = ((sign * exponent.double()).exp() * 2**ASPECT_BITS + 0.5).floor()
        root = (area.double() * aspect).sqrt() * (UNIT * 2**ASPECT_BITS) ** -0.5
        sides.append((root + 0.5).floor().long())
    return sides[0], sides[1]


def _draw(key: Tensor, number: Tensor) -> Tensor:
    """The random number of a counter, 64 bits."""
    return _scramble(key + (number + 1) * _signed(_GOLDEN))


def _scramble(state: Tensor) -> Tensor:
    """SplitMix64's output function, with the bits of an unsigned integer in int64."""
    state = (state ^ _shifted(state, 30)) * _signed(_FIRST)
    state = (state ^ _shifted(state, 27)) * _signed(_SECOND)
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """The bits moved to the right, with zeros from the left."""
    return state >> bits & (1 << 64 - bits) - 1


def _signed(number: int) -> int:
    """The int64 with the bits of an unsigned integer."""
    return (number + 2**63) % 2**64 - 2**63


def _wide(x: Tensor) -> Tensor:
    return x[:, None, None]


@fake(_block_mask)
def _(seed, target, rows, columns, limits, step, attempts, stream):
    return seed.new_empty(seed.shape[0], rows * columns, dtype=torch.bool)


register_triton(_block_mask, lambda: _kernels().block_mask)
