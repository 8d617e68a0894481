"""benchmarks/memory.py: following allocations, and the table of docs/methods.md."""

import dataclasses
import json

import pytest
import torch

from benchmarks import memory, store
from benchmarks.memory import CASES
from benchmarks.memory_cases import DENSE, NT_XENT

TINY = [
    dataclasses.replace(NT_XENT, real=(64, 16), small=(32, 16)),
    dataclasses.replace(DENSE, real=(4, 9, 8, 16, 64), small=(2, 9, 8, 16, 32)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.methods[0])
def test_what_is_followed_is_what_a_run_takes(case):
    followed, (measured, _) = memory.followed(case, small=True), memory.measured(case.reference, case.small)
    assert measured == pytest.approx(followed, rel=memory.AGREEMENT)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.methods[0])
def test_the_reference_has_our_loss_and_gradients(case):
    """But for factors of the heads, which both make at random: there only that both are finite."""
    results = []
    for make in (case.reference, case.ours):
        torch.manual_seed(0)
        results.append(make(*case.small)())
    for theirs, ours in zip(*results, strict=True):
        assert theirs.shape == ours.shape
        if "predictive" in case.loss:
            assert ours.isfinite().all() and ours.abs().max() > 0
        elif "Barlow" in case.loss or "VICReg" in case.loss:  # gradients are differences of large terms
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max()))
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_freed_memory_is_not_counted():
    with memory.Allocations() as allocations:
        for _ in range(3):
            x = torch.empty(1000, device="meta")
            y = x + 1
            del x, y
        z = torch.empty(10, device="meta").add_(1).view(2, 5)
    assert allocations.peak == 8000
    assert allocations.held == 40 and z.shape == (2, 5)


def test_the_demo_prints_both_sides(monkeypatch, capsys):
    monkeypatch.setattr(memory, "DEMO", TINY)
    assert memory.main([]) == 0
    out = capsys.readouterr().out
    assert out.count("MB beside the inputs, measured") == 2 and out.count("reference") == 2
    assert "GB at most" in out


def test_losses_and_runs_enter_one_table(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CASES", TINY)
    monkeypatch.setattr(memory, "RESULTS", tmp_path / "results")
    page = tmp_path / "methods.md"
    page.write_text("\n".join(memory.MARKERS))
    monkeypatch.setattr(memory, "PAGE", page)
    run = tmp_path / "run"
    run.mkdir()
    config = {"method": "densecl", "options": {"data": "shapes:count=2048"}, "config": {"training": {"epochs": 3}}}
    (run / "config.json").write_text(json.dumps(config))
    lines = [{"evaluation": "knn", "accuracy": 0.25}, {"evaluation": "linear"}, {"evaluation": "knn", "accuracy": 0.5}]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for _ in range(2):  # the second measurement replaces the first
        assert memory.main(["--measure"]) == 0
        assert memory.main(["--runs", str(run)]) == 0
    (path,) = store.machine_files(tmp_path / "results")
    assert len(store.rows_of(path)) == 3
    lines = page.read_text().splitlines()
    assert len(lines) == 2 + 2 + 3  # markers, header, and a line for each method
    assert any("densecl" in line and "| 2,048 | 25.0% | 50.0% |" in line for line in lines)
    assert sum("simclr" in line and line.endswith("| – | – | – |") for line in lines) == 2
    assert memory.main(["--check"]) == 0
    page.write_text(page.read_text().replace("2,048", "4,096"))
    assert memory.main(["--check"]) == 1


def test_a_run_without_two_evaluations_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "evaluations.jsonl").write_text("")
    with pytest.raises(ValueError, match="must have kNN evaluations before and after training, got 0"):
        memory.add_runs([tmp_path])
