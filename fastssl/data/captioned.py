"""Image files with captions that a table or a JSON file lists, and the rules for captions that can't be used."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.text import printable

from .reading import open_regular, read_image_file, usable_memory
from .source import BadImage, Source, Strings
from .split import hold_out

MARKS = ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))  # first bytes of text in UTF-16
SHARE_OF_MEMORY = 16  # a list of captions takes several times its size in memory


def decode_text(data: bytes) -> str:
    """UTF-8 with or without a byte order mark, or UTF-16 with one. Bytes that are neither become surrogates."""
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8-sig")
    errors = "surrogateescape" if encoding == "utf-8-sig" else "surrogatepass"
    try:
        return data.decode(encoding, errors)
    except UnicodeDecodeError:  # an odd number of bytes
        return data.decode("utf-8", "surrogateescape")


def read_text(path: Path) -> str:
    """The text of a file of captions.

    Raises:
        ValueError: the file can't be read, or takes more memory than there is; one sentence.
    """
    try:
        with open_regular(path) as file:
            size, most = path.stat().st_size, usable_memory() // SHARE_OF_MEMORY
            if size > most:
                raise ValueError(
                    f"data: {printable(path)} has {size:,} bytes, more than {most:,}: use webdataset shards"
                )
            return decode_text(file.readall())
    except FileNotFoundError as error:
        raise ValueError(f"data: {printable(path)} does not exist") from error
    except OSError as error:
        raise ValueError(f"data: {printable(path)} can't be read ({error.strerror or error})") from error


def usable_captions(texts: Iterable[Any], dropped: Counter[str]) -> list[str]:
    """The captions that can be used, without blanks at their ends.

    Args:
        texts: captions as they were read.
        dropped: gets the number of others by the reason.
    """
    kept = []
    for text in texts:
        if not isinstance(text, str):
            dropped["no text"] += 1
        elif not text.strip():
            dropped["blank"] += 1
        elif not _is_utf8(text):
            dropped["not UTF-8"] += 1
        else:
            kept.append(text.strip())
    return kept


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def describe_dropped(dropped: Counter[str]) -> tuple[str, ...]:
    """A sentence on captions that can't be used."""
    reasons = " and ".join(f"{count:,} {'is' if count == 1 else 'are'} {reason}" for reason, count in dropped.items())
    return (f"captions that do not count: {reasons}",) if dropped else ()


class CaptionedFiles(Source):
    """Image files with captions, of one split.

    Args:
        root: folder that relative paths start from.
        captions: {path: its captions}.
        rows: [M] numbers of the images in this split, ascending.
        notes: sentences on the captions.
    """

    classes, size, shards = None, None, None

    def __init__(self, root: Path, captions: dict[str, list[str]], rows: np.ndarray, notes: Sequence[str]):
        paths, texts = list(captions), list(captions.values())
        self.root, self.notes = root, tuple(notes)
        self._paths = Strings([paths[row] for row in rows.tolist()])
        self._captions = Strings([json.dumps(texts[row]) for row in rows.tolist()])

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> np.ndarray:
        path = self.name(index)
        try:
            return read_image_file(path)
        except (OSError, ValueError) as error:  # ValueError of a name with a NUL
            raise BadImage(f"{printable(path)}: {getattr(error, 'strerror', None) or error}") from error

    def name(self, index: int) -> str:
        return str(self.root / self._paths[index])

    def label(self, index: int) -> int:
        return -1

    def identity(self, index: int) -> str:
        return self._paths[index]

    def captions(self, index: int) -> tuple[str, ...]:
        return tuple(json.loads(self._captions[index]))


def open_files(
    root: Path, captions: dict[str, list[Any]], split: str | None, name: str, notes: Sequence[str] = ()
) -> CaptionedFiles:
    """A source of the files with at least one caption that can be used.

    Args:
        root: folder that relative paths start from.
        captions: {path: its captions as they were read}.
        split: "train" or "test", of which the latter has a fifth of the files; None if these are a split already.
        name: the source in errors.
        notes: further sentences.

    Raises:
        ValueError: there are too few files.
    """
    dropped: Counter[str] = Counter()
    usable = {path: usable_captions(texts, dropped) for path, texts in captions.items() if _is_name(path)}
    kept = {path: texts for path, texts in usable.items() if texts}
    told = [*notes, *describe_dropped(dropped)]
    if missing := len(captions) - len(kept):
        told.append(f"{missing:,} of {len(captions):,} images have no caption and are left out")
    if len(kept) < (2 if split else 1):
        told = [f"it lists {len(captions):,} images", *told]
        needed = "two images with captions or more, as a fifth is held out" if split else "an image with a caption"
        raise ValueError(f"data: {name} must have {needed}; {'; '.join(told)}")
    rows = hold_out(kept, np.zeros(len(kept), np.int64), split, name) if split else np.arange(len(kept))
    return CaptionedFiles(root, kept, rows, told)


def _is_name(path: str) -> bool:
    """True for what can be the name of a file: half of a pair of surrogates can't."""
    try:
        path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return bool(path)
