"""Token ids of all captions of a source, made once and gathered by the number of the image.

The ids lie in a memory-mapped file in ~/.cache/fastssl (or $XDG_CACHE_HOME), whose name follows the captions, the
tokenizer and the length: it is made anew when one of them changes, and shared by the ranks of a machine. Loaders gather
from it behind the engine, so engines and workers see no text.
"""

import fcntl
import hashlib
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastssl.files import write_atomically
from fastssl.text import printable

from .draws import mix
from .numpy_files import map_npy
from .source import Source, Subset, cache_folder, read_captions
from .text import TextInput
from .tokenizers import Tokenizer, tokenizer_of

STREAM = 0x74657874  # of random numbers, apart from those of the views, which are numbered from 0
STEP = 8  # batches are padded to a multiple of this number of tokens
MOST_CHARACTERS = 65_536  # of a caption that are looked at
ROWS = 8_192  # captions that are written together


class TokenTable:
    """Token ids of the captions of a source's images.

    Args:
        rows: [C, 1 + length] uint16 or int32, captions of the first image, then those of the second, …: the number of
            tokens before the caption was cut, and the ids, padded.
        first: [N + 1] int64, row of each image's first caption, and C.
        text: how the batches are padded.
        vocabulary: number of tokens.
        path: file of the rows, for errors.
    """

    def __init__(self, rows: np.ndarray, first: np.ndarray, text: TextInput, vocabulary: int, path: Path | None = None):
        self.rows, self.first, self.text, self.vocabulary, self.path = rows, first, text, vocabulary, path

    def gather(self, index: Tensor, seed: Tensor) -> Tensor:
        """Ids [B, L] int64 of one caption of each image: the one that the image's seed chooses.

        Args:
            index: [B] int64, numbers of images; each has a caption.
            seed: [B] int64, `Batch.seed`.

        Raises:
            ValueError: the file of the table is damaged.
        """
        images = index.numpy()
        first, count = self.first[images], self.first[images + 1] - self.first[images]
        rows = self.rows[first + mix(seed.numpy(), STREAM) % count]
        ids, width = np.asarray(rows[:, 1:]), self.text.length
        if self.text.trim and len(rows):
            width = min(width, -(-int(rows[:, 0].max()) // STEP) * STEP)
        if ids.max(initial=0) >= self.vocabulary:
            raise ValueError(f"data: {printable(self.path)}, a cached table of tokens, is damaged: remove it")
        return torch.from_numpy(ids[:, :width].astype(np.int64))

    def notes(self) -> tuple[str, ...]:
        """Sentences if captions are cut, and if the table takes memory because its file could not be written."""
        longest = self.text.length
        lengths, told = self.rows[:, 0], []
        if cut := int((lengths > longest).sum()):
            verb = "is" if cut == 1 else "are"
            numbers = f"{cut:,} of {len(lengths):,} captions {verb} cut to {longest} tokens"
            told.append(f"{numbers}, the longest has {lengths.max():,}")
        if self.rows.size and not isinstance(self.rows, np.memmap):
            place = f"{printable(self.path)} can't be written (XDG_CACHE_HOME names another folder)"
            told.append(f"the tokens of captions take {self.rows.nbytes / 1e6:,.1f} MB of each rank's memory: {place}")
        return tuple(told)


def with_captions(source: Source) -> Source:
    """The images of a source that have a caption; its notes say how many are left out.

    Raises:
        ValueError: no image has one.
    """
    total = len(source)
    has_one = np.fromiter((bool(read_captions(source, index)) for index in range(total)), bool, total)
    if not has_one.any():
        raise ValueError(
            "data: this method learns from images and text, and no image of the data has a caption: use captions, "
            "webdataset: with .txt or .json, csv:, tsv:, coco:, emoji, or a source of your own with captions(index)"
        )
    if has_one.all():
        return source
    rows = np.flatnonzero(has_one)
    shards = None if source.shards is None else np.searchsorted(rows, source.shards)
    subset = Subset(source, array("q", rows.tolist()), shards)  # in one piece: workers would copy a list's numbers
    missing = total - len(rows)
    verb = "has no caption and is" if missing == 1 else "have no caption and are"
    subset.notes = (*getattr(source, "notes", ()), f"{missing:,} of {total:,} training images {verb} left out")
    return subset


def build_table(source: Source, text: TextInput) -> TokenTable:
    """The token ids of a source's captions, from the cache if they are there.

    Args:
        source: images of which each has a caption.
        text: tokenizer and length.

    Raises:
        MissingExtra: a caption needs ftfy, which is not installed.
    """
    tokenizer = tokenizer_of(text)
    first, key = _find_rows(source, f"{tokenizer.identity} {text.length}")
    shape, dtype = (int(first[-1]), 1 + text.length), np.dtype(np.uint16 if tokenizer.vocabulary <= 2**16 else np.int32)
    path = cache_folder() / f"tokens-{key}.npy"
    rows = _read_rows(path, shape, dtype)
    if rows is None:
        with _locked(path):  # by one rank of a machine; the others find its file
            rows = _read_rows(path, shape, dtype)
            if rows is None:
                rows = _write_rows(path, source, tokenizer, shape, dtype)
    return TokenTable(rows, first, text, tokenizer.vocabulary, path)


def _find_rows(source: Source, identity: str) -> tuple[np.ndarray, str]:
    """(row [N + 1] of each image's first caption, name of the table of these captions with this tokenizer)."""
    digest, first = hashlib.blake2b(identity.encode(), digest_size=12), np.zeros(len(source) + 1, np.int64)
    for index in range(len(source)):
        captions = read_captions(source, index)
        first[index + 1] = first[index] + len(captions)
        for caption in captions:
            encoded = caption.encode(errors="surrogatepass")
            digest.update(b"%d " % len(encoded) + encoded)
    digest.update(first.tobytes())
    return first, digest.hexdigest()


def _read_rows(path: Path, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray | None:
    """The mapped table; None if there is none, or a damaged one."""
    try:
        rows = map_npy(path)
    except ValueError:
        return None
    return rows if rows.shape == shape and rows.dtype == dtype else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits until no other process is in this block; where no lock file can be written, it doesn't."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            path.with_suffix(".lock").unlink()
        os.close(handle)


def _write_rows(
    path: Path, source: Source, tokenizer: Tokenizer, shape: tuple[int, int], dtype: np.dtype
) -> np.ndarray:
    """The table, mapped from the file that it is written to, or in memory where the file can't be written."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    try:
        with write_atomically(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for block in _blocks(source, tokenizer, shape[1] - 1, dtype):
                file.write(block.tobytes())
        return map_npy(path)
    except OSError:  # no space or no permission
        return np.concatenate([np.empty((0, shape[1]), dtype), *_blocks(source, tokenizer, shape[1] - 1, dtype)])


def _blocks(source: Source, tokenizer: Tokenizer, length: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The table in blocks [≤ ROWS, 1 + length]."""
    lines: list[list[int]] = []
    for index in range(len(source)):
        for caption in read_captions(source, index):
            ids = tokenizer.encode(caption[:MOST_CHARACTERS])
            count = min(len(ids), 2**16 - 1)
            ids = ids if len(ids) <= length else tokenizer.encode(caption[:MOST_CHARACTERS], length)
            lines.append([count, *ids, *[tokenizer.pad] * (length - len(ids))])
        if len(lines) >= ROWS:
            yield np.array(lines, dtype)
            lines = []
    if lines:
        yield np.array(lines, dtype)
