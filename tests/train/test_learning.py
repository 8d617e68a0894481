"""Learning of methods of images and text, and of iGPT, for minutes each.

`make test-learning` compares the other methods with what their recipes have learned (benchmarks/learning), and
`make test` does so with a method that learns within seconds.
"""

import json
import sys

import pytest

import fastssl
from fastssl import cli

RISE = 0.05  # points of accuracy; batch statistics alone, at a learning rate of 0, add less
EPOCHS = {"clip": 8, "siglip": 16, "albef": 14}  # of methods of images and text
# Least share of 1,000 images, and of their captions, with one another among the first 10; 1 % by chance. Measured were
# 75 % and more.
LEAST_RECALL = {"clip": 0.5, "siglip": 0.5, "albef": 0.5}


@pytest.mark.exhaustive
@pytest.mark.parametrize("words", [[], ["--lr", "0"]], ids=["as it is", "learning rate 0"])
def test_igpt_learns_digits(words, tmp_path, monkeypatch):
    """The mean features of larger images tell their colours."""
    folder = tmp_path / "run"
    options = ["--data", "digits", "--folder", str(folder), "--no-tensorboard", "--workers", "0"]
    command = ["fastssl", "pretrain", "igpt", *options, "--epochs", "5", "--image-size", "8", "8", *words]
    monkeypatch.setattr(sys, "argv", command)
    cli.main()
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    untrained, trained = [line["accuracy"] for line in lines if line["evaluation"] == "knn"]
    print(f"kNN {untrained:.1%} untrained, {trained:.1%} trained")
    assert (trained - untrained >= RISE) == (not words)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", EPOCHS)
def test_captions_are_found(method, tmp_path):
    run = fastssl.pretrain(
        method, "captions", folder=tmp_path / "run", epochs=EPOCHS[method], tensorboard=False, workers=0
    )
    recall = run.retrieval()
    print(f"{method}: {recall}")
    assert min(recall.image_to_text[10], recall.text_to_image[10]) >= LEAST_RECALL[method]
