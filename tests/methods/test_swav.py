import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastssl.contract import Batch, DefersUpdates, Method
from fastssl.distributed import all_gather, rank, world_size
from fastssl.methods import swav
from fastssl.methods.swav import SwAV
from fastssl.nn.heads import mlp_head
from fastssl.train.config import Training
from fastssl.train.optim import build_optimizer
from tests.methods import transcription_family as family
from tests.methods import transcription_swav as t
from tests.support.golden import part, read
from tests.support.ranks import run_ranks

EXACT = {"rtol": 1e-9, "atol": 1e-10}


class Body(nn.Module):
    """The golden file's encoder: mean over pixels, a linear layer named body, ReLU."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(10, 12)

    def forward(self, x):
        return F.relu(self.body(x.mean((2, 3))))


def golden_body(p, images):
    return family.linear(p, "body", images.mean((2, 3))).relu()


PROJECTOR = ("projection_head.0", "projection_head.1", "projection_head.3")


def golden_crops(golden, step, dtype=torch.float64):
    return [golden[f"step{step}.input.crop{i}"].to(dtype) for i in range(6)]


def golden_model(golden, meta):
    projector = mlp_head(12, 12, 6, bias=True, last_bias=True)
    prototypes = nn.Linear(6, meta["prototypes"], bias=False)
    queue = (8, 1 / 5)  # of five steps, it fills from the second on
    model = SwAV(Body(), projector, prototypes, (meta["temperature"], meta["epsilon"]), meta["iterations"], queue)
    assert not model.load_state_dict(part(golden, "state."), strict=False).unexpected_keys
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_five_golden_steps(dtype):
    """Losses, gradients, LARC, frozen prototypes and the queue of the official code."""
    golden, meta = read("swav")
    exact = EXACT if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    model = golden_model(golden, meta).to(dtype)
    training = Training(1, 1, "larc", 0.0, meta["larc"]["weight_decay"], decay_all=True)
    optimizer, batch = build_optimizer(model, training), meta["batch"]
    for step, lr in enumerate(meta["lr"]):
        expected = part(golden, f"step{step}.")
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.before_step(step / 5)
        assert model.queue_is_full == (expected["n_assigned"] > batch)
        loss, _ = model(Batch(tuple(golden_crops(golden, step, dtype)), None, None))
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected["loss"].to(dtype), **exact)
        if step < meta["freeze_prototypes_niters"]:
            model.prototypes.weight.grad = None
        gradients = {name: p.grad for name, p in zip(names_of(model), model.parameters())}
        for name, gradient in part(expected, "grad.").items():
            torch.testing.assert_close(gradients[name], gradient.to(dtype), **exact)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step((step + 1) / 5)
        torch.testing.assert_close(model.prototypes.weight.detach(), expected["prototypes"].to(dtype), **exact)
        torch.testing.assert_close(model.backbone.body.weight.detach(), expected["body.weight"].to(dtype), **exact)
        if "queue" in expected:
            for ours, theirs in zip(model.queues, expected["queue"].to(dtype)):
                blocks = theirs.split(batch)  # the newest in front; ours is written in turn
                newest = (step - 1) % 2
                torch.testing.assert_close(ours.queue, torch.cat(blocks if newest == 0 else blocks[::-1]), **exact)
    state = model.state_dict()
    for name, x in part(golden, "step4.state.").items():
        torch.testing.assert_close(state[name], x.to(state[name].dtype), **exact)


def names_of(model):
    """Names of the parameters in the state dict."""
    return [name.removeprefix("backbone.") for name, _ in model.named_parameters()]


def test_the_transcription_meets_the_golden_steps():
    golden, meta = read("swav")
    optimizer = family.Optimizer(family.lars_c, lambda step, name: meta["lr"][step], meta["larc"]["weight_decay"])
    codes, frozen = [], meta["freeze_prototypes_niters"]
    options = {"projector": PROJECTOR, "queue": 8, "queue_start": 1, "frozen": frozen, "codes_of_steps": codes}
    batches = [golden_crops(golden, step) for step in range(5)]
    replay = t.run_swav(part(golden, "state."), batches, backbone=golden_body, optimizer=optimizer, **options)
    for step in range(5):
        torch.testing.assert_close(replay.losses[step], golden[f"step{step}.loss"], **EXACT)
        for i in range(2):
            torch.testing.assert_close(codes[step][i], golden[f"step{step}.codes{i}"], **EXACT)
        for name, gradient in part(golden, f"step{step}.grad.").items():
            torch.testing.assert_close(replay.gradients[step][name], gradient, **EXACT)
    for name, x in part(golden, "step4.state.").items():
        torch.testing.assert_close(replay.tensors[name].detach(), x, **EXACT)
