"""Decodes JPEGs at full size, or at 1/2, 1/4 or 1/8 of it, by the decoder that takes the least time.

simplejpeg and Pillow contain the same library, libjpeg-turbo, and both are used with its default, the accurate inverse
transform and smooth upsampling of the colours: their pixels are equal, so a run may be resumed with either. simplejpeg
takes three quarters of the time, since it decodes into the array of the result. Pillow decodes what simplejpeg has no
colours for (CMYK) or refuses (files with an irregularity), which depends on the file alone; and all JPEGs where
simplejpeg is not installed, as on a free-threaded Python, for which it has no wheels. `DECODER` names the one in use.

A reduced image is made from the low frequencies of each block of 8×8 pixels. It takes less time, and so does all that
follows. Its sides are those of the image divided by the scale, rounded up; pixel i of it covers the pixels from
scale · i to scale · (i + 1) of the image.
"""

from importlib.metadata import version

import numpy as np
from PIL import Image, features

try:
    import simplejpeg
except ImportError:  # reported by `DECODER`
    simplejpeg = None

SCALES = (8, 4, 2)  # by which a JPEG can be reduced
MODES = ("RGB", "L")  # of Pillow, for the colours that simplejpeg converts
DECODER = (
    f"simplejpeg {version('simplejpeg')}"
    if simplejpeg
    else f"Pillow {Image.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')} (simplejpeg is not installed: "
    "it takes three quarters of the time)"
)


def reduced(size: tuple[int, int], scale: int) -> tuple[int, int]:
    """(height, width) of an image of this size, reduced."""
    return -(-size[0] // scale), -(-size[1] // scale)


def decode_jpeg(data: np.ndarray, size: tuple[int, int], mode: str, scale: int = 1) -> np.ndarray | None:
    """Pixels [H, W, 3] as stored, whatever the orientation is; None if Pillow is to decode the file.

    Args:
        data: bytes [N] of the file.
        size: (height, width) as stored, in the header that Pillow reads.
        mode: Pillow's name of its colours.
        scale: 1, or one of `SCALES` that is not larger than a side of the image.
    """
    if simplejpeg is None or mode not in MODES:
        return None
    height, width = reduced(size, scale)
    try:
        pixels = simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=scale)
    except ValueError:  # Pillow accepts more irregularities, and says what is wrong
        return None
    return pixels if pixels.shape == (height, width, 3) else None  # a second header may state another size
