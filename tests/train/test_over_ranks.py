"""Training on several ranks (gloo): losses and weights of one process up to rounding, and bit-equal resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastssl import distributed
from fastssl.contract import PreparesEpochs, TrainingImages
from fastssl.data.augmentation import evaluation
from fastssl.data.loader import Loader
from fastssl.data.source import open_source
from fastssl.preparation import on_all_ranks
from fastssl.run import method_module
from fastssl.train import checkpoint
from fastssl.train.config import Execution
from fastssl.train.log import read_metrics
from fastssl.train.loop import train
from fastssl.train.signals import Interrupted
from fastssl.train.trainer import Trainer
from tests.support.ranks import run_ranks
from tests.support.small_methods import SMALL

SIZES = {
    "mae": {"decoder_depth": 1},
    "moco_v1": {"queue_size": 96, "bn_splits": 2},
    "moco_v2": {"queue_size": 96, "bn_splits": 2},
    "densecl": {"queue_size": 96, "bn_splits": 2, "dim": 16},
    "moco_v3": {"backbone": "resnet_mini", "hidden": 32, "dim": 16},
    "moco_v3 vit": {"backbone": "vit_mini", "hidden": 32, "dim": 16},
    **SMALL,
    # batch norms would have statistics of each micro-batch
    "dino vit": {"backbone": "vit_mini", "drop_path": 0.0, "bn_in_head": False, **SMALL["dino"]},
}

OWN = ("beit", "simmim")  # methods whose own tests have two ranks


def trained(folder, name, *, epochs=1, resume=False, kill=None, changes=None, double=False, **settings):
    """Train on 96 shapes (48 in float64) in steps of 16 images; the unsharded state saved at the end."""
    accumulate = settings.pop("accumulate", 1)
    name, vit = name.split()[0], "vit" in name
    module = method_module(name)
    config = module.Config.small()
    for field, value in {**SIZES[name + " vit" * vit], **(changes or {})}.items():
        setattr(config, field, value)
    training = config.training
    training.epochs, training.batch_size, training.warmup_epochs, training.accumulate = epochs, 16, 0, accumulate
    training.optimizer = "adamw" if vit else training.optimizer
    training.lr = 0.5 if training.optimizer == "sgd" else 1e-2
    torch.manual_seed(0)
    method = module.build(config)
    method = method.double() if double else method
    torch.manual_seed(distributed.rank())
    world, rank = distributed.world_size(), distributed.rank()
    source = open_source(f"shapes:count={48 if double else 96}")
    loader = Loader(source, config.augmentation, 16 // world // accumulate, rank=rank, world=world)
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    state = checkpoint.load(folder / "checkpoints", name) if resume else None

    def cast(batches):
        for batch in batches:
            yield batch._replace(views=tuple(view.double() for view in batch.views)) if double else batch

    def epoch_of(epoch, start):
        for i, batch in enumerate(cast(loader.epoch(epoch, start or 0))):
            if kill is not None and start is not None and (rank, i + start) == kill:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    execution = Execution(**{"log_every": 1, "tensorboard": False, **settings})
    try:
        groups = getattr(module, "parameter_groups", None)
        steps = len(loader) // accumulate
        trainer = Trainer(method, training, execution, steps, parameter_groups=groups, state=state)

        def before_epoch(epoch):
            if isinstance(method, PreparesEpochs):
                plain = Loader(source, evaluation((32, 32), 1.0), 16, train=False, rank=rank, world=world)
                passes = [lambda: epoch_of(epoch, None), lambda: cast(plain.epoch(0))]
                method.before_epoch(TrainingImages(len(source), len(loader), *passes))

        train(trainer, name, epoch_of, folder, before_epoch=before_epoch)
    except Interrupted as interrupted:
        return interrupted.code, str(interrupted)
    distributed.all_gather_object(None)  # wait until rank 0 has written the checkpoint
    return checkpoint.load(folder / "checkpoints", name)


def in_ranks(world, *args, **kwargs):
    return run_ranks(world, _call, args, kwargs)


def _call(args, kwargs):
    return trained(*args, **kwargs)


def assert_close(expected, state, folders, bound):
    for key, x in expected["model"].items():
        torch.testing.assert_close(state["model"][key], x, rtol=bound, atol=bound, msg=lambda m, key=key: f"{key}: {m}")
    lines = [read_metrics(folder / "metrics.jsonl") for folder in folders]
    for first, second in zip(*lines, strict=True):
        for key in ("loss", "grad_norm"):
            assert first[key] == pytest.approx(second[key], rel=bound), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "accumulate", "execution"),
    [
        ("mae", 1, {}),
        ("mae", 2, {}),
        ("mae", 1, {"shard": True}),
        ("mae", 2, {"shard": True, "clip_norm": 0.5}),
        ("moco_v3", 1, {}),
        ("moco_v3 vit", 1, {}),
        ("moco_v3 vit", 1, {"shard": True}),
        *((name, 1, {}) for name in SMALL if name not in OWN),
        *(pytest.param(name, 1, {}, marks=pytest.mark.exhaustive) for name in OWN),
        pytest.param("beit", 1, {"shard": True}, marks=pytest.mark.exhaustive),
        ("dino vit", 2, {}),
        ("dino vit", 1, {"shard": True}),
    ],
)
def test_two_ranks_equal_one_process_with_the_whole_batch(tmp_path, name, accumulate, execution):
    """MAE, and methods with batch norms and losses over all ranks: three steps in float64."""
    unsharded = {key: value for key, value in execution.items() if key != "shard"}
    one = trained(tmp_path / "one", name, double=True, **unsharded)
    two, _ = in_ranks(2, tmp_path / "two", name, double=True, accumulate=accumulate, **execution)
    assert one["step"] == two["step"] == 3
    assert len(two["random"]) == 2
    assert_close(one, two, (tmp_path / "one", tmp_path / "two"), bound=1e-6)
    for key, x in one["optimizer"]["state"].items():
        assert {name: torch.as_tensor(v).shape for name, v in x.items()} == {
            name: torch.as_tensor(v).shape for name, v in two["optimizer"]["state"][key].items()
        }


# methods with state of each kind stay in `make test`: queues, a bank, clusters, centres; and one without
STATEFUL = ("byol", "instdisc", "swav", "deepcluster_v2", "ibot")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "execution", "changes"),
    [("mae", {"shard": True}, {}), ("moco_v1", {}, {"shard_queue": True}), ("moco_v3", {}, {})]
    + [pytest.param("moco_v2", {}, {}, marks=pytest.mark.exhaustive)]
    + [pytest.param("densecl", {}, {"shard_queue": True}, marks=pytest.mark.exhaustive)]
    + [pytest.param(name, {}, {}, marks=() if name in STATEFUL else pytest.mark.exhaustive) for name in SMALL],
)
def test_interrupted_ranks_stop_together_and_resume_bit_for_bit(tmp_path, name, execution, changes):
    """SIGTERM reaches only rank 1, in the middle of an epoch: both ranks save at the same step, and the resumed run
    equals one without interruption, including the sharded queue and the shuffles of each rank."""
    whole, _ = in_ranks(2, tmp_path / "whole", name, epochs=2, changes=changes, **execution)
    interrupted = in_ranks(2, tmp_path / "resumed", name, epochs=2, changes=changes, kill=(1, 2), **execution)
    assert interrupted[0] == interrupted[1]
    code, text = interrupted[0]
    assert code == 143
    assert text.startswith("SIGTERM: saved after step 4")
    resumed, _ = in_ranks(2, tmp_path / "resumed", name, epochs=2, changes=changes, resume=True, **execution)
    assert resumed["step"] == whole["step"] == 12
    for key, x in whole["model"].items():
        assert torch.equal(resumed["model"][key], x), key
    lines = [
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "resumed")
    ]
    assert lines[0] == lines[1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), [("mae", {}), ("moco_v1", {"shard_queue": True})])
def test_resume_on_another_number_of_ranks(tmp_path, name, changes):
    """Two ranks, then one, on the same images: MAE's weights equal those of one process up to rounding."""
    in_ranks(2, tmp_path / "run", name, epochs=2, changes=changes, kill=(0, 2))
    state = trained(tmp_path / "run", name, epochs=2, changes=changes, resume=True)
    assert state["step"] == 12
    if name == "mae":
        expected = trained(tmp_path / "one", name, epochs=2)
        assert_close(expected, state, (tmp_path / "one", tmp_path / "run"), bound=5e-3)


def torchrun(*words: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        "-m",
        "fastssl",
        "pretrain",
        *words,
    ]


@pytest.mark.slow
def test_torchrun_with_a_killed_rank(tmp_path):
    """The other rank reports the loss in one sentence, and the checkpoint is intact."""
    words = [
        "mae",
        "--data",
        "digits",
        "--batch-size",
        "128",
        "--decoder-depth",
        "1",
        "--epochs",
        "40",
        "--log-every",
        "1",
        "--checkpoint-every",
        "2",
        "--knn-every",
        "0",
        "--no-tensorboard",
    ]
    folder = tmp_path / "run"
    process = subprocess.Popen(
        torchrun(*words, "--folder", str(folder)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while len(read_metrics(folder / "metrics.jsonl")) < 4 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(_rank_1_of(process.pid), signal.SIGKILL)
        out, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert f"batch 128 over 2 ranks → {folder}" in out
    assert process.returncode != 0
    sentence = (
        "fastssl: pretrain: rank 0 of 2 lost the connection to another rank; checkpoints are intact, "
        f"continue with: --resume {folder}"
    )
    assert sentence in out, out
    assert checkpoint.load(folder / "checkpoints", "mae")["step"] >= 2


def _rank_1_of(agent: int) -> int:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(path.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == agent and b"\0RANK=1\0" in b"\0" + path.joinpath("environ").read_bytes():
                return int(path.name)
        except OSError:
            continue
    raise AssertionError("rank 1 is not running")


def _refused_on(rank: int) -> str:
    def check() -> int:
        if distributed.rank() == rank:
            raise ValueError(f"rank {rank} has no data")
        return distributed.rank()

    try:
        return str(on_all_ranks(check))
    except ValueError as error:
        return str(error)


@pytest.mark.slow
def test_what_one_rank_refuses_is_refused_on_all():
    """No rank goes on alone, or waits for one that has stopped."""
    assert run_ranks(2, _refused_on, 1) == ["rank 1 has no data"] * 2
    assert run_ranks(2, _refused_on, 7) == ["0", "1"]


def test_setup_without_torchrun_keeps_one_process(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    device = torch.device("cpu")
    assert distributed.setup(device) == device
    assert distributed.world_size() == 1
    assert json.dumps(distributed.all_gather_object({"a": 1})) == '[{"a": 1}]'
