"""Block-wise masks, against the loops in Python that BEiT, iBOT and DINOv2 run in their data loaders.

Each draws from a generator of its own, so the rows compare times; tests compare the statistics of the masks.
"""

import math
import random

import pytest
import torch

from fastssl.ops import block_mask

from .harness import Case, compare
from .machine import DEVICE

GRID = (14, 14)


def official_mask(count: float, low: float, high: float, generator: random.Random) -> torch.Tensor:
    """The mask of one sample by a double loop in plain Python."""
    rows, columns = GRID
    mask, masked = torch.zeros(GRID, dtype=torch.bool).numpy(), 0
    while masked < count:
        limit, added = min(count - masked, high), 0
        for _ in range(10):
            area = generator.uniform(low, limit)
            aspect = math.exp(generator.uniform(math.log(0.3), -math.log(0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, left = generator.randint(0, rows - height), generator.randint(0, columns - width)
            new = height * width - mask[top : top + height, left : left + width].sum()
            if not 0 < new <= limit:
                continue
            for row in range(top, top + height):
                for column in range(left, left + width):
                    if not mask[row, column]:
                        mask[row, column] = True
                        added += 1
            break
        if not added:
            break
        masked += added
    return torch.from_numpy(mask).flatten()


@pytest.mark.parametrize("name, batch, count, low, high", [("BEiT", 256, 75, 16, 75), ("DINOv2", 128, 59, 4, 98)])
def test_block_mask(benchmark, name, batch, count, low, high):
    seed, counts = torch.arange(batch, device=DEVICE), torch.full((batch,), count, device=DEVICE)

    def official():
        generator = random.Random(0)
        return torch.stack([official_mask(count, low, high, generator) for _ in range(batch)]).to(DEVICE)

    def nearly_reached(masks):
        """Whether the mean number of masked patches is within 2 % of the count, as the official code's is."""
        return masks.sum(1).float().mean()[None] > 0.98 * count

    case = Case(
        op="block_mask",
        size=f"{name}: B={batch}, {count} of 14 × 14",
        kernel="block_mask",
        contestants={"ours": lambda: block_mask(seed, counts, GRID, low, high), "official": official},
        expected=lambda: torch.tensor([True], device=DEVICE),
        adapt={"ours": nearly_reached, "official": nearly_reached},
    )
    compare(benchmark, case)
