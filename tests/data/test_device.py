"""The engine whose workers only decode, on a CPU: bit-equal batches of the torchvision engine."""

import multiprocessing
import os

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.data import device
from fastssl.data.augmentation import Augmentation, View, evaluation, multi_crop
from fastssl.data.draws import draw, mix, windows
from fastssl.data.loader import Loader
from fastssl.data.source import open_source
from fastssl.data.workers import LostWorker
from fastssl.methods import mae, moco_v3
from tests.data.test_extras import Captioned
from tests.support.loaders import digest, poison

SIZE = (24, 36)
AUGMENTATIONS = {
    "mae": mae.Config(image_size=SIZE).augmentation,
    "moco_v3": moco_v3.Config(image_size=SIZE).augmentation,
    "multi_crop": multi_crop(SIZE, (16, 16), 2),
    "evaluation": evaluation(SIZE),
    "whole": Augmentation((View(SIZE), View((5, 80), interpolation="bicubic"))),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of images of different sizes, and of broken files."""
    folder = tmp_path_factory.mktemp("images") / "data"
    poison(folder, good=3)
    for i, shape in enumerate([(90, 31, 3), (17, 120, 3), (64, 64, 3), (5, 7, 3)]):
        pixels = np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"size{i}.jpg", quality=95)
    return open_source(f"folder:{folder}::labels=none")


def digests(source, augmentation, engine, train=True, workers=0, **options):
    loader = Loader(source, augmentation, 6, train=train, engine=engine, workers=workers, max_bad=1.0, **options)
    return [digest(batch) for epoch in (0, 1) for batch in loader.epoch(epoch)]


@pytest.mark.parametrize("train", [True, False], ids=["train", "evaluation"])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_batches_are_those_of_the_torchvision_engine(images, name, train):
    """Ragged sizes, bad files, images that fill in, several views: to the bit."""
    augmentation = AUGMENTATIONS[name]
    expected = digests(images, augmentation, "torchvision", train)
    assert digests(images, augmentation, "device", train) == expected and len(set(expected)) == len(expected) > 3


def test_workers_ranks_and_resume(images):
    augmentation = AUGMENTATIONS["moco_v3"]
    expected = digests(images, augmentation, "torchvision", workers=0)
    assert digests(images, augmentation, "device", workers=2) == expected
    loader = Loader(images, augmentation, 6, engine="device", workers=2, max_bad=1.0)
    assert [digest(batch) for batch in loader.epoch(0, start=1)] == expected[1 : len(loader)]
    for rank in range(2):
        one, two = (
            digests(images, augmentation, engine, rank=rank, world=2, train=False)
            for engine in ("torchvision", "device")
        )
        assert one == two


class Planes(Captioned):
    """Planes of YUV and pixels by turns, of several sizes."""

    size = None

    def read(self, index):
        random, height, width = np.random.default_rng(index), 20 + 2 * (index % 5), 34 - 2 * (index % 7)
        shape = (height * 3 // 2, width) if index % 3 else (height, width, 3)
        return random.integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("crop", [(0.05, 0.3), (0.3, 1.0), None], ids=str)
def test_planes_are_sent_as_planes(crop):
    """Parts of planes begin and end at even pixels, windows anywhere."""
    source, augmentation = Planes(12), Augmentation((View((9, 7), crop=crop), View((30, 40), crop=crop, flip_p=0.5)))
    assert digests(source, augmentation, "device") == digests(source, augmentation, "torchvision")
    decoded = device.decode_batch(source, augmentation, 0, 0, np.arange(12), True)
    assert [shape[2] for shape in decoded.images[:, 1:].tolist()] == [3, 0, 0] * 4
    images = device.images_in(decoded.memory, decoded.images)
    assert [image.ndim for image in images] == [3, 2, 2] * 4
    assert sum(image.numel() for image in images) == len(decoded.memory)


def test_large_jpegs_are_reduced(tmp_path):
    """By the same number as in the torchvision engine; the parts of reduced images are sent."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for i, size in enumerate([(300, 200), (640, 481), (97, 333), (1200, 900)]):
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(tmp_path / f"{i}.jpg", quality=90)
    source = open_source(f"folder:{tmp_path}::labels=none")
    augmentation = Augmentation(
        (View((12, 20), crop=(0.2, 1.0), interpolation="bicubic"), View((8, 8), crop=(0.1, 0.3)))
    )
    expected = [digest(batch) for batch in Loader(source, augmentation, 2).epoch(0)]
    assert [digest(batch) for batch in Loader(source, augmentation, 2, engine="device").epoch(0)] == expected
    decoded = device.decode_batch(source, augmentation, 0, 0, np.array([3]), True)
    assert len(decoded.memory) < 3 * 1200 * 900 / 16 and (decoded.windows % 1).any()


def test_extras_of_good_images_alone():
    source = Captioned(24, bad=[5, 11], encoded=True, unreadable=[3])
    augmentation = Augmentation((View((8, 8), crop=(0.3, 1.0)),))
    assert digests(source, augmentation, "device") == digests(source, augmentation, "torchvision")


def test_a_worker_sends_the_parts_that_the_views_need():
    """Two small crops of an image are sent as the smallest part that has both."""
    source, augmentation = open_source("shapes:count=6,size=64"), Augmentation((View((8, 8), crop=(0.05, 0.1)),) * 2)
    decoded = device.decode_batch(source, augmentation, 0, 0, np.arange(6), True)
    sizes = np.full((6, 2), 64)
    whole = np.stack([windows(v, draw(v, n, mix(0, 0, np.arange(6))), sizes) for n, v in enumerate(augmentation.views)])
    corner = whole[..., :2].min(0)
    assert np.array_equal(decoded.windows.numpy()[..., :2], whole[..., :2] - corner)
    assert np.array_equal(decoded.windows.numpy()[..., 2:], whole[..., 2:])
    shapes = (whole[..., :2] + whole[..., 2:]).max(0) - corner
    assert np.array_equal(decoded.images.numpy()[:, 1:], np.column_stack([shapes, [3] * 6]))
    assert len(decoded.memory) == 3 * shapes.prod(1).sum() < 0.6 * 6 * 64 * 64 * 3
    for part, (top, left), (height, width), index in zip(
        device.images_in(decoded.memory, decoded.images), corner, shapes, range(6)
    ):
        assert np.array_equal(part, source.read(index)[top : top + height, left : left + width])


def test_images_that_fill_in_are_sent_once():
    source = Captioned(8, bad=[1, 2, 3, 4])
    decoded = device.decode_batch(source, Augmentation((View((8, 8)),)), 0, 0, np.arange(8), True)
    assert len(decoded.images) == 8 and len(set(decoded.images[:, 0].tolist())) == 4
    assert decoded.index.tolist() == [0, 5, 6, 7] * 2 and [index for index, _ in decoded.bad] == [1, 2, 3, 4]
    none = device.decode_batch(Captioned(2, bad=[0, 1]), Augmentation((View((8, 8)),)), 0, 0, np.arange(2), True)
    assert none.windows.shape == (1, 0, 4) and none.images.shape == (0, 4) and len(none.bad) == 2


def test_too_small_a_shared_memory_is_refused_at_the_start(monkeypatch):
    """Where images have one size; otherwise a worker that finds it full is named."""
    free = os.statvfs_result((4096, 4096, 1000, 20, 20, 0, 0, 0, 0, 255))  # 80 kB
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "forkserver")  # forked workers need no folder
    loader = Loader(open_source("shapes:count=24,size=64"), AUGMENTATIONS["mae"], 6, engine="device", workers=2)
    with pytest.raises(
        LostWorker, match=r"^data: 2 workers keep up to 5 batches of 0.1 MB in /dev/shm, which has 0.1 MB"
    ):
        loader.epoch(0)


def test_views_are_made_on_the_device_of_the_loader():
    """On torch's meta device, which has no pixels: nothing is made elsewhere and copied."""
    source = open_source("shapes:count=6,size=32")
    engine = device.Engine(
        source, multi_crop((16, 16), (8, 8), 1), 0, workers=0, device=torch.device("meta"), fill_in=True, batch_size=6
    )
    decoded = device.decode_batch(source, engine._augmentation, 0, 0, np.arange(6), True)
    samples = engine._make_views(decoded)
    assert [view.device.type for view in samples.views] == ["meta"] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_views_on_a_gpu_are_those_of_a_cpu(images, name):
    """Crops to the bit; colours but for rounding, which contrast and a threshold amplify."""
    augmentation = AUGMENTATIONS[name]
    loaders = [
        Loader(images, augmentation, 6, engine=engine, device=where, workers=2, max_bad=1.0)
        for engine, where in (("torchvision", "cpu"), ("device", "cuda"))
    ]
    for expected, found in zip(loaders[0].epoch(0), loaders[1].epoch(0), strict=True):
        assert torch.equal(expected.index, found.index.cpu()) and found.views[0].is_cuda
        for view, a, b in zip(augmentation.views, expected.views, found.views):
            byte = 1 / 255 / min(view.std)
            off = (a - b.cpu()).abs()
            assert (off > 1.01 * byte).float().mean() < (2e-3 if view.solarize_p else 1e-4)
            assert (off > 0.01 * byte).float().mean() < 1e-2
