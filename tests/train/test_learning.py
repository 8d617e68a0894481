"""Learning itself: short runs on shapes, each of which must lift kNN over the untrained encoder by what it states."""

import json
import sys

import pytest

from fastssl import cli

# Options, and a lift of about half of what was seen: 4.8, 4.3, 7.6 and 11.2 points on two cores, with two more epochs
# of mae and one more of the others. With a learning rate of 0, moco_v2 fell by 2.8 points and moco_v3 rose by 0.5.
RUNS = {
    "mae": (
        [
            "--epochs",
            "10",
            "--image-size",
            "32",
            "32",
            "--crop-min",
            "0.5",
            "--mask-ratio",
            "0.75",
            "--batch-size",
            "32",
        ],
        0.02,
    ),
    "moco_v1": (["--epochs", "5"], 0.02),
    "moco_v2": (["--epochs", "5"], 0.03),
    "moco_v3": (["--epochs", "3"], 0.05),
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
