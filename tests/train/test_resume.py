"""A run that is killed and resumed gives the losses of one that was not, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastssl.data.loader import has_dali

RUNS = {
    "mae": ["mae", "--data", "digits", "--epochs", "2", "--batch-size", "256", "--decoder-depth", "1"],
    "moco_v2": ["moco_v2", "--data", "shapes:count=256", "--epochs", "2", "--batch-size", "32", "--queue-size", "100"],
    "moco_v3": ["moco_v3", "--data", "shapes:count=256", "--epochs", "2", "--batch-size", "32", "--hidden", "64"],
}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "fastssl", "pretrain", *words]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(m["step"], m["loss"]) for m in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]


def killed_after(words: list[str], run: Path, step: int) -> None:
    """Starts a run and kills it, without any warning, as soon as it has written that step."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            path = run / "metrics.jsonl"
            if path.is_file() and path.read_text().count("\n") >= step:
                break
            time.sleep(0.005)
        assert process.poll() is None, "the run ended before it could be killed"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "workers", "engine"),
    [
        ("mae", 0, "torchvision"),
        ("moco_v2", 1, "torchvision"),
        pytest.param("moco_v2", 1, "dali", marks=pytest.mark.skipif(not has_dali(), reason="needs DALI")),
        ("moco_v3", 0, "auto"),
    ],
)
def test_killed_and_resumed_is_bit_equal(tmp_path, name, workers, engine):
    options = [*RUNS[name], "--log-every", "1", "--checkpoint-every", "3", "--workers", str(workers)]
    options += ["--engine", engine]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(*options, "--run", str(whole)), check=True, stdout=subprocess.DEVNULL)
    killed_after(command(*options, "--run", str(broken)), broken, step=5)
    assert (broken / "checkpoint.pt").is_file()
    subprocess.run(command("--resume", str(broken)), check=True, stdout=subprocess.DEVNULL)
    assert losses(broken) == losses(whole)
    assert len(losses(whole)) == losses(whole)[-1][0] > 8
