"""Arrays that a source gives beside the image, and sources from outside the package."""

import os

import numpy as np
import pytest
import torch

from fastssl.data.findings import scan
from fastssl.data.loader import Loader
from fastssl.data.source import BadImage, Subset, open_source
from tests.data.test_loader import Numbers
from tests.support.contract import refused
from tests.support.loaders import digest, engines, plain


def tokens_of(index):
    return np.arange(5, dtype=np.int64) * 1000 + index


def depth_of(index):
    return np.full((2, 3), index / 7, dtype=np.float32)


class Captioned(Numbers):
    """`Numbers` with token ids and a depth map; those of the images in `unreadable` can't be read."""

    def __init__(self, count, bad=(), encoded=False, unreadable=()):
        super().__init__(count, bad, encoded)
        self.unreadable = set(unreadable)

    def extras(self, index):
        if index in self.unreadable:
            raise BadImage(f"image {index}: no depth map")
        return {"tokens": tokens_of(index), "depth": depth_of(index), "night": np.array(index % 2 == 0)}


class Wrong(Numbers):
    """`Numbers` with the extras that a function gives."""

    def __init__(self, count, function):
        super().__init__(count)
        self.extras = function


def check(batch):
    """Extras are those of the batch's images, with their dtypes."""
    assert batch.extras.keys() == {"tokens", "depth", "night"}
    indices = batch.index.tolist()
    assert torch.equal(batch.extras["tokens"], torch.from_numpy(np.stack([tokens_of(i) for i in indices])))
    assert torch.equal(batch.extras["depth"], torch.from_numpy(np.stack([depth_of(i) for i in indices])))
    assert torch.equal(batch.extras["night"], batch.index % 2 == 0)
    dtypes = [batch.extras[key].dtype for key in ("tokens", "depth", "night")]
    assert dtypes == [torch.int64, torch.float32, torch.bool]


@pytest.mark.parametrize("train", [True, False], ids=["train", "evaluation"])
@pytest.mark.parametrize("encoded", [False, True], ids=["pixels", "files"])
@pytest.mark.parametrize("workers", [0, 2])
@engines
def test_extras_reach_the_batch_unchanged(engine, workers, encoded, train):
    loader = Loader(Captioned(22, encoded=encoded), plain((8, 8)), 4, workers=workers, engine=engine, train=train)
    for epoch in (0, 1):
        batches = list(loader.epoch(epoch))
        assert len(batches) == (5 if train else 6)
        for batch in batches:
            check(batch)


@pytest.mark.parametrize("encoded", [False, True], ids=["pixels", "files"])
@pytest.mark.parametrize("workers", [0, 2])
@engines
def test_an_image_that_fills_in_brings_its_own_extras(engine, workers, encoded):
    """Images 3 and 11 can't be decoded, the extras of 6 can't be read: all three are bad."""
    source = Captioned(24, bad=[3, 11], encoded=encoded, unreadable=[6])
    loader = Loader(source, plain((8, 8)), 8, workers=workers, engine=engine, max_bad=1.0)
    for batch in loader.epoch(0):
        assert len(batch.index) == 8
        assert not {3, 6, 11} & set(batch.index.tolist())
        check(batch)
    assert loader.bad_count == 3


@engines
def test_evaluation_leaves_bad_images_out_with_their_extras(engine):
    source = Captioned(10, bad=[0, 1, 5], encoded=True)
    batches = list(Loader(source, plain((8, 8)), 2, train=False, engine=engine, max_bad=1.0).epoch(0))
    assert [batch.index.tolist() for batch in batches] == [[2, 3], [4], [6, 7], [8, 9]]
    for batch in batches:
        check(batch)


@engines
def test_extras_of_a_subset(engine):
    (batch,) = Loader(Subset(Captioned(10), [7, 2]), plain((8, 8)), 2, train=False, engine=engine).epoch(0)
    assert batch.index.tolist() == [0, 1]
    assert torch.equal(batch.extras["tokens"], torch.from_numpy(np.stack([tokens_of(7), tokens_of(2)])))
    (batch,) = Loader(Subset(Numbers(10), [7, 2]), plain((8, 8)), 2, train=False, engine=engine).epoch(0)
    assert batch.extras == {}


@engines
@pytest.mark.parametrize("train", [True, False], ids=["train", "evaluation"])
def test_extras_over_ranks_are_those_of_one_process(engine, train):
    source, augmentation = Captioned(25), plain((8, 8))
    (whole, *_), parts = (
        list(Loader(source, augmentation, 6, train=train).epoch(1)),
        [
            next(Loader(source, augmentation, 2, train=train, rank=rank, world=3, engine=engine).epoch(1))
            for rank in range(3)
        ],
    )
    for key, value in whole.extras.items():
        assert torch.equal(value, torch.cat([part.extras[key] for part in parts]))


@pytest.mark.parametrize("workers", [0, 2])
@engines
def test_extras_after_a_resume(engine, workers):
    source = Captioned(24, encoded=True, bad=[4])
    options = {"seed": 3, "engine": engine, "max_bad": 1.0}
    whole = [digest(batch) for batch in Loader(source, plain((8, 8)), 4, **options).epoch(2)]
    resumed = Loader(source, plain((8, 8)), 4, workers=workers, **options)
    assert [digest(batch) for batch in resumed.epoch(2, start=3)] == whole[3:]


@engines
def test_sources_without_extras_give_an_empty_dict(engine):
    """A class that inherits from `Source`, and one that has the other methods alone."""
    assert not hasattr(Numbers, "extras")
    for source in (open_source("shapes:count=8"), Numbers(8)):
        (batch,) = Loader(source, plain((8, 8)), 8, engine=engine).epoch(0)
        assert batch.extras == {}
    assert all(open_source(name).extras(0) == {} for name in ("digits", "shapes"))


def test_extras_that_are_kept_hold_no_files_open():
    kept, counts = [], []
    for batch in Loader(Captioned(160), plain((8, 8)), 4, workers=1).epoch(0):
        kept.append(batch.extras)
        counts.append(len(os.listdir("/proc/self/fd")))
    assert counts[-1] - counts[4] < 8


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@engines
def test_extras_that_break_the_contract_get_one_sentence(engine, workers):
    def fails(function, sentence, batch_size=4):
        loader = Loader(
            Wrong(4, function), plain((8, 8)), batch_size, engine=engine, workers=workers, train=False, max_bad=1.0
        )
        with pytest.raises(ValueError, match=rf"\A{sentence}\Z"):
            list(loader.epoch(0))

    same = r"data: extras must have the same keys, shapes and dtypes for every image, got "
    fails(lambda i: {"a": np.zeros(3 + i // 2)}, same + r"a float64 \[4\] for image 2 and a float64 \[3\] for image 0")
    fails(lambda i: {"a": np.zeros(3)} if i else {}, same + r"a float64 \[3\] for image 1 and none for image 0")
    fails(lambda i: {"a": np.zeros(2, "f4" if i else "f8")}, same + r"a float32 \[2\] for image 1 and a float64 .*")
    fails(
        lambda i: {"a": np.zeros(3 + i // 2)},
        same + r"a float64 \[4\] in a batch after a float64 \[3\] in another",
        batch_size=2,
    )
    arrays = "data: extras must be a dict of NumPy arrays, got "
    fails(lambda i: {"a": [1, 2]}, arrays + "a list as 'a' for image 0")
    fails(lambda i: np.zeros(3), arrays + r"array\(\[0., 0., 0.\]\) for image 0")
    fails(lambda i: {"a": np.array("text")}, r"data: extras must have dtypes that torch has, got a <U4 \[\]")


MODULE = """
import numpy as np
from fastssl.data.source import Source

class Greys(Source):
    def __init__(self, count, split):
        self.count, self.split = count, split
        self.classes, self.size, self.shards = ["dark", "light"], (8, 8), None

    def __len__(self):
        return self.count

    def read(self, index):
        return np.full((8, 8, 3), 40 + index, dtype=np.uint8)

    def name(self, index):
        return f"greys {self.split}, image {index}"

    def label(self, index):
        return index % 2

    def extras(self, index):
        return {"tokens": np.array([index, index + 1])}

def open_split(argument, split):
    return Greys(int(argument or 6), split)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An importable package `toyhouse` outside fastssl."""
    (tmp_path / "toyhouse").mkdir()
    (tmp_path / "toyhouse" / "__init__.py").write_text("")
    (tmp_path / "toyhouse" / "greys.py").write_text(MODULE)
    (tmp_path / "toyhouse" / "empty.py").write_text("open_split = None\n")
    (tmp_path / "toyhouse" / "half.py").write_text("def open_split(argument, split):\n    return [argument, split]\n")
    (tmp_path / "toyhouse" / "broken.py").write_text("import a_module_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "toyhouse"


@pytest.mark.parametrize("workers", [0, 2])
@engines
def test_a_source_of_a_module_outside_the_package(toy, engine, workers):
    source = open_source(f"{toy}.greys:10", "test")
    assert (len(source), source.name(3), len(open_source(f"{toy}.greys"))) == (10, "greys test, image 3", 6)
    for batch in Loader(source, plain((8, 8)), 5, engine=engine, workers=workers).epoch(0):
        assert torch.equal(batch.extras["tokens"], torch.stack([batch.index, batch.index + 1], dim=1))
        assert torch.equal(batch.label, batch.index % 2)
        pixels = (batch.views[0] * 0.229 + 0.485)[:, 0].mean((1, 2)) * 255
        torch.testing.assert_close(pixels, 40.0 + batch.index, rtol=0, atol=0.01)
    assert scan(source).labels == {0: 5, 1: 5}


def test_modules_that_are_no_source_get_one_sentence(toy):
    remedy = "install it, or add its folder to PYTHONPATH"
    for name, missing in (("nowhere.photos", "nowhere"), (f"{toy}.no", f"{toy}.no")):
        sentence = f"data: the source module {name} can't be imported (No module named '{missing}'): {remedy}"
        refused(sentence, ValueError, open_source, f"{name}:x")
    refused(
        f"data: the source module {toy}.broken can't be imported (No module named 'a_module_that_is_not_installed'): "
        f"{remedy}",
        ValueError,
        open_source,
        f"{toy}.broken",
    )
    for name in ("empty", ""):
        module = f"{toy}.{name}" if name else "os.path"
        sentence = f"data: the source module {module} must have a function open_split(argument, split), got none"
        refused(sentence, ValueError, open_source, f"{module}:1")
    refused(
        f"data: {toy}.half.open_split must return a source, got list without classes, size, shards, read, name, label",
        ValueError,
        open_source,
        f"{toy}.half:1",
    )
    for name in ("./photos", ".greys", "toyhouse.", "..", "photos.v-2"):
        with pytest.raises(ValueError, match=r"^data: unknown source '.*', there are .*package.module:ARGUMENT"):
            open_source(f"{name}:x")
    refused("data: split must be train or test, got 'val'", ValueError, open_source, "digits", "val")


@pytest.mark.gpu
@engines
def test_extras_arrive_on_the_gpu(engine):
    for batch in Loader(Captioned(24, encoded=True), plain((8, 8)), 8, device="cuda", engine=engine).epoch(0):
        assert {value.device.type for value in batch.extras.values()} == {"cuda"}
        extras = {key: value.cpu() for key, value in batch.extras.items()}
        check(batch._replace(index=batch.index.cpu(), extras=extras))
