import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastssl.contract import Batch, Method
from fastssl.methods import byol
from fastssl.methods.byol import BYOL
from fastssl.nn.heads import mlp_head
from fastssl.train.config import Training
from fastssl.train.optim import build_optimizer
from tests.support.golden import part, read


class Network(nn.Module):
    """The golden file's encoder and projector: body, ReLU, fc."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(10, 12), mlp_head(12, 16, 8, bias=True)

    def forward(self, x):
        return self.fc(F.relu(self.body(x)))


def ours(name):
    """Our name of a tensor of the golden file: the target's predictor and both classifiers have none."""
    network, module, *rest = name.split(".")
    if module == "classifier" or (network, module) == ("target", "predictor"):
        return None
    module = {"encoder": f"{network}.", "projector": f"{network}.fc.", "predictor": "predictor."}[module]
    return module + ".".join(rest)


def named(golden, prefix):
    return {ours(name): x for name, x in part(golden, prefix).items() if "." in name and ours(name)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_four_golden_steps(dtype):
    """Losses, gradients, LARS, target network and running statistics of the official update."""
    golden, meta = read("byol")
    config = meta["config"]
    model = BYOL(Network(), Network(), mlp_head(8, 14, 8, bias=True), config["base_target_ema"])
    missing, unexpected = model.load_state_dict(named(golden, "state."), strict=False)
    assert not unexpected and all("running" in name or "tracked" in name for name in missing)
    model.to(dtype)
    exact = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    settings = config["optimizer_config"]
    training = Training(1, 1, "lars", 0.0, settings["weight_decay"], momentum=settings["momentum"])
    optimizer = build_optimizer(model, training)
    for step in range(4):
        expected = part(golden, f"step{step}.")
        progress = step / config["max_steps"]
        assert model.momentum_at(progress) == pytest.approx(expected["tau"].item(), rel=1e-9)
        for group in optimizer.param_groups:
            group["lr"] = expected["learning_rate"].double().item()
        model.before_step(progress)
        loss, _ = model(Batch((expected["input.view1"].to(dtype), expected["input.view2"].to(dtype)), None, None))
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected["repr_loss"].to(dtype), **exact)
        for name, gradient in named(golden, f"step{step}.grad.").items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient.to(dtype), **exact)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step((step + 1) / config["max_steps"])
        state = model.state_dict()
        for name, x in named({k: v for k, v in expected.items() if k.startswith(("online", "target"))}, "").items():
            value = state[name]
            if "running" in name:  # haiku: biased variance, and the average divided by 1 − 0.9^updates
                kept = 0.9 ** state[name.rpartition(".")[0] + ".num_batches_tracked"].item()
                initial, share = (kept, 7 / 8) if name.endswith("var") else (0, 1)
                value = (value - initial) / (1 - kept) * share
            torch.testing.assert_close(value, x.to(dtype), **exact, msg=lambda m, name=name: f"{name}: {m}")


def tiny(**changes):
    config = byol.Config.small()
    for name, value in {"dim": 16, "hidden": 32, **changes}.items():
        setattr(config, name, value)
    return byol.build(config)


def test_it_fulfils_the_contract_and_its_features_are_the_inputs_of_the_projector():
    model, images = tiny().eval(), torch.randn(4, 3, 32, 32)
    assert isinstance(model, Method)
    torch.testing.assert_close(model.online.fc(model.features(images)), model.online(images))
    assert model.features(images).shape == (4, 256)


def test_the_target_starts_at_other_weights_or_at_the_same():
    for same in (False, True):
        model = tiny(same_initial_weights=same)
        equal = torch.equal(model.online.conv1.weight, model.target.state_dict()["conv1.weight"])
        assert equal == same
        assert not any(p.requires_grad for p in model.target.parameters())


def test_the_target_moves_with_the_momentum_of_the_step_and_after_it():
    model = tiny(ema_momentum=0.9)
    model.before_step(0.5)  # halfway along the cosine from 0.9 to 1
    before = model.target.state_dict()["conv1.weight"].clone()
    loss, _ = model(Batch(torch.randn(2, 8, 3, 32, 32).unbind(), None, None))
    assert 0 <= loss <= 8
    loss.backward()
    assert torch.equal(model.target.state_dict()["conv1.weight"], before)
    model.after_step(1.0)
    moved = model.target.state_dict()["conv1.weight"]
    torch.testing.assert_close(moved, before.lerp(model.online.conv1.weight.detach(), 0.05))


def test_defaults_are_those_of_the_paper():
    config = byol.Config.paper()
    t = config.training
    assert (t.optimizer, t.lr, t.weight_decay, t.decay_all, t.momentum) == ("lars", 0.2, 1.5e-6, False, 0.9)
    assert (t.epochs, t.batch_size, t.warmup_epochs, t.lr_end) == (1000, 4096, 10, 0.0)
    assert (config.dim, config.hidden, config.ema_momentum, config.ema_momentum_end) == (256, 4096, 0.996, 1.0)
    first, second = config.augmentation.views
    assert (first.blur_p, second.blur_p, first.solarize_p, second.solarize_p) == (1.0, 0.1, 0.0, 0.2)
    assert (first.crop, first.jitter, first.jitter_p) == ((0.08, 1.0), (0.4, 0.4, 0.2, 0.1), 0.8)
    assert (first.interpolation, first.grayscale_p, first.flip_p) == ("bicubic", 0.2, 0.5)
    probe = byol.linear_probe("resnet50")
    assert (probe.optimizer, probe.lr, probe.epochs, probe.weight_decay) == ("sgd", 0.2, 80, 0.0)
