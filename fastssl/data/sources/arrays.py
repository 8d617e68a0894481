"""`arrays:FILE`: images in a NumPy file, uint8; a .npy file is memory-mapped.

    arrays:images.npy                 [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1 or 3, without labels
    arrays:images.npy,labels.npy      the same with labels [N], integers
    arrays:data.npz                   arrays images and, optionally, labels; or x_train, y_train, x_test, y_test

A label of −1 is none: the image trains, and evaluations leave it out. If the file has labels but no test split, a fifth
of each class is held out, see `split.hold_out`.
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ..source import Source, class_names, expand_user
from ..split import describe_labels, hold_out

KEYS = {"train": (("images", "labels"), ("x_train", "y_train")), "test": (("images", "labels"), ("x_test", "y_test"))}


class Arrays(Source):
    """Rows of images in memory or on disk.

    Args:
        pixels: [N, H, W, C] or [N, H, W] uint8; a memory map is shared with forked workers, not copied to them.
        labels: [N] integers, −1 for none, or None.
        classes: names of the labels.
        rows: [M] numbers of the images in this split.
        name: the file in messages.
    """

    def __init__(
        self, pixels: np.ndarray, labels: np.ndarray | None, classes: list[str] | None, rows: np.ndarray, name: str
    ):
        self._pixels, self._labels, self._rows, self._name = pixels, labels, rows, name
        self.classes, self.size, self.shards = classes, (pixels.shape[1], pixels.shape[2]), None

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> np.ndarray:
        pixels = np.asarray(self._pixels[self._rows[index]])
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        return np.array(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))

    def name(self, index: int) -> str:
        return f"{self._name}, image {self._rows[index]}"

    def identity(self, index: int) -> str:
        return str(self._rows[index])

    def label(self, index: int) -> int:
        return -1 if self._labels is None else int(self._labels[self._rows[index]])


def open_split(argument: str, split: str) -> Arrays:
    images_path, _, labels_path = argument.partition(",")
    if not argument or Path(images_path).suffix not in (".npy", ".npz") or Path(labels_path).suffix not in ("", ".npy"):
        raise ValueError(f"data: arrays needs a file: arrays:FILE.npy, arrays:FILE.npz or two .npy, got {argument!r}")
    if images_path.endswith(".npz"):
        pixels, labels, is_split = _read_npz(expand_user(images_path), split)
    else:
        pixels, is_split = _load(expand_user(images_path)), False
        labels = _load(expand_user(labels_path)) if labels_path else None
    return make_source(_channels_last(pixels, images_path), labels, split, is_split, argument)


def make_source(pixels: np.ndarray, labels: np.ndarray | None, split: str, is_split: bool, name: str) -> Arrays:
    """The source of a split of arrays.

    Args:
        pixels: [N, H, W, C] or [N, H, W] uint8.
        labels: [N] integers, −1 for none, or None.
        split: "train" or "test".
        is_split: True if the arrays are this split already; else `hold_out` divides them.
        name: the file in messages.

    Raises:
        ValueError: there are no images, the labels don't fit, or the test split would be empty.
    """
    if len(pixels) == 0:
        raise ValueError(f"data: {name} holds no images")
    classes = None
    if labels is not None:
        if labels.shape != (len(pixels),) or labels.dtype.kind not in "iu":
            got = f"{labels.dtype} {list(labels.shape)}"
            raise ValueError(
                f"data: {name}: labels must be integers of shape [{len(pixels)}], -1 for no label, got {got}"
            )
        classes = class_names(labels, name)
    rows = np.arange(len(pixels)) if is_split else hold_out(map(str, range(len(pixels))), labels, split, name)
    source = Arrays(pixels, labels, classes, rows, name)
    source.notes += describe_labels(labels, classes, held_out=not is_split)
    return source


def from_torchvision(dataset: Any, root: str, split: str) -> Arrays:
    """The source of a dataset class of torchvision that keeps `data` [N, H, W, C] and `targets`.

    Args:
        dataset: the class, such as `CIFAR10`.
        root: folder that holds its files.
        split: "train" or "test".

    Raises:
        ValueError: no folder is given, or the files are missing or damaged.
    """
    name = dataset.__name__
    if not root:
        raise ValueError(f"data: {name.lower()} needs a folder: {name.lower()}:PATH")
    try:
        data = dataset(expand_user(root), train=split == "train", download=False)
    except RuntimeError as error:
        raise ValueError(f"data: {root}: {name} is missing or damaged ({error})") from error
    source = make_source(data.data, np.asarray(data.targets), split, is_split=True, name=root)
    source.classes = data.classes
    return source


def _load(path: Path, is_npy: bool = True) -> Any:
    """The array of a .npy file, memory-mapped, or the arrays of a .npz file."""
    if not path.is_file():
        raise ValueError(f"data: {path} does not exist")
    try:
        content = np.load(path, mmap_mode="r" if is_npy else None, allow_pickle=False)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"data: {path} is no NumPy file of plain numbers ({error})") from error
    if isinstance(content, np.ndarray) != is_npy:
        raise ValueError(f"data: {path} does not fit its suffix: .npy is one array, .npz several")
    return content


def _read_npz(path: Path, split: str) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """(images, labels, True if the arrays are the requested split)."""
    with _load(path, is_npy=False) as file:
        for images_key, labels_key in KEYS[split]:
            if images_key in file:
                return file[images_key], file.get(labels_key), images_key != "images"
        keys = ", ".join(file.files)
    raise ValueError(
        f"data: {path} must hold images (and labels), or x_train, y_train, x_test, y_test; it holds {keys}"
    )


def _channels_last(pixels: np.ndarray, name: str) -> np.ndarray:
    fits = pixels.ndim == 3 or (pixels.ndim == 4 and (pixels.shape[3] in (1, 3) or pixels.shape[1] in (1, 3)))
    if pixels.dtype != np.uint8 or not fits:
        expected = "uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels"
        raise ValueError(f"data: {name}: images must be {expected}, got {pixels.dtype} {list(pixels.shape)}")
    return pixels if pixels.ndim == 3 or pixels.shape[3] in (1, 3) else np.moveaxis(pixels, 1, 3)
