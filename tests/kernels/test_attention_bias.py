"""The Triton kernels of attention with a bias, interpreted, behind the public op."""

import pytest
import torch

from fastssl.kernels import attention_bias as kernels
from fastssl.kernels import attention_plan, tile
from fastssl.ops import attention, attention_packed, dispatch
from tests.kernels.contract import every_architecture
from tests.kernels.interpreter import triton_on_cpu, watch
from tests.support import kernel_model as model
from tests.support.close import assert_as_exact_on_average

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton is not interpreted")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def operands(B, L, M, H, E, dtype, shared=True):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, L, H, E, generator=generator).to(dtype)
    k, v = torch.randn(2, B, M, H, E, generator=generator).to(dtype)
    return q, k, v, torch.randn(*(() if shared else (B,)), H, L, M, generator=generator)


def compare(q, k, v, bias, scale=None):
    """Compares result and gradients with float64: no larger error than plain torch in the same dtype."""
    weights = torch.randn(q.shape)

    def run(*inputs):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = attention(*leaves[:3], scale, leaves[3])
        return out.detach(), *torch.autograd.grad(out, leaves, weights.to(out.dtype))

    with triton_on_cpu() as seen:
        ours = run(q, k, v, bias)
    assert seen.launches[-1][0] == "attention_dbias_kernel" and len(seen.launches) == 3
    with dispatch.reference():
        truth, plain = run(*(x.double() for x in (q, k, v, bias))), run(q, k, v, bias)
    largest = 4.0 if q.dtype == torch.float32 else 2.0  # products of tf32 parts have 22 of float32's 24 bits
    for name, *results in zip(("out", "dq", "dk", "dv", "dbias"), ours, truth, plain):
        assert_as_exact_on_average(*results, name, largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "B, L, M, H, E, shared", [(1, 1, 1, 1, 1, True), (3, 13, 70, 2, 20, True), (2, 50, 9, 2, 32, False)]
)
def test_sizes(B, L, M, H, E, shared, dtype):
    compare(*operands(B, L, M, H, E, dtype, shared))


@every_architecture
@pytest.mark.parametrize("L, E", [(100, 32), (130, 64)])
def test_a_program_of_a_head_and_of_a_block(arch, L, E):
    with tile.assume_card(arch):
        compare(*operands(2, L, L, 1, E, torch.float16))


def test_sums_of_parts_and_strides():
    q, k, v, bias = operands(33, 5, 6, 2, 8, torch.float32)
    assert attention_plan.bias_gradient_plan(33, 5, 6, 2, 8, 4, True).samples == 11
    compare(q, k, v, bias.permute(2, 1, 0).contiguous().permute(2, 1, 0), 0.5)
    compare(q, k, v, bias[:1].expand(2, -1, -1).bfloat16())


def test_packed_is_attention():
    qkv, dout = torch.randn(2, 20, 3, 2, 8).requires_grad_(), torch.randn(2, 20, 2, 8)
    bias = torch.randn(2, 20, 20).requires_grad_()
    with triton_on_cpu():
        results = [attention_packed(qkv, None, bias), attention(*qkv.unbind(2), None, bias)]
        for ours, theirs in zip(*([out, *torch.autograd.grad(out, (qkv, bias), dout)] for out in results)):
            assert torch.equal(ours, theirs)


def test_masked_keys():
    q, k, v, bias = operands(2, 20, 40, 1, 8, torch.float32)
    mask = torch.rand(20, 40) < 0.5
    mask[:, :33] |= (torch.arange(20) % 2 == 0)[:, None]  # the first tile of these queries has no key
    mask[:, 39] = False
    bias[:, mask] = float("-inf")
    compare(q, k, v, bias)
    bias[:, 3] = float("-inf")
    with watch():
        out, _ = kernels.attention_bias_fwd(q, k, v, bias, 1.0)
    assert out[:, 3].isnan().all() and out[:, 4:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_whose_biases_are_the_lowest_numbers(dtype):
    """As masks in the place of −∞ have them: every key counts the same."""
    q, k, v, bias = operands(2, 4, 40, 1, 8, dtype)
    bias = bias.double() if dtype == torch.float64 else bias
    bias[:, 2] = torch.finfo(dtype if dtype == torch.float64 else torch.float32).min
    with watch():
        out, _ = kernels.attention_bias_fwd(q, k, v, bias, 1.0)
    torch.testing.assert_close(out[:, 2], v.mean(1))
    assert out.isfinite().all()


def test_empty():
    q, k, v, bias = operands(0, 5, 6, 2, 8, torch.float32)
    with watch() as seen:
        out, lse = kernels.attention_bias_fwd(q, k, v, bias, 1.0)
        *_, dbias = kernels.attention_bias_bwd(out, q, k, v, bias, out, lse, 1.0, True)
    assert not seen.launches and dbias.shape == bias.shape and not dbias.any()
    q, k, v, bias = operands(2, 5, 6, 2, 8, torch.float32)
    with watch() as seen:
        out, lse = kernels.attention_bias_fwd(q, k, v, bias, 1.0)
        *_, dbias = kernels.attention_bias_bwd(out, q, k, v, bias, out, lse, 1.0, False)
    assert dbias.shape == (0,) and [kernel for kernel, _ in seen.launches][2:] == []


@pytest.mark.parametrize("B, L, H, E, dtype", [(18, 20, 2, 32, torch.bfloat16), (2, 70, 1, 40, torch.float32)])
def test_bytes_and_operations_are_the_model(B, L, H, E, dtype):
    q, k, v, bias = operands(B, L, L, H, E, dtype)
    with watch() as seen:
        out, lse = kernels.attention_bias_fwd(q, k, v, bias, 1.0)
    expected = model.attention_bias_fwd(B, L, H, E, dtype.itemsize, 4)
    assert (seen.bytes, seen.operations) == (expected.requested, expected.operations)
    with watch() as seen:
        kernels.attention_bias_bwd(out, q, k, v, bias, out, lse, 1.0, True)
    expected = model.attention_bias_bwd(B, L, H, E, dtype.itemsize, 4)
    assert (seen.bytes, seen.operations) == (expected.requested, expected.operations)
