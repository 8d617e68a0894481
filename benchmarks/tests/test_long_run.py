"""benchmarks/long_run.py: a run is killed halfway and continued by the same command."""

import pytest

from benchmarks import long_run
from benchmarks.learning import results
from fastssl.eval.few_labels_table import ROWS, Measured
from fastssl.eval.labels import Accuracy
from fastssl.run import Run

FEW = [Measured(start, classifier, 100, (0.25, 0.5)) for start, classifier in ROWS]


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """Runs and results in a folder of their own; classifiers of known accuracy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(long_run, "EVERY", 0.05)
    monkeypatch.setattr(long_run, "POINTS", 1)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(Run, "linear", lambda run: Accuracy(0.75, 0.9))
    monkeypatch.setattr(Run, "few_labels", lambda run: FEW)


@pytest.mark.slow
def test_a_run_is_killed_and_continued(alone, tmp_path):
    row = long_run.measure(("mae", "patterns:count=1024", 4))
    assert 2.5 <= row["killed"] < 4
    assert row["resumed"] in (2, 3) and 0 <= row["killed"] - row["resumed"] <= 1  # the last epoch's checkpoint
    assert row["images_seen"] == 4 * 1024 and row["command"].endswith("--resume auto")
    assert row["curve"]["knn"][-1] == [4.0, row["trained"]]
    results.add(long_run.NAME, row, lambda old: True, long_run._key)
    text = long_run.render()
    assert "| `mae` | 4,096 |" in text and f"| {row['killed']:.2f}, {row['resumed']:.2f} |" in text
    assert "| `mae` | 100 | 37.5% ± 17.7% |" in text
    with pytest.raises(SystemExit):
        long_run.main(["--methods", "mae"])  # its folder exists


def test_a_run_that_ends_by_itself_is_an_error(alone, tmp_path):
    with pytest.raises(RuntimeError, match="ended with status 1 before epoch 3"):
        long_run.kill_at(["pretrain", "nothing"], tmp_path / "run", 3)
    assert long_run.render().startswith("No measurements yet")
