import dataclasses
import re

import numpy as np
import pytest
import torch

from fastssl.data.source import BadImage, open_source
from fastssl.eval.reconstruction import as_bytes, first_images, pixels, read_snapshots, reconstruct, save_snapshot
from fastssl.methods import mae
from fastssl.ops import patchify


@pytest.fixture
def model():
    changes = {"image_size": (24, 24), "mask_ratio": 0.6, "norm_pix": False}
    return mae.build(dataclasses.replace(mae.Config.small(), **changes)).eval()


def test_rows_are_input_masked_output_and_filled(model):
    """The masked row is the input where the mask is 0, and the last row is the output in removed patches."""
    images = torch.randn(3, 3, 24, 24)
    shown = reconstruct(model, images)
    torch.testing.assert_close(shown.input, pixels(images))
    grey = pixels(torch.zeros(1, 3, 1, 1)).expand(3, 3, 24, 24)
    kept = (shown.masked == shown.input).all(1)
    assert kept.float().mean() == pytest.approx(model.keep / model.length, abs=0.01)
    removed = ~kept.unsqueeze(1).expand_as(images)
    assert torch.equal(shown.masked[removed], grey[removed])
    assert torch.equal(shown.filled[removed], shown.output[removed])
    assert torch.equal(shown.filled[~removed], shown.input[~removed])


def test_images_of_another_normalisation(model, tmp_path):
    """Grey is the mean that images are normalised by, and pixels are undone by it in pictures and in snapshots."""
    colours = {"mean": (0.2, 0.4, 0.6), "std": (0.5, 0.25, 0.1)}
    images = torch.randn(2, 3, 24, 24)
    shown = reconstruct(model, images, **colours)
    torch.testing.assert_close(shown.input, pixels(images, **colours))
    grey = (shown.masked == torch.tensor(colours["mean"]).view(3, 1, 1)).all(1)
    assert grey.float().mean() == pytest.approx(1 - model.keep / model.length, abs=0.01)
    save_snapshot(model, images, tmp_path / "snapshots" / "step-1.npz", **colours)
    ((_, filled),) = read_snapshots(tmp_path / "snapshots")
    assert (filled == as_bytes(shown.filled)).all()


def test_masks_are_the_same_each_time(model):
    images = torch.randn(2, 3, 24, 24)
    first = reconstruct(model, images)
    torch.rand(7)
    for one, two in zip(first, reconstruct(model, images)):
        assert torch.equal(one, two)
    assert all(part.min() >= 0 and part.max() <= 1 and not part.requires_grad for part in first)


def test_standardised_patches_get_their_mean_and_variance_back(model, monkeypatch):
    """With `norm_pix_loss` a perfect prediction gives the input back."""
    model.norm_pix_loss = True
    images = 0.2 * torch.randn(2, 3, 24, 24)
    target = patchify(images, model.patch_size)
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    perfect = (target - mean) / (variance + 1e-6).sqrt(), torch.ones(target.shape[:2])
    monkeypatch.setattr(model, "reconstruct", lambda images, noise: perfect)
    torch.testing.assert_close(reconstruct(model, images).output, pixels(images))


def test_the_first_images_that_can_be_decoded(monkeypatch):
    source = open_source("shapes:count=64", "test")
    random = torch.get_rng_state()
    expected = first_images(source, (32, 32), count=6)
    assert torch.equal(torch.get_rng_state(), random)
    assert expected.shape == (6, 3, 32, 32)
    read = source.read

    def broken(index):
        if index in (0, 2, 3):
            raise BadImage(f"image {index}: broken")
        return read(index)

    monkeypatch.setattr(source, "read", broken)
    images = first_images(source, (32, 32), count=3)
    torch.testing.assert_close(images, expected[[1, 4, 5]])


def test_none_can_be_decoded(monkeypatch):
    source = open_source("shapes:count=8", "test")

    def broken(index):
        raise BadImage("broken")

    monkeypatch.setattr(source, "read", broken)
    with pytest.raises(ValueError, match="none of the images can be decoded"):
        first_images(source, (32, 32))


def test_snapshots_are_read_in_the_order_of_steps(model, tmp_path):
    images, folder = torch.randn(4, 3, 24, 24), tmp_path / "reconstructions"
    assert read_snapshots(folder) == []
    for step in (1_000_000, 0, 120):
        save_snapshot(model, images, folder / f"step-{step:06d}.npz")
    (folder / "step-000007.npz.writing").write_bytes(b"half")
    found = read_snapshots(folder)
    assert [step for step, _ in found] == [0, 120, 1_000_000]
    assert found[0][1].dtype == np.uint8
    assert found[0][1].shape == (4, 24, 24, 3)
    assert np.array_equal(found[0][1], as_bytes(reconstruct(model, images).filled))


def test_damaged_snapshots_are_named(tmp_path):
    path = tmp_path / "step-000001.npz"
    for content in (b"", b"PK\x03\x04 broken", b"nothing"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{re.escape(f'reconstruction: {path} is damaged: remove it')}$"):
            read_snapshots(tmp_path)
    np.savez(path, filled=np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match=r"must hold uint8 \[N, H, W, 3\], got float32 \(2, 3\)"):
        read_snapshots(tmp_path)
