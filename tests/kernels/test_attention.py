"""The Triton kernels of attention, interpreted, behind the public op."""

import importlib
import types

import pytest
import torch

from fastssl.kernels import attention as kernels
from fastssl.kernels import tile
from fastssl.ops import attention, attention_packed, dispatch
from tests.kernels.contract import every_architecture
from tests.kernels.interpreter import triton_on_cpu, watch
from tests.support import kernel_model as model
from tests.support.close import assert_as_exact_on_average
from tests.support.contract import sparse

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton is not interpreted")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def packed(B, L, H, E, dtype, seed=0):
    qkv = torch.randn(B, L, 3, H, E, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return qkv.unbind(2)


def compare(q, k, v, scale=None):
    """Compares result and gradients with float64: no larger error than plain torch in the same dtype."""
    weights = torch.randn(q.shape)

    def run(*inputs):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = attention(*leaves, scale=scale)
        return out.detach(), *torch.autograd.grad(out, leaves, weights.to(out.dtype))

    with triton_on_cpu() as seen:
        ours = run(q, k, v)
    assert [kernel for kernel, _ in seen.launches] in (
        ["attention_fwd_kernel", "attention_bwd_per_head_kernel"],
        ["attention_fwd_kernel", "attention_bwd_per_block_kernel"],
    )
    with dispatch.reference():
        truth, plain = run(q.double(), k.double(), v.double()), run(q, k, v)
    # Three products of tf32 parts have 22 of float32's 24 bits, so the largest error of a cell varies more.
    largest = 4.0 if q.dtype == torch.float32 else 2.0
    for name, *results in zip(("out", "dq", "dk", "dv"), ours, truth, plain):
        assert_as_exact_on_average(*results, name, largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, L, H, E", [(1, 1, 1, 1), (2, 13, 2, 20), (1, 50, 2, 32), (1, 65, 1, 64)])
def test_sizes(B, L, H, E, dtype):
    compare(*packed(B, L, H, E, dtype))


@every_architecture
@pytest.mark.parametrize("L, E", [(100, 32), (130, 64), (197, 32), (70, 80), (257, 32)])
def test_every_row_of_the_tables(arch, L, E):
    with tile.assume_card(arch):
        compare(*packed(1, L, 1, E, torch.float16))


@every_architecture
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_row_of_the_wide_dtypes(arch, dtype):
    with tile.assume_card(arch):
        compare(*packed(1, 40, 1, 40, dtype))


def test_lengths_of_keys_and_layouts():
    q, k, v = torch.randn(2, 9, 2, 16), torch.randn(2, 70, 2, 16), torch.randn(2, 70, 2, 16)
    compare(q, k, v, scale=0.5)
    compare(k, q, q.flip(0))
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in packed(2, 9, 3, 16, torch.float32)]
    compare(*heads_first)
    compare(*[x.transpose(1, 3).contiguous().transpose(1, 3) for x in heads_first])  # rows with gaps, which are copied
    compare(q[:, ::2], k[:, 1:], v[:, :69])


@pytest.mark.parametrize("L, E, dtype", [(50, 32, torch.bfloat16), (70, 20, torch.float32)])
def test_packed_is_attention(L, E, dtype):
    """A program for each head, and for each block: the same gradients as `attention`, written into one tensor."""
    qkv, dout = torch.randn(2, L, 3, 2, E).to(dtype).requires_grad_(), torch.randn(2, L, 2, E).to(dtype)
    with triton_on_cpu():
        results = [attention_packed(qkv), attention(*qkv.unbind(2))]
        for ours, theirs in zip(*([out, *torch.autograd.grad(out, qkv, dout)] for out in results)):
            assert torch.equal(ours, theirs)


def test_large_scores_do_not_overflow():
    q, k, v = packed(1, 20, 1, 16, torch.float32)
    with watch():
        out, lse = kernels.attention_fwd(100 * q, 100 * k, v, 1.0)
        gradients = kernels.attention_bwd(out, 100 * q, 100 * k, v, out, lse, 1.0)
    best = (q[0, :, 0] @ k[0, :, 0].T).argmax(1)
    torch.testing.assert_close(out, v[:, best])
    assert all(gradient.isfinite().all() for gradient in gradients)


def by_formula(dout, q, k, v, scale):
    with dispatch.reference():
        out, lse = torch.ops.fastssl.attention_fwd(q, k, v, scale)
        return out, *torch.ops.fastssl.attention_bwd(dout, q, k, v, out, lse, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scores_far_below_zero(dtype):
    """Tiles are padded with keys of score 0, far above all true scores here."""
    q, k, v = packed(1, 20, 1, 16, dtype)
    q, k, dout = q.abs() + 7, -k.abs() - 7, torch.randn(1, 20, 1, 16).to(dtype)
    with watch():
        out, lse = kernels.attention_fwd(q, k, v, 0.25)
        gradients = kernels.attention_bwd(dout, q, k, v, out, lse, 0.25)
    assert lse.max() < -100  # exp(100) overflows float32
    truth = by_formula(*(x.double() for x in (dout, q, k, v)), 0.25)
    for result, exact in zip((out, *gradients), truth):
        assert (result - exact).abs().max() < 0.02 * exact.abs().max()


def test_offsets_beyond_32_bits():
    far = sparse((2, 3, 1, 4), (2**31, 2**22, 4, 1), torch.float16)
    far[1, 2] = 1.0
    q = torch.ones(2, 3, 1, 4, dtype=torch.float16)
    with watch():
        out, lse = kernels.attention_fwd(q, far, far, 1.0)
    expected = torch.tensor([0.0, 4.0, 4.0])
    torch.testing.assert_close(
        lse[:, 0, 0], torch.stack([torch.tensor([0.0, 0, 0]), expected.new_tensor([0, 0, 4.0])]).logsumexp(1)
    )
    assert not out[0].any() and (out[1] > 0.9).all()


def test_products_beyond_32_bits():
    """Strides that fit 32 bits, times tokens or samples, so that the offset does not."""
    far = sparse((3, 300, 1, 2), (2**30, 2**23 - 8, 2, 1), torch.float16)
    far[2, 299] = 20.0
    q = torch.ones(3, 1, 1, 2, dtype=torch.float16)
    with watch():
        out, _ = kernels.attention_fwd(q, far, far, 1.0)
    assert not out[:2].any() and (out[2] > 19.9).all()


def test_empty():
    none = torch.empty(0, 5, 2, 8)
    with watch() as seen:
        out, lse = kernels.attention_fwd(none, none, none, 1.0)
        kernels.attention_bwd(out, none, none, none, out, lse, 1.0)
        q, k = torch.empty(1, 0, 2, 8), torch.randn(1, 3, 2, 8)
        out, lse = kernels.attention_fwd(q, k, k, 1.0)
        _, dk, dv = kernels.attention_bwd(out, q, k, k, out, lse, 1.0)
    assert not seen.launches and not dk.any() and not dv.any()


@pytest.mark.parametrize(
    "B, L, H, E, dtype", [(2, 50, 2, 32, torch.bfloat16), (1, 257, 1, 20, torch.float16), (1, 70, 2, 40, torch.float32)]
)
def test_bytes_and_operations_are_the_model(B, L, H, E, dtype):
    q, k, v = packed(B, L, H, E, dtype)
    with watch() as seen:
        out, lse = kernels.attention_fwd(q, k, v, 1.0)
    expected = model.attention_fwd(B, L, H, E, dtype.itemsize)
    assert (seen.bytes, seen.operations) == (expected.requested, expected.operations)
    with watch() as seen:
        kernels.attention_bwd(out, q, k, v, out, lse, 1.0)
    expected = model.attention_bwd(B, L, H, E, dtype.itemsize)
    assert (seen.bytes, seen.operations) == (expected.requested, expected.operations)


def test_long_sequences_and_wide_heads_run_in_torch(monkeypatch):
    """`backend`, on a GPU, with its limit on the width of heads, and on a CPU, without one."""
    rule = importlib.import_module("fastssl.ops.attention")

    class OnGPU:
        is_cuda, device, requires_grad = True, torch.device("cuda"), True

        def __init__(self, L, E, size):
            self.shape, self.size = (1, L, 1, E), size

        def element_size(self):
            return self.size

    monkeypatch.setattr(rule, "_fmha", lambda: None)
    named = {
        (L, E, size): rule.backend(*[OnGPU(L, E, size)] * 3)
        for L, E, size in [(512, 128, 2), (513, 64, 2), (50, 129, 2), (50, 64, 4), (50, 65, 4)]
    }
    assert list(named.values()) == ["kernel", "torch", "torch", "kernel", "torch"]
    assert rule.backend(*[torch.empty(1, 50, 1, 200)] * 3) == "kernel"
    assert rule.backend(torch.empty(1, 513, 1, 8), *[torch.empty(1, 5, 1, 8)] * 2) == "torch"


def test_long_sequences_run_in_xformers_where_it_supports_them(monkeypatch):
    """With a mock of xformers, which has no operator for CPUs."""
    rule, calls = importlib.import_module("fastssl.ops.attention"), []

    class Operator:
        @staticmethod
        def supports(call):
            return call.query.shape[3] <= 64

    class FMHA:
        ALL_FW_OPS = ALL_BW_OPS = (Operator,)
        Inputs = types.SimpleNamespace

        @staticmethod
        def memory_efficient_attention(q, k, v, scale):
            calls.append(q.shape)
            return torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), scale=scale
            ).transpose(1, 2)

    monkeypatch.setattr(rule, "_fmha", lambda: FMHA)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    q, k, v = packed(1, 600, 1, 32, torch.float32)
    out = attention(q, k, v)
    assert calls == [(1, 600, 1, 32)]
    wide = packed(1, 600, 1, 80, torch.float32)
    attention(*wide)
    assert len(calls) == 1
    monkeypatch.setattr(rule, "_fmha", lambda: None)
    torch.testing.assert_close(out, attention(q, k, v))
