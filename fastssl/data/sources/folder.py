"""`folder:PATH`: images of any size, in class folders or in none, JPEG, PNG, WebP, BMP, TIFF or GIF.

    PATH/cat/1.jpg PATH/dog/2.jpg            classes by the first folder level
    PATH/1.jpg PATH/more/2.jpg               no classes, where images lie in PATH itself
    PATH/train/… PATH/test/… (or val)        split by the owner; else every fifth image is the test split

Without labels there is nothing to hold out for, and a run trains on all images.

What a folder holds is remembered in ~/.cache/fastssl (or $XDG_CACHE_HOME), and holds as long as none of its folders
changed: adding, removing or renaming a file changes the time of the folder that it lies in.
"""

import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np

from ..source import BadImage, Strings, cache_folder, expanded

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
TEST_NAMES = ("test", "val", "validation")
SETTLED = 2 * 10**9  # nanoseconds: a file that comes in the tick in which the folder was read would not be noticed


class Folder:
    """Files below a root."""

    size = shards = None

    def __init__(self, root: Path, paths: list[str], labels: list[int], classes: list[str] | None):
        self._root, self._paths, self.classes = root, Strings(paths), classes
        self._labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def name(self, index: int) -> str:
        return os.path.join(self._root, self._paths[index])

    def read(self, index: int) -> np.ndarray:
        try:
            return np.fromfile(self.name(index), np.uint8)
        except OSError as error:
            raise BadImage(f"{self.name(index)}: {error.strerror or error}") from error


def open_split(argument: str, split: str) -> Folder:
    if not argument:
        raise ValueError("data: folder needs a path: folder:PATH")
    root = expanded(argument)
    if not root.is_dir():
        raise ValueError(f"data: {root} is not a folder")
    owned_test = next((root / name for name in TEST_NAMES if (root / name).is_dir()), None)
    if (root / "train").is_dir() and owned_test:
        paths, labels, classes = _scan(root / "train")
        if split == "train":
            return Folder(root / "train", paths, labels, classes)
        return Folder(owned_test, *_scan(owned_test, classes))
    paths, labels, classes = _scan(root)
    if split == "test":
        if len(paths) < 5:
            raise ValueError(f"data: {root} has {len(paths)} images, and every fifth is the test split: 5 are needed")
        return Folder(root, paths[4::5], labels[4::5], classes)
    if classes is not None:  # what is asked at evaluation must not be among the answers
        del paths[4::5], labels[4::5]
    return Folder(root, paths, labels, classes)


def _scan(root: Path, classes: list[str] | None = None) -> tuple[list[str], list[int], list[str] | None]:
    """Paths below the root in sorted order, so that index i is the same image on every machine, with their labels."""
    paths = _remembered(root)
    if not paths:
        raise ValueError(f"data: {root} holds no image ({', '.join(SUFFIXES)}), not in its subfolders either")
    tops = [path.partition(os.sep) for path in paths]
    names = sorted({top for top, _, _ in tops})
    if any(not rest for _, _, rest in tops) or (classes is None and len(names) < 2):
        return paths, [-1] * len(paths), None
    classes = names if classes is None else classes
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise ValueError(f"data: {root} has the class {unknown[0]!r}, which the training folder lacks")
    numbers = {name: number for number, name in enumerate(classes)}
    return paths, [numbers[top] for top, _, _ in tops], classes


def _remembered(root: Path) -> list[str]:
    """`_walk`'s paths, from the cache where no folder has changed since."""
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:24]
    cache = cache_folder() / f"folder-{name}.json"
    try:
        known = json.loads(cache.read_text())
        if all(_mark(os.stat(root / folder)) == mark for folder, mark in known["folders"].items()):
            return known["paths"]
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or a folder is gone, or the file is damaged
        pass
    began = time.time_ns()
    folders, paths = _walk(root)
    if max(changed for *_, changed, _ in folders.values()) > began - SETTLED:
        return paths
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"folders": folders, "paths": paths}))
        partial.replace(cache)
    except OSError:  # no room or no right: it is read again next time
        pass
    return paths


def _mark(found: os.stat_result) -> list[int]:
    """Which folder this is, and when files came, went or were renamed in it, even where that time was set back."""
    return [found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _walk(root: Path) -> tuple[dict[str, list[int]], list[str]]:
    """{folder below the root: its `_mark`}, and the images' paths below the root, sorted. Hidden ones are left out."""
    folders, paths = {}, []
    waiting = [("", ())]
    while waiting:
        folder, above = waiting.pop()
        found = os.stat(root / folder)
        if (found.st_dev, found.st_ino) in above:  # a link back up
            continue
        above = (*above, (found.st_dev, found.st_ino))
        folders[folder] = _mark(found)
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append((os.path.join(folder, entry.name), above))
                elif entry.name.lower().endswith(SUFFIXES) and (entry.is_file() or entry.is_symlink()):
                    paths.append(os.path.join(folder, entry.name))
    return folders, sorted(paths)
