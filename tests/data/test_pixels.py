"""Images of any depth: larger values never become darker, and none become black or white in silence."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.data.augmentation import Augmentation, View
from fastssl.data.decoding import ImageFile
from fastssl.data.loader import Loader, has_dali
from fastssl.data.source import BadImage, BadSource, open_source
from fastssl.data.values import Values, choose_rule, find_values, to_bytes
from tests.data.test_loader import Numbers
from tests.support.contract import refused

SHAPE = (16, 24)
RAMP = np.linspace(0, 1, 16 * 24).reshape(SHAPE)
TIFF_KINDS = {"u": 1, "i": 2, "f": 3}  # values of the tag SampleFormat


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return np.frombuffer(file.getvalue(), np.uint8).copy()


def png16(values, colour_type):
    """A PNG of 16 bits [H, W, C], which Pillow can't write in colour."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return np.frombuffer(b"\x89PNG\r\n\x1a\n" + data, np.uint8).copy()


def tiff(values, order="<", planes=False, white_is_zero=False):
    """An uncompressed TIFF of any dtype, [H, W] or [H, W, C]."""
    height, width, *bands = values.shape
    count, values = (bands or [1])[0], np.moveaxis(values, -1, 0) if planes else values
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits = values.dtype.itemsize * 8
    colours = 2 if bands else 0 if white_is_zero else 1
    strips = count if planes else 1
    first, tables = 8, b""
    tags = {256: (width,), 257: (height,), 258: (bits,) * count, 259: (1,), 262: (colours,)}
    tags |= {273: (0,) * strips, 277: (count,), 278: (height,), 279: (len(data) // strips,) * strips}
    tags |= {284: (2 if planes else 1,), 339: (TIFF_KINDS[values.dtype.kind],) * count}
    end = first + 2 + 12 * len(tags) + 4  # of the directory; longer values follow, then the pixels
    start = end + sum(4 * len(v) for v in tags.values() if len(v) > 1)
    tags[273] = tuple(start + i * (len(data) // strips) for i in range(strips))
    entries, extra = b"", b""
    for tag, numbers in sorted(tags.items()):
        kind, code = (3, "H") if tag in (258, 339) else (4, "I")
        packed = struct.pack(f"{order}{len(numbers)}{code}", *numbers)
        if len(packed) > 4:
            offset = end + len(extra)
            extra += packed.ljust(4 * len(numbers), b"\0")
            packed = struct.pack(f"{order}I", offset)
        entries += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", first)
    tables = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    data = (head + tables + extra).ljust(start, b"\0") + data
    return np.frombuffer(data, np.uint8).copy()


def decoded(data):
    """(pixels [H, W, 3] as integers, values) of a file."""
    image = ImageFile(data, "x")
    pixels = image.pixels()
    return pixels.permute(1, 2, 0).numpy().astype(int), image.values(pixels)


def check_ramp(pixels, highest, tolerance=1):
    """A ramp from black to `highest`: monotone, and everywhere in proportion."""
    grey = pixels[..., 0].ravel()
    assert (np.diff(grey) >= 0).all()
    assert np.abs(grey - RAMP.ravel() * highest).max() <= tolerance


UINT16, INT16, INT32, UINT32, FLOAT = np.uint16, np.int16, np.int32, np.uint32, np.float32
GREY = {  # name: (file, largest byte, rule)
    "PNG, 8 bits in 16": (lambda: saved(Image.fromarray((RAMP * 255).astype(UINT16)), "PNG"), 255, "8 bits"),
    "PNG, 12 bits in 16": (lambda: saved(Image.fromarray((RAMP * 4095).astype(UINT16)), "PNG"), 255, "12 bits"),
    "PNG, 10 bits in 16": (lambda: saved(Image.fromarray((RAMP * 1023).astype(UINT16)), "PNG"), 63, "12 bits"),
    "PNG, 16 bits": (lambda: saved(Image.fromarray((RAMP * 65535).astype(UINT16)), "PNG"), 255, "16 bits"),
    "TIFF uint16, 12 bits": (lambda: tiff((RAMP * 4095).astype(UINT16)), 255, "12 bits"),
    "TIFF uint16, big-endian": (lambda: tiff((RAMP * 4095).astype(UINT16), ">"), 255, "12 bits"),
    "TIFF int16": (lambda: tiff((RAMP * 60000 - 30000).astype(INT16)), 255, "own range"),
    "TIFF int16, big-endian": (lambda: tiff((RAMP * 4095 - 1024).astype(INT16), ">"), 255, "own range"),
    "TIFF int8": (lambda: tiff((RAMP * 200 - 100).astype(np.int8)), 255, "own range"),
    "TIFF int32, 0 to 255": (lambda: tiff((RAMP * 255).astype(INT32)), 255, "8 bits"),
    "TIFF int32": (lambda: tiff((RAMP * 2e9 - 1e9).astype(INT32)), 255, "own range"),
    "TIFF uint32 above an int32": (lambda: tiff((RAMP * 4e9).astype(UINT32)), 255, "own range"),
    "TIFF float, 0 to 1": (lambda: tiff(RAMP.astype(FLOAT)), 255, "0 to 1"),
    "TIFF float, 0 to 255": (lambda: tiff((RAMP * 255).astype(FLOAT)), 255, "8 bits"),
    "TIFF float, 0 to 65,535": (lambda: tiff((RAMP * 65535).astype(FLOAT)), 255, "16 bits"),
    "TIFF float, -1 to 1": (lambda: tiff((RAMP * 2 - 1).astype(FLOAT)), 255, "own range"),
    "TIFF float, large": (lambda: tiff((RAMP * 6e38 - 3e38).astype(FLOAT)), 255, "own range"),
    "PGM, 12 bits": (lambda: pgm(RAMP * 4095, 4095), 255, "16 bits"),
    "PGM, dark": (lambda: pgm(RAMP * 4095, 65535), 15, "16 bits"),  # the format states its range
}


def pgm(values, largest):
    head = f"P5 {SHAPE[1]} {SHAPE[0]} {largest}\n".encode()
    return np.frombuffer(head + values.astype(">u2").tobytes(), np.uint8).copy()


@pytest.mark.parametrize("name", GREY)
def test_deep_grey_images_are_monotone(name):
    make, highest, rule = GREY[name]
    pixels, values = decoded(make())
    check_ramp(pixels, highest, tolerance=2 if name == "TIFF int8" else 1)  # which has 201 values
    assert values.rule == rule


def test_white_is_zero_is_inverted_as_in_8_bits():
    pixels, _ = decoded(tiff((RAMP * 4095).astype(UINT16), white_is_zero=True))
    check_ramp(255 - pixels, 255)


COLOUR = np.stack([RAMP, RAMP / 2, 1 - RAMP], axis=-1)
COLOURS = {
    "PNG": lambda x: png16(x, 2),
    "PNG with transparency": lambda x: png16(np.concatenate([x, np.full((*SHAPE, 1), 65535, UINT16)], -1), 6),
    "TIFF": tiff,
    "TIFF, big-endian": lambda x: tiff(x, ">"),
}


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("kind", COLOURS)
def test_deep_colours_keep_their_low_bits(kind, bits):
    """Pillow keeps the high byte of 16-bit colours, so 12 bits would be nearly black."""
    pixels, values = decoded(COLOURS[kind]((COLOUR * (2**bits - 1)).astype(UINT16)))
    assert np.abs(pixels - COLOUR * 255).max() <= 1
    assert values.rule == f"{bits} bits"


def test_deep_colours_that_are_turned(tmp_path):
    values = (COLOUR * 4095).astype(UINT16)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(png16(values, 2).tobytes()))
    upright, _ = decoded(png16(values, 2))
    head, tail = png16(values, 2).tobytes()[:33], png16(values, 2).tobytes()[33:]
    body = b"eXIf" + exif.tobytes()[6:]
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    turned, _ = decoded(np.frombuffer(head + chunk + tail, np.uint8).copy())
    assert image.size == (24, 16)
    assert np.array_equal(turned, np.rot90(upright, -1))


def test_what_pillow_would_garble_is_a_bad_image():
    with pytest.raises(BadImage, match=r"^x: Pillow can't decode a TIFF of 16 bits in planes$"):
        decoded(tiff((COLOUR * 65535).astype(UINT16), planes=True))
    pixels, _ = decoded(tiff((COLOUR * 255).astype(np.uint8), planes=True))
    assert np.abs(pixels - COLOUR * 255).max() <= 1
    grey = np.stack([RAMP * 4095, np.full(SHAPE, 65535)], -1).astype(UINT16)
    with pytest.raises(BadImage, match=r"^x: its values are at most 4,095 of 65,535 and stored as LA;16B, which can't"):
        decoded(png16(grey, 4))
    pixels, values = decoded(png16(grey * 16, 4))
    check_ramp(pixels, 255)
    assert values.rule == "16 bits"


def test_nan_and_infinities():
    values = RAMP.astype(FLOAT)
    values[0, :3] = np.nan, np.inf, -np.inf
    pixels, found = decoded(tiff(values))
    assert pixels[0, :3, 0].tolist() == [0, 255, 0]
    assert found == Values(values[0, 3], 1.0, "0 to 1")
    with pytest.raises(BadImage, match=r"^x: all its values are NaN or infinite$"):
        decoded(tiff(np.full(SHAPE, np.nan, FLOAT)))


def test_bytes_are_as_they_are():
    pixels, values = decoded(saved(Image.fromarray(np.full(SHAPE, 7, np.uint8)), "PNG"))
    assert (pixels == 7).all()  # dark, as the file says
    assert values == Values(7, 7, "8 bits")


RANGES = [  # dtype, low, high, rule
    (np.uint8, 0, 200, "8 bits"),
    (np.uint16, 0, 255, "8 bits"),
    (np.uint16, 3, 256, "12 bits"),
    (np.uint16, 0, 4095, "12 bits"),
    (np.uint16, 0, 4096, "16 bits"),
    (np.int64, 0, 65535, "16 bits"),
    (np.int64, 0, 65536, "own range"),
    (np.int64, -(2**63), 2**63 - 1, "own range"),
    (np.uint64, 0, 2**64 - 1, "own range"),
    (np.int16, -1, 5, "own range"),
    (np.float64, 0, 1, "0 to 1"),
    (np.float16, 0, 1.5, "8 bits"),
    (np.float64, -1e-9, 1, "own range"),
    (np.float64, -1.7e308, 1.7e308, "own range"),
]


@pytest.mark.parametrize(("dtype", "low", "high", "rule"), RANGES)
def test_the_rule_of_each_range(dtype, low, high, rule):
    values = np.array(
        [low, low + (high - low) // 3 if np.dtype(dtype).kind in "iu" else low / 3 + high / 3, high], dtype
    )
    found = find_values(values)
    assert (found.rule, choose_rule(low, high, np.dtype(dtype))) == (rule, rule)
    scaled = to_bytes(values, found).astype(int)
    assert (np.diff(scaled) >= 0).all()
    if rule == "own range":
        assert scaled[[0, 2]].tolist() == [0, 255]


def test_booleans_and_constants():
    assert to_bytes(np.array([False, True]), find_values(np.array([False, True]))).tolist() == [0, 255]
    constant = np.full((2, 2), -1000, np.int16)
    assert to_bytes(constant, find_values(constant)).tolist() == [[0, 0], [0, 0]]


@pytest.mark.skipif(not has_dali(), reason="needs DALI")
def test_both_engines_have_the_same_pixels(tmp_path):
    names = [name for name in GREY if name.startswith(("PNG", "TIFF"))]
    for number, name in enumerate(names):
        (tmp_path / f"{number:02d}.{name[:3].lower()}").write_bytes(GREY[name][0]().tobytes())
    (tmp_path / "colour.png").write_bytes(png16((COLOUR * 4095).astype(UINT16), 2).tobytes())
    for path in tmp_path.glob("*.tif"):
        path.rename(path.with_suffix(".tiff"))
    source = open_source(f"folder:{tmp_path}")
    assert len(source) == len(names) + 1
    by_torchvision, by_dali = (
        next(iter(Loader(source, Augmentation((View(SHAPE),)), len(source), train=False, engine=engine).epoch(0)))
        for engine in ("torchvision", "dali")
    )
    assert torch.equal(by_torchvision.views[0], by_dali.views[0])


ARRAYS = {  # name: (values of N images from 0 to 1, largest byte, rule)
    "float, 0 to 1": (lambda x: x.astype(FLOAT), 255, "0 to 1"),
    "float, 0 to 255": (lambda x: x * 255, 255, "8 bits"),
    "uint16, 12 bits": (lambda x: (x * 4095).astype(UINT16), 255, "12 bits"),
    "uint16": (lambda x: (x * 65535).astype(UINT16), 255, "16 bits"),
    "int16": (lambda x: (x * 4095 - 1024).astype(INT16), 255, "own range"),
    "int64, 0 to 255": (lambda x: (x * 255).astype(np.int64), 255, "8 bits"),
    "half": (lambda x: x.astype(np.float16), 255, "0 to 1"),
}


BLACK_AND_WHITE = {
    "0 to 1": "0 becomes black, 1 white",
    "8 bits": "0 becomes black, 255 white",
    "12 bits": "0 becomes black, 4,095 white",
    "16 bits": "0 becomes black, 65,535 white",
    "own range": "-?[1-9].* becomes black, [1-9].* white",
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_any_dtype_have_one_scale(tmp_path, name):
    """A dark image of an array stays dark: the range is that of all images."""
    convert, highest, rule = ARRAYS[name]
    np.save(tmp_path / "x.npy", convert(np.stack([RAMP / 50, RAMP])))
    source = open_source(f"arrays:{tmp_path}/x.npy")
    check_ramp(source.read(1), highest)
    check_ramp(source.read(0), highest / 50)
    assert re.search(f": {BLACK_AND_WHITE[rule]} \\(", source.notes[-1])


def test_a_large_array_is_not_read_whole(tmp_path, monkeypatch):
    from fastssl.data.sources import arrays

    monkeypatch.setattr(arrays, "SAMPLE", 3 * RAMP.nbytes)
    images = np.stack([RAMP * 1000] * 9)
    images[1] *= 50  # not looked at
    np.save(tmp_path / "x.npy", images)
    source = open_source(f"arrays:{tmp_path}/x.npy")
    assert (
        "values from 0 to 1,000 in 3 of 9 images; values beyond are cut off: 0 becomes black, 4,095 white"
        in (source.notes[-1])
    )
    assert source.read(1).max() == 255
    check_ramp(source.read(0), 1000 / 4095 * 255)


def test_the_test_split_has_the_scale_of_the_training_split(tmp_path):
    np.savez(tmp_path / "x.npz", x_train=np.stack([RAMP * 60000] * 2), x_test=np.stack([RAMP * 100] * 2))
    train, test = (open_source(f"arrays:{tmp_path}/x.npz", split) for split in ("train", "test"))
    assert train.notes[-1] == test.notes[-1]
    assert test.read(0).max() <= 1


def test_a_stated_range(tmp_path):
    np.save(tmp_path / "x.npy", np.stack([(RAMP * 4000 - 1000).astype(INT16)] * 3))
    source = open_source(f"arrays:{tmp_path}/x.npy::value_range=-1000..1000")
    grey = source.read(0)[..., 0].astype(int)
    assert np.abs(grey - (RAMP * 2).clip(0, 1) * 255).max() <= 1
    for text in ("5", "a..b", "3..3", "0..inf"):
        refused(
            f"data: arrays takes value_range=LOW..HIGH, such as 0..4095, got '{text}'",
            ValueError,
            open_source,
            f"arrays:{tmp_path}/x.npy::value_range={text}",
        )
    np.save(tmp_path / "y.npy", np.zeros((3, 4, 4), np.uint8))
    refused(
        f"data: {tmp_path}/y.npy: value_range is for other dtypes than uint8",
        ValueError,
        open_source,
        f"arrays:{tmp_path}/y.npy::value_range=0..9",
    )


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 1), np.uint8),
        np.zeros((4, 4)),
        np.zeros((4, 4), np.uint8),  # no planes: 3 · height / 2 rows
        np.zeros((6, 3), np.uint8),  # planes of an odd width
    ],
)
def test_a_source_of_your_own_must_give_bytes(pixels):
    """Floats from 0 to 1 would become black."""

    class Own(Numbers):
        def read(self, index):
            return pixels

    with pytest.raises(BadSource, match=r"^data: read must give uint8, pixels \[H, W, 3\] .* got .* for image \d"):
        list(Loader(Own(4), Augmentation((View((8, 8)),)), 4).epoch(0))


def test_grey_pixels_are_not_taken_for_planes():
    """[24, 24] could be the planes of 16×24 pixels; a source that states the size of its images says what they are."""

    class Grey(Numbers):
        size = (24, 24)

        def read(self, index):
            return np.zeros((24, 24), np.uint8)

    sentence = (
        "data: read must give planes [3·H/2, W] of the source's size, 24×24, got [24, 24] for image 0, which is 16×24: "
        "repeat grey pixels as [H, W, 3]"
    )
    with pytest.raises(BadSource, match=f"^{re.escape(sentence)}$"):
        next(Loader(Grey(1), Augmentation((View((8, 8)),)), 1).epoch(0))


def test_formats_outside_of_the_table_are_not_opened(tmp_path, monkeypatch):
    """An EPS would start Ghostscript when it is decoded."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: pytest.fail("Ghostscript was started"))
    for kind in ("EPS", "PCX", "ICNS"):
        image = Image.new("RGB", (32, 32)) if kind != "ICNS" else Image.new("RGBA", (32, 32))
        with pytest.raises(BadImage, match=r"^x: no JPEG, PNG, .*, or a variant of it that Pillow lacks$"):
            decoded(saved(image, kind))


def test_images_without_pixels():
    with pytest.raises(BadImage, match=r"^x: 5×0 has no pixels$"):
        ImageFile(np.zeros((0, 5, 3), np.uint8), "x")
    empty = tiff(np.zeros((1, 1), np.uint8))
    at = empty.tobytes().index(struct.pack("<HHI", 256, 4, 1))
    empty[at + 8 : at + 12] = 0
    with pytest.raises(BadImage, match=r"^x: "):
        decoded(empty)
