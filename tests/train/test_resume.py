"""A killed and resumed run has the losses and weights of an uninterrupted one, bit for bit."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastssl import cli
from fastssl.data.loader import has_dali
from fastssl.train import checkpoint
from tests.support.ranks import start_process
from tests.support.tokenizers import tokenizer_file

SMALL = ["--epochs", "2", "--batch-size", "32", "--no-tensorboard"]
RUNS = {
    "mae": ["mae", *SMALL, "--decoder-depth", "1"],
    "moco_v1": ["moco_v1", *SMALL, "--queue-size", "100", "--bn-splits", "4", "--accumulate", "2"],
    "moco_v2": ["moco_v2", *SMALL, "--queue-size", "100"],
    "moco_v3": ["moco_v3", *SMALL, "--hidden", "64"],
    "swav": ["swav", *SMALL, "--prototypes", "20", "--queue-size", "64", "--queue-start", "0"],
    "deepcluster": ["deepcluster", *SMALL, "--clusters", "10"],
    "deepcluster_v2": ["deepcluster_v2", *SMALL, "--prototypes", "10", "8"],
    "cpc": ["cpc", *SMALL, "--candidates", "drawn", "--hidden", "16"],
    "densecl": ["densecl", *SMALL, "--queue-size", "100"],
    "igpt": ["igpt", *SMALL, "--colours", "16", "--image-size", "8", "8"],
    "beit": ["beit", *SMALL, "--drop-path", "0.3", "--tokenizer", tokenizer_file()],
    "dvae": ["dvae", *SMALL, "--width", "4", "--codes", "24"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Images without labels, so that little time is spent on evaluations."""
    path = tmp_path_factory.mktemp("images") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (272, 32, 32, 3), dtype=np.uint8))
    return ["--data", f"arrays:{path}"]


def start_run(*words: str) -> multiprocessing.Process:
    """`fastssl pretrain …` in a new process, forked from one that has imported the package."""
    return start_process(_pretrain, words)


def _pretrain(words: tuple[str, ...]) -> None:
    os.setsid()  # so that its workers are killed with it
    sys.argv = ["fastssl", "pretrain", *words]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        cli.main()


def exit_code(process: multiprocessing.Process) -> int:
    process.join(600)  # a limit for hangs, also on a busy machine
    assert process.exitcode is not None
    return process.exitcode


def losses(run: Path) -> list[tuple[int, float]]:
    return [(m["step"], m["loss"]) for m in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def kill_when(process: multiprocessing.Process, moment, number=signal.SIGKILL) -> int:
    """Send a signal as soon as `moment()` is true; the exit code."""
    try:
        deadline = time.monotonic() + 120
        while process.is_alive() and time.monotonic() < deadline and not moment():
            time.sleep(0.001)
        assert process.is_alive(), "the run ended before it could be stopped"
        os.kill(process.pid, number)
        return exit_code(process)
    finally:
        if process.is_alive():
            process.kill()


def weights(run: Path, name: str) -> dict:
    return checkpoint.load(run / "checkpoints", name)["model"]


def assert_same_run(broken: Path, whole: Path, name: str) -> None:
    assert losses(broken) == losses(whole)
    expected = weights(whole, name)
    for key, x in weights(broken, name).items():
        assert torch.equal(x, expected[key]), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "workers", "engine"),
    [
        ("moco_v1", 0, "torchvision"),
        ("moco_v2", 1, "torchvision"),
        pytest.param("moco_v2", 1, "dali", marks=pytest.mark.skipif(not has_dali(), reason="needs DALI")),
        ("moco_v3", 0, "auto"),
        ("deepcluster_v2", 0, "torchvision"),
        pytest.param("swav", 0, "torchvision", marks=pytest.mark.exhaustive),
        pytest.param("deepcluster", 0, "torchvision", marks=pytest.mark.exhaustive),
        pytest.param("cpc", 0, "auto", marks=pytest.mark.exhaustive),
        pytest.param("densecl", 0, "auto", marks=pytest.mark.exhaustive),
        pytest.param("igpt", 0, "torchvision", marks=pytest.mark.exhaustive),
        pytest.param("beit", 0, "auto", marks=pytest.mark.exhaustive),
        pytest.param("dvae", 0, "auto", marks=pytest.mark.exhaustive),
    ],
)
def test_killed_and_resumed_is_bit_equal(tmp_path, data, name, workers, engine):
    options = [*RUNS[name], *data, "--log-every", "1", "--checkpoint-every", "3", "--workers", str(workers)]
    options += ["--engine", engine]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert exit_code(start_run(*options, "--folder", str(whole))) == 0
    kill_when(start_run(*options, "--folder", str(broken)), lambda: steps(broken) >= 5)
    assert exit_code(start_run("--resume", str(broken))) == 0
    assert_same_run(broken, whole, name)
    assert len(losses(whole)) == losses(whole)[-1][0] > 8


@pytest.mark.parametrize(
    ("kills", "epochs"), [pytest.param(4, 5, marks=pytest.mark.slow), pytest.param(10, 8, marks=pytest.mark.exhaustive)]
)
def test_killed_at_random_moments(tmp_path, data, seed, kills, epochs):
    """One run is killed several times, alternately at a random moment after a random step and while it writes a
    checkpoint, of which a partial file remains. The same command resumes it each time, at last to its end."""
    chance = random.Random(seed)
    large = [
        "--epochs",
        str(epochs),
        "--decoder-dim",
        "256",
        "--checkpoint-every",
        "2",
    ]  # a large checkpoint takes time to write
    options = [*RUNS["mae"], *data, *large, "--log-every", "1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert exit_code(start_run(*options, "--folder", str(whole))) == 0
    resume_words = (*options, "--folder", str(broken), "--resume", "auto")
    while_writing = 0
    for kill in range(kills):
        before, more, delay = steps(broken), chance.randint(1, 3), chance.random() * 0.1
        reached: list[float] = []

        def random_moment(before=before, more=more, delay=delay, reached=reached):
            if not reached and steps(broken) >= before + more:
                reached.append(time.monotonic() + delay)
            return reached and time.monotonic() >= reached[0]

        def writing(before=before):
            return steps(broken) > before and any((broken / "checkpoints").glob("*.writing"))

        kill_when(start_run(*resume_words), writing if kill % 2 else random_moment)
        while_writing += any((broken / "checkpoints").glob("*.writing"))
        if checkpoint.files(broken / "checkpoints"):  # the first may not have been written yet
            checkpoint.load(broken / "checkpoints", "mae")
    assert while_writing >= kills // 5
    assert exit_code(start_run(*resume_words)) == 0
    assert_same_run(broken, whole, "mae")
    assert not list((broken / "checkpoints").glob("*.writing"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGUSR1, 138, marks=pytest.mark.exhaustive)]
)
def test_a_signal_saves_and_exits(tmp_path, data, number, code):
    """The signals of schedulers before they stop a job: the step is finished and saved; exit status 128 + signal."""
    options = [*RUNS["moco_v2"], *data, "--log-every", "1", "--workers", "1"]
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    assert kill_when(start_run(*options, "--folder", str(interrupted)), lambda: steps(interrupted) >= 3, number) == code
    step = checkpoint.load(interrupted / "checkpoints", "moco_v2")["step"]
    assert 3 <= step < 8  # in the middle of the first epoch
    assert exit_code(start_run(*options, "--folder", str(interrupted), "--resume", "auto")) == 0
    if number == signal.SIGTERM:
        assert exit_code(start_run(*options, "--folder", str(whole))) == 0
        assert_same_run(interrupted, whole, "moco_v2")


@pytest.mark.slow
@pytest.mark.parametrize("resume", [False, True])
def test_of_two_processes_in_one_folder_one_trains(tmp_path, data, resume):
    """Started at the same moment, anew or to resume; nothing of the refused one is in the folder."""
    options = [*RUNS["moco_v2"], *data, "--log-every", "1", "--workers", "0", "--folder", str(tmp_path / "run")]
    if resume:
        assert exit_code(start_run(*options)) == 0
        options = ["--resume", str(tmp_path / "run"), "--epochs", "4"]
    codes = [exit_code(process) for process in [start_run(*options), start_run(*options)]]
    assert sorted(codes) == [0, 1]
    steps_of_epochs = 8 * (4 if resume else 2)
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, steps_of_epochs + 1))


@pytest.mark.slow
def test_resume_auto_refuses_another_run(tmp_path, data, monkeypatch):
    def pretrain(*more: str) -> None:
        words = ["mae", *data, "--epochs", "1", "--batch-size", "128", "--decoder-depth", "1", "--no-tensorboard"]
        words += ["--folder", str(tmp_path / "run"), "--resume", "auto", *more]
        monkeypatch.setattr(sys, "argv", ["fastssl", "pretrain", *words])
        cli.main()

    pretrain()
    pretrain("--workers", "0")  # the number of workers may change
    with pytest.raises(SystemExit) as refused:
        pretrain("--lr", "1e-3")
    assert str(refused.value) == (
        f"fastssl: pretrain: {tmp_path / 'run'} is a run with --lr 0.006, which cannot change to 0.001 when it "
        "is resumed: --resume auto takes the original options"
    )
