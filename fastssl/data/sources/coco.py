"""`coco:PATH`: photographs with several captions each, in the layout of COCO.

    coco:PATH                                     annotations/captions_train2017.json and captions_val2017.json
    coco:annotations/captions_val2017.json        one file, of whose images a fifth is held out
    coco:FILE.json::images=FOLDER                 images in another folder than the one after which the file is named

FOLDER is relative to the file's. Images without a caption are left out, and a note says so.
"""

import json
import re
from pathlib import Path
from typing import Any

from fastssl.text import listed, printable

from ..captioned import CaptionedFiles, open_files, read_text
from ..source import expand_user, split_options
from ..split import TEST_NAMES, TRAIN_NAMES

NAME = re.compile(r"captions_(.+)\.json")


def open_split(argument: str, split: str) -> CaptionedFiles:
    if not argument:
        raise ValueError("data: coco needs a folder or a file of captions: coco:PATH")
    name, options = split_options(argument, {"images": None}, "coco")
    path, is_split = expand_user(name), False
    if path.is_dir():
        path, is_split = _file_of_split(path, split), True
    folder = path.parent / expand_user(options["images"]) if "images" in options else _image_folder(path)
    if not folder.is_dir():
        raise ValueError(f"data: {printable(folder)}, the folder of the images of {printable(path)}, does not exist")
    captions = _read_captions(path)
    return open_files(folder, captions, None if is_split else split, f"coco:{printable(path)}")


def _file_of_split(root: Path, split: str) -> Path:
    """The file of captions of a split.

    Raises:
        ValueError: not exactly one file is named after each split.
    """
    files = sorted((root / "annotations").glob("captions_*.json")) or sorted(root.glob("captions_*.json"))
    names = TRAIN_NAMES if split == "train" else TEST_NAMES
    words = {file: re.findall(r"[a-z]+", file.stem.lower().removeprefix("captions_"))[:1] for file in files}
    found = [file for file in files if words[file] and words[file][0] in names]
    if len(found) != 1:
        got = listed([file.name for file in files]) if files else "none"
        wanted = f"annotations/captions_{'train' if split == 'train' else 'val'}*.json"
        raise ValueError(f"data: {printable(root)} must have one {wanted}, got {got}: name one (coco:FILE.json)")
    return found[0]


def _image_folder(path: Path) -> Path:
    """The folder with the name of a file of captions, beside it or beside its folder."""
    match = NAME.fullmatch(path.name)
    name = match[1] if match else path.stem
    places = (path.parent.parent / name, path.parent / name, path.parent.parent / "images" / name)
    if found := [place for place in places if place.is_dir()]:
        return found[0]
    if not path.exists():
        raise ValueError(f"data: {printable(path)} does not exist")
    raise ValueError(
        f"data: the images of {printable(path)} must lie in a folder {printable(name)} beside it or above: name it "
        f"(coco:FILE.json::images=FOLDER)"
    )


def _read_captions(path: Path) -> dict[str, list[Any]]:
    """{name of an image: its captions}, images without captions too.

    Raises:
        ValueError: the file is no JSON with COCO's images and annotations.
    """
    try:
        content = json.loads(read_text(path))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        if not all(isinstance(name, str) for name in names.values()):
            raise TypeError("a file_name that is no text")
        captions: dict[str, list[Any]] = {name: [] for name in names.values()}
        for annotation in content["annotations"]:
            captions[names[annotation["image_id"]]].append(annotation.get("caption"))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, RecursionError) as error:
        reason = printable(f"{type(error).__name__}: {error}"[:200])
        raise ValueError(
            f"data: {printable(path)} must be COCO's JSON with images (id, file_name) and annotations (image_id, "
            f"caption) ({reason})"
        ) from error
    return captions
