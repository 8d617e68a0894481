"""Views of JPEGs that are decoded at a fraction of their size: the same draws, nearly the same pixels."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.data import torchvision
from fastssl.data.augmentation import Augmentation, View, evaluation, multi_crop
from fastssl.data.decoding import ImageFile, decode_for_views
from fastssl.data.loader import Loader
from fastssl.data.source import Source
from fastssl.ops import resized_crops_
from fastssl.run import Options


def photo(height, width, seed):
    """Structure of all sizes, as in a photograph: noise whose strength falls with its frequency."""
    generator = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for side in (3, 6, 12, 24, 48, 96, 192):
        noise = Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float32) / side
    total -= total.min()
    return Image.fromarray((total * (255 / total.max())).astype(np.uint8))


def encoded(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return np.frombuffer(file.getvalue(), np.uint8).copy()


class Photographs(Source):
    """JPEGs of several sizes."""

    classes, size, shards = None, None, None
    sizes = ((300, 400), (401, 303), (640, 480), (1001, 777))

    def __init__(self):
        self.files = [encoded(photo(*size, seed)) for seed, size in enumerate(self.sizes)]

    def __len__(self):
        return len(self.files)

    def read(self, index):
        return self.files[index]

    def name(self, index):
        return f"photo {index}"

    def label(self, index):
        return -1


@pytest.fixture(scope="module")
def source():
    return Photographs()


CROPS = View((96, 96), crop=(0.2, 1.0))
AUGMENTATIONS = {
    "bilinear": Augmentation((CROPS,)),
    "bicubic": Augmentation((dataclasses.replace(CROPS, interpolation="bicubic"),)),
    "two": Augmentation((CROPS, dataclasses.replace(CROPS, size=(64, 64)))),
    "multi_crop": multi_crop((96, 96), (32, 32), 4),
}


def views(source, augmentation, workers=0, **options):
    loader = Loader(source, augmentation, 2, workers=workers, seed=3, train=False, **options)
    batches = list(loader.epoch(0))
    stds = [torch.tensor(view.std).view(3, 1, 1) * 255 for view in augmentation.views]
    pixels = [torch.cat([batch.views[i] for batch in batches]) * std for i, std in enumerate(stds)]
    return pixels, torch.cat([batch.seed for batch in batches])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_views_of_reduced_images_are_nearly_those_of_whole_ones(source, monkeypatch, name):
    augmentation, scales = AUGMENTATIONS[name], []
    raster = ImageFile.raster
    monkeypatch.setattr(ImageFile, "raster", lambda self, scale=1: scales.append(scale) or raster(self, scale))
    colourless = Augmentation(
        tuple(
            dataclasses.replace(view, jitter=(0, 0, 0, 0), grayscale_p=0, blur_p=0, solarize_p=0)
            for view in augmentation.views
        )
    )
    found, seeds = views(source, colourless)
    assert max(scales) >= 2
    whole, same_seeds = views(source, dataclasses.replace(colourless, reduced=False))
    assert set(scales[len(source) :]) == {1} and torch.equal(seeds, same_seeds)
    for mine, full in zip(found, whole):
        difference = (mine - full).abs()
        assert 0 < difference.mean() < 0.6 and difference.flatten(1).mean(1).max() < 1.2


def test_views_of_full_size_do_not_change(source):
    """No image is reduced for a view that needs its pixels."""
    large = Augmentation((View((512, 512), crop=(0.2, 1.0)),))
    assert torch.equal(views(source, large)[0][0], views(source, dataclasses.replace(large, reduced=False))[0][0])


@pytest.mark.slow
def test_workers_make_the_same_views(source):
    augmentation = AUGMENTATIONS["multi_crop"]
    alone, several = views(source, augmentation)[0], views(source, augmentation, workers=2)[0]
    assert all(torch.equal(a, b) for a, b in zip(alone, several))


def test_evaluations_decode_in_full_and_a_run_may(source, monkeypatch):
    assert not evaluation((64, 64)).reduced and Augmentation((CROPS,)).reduced
    assert not Options("digits").full_decode
    monkeypatch.setattr(torchvision, "decode_for_views", None)
    Loader(source, evaluation((64, 64)), 4, train=False).epoch(0).__next__()


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_window_keeps_its_place(interpolation, scale):
    """A bright square in a black image: its centre of mass is where it is in a view of the whole image."""
    pixels = np.zeros((256, 256, 3), np.uint8)
    pixels[101:165, 90:154] = 255
    image = ImageFile(encoded(Image.fromarray(pixels)), "x")
    window, size = [37, 51, 149, 131], (24, 24)
    reduced, windows = image.raster(scale), [number / scale for number in window]
    ours, plain = torch.empty(1, 3, *size, dtype=torch.uint8), torch.empty(1, 3, *size, dtype=torch.uint8)
    resized_crops_(ours, [reduced], torch.tensor([windows], dtype=torch.float64), interpolation)
    resized_crops_(plain, [image.raster()], torch.tensor([window]), interpolation)

    def centre(view):
        weights = view[0, 0].double()
        places = torch.arange(24.0, dtype=torch.float64)
        return (weights.sum(1) @ places / weights.sum()).item(), (weights.sum(0) @ places / weights.sum()).item()

    assert max(abs(a - b) for a, b in zip(centre(ours), centre(plain))) < 0.02
    given, same = decode_for_views(image, [window], [size])
    assert given.shape == image.raster(2).shape and same == [[number / 2 for number in window]]
