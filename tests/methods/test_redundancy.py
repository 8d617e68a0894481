"""Barlow Twins and VICReg: golden numbers of their projector and loss, names, and the papers' numbers."""

import pytest
import torch
import torchvision
from torch import nn

from fastssl.contract import Batch, Method
from fastssl.methods import barlow_twins, vicreg
from fastssl.methods.barlow_twins import BarlowTwins
from fastssl.methods.vicreg import VICReg
from fastssl.nn import BarlowTwinsLoss, VICRegLoss
from fastssl.nn.heads import mlp_head
from fastssl.nn.noncontrastive import redundancy
from fastssl.train.optim import build_optimizer
from tests.support.golden import read

EXACT = {"rtol": 1e-9, "atol": 1e-11}
MODULES = {"barlow_twins": barlow_twins, "vicreg": vicreg}


def method_of(name, dim, projector=None):
    """The method without encoder, and its projector, by default one that passes embeddings on."""
    projector = projector or nn.Sequential(nn.Linear(dim, dim, bias=False))
    if projector[-1].in_features == dim:
        nn.init.eye_(projector[-1].weight)
    if name == "vicreg":
        return VICReg(nn.Identity(), projector, VICRegLoss(gather=True)).double()
    criterion = BarlowTwinsLoss(0.0051, gather=True)
    return BarlowTwins(nn.Identity(), projector, criterion).double()


@pytest.mark.parametrize("size", ["n12_d6", "n6_d16"])
@pytest.mark.parametrize(("name", "inputs"), [("barlow_twins", ("z1", "z2")), ("vicreg", ("x", "y"))])
def test_golden_loss_of_the_method(name, inputs, size):
    """Loss, gradients of the embeddings, and the running statistics of Barlow Twins' batch norm."""
    golden, _ = read(name)
    views = tuple(golden[f"{size}.input.{key}"].double().requires_grad_() for key in inputs)
    model = method_of(name, views[0].shape[1])
    loss, metrics = model(Batch(views, None, None))
    loss.backward()
    torch.testing.assert_close(metrics["redundancy"], redundancy(*(model.projector(view) for view in views)))
    torch.testing.assert_close(loss.detach(), golden[f"{size}.loss"], **EXACT)
    for view, key in zip(views, inputs):
        torch.testing.assert_close(view.grad, golden[f"{size}.grad.{key}"], **EXACT)
    if name == "barlow_twins":
        for key in ("running_mean", "running_var"):
            torch.testing.assert_close(model.state_dict()[f"bn.{key}"], golden[f"{size}.bn.{key}"], **EXACT)
    else:
        assert metrics["variance"].item() == pytest.approx(golden[f"{size}.std"].item())


@pytest.mark.parametrize("name", MODULES)
def test_golden_gradient_of_a_projector(name):
    golden, _ = read(name)
    projector = nn.Sequential(nn.Linear(5, 6, bias=False))
    projector[0].weight.data = golden["two_ranks.state.projector.weight"].double()
    model = method_of(name, 0, projector)
    loss, _ = model(Batch(tuple(golden[f"two_ranks.input.{key}"].double() for key in "xy"), None, None))
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["one_rank.loss"], **EXACT)
    torch.testing.assert_close(projector[0].weight.grad, golden["one_rank.grad.projector.weight"], **EXACT)


def tiny(module, **changes):
    config = module.Config.small()
    for name, value in {"dim": 16, **changes}.items():
        setattr(config, name, value)
    return module.build(config)


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_they_fulfil_the_contract(module):
    model, images = tiny(module).eval(), torch.randn(4, 3, 32, 32)
    assert isinstance(model, Method)
    assert model.features(images).shape == (4, 256)
    torch.testing.assert_close(model.encoder(images), model.features(images))


@pytest.mark.parametrize("name", MODULES)
def test_names_are_those_of_the_official_code(name):
    """torchvision's ResNet-50 without fc as backbone, projector, and Barlow Twins' batch norm without parameters."""
    with torch.device("meta"):
        model, reference = MODULES[name].build(MODULES[name].Config()), torchvision.models.resnet50()
        head = mlp_head(2048, 8192, 8192, 8192, bias=name == "vicreg").state_dict()
    names = {f"backbone.{key}" for key in reference.state_dict() if not key.startswith("fc.")}
    names |= {f"projector.{key}" for key in head}
    if name == "barlow_twins":
        names |= {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
    assert set(model.state_dict()) == names
    assert ("projector.0.bias" in names) == (name == "vicreg") and "projector.6.bias" not in names
    assert model.state_dict()["projector.6.weight"].shape == (8192, 8192)


def test_barlow_twins_has_another_learning_rate_for_biases_and_norms():
    model = tiny(barlow_twins, vector_lr=0.024)
    weights, vectors = build_optimizer(
        model, barlow_twins.Config().training, barlow_twins.parameter_groups
    ).param_groups
    assert (weights["lr_scale"], weights["weight_decay"], weights["adapt"]) == (1.0, 1e-6, True)
    assert (vectors["lr_scale"] * 0.2, vectors["weight_decay"], vectors["adapt"]) == (pytest.approx(0.0048), 0.0, False)
    assert {p.ndim for p in vectors["params"]} == {1} and {p.ndim for p in weights["params"]} == {2, 4}


def test_barlow_twins_divides_its_gradient_as_the_code_with_16_ranks_does():
    gradients = []
    for ranks in (1, 16):
        torch.manual_seed(0)
        model = tiny(barlow_twins, gradient_ranks=ranks)
        model(Batch(torch.randn(2, 8, 3, 32, 32).unbind(), None, None))[0].backward()
        gradients.append(model.projector[0].weight.grad)
    torch.testing.assert_close(gradients[1] * 16, gradients[0])
    assert barlow_twins.build(barlow_twins.Config("resnet_mini", dim=8)).criterion.gradient_ranks == 16


def test_defaults_are_those_of_the_papers():
    for module in MODULES.values():
        config = module.Config.paper()
        t = config.training
        assert (t.optimizer, t.lr, t.lr_end, t.weight_decay, t.momentum) == ("lars", 0.2, 0.0002, 1e-6, 0.9)
        assert (t.epochs, t.batch_size, t.warmup_epochs, config.dim) == (1000, 2048, 10, 8192)
        first, second = config.augmentation.views
        assert (first.blur_p, second.blur_p, first.solarize_p, second.solarize_p) == (1.0, 0.1, 0.0, 0.2)
        assert (first.crop, first.jitter, first.interpolation) == ((0.08, 1.0), (0.4, 0.4, 0.2, 0.1), "bicubic")
    barlow, variance = barlow_twins.Config(), vicreg.Config()
    assert (barlow.redundancy_weight, barlow.gradient_ranks, barlow.vector_lr * 0.2) == (
        0.0051,
        16,
        pytest.approx(0.0048),
    )
    assert (variance.sim_weight, variance.std_weight, variance.cov_weight, variance.halve_std) == (25, 25, 1, True)
    probes = [module.linear_probe("resnet50") for module in MODULES.values()]
    assert [(p.optimizer, p.lr, p.batch_size, p.epochs) for p in probes] == [
        ("sgd", 0.3, 256, 100),
        ("sgd", 0.02, 256, 100),
    ]
