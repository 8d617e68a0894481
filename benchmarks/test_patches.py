"""Patches of images and MAE's loss on masked patches: 224² images, patches of 16², three quarters masked."""

import pytest
import torch
import torch.nn.functional as F

from fastssl.ops import keep_patches, masked_patch_mse, patchify, random_masking

from .harness import Case, compare, compiled, compiled_on_gpu, forward_backward
from .machine import DEVICE

SIDE, PATCH, LENGTH, KEEP = 224, 16, 196, 49
VALUES = PATCH * PATCH * 3
BATCHES = [256, 64, 1]


def cut(images: torch.Tensor) -> torch.Tensor:
    """patchify of the reference code: patches in row-major order; row, column, channel inside a patch."""
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return torch.einsum("bchpwq->bhwpqc", grid).reshape(batch, -1, PATCH * PATCH * channels)


def masking(batch: int):
    return random_masking(torch.rand(batch, LENGTH, device=DEVICE), KEEP)


def rows(patches: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return patches.gather(1, ids.unsqueeze(-1).expand(-1, -1, patches.shape[2]))


def standardised(target: torch.Tensor) -> torch.Tensor:
    return (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5


@pytest.mark.parametrize("batch", BATCHES)
def test_patchify(benchmark, batch):
    images = torch.randn(batch, 3, SIDE, SIDE, device=DEVICE)

    def unfold():
        columns = F.unfold(images, PATCH, stride=PATCH).reshape(batch, 3, PATCH * PATCH, LENGTH)
        return columns.permute(0, 3, 2, 1).reshape(batch, LENGTH, VALUES)

    case = Case(
        op="patchify",
        size=f"B={batch}, {SIDE}², patch {PATCH}, fp32, forward",
        kernel="patchify",
        contestants={"ours": lambda: patchify(images, PATCH), "official": lambda: cut(images), "unfold": unfold},
        rivals=compiled_on_gpu(lambda: cut(images)),
        bytes_moved=0 if batch < 64 else 2 * images.nbytes,
    )
    compare(benchmark, case)


@pytest.mark.parametrize("batch", BATCHES)
def test_keep_patches(benchmark, batch):
    images = torch.randn(batch, 3, SIDE, SIDE, device=DEVICE)
    ids = masking(batch).ids_keep
    samples = torch.arange(batch, device=DEVICE).unsqueeze(1)
    grid_side = SIDE // PATCH

    def official():
        return cut(images).gather(1, ids.unsqueeze(-1).repeat(1, 1, VALUES))

    def indexed():
        grid = images.reshape(batch, 3, grid_side, PATCH, grid_side, PATCH).permute(0, 2, 4, 3, 5, 1)
        return grid[samples, ids // grid_side, ids % grid_side].reshape(batch, KEEP, VALUES)

    case = Case(
        op="keep_patches",
        size=f"B={batch}, {SIDE}², patch {PATCH}, keep {KEEP} of {LENGTH}, fp32, forward",
        kernel="keep_patches_fwd",
        contestants={
            "ours": lambda: keep_patches(images, ids, PATCH),
            "official": official,
            "gather, expand": lambda: rows(cut(images), ids),
            "indexing": indexed,
        },
        rivals=compiled_on_gpu(official),
        bytes_moved=0 if batch < 64 else 2 * batch * KEEP * VALUES * images.itemsize,
    )
    compare(benchmark, case)


@pytest.mark.parametrize("batch", BATCHES)
def test_masked_patch_mse(benchmark, batch):
    """The reference code predicts all patches and weights the loss by the mask; the others take masked patches only."""
    images = torch.randn(batch, 3, SIDE, SIDE, device=DEVICE)
    _, ids, _, mask = masking(batch)
    pred_all = torch.randn(batch, LENGTH, VALUES, device=DEVICE, requires_grad=True)
    pred = rows(pred_all.detach(), ids).requires_grad_()

    def official():
        error = ((pred_all - standardised(cut(images))) ** 2).mean(-1)
        return (error * mask).sum() / mask.sum()

    def masked_only():
        return F.mse_loss(pred, standardised(rows(cut(images), ids)))

    case = Case(
        op="masked_patch_mse",
        size=f"B={batch}, {SIDE}², patch {PATCH}, norm_pix, {LENGTH - KEEP} of {LENGTH}, fp32, forward + backward",
        kernel="masked_patch_mse_fwd",
        contestants={
            "ours": forward_backward(lambda: masked_patch_mse(pred, images, ids, PATCH, norm_pix=True), pred),
            "official": forward_backward(official, pred_all),
            "masked patches only": forward_backward(masked_only, pred),
        }
        | ({"torch.compile": compiled(official, pred_all)} if batch == 64 and DEVICE.type == "cpu" else {}),
        rivals=compiled_on_gpu(official, pred_all),
        adapt=dict.fromkeys(("official", "torch.compile"), lambda result: (result[0], rows(result[1], ids))),
        bytes_moved=0 if batch < 64 else 3 * pred.nbytes,
    )
    compare(benchmark, case)
