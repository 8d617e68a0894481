"""ALBEF's RandomAugment against Pillow's operators."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy.stats import chisquare

from fastssl.data.augmentation import Augmentation, View
from fastssl.data.draws import draw
from fastssl.data.loader import Loader, has_dali
from fastssl.data.random_augment import CHANGES, draw_changes, random_augment_
from fastssl.data.sources.shapes import open_split
from tests.support.contract import refused

GREY = (128, 128, 128)


def picture(height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    """Smooth colours with an edge and noise, [H, W, 3] uint8."""
    random, (y, x) = np.random.default_rng(seed), np.mgrid[:height, :width]
    waves = [120 + 70 * np.sin(x / (5 + c) + y / (9 - c)) + 30 * (x > width // 2) for c in range(3)]
    return (np.stack(waves, 2) + random.uniform(-15, 15, (height, width, 3))).clip(0, 255).astype(np.uint8)


def changed(image: np.ndarray, *numbers: int) -> np.ndarray:
    """The image by these changes, between two others that are left alone."""
    pixels = torch.from_numpy(np.stack([image] * 3)).permute(0, 3, 1, 2).contiguous()
    random_augment_(pixels, np.array([[0, 0], [*numbers, 0][:2], [0, 0]]))
    bytes_ = pixels.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(bytes_[0], image) and np.array_equal(bytes_[2], image)
    return bytes_[1]


def affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Pillow's affine map, of a matrix that leads from a pixel's number to that of its source."""
    a, b, c, d, e, f = matrix
    centres = (a, b, c + 0.5 - (a + b) / 2, d, e, f + 0.5 - (d + e) / 2)
    return image.transform(image.size, Image.Transform.AFFINE, centres, Image.Resampling.BILINEAR, fillcolor=GREY)


PILLOW = {
    "identity": lambda image, sign: image,
    "auto_contrast": lambda image, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, sign: ImageOps.equalize(image),
    "brightness": lambda image, sign: image.point(lambda value: min(255, int(value * 1.36))),
    "sharpness": lambda image, sign: ImageEnhance.Sharpness(image).enhance(1.36),
    "shear_x": lambda image, sign: affine(image, (1, -sign * 0.21, 0, 0, 1, 0)),
    "shear_y": lambda image, sign: affine(image, (1, 0, 0, -sign * 0.21, 1, 0)),
    "translate_x": lambda image, sign: affine(image, (1, 0, sign * 7, 0, 1, 0)),
    "translate_y": lambda image, sign: affine(image, (1, 0, 0, 0, 1, sign * 7)),
    "rotate": lambda image, sign: image.rotate(
        sign * 21, Image.Resampling.BILINEAR, center=(image.width / 2 + 0.5, image.height / 2 + 0.5), fillcolor=GREY
    ),
}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_that_of_pillow(name, sign):
    """But for rounding. Moves round where Pillow cuts, and blend the image with the fill at its border."""
    number = CHANGES.index(name)
    for image in (picture(), picture(5, 3, 1), picture(2, 9), np.full((8, 8, 3), 77, np.uint8), picture() // 4):
        ours, expected = changed(image, sign * number), np.asarray(PILLOW[name](Image.fromarray(image), sign))
        off = ours.astype(int) - expected
        if number > CHANGES.index("sharpness"):
            of_ones = torch.full((1, 3, *image.shape[:2]), 255, dtype=torch.uint8)
            random_augment_(of_ones, np.array([[sign * number, 0]]))
            values = of_ones[0].permute(1, 2, 0).numpy()
            off = off[(values == 255) | (values == 128)]
            assert off.size and off.min() >= 0 and off.max() <= 1, image.shape
        else:
            assert abs(off).max() <= 1 and (off != 0).mean() < 0.05, image.shape


def test_two_changes_follow_one_another():
    once = changed(picture(), CHANGES.index("rotate"))
    both = changed(picture(), CHANGES.index("rotate"), CHANGES.index("equalize"))
    assert np.array_equal(both, changed(once, CHANGES.index("equalize")))
    assert not np.array_equal(both, changed(picture(), CHANGES.index("equalize"), CHANGES.index("rotate")))


def test_draws():
    """Ten changes alike, each applied with probability 1/2, moves to either side; no other draw is another."""
    view = View((8, 8), crop=(0.2, 1.0), flip_p=0.5)
    seeds = np.arange(4000)
    plain, augmented = (draw(v, 0, seeds) for v in (view, replace(view, random_augment=True)))
    assert all(np.array_equal(a, b) for a, b in zip(plain[:-1], augmented[:-1]))
    assert plain.changes.shape == augmented.changes.shape == (4000, 2) and not plain.changes.any()
    for column in augmented.changes.T:
        counts = np.bincount(abs(column), minlength=10)
        assert chisquare(counts, [4000 * 0.55, *[4000 * 0.05] * 9]).pvalue > 1e-3
        assert chisquare([(column[column != 0] > 0).sum(), (column < 0).sum()]).pvalue > 1e-3
    assert abs(np.corrcoef(augmented.changes.T)[0, 1]) < 0.06
    assert draw_changes(np.array([[0.99, 0.0, 0.4, 0.4, 0.6, 0.0]])).tolist() == [[-9, 0]]


needs_dali = pytest.mark.skipif(not has_dali(), reason="DALI is not installed")


@pytest.mark.parametrize("engine", ["device", pytest.param("dali", marks=needs_dali)])
def test_engines_agree(engine):
    source = open_split("count=48", "train")
    augmentation = Augmentation((View((32, 32), flip_p=0.5, random_augment=True),), reduced=False)
    ours, others = (next(Loader(source, augmentation, 48, engine=name).epoch(0)) for name in ("torchvision", engine))
    assert torch.equal(ours.index, others.index)
    assert torch.equal(ours.views[0], others.views[0])
    plain = next(Loader(source, Augmentation((View((32, 32), flip_p=0.5),)), 48).epoch(0))
    share = (plain.views[0] != ours.views[0]).flatten(1).any(1).float().mean()
    assert 0.3 < share < 0.9


def test_a_view_of_another_size_can_not_share_moves():
    sentence = (
        "augmentation: a view with same_crop must follow one without random_augment, whose moves are in pixels of one "
        "size, got random_augment True"
    )
    views = View((8, 8), random_augment=True), View((4, 4), same_crop=True)
    refused(sentence, ValueError, Augmentation, views)
