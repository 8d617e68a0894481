"""`folder:PATH`: images of any size, in class folders or in none, JPEG, PNG, WebP, BMP, TIFF or GIF.

    PATH/cat/1.jpg PATH/dog/2.jpg            classes by the first folder level
    PATH/1.jpg PATH/more/2.jpg               no classes, where images lie in PATH itself
    PATH/train/… PATH/test/… (or val)        split by the owner; else every fifth image is the test split

Without labels there is nothing to hold out for, and a run trains on all images.
"""

import os
from pathlib import Path

from PIL import Image, ImageOps

from .source import BadImage

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
TEST_NAMES = ("test", "val", "validation")


class Folder:
    size = None

    def __init__(self, paths: list[Path], labels: list[int], classes: list[str] | None):
        self._paths, self._labels, self.classes = paths, labels, classes

    def __len__(self) -> int:
        return len(self._paths)

    def label(self, index: int) -> int:
        return self._labels[index]

    def image(self, index: int) -> Image.Image:
        path = self._paths[index]
        try:
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)  # decodes: a truncated file fails here
                if image.mode.startswith("I;16") or image.mode == "I":  # 16-bit grey: keep the high byte
                    image = image.convert("I").point(lambda value: value / 256).convert("L")
                return image.convert("RGB")
        except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on broken files
            raise BadImage(f"{path}: {type(error).__name__}: {error}") from error


def open_split(argument: str, split: str) -> Folder:
    if not argument:
        raise ValueError("data: folder needs a path: folder:PATH")
    root = Path(argument).expanduser()
    if not root.is_dir():
        raise ValueError(f"data: {root} is not a folder")
    owned_test = next((root / name for name in TEST_NAMES if (root / name).is_dir()), None)
    if (root / "train").is_dir() and owned_test:
        paths, labels, classes = _scan(root / "train")
        if split == "test":
            paths, labels, classes = _scan(owned_test, classes)
        return Folder(paths, labels, classes)
    paths, labels, classes = _scan(root)
    if split == "test":
        return Folder(paths[4::5], labels[4::5], classes)
    if classes is not None:  # what is asked at evaluation must not be among the answers
        del paths[4::5], labels[4::5]
    return Folder(paths, labels, classes)


def _scan(root: Path, classes: list[str] | None = None) -> tuple[list[Path], list[int], list[str] | None]:
    """Paths in sorted order, so that index i is the same image on every machine, with their labels."""
    paths = sorted(
        Path(folder, file)
        for folder, _, files in os.walk(root, followlinks=True)
        for file in files
        if Path(file).suffix.lower() in SUFFIXES and not file.startswith(".")
    )
    if not paths:
        raise ValueError(f"data: {root} holds no image ({', '.join(sorted(SUFFIXES))}), not in its subfolders either")
    tops = [path.relative_to(root).parts[0] for path in paths]
    if any(path.parent == root for path in paths) or (classes is None and len(set(tops)) < 2):
        return paths, [-1] * len(paths), None
    classes = sorted(set(tops)) if classes is None else classes
    unknown = sorted(set(tops) - set(classes))
    if unknown:
        raise ValueError(f"data: {root} has the class {unknown[0]!r}, which the training folder lacks")
    return paths, [classes.index(top) for top in tops], classes
