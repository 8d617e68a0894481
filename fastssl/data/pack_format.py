"""The file format of packs: images of both splits of a source in one file, each behind a header with checksums.

    file     header · records · index · trailer; integers are little-endian, records begin at multiples of 8 bytes
    header   "FSSLPACK", version (4 bytes), length of the JSON (4), its CRC-32 (4), zeros (4), the JSON
    record   "IMG0", CRC-32 of the rest of this header and of the JSON, number of the image (8), bytes of the image (8),
             bytes of the JSON (4), height (4), width (4), CRC-32 of the image (4), the JSON, the image, its extras
    index    the fields of all records as a safetensors file, with the header's JSON in its metadata
    trailer  "FSSLEND0", offset of the index (8), its bytes (8), its CRC-32 (4), zeros (4)

A record whose height is 0 holds an image file, else pixels: RGB [height, width, 3], or, in half as many bytes, planes
[3·height/2, width] of an even height and width, as `decoding.py` describes them. Its JSON has the name, the
identity, the label, the split and the captions of the image, the size and the CRC-32 of its extras (a safetensors
file), or the reason why it could not be decoded; such a record has no bytes. The index makes opening fast, and holds
nothing that the records don't: of a file that is cut off or whose index is damaged, the records are read one by one.

The checksum of an image is verified when a process reads it for the first time, and that of its extras always. Later
reads of the process return the mapped memory itself: they would find what the first one found.

Shards are such files, each with a part of the images. The numbers of the images go on from shard to shard, and each
header says which shard of how many it is.
"""

import json
import mmap
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from fastssl.text import printable

from .reading import open_regular

MAGIC, RECORD_MAGIC, END_MAGIC, VERSION = b"FSSLPACK", b"IMG0", b"FSSLEND0", 1
HEADER, RECORD, TRAILER = struct.Struct("<8sIIII"), struct.Struct("<4sIQQIIII"), struct.Struct("<8sQQII")
MOST_JSON = 2**26  # bytes of a header's JSON: a million class names


class Record(NamedTuple):
    """An image of a pack."""

    number: int  # of the image in the source: those of the training split, then those of the held-out split
    offset: int  # of the image in the file, bytes
    size: int  # of the image, bytes
    height: int  # of pixels; 0 for an image file
    width: int
    crc: int  # CRC-32 of the image
    facts: dict[str, Any]  # name, identity, label, split, captions, extras: [bytes, CRC-32], or bad: reason


class Index(NamedTuple):
    """All images of a pack that can be read."""

    header: dict[str, Any]
    columns: dict[str, np.ndarray]  # as `columns_of` makes them
    notes: list[str]  # sentences on damage


def header_bytes(header: dict[str, Any]) -> bytes:
    """The header of a file, padded to a multiple of 8 bytes."""
    text = json.dumps(header).encode()
    return _padded(HEADER.pack(MAGIC, VERSION, len(text), zlib.crc32(text), 0) + text)


def record_bytes(number: int, image: np.ndarray, facts: dict[str, Any], extras: bytes = b"") -> bytes:
    """A record of an image: bytes [N] of a file, RGB [H, W, 3] or planes [3·H/2, W]; an empty array for a bad one."""
    height, width = image.shape[:2] if image.ndim > 1 else (0, 0)
    height = height * 2 // 3 if image.ndim == 2 else height
    facts = {**facts, "extras": [len(extras), zlib.crc32(extras)]} if extras else facts
    text, data = json.dumps(facts).encode(), image.tobytes()
    rest = RECORD.pack(b"", 0, number, len(data), len(text), height, width, zlib.crc32(data))[8:]
    crc = zlib.crc32(rest + text)
    return _padded(RECORD_MAGIC + struct.pack("<I", crc) + rest + text + data + extras)


def index_bytes(records: list[Record], header: dict[str, Any], offset: int) -> bytes:
    """Index and trailer, which follow the records at `offset`."""
    index = safetensors.numpy.save(columns_of(records), {"header": json.dumps(header)})
    return index + TRAILER.pack(END_MAGIC, offset, len(index), zlib.crc32(index), 0)


def columns_of(records: list[Record]) -> dict[str, np.ndarray]:
    """Fields of the records whose image can be decoded, an array [N] each; names and identities as bytes and ends."""
    good = [record for record in records if "bad" not in record.facts]

    def column(values: list[int]) -> np.ndarray:
        return np.array(values, dtype=np.int64)

    columns = {name: column([getattr(r, name) for r in good]) for name in Record._fields[:-1]}
    columns["label"] = column([r.facts["label"] for r in good])
    columns["split"] = column([r.facts["split"] for r in good])
    extras = [r.facts.get("extras", [0, 0]) for r in good]
    columns["extras_size"], columns["extras_crc"] = column([e[0] for e in extras]), column([e[1] for e in extras])
    texts = {name: [r.facts[name] for r in good] for name in ("name", "identity")}
    if any("captions" in r.facts for r in good):
        texts["captions"] = [json.dumps(r.facts.get("captions", [])) for r in good]
    for name, strings in texts.items():
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        columns[name] = np.frombuffer(b"".join(encoded) or b"\0", np.uint8)
        columns[f"{name}_end"] = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    bad = [r for r in records if "bad" in r.facts]
    columns["bad"] = column([sum(r.facts["split"] == split for r in bad) for split in (0, 1)])
    return columns


def read_index(path: Path) -> Index:
    """The index of a pack, or that of its intact records if the file is cut off or damaged.

    Raises:
        ValueError: the file is no pack, of another version, or its header and its index are damaged.
        OSError: the file can't be read.
    """
    with open_regular(path) as file:
        if not file.read(1):
            raise ValueError(f"data: {printable(path)} is empty, no pack")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                index = _read_index(path, data)
                _check(index, len(data))
            except (
                KeyError,
                IndexError,
                TypeError,
                AttributeError,
                struct.error,
                safetensors.SafetensorError,
            ) as error:
                raise ValueError(f"data: {printable(path)} is no pack of this program ({_reason(error)})") from error
    return index


def _reason(error: Exception) -> str:
    """The error on one line, for a file whose checksums are right and whose content is not."""
    return printable(f"{type(error).__name__}: {error}".splitlines()[0][:100])


def _check(index: Index, length: int) -> None:
    """Checks that all fields are there and that every image lies in the file of `length` bytes.

    Raises:
        TypeError, KeyError: they don't.
    """
    header, columns, _ = index
    count = len(columns["offset"])
    for name in (*Record._fields[:-1], "label", "split", "extras_size", "extras_crc"):
        if columns[name].dtype != np.int64 or columns[name].shape != (count,):
            raise TypeError(f"{name} of {columns[name].dtype} {columns[name].shape} for {count} images")
    start, end = columns["offset"], columns["offset"] + columns["size"]
    lengths = [columns[name] for name in ("offset", "size", "extras_size", "height", "width")]
    if any((x < 0).any() or (x > length).any() for x in lengths) or (end + columns["extras_size"] > length).any():
        raise TypeError(f"images beyond the end at {length}, from {start.min()} to {end.max()}")
    for name in ("name", "identity", *(("captions",) if "captions" in columns else ())):
        ends = columns[f"{name}_end"]
        if ends.shape != (count + 1,) or ends[0] != 0 or (np.diff(ends) < 0).any() or ends[-1] > columns[name].size:
            raise TypeError(f"{name}_end is not ascending")
    for split, classes in enumerate(header["classes"]):
        labels = columns["label"][columns["split"] == split]
        if len(labels) and not -1 <= labels.min() <= labels.max() < len(classes or ()):
            raise TypeError(f"labels from {labels.min()} to {labels.max()} of {len(classes or ())} classes")
    if not isinstance(header["classes"], list) or len(header["classes"]) != 2 or len(header["images"]) != 2:
        raise TypeError("header without two splits")
    if not all(isinstance(note, str) for notes in header["notes"] for note in notes) or len(header["notes"]) != 2:
        raise TypeError("notes that are no sentences")


def _read_index(path: Path, data: mmap.mmap) -> Index:
    name = printable(path)
    header, start = _read_header(name, data)
    end = TRAILER.unpack(data[-TRAILER.size :]) if len(data) >= TRAILER.size else (b"", 0, 0, 0, 0)
    whole = end[0] == END_MAGIC and end[1] + end[2] == len(data) - TRAILER.size
    index = data[end[1] : end[1] + end[2]] if whole else b""
    notes = []
    if whole and zlib.crc32(index) == end[3]:
        columns, stored = safetensors.numpy.load(index), _stored_header(index)
        if header is None:
            notes.append(f"the header of {name} is damaged: that of its index is used")
        return Index(stored, columns, notes)
    if header is None:
        raise ValueError(
            f"data: {name} is damaged: neither its header nor its index can be read: pack the images again"
        )
    records = list(scan(data, start))
    columns = columns_of(records)
    total, seen = sum(header["images"]), len({record.number for record in records})
    what = "its index is damaged" if whole else "it has no index: the file is cut off, or not finished"
    notes.append(
        f"{name}: {what}; {seen:,} of {total:,} images are intact"
        + (": pack the source again for the others" if seen < total else "")
    )
    if not seen:
        raise ValueError(f"data: {name} holds no image: {what}: pack the source again")
    return Index(header, columns, notes)


def _read_header(name: str, data: mmap.mmap) -> tuple[dict[str, Any] | None, int]:
    """(the header, None if it is damaged; offset of the first record)."""
    if len(data) < HEADER.size or data[:8] != MAGIC:
        raise ValueError(f"data: {name} is no pack: it does not begin with {MAGIC.decode()}")
    _, version, length, crc, _ = HEADER.unpack(data[: HEADER.size])
    text = data[HEADER.size : HEADER.size + min(length, MOST_JSON)]
    if zlib.crc32(text) != crc:
        return None, 0
    if version != VERSION:
        raise ValueError(f"data: {name} is a pack of version {version}, and this program reads version {VERSION}")
    return json.loads(text), -(-(HEADER.size + length) // 8) * 8


def _stored_header(index: bytes) -> dict[str, Any]:
    """The header in the metadata of an intact index."""
    (length,) = struct.unpack("<Q", index[:8])
    return json.loads(json.loads(index[8 : 8 + length])["__metadata__"]["header"])


def scan(data: mmap.mmap | bytes, start: int) -> Iterator[Record]:
    """The intact records from `start` on. After a damaged one, the search for the next goes on."""
    while 0 <= start <= len(data) - RECORD.size:
        record, end = _read_record(data, start)
        if record is not None:
            yield record
            start = end
            continue
        start = data.find(RECORD_MAGIC, start + 1)
        while start >= 0 and start % 8:
            start = data.find(RECORD_MAGIC, start + 1)


def _read_record(data: mmap.mmap | bytes, start: int) -> tuple[Record | None, int]:
    """(the record, None if its header is damaged or it is cut off; offset of the next)."""
    head = data[start : start + RECORD.size]
    magic, crc, number, size, length, height, width, image_crc = RECORD.unpack(head)
    begin = start + RECORD.size + length
    if magic != RECORD_MAGIC or length > MOST_JSON or begin + size > len(data):
        return None, 0
    text = data[start + RECORD.size : begin]
    if zlib.crc32(head[8:] + text) != crc:
        return None, 0
    facts = json.loads(text)
    end = begin + size + facts.get("extras", [0])[0]
    if not begin + size <= end <= len(data):
        return None, 0
    return Record(number, begin, size, height, width, image_crc, facts), -(-end // 8) * 8


def shape_of(size: int, height: int, width: int) -> tuple[int, ...] | None:
    """Shape of an image of `size` bytes in a record, whose height and width are these; None if they don't agree."""
    if not height:
        return (size,)
    if size == 3 * height * width:
        return height, width, 3
    if 2 * size == 3 * height * width and not (height % 2 or width % 2):
        return 3 * height // 2, width
    return None


def shard_path(path: Path, shard: int, shards: int) -> Path:
    """The file of a shard, such as photos-00000-of-00004.pack of photos.pack; the path itself if there is only one."""
    return path if shards == 1 else path.with_name(f"{path.stem}-{shard:05d}-of-{shards:05d}{path.suffix}")


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 8)
