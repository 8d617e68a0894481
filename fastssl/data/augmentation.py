"""Augmentations as plain values: a method defines them, and every loader engine reads them."""

from dataclasses import dataclass, fields, replace
from typing import Any

MAX_SIDE = 8192  # pixels: a view of that height and width takes 0.8 GB as floats
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SWAV_STD = (0.228, 0.224, 0.225)  # of SwAV's and DeepCluster-v2's code
COLOUR_LAWS: dict[str, dict[str, Any]] = {  # fields of `ops.ColourLaw`
    "torchvision": {},
    "simclr_v1": {"additive": True, "tensorflow": True},
    "simclr_v2": {"tensorflow": True},
    "byol": {"additive": True, "tensorflow": True},
}
COLOUR_SPACES = ("rgb", "lab")
INTERPOLATIONS = ("bilinear", "bicubic", "lanczos")
OWN = ("size", "interpolation", "mean", "std", "colour_space", "same_crop")  # of a view with `same_crop`


@dataclass(frozen=True)
class View:
    """One augmented view of an image; the defaults resize the whole image without randomness.

    The steps run in the order of the fields, as in the reference code of MoCo v2 and v3, except `grayscale_first`.
    """

    size: tuple[int, int]  # (height, width) in pixels
    crop: tuple[float, float] | None = None  # range of a random crop's share of the area; its aspect is 3:4 to 4:3
    centre: float | None = None  # without `crop`: share of the sides that an undistorted centre crop takes
    interpolation: str = "bilinear"  # "bilinear", "bicubic" or "lanczos" (of three lobes), always antialiased
    jitter: tuple[float, float, float, float] = (0, 0, 0, 0)  # strengths of brightness, contrast, saturation, hue
    jitter_p: float = 1.0
    grayscale_p: float = 0.0
    grayscale_first: bool = False  # grayscale before the jitter, as in MoCo v1
    colour_law: str = "torchvision"  # formulas of jitter, grayscale and blur: one of `COLOUR_LAWS`, see `ops.augment_`
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # range of the Gaussian's standard deviation, pixels
    solarize_p: float = 0.0
    flip_p: float = 0.0
    random_augment: bool = False  # two of ten changes, see `data.random_augment`
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    colour_space: str = "rgb"  # "lab": L, a, b of the finished view; `mean` and `std` are then theirs (`data.lab`)
    same_crop: bool = False  # window and random steps are those of the view before it: the same pixels in another size

    def __post_init__(self):
        if not (len(self.size) == 2 and all(1 <= side <= MAX_SIDE for side in self.size)):
            got = " ".join(map(str, self.size))
            raise ValueError(f"augmentation: height and width must be from 1 to {MAX_SIDE:,} pixels, got {got}")
        low, high = self.crop or (1, 1)
        if not 0 < low <= high <= 1:
            raise ValueError(f"augmentation: crop must be a range above 0 and at most 1, got {low} {high}")
        if self.centre is not None and not 0 < self.centre <= 1:
            raise ValueError(f"augmentation: centre must be above 0 and at most 1, got {self.centre}")
        low, high = self.blur_sigma
        if not 0 < low <= high:
            raise ValueError(f"augmentation: blur_sigma must be a range above 0, got {low} {high}")
        if self.interpolation not in INTERPOLATIONS:
            expected = "bilinear, bicubic or lanczos"
            raise ValueError(f"augmentation: interpolation must be {expected}, got {self.interpolation!r}")
        for name, known in (("colour_law", COLOUR_LAWS), ("colour_space", COLOUR_SPACES)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"augmentation: {name} must be {' or '.join(known)}, got {value!r}")
        if min(*self.jitter, 0.5 - self.jitter[3]) < 0:
            raise ValueError(
                f"augmentation: jitter must be four strengths of at least 0, the hue's at most 0.5, got {self.jitter}"
            )


@dataclass(frozen=True)
class Augmentation:
    """The views of one training sample, all made from one decoded image.

    A view with `same_crop` gets all fields but `OWN` from the view before it.
    """

    views: tuple[View, ...]
    reduced: bool = True  # decode large JPEGs at 1/2, 1/4 or 1/8 of their size where the views need no more pixels

    def __post_init__(self):
        views: list[View] = []
        for view in self.views:
            if view.same_crop:
                view = _linked(view, views[-1] if views else None)
            views.append(view)
        object.__setattr__(self, "views", tuple(views))

    @property
    def sources(self) -> list[int]:
        """The number of the view whose window and draws each view has: its own, or that of a view before it."""
        numbers: list[int] = []
        for number, view in enumerate(self.views):
            numbers.append(numbers[-1] if view.same_crop else number)
        return numbers


def _linked(view: View, source: View | None) -> View:
    """A view with `same_crop`, with the fields of the view before it."""
    if source is None:
        raise ValueError("augmentation: same_crop must not be set in the first view, which has none before it")
    taken = {field.name: getattr(source, field.name) for field in fields(View) if field.name not in OWN}
    for field in fields(View):
        given, value = getattr(view, field.name), taken.get(field.name)
        if field.name in taken and given not in (value, field.default):
            raise ValueError(
                f"augmentation: a view with same_crop has the {field.name} of the view before it, {value!r}: leave it "
                f"out, got {given!r}"
            )
    if source.blur_p:
        raise ValueError(
            "augmentation: a view with same_crop must follow one without blur, whose width is in pixels of one size, "
            f"got blur_p {source.blur_p:g}"
        )
    if source.random_augment:
        raise ValueError(
            "augmentation: a view with same_crop must follow one without random_augment, whose moves are in pixels of "
            "one size, got random_augment True"
        )
    return replace(view, **taken)


def asymmetric_views(view: View, blur_p: tuple[float, ...], solarize_p: tuple[float, ...]) -> Augmentation:
    """Views that differ in the probabilities of blur and solarization alone, one of each per view.

    Source: Grill et al., 2020 (BYOL), appendix B.
    """
    return Augmentation(tuple(replace(view, blur_p=blur, solarize_p=sun) for blur, sun in zip(blur_p, solarize_p)))


def evaluation(
    size: tuple[int, int],
    centre: float = 0.875,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Augmentation:
    """An undistorted centre crop, at any size; the papers' protocol takes 224 pixels of a side of 256.

    The images are decoded in full.
    """
    view = View(size=size, centre=centre, interpolation="bicubic", mean=mean, std=std)
    return Augmentation((view,), reduced=False)


def multi_crop(
    size: tuple[int, int] = (224, 224),
    small_size: tuple[int, int] = (96, 96),
    small: int = 6,
    *,
    areas: tuple[float, float] = (0.05, 0.14),
    jitter: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 0.2),
    blur_p: float = 0.5,
) -> Augmentation:
    """Two large and several small crops, each with SimCLR's colour augmentation.

    Args:
        size, small_size: (height, width) in pixels of the large and the small views.
        small: number of small views.
        areas: smallest share of the area of a small view, and the share up to which views are small, above it large.
        jitter: strengths of brightness, contrast, saturation and hue jitter.
        blur_p: probability of blur.

    Source: Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", 2020 (SwAV),
    section 3.3 and its code: areas 0.14 to 1 and 0.05 to 0.14, and a standard deviation of red of 0.228.
    """
    smallest, limit = areas
    large_view = View(
        size, crop=(limit, 1.0), jitter=jitter, jitter_p=0.8, grayscale_p=0.2, blur_p=blur_p, flip_p=0.5, std=SWAV_STD
    )
    small_view = replace(large_view, size=small_size, crop=(smallest, limit))
    return Augmentation((large_view,) * 2 + (small_view,) * small)


def global_and_local_views(
    view: View,
    local_size: tuple[int, int],
    local_crop: tuple[float, float],
    count: int,
    blur_p: tuple[float, float, float],
    solarize_p: tuple[float, float],
) -> Augmentation:
    """Two large views, and small ones of small parts of the image, which are never solarized.

    Args:
        view: what all views have in common, with the size and the crop of the large ones.
        local_size, local_crop: those of the small views.
        count: number of small views.
        blur_p: probability of blur of the first and the second large view, and of the small ones.
        solarize_p: probability of solarization of the large views.

    Source: Caron et al., 2021 (DINO), section 3.1 and its code.
    """
    large = asymmetric_views(view, blur_p[:2], solarize_p).views
    small = replace(view, size=local_size, crop=local_crop, blur_p=blur_p[2])
    return Augmentation((*large, *[small] * count))
