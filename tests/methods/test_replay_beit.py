"""Twelve training steps of BEiT, through the trainer, equal those of plain torch.

The reference is tests/methods/transcription_beit.py. Both sides compute in float64 from the same weights, images, masks
and codes, and differ by rounding.
"""

import dataclasses

import pytest
import torch

from fastssl.contract import Batch
from fastssl.methods import beit
from fastssl.nn.beit import BEIT_SIZES
from fastssl.train.config import Execution
from fastssl.train.trainer import Trainer
from tests.methods import transcription_beit as t
from tests.methods.test_replay_family import LEAST, TIMES, distance, disturbed
from tests.support.tokenizers import save_tokenizer

STEPS, EPOCHS, BATCH, SIZE, PEAK, END = 12, 4, 4, (16, 24), 2e-3, 1e-4
DECAY, CLIP = 0.3, 0.05  # a decay that shows; a norm below those of the first gradients
KINDS = {
    "shared": {"relative_bias": "shared"},
    "block": {"relative_bias": "block", "layer_scale": 0.5},
    "absolute": {"relative_bias": "none", "abs_pos": True, "layer_scale": 0.0},
}


@pytest.fixture(autouse=True)
def small_vit(monkeypatch):
    monkeypatch.setitem(BEIT_SIZES, "vit_mini", (32, 2, 4, 4))


def ours(path, kind):
    """The method before and after twelve steps, their losses, and what the transcription is given."""
    torch.manual_seed(0)
    config = beit.Config("vit_mini", SIZE, path, mask_patches=10, mask_min=4, drop_path=0.0, **KINDS[kind])
    per_256 = 256 / BATCH
    config.training = dataclasses.replace(
        config.training,
        epochs=EPOCHS,
        batch_size=BATCH,
        lr=PEAK * per_256,
        lr_end=END * per_256,
        warmup_epochs=1,
        weight_decay=DECAY,
        clip_parameter_norm=CLIP,
    )
    model = beit.build(config).double()
    with torch.no_grad():
        for name, p in model.named_parameters():  # small initial weights would hide what they multiply
            p.add_(torch.randn_like(p), alpha=0.1 if p.ndim > 1 or "bias" in name else 0.02)
    initial = {name: x.clone() for name, x in model.state_dict().items()}
    trainer = Trainer(model, config.training, Execution(), STEPS // EPOCHS, parameter_groups=beit.parameter_groups)
    losses, steps = [], []
    for step in range(STEPS):
        images, second = (torch.randn(BATCH, 3, *size, dtype=torch.float64) for size in (SIZE, (32, 48)))
        seed = BATCH * step + torch.arange(BATCH)
        steps.append(t.Step(images, model.masks(seed), model.codes(second)))
        losses.append(trainer.step(iter([Batch((images, second), torch.arange(BATCH), None, seed)])).loss)
    return initial, model.state_dict(), losses, steps


def theirs(state, steps, **changes):
    settings = {"decay": DECAY, "clip": CLIP, "rates": t.learning_rates(PEAK, END, STEPS // EPOCHS, STEPS), **changes}
    return t.run(state, steps, t.Size((4, 6), 4, 4), **settings)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k == "shared" else pytest.mark.exhaustive) for k in KINDS]
)
def test_twelve_steps(kind, tmp_path):
    initial, final, losses, steps = ours(save_tokenizer(tmp_path / "tokenizer.safetensors"), kind)
    assert len(torch.cat([step.codes for step in steps]).unique()) > 8
    assert len({int(step.mask.sum()) for step in steps}) > 1
    (replayed, expected), (ruled, other) = theirs(initial, steps), theirs(disturbed(initial), steps)
    allowed = TIMES * distance(replayed, ruled) + LEAST
    assert distance(losses, replayed) <= allowed < 1e-8
    allowed = TIMES * distance(expected.values(), other.values()) + LEAST
    assert {name for name, x in final.items() if x.is_floating_point()} == set(expected)
    assert distance([final[name] for name in expected], expected.values()) <= allowed < 1e-7
    moved = {name: distance([x], [initial[name]]) for name, x in expected.items()}
    still = [name for name, way in moved.items() if way < 1e-4]
    assert not still, f"{still[0]} moved by only {moved[still[0]]:.1e}: the comparison would show nothing"


@pytest.mark.exhaustive
@pytest.mark.parametrize("change", [{"decay": 0.31}, {"clip": 0.051}, {"rates": [PEAK] * STEPS}])
def test_a_wrong_number_is_noticed(change, tmp_path):
    initial, _, losses, steps = ours(save_tokenizer(tmp_path / "tokenizer.safetensors"), "shared")
    assert distance(losses, theirs(initial, steps, **change)[0]) > 1e-7
