"""`folder:PATH`: image files of any size, in class folders or without classes; `formats.py` lists the formats.

    PATH/cat/1.jpg PATH/dog/2.jpg            classes are the first level of folders
    PATH/1.jpg PATH/more/2.jpg               no labels
    PATH/train/… PATH/test/…                 given splits: train or training; test, testing, val, valid, validation,
                                             eval or evaluation; in upper or lower case
    PATH::labels=none                        the folders are no classes (dates, for instance): no labels
    PATH::labels=folders                     every folder in PATH is a class, also one that is named train or test

Without given splits a fifth of each class is held out, see `split.hold_out`; without labels a run trains on all images.
What was passed over, and why, is in `notes`.
"""

import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastssl.text import listed, printable

from ..formats import FORMATS, SUFFIXES
from ..listing import RUNS, Listing, is_folder, list_files
from ..reading import read_image_file
from ..source import BadImage, Source, Strings, expand_user, split_options
from ..split import TEST_NAMES, TRAIN_NAMES, describe_labels, hold_out

OPTIONS = {"labels": ("none", "folders")}
LOOKALIKES = (r"(^|[^a-z])(train|trn)", r"(^|[^a-z])(test|tst|val|eval|dev|hold)")  # starts of words in a folder's name


class Folder(Source):
    """Image files below a root.

    Args:
        root: the folder.
        paths: [N] files, relative to the root.
        labels: [N] class of each file, −1 for none.
        classes: names of the labels; None: no labels.
        notes: sentences on how the folder was understood.
    """

    def __init__(
        self, root: Path, paths: Sequence[str], labels: np.ndarray, classes: list[str] | None, notes: Sequence[str]
    ):
        self.root, self._paths, self._labels = root, Strings(paths), labels
        self.classes, self.size, self.shards, self.notes = classes, None, None, tuple(notes)

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def name(self, index: int) -> str:
        return os.path.join(self.root, self._paths[index])

    def identity(self, index: int) -> str:
        return self._paths[index]

    def read(self, index: int) -> np.ndarray:
        path = self.name(index)
        try:
            return read_image_file(path)
        except OSError as error:
            raise BadImage(f"{printable(path)}: {error.strerror or error}") from error


class _Part(NamedTuple):
    """The images of a folder that is a whole source, or one split of it."""

    root: Path
    paths: list[str]
    labels: np.ndarray  # [N] int64
    classes: list[str] | None
    notes: list[str]


def open_split(argument: str, split: str) -> Folder:
    path, options = split_options(argument, OPTIONS, "folder")
    if not path:
        raise ValueError("data: folder needs a path: folder:PATH")
    root = expand_user(path)
    if not root.is_dir():
        raise ValueError(f"data: {printable(root)} is not a folder")
    option = options.get("labels", "")
    names = _folders(root)
    train_name, test_names = _find_splits(root, names, option)
    train = _read(root, train_name, option)
    if not test_names:
        rows = hold_out(train.paths, train.labels, split, printable(root))
        notes = [*train.notes, *describe_labels(train.labels, train.classes)]
        return Folder(train.root, [train.paths[row] for row in rows], train.labels[rows], train.classes, notes)
    tests = [_read(root, name, option, train) for name in test_names]
    test = next((part for part in tests if part.classes), tests[0])
    if split == "train":
        return Folder(*train)
    others = sorted(name for name in {*os.listdir(root)} - {train_name, test.root.name} if not name.startswith("."))
    unused = (
        [f"beside the splits {train_name} and {test.root.name} these are passed over: {listed(others)}"]
        if others
        else []
    )
    return Folder(*test._replace(notes=[*unused, *test.notes, *_compare(train, test)]))


def _folders(root: Path) -> list[str]:
    """Names of the folders in a folder, in sorted order; hidden ones and that of runs are left out."""
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if is_folder(entry)]
    return sorted(name for name in names if not name.startswith(".") and name != RUNS)


def _find_splits(root: Path, names: list[str], option: str) -> tuple[str, list[str]]:
    """(folder of the training split, "" for the root itself; folders that may be the test split, the best first).

    Raises:
        ValueError: the folders look like splits, but which is which is not known.
    """
    if option == "folders":
        return "", []
    train, test = _split_names(names)
    if len(train) == 1 and test:
        return train[0], test
    if option == "none" or not (train or test or _look_alike(names)):
        return "", []
    listing = list_files(root)
    names = sorted({path.partition(os.sep)[0] for path in listing.paths if os.sep in path})  # those with images
    train, test = _split_names(names)
    if train and train == names:  # no test split, and no other folder either
        return train[0], []
    if len(names) > 1 and (train or test or _look_alike(names)):
        shown = printable(root)
        raise ValueError(
            f"data: folders of {shown} look like splits, and it is not clear which is which, got {listed(names)}: name "
            f"the training split train and the held-out one test or val, or say what the folders are with "
            f"folder:{shown}::labels=folders (each is a class) or folder:{shown}::labels=none (train on all images)"
        )
    return "", []


def _split_names(names: list[str]) -> tuple[list[str], list[str]]:
    """Those of the names that are names of a training split, and of a test split, the best first."""
    test = [name for name in names if name.lower() in TEST_NAMES]
    order = TEST_NAMES.index
    return [name for name in names if name.lower() in TRAIN_NAMES], sorted(test, key=lambda name: order(name.lower()))


def _look_alike(names: list[str]) -> bool:
    """True if one name has a word like train and another one a word like test, such as train2017 and val2017."""
    return all(any(re.search(pattern, name.lower()) for name in names) for pattern in LOOKALIKES)


def _read(root: Path, name: str, option: str, train: _Part | None = None) -> _Part:
    """The images and classes of the root, or of its folder `name`; a test split has the classes of `train`.

    Raises:
        ValueError: there is no image, or a class of a test split is not in the training split.
    """
    folder, prefix = root / name, f"{printable(name)}: " if name else ""
    listing = list_files(folder)
    if not listing.paths:
        passed = "".join(f"; {note}" for note in _describe_others(listing))
        raise ValueError(
            f"data: {printable(folder)} holds no image ({', '.join(SUFFIXES)}), nor do its subfolders{passed}"
        )
    counts, beside = _divide(listing.paths)
    names = sorted(counts)
    classes, reason = _find_classes(folder, names, len(beside), len(listing.paths), option, train)
    notes = [reason] if reason else []
    paths, labels = listing.paths, np.full(len(listing.paths), -1)
    if classes is not None:
        if beside:
            notes.append(f"images in no class folder are passed over, {len(beside):,}: {listed(beside)}")
            paths = [path for path in paths if os.sep in path]
        numbers = {name: number for number, name in enumerate(classes)}
        labels = np.repeat([numbers[name] for name in counts], [*counts.values()])
        if empty := [f"{name} ({_kinds(listing.others.get(name, {}))})" for name in listing.tops if name not in names]:
            notes.append(f"folders without an image that can be read here are no classes: {listed(empty)}")
    notes += _describe_others(listing)
    return _Part(folder, paths, labels, classes, [f"{prefix}{note}" for note in notes])


def _divide(paths: list[str]) -> tuple[dict[str, int], list[str]]:
    """({folder in the root: number of its paths}, in the order of the paths; paths in no folder).

    Args:
        paths: in sorted order, so that those of a folder follow each other.
    """
    counts: dict[str, int] = {}
    beside: list[str] = []
    row = 0
    while row < len(paths):
        top, separator, _ = paths[row].partition(os.sep)
        if separator:
            end = bisect_left(paths, top + chr(ord(os.sep) + 1), row)
            counts[top] = end - row
            row = end
        else:
            beside.append(top)
            row += 1
    return counts, beside


def _find_classes(
    folder: Path, names: list[str], strays: int, total: int, option: str, train: _Part | None
) -> tuple[list[str] | None, str]:
    """(names of the classes, or None for no labels; the reason where that may be a surprise)."""
    if option == "none" or (train and train.classes is None):
        return None, ""
    if option == "folders" and train is None:
        if not names:
            raise ValueError(f"data: labels=folders needs folders with images, got none in {printable(folder)}")
        return names, ""
    if 2 * strays >= total:
        most = "most" if names else "the"
        reason = f"there are no labels, as {most} images are in no folder: {strays:,} of {total:,}"
        return None, reason if names or train else ""
    if train is not None and train.classes is not None:
        unknown = [name for name in names if name not in train.classes]
        if len(unknown) == len(names):
            return None, f"there are no labels, as the folders are no classes of the training split: {listed(names)}"
        if unknown:
            raise ValueError(f"data: {printable(folder)} has the class {unknown[0]!r}, which the training folder lacks")
        return train.classes, ""
    if len(names) == 1:
        return None, f"there are no labels, as only one folder has images: {printable(names[0])}"
    return names, ""


def _compare(train: _Part, test: _Part) -> list[str]:
    """Sentences on classes that the held-out split lacks."""
    if train.classes is None or test.classes is None:
        return []
    present = {*test.labels.tolist()}
    missing = [train.classes[label] for label in range(len(train.classes)) if label not in present]
    name = printable(test.root.name)
    return [f"the held-out split {name} has no image of the classes {listed(missing)}"] if missing else []


def _describe_others(listing: Listing) -> list[str]:
    """Sentences on the files and folders that were passed over."""
    kinds: Counter[str] = sum((Counter(kinds) for kinds in listing.others.values()), Counter())
    notes = [f"files passed over: {_kinds(kinds)}"] if kinds else []
    if lacking := [name for name, suffixes in FORMATS.items() if any(suffix in kinds for suffix in suffixes)]:
        remedy = "the package pillow-heif decodes it" if lacking == ["HEIF"] else "install a Pillow with decoders of it"
        notes[0] += f" ({' and '.join(lacking)}: {remedy})"
    if listing.ours:
        notes.append(f"folders that fastssl wrote are passed over: {listed(listing.ours)}")
    return notes


def _kinds(kinds: dict[str, int]) -> str:
    """Counts of files by suffix as text, such as "12 .txt, 1 .heic"; "empty" for none."""
    most = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    return listed([f"{count:,} {kind}" for kind, count in most]) or "empty"
