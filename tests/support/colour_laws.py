"""Colours of SimCLR's and BYOL's code, pixel by pixel with colorsys: written from their facts, not from our code."""

import colorsys

import numpy as np
from scipy.ndimage import correlate1d


def _in_hsv(image, change):
    changed = [[colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel))) for pixel in row] for row in image]
    return np.array(changed).reshape(image.shape)


def _brightness(image, factor, additive):
    return image + (factor - 1) if additive else image * factor


def _contrast(image, factor):
    mean = image.mean((0, 1))
    return (image - mean) * factor + mean


def augmented(pixels, jitter, order, grey, sigma, flip, additive):
    """A view in bytes [3, H, W], not rounded, of the bytes `pixels` [3, H, W].

    Flip, then jitter in the drawn order with a clip to [0, 1] after each step, then grayscale, then blur by a kernel of
    a tenth of the height, made odd, with zeros beyond the border.
    """
    image = pixels.astype(float).transpose(1, 2, 0) / 255
    image = image[:, ::-1] if flip else image
    brightness, contrast, saturation, hue = map(float, jitter)
    steps = (
        lambda x: _brightness(x, brightness, additive),
        lambda x: _contrast(x, contrast),
        lambda x: _in_hsv(x, lambda h, s, v: (h, min(max(s * saturation, 0), 1), v)),
        lambda x: _in_hsv(x, lambda h, s, v: ((h + hue) % 1, s, v)),
    )
    if list(jitter) != [1, 1, 1, 0]:
        for step in order:
            image = steps[step](image).clip(0, 1)
    if grey:
        image = np.repeat((image @ [0.2989, 0.5870, 0.1140])[..., None], 3, 2)
    if sigma > 0:
        radius = int(len(image) / 10 / 2)
        kernel = np.exp(-(np.arange(-radius, radius + 1.0) ** 2) / (2 * float(sigma) ** 2))
        for axis in (0, 1):
            image = correlate1d(image, kernel / kernel.sum(), axis, mode="constant", cval=0)
    return 255 * image.clip(0, 1).transpose(2, 0, 1)
