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
    centre: float | None = (
        None  # without `crop`: what a centre crop takes of the sides (0.875: 224 of 256), undistorted
    )
    interpolation: str = "bilinear"  # or "bicubic"; always antialiased
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

    def __post_init__(self):
        shares = {"crop": self.crop or (1, 1), "centre": (self.centre or 1,), "blur_sigma": self.blur_sigma}
        for name, values in shares.items():
            if not (0 < values[0] <= values[-1] and (name == "blur_sigma" or values[-1] <= 1)):
                limit = "" if name == "blur_sigma" else ", up to 1"
                came = " ".join(map(str, values))
                raise ValueError(f"augmentation: {name} must lie above 0{limit}, and rise, got {came}")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"augmentation: interpolation must be bilinear or bicubic, got {self.interpolation!r}")
        if min(*self.jitter, 0.5 - self.jitter[3]) < 0:
            raise ValueError(
                f"augmentation: jitter must be four strengths from 0 on, the hue's up to 0.5, got {self.jitter}"
            )


@dataclass(frozen=True)
class Augmentation:
    """The views that one training sample is made of, all cut from one decoded image."""

    views: tuple[View, ...]


def evaluation(size: tuple[int, int], centre: float = 0.875) -> Augmentation:
    """The middle of the image, undistorted: the protocol of the papers, 224 pixels of a side of 256, at any size."""
    return Augmentation((View(size=size, centre=centre, interpolation="bicubic"),))


def multi_crop(
    size: tuple[int, int] = (224, 224), small_size: tuple[int, int] = (96, 96), small: int = 6
) -> Augmentation:
    """Two large and several small crops, each with SimCLR's colours.

    Source: Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", 2020 (SwAV),
    section 3.3 and its code: areas 0.14 to 1 and 0.05 to 0.14.
    """
    colours = {"jitter": (0.8, 0.8, 0.8, 0.2), "jitter_p": 0.8, "grayscale_p": 0.2, "blur_p": 0.5, "flip_p": 0.5}
    views = [View(size, crop=(0.14, 1.0), **colours)] * 2 + [View(small_size, crop=(0.05, 0.14), **colours)] * small
    return Augmentation(tuple(views))
