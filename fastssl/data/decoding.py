"""Decodes image files to pixels with Pillow.

DALI has the same libjpeg-turbo and gives the same pixels. torchvision's decode_jpeg would save a copy of the pixels,
about a tenth of the time, but torchvision plans to remove it.
"""

import io

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .source import BadImage, Source

MAX_PIXELS = 2 * 89_478_485  # Pillow's limit against decompression bombs: half a gigabyte
ORIENTATION, TRANSPOSED = 0x0112, {5, 6, 7, 8}  # EXIF's tag, and its values that exchange height and width


class ImageFile:
    """An image file with its header read, or an array of pixels. `pixels` decodes it.

    Attributes:
        size: (height, width) of the upright image.
        orientation: EXIF's orientation of the stored pixels, 1 to 8; 1 for an array.
        format, mode: names that Pillow gives them, such as "PNG" and "I;16"; "pixels" and "RGB" for an array.

    Args:
        data: bytes [N] of a file, or pixels [H, W, 3], uint8 and writable.
        name: the image in errors.

    Raises:
        BadImage: the data is no image, or has more than `MAX_PIXELS` pixels.
    """

    def __init__(self, data: np.ndarray, name: str):
        self.data, self.name, self.orientation = data, name, 1
        self.size: tuple[int, int]
        self.format: str | None
        self._image: Image.Image | None = None
        if data.ndim == 3:
            self.size, self.format, self.mode = (data.shape[0], data.shape[1]), "pixels", "RGB"
            return
        if not len(data):
            raise BadImage(f"{name}: the file is empty")
        try:
            self._image = image = Image.open(io.BytesIO(data.tobytes()))
        except Exception as error:  # decoders raise anything from OSError to struct.error on broken files
            raise self._bad_image(error) from error
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(f"{name}: {image.width}×{image.height} are more than {MAX_PIXELS:,} pixels")
        self.orientation = _orientation(image)
        transposed = self.orientation in TRANSPOSED and image.format != "TIFF"  # Pillow gives a TIFF's upright size
        self.size = (image.width, image.height) if transposed else (image.height, image.width)
        self.format, self.mode = image.format, image.mode

    def pixels(self) -> Tensor:
        """Upright pixels [3, H, W] uint8, in memory [H, W, 3].

        Grey images become RGB, 16-bit values keep their high byte, transparency is dropped, and of an animation the
        first picture is taken.

        Raises:
            BadImage: the file can't be decoded or is truncated.
        """
        if self._image is None:
            return torch.from_numpy(self.data).permute(2, 0, 1)
        try:
            image = self._image
            if self.orientation != 1:
                image = ImageOps.exif_transpose(image)  # decodes, and fails on a truncated file
            if image.mode.startswith("I"):  # 16 bits of grey, as "I;16" or in 32 bits
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode != "RGB":
                image = image.convert("RGB")
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # decodes an image that is stored upright
        except Exception as error:
            raise self._bad_image(error) from error

    def _bad_image(self, error: Exception) -> BadImage:
        if isinstance(error, UnidentifiedImageError):  # its text is the address of a buffer
            return BadImage(f"{self.name}: no image format that Pillow supports")
        lines = str(error).splitlines()
        return BadImage(f"{self.name}: {type(error).__name__}: {lines[0] if lines else ''}")


def open_image(source: Source, index: int) -> ImageFile:
    """An image of a source, with its header read.

    Raises:
        BadImage: the image can't be read, is no image or has too many pixels.
    """
    return ImageFile(source.read(index), source.name(index))


def _orientation(image: Image.Image) -> int:
    """Orientation from EXIF or XMP, 1 to 8; 1 where it is missing or damaged, as other decoders treat it."""
    if image.format == "PNG" and "exif" not in image.info:  # Pillow would decode all pixels to find EXIF after them
        return 1
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1
    return orientation if orientation in range(1, 9) else 1
