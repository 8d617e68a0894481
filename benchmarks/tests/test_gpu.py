"""benchmarks/gpu: the whole run on a CPU with tiny sizes, what a cut-off run leaves, and the pack."""

import json
import time
import zipfile

import pytest
import torch

from benchmarks import harness
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import pack as packing
from benchmarks.gpu import render
from benchmarks.gpu.adopt import adopt
from benchmarks.gpu.loaders import _slower
from benchmarks.gpu.profile import covered
from benchmarks.gpu.record import Clock, Record
from benchmarks.gpu.sweeps import Sweep, measure

LARGE_FILE = 3 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")
def test_dry_run(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark would measure nothing
    assert gpu.main(["--dry-run", "--minutes", "15", "--out", str(tmp_path)]) == 0, capfd.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == list(gpu.PHASES)
    assert all(phase["rows"] > 0 for phase in summary.values())
    assert len(list(tmp_path.iterdir())) == len(gpu.PHASES) + 1
    phases = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in summary}
    assert all(phase["state"] == "finished" and phase["dry_run"] for phase in phases.values())
    assert {row["family"] for row in phases["ops"]["rows"]} == {"contrastive", "attention"}
    assert {row["outcome"] for row in phases["tests"]["rows"]} == {"skipped"}
    assert phases["steps"]["rows"][0]["operations"] > 1e6
    assert all(render.tables[name](phases[name]) for name in render.tables)
    assert adopt(tmp_path, tmp_path / "results") == 1  # figures of a dry run are refused
    assert "dry run" in capfd.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("benchmarks.machine.DEVICE", torch.device("cpu"))
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    assert "--dry-run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_shares_are_those_of_a_whole():
    assert sum(share for share, _ in gpu.PHASES.values()) == pytest.approx(1)


def test_a_hanging_phase_is_ended_and_keeps_its_rows(tmp_path, monkeypatch):
    """The phase is a program that writes one row, starts a child that ignores everything, and sleeps."""
    program = tmp_path / "program.py"
    program.write_text(
        "import subprocess, sys, time; from pathlib import Path; from benchmarks.gpu.record import Record\n"
        f"record = Record(Path({str(tmp_path)!r}), 'facts')\n"
        "record.add({'fact': 1}); print('last words', flush=True)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)\n"
    )
    start = gpu.subprocess.Popen
    python = gpu.sys.executable
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command, **options: start([python, program], **options))
    monkeypatch.setenv("PYTHONPATH", str(packing.ROOT))
    began = time.monotonic()
    summary = gpu.run(["facts"], minutes=8 / 60, folder=tmp_path, dry=True)
    assert time.monotonic() - began < 30
    assert summary["facts"]["state"].startswith("cut off (ended after")
    assert summary["facts"]["rows"] == 1
    assert summary["facts"]["output"] == ["last words"]


def test_time_that_a_phase_leaves_goes_to_later_ones(tmp_path, monkeypatch):
    given = {}

    def ends_at_once(name, seconds, folder, dry):
        given[name] = seconds
        return {"state": "finished", "seconds": 0.0, "rows": 1, "output": []}

    monkeypatch.setattr(gpu, "_run_phase", ends_at_once)
    gpu.run(["facts", "ops"], minutes=1, folder=tmp_path, dry=True)
    assert given["facts"] == pytest.approx(60 * 0.03 / 0.28, abs=0.5)
    assert given["ops"] == pytest.approx(60, abs=0.5)


def test_a_sweep_finds_the_faster_value_and_restores_the_table(tmp_path):
    table = {"naps": 5}

    def run():
        if table["naps"] == 2:
            raise RuntimeError("out of resource: shared memory")
        time.sleep(table["naps"] * 2e-3)
        return torch.ones(2) * (3 if table["naps"] == 0 else 1)

    record = Record(tmp_path, "sweeps")
    proposal = measure(Sweep("naps", table, "naps", [0, 1, 2, 5], run), Clock(60), record, repeats=3)
    assert proposal.startswith("5 → 1: ")
    assert table == {"naps": 5}
    rows = {row["value"]: row for row in record.content["rows"]}
    assert "wrong" in rows["0"]["failed"] and "shared memory" in rows["2"]["failed"]
    assert rows["5"]["present"] and rows["1"]["us"] < rows["5"]["us"]


def test_gaps_are_what_no_kernel_covers():
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4
    assert covered([]) == 0


def test_the_slower_of_step_and_loader(tmp_path):
    row = {"case": "mae-vit-base", "precision": "bf16", "images_per_second": {"ours": [1, 5000.0, 1]}}
    (tmp_path / "steps.json").write_text(json.dumps({"rows": [row]}))
    record = Record(tmp_path, "loaders")
    for rate in (3000.0, 4000.0):
        record.add({"augmentation": "mae", "images_per_second": rate})
    assert _slower(record) == {"mae": "the loader: step 5,000, loader 4,000 images/s"}


def test_adopted_rows_replace_those_of_the_same_case(tmp_path):
    about = {"dry_run": False, "machine": {"slug": "card", "name": "Card"}, "environment": {"commit": "a"}}
    run, results = tmp_path / "run", tmp_path / "results"
    run.mkdir()
    for ms in (1.0, 2.0):
        rows = [{"family": "queue", "op": "enqueue_", "size": "small", "ms": ms}, {"failed": "test_x", "reason": "y"}]
        (run / "ops.json").write_text(json.dumps(about | {"rows": rows}))
        (run / "steps.json").write_text(json.dumps(about | {"rows": [{"case": "mae", "precision": "bf16", "ms": ms}]}))
        (run / "facts.json").write_text(json.dumps(about | {"rows": []}))
        assert adopt(run, results, pages=False) == 0
    for path in (results / "card.json", results / "step" / "card.json"):
        (stored,) = [row for run in json.loads(path.read_text())["runs"] for row in run["rows"]]
        assert stored["ms"] == 2.0
    assert (results / "gpu" / "card" / "facts.json").is_file()


def wheel_of(package, folder, python):
    """A wheel with one module; that of "large" does not fit into one part."""
    name = package.replace("-", "_")
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", f"NAME = {name!r}\n")
        if package == "large":
            file.writestr("large.bin", bytes(torch.randint(256, (LARGE_FILE,), dtype=torch.uint8).tolist()))
        file.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{name}-1.0.dist-info/RECORD", "")


@pytest.mark.slow
def test_a_pack_is_carried_in_parts_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packing, "WHEELS", ("small-one",))
    limit = 2**20 + 2**20  # pieces are a megabyte smaller
    monkeypatch.setattr(packing, "ROOT", tmp_path)  # no kernels here
    parts = packing.pack(tmp_path / "pack", "3.12", limit, large=("large",), download=wheel_of)
    assert len(parts) == 1 + 4
    site, package = tmp_path / "site", tmp_path / "fastssl"
    package.mkdir()
    packing.unpack(parts[3:], site, package)  # in any order
    assert "2 of 4 pieces of DALI are here" in capsys.readouterr().out
    packing.unpack(parts[:3], site, package)
    assert (site / "small_one.py").is_file() and (site / "large.bin").stat().st_size == LARGE_FILE
    assert not list(site.glob("*-of-*"))
    damaged = next((parts[1] / "pieces").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(SystemExit, match=r"damaged: carry part-1 again"):
        packing.unpack(parts[:2], site, package)


def test_a_right_rival_is_timed_and_a_wrong_one_left_out_with_its_reason():
    case = harness.Case(
        op="sum",
        size="",
        kernel="",
        contestants=dict.fromkeys(("ours", "official"), lambda: torch.ones(2)),
        rivals={"right": lambda: torch.ones(2), "wrong": lambda: torch.zeros(2), "broken": lambda: 1 / 0},
    )
    right, left_out = harness.right_rivals(case, harness.check(case))
    assert list(right) == ["right"]
    assert left_out["wrong"].startswith("WrongResult: ") and left_out["broken"].startswith("ZeroDivisionError: ")
