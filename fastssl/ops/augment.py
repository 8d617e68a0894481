"""The photometric half of an augmentation, in place on a batch of bytes: jitter, grayscale, blur, solarize, flip."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import check
from .dispatch import fake, op

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow and torchvision have it
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # columns of `jitter`, and what `order` names


def augment_(
    images: Tensor,
    jitter: Tensor,
    order: Tensor,
    grey: Tensor,
    sigma: Tensor,
    solarize: Tensor,
    flip: Tensor,
    grey_first: bool = False,
) -> Tensor:
    """Augments each image by its own draws, in place; returns `images`.

    Each step is skipped for the images whose draws leave it out. In this order, on values x in [0, 255]:

    1. jitter: the four steps in the image's own `order`, each clamped to [0, 255], with luma(x) = 0.299 R + 0.587 G +
       0.114 B: brightness f·x; contrast m + f·(x − m), m the image's mean luma; saturation luma + f·(x − luma); hue,
       turned by h of a whole turn in HSV, which keeps the largest and the smallest channel of each pixel.
    2. grayscale: all channels become luma (before 1. where `grey_first`, as in MoCo v1).
    3. Gaussian blur, separable, of radius ⌈3σ⌉ (at most size − 1), weights normalised, the border mirrored about the
       edge pixels.
    4. rounded to bytes; then solarize: 255 − x where x ≥ 128.
    5. flip: left and right exchanged.

    What torchvision's transforms do on Pillow images, but that bytes are rounded once, not after each step, and that
    the blur is a Gaussian (Pillow's is three box filters).

    Args:
        images: [B, 3, H, W] uint8, changed in place; any strides by which no two images share memory.
        jitter: [B, 4] float32: factors f ≥ 0 of brightness, contrast, saturation, and the hue's turn h in [−0.5, 0.5].
            (1, 1, 1, 0) changes nothing.
        order: [B, 4] int64, a permutation of 0 … 3 (the columns of `jitter`).
        grey: [B] bool.
        sigma: [B] float32, pixels; 0 for no blur.
        solarize: [B] bool.
        flip: [B] bool.
        grey_first: of all images.

    All draws lie on the CPU, wherever the images do: they decide what is computed at all. Their values are not checked;
    `draw(view, number, seeds).colours` of `fastssl.data.draws` makes them, with torchvision's distributions.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
        RuntimeError: an `order` is not in 0 … 3.

    Memory: a few float32 images. No gradient.

    Source: Chen et al., "Improved Baselines with Momentum Contrastive Learning", 2020 (MoCo v2), section 3, and code.
    """
    check.tensor("augment_", "images", images, "B 3 H W", **{"3": 3})
    _check_dtype("images", images, torch.uint8)
    floats, whole, yes_or_no = torch.float32, torch.int64, torch.bool
    for name, draws, dims, dtype in (
        ("jitter", jitter, "B 4", floats),
        ("order", order, "B 4", whole),
        ("grey", grey, "B", yes_or_no),
        ("sigma", sigma, "B", floats),
        ("solarize", solarize, "B", yes_or_no),
        ("flip", flip, "B", yes_or_no),
    ):
        _check_draws(name, draws, dims, dtype, images.shape[0])
    _augment_(images, jitter, order, grey, sigma, solarize, flip, grey_first)
    return images


def _check_draws(name: str, draws: Tensor, dims: str, dtype: torch.dtype, batch: int) -> None:
    check.tensor("augment_", name, draws, dims, **({"B": batch, "4": 4} if dims == "B 4" else {"B": batch}))
    _check_dtype(name, draws, dtype)
    if draws.device.type not in ("cpu", "meta"):
        check.fail("augment_", f"{name} must be on the cpu (draws decide what is computed), got {draws.device}")


def _check_dtype(name: str, value: Tensor, dtype: torch.dtype) -> None:
    if value.dtype != dtype:
        wanted, came = (str(d).removeprefix("torch.") for d in (dtype, value.dtype))
        check.fail("augment_", f"{name} must be {wanted}, got {came}", TypeError)


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
) -> None:
    draws = zip(jitter.tolist(), order.tolist(), grey.tolist(), sigma.tolist(), solarize.tolist(), flip.tolist())
    for image, (factors, steps, is_grey, blur, inverted, mirrored) in zip(images, draws):
        if is_grey or blur > 0 or factors != [1, 1, 1, 0]:
            values = coloured(image.float(), factors, steps, is_grey, grey_first)
            image.copy_((blurred(values, blur) if blur > 0 else values).round_())
        if inverted:
            image.copy_(torch.where(image >= 128, 255 - image, image))
        if mirrored:
            image.copy_(image.flip(-1))


@fake(_augment_)
def _(images, jitter, order, grey, sigma, solarize, flip, grey_first):
    pass


def coloured(x: Tensor, factors: list[float], steps: list[int], grey: bool, grey_first: bool) -> Tensor:
    """Steps 1 and 2 of `augment_` on one image [3, H, W], floating."""
    if grey and grey_first:
        x = _luma(x).expand_as(x)
    for step in steps:
        factor = factors[step]
        if factor == (0 if step == HUE else 1):
            continue
        if step == BRIGHTNESS:
            x = (x * factor).clamp_(0, 255)
        elif step == CONTRAST:
            x = _blend(x, _luma(x).mean(), factor)
        elif step == SATURATION:
            x = _blend(x, _luma(x), factor)
        else:
            x = _turn_hue(x, factor)
    return _luma(x).expand_as(x).contiguous() if grey and not grey_first else x


def _luma(x: Tensor) -> Tensor:
    red, green, blue = LUMA
    return (x[0] * red + x[1] * green + x[2] * blue).unsqueeze(0)


def _blend(x: Tensor, other: Tensor, factor: float) -> Tensor:
    return ((x - other) * factor + other).clamp_(0, 255)


def _turn_hue(x: Tensor, turns: float) -> Tensor:
    """RGB → HSV → RGB in one: of each pixel the largest and smallest channel stay, the place between them moves.

    With H in sixths of a turn, a channel is V − (V − min)·clamp(min(k, 4 − k), 0, 1), where k = (n + H) mod 6, and n
    is 5, 3, 1 for red, green, blue.
    """
    red, green, blue = x
    top, low = x.amax(0), x.amin(0)
    spread = top - low
    sixths = torch.where(
        top == red, green - blue, torch.where(top == green, blue - red + 2 * spread, red - green + 4 * spread)
    )
    hue = sixths / torch.where(spread > 0, spread, 1) + 6 * turns
    k = hue + torch.tensor([5.0, 3.0, 1.0], dtype=x.dtype, device=x.device).view(3, 1, 1)
    k = k - (k / 6).floor_() * 6
    return top - spread * torch.minimum(k, 4 - k).clamp_(0, 1)


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Step 3 of `augment_` on one image [3, H, W], floating."""
    return _blurred_along_width(_blurred_along_width(x, sigma).mT, sigma).mT


def _blurred_along_width(x: Tensor, sigma: float) -> Tensor:
    width = x.shape[-1]
    radius = min(math.ceil(3 * sigma), width - 1)
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    padded = F.pad(x, (radius, radius), mode="reflect")
    result = padded[..., radius : radius + width] * (weights[0] / total)
    for i in range(1, radius + 1):
        left, right = padded[..., radius - i :][..., :width], padded[..., radius + i :][..., :width]
        result.add_(left + right, alpha=weights[i] / total)
    return result
