"""The fingerprint of a run's images: what it notices, and what it does not depend on."""

import time

import numpy as np
import pytest

from fastssl.data.fingerprint import EXAMINED, describe_changes, read_fingerprint, take_fingerprint
from fastssl.data.source import BadImage


class Named:
    """Images by name; a name is also the image's content, unless `content` has another."""

    size = None

    def __init__(self, names, labels=None, classes=None, shards=None, content=None):
        self.names, self.labels, self.classes, self.shards = list(names), labels, classes, shards
        self.content = content or {}

    def __len__(self):
        return len(self.names)

    def name(self, index):
        return f"/data/{self.names[index]}"

    def identity(self, index):
        return self.names[index]

    def label(self, index):
        return -1 if self.labels is None else self.labels[index]

    def read(self, index):
        content = self.content.get(self.names[index], self.names[index])
        if content is None:
            raise BadImage(f"{self.name(index)}: no image")
        return np.frombuffer(content.encode(errors="surrogateescape"), np.uint8)


def numbered(first, last):
    return [f"{i}.jpg" for i in range(first, last)]


BEFORE = Named(numbered(0, 10))
CHANGES = [
    (BEFORE, Named(numbered(0, 10)), []),
    (BEFORE, Named(numbered(0, 12)), ['2 added ("10.jpg", "11.jpg")']),
    (BEFORE, Named(numbered(5, 10)), ['5 removed ("0.jpg", "1.jpg", "2.jpg", …)']),
    (BEFORE, Named(numbered(1, 11)), ['1 added ("10.jpg")', '1 removed ("0.jpg")']),
    (BEFORE, Named(numbered(20, 23)), ['none of the 3 images ("20.jpg") is one of the 10 before']),
    (BEFORE, Named(numbered(0, 10)[::-1]), ["the same images in another order"]),
    (BEFORE, Named([*numbered(0, 10), "3.jpg"]), ["11 images instead of 10"]),
    (BEFORE, Named(numbered(0, 10), shards=np.array([0, 10])), ["the same images in other shards"]),
    (
        BEFORE,
        Named(numbered(0, 10), content={"4.jpg": "new", "5.jpg": None}),
        ['2 of 10 examined with other content ("4.jpg", "5.jpg")'],
    ),
    (
        Named(numbered(0, 4), [0, 0, 1, -1], ["cat", "dog"]),
        Named(numbered(0, 4), [1, 1, 2, -1], ["ant", "cat", "dog"]),
        [],
    ),
    (
        Named(numbered(0, 4), [0, 0, 1, 1], ["cat", "dog"]),
        Named(numbered(0, 4), [0, 1, 1, -1], ["cat", "dog"]),
        ['2 with another label ("1.jpg", "3.jpg")'],
    ),
    (Named(["a\n\x1b"]), Named(["a\n\x1b", "b\n\x1b", "\udcff"]), ['2 added ("b\\n\\x1b", "\\xff")']),
]


@pytest.mark.parametrize(("before", "after", "changes"), CHANGES)
def test_what_is_noticed(tmp_path, before, after, changes):
    take_fingerprint(before).write(tmp_path / "data.npz")
    found = describe_changes(read_fingerprint(tmp_path / "data.npz"), take_fingerprint(after))
    assert [sorted(phrase) for phrase in found] == [sorted(phrase) for phrase in changes]  # rows come in any order
    assert read_fingerprint(tmp_path / "none.npz") is None


def test_long_names_are_left_out_and_counts_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("fastssl.data.fingerprint.MAX_NAMES", 10)
    take_fingerprint(BEFORE).write(tmp_path / "data.npz")
    found = describe_changes(read_fingerprint(tmp_path / "data.npz"), take_fingerprint(Named(numbered(3, 11))))
    assert found == ['1 added ("10.jpg")', "3 removed"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"garbage"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^data: .*data\.npz, the fingerprint of the run's data, is damaged"):
        read_fingerprint(path)


def test_many_images_take_little_time_and_space(tmp_path):
    source = Named(f"class {i % 1000:04}/{i:08}.jpg" for i in range(50_000))
    start = time.process_time()
    take_fingerprint(source).write(tmp_path / "data.npz")
    assert time.process_time() - start < 2  # 40 s for a million, ten times what it takes
    assert (tmp_path / "data.npz").stat().st_size < 50_000 * 24
    assert len(read_fingerprint(tmp_path / "data.npz").examined) == EXAMINED
