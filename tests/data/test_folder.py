"""How a folder of images is understood: splits, classes, what is passed over, and what is refused."""

import json
import os
import time
from pathlib import Path

import pytest
from PIL import Image

from fastssl.data import formats, listing, reading
from fastssl.data.source import BadImage, open_source
from fastssl.data.split import NOTHING_HELD_OUT
from tests.support.contract import refused


def write(root, *paths):
    """Writes a small image at each path, text where the suffix is no image's, and a folder where it ends in /."""
    for path in map(str, paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith("/"):
            (root / path).mkdir(parents=True, exist_ok=True)
        elif path.lower().endswith(formats.SUFFIXES):
            Image.new("RGB", (4, 4)).save(root / path, "PNG")  # decoded by its content, not by its suffix
        else:
            (root / path).write_text("{}")


def images(*folders, count=5):
    return [f"{name}/{i}.png" for name in folders for i in range(count)]


def opened(root, options=""):
    return [open_source(f"folder:{root}{options}", split) for split in ("train", "test")]


def identities(source):
    return [source.identity(i) for i in range(len(source))]


SPLITS = [  # (training folder, test folder)
    ("train", "valid"),
    ("train", "val"),
    ("train", "validation"),
    ("training", "testing"),
    ("Train", "Test"),
    ("TRAIN", "eval"),
    ("training", "Evaluation"),
]


@pytest.mark.parametrize(("train_name", "test_name"), SPLITS)
def test_names_of_splits(tmp_path, train_name, test_name):
    write(tmp_path, *images(f"{train_name}/cat", f"{train_name}/dog"), *images(f"{test_name}/dog", count=2))
    train, test = opened(tmp_path)
    assert (train.classes, test.classes, len(train), len(test)) == (["cat", "dog"], ["cat", "dog"], 10, 2)
    assert [test.label(i) for i in range(2)] == [1, 1]
    assert train.notes == ()
    assert test.notes == (f"the held-out split {test_name} has no image of the classes cat",)


LOOK_ALIKE = {
    "one known name": ["train", "holdout"],
    "a class named train": ["bus", "car", "train"],
    "a class named test": ["control", "test"],
    "no training split": ["val", "test"],
    "two training splits": ["train", "training", "test"],
    "years": ["train2017", "val2017"],
    "words": ["training_set", "test_set"],
    "abbreviations": ["trn", "tst"],
}


@pytest.mark.parametrize("case", LOOK_ALIKE)
def test_what_looks_like_a_split_is_refused_with_the_way_out(tmp_path, case):
    names = LOOK_ALIKE[case]
    write(tmp_path, *images(*names))
    sentence = (
        f"data: folders of {tmp_path} look like splits, and it is not clear which is which, got "
        f"{', '.join(sorted(names))}: name the training split train and the held-out one test or val, or say what the "
        f"folders are with folder:{tmp_path}::labels=folders (each is a class) or folder:{tmp_path}::labels=none "
        "(train on all images)"
    )
    for split in ("train", "test"):
        refused(sentence, ValueError, open_source, f"folder:{tmp_path}", split)
    assert opened(tmp_path, "::labels=folders")[0].classes == sorted(names)
    train, _ = opened(tmp_path, "::labels=none")
    assert (train.classes, len(train)) == (None, 5 * len(names))


def test_names_that_are_no_splits(tmp_path):
    """Classes whose names only begin like a split, and folders without images."""
    write(tmp_path, *images("trainer", "trolley"), "test/", "val/notes.txt")
    train, test = opened(tmp_path)
    assert train.classes == test.classes == ["trainer", "trolley"]


def test_a_training_folder_alone_is_divided(tmp_path):
    write(tmp_path, *images("train/cat", "train/dog"), "annotations/a.json")
    train, test = opened(tmp_path)
    assert (train.classes, len(train), len(test)) == (["cat", "dog"], 8, 2)


def test_a_test_split_without_class_folders_is_named(tmp_path):
    write(tmp_path, *images("train/cat", "train/dog"), *images("val", count=6))
    train, test = opened(tmp_path)
    assert (train.classes, test.classes, len(test), test.label(0)) == (["cat", "dog"], None, 6, -1)
    assert test.notes == ("val: there are no labels, as the images are in no folder: 6 of 6",)


def test_a_test_split_with_other_folders_has_no_labels(tmp_path):
    write(tmp_path, *images("train/cat", "train/dog", "val/images"))
    _, test = opened(tmp_path)
    assert test.classes is None
    assert test.notes[0] == "val: there are no labels, as the folders are no classes of the training split: images"


def test_of_several_test_splits_one_with_labels_is_taken(tmp_path):
    write(tmp_path, *images("train/cat", "train/dog", "val/cat", "val/dog", "test", "extra"))
    train, test = opened(tmp_path)
    assert (train.classes, test.classes, len(test)) == (["cat", "dog"], ["cat", "dog"], 10)
    assert test.notes == ("beside the splits train and val these are passed over: extra, test",)
    write(tmp_path, "a\n.png", "notes.txt", "runs/x.png", ".hidden.png")
    note = r"beside the splits train and val these are passed over: a\n.png, extra, notes.txt, runs, test"
    assert open_source(f"folder:{tmp_path}", "test").notes == (note,)


def test_an_unknown_class_of_the_test_split_is_refused(tmp_path):
    write(tmp_path, *images("train/cat", "train/dog", "val/cat", "val/cow"))
    sentence = f"data: {tmp_path}/val has the class 'cow', which the training folder lacks"
    refused(sentence, ValueError, open_source, f"folder:{tmp_path}", "test")


def test_stray_images_beside_class_folders_are_passed_over(tmp_path):
    write(tmp_path, *images("cat", "dog"), "thumb.png", "a\n.png", "notes.txt", "cat/more.TXT", "cat/x.heic")
    train, test = opened(tmp_path)
    assert (train.classes, len(train), len(test)) == (["cat", "dog"], 8, 2)
    assert train.notes[0] == r"images in no class folder are passed over, 2: a\n.png, thumb.png"
    assert train.notes[1].startswith("files passed over: 2 .txt, 1 .heic")


def test_images_mostly_in_the_folder_itself_have_no_labels(tmp_path):
    write(tmp_path, *(f"{i}.png" for i in range(30)), *images("more", "others"))
    train, _ = opened(tmp_path)
    assert (train.classes, len(train)) == (None, 40)
    assert train.notes == ("there are no labels, as most images are in no folder: 30 of 40", NOTHING_HELD_OUT)


def test_one_folder_has_no_labels(tmp_path):
    write(tmp_path, *images("photos/cat", "photos/dog"))
    train, _ = opened(tmp_path)
    reason = "there are no labels, as only one folder has images: photos"
    assert (train.classes, train.notes) == (None, (reason, NOTHING_HELD_OUT))


def test_folders_that_are_no_classes(tmp_path):
    write(tmp_path, *images("2024-01-01", "2024-01-02"))
    train, test = opened(tmp_path, "::labels=none")
    assert (train.classes, len(train), train.label(3), test.classes) == (None, 10, -1, None)
    write(tmp_path / "split", *images("train/2024", "train/2025", "test/2026"))
    train, test = opened(tmp_path / "split", "::labels=none")
    assert (train.classes, test.classes, len(train), len(test)) == (None, None, 10, 5)
    sentence = (
        "data: folder takes the options labels=none|folders after ::, got 'labels=dates' (a path with :: in it ends "
        "with ::)"
    )
    refused(sentence, ValueError, open_source, f"folder:{tmp_path}::labels=dates")


def test_a_path_with_colons(tmp_path):
    write(tmp_path / "a::b", *images("cat", "dog"))
    assert open_source(f"folder:{tmp_path}/a::b::").classes == ["cat", "dog"]


def test_folders_and_pictures_that_fastssl_wrote_are_no_classes(tmp_path):
    """The default folder of runs, a run anywhere below, and the picture that `data show` writes."""
    write(tmp_path, *images("cat", "dog"), "runs/preview.png", "runs/mae/config.json", "runs/mae/x.png")
    write(tmp_path, "cat/run/config.json", "cat/run/metrics.jsonl", "cat/run/x.png")
    write(tmp_path, "moco/config.json", "moco/checkpoints/", "moco/x.png", "fastssl-views.png")
    train, test = opened(tmp_path)
    assert (train.classes, len(train) + len(test)) == (["cat", "dog"], 10)
    assert train.notes == (
        "files passed over: 1 fastssl-*",
        "folders that fastssl wrote are passed over: cat/run, moco, runs",
    )


def test_a_class_without_a_readable_image_is_named(tmp_path):
    write(tmp_path, *images("cat", "dog"), "owl/a.xcf", "owl/b.xcf", "cow/")
    train, _ = opened(tmp_path)
    assert train.classes == ["cat", "dog"]
    assert train.notes[0] == "folders without an image that can be read here are no classes: cow (empty), owl (2 .xcf)"
    write(tmp_path / "none", "a/x.xcf")
    with pytest.raises(ValueError, match=r"nor do its subfolders; files passed over: 1 \.xcf$"):
        open_source(f"folder:{tmp_path / 'none'}")


@pytest.mark.parametrize("suffix", formats.SUFFIXES)
def test_every_suffix_that_pillow_can_read_is_an_image(tmp_path, suffix):
    write(tmp_path, f"a/x{suffix}", f"b/X{suffix.upper()}")
    assert open_source(f"folder:{tmp_path}").classes == ["a", "b"]


def test_formats_are_those_that_pillow_decodes(monkeypatch):
    """A plug-in for HEIF counts once it is registered; decoders that start programs never do."""
    monkeypatch.setattr(Image, "OPEN", {name: Image.OPEN[name] for name in ("PNG", "JPEG")})
    assert formats.find_readable() == ("JPEG", "PNG")
    monkeypatch.setitem(Image.OPEN, "HEIF", (None, None))
    assert formats.find_readable() == ("JPEG", "PNG", "HEIF")
    assert not {"EPS", "PDF", "WMF", "PSD"} & {*formats.FORMATS}
    monkeypatch.setattr(formats.features, "check", lambda library: False)
    monkeypatch.setitem(Image.OPEN, "AVIF", (None, None))
    assert "AVIF" not in formats.find_readable()


def test_what_a_missing_decoder_would_read_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "SUFFIXES", (".png",))
    write(tmp_path, *images("cat", "dog"), "cat/a.heic")
    passed = "files passed over: 1 .heic (HEIF: the package pillow-heif decodes it)"
    assert open_source(f"folder:{tmp_path}").notes == (passed,)


@pytest.mark.parametrize("kind", ["link to a pipe", "became a pipe", "became a folder", "device", "sparse"])
def test_only_regular_files_are_read(tmp_path, kind):
    """Neither waits for the writer of a pipe nor fills the memory."""
    write(tmp_path, "x.png")
    path = tmp_path / "x.png"
    source = open_source(f"folder:{tmp_path}")
    path.unlink()
    if kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
        source = open_source(f"folder:{tmp_path}")
    elif kind == "became a pipe":
        os.mkfifo(path)
    elif kind == "became a folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(reading.MAX_IMAGE_BYTES + 1)
    most = "2,147,483,649 bytes are more than 2,147,483,648, the most of an image"
    reasons = {"sparse": most, "became a folder": "Is a directory"}
    with pytest.raises(BadImage, match=f"^{path}: {reasons.get(kind, 'not a regular file')}$"):
        source.read(0)


def settle(root):
    """Sets the times of all folders to a minute ago: a folder that has just changed is not cached."""
    for path in [root, *root.rglob("*")]:
        if path.is_dir():
            os.utime(path, (time.time() - 60,) * 2)


DOCTORED = {
    "parent": lambda cached: cached["paths"].append("../secret/x.png"),
    "parent inside": lambda cached: cached["paths"].append("cat/../../secret/x.png"),
    "parent at the end": lambda cached: cached["paths"].append("cat/.."),
    "absolute": lambda cached: cached["paths"].append("/etc/passwd"),
    "zero byte": lambda cached: cached["paths"].append("cat/0.png\0x"),
    "number": lambda cached: cached["paths"].append(7),
    "folder outside": lambda cached: cached["folders"].update({"..": [0, 0, 0, 0]}),
    "no list": lambda cached: cached.update(paths={"a": 1}, tops=7),
    "counts": lambda cached: cached["others"].update({"cat": {".txt": "many"}}),
    "nested": lambda cached: cached.update(others=[[]]),
    "other formats": lambda cached: cached.update(suffixes=[".png"]),
}


@pytest.mark.parametrize("change", DOCTORED)
def test_a_cache_that_was_edited_is_not_used(tmp_path, monkeypatch, change):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    write(tmp_path, *images("data/cat", "data/dog"), "secret/x.png")
    settle(tmp_path / "data")
    expected = identities(open_source(f"folder:{tmp_path}/data"))
    (cache,) = (tmp_path / "home" / "fastssl").iterdir()
    content = json.loads(cache.read_text())
    DOCTORED[change](content)
    cache.write_text(json.dumps(content))
    assert identities(open_source(f"folder:{tmp_path}/data")) == expected


@pytest.mark.parametrize("content", ["[" * 100_000, None, "{}"])
def test_a_cache_that_cannot_be_read(tmp_path, monkeypatch, content):
    """Nested without end, a pipe, or 64 GB of nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    write(tmp_path, *images("data/cat", "data/dog"))
    settle(tmp_path / "data")
    expected = identities(open_source(f"folder:{tmp_path}/data"))
    (cache,) = (tmp_path / "home" / "fastssl").iterdir()
    cache.unlink()
    cache.write_text(content) if content else os.mkfifo(cache)
    if content == "{}":
        os.truncate(cache, 64 * 2**30)
    assert identities(open_source(f"folder:{tmp_path}/data")) == expected


def test_the_cache_keeps_what_was_passed_over(tmp_path, monkeypatch):
    write(
        tmp_path,
        *images("cat", "dog"),
        "cat/a.txt",
        "thumb.png",
        "cow/",
        "cat/run/config.json",
        "cat/run/metrics.jsonl",
    )
    settle(tmp_path)
    first = open_source(f"folder:{tmp_path}")
    monkeypatch.setattr(listing, "_walk", None)  # a second walk would fail
    second = open_source(f"folder:{tmp_path}")
    assert (second.notes, identities(second)) == (first.notes, identities(first))
    assert len(first.notes) == 4


def test_a_run_that_writes_its_folder_does_not_change_the_list(tmp_path, monkeypatch):
    write(tmp_path, *images("cat", "dog"), "runs/mae/config.json")
    settle(tmp_path)
    open_source(f"folder:{tmp_path}")
    write(tmp_path, "runs/mae/x.png", "runs/y.png")
    monkeypatch.setattr(listing, "_walk", None)
    assert open_source(f"folder:{tmp_path}").classes == ["cat", "dog"]


def test_identities_do_not_depend_on_the_place(tmp_path):
    write(tmp_path / "a", *images("cat", "dog"))
    (tmp_path / "b").mkdir()
    (tmp_path / "a").rename(tmp_path / "b" / "c")
    source = open_source(f"folder:{tmp_path}/b/c")
    assert all((tmp_path / "b" / "c" / name).is_file() for name in identities(source))
    assert not any(Path(name).is_absolute() for name in identities(source))


def test_a_link_to_itself_is_a_bad_image(tmp_path):
    write(tmp_path, *images("cat", "dog"))
    for path in ("cat/loop.png", "loop", "loop.txt"):
        (tmp_path / path).symlink_to(tmp_path / path)
    everything, _ = opened(tmp_path, "::labels=none")
    loop = f"{tmp_path}/cat/loop.png"
    number = [everything.name(number) for number in range(len(everything))].index(loop)
    refused(f"{loop}: Too many levels of symbolic links", BadImage, everything.read, number)
    source = open_source(f"folder:{tmp_path}")
    assert source.classes == ["cat", "dog"]
    assert source.notes == ("files passed over: 1 .txt, 1 without a suffix",)


def test_splits_without_an_image_get_a_sentence(tmp_path):
    write(tmp_path, "train2017/a.txt", "val2017/b.txt")
    with pytest.raises(ValueError, match=r"^data: .* holds no image \(.* nor do its subfolders; files passed over: 2"):
        open_source(f"folder:{tmp_path}")
