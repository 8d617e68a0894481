import pytest
import torch
import torch.nn.functional as F

from fastssl.ops import batch_info_nce, contrastive, info_nce, nt_xent
from tests.close import assert_exact
from tests.ops.contract import compiles, gradcheck, opcheck, refused, refuses_second_derivative


def unit(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype)


def info_nce_formula(q, k, queue, tau):
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / tau
    loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64), reduction="none")
    return loss, (logits[:, 1:] > logits[:, :1]).sum(1)


def batch_formula(q, keys, tau, first=0):
    logits, labels = q @ keys.T / tau, first + torch.arange(len(q))
    positive = logits.gather(1, labels[:, None])
    return F.cross_entropy(logits, labels, reduction="none"), (logits > positive).sum(1)


def nt_xent_formula(z1, z2, tau):
    z = torch.cat([z1, z2])
    logits = (z @ z.T / tau).masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
    labels = (torch.arange(len(z)) + len(z1)) % len(z)
    return F.cross_entropy(logits, labels, reduction="none")


@pytest.mark.parametrize(("batch", "length", "width"), [(1, 1, 1), (13, 63, 5), (8, 1000, 128), (4, 0, 3), (0, 7, 3)])
@pytest.mark.parametrize("tau", [0.07, 0.2, 5.0])
def test_info_nce_is_cross_entropy(batch, length, width, tau):
    q, k, queue = unit(batch, width).requires_grad_(), unit(batch, width), unit(length, width)
    loss, rank = info_nce(q, k, queue, tau)
    wanted, wanted_rank = info_nce_formula(q, k, queue, tau)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(rank, wanted_rank) and rank.dtype == torch.int64
    weights = torch.rand(batch).double()
    for ours, theirs in zip(*(torch.autograd.grad((value * weights).sum(), q) for value in (loss, wanted))):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("batch", "count", "first"), [(1, 1, 0), (13, 63, 50), (8, 8, 0), (5, 1000, 17)])
def test_batch_info_nce_is_cross_entropy(batch, count, first):
    q, keys = unit(batch, 16).requires_grad_(), unit(count, 16).requires_grad_()
    loss, rank = batch_info_nce(q, keys, 0.2, first)
    wanted, wanted_rank = batch_formula(q, keys, 0.2, first)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(rank, wanted_rank)
    weights = torch.rand(batch).double()
    grads = [torch.autograd.grad((value * weights).sum(), (q, keys)) for value in (loss, wanted)]
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2, 13, 63])
def test_nt_xent_is_cross_entropy(batch):
    z1, z2 = unit(batch, 16).requires_grad_(), unit(batch, 16).requires_grad_()
    losses = nt_xent(z1, z2, 0.5), nt_xent_formula(z1, z2, 0.5)
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    weights = torch.rand(2 * batch).double()
    for ours, theirs in zip(*(torch.autograd.grad((value * weights).sum(), (z1, z2)) for value in losses)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_gradients_with_a_learnable_temperature():
    q, k, queue = unit(3, 4).requires_grad_(), unit(3, 4), unit(7, 4)
    keys, tau = unit(5, 4).requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    gradcheck(lambda q, t: info_nce(q, k, queue, t).loss, q, tau)
    gradcheck(lambda q, keys, t: batch_info_nce(q, keys, t, 1).loss, q, keys, tau)
    gradcheck(lambda keys: batch_info_nce(q.detach(), keys, 0.3, 1).loss, keys)
    gradcheck(nt_xent, q, unit(3, 4).requires_grad_(), tau)
    gradcheck(lambda t: info_nce(q.detach(), k, queue, t.exp()).loss, tau)
    for function in (
        lambda q: info_nce(q, k, queue, 0.3),
        lambda q: nt_xent(q, k, 0.3),
        lambda q: batch_info_nce(q, k, 0.3),
    ):
        refuses_second_derivative(function, q)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [0.07, 0.2])
def test_errs_no_more_than_torch_that_sums_in_float32(dtype, tau):
    q, k, queue = unit(32, 128, dtype=dtype), unit(32, 128, dtype=dtype), unit(1000, 128, dtype=dtype)
    runs = {}
    for kind, cast, functions in (
        ("truth", torch.float64, (info_nce_formula, batch_formula, nt_xent_formula)),
        ("plain", torch.float32, (info_nce_formula, batch_formula, nt_xent_formula)),
        ("ours", dtype, (info_nce, batch_info_nce, nt_xent)),
    ):
        x, y = q.to(cast).requires_grad_(), k.to(cast).requires_grad_()
        losses = (
            functions[0](x, y.detach(), queue.to(cast), tau)[0],
            functions[1](x, y, tau)[0],
            functions[2](x, y, tau),
        )
        grads = [torch.autograd.grad(loss.sum(), x, retain_graph=True)[0] for loss in losses]
        runs[kind] = [*losses, *[g.to(dtype) if kind == "plain" else g for g in grads]]
    for i, result in enumerate(runs["ours"]):
        assert_exact(result, runs["truth"][i], runs["plain"][i], f"{'loss' if i < 3 else 'dq'} of op {i % 3}")


def test_queue_may_have_another_dtype():
    q, k, queue = unit(4, 8, dtype=torch.float32), unit(4, 8, dtype=torch.float32), unit(50, 8, dtype=torch.bfloat16)
    assert torch.equal(info_nce(q, k, queue, 0.1).loss, info_nce(q, k, queue.float(), 0.1).loss)


def test_small_temperature_and_equal_keys_stay_finite():
    q = unit(4, 8, dtype=torch.float32).requires_grad_()
    keys = q.detach()[:1].expand(4, 8)
    for loss in (
        info_nce(q, keys, keys.expand(4, 8), 0.005).loss,
        batch_info_nce(q, keys, 0.005).loss,
        nt_xent(q, keys, 0.005),
    ):
        assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), q)[0].isfinite().all()  # fmt: skip


def test_queue_may_be_overwritten_before_backward():
    """MoCo's reference clones the queue each step because it enqueues before the backward pass."""
    q, k, queue = unit(3, 4).requires_grad_(), unit(3, 4), unit(7, 4)
    (expected,) = torch.autograd.grad(info_nce(q, k, queue, 0.2).loss.sum(), q)
    loss = info_nce(q, k, queue, 0.2).loss.sum()
    queue.zero_()
    assert torch.equal(torch.autograd.grad(loss, q)[0], expected)


def test_no_gradient_is_made_where_none_is_needed():
    q, tau = unit(3, 4), torch.tensor(0.1)
    for with_grad, size in ((False, 0), (True, 12)):
        assert contrastive._info_nce_fwd(q, q, q, tau, with_grad)[2].numel() == size
        assert contrastive._batch_info_nce_fwd(q, q, tau, 0, with_grad)[2].numel() == size


def test_autocast_changes_nothing():
    q, k, queue = unit(4, 8, dtype=torch.float32).requires_grad_(), unit(4, 8, dtype=torch.float32), unit(9, 8).float()
    functions = (
        lambda: info_nce(q, k, queue, 0.1).loss,
        lambda: batch_info_nce(q, k, 0.1).loss,
        lambda: nt_xent(q, k, 0.1),
    )
    for function in functions:
        with torch.autocast("cpu", torch.bfloat16):
            inside = function()
            (inside_grad,) = torch.autograd.grad(inside.sum(), q)
        assert inside.dtype == torch.float32 and torch.equal(inside, function())
        assert torch.equal(inside_grad, torch.autograd.grad(function().sum(), q)[0])


def test_contract():
    q, k, queue = unit(4, 8).float().requires_grad_(), unit(4, 8).float(), unit(9, 8).float()
    keys, tau = unit(6, 8).float().requires_grad_(), torch.tensor(0.2, requires_grad=True)
    lse, dloss = torch.zeros(4), torch.ones(4)
    opcheck(contrastive._info_nce_fwd, q, k, queue, tau, True)
    opcheck(contrastive._batch_info_nce_fwd, q, keys, tau, 2, True)
    opcheck(contrastive._batch_info_nce_dkeys, q.detach(), keys.detach(), tau.detach(), 2, lse, dloss)
    opcheck(contrastive._nt_xent_fwd, q, tau)
    opcheck(contrastive._nt_xent_bwd, q.detach(), tau.detach(), lse, dloss)
    compiles(lambda q, t: info_nce(q, k, queue, t), q, tau)
    compiles(lambda q: info_nce(q, k, queue, 0.2), q)
    compiles(lambda q, keys, t: batch_info_nce(q, keys, t, 2), q, keys, tau)
    compiles(lambda q, z, t: nt_xent(q, z, t), q, unit(4, 8).float().requires_grad_(), tau)


def test_error_sentences():
    q, k, queue = unit(4, 8), unit(4, 8), unit(9, 8)
    refused("info_nce: k must have shape [B=4, D=8], got [9, 8]", ValueError, info_nce, q, queue, queue, 0.1)
    refused("info_nce: queue must have shape [K, D=8], got [8, 9]", ValueError, info_nce, q, k, queue.T, 0.1)
    refused("info_nce: tau must be > 0, got 0", ValueError, info_nce, q, k, queue, 0)
    refused("info_nce: tau must be > 0, got nan", ValueError, info_nce, q, k, queue, float("nan"))
    refused("nt_xent: tau must be > 0, got -0.1", ValueError, nt_xent, q, k, -0.1)
    refused(
        "info_nce: k must not require a gradient, it gets none (pass k.detach())",
        ValueError, info_nce, q, k.clone().requires_grad_(), queue, 0.1,
    )  # fmt: skip
    refused(
        "info_nce: q must be a tensor of shape [B, D], got list",
        TypeError, info_nce, [[1.0]], k, queue, 0.1,
    )  # fmt: skip
    refused(
        "batch_info_nce: first must be at least 0 and first + B ≤ M = 9 with B = 4, got first=6",
        ValueError, batch_info_nce, q, queue, 0.1, 6,
    )  # fmt: skip
    refused("nt_xent: z2 must have shape [B=4, D=8], got [9, 8]", ValueError, nt_xent, q, queue, 0.1)
    refused(
        "info_nce: queue must be float32, float64, bfloat16 or float16, got int64",
        TypeError, info_nce, q, k, queue.long(), 0.1,
    )  # fmt: skip
