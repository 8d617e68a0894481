"""Twelve training steps of iBOT and DINOv2 equal those of plain torch.

The reference is tests/methods/transcription_dinov2.py, which was written from the papers and the official code, without
the methods of this package. Both sides compute in float64 from the same weights, images and masks, and differ by
rounding.
"""

import dataclasses

import pytest
import torch

from fastssl.contract import Batch
from fastssl.methods import dinov2, ibot
from fastssl.nn.vit import DINO_SIZES
from fastssl.train.config import Execution, Training
from fastssl.train.trainer import Trainer
from tests.methods import transcription_dinov2 as t
from tests.methods.test_replay_family import distance, disturbed

STEPS, EPOCHS, BATCH = 12, 4, 4
TIMES, LEAST = 20, 1e-13  # as in test_replay_family.py
CLIP = 0.05  # below the norms of the first gradients
SIZES = {
    "patch_size": 4,
    "hidden": 24,
    "prototypes": 16,
    "bottleneck": 8,
    "warmup_teacher_temp_epochs": 2,
    "ema_momentum": 0.9,
}
KEPT = {"koleo_weight": 0.1, "norm_last_layer": False, "layer_scale": 0.1, "patch_embed_lr": 0.2, "teacher_temp": 0.07}
CASES = {
    "ibot": (ibot, {"warmup_teacher_patch_temp": 0.05, "patch_weight": 1.0, "norm_last_layer": False}),
    "dinov2": (
        dinov2,
        {
            **KEPT,
            "centering": "centering",
            "registers": 2,
            "layer_decay": 0.8,
            "still_epochs": 1,
            "patch_embed_lr": 0.3,
        },
    ),
    "dinov2 sinkhorn": (
        dinov2,
        {
            **KEPT,
            "separate_head": True,
            "patch_prototypes": 12,
            "patch_bottleneck": 6,
            "centering": "sinkhorn_knopp",
            "still_epochs": 1,
        },
    ),
}


@pytest.fixture(autouse=True)
def small_vit(monkeypatch):
    monkeypatch.setitem(DINO_SIZES, "vit_mini", (32, 2, 4, 4))


def build(name):
    module, changes = CASES[name]
    config = dataclasses.replace(module.Config.small(), image_size=(16, 16), local_size=(8, 8), **SIZES, **changes)
    frozen = {"freeze": ("student.head.last_layer",), "freeze_epochs": 1} if module is ibot else {}
    config.training = Training(
        EPOCHS, 256, "adamw", 1e-3, 0.04, 0.4, warmup_epochs=1, clip_parameter_norm=CLIP, **frozen
    )
    return module, module.build(config).double(), config


def official(state, network):
    """Our state's student or teacher in the names of the official code."""
    names = {n.removeprefix(f"{network}."): x for n, x in state.items() if n.startswith(f"{network}.")}
    return {n.replace("reg_token", "register_tokens"): x for n, x in names.items()}


def ours(module, model, config, batches):
    """Losses, and for each step what the transcription is given."""
    groups = getattr(module, "parameter_groups", None)
    trainer = Trainer(model, config.training, Execution(), STEPS // EPOCHS, parameter_groups=groups)
    losses, steps = [], []
    for batch in batches:
        mask = model.masked_rows(batch)[1]
        still = trainer.count.epochs(trainer.steps) < 1
        losses.append(trainer.step(iter([batch])).loss)
        rates = {g["lr"] / g["lr_scale"] for g in trainer.optimizer.param_groups if not g.get("still_epochs")}
        decays = {
            g["weight_decay"] / g["weight_decay_scale"] for g in trainer.optimizer.param_groups if g["weight_decay"]
        }
        temps = model.teacher_temp.item(), model.patch_temp.item() if module is ibot else model.teacher_temp.item()
        last_lr = 0.0 if still and getattr(config, "still_epochs", 0) == 1 else None
        scheduled = max(rates), max(decays), model.momentum_of_step, *temps, last_lr, still and module is ibot
        steps.append(t.Step(batch.views, mask, *scheduled))
    return losses, steps


def theirs(module, initial, config, steps):
    vit = t.Vit(patch=4, heads=4)
    networks = official(initial, "student"), official(initial, "teacher")
    if module is ibot:
        return t.run_ibot(*networks, steps, vit, clip_norm=CLIP)
    vit = vit._replace(offset=0.0, antialias=True) if config.registers else vit
    scales = {"decay": config.layer_decay, "patch_embed": config.patch_embed_lr}
    centering = config.centering == "centering"
    return t.run_dinov2(*networks, steps, vit, clip_norm=CLIP, centering=centering, scales=scales)


def both(name, seed=0):
    torch.manual_seed(seed)
    module, model, config = build(name)
    initial = {key: x.clone() for key, x in model.state_dict().items()}
    batches = [
        Batch(
            (
                *torch.randn(2, BATCH, 3, 16, 16, dtype=torch.float64),
                *torch.randn(3, BATCH, 3, 8, 8, dtype=torch.float64),
            ),
            torch.arange(BATCH),
            None,
            BATCH * step + torch.arange(BATCH),
        )
        for step in range(STEPS)
    ]
    losses, steps = ours(module, model, config, batches)
    runs = [theirs(module, state, config, steps) for state in (initial, disturbed(initial))]
    return module, model, config, initial, steps, losses, *runs


@pytest.mark.parametrize("name", CASES)
def test_twelve_steps(name):
    _, model, config, initial, steps, losses, replay, ruler = both(name)
    assert sum(step.mask.any() for step in steps) == STEPS
    allowed = TIMES * distance(replay.losses, ruler.losses) + LEAST
    assert distance(losses, replay.losses) <= allowed < 1e-8
    state = model.state_dict()
    for network in ("student", "teacher"):
        expected, other = ({key: x.detach() for key, x in getattr(run, network).items()} for run in (replay, ruler))
        found = official(state, network)
        assert found.keys() == expected.keys()
        allowed = TIMES * distance(expected.values(), other.values()) + LEAST
        assert distance([found[key] for key in expected], expected.values()) <= allowed < 1e-7
        before = official(initial, network)
        moved = {key: distance([found[key]], [before[key]]) for key in expected}
        still = [key for key, way in moved.items() if way < 1e-5]
        assert not still, f"{network}.{still[0]} moved by only {moved[still[0]]:.1e}"
    if getattr(config, "centering", "centering") == "centering":
        for key, loss in (("cls", model.dino_loss), ("patch", model.ibot_patch_loss)):
            torch.testing.assert_close(loss.center[0], replay.centres[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name, field, change", [("ibot", "patch_temp", 1.01), ("dinov2", "momentum", 0.999)])
def test_a_wrong_schedule_is_noticed(name, field, change):
    module, _, config, initial, steps, losses, *_ = both(name)
    steps = [step._replace(**{field: getattr(step, field) * change}) for step in steps]
    wrong = theirs(module, initial, config, steps)
    assert distance(losses, wrong.losses) > 1e-7
