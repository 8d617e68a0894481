"""Small valid files of every kind that a source reads, mutations of them, and a process that opens them.

    KINDS               kind: writer of the files, which returns the source's spec; a new kind joins by a line
    mutate              changes a file in one of many ways
    python -m tests.attack.files SEED KINDS FIRST COUNT FOLDER      prints a JSON line for each case

A case is a kind and a number: its random choices follow (seed, kind, number) alone. It may end in images, bad images or
a sentence; everything else is written to its line as a failure. Who starts the process watches the time.
"""

import csv
import gzip
import io
import json
import os
import random
import re
import resource
import shutil
import struct
import sys
import tarfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastssl.cli.data_page import Side, bad_images, page
from fastssl.data import decoding, listing, numpy_files, packing, reading
from fastssl.data.findings import scan
from fastssl.data.fingerprint import take_fingerprint
from fastssl.data.formats import FORMATS, READABLE
from fastssl.data.source import BadSource, has_captions, open_source
from fastssl.data.sources import arrays, idx
from fastssl.data.text import TextInput
from fastssl.data.token_table import build_table, with_captions
from fastssl.text import printable

MEMORY = 100_000_000  # bytes that the sources are told this machine has
PIXELS = 2**20  # most of an image here, so that an image at the limit takes megabytes
ADDRESS_SPACE = 3 * 2**30  # beyond that of the imports; a bomb beyond it fails at once
LONGEST = 6_000  # characters of a sentence
SECRET = b"content of a file that no source was given"
NUMBERS = (0, 1, 2, 127, 128, 255, 256, 2**15 - 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
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


def flip(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[place(rng, data)] ^= 1 << rng.randrange(8)


def place(rng: random.Random, data: bytearray) -> int:
    """A position, more often among the first bytes, where headers are."""
    return rng.randrange(min(len(data), rng.choice((16, 64, 512, len(data)))))


def put_number(rng: random.Random, data: bytearray) -> None:
    size = rng.choice((1, 2, 4, 8))
    at = place(rng, data)
    number = rng.choice(NUMBERS) % 256**size
    data[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))


def cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def drop(rng: random.Random, data: bytearray) -> None:
    at = place(rng, data)
    del data[at : at + rng.randrange(1, 100)]


def repeat(rng: random.Random, data: bytearray) -> None:
    at = place(rng, data)
    data[at:at] = data[at : at + rng.randrange(1, 1000)] * rng.choice((1, 2, 50))


def blank(rng: random.Random, data: bytearray) -> None:
    at = place(rng, data)
    size = len(data[at : at + rng.randrange(1, 100)])
    data[at : at + size] = rng.choice((b"\0", b"\xff", b" ", b"9")) * size


def append(rng: random.Random, data: bytearray) -> None:
    data += rng.choice((bytes(1000), rng.randbytes(1000), bytes(data)))


BYTES = (flip, put_number, cut, drop, repeat, blank, append)


def mend_png(data: bytearray) -> None:
    """Corrects the checksums, so that the decoder sees the change behind them."""
    at = 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + size > len(data):
            return
        data[at + 8 + size : at + 12 + size] = zlib.crc32(data[at + 4 : at + 8 + size]).to_bytes(4, "big")
        at += 12 + size


def mend_tar(data: bytearray) -> None:
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])


def mutate_tar_header(rng: random.Random, data: bytearray) -> None:
    """Another size, type or name of a member, with a right checksum."""
    headers = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    at = rng.choice(headers) if headers else 0
    sizes = (b"77777777777\0", b"00000000000\0", b"-0000000100\0", b"\x80" + bytes(3) + b"\xff" * 8, b"\xff" * 12)
    change = rng.choice(("size", "type", "name", "pax"))
    if change == "size":
        data[at + 124 : at + 136] = rng.choice(sizes)
    elif change == "type":
        data[at + 156] = rng.choice(b"01234567xgLKSVDMNAX\0\xff")
    elif change == "name":
        data[at : at + 100] = rng.choice(NAMES).encode(errors="surrogateescape")[:99].ljust(100, b"\0")
    else:
        for key in (b"size=", b"path=", b"mtime="):
            data[:] = data.replace(key, rng.choice((b"size=", b"GNU.sparse.size=", b"hdrcharset=", b"9999=")))
    mend_tar(data)


def mutate_npy_header(rng: random.Random, data: bytearray) -> None:
    """Another shape or dtype in the header of an array."""
    sides = (0, 1, 3, 6, 12, 16, -1, 10**6, 2**31, 2**62, 2**64, 10**30)
    shape = tuple(rng.choice(sides) for _ in range(rng.randrange(6)))
    dtype = rng.choice(("'|u1'", "'<f8'", "'<c16'", "'|O'", "'<U1000004'", "'|V9'", "'<M8[s]'", "[('a','<i4')]", "3"))
    header = rng.choice((f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}}}", "(" * 5000, "{}", "\0"))
    at = data.find(b"\x93NUMPY")
    if at >= 0:
        size = int.from_bytes(data[at + 8 : at + 10], "little")
        text = header.encode().ljust(max(1, size - 1)) + b"\n"
        data[at + 8 : at + 10 + size] = struct.pack("<H", len(text)) + text


def mutate_bytes(rng: random.Random, path: Path) -> str:
    """Changes the content of a file, behind its compression or checksums at times."""
    content, changes = path.read_bytes(), list(BYTES)
    inside = rng.random() < 0.6
    if path.suffix == ".gz" and inside:
        content = gzip.decompress(content)
    if path.suffix == ".tar":
        changes += [mutate_tar_header] * 4
    if path.suffix == ".npy":
        changes += [mutate_npy_header] * 4
    if path.suffix == ".npz" and inside:
        return mutate_npz(rng, path)
    data = bytearray(content)
    told = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = rng.choice(changes)
        told.append(change.__name__)
        if data:
            change(rng, data)
    if inside and path.suffix in (".png", ".tar"):
        (mend_png if path.suffix == ".png" else mend_tar)(data)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" and inside else data)
    return f"{' and '.join(told)} {path.name}{' inside' if inside else ''}"


def mutate_npz(rng: random.Random, path: Path) -> str:
    """Changes an array in a .npz file, whose checksum is right."""
    with zipfile.ZipFile(path) as file:
        members = {name: bytearray(file.read(name)) for name in file.namelist()}
    name = rng.choice(sorted(members))
    change = rng.choice((*BYTES, mutate_npy_header, mutate_npy_header, mutate_npy_header))
    change(rng, members[name])
    with zipfile.ZipFile(path, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))) as file:
        for member, data in members.items():
            file.writestr(member, bytes(data))
    return f"{change.__name__} {name} in {path.name}"


def make_sparse(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(rng.choice((2**30, 64 * 2**30)))
        if rng.random() < 0.5:
            file.write(bytes(len(content)))


def substitute(rng: random.Random, path: Path) -> str:
    """Puts something else in the place of a file."""
    kinds = ("pipe", "folder", "loop", "dangling", "link to a pipe", "device", "sparse", "empty", "another file")
    kind = rng.choice(kinds)
    if kind == "sparse":
        make_sparse(path, rng)
        return f"{kind} {path.name}"
    pipe = path.parent / ".pipe"
    if kind == "link to a pipe":
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("empty", "another file"):
        path.write_bytes(b"" if kind == "empty" else encoded(rng, rng.choice(("PNG", "JPEG", "GIF", "BMP"))))
    else:
        path.symlink_to({"loop": path, "dangling": "nowhere", "link to a pipe": pipe, "device": "/dev/zero"}[kind])
    return f"{kind} {path.name}"


def rename(rng: random.Random, path: Path) -> str:
    name = rng.choice(NAMES)
    path.rename(path.with_name(f"{name}{path.suffix}"))
    return f"{path.name} renamed to {name!r}"


def mutate(rng: random.Random, path: Path) -> str:
    """Changes a file in one of the ways above, and says how."""
    return rng.choices((mutate_bytes, substitute, rename), (8, 2, 1))[0](rng, path)


def mutate_cache(rng: random.Random, cache: Path, secret: Path) -> str:
    """Changes one of the files that an earlier opening has cached; at times so that it leads to another file."""
    paths = sorted(path for path in cache.rglob("*") if path.is_file())
    if not paths:
        return "no cache"
    path = rng.choice(paths)
    if path.suffix != ".json" or rng.random() < 0.4:
        return mutate(rng, path)
    strings = sorted({*re.findall(r'"[^"\\]{1,40}"', path.read_text())})
    old = rng.choice(strings) if strings else ""
    leads = (
        str(secret),
        f"../{secret.name}",
        f"class0/../../{secret.name}",
        "\0",
        f"//{secret}",
        "class0/./0.png",
        "x",
    )
    new = rng.choice((*map(json.dumps, leads), "1e999", "null", "[]", "-1", "9" * 5000, "{}", "[" * 100_000))
    path.write_text(path.read_text().replace(old, new))
    return f"{old} of {path.name} became {new[:80]}"


class Failure(Exception):
    """What a source must not do."""


def check_sentence(text: str, start: str = "") -> None:
    if printable(text) != text or len(text) > LONGEST or not text.startswith(start):
        raise Failure(f"no sentence that a terminal can show: {text[:500]!r} ({len(text)} characters)")


def open_everything(spec: str) -> str:
    """Does with a source what `data check` and the start of a run do.

    Returns:
        The outcome: "images", "bad images" or "refused".

    Raises:
        Failure: a message is no sentence, or the content of another file was read.
    """
    outcome = "refused"
    for split in ("train", "test"):
        try:
            source = open_source(spec, split)
        except BadSource:
            raise
        except ValueError as error:
            check_sentence(str(error), "data: ")
            continue
        for note in source.notes:
            check_sentence(note)
        findings = scan(source)
        side = Side(source, findings)
        for line in bad_images({split: side}):
            check_sentence(line)
        list(page({split: side}, source.notes))
        if any(SECRET in source.read(number).tobytes() for number in range(len(source)) if not is_bad(source, number)):
            raise Failure("the content of a file that the source was not given")
        take_fingerprint(source, with_captions=True)
        if has_captions(source):
            source = with_captions(source)
            build_table(source, TextInput("bert", 16)).gather(torch.arange(len(source)), torch.arange(len(source)))
        outcome = "bad images" if findings.bad or outcome == "bad images" else "images"
    return outcome


def is_bad(source, number: int) -> bool:
    try:
        source.read(number)
    except decoding.BadImage:
        return True
    return False


def attack(seed: str, kind: str, number: int, folder: Path) -> tuple[str, str]:
    """(what was changed, the outcome) of a case."""
    rng = random.Random(f"{seed} {kind} {number}")
    root, cache, secret = folder / "root", folder / "cache", folder / "secret.png"
    shutil.rmtree(folder, ignore_errors=True)
    root.mkdir(parents=True)
    secret.write_bytes(SECRET)
    os.environ["XDG_CACHE_HOME"] = str(cache)
    spec = KINDS[kind](rng, root)
    if kind in ("tree", "tar") and rng.random() < 0.4:
        open_everything(spec)
        change = mutate_cache(rng, cache, secret)
    else:
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        change = "; ".join(mutate(rng, path) for path in rng.sample(paths, min(len(paths), rng.choice((1, 1, 2)))))
    return change, open_everything(spec)


def limit_sizes() -> None:
    """Makes the limits of the sources small, so that an attack at a limit is quick, and one beyond it shows."""
    decoding.MAX_PIXELS = arrays.MAX_PIXELS = PIXELS
    reading.MAX_IMAGE_BYTES = 2**24
    numpy_files.usable_memory = idx.usable_memory = lambda: MEMORY
    listing.MAX_CACHE = 2**24
    listing.SETTLED = -(10**15)  # a folder that has just changed is cached too
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, used + ADDRESS_SPACE))


def main(seed: str, kinds: str, first: str, count: str, folder: str) -> None:
    limit_sizes()
    started = time.monotonic()
    for number in range(int(first), int(first) + int(count)):
        for kind in kinds.split(","):
            print(json.dumps({"case": f"{kind} {number}"}), flush=True)
            case = {"change": "", "outcome": "", "failure": ""}
            try:
                case["change"], case["outcome"] = attack(seed, kind, number, Path(folder))
            except BaseException:
                case["failure"] = traceback.format_exc()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(json.dumps({**case, "peak": peak, "seconds": time.monotonic() - started}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
