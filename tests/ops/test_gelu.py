import itertools

import pytest
import torch
import torch.nn.functional as F

from fastssl.ops import bias_gelu, gelu
from tests.support.close import assert_exact
from tests.support.contract import compiles, gradcheck, opcheck, refused, refuses_second_derivative, rejects

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
