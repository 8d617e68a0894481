import pytest
import torch
import torch.nn.functional as F

from fastssl.contract import Batch, Method, RanksNegatives
from fastssl.methods import invaspread
from fastssl.methods.invaspread import invariant_spreading_loss
from tests.support.golden import part, read
from tests.support.ranks import run_ranks


@pytest.mark.parametrize(("name", "tau", "weight"), [("T0.1", 0.1, 1.0), ("T0.5", 0.5, 1.0), ("T0.1_m2", 0.1, 2.0)])
def test_golden_losses_and_the_gradient_of_the_code(name, tau, weight):
    """The second factors are constants to the gradient, so it is not that of the number."""
    golden, _ = read("invaspread")
    z, expected = golden["input.features"].double().requires_grad_(), part(golden, f"{name}.")
    loss, _ = invariant_spreading_loss(z, tau, weight)
    torch.testing.assert_close(loss.detach(), expected["loss"], rtol=1e-9, atol=1e-10)
    (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(gradient, expected["grad.features"], rtol=1e-9, atol=1e-10)
    assert (gradient - expected["full_grad.features"]).abs().max() > 0.1


def test_ranks_of_partners():
    z = F.normalize(torch.randn(8, 3), dim=1)
    cosines = (z @ z.T).fill_diagonal_(-2)
    wanted = [(cosines[i] > cosines[i, (i + 4) % 8]).sum().item() for i in range(8)]
    assert invariant_spreading_loss(z)[1].tolist() == wanted


@pytest.mark.parametrize("weight", [1.0, 1.5])
def test_a_negative_that_takes_all_of_the_softmax_has_a_finite_loss(weight):
    """1 − p is 4e-9, below the resolution of float32, where a row equals that of another image and is opposite to the
    other view of its own."""
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]]).requires_grad_()
    exact = z.detach().double().requires_grad_()
    loss, _ = invariant_spreading_loss(z, 0.1, weight)
    p = (exact @ exact.detach().T / 0.1).exp()
    partner = torch.eye(4, dtype=torch.bool).roll(2, 0)
    negative = ~(partner | torch.eye(4, dtype=torch.bool))
    whole = p[partner] + weight * (p * negative).sum(1)
    spread = (1 - (p / whole[:, None])[negative]).log().view(4, 2).sum(1)
    expected = -((p[partner] / whole).log() + weight * spread).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    gradient, wanted = torch.autograd.grad(loss, z)[0], torch.autograd.grad(expected, exact)[0]
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-5)


def _of_this_rank(z, world):
    from fastssl.distributed import rank

    own = z.unflatten(0, (2, world, -1))[:, rank()].flatten(0, 1).requires_grad_()
    loss, ranks = invariant_spreading_loss(own, 0.1)
    return loss.detach(), torch.autograd.grad(loss, own)[0] / world, ranks


@pytest.mark.slow
def test_two_ranks_equal_one_process():
    z = F.normalize(torch.randn(12, 5).double(), dim=1)
    whole = z.clone().requires_grad_()
    loss, ranks = invariant_spreading_loss(whole, 0.1)
    (gradient,) = torch.autograd.grad(loss, whole)
    parts = run_ranks(2, _of_this_rank, z, 2)
    torch.testing.assert_close(sum(part[0] for part in parts) / 2, loss.detach())
    for i, wanted in ((1, gradient), (2, ranks)):
        made = torch.stack([part[i].unflatten(0, (2, -1)) for part in parts], 1).flatten(0, 2)
        torch.testing.assert_close(made, wanted)


def test_it_fulfils_the_contract():
    config = invaspread.Config.small()
    config.dim = 16
    model, views = invaspread.build(config), torch.randn(2, 8, 3, 32, 32).unbind()
    assert isinstance(model, Method) and isinstance(model, RanksNegatives)
    loss, metrics = model(Batch(views, None, None))
    loss.backward()
    assert loss > 0 and metrics.keys() == {"top1"}
    rank, count = model.ranks(Batch(views, None, None))
    assert rank.shape == (16,) and count == 14
    model.eval()
    torch.testing.assert_close(model.backbone.fc(model.features(views[0])), model.backbone(views[0]))


def test_defaults_are_those_of_the_code():
    config = invaspread.Config.paper()
    t = config.training
    assert (config.backbone, config.image_size, config.small_images, config.dim) == ("resnet18", (32, 32), True, 128)
    assert (t.optimizer, t.lr * t.batch_size / 256, t.weight_decay, t.decay_all) == ("sgd", 0.03, 5e-4, True)
    assert (t.epochs, t.batch_size, t.lr_drops, config.tau, config.negative_weight) == (301, 128, (120, 200), 0.1, 1.0)
    for view in config.augmentation.views:
        assert (view.crop, view.jitter, view.jitter_p) == ((0.2, 1.0), (0.4, 0.4, 0.4, 0.4), 1.0)
        assert (view.grayscale_p, view.flip_p, view.blur_p) == (0.2, 0.5, 0.0)
    assert invaspread.linear_probe("resnet18").epochs == 100
    assert not invaspread.Config.paper("timm:convnext_atto").small_images
