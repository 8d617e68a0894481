"""Every command on one tiny run, through the command line's own entry point."""

import json

import numpy as np
import pytest
import torch

from fastssl.method_modules import method_module
from fastssl.run import open_run
from fastssl.weights import GENERAL_FORMATS
from tests.support.command import run

DATA, CAPTIONED = "shapes:count=48,size=32", "captions:count=48,size=32"
TINY = ["--data", DATA, "--epochs", "1", "--batch-size", "16", "--workers", "0", "--no-tensorboard"]
SHORT = ["--epochs", "1", "--batch-size", "16", "--warmup-epochs", "0"]


def accuracies(folder) -> list[str]:
    """Names of the evaluations that were noted, each with a share as its accuracy."""
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert all(0 <= line["accuracy"] <= 1 for line in lines)
    return [line["evaluation"] for line in lines]


def use_every_command(
    monkeypatch, capsys, folder, method: str, *words: str, formats=GENERAL_FORMATS, refused=frozenset()
) -> None:
    """Pretrains, evaluates, embeds, exports, reports and resumes; `words` are options of `pretrain`.

    `refused` has "finetune" and formats that must be refused by a sentence, because the method has another encoder than
    these take.
    """

    def refuses(start: str, *command) -> None:
        with pytest.raises(SystemExit, match=rf"^fastssl: {start}: .*(encoder|has no|needs|has the names)"):
            run(monkeypatch, *command)

    module = method_module(method)
    has_text = hasattr(module.Config, "text")
    tiny = [CAPTIONED if has_text and word == DATA else word for word in TINY]
    run(monkeypatch, "pretrain", method, *tiny, "--folder", folder, *words)
    first = open_run(folder).state()["step"]
    assert first >= 1
    run(monkeypatch, "eval", "knn", folder, "--k", "5")
    run(monkeypatch, "eval", "linear", folder, "--optimizers", "lbfgs", "--epochs", "3")
    tuning = ["eval", "finetune", folder, *SHORT, "--labels", "0.5"]
    refuses("eval", *tuning) if "finetune" in refused else run(monkeypatch, *tuning)
    if hasattr(module, "linear_probe"):
        run(monkeypatch, "eval", "linear", folder, "--protocol", "official", *SHORT)
    evaluated = {"knn", "linear", "finetune"} - set(refused)
    if has_text:
        run(monkeypatch, "eval", "zeroshot", folder, "--data", CAPTIONED)
        run(monkeypatch, "eval", "retrieval", folder, "--data", CAPTIONED)
        evaluated |= {"zeroshot", "retrieval"}
    assert evaluated <= set(accuracies(folder))
    run(monkeypatch, "embed", folder, DATA, "--out", folder / "features.npz")
    features = np.load(folder / "features.npz")["features"]
    assert len(features) >= 48 and np.isfinite(features).all()
    official = getattr(module, "OFFICIAL", None)
    capsys.readouterr()
    for layout in (*formats, *([official] if official else [])):
        if layout in refused:
            refuses("export", "export", folder, "--format", layout)
            continue
        run(monkeypatch, "export", folder, "--format", layout)
        assert open_run(folder).folder.joinpath(capsys.readouterr().out.strip()).is_file()
    run(monkeypatch, "report", folder)
    page = (folder / "report.html").read_text()
    assert method in page and "Nearest neighbours" in page
    assert ("Retrieved pairs" in page) == ("Zero-shot classification" in page) == has_text
    run(monkeypatch, "pretrain", "--resume", folder, "--epochs", "2")
    state = open_run(folder).state()
    assert state["step"] == 2 * first
    assert all(torch.isfinite(x).all() for x in state["model"].values() if x.is_floating_point())
