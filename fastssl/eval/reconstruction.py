"""Reconstructed images of an autoencoder, masked or of codes, and snapshots of them during a run."""

import itertools
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.contract import Autoencodes
from fastssl.data.augmentation import IMAGENET_MEAN, IMAGENET_STD
from fastssl.data.decoding import open_image
from fastssl.data.source import BadImage, Source, Subset
from fastssl.files import write_atomically
from fastssl.ops import patchify, unpatchify

from .features import extract


class Reconstruction(NamedTuple):
    """Pixels [N, 3, H, W] float32 in 0..1, on the CPU."""

    input: Tensor  # the image
    masked: Tensor  # the image with removed patches in grey, the mean that images are normalised by
    output: Tensor  # predictions of all patches
    filled: Tensor  # predictions in the removed patches, the image elsewhere


@torch.no_grad()
def reconstruct(mae: nn.Module, images: Tensor, **normalisation: Any) -> Reconstruction:
    """Masks and reconstructs images; the masks depend only on N and the number of patches.

    Args:
        mae: a `contract.Reconstructs` on any device, with `patch_size` and `length`, the number of patches. With
            `norm_pix_loss` it predicts standardised patches, which then get the true mean and variance of each patch.
        images: [N, 3, H, W] float32, normalised.
        normalisation: `mean` and `std` of the images, as for `pixels`.
    """
    device = next(mae.parameters()).device
    patch, (height, width) = mae.patch_size, images.shape[2:]
    noise = torch.rand(len(images), mae.length, generator=torch.Generator().manual_seed(0))
    pred, mask = mae.reconstruct(images.to(device), noise.to(device))  # mask: 0 kept, 1 removed
    pred, target, removed = pred.float().cpu(), patchify(images.cpu(), patch), mask.cpu().unsqueeze(-1) > 0
    if mae.norm_pix_loss:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        pred = pred * (variance + 1e-6).sqrt() + mean
    grey = torch.zeros_like(target)
    parts = (target, torch.where(removed, grey, target), pred, torch.where(removed, pred, target))
    return Reconstruction(*(pixels(unpatchify(part, patch, height, width), **normalisation) for part in parts))


@torch.no_grad()
def autoencode(method: nn.Module, images: Tensor, **normalisation: Any) -> Tensor:
    """Pixels [N, 3, H, W] float32 in 0..1, on the CPU, of images as their codes show them.

    Args:
        method: a `contract.Autoencodes` on any device.
        images: [N, 3, H, W] float32, normalised.
        normalisation: `mean` and `std` of the images, as for `pixels`.
    """
    device = next(method.parameters()).device
    return pixels(method.autoencode(images.to(device)).float().cpu(), **normalisation)


def pixels(
    images: Tensor, mean: tuple[float, float, float] = IMAGENET_MEAN, std: tuple[float, float, float] = IMAGENET_STD
) -> Tensor:
    """Pixels of images that are normalised by `mean` and `std`: [N, 3, H, W] float32, clamped to 0..1."""
    mean_of_channels, scale = (images.new_tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return (images * scale + mean_of_channels).clamp(0, 1)


def as_bytes(images: Tensor) -> np.ndarray:
    """Pixels [N, 3, H, W] in 0..1 as uint8 [N, H, W, 3]."""
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def first_images(source: Source, size: tuple[int, int], count: int = 10, **normalisation: Any) -> Tensor:
    """The first images that can be decoded, as in evaluation: [≤ count, 3, H, W] float32, normalised, on the CPU.

    torch's generator is left unchanged, so that an evaluation does not affect the run.

    Args:
        source: the images.
        size: (height, width) in pixels.
        count: most images.
        normalisation: `mean` and `std`, ImageNet's by default.

    Raises:
        ValueError: none of the images can be decoded.
    """
    good = itertools.islice((index for index in range(len(source)) if _decodes(source, index)), count)
    images, *_ = extract(lambda images: images, Subset(source, list(good)), size, batch_size=count, **normalisation)
    return images


def _decodes(source: Source, index: int) -> bool:
    try:
        open_image(source, index).pixels()
    except BadImage:
        return False
    return True


def save_snapshot(method: nn.Module, images: Tensor, path: Path, **normalisation: Any) -> None:
    """Writes `filled` of `reconstruct`, or the result of `autoencode`, as uint8 [N, H, W, 3] into an .npz, atomically.

    Args:
        method, images, normalisation: as for these.
        path: RUN/reconstructions/step-000120.npz; the folder is created if missing.
    """
    if isinstance(method, Autoencodes):
        made = autoencode(method, images, **normalisation)
    else:
        made = reconstruct(method, images, **normalisation).filled
    filled = as_bytes(made)
    path.parent.mkdir(exist_ok=True)
    with write_atomically(path, "wb") as file:
        np.savez_compressed(file, filled=filled)


def read_snapshots(folder: Path) -> list[tuple[int, np.ndarray]]:
    """(step, uint8 [N, H, W, 3]) of each snapshot in RUN/reconstructions, by step; [] if the folder is missing.

    Raises:
        ValueError: a file is damaged.
    """
    snapshots = []
    for path in folder.glob("step-*.npz"):
        if not (match := re.fullmatch(r"step-(\d+)\.npz", path.name)):
            continue
        try:
            with np.load(path) as arrays:
                filled = arrays["filled"]
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"reconstruction: {path} is damaged: remove it") from error
        if filled.dtype != np.uint8 or filled.ndim != 4 or filled.shape[3] != 3:
            raise ValueError(f"reconstruction: {path} must hold uint8 [N, H, W, 3], got {filled.dtype} {filled.shape}")
        snapshots.append((int(match[1]), filled))
    return sorted(snapshots, key=lambda snapshot: snapshot[0])
