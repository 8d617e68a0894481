"""Small valid files of every kind that a source reads.

KINDS               kind: writer of the files, which returns the source's spec; a new kind joins by a line
"""

import csv
import gzip
import io
import json
import os
import random
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from fastssl.data import decoding, packing
from fastssl.data.formats import FORMATS, READABLE
from fastssl.data.source import open_source

NAMES = (
    "\x1b[2J\x1b[31mred",
    "line\nbreak",
    os.fsdecode(b"\xff\xfe"),
    "\u202etxt",
    "::labels=none",
    "a,b",
    "{0..9}",
    "x" * 200,
    "[red]",
    "~root",
    "%s%n",
    "-rf",
    " ",
)


def pixels(rng: random.Random) -> np.ndarray:
    return np.frombuffer(rng.randbytes(16 * 12 * 3), np.uint8).reshape(16, 12, 3)


def encoded(rng: random.Random, format: str) -> bytes:
    """An image file in one of the modes of its format."""
    deep = (pixels(rng)[..., 0].astype(np.uint16) * 257, pixels(rng)[..., 0] / np.float32(255))
    choices = {"PNG": (*deep[:1],), "TIFF": deep}.get(format, ())
    choices += (pixels(rng), pixels(rng)[..., 0])
    buffer, options = io.BytesIO(), {}
    if format in ("JPEG", "TIFF", "PNG", "WEBP") and rng.random() < 0.3:
        exif = Image.Exif()
        exif[decoding.ORIENTATION] = rng.randrange(1, 9)
        options["exif"] = exif
    if format == "TIFF":
        options["compression"] = rng.choice(("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"))
    Image.fromarray(rng.choice(choices)).save(buffer, format, **options)
    return buffer.getvalue()


def write_images(rng: random.Random, root: Path, format: str, suffix: str) -> str:
    for number in range(4):
        path = root / "data" / f"class{number % 2}" / f"{number}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(rng, format))
    return f"folder:{root}/data"


def image_writer(format: str, suffix: str) -> Callable[[random.Random, Path], str]:
    return lambda rng, root: write_images(rng, root, format, suffix)


def write_tree(rng: random.Random, root: Path) -> str:
    """Class folders, with or without splits, and things that lie beside them."""
    splits = rng.choice((("",), ("train", "val"), ("Training", "test", "eval"), ("train",), ("trn", "holdout")))
    for split in splits:
        for name in rng.sample(("cat", "dog", "runs", "train", "x\x1b\n", os.fsdecode(b"\xff")), 3):
            for number in range(rng.randrange(4)):
                path = root / "data" / split / name / f"{number}{rng.choice(('.png', '.JPG', '.txt', '', '.heic'))}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(rng, "PNG"))
    (root / "data").mkdir(exist_ok=True)
    (root / "data" / rng.choice(("thumb.png", "labels.csv", "fastssl-views.png"))).write_bytes(encoded(rng, "PNG"))
    return f"folder:{root}/data{rng.choice(('', '', '::labels=none', '::labels=folders'))}"


def write_tar(rng: random.Random, root: Path) -> str:
    (root / "data").mkdir()
    name = rng.choice((*NAMES, "y" * 5_000, "y" * 200_000))
    for shard in range(2):
        style = rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
        with tarfile.open(root / "data" / f"{shard}.tar", "w", format=style, errors="surrogateescape") as tar:
            for number in range(4):
                key = f"{rng.choice(('', 'n01/', '../', '/'))}{name * (number == 3)}{number}"
                members = {
                    "jpg": encoded(rng, "JPEG"),
                    "cls": str(rng.choice((number % 2, -1))).encode(),
                    "json": rng.choice((b"{}", json.dumps({"caption": caption(rng)}).encode())),
                }
                if rng.random() < 0.3:
                    members["txt"] = caption(rng).encode(errors="surrogateescape")
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return f"webdataset:{root}/data{rng.choice(('', '/{0..1}.tar', '/{0,1}.tar', '::image_key=jpg'))}"


def labelled_arrays(rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    dtype = rng.choice((np.uint8, np.uint16, np.int32, np.float32, np.float64, np.bool_))
    images = np.stack([pixels(rng) for _ in range(6)]).astype(dtype)
    if rng.random() < 0.3:
        images = np.moveaxis(images, 3, 1)
    return images, np.array(rng.choice(((0, 0, 1, 1, -1, 2), (0,) * 6, (-1,) * 6)))


def write_npz(rng: random.Random, root: Path) -> str:
    images, labels = labelled_arrays(rng)
    save = rng.choice((np.savez, np.savez_compressed))
    if rng.random() < 0.5:
        save(root / "x.npz", images=images, labels=labels)
    else:
        save(root / "x.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    return f"arrays:{root}/x.npz"


def write_npy(rng: random.Random, root: Path) -> str:
    images, labels = labelled_arrays(rng)
    np.save(root / "x.npy", np.asfortranarray(images) if rng.random() < 0.3 else images)
    np.save(root / "y.npy", labels)
    return f"arrays:{root}/x.npy{rng.choice(('', f',{root}/y.npy'))}{rng.choice(('', '::value_range=0..9'))}"


def write_idx(rng: random.Random, root: Path) -> str:
    suffix = rng.choice(("", ".gz"))
    for prefix in ("train", "t10k"):
        images = b"\0\0\x08\x03" + struct.pack(">3i", 4, 8, 6) + rng.randbytes(4 * 8 * 6)
        labels = b"\0\0\x08\x01" + struct.pack(">i", 4) + bytes((0, 1, 0, 1))
        for name, data in (("images-idx3", images), ("labels-idx1", labels)):
            path = root / f"{prefix}-{name}-ubyte{suffix}"
            path.write_bytes(gzip.compress(data) if suffix else data)
    return f"idx:{root}"


def write_packed(rng: random.Random, root: Path) -> str:
    folder = root / "images"
    for split in ("train", "val"):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for i in range(2):
                size, path = (rng.randint(4, 20), rng.randint(4, 20)), folder / split / label / f"{i}.png"
                Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).save(path)
    sources = {split: open_source(f"folder:{folder}", split) for split in ("train", "test")}
    shards = rng.choice((1, 2))
    packing.write_pack(sources, root / "x.pack", packing.Encoding(rng.choice(packing.KINDS), 12), shards=shards)
    shutil.rmtree(folder)
    return f"pack:{root}/x.pack"


def caption(rng: random.Random) -> str:
    return rng.choice((*NAMES, "a red star", "", 'two\tblue "discs", left', "\0", "é" * 300))


def write_table(kind: str) -> Callable[[random.Random, Path], str]:
    delimiter = "," if kind == "csv" else "\t"

    def write(rng: random.Random, root: Path) -> str:
        paths = [f"{number}.png" for number in range(4)]
        for path in paths:
            (root / path).write_bytes(encoded(rng, "PNG"))
        rows = [
            (rng.choice((*paths, *NAMES)), caption(rng).replace("\0", ""), rng.choice(("train", "val")))
            for _ in range(9)
        ]
        buffer = io.StringIO()
        csv.writer(buffer, delimiter=delimiter).writerows([("path", "caption", rng.choice(("split", "x"))), *rows])
        text = buffer.getvalue().encode("utf-8", "surrogateescape")
        (root / f"x.{kind}").write_bytes(text if rng.random() < 0.8 else text.decode(errors="replace").encode("utf-16"))
        return f"{kind}:{root}/x.{kind}{rng.choice(('', '', '::caption=caption', '::image=caption'))}"

    return write


def write_coco(rng: random.Random, root: Path) -> str:
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        names = [f"{number}.jpg" for number in range(4)]
        for name in names:
            (root / split / name).write_bytes(encoded(rng, "JPEG"))
        images = [{"id": number, "file_name": rng.choice((name, *NAMES))} for number, name in enumerate(names)]
        annotations = [{"image_id": rng.randrange(4), "caption": rng.choice((caption(rng), None, 3))} for _ in range(9)]
        (root / "annotations").mkdir(exist_ok=True)
        content = json.dumps({"images": images, "annotations": annotations})
        (root / "annotations" / f"captions_{split}.json").write_text(content)
    return rng.choice((f"coco:{root}", f"coco:{root}/annotations/captions_val2017.json"))


KINDS: dict[str, Callable[[random.Random, Path], str]] = {
    **{format.lower(): image_writer(format, FORMATS[format][0]) for format in READABLE if format in Image.SAVE},
    "tree": write_tree,
    "tar": write_tar,
    "npz": write_npz,
    "npy": write_npy,
    "idx": write_idx,
    "pack": write_packed,
    "csv": write_table("csv"),
    "tsv": write_table("tsv"),
    "coco": write_coco,
}
