import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fastssl.data.decoding import open_image
from fastssl.data.formats import SUFFIXES
from fastssl.data.source import BadImage, open_source, source_names
from fastssl.data.sources import shapes
from fastssl.data.split import NOTHING_HELD_OUT, hold_out
from fastssl.eval.knn import knn_accuracy
from fastssl.nn.resnet import build_resnet
from tests.support.contract import refused

FASHION = Path("/usr/share/datasets/fashion-mnist")


def shown(source, index):
    """[H, W, 3]"""
    return open_image(source, index).pixels().permute(1, 2, 0).numpy()


def noise(path, size=(20, 12), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path, **options)


@pytest.mark.parametrize("name", ["digits", "patterns", "shapes"])
def test_embedded_sources(name):
    train, test = open_source(name), open_source(name, "test")
    assert len(train.classes) == 10
    for source in (train, test):
        image = shown(source, 7)
        assert (image.dtype, image.shape) == (np.uint8, (*source.size, 3))
        assert set(map(source.label, range(50))) <= set(range(10))
        assert np.array_equal(shown(source, 7), image)
        assert source.name(7) == f"{name}, image 7"
    assert not any(np.array_equal(shown(train, i), shown(test, i)) for i in range(20))


def test_digits_are_complete():
    train, test = open_source("digits"), open_source("digits", "test")
    rows = [source.identity(i) for source in (train, test) for i in range(len(source))]
    assert len(rows) == len(set(rows)) == 1797
    counts = [np.bincount([source.label(i) for i in range(len(source))]) for source in (train, test)]
    assert np.array_equal(counts[1], (2 * sum(counts) + 5) // 10)


@pytest.mark.parametrize("name", ["patterns", "shapes"])
def test_drawn_images_take_count_size_and_seed(name):
    source = open_source(f"{name}:count=30,size=48,seed=5")
    assert (len(source), source.size) == (30, (48, 48))
    assert not np.array_equal(shown(source, 0), shown(open_source(f"{name}:size=48"), 0))
    assert [source.label(i) for i in range(10)] == list(range(10))


def test_backgrounds_of_shapes_are_few_and_shared_by_all_classes():
    """With more of them, instance discrimination could tell images apart without learning the shape."""
    source = open_source("shapes:count=2000")
    for label in range(10):
        corners = {tuple(shown(source, i)[0, 0]) for i in range(label, 600, 10)}
        assert corners == {(grey, grey, grey) for grey in shapes.GREYS}


def test_every_class_has_a_visible_outline():
    areas = []
    for label in range(10):
        image = shown(open_source("shapes"), label).astype(int)
        areas.append((np.ptp(image, axis=2) > 20).mean())  # share of coloured pixels on a grey background
    assert min(areas) > 0.02


def test_patterns_look_alike_at_every_size():
    """The same pattern is drawn with more pixels."""
    small, large = open_source("patterns:size=32"), open_source("patterns:size=128")
    for i in range(20):
        shrunk = shown(large, i).reshape(32, 4, 32, 4, 3).mean((1, 3))
        assert np.abs(shown(small, i) - shrunk).mean() < 12


def test_patterns_of_a_class_have_different_pixels_and_two_tones():
    source = open_source("patterns")
    for label in range(1, 10):  # 0 is plain
        images = np.stack([shown(source, i) for i in range(label, 200, 10)]).astype(float)
        dark, bright = np.quantile(images, (0.1, 0.9), axis=(1, 2, 3))
        assert (bright > 1.5 * dark).all()
        a, b = images[::2].mean(-1).reshape(10, -1), images[1::2].mean(-1).reshape(10, -1)
        assert np.abs([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b)]).mean() < 0.3


@pytest.mark.slow
def test_raw_pixels_and_an_untrained_encoder_know_little_of_patterns():
    """What a pretrained encoder knows beyond that it has learned."""
    images, labels = [], []
    for source in (open_source("patterns"), open_source("patterns", "test")):
        images.append(torch.stack([open_image(source, i).pixels() for i in range(len(source))]).float() / 128 - 1)
        labels.append(torch.tensor([source.label(i) for i in range(len(source))]))
    torch.manual_seed(0)
    encoder = build_resnet("resnet_mini", 10).eval()
    encoder.fc = torch.nn.Identity()

    def accuracy(features):
        (x, y), (x_test, y_test) = zip(map(features, images), labels)
        return knn_accuracy(x, y, x_test, y_test, ks=(20,))[20]

    with torch.no_grad():
        raw, untrained = accuracy(lambda x: x.flatten(1)), accuracy(encoder)
    print(f"raw pixels {raw:.1%}, untrained encoder {untrained:.1%}")
    assert raw <= 0.25 and untrained <= 0.35


def test_folder_with_classes_and_held_out_fifth(tmp_path):
    for name in ("cat", "dog"):
        for i in range(10):
            noise(tmp_path / name / "deep" / f"{i}.png")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    noise(tmp_path / ".hidden" / ".x.png")
    train, test = open_source(f"folder:{tmp_path}"), open_source(f"folder:{tmp_path}", "test")
    assert (train.classes, len(train), len(test)) == (["cat", "dog"], 16, 4)
    assert [train.label(i) for i in (0, 15)] == [0, 1]
    names_of = [{source.name(i) for i in range(len(source))} for source in (train, test)]
    assert not names_of[0] & names_of[1]
    assert all(Path(name).is_file() for name in names_of[0])


def test_folder_without_classes(tmp_path):
    for i in range(3):
        noise(tmp_path / f"{i}.jpg")
    source = open_source(f"folder:{tmp_path}")
    assert source.classes is None
    assert source.label(0) == -1


def test_folder_with_a_split(tmp_path):
    for part, count in (("train", 4), ("val", 2)):
        for name in ("a", "b"):
            for i in range(count):
                noise(tmp_path / part / name / f"{i}.png")
    assert len(open_source(f"folder:{tmp_path}")) == 8
    test = open_source(f"folder:{tmp_path}", "test")
    assert (len(test), test.classes) == (4, ["a", "b"])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    if mode == "I;16":
        Image.fromarray(np.full((4, 6), 40000, dtype=np.uint16)).save(path)
    else:
        Image.new("RGB", (6, 4), (200, 200, 200)).convert(mode).save(path)
    image = shown(open_source(f"folder:{tmp_path}"), 0)
    assert image.shape == (4, 6, 3)
    # the palette has steps of 51, and one bit is dithered
    expected = {"I;16": [40000 // 256], "P": [204], "1": [0, 255]}.get(mode, [200])
    assert np.array_equal(np.unique(image), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, kind, orientation):
    """The size of the upright image comes from the header: windows are drawn before the image is decoded."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{kind.lower()}"
    noise(path, (20, 12), exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    opened = open_image(open_source(f"folder:{tmp_path}"), 0)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert opened.size == expected.shape[:2] == ((20, 12) if orientation > 4 else (12, 20))
    assert np.array_equal(opened.pixels().permute(1, 2, 0).numpy(), expected)


def test_damaged_exif_is_ignored(tmp_path):
    noise(tmp_path / "x.jpg", exif=b"Exif\0\0nonsense")
    assert open_image(open_source(f"folder:{tmp_path}"), 0).pixels().shape == (3, 12, 20)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif", "bmp"])
def test_a_partly_damaged_image_is_bad(tmp_path, kind):
    """Missing pixels in every format, and overwritten pixels in PNG, whose checksums show them."""
    path = tmp_path / f"x.{kind}"
    noise(path, (200, 120), **({"compression": "tiff_lzw"} if kind == "tif" else {}))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(BadImage):
        open_image(open_source(f"folder:{tmp_path}"), 0).pixels()
    if kind == "png":
        path.write_bytes(data[:200] + b"x" * 200 + data[400:])
        with pytest.raises(BadImage):
            open_image(open_source(f"folder:{tmp_path}"), 0).pixels()


@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_errors_of_bad_images_name_the_file(tmp_path, damage):
    path = tmp_path / "x.png"
    noise(path)
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"hello", "truncated": data[: len(data) // 2]}[damage])
    with pytest.raises(BadImage, match=str(path)):
        open_image(open_source(f"folder:{tmp_path}"), 0).pixels()


def test_error_sentences(tmp_path):
    refused(
        f"data: unknown source 'cifar', there are {', '.join(source_names())} (folder:PATH for your images, "
        f"package.module:ARGUMENT for a source of your own)",
        ValueError,
        open_source,
        "cifar",
    )
    embedded, of_files = (
        ["captions", "digits", "emoji", "patterns", "shapes"],
        ["arrays", "cifar10", "cifar100", "folder", "idx", "pack"],
    )
    assert source_names() == sorted([*embedded, *of_files, "coco", "csv", "tsv", "webdataset"])
    refused(f"data: {tmp_path / 'no'} is not a folder", ValueError, open_source, f"folder:{tmp_path / 'no'}")
    suffixes = ", ".join(SUFFIXES)
    refused(
        f"data: {tmp_path} holds no image ({suffixes}), nor do its subfolders",
        ValueError,
        open_source,
        f"folder:{tmp_path}",
    )
    refused("data: folder needs a path: folder:PATH", ValueError, open_source, "folder")
    refused("data: digits takes no argument, got '5'", ValueError, open_source, "digits:5")
    refused("data: shapes takes count=N, size=N and seed=N, got 'width=3'", ValueError, open_source, "shapes:width=3")
    refused("data: shapes takes a size from 8 to 2,048, got 'size=4'", ValueError, open_source, "shapes:size=4")


def pixels(count=10, shape=(4, 6)):
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def seen(source):
    return np.stack([shown(source, i) for i in range(len(source))])


@pytest.mark.parametrize("layout", ["grey", "grey channel", "channels last", "channels first"])
def test_arrays_of_every_layout(tmp_path, layout):
    shape = {"grey": (4, 6), "grey channel": (4, 6, 1), "channels last": (4, 6, 3), "channels first": (3, 4, 6)}[layout]
    images, path = pixels(10, shape), tmp_path / "images.npy"
    np.save(path, images)
    source = open_source(f"arrays:{path}")
    assert (len(source), source.size, source.classes, source.label(3)) == (10, (4, 6), None, -1)
    assert isinstance(source._pixels, np.memmap)  # a view of one too
    expected = np.moveaxis(images, 1, 3) if layout == "channels first" else images.reshape(10, 4, 6, -1)
    assert np.array_equal(seen(source), np.broadcast_to(expected, (10, 4, 6, 3)))


def test_arrays_with_labels_hold_out_a_fifth_of_each_class(tmp_path):
    images, labels = pixels(30), np.arange(30) % 3
    for name, value in (("x", images), ("y", labels)):
        np.save(tmp_path / f"{name}.npy", value)
    np.savez(tmp_path / "both.npz", images=images, labels=labels)
    for spec in (f"arrays:{tmp_path / 'x.npy'},{tmp_path / 'y.npy'}", f"arrays:{tmp_path / 'both.npz'}"):
        train, test = open_source(spec), open_source(spec, "test")
        held_out = hold_out(map(str, range(30)), labels, "test", "x")
        assert np.bincount(labels[held_out]).tolist() == [2, 2, 2]
        assert train.classes == ["0", "1", "2"]
        assert [test.label(i) for i in range(len(test))] == labels[held_out].tolist()
        assert np.array_equal(seen(test)[..., 0], images[held_out])
        assert [train.label(i) for i in range(len(train))] == np.delete(labels, held_out).tolist()


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.float32])
def test_arrays_without_some_labels(tmp_path, dtype):
    """−1 is no label: such images train. Where all are −1, the source has no labels."""
    images, labels = pixels(30), np.where(np.arange(30) % 2 == 0, -1, np.arange(30) % 3).astype(dtype)
    spec = f"arrays:{tmp_path / 'x.npy'},{tmp_path / 'y.npy'}"
    np.save(tmp_path / "x.npy", images)
    np.save(tmp_path / "y.npy", labels)
    if dtype is np.float32:
        sentence = f"data: {spec[7:]}: labels must be integers of shape [30], -1 for no label, got float32 [30]"
        refused(sentence, ValueError, open_source, spec)
        return
    train, test = open_source(spec), open_source(spec, "test")
    of_train, of_test = ([source.label(i) for i in range(len(source))] for source in (train, test))
    assert (train.classes, of_train.count(-1), len(of_train)) == (["0", "1", "2"], 15, 27)
    assert sorted(of_test) == [0, 1, 2]
    assert train.notes == ("15 of 30 images have no label: they train, and evaluations leave them out",)
    np.save(tmp_path / "y.npy", np.full(30, -1))
    source = open_source(spec)
    assert (source.classes, len(source)) == (None, 30)
    assert source.notes == (NOTHING_HELD_OUT,)
    np.save(tmp_path / "y.npy", labels - 1)
    sentence = f"data: {spec[7:]}: labels must be class numbers from 0 to 999,999, or -1 for no label, got -2"
    refused(sentence, ValueError, open_source, spec)


def test_arrays_with_a_split(tmp_path):
    images, labels = pixels(), np.arange(10) % 2
    path = tmp_path / "mnist.npz"
    np.savez_compressed(path, x_train=images[:7], y_train=labels[:7], x_test=images[7:], y_test=labels[7:])
    train, test = open_source(f"arrays:{path}"), open_source(f"arrays:{path}", "test")
    assert (len(train), len(test), test.label(0)) == (7, 3, 1)
    assert np.array_equal(seen(test)[..., 2], images[7:])


def idx_file(path, values):
    header = bytes((0, 0, 8, values.ndim)) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    data = header + values.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files(tmp_path, suffix):
    images, labels = pixels(), (np.arange(10) % 4).astype(np.uint8)
    for name, rows in (("train", slice(0, 7)), ("t10k", slice(7, 10))):
        idx_file(tmp_path / f"{name}-images-idx3-ubyte{suffix}", images[rows])
        idx_file(tmp_path / f"{name}-labels-idx1-ubyte{suffix}", labels[rows])
    train, test = open_source(f"idx:{tmp_path}"), open_source(f"idx:{tmp_path}", "test")
    assert (len(train), len(test), train.size, train.classes) == (7, 3, (4, 6), ["0", "1", "2", "3"])
    assert np.array_equal(seen(test)[..., 0], images[7:])
    assert [test.label(i) for i in range(3)] == [3, 0, 1]


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_of_debian():
    train, test = (open_source(f"idx:{FASHION}", split) for split in ("train", "test"))
    assert (len(train), len(test), train.size, len(train.classes)) == (60000, 10000, (28, 28), 10)


def test_error_sentences_of_arrays_and_idx(tmp_path):
    def fails(spec, sentence):
        with pytest.raises(ValueError, match=f"^data: .*{sentence}"):
            open_source(spec)

    fails("arrays", "arrays needs a file: arrays:FILE.npy, arrays:FILE.npz or two .npy, got ''")
    fails(f"arrays:{tmp_path}/no.npy", r"no\.npy does not exist")
    wrong = tmp_path / "wrong.npy"
    wrong.write_bytes(b"nothing")
    fails(f"arrays:{wrong}", "is no NumPy file of plain numbers")
    np.save(wrong, np.array([{}], dtype=object))
    fails(f"arrays:{wrong}", "is no NumPy file of plain numbers")
    np.save(wrong, pixels().astype(np.complex64))
    fails(f"arrays:{wrong}", r"images must be numbers .* got complex64 \[10, 4, 6\]")
    np.save(wrong, pixels(10, (5, 4, 6)))
    fails(f"arrays:{wrong}", r"got uint8 \[10, 5, 4, 6\]")
    np.save(wrong, pixels(0))
    fails(f"arrays:{wrong}", "holds no images")
    np.save(tmp_path / "y.npy", np.arange(9))
    np.save(wrong, pixels())
    fails(f"arrays:{wrong},{tmp_path / 'y.npy'}", r"labels must be integers of shape \[10\], .*got int64 \[9\]")
    np.savez(tmp_path / "z.npz", a=pixels())
    fails(f"arrays:{tmp_path / 'z.npz'}", "it holds a")
    fails(f"idx:{tmp_path / 'no'}", "idx needs a folder: idx:PATH, got")
    fails(f"idx:{tmp_path}", "has no train-images-idx3-ubyte or train-images-idx3-ubyte.gz")
    path = tmp_path / "train-images-idx3-ubyte"
    for data in (b"", b"\0\0\x08\x01\0\0\0\x02ab", bytes((0, 0, 8, 3)) + bytes(12) + b"x"):
        path.write_bytes(data)
        fails(f"idx:{tmp_path}", "is no idx file of 3 dims of bytes, or is truncated")
    path.rename(f"{path}.gz")
    fails(f"idx:{tmp_path}", "can't be read")


def test_shapes_leave_the_global_generator_unchanged():
    before = torch.get_rng_state()
    open_image(open_source("shapes"), 3).pixels()
    assert torch.equal(before, torch.get_rng_state())
