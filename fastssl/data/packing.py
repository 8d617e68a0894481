"""Writing of packs (`pack_format.py`): images are made smaller and encoded in worker processes, and the file can be
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
from PIL import Image
from torch.utils.data import Dataset

from fastssl.text import printable

from .decoding import ImageFile
from .pack_format import Record, header_bytes, index_bytes, record_bytes, scan
from .source import SPLITS, BadImage, Source, identity, read_extras
from .workers import Workers

KINDS = ("jpeg", "rgb", "copy")


class Encoding(NamedTuple):
    """How images are stored."""

    kind: str = "jpeg"  # "jpeg"; "rgb" for pixels, which need no decoding; "copy" for the files as they are
    side: int = 320  # largest length of the shorter side in pixels; larger images are made smaller
    quality: int = 90  # of JPEG, 1 to 95


class Packed(NamedTuple):
    """What `write_pack` wrote."""

    images: int  # in the file
    bad: list[str]  # "PATH: reason" of those that can't be decoded
    bytes: int  # size of the file
    continued: int  # images that an earlier, interrupted call had written


def encode(image: ImageFile, encoding: Encoding) -> np.ndarray:
    """The image as it is stored: bytes [N] of a file, or pixels [H, W, 3].

    An upright JPEG that is small enough is kept as it is. Others are resized with Pillow's bicubic filter.

    Raises:
        BadImage: the image can't be decoded.
    """
    small = min(image.size) <= encoding.side
    pixels = image.pixels()  # also of what is copied: a pack holds no image that can't be decoded
    keep = encoding.kind == "jpeg" and image.format == "JPEG" and image.orientation == 1 and small
    if encoding.kind == "copy" or keep:
        return image.data
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    if not small:
        scale = encoding.side / min(picture.size)
        size = [max(encoding.side, round(side * scale)) for side in picture.size]
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    if encoding.kind == "rgb":
        return np.array(picture)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=encoding.quality)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def write_pack(
    sources: dict[str, Source],
    path: Path,
    encoding: Encoding,
    *,
    workers: int = 0,
    name: str = "",
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Packed:
    """Writes the images of a source to one file, `path`; until it is whole its name ends in .part.

    A .part file of the same source and encoding is continued after its last intact record.

    Args:
        sources: {"train": …, "test": …}, or one of them.
        path: the file to write, which must not exist.
        encoding: how images are stored.
        workers: processes that decode and encode; 0 for this one.
        name: the source, as in `open_source`, stored in the file.
        progress: called with the number of images done and of all.

    Raises:
        ValueError: the file exists, can't be written, or a .part file holds other images; another process writes it;
            no image can be decoded.
    """
    numbers = {split: sources[split] for split in SPLITS if split in sources}
    header: dict[str, Any] = {
        "source": name,
        "encoding": encoding._asdict(),
        "images": [len(numbers[split]) if split in numbers else 0 for split in SPLITS],
        "classes": [numbers[split].classes if split in numbers else None for split in SPLITS],
        "notes": [list(getattr(numbers.get(split), "notes", ())) for split in SPLITS],
    }
    if path.exists():
        raise ValueError(f"data: --out {printable(path)} exists: choose another name, or remove it")
    part = path.with_name(f"{path.name}.part")
    try:
        with open(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            _lock(file, part)
            records = _continue(file, part, header)
            continued, total = len(records), sum(header["images"])
            for data in _encoded(numbers, encoding, {record.number for record in records}, workers):
                begin = file.tell()
                file.write(data)
                records += [record._replace(offset=record.offset + begin) for record in scan(data, 0)]
                progress(len(records), total)
            if not any("bad" not in record.facts for record in records):
                raise ValueError(f"data: none of the {total:,} images of {printable(name)} can be decoded")
            file.write(index_bytes(records, header, file.tell()))
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        part.rename(path)
    except OSError as error:
        raise ValueError(f"data: --out {printable(path)} can't be written ({error.strerror or error})") from error
    bad = [record.facts["bad"] for record in records if "bad" in record.facts]
    return Packed(len(records) - len(bad), bad, size, continued)


def _lock(file: Any, part: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"data: another process is writing {printable(part)}") from error


def _continue(file: Any, part: Path, header: dict[str, Any]) -> list[Record]:
    """Records of an interrupted call; the file then ends behind the last of them, or behind a new header."""
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
        extras = b""
        try:
            image = encode(ImageFile(source.read(index), name), self.encoding)
            arrays = read_extras(source, index)
            extras = safetensors.numpy.save(arrays) if arrays else b""
        except BadImage as error:
            image, facts["bad"] = np.empty(0, np.uint8), str(error)
        return record_bytes(number, image, facts, extras)


def _encoded(sources: dict[str, Source], encoding: Encoding, done: set[int], workers: int) -> Iterator[bytes]:
    """The record of each image that is not done, in order."""
    total = sum(map(len, sources.values()))
    todo = np.array([number for number in range(total) if number not in done], dtype=np.int64)
    if len(todo):
        yield from Workers(_Encoded(sources, encoding, todo), workers=workers, batch_size=None)


def _place(sources: dict[str, Source], number: int) -> tuple[str, int]:
    """(split, index in it) of the image with this number."""
    for split, source in sources.items():
        if number < len(source):
            return split, number
        number -= len(source)
    raise IndexError(number)
