"""Damaged and hostile files: one sentence that names the file, at once, in little memory."""

import functools
import gzip
import io
import os
import re
import struct
import tarfile
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

import fastssl
from fastssl.data import reading
from fastssl.data.augmentation import View
from fastssl.data.decoding import open_image
from fastssl.data.findings import scan
from fastssl.data.loader import Loader
from fastssl.data.reading import open_regular, read_image_file
from fastssl.data.source import BadImage, open_source
from fastssl.data.sources import webdataset
from tests.data.test_files import jpeg, shard
from tests.data.test_loader import Numbers
from tests.support.contract import refused
from tests.support.loaders import engines, plain

HUGE = 64 * 2**30  # bytes of a sparse file
ONE_SENTENCE = re.compile(r"data: [^\n\x1b]{10,600}")


@pytest.fixture(autouse=True)
def in_little_time_and_memory():
    tracemalloc.start()
    started = time.monotonic()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - started < 60  # seconds even on a busy machine; a hang or a bomb takes minutes
    assert peak < 200e6


def sentence_of(spec, split="train"):
    """The refusal of a source, or of its first image."""
    with pytest.raises((ValueError, BadImage)) as raised:
        open_image(open_source(spec, split), 0)
    text = str(raised.value)
    assert "\n" not in text
    return text


def npy(shape, dtype="|u1", data=b"", version=(1, 0), extra=""):
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}{extra}}}"
    header = header.ljust(117) + "\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(header)) + header.encode() + data


NPY = {  # name: (content, what the sentence says)
    "more than the file has": (npy("(10, 4, 4)", data=bytes(100)), r"states uint8 \[10, 4, 4\], 160 bytes, of which"),
    "petabytes": (npy("(1000000, 1000000, 1000)"), "1,000,000,000,000,000 bytes, of which it has 0"),
    "beyond an int64": (npy(f"({2**62}, {2**62}, 3)"), "states uint8"),
    "negative": (npy("(-1, 4, 4)", data=bytes(64)), r"states the shape \[-1, 4, 4\]"),
    "no shape": (npy("'a'", data=bytes(64)), "shape"),
    "objects": (npy("(4, 4, 4)", "|O", bytes(64)), "objects"),
    "records": (npy("(4, 4, 4)", [("a", "<i4")], bytes(256)), "records"),
    "code": (npy("(__import__('os').abort(),)"), "no NumPy file"),
    "nested": (npy("(" * 100 + ")" * 100), "no NumPy file"),
    "a long header": (npy("(1, 4, 4)", data=bytes(16), extra=" " * 2_000), "Header info length .* is large"),
    "another version": (npy("(1, 4, 4)", data=bytes(16), version=(3, 0)), "version 3"),
    "text": (b"hello", "no NumPy file"),
    "empty": (b"", "no NumPy file"),
    "no pixels": (npy("(5, 0, 0)"), "images must have 1 to .* pixels, got 0 × 0"),
    "too many pixels": (None, "images must have 1 to .* pixels, got 30000 × 30000"),
}


@pytest.mark.parametrize("name", NPY)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_npy_headers(tmp_path, name, suffix):
    data, expected = NPY[name]
    path = tmp_path / f"x.{suffix}"
    if data is None:
        if suffix == "npz":
            return
        path.write_bytes(npy("(1, 30000, 30000)"))
        os.truncate(path, 128 + 900_000_000)
    elif suffix == "npz":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("images.npy", data)
    else:
        path.write_bytes(data)
    text = sentence_of(f"arrays:{path}")
    assert text.startswith(f"data: {path}")
    assert re.search(expected, text)


def test_npz_with_a_wrong_checksum(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, images=np.zeros((5, 4, 4), np.uint8))
    data = bytearray(path.read_bytes())
    data[data.index(b"\x93NUMPY") + 150] ^= 1
    path.write_bytes(data)
    assert re.search(r"^data: .*x\.npz, array images, is no NumPy .*Bad CRC-32", sentence_of(f"arrays:{path}"))


@pytest.mark.parametrize("damage", ["cut", "encrypted", "unknown method", "no array"])
def test_damaged_npz(tmp_path, damage):
    path = tmp_path / "x.npz"
    np.savez(path, images=np.zeros((5, 4, 4), np.uint8))
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\1\2")
    if damage == "encrypted":
        data[entry + 8] |= 1
        data[6] |= 1
    elif damage == "unknown method":
        data[entry + 10] = data[8] = 99
    path.write_bytes(data[:-30] if damage == "cut" else data)
    if damage == "no array":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("images", b"text")
    assert sentence_of(f"arrays:{path}").startswith(f"data: {path}")


def test_a_zip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    """A gigabyte that is packed in a megabyte, on a machine with 100 MB."""
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("images.npy", "w") as member:
        member.write(npy("(1024, 1024, 256)"))
        for _ in range(256):
            member.write(bytes(2**20))
    monkeypatch.setattr("fastssl.data.numpy_files.usable_memory", lambda: 100_000_000)
    assert "takes 0.3 GB of memory, of which there are 0.1: save it as a .npy file" in sentence_of(f"arrays:{path}")


def test_the_memory_of_a_container_counts(tmp_path, monkeypatch):
    machine = reading.usable_memory()
    monkeypatch.setattr(reading, "CONTROL_GROUP", tmp_path / "memory.max")
    for text, expected in (("1000\n", 1000), ("max\n", machine), (f"{machine * 2}", machine)):
        (tmp_path / "memory.max").write_text(text)
        assert reading.usable_memory() == expected


def idx_header(*shape):
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}i", *shape)


def test_gzipped_idx_is_unpacked_as_far_as_its_header_says(tmp_path, monkeypatch):
    monkeypatch.setattr("fastssl.data.sources.idx.usable_memory", lambda: 100_000_000)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    packed = gzip.compress(bytes(2**20)) * 16_000  # 16 GB
    with path.open("wb") as file:
        file.write(gzip.compress(idx_header(16_000, 1024, 1024)) + packed)
    assert "takes 16.8 GB of memory, of which there are 0.1: save it as .npy" in sentence_of(f"idx:{tmp_path}")
    path.write_bytes(gzip.compress(idx_header(10, 4, 4)) + packed)
    assert "is no idx file of 3 dims of bytes, or is truncated" in sentence_of(f"idx:{tmp_path}")


def test_zeros_behind_a_gzip_file_are_not_read(tmp_path):
    for prefix in ("train", "t10k"):
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_header(2, 4, 4) + bytes(range(32))))
        labels = bytes((0, 0, 8, 1)) + struct.pack(">i", 2) + b"\0\1"
        members = gzip.compress(labels[:5]) + gzip.compress(labels[5:])  # several members are one stream
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(members)
    for path in tmp_path.iterdir():
        os.truncate(path, HUGE)
    source = open_source(f"idx:{tmp_path}")
    assert [source.read(1)[..., 0].ravel().tolist(), source.label(1)] == [list(range(16, 32)), 1]
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content = bytearray(gzip.compress(idx_header(2, 4, 4) + bytes(32)))
    content[-6] ^= 1  # the checksum
    path.write_bytes(content)
    assert f"{path} can't be read (Error -3 while decompressing data: incorrect data check)" in sentence_of(
        f"idx:{tmp_path}"
    )


@pytest.mark.parametrize("shape", [(2**31 - 1,) * 3, (-1, 4, 4), (5, 0, 0)])
def test_impossible_shapes_of_idx(tmp_path, shape):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(idx_header(*shape) + bytes(100))
    assert str(tmp_path) in sentence_of(f"idx:{tmp_path}")


def test_sparse_files_and_pipes(tmp_path):
    """64 GB of zeros, and pipes that nobody writes to, also behind links."""
    sparse, pipe = tmp_path / "sparse", tmp_path / "pipe"
    sparse.touch()
    os.truncate(sparse, HUGE)
    os.mkfifo(pipe)
    for kind, target in (("sparse", sparse), ("pipe", pipe)):
        folder = tmp_path / f"{kind}-idx"
        folder.mkdir()
        for name in ("x.npy", "x.npz", "x.tar", "train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"):
            (folder / name).symlink_to(target)
        for spec in ("arrays:x.npy", "arrays:x.npz", "arrays:x.npy,x.npy", "webdataset:x.tar", "webdataset:", "idx:"):
            source, _, argument = spec.partition(":")
            paths = ",".join(str(folder / name) for name in argument.split(","))
            text = sentence_of(f"{source}:{paths}")
            assert ONE_SENTENCE.fullmatch(text)
            assert str(folder) in text
        (folder / "train-images-idx3-ubyte").unlink()
        assert str(folder) in sentence_of(f"idx:{folder}")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
            open_regular(path)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(HUGE)
    with pytest.raises(OSError, match=r"68,719,476,736 bytes are more than 2,147,483,648, the most of an image"):
        read_image_file(tmp_path / "sparse")
    assert read_image_file(tmp_path / "sparse", HUGE - 5, 100).tolist() == [0] * 5
    assert read_image_file(tmp_path / "sparse", HUGE + 5, 100).tolist() == []


def tar_of(path, *members):
    """A tar of (name, size stated, data, pax headers, type)."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, _, data, pax, kind in members:
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers, info.type = len(data), pax, kind
            tar.addfile(info, io.BytesIO(data))
    content = bytearray(path.read_bytes())
    for name, size, data, _, _ in members:
        if size != len(data):
            at = content.index(name.encode())
            content[at + 124 : at + 136] = (
                b"%011o\0" % size if 0 <= size < 8**11 else (size % 2**96 | 0x80 << 88).to_bytes(12, "big")
            )
            content[at + 148 : at + 156] = b" " * 8
            content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    path.write_bytes(content)
    return path


TARS = {  # name: a member whose size, in the header or in pax, is not the one of its data
    "negative size in pax": ("a.jpg", 6, b"abcdef", {"size": "-1000"}, tarfile.REGTYPE),
    "negative size": ("a.jpg", -512, b"abcdef", {}, tarfile.REGTYPE),
    "size beyond an int64": ("a.jpg", 6, b"abcdef", {"size": "1" * 40}, tarfile.REGTYPE),
    "no number as size": ("a.jpg", 6, b"abcdef", {"size": "x"}, tarfile.REGTYPE),
    "64 GB": ("a.jpg", HUGE, b"abcdef", {}, tarfile.REGTYPE),
    "64 GB of long name": ("a.jpg", HUGE, b"abcdef", {}, tarfile.GNUTYPE_LONGNAME),
    "64 GB of pax header": ("a.jpg", HUGE, b"abcdef", {}, tarfile.XHDTYPE),
}


@pytest.mark.parametrize("name", TARS)
@pytest.mark.parametrize("grown", [False, True], ids=["short", "sparse"])
def test_tar_members_with_wrong_sizes(tmp_path, name, grown):
    """Also in a tar file that is as large as its member says, without taking space."""
    path = tar_of(tmp_path / "x.tar", TARS[name])
    if grown:
        os.truncate(path, HUGE + 2**20)
    assert sentence_of(f"webdataset:{path}").startswith(
        f"data: {path}" if not grown or name != "64 GB" else f"{path}: "
    )


def test_a_label_of_gigabytes_is_not_read(tmp_path):
    path = tar_of(tmp_path / "x.tar", ("a.cls", HUGE, b"0", {}, tarfile.REGTYPE))
    os.truncate(path, HUGE + 2**20)
    assert "a.cls must hold the number of a class" in sentence_of(f"webdataset:{path}")


def test_a_long_name_lengthens_no_other(tmp_path):
    """Names of fixed length took a megabyte each after one of a megabyte."""
    members = {f"{i:03d}.jpg": b"x" for i in range(300)}
    shard(tmp_path / "x.tar", {**members, "a" * 900_000 + ".jpg": b"x"})
    for _ in range(2):
        source = open_source(f"webdataset:{tmp_path}/x.tar")
        assert len(source) == 301
        assert len(source.name(300)) > 900_000
        cache = max(webdataset.cache_folder().glob("shard-*.npz"), key=os.path.getmtime)
        assert cache.stat().st_size < 2e6


@pytest.mark.parametrize("pattern", ["{0..99999999999999}", "{a,b}" * 40, "{0..9}" * 30, "{00..99}{000000..999999}"])
def test_patterns_are_bounded(tmp_path, pattern):
    text = sentence_of(f"webdataset:{tmp_path}/{pattern}.tar")
    assert re.search(r"must be at most 1,000,000 shards, got [\d.e+]+$", text)


def test_a_pattern_may_descend(tmp_path):
    for number in (8, 9, 10):
        shard(tmp_path / f"{number:02d}.tar", {f"{number}.jpg": jpeg()})
    source = open_source(f"webdataset:{tmp_path}/{{10..08}}.tar")
    assert [source.name(i)[-6:].strip(" r:") for i in range(3)] == ["10.jpg", "9.jpg", "8.jpg"]


def doctored(**changes):
    good = {
        "offsets": np.array([512]),
        "sizes": np.array([100]),
        "labels": np.array([-1]),
        "names": np.frombuffer(b"a.jpg\0", np.uint8),
        "taken": np.frombuffer(b"jpg 1\0", np.uint8),
        "passed": np.zeros(0, np.uint8),
    }
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


DOCTORED = {
    "offset before the file": {"offsets": np.array([-5])},
    "offset behind the file": {"offsets": np.array([10**9])},
    "size beyond the file": {"sizes": np.array([2**62])},
    "sum beyond an int64": {"offsets": np.array([512]), "sizes": np.array([2**63 - 1])},
    "another dtype": {"offsets": np.array([512.0])},
    "another shape": {"offsets": np.array([[512]])},
    "another length": {"sizes": np.array([100, 100])},
    "more names": {"names": np.frombuffer(b"a.jpg\0b.jpg\0", np.uint8)},
    "a label too large": {"labels": np.array([10**9])},
    "no counts": {"taken": np.frombuffer(b"jpg\0", np.uint8)},
    "a field is missing": {"labels": None},
    "objects": {"names": np.array(["a.jpg", None], object)},
}


@pytest.mark.parametrize("name", DOCTORED)
def test_a_doctored_index_is_not_believed(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    shard(tmp_path / "x.tar", {"a.jpg": jpeg(), "b.txt": b"x"})
    source = open_source(f"webdataset:{tmp_path}/x.tar")
    expected = source.read(0).tobytes(), source.notes
    (cache,) = (tmp_path / "home" / "fastssl").iterdir()
    np.savez(cache, **doctored(**DOCTORED[name]))
    source = open_source(f"webdataset:{tmp_path}/x.tar")
    assert (source.read(0).tobytes(), source.notes) == expected


def test_an_index_that_is_a_pipe_or_a_bomb_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    shard(tmp_path / "x.tar", {"a.jpg": jpeg()})
    open_source(f"webdataset:{tmp_path}/x.tar")
    (cache,) = (tmp_path / "home" / "fastssl").iterdir()
    cache.unlink()
    os.mkfifo(cache)
    assert len(open_source(f"webdataset:{tmp_path}/x.tar")) == 1


def test_samples_with_several_images(tmp_path):
    left, right, plain_one = jpeg(), jpeg(), jpeg()
    members = {f"{i}.right.jpg": right for i in range(3)} | {f"{i}.left.jpg": left for i in range(3)}
    shard(tmp_path / "x.tar", {**members, "2.JPG": plain_one, "2.json": b"{}"})
    for _ in range(2):  # scanned, then from the cached index
        source = open_source(f"webdataset:{tmp_path}/x.tar")
        assert [source.read(i).tobytes() for i in range(3)] == [left, left, plain_one]
        assert source.notes[0] == (
            "images are the members .left.jpg (2), .jpg (1); passed over: .right.jpg (3), .json (1), .left.jpg (1) "
            "(::image_key=EXTENSION for another image)"
        )
        source = open_source(f"webdataset:{tmp_path}/x.tar::image_key=right.jpg")
        assert [source.read(i).tobytes() for i in range(3)] == [right] * 3
        source = open_source(f"webdataset:{tmp_path}::image_key=jpg")
        assert [source.read(i).tobytes() for i in range(len(source))] == [plain_one]


def test_a_refusal_names_the_extensions_found(tmp_path):
    shard(tmp_path / "x.tar", {"a.txt": b"x", "b.txt": b"x", "b.json": b"{}", "c.jpg.enc": b"x"})
    for _ in range(2):
        text = sentence_of(f"webdataset:{tmp_path}/x.tar")
        assert text.endswith("its members are .txt (2), .jpg.enc (1), .json (1)")
    assert sentence_of(f"webdataset:{tmp_path}/x.tar::image_key=png") == (
        f"data: {tmp_path}/x.tar must have members with the extension png, which image_key names; its members are "
        ".txt (2), .jpg.enc (1), .json (1)"
    )
    shard(tmp_path / "empty.tar", {})
    assert sentence_of(f"webdataset:{tmp_path}/empty.tar").endswith("; there are no members")


def test_an_unreadable_shard_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.tar").mkdir()
    assert f"{tmp_path}/x.tar is no file" in sentence_of(f"webdataset:{tmp_path}/{{x,y}}.tar")
    shard(tmp_path / "y.tar", {"a.jpg": jpeg()})

    def fail(*args, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(tarfile, "open", fail)
    refused(
        f"data: {tmp_path}/y.tar can't be read (Input/output error)",
        ValueError,
        open_source,
        f"webdataset:{tmp_path}/y.tar",
    )


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x.tar", "http://no host/x.tar", "http://[/x.tar"])
def test_a_download_that_fails_is_named(address):
    assert sentence_of(f"webdataset:{address}").startswith(f"data: {address} can't be downloaded (")


HOSTILE_NAME = os.fsdecode(b"a\x1b[31m\n\xff.jpg")


@engines
@pytest.mark.parametrize("workers", [0, 1])
def test_names_that_no_terminal_should_get(tmp_path, engine, workers):
    root, log = tmp_path / "data", tmp_path / "bad_files.txt"
    root.mkdir()
    for name in (HOSTILE_NAME, "b\u202e.jpg"):
        (root / name).write_bytes(b"no image")
    for i in range(6):
        (root / f"{i}.jpg").write_bytes(jpeg())
    log.write_bytes(b"\xff from an earlier run\n")
    source = open_source(f"folder:{root}")
    loader = Loader(source, plain((8, 8)), 4, workers=workers, engine=engine, bad_files=log, max_bad=0.3)
    for epoch in (0, 1):
        list(loader.epoch(epoch))
    lines = log.read_bytes().splitlines()[1:]
    assert sorted(line.decode("ascii").rpartition("/")[2].partition(":")[0] for line in lines) == [
        r"a\x1b[31m\n\xff.jpg",
        r"b\u202e.jpg",
    ]
    assert all(line.isascii() and line.isprintable() for line in scan(source).bad)
    with pytest.raises(ValueError, match=r"^data: .* images can't be decoded, more than the 1\.0%"):
        list(Loader(source, plain((8, 8)), 8, engine=engine).epoch(0))


def test_names_in_a_tar_and_of_a_source_of_your_own(tmp_path):
    shard(tmp_path / "x.tar", {"\x1b.jpg": b"no image", "\x1b.cls": b"0"})
    with pytest.raises(BadImage, match=r"x\.tar: \\x1b\.jpg: no JPEG"):
        open_image(open_source(f"webdataset:{tmp_path}/x.tar"), 0)
    shard(tmp_path / "y.tar", {"\x1b.jpg": jpeg(), "\x1b.cls": b"cat"})
    assert "\\x1b.cls must hold" in sentence_of(f"webdataset:{tmp_path}/y.tar")

    class Named(Numbers):
        def name(self, index):
            return f"\x1b{index}"

        def read(self, index):
            raise BadImage(f"{self.name(index)}: no\nimage")

    with pytest.raises(ValueError, match=r"\(the last: \\x1b\d: no\\nimage\)$"):
        list(Loader(Named(4), plain((8, 8)), 4, max_bad=1.0).epoch(0))


@pytest.mark.parametrize(
    "argument",
    ["size=100000", "count=0", f"count={10**20}", f"seed={2**64}", f"size={'9' * 5000}", "count=1000000000000"],
)
def test_shapes_are_bounded(argument):
    name = argument.partition("=")[0]
    text = sentence_of(f"shapes:{argument}")
    assert re.match(rf"data: shapes takes a {name} from \d+ to [\d,]+, got '{name}=\d+'$", text)


def test_views_are_bounded():
    refused(
        "augmentation: height and width must be from 1 to 8,192 pixels, got 1000000 1000000",
        ValueError,
        functools.partial(View, (1_000_000, 1_000_000)),
    )
    with pytest.raises(ValueError, match="from 1 to 8,192 pixels, got 0 5"):
        View((0, 5))


def test_a_run_with_views_beyond_all_bounds_is_refused_before_its_model_is_built(tmp_path):
    with pytest.raises(
        ValueError, match=r"^augmentation: height and width must be from 1 to 8,192 pixels, got 1000000"
    ):
        fastssl.pretrain("mae", data="shapes:count=64", folder=tmp_path / "run", image_size=(1_000_000, 1_000_000))
    assert not (tmp_path / "run").exists()
