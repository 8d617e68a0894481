import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F

from fastssl.ops import dispatch, linear
from tests.support.close import assert_as_exact_on_average
from tests.support.contract import compiles, gradcheck, refused, refuses_second_derivative, rejects

module, products = (importlib.import_module(f"fastssl.ops.{name}") for name in ("dense", "products"))
SIZES = [(1, 1, 1), (5, 3, 2), (70, 33, 45), (97, 129, 31), (300, 700, 65), (131, 77, 515)]  # M, K, N
DTYPES = [  # of x, of the weight
    *((dtype, dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)),
    (torch.bfloat16, torch.float32),
]


@pytest.fixture(autouse=True, params=["inner product", "F.linear", "float32"])
def library(request, monkeypatch):
    """Runs our layer at the small sizes of tests, with each library of `ops.products`."""
    monkeypatch.setattr(module, "FEWEST", 1)
    monkeypatch.setattr(products, "FEWEST", 1)
    monkeypatch.setattr(products, "has_inner_product", lambda dtype: request.param == "inner product")
    monkeypatch.setattr(module, "has_inner_product", lambda dtype: True)
    if request.param == "float32":
        monkeypatch.setattr(products, "is_native", lambda dtype: dtype in (torch.float32, torch.float64))
    return request.param


def layer(rows, depth, columns, x_dtype=torch.float64, dtype=torch.float64):
    x, dy = torch.randn(rows, depth).to(x_dtype), torch.randn(rows, columns).to(x_dtype)
    return x, (torch.randn(columns, depth) / depth**0.5).to(dtype), torch.randn(columns).to(dtype), dy


def ours(x, weight, bias, dy, gelu):
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    y = module._Linear.apply(x, weight, bias, gelu)
    return y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy)


def formula(x, weight, bias, dy, gelu):
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    y = F.linear(F.gelu(x) if gelu else x, weight, bias)
    return y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("x_dtype, dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_error_is_at_most_torch_s(size, x_dtype, dtype, gelu):
    """Torch computes in x's dtype, with the weights rounded to it, as under autocast."""
    x, weight, bias, dy = layer(*size, x_dtype, dtype)
    rounded = (x, weight.to(x_dtype), bias.to(x_dtype), dy)
    truths = formula(*(t.double() for t in rounded), gelu)
    for name, result, truth, plain in zip(
        ("y", "dx", "dweight", "dbias"), ours(x, weight, bias, dy, gelu), truths, formula(*rounded, gelu)
    ):
        assert result.dtype == (dtype if name in ("dweight", "dbias") else x_dtype)
        assert_as_exact_on_average(result.to(plain.dtype), truth, plain, name)


def test_gradients():
    x, weight, bias, _ = (t.requires_grad_() for t in layer(4, 3, 2))
    for gelu in (False, True):
        gradcheck(lambda *args, gelu=gelu: linear(*args, gelu), x, weight, bias)
    gradcheck(lambda *args: linear(*args), x.unflatten(0, (2, 2)).detach().requires_grad_(), weight)
    refuses_second_derivative(lambda x: linear(x, weight, bias), x)


def test_only_the_required_gradients_are_computed(monkeypatch):
    x, weight, bias, dy = layer(4, 3, 2)
    calls = []
    monkeypatch.setattr(module, "product", lambda *args: calls.append(args) or products.product(*args))
    for leaves, count in (((x,), 1), ((weight,), 1), ((x, weight, bias), 2), ((bias,), 0)):
        y = linear(*(t.detach().requires_grad_(any(t is leaf for leaf in leaves)) for t in (x, weight, bias)))
        calls.clear()
        y.backward(dy)
        assert len(calls) == count


def test_one_tensor_is_kept():
    """GELU(x) and the rounded weight are not."""
    x, weight, bias, _ = layer(70, 33, 45, torch.bfloat16, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module._Linear.apply(x.requires_grad_(), weight.requires_grad_(), bias, True)
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), weight.data_ptr()]


def test_strides():
    x, weight, bias, dy = layer(12, 10, 8)
    expected = formula(x, weight, bias, dy, True)
    wide = torch.randn(12, 20, dtype=torch.float64)
    wide[:, 5:15] = x
    for odd in (wide[:, 5:15], x.T.contiguous().T):
        odd = odd.detach().requires_grad_()
        y = linear(odd, weight.T.contiguous().T, bias, gelu=True)
        torch.testing.assert_close(y, expected[0])
        torch.testing.assert_close(torch.autograd.grad(y, odd, dy.T.contiguous().T)[0], expected[1])
    (gradient,) = torch.autograd.grad(linear(x.requires_grad_(), weight, bias).sum(), x)  # dy of stride 0
    torch.testing.assert_close(gradient, weight.sum(0).expand(12, 10))


def test_nan_and_infinity_propagate():
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias, dy = layer(70, 33, 45, dtype, torch.float32)
        x[3, 4], dy[5, 6] = float("nan"), float("inf")
        y, dx, dweight, dbias = ours(x, weight, bias, dy, False)
        assert y[3].isnan().all() and y.isnan().sum() == 45
        assert not dx[5].isfinite().any() and dx.isfinite().sum() == 69 * 33
        assert dweight[:, 4].isnan().all() and not dbias[6].isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_like_torch_and_keeps_gradients_in_float32(dtype):
    x, weight, bias, dy = layer(70, 33, 45, torch.float32, torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with torch.autocast("cpu", dtype):
        y = linear(x, weight, bias, gelu=True)
        assert y.dtype == dtype and linear(x.double(), weight.double()).dtype == torch.float64
    found = (y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype)))
    truths = formula(*(t.detach().to(dtype).double() for t in (x, weight, bias, dy)), True)
    plains = formula(*(t.detach().to(dtype) for t in (x, weight, bias, dy)), True)
    for result, truth, plain in zip(found, truths, plains):
        assert_as_exact_on_average(result.to(dtype), truth, plain)
    assert found[2].dtype == found[3].dtype == torch.float32


@pytest.mark.parametrize("rows", [4, 70])
@pytest.mark.parametrize("fewest", [1, 64])
def test_autocast_takes_weights_of_any_dtype(monkeypatch, fewest, rows):
    """Also float64, which torch's autocast leaves as it is, and refuses beside 16 bits."""
    monkeypatch.setattr(module, "FEWEST", fewest)
    for dtypes in itertools.product(dict(DTYPES), repeat=2):
        x, *parameters = torch.randn(rows, 5), *(torch.randn(s).to(d) for s, d in zip([(3, 5), (3,)], dtypes))
        weight, bias = (parameter.requires_grad_() for parameter in parameters)
        with torch.autocast("cpu", torch.bfloat16):
            y = linear(x, weight, bias)
        y.sum().backward()
        assert (y.dtype, weight.grad.dtype, bias.grad.dtype) == (torch.bfloat16, *dtypes)


def test_backend(monkeypatch):
    x, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
    assert module.backend(x, weight) == module.backend(x, weight, gelu=True) == "ours"
    with dispatch.reference():
        assert module.backend(x, weight) == "torch"
    monkeypatch.setattr(module, "has_inner_product", lambda dtype: False)
    assert module.backend(x, weight) == "torch"
    assert module.backend(x, weight, gelu=True) == module.backend(x.bfloat16(), weight) == "ours"
    monkeypatch.setattr(module, "FEWEST", 7)
    assert module.backend(x, weight, gelu=True) == "torch"
    torch.testing.assert_close(linear(x, weight, gelu=True), F.linear(F.gelu(x), weight))


def test_empty():
    for rows, columns in ((0, 3), (4, 0)):
        x, weight = torch.randn(rows, 2, requires_grad=True), torch.randn(columns, 2, requires_grad=True)
        y = linear(x, weight)
        assert y.shape == (rows, columns)
        y.sum().backward()
        assert not x.grad.any() and not weight.grad.any()


def test_compile():
    x, weight, bias, _ = (t.float().requires_grad_() for t in layer(6, 5, 4))
    compiles(lambda *args: linear(*args, gelu=True), x, weight, bias)


def test_a_bias_of_any_strides():
    x, weight, pairs = torch.randn(97, 8), torch.randn(6, 8), torch.randn(6, 2)
    for bias in (pairs[:, 1], pairs[:1, 0].expand(6)):
        torch.testing.assert_close(linear(x, weight, bias), linear(x, weight, bias.clone()), rtol=0, atol=0)


def test_error_sentences():
    x, weight, bias, _ = layer(6, 5, 4, torch.float32, torch.float32)
    refused("linear: weight must have shape [N, K], got [5]", ValueError, linear, x, weight[0])
    rejects("linear", "x", "[6, 4]", ValueError, linear, x[:, :4], weight)
    rejects("linear", "bias", "[3]", ValueError, linear, x, weight, bias[:3])
    wanted = "linear: weight and bias must have x's dtype torch.bfloat16 outside autocast, got torch.float32"
    refused(wanted, TypeError, linear, x.bfloat16(), weight)
    wanted = "linear: x must be float32, float64, bfloat16 or float16, got int64"
    refused(wanted, TypeError, linear, x.long(), weight)
    rejects("linear", "weight", "meta", ValueError, linear, x, weight.to("meta"))
