"""Augmentations as plain torchvision (v2) transforms on Pillow images, as the reference code writes them.

Tests compare statistics with them, and benchmarks/loader.py times the loaders against them.
"""

import torch
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode, v2

from fastssl.data.augmentation import View


class PillowBlur(v2.Transform):
    """Gaussian blur of a random radius, by Pillow: what the reference code of MoCo v2 and v3 calls GaussianBlur."""

    def __init__(self, sigma: tuple[float, float]):
        super().__init__()
        self.sigma = sigma

    def make_params(self, inputs):
        return {"radius": torch.empty(()).uniform_(*self.sigma).item()}

    def transform(self, image: Image.Image, params) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(params["radius"]))


def plain_transform(view: View) -> v2.Compose:
    """Pillow RGB image → uint8 tensor [3, H, W]. All randomness comes from torch's global generator."""
    interpolation = InterpolationMode(view.interpolation)
    if view.crop is not None:
        steps = [v2.RandomResizedCrop(view.size, scale=view.crop, interpolation=interpolation)]
    elif view.centre is not None:
        larger = round(min(view.size) / view.centre)  # of a square view: the protocol's 256 for 224
        steps = [v2.Resize(larger, interpolation=interpolation), v2.CenterCrop(view.size)]
    else:
        steps = [v2.Resize(view.size, interpolation=interpolation)]
    grayscale = [v2.RandomGrayscale(view.grayscale_p)] if view.grayscale_p else []
    steps += grayscale if view.grayscale_first else []
    if any(view.jitter):
        steps.append(v2.RandomApply([v2.ColorJitter(*view.jitter)], p=view.jitter_p))
    steps += [] if view.grayscale_first else grayscale
    if view.blur_p:
        steps.append(v2.RandomApply([PillowBlur(view.blur_sigma)], p=view.blur_p))
    if view.solarize_p:
        steps.append(v2.RandomSolarize(threshold=128, p=view.solarize_p))
    if view.flip_p:
        steps.append(v2.RandomHorizontalFlip(view.flip_p))
    return v2.Compose([*steps, v2.PILToTensor()])
