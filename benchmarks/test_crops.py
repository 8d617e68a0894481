"""Random resized crops of photographs, and bytes as normalised floats, beside torch, torchvision (v2) and Pillow.

`official` takes Pillow images, which a loader decodes, as the official codes do. All resample with antialias; Pillow
rounds at other places, and planes have half the resolution in colour. So the comparison is of the mean of each quarter
of an image, in bfloat16 for its tolerance of 2 %.
"""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional
import torchvision.transforms.v2.functional as F
from PIL import Image

from fastssl.ops import normalise, resized_crops_

from .harness import DTYPES, Case, compare
from .machine import DEVICE
from .test_augment import means

SIDES = (400, 532)  # height and width of the photographs
BATCH = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photographs(count: int) -> list[torch.Tensor]:
    """Smooth images [H, W, 3] uint8."""
    coarse = torch.rand(count, 3, 8, 10)
    values = torch.nn.functional.interpolate(coarse, SIDES, mode="bicubic").clamp(0, 1).mul(255).byte()
    return list(values.permute(0, 2, 3, 1).contiguous())


def planes_of(image: torch.Tensor) -> torch.Tensor:
    """Planes [3·H/2, W] of 4:2:0."""
    luma, *chroma = Image.fromarray(image.numpy()).convert("YCbCr").split()
    parts = [np.asarray(luma), *(np.asarray(plane.reduce(2)) for plane in chroma)]
    return torch.from_numpy(np.concatenate([part.ravel() for part in parts]).reshape(-1, image.shape[1]))


def drawn_windows(count: int, areas: tuple[float, float]) -> list[list[int]]:
    """Windows of torchvision's RandomResizedCrop: share of the area, aspect from 3:4 to 4:3."""
    n, drawn = random.Random(0), []
    while len(drawn) < count:
        area, aspect = n.uniform(*areas) * SIDES[0] * SIDES[1], math.exp(n.uniform(math.log(3 / 4), math.log(4 / 3)))
        height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < height <= SIDES[0] and 0 < width <= SIDES[1]:
            drawn.append([n.randint(0, SIDES[0] - height), n.randint(0, SIDES[1] - width), height, width])
    return drawn


def by_pillow(images: list[Image.Image], windows: list[list[int]], side: int, mode: str) -> list[torch.Tensor]:
    method = Image.Resampling[mode.upper()]
    boxes = [(left, top, left + width, top + height) for top, left, height, width in windows]
    return [F.pil_to_tensor(x.resize((side, side), method, box)) for x, box in zip(images, boxes)]


def by_interpolate(out: torch.Tensor, images: list[torch.Tensor], windows: list[list[int]], mode: str) -> torch.Tensor:
    for result, image, (top, left, height, width) in zip(out, images, windows):
        cropped = image[None, :, top : top + height, left : left + width]
        result.copy_(torch.nn.functional.interpolate(cropped, out.shape[2:], mode=mode, antialias=True)[0])
    return out


def by_torchvision(images: list[torch.Tensor], windows: list[list[int]], side: int, mode: str) -> list[torch.Tensor]:
    method = {"bilinear": F.InterpolationMode.BILINEAR, "bicubic": F.InterpolationMode.BICUBIC}[mode]
    return [F.resized_crop(x, *window, [side, side], method, antialias=True) for x, window in zip(images, windows)]


def means_of_each(images: list[torch.Tensor]) -> torch.Tensor:
    return means(torch.stack(images).to(DEVICE))


@pytest.mark.parametrize(
    "name, areas, side, mode, planes",
    [
        ("MoCo v2's crops", (0.2, 1), 224, "bilinear", False),
        ("MoCo v2's crops, from YUV", (0.2, 1), 224, "bilinear", True),
        ("MAE's crops", (0.2, 1), 224, "bicubic", False),
        ("MAE's crops, from YUV", (0.2, 1), 224, "bicubic", True),
        ("BEiT's crops for the tokenizer", (0.08, 1), 112, "lanczos", False),
        ("SwAV's small crops", (0.05, 0.14), 96, "bilinear", False),
        ("SwAV's small crops, from YUV", (0.05, 0.14), 96, "bilinear", True),
    ],
)
def test_resized_crops(benchmark, name, areas, side, mode, planes):
    rgb, windows = photographs(BATCH), drawn_windows(BATCH, areas)
    pillow = [Image.fromarray(image.numpy()) for image in rgb]
    sources = [(planes_of(image) if planes else image).to(DEVICE) for image in rgb]
    channels_first = [image.to(DEVICE).permute(2, 0, 1) for image in rgb]
    tensor = torch.tensor(windows)
    out, other = (torch.empty(BATCH, 3, side, side, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    read = sum(height * width for _, _, height, width in windows) * (3 if not planes else 1.5)
    rivals = {
        "F.interpolate": lambda: by_interpolate(other, channels_first, windows, mode),
        "torchvision on tensors": lambda: by_torchvision(channels_first, windows, side, mode),
    }
    case = Case(
        op="resized_crops_",
        size=f"{name}, B={BATCH}, {SIDES[0]}×{SIDES[1]} to {side}²",
        kernel="resized_crops_",
        contestants={
            "ours": lambda: resized_crops_(out, sources, tensor, mode),
            "official": lambda: by_pillow(pillow, windows, side, mode),
        },
        rivals={} if mode == "lanczos" else rivals,  # torch lacks it on tensors
        adapt={
            "ours": means,
            "official": means_of_each,
            "F.interpolate": means,
            "torchvision on tensors": means_of_each,
        },
        bytes_moved=int(read) + out.nbytes,
    )
    compare(benchmark, case)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_normalise(benchmark, dtype):
    pixels = torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8).to(DEVICE)
    mean, std = (torch.tensor(v, device=DEVICE).view(1, 3, 1, 1) for v in (MEAN, STD))

    def official() -> torch.Tensor:
        return ((pixels.float() / 255 - mean) / std).to(DTYPES[dtype])

    case = Case(
        op="normalise",
        size=f"B={BATCH}, 224², {dtype}",
        kernel="normalise",
        contestants={
            "ours": lambda: normalise(pixels, MEAN, STD, DTYPES[dtype]),
            "official": official,
            "in place": lambda: pixels.float().sub_(mean * 255).div_(std * 255).to(DTYPES[dtype]),
        },
        rivals={"torch.compile": torch.compile(official, dynamic=False)},
        bytes_moved=pixels.nbytes * (1 + DTYPES[dtype].itemsize),
        dtype=DTYPES[dtype],
    )
    compare(benchmark, case)
