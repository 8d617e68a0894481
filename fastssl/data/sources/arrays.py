"""`arrays:FILE`: images in a NumPy file, uint8, memory-mapped where that can be.

    arrays:images.npy                 [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1 or 3, no labels
    arrays:images.npy,labels.npy      …and labels [N], integers
    arrays:data.npz                   images and, if there are any, labels; or x_train, y_train, x_test, y_test

Without a split of its own every fifth image is the test split, where there are labels.
"""

import zipfile
from pathlib import Path

import numpy as np

from ..source import expanded, numbered

KEYS = {"train": (("images", "labels"), ("x_train", "y_train")), "test": (("images", "labels"), ("x_test", "y_test"))}


class Arrays:
    """Rows of images [N, H, W, C] or [N, H, W] uint8, in memory or on disk.

    Args:
        pixels: the images; a memory map is shared with forked workers, not copied to them.
        labels: [N] integers, or None.
        classes: names of the labels.
        rows: numbers of the images that belong to this split.
        what: the file, in messages.
    """

    shards = None

    def __init__(
        self, pixels: np.ndarray, labels: np.ndarray | None, classes: list[str] | None, rows: np.ndarray, what: str
    ):
        self._pixels, self._labels, self.classes, self._rows, self._what = pixels, labels, classes, rows, what
        self.size = pixels.shape[1:3]

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> np.ndarray:
        pixels = np.asarray(self._pixels[self._rows[index]])
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        return np.array(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))

    def name(self, index: int) -> str:
        return f"{self._what}, image {self._rows[index]}"

    def label(self, index: int) -> int:
        return -1 if self._labels is None else int(self._labels[self._rows[index]])


def open_split(argument: str, split: str) -> Arrays:
    images_path, _, labels_path = argument.partition(",")
    if not argument or Path(images_path).suffix not in (".npy", ".npz") or Path(labels_path).suffix not in ("", ".npy"):
        raise ValueError(f"data: arrays needs a file: arrays:FILE.npy, arrays:FILE.npz or two .npy, got {argument!r}")
    if images_path.endswith(".npz"):
        pixels, labels, owned = _of_npz(expanded(images_path), split)
    else:
        pixels, labels, owned = (
            _load(expanded(images_path)),
            _load(expanded(labels_path)) if labels_path else None,
            False,
        )
    return labelled(_channels_last(pixels, images_path), labels, split, owned, argument)


def labelled(pixels: np.ndarray, labels: np.ndarray | None, split: str, owned: bool, what: str) -> Arrays:
    """The source of a split; `owned` where the arrays are that split, else every fifth image is for the test."""
    if len(pixels) == 0:
        raise ValueError(f"data: {what} holds no images")
    classes = None
    if labels is not None:
        if labels.shape != (len(pixels),) or labels.dtype.kind not in "iu" or labels.min() < 0:
            came = f"{labels.dtype} {list(labels.shape)}"
            raise ValueError(f"data: {what}: labels must be integers ≥ 0 of shape [{len(pixels)}], got {came}")
        classes = numbered(labels, what)
    rows = np.arange(len(pixels))
    if split == "test" and not owned and len(pixels) < 5:
        raise ValueError(f"data: {what} has {len(pixels)} images, and every fifth is the test split: 5 are needed")
    if not owned and (split == "test" or labels is not None):
        rows = rows[4::5] if split == "test" else np.delete(rows, slice(4, None, 5))
    return Arrays(pixels, labels, classes, rows, what)


def of_torchvision(dataset: type, root: str, split: str) -> Arrays:
    """A data set of torchvision's that keeps `data` [N, H, W, C] and `targets`, already on disk."""
    if not root:
        raise ValueError(f"data: {dataset.__name__.lower()} needs a folder: {dataset.__name__.lower()}:PATH")
    try:
        held = dataset(expanded(root), train=split == "train", download=False)
    except RuntimeError as error:
        raise ValueError(f"data: {root}: {dataset.__name__} is not there, or damaged ({error})") from error
    source = labelled(held.data, np.asarray(held.targets), split, True, root)
    source.classes = held.classes
    return source


def _load(path: Path, mapped: bool = True):
    if not path.is_file():
        raise ValueError(f"data: {path} does not exist")
    try:
        found = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"data: {path} is no NumPy file of plain numbers ({error})") from error
    if isinstance(found, np.ndarray) != mapped:
        raise ValueError(f"data: {path} is not what its name says: .npy is one array, .npz several")
    return found


def _of_npz(path: Path, split: str) -> tuple[np.ndarray, np.ndarray | None, bool]:
    with _load(path, mapped=False) as file:
        for images, labels in KEYS[split]:
            if images in file:
                found = file.get(labels)
                return file[images], found, images != "images"
        held = ", ".join(file.files)
    raise ValueError(
        f"data: {path} must hold images (and labels), or x_train, y_train, x_test, y_test; it holds {held}"
    )


def _channels_last(pixels: np.ndarray, what: str) -> np.ndarray:
    fits = pixels.ndim == 3 or (pixels.ndim == 4 and (pixels.shape[3] in (1, 3) or pixels.shape[1] in (1, 3)))
    if pixels.dtype != np.uint8 or not fits:
        wanted = "uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels"
        raise ValueError(f"data: {what}: images must be {wanted}, got {pixels.dtype} {list(pixels.shape)}")
    return pixels if pixels.ndim == 3 or pixels.shape[3] in (1, 3) else np.moveaxis(pixels, 1, 3)
