"""What a method asks of the data: augmentations as plain values, read by every loader engine."""

from dataclasses import dataclass

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class View:
    """One augmented picture of an image. The defaults change nothing but the size: a resize and no randomness.

    The steps run in the order of the fields, as in the reference code of MoCo v2 and v3, but for `grayscale_first`.
    """

    size: tuple[int, int]  # (height, width) in pixels
    crop: tuple[float, float] | None = None  # share of the image's area that a random crop takes (aspect 3:4 to 4:3)
    interpolation: str = "bilinear"  # or "bicubic"
    jitter: tuple[float, float, float, float] = (0, 0, 0, 0)  # strengths of brightness, contrast, saturation, hue
    jitter_p: float = 1.0
    grayscale_p: float = 0.0
    grayscale_first: bool = False  # before the jitter, as in MoCo v1
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarize_p: float = 0.0
    flip_p: float = 0.0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


@dataclass(frozen=True)
class Recipe:
    """The views that one training sample is made of, all cut from one decoded image."""

    views: tuple[View, ...]


def plain(size: tuple[int, int]) -> Recipe:
    """The whole image, resized: what evaluation and the pictures of a report see."""
    return Recipe((View(size=size, interpolation="bicubic"),))
