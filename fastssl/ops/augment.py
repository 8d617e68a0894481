"""Photometric augmentation in place on a batch of uint8 images: jitter, grayscale, blur, solarize, flip."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import check
from .dispatch import fake, op, register_triton


def _kernels():
    """The Triton kernels, imported at the first call on a GPU."""
    from fastssl.kernels import augment

    return augment


LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow and torchvision
TENSORFLOW_LUMA = (0.2989, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # columns of `jitter`, and values of `order`


class ColourLaw(NamedTuple):
    """Variants of the steps of `augment_`; the defaults are torchvision's."""

    grey_first: bool = False  # grayscale before the jitter, as in MoCo v1
    additive: bool = False  # brightness is added, as in BYOL and SimCLR v1
    tensorflow: bool = False  # contrast, saturation, grayscale and blur of the code of SimCLR and BYOL

    @property
    def luma(self) -> tuple[float, float, float]:
        """Weights of red, green and blue in grayscale."""
        return TENSORFLOW_LUMA if self.tensorflow else LUMA

    def blur_radius(self, height: int) -> int | None:
        """Radius of the blur of an image of this height; None where it depends on σ."""
        return height // 20 if self.tensorflow else None


TORCHVISION = ColourLaw()


def augment_(
    images: Tensor,
    jitter: Tensor,
    order: Tensor,
    grey: Tensor,
    sigma: Tensor,
    solarize: Tensor,
    flip: Tensor,
    law: ColourLaw = TORCHVISION,
) -> Tensor:
    """Augments each image with the parameters drawn for it, in place; returns `images`.

    A step is skipped for an image whose parameters leave it out. In this order, on values x in [0, 255]:

    1. jitter: the four steps in the `order` of the image, each clamped to [0, 255], with luma(x) = 0.299 R + 0.587 G +
       0.114 B: brightness f·x; contrast m + f·(x − m), m the image's mean luma; saturation luma + f·(x − luma); hue,
       rotated by h of a full turn in HSV, which keeps the largest and the smallest channel of each pixel.
    2. grayscale: all channels become luma (before 1. with `law.grey_first`, as in MoCo v1).
    3. Gaussian blur, separable, of radius ⌈3σ⌉ (at most size − 1), weights normalised, the border reflected about the
       edge pixels.
    4. rounding to uint8; then solarize: 255 − x where x ≥ 128.
    5. horizontal flip.

    With `law.additive` brightness is x + 255·(f − 1). With `law.tensorflow` contrast is m + f·(x − m), m the channel's
    mean; saturation is multiplied by f in HSV, up to 1: v − min(f, v / (v − w))·(v − x), v and w the largest and the
    smallest channel of a pixel; grayscale weighs red by 0.2989; and the blur has radius ⌊H / 20⌋ along both axes, with
    zeros beyond the border.

    Differs from torchvision's transforms on Pillow images in two points: values are rounded once, not after each step,
    and the blur is a Gaussian (Pillow's is three box filters).

    Args:
        images: [B, 3, H, W] uint8, changed in place; any strides by which no two images share memory.
        jitter: [B, 4] float32: factors f ≥ 0 of brightness, contrast, saturation, and the rotation h of the hue in
            [−0.5, 0.5]. (1, 1, 1, 0) changes nothing.
        order: [B, 4] int64, a permutation of 0 … 3 (the columns of `jitter`).
        grey: [B] bool, convert to grayscale.
        sigma: [B] float32, standard deviation of the blur in pixels; 0 for no blur.
        solarize: [B] bool.
        flip: [B] bool.
        law: variants of these steps, for all images.

    All parameters but `images` must be on the CPU, whatever the device of the images, because they decide which steps
    run. Their values are not checked; `draw(view, number, seeds).colours` of `fastssl.data.draws` draws them from
    torchvision's distributions.

    Raises:
        ValueError: a shape or device does not fit, or two pixels of the images share memory.
        TypeError: a dtype does not fit, or law is no `ColourLaw`.
        RuntimeError: an `order` is not in 0 … 3.

    Memory: a few float32 images. No gradient.

    Source: Chen et al., "Improved Baselines with Momentum Contrastive Learning", 2020 (MoCo v2), section 3, and code;
        Chen et al., 2020 (SimCLR), appendix A, and code; Grill et al., 2020 (BYOL), appendix B, and code.
    """
    check.tensor("augment_", "images", images, "B 3 H W", **{"3": 3})
    _check_dtype("images", images, torch.uint8)
    for name, parameter, dims, dtype in (
        ("jitter", jitter, "B 4", torch.float32),
        ("order", order, "B 4", torch.int64),
        ("grey", grey, "B", torch.bool),
        ("sigma", sigma, "B", torch.float32),
        ("solarize", solarize, "B", torch.bool),
        ("flip", flip, "B", torch.bool),
    ):
        _check_parameter(name, parameter, dims, dtype, images)
    check.separate("augment_", {"images": images}, {})
    if not isinstance(law, ColourLaw) or not all(isinstance(choice, bool) for choice in law):
        check.fail("augment_", f"law must be a ColourLaw of True and False, got {law!r}", TypeError)
    _augment_(images, jitter, order, grey, sigma, solarize, flip, *law)
    return images


def _check_parameter(name: str, parameter: Tensor, dims: str, dtype: torch.dtype, images: Tensor) -> None:
    batch = images.shape[0]
    check.tensor("augment_", name, parameter, dims, **({"B": batch, "4": 4} if dims == "B 4" else {"B": batch}))
    _check_dtype(name, parameter, dtype)
    if not parameter.is_cpu and not (parameter.is_meta and images.is_meta):
        check.fail("augment_", f"{name} must be on the cpu, whatever the device of images, got {parameter.device}")


def _check_dtype(name: str, value: Tensor, dtype: torch.dtype) -> None:
    if value.dtype != dtype:
        expected, got = check.dtype_name(dtype), check.dtype_name(value.dtype)
        check.fail("augment_", f"{name} must be {expected}, got {got}", TypeError)


@op("augment_", mutates_args=("images",))
def _augment_(
    images: Tensor,
    jitter: Tensor,
    order: Tensor,
    grey: Tensor,
    sigma: Tensor,
    solarize: Tensor,
    flip: Tensor,
    grey_first: bool,
    additive: bool,
    tensorflow: bool,
) -> None:
    check.in_range("augment_", "order", order, 4, "3")
    if images.numel() == 0:
        return
    law = ColourLaw(grey_first, additive, tensorflow)
    parameters = zip(*(column.tolist() for column in (jitter, order, grey, sigma, solarize, flip)))
    for image, (factors, steps, to_grey, blur_sigma, to_solarize, to_flip) in zip(images, parameters):
        if to_grey or blur_sigma > 0 or factors != [1, 1, 1, 0]:
            values = jitter_image(image.float(), factors, steps, to_grey, law)
            image.copy_((blur_image(values, blur_sigma, law) if blur_sigma > 0 else values).round_())
        if to_solarize:
            image.copy_(torch.where(image >= 128, 255 - image, image))
        if to_flip:
            image.copy_(image.flip(-1))


@fake(_augment_)
def _(images, jitter, order, grey, sigma, solarize, flip, grey_first, additive, tensorflow):
    pass


register_triton(_augment_, lambda: _kernels().augment_)


def jitter_image(x: Tensor, factors: list[float], steps: list[int], grey: bool, law: ColourLaw) -> Tensor:
    """Jitter and grayscale of `augment_` on one image [3, H, W], floating."""
    if grey and law.grey_first:
        x = _luma(x, law.luma).expand_as(x)
    for step in steps:
        factor = factors[step]
        if factor == (0 if step == HUE else 1):
            continue
        if step == BRIGHTNESS:
            x = (x + 255 * (factor - 1) if law.additive else x * factor).clamp_(0, 255)
        elif step == CONTRAST:
            x = _blend(x, x.mean((1, 2), keepdim=True) if law.tensorflow else _luma(x).mean(), factor)
        elif step == SATURATION:
            x = _saturate(x, factor) if law.tensorflow else _blend(x, _luma(x), factor)
        else:
            x = _rotate_hue(x, factor)
    return _luma(x, law.luma).expand_as(x).contiguous() if grey and not law.grey_first else x


def _luma(x: Tensor, weights: tuple[float, float, float] = LUMA) -> Tensor:
    """[3, H, W] → [1, H, W]"""
    red, green, blue = weights
    return (x[0] * red + x[1] * green + x[2] * blue).unsqueeze(0)


def _blend(x: Tensor, base: Tensor, factor: float) -> Tensor:
    """The value base + factor · (x − base), clamped."""
    return ((x - base) * factor + base).clamp_(0, 255)


def _saturate(x: Tensor, factor: float) -> Tensor:
    """Saturation in HSV times a factor, up to 1: the distances to the largest channel change in proportion."""
    largest = x.amax(0)
    chroma = largest - x.amin(0)
    scale = (largest / torch.where(chroma > 0, chroma, 1)).clamp_(max=factor)
    return (largest - (largest - x) * scale).clamp_(0, 255)


def _rotate_hue(x: Tensor, turns: float) -> Tensor:
    """RGB → HSV, hue + turns, HSV → RGB.

    With V and m the largest and the smallest channel of a pixel and H its hue in sixths of a turn, a channel is
    V − (V − m)·clamp(min(k, 4 − k), 0, 1), where k = (n + H) mod 6, and n is 5, 3, 1 for red, green, blue.
    """
    red, green, blue = x
    largest, smallest = x.amax(0), x.amin(0)
    chroma = largest - smallest
    sixths = torch.where(
        largest == red, green - blue, torch.where(largest == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    )
    hue = sixths / torch.where(chroma > 0, chroma, 1) + 6 * turns
    k = hue + torch.tensor([5.0, 3.0, 1.0], dtype=x.dtype, device=x.device).view(3, 1, 1)
    k = k - (k / 6).floor_() * 6
    return largest - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


def blur_image(x: Tensor, sigma: float, law: ColourLaw = TORCHVISION) -> Tensor:
    """Gaussian blur of `augment_` on one image [3, H, W], floating."""
    radius = law.blur_radius(x.shape[1])
    return _blur_along_width(_blur_along_width(x, sigma, radius).mT, sigma, radius).mT


def _blur_along_width(x: Tensor, sigma: float, radius: int | None) -> Tensor:
    """With a radius, there are zeros beyond the border."""
    width, mode = x.shape[-1], "reflect" if radius is None else "constant"
    if radius is None:
        radius = math.ceil(min(3 * sigma, width - 1))  # sigma may be infinite
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    padded = F.pad(x, (radius, radius), mode=mode)
    result = padded[..., radius : radius + width] * (weights[0] / total)
    for i in range(1, radius + 1):
        left, right = padded[..., radius - i :][..., :width], padded[..., radius + i :][..., :width]
        result.add_(left + right, alpha=weights[i] / total)
    return result
