"""NVIDIA DALI's pipeline of an augmentation, as its users write it: files are decoded in their random windows, and the
graph draws its random numbers itself. Importing this module needs DALI."""

import math

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import math as dm
from nvidia.dali.data_node import DataNode

from fastssl.data.augmentation import View

INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
ASPECT = 3 / 4, 4 / 3


@pipeline_def(enable_conditionals=True)
def graph(root: str, views: tuple[View, ...]) -> tuple[DataNode, ...]:
    """The views of the batches of a folder of class folders, each normalised floats [B, 3, H, W]."""
    files, _ = fn.readers.file(file_root=root, random_shuffle=True, name="photos")
    if len(views) == 1 and views[0].crop:
        view = views[0]
        window = fn.decoders.image_random_crop(
            files, output_type=types.RGB, random_area=view.crop, random_aspect_ratio=ASPECT
        )
        crops = [fn.resize(window, size=view.size, interp_type=INTERPOLATION[view.interpolation])]
    else:
        image = fn.decoders.image(files, output_type=types.RGB)
        crops = [_crop(image, view) for view in views]
    return tuple(_normalise(_colours(crop, view), view) for crop, view in zip(crops, views))


def _crop(image: DataNode, view: View) -> DataNode:
    interpolation = INTERPOLATION[view.interpolation]
    if view.crop:
        return fn.random_resized_crop(
            image, size=view.size, random_area=view.crop, random_aspect_ratio=ASPECT, interp_type=interpolation
        )
    if view.centre:
        shorter = round(min(view.size) / view.centre)
        return fn.resize(image, resize_shorter=shorter, interp_type=interpolation)  # `_normalise` cuts out the centre
    return fn.resize(image, size=view.size, interp_type=interpolation)


def _colours(x: DataNode, view: View) -> DataNode:
    if any(view.jitter) and _happens(view.jitter_p):
        brightness, contrast, saturation, hue = view.jitter
        x = fn.color_twist(
            x,
            brightness=_between(max(0, 1 - brightness), 1 + brightness),
            contrast=_between(max(0, 1 - contrast), 1 + contrast),
            saturation=_between(max(0, 1 - saturation), 1 + saturation),
            hue=_between(-360 * hue, 360 * hue),
        )
    if view.grayscale_p and _happens(view.grayscale_p):
        x = fn.saturation(x, saturation=0.0)
    if view.blur_p and _happens(view.blur_p):
        x = fn.gaussian_blur(x, sigma=_between(*view.blur_sigma), window_size=2 * math.ceil(3 * view.blur_sigma[1]) + 1)
    if view.solarize_p and _happens(view.solarize_p):
        x = dm.min(x, types.Constant(255, types.UINT8) - x)  # 255 − x where x ≥ 128
    return x


def _normalise(x: DataNode, view: View) -> DataNode:
    return fn.crop_mirror_normalize(
        x,
        crop=view.size,
        mirror=fn.random.coin_flip(probability=view.flip_p),
        mean=[255 * value for value in view.mean],
        std=[255 * value for value in view.std],
        dtype=types.FLOAT,
        output_layout="CHW",
    )


def _happens(probability: float) -> DataNode:
    return fn.random.coin_flip(probability=probability, dtype=types.BOOL)


def _between(low: float, high: float) -> DataNode:
    return fn.random.uniform(range=[low, high])
