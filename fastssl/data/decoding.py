"""Decodes image files to pixels: JPEGs as `jpeg.py` describes, the other formats of `formats.py` with Pillow.

Values of more than 8 bits are scaled as `values.py` describes. DALI has libjpeg-turbo too and gives the same pixels.

An image in memory is RGB [H, W, 3], or planes [3·H/2, W] of even H and W: Y [H, W], then Cb and Cr [H/2, W/2] each, one
after the other; full-range BT.601 as in a JPEG, with half the colours' resolution in both directions.
"""

import io
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile as ImageFormat
from torch import Tensor

from fastssl.text import printable

from .formats import READABLE
from .jpeg import SCALES, decode_jpeg
from .source import BadImage, BadSource, Source
from .values import Values, find_values, to_bytes

MAX_PIXELS = 2 * 89_478_485  # Pillow's limit against decompression bombs: half a gigabyte
ORIENTATION, TRANSPOSED = 0x0112, {5, 6, 7, 8}  # EXIF's tag, and its values that exchange height and width
MIRRORED, UPSIDE_DOWN = {2, 3, 6, 7}, {3, 4, 7, 8}  # values that then exchange left and right, or top and bottom
# Pillow keeps the high byte of colours of 16 bits. Layout of their pixels: one that makes it keep the low byte.
NATIVE = "L" if sys.byteorder == "little" else "B"
LOW_BYTE = {
    f"{bands};16{order}": f"{bands};16{swapped}"
    for bands in ("RGB", "RGBA", "RGBX", "CMYK")
    for order, swapped in {"B": "L", "L": "B", "N": "B" if NATIVE == "L" else "L"}.items()
}
JPEGS = ("JPEG", "MPO")  # MPO: a JPEG followed by more pictures
MARGIN = 1.5  # smallest window in a reduced image, as a multiple of the view's sides
FULL_RANGE = {"PPM", "JPEG2000"}  # these formats state the largest value, and Pillow scales it to 65,535


# TIFF's tags, and values of theirs
BITS, COLOURS, KIND = 258, 262, 339
WHITE_IS_ZERO, UNSIGNED, SIGNED = 0, 1, 2


class ImageFile:
    """An image file with its header read, or an array of pixels. `pixels` and `raster` decode it.

    Attributes:
        size: (height, width) of the upright image.
        orientation: EXIF's orientation of the stored pixels, 1 to 8; 1 for an array.
        format, mode: names that Pillow gives them, such as "PNG" and "I;16"; "pixels" for an array, and "RGB", or "YUV"
            for planes.

    Args:
        data: bytes [N] of a file, or uint8 pixels [H, W, 3] or planes [3·H/2, W].
        name: the image in errors.

    Raises:
        BadImage: the data is no image, or has no pixels or more than `MAX_PIXELS`.
        BadSource: the data has another dtype or shape.
    """

    def __init__(self, data: np.ndarray, name: str):
        self.data, self.name, self.orientation = data, name, 1
        self.size: tuple[int, int]
        self.format: str | None
        self._image: Image.Image | None = None
        self._values: Values | None = None  # of an image of more than 8 bits, once it is decoded
        if data.dtype != np.uint8 or not (data.ndim == 1 or _is_rgb(data) or _is_planes(data)):
            got = f"{data.dtype} {list(data.shape)} for {printable(name)}"
            raise BadSource(
                "data: read must give uint8, pixels [H, W, 3] or planes [3·H/2, W] of even H and W, or the bytes [N] "
                f"of a file, got {got}"
            )
        if data.ndim == 3:
            self.size, self.format, self.mode = (data.shape[0], data.shape[1]), "pixels", "RGB"
        elif data.ndim == 2:
            self.size, self.format, self.mode = (data.shape[0] // 3 * 2, data.shape[1]), "pixels", "YUV"
        elif not len(data):
            raise BadImage(f"{printable(name)}: the file is empty")
        else:
            self._image = image = self._open()
            self.orientation = _orientation(image)
            transposed = self.orientation in TRANSPOSED and image.format != "TIFF"  # Pillow gives a TIFF's upright size
            self.size = (image.width, image.height) if transposed else (image.height, image.width)
            self.format, self.mode = image.format, image.mode
        pixels = self.size[0] * self.size[1]
        if not 0 < pixels <= MAX_PIXELS:
            wrong = f"are more than {MAX_PIXELS:,} pixels" if pixels else "has no pixels"
            raise BadImage(f"{printable(name)}: {self.size[1]}×{self.size[0]} {wrong}")

    def _open(self) -> Image.Image:
        try:
            return Image.open(io.BytesIO(self.data.data), formats=READABLE)  # copies the bytes
        except Exception as error:  # decoders raise anything from OSError to struct.error on broken files
            raise self._bad_image(error) from error

    def pixels(self) -> Tensor:
        """Upright pixels [3, H, W] uint8, in memory [H, W, 3].

        Grey images become RGB, values of more than 8 bits are scaled as `values.py` describes, transparency is dropped,
        and of an animation the first picture is taken.

        Raises:
            BadImage: the file can't be decoded or is truncated.
        """
        if self.data.ndim == 2:
            return torch.from_numpy(planes_to_rgb(self.data)).permute(2, 0, 1)
        return self.raster().permute(2, 0, 1)

    def raster(self, scale: int = 1) -> Tensor:
        """Upright pixels as they are in memory, uint8: RGB [H, W, 3], or planes [3·H/2, W] where they are given.

        Args:
            scale: number that both sides are divided by, rounded up: 1, or what `find_scale` returned.

        Raises:
            BadImage: the file can't be decoded or is truncated.
        """
        if self._image is None:
            return torch.from_numpy(self.data)
        try:
            image, layouts = self._image, _layouts(self._image)  # decoding forgets the layouts
            if self.format in JPEGS:
                return torch.from_numpy(_upright(self._decode_jpeg(scale), self.orientation))
            if self.orientation != 1:
                image = ImageOps.exif_transpose(image)  # decodes, and fails on a truncated file
            if image.mode.startswith(("I", "F")) or self._is_signed():
                image = self._grey_to_bytes(np.asarray(image))
            elif any(";16" in layout for layout in layouts):
                image = self._colours_to_bytes(image, layouts)
            elif (self._tag(BITS) or 0) > 8:
                reason = f"Pillow can't decode a TIFF of {self._tag(BITS)} bits in planes"
                raise BadImage(f"{printable(self.name)}: {reason}")
            if image.mode != "RGB":
                image = image.convert("RGB")
            return torch.from_numpy(np.array(image))  # decodes an image that is stored upright
        except BadImage:
            raise
        except Exception as error:
            raise self._bad_image(error) from error

    def _decode_jpeg(self, scale: int) -> np.ndarray:
        """Pixels [H, W, 3] of a JPEG as stored."""
        image: Any = self._image
        size = (image.height, image.width)
        pixels = decode_jpeg(self.data, size, image.mode, scale)
        if pixels is None:
            if scale > 1:
                image = self._open()  # anew, since `draft` changes an image for good
                image.draft(None, (size[1] // scale, size[0] // scale))
            pixels = np.array(image.convert("RGB"))
        return pixels

    def find_scale(self, most: float) -> int:
        """The largest of 1, 2, 4 and 8, at most `most`, by which decoding can reduce the sides of the image.

        Only JPEGs can be reduced; turned or mirrored ones by a number that divides their sides, since the blocks of
        pixels that become one begin at the first pixel that is stored.
        """
        if self._image is None or self.format not in JPEGS:
            return 1
        for scale in SCALES:
            divides = not (self.size[0] % scale or self.size[1] % scale)
            if scale <= min(most, *self.size) and (divides or self.orientation == 1):
                return scale
        return 1

    def values(self, pixels: Tensor) -> Values:
        """Smallest and largest stored value, and the rule by which they became bytes.

        Args:
            pixels: what ``pixels()`` returned. An image of 8 bits is searched for its values only here.

        Colours of more than 12 bits are known to the high byte: their largest value is that of the last low byte.
        """
        if self._values is not None:
            return self._values
        low, high = pixels.aminmax()
        return Values(low.item(), high.item(), "8 bits")

    def _to_bytes(self, numbers: np.ndarray) -> Image.Image:
        """Values [H, W] or [H, W, C] as an image of bytes, scaled by the range that they need."""
        self._values = find_values(numbers)
        if self._values is None:
            raise BadImage(f"{printable(self.name)}: all its values are NaN or infinite")
        if self.format in FULL_RANGE and self._values.rule.endswith("bits"):
            self._values = self._values._replace(rule="16 bits")
        return Image.fromarray(to_bytes(numbers, self._values))

    def _grey_to_bytes(self, numbers: np.ndarray) -> Image.Image:
        """Values [H, W] of more than 8 bits as bytes; of a TIFF they may be of a kind that Pillow has no mode for."""
        if self._tag(KIND, UNSIGNED) == UNSIGNED and numbers.dtype == np.int32 and self._tag(BITS) == 32:
            numbers = numbers.view(np.uint32)
        if self._is_signed():
            numbers = numbers.view(np.int8)
        image = self._to_bytes(numbers)
        return ImageOps.invert(image) if self._tag(COLOURS) == WHITE_IS_ZERO else image

    def _is_signed(self) -> bool:
        """True for a TIFF of signed bytes, which Pillow takes for unsigned ones."""
        return self.mode == "L" and self._tag(KIND) == SIGNED

    def _tag(self, tag: int, default: int | None = None) -> int | None:
        """A tag of a TIFF, the first of its values; None for other formats."""
        if self.format != "TIFF":
            return None
        value: Any = getattr(self._image, "tag_v2", {}).get(tag, default)
        return value[0] if isinstance(value, tuple) and value else value

    def _colours_to_bytes(self, image: Image.Image, layouts: set[str]) -> Image.Image:
        """Colours of 16 bits, of which Pillow has kept the high byte. If that is small, the low byte is read too."""
        bands = 4 if image.mode == "CMYK" else 3  # transparency is dropped
        low, high = (pick(ends) for pick, ends in zip((min, max), zip(*image.getextrema()[:bands])))
        self._values = Values(256 * low, 256 * high + 255, "16 bits")
        if self.format in FULL_RANGE or self._values.high > 4_095:
            return image
        if not layouts <= LOW_BYTE.keys():
            reason = f"its values are at most 4,095 of 65,535 and stored as {', '.join(layouts)}, which can't be read"
            raise BadImage(f"{printable(self.name)}: {reason} without loss: save it as RGB")
        rest: Any = self._open()
        rest.tile = [tile._replace(args=_replace_layout(tile.args)) for tile in rest.tile]
        if self.orientation != 1:
            rest = ImageOps.exif_transpose(rest)
        numbers = np.asarray(image).astype(np.uint16) << 8 | np.asarray(rest)
        scaled = self._to_bytes(numbers[..., :bands])
        return scaled if bands == 3 else Image.frombytes("CMYK", image.size, scaled.tobytes())

    def _bad_image(self, error: Exception) -> BadImage:
        name = printable(self.name)
        if isinstance(error, UnidentifiedImageError):  # its text is the address of a buffer
            return BadImage(f"{name}: no {', '.join(READABLE)}, or a variant of it that Pillow lacks")
        lines = str(error).splitlines()
        return BadImage(f"{name}: {type(error).__name__}: {printable(lines[0]) if lines else ''}")


def open_image(source: Source, index: int) -> ImageFile:
    """An image of a source, with its header read.

    Raises:
        BadImage: the image can't be read, is no image or has too many pixels.
        BadSource: it is planes of another size than the source's.
    """
    data = source.read(index)
    image = ImageFile(data, source.name(index))
    if data.ndim == 2 and source.size not in (None, image.size):  # grey pixels [H, W] look like planes
        (height, width), got = image.size, f"{list(data.shape)} for {printable(image.name)}"
        expected = f"planes [3·H/2, W] of the source's size, {source.size[0]}×{source.size[1]}"
        raise BadSource(
            f"data: read must give {expected}, got {got}, which is {height}×{width}: repeat grey pixels as [H, W, 3]"
        )
    return image


def decode_for_views(
    image: ImageFile, windows: Sequence[Sequence[float]], sizes: Sequence[tuple[int, int]]
) -> tuple[Tensor, list[list[float]]]:
    """Pixels for several views of an image, reduced as far as all of them allow, and the views' windows in them.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if each window then still has `MARGIN` times as many pixels in
    height and width as its view. The windows are those of the whole image, divided by that number, not rounded: so they
    show the same part of it. A view differs from that of the whole image by about 0.5 of 255 in the mean of its pixels.

    Args:
        image: the image.
        windows: top, left, height and width of each view's window, pixels of the whole image.
        sizes: (height, width) of each view.

    Returns: pixels as `ImageFile.raster` gives them, and windows.

    Raises:
        BadImage: the file can't be decoded.
    """
    allowed = min(min(w[2] / size[0], w[3] / size[1]) for w, size in zip(windows, sizes)) / MARGIN
    scale = image.find_scale(allowed)
    return image.raster(scale), [[number / scale for number in window] for window in windows]


def planes_to_rgb(planes: np.ndarray) -> np.ndarray:
    """Planes [3·H/2, W] as RGB [H, W, 3]; colours are interpolated linearly between their centres, as in libjpeg."""
    height, width = planes.shape[0] // 3 * 2, planes.shape[1]
    luma, chroma = planes[:height], planes[height:].reshape(2, height // 2, width // 2)
    parts = [Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR) for plane in chroma]
    return np.array(Image.merge("YCbCr", [Image.fromarray(luma), *parts]).convert("RGB"))


def rgb_to_planes(picture: Image.Image) -> np.ndarray:
    """A picture in RGB as planes [3·H/2, W]; odd sides are made even by repeating the last row or column."""
    width, height = picture.size
    if height % 2 or width % 2:
        pixels = np.pad(np.asarray(picture), ((0, height % 2), (0, width % 2), (0, 0)), "edge")
        picture = Image.fromarray(pixels)
    luma, *chroma = picture.convert("YCbCr").split()
    parts = [np.asarray(luma), *(np.asarray(plane.reduce(2)) for plane in chroma)]
    return np.concatenate([part.reshape(-1) for part in parts]).reshape(-1, luma.width)


def _is_rgb(data: np.ndarray) -> bool:
    return data.ndim == 3 and data.shape[2] == 3


def _is_planes(data: np.ndarray) -> bool:
    return data.ndim == 2 and data.shape[0] % 3 == 0 and data.shape[1] % 2 == 0


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels [H, W, 3] turned as EXIF's orientation says."""
    if orientation == 1:
        return pixels
    if orientation in TRANSPOSED:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in MIRRORED:
        pixels = pixels[:, ::-1]
    if orientation in UPSIDE_DOWN:
        pixels = pixels[::-1]
    return pixels.copy()  # `np.ascontiguousarray` leaves the negative stride of a side of one pixel


def _orientation(image: Image.Image) -> int:
    """Orientation from EXIF or XMP, 1 to 8; 1 where it is missing or damaged, as other decoders treat it."""
    if image.format == "PNG" and "exif" not in image.info:  # Pillow would decode all pixels to find EXIF after them
        return 1
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1
    return orientation if orientation in range(1, 9) else 1


def _layouts(image: Image.Image) -> set[str]:
    """Pillow's names of the layouts of an undecoded image's pixels, such as "RGB;16B"; one a tile."""
    tiles = image.tile if isinstance(image, ImageFormat) else []
    return {str(tile.args[0] if isinstance(tile.args, tuple) and tile.args else tile.args) for tile in tiles}


def _replace_layout(args: Any) -> Any:
    """Arguments of a tile's decoder with the layout that keeps the low byte."""
    return (LOW_BYTE[args[0]], *args[1:]) if isinstance(args, tuple) else LOW_BYTE[args]
