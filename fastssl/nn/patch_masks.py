"""Which patches of the large crops are masked in iBOT and DINOv2, and the rows of a loss on them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.ops import block_mask

from .masking import seeded_noise

_RATIO, _PLACE = 0x726174696F, 0x706C616365  # keep these draws independent of others from the same seeds


def ibot_masks(
    seed: Tensor, grid: tuple[int, int], crops: int, shares: tuple[tuple[float, float], ...], block: bool
) -> Tensor:
    """Masks of iBOT [crops · B, L] bool, crop by crop.

    Args:
        seed: [B] int64.
        grid: rows and columns of patches.
        crops: crops of an image.
        shares: pairs, of which each crop draws one, and then the share of its masked patches: no further from the first
            number than the second.
        block: mask blocks of patches (`ops.block_mask`), a little fewer than asked for; else single patches, exactly.

    Source: Zhou et al., 2022 (iBOT), section 3.2 and its code.
    """
    length, masks = grid[0] * grid[1], []
    noise = seeded_noise(2 * crops, _RATIO, seed).double()
    for crop in range(crops):
        choice, place = (noise[:, 2 * crop] * len(shares)).long(), 2 * noise[:, 2 * crop + 1] - 1
        drawn = [torch.where(choice == i, ratio + place * span, 0) for i, (ratio, span) in enumerate(shares)]
        share = torch.stack(drawn).sum(0)  # the others are 0
        if block:
            masks.append(block_mask(seed, share * length, grid, max((min(grid) // 3) ** 2, 1), stream=crop))
        else:
            order = seeded_noise(length, _PLACE + crop, seed).argsort(stable=True).argsort()
            masks.append(order < (share * length).long()[:, None])
    return torch.cat(masks)


def dinov2_masks(
    seed: Tensor, grid: tuple[int, int], crops: int, probability: float, ratios: tuple[float, float]
) -> Tensor:
    """Masks of DINOv2 [crops · B, L] bool, crop by crop: of all crops of the batch int(crops · B · probability) are
    masked, and their shares are spread evenly over the range `ratios`, one in each of as many equal parts of it.

    Args:
        seed: [B] int64. A mask depends on all seeds of the batch.
        grid: rows and columns of patches.
        crops: crops of an image.
        probability: share of the crops that are masked.
        ratios: smallest and largest share of a crop's patches.

    Source: Oquab et al., 2024 (DINOv2), its code.
    """
    length, (low, high) = grid[0] * grid[1], ratios
    masked = int(crops * len(seed) * probability)
    noise = seeded_noise(2 * crops, _RATIO, seed).double().unflatten(1, (2, crops)).permute(1, 2, 0).flatten(1)
    stratum = noise[0].argsort(stable=True).argsort()
    share = low + (high - low) * (stratum + noise[1]) / max(masked, 1)
    counts = torch.where(stratum < masked, (share * length).long(), 0).view(crops, -1)
    most = max(length * 0.5, 4)
    return torch.cat([block_mask(seed, count, grid, 4, most, stream=crop) for crop, count in enumerate(counts)])


def most_masked(length: int, images: int, probability: float, ratios: tuple[float, float]) -> int:
    """The most patches of L = `length` that `dinov2_masks` masks in all of `images` crops."""
    masked, (low, high) = int(images * probability), ratios
    return sum(math.floor(length * (low + (high - low) * (i + 1) / masked)) for i in range(masked))


class MaskedRows(NamedTuple):
    """Rows of a loss on masked patches."""

    rows: Tensor  # [M] int64, numbers of patches, counted through all crops
    weights: Tensor  # [M], 1 / number of masked patches of the row's crop; 0 for a row that only fills up
    counted: Tensor | None  # [M] bool, False for rows that only fill up; None if there is none


def masked_rows(mask: Tensor, dtype: torch.dtype, most: int) -> MaskedRows:
    """The masked patches of [C, L] bool, in order.

    On a CPU they are exactly these. Elsewhere and in a compiled graph there are always `most` rows, so that the host
    need not wait for their number: the last of them are other patches, whose weight is 0.

    Args:
        mask: [C, L] bool.
        dtype: dtype of the weights.
        most: at least as many patches as can be masked.
    """
    flat = mask.flatten()
    exact = reads_are_free(mask)
    rows = flat.nonzero()[:, 0] if exact else (~flat).to(torch.uint8).argsort(stable=True)[:most]
    counted = None if exact else flat[rows]
    weights = mask.sum(1).clamp(min=1).to(dtype).reciprocal()[rows // mask.shape[1]]
    return MaskedRows(rows, weights if counted is None else weights * counted, counted)


def reads_are_free(x: Tensor) -> bool:
    """Whether the host may read values of x without a wait for a device, and outside of a compiled graph."""
    return x.is_cpu and not torch.compiler.is_compiling()
