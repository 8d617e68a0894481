"""Optimizers and their parameter groups."""

import pytest
import torch
from torch import nn

from fastssl.methods import mae
from fastssl.train.config import Training
from fastssl.train.optim import LARS, build_optimizer
from tests.support.contract import refused
from tests.support.golden import read


def optimizer_of(**changes):
    model = mae.build(mae.Config.small())
    settings = {"epochs": 1, "batch_size": 1, "optimizer": "adamw", "lr": 0.1, "weight_decay": 0.05} | changes
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, Training(**settings))
    groups = [({names[id(p)] for p in g["params"]}, g["weight_decay"]) for g in optimizer.param_groups]
    return model, optimizer, groups


def test_mae_decays_tokens_and_matrices_but_not_biases_norms_and_positions():
    model, optimizer, ((decayed, rate), (undecayed, none)) = optimizer_of(betas=(0.9, 0.95))
    assert (rate, none) == (0.05, 0.0)
    assert {"cls_token", "mask_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= decayed
    assert {"patch_embed.proj.bias", "norm.weight", "blocks.0.norm1.bias"} <= undecayed
    assert decayed | undecayed == {n for n, p in model.named_parameters() if p.requires_grad}
    assert "pos_embed" not in decayed | undecayed
    assert optimizer.defaults["betas"] == (0.9, 0.95)


def test_moco_decays_everything():
    _, _, groups = optimizer_of(decay_all=True, optimizer="sgd")
    assert len(groups) == 1


@pytest.mark.parametrize(("name", "cls"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("lars", LARS)])
def test_optimizer_classes(name, cls):
    assert isinstance(optimizer_of(optimizer=name)[1], cls)


def test_forms_of_lars_by_name():
    forms = {name: optimizer_of(optimizer=name)[1] for name in ("lars", "lars_simclr", "larc")}
    assert {name: (o.lr_in_momentum, o.larc) for name, o in forms.items()} == {
        "lars": (False, False),
        "lars_simclr": (True, False),
        "larc": (False, True),
    }
    refused(
        "LARS: lr_in_momentum must be False with larc, got True: choose one form",
        ValueError,
        lambda: LARS([torch.zeros(2)], 0.1, lr_in_momentum=True, larc=True),
    )


# optimizer in the golden file: form of ours, and "adapt" of the group of biases where it is not the default
VARIANTS = {
    "byol": {},
    "barlow": {},
    "vicreg": {},
    "dino": {},
    "mocov3": {},
    "simclr": {"lr_in_momentum": True},
    "swav_larc": {"larc": True},
    "simsiam_larc_linear": {"larc": True, "weight_decay": 0.0},
    "lightly": {"larc": True, "adapt": False},
}


@pytest.mark.parametrize("layout", ["contiguous", "transposed gradient"])
@pytest.mark.parametrize("name", VARIANTS)
def test_golden_lars_variants(name, layout):
    """Four steps with a changing learning rate, in float64; the second gradient of the matrix is zero."""
    golden, meta = read("lars_variants")
    form = {"weight_decay": meta["weight_decay"], **VARIANTS[name]}
    biases = {"adapt": form.pop("adapt")} if "adapt" in form else {}
    params = {key: golden[f"input.{key}0"].double().requires_grad_() for key in "wbz"}
    groups = [{"params": [params["w"], params["z"]]}, {"params": [params["b"]], **biases}]
    optimizer = LARS(groups, 0.0, momentum=meta["momentum"], trust=meta["trust"], **form)
    for step, lr in enumerate(meta["lr"]):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for key, p in params.items():
            gradient = golden[f"input.g{key}{step}"].double()
            p.grad = gradient.T.contiguous().T if layout != "contiguous" and gradient.ndim > 1 else gradient
        optimizer.step()
        for key, p in params.items():
            expected = golden[f"{name}.{key}{step + 1}"]
            torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12, msg=f"{key}, step {step}")


@pytest.mark.parametrize("form", [{}, {"lr_in_momentum": True}, {"larc": True}])
def test_lars_skips_a_step_whose_gradient_is_not_finite(form):
    params = [torch.randn(3, 2).requires_grad_(), torch.randn(2).requires_grad_()]
    optimizer = LARS(params, 0.1, weight_decay=0.1, **form)
    for values, found_inf in ((1.0, 0.0), (torch.nan, 1.0), (1.0, 0.0)):
        before = [p.detach().clone() for p in params]
        buffers = [optimizer.state[p].get("momentum_buffer", p).detach().clone() for p in params]
        for p in params:
            p.grad = torch.full_like(p, values)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        assert all(torch.equal(p, old) == bool(found_inf) for p, old in zip(params, before))
        assert all(
            torch.equal(optimizer.state[p]["momentum_buffer"], old) == bool(found_inf)
            for p, old in zip(params, buffers)
        )


def test_lars_takes_weights_in_channels_last():
    """Weights, gradients and buffers in other memory formats than each other have the same step."""
    weight, gradient = torch.randn(2, 4, 3, 3, 3).double()
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        p = weight.clone(memory_format=memory_format).requires_grad_()
        optimizer = LARS([p], 0.5, weight_decay=0.1)
        for _ in range(2):
            p.grad = gradient.clone(memory_format=memory_format)
            optimizer.step()
        results.append(p.detach().contiguous())
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-15)


class OddNorm(nn.BatchNorm1d):
    """A norm whose weight has the shape [1, C, 1], as haiku's."""

    def __init__(self, channels):
        super().__init__(channels)
        self.weight = nn.Parameter(torch.ones(1, channels, 1))


def test_norms_are_exempt_by_their_type_and_not_by_their_shape():
    model = nn.Sequential(nn.Linear(3, 3), OddNorm(3))
    model.register_parameter("token", nn.Parameter(torch.zeros(1, 1, 3)))
    adapted, exempt = build_optimizer(model, Training(1, 1, "lars", 0.1, 0.05)).param_groups
    assert {id(p) for p in adapted["params"]} == {id(model[0].weight), id(model.token)}
    assert (adapted["adapt"], adapted["weight_decay"]) == (True, 0.05)
    assert (exempt["adapt"], exempt["weight_decay"]) == (False, 0.0)
    assert len(exempt["params"]) == 3
