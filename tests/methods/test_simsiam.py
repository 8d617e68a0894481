import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from fastssl.contract import Batch, Method
from fastssl.methods import simsiam
from fastssl.methods.simsiam import SimSiam, parameter_groups
from fastssl.nn.heads import mlp_head
from fastssl.train.optim import build_optimizer
from tests.support.golden import part, read


class Encoder(nn.Module):
    """The golden file's encoder: body, ReLU, projector."""

    def __init__(self, dim):
        super().__init__()
        self.body = nn.Linear(10, 12)
        self.fc = mlp_head(12, 12, 12, dim, last_bias=True, last_norm="plain")

    def forward(self, x):
        return self.fc(F.relu(self.body(x)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_three_golden_steps(dtype):
    """Losses, gradients, and weights and running statistics after three steps with the predictor's own rate."""
    golden, meta = read("simsiam")
    model = SimSiam(Encoder(meta["dim"]), mlp_head(meta["dim"], meta["pred_dim"], meta["dim"], last_bias=True))
    model.load_state_dict(part(golden, "state."), strict=True)
    model.to(dtype)
    exact = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    sgd = meta["sgd"]
    groups = parameter_groups(model)
    assert [group.get("constant_lr", False) for group in groups] == [False, True]
    optimizer = torch.optim.SGD(groups, 0.0, sgd["momentum"], weight_decay=sgd["weight_decay"])
    gradients = {name.replace("backbone.", "encoder."): p for name, p in model.named_parameters()}
    for step in range(3):
        expected = part(golden, f"step{step}.")
        for group, lr in zip(optimizer.param_groups, expected["lr"].tolist()):
            group["lr"] = lr
        loss, _ = model(Batch((expected["input.x1"].to(dtype), expected["input.x2"].to(dtype)), None, None))
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected["loss"].to(dtype), **exact)
        for name, gradient in part(expected, "grad.").items():
            torch.testing.assert_close(gradients[name].grad, gradient.to(dtype), **exact)
        assert gradients[meta["no_gradient"][0]].grad is None
        optimizer.step()
        optimizer.zero_grad()
    state = model.state_dict()
    for name, x in part(golden, "step2.state.").items():
        torch.testing.assert_close(state[name], x if name.endswith("tracked") else x.to(dtype), **exact)


def tiny(**changes):
    config = simsiam.Config.small()
    for name, value in {"dim": 16, "hidden": 8, **changes}.items():
        setattr(config, name, value)
    return simsiam.build(config)


def test_it_fulfils_the_contract_and_its_features_are_the_inputs_of_the_projector():
    model, images = tiny().eval(), torch.randn(4, 3, 32, 32)
    assert isinstance(model, Method)
    torch.testing.assert_close(model.backbone.fc(model.features(images)), model.backbone(images))
    assert model.features(images).shape == (4, 256)


def test_names_are_those_of_the_official_code():
    """torchvision's ResNet-50 named encoder, with the projector as fc, and the predictor; also as part of a module."""
    with torch.device("meta"):
        model, reference = simsiam.build(simsiam.Config()), torchvision.models.resnet50()
        reference.fc = mlp_head(2048, 2048, 2048, 2048, last_bias=True, last_norm="plain")
    names = {f"encoder.{name}" for name in reference.state_dict()}
    names |= {f"predictor.{name}" for name in mlp_head(2048, 512, 2048, last_bias=True).state_dict()}
    assert set(model.state_dict()) == names
    assert model.state_dict()["predictor.3.weight"].shape == (2048, 512)
    wrapped = nn.ModuleDict({"method": tiny()})
    state = {name: x + 1 for name, x in wrapped.state_dict().items()}
    assert "method.encoder.conv1.weight" in state
    wrapped.load_state_dict(state)
    assert torch.equal(wrapped["method"].backbone.conv1.weight, state["method.encoder.conv1.weight"])


def test_only_the_projectors_last_bias_is_frozen():
    frozen = [name for name, p in tiny().named_parameters() if not p.requires_grad]
    assert frozen == ["backbone.fc.6.bias"]


def test_blocks_are_the_identity_at_initialisation():
    assert all(block.bn2.weight.abs().max() == 0 for block in tiny().backbone.layer3)


def test_all_parameters_are_decayed_and_the_predictors_rate_can_follow_the_schedule():
    model = tiny(fix_predictor_lr=False)
    groups = build_optimizer(model, simsiam.Config().training, parameter_groups).param_groups
    assert [(g["weight_decay"], g.get("constant_lr")) for g in groups] == [(1e-4, None), (1e-4, False)]


def test_defaults_are_those_of_the_paper():
    config = simsiam.Config.paper()
    t = config.training
    assert (t.optimizer, t.lr, t.weight_decay, t.decay_all, t.momentum) == ("sgd", 0.05, 1e-4, True, 0.9)
    assert (t.epochs, t.batch_size, t.warmup_epochs, t.lr_by_epoch, t.lr_end) == (100, 512, 0, True, 0.0)
    assert (config.dim, config.hidden, config.fix_predictor_lr) == (2048, 512, True)
    view, other = config.augmentation.views
    assert view == other
    assert (view.crop, view.jitter, view.jitter_p, view.blur_p) == ((0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.8, 0.5)
    assert (view.interpolation, view.grayscale_p, view.solarize_p, view.flip_p) == ("bilinear", 0.2, 0.0, 0.5)
    probe = simsiam.linear_probe("resnet50")
    assert (probe.optimizer, probe.lr, probe.batch_size, probe.epochs) == ("larc", 0.1, 4096, 90)
