"""Block-wise masks: the statistics of BEiT's, DINOv2's and iBOT's code, and the same bits from every implementation."""

import importlib
import math

import pytest
import torch

from fastssl.ops import block_mask, dispatch
from tests.support import golden
from tests.support.contract import equals_body, opcheck, plain, refused, rejects, torch_threads

module = importlib.import_module("fastssl.ops.block_masks")
MANY = 20_000  # masks, as many as the golden statistics of BEiT are of


def draw(count, masks=MANY, grid=(14, 14), **options):
    """Masks [masks, h, w] of the seeds 0, 1, …, each with `count` patches to mask."""
    return block_mask(torch.arange(masks), torch.full((masks,), count), grid, **options).unflatten(1, grid)


def near(measured: float, expected: float, deviation: float, other: int = MANY, masks: int = MANY) -> bool:
    """Two means of so many samples differ by less than five standard errors."""
    return abs(measured - expected) < 5 * deviation * math.sqrt(1 / masks + 1 / other)


def share_near(measured: float, expected: float, other: int = MANY, masks: int = MANY) -> bool:
    return near(measured, expected, math.sqrt(max(expected * (1 - expected), 1e-4)), other, masks)


def test_statistics_are_those_of_beit():
    tensors, meta = golden.read("beit_masks")
    masks = draw(75, min_patches=16)
    counts = masks.sum((1, 2))
    assert counts.max() == meta["max_count"] and abs(int(counts.min()) - meta["min_count"]) <= 3
    assert near(counts.double().mean().item(), meta["mean_count"], counts.double().std().item())
    histogram = torch.bincount(counts, minlength=76) / MANY
    for share, expected in zip(histogram.tolist(), (tensors["v1.count_histogram"] / MANY).tolist(), strict=True):
        assert share_near(share, expected)
    frequency = masks.double().mean(0)
    for share, expected in zip(frequency.flatten(), tensors["v1.position_frequency"].flatten(), strict=True):
        assert share_near(share.item(), expected.item())
    right = (masks[:, :, :-1] & masks[:, :, 1:]).sum() / masks[:, :, :-1].sum()
    lower = (masks[:, :-1] & masks[:, 1:]).sum() / masks[:, :-1].sum()
    assert abs(right - meta["right_neighbour"]) < 0.002 and abs(lower - meta["lower_neighbour"]) < 0.002


def test_sizes_of_blocks_are_those_of_beit():
    """The first block, which must be smaller than the grid and no larger than the mask: its height, width and area."""
    tensors, meta = golden.read("beit_masks")
    first, unit = meta["first_block"], module.UNIT
    random = module._draw(torch.arange(2 * MANY), torch.tensor(0))
    step = round(-math.log(0.3) * 2**module.EXPONENT_BITS / module.ASPECTS)
    height, width = module._sides(random, 16 * unit, torch.tensor(75 * unit), step)
    fits = (height < 14) & (width < 14) & (height * width <= 75)
    height, width = height[fits][:MANY], width[fits][:MANY]
    assert len(height) == MANY
    for sizes, mean in ((height, first["mean_h"]), (width, first["mean_w"]), (height * width, first["mean_area"])):
        assert near(sizes.double().mean().item(), mean, sizes.double().std().item())
    histogram = torch.bincount(height, minlength=15) / MANY
    expected = tensors["v1.first_block_height_histogram"] / first["n"]
    assert all(share_near(*shares) for shares in zip(histogram.tolist(), expected.tolist(), strict=True))


def test_statistics_are_those_of_dinov2():
    _, meta = golden.read("dinov2_masks")
    for count in ("19", "39", "59", "78", "98"):
        expected = meta["statistics"][count]
        got = draw(int(count), min_patches=4, max_patches=98).sum((1, 2))
        assert got.max() == expected["max"]
        assert near(got.double().mean().item(), expected["mean"], got.double().std().item(), 1500)
        assert share_near((got == int(count)).double().mean().item(), expected["share_exact"], 1500)


def test_statistics_are_those_of_ibot():
    """The count is the ratio times the patches, not rounded, and is never reached."""
    _, meta = golden.read("ibot")
    expected = meta["mask_statistics"]["block, ratio .3 of 196 (58.8)"]
    got = draw(0.3 * 196, min_patches=(14 // 3) ** 2).sum((1, 2))
    assert got.max() == expected["max"] and abs(int(got.min()) - expected["min"]) <= 5
    assert near(got.double().mean().item(), expected["mean"], got.double().std().item(), 3000)
    assert share_near((got == 58).double().mean().item(), expected["share_58"], 3000)


GRIDS = [(1, 1), (1, 9), (2, 2), (7, 7), (8, 16), (14, 14), (37, 37), (3, 128)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_kernel_draws_the_masks_of_plain_torch(grid):
    length = grid[0] * grid[1]
    seed = torch.randint(-(2**63), 2**63 - 1, (64,))
    count = (torch.rand(64, dtype=torch.float64) * (length + 1)).clamp(max=length)
    for options in (
        {"min_patches": 1},
        {"min_patches": 4, "max_patches": max(1, length / 2)},
        {"min_patches": max(1, length // 9), "min_aspect": 1, "attempts": 3, "stream": 7},
        {"min_patches": 16, "min_aspect": 0.01, "attempts": 100},
    ):
        mask = block_mask(seed, count, grid, **options)
        with dispatch.reference():
            assert torch.equal(mask, block_mask(seed, count, grid, **options))
        assert mask.shape == (64, length) and mask.dtype == torch.bool
        assert (mask.sum(1) <= count).all()
    if grid == (1, 1):
        assert not mask.any()  # a block must be smaller than the grid


def test_the_op_equals_its_body_on_any_strides():
    seed = torch.randint(2**62, (40, 3))[:, 1]
    target = torch.randint(100 * 256, (40,)).flip(0)[::2].repeat_interleave(2)
    equals_body(module._block_mask, seed, target, 10, 10, [1024, 12800], 10**8, 10, 3)
    equals_body(module._block_mask, seed[:1].expand(40), target[:1].expand(40), 10, 10, [1024, 12800], 10**8, 10, 3)


def test_a_mask_depends_on_its_seed_count_and_stream_alone():
    seed, count = torch.randint(2**62, (48,)), torch.randint(99, (48,))
    masks = block_mask(seed, count, (14, 14), 4)
    with torch_threads(2):
        assert torch.equal(block_mask(seed, count, (14, 14), 4), masks)
    order = torch.randperm(48)
    assert torch.equal(block_mask(seed[order], count[order], (14, 14), 4), masks[order])
    assert torch.equal(block_mask(seed[5:9], count[5:9], (14, 14), 4), masks[5:9])
    assert torch.equal(block_mask(seed, count.float(), (14, 14), 4), masks)
    assert not torch.equal(block_mask(seed, count, (14, 14), 4, stream=1), masks)


def test_streams_and_neighbouring_seeds_are_unrelated():
    """Two masks of 75 patches share as many as two of different images: Σ frequency²."""
    masks, others = draw(75, 4000, min_patches=16), draw(75, 4000, min_patches=16, stream=1)
    expected = (masks.double().mean(0) ** 2).sum().item()
    for one, other in ((masks, others), (masks[1:], masks[:-1])):
        shared = (one & other).sum((1, 2)).double()
        assert near(shared.mean().item(), expected, shared.std().item(), 4000, 4000)


def test_these_bits():
    """A resumed run must draw the masks that it began with: of any machine, and of later versions."""
    mask = block_mask(torch.tensor([0, 1, 2**62]), torch.tensor([6, 12.5, 20]), (5, 7), 2, 9)
    assert [int("".join(map(str, row)), 2) for row in mask.int().tolist()] == [4329314304, 487068, 34083641100]


def test_aspects_are_far_from_a_tie():
    """Each aspect is rounded to 16 fractional bits, so it does not matter which library computed the exponential."""
    exponent = (2 * torch.arange(4096.0, dtype=torch.float64) + 1 - 4096) * -math.log(0.3) / 4096
    fraction = (exponent.exp() * 2**16) % 1
    assert (fraction - 0.5).abs().min() > 1e-6  # its error is below 1e-10


def test_no_samples_and_nothing_to_mask():
    assert block_mask(torch.zeros(0, dtype=torch.int64), torch.zeros(0), (3, 5), 1).shape == (0, 15)
    assert not block_mask(torch.arange(9), torch.zeros(9), (14, 14), 4).any()
    assert (
        plain(module._block_mask, torch.zeros(0).long(), torch.zeros(0).long(), 3, 5, [1, 1], 1, 1, 0)[0].numel() == 0
    )


def test_contract():
    opcheck(module._block_mask, torch.arange(5), torch.arange(5) * 2560, 14, 14, [1024, 10_000], 10**8, 10, 0)


def test_compiles():
    def masks(seed, count):
        return block_mask(seed, count, (14, 14), 4).sum(1)

    args = torch.arange(6), torch.arange(6) * 10
    torch._dynamo.reset()
    assert torch.equal(torch.compile(masks, fullgraph=True, backend="aot_eager")(*args), masks(*args))


def test_error_sentences():
    seed, count = torch.arange(2), torch.tensor([5, 197])
    sentence = "block_mask: count must be between 0 and h·w=196, got 197"
    refused(sentence, RuntimeError, block_mask, seed, count, (14, 14), 4)
    for value, got in ((-1.0, "-1"), (196.5, "196.5"), (math.inf, "4.29497e+09")):
        for backend in ("kernel", "plain torch"):
            with dispatch.reference() if backend == "plain torch" else torch.no_grad():
                rejects(
                    "block_mask", "count", got, RuntimeError, block_mask, seed, torch.tensor([5, value]), (14, 14), 4
                )
    count = torch.tensor([5, 6])
    refused("block_mask: count must have shape [B=2], got [3]", ValueError, block_mask, seed, torch.ones(3), (3, 3), 1)
    rejects("block_mask", "seed", "float32", TypeError, block_mask, seed.float(), count, (3, 3), 1)
    rejects("block_mask", "count", "bool", TypeError, block_mask, seed, count.bool(), (3, 3), 1)
    rejects("block_mask", "grid", "196", TypeError, block_mask, seed, count, 196, 1)
    rejects("block_mask", "grid", "0 × 3", ValueError, block_mask, seed, count, (0, 3), 1)
    rejects("block_mask", "grid", "65 × 64", ValueError, block_mask, seed, count, (65, 64), 1)
    rejects("block_mask", "min_patches", "0", ValueError, block_mask, seed, count, (3, 3), 0)
    rejects("block_mask", "max_patches", "0.5", ValueError, block_mask, seed, count, (3, 3), 1, 0.5)
    rejects("block_mask", "min_aspect", "1.5", ValueError, block_mask, seed, count, (3, 3), 1, min_aspect=1.5)
    rejects("block_mask", "attempts", "0", ValueError, block_mask, seed, count, (3, 3), 1, attempts=0)
    rejects("block_mask", "stream", "-1", ValueError, block_mask, seed, count, (3, 3), 1, stream=-1)
