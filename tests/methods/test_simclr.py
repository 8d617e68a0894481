import pytest
import torch
from torch import nn

from fastssl.contract import Batch, Method, RanksNegatives
from fastssl.distributed import rank, world_size
from fastssl.methods import simclr_v1, simclr_v2
from fastssl.methods.simclr_v1 import SimCLR
from fastssl.nn import losses
from tests.support.golden import read
from tests.support.ranks import run_ranks

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def loss_of(views, tau, loss_scale=2.0):
    """Loss of SimCLR, whose backbone passes the views on, and its gradient."""
    views = [view.double().requires_grad_() for view in views]
    loss, metrics = SimCLR(nn.Identity(), tau, loss_scale)(Batch(tuple(views), None, None))
    loss.backward()
    return loss.detach(), torch.cat([view.grad for view in views]), metrics["top1"]


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_golden_loss(tau):
    golden, _ = read("simclr_ntxent")
    views = golden["input.hidden"].chunk(2)
    loss, gradient, _ = loss_of(views, tau)
    torch.testing.assert_close(loss, golden[f"T{tau}.loss"], **EXACT)
    torch.testing.assert_close(gradient, golden[f"T{tau}.grad.hidden"], **EXACT)
    papers, gradient, _ = loss_of(views, tau, loss_scale=1.0)
    torch.testing.assert_close(papers, golden[f"T{tau}.lightly.loss"], **EXACT)
    torch.testing.assert_close(gradient, golden[f"T{tau}.lightly.grad.hidden"], **EXACT)


def counted(op, rows):
    def op_of_few_rows(q, *rest):
        assert len(q) == rows
        return op(q, *rest)

    return op_of_few_rows


def golden_on_this_rank():
    """Loss and gradient of the golden file, after a check that no rank computes rows of another."""
    golden, meta = read("simclr_ntxent")
    rows = golden["two_ranks.input.hidden"][rank()]
    for name in ("nt_xent", "batch_info_nce"):
        setattr(losses, name, counted(getattr(losses, name), len(rows) // 2))
    loss, gradient, _ = loss_of(rows.chunk(2), meta["temperature_two_ranks"])
    return loss, gradient / world_size()  # as DistributedDataParallel's mean over ranks scales it


def test_golden_two_ranks():
    golden, _ = read("simclr_ntxent")
    for this_rank, (loss, gradient) in enumerate(run_ranks(2, golden_on_this_rank)):
        torch.testing.assert_close(loss, golden[f"two_ranks.rank{this_rank}.loss"], **EXACT)
        torch.testing.assert_close(gradient, golden["two_ranks.grad_of_mean_loss"][this_rank], **EXACT)


def tiny(module=simclr_v1, **changes):
    config = module.Config.small()
    for name, value in {"dim": 16, "hidden": 32, **changes}.items():
        setattr(config, name, value)
    return module.build(config)


def test_it_fulfils_the_contract_and_its_features_are_the_inputs_of_the_projector():
    model, images = tiny().eval(), torch.randn(4, 3, 32, 32)
    assert isinstance(model, Method) and isinstance(model, RanksNegatives)
    torch.testing.assert_close(model.backbone.fc(model.features(images)), model.backbone(images))
    assert model.features(images).shape == (4, 256)


def test_ranks_count_the_other_images_that_are_closer():
    z1 = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    z2 = torch.tensor([[1.0, 0.1], [1.0, 0.0], [1.0, 1.0]])
    method = SimCLR(nn.Identity())
    assert method.partner_ranks(z1, z2).tolist() == [1, 2, 0]
    ranks, negatives = method.ranks(Batch((z1, z2), None, None))
    assert (ranks.tolist(), negatives) == ([1, 2, 0], 2)
    _, metrics = method(Batch((z1, z2), None, None))
    assert metrics["top1"] == pytest.approx(1 / 3)


def test_batch_norms_see_both_views_together():
    """The projector's last norm without its weight: the projections of both views together have mean 0."""
    model = tiny()
    model.backbone.fc[-1].register_forward_hook(lambda _, args, out: outputs.append(out))
    outputs = []
    views = torch.randn(8, 3, 32, 32), 3 + torch.randn(8, 3, 32, 32)
    model(Batch(views, None, None))
    assert [len(x) for x in outputs] == [16]
    torch.testing.assert_close(outputs[0].mean(0), torch.zeros(16), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("module", "layers"), [(simclr_v1, 2), (simclr_v2, 3)])
def test_heads_have_the_layers_of_the_official_code(module, layers):
    with torch.device("meta"):
        head = module.build(module.Config()).backbone.fc
    kinds = ["Linear", "BatchNorm1d", "ReLU"] * (layers - 1) + ["Linear", "BatchNorm1d"]
    assert [type(layer).__name__ for layer in head] == kinds
    assert all(layer.bias is None for layer in head if isinstance(layer, nn.Linear))
    shapes = [tuple(layer.weight.shape) for layer in head if isinstance(layer, nn.Linear)]
    assert shapes == [(2048, 2048)] * (layers - 1) + [(128, 2048)]
    assert [p.requires_grad for p in head[-1].parameters()] == [True, False]
    weight = tiny(module, hidden=512).backbone.fc[0].weight
    assert weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_defaults_are_those_of_the_papers():
    v1, v2 = simclr_v1.Config.paper(), simclr_v2.Config.paper()
    for config, epochs, lr, decay, scaling in ((v1, 1000, 0.3, 1e-6, "linear"), (v2, 800, 1.2, 1e-4, "sqrt")):
        t = config.training
        assert (t.optimizer, t.lr, t.weight_decay, t.lr_scaling) == ("lars_simclr", lr, decay, scaling)
        assert (t.epochs, t.batch_size, t.warmup_epochs, t.momentum) == (epochs, 4096, 10, 0.9)
        assert (config.dim, config.hidden, config.tau, config.loss_scale) == (128, 2048, 0.1, 2.0)
        view, other = config.augmentation.views
        assert view == other
        assert (view.crop, view.jitter, view.jitter_p, view.blur_p) == ((0.08, 1.0), (0.8, 0.8, 0.8, 0.2), 0.8, 0.5)
        assert (view.interpolation, view.grayscale_p, view.flip_p) == ("bicubic", 0.2, 0.5)
    probe = simclr_v1.linear_probe("resnet50")
    assert (probe.optimizer, probe.lr, probe.batch_size, probe.weight_decay) == ("sgd", 0.1, 4096, 1e-6)
