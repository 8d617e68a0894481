"""The bytes of an image file become pixels, by Pillow. DALI has the same libjpeg-turbo and gives the same pixels.

torchvision's decode_jpeg would save a copy of the pixels, about a tenth of the time, but is to be removed.
"""

import io

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .source import BadImage, Source

MOST_PIXELS = 2 * 89_478_485  # where Pillow too sees a decompression bomb: half a gigabyte
ORIENTATION, TURNED = 0x0112, {5, 6, 7, 8}  # EXIF's tag, and its values that exchange height and width


class Opened:
    """An image of which the header has been read, in 40 µs; `pixels` decodes it.

    Args:
        data: bytes [N] of a file, or pixels [H, W, 3], uint8, writable.
        name: in messages.

    Raises:
        BadImage: it is no image, or has too many pixels.
    """

    def __init__(self, data: np.ndarray, name: str):
        self.data, self.name, self.orientation, self._image = data, name, 1, None
        if data.ndim == 3:
            self.size, self.format, self.mode = data.shape[:2], "pixels", "RGB"
            return
        if not len(data):
            raise BadImage(f"{name}: the file is empty")
        try:
            self._image = image = Image.open(io.BytesIO(data))
        except Exception as error:  # decoders raise anything from OSError to struct.error on broken files
            raise self._bad(error) from error
        if image.width * image.height > MOST_PIXELS:
            raise BadImage(f"{name}: {image.width}×{image.height} are more than {MOST_PIXELS:,} pixels")
        self.orientation = _orientation(image)
        turned = self.orientation in TURNED and image.format != "TIFF"  # whose size Pillow has turned already
        self.size = (image.width, image.height) if turned else (image.height, image.width)  # as it is shown
        self.format, self.mode = image.format, image.mode  # as Pillow calls them: "PNG", "I;16"

    def pixels(self) -> Tensor:
        """[3, H, W] uint8, in memory [H, W, 3], upright.

        Grey becomes RGB, of 16 bits the high byte stays, transparency is dropped, of an animation the first picture
        stays.

        Raises:
            BadImage: it can't be decoded or is cut short.
        """
        if self._image is None:
            return torch.from_numpy(self.data).permute(2, 0, 1)
        try:
            image = self._image
            if self.orientation != 1:
                image = ImageOps.exif_transpose(image)  # decodes: a truncated file fails here
            if image.mode.startswith("I"):  # 16 bits of grey, as "I;16" or in 32
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode != "RGB":
                image = image.convert("RGB")
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # …or here
        except Exception as error:
            raise self._bad(error) from error

    def _bad(self, error: Exception) -> BadImage:
        if isinstance(error, UnidentifiedImageError):  # whose text is the address of a buffer
            return BadImage(f"{self.name}: no image that Pillow knows")
        said = str(error).splitlines()
        return BadImage(f"{self.name}: {type(error).__name__}: {said[0] if said else ''}")


def open_image(source: Source, index: int) -> Opened:
    """An image of a source. Raises `BadImage`."""
    return Opened(source.read(index), source.name(index))


def _orientation(image: Image.Image) -> int:
    """1 to 8, from EXIF or XMP; 1 where there is none or it is damaged, which decoders pass over."""
    if image.format == "PNG" and "exif" not in image.info:  # Pillow would decode it to look behind the pixels
        return 1
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1
    return found if found in range(1, 9) else 1
