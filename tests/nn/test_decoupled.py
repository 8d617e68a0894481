import pytest
import torch
import torch.nn.functional as F
from lightly.loss import DCLLoss as LightlyDCL
from lightly.loss import DCLWLoss as LightlyDCLW
from torch import nn

from fastssl.distributed import rank, world_size
from fastssl.nn import DCLLoss, DCLWLoss, NTXentLoss, decoupled
from tests.support.contract import refused
from tests.support.ranks import run_ranks

B, D = 7, 5


def views(batch=B, dtype=torch.float64):
    return [torch.randn(batch, D, dtype=dtype, requires_grad=True) for _ in range(2)]


def formula(z1, z2, tau, sigma=None):
    """Equation 6 of the paper, image by image; with sigma its section 3.2."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    total = 0
    for one, two in ((z1, z2), (z2, z1)):
        cosines = (one * two).sum(1).detach()
        for i in range(len(one)):
            others = [j for j in range(len(one)) if j != i]
            negatives = torch.cat([one[others] @ one[i], two[others] @ one[i]]) / tau
            weight = 1 if sigma is None else 2 - len(one) * (cosines / sigma).softmax(0)[i]
            total = total - weight * (one[i] @ two[i]) / tau + negatives.exp().sum().log()
    return total / (2 * len(z1))


def with_gradients(criterion, z):
    z = [x.detach().clone().requires_grad_() for x in z]
    loss = criterion(*z)
    loss.backward()
    return [loss.detach(), *(x.grad for x in z)]


@pytest.mark.parametrize("at_once", [1, 30, 2**22])
@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_it_is_the_formula_in_blocks_of_any_size(tau, at_once, monkeypatch):
    monkeypatch.setattr(decoupled, "LOGITS_AT_ONCE", at_once)
    z, exact = views(), {"rtol": 1e-12, "atol": 1e-13}
    for ours, sigma in ((DCLLoss(tau), None), (DCLWLoss(tau, 0.3), 0.3)):
        expected = with_gradients(lambda a, b, sigma=sigma: formula(a, b, tau, sigma), z)
        for made, wanted in zip(with_gradients(ours, z), expected):
            torch.testing.assert_close(made, wanted, **exact)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_it_is_lightlys():
    z = views()
    for ours, theirs in (
        (DCLLoss(0.2), LightlyDCL(0.2)),
        (DCLLoss(0.2, squared_distance), LightlyDCL(0.2, squared_distance)),
        (DCLWLoss(0.2), LightlyDCLW(0.2)),
    ):
        for made, wanted in zip(with_gradients(ours, z), with_gradients(theirs, z)):
            torch.testing.assert_close(made, wanted, rtol=1e-12, atol=1e-13)


def squared_distance(z, other):
    return (z - other).square().sum(1)


def test_a_positive_that_dominates_costs_no_digits():
    """exp of the positive's logit is 10²⁶ times that of the others: NT-Xent's sum has no digit of them left."""
    z1 = torch.linalg.qr(torch.randn(8, 8))[0]
    z = [z1, z1 + 1e-3 * torch.randn(8, 8)]
    exact = with_gradients(DCLLoss(1 / 60), [x.double() for x in z])
    assert NTXentLoss(1 / 60)(*z) < 1e-20
    for made, wanted in zip(with_gradients(DCLLoss(1 / 60), z), exact):
        assert (made - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_trained_temperature_and_derivatives():
    tau = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    torch.autograd.gradcheck(lambda a, b, t: DCLLoss(t)(a, b), (*views(3), tau))
    with pytest.raises(RuntimeError, match=r"DCLLoss"):
        (gradient,) = torch.autograd.grad(DCLLoss()(*(z := views())), z[:1], create_graph=True)
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_and_autocast(dtype):
    z = [x.detach().to(dtype) for x in views()]
    expected = DCLLoss()(*(x.float() for x in z))
    assert expected.dtype == torch.float32
    torch.testing.assert_close(DCLLoss()(*z), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(DCLLoss()(*(x.float() for x in z)), expected)


def gathered(criterion):
    torch.manual_seed(0)
    z = torch.randn(2, world_size() * B, D, dtype=torch.float64)
    return with_gradients(criterion, [part.view(world_size(), B, D)[rank()] for part in z])


def test_over_ranks_it_is_that_of_the_whole_batch():
    torch.manual_seed(0)
    z = torch.randn(2, 2 * B, D, dtype=torch.float64)
    loss, one, two = with_gradients(DCLLoss(0.3), z)
    losses, ones, twos = zip(*run_ranks(2, gathered, DCLLoss(0.3, gather=True)))
    torch.testing.assert_close(torch.stack(losses).mean(), loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat(ones) / 2, one, rtol=1e-11, atol=1e-13)  # DDP divides by the ranks
    torch.testing.assert_close(torch.cat(twos) / 2, two, rtol=1e-11, atol=1e-13)


def test_refusals():
    refused("DCLLoss: tau must be > 0, got 0", ValueError, DCLLoss, 0)
    refused("DCLWLoss: tau must be > 0, got -1", ValueError, DCLWLoss, -1)
    one, two = torch.randn(1, D), torch.randn(2, D)
    refused("DCLLoss: z1 and z2 must have one shape [B, D], got [1, 5] and [2, 5]", ValueError, DCLLoss(), one, two)
    refused(
        "DCLLoss: there must be at least 2 images, since negatives are of other ones, got 1",
        ValueError,
        DCLLoss(),
        one,
        one,
    )


def metric_learning(embeddings, labels, temperature):
    """pytorch-metric-learning's NTXentLoss: each pair of one label against itself and all pairs with other labels."""
    z = F.normalize(embeddings, dim=1)
    logits = z @ z.T / temperature
    losses = []
    for i in range(len(z)):
        negatives = logits[i][labels != labels[i]]
        for j in range(len(z)):
            if i != j and labels[i] == labels[j]:
                losses.append(torch.cat([logits[i, j, None], negatives]).logsumexp(0) - logits[i, j])
    return torch.stack(losses).mean()


def test_the_line_that_replaces_pytorch_metric_learnings():
    embeddings, labels = torch.cat(views()).detach(), torch.arange(B).repeat(2)
    expected = metric_learning(embeddings, labels, 0.07)
    torch.testing.assert_close(NTXentLoss(0.07)(*embeddings.chunk(2)), expected, rtol=1e-12, atol=0)


def test_pytorch_metric_learning_itself():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    embeddings, labels = torch.cat(views()).detach(), torch.arange(B).repeat(2)
    expected = losses.NTXentLoss(0.07)(embeddings, labels)
    torch.testing.assert_close(NTXentLoss(0.07)(*embeddings.chunk(2)), expected)
