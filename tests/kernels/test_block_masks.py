import pytest
import torch

from fastssl.kernels import block_masks as kernels
from fastssl.kernels import tile
from fastssl.ops import block_mask, dispatch
from tests.kernels.interpreter import triton_on_cpu
from tests.support import kernel_model as model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton is not interpreted")


def same_masks(seed, count, grid, *args, **options):
    """The kernel's masks, after a check that they are those of plain torch."""
    with triton_on_cpu() as seen:
        masks = block_mask(seed, count, grid, *args, **options)
    assert [kernel for kernel, _ in seen.launches] == ["block_mask_kernel"]
    with dispatch.reference():
        assert torch.equal(masks, block_mask(seed, count, grid, *args, **options))
    return masks, seen


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (7, 7), (14, 14), (3, 128)], ids=str)
def test_the_masks_are_those_of_plain_torch(grid):
    length = grid[0] * grid[1]
    seed = torch.tensor([0, 1, -1, 2**63 - 1])
    count = torch.tensor([0, 0.3, 0.5, 1], dtype=torch.float64) * length
    same_masks(seed, count, grid, max(1, length // 9))
    same_masks(seed, count.long(), grid, 4, max(1, length / 2), 0.5, 3, 2**31 - 1)


def test_large_grids_and_strides():
    seed = torch.randint(2**62, (3, 2))[:, 1]
    same_masks(seed, torch.tensor([700]).expand(3), (37, 37), 4, 684)
    masks, _ = same_masks(seed[:1], torch.tensor([3900]), (64, 64), 900, 1200, attempts=2)
    assert masks.sum() > 900
    with triton_on_cpu() as seen:
        assert block_mask(seed[:0], seed[:0], (14, 14), 4).shape == (0, 196) and not seen.launches


@pytest.mark.parametrize("arch", tile.ARCHITECTURES[:2])
def test_bytes_are_those_of_the_model(arch):
    with tile.assume_card(arch):
        _, seen = same_masks(torch.arange(5), torch.full((5,), 30), (7, 9), 4)
    assert seen.bytes == model.block_mask(5, 63).requested == model.block_mask(5, 63).least


def test_one_warp_holds_the_mask_of_a_usual_grid():
    """A launch of few warps for each sample leaves room for all samples of a batch at once."""
    assert kernels.warps(196) == kernels.warps(512) == 1
    assert kernels.warps(37 * 37) == 4 and kernels.warps(4096) == 8
