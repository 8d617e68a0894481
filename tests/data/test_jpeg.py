"""JPEGs: the same pixels by either decoder, at any scale, and the rule that chooses the scale."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fastssl.data import jpeg
from fastssl.data.decoding import MARGIN, ImageFile, decode_for_views
from fastssl.data.source import BadImage
from fastssl.machine import facts

needs_simplejpeg = pytest.mark.skipif(jpeg.simplejpeg is None, reason="simplejpeg is not installed")


def picture(height, width, mode="RGB", seed=0):
    """Smooth parts and noise."""
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height))
    noise = generator.integers(-20, 20, (height, width, 3))
    pixels = np.clip(np.asarray(small) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90, **options})
    return np.frombuffer(file.getvalue(), np.uint8).copy()


def turned(image, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, exif=exif, **options)


KINDS = {
    "4:2:0": {},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:4:4": {"subsampling": "4:4:4"},
    "progressive": {"progressive": True},
    "RGB inside": {"keep_rgb": True},
    "grey": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
    "restarts": {"restart_marker_rows": 1},
}


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(64, 48), (37, 91), (9, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_both_decoders_give_libjpegs_pixels(monkeypatch, kind, size, scale):
    mode = KINDS[kind].get("mode", "RGB")
    data = encoded(picture(*size, mode), **{k: v for k, v in KINDS[kind].items() if k != "mode"})
    plain = Image.open(io.BytesIO(data.tobytes()))
    if scale > 1:
        plain.draft(None, (size[1] // scale, size[0] // scale))
    expected = torch.from_numpy(np.array(plain.convert("RGB")))
    assert expected.shape[:2] == jpeg.reduced(size, scale)
    assert torch.equal(ImageFile(data, "x").raster(scale), expected)
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    assert torch.equal(ImageFile(data, "x").raster(scale), expected)


@needs_simplejpeg
def test_pillow_decodes_only_what_simplejpeg_leaves():
    header = lambda data: ((Image.open(io.BytesIO(data)).height, 48), Image.open(io.BytesIO(data)).mode)  # noqa: E731
    for kind in KINDS:
        options = dict(KINDS[kind])
        data = encoded(picture(64, 48, options.pop("mode", "RGB")), **options)
        assert (jpeg.decode_jpeg(data, *header(data)) is None) == (kind == "CMYK")


@pytest.mark.parametrize("size", [(64, 48), (61, 43), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(size, orientation):
    data = turned(picture(*size), orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data.tobytes())))
    image = ImageFile(data, "x")
    assert image.size == (upright.height, upright.width)
    assert torch.equal(image.pixels(), torch.from_numpy(np.array(upright)).permute(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_image_is_reduced_where_its_blocks_are_whole(orientation):
    whole, odd = (ImageFile(turned(picture(*size), orientation), "x") for size in ((64, 48), (61, 48)))
    assert whole.find_scale(8) == 8 and whole.find_scale(3.9) == 2 and whole.find_scale(1.9) == 1
    assert odd.find_scale(8) == (8 if orientation == 1 else 1)
    small = whole.raster(4).float()
    mean = whole.pixels().float().unfold(1, 4, 4).unfold(2, 4, 4).mean(dim=(3, 4)).permute(1, 2, 0)
    assert small.shape == mean.shape and (small - mean).abs().mean() < 4


def test_only_jpegs_are_reduced():
    file = io.BytesIO()
    picture(64, 48).save(file, "PNG")
    for data in (np.frombuffer(file.getvalue(), np.uint8).copy(), np.zeros((64, 48, 3), np.uint8)):
        assert ImageFile(data, "x").find_scale(8) == 1
    assert ImageFile(encoded(picture(3, 48)), "x").find_scale(8) == 2  # no side becomes less than a pixel


def test_views_keep_their_pixels():
    """Each window in the reduced image has at least `MARGIN` times the pixels of its view's sides."""
    image = ImageFile(encoded(picture(480, 640)), "x")
    windows, sizes = [(0, 0, 480, 640), (10, 20, 200, 150)], [(64, 64), (32, 32)]
    pixels, places = decode_for_views(image, windows, sizes)
    scale = 2
    assert pixels.shape == (240, 320, 3) and places == [[number / 2 for number in window] for window in windows]
    for chosen, fits in ((scale, True), (2 * scale, False)):
        sides = [(w[2] / chosen / s[0], w[3] / chosen / s[1]) for w, s in zip(windows, sizes)]
        assert (min(map(min, sides)) >= MARGIN) == fits
    whole, same = decode_for_views(image, windows, [(64, 64), (200, 200)])  # a view larger than its window
    assert whole.shape == (480, 640, 3) and same == [list(window) for window in windows]


@pytest.mark.parametrize("scale", [1, 2, 8])
def test_truncated_and_damaged_files_are_bad_images(scale):
    data = encoded(picture(64, 48))
    for length in (len(data) - 40, len(data) // 2):
        with pytest.raises(BadImage, match=r"^x: OSError: image file is truncated"):
            ImageFile(data[:length].copy(), "x").raster(scale)


def test_irregular_files_are_decoded_by_pillow(monkeypatch):
    """Bytes between two markers: a warning of libjpeg, which simplejpeg refuses and Pillow overlooks."""
    data = encoded(picture(64, 48)).tobytes()
    table = data.index(b"\xff\xda")
    odd = np.frombuffer(data[:table] + b"\0\0" + data[table:], np.uint8).copy()
    found = [ImageFile(odd, "x").raster(scale) for scale in (1, 2)]
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    assert all(torch.equal(a, ImageFile(odd, "x").raster(scale)) for a, scale in zip(found, (1, 2)))


def test_the_decoder_is_named():
    assert facts()["jpeg decoder"] == jpeg.DECODER
    assert jpeg.DECODER.startswith("simplejpeg " if jpeg.simplejpeg else "Pillow ")
