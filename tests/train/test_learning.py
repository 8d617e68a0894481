"""Learning itself: short runs on shapes, each of which must lift kNN over the untrained encoder by what it states."""

import json
import sys

import pytest

from fastssl import cli

RUNS = {
    "mae": (["--epochs", "8"], 0.05),
    "moco_v1": (["--epochs", "4"], 0.05),
    "moco_v2": (["--epochs", "4"], 0.05),
    "moco_v3": (["--epochs", "4"], 0.15),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", RUNS)
def test_knn_rises(tmp_path, monkeypatch, method):
    words, lift = RUNS[method]
    data = ["--data", "shapes:count=2048", "--folder", str(tmp_path / "run"), "--no-tensorboard", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", ["fastssl", "pretrain", method, *data, *words])
    cli.main()
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    untrained, trained = [line["accuracy"] for line in lines if line["evaluation"] == "knn"]
    assert trained - untrained >= lift, f"kNN went from {untrained:.1%} to {trained:.1%}"
