"""benchmarks/memory.py: following allocations, and the table of docs/methods.md."""

import dataclasses

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


def test_losses_and_what_was_learned_are_one_table(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CASES", TINY)
    monkeypatch.setattr(memory, "RESULTS", tmp_path / "results")
    known = {"densecl": {"score": "knn", "untrained": 0.25, "trained": 0.5}}
    monkeypatch.setattr(memory, "learned", known.get)
    page = tmp_path / "methods.md"
    page.write_text("\n".join(memory.MARKERS))
    monkeypatch.setattr(memory, "PAGE", page)
    for _ in range(2):  # the second measurement replaces the first
        assert memory.main(["--measure"]) == 0
    (path,) = store.machine_files(tmp_path / "results")
    assert len(store.rows_of(path)) == 2
    lines = page.read_text().splitlines()
    assert len(lines) == 2 + 2 + 3 + len(memory.NO_CASE)  # markers, header, and a line for each method
    assert any("densecl" in line and line.endswith("| 25.0% | 50.0% |") for line in lines)
    assert sum("simclr" in line and line.endswith("| – | – |") for line in lines) == 2
    assert memory.main(["--check"]) == 0
    page.write_text(page.read_text().replace("25.0%", "35.0%"))
    assert memory.main(["--check"]) == 1
    assert memory.main(["--render"]) == 0 and memory.main(["--check"]) == 0
