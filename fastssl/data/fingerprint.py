"""Fingerprint of the images of a run: which they are, in what order, and their labels.

A run that is resumed must get the images that it was started with. Images are compared by their identity, which does
not depend on where the data lies. A file holds 16 bytes for each image, the names too where they need at most
`MAX_NAMES` bytes, and digests of the content of a few images.
"""

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fastssl.files import write_atomically
from fastssl.text import printable

from .source import BadImage, Source, identity, read_captions

MAX_NAMES = 8 << 20  # largest size of the compressed names
EXAMINED = 64  # images whose content is compared
SHOWN = 3  # names in a message
CHUNK = 4096  # names that are compressed together


class Fingerprint:
    """The images of a source by their identities. `take_fingerprint` and `read_fingerprint` return it.

    Args:
        hashes: [N] uint64 of each image's identity, in the source's order.
        labels: [N] int64, −1 without a label.
        classes: names of the labels.
        shards: as `Source.shards`; empty without shards.
        examined: [M] numbers of the images whose content is known.
        content: [M] uint64 of these images' content; that of no bytes for one that cannot be read.
        names: the identities; empty if they are too long to be kept.
        captions: [N] uint64 of each image's captions; empty if the run does not learn from them.
    """

    def __init__(
        self,
        hashes: np.ndarray,
        labels: np.ndarray,
        classes: list[str],
        shards: np.ndarray,
        examined: np.ndarray,
        content: np.ndarray,
        names: list[str],
        captions: np.ndarray,
    ):
        self.hashes, self.labels, self.classes, self.shards = hashes, labels, classes, shards
        self.examined, self.content, self.names, self.captions = examined, content, names, captions

    def write(self, path: Path) -> None:
        """Writes an .npz, atomically."""
        columns = ("hashes", "labels", "shards", "examined", "content", "captions")
        arrays = {name: getattr(self, name) for name in columns}
        classes = zlib.compress(json.dumps(self.classes).encode())
        names = zlib.compress(json.dumps(self.names).encode(), 1)
        with write_atomically(path, "wb") as file:
            np.savez(
                file,
                **arrays,
                classes=np.frombuffer(classes, np.uint8),
                names=np.frombuffer(names if len(names) <= MAX_NAMES else b"", np.uint8),
            )


def take_fingerprint(source: Source, with_captions: bool = False) -> Fingerprint:
    """The fingerprint of a source, of its captions too if asked; takes a few seconds for a million images."""
    count, names = len(source), []
    hashes, labels = np.empty(count, "<u8"), np.empty(count, np.int64)
    for start in range(0, count, CHUNK):
        numbers = range(start, min(start + CHUNK, count))
        chunk = [identity(source, number) for number in numbers]
        hashes[start : numbers.stop] = _hashes(name.encode(errors="surrogatepass") for name in chunk)
        labels[start : numbers.stop] = [source.label(number) for number in numbers]
        names += chunk
    examined = np.argsort(hashes, kind="stable")[:EXAMINED]  # a choice that stays when other images come and go
    content = _hashes(_content(source, number) for number in examined.tolist())
    shards = np.empty(0, np.int64) if source.shards is None else np.asarray(source.shards, np.int64)
    texts = (json.dumps(read_captions(source, number)).encode() for number in range(count if with_captions else 0))
    return Fingerprint(hashes, labels, list(source.classes or []), shards, examined, content, names, _hashes(texts))


def read_fingerprint(path: Path) -> Fingerprint | None:
    """The fingerprint in a file; None if the file does not exist, as in a run of an older version.

    Raises:
        ValueError: the file is damaged.
    """
    if not os.path.lexists(path):
        return None
    try:
        if not path.is_file() or not zipfile.is_zipfile(path):  # opening a pipe would wait for ever
            raise ValueError("it is no file of that kind")
        with np.load(path, allow_pickle=False) as arrays:
            columns = {name: arrays[name] for name in ("hashes", "labels", "shards", "examined", "content")}
            classes = json.loads(zlib.decompress(arrays["classes"].tobytes()))
            names = json.loads(zlib.decompress(packed)) if (packed := arrays["names"].tobytes()) else []
            columns["captions"] = arrays["captions"] if "captions" in arrays else np.empty(0, np.uint64)
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(
            f"data: {path}, the fingerprint of the run's data, is damaged ({error}): remove it to go on without one"
        ) from error
    return Fingerprint(**columns, classes=classes, names=names)


def describe_changes(old: Fingerprint, new: Fingerprint) -> list[str]:
    """What has changed between two fingerprints, a phrase for each change; [] if nothing has."""
    added, removed = ~np.isin(new.hashes, old.hashes), ~np.isin(old.hashes, new.hashes)
    if added.all():
        return [f"none of the {len(new.hashes)} images{_some(new.names, [0])} is one of the {len(old.hashes)} before"]
    changes = [
        f"{rows.sum()} {verb}{_some(fingerprint.names, rows.nonzero()[0])}"
        for fingerprint, rows, verb in ((new, added, "added"), (old, removed, "removed"))
        if rows.any()
    ]
    if len(new.hashes) - len(old.hashes) != added.sum() - removed.sum():  # identities that several images have
        changes.append(f"{len(new.hashes)} images instead of {len(old.hashes)}")
    _, rows, old_rows = np.intersect1d(new.hashes, old.hashes, return_indices=True)
    relabelled = _class_names(new)[rows] != _class_names(old)[old_rows]
    if relabelled.any():
        changes.append(f"{relabelled.sum()} with another label{_some(new.names, rows[relabelled])}")
    if len(old.captions) and len(new.captions):
        other = old.captions[old_rows] != new.captions[rows]
        if other.any():
            changes.append(f"{other.sum()} with other captions{_some(new.names, rows[other])}")
    if changed := _changed_content(old, new):
        changes.append(f"{len(changed)} of {len(old.examined)} examined with other content{_some(new.names, changed)}")
    if not changes and not np.array_equal(old.hashes, new.hashes):
        changes.append("the same images in another order")
    if not changes and not np.array_equal(old.shards, new.shards):
        changes.append("the same images in other shards")
    return changes


def _changed_content(old: Fingerprint, new: Fingerprint) -> list[int]:
    """Numbers of the new images that were examined both times and have other content."""
    before = dict(zip(old.hashes[old.examined].tolist(), old.content.tolist()))
    pairs = zip(new.examined.tolist(), new.hashes[new.examined].tolist(), new.content.tolist())
    return [number for number, image, content in pairs if before.get(image, content) != content]


def _class_names(fingerprint: Fingerprint) -> np.ndarray:
    """[N] name of each image's class, "" without a label; numbers change when a class is added."""
    labels = np.where(fingerprint.labels < len(fingerprint.classes), fingerprint.labels, -1)
    return np.array([*fingerprint.classes, ""], dtype=object)[labels]


def _some(names: Sequence[str], rows: Sequence[int] | np.ndarray) -> str:
    """The first few names in brackets; "" where names are not kept."""
    if not len(names):
        return ""
    shown = [f'"{printable(names[row])}"' for row in rows[:SHOWN]]
    return f" ({', '.join(shown)}{', …' if len(rows) > SHOWN else ''})"


def _hashes(texts: Iterator[bytes]) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, "<u8").copy()


def _content(source: Source, number: int) -> bytes:
    try:
        return source.read(number).tobytes()
    except BadImage:
        return b""
