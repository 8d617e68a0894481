"""benchmarks/loader.py and the files beside it, at sizes that take seconds."""

import itertools
import os
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import loader, loader_clock, loader_facts, loader_rivals, loader_table, store
from benchmarks.loader_rivals import BASELINE, RIVALS, Setting, Views, installed
from fastssl.data.augmentation import evaluation
from fastssl.data.packing import KINDS
from fastssl.data.source import open_source

ENGINES = ["fastssl, folder", *(["fastssl on DALI, folder"] if find_spec("nvidia.dali") else [])]


@pytest.fixture
def photo():
    """A smooth picture, whose resampled pixels differ little between libraries."""
    ramp = torch.linspace(0, 255, 80)
    pixels = torch.stack([ramp[:64, None].expand(64, 80), ramp.expand(64, 80), 255 - ramp.expand(64, 80)], 2)
    return Image.fromarray(pixels.byte().numpy())


@pytest.fixture
def setting(tmp_path, photo):
    root = tmp_path / "photos-64"
    loader.write_photographs(root, 64, [photo], copies=8)
    return Setting(root, tmp_path / "shards-64", tmp_path, evaluation((48, 48)), batch=4, workers=1)


@pytest.mark.slow
def test_every_contestant_has_a_row(monkeypatch):
    """Ours read a folder, tar shards and packs, beside two of the rivals, which have tests of their own."""
    pytest.importorskip("skimage")
    for name, value in {"ROUNDS": 1, "SECONDS": 0.05, "BATCH": 8, "COPIES": 4, "SIDE": 32, "WORKERS": 1}.items():
        monkeypatch.setattr(loader, name, value)
    monkeypatch.setattr(loader, "RIVALS", {name: RIVALS[name] for name in (BASELINE, "ImageFolder, tensors")})
    ((row,),) = loader.measure(("mae",))
    assert (row["augmentation"], row["side"], row["batch"]) == ("mae", 32, 8)
    ours = {*ENGINES, "fastssl, webdataset", *(f"fastssl, pack, {kind}" for kind in KINDS if kind != "copy")}
    rivals = set(loader.RIVALS)
    for column in ("images_per_second", "ratio", "ratio_best", "cpu_seconds", "memory_mb"):
        assert set(row[column]) == ours | rivals
    assert min(row["images_per_second"].values()) > 0 and min(row["cpu_seconds"].values()) >= 0
    assert row["ratio"][BASELINE] == row["ratio_best"][row["best"]] == 1
    assert row["best"] in rivals
    assert len(loader_table._lines(row)) == len(ours | rivals)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in RIVALS if name != BASELINE])
def test_rivals_make_the_same_views(name, setting):
    """Without randomness each gives what the baseline gives, up to the difference of two resamplings."""
    if not installed(RIVALS[name]):
        pytest.skip(f"{RIVALS[name].package} is not installed")
    expected = next(RIVALS[BASELINE].start(setting)())
    batches = RIVALS[name].start(setting)()
    for views in itertools.islice(batches, 3):  # more than an epoch
        assert [(view.dtype, view.shape) for view in views] == [(torch.float32, (4, 3, 48, 48))]
        assert (views[0] - expected[0]).abs().mean() < 0.03  # of a standard deviation: two levels of 255
    del batches


def test_views_of_tensors_are_those_of_pictures(photo):
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    (ours,), (other,) = (Views(evaluation((48, 48)), tensors)(x) for tensors, x in ((False, photo), (True, pixels)))
    assert (ours - other).abs().max() < 0.08


def test_a_contestant_with_other_views_is_refused():
    start = loader.checked("short", lambda: iter([[torch.zeros(loader.BATCH, 3, 8, 8)]]), evaluation((48, 48)))
    with pytest.raises(RuntimeError, match="short gives"):
        next(start())


def test_cost_counts_images_memory_and_started_processes():
    """A loader that holds 64 MB, and a process beside it that computes."""
    busy = [sys.executable, "-c", "import time\nend = time.time() + 30\nwhile time.time() < end: pass"]

    def start():
        held = torch.ones(16 * 2**20)
        with subprocess.Popen(busy) as process:
            try:
                while True:
                    time.sleep(0.02)
                    yield [held.new_zeros(5, 3)]
            finally:
                process.kill()

    result = loader_clock.cost(start, 0.3, warm_up=2, turns=2)
    assert 20 < result.images_per_second <= 5 / 0.02
    assert 60 < result.memory_mb < 200
    assert result.cpu_seconds * result.images_per_second / 1000 > 0.1  # cores in use
    assert loader_clock.tree()[0] == os.getpid()


def test_absent_rivals_are_named(monkeypatch):
    monkeypatch.setattr(loader_rivals, "installed", lambda rival: rival.package != "litdata")
    assert loader_rivals.absent() == ["litdata"]


ROW = {
    "augmentation": "mae",
    "side": 400,
    "batch": 32,
    "images_per_second": {"SPDL": 300.0, BASELINE: 100.0, "fastssl, folder": 600.0},
    "ratio": {"SPDL": 3.0, BASELINE: 1.0, "fastssl, folder": 6.0},
    "best": "SPDL",
    "ratio_best": {"SPDL": 1.0, BASELINE: 0.33, "fastssl, folder": 2.0},
    "cpu_seconds": {"SPDL": 3.0, BASELINE: 9.0, "fastssl, folder": 1.5},
    "memory_mb": {"SPDL": 100.0, BASELINE: 200.0, "fastssl, folder": 150.0},
    "others": 0.0,
    "absent": ["litdata"],
}
OLD = {"augmentation": "mae", "side": 256, "batch": 64, "images_per_second": {BASELINE: 50.0}, "ratio": {BASELINE: 1.0}}
FACT = {"measurement": "packing", "case": "jpeg", "values": {"images/s a core": 1234}, "others": 0.5}
SOFTWARE = {"level": "avx2", "torch": "2", "spdl": "1", "litdata": "not installed", "commit": "abc", "date": "today"}


def rendered(tmp_path, *rows):
    machine = {"slug": "x", "name": "X"}
    return loader_table.render([store.add(tmp_path, machine, SOFTWARE, rows, replaces=lambda row: False)])


def test_tables_show_ours_first_and_name_what_is_absent(tmp_path):
    text = rendered(tmp_path, ROW, FACT)
    lines = [line for line in text.splitlines() if line.startswith("| `mae`")]
    assert lines == [
        "| `mae`, 400 | fastssl, folder | 600 | 6.0× | 2.0× | 1.50 | 150 |",
        "| `mae`, 400 | **SPDL** | 300 | 3.0× | 1.0× | 3.00 | 100 |",
        f"| `mae`, 400 | {BASELINE} | 100 | 1.0× | 0.33× | 9.00 | 200 |",
    ]
    assert "torch 2, SPDL 1 · batch 32 · commit `abc` · today" in text
    assert "Not installed, so not measured: litdata." in text
    assert "| packing | jpeg (busy: 50%) | 1,230 images/s a core |" in text


def test_a_disturbed_row_has_no_ratios(tmp_path):
    line = next(line for line in rendered(tmp_path, ROW | {"others": 0.4}).splitlines() if line.startswith("| `mae`"))
    assert line == "| `mae`, 400 (busy: 40%) | fastssl, folder | 600 | – | – | 1.50 | 150 |"


def test_rows_without_later_columns_are_shown(tmp_path):
    text = rendered(tmp_path, OLD)
    assert f"| `mae`, 256 | {BASELINE} | 50.0 | 1.0× | – | – | – |" in text
    assert loader_table.FACTS_LEGEND not in text


def test_without_results_the_command_is_named():
    assert "`python -m benchmarks.loader`" in loader_table.render([])


def test_a_measurement_replaces_its_own_rows_alone(tmp_path, monkeypatch):
    """--only: the other rows stay, and an older case of the same measurement goes."""
    pytest.importorskip("cpuinfo")
    page = tmp_path / "page.md"
    page.write_text("\n".join(loader_table.MARKERS))
    monkeypatch.setattr(loader, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(loader, "PAGE", page)
    monkeypatch.setattr(loader, "measure", lambda names: iter([[ROW | {"augmentation": name}] for name in names]))
    cases = iter(["jpeg, 400 to 320 pixels", "jpeg, 400 to 256 pixels"])
    packing = {"packing": lambda root: [{"case": next(cases), "values": {"images/s a core": 1}}]}
    monkeypatch.setattr(loader_facts, "FACTS", packing)
    monkeypatch.setattr(loader, "write_photographs", lambda *arguments, **options: None)
    monkeypatch.setattr(loader, "keep_freed_memory", lambda: None)
    assert loader.main([]) == 0
    assert loader.main(["--only", "packing", "dino"]) == 0
    (path,) = (tmp_path / "kept").glob("*.json")
    rows = store.rows_of(path)
    assert sorted(row["augmentation"] for row in rows if "augmentation" in row) == sorted(loader.AUGMENTATIONS)
    assert [row["case"] for row in rows if "measurement" in row] == ["jpeg, 400 to 256 pixels"]
    assert loader.main(["--check"]) == 0
    page.write_text("\n".join([loader_table.MARKERS[0], "**AMD** **X**", loader_table.MARKERS[1]]))
    assert loader.main(["--render"]) == 0 and "| packing |" in page.read_text()


@pytest.mark.parametrize("kind", ["folder", "webdataset", "pack"])
def test_sources_to_open_hold_what_they_say(kind, tmp_path, monkeypatch, photo):
    for name, value in {"FILES": 25, "FILES_PER_FOLDER": 10, "SAMPLES": 25, "SAMPLES_PER_SHARD": 10}.items():
        monkeypatch.setattr(loader_facts, name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    path, write = loader_facts.SOURCES[kind]
    write(data, b"not an image")
    held_out = 0 if kind == "pack" else len(open_source(f"{kind}:{tmp_path / path}", "test"))
    assert len(open_source(f"{kind}:{tmp_path / path}")) + held_out == 25


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["packing", "memory", "floors"])
def test_facts_have_values(name, setting, monkeypatch):
    for field, value in {"EPOCHS": 2, "WORKERS": 1, "BATCH": 4, "FLOOR_SECONDS": 0.01}.items():
        monkeypatch.setattr(loader_facts, field, value)
    rows = list(loader_facts.FACTS[name](setting.photos))
    assert len({row["case"] for row in rows}) == len(rows) >= 2
    assert all(value > 0 for row in rows for value in row["values"].values())


@pytest.mark.slow
def test_a_folder_opens_in_a_new_process(tmp_path):
    (tmp_path / "data" / "0").mkdir(parents=True)
    (tmp_path / "data" / "0" / "a.jpg").touch()
    assert 0 < loader_facts._seconds_to_open("folder:data", tmp_path) < 60
