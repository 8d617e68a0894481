import itertools

import pytest
import torch
import torch.nn.functional as F

from fastssl.kernels import gelu as kernels
from fastssl.kernels import tile
from fastssl.nn.block import Mlp
from fastssl.ops import bias_gelu, dispatch, gelu
from tests.kernels.contract import every_architecture, launched
from tests.kernels.interpreter import triton_on_cpu
from tests.support import kernel_model as model
from tests.support.contract import plain

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton is not interpreted")

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def check(x, bias, dy):
    """Forward and backward equal the plain-torch bodies up to rounding."""
    results, _ = launched(kernels.bias_gelu_fwd, x, bias)
    gradients, _ = launched(kernels.bias_gelu_bwd, dy, x, bias)
    expected = [*plain(gelu._bias_gelu_fwd, x, bias), *plain(gelu._bias_gelu_bwd, dy, x, bias)]
    for i, (result, other) in enumerate(zip((*results, *gradients), expected, strict=True)):
        assert result.is_contiguous() and (result.shape, result.dtype) == (other.shape, other.dtype)
        tolerance = 1e-12 if x.dtype == torch.float64 else max(2e-6, 2 * torch.finfo(result.dtype).eps)
        scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(
            result, other, rtol=tolerance, atol=tolerance * scale, msg=lambda m, i=i: f"result {i}: {m}"
        )


def made(M, K, dtype=torch.float32, bias=torch.float32):
    return torch.randn(M, K).mul(3).to(dtype), torch.randn(K).to(bias), torch.randn(M, K).to(dtype)


@pytest.mark.parametrize("shape", [(3, 24), (1, 1), (37, 100), (5, 700), (130, 16)], ids=str)
def test_every_size(shape):
    check(*made(*shape))


def test_dtypes():
    for dtype, bias in itertools.product(FLOATS, FLOATS):
        check(*made(9, 50, dtype, bias))


def test_strides_and_no_rows():
    x, bias, dy = made(20, 40)
    check(x.T.contiguous().T, bias.flip(0), dy[:1].expand(20, 40))
    check(x[::2, ::2], bias[::2], dy[1::2, 1::2])
    check(*made(0, 8))


def test_far_from_zero():
    """GELU is 0 or the identity where the normal distribution has no weight, and its slope stays finite."""
    x = torch.tensor([[-1e30, -40.0, 40.0, 1e30]])
    (y,), _ = launched(kernels.bias_gelu_fwd, x, torch.zeros(4))
    (dx, _), _ = launched(kernels.bias_gelu_bwd, torch.ones(1, 4), x, torch.zeros(4))
    assert torch.equal(y, x.clamp(min=0)) and dx.tolist() == [[0, 0, 1, 1]]


@every_architecture
def test_several_programs(arch):
    with tile.assume_card(arch, 1):  # a program takes several blocks of rows
        check(*made(500, 300, torch.bfloat16))


def test_bytes_are_those_of_the_model():
    M, K = 200, 300
    x, bias, dy = made(M, K, torch.bfloat16)
    with tile.assume_card("sm_90", 1):
        assert launched(kernels.bias_gelu_fwd, x, bias)[1] == model.bias_gelu_fwd(M, K, 2).requested
        count = launched(kernels.bias_gelu_bwd, dy, x, bias)[1]
        assert count == model.bias_gelu_bwd(M, K, 2, multiprocessors=1).requested


@pytest.fixture
def on_gpu(monkeypatch):
    """The op's path of GPUs, where it has a kernel."""
    monkeypatch.setattr(gelu, "backend", lambda x: "kernel")


def test_public_op(on_gpu):
    inputs = [t.requires_grad_() for t in (torch.randn(2, 5, 40).bfloat16(), torch.randn(40))]
    upstream = torch.randn(2, 5, 40).bfloat16()

    def run(function):
        y = function(*inputs)
        return [y, *torch.autograd.grad(y, inputs, upstream)]

    with dispatch.reference():
        expected = run(lambda x, b: F.gelu(x.float() + b).bfloat16())
    with triton_on_cpu() as seen:
        found = run(bias_gelu)
    assert [kernel for kernel, _ in seen.launches] == ["bias_gelu_fwd_kernel", "bias_gelu_bwd_kernel"]
    for result, other in zip(found, expected, strict=True):
        assert result.dtype == other.dtype
        torch.testing.assert_close(result, other, rtol=2**-7, atol=2**-7 if result.dtype == torch.bfloat16 else 1e-2)


def test_mlp(on_gpu):
    """The block's MLP adds its first bias in the kernel; values and all gradients stay those of torch's layers."""
    mlp, x = Mlp(16, 64), torch.randn(3, 7, 16, requires_grad=True)
    upstream = torch.randn(3, 7, 16)
    leaves = [x, *mlp.parameters()]

    def run(function):
        y = function(x)
        return [y, *torch.autograd.grad(y, leaves, upstream)]

    expected = run(lambda x: F.linear(F.gelu(F.linear(x, mlp.fc1.weight, mlp.fc1.bias)), mlp.fc2.weight, mlp.fc2.bias))
    with triton_on_cpu() as seen:
        found = run(mlp)
    assert "bias_gelu_bwd_kernel" in [kernel for kernel, _ in seen.launches]
    for result, other in zip(found, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-4, atol=1e-5)
