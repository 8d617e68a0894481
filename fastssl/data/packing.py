"""Writing of packs (`pack_format.py`): images are made smaller and encoded in worker processes, and files can be
continued after an interruption."""

import fcntl
import io
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fastssl.ops import resized_crops_
from fastssl.text import printable

from .decoding import MARGIN, ImageFile, open_image, rgb_to_planes
from .pack_format import Record, header_bytes, index_bytes, record_bytes, scan, shard_path
from .source import SPLITS, BadImage, Source, identity, read_captions, read_extras
from .workers import Workers

KINDS = ("jpeg", "yuv", "rgb", "copy")


class Encoding(NamedTuple):
    """How images are stored."""

    kind: str = "jpeg"  # one of `KINDS`: yuv and rgb are pixels, which need no decoding; copy: the files as they are
    side: int = 320  # largest length of the shorter side in pixels; larger images are made smaller
    quality: int = 90  # of JPEG, 1 to 95


class Packed(NamedTuple):
    """What `write_pack` wrote."""

    images: int  # in the file
    bad: list[str]  # "PATH: reason" of those that can't be decoded
    bytes: int  # size of the file
    continued: int  # images that an earlier, interrupted call had written


def encode(image: ImageFile, encoding: Encoding) -> np.ndarray:
    """The image as it is stored: bytes [N] of a file, RGB [H, W, 3] or planes [3·H/2, W].

    An upright JPEG that is small enough is kept as it is. Others are resized with an antialiased bicubic filter; large
    JPEGs are first decoded at 1/2, 1/4 or 1/8, to at least `MARGIN` times the new size.

    Raises:
        BadImage: the image can't be decoded.
    """
    kind, side = encoding.kind, encoding.side
    small = min(image.size) <= side
    keep = kind == "jpeg" and image.format == "JPEG" and image.orientation == 1 and small
    if kind == "copy" or keep:
        image.raster()  # a pack holds no image that can't be decoded
        return image.data
    if kind == "yuv" and image.data.ndim == 2 and small:
        return image.data
    pixels = image.pixels() if small else _resize(image, side, even=kind == "yuv")
    planes = [Image.fromarray(plane) for plane in pixels.contiguous().numpy()]
    picture = Image.merge("RGB", planes)  # a fast way to interleave
    if kind == "rgb":
        return np.array(picture)
    if kind == "yuv":
        return rgb_to_planes(picture)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=encoding.quality)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def _resize(image: ImageFile, side: int, even: bool) -> Tensor:
    """The image as RGB [3, H, W] uint8, whose shorter side is `side`; with `even` both sides are rounded up to even.

    Raises:
        BadImage: the image can't be decoded.
    """
    height, width = image.size
    scale = image.find_scale(min(image.size) / side / MARGIN)
    window = torch.tensor([[0, 0, height / scale, width / scale]], dtype=torch.float64)
    step, ratio = 1 + even, side / min(image.size)
    size = [-(-max(side, round(length * ratio)) // step) * step for length in image.size]
    pixels = torch.empty(1, 3, *size, dtype=torch.uint8)
    return resized_crops_(pixels, [image.raster(scale)], window, "bicubic")[0]


def write_pack(
    sources: dict[str, Source],
    path: Path,
    encoding: Encoding,
    *,
    workers: int = 0,
    name: str = "",
    progress: Callable[[int, int], object] = lambda done, total: None,
    shards: int = 1,
) -> Packed:
    """Writes the images of a source to one file, `path`, or to several; until one is whole its name ends in .part.

    A .part file of the same source and encoding is continued after its last intact record, and whole shards are kept.

    Args:
        sources: {"train": …, "test": …}, or one of them.
        path: the file to write, which must not exist; with shards the name that `shard_path` derives theirs from.
        encoding: how images are stored.
        workers: processes that decode and encode; 0 for this one.
        name: the source, as in `open_source`, stored in the file.
        progress: called with the number of images done and of all.
        shards: number of files.

    Raises:
        ValueError: the file exists, can't be written, or a .part file holds other images; another process writes it;
            there are more shards than images; no image can be decoded.
    """
    sources = {split: sources[split] for split in SPLITS if split in sources}
    total = sum(map(len, sources.values()))
    if shards > max(1, total):
        raise ValueError(f"data: --shards must be at most the number of images, {total:,}, got {shards:,}")
    if path.exists():
        raise ValueError(f"data: --out {printable(path)} exists: choose another name, or remove it")
    written: list[Record] = []
    bytes_written = continued = 0
    for shard in range(shards):
        numbers = range(total * shard // shards, total * (shard + 1) // shards)
        header = {"source": name, "encoding": encoding._asdict(), **_describe(sources, numbers)}
        file = shard_path(path, shard, shards)
        try:
            with _Part(file, {**header, "shard": [shard, shards]}) as part:
                done = {record.number for record in part.records}
                continued += len(done)
                for data in _encoded(sources, encoding, [n for n in numbers if n not in done], workers):
                    part.write(data)
                    progress(len(written) + len(part.records), total)
                written += part.records
                if shard == shards - 1 and not any("bad" not in record.facts for record in written):
                    raise ValueError(f"data: none of the {total:,} images of {printable(name)} can be decoded")
                bytes_written += part.finish()
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"data: --out {printable(file)} can't be written ({reason})") from error
    bad = [record.facts["bad"] for record in written if "bad" in record.facts]
    return Packed(len(written) - len(bad), bad, bytes_written, continued)


def _describe(sources: dict[str, Source], numbers: range) -> dict[str, Any]:
    """Fields of a header on the images with these numbers, which count through both splits."""
    images, first = [], 0
    for split in SPLITS:
        count = len(sources[split]) if split in sources else 0
        images.append(len(range(max(first, numbers.start), min(first + count, numbers.stop))))
        first += count
    return {
        "images": images,
        "classes": [sources[split].classes if split in sources else None for split in SPLITS],
        "notes": [list(getattr(sources.get(split), "notes", ())) for split in SPLITS],
    }


class _Part:
    """A file that is written, named .part until it is whole, and continued after its last intact record.

    Args:
        path: its final name.
        header: its header. A whole shard with the same one is left as it is.

    Attributes:
        records: those in the file.
    """

    def __init__(self, path: Path, header: dict[str, Any]):
        self._path, self._header, self._part = path, header, path.with_name(f"{path.name}.part")
        self._whole = path.exists()

    def __enter__(self) -> "_Part":
        path = self._path if self._whole else self._part
        self._file = open(os.open(path, os.O_RDWR if self._whole else os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            _lock(self._file, path)
            self.records = _continue(self._file, path, self._header, cut=not self._whole)
        except BaseException:
            self._file.close()
            raise
        return self

    def write(self, data: bytes) -> None:
        """Appends the record of an image."""
        begin = self._file.tell()
        self._file.write(data)
        self.records += [record._replace(offset=record.offset + begin) for record in scan(data, 0)]

    def finish(self) -> int:
        """Appends the index and gives the file its name; returns its size."""
        if not self._whole:
            self._file.write(index_bytes(self.records, self._header, self._file.tell()))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._part.rename(self._path)
        return self._file.seek(0, os.SEEK_END)

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _lock(file: Any, part: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"data: another process is writing {printable(part)}") from error


def _continue(file: Any, part: Path, header: dict[str, Any], cut: bool) -> list[Record]:
    """Records of an interrupted call; with `cut` the file then ends behind the last, or behind a new header."""
    start = header_bytes(header)
    file.seek(0)
    found = file.read(len(start))
    if found != start[: len(found)]:
        raise ValueError(
            f"data: {printable(part)} was begun with other images or another encoding: remove it, or choose another "
            "--out"
        )
    records, end = [], len(start)
    if len(found) == len(start):
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            records = list(scan(data, end))
        if records:
            last = records[-1]
            end = -(-(last.offset + last.size + last.facts.get("extras", [0])[0]) // 8) * 8
    if not cut:
        return records
    file.truncate(min(end, file.seek(0, os.SEEK_END)))
    if not records:
        file.seek(0)
        file.write(start)
    file.write(b"\0" * (end - file.seek(0, os.SEEK_END)))  # padding that was cut off
    return records


class _Encoded(Dataset):
    """Records of the images with these numbers, which count through both splits."""

    def __init__(self, sources: dict[str, Source], encoding: Encoding, todo: np.ndarray):
        self.sources, self.encoding, self.todo = sources, encoding, todo

    def __len__(self) -> int:
        return len(self.todo)

    def __getitem__(self, row: int) -> bytes:
        number = int(self.todo[row])
        split, index = _place(self.sources, number)
        source = self.sources[split]
        name = source.name(index)
        facts: dict[str, Any] = {"name": name, "identity": identity(source, index), "label": source.label(index)}
        facts["split"] = SPLITS.index(split)
        if captions := read_captions(source, index):
            facts["captions"] = captions
        extras = b""
        try:
            image = encode(open_image(source, index), self.encoding)
            arrays = read_extras(source, index)
            extras = safetensors.numpy.save(arrays) if arrays else b""
        except BadImage as error:
            image, facts["bad"] = np.empty(0, np.uint8), str(error)
        return record_bytes(number, image, facts, extras)


def _encoded(sources: dict[str, Source], encoding: Encoding, numbers: list[int], workers: int) -> Iterator[bytes]:
    """The record of each image with these numbers, in order."""
    if numbers:
        todo = np.array(numbers, dtype=np.int64)
        yield from Workers(_Encoded(sources, encoding, todo), workers=workers, batch_size=None)


def _place(sources: dict[str, Source], number: int) -> tuple[str, int]:
    """(split, index in it) of the image with this number."""
    for split, source in sources.items():
        if number < len(source):
            return split, number
        number -= len(source)
    raise IndexError(number)
