"""`fastssl bench`: the advice, the parts of a loader's work, and the step of a method."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.cli import bench
from fastssl.cli.bench_advice import Situation, advise
from fastssl.data.augmentation import Augmentation, View
from fastssl.data.parts import Parts, measure_parts, take_sample
from fastssl.data.source import open_source
from tests.data.test_loader import Numbers
from tests.support.command import refused, run

DECODING = Parts(read=0.1, decode=3.0, crop=0.5, colours=0.1, normalise=0.3)  # 250 images/s a core, 270 a worker
CROPPING = Parts(read=0.1, decode=0.0, crop=0.5, colours=0.4, normalise=0.0)


def advice(parts=DECODING, **changes):
    """Advice for photographs of 400 pixels in a folder, on 16 cores with a GPU."""
    usual = {"source": "folder:A", "augmentation": "mae", "image_side": 400, "view_side": 224, "cores": 16, "gpu": True}
    return advise(
        Situation(**{**usual, "parts": parts, "engine": "torchvision", "engines": ("torchvision",), **changes})
    )


def test_enough_cores_need_no_change():
    made, step, enough = advice(step_rate=1000)
    assert made == "A core makes 270 images/s of mae, 16 cores 4,324."
    assert step == "The step takes 1,000 images/s: 4 cores feed it, there are 16."
    assert enough == "That is enough: use --workers 4."
    assert advice(step_rate=4324)[2] == "That is enough: use --workers 16."
    assert advice(step_rate=100)[1] == "The step takes 100 images/s: 1 core feeds it, there are 16."


def test_a_cpu_computes_the_step_on_the_same_cores():
    """It also normalises, and a step that all cores feed leaves none to compute it."""
    told = advice(step_rate=4000, gpu=False)
    assert told[0] == "A core makes 250 images/s of mae, 16 cores 4,000."
    assert told[1] == "The step takes 4,000 images/s: 16 cores feed it, there are 16."
    assert told[2] == "Here the cores also compute the step, which shares them with the loader."
    assert advice(step_rate=3000, gpu=False)[2] == "That is enough: use --workers 12."


def test_without_a_step_the_way_to_measure_it_is_named():
    told = advice()
    assert told[1].startswith("To see whether that is enough: give the step's rate as --step-rate IMAGES/S, or")
    assert told[2].startswith("Decoding takes 75% of the time: ")


def test_the_data_page_shows_what_is_said():
    """For the numbers of its example, in milliseconds."""
    photos = {"parts": Parts(0.03, 0.73, 0.28, 0.01, 0.07), "source": "folder:photos", "cores": 2, "gpu": False}
    told = advice(**photos, step_rate=1500, workers=2, rates={"process": 286, "thread": 281})
    page = Path(__file__).parent.parent / "docs" / "data.md"
    assert "\n".join(["", *told, "```"]) in page.read_text()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            {},
            "Decoding takes 75% of the time: a pack of pixels needs none, for several times the disk: "
            "fastssl data pack folder:A --out FILE.pack --kind yuv --side 320",
        ),
        ({"image_side": 1024}, "so pack them smaller: fastssl data pack folder:A --out FILE.pack --side 320"),
        (
            {"view_side": 96, "image_side": 200},
            "pack them smaller: fastssl data pack folder:A --out FILE.pack --side 160",
        ),
        ({"source": "pack:A.pack"}, "pack the images again with --kind yuv, which needs no decoding but several times"),
    ],
)
def test_decoding_is_saved_by_a_pack(changes, sentence):
    told = advice(step_rate=6000, **changes)
    assert told[1:3] == [
        "The step takes 6,000 images/s: 23 cores feed it, there are 16.",
        "That is too few: use --workers 16, and make the loader faster.",
    ]
    assert sentence in told[3]


def test_crops_go_to_the_gpu_if_an_engine_does_them_there():
    assert advice(CROPPING)[2] == "Crops and colours take 90% of the time: smaller or fewer views, or more cores."
    engines = ("torchvision", "dali")
    told = advice(CROPPING, engines=engines)[2]
    assert told == "Crops and colours take 90% of the time: --engine dali does that on the GPU."
    assert "more cores" in advice(CROPPING, engines=engines, gpu=False)[2]
    assert "more cores" in advice(CROPPING, engines=engines, engine="dali")[2]


def test_slow_reading_is_named():
    slow = DECODING._replace(read=9.0)
    assert advice(slow)[-1].startswith(
        "Reading takes 70% of the time: pack it on a fast disk, or use more workers than cores"
    )
    assert "copy it to a disk of this machine" in advice(slow, source="pack:A.pack")[-1]


def test_the_faster_kind_of_workers_is_named():
    rates = {"process": 1000.0, "thread": 1250.0}
    sentence = "With workers of the kind thread the loader is 25% faster: --worker-kind thread."
    for rate in (None, 100, 9000):
        assert advice(rates=rates, step_rate=rate)[-1] == sentence
        assert "kind thread" not in advice(rates={"process": 1000.0, "thread": 1090.0}, step_rate=rate)[-1]


def test_a_loader_that_something_else_holds_up_is_named():
    held_up = (
        "16 cores 4,324. The whole loader makes 320 with 2 workers, so other programs use the cores, or the disk is"
    )
    assert held_up in advice(rates={"process": 320.0}, workers=2)[0]
    assert advice(rates={"process": 330.0}, workers=2)[0].endswith("16 cores 4,324.")
    assert held_up.replace("2 workers", "4 workers") in advice(rates={"process": 320.0}, workers=4)[0]


def test_a_sample_passes_over_bad_images_and_keeps_to_its_memory(monkeypatch):
    sample = take_sample(Numbers(40, bad=range(20), encoded=True), 40)
    assert (len(sample.images), sample.side) == (20, 8)
    assert all(sample.images.read(index).ndim == 1 for index in range(20))
    monkeypatch.setattr("fastssl.data.parts.BYTES", 5 * 3 * 64 - 1)
    assert len(take_sample(Numbers(40), 40).images) == 5


def test_parts_are_measured_alone():
    """Decoding takes time for files and none for pixels; jitter and blur take time, and threads stay as they were."""
    threads = torch.get_num_threads()
    view = View((64, 64), crop=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), blur_p=1.0)
    noise = np.random.default_rng(0).integers(0, 256, (16, 200, 200, 3), dtype=np.uint8)

    class Noise(Numbers):
        def read(self, index):
            return noise[index]

    def measured(source, view):
        return measure_parts(take_sample(source, 16), Augmentation((view,)), torch.device("cpu"), 0.2)

    pixels = measured(Noise(16), view)
    assert pixels.decode < 0.3 * pixels.crop + 0.05
    assert min(pixels.crop, pixels.colours, pixels.normalise, pixels.read) > 0
    assert pixels.a_core == pytest.approx(1000 / sum(pixels))
    assert pixels.a_worker > pixels.a_core
    assert measured(Noise(16), View((64, 64))).colours < 0.5 * pixels.colours
    assert torch.get_num_threads() == threads


def test_files_take_time_to_decode(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    for number in range(6):
        Image.fromarray(noise).save(tmp_path / f"{number}.jpg")
    sample = take_sample(open_source(f"folder:{tmp_path}"), 6)
    parts = measure_parts(sample, Augmentation((View((32, 32)),)), torch.device("cpu"), 0.2)
    assert parts.decode > max(parts.crop, parts.colours, parts.normalise)


def test_bench_measures_the_step_of_a_method_and_compares_workers(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SECONDS_OF_STEPS", 0.0)
    words = ("--data", "shapes:count=64", "--method", "simsiam", "--augmentation", "evaluation", "--workers", 2)
    kinds = ("--worker-kind", "process", "thread", "process", "--engine", "torchvision")
    run(monkeypatch, "bench", *words, *kinds, "--seconds", 0.02, "--batch-size", 8)
    said = capsys.readouterr().out
    rows = [line.split("│")[1:3] for line in said.splitlines() if "torchvision, " in line]
    kinds = ("torchvision, process", "torchvision, thread")
    assert [[cell.strip() for cell in row] for row in rows] == [
        [n, k] for n in ("simsiam", "evaluation") for k in kinds
    ]
    assert re.search(r"^A core makes [\d,]+ images/s of simsiam, .*\nThe step takes [\d,]+ images/s: ", said, re.M)


def test_a_method_that_needs_all_images_first_is_refused(monkeypatch):
    sentence = "bench: deepcluster needs all images before its first step: give its rate as --step-rate IMAGES/S"
    refused(monkeypatch, sentence, "bench", "--data", "shapes:count=64", "--method", "deepcluster", "--batch-size", 8)
