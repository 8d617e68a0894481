"""Engines, augmentations and image folders that the tests of the loaders share."""

import hashlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fastssl.data.augmentation import Augmentation, View
from fastssl.data.loader import has_dali

ENGINES = ["torchvision", "device", pytest.param("dali", marks=pytest.mark.skipif(not has_dali(), reason="needs DALI"))]
engines = pytest.mark.parametrize("engine", ENGINES)


def plain(size):
    """Augmentation that resizes the whole image, nothing else."""
    return Augmentation((View(size),))


def indices(loader, epoch, start=0):
    return [i for batch in loader.epoch(epoch, start) for i in batch.index.tolist()]


def digest(batch):
    tensors = (*batch.views, batch.index, batch.label, batch.seed, *batch.extras.values())
    return hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()


def poison(folder, good):
    """Writes a folder of images of all formats and of broken files; returns the names of the broken ones."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for i in range(good):
        image.save(folder / f"{i:03d}.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif)
    image.convert("L").save(folder / "grey.jpg")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.save(folder / "progressive.jpg", progressive=True)
    image.save(folder / "x.webp")
    image.save(folder / "x.bmp")
    image.save(folder / "x.tif")
    image.convert("RGBA").save(folder / "x.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "sixteen.png")
    image.convert("P").save(folder / "palette.gif")
    jpeg = (folder / "000.jpg").read_bytes()
    bad = {
        "bad-zero.jpg": b"",
        "bad-text.jpg": b"not an image",
        "bad-cut.jpg": jpeg[: len(jpeg) // 2],
        "bad-head.jpg": jpeg[:30],
        "bad-cut.png": (folder / "x.png").read_bytes()[:200],
        "bad-cut.webp": (folder / "x.webp").read_bytes()[:100],
        "bad-noise.jpg": jpeg[:2] + bytes(500),
        "bad-bomb.png": bomb(),
    }
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    (folder / "bad-gone.jpg").symlink_to("nowhere")
    return sorted([*bad, "bad-gone.jpg"])


def bomb():
    """A PNG whose header claims 20,000 × 20,000 pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + bytes(100)
