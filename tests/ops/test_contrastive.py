import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastssl.ops import batch_info_nce, contrastive, dispatch, info_nce, nt_xent
from fastssl.ops.dispatch import acc_dtype
from tests.support.close import assert_exact, assert_same
from tests.support.contract import (
    compiles,
    gradcheck,
    opcheck,
    refused,
    refuses_second_derivative,
    rejects,
    sparse,
    torch_threads,
)
from tests.support.memory import peak_memory
from tests.support.products import EVERY_PRODUCT, multiplying_bfloat16_by

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FLOATS = st.sampled_from(DTYPES)


def unit(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype)


def info_nce_formula(q, k, queue, tau):
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / tau
    loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64), reduction="none")
    return loss, (logits[:, 1:] > logits[:, :1]).sum(1)


def batch_formula(q, keys, tau, label_offset=0):
    logits, labels = q @ keys.T / tau, label_offset + torch.arange(len(q))
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


@pytest.mark.parametrize(("batch", "count", "label_offset"), [(1, 1, 0), (13, 63, 50), (8, 8, 0), (5, 1000, 17)])
def test_batch_info_nce_is_cross_entropy(batch, count, label_offset):
    q, keys = unit(batch, 16).requires_grad_(), unit(count, 16).requires_grad_()
    loss, rank = batch_info_nce(q, keys, 0.2, label_offset)
    wanted, wanted_rank = batch_formula(q, keys, 0.2, label_offset)
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
        refuses_second_derivative(function, q)


def ops_of(q, k, queue, tau, label_offset):
    """Results of every op of the file on the same inputs; backward ops get log-sum-exps in the ops' dtype."""
    z, dloss = torch.cat([q, k]), torch.linspace(0.5, 2, len(q)).to(acc_dtype(q))
    exact = torch.cat([z, queue])[len(z) :], z.double(), tau.double()
    lse = torch.logsumexp(q.double() @ exact[0].double().T / exact[2], 1).to(acc_dtype(q))
    logits = (exact[1] @ exact[1].T / exact[2]).fill_diagonal_(float("-inf"))
    results = {
        "info_nce": contrastive._info_nce_fwd(q, k, queue, tau, True),
        "batch_info_nce": contrastive._batch_info_nce_fwd(q, queue, tau, label_offset, True),
        "dkeys": [contrastive._batch_info_nce_dkeys(q, queue, tau, label_offset, lse, dloss)],
        "nt_xent": contrastive._nt_xent_fwd(z, tau),
        "dz": [contrastive._nt_xent_bwd(z, tau, logits.logsumexp(1).to(acc_dtype(q)), dloss.repeat(2))],
    }
    return {f"{name}, result {i}": tensor for name, tensors in results.items() for i, tensor in enumerate(tensors)}


GRADIENTS = ("info_nce, result 2", "batch_info_nce, result 2", "dkeys, result 0", "dz, result 0")


def gradients_in_bfloat16(q, k, queue, tau, label_offset):
    """The gradients of plain torch whose logits and softmax are bfloat16."""
    q, k, keys = (x.detach().requires_grad_() for x in (q, k, queue))
    upstream = torch.linspace(0.5, 2, len(q))
    (dq,) = torch.autograd.grad(info_nce_formula(q, k, keys, tau)[0].sum(), q)
    (dq_batch,) = torch.autograd.grad(batch_formula(q, keys, tau, label_offset)[0].sum(), q)
    (dkeys,) = torch.autograd.grad((batch_formula(q, keys, tau, label_offset)[0] * upstream).sum(), keys)
    dz = torch.autograd.grad((nt_xent_formula(q, k, tau) * upstream.repeat(2)).sum(), (q, k))
    return dict(zip(GRADIENTS, (dq, dq_batch, dkeys, torch.cat(dz)), strict=True))


def check_exact(q, k, queue, tau, label_offset):
    ours = ops_of(q, k, queue, tau, label_offset)
    with dispatch.reference():
        plain = ops_of(q, k, queue, tau, label_offset)
        truth = ops_of(q.double(), k.double(), queue.double(), tau.double(), label_offset)
    if q.dtype == torch.bfloat16 and dispatch.bf16_products() != "float32":
        # The softmax is rounded to bfloat16, and only gradients depend on that.
        plain |= {name: dx.float() for name, dx in gradients_in_bfloat16(q, k, queue, tau, label_offset).items()}
    for name, result in ours.items():
        if result.dtype == torch.int64:
            assert torch.equal(result, plain[name]), name
        else:
            assert_exact(result, truth[name], plain[name], name)


SIZES = pytest.mark.parametrize("size", [(13, 63, 5), (32, 1000, 128), (197, 197, 64), (300, 1111, 100)], ids=str)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tau", [0.07, 0.2])
@SIZES
def test_error_is_at_most_torch_s_in_float32(dtype, tau, size):
    """The plain-torch body computes in float32 whatever the dtypes of the inputs."""
    batch, length, width = size
    q, k, queue = unit(batch, width, dtype=dtype), unit(batch, width, dtype=dtype), unit(length, width, dtype=dtype)
    check_exact(q, k, queue, torch.tensor(tau), (length - batch) // 2)


@EVERY_PRODUCT
@pytest.mark.parametrize("tau", [0.07, 0.2])
@SIZES
def test_error_in_bfloat16(products, tau, size):
    """Losses, ranks and log-sum-exps are as exact as in float32; gradients are so by float32 products, and at least as
    exact as plain torch's in bfloat16 by others."""
    dtype = torch.bfloat16
    batch, length, width = size
    q, k, queue = unit(batch, width, dtype=dtype), unit(batch, width, dtype=dtype), unit(length, width, dtype=dtype)
    check_exact(q, k, queue, torch.tensor(tau), (length - batch) // 2)


@given(
    batch=st.integers(1, 140),
    extra=st.integers(0, 300),
    width=st.integers(1, 70),
    dtypes=st.tuples(*[FLOATS] * 3),
    tau=st.sampled_from([0.05, 0.2, 2.0, -0.3]),
    length=st.sampled_from([1, 1, 20]),
)
@settings(max_examples=60)
def test_any_shape(batch, extra, width, dtypes, tau, length):
    """Also long vectors, negative temperature, and mixed dtypes."""
    with multiplying_bfloat16_by("float32"):
        check_any_shape(batch, extra, width, dtypes, tau, length)


def check_any_shape(batch, extra, width, dtypes, tau, length):
    torch.manual_seed(0)
    count = batch + extra
    q, k, queue = (length * unit(n, width).to(dtype) for n, dtype in zip((batch, batch, count), dtypes))
    tau = torch.tensor(tau, dtype=torch.float64)
    args = q, k, queue, tau, extra // 2
    if dtypes[0] != dtypes[1]:
        k = k.to(q.dtype)  # torch.cat of z1 and z2 promotes them
    with dispatch.reference():
        expected = ops_of(q, k, *args[2:])
    largest_logit = max(1, length) ** 2 / abs(tau.item())
    for name, ours in ops_of(q, k, *args[2:]).items():
        wanted = expected[name]
        assert ours.dtype == wanted.dtype and ours.is_contiguous(), name
        unit_roundoff = 2.0**-52 if acc_dtype(q) == torch.float64 else 2.0**-23
        scale = max(largest_logit, wanted.abs().max().item())  # of the terms of a gradient, before they cancel
        error = (ours.double() - wanted.double()).abs().max().item()
        assert error <= 30 * unit_roundoff * (1 + largest_logit) * scale, f"{name}: error {error}"


@EVERY_PRODUCT
@given(
    batch=st.integers(1, 140),
    extra=st.integers(0, 700),
    width=st.integers(1, 140),
    tau=st.sampled_from([0.05, 0.2, 2.0, -0.3]),
    length=st.sampled_from([1, 1, 20]),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])  # the fixture is constant
def test_any_shape_in_bfloat16(products, batch, extra, width, tau, length):
    torch.manual_seed(0)
    q, k, queue = (length * unit(n, width).bfloat16() for n in (batch, batch, batch + extra))
    args = q, k, queue, torch.tensor(tau), extra // 2
    with dispatch.reference():
        expected = ops_of(*args)
    largest_logit = max(1, length) ** 2 / abs(tau)
    for name, ours in ops_of(*args).items():
        error = (ours.double() - expected[name].double()).abs()
        scale = max(largest_logit, expected[name].abs().max().item())
        assert error.max() <= 30 * 2.0**-23 * (1 + largest_logit) * scale or name in GRADIENTS, name
        assert error.max() <= 2.0**-7 * scale, name
        assert products != "float32" or error.max() <= 30 * 2.0**-23 * (1 + largest_logit) * scale, name


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: x[:1].expand_as(x),
        lambda x: x[:, :1].expand_as(x),
        lambda x: x.repeat_interleave(2, 0)[::2],
    ],
    ids=["columns first", "wider rows", "one row expanded", "one column expanded", "every other row"],
)
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("width", [24, 32])
def test_any_strides(view, dtype, width):
    q, k, queue = (view(unit(n, width, dtype=dtype)) for n in (20, 20, 160))
    tau = torch.tensor(0.2)
    for ours, same in zip(
        ops_of(q, k, queue, tau, 3).values(), ops_of(q.clone(), k.clone(), queue.clone(), tau, 3).values()
    ):
        assert_same(ours, same)


def test_offsets_beyond_32_bits():
    queue = sparse((5, 8), (2**29 + 8, 1))
    near = unit(5, 8, dtype=torch.float32)
    queue.copy_(near)
    q, k, tau = near[:3] + 0.1, near[:3], torch.tensor(0.2)
    for far, same in zip(ops_of(q, k, queue, tau, 1).values(), ops_of(q, k, near, tau, 1).values()):
        assert_same(far, same)


@pytest.mark.parametrize("size", [(3, 5000, 32), (70, 900, 33), (600, 700, 16)], ids=str)
def test_same_bits_on_one_thread_and_on_two(size):
    check_threads(size, torch.float32)


@EVERY_PRODUCT
@pytest.mark.parametrize("size", [(3, 2000, 32), (70, 900, 33), (300, 700, 16)], ids=str)
def test_same_bits_on_one_thread_and_on_two_in_bfloat16(products, size):
    check_threads(size, torch.bfloat16)


def check_threads(size, dtype):
    batch, length, width = size
    q, k, queue = (unit(n, width, dtype=dtype) for n in (batch, batch, length))
    results = []
    for threads in (1, 2):
        with torch_threads(threads):
            results.append(ops_of(q, k, queue, torch.tensor(0.1), 5))
    for name, one in results[0].items():
        assert_same(results[1][name], one, name)


@EVERY_PRODUCT
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("width", [33, 64])
def test_a_key_equal_to_the_positive_is_not_above_it(products, dtype, width):
    q, k = unit(50, width, dtype=dtype), unit(50, width, dtype=dtype)
    assert torch.equal(info_nce(q, k, k[7:8].repeat(300, 1), 0.1).rank[7], torch.tensor(0))
    ranks = info_nce(q, k, k.repeat_interleave(3, 0), 0.1).rank
    scores = q.double() @ k.double().T
    assert torch.equal(ranks, 3 * (scores > scores.diagonal()[:, None]).sum(1))


@EVERY_PRODUCT
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_nan_of_a_query_and_of_the_queue_propagate(products, dtype):
    q, k, queue = (unit(n, 8, dtype=dtype) for n in (20, 20, 200))
    q[3, 2] = float("nan")
    loss, _, dq = contrastive._info_nce_fwd(q, k, queue, torch.tensor(0.1), True)
    others = [i for i in range(20) if i != 3]
    assert loss[3].isnan() and dq[3].isnan().all() and loss[others].isfinite().all() and dq[others].isfinite().all()
    queue[150, 1] = float("nan")
    assert info_nce(unit(20, 8, dtype=dtype), k, queue, 0.1).loss.isnan().all()
    assert nt_xent(q, k, 0.1).isnan().all()


def test_extra_memory_does_not_grow_with_the_queue():
    """At MoCo's sizes: no logits, no copy of the queue."""
    q, key, tau = unit(256, 128, dtype=torch.float32), unit(1, 128, dtype=torch.float32), torch.tensor(0.2)

    def peak(length):
        return peak_memory(lambda: contrastive._info_nce_fwd(q, q, key.expand(length, 128), tau, True))

    assert peak(65536) == peak(262144) < 4e6


def test_queue_may_have_another_dtype():
    q, k, queue = unit(4, 8, dtype=torch.float32), unit(4, 8, dtype=torch.float32), unit(50, 8, dtype=torch.bfloat16)
    assert torch.equal(info_nce(q, k, queue, 0.1).loss, info_nce(q, k, queue.float(), 0.1).loss)


def test_one_large_logit_at_any_position():
    """Logits of thousands, whose exponentials overflow unless the maximum is subtracted."""
    q, k = unit(3, 8), unit(3, 8)
    for place in (0, 1, 95, 96, 191, 192, 199):
        queue = unit(200, 8)
        queue[place] *= 1000
        ours, truth = (info_nce(*(x.to(dtype) for x in (q, k, queue)), 0.1)[0] for dtype in (torch.float32, q.dtype))
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(truth, info_nce_formula(q, k, queue, 0.1)[0])


def test_small_temperature_and_equal_keys_stay_finite():
    q = unit(4, 8, dtype=torch.float32).requires_grad_()
    keys = q.detach()[:1].expand(4, 8)
    for loss in (
        info_nce(q, keys, keys.expand(4, 8), 0.005).loss,
        batch_info_nce(q, keys, 0.005).loss,
        nt_xent(q, keys, 0.005),
    ):
        assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), q)[0].isfinite().all()


def test_queue_may_be_overwritten_before_backward():
    """MoCo's reference clones the queue each step because it enqueues before the backward pass."""
    q, k, queue = unit(3, 4).requires_grad_(), unit(3, 4), unit(7, 4)
    (expected,) = torch.autograd.grad(info_nce(q, k, queue, 0.2).loss.sum(), q)
    loss = info_nce(q, k, queue, 0.2).loss.sum()
    queue.zero_()
    assert torch.equal(torch.autograd.grad(loss, q)[0], expected)


def test_no_gradient_without_with_grad():
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


@pytest.mark.parametrize("tau", [1e-30, 1e-10, 1e-4, 1e10, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EVERY_PRODUCT
def test_extreme_temperatures_equal_plain_torch(products, tau, dtype):
    """Logits of 10^30: the maximum must be subtracted before the division by tau, forward and backward."""
    q, k, queue, z = (unit(n, 16, dtype=dtype) for n in (40, 40, 300, 40))

    def results():
        leaves = [x.clone().requires_grad_() for x in (q, k, z)]
        losses = info_nce(leaves[0], k, queue, tau).loss, batch_info_nce(leaves[0], leaves[1], tau).loss
        losses += (nt_xent(leaves[0], leaves[2], tau),)
        return [
            x
            for loss in losses
            for x in (loss, *torch.autograd.grad(loss.sum(), leaves, allow_unused=True))
            if x is not None
        ]

    ours = results()
    with dispatch.reference():
        plain = results()
    for result, wanted in zip(ours, plain, strict=True):
        assert result.isfinite().all()
        largest = wanted.double().abs().max().item()
        torch.testing.assert_close(result, wanted, rtol=0, atol=(0.02 if dtype == torch.bfloat16 else 1e-4) * largest)


def test_a_gradient_penalty_raises():
    """The upstream gradient of a mean is a constant, where torch's once_differentiable lets the second pass."""
    q, k, keys = unit(4, 8).requires_grad_(), unit(4, 8), unit(6, 8).requires_grad_()
    losses = {
        "info_nce": lambda: info_nce(q, k, keys.detach(), 0.2).loss.mean(),
        "batch_info_nce": lambda: batch_info_nce(q, keys, 0.2).loss.mean(),
        "nt_xent": lambda: nt_xent(q, k, 0.2).mean(),
    }
    for name, loss in losses.items():
        (dq,) = torch.autograd.grad(loss(), q, create_graph=True)
        sentence = (
            f"{name}: its gradient cannot be differentiated again (create_graph=True): for a second derivative write "
            "the formula of its docstring in plain torch"
        )
        refused(sentence, RuntimeError, dq.square().sum().backward)
        assert torch.equal(dq, torch.autograd.grad(loss(), q)[0])  # the first derivative is right


def test_error_sentences():
    q, k, queue = unit(4, 8), unit(4, 8), unit(9, 8)
    refused("info_nce: k must have shape [B=4, D=8], got [9, 8]", ValueError, info_nce, q, queue, queue, 0.1)
    rejects("info_nce", "queue", "[8, 9]", ValueError, info_nce, q, k, queue.T, 0.1)
    rejects("info_nce", "tau", "0", ValueError, info_nce, q, k, queue, 0)
    rejects("info_nce", "tau", "nan", ValueError, info_nce, q, k, queue, float("nan"))
    rejects("nt_xent", "tau", "-0.1", ValueError, nt_xent, q, k, -0.1)
    rejects("info_nce", "k", "requires_grad=True", ValueError, info_nce, q, k.clone().requires_grad_(), queue, 0.1)
    rejects("info_nce", "q", "list", TypeError, info_nce, [[1.0]], k, queue, 0.1)
    rejects("batch_info_nce", "label_offset", "6", ValueError, batch_info_nce, q, queue, 0.1, 6)
    rejects("nt_xent", "z2", "[9, 8]", ValueError, nt_xent, q, queue, 0.1)
    rejects("info_nce", "queue", "int64", TypeError, info_nce, q, k, queue.long(), 0.1)


@EVERY_PRODUCT
def test_threads_and_a_forked_process_in_bfloat16(products):
    """Each thread configures and releases its tiles; a forked process keeps the permission and the choice."""
    q, k, queue = (unit(n, 64).bfloat16() for n in (40, 40, 1000))

    def loss_and_gradient():
        return contrastive._info_nce_fwd(q, k, queue, torch.tensor(0.2), True)

    expected = loss_and_gradient()
    with ThreadPoolExecutor(3) as pool:
        for results in pool.map(lambda _: loss_and_gradient(), range(12)):
            assert all(map(torch.equal, results, expected))
    receive, send = os.pipe()
    with torch_threads(1):  # OpenMP's threads do not survive a fork
        child = os.fork()
        if child == 0:
            os.write(send, b"same" if all(map(torch.equal, loss_and_gradient(), expected)) else b"else")
            os._exit(0)
    os.waitpid(child, 0)
    os.close(send)
    with os.fdopen(receive, "rb") as answer:
        assert answer.read() == b"same"
