"""The training loop and its safeguards, with a model of a few numbers."""

import json
import shutil
import sys
import time
import types

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.contract import Batch
from fastssl.methods import (
    barlow_twins,
    beit,
    cpc,
    deepcluster_v2,
    densecl,
    dino,
    dinov2,
    igpt,
    mae,
    moco_v2,
    moco_v3,
    simclr_v1,
    swav,
    vicreg,
)
from fastssl.nn import KeyQueue, patch_masks
from fastssl.train import checkpoint
from fastssl.train.config import Execution, Training
from fastssl.train.log import read_metrics
from fastssl.train.loop import train
from fastssl.train.records import read_records
from fastssl.train.trainer import Trainer
from tests.support.tokenizers import tokenizer_file
from tests.support.trainers import constant_rate_trainer

OPTIMIZERS = ("adamw", "sgd", "lars")
QUIET = {"tensorboard": False, "log_every": 1}


class Line(nn.Module):
    """A regression on vectors of four numbers; a NaN among them makes the loss NaN."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.starts, self.steps = [], []  # progress given to before_step and after_step

    def forward(self, batch):
        (x,) = batch.views
        loss = (self.layer(x) - 1).square().mean()
        return loss, {"size": loss.detach().new_tensor(float(len(x)))}

    def before_step(self, progress):
        self.starts.append(progress)

    def after_step(self, progress):
        self.steps.append(progress)

    @property
    def encoder(self):
        return self.layer

    def features(self, images):
        return self.layer(images)


def batches(count=6, size=8, bad=()):
    """An ``epoch_of`` of `count` batches; those whose numbers are in `bad` have a NaN in one image."""

    def epoch_of(epoch, start):
        generator = torch.Generator().manual_seed(epoch)
        images = [torch.randn(size, 4, generator=generator) for _ in range(count)]
        for i in range(start, count):
            if epoch * count + i in bad:
                images[i][3, 0] = torch.nan
            index = torch.arange(size) + 100 * (epoch * count + i)
            yield Batch((images[i],), index, index)

    return epoch_of


def settings(optimizer="adamw", size=8, epochs=1, **changes):
    lr = 3.0 if optimizer == "lars" else 0.3
    return Training(epochs, size, optimizer, **{"lr": lr, "weight_decay": 0.0, **changes})


def run(tmp_path, epoch_of, training, steps=6, method=None, resume=None, run_id="", **execution):
    torch.manual_seed(0)
    method = method or Line()
    trainer = Trainer(method, training, Execution(**{**QUIET, **execution}), steps, state=resume)
    train(trainer, "line", epoch_of, tmp_path, run_id=run_id)
    return method


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bad", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, optimizer, bad):
    """Weights, momenta and AdamW's step count equal those of a run without the batch; its images are listed."""
    (tmp_path / "with").mkdir(), (tmp_path / "without").mkdir()
    training = settings(optimizer, lr_by_epoch=True)  # a constant rate: a skipped step counts in the schedule
    method = run(tmp_path / "with", batches(bad={bad}), training)

    def without_bad(epoch, start):
        return (batch for i, batch in enumerate(batches()(epoch, 0)) if i != bad)

    expected = run(tmp_path / "without", without_bad, training, steps=5)
    for p, q in zip(method.parameters(), expected.parameters()):
        assert torch.equal(p, q)
    states = [
        checkpoint.load(folder / "checkpoints", "line")["optimizer"]["state"]
        for folder in (tmp_path / "with", tmp_path / "without")
    ]
    for number, values in states[0].items():
        for name, x in values.items():
            assert torch.equal(torch.as_tensor(x), torch.as_tensor(states[1][number][name])), name
    (note,) = read_records(tmp_path / "with" / "skipped-0.jsonl")
    assert note["step"] == bad + 1
    assert note["loss"] == note["grad_norm"] == "nan"
    assert note["indices"] == list(range(100 * bad, 100 * bad + 8))
    lines = read_metrics(tmp_path / "with" / "metrics.jsonl")
    assert [line["skipped"] for line in lines] == [int(i == bad) for i in range(6)]
    assert lines[bad]["loss"] is None


def test_too_many_consecutive_skipped_steps_stop_the_run(tmp_path):
    with pytest.raises(ValueError) as error:
        run(tmp_path, batches(bad={1, 3, 4, 5}), settings(), checkpoint_every=1, max_skipped=2)
    assert str(error.value) == (
        "train: loss nan and gradient norm nan in step 6: 3 consecutive steps were skipped, more than --max-skipped 2; "
        f"their images are listed in {tmp_path}/skipped-0.jsonl, and earlier checkpoints are intact"
    )
    assert checkpoint.load(tmp_path / "checkpoints", "line")["step"] == 5
    assert [note["step"] for note in read_records(tmp_path / "skipped-0.jsonl")] == [2, 4, 5, 6]


def test_a_gradient_that_is_not_finite_with_a_finite_loss(tmp_path):
    """The derivative of a square root at zero."""

    class Root(Line):
        def forward(self, batch):
            loss, metrics = super().forward(batch)
            root = (self.layer.bias * 0).sum().sqrt()
            return loss + root if batch.index[0] == 200 else loss, metrics

    run(tmp_path, batches(), settings(), method=Root())
    (note,) = read_records(tmp_path / "skipped-0.jsonl")
    assert (note["step"], note["grad_norm"]) == (3, "nan")
    assert float(note["loss"]) > 0


def test_clipping(tmp_path):
    """The step is that of the gradient scaled down to the norm."""
    training = settings("sgd", momentum=0.0, lr_by_epoch=True)
    first = Line()
    start = [p.detach().clone() for p in first.parameters()]
    run(tmp_path, batches(count=1), training, steps=1, method=first, clip_norm=1e-3)
    moved = torch.cat([(p - q).flatten() for p, q in zip(first.parameters(), start)]).norm()
    lr = 0.3 * 8 / 256
    assert moved.item() == pytest.approx(lr * 1e-3, rel=1e-3)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["grad_norm"] > 0.1  # the norm before clipping


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_accumulation_equals_the_large_batch(tmp_path, optimizer):
    def small(epoch, start):
        for batch in batches(size=8)(epoch, start // 4):
            for part in torch.arange(8).split(2):
                yield Batch((batch.views[0][part],), batch.index[part], batch.label[part])

    (tmp_path / "large").mkdir(), (tmp_path / "small").mkdir()
    large = run(tmp_path / "large", batches(size=8), settings(optimizer, epochs=2))
    parts = run(tmp_path / "small", small, settings(optimizer, epochs=2, accumulate=4))
    for p, q in zip(large.parameters(), parts.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("large", "small")]
    for line, line_of_parts in zip(*lines, strict=True):
        assert line["loss"] == pytest.approx(line_of_parts["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(line_of_parts["grad_norm"], rel=1e-4)
    assert parts.steps == large.steps
    assert parts.starts == large.starts == [i / 12 for i in range(12)]  # once per step, not per micro-batch


@pytest.mark.parametrize("symmetric", [False, True])
def test_keys_of_all_micro_batches_enter_the_queue_in_order(symmetric):
    """After steps of three micro-batches the queue and the weights equal those of the large batch."""
    config = moco_v2.Config.small()
    config.symmetric, config.queue_size, config.bn_splits = symmetric, 40, 1
    torch.manual_seed(0)
    whole = moco_v2.build(config).double()
    split = moco_v2.build(config).double()
    split.load_state_dict(whole.state_dict())
    views = tuple(torch.randn(12, 3, 32, 32, dtype=torch.float64) for _ in range(2))
    label = torch.arange(12)
    training = Training(1, 12, "sgd", 30.0, 0.0)
    states = []
    for method, parts in ((whole, 1), (split, 3)):
        training.accumulate = parts
        trainer = constant_rate_trainer(method, training, 0.5, steps=2)
        method.eval()  # batch norms use running statistics, so that results do not depend on the micro-batch
        for _ in range(2):
            pieces = [Batch(tuple(v[i] for v in views), label[i], label[i]) for i in label.chunk(parts)]
            trainer.step(iter(pieces))
        states.append(method.state_dict())
    assert int(states[0]["queue_ptr"]) == (24 * (1 + symmetric)) % 40
    for name, x in states[0].items():
        torch.testing.assert_close(states[1][name], x, rtol=1e-9, atol=1e-10, msg=name)


def test_keys_that_are_not_finite_do_not_enter_the_queue():
    queue = KeyQueue(4, 8)
    before = queue.queue.clone()
    keys = torch.randn(3, 4)
    keys[1, 2] = torch.inf
    queue.enqueue(keys)
    assert torch.equal(queue.queue[[0, 2]], keys[[0, 2]])
    assert torch.equal(queue.queue[1], before[1])
    assert int(queue.queue_ptr) == 3


class Syncs(TorchDispatchMode):
    """Records operations that make the host wait for a device: reads of values, and shapes that depend on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.NAMES:
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def tiny(module, **changes):
    config = module.Config.small()
    for name, value in changes.items():
        setattr(config, name, value)
    return config, module.build(config)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("module", "changes"),
    [
        (mae, {}),
        (moco_v2, {"queue_size": 64}),
        (densecl, {"queue_size": 64}),
        (cpc, {"candidates": "drawn", "hidden": 16}),
        (moco_v3, {"hidden": 32}),
        (simclr_v1, {"hidden": 32, "training": Training(1, 8, "lars_simclr", 0.1, 1e-4)}),
        (vicreg, {"dim": 16, "training": Training(1, 8, "larc", 0.1, 1e-4)}),
        (dino, {"prototypes": 48}),
        (dinov2, {"prototypes": 48}),
        (beit, {"tokenizer": tokenizer_file()}),
        (swav, {"queue_size": 64, "queue_start": 0}),
        (deepcluster_v2, {}),
        (igpt, {}),
        (barlow_twins, {"dim": 16, "training": Training(1, 8, "lars", 0.1, 1e-4)}),
    ],
)
@pytest.mark.parametrize("clipping", [{}, {"clip_norm": 1.0}, {"clip_parameter_norm": 0.1}])
def test_a_step_never_waits_for_the_device(module, changes, precision, clipping, monkeypatch):
    monkeypatch.setattr(patch_masks, "reads_are_free", lambda x: False)  # on a CPU they are, and masks are read
    config, method = tiny(module, **changes)
    execution = {name: norm for name, norm in clipping.items() if name == "clip_norm"}
    config.training.clip_parameter_norm = clipping.get("clip_parameter_norm", 0.0)
    trainer = constant_rate_trainer(method, config.training, 0.1, precision=precision, **execution)
    images = torch.randn(8, 3, *config.image_size)
    batch = Batch((images,) * len(config.augmentation.views), torch.arange(8), torch.arange(8), torch.arange(8))
    with Syncs() as syncs:
        trainer.step(iter([batch]))
        trainer.step(iter([batch]))
    assert syncs.seen == []
    with syncs:
        float(images.sum())
    assert len(syncs.seen) == 1


def test_fp16_scales_the_loss_and_skips_what_overflows(tmp_path):
    """The initial loss scale of 65536 makes this loss overflow: steps are skipped until the scale is small enough."""

    class Steep(Line):
        def forward(self, batch):
            loss, metrics = super().forward(batch)
            return loss.float() * 100, metrics

    run(tmp_path, batches(count=12), settings("sgd", lr_by_epoch=True), steps=12, method=Steep(), precision="fp16")
    lines = read_metrics(tmp_path / "metrics.jsonl")
    skipped = [line["skipped"] for line in lines]
    assert 1 <= sum(skipped) < 10
    assert skipped == sorted(skipped, reverse=True)
    assert lines[-1]["loss_scale"] == 65536 / 2 ** sum(skipped)
    assert lines[-1]["loss"] > 0
    state = checkpoint.load(tmp_path / "checkpoints", "line")
    assert state["scaler"]["scale"] == lines[-1]["loss_scale"]


def test_tensorboard_and_wandb_get_the_same_numbers(tmp_path, monkeypatch):
    sent = []
    fake = types.SimpleNamespace(
        log=lambda record, step: sent.append((step, record)), finish=lambda: sent.append("end")
    )
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: fake))
    run(tmp_path, batches(), settings(), tensorboard=True, wandb="project")
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert sent == [*((line["step"], line) for line in lines), "end"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    values = [(event.step, event.value) for event in events.Scalars("loss")]
    assert values == [(line["step"], pytest.approx(line["loss"])) for line in lines]


class FakeWandb:
    """Runs by id at a server; like wandb, a resumed run begins at the step after its last one."""

    def __init__(self):
        self.runs = {}

    def init(self, id, **_):
        logged = self.runs.setdefault(id, [])
        first = logged[-1][0] + 1 if logged else 0
        return types.SimpleNamespace(
            starting_step=first, log=lambda record, step: logged.append((step, record["loss"])), finish=lambda: None
        )


def test_a_resumed_run_continues_its_run_at_wandb(tmp_path, monkeypatch):
    """Killed after step 5 with a checkpoint of step 3: steps 4 and 5 are logged once."""
    server = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", server)
    options = {"wandb": "project", "checkpoint_every": 3, "run_id": "abc"}

    def killed(epoch, start):
        for i, batch in enumerate(batches()(epoch, start)):
            if i == 5:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, killed, settings(), **options)
    assert [step for step, _ in server.runs["abc"]] == [1, 2, 3, 4, 5]
    state = checkpoint.load(tmp_path / "checkpoints", "line", "abc")
    assert state["step"] == 3
    run(tmp_path, batches(), settings(), resume=state, **options)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert server.runs == {"abc": [(line["step"], line["loss"]) for line in lines]}
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_run_does_not_end_without_its_last_checkpoint(tmp_path):
    """The folder of the checkpoints becomes a file while the last epoch is trained."""

    def epoch_of(epoch, start):
        for i, batch in enumerate(batches()(epoch, start)):
            if (epoch, i) == (1, 4):
                while not list((tmp_path / "checkpoints").glob("*.pt")):  # step 6 is still being written
                    time.sleep(0.01)
                shutil.rmtree(tmp_path / "checkpoints")
                (tmp_path / "checkpoints").touch()
            yield batch

    with pytest.raises(ValueError, match=r"^checkpoint: step 12 could not be written to .* \(File exists\); there "):
        run(tmp_path, epoch_of, settings(epochs=2))


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"^train: --wandb needs a package: pip install 'fastssl-engine\[wandb\]'$"):
        run(tmp_path, batches(), settings(), wandb="project")


def test_profile_lists_the_parts_of_a_step(tmp_path):
    config, method = tiny(moco_v3, hidden=32)

    def epoch_of(epoch, start):
        for i in range(start, 8):
            images = torch.randn(8, 3, *config.image_size)
            yield Batch((images, images), torch.arange(8) + i, torch.arange(8))

    run(tmp_path, epoch_of, settings("sgd"), steps=8, method=method, profile=4)
    table = json.loads((tmp_path / "profile" / "table.json").read_text())
    rows = {row["part"]: row for row in table["rows"]}
    assert list(rows) == ["data", "forward", "loss", "backward", "optimizer", "EMA and queue"]
    assert all(row["ms"] > 0 for row in rows.values())
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert rows["backward"]["ms"] > rows["loss"]["ms"]
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    assert "backward" in {event.get("name") for event in trace["traceEvents"]}
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 8  # the run continued


SCHEDULES = {
    "constant": {},
    "all schedules": {
        "weight_decay_end": 0.4,
        "clip_parameter_norm": 0.05,
        "freeze": ("layer.bias",),
        "freeze_epochs": 0.5,
        "warmup_epochs": 1,
    },
}


@pytest.mark.parametrize("schedules", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_is_bit_equal_at_every_step(tmp_path, optimizer, schedules):
    training = settings(optimizer, epochs=2, weight_decay=0.04, **SCHEDULES[schedules])
    (tmp_path / "whole").mkdir()
    expected = run(tmp_path / "whole", batches(), training, checkpoint_every=1, keep_last=12)
    for path in checkpoint.files(tmp_path / "whole" / "checkpoints")[:-1]:
        state = torch.load(path, weights_only=True)
        folder = tmp_path / path.name
        folder.mkdir()
        method = run(folder, batches(), training, resume=state)
        for p, q in zip(method.parameters(), expected.parameters()):
            assert torch.equal(p, q)


@pytest.mark.parametrize("stopped", [3, 4])
def test_each_epoch_is_prepared_once_before_its_first_step(tmp_path, stopped):
    """Also in a run that continues in the middle of an epoch, which was prepared before, or at the start of one."""
    calls = []

    def train_from(state):
        execution = Execution(**QUIET, checkpoint_every=1, keep_last=20)
        trainer = Trainer(Line(), settings(epochs=3), execution, 4, state=state)

        def before_epoch(epoch):
            assert trainer.method.training
            calls.append((epoch, trainer.steps))

        train(trainer, "line", batches(4), tmp_path, before_epoch=before_epoch)

    train_from(None)
    assert calls == [(0, 0), (1, 4), (2, 8)]
    for path in checkpoint.files(tmp_path / "checkpoints")[stopped:]:
        path.unlink()
    calls.clear()
    train_from(checkpoint.load(tmp_path / "checkpoints", "line"))
    assert calls == [(1, 4), (2, 8)]
