"""The Triton kernel of the pairwise sigmoid loss, interpreted, behind the public op."""

import pytest
import torch
import torch.nn.functional as F

from fastssl.kernels import contrastive_plan, pairwise, tile
from fastssl.ops import dispatch, pairwise_sigmoid
from tests.kernels.contract import every_architecture
from tests.kernels.interpreter import triton_on_cpu, watch
from tests.support import kernel_model as model
from tests.support.close import assert_exact

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton is not interpreted")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def unit(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(*shape), dim=-1).to(dtype)


def compare(q, keys, scale=10.0, bias=-4.0, label_offset=0):
    def run(values):
        inputs = [x.detach().requires_grad_() for x in values]
        loss = pairwise_sigmoid(*inputs, label_offset)
        return [loss.detach(), *torch.autograd.grad(loss * 3, inputs)]

    values = q, keys, torch.tensor(scale), torch.tensor(bias)
    with triton_on_cpu() as seen:
        ours = run(values)
    assert len(seen.launches) == 2
    with dispatch.reference():
        plain, exact = run(values), run([x.double() for x in values])
    for name, result, truth, torch_made in zip(("loss", "dq", "dkeys", "dscale", "dbias"), ours, exact, plain):
        if name == "dscale" and q.dtype.itemsize == 2:  # of weights that were rounded to 16 bits
            terms = (q.double() * exact[1]).abs().sum() / scale
            assert (result - truth).abs() <= 0.01 * terms
        else:
            assert_exact(result, truth, torch_made, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "M", "D", "label_offset"), [(1, 1, 1, 0), (13, 63, 7, 50), (40, 100, 33, 7)])
def test_pairwise_sigmoid(B, M, D, label_offset, dtype):
    compare(unit(B, D, dtype=dtype), unit(M, D, dtype=dtype), label_offset=label_offset)


def test_mixed_dtypes_and_strides():
    compare(unit(9, 5).T, unit(6, 18)[:, ::2].bfloat16())
    compare(unit(5, 9, dtype=torch.float16), unit(5, 9, dtype=torch.bfloat16))


def test_wide_rows_are_cut(monkeypatch):
    monkeypatch.setitem(contrastive_plan.PAIR_TILES, "sm_90", {size: {32: (16, 16, 16, 4, 1, 1)} for size in (2, 4, 8)})
    compare(unit(20, 70), unit(33, 70), label_offset=3)


def test_small_derivatives_survive_float16():
    compare(unit(30, 16, dtype=torch.float16), unit(30, 16, dtype=torch.float16), scale=5.0, bias=-12.0)


def test_without_gradient_one_launch():
    q, keys = unit(9, 5), unit(12, 5)
    with triton_on_cpu() as seen:
        loss = pairwise_sigmoid(q, keys, 2.0, -1.0, 1)
    assert len(seen.launches) == 1
    torch.testing.assert_close(loss, pairwise_sigmoid(q, keys, 2.0, -1.0, 1), rtol=1e-6, atol=0)


@every_architecture
def test_every_architecture(arch):
    with tile.assume_card(arch):
        compare(unit(20, 40), unit(40, 40), label_offset=5)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("B, M, D, dtype", [(14, 63, 16, torch.bfloat16), (34, 130, 40, torch.float32)])
def test_bytes_and_operations_are_the_model(B, M, D, dtype, grad):
    expected = model.pairwise_sigmoid_fwd(B, M, D, dtype.itemsize, grad)
    with watch() as seen:
        numbers = torch.tensor(10.0), torch.tensor(-4.0)
        pairwise.pairwise_sigmoid_fwd(unit(B, D, dtype=dtype), unit(M, D, dtype=dtype), *numbers, 0, grad)
    assert (seen.bytes, seen.operations) == (expected.requested, expected.operations)


def test_bytes_of_wide_rows_that_are_cut(monkeypatch):
    monkeypatch.setitem(contrastive_plan.PAIR_TILES, "sm_90", {4: {32: (16, 16, 16, 4, 1, 1)}})
    expected = model.pairwise_sigmoid_fwd(20, 33, 70, 4)
    with watch() as seen:
        pairwise.pairwise_sigmoid_fwd(unit(20, 70), unit(33, 70), torch.tensor(10.0), torch.tensor(-4.0), 3, True)
    assert (seen.bytes, seen.operations) == (expected.requested, expected.operations)
