"""Colours of SimCLR's and BYOL's code and Lab views: in `augment_` and in both engines, pixel by pixel."""

import dataclasses

import numpy as np
import pytest
import torch
from skimage.color import rgb2lab
from sklearn.datasets import load_sample_images

from fastssl.data.augmentation import COLOUR_LAWS, Augmentation, View
from fastssl.data.draws import draw, mix
from fastssl.data.lab import LAB_MEAN, LAB_STD, rgb_to_lab
from fastssl.data.loader import Loader, has_dali
from fastssl.data.sources.arrays import Arrays
from fastssl.data.torchvision import law_of
from fastssl.methods import byol, simclr_v1, simclr_v2
from fastssl.ops import augment_, dispatch
from tests.ops.test_augment import draws as parameters
from tests.support.colour_laws import augmented
from tests.support.contract import refused

needs_dali = pytest.mark.skipif(not has_dali(), reason="needs DALI")
ENGINES = ["torchvision", pytest.param("dali", marks=needs_dali), pytest.param("dali graph", marks=needs_dali)]
LAWS = [law for law in COLOUR_LAWS if law != "torchvision"]
SIZE = (44, 52)  # a blur of radius 2, which cuts most of a Gaussian off
PHOTOS = np.stack([image[20:404:4, 80:560:5] for image in load_sample_images().images] * 6)


def loaded(engine, view, batch=12):
    """One batch of a view as the loader gives it, and the draws of its images."""
    source = Arrays(PHOTOS, None, None, np.arange(len(PHOTOS)), "photographs")
    loader = Loader(source, Augmentation((view,)), batch, engine=engine.partition(" ")[0], workers=0)
    if engine == "dali graph":
        loader._engine.colours = True
    (batch,) = loader.epoch(0)
    return batch.views[0], draw(view, 0, mix(0, 0, batch.index.numpy()))


def bytes_of(pixels, view):
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (view.mean, view.std))
    return (pixels * std + mean) * 255


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "plain torch"])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("step", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_each_step(law, step, reference):
    jitter = np.tile(np.array([1, 1, 1, 0], np.float32), (6, 1))
    jitter[:, step] += np.array([-0.8, -0.4, -0.1, 0.1, 0.4, 0.8], np.float32) * (0.5 if step == 3 else 1)
    self_coloured = torch.randint(0, 256, (6, 3, 9, 11), dtype=torch.uint8)
    images = torch.cat([self_coloured[:3], torch.from_numpy(PHOTOS[:3, :9, :11]).permute(0, 3, 1, 2)])
    expected = [
        augmented(x.numpy(), row, range(4), False, 0, False, law != "simclr_v2") for x, row in zip(images, jitter)
    ]
    if reference:
        with dispatch.reference():
            made = augment_(
                images.clone(), *parameters(6, jitter=torch.from_numpy(jitter)), law_of(View((9, 11), colour_law=law))
            )
    else:
        made = augment_(
            images.clone(), *parameters(6, jitter=torch.from_numpy(jitter)), law_of(View((9, 11), colour_law=law))
        )
    assert np.abs(made.numpy() - np.stack(expected)).max() <= 0.501


@pytest.mark.parametrize("size", [(40, 30), (59, 8), (19, 19), (100, 3)], ids=str)
@pytest.mark.parametrize("grey", [False, True])
def test_blur_and_grayscale(size, grey):
    images, sigma = torch.randint(0, 256, (4, 3, *size), dtype=torch.uint8), torch.tensor([0.1, 0.7, 1.5, 2.0])
    made = augment_(images.clone(), *parameters(4, sigma=sigma, grey=grey), law_of(View(size, colour_law="simclr_v2")))
    expected = [augmented(x.numpy(), [1, 1, 1, 0], range(4), grey, s, False, False) for x, s in zip(images, sigma)]
    assert np.abs(made.numpy() - np.stack(expected)).max() <= 0.501


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("law", LAWS)
def test_views_of_an_engine_are_those_of_the_formulas(engine, law):
    strong = {"jitter": (0.8, 0.8, 0.8, 0.2), "jitter_p": 0.8, "grayscale_p": 0.2, "blur_p": 0.5, "flip_p": 0.5}
    view = View(SIZE, crop=(0.2, 1.0), interpolation="bicubic", colour_law=law, **strong)
    plain = dataclasses.replace(view, jitter=(0, 0, 0, 0), grayscale_p=0, blur_p=0, flip_p=0)
    made, draws = loaded(engine, view)
    uncoloured, _ = loaded(engine, plain)
    made = bytes_of(made, view)
    assert draws.grey.any() and draws.flip.any() and (draws.sigma > 0).any() and (draws.jitter[:, 0] != 1).any()
    for i, pixels in enumerate(bytes_of(uncoloured, view).round().numpy()):
        jitter, order, grey, sigma, _, flip = (column[i] for column in draws.colours)
        expected = augmented(pixels, jitter, order, grey, sigma, flip, law != "simclr_v2")
        assert np.abs(made[i].numpy() - expected).max() <= 0.51, i


@pytest.mark.parametrize("law", LAWS)
def test_draws_do_not_depend_on_the_law(law):
    seeds, view = np.arange(50), View(SIZE, jitter=(0.8, 0.8, 0.8, 0.2), blur_p=0.5)
    for a, b in zip(draw(view, 1, seeds), draw(dataclasses.replace(view, colour_law=law), 1, seeds)):
        assert np.array_equal(a, b)
    offsets = draw(view, 0, np.arange(4000)).jitter[:, 0] - 1  # brightness, added as a share of white
    assert offsets.min() == pytest.approx(-0.8, abs=2e-3) and offsets.max() == pytest.approx(0.8, abs=2e-3)


@pytest.mark.parametrize("method", [simclr_v1, simclr_v2, byol])
def test_methods_have_the_law_of_their_code(method):
    name = method.__name__.rpartition(".")[2]
    assert {view.colour_law for view in method.Config.paper().augmentation.views} == {name}
    assert {view.colour_law for view in method.Config(colour_law="torchvision").augmentation.views} == {"torchvision"}
    assert {view.colour_law for view in method.Config.small().augmentation.views} == {"torchvision"}


def test_lab_is_skimages():
    grid = torch.cartesian_prod(*[torch.linspace(0, 255, 18)] * 3).double().T.reshape(1, 3, 54, 108) / 255
    expected = rgb2lab(grid[0].permute(1, 2, 0).numpy())
    assert np.abs(rgb_to_lab(grid)[0].permute(1, 2, 0).numpy() - expected).max() < 1e-5
    assert np.abs(rgb_to_lab(grid.float())[0].permute(1, 2, 0).numpy() - expected).max() < 1e-3
    assert pytest.approx(((0 + 100) / 2, (-86.183 + 98.233) / 2, (-107.857 + 94.478) / 2)) == LAB_MEAN
    assert pytest.approx(((100 - 0) / 2, (86.183 + 98.233) / 2, (107.857 + 94.478) / 2)) == LAB_STD


@pytest.mark.parametrize("engine", ENGINES)
def test_lab_views(engine):
    view = View(SIZE, crop=(0.2, 1.0), flip_p=0.5)
    rgb, _ = loaded(engine, view)
    lab, _ = loaded(engine, dataclasses.replace(view, colour_space="lab", mean=LAB_MEAN, std=LAB_STD))
    pixels = bytes_of(rgb, view).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    expected = (rgb2lab(pixels) - LAB_MEAN) / LAB_STD
    assert lab.dtype == torch.float32
    assert np.abs(lab.permute(0, 2, 3, 1).numpy() - expected).max() < 1e-4


def test_refusals():
    refused(
        "augmentation: colour_law must be torchvision or simclr_v1 or simclr_v2 or byol, got 'pillow'",
        ValueError,
        View,
        (8, 8),
        colour_law="pillow",
    )
    refused("augmentation: colour_space must be rgb or lab, got 'hsv'", ValueError, View, (8, 8), colour_space="hsv")
