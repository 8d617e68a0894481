"""Both engines against plain torchvision: equal pixels from equal draws, and equal statistics over many draws."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from sklearn.datasets import load_sample_images
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fastssl.data.augmentation import Augmentation, View, evaluation, multi_crop
from fastssl.data.decoding import open_image
from fastssl.data.draws import draw, mix, windows
from fastssl.data.loader import Loader, has_dali
from fastssl.data.source import Subset, open_source
from fastssl.data.sources.arrays import Arrays
from fastssl.methods import mae, moco_v1, moco_v2, moco_v3
from tests.support.loaders import digest, engines, indices, poison
from tests.support.transforms import plain_transform

needs_dali = pytest.mark.skipif(not has_dali(), reason="needs DALI")
SIZE = (64, 96)
# BEiT jitters always; torchvision rounds after each step, so that the bounds below are for fewer jittered images
JITTER = {"jitter": (0.4, 0.4, 0.4, 0.0), "jitter_p": 0.7}
BEIT = View(SIZE, crop=(0.08, 1.0), interpolation="bicubic", flip_p=0.5, **JITTER)
AUGMENTATIONS = {
    "mae": mae.Config(image_size=SIZE).augmentation,
    "moco_v1": moco_v1.Config(image_size=SIZE).augmentation,
    "moco_v2": moco_v2.Config(image_size=SIZE).augmentation,
    "moco_v3": moco_v3.Config(image_size=SIZE).augmentation,
    "multi_crop": multi_crop(SIZE, (32, 32), 2),
    "beit": Augmentation((BEIT, View((32, 48), interpolation="lanczos", same_crop=True))),
    "evaluation": evaluation(SIZE),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Six images of two real photographs."""
    folder = tmp_path_factory.mktemp("photos")
    for name, image in zip("ab", load_sample_images().images):
        for i in range(4):
            path = folder / name / f"{i}.jpg"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).save(path, quality=90)
    return Subset(open_source(f"folder:{folder}::labels=none"), range(6))


def views_of(engine, source, augmentation, count=None, train=True, **options):
    """Views [B, 3, H, W] with values 0 … 255, of as many epochs as `count` images take."""
    loader = Loader(source, augmentation, len(source), train=train, engine=engine.partition(" ")[0], **options)
    if engine == "dali graph":
        loader._engine.colours = True
    batches, seen = [], 0
    while not batches or seen < (count or 0):
        (batch,) = loader.epoch(len(batches))
        batches.append(batch)
        seen += len(batch.index)
    views = [torch.cat([batch.views[v] for batch in batches]) for v in range(len(augmentation.views))]
    scales = [torch.tensor(x).view(1, 3, 1, 1) * 255 for x in (augmentation.views[0].mean, augmentation.views[0].std)]
    return [view * scales[1] + scales[0] for view in views], [batch.index for batch in batches]


def view_by_torchvision(image: Image.Image, view: View, seed: int, number: int) -> torch.Tensor:
    """A view of one image from our draws, made with torchvision's functions on a Pillow image and on bytes."""
    draws = draw(view, number, np.array([seed]))
    top, left, height, width = windows(view, draws, np.array([image.size[::-1]]))[0].tolist()
    image = F.resized_crop(image, top, left, height, width, view.size, InterpolationMode(view.interpolation))
    brightness, contrast, saturation, hue = draws.jitter[0].tolist()
    steps = (
        lambda x: F.adjust_brightness(x, brightness),
        lambda x: F.adjust_contrast(x, contrast),
        lambda x: F.adjust_saturation(x, saturation),
        lambda x: F.adjust_hue(x, hue),
    )
    if draws.grey[0] and view.grayscale_first:
        image = F.to_grayscale(image, 3)
    if draws.jitter[0].tolist() != [1, 1, 1, 0]:
        for step in draws.order[0]:
            image = steps[step](image)
    if draws.grey[0]:
        image = F.to_grayscale(image, 3)
    pixels = F.pil_to_tensor(image)
    if (sigma := float(draws.sigma[0])) > 0:
        window = 2 * int(np.ceil(3 * sigma)) + 1
        pixels = F.gaussian_blur(pixels, [window, window], [sigma, sigma])
    if draws.solarize[0]:
        pixels = F.solarize(pixels, 128)
    return F.horizontal_flip(pixels) if draws.flip[0] else pixels


@pytest.mark.parametrize(
    "engine", ["torchvision", pytest.param("dali", marks=needs_dali), pytest.param("dali graph", marks=needs_dali)]
)
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_views_equal_those_of_torchvision(photos, name, engine):
    """Up to torchvision's rounding to bytes after each step: half a value, which contrast and hue amplify."""
    augmentation = replace(AUGMENTATIONS[name], reduced=False)
    views, epochs = views_of(engine, photos, augmentation, count=24)
    differences = []
    for number, view in enumerate(augmentation.views):
        seeds = np.concatenate([mix(0, epoch, index.numpy()) for epoch, index in enumerate(epochs)])
        for pixels, seed, index in zip(views[number], seeds, torch.cat(epochs).tolist()):
            with Image.open(photos.name(index)) as image:
                expected = view_by_torchvision(image, view, seed, augmentation.sources[number])
            near_threshold = torch.zeros_like(expected, dtype=bool)
            if view.solarize_p:  # a rounding error decides whether 128 is inverted
                near_threshold = (expected.int() - 128).abs() <= 3
            differences.append((pixels - expected).abs()[~near_threshold])
    difference = torch.cat(differences)
    assert difference.mean() < 1.2
    assert (difference > 6).float().mean() < 2e-3


@needs_dali
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_engines_agree_and_so_does_the_graph_of_a_gpu(photos, name):
    augmentation = replace(AUGMENTATIONS[name], reduced=False)  # DALI decodes in full
    (by_torchvision, torchvision_order), (by_dali, dali_order), (by_graph, _) = (
        views_of(engine, photos, augmentation, count=24) for engine in ("torchvision", "dali", "dali graph")
    )
    assert all(torch.equal(a, b) for a, b in zip(torchvision_order, dali_order))
    for number, view in enumerate(augmentation.views):
        difference = (by_torchvision[number] - by_dali[number]).abs()
        assert difference.mean() < 0.5
        assert (difference > 6).float().mean() < 2e-3
        rounding = (by_dali[number] - by_graph[number]).abs()  # equal resampled bytes, `augment_` or DALI's operators
        assert rounding.mean() < 0.01
        assert (rounding > 1.01).float().mean() < (1e-4 if view.solarize_p else 1e-6)


@pytest.mark.parametrize("engine", ["torchvision", pytest.param("dali", marks=needs_dali)])
@pytest.mark.parametrize(
    "name", ["mae", *(pytest.param(name, marks=pytest.mark.slow) for name in ("moco_v2", "moco_v3"))]
)
def test_statistics_over_many_draws_equal_those_of_plain_torchvision(photos, name, engine):
    """Mean and standard deviation per channel and energy of edges over 1,500 views of a photograph, against transforms
    with torch's random numbers. Pillow blurs with three boxes instead of a Gaussian: 4 % of the energy of edges."""
    augmentation, count = AUGMENTATIONS[name], 1500
    pixels = open_image(photos, 0).pixels()[:, ::3, ::3].permute(1, 2, 0).numpy()
    image, photo = Image.fromarray(pixels), Arrays(np.stack([pixels] * 50), None, None, np.arange(50), "a photograph")
    views, _ = views_of(engine, photo, augmentation, count=count)
    for pixels, view in zip(views, augmentation.views):
        transform = plain_transform(view)
        expected = torch.stack([transform(image) for _ in range(count)]).float()
        for statistic, tolerance in ((means, 0.01), (deviations, 0.01), (edges, 0.04)):
            a, b = statistic(pixels), statistic(expected)
            noise = 4 * (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
            assert ((a.mean(0) - b.mean(0)).abs() <= noise + tolerance * b.mean(0)).all(), statistic.__name__
            assert ((a.std(0) / b.std(0)).log().abs() < 0.15).all(), statistic.__name__


def means(x):
    return x.mean((2, 3))


def deviations(x):
    return x.std((2, 3))


def edges(x):
    return x.diff(dim=3).square().mean((1, 2, 3))[:, None]


@pytest.mark.parametrize("workers", [0, 2])
@engines
def test_a_poisoned_folder_trains_to_the_end(tmp_path, engine, workers):
    bad = poison(tmp_path / "data", good=45)
    source, log = open_source(f"folder:{tmp_path / 'data'}"), tmp_path / "bad_files.txt"
    augmentation = Augmentation((View((16, 16), crop=(0.3, 1.0), blur_p=0.5),) * 2)
    loader = Loader(source, augmentation, 8, workers=workers, bad_files=log, max_bad=0.2, engine=engine)
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            assert len(batch.index) == 8
            assert torch.isfinite(batch.views[0]).all()
            assert not {source.name(i).rpartition("/")[2] for i in batch.index.tolist()} & set(bad)
    assert loader.bad_count == len(bad)
    assert sorted(line.partition(": ")[0].rpartition("/")[2] for line in log.read_text().splitlines()) == bad


@needs_dali
def test_dali_decodes_what_pillow_decodes(tmp_path):
    """Equal pixels for every format and mode of the poisoned folder, in the size of the files."""
    poison(tmp_path / "data", good=1)
    source = open_source(f"folder:{tmp_path / 'data'}")
    loaders = [
        Loader(source, Augmentation((View((40, 60)),)), 8, train=False, max_bad=1.0, engine=engine)
        for engine in ("torchvision", "dali")
    ]
    by_torchvision, by_dali = (list(loader.epoch(0)) for loader in loaders)
    assert indices(loaders[0], 0) == indices(loaders[1], 0)
    assert sum(len(batch.index) for batch in by_torchvision) == 11
    for a, b in zip(by_torchvision, by_dali):
        # only the rotated image, whose sides are exchanged, is resampled
        upright = torch.tensor(["turned" not in source.name(i) for i in a.index.tolist()])
        assert torch.equal(a.views[0][upright], b.views[0][upright])
        assert (a.views[0] - b.views[0]).abs().max() < 0.2
        assert torch.equal(a.index, b.index)


@needs_dali
def test_a_broken_pipeline_leaves_the_other_batches_bit_equal(tmp_path):
    """A file that DALI fails on changes the engine of its own batch, and no other batch."""
    poison(tmp_path / "data", good=45)
    source = open_source(f"folder:{tmp_path / 'data'}")
    augmentation = Augmentation((View((16, 16), crop=(0.3, 1.0)),))
    loader = Loader(source, augmentation, 8, max_bad=1.0, engine="dali")
    first, again = ([(batch.index.tolist(), digest(batch)) for batch in loader.epoch(0)] for _ in range(2))
    assert [index for index, _ in first] == [index for index, _ in again]
    equal = sum(a == b for a, b in zip(first, again))
    assert len(first) - 3 <= equal < len(first)  # batches with truncated and noisy JPEGs: first by Pillow, then by DALI


@needs_dali
@pytest.mark.parametrize("colours", [True, False], ids=["colours in the graph", "colours by augment_"])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_graph_of_a_gpu_keeps_pixels_on_it(name, colours):
    """Checks that need no GPU: DALI accepts the graph, and every operator on pixels is placed on the GPU."""
    from fastssl.data import dali

    graph = dali._graph(AUGMENTATIONS[name], colours, batch_size=8, num_threads=2, device_id=0, prefetch_queue_depth=1)
    graph._build_graph()
    assert [output.device for output in graph._graph_outputs] == ["gpu"] * len(AUGMENTATIONS[name].views)
    devices: dict[str, set[str]] = {}
    for operator in graph._ops:
        spec = str(operator.spec)
        kind, device = (re.search(pattern, spec)[1] for pattern in (r"OpSpec for (\w+)", r"device: (\w+)"))
        devices.setdefault(kind, set()).add(device)
    assert devices["decoders__Image"] == {"mixed"}
    pixels = {"Slice", "Resize", "Transpose", "Cast", "GaussianBlur", "CropMirrorNormalize", "reductions__Mean", "Cat"}
    assert {kind: device for kind, device in devices.items() if kind in pixels and device != {"gpu"}} == {}
    assert {"Slice", "Resize", "CropMirrorNormalize" if colours else "Transpose"} <= set(devices)
    on_host = {kind for kind, device in devices.items() if "cpu" in device}
    assert on_host <= {"ExternalSource", "_TensorSubscript", "_ArithmeticGenericOp", "_conditional__Split"}


@needs_dali
def test_dali_gets_the_orientation_from_pillow(tmp_path):
    """XMP may hold an orientation too, and EXIF may be damaged in other places; DALI alone would ignore both."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image, exif = Image.fromarray(pixels), Image.Exif()
    for orientation in range(1, 9):
        xmp = f"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
            <rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/>
            </rdf:RDF></x:xmpmeta>"""
        image.save(tmp_path / f"xmp{orientation}.jpg", xmp=xmp.encode())
        exif[0x0112] = orientation
        image.save(tmp_path / f"exif{orientation}.jpg", exif=exif)
    source = open_source(f"folder:{tmp_path}")
    augmentation = Augmentation((View((32, 48), crop=(0.3, 0.9)),))
    (by_torchvision,), (by_dali,) = (
        list(Loader(source, augmentation, 16, train=False, engine=engine).epoch(0))
        for engine in ("torchvision", "dali")
    )
    assert (by_torchvision.views[0] - by_dali.views[0]).abs().max() < 0.2
    sizes = {open_image(source, i).size for i in range(16)}
    assert sizes == {(40, 60), (60, 40)}


@needs_dali
def test_an_image_that_only_dali_refuses_is_decoded_by_pillow_from_then_on(tmp_path, monkeypatch):
    """Pillow is set to accept truncated files, which DALI refuses."""
    from fastssl.data import dali

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    poison(tmp_path / "data", good=45)
    for path in (tmp_path / "data").glob("bad-*"):
        if path.name != "bad-cut.jpg":
            path.unlink()
    source = open_source(f"folder:{tmp_path / 'data'}")
    augmentation = Augmentation((View((16, 16), crop=(0.3, 1.0)),))
    loader = Loader(source, augmentation, 8, train=False, engine="dali")
    builds, graph = [], dali._graph
    monkeypatch.setattr(dali, "_graph", lambda *args, **options: builds.append(1) or graph(*args, **options))
    for _ in range(3):
        assert indices(loader, 0) == list(range(len(source)))
        assert len(builds) == 2  # the first pipeline breaks, the second one stays
    assert loader.bad_count == 0
    assert [source.name(i).rpartition("/")[2] for i in loader._engine._refused] == ["bad-cut.jpg"]


@needs_dali
def test_an_error_of_dali_without_a_bad_image_is_raised(monkeypatch):
    loader = Loader(open_source("shapes:count=8"), Augmentation((View((16, 16)),)), 8, engine="dali")
    monkeypatch.setattr(loader._engine, "_pipeline", Broken())
    with pytest.raises(RuntimeError, match="out of memory"):
        list(loader.epoch(0))


class Broken:
    """A pipeline that fails for another reason than an image."""

    def feed_input(self, name, column):
        pass

    def schedule_run(self):
        pass

    def share_outputs(self):
        raise RuntimeError("out of memory")
