"""The commands that look at data."""

import itertools
import time

import numpy as np
from PIL import Image

from fastssl.data.augmentation import Augmentation, View
from fastssl.data.contact_sheet import GAP, make_contact_sheet
from fastssl.data.findings import scan
from fastssl.data.loader import has_dali
from fastssl.data.source import open_source
from fastssl.data.timing import measure_throughput
from fastssl.methods import moco_v2, moco_v3
from fastssl.run import find_augmentation, method_names
from tests.support.command import refused, run
from tests.support.loaders import engines, poison

ENGINES = ["torchvision", *(["dali"] if has_dali() else [])]


def test_check_counts_sizes_formats_and_names_bad_files(monkeypatch, capsys, tmp_path):
    bad = poison(tmp_path / "data", good=40)
    run(
        monkeypatch,
        "data",
        "check",
        f"folder:{tmp_path / 'data'}",
        "--workers",
        2,
        "--seconds",
        0.1,
        "--bad-files",
        tmp_path / "bad.txt",
    )
    said = capsys.readouterr().out
    assert f"images       59 of the train split, {len(bad)} bad" in said
    assert "JPEG RGB 42" in said
    assert all(kind in said for kind in ("JPEG L 1", "JPEG CMYK 1", "PNG I;16 1", "GIF P 1", "WEBP RGB 1", "no labels"))
    assert "heights      40 to 60 pixels, median 40" in said
    named = [line.partition(": ")[0].rpartition("/")[2] for line in (tmp_path / "bad.txt").read_text().splitlines()]
    assert sorted(named) == bad
    assert said.count("\nbad ") == len(bad)
    for engine in ENGINES:
        assert f"\n{engine:<12} " in said
        assert "images/s" in said


def test_check_of_pixels_and_labels():
    found = scan(open_source("shapes:count=23,size=16"))
    assert (found.good, found.bad, found.formats) == (23, [], {"pixels RGB": 23})
    assert found.labels == {label: 3 if label < 3 else 2 for label in range(10)}
    assert set(found.heights.tolist()) | set(found.widths.tolist()) == {16}


def test_check_of_nothing_but_bad_files(monkeypatch, capsys, tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"")
    run(monkeypatch, "data", "check", f"folder:{tmp_path}", "--workers", 0)
    assert "images       1 of the train split, 1 bad" in capsys.readouterr().out


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
    )
    said = capsys.readouterr().out
    for name, engine in itertools.product(("moco_v2", "evaluation"), ENGINES):
        (line,) = [line for line in said.splitlines() if name in line and engine in line]
        rate, cpu = (float(cell.replace(",", "")) for cell in line.split("│")[3:5])
        assert rate > 0
        assert cpu > 0


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
    refused(monkeypatch, "data: name a command: check, show, got nothing", "data")
    refused(monkeypatch, "data: name a command: check, show, got look", "data", "look")
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
    refused(monkeypatch, f"data: --seed must be at least 0, got {10**23}", *show, "--seed", 10**23)
    refused(monkeypatch, "bench: --batch-size must be at least 1, got 0", *bench, "--batch-size", 0)
    refused(monkeypatch, "bench: --workers must be at least 0, got -1", *bench, "--workers", -1)
    refused(monkeypatch, "bench: --seconds must be at least 0, got nan", *bench, "--seconds", "nan")
    refused(monkeypatch, "bench: --engine must name at least one, got none", *bench, "--engine")
    refused(monkeypatch, "data: unknown engine 'x', there are torchvision, dali", *bench, "--engine", "x")
    (tmp_path / "x.jpg").write_bytes(b"")
    to = ("--to", tmp_path / "no" / "x.png")
    refused(monkeypatch, f"data: --to must be in a folder that exists, got {tmp_path}/no/x.png", *show, *to)
    refused(monkeypatch, "data: none of the images to show can be decoded", "data", "show", f"folder:{tmp_path}")
    refused(
        monkeypatch, "data: unknown engine 'x', there are torchvision, dali", "data", "show", "shapes", "--engine", "x"
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
