"""Distributions of the draws against torchvision's, with fixed seeds, so that a result never changes."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import v2

from fastssl.data.augmentation import Augmentation, View, evaluation
from fastssl.data.draws import _orders, draw, draw_views, windows, windows_of_views
from tests.support.contract import refused

COUNT = 4000
UNLIKELY = 1e-3
SEEDS = np.arange(COUNT)


def assert_same_distribution(values, expected):
    assert ks_2samp(np.asarray(values, float), np.asarray(expected, float)).pvalue > UNLIKELY


@pytest.mark.parametrize("size", [(427, 640), (64, 64), (40, 400), (300, 30)], ids=str)
@pytest.mark.parametrize("crop", [(0.08, 1.0), (0.2, 1.0), (0.05, 0.14)], ids=str)
def test_windows_are_those_of_random_resized_crop(size, crop):
    """Also for long images, in which few windows fit and torchvision takes the middle."""
    transform = v2.RandomResizedCrop((8, 8), scale=crop)
    image = torch.empty(3, *size)
    params = [transform.make_params([image]) for _ in range(COUNT)]
    view = View((8, 8), crop=crop)
    top, left, height, width = windows(view, draw(view, 0, SEEDS), np.broadcast_to(size, (COUNT, 2))).T
    for values, name in ((top, "top"), (left, "left"), (height, "height"), (width, "width")):
        assert_same_distribution(values, [p[name] for p in params])
    assert_same_distribution(height * width, [p["height"] * p["width"] for p in params])
    assert_same_distribution(width / height, [p["width"] / p["height"] for p in params])
    assert min(top.min(), left.min()) >= 0
    assert (top + height).max() <= size[0]
    assert (left + width).max() <= size[1]
    assert min(height.min(), width.min()) > 0


@pytest.mark.parametrize("strengths", [(0.4, 0.4, 0.4, 0.1), (0.8, 1.5, 0.2, 0.5)], ids=str)
def test_jitter_is_that_of_color_jitter(strengths):
    params = [v2.ColorJitter(*strengths).make_params([]) for _ in range(COUNT)]
    draws = draw(View((8, 8), jitter=strengths), 0, SEEDS)
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    for column, name in zip(draws.jitter.T, names):
        assert_same_distribution(column, [p[name] for p in params])
    counts = [(draws.order == order).all(axis=1).sum() for order in _orders()]
    assert sum(counts) == COUNT
    assert chisquare(counts).pvalue > UNLIKELY


def test_steps_have_the_probabilities_of_the_view():
    view = View(
        (8, 8), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grayscale_p=0.2, blur_p=0.1, solarize_p=0.3, flip_p=0.5
    )
    draws = draw(view, 0, SEEDS)
    drawn = {
        "jitter": (draws.jitter != np.float32([1, 1, 1, 0])).any(axis=1),
        "grayscale": draws.grey,
        "blur": draws.sigma > 0,
        "solarize": draws.solarize,
        "flip": draws.flip,
    }
    for name, chosen in drawn.items():
        p = getattr(view, f"{name}_p")
        assert chisquare([chosen.sum(), COUNT - chosen.sum()], [p * COUNT, (1 - p) * COUNT]).pvalue > UNLIKELY, name
    pairs = np.corrcoef(np.stack(list(drawn.values())).astype(float))
    assert np.abs(pairs - np.eye(5)).max() < 0.06  # the steps are independent
    sigma = draws.sigma[draws.sigma > 0]
    assert_same_distribution(sigma, np.random.default_rng(0).uniform(*view.blur_sigma, COUNT))
    default = draw(View((8, 8)), 0, SEEDS)
    assert not (default.grey.any() or default.sigma.any() or default.solarize.any() or default.flip.any())
    assert (default.jitter == np.float32([1, 1, 1, 0])).all()


def test_views_and_neighbouring_seeds_are_independent():
    view = View((8, 8), crop=(0.2, 1.0))
    first, second = (draw(view, number, SEEDS) for number in (0, 1))
    for a, b in ((first.area, second.area), (first.place, second.place), (first.area[:-1], first.area[1:])):
        assert abs(np.corrcoef(a[:, 0], b[:, 0])[0, 1]) < 0.06


def test_draws_of_a_sample_do_not_depend_on_its_batch():
    view = View((8, 8), crop=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), blur_p=0.5)
    whole, part = draw(view, 1, SEEDS), draw(view, 1, SEEDS[17:19])
    assert all(np.array_equal(a[17:19], b) for a, b in zip(whole, part))
    assert all(np.array_equal(a, b) for a, b in zip(whole.take([17, 18]), part))


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (100, 700), (224, 224), (7, 5)], ids=str)
def test_evaluation_takes_the_window_of_resize_and_centre_crop(size):
    """224 of 256, in pixels of the image, to one pixel: torchvision rounds the resized sides."""
    view = evaluation((224, 224)).views[0]
    ((top, left, height, width),) = windows(view, draw(view, 0, SEEDS[:1]), np.array([size]))
    scale = min(size) / 256
    expected = (size[0] - 224 * scale) / 2, (size[1] - 224 * scale) / 2, 224 * scale, 224 * scale
    assert np.abs(np.array([top, left, height, width]) - expected).max() <= 1


def test_evaluation_of_a_rectangle_is_undistorted():
    view = evaluation((224, 448), centre=1.0).views[0]
    ((top, left, height, width),) = windows(view, draw(view, 0, SEEDS[:1]), np.array([(600, 800)]))
    assert (top, left, height, width) == (100, 0, 400, 800)


def test_a_view_without_crop_or_centre_takes_the_whole_image():
    view = View((8, 8))
    assert windows(view, draw(view, 0, SEEDS[:1]), np.array([(30, 70)])).tolist() == [[0, 0, 30, 70]]


def test_error_sentences_of_views():
    refused(
        "augmentation: crop must be a range above 0 and at most 1, got 0.5 0.2",
        ValueError,
        View,
        (8, 8),
        crop=(0.5, 0.2),
    )
    refused("augmentation: crop must be a range above 0 and at most 1, got 0 1", ValueError, View, (8, 8), crop=(0, 1))
    refused("augmentation: centre must be above 0 and at most 1, got 1.5", ValueError, View, (8, 8), centre=1.5)
    refused("augmentation: blur_sigma must be a range above 0, got 0 2", ValueError, View, (8, 8), blur_sigma=(0, 2))
    refused(
        "augmentation: interpolation must be bilinear, bicubic or lanczos, got 'nearest'",
        ValueError,
        View,
        (8, 8),
        interpolation="nearest",
    )
    refused(
        "augmentation: jitter must be four strengths of at least 0, the hue's at most 0.5, got (0, 0, 0, 0.6)",
        ValueError,
        View,
        (8, 8),
        jitter=(0, 0, 0, 0.6),
    )


LINKED = {"interpolation": "lanczos", "mean": (-0.125,) * 3, "std": (1.25,) * 3, "same_crop": True}


def test_a_view_with_same_crop_has_the_window_and_the_draws_of_the_view_before():
    strong = {"crop": (0.08, 1.0), "jitter": (0.4, 0.4, 0.4, 0.0), "grayscale_p": 0.2, "flip_p": 0.5}
    first, other = View((16, 24), interpolation="bicubic", **strong), View((8, 8), crop=(0.2, 1.0))
    made = Augmentation((first, View((8, 12), **LINKED), View((4, 6), **LINKED), other, View((5, 5), same_crop=True)))
    assert made.sources == [0, 0, 0, 3, 3]
    linked = made.views[1]
    assert (linked.size, linked.interpolation, linked.mean) == ((8, 12), "lanczos", (-0.125,) * 3)
    assert (linked.crop, linked.jitter, linked.flip_p) == (first.crop, first.jitter, 0.5)
    draws, sizes = draw_views(made, SEEDS[:50]), np.random.default_rng(0).integers(20, 90, (50, 2))
    found = windows_of_views(made, draws, sizes)
    for number, source in enumerate(made.sources):
        assert all(np.array_equal(a, b) for a, b in zip(draws[number], draws[source]))
        assert np.array_equal(found[number], found[source])
    for number in (0, 3):  # as without the others
        assert all(np.array_equal(a, b) for a, b in zip(draws[number], draw(made.views[number], number, SEEDS[:50])))
    assert not np.array_equal(found[0], found[3])


def test_a_linked_view_of_another_shape_shows_the_centre_crop_of_the_view_before():
    made = Augmentation((View((14, 14), centre=0.875), View((7, 21), same_crop=True)))
    found = windows_of_views(made, draw_views(made, SEEDS[:3]), np.full((3, 2), (100, 80)))
    assert found[1].tolist() == found[0].tolist() == [[15, 5, 70, 70]] * 3


def test_error_sentences_of_linked_views():
    first = View((8, 8), crop=(0.2, 1.0), flip_p=0.5)
    sentence = "augmentation: same_crop must not be set in the first view, which has none before it"
    refused(sentence, ValueError, Augmentation, (View((4, 4), same_crop=True), first))
    sentence = (
        "augmentation: a view with same_crop has the crop of the view before it, (0.2, 1.0): leave it out, got "
        "(0.5, 1.0)"
    )
    refused(sentence, ValueError, Augmentation, (first, View((4, 4), crop=(0.5, 1.0), same_crop=True)))
    sentence = (
        "augmentation: a view with same_crop must follow one without blur, whose width is in pixels of one size, got "
        "blur_p 0.5"
    )
    refused(sentence, ValueError, Augmentation, (View((8, 8), blur_p=0.5), View((4, 4), same_crop=True)))
