"""Losses without negatives against golden numbers, in both of their forms, and over two and three ranks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.distributed import all_gather, rank, world_size
from fastssl.nn import BarlowTwinsLoss, NegativeCosineSimilarity, VICRegLoss, noncontrastive
from fastssl.nn.noncontrastive import redundancy, squared_cross_product, uses_gram
from tests.support.contract import compiles, gradcheck, refused
from tests.support.golden import read
from tests.support.ranks import run_ranks

EXACT = {"rtol": 1e-9, "atol": 1e-11}
SIZES = ("n12_d6", "n6_d16")


@pytest.fixture(params=["gram", "dimensions"])
def form(request, monkeypatch):
    """Both forms of the squared cross product, whichever is cheaper."""
    monkeypatch.setattr(noncontrastive, "uses_gram", lambda rows, dim: request.param == "gram")


def test_the_form_with_fewer_operations_is_chosen():
    assert uses_gram(2048, 8192) and uses_gram(6143, 8192)
    assert not uses_gram(6144, 8192) and not uses_gram(4096, 2048)


def inputs(golden, *names):
    return [golden[name].double().requires_grad_() for name in names]


def test_byols_loss_of_one_direction():
    golden, _ = read("byol")
    (p,) = inputs(golden, "regression.input.prediction")
    loss = 2 + 2 * NegativeCosineSimilarity()(p, golden["regression.input.target"].double())
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["regression.loss"], **EXACT)
    torch.testing.assert_close(p.grad, golden["regression.grad.prediction"], **EXACT)


def test_half_precision_is_computed_in_float32():
    p, z = torch.randn(2, 4, 8).bfloat16()
    for criterion in (NegativeCosineSimilarity(), BarlowTwinsLoss(), VICRegLoss()):
        loss = criterion(p, z)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, criterion(p.float(), z.float()))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(criterion(p, z), loss)


def test_rows_that_do_not_fit_are_refused():
    """Broadcasting would give a number, and a single row NaN."""
    for criterion in (BarlowTwinsLoss(), VICRegLoss()):
        name = type(criterion).__name__
        shapes = f"{name}: z1 and z2 must have one shape [B, D], got "
        refused(shapes + "[4, 5] and [1, 5]", ValueError, criterion, torch.randn(4, 5), torch.randn(1, 5))
        refused(shapes + "[2, 4, 5] and [2, 4, 5]", ValueError, criterion, *torch.randn(2, 2, 4, 5))
        sentence = f"{name}: there must be at least 2 rows, over which a variance is taken, got 1"
        refused(sentence, ValueError, criterion, *torch.randn(2, 1, 5))
    sentence = "NegativeCosineSimilarity: p and z must have one shape, got [4, 5] and [1, 5]"
    refused(sentence, ValueError, NegativeCosineSimilarity(), torch.randn(4, 5), torch.randn(1, 5))


@pytest.mark.parametrize("size", SIZES)
def test_golden_barlow_twins(size, form):
    golden, meta = read("barlow_twins")
    z1, z2 = inputs(golden, f"{size}.input.z1", f"{size}.input.z2")
    loss = BarlowTwinsLoss(meta["lambd"], eps=meta["eps"])(z1, z2)
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden[f"{size}.loss"], **EXACT)
    torch.testing.assert_close(z1.grad, golden[f"{size}.grad.z1"], **EXACT)
    torch.testing.assert_close(z2.grad, golden[f"{size}.grad.z2"], **EXACT)


@pytest.mark.parametrize("size", SIZES)
def test_golden_vicreg(size, form):
    """The total and each of its three terms, with gradients."""
    golden, _ = read("vicreg")
    for name, weights in {"": (25.0, 25.0, 1.0), "sim": (1, 0, 0), "std": (0, 1, 0), "cov": (0, 0, 1)}.items():
        z1, z2 = inputs(golden, f"{size}.input.x", f"{size}.input.y")
        loss = VICRegLoss(*weights)(z1, z2)
        loss.backward()
        prefix = f"{size}.{name}." if name else f"{size}."
        torch.testing.assert_close(loss.detach(), golden[f"{size}.{name or 'loss'}"], **EXACT)
        torch.testing.assert_close(z1.grad, golden[f"{prefix}grad.x"], **EXACT)
        torch.testing.assert_close(z2.grad, golden[f"{prefix}grad.y"], **EXACT)


def test_the_papers_variance_term_is_twice_the_codes():
    z1, z2 = torch.randn(2, 6, 4)
    (_, halved, _), (_, whole, _) = VICRegLoss().terms(z1, z2), VICRegLoss(halve_std=False).terms(z1, z2)
    torch.testing.assert_close(whole, 2 * halved)


def test_gradient_ranks_divide_the_gradient_alone():
    z1, z2 = torch.randn(2, 6, 4).requires_grad_()
    losses = [BarlowTwinsLoss(gradient_ranks=n)(z1, z2) for n in (1, 16)]
    gradients = [torch.autograd.grad(loss, (z1, z2)) for loss in losses]
    torch.testing.assert_close(*losses)
    for whole, divided in zip(*gradients):
        torch.testing.assert_close(divided * 16, whole)
    sentence = "BarlowTwinsLoss: gradient_ranks must be at least 1, got 0"
    refused(sentence, ValueError, BarlowTwinsLoss, gradient_ranks=0)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_squared_cross_product(shape, form):
    a, b = torch.randn(2, *shape, dtype=torch.float64).unbind(0)
    torch.testing.assert_close(squared_cross_product(a, b), (a.T @ b).square().sum(), **EXACT)
    torch.testing.assert_close(squared_cross_product(a), (a.T @ a).square().sum(), **EXACT)
    a.requires_grad_(), b.requires_grad_()
    gradcheck(squared_cross_product, a, b)
    gradcheck(squared_cross_product, a)
    gradcheck(squared_cross_product, a, b.detach())
    gradcheck(squared_cross_product, a.detach(), b)


@pytest.mark.slow
def test_losses_are_one_graph(form):
    z1, z2 = torch.randn(2, 6, 4, dtype=torch.float64).unbind(0)
    for criterion in (BarlowTwinsLoss(gradient_ranks=2), VICRegLoss(), NegativeCosineSimilarity()):
        compiles(criterion, z1.requires_grad_(), z2.requires_grad_())


def test_losses_work_on_the_meta_device(form):
    z1, z2 = torch.randn(2, 6, 4, device="meta").unbind(0)
    for criterion in (BarlowTwinsLoss(), VICRegLoss(), NegativeCosineSimilarity()):
        loss = criterion(z1.requires_grad_(), z2)
        loss.backward()
        assert loss.device.type == "meta" and loss.shape == ()


def test_memory_is_of_the_smaller_side():
    """Eight rows of 20,000 dimensions: a matrix of dimensions would take 1.6 GB."""
    z1, z2 = torch.randn(2, 8, 20000).unbind(0)
    z1.requires_grad_()
    sizes = []

    def note(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = BarlowTwinsLoss()(z1, z2) + VICRegLoss()(z1, z2)
    loss.backward()
    assert max(sizes) <= z1.numel()


def through_projector(name, options, world=1, this_rank=0):
    """Losses, and the gradient that DistributedDataParallel leaves, of the golden file's rows of this rank."""
    golden, _ = read(name)
    projector = nn.Linear(5, 6, bias=False).double()
    projector.weight.data = golden["two_ranks.state.projector.weight"].double()
    model = DistributedDataParallel(projector) if world > 1 else projector
    criterion = (BarlowTwinsLoss if name == "barlow_twins" else VICRegLoss)(gather=True, **options)
    views = (golden[f"two_ranks.input.{key}"].double().chunk(world)[this_rank] for key in "xy")
    z1, z2 = model(torch.cat(list(views))).chunk(2)
    loss = criterion(z1, z2)
    loss.backward()
    return all_gather(loss.detach().view(1)), projector.weight.grad


def on_this_rank(name, options, gram):
    noncontrastive.uses_gram = lambda rows, dim: gram
    return through_projector(name, options, world_size(), rank())


RANK_CASES = {"barlow_twins": {"redundancy_weight": 0.0051}, "vicreg": {}}


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("name", RANK_CASES)
def test_golden_two_ranks(name, gram):
    golden, _ = read(name)
    reference = {"gradient_ranks": 2} if name == "barlow_twins" else {}
    loss, gradient = through_projector(name, RANK_CASES[name])
    torch.testing.assert_close(loss[0], golden["one_rank.loss"], **EXACT)
    torch.testing.assert_close(gradient, golden["one_rank.grad.projector.weight"], **EXACT)
    for losses, gradient in run_ranks(2, on_this_rank, name, RANK_CASES[name] | reference, gram):
        torch.testing.assert_close(losses, golden["two_ranks.loss"], **EXACT)
        torch.testing.assert_close(gradient, golden["two_ranks.grad.projector.weight"], **EXACT)


def batch_of(world, this_rank):
    generator = torch.Generator().manual_seed(3)
    z1, z2 = torch.randn(2, 6, 7, generator=generator, dtype=torch.float64)
    return [z.chunk(world)[this_rank].clone().requires_grad_() for z in (z1, z2)]


def gradients_on_this_rank():
    """Mean loss over ranks and gradients of this rank's rows, as DDP's mean scales them."""
    results = []
    for criterion in (BarlowTwinsLoss(gather=True), VICRegLoss(gather=True)):
        views = batch_of(world_size(), rank())
        loss = criterion(*views)
        gradients = torch.autograd.grad(loss, views)
        results.append([all_gather(loss.detach().view(1)).mean(), *(all_gather(g / world_size()) for g in gradients)])
    return results


def test_three_ranks_equal_one_process():
    expected = gradients_on_this_rank()
    for results in run_ranks(3, gradients_on_this_rank):
        for result, reference in zip(results, expected):
            for x, y in zip(result, reference):
                torch.testing.assert_close(x, y, **EXACT)


def test_lightlys_losses_are_equal():
    lightly = pytest.importorskip("lightly.loss")
    z1, z2 = torch.randn(2, 8, 5, dtype=torch.float64)
    for ours, theirs in (
        (NegativeCosineSimilarity(), lightly.NegativeCosineSimilarity()),
        (BarlowTwinsLoss(), lightly.BarlowTwinsLoss()),
        (VICRegLoss(), lightly.VICRegLoss()),
    ):
        torch.testing.assert_close(ours(z1, z2), theirs(z1, z2), **EXACT)
    torch.testing.assert_close(NegativeCosineSimilarity()(z1, z2), -F.cosine_similarity(z1, z2).mean(), **EXACT)


def test_redundancy_is_the_adjusted_mean_of_squared_correlations():
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn(40, 9, generator=generator, dtype=torch.float64) * 3 + 5 for _ in range(2))
    others = ~torch.eye(9, dtype=torch.bool)
    squares = torch.stack([torch.corrcoef(z.T).square()[others].mean() for z in (z1, z2)]).mean()
    torch.testing.assert_close(redundancy(z1, z2), 1 - (1 - squares) * 39 / 38)
    z1.requires_grad_()
    assert not redundancy(z1, z2).requires_grad
    expected = redundancy(z1.float(), z2.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert redundancy(z1.float(), z2.float()).equal(expected)


def test_redundancy_of_known_embeddings():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(32, 1, generator=generator)
    same = one * torch.linspace(-2, 3, 128)  # one direction; neither sign nor scale matter
    for scale in (1, 1e-12, 1e12):
        assert redundancy(scale * same, scale * same.flip(0) + scale).item() == pytest.approx(1, abs=1e-3)
    own = [redundancy(z).item() for z in torch.randn(50, 8, 128, generator=generator)]
    assert abs(sum(own) / len(own)) < 0.01  # by chance 1/7, which is taken off
    first = torch.randn(32, noncontrastive.COMPARED, generator=generator)
    assert redundancy(torch.cat([first, same], dim=1)).equal(redundancy(first))


def test_constant_dimensions_have_no_correlation():
    constant = torch.full((48, 8), 0.1) + torch.arange(8)
    assert redundancy(constant).item() == pytest.approx(1 - 47 / 46)
    varied = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))
    half = torch.cat([varied, constant], dim=1)
    pairs = 8 * 7 / (16 * 15)  # a quarter of the pairs have correlations
    squares = 1 - (1 - redundancy(varied).double()) * 46 / 47
    assert redundancy(half).item() == pytest.approx(float(1 - (1 - squares * pairs) * 47 / 46), abs=1e-5)


@pytest.mark.parametrize("shape", [(2, 8), (1, 8), (8, 1)])
def test_no_redundancy_without_pairs(shape):
    assert redundancy(torch.randn(shape)).isnan()
