"""Sources that read files: their caches of folders and shards, and their errors for broken files."""

import functools
import http.server
import io
import os
import pickle
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from fastssl.data import listing
from fastssl.data.decoding import open_image
from fastssl.data.loader import Loader
from fastssl.data.source import BadImage, Strings, open_source
from fastssl.data.sources import webdataset
from tests.support.contract import refused
from tests.support.loaders import engines, indices, plain

RANDOM = np.random.default_rng(0)


def jpeg(shape=(12, 20, 3)):
    file = io.BytesIO()
    Image.fromarray(RANDOM.integers(0, 256, shape, dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def settle(root):
    """Sets the times of all folders to a minute ago: a folder that has just changed is not cached."""
    minute_ago = time.time() - 60
    for path in [root, *root.rglob("*")]:
        if path.is_dir():
            os.utime(path, (minute_ago, minute_ago))


@pytest.fixture
def classes(tmp_path):
    root = tmp_path / "data"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(5):
            (root / name / f"{i}.jpg").write_bytes(jpeg())
    settle(root)
    return root


def names(source):
    return [Path(source.name(i)).name for i in range(len(source))]


def test_a_folder_is_walked_once(classes, monkeypatch):
    first = open_source(f"folder:{classes}")
    monkeypatch.setattr(listing, "_walk", None)  # a second walk would fail
    second = open_source(f"folder:{classes}")
    assert names(first) == names(second)
    assert [first.label(i) for i in range(8)] == [second.label(i) for i in range(8)] == [0] * 4 + [1] * 4


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "folder added", "folder removed"])
def test_a_changed_folder_is_walked_again(classes, change):
    before = len(open_source(f"folder:{classes}")) + len(open_source(f"folder:{classes}", "test"))
    if change == "added":
        (classes / "cat" / "new.jpg").write_bytes(jpeg())
    elif change == "removed":
        (classes / "dog" / "0.jpg").unlink()
    elif change == "renamed":
        (classes / "dog" / "0.jpg").rename(classes / "dog" / "z.jpg")
    elif change == "folder added":
        (classes / "fox").mkdir()
        (classes / "fox" / "0.jpg").write_bytes(jpeg())
    else:
        for path in (classes / "dog").iterdir():
            path.unlink()
        (classes / "dog").rmdir()
        (classes / "cow").mkdir()
        (classes / "cow" / "0.jpg").write_bytes(jpeg())
    source, test = (open_source(f"folder:{classes}", split) for split in ("train", "test"))
    expected = {"added": 1, "removed": -1, "renamed": 0, "folder added": 1, "folder removed": -4}[change]
    assert len(source) + len(test) == before + expected
    if change == "renamed":
        assert "z.jpg" in names(source) + names(test)
    if change.startswith("folder"):
        assert source.classes == {"folder added": ["cat", "dog", "fox"], "folder removed": ["cat", "cow"]}[change]


def test_a_folder_that_has_just_changed_is_not_cached(tmp_path):
    """A file added in the same tick of the clock would not change the folder's time."""
    (tmp_path / "x.jpg").write_bytes(jpeg())
    before = set(Path(os.environ["XDG_CACHE_HOME"]).rglob("*"))
    open_source(f"folder:{tmp_path}")
    assert set(Path(os.environ["XDG_CACHE_HOME"]).rglob("*")) == before


def test_a_damaged_or_forbidden_cache_is_replaced_by_a_walk(classes, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    first = names(open_source(f"folder:{classes}"))
    (cached,) = (tmp_path / "home" / "fastssl").iterdir()
    for content in ("", "{", "[]", '{"folders": {}}'):
        cached.write_text(content)
        assert names(open_source(f"folder:{classes}")) == first
    monkeypatch.setenv("XDG_CACHE_HOME", str(cached))  # a file, not a folder
    assert names(open_source(f"folder:{classes}")) == first


def test_links_to_parents_and_names_that_are_no_text(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    (tmp_path / "gone").symlink_to("nowhere")
    name = os.fsdecode(b"\xff\xfe.jpg")
    (tmp_path / "a" / name).write_bytes(jpeg())
    (tmp_path / "a" / "Ünïcode 日本.JPEG").write_bytes(jpeg())
    settle(tmp_path)
    for _ in range(2):
        source = open_source(f"folder:{tmp_path}")
        assert sorted(names(source)) == sorted([name, "Ünïcode 日本.JPEG"])
        assert all(open_image(source, i).pixels().shape == (3, 12, 20) for i in range(2))


def test_a_change_is_noticed_although_its_time_was_set_back(classes):
    """Archives and file system images may give all files one time."""
    first = names(open_source(f"folder:{classes}"))
    before = os.stat(classes / "cat")
    (classes / "cat" / "new.jpg").write_bytes(jpeg())
    os.utime(classes / "cat", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(open_source(f"folder:{classes}")) + 2 == len(first) + 3


def test_hidden_folders_pipes_and_links(tmp_path):
    """Hidden folders are no classes, pipes are no images, and a link to a folder is a class."""
    for name in ("a", "b", ".ipynb_checkpoints"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "data" / name / f"{i}.jpg").write_bytes(jpeg())
    os.mkfifo(tmp_path / "data" / "a" / "pipe.jpg")
    (tmp_path / "data" / "z").symlink_to(tmp_path / "data" / "a")
    source = open_source(f"folder:{tmp_path / 'data'}")
    assert source.classes == ["a", "b", "z"]
    assert len(source) == 9 - 3


def test_too_few_images_for_a_test_split(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes(jpeg())
    refused(
        f"data: {tmp_path} must have a class with two labelled images or more, as a fifth of each class is held out "
        "for evaluation, got 2 images without such a class: use it without labels, or give it a test split of its own",
        ValueError,
        open_source,
        f"folder:{tmp_path}",
        "test",
    )
    assert len(open_source(f"folder:{tmp_path}::labels=none", "test")) == 1


def test_a_user_without_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
    (tmp_path / "x.jpg").write_bytes(jpeg())
    settle(tmp_path)
    assert len(open_source(f"folder:{tmp_path}")) == 1
    with pytest.raises(ValueError, match=r"^data: ~nobody-here/x: "):
        open_source("folder:~nobody-here/x")


def test_strings_equal_the_list():
    expected = ["", "a", "Ünï", os.fsdecode(b"\xff")]
    strings = Strings(expected)
    assert [strings[i] for i in range(4)] == expected
    assert len(strings) == 4
    assert [pickle.loads(pickle.dumps(strings))[i] for i in range(4)] == expected


def shard(path, samples):
    """Writes a tar file of {member name: bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def samples(first, count, labelled=True):
    members = {}
    for i in range(first, first + count):
        members[f"a/b.c/{i:04d}.jpg"] = jpeg()  # the dot in the folder starts no suffix
        if labelled:
            members[f"a/b.c/{i:04d}.cls"] = str(i % 3).encode()
        members[f"a/b.c/{i:04d}.json"] = b"{}"
    return members


@pytest.fixture
def shards(tmp_path):
    """A folder of three shards, and the data of each image in them."""
    members = {}
    for number, count in enumerate((4, 7, 1)):
        of_shard = samples(10 * number, count)
        shard(tmp_path / "shards" / f"s-{number:02d}.tar", of_shard)
        members |= of_shard
    return tmp_path / "shards", {name: data for name, data in members.items() if name.endswith("jpg")}


@pytest.mark.parametrize("pattern", ["", "/s-{00..02}.tar", "/s-0{0,1,2}.tar"])
def test_shards_give_their_images_and_labels(shards, pattern):
    root, images = shards
    splits = [open_source(f"webdataset:{root}{pattern}", split) for split in ("train", "test")]
    assert [len(split) for split in splits] == [9, 3]
    seen = {}
    for split in splits:
        assert (split.classes, split.size) == (["0", "1", "2"], None)
        for i in range(len(split)):
            path, _, name = split.name(i).partition(": ")
            assert Path(path).is_file()
            assert split.read(i).tobytes() == images[name]
            assert split.label(i) == int(name[-8:-4]) % 3
            seen[name] = open_image(split, i).pixels().shape
    assert set(seen) == set(images)
    assert set(seen.values()) == {(3, 12, 20)}


def test_shards_follow_each_other_in_the_source(shards):
    source = open_source(f"webdataset:{shards[0]}")
    assert source.shards.tolist() == [0, 4, 8, 9]
    for number, (first, end) in enumerate(zip(source.shards, source.shards[1:])):
        assert all(f"s-{number:02d}.tar" in source.name(i) for i in range(first, end))


@engines
@pytest.mark.parametrize("workers", [0, 2])
def test_three_ranks_divide_the_shards(shards, engine, workers):
    source = open_source(f"webdataset:{shards[0]}")
    seen = [
        set(indices(Loader(source, plain((8, 8)), 1, rank=r, world=3, engine=engine, workers=workers), 2))
        for r in range(3)
    ]
    assert [len(part) for part in seen] == [3, 3, 3]
    assert len(set.union(*seen)) == 9


def test_shards_with_a_split_and_without_labels(tmp_path):
    shard(tmp_path / "train-0.tar", samples(0, 6))
    shard(tmp_path / "val-0.tar", samples(6, 3))
    assert [len(open_source(f"webdataset:{tmp_path}", split)) for split in ("train", "test")] == [6, 3]
    shard(tmp_path / "plain" / "x.tar", samples(0, 5, labelled=False))
    source = open_source(f"webdataset:{tmp_path}/plain")
    assert (len(source), source.classes, source.label(0)) == (5, None, -1)


def test_the_index_of_a_shard_is_cached_until_it_changes(shards, monkeypatch):
    path = f"webdataset:{shards[0]}/s-00.tar"
    assert len(open_source(path)) == 3
    with monkeypatch.context() as patched:
        patched.setattr(webdataset, "_scan", None)
        assert len(open_source(path)) == 3
    shard(shards[0] / "s-00.tar", samples(0, 9))
    assert len(open_source(path)) == 6


def test_a_shard_truncated_after_it_was_indexed_has_bad_images(shards):
    path = shards[0] / "s-00.tar"
    source = open_source(f"webdataset:{path}")
    data = path.read_bytes()
    path.write_bytes(data[:3000])
    with pytest.raises(BadImage, match=r"s-00\.tar: .*\.jpg: the shard ends before the image does"):
        source.read(2)
    path.unlink()
    with pytest.raises(BadImage, match=r"s-00\.tar: .*\.jpg: No such file"):
        source.read(0)


def test_remote_shards_are_downloaded_once(shards):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(shards[0]))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"webdataset:http://127.0.0.1:{server.server_port}/s-{{00..02}}.tar"
    assert len(open_source(address)) == 9
    server.shutdown()
    server.server_close()
    assert open_image(open_source(address), 0).pixels().shape == (3, 12, 20)


def test_an_incomplete_download_is_not_kept(shards):
    data = (shards[0] / "s-01.tar").read_bytes()
    ends = [len(data) // 2, len(data)]

    class HalfWay(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: ends.pop(0)])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HalfWay)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/s-01.tar"
    with pytest.raises(ValueError, match=r"^data: http.* ended after .* bytes: try again$"):
        open_source(f"webdataset:{address}")
    assert len(open_source(f"webdataset:{address}")) == 4
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("damage", ["header", "cut"])
def test_a_damaged_shard_is_refused(tmp_path, damage):
    path = tmp_path / "x.tar"
    shard(path, samples(0, 6))
    with tarfile.open(path) as tar:
        fourth = tar.getmembers()[9].offset
    data = bytearray(path.read_bytes())
    if damage == "header":
        data[fourth + 150] ^= 0xFF
    path.write_bytes(data if damage == "header" else data[:fourth])
    with pytest.raises(ValueError, match=rf"^data: .*x\.tar is damaged or truncated at byte {fourth:,}$"):
        open_source(f"webdataset:{path}")


def test_split_names_are_whole_words_of_a_shard_s_name(tmp_path):
    for name in ("retrieval-train-0", "latest-train-1"):
        shard(tmp_path / f"{name}.tar", samples(0, 5))
    train, test = (open_source(f"webdataset:{tmp_path}", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (7, 3)
    shard(tmp_path / "imagenet_val_0.tar", samples(0, 3))
    assert [len(open_source(f"webdataset:{tmp_path}", split)) for split in ("train", "test")] == [10, 3]
    shard(tmp_path / "extra.tar", samples(0, 3))
    with pytest.raises(ValueError, match=r"^data: .*extra\.tar is neither named train nor test"):
        open_source(f"webdataset:{tmp_path}")


def test_members_of_all_kinds(tmp_path):
    """Hard links, upper case, names without a folder; a second image of a sample is passed over and named."""
    one, two = jpeg(), jpeg()
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (
            ("./a.JPG", one),
            ("./a.CLS", b"2"),
            ("./a.seg.png", two),
            ("b" * 150 + ".jpg", two),
            ("b" * 150 + ".cls", b" 1\n"),
            ("folder/", b""),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            tar.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo("./c.jpg")
        info.type, info.linkname = tarfile.LNKTYPE, "./a.JPG"
        tar.addfile(info)
        info = tarfile.TarInfo("./c.cls")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"0"))
    for _ in range(2):  # also from the cached index
        source = open_source(f"webdataset:{path}")
        (note,) = source.notes[:1]
        assert note.startswith("images are the members .jpg (3); passed over: .seg.png (1)")
    assert [source.read(i).tobytes() for i in range(3)] == [one, two, one]
    assert [source.label(i) for i in range(3)] == [2, 1, 0]


def test_error_sentences_of_shards(tmp_path):
    refused(
        "data: webdataset needs shards: webdataset:PATH or webdataset:PATH/train-{000..146}.tar",
        ValueError,
        open_source,
        "webdataset",
    )
    refused(f"data: {tmp_path} holds no *.tar", ValueError, open_source, f"webdataset:{tmp_path}")
    refused(
        f"data: {tmp_path}/x-1.tar does not exist", ValueError, open_source, f"webdataset:{tmp_path}/x-{{1..3}}.tar"
    )
    (tmp_path / "no.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(ValueError, match=r"^data: .*no\.tar is no tar file, or is compressed or truncated"):
        open_source(f"webdataset:{tmp_path}/no.tar")
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    with pytest.raises(ValueError, match=r"^data: .*z\.tar is no tar file, or is compressed or truncated"):
        open_source(f"webdataset:{tmp_path}/z.tar")
    shard(tmp_path / "text.tar", {"a.txt": b"x"})
    with pytest.raises(ValueError, match=r"^data: .*text\.tar must have members with the suffix of an image"):
        open_source(f"webdataset:{tmp_path}/text.tar")
    shard(tmp_path / "label.tar", {"a.jpg": jpeg(), "a.cls": b"cat"})
    with pytest.raises(ValueError, match=r"^data: .*label\.tar: a\.cls must hold .* or -1 for no label, got 'cat'$"):
        open_source(f"webdataset:{tmp_path}/label.tar")
    for label in (b"-2", b"1000000", b"99999999999999999999"):
        shard(tmp_path / "label.tar", {"a.jpg": jpeg(), "a.cls": label})
        with pytest.raises(
            ValueError, match=r"a\.cls must hold the number of a class from 0 to 999,999, or -1 for no label, got"
        ):
            open_source(f"webdataset:{tmp_path}/label.tar")


@pytest.mark.parametrize("dataset", [CIFAR10, CIFAR100])
def test_cifar_in_the_layout_of_torchvision(tmp_path, monkeypatch, dataset):
    """Files of that layout with few images; their checksums are not compared."""
    name, key = dataset.__name__.lower(), "fine_labels" if dataset is CIFAR100 else "labels"
    root = tmp_path / dataset.base_folder
    root.mkdir()
    pixels = RANDOM.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    content = {"data": pixels.reshape(4, -1), key: [0, 1, 2, 1]}
    for file, _ in dataset.train_list + dataset.test_list:
        (root / file).write_bytes(pickle.dumps(content))
    (root / dataset.meta["filename"]).write_bytes(pickle.dumps({dataset.meta["key"]: ["ant", "bee", "cat"]}))
    sentence = (  # torchvision's own proposes download=True, which nobody can give here
        f"data: {tmp_path}: {dataset.__name__} is missing or damaged: it must hold the folder {dataset.base_folder} as "
        "torchvision stores it"
    )
    refused(sentence, ValueError, open_source, f"{name}:{tmp_path}")
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: Path(path).is_file())
    train, test = (open_source(f"{name}:{tmp_path}", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (4 * len(dataset.train_list), 4)
    assert (train.classes, train.size, train.label(1)) == (["ant", "bee", "cat"], (32, 32), 1)
    assert np.array_equal(open_image(test, 2).pixels().numpy(), pixels[2])
    refused(f"data: {name} needs a folder: {name}:PATH", ValueError, open_source, name)


def test_shards_without_some_labels(tmp_path):
    """A missing .cls and one of −1 are no label: such images train, and none of the other labels is lost."""
    members = samples(0, 20)
    del members["a/b.c/0004.cls"]
    members["a/b.c/0005.cls"] = b"-1\n"
    shard(tmp_path / "x.tar", members)
    train, test = (open_source(f"webdataset:{tmp_path}/x.tar", split) for split in ("train", "test"))
    of_train, of_test = ([source.label(i) for i in range(len(source))] for source in (train, test))
    assert (train.classes, of_train.count(-1), len(of_train)) == (["0", "1", "2"], 2, 17)
    assert sorted(of_test) == [0, 1, 2]
    assert "2 of 20 images have no label: they train, and evaluations leave them out" in train.notes


def test_identities_of_shards_do_not_depend_on_the_place(tmp_path):
    """Nor on which image of a sample is taken."""
    shard(tmp_path / "a" / "x.tar", samples(0, 6))
    held_out = open_source(f"webdataset:{tmp_path}/a", "test")
    (tmp_path / "a").rename(tmp_path / "b")
    moved = open_source(f"webdataset:{tmp_path}/b", "test")
    assert [moved.identity(i) for i in range(3)] == [held_out.identity(i) for i in range(3)]
    assert moved.identity(0).startswith("x.tar: a/b.c/000")
    assert not moved.identity(0).endswith("jpg")


@pytest.mark.parametrize(
    ("train", "test"), [("training-0", "valid-0"), ("TRAIN_0", "testing_0"), ("x-train", "x-eval")]
)
def test_more_words_for_splits_of_shards(tmp_path, train, test):
    shard(tmp_path / f"{train}.tar", samples(0, 6))
    shard(tmp_path / f"{test}.tar", samples(6, 3))
    assert [len(open_source(f"webdataset:{tmp_path}", split)) for split in ("train", "test")] == [6, 3]


def test_shards_beside_a_split_that_have_no_word_are_refused(tmp_path):
    shard(tmp_path / "train-0.tar", samples(0, 6))
    shard(tmp_path / "holdout-0.tar", samples(6, 3))
    with pytest.raises(ValueError, match=r"^data: .*holdout-0\.tar is neither named train nor test"):
        open_source(f"webdataset:{tmp_path}")
