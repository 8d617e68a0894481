import pytest
import torch
import torch.nn.functional as F

from fastssl.ops import dispatch, pairwise, pairwise_sigmoid
from tests.support.close import assert_exact, assert_same
from tests.support.contract import compiles, gradcheck, opcheck, refuses_second_derivative, rejects, torch_threads
from tests.support.memory import peak_memory
from tests.support.products import EVERY_PRODUCT

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1, 0), (13, 63, 7, 50), (40, 40, 33, 0), (130, 300, 70, 100), (400, 130 + 400, 8, 0), (64, 64, 512, 0)]


def unit(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype)


def formula(q, keys, scale, bias, label_offset=0):
    logits = scale * (q @ keys.T) + bias
    z = -torch.ones_like(logits)
    z[torch.arange(len(q)), label_offset + torch.arange(len(q))] = 1
    return -F.logsigmoid(z * logits).sum() / len(q)


def leaves(*values):
    return [x.detach().clone().requires_grad_() for x in values]


@pytest.mark.parametrize(("batch", "count", "width", "label_offset"), SIZES)
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (112.0, -16.5), (-3.0, 2.0), (0.0, 0.0)])
def test_it_is_the_logistic_loss_of_all_pairs(batch, count, width, label_offset, scale, bias):
    values = unit(batch, width), unit(count, width), torch.tensor(scale).double(), torch.tensor(bias).double()
    losses, grads = [], []
    for function in (pairwise_sigmoid, formula):
        inputs = leaves(*values)
        losses.append(function(*inputs, label_offset))
        grads.append(torch.autograd.grad(1.5 * losses[-1], inputs))
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("batch", "count", "width", "label_offset"), SIZES)
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (112.0, -16.5)])
def test_errors_are_at_most_those_of_plain_torch(batch, count, width, label_offset, dtype, scale, bias):
    def run(values):
        inputs = leaves(*values)
        loss = pairwise_sigmoid(*inputs, label_offset)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    values = unit(batch, width, dtype=dtype), unit(count, width, dtype=dtype), torch.tensor(scale), torch.tensor(bias)
    ours = run(values)
    with dispatch.reference():
        plain, exact = run(values), run([x.double() for x in values])
    for name, *results in zip(("loss", "dq", "dkeys", "dscale", "dbias"), ours, exact, plain):
        if name == "dscale":  # a sum of products of both signs: its error is compared with the sum of their sizes
            terms = (values[0].double() * exact[1]).abs().sum() / scale
            assert (results[0] - results[1]).abs() <= (2e-6 if dtype == torch.float32 else 1e-2) * terms
        else:
            assert_exact(*results, name)


@EVERY_PRODUCT
def test_bfloat16_products(products):
    q, keys = unit(70, 40, dtype=torch.bfloat16), unit(100, 40, dtype=torch.bfloat16)
    values = q, keys, torch.tensor(10.0), torch.tensor(-10.0)
    exact = [x.double().requires_grad_() for x in values]
    grads = torch.autograd.grad(formula(*exact, 20), exact)
    inputs = leaves(*values)
    loss = pairwise_sigmoid(*inputs, 20)
    ours = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(loss.double(), formula(*exact, 20), rtol=1e-6, atol=0)
    for one, two in zip(ours[:2], grads):
        assert (one - two).abs().max() <= 0.01 * two.abs().max()


def test_a_confident_pair_has_an_exact_loss_and_gradient():
    q, scale, bias = torch.eye(2, 4), torch.tensor(60.0, requires_grad=True), torch.tensor(-30.0)
    loss = pairwise_sigmoid(q, q, scale, bias)
    exact = formula(q.double(), q.double(), 60.0, -30.0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)  # 2e-13: not a difference of large numbers


def test_numbers_beyond_float32_are_infinite():
    q = torch.ones(2, 3)
    assert pairwise_sigmoid(q, q, 1.0, 1e300) == pairwise_sigmoid(q, q, 1e300, 0.0) == torch.inf
    assert pairwise_sigmoid(q, q, 1.0, -1e300) == torch.inf
    assert pairwise_sigmoid(q[:1], q[:1], 1.0, 1e300) == 0  # the pair belongs together


def test_nan_reaches_the_loss_and_infinite_logits_do_not_make_one():
    q, keys = torch.ones(3, 4), torch.ones(5, 4)
    keys[4] = -torch.inf
    assert pairwise_sigmoid(q, keys, 1.0, 0.0).isfinite()
    keys[4] = torch.nan
    assert pairwise_sigmoid(q, keys, 1.0, 0.0).isnan()


def test_strides_mixed_dtypes_and_numbers():
    q, keys = torch.randn(8, 7).T, torch.randn(9, 32)[:, ::4].bfloat16()
    expected = formula(q.double(), keys.double(), 2.0, -1.0, 2)
    torch.testing.assert_close(pairwise_sigmoid(q, keys, 2, -1, 2).double(), expected, rtol=1e-6, atol=0)
    assert pairwise_sigmoid(q.bfloat16(), keys, 2, -1, 2).dtype == torch.float32


def test_threads_do_not_change_a_bit():
    q, keys = unit(300, 40, dtype=torch.float32), unit(900, 40, dtype=torch.float32)
    results = []
    for count in (1, 2):
        with torch_threads(count):
            inputs = leaves(q, keys)
            loss = pairwise_sigmoid(*inputs, 10.0, -10.0, 7)
            results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    for one, two in zip(*results):
        assert_same(one, two)


def test_no_logits_are_kept():
    q = unit(4096, 16, dtype=torch.float32).requires_grad_()
    with torch_threads(1):
        peak = peak_memory(lambda: pairwise_sigmoid(q, q.detach(), 10.0, -10.0).backward())
    assert peak < 4096 * 4096 * 4 / 8, f"{peak / 2**20:.0f} MiB"


def test_gradients_and_contract():
    q, keys = unit(3, 4).requires_grad_(), unit(5, 4).requires_grad_()
    scale, bias = leaves(torch.tensor(3.0).double(), torch.tensor([-2.0]).double())
    for label_offset in (0, 2):
        gradcheck(lambda *x, offset=label_offset: pairwise_sigmoid(*x, offset), q, keys, scale, bias)
    opcheck(pairwise._pairwise_sigmoid_fwd, q.detach(), keys.detach(), scale.detach(), bias.detach()[0], 1, True)
    opcheck(pairwise._pairwise_sigmoid_fwd, q.detach(), keys.detach(), scale.detach(), bias.detach()[0], 1, False)
    refuses_second_derivative(lambda q: pairwise_sigmoid(q, keys.detach(), 2.0, -1.0), q)


def test_it_compiles():
    q, keys = unit(4, 8).float().requires_grad_(), unit(6, 8).float().requires_grad_()
    compiles(lambda q, keys, s: pairwise_sigmoid(q, keys, s, -1.0, 1), q, keys, torch.tensor(2.0, requires_grad=True))


def test_refusals():
    q, keys = torch.randn(4, 8), torch.randn(6, 8)
    name = "pairwise_sigmoid"
    rejects(name, "keys", "[6, 7]", ValueError, pairwise_sigmoid, q, keys[:, 1:], 1.0, 0.0)
    rejects(name, "q", "[0, 8]", ValueError, pairwise_sigmoid, q[:0], keys, 1.0, 0.0)
    rejects(name, "q", "[4, 0]", ValueError, pairwise_sigmoid, q[:, :0], keys[:, :0], 1.0, 0.0)
    rejects(name, "label_offset", "3", ValueError, pairwise_sigmoid, q, keys, 1.0, 0.0, 3)
    rejects(name, "scale", "shape [2]", ValueError, pairwise_sigmoid, q, keys, torch.ones(2), 0.0)
    rejects(name, "bias", "'0'", TypeError, pairwise_sigmoid, q, keys, 1.0, "0")
    rejects(name, "q", "int64", TypeError, pairwise_sigmoid, q.long(), keys, 1.0, 0.0)
