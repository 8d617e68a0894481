"""The commands that look at data."""

import itertools
import re
import time

import numpy as np
import torch
from PIL import Image

import fastssl
from fastssl.data.augmentation import Augmentation, View
from fastssl.data.contact_sheet import GAP, make_contact_sheet
from fastssl.data.findings import scan
from fastssl.data.loader import has_dali
from fastssl.data.parts import Parts
from fastssl.data.source import open_source
from fastssl.data.split import NOTHING_HELD_OUT
from fastssl.data.timing import measure_throughput
from fastssl.method_modules import find_augmentation, method_names
from fastssl.methods import moco_v2, moco_v3
from tests.support import toy_method
from tests.support.command import refused, run
from tests.support.loaders import engines, poison
from tests.support.tokenizers import tokenizer_file

ENGINES = ["torchvision", *(["device"] if torch.cuda.is_available() else []), *(["dali"] if has_dali() else [])]


def test_check_counts_sizes_formats_and_names_bad_files(monkeypatch, capsys, tmp_path):
    bad = poison(tmp_path / "data", good=40)
    run(
        monkeypatch,
        "data",
        "check",
        f"folder:{tmp_path / 'data'}",
        "--split",
        "both",
        "--workers",
        2,
        "--seconds",
        0.1,
        "--bad-files",
        tmp_path / "bad.txt",
    )
    said = capsys.readouterr().out
    rows = {line[:17].strip(): line[17:].split() for line in said.splitlines()}
    assert rows["images"] == ["59", "12"]
    assert rows["bad images"][0] == str(len(bad))
    assert rows["without a label"] == ["59", "12"]
    assert rows["classes"] == ["0", "0"]
    assert "40 to 60, median 40" in said
    formats = {kind: re.search(rf"^{kind} +(\d+)", said, re.MULTILINE)[1] for kind in ("JPEG RGB", "JPEG L", "GIF P")}
    assert formats == {"JPEG RGB": "42", "JPEG L": "1", "GIF P": "1"}
    assert all(kind in said for kind in ("JPEG CMYK", "PNG I;16", "WEBP RGB"))
    assert f"note  {NOTHING_HELD_OUT}\n" in said
    named = [line.partition(": ")[0].rpartition("/")[2] for line in (tmp_path / "bad.txt").read_text().splitlines()]
    assert sorted(named) == bad
    assert said.count("\nbad   ") == len(bad)
    for engine in ENGINES:
        assert f"\n  {engine:<12} " in said
        assert "images/s" in said


def test_check_of_pixels_and_labels():
    found = scan(open_source("shapes:count=23,size=16"))
    assert (found.good, found.bad, found.formats) == (23, [], {"pixels RGB": 23})
    assert found.labels == {label: 3 if label < 3 else 2 for label in range(10)}
    assert set(found.heights.tolist()) | set(found.widths.tolist()) == {16}


def test_a_check_that_is_refused_empties_no_file(monkeypatch, tmp_path):
    kept = tmp_path / "bad.txt"
    kept.write_text("precious\n")
    refused(
        monkeypatch, "data: /nonexistent is not a folder", "data", "check", "folder:/nonexistent", "--bad-files", kept
    )
    assert kept.read_text() == "precious\n"
    sentence = f"data: --bad-files {tmp_path} can't be written (Is a directory)"
    refused(monkeypatch, sentence, "data", "check", "shapes:count=8,size=8", "--bad-files", tmp_path)


def test_check_of_nothing_but_bad_files(monkeypatch, capsys, tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"")
    run(monkeypatch, "data", "check", f"folder:{tmp_path}", "--workers", 0)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["images", "1", "1"] in rows
    assert ["bad", "images", "1", "1"] in rows


def checked(monkeypatch, capsys, spec, *words):
    """The page of `data check` as {first words: the rest}, and its notes."""
    run(monkeypatch, "data", "check", spec, "--workers", 0, "--seconds", 0, *words)
    lines = capsys.readouterr().out.splitlines()
    rows = [re.split(r" {2,}", line.strip()) for line in lines]
    return {row[0]: row[1:] for row in rows if row[0] != "note"}, [row[1] for row in rows if row[0] == "note"]


def test_check_compares_both_splits(monkeypatch, capsys, tmp_path):
    """Classes and images on both sides, images without a label, and the range of the values."""
    labels, images = np.array([0] * 10 + [1] * 5 + [3] + [-1] * 4), np.full((20, 8, 6), 7, np.uint8)
    images[3, 2, 2] = 200
    np.savez(tmp_path / "x.npz", images=images, labels=labels)
    rows, notes = checked(monkeypatch, capsys, f"arrays:{tmp_path / 'x.npz'}")
    assert rows["images"] == ["17", "3"]
    assert rows["without a label"] == ["4", "0"]
    assert rows["classes"] == ["3", "2"]
    assert rows["missing classes"] == ["1: 2", "2: 2, 3"]
    assert rows["images of a class"] == ["1 to 8", "1 to 2"]
    assert (rows["height"], rows["width"]) == (["8", "8"], ["6", "6"])
    assert rows["size per image"] == ["144 bytes", "144 bytes"]
    assert rows["names of the classes: 0, 1, 2, 3"] == []
    assert rows["pixels RGB"] == ["17", "3", "7 to 200 (8 bits)"]
    assert notes == [
        "4 of 20 images have no label: they train, and evaluations leave them out",
        "no image is held out of classes that have only one: 3",
    ]
    rows, _ = checked(monkeypatch, capsys, f"arrays:{tmp_path / 'x.npz'}", "--split", "test")
    assert (rows["images"], rows["missing classes"]) == (["3"], ["2: 2, 3"])


def test_check_says_what_was_passed_over(monkeypatch, capsys, tmp_path):
    """A messy folder fits one screen."""
    for path in [*(f"{name}/{i}.png" for name in ("cat", "[red]dog\n") for i in range(5)), "thumb.png", "runs/x.png"]:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / path)
    (tmp_path / "owl").mkdir()
    (tmp_path / "owl" / "a.xcf").write_text("")
    (tmp_path / "cat" / "bad\x1b.jpg").write_text("")
    rows, notes = checked(monkeypatch, capsys, f"folder:{tmp_path}")
    assert r"names of the classes: [red]dog\n, cat" in rows
    assert notes == [
        "images in no class folder are passed over, 1: thumb.png",
        "folders without an image that can be read here are no classes: owl (1 .xcf)",
        "files passed over: 1 .xcf",
        "folders that fastssl wrote are passed over: runs",
    ]
    assert rows["bad"] == [rf"{tmp_path}/cat/bad\x1b.jpg: the file is empty"]
    assert len(rows) + len(notes) < 40


def test_check_of_a_split_without_labels(monkeypatch, capsys, tmp_path):
    for path in ("train/a/0.png", "train/b/0.png", "val/0.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / path)
    rows, notes = checked(monkeypatch, capsys, f"folder:{tmp_path}")
    assert (rows["without a label"], rows["classes"]) == (["0", "1"], ["2", "0"])
    assert notes == [
        "val: there are no labels, as the images are in no folder: 1 of 1",
        "the held-out split has no labels, unlike the training split: nothing can be evaluated",
    ]


def test_a_run_names_the_split_without_labels(capsys, tmp_path):
    pixels = np.zeros((32, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "x.npz", x_train=pixels, y_train=np.arange(32) % 2, x_test=pixels)
    fast = {"epochs": 1, "batch_size": 16, "workers": 0, "tensorboard": False}
    fastssl.pretrain(toy_method, f"arrays:{tmp_path / 'x.npz'}", folder=tmp_path / "run", **fast)
    sentence = "the held-out split has no labels, unlike the training split: nothing can be evaluated\n"
    assert capsys.readouterr().out.count(sentence) == 1


def test_check_goes_on_without_a_test_split(monkeypatch, capsys, tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.arange(3))
    rows, notes = checked(monkeypatch, capsys, f"arrays:{tmp_path / 'x.npz'}")
    assert rows["images"] == ["3"]
    assert notes[0].startswith(f"no held-out split: data: {tmp_path}/x.npz must have a class with two labelled images")


def test_show_does_not_change_the_folder_that_it_shows(monkeypatch, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (32, 32)).save(tmp_path / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "data", "show", "folder:.", "--image-size", 8, 8)
    assert (tmp_path / "fastssl-views.png").is_file()
    source = open_source("folder:.")
    assert (source.classes, source.notes) == (["cat", "dog"], ("files passed over: 1 fastssl-*",))
    for path in ("views.png", "cat/views.JPG"):
        sentence = (
            "data: --to must be outside of the folder that is looked at, or its name must start with fastssl-, as it "
            f"would become an image of that folder, got {tmp_path / path}"
        )
        refused(monkeypatch, sentence, "data", "show", "folder:.", "--to", path)
    (tmp_path / "runs").mkdir()
    run(monkeypatch, "data", "show", "folder:.", "--image-size", 8, 8, "--to", "runs/preview.png")
    assert open_source("folder:.").classes == ["cat", "dog"]


@engines
def test_show_writes_what_a_method_sees(engine, monkeypatch, capsys, tmp_path):
    path = tmp_path / "views.png"
    run(
        monkeypatch,
        "data",
        "show",
        "shapes:count=40",
        "--augmentation",
        "moco_v3",
        "--engine",
        engine,
        "--rows",
        3,
        "--columns",
        2,
        "--image-size",
        24,
        32,
        "--to",
        path,
    )
    assert capsys.readouterr().out.strip() == str(path)
    assert Image.open(path).size == (4 * (32 + GAP) - GAP, 3 * (24 + GAP) - GAP)


def test_show_takes_the_tokenizer_of_a_method(monkeypatch, tmp_path):
    """Whose stride of 4 makes both views equally large."""
    path, words = tmp_path / "views.png", ("data", "show", "shapes:count=4", "--tokenizer", tokenizer_file())
    run(monkeypatch, *words, "--augmentation", "beit", "--rows", 1, "--columns", 1, "--to", path)
    assert Image.open(path).size == (2 * (32 + GAP) - GAP, 32)
    for name in ("moco_v2", "evaluation"):
        sentence = f"data: --tokenizer is for a method that predicts its codes, {name} does not, got {tokenizer_file()}"
        refused(monkeypatch, sentence, *words, "--augmentation", name)
    sentence = "bench: --tokenizer is for a method that predicts its codes (--method beit), got x"
    refused(monkeypatch, sentence, "bench", "--data", "shapes", "--tokenizer", "x")


@engines
def test_a_sheet_shows_the_pixels_themselves(engine):
    source = open_source("shapes:count=40")
    canvas = np.asarray(make_contact_sheet(source, Augmentation((View((32, 32)),)), engine, rows=4, columns=1))
    for row, index in enumerate((0, 13, 26, 39)):
        assert np.array_equal(canvas[row * (32 + GAP) :][:32], source.read(index))


def test_bench_prints_a_row_for_each_recipe_and_engine(monkeypatch, capsys):
    run(
        monkeypatch,
        "bench",
        "--data",
        "shapes:count=64",
        "--augmentation",
        "moco_v2",
        "evaluation",
        "--workers",
        0,
        "--seconds",
        0.05,
        "--batch-size",
        16,
        "--step-rate",
        1,
    )
    said = capsys.readouterr().out
    for name, engine in itertools.product(("moco_v2", "evaluation"), ENGINES):
        (line,) = [line for line in said.splitlines() if name in line and engine in line]
        rate, cpu = (float(cell.replace(",", "")) for cell in line.split("│")[3:5])
        assert rate > 0
        assert cpu > 0

    for part in (*Parts._fields, "all", "images/s a core", "whole loader"):
        (line,) = [line for line in said.splitlines() if line.startswith(f"│ {part}")]
        values = [float(cell.split()[0].replace(",", "")) for cell in line.split("│")[2:4]]
        assert min(values) >= 0
        assert part in Parts._fields or min(values) > 0
    assert re.search(r"^A core makes [\d,]+ images/s of moco_v2, ", said, re.M)
    assert "The step takes 1 images/s: 1 core feeds it, there are " in said


def test_recipes_by_name(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (90, 70)).save(photos / "x.png")
    large, small = open_source(f"folder:{photos}"), open_source("shapes")
    assert find_augmentation("moco_v3", large) == moco_v3.Config.paper().augmentation
    assert find_augmentation("moco_v2", small) == moco_v2.Config.small().augmentation
    assert find_augmentation("moco_v2", large, (32, 64)).views[0].size == (32, 64)
    assert len(find_augmentation("multi_crop", large).views) == 8
    assert find_augmentation("evaluation", large, (32, 32)).views[0].centre == 0.875


def test_mistakes_get_one_sentence(monkeypatch, tmp_path):
    refused(monkeypatch, "data: name a command: check, show, pack, got nothing", "data")
    refused(monkeypatch, "data: name a command: check, show, pack, got look", "data", "look")
    refused(
        monkeypatch,
        f"data: unknown augmentation 'x', there are {', '.join(method_names())}, multi_crop, evaluation",
        "data",
        "show",
        "shapes",
        "--augmentation",
        "x",
    )
    refused(monkeypatch, "data: --rows must be at least 1, got 0", "data", "show", "shapes", "--rows", "0")
    show, bench = ("data", "show", "shapes"), ("bench", "--data", "shapes")
    refused(monkeypatch, "data: --image-size must be at least 1, got -4 8", *show, "--image-size", "-4", "8")
    refused(monkeypatch, f"data: --seed must be at least 0 and below 2**63, got {10**23}", *show, "--seed", 10**23)
    refused(monkeypatch, "bench: --batch-size must be at least 1, got 0", *bench, "--batch-size", 0)
    refused(monkeypatch, "bench: --workers must be at least 0, got -1", *bench, "--workers", -1)
    refused(monkeypatch, "bench: --seconds must be at least 0, got nan", *bench, "--seconds", "nan")
    refused(monkeypatch, "bench: --engine must name at least one, got none", *bench, "--engine")
    refused(monkeypatch, "data: unknown engine 'x', there are torchvision, device, dali", *bench, "--engine", "x")
    refused(monkeypatch, "bench: --step-rate must be above 0, got 0.0", *bench, "--step-rate", 0)
    refused(monkeypatch, "data: --worker-kind must be auto, process or thread, got 'x'", *bench, "--worker-kind", "x")
    (tmp_path / "x.jpg").write_bytes(b"")
    broken = ("bench", "--data", f"folder:{tmp_path}")
    refused(monkeypatch, "bench: none of the images to measure can be decoded, see fastssl data check", *broken)
    to = ("--to", tmp_path / "no" / "x.png")
    refused(monkeypatch, f"data: --to must be in a folder that exists, got {tmp_path}/no/x.png", *show, *to)
    refused(monkeypatch, "data: none of the images to show can be decoded", "data", "show", f"folder:{tmp_path}")
    refused(
        monkeypatch,
        "data: unknown engine 'x', there are torchvision, device, dali",
        "data",
        "show",
        "shapes",
        "--engine",
        "x",
    )


def test_speed_counts_images_and_seconds():
    """Batches of 10 images in 10 ms each are 1,000 images/s; the slow start is not counted."""

    def start():
        time.sleep(0.3)
        for _ in iter(int, 1):
            time.sleep(0.01)
            yield 10

    seen = measure_throughput(start, 0.3, warm_up=2)
    assert 500 < seen.images_per_second <= 1000
    assert 0 <= seen.cpu_seconds < 2
