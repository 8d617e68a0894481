"""`folder:PATH`: images of any size, in class folders or without classes: JPEG, PNG, WebP, BMP, TIFF or GIF.

    PATH/cat/1.jpg PATH/dog/2.jpg            classes are the first level of folders
    PATH/1.jpg PATH/more/2.jpg               no classes, since images are in PATH itself
    PATH/train/… PATH/test/… (or val)        given splits; without them every fifth image is in the test split

Without labels no image is held out, and a run trains on all of them.

The list of files is cached in ~/.cache/fastssl (or $XDG_CACHE_HOME) until one of the folders changes: adding, removing
or renaming a file changes the modification time of its folder.
"""

import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np

from fastssl.files import write_atomically

from ..formats import SUFFIXES
from ..source import BadImage, Source, Strings, cache_folder, expand_user
from ..split import hold_out

TEST_NAMES = ("test", "val", "validation")
SETTLED = 2 * 10**9  # nanoseconds after which a change is safe to cache: two changes in one clock tick look like one


class Folder(Source):
    """Image files below a root."""

    def __init__(self, root: Path, paths: list[str], labels: list[int], classes: list[str] | None):
        self._root, self._paths, self._labels = root, Strings(paths), np.array(labels, dtype=np.int64)
        self.classes, self.size, self.shards = classes, None, None

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
    root = expand_user(argument)
    if not root.is_dir():
        raise ValueError(f"data: {root} is not a folder")
    test_root = next((root / name for name in TEST_NAMES if (root / name).is_dir()), None)
    if (root / "train").is_dir() and test_root:
        paths, labels, classes = _scan(root / "train")
        if split == "train":
            return Folder(root / "train", paths, labels, classes)
        return Folder(test_root, *_scan(test_root, classes))
    paths, labels, classes = _scan(root)
    rows = hold_out(len(paths), split, classes is not None, str(root)).tolist()
    return Folder(root, [paths[row] for row in rows], [labels[row] for row in rows], classes)


def _scan(root: Path, classes: list[str] | None = None) -> tuple[list[str], list[int], list[str] | None]:
    """Paths below the root in sorted order, so that index i is the same image on every machine, with their labels."""
    paths = _list_images(root)
    if not paths:
        raise ValueError(f"data: {root} holds no image ({', '.join(SUFFIXES)}), nor do its subfolders")
    parts = [path.partition(os.sep) for path in paths]
    names = sorted({top for top, _, _ in parts})
    if any(not rest for _, _, rest in parts) or (classes is None and len(names) < 2):
        return paths, [-1] * len(paths), None
    classes = names if classes is None else classes
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise ValueError(f"data: {root} has the class {unknown[0]!r}, which the training folder lacks")
    numbers = {name: number for number, name in enumerate(classes)}
    return paths, [numbers[top] for top, _, _ in parts], classes


def _list_images(root: Path) -> list[str]:
    """Paths of `_walk`, from the cache if no folder has changed since."""
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:24]
    cache = cache_folder() / f"folder-{name}.json"
    try:
        cached = json.loads(cache.read_text())
        if all(_state(os.stat(root / folder)) == state for folder, state in cached["folders"].items()):
            return cached["paths"]
    except (OSError, ValueError, KeyError, TypeError):  # no cache yet, a folder is gone, or the cache is damaged
        pass
    started = time.time_ns()
    folders, paths = _walk(root)
    if max(changed for *_, changed, _ in folders.values()) > started - SETTLED:
        return paths
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(cache) as file:
            file.write(json.dumps({"folders": folders, "paths": paths}))
    except OSError:  # no space or no permission: the next call walks again
        pass
    return paths


def _state(folder: os.stat_result) -> list[int]:
    """Identity of a folder and times of its last change; the last one (ctime) can't be set back."""
    return [folder.st_dev, folder.st_ino, folder.st_mtime_ns, folder.st_ctime_ns]


def _walk(root: Path) -> tuple[dict[str, list[int]], list[str]]:
    """The state of each folder below the root, and the sorted paths of the images; hidden ones are left out."""
    folders: dict[str, list[int]] = {}
    paths: list[str] = []
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while pending:
        folder, parents = pending.pop()
        stat = os.stat(root / folder)
        if (stat.st_dev, stat.st_ino) in parents:  # a link to a parent folder
            continue
        parents = (*parents, (stat.st_dev, stat.st_ino))
        folders[folder] = _state(stat)
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending.append((os.path.join(folder, entry.name), parents))
                elif entry.name.lower().endswith(SUFFIXES) and (entry.is_file() or entry.is_symlink()):
                    paths.append(os.path.join(folder, entry.name))
    return folders, sorted(paths)
