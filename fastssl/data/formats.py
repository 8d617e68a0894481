"""Formats of image files that fastssl reads, and the suffixes of their names.

    FORMATS     all of them; the table is closed, as other decoders of Pillow start programs (EPS) or are seldom tested
    READABLE    those that Pillow can decode here, as ``Image.open(formats=READABLE)`` takes them
    SUFFIXES    suffixes, in lower case, of the files that can be decoded here

HEIF needs the package pillow-heif, which is registered if it is installed. Other plug-ins for Pillow that decode one of
the formats count if they are registered before this module is imported.
"""

import importlib
import importlib.util

from PIL import Image, features

FORMATS = {  # Pillow's name of a format: suffixes of its files
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "AVIF": (".avif", ".avifs"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "HEIF": (".heic", ".heics", ".heif", ".heifs", ".hif"),
}
LIBRARIES = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}  # of formats that Pillow may be built without


def find_readable() -> tuple[str, ...]:
    """Names in `FORMATS` that Pillow can decode now."""
    Image.init()  # registers Pillow's own formats
    if "HEIF" not in Image.OPEN and importlib.util.find_spec("pillow_heif") is not None:
        importlib.import_module("pillow_heif").register_heif_opener()
    return tuple(
        name for name in FORMATS if name in Image.OPEN and (name not in LIBRARIES or features.check(LIBRARIES[name]))
    )


READABLE = find_readable()
SUFFIXES = tuple(suffix for name in READABLE for suffix in FORMATS[name])
