import itertools

import pytest
import torch
import torch.nn.functional as F

from fastssl.ops import bias_gelu, gelu
from tests.support.close import assert_exact, assert_same
from tests.support.contract import (
    compiles,
    gradcheck,
    opcheck,
    refused,
    refuses_second_derivative,
    rejects,
    torch_threads,
)

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def fused(x, bias):
    """The path of GPUs, with the plain-torch bodies of its ops."""
    return gelu._BiasGelu.apply(x.reshape(-1, x.shape[-1]), bias).view(x.shape)


@pytest.mark.parametrize("function", [bias_gelu, fused])
@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 1), (33,), (0, 5)], ids=str)
def test_is_the_formula(shape, function):
    x, bias = torch.randn(shape).double().requires_grad_(), torch.randn(shape[-1]).double().requires_grad_()
    upstream = torch.randn(shape).double()
    for ours, theirs in zip(
        *([y, *torch.autograd.grad(y, (x, bias), upstream)] for y in (function(x, bias), F.gelu(x + bias))), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_torch_s(dtype):
    """Beside a linear layer, whose output torch rounds with its bias added."""
    x, bias, upstream = (t.to(dtype) for t in (3 * torch.randn(300, 40), torch.randn(40), torch.randn(300, 40)))

    def run(function, kind):
        leaves = [t.to(kind).requires_grad_() for t in (x, bias)]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(kind))]

    plain, exact = run(lambda x, b: F.gelu(x + b), dtype), run(lambda x, b: F.gelu(x + b), torch.float64)
    for name, ours, truth, theirs in zip(("y", "dx", "dbias"), run(fused, dtype), exact, plain, strict=True):
        assert_exact(ours, truth, theirs, name)


def test_gradients():
    x, bias = torch.randn(4, 6).double().requires_grad_(), torch.randn(6).double().requires_grad_()
    gradcheck(fused, x, bias)
    gradcheck(bias_gelu, x, bias)
    refuses_second_derivative(lambda x: fused(x, bias), x)


def test_ops_and_compile():
    for dtype, bias in itertools.product(FLOATS, (torch.float32, torch.bfloat16)):
        x, b, dy = torch.randn(5, 8).to(dtype), torch.randn(8).to(bias), torch.randn(5, 8).to(dtype)
        opcheck(gelu._bias_gelu_fwd, x, b)
        opcheck(gelu._bias_gelu_bwd, dy, x, b)
        assert bias_gelu(x, b).dtype == fused(x, b).dtype == dtype
    compiles(bias_gelu, torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True))
    compiles(fused, torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True))


def test_error_sentences():
    x, bias = torch.randn(2, 8), torch.randn(8)
    refused("bias_gelu: x must have shape [..., K], got []", ValueError, bias_gelu, x.sum(), bias)
    rejects("bias_gelu", "bias", "[7]", ValueError, bias_gelu, x, bias[1:])
    rejects("bias_gelu", "x", "int64", TypeError, bias_gelu, x.long(), bias)
    rejects("bias_gelu", "bias", "meta", ValueError, bias_gelu, x, bias.to("meta"))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(70, 33), (3, 512), (1, 1), (0, 5), (5, 0)], ids=str)
def test_ops_of_the_next_layer(shape, dtype):
    """On CPUs, for rows with gaps between them; the second writes the gradient over dy."""
    x, dy = (3 * torch.randn(shape[0], 2 * shape[1]).to(dtype)[:, : shape[1]] for _ in range(2))
    truth, exact = F.gelu(x.double()), torch.ops.aten.gelu_backward(dy.double(), x.double())
    plain, plain_dx = F.gelu(x), torch.ops.aten.gelu_backward(dy, x)
    dx = dy.clone()
    for name, y in (("y", gelu.gelu_fwd(x)), ("y again", gelu.gelu_bwd_(dx, x))):
        assert y.dtype == dtype and y.is_contiguous()
        assert_exact(y, truth, plain, name)
    assert_exact(dx, exact, plain_dx, "dx")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops_of_the_next_layer_at_the_ends(dtype):
    x = torch.tensor([[float("nan"), float("inf"), 100.0, -100.0, 0.0, -0.0]]).to(dtype)
    dx = torch.ones_like(x)
    for y in (gelu.gelu_fwd(x), gelu.gelu_bwd_(dx, x)):
        assert y[0, 0].isnan() and y[0, 1:3].tolist() == [torch.inf, 100.0]
        torch.testing.assert_close(y[0, 3:], torch.zeros(3, dtype=dtype), rtol=0, atol=1e-30)
    assert dx[0, 0].isnan()
    torch.testing.assert_close(dx[0, 2:], torch.tensor([1.0, 0.0, 0.5, 0.5], dtype=dtype), rtol=1e-6, atol=1e-30)


def test_same_bits_on_any_number_of_threads():
    for dtype in (torch.float32, torch.bfloat16):
        x, dy = (torch.randn(300, 700).to(dtype) for _ in range(2))
        with torch_threads(1):
            alone = gelu.gelu_fwd(x), gelu.gelu_bwd_(one := dy.clone(), x), one
        for first, second in zip(alone, (gelu.gelu_fwd(x), gelu.gelu_bwd_(two := dy.clone(), x), two), strict=True):
            assert_same(first, second)


def test_contract_of_the_next_layer_s_ops():
    for dtype in FLOATS:
        x, dy = torch.randn(5, 8).to(dtype), torch.randn(5, 8).to(dtype)
        opcheck(gelu.gelu_fwd, x)
        opcheck(gelu.gelu_bwd_, dy, x)
