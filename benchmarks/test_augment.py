"""Jitter, grayscale, blur and flip of a batch of uint8 images, beside torchvision (v2) on single images, same draws.

`official` takes Pillow images, which a loader decodes, and runs on one thread, as each worker of a loader does. The
baselines round to bytes after each step, Pillow's hue has 256 values and its blur is three box filters. So the
comparison is of the mean of each quarter of an image, in bfloat16 for its tolerance of 2 %.
"""

import math

import pytest
import torch
import torch.nn.functional
import torchvision.transforms.v2.functional as F
from PIL import ImageFilter

from fastssl.ops import augment_, dispatch

from .harness import Case, compare
from .machine import DEVICE

IDENTITY = torch.tensor([1.0, 1.0, 1.0, 0.0])
ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def draws(batch: int, jitter_p: float, grey_p: float, blur_p: float, flip_p: float, sigma=(0.1, 2.0)):
    """Random draws with the jitter of MoCo v2: 0.4, 0.4, 0.4 and 0.1."""

    def chance(p: float) -> torch.Tensor:
        return torch.rand(batch) < p

    jitter = IDENTITY + torch.tensor([0.4, 0.4, 0.4, 0.1]) * (2 * torch.rand(batch, 4) - 1)
    jitter[:, 3] = (jitter[:, 3] * 255).round() * 1.001 / 255  # Pillow truncates to multiples of 1/255
    jitter = torch.where(chance(jitter_p)[:, None], jitter, IDENTITY)
    order = torch.rand(batch, 4).argsort(1)
    sigma = torch.where(chance(blur_p), torch.empty(batch).uniform_(*sigma), 0)
    return jitter, order, chance(grey_p), sigma, chance(0), chance(flip_p)


def official_blur(image, sigma: float):
    """The blur of MoCo v2's code."""
    return image.filter(ImageFilter.GaussianBlur(sigma))


def tensor_blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    return F.gaussian_blur(image, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma, sigma])


def image_by_image(images: list, args: tuple, blur) -> list:
    """Results of torchvision's functions on Pillow images or tensors."""
    results = []
    for image, factors, steps, grey, sigma, _, flip in zip(images, *(column.tolist() for column in args)):
        for step in steps:
            if factors[step] != IDENTITY[step]:
                image = ADJUST[step](image, factors[step])
        image = F.rgb_to_grayscale(image, num_output_channels=3) if grey else image
        image = blur(image, sigma) if sigma > 0 else image
        results.append(F.horizontal_flip(image) if flip else image)
    return results


def with_plain_torch(images: torch.Tensor, args: tuple) -> torch.Tensor:
    with dispatch.reference():
        return augment_(images, *args)


def means(images: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).bfloat16()


def means_of_each(images: list[torch.Tensor]) -> torch.Tensor:
    return means(torch.stack(images).to(DEVICE))


@pytest.mark.parametrize(
    "name, batch, side, probabilities",
    [
        ("MoCo v2's draws", 64, 224, dict(jitter_p=0.8, grey_p=0.2, blur_p=0.5, flip_p=0.5)),
        ("MoCo v2's draws", 64, 32, dict(jitter_p=0.8, grey_p=0.2, blur_p=0.5, flip_p=0.5)),
        ("jitter of all", 64, 224, dict(jitter_p=1, grey_p=0, blur_p=0, flip_p=0)),
        ("blur of all, σ=1", 64, 224, dict(jitter_p=0, grey_p=0, blur_p=1, flip_p=0, sigma=(1, 1))),
    ],
)
def test_augment(benchmark, name, batch, side, probabilities):
    coarse = torch.rand(batch, 3, 8, 8)  # smooth, like a photograph
    images = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1).mul(255).byte()
    pillow = [F.to_pil_image(image) for image in images]
    images, args = images.to(DEVICE), draws(batch, **probabilities)
    state, plain_state = images.clone(), images.clone()
    case = Case(
        op="augment_",
        size=f"{name}, B={batch}, {side}²",
        kernel="augment_",
        contestants={
            "ours": lambda: augment_(state, *args),
            "official": lambda: [F.pil_to_tensor(image) for image in image_by_image(pillow, args, official_blur)],
            "torchvision on tensors": lambda: image_by_image(images, args, tensor_blur),
            "plain torch": lambda: with_plain_torch(plain_state, args),
        },
        adapt={"ours": means, "plain torch": means, "official": means_of_each, "torchvision on tensors": means_of_each},
        bytes_moved=2 * images.nbytes if side == 224 else 0,
    )
    compare(benchmark, case)
