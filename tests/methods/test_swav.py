import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastssl.contract import Batch, DefersUpdates, Method
from fastssl.methods import swav
from fastssl.methods.swav import SwAV
from fastssl.nn.heads import mlp_head
from fastssl.train.config import Training
from fastssl.train.optim import build_optimizer
from fastssl.train.schedule import learning_rate
from fastssl.weights import load_initial_weights, load_weights
from tests.methods import transcription_family as family
from tests.methods import transcription_swav as t
from tests.support.golden import part, read

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
            for ours, theirs in zip(model.queue, expected["queue"].to(dtype)):
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


def tiny(**changes):
    config = swav.Config.small()
    for name, value in {"dim": 8, "hidden": 16, "prototypes": 7, **changes}.items():
        setattr(config, name, value)
    return swav.build(config)


def crops(batch=4):
    return tuple(torch.randn(batch, 3, *size) for size in ((32, 32), (32, 32), (16, 16), (16, 16)))


def test_it_fulfils_the_contract_and_its_names_are_the_official_ones():
    model = tiny()
    assert isinstance(model, Method) and isinstance(model, DefersUpdates)
    assert model.features(torch.randn(2, 3, 32, 32)).shape == (2, 256)
    names = set(model.state_dict())
    assert {"conv1.weight", "layer4.0.bn2.running_var", "prototypes.weight"} <= names
    assert {f"projection_head.{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias")} <= names
    assert not any(name.startswith(("backbone", "fc", "queue")) for name in names)


def test_released_checkpoints_load(tmp_path):
    """The files have a plain state dict with DataParallel's prefix, those of training runs one beside other things."""
    model = tiny()
    state = model.state_dict()
    state = {f"module.{name}": x + torch.rand_like(x) if x.is_floating_point() else x for name, x in state.items()}
    for i, content in enumerate((state, {"epoch": 800, "state_dict": state})):
        path = tmp_path / f"swav_{i}.pth.tar"
        torch.save(content, path)
        continued, encoder, with_queue = tiny(), tiny(), tiny(queue_size=64)
        assert load_initial_weights(continued, path) == []
        load_weights(encoder, path, encoder_only=True)
        (note,) = load_initial_weights(with_queue, path)
        assert note.endswith("has no queue: queue starts at random")
        for name, x in continued.state_dict().items():
            assert torch.equal(x, state[f"module.{name}"]) and torch.equal(with_queue.state_dict()[name], x)
        assert torch.equal(encoder.backbone.conv1.weight, continued.backbone.conv1.weight)
        assert not torch.equal(encoder.prototypes.weight, continued.prototypes.weight)


def test_prototypes_are_unit_vectors_in_a_step_and_the_queue_is_used_when_it_is_full():
    config = swav.Config.small()
    config.prototypes, config.dim, config.hidden, config.queue_size, config.queue_start = 7, 8, 16, 13, 7
    config.training = dataclasses.replace(config.training, epochs=14, batch_size=4)
    model = swav.build(config)  # of 14 epochs: the queue fills from progress 0.5 on
    assert [len(queue.queue) for queue in model.queue] == [12, 12]  # a multiple of the batch
    for step in range(8):
        model.before_step(step / 8)
        torch.testing.assert_close(model.prototypes.weight.norm(dim=1), torch.ones(7))
        assert model.queue_is_full == (step >= 7)
        model(Batch(crops(), None, None))
        model.after_step((step + 1) / 8)
        assert model.pending == [] and model.queue[0].queue.any(1).sum() == 4 * min(max(step - 3, 0), 3)
    with pytest.raises(ValueError, match=r"^swav: --queue-size must be 0 or at least the batch of 32, got 31$"):
        tiny(queue_size=31)


def test_defaults_are_those_of_the_paper():
    config = swav.Config.paper()
    t = config.training
    assert (t.optimizer, t.weight_decay, t.decay_all, t.momentum) == ("larc", 1e-6, True, 0.9)
    assert (t.epochs, t.batch_size, t.warmup_epochs, t.freeze) == (800, 4096, 10, ("prototypes",))
    rates = [learning_rate(t, epoch, 312) for epoch in (0, 10 - 1 / 312, 10, 800)]
    assert rates == pytest.approx([0.3, 4.8, 4.8, 0.0048])
    assert sum(step < t.freeze_epochs * 312 for step in range(1000)) == 313
    assert (config.dim, config.hidden, config.prototypes, config.tau, config.epsilon) == (128, 2048, 3000, 0.1, 0.05)
    first, second, *small = config.augmentation.views
    assert first == second and len(small) == 6 and (first.size, small[0].size) == ((224, 224), (96, 96))
    assert (first.crop, small[0].crop, first.interpolation) == ((0.14, 1.0), (0.05, 0.14), "bilinear")
    assert (first.jitter, first.jitter_p, first.grayscale_p) == ((0.8, 0.8, 0.8, 0.2), 0.8, 0.2)
    assert (first.blur_p, small[0].blur_p, first.flip_p, first.std) == (0.5, 0.5, 0.5, (0.228, 0.224, 0.225))
    probe = swav.linear_probe("resnet50")
    assert (probe.optimizer, probe.lr, probe.batch_size, probe.weight_decay) == ("sgd", 0.3, 256, 1e-6)
