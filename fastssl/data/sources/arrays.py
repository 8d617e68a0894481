"""`arrays:FILE`: images in a NumPy file; a .npy file is memory-mapped.

    arrays:images.npy                 [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1 or 3, without labels
    arrays:images.npy,labels.npy      the same with labels [N], integers
    arrays:data.npz                   arrays images and, optionally, labels; or x_train, y_train, x_test, y_test
    arrays:images.npy::value_range=0..1000    these values become black and white, those beyond are cut off

Values of another dtype than uint8 are scaled by one rule for all images of the file, see `data.values`: that of the
training images if there are several arrays, and of evenly spaced ones if they are more than 64 MiB.

A label of −1 is none: the image trains, and evaluations leave it out. If the file has labels but no test split, a fifth
of each class is held out, see `split.hold_out`.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.text import printable

from ..decoding import MAX_PIXELS
from ..numpy_files import Npz, map_npy
from ..source import Source, class_names, expand_user, split_options
from ..split import describe_labels, hold_out
from ..values import Values, find_ends, find_values, to_bytes

SAMPLE = 2**26  # bytes of images that are searched for their values
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


class ScaledPixels:
    """Images of any dtype, which become bytes when they are read.

    Args:
        pixels: [N, …] booleans, integers or floats.
        values: their range and rule.
    """

    def __init__(self, pixels: np.ndarray, values: Values):
        self.pixels, self.values, self.shape = pixels, values, pixels.shape

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int) -> np.ndarray:
        return to_bytes(self.pixels[row], self.values)


def open_split(argument: str, split: str) -> Arrays:
    paths, options = split_options(argument, {"value_range": None}, "arrays")
    images_path, _, labels_path = paths.partition(",")
    pixels: Any
    if not paths or Path(images_path).suffix not in (".npy", ".npz") or Path(labels_path).suffix not in ("", ".npy"):
        raise ValueError(f"data: arrays needs a file: arrays:FILE.npy, arrays:FILE.npz or two .npy, got {argument!r}")
    if images_path.endswith(".npz"):
        pixels, labels, is_split, searched = _read_npz(expand_user(images_path), split)
    else:
        pixels, is_split = map_npy(expand_user(images_path)), False
        labels, searched = map_npy(expand_user(labels_path)) if labels_path else None, pixels
    pixels = _channels_last(pixels, images_path)
    notes: tuple[str, ...] = ()
    if pixels.dtype != np.uint8 and len(pixels):
        values, note = _choose_values(searched, options.get("value_range"), images_path)
        pixels, notes = ScaledPixels(pixels, values), (note,)
    elif options:
        raise ValueError(f"data: {printable(images_path)}: value_range is for other dtypes than uint8")
    source = make_source(pixels, labels, split, is_split, paths)
    source.notes += notes
    return source


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
    except (RuntimeError, OSError) as error:
        stored = f"it must hold the folder {dataset.base_folder} as torchvision stores it"
        reason = f" ({printable(error.strerror or error)})" if isinstance(error, OSError) else ""
        raise ValueError(f"data: {printable(root)}: {name} is missing or damaged: {stored}{reason}") from error
    source = make_source(data.data, np.asarray(data.targets), split, is_split=True, name=root)
    source.classes = data.classes
    return source


def _read_npz(path: Path, split: str) -> tuple[np.ndarray, np.ndarray | None, bool, np.ndarray]:
    """(images, labels, True if the arrays are the requested split, images whose values give the scale)."""
    with Npz(path) as file:
        for images_key, labels_key in KEYS[split]:
            if images_key not in file.names:
                continue
            images = searched = file.read(images_key)
            if images_key == "x_test" and images.dtype != np.uint8 and "x_train" in file.names:
                searched = file.read("x_train")
            labels = file.read(labels_key) if labels_key in file.names else None
            return images, labels, images_key != "images", searched
        keys = ", ".join(map(printable, file.names))
    raise ValueError(
        f"data: {printable(path)} must hold images (and labels), or x_train, y_train, x_test, y_test; it holds {keys}"
    )


def _channels_last(pixels: np.ndarray, name: str) -> np.ndarray:
    fits = pixels.ndim == 3 or (pixels.ndim == 4 and (pixels.shape[3] in (1, 3) or pixels.shape[1] in (1, 3)))
    if pixels.dtype.kind not in "buif" or not fits:
        expected = "numbers [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels"
        got = f"{pixels.dtype} {list(pixels.shape)}"
        raise ValueError(f"data: {printable(name)}: images must be {expected}, got {got}")
    if pixels.ndim == 4 and pixels.shape[3] not in (1, 3):
        pixels = np.moveaxis(pixels, 1, 3)
    height, width = pixels.shape[1:3]
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(
            f"data: {printable(name)}: images must have 1 to {MAX_PIXELS:,} pixels, got {height} × {width}"
        )
    return pixels


def _choose_values(pixels: np.ndarray, value_range: str | None, name: str) -> tuple[Values, str]:
    """The range and the rule for images [N, …] that are no bytes, and a sentence on them."""
    if value_range is not None:
        low, separator, high = value_range.partition("..")
        try:
            ends = float(low), float(high)
        except ValueError:
            ends = (0.0, 0.0)
        if not (separator and ends[0] < ends[1] and all(map(math.isfinite, ends))):
            raise ValueError(f"data: arrays takes value_range=LOW..HIGH, such as 0..4095, got {value_range!r}")
        return Values(*ends, "own range"), f"values from {low} to {high} are scaled to bytes, others are cut off"
    count = min(len(pixels), max(1, SAMPLE // max(1, pixels[0].nbytes)))
    rows = np.linspace(0, len(pixels) - 1, count).astype(np.int64)
    values = find_values(pixels[rows] if count < len(pixels) else pixels)
    if values is None:
        raise ValueError(f"data: {printable(name)}: images must have finite values, got NaN and infinities alone")
    looked = "" if count == len(pixels) else f" in {count:,} of {len(pixels):,} images; values beyond are cut off"
    found = f"{pixels.dtype} values from {values.low:,.6g} to {values.high:,.6g}{looked}"
    black, white = find_ends(values)
    return values, f"{found}: {black:,.6g} becomes black, {white:,.6g} white (::value_range=LOW..HIGH for other values)"
