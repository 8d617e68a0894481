"""The Triton kernels of InfoNCE and NT-Xent, interpreted, behind the public ops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels import contrastive as kernels
from fastssl.kernels import contrastive_plan, tile
from fastssl.ops import batch_info_nce, dispatch, info_nce, nt_xent
from tests.kernels.contract import every_architecture
from tests.kernels.interpreter import triton_on_cpu, watch
from tests.support import kernel_model as model
from tests.support.close import FLOOR, assert_exact
from tests.support.contract import sparse

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton is not interpreted")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1), (13, 63, 7), (40, 100, 33)]  # B, K, D


def unit(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(*shape), dim=-1).to(dtype)


def three_ways(function, *tensors: Tensor):
    """(kernels, float64, plain torch): results of `function`, and gradients of the tensors that require one."""

    def run(inputs):
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        results = function(*leaves)
        results = [results] if isinstance(results, Tensor) else list(results)
        weights = torch.linspace(0.5, 1.5, len(results[0]), dtype=results[0].dtype) / len(results[0])
        (results[0] * weights).sum().backward()
        return [r.detach() for r in results] + [x.grad for x in leaves if x.requires_grad]

    with triton_on_cpu() as seen:
        ours = run(tensors)
    assert seen.launches, "no kernel ran"
    with dispatch.reference():
        return ours, run([x.double().requires_grad_(x.requires_grad) for x in map(detached, tensors)]), run(tensors)


def detached(x):
    return x.detach().requires_grad_(x.requires_grad)


def compare(function, *tensors):
    ours, truth, plain = three_ways(function, *tensors)
    for i, (result, exact, torch_made) in enumerate(zip(ours, truth, plain, strict=True)):
        if result.dtype == torch.int64:
            assert torch.equal(result, exact), f"rank: {result} for {exact}"
        elif result.dim() == 0 and tensors[0].dtype.itemsize == 2:
            # τ's gradient sums q·dq, and a kernel rounds the weights in dq to the dtype of its inputs.
            dq = next(x for x in ours if x.dim() == 2)
            terms = (tensors[0] * dq).abs().sum() / tensors[-1]
            assert (result - exact).abs() <= FLOOR[tensors[0].dtype] * terms
        else:
            assert_exact(result, exact, torch_made, f"result {i}")
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, K, D", SIZES)
def test_info_nce(B, K, D, dtype):
    compare(
        lambda q, k, queue, tau: info_nce(q, k, queue, tau),
        unit(B, D, dtype=dtype).requires_grad_(),
        unit(B, D, dtype=dtype),
        unit(K, D, dtype=dtype),
        torch.tensor(0.2, requires_grad=True),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, M, D, label_offset", [(1, 1, 1, 0), (13, 63, 7, 50), (40, 100, 33, 7)])
def test_batch_info_nce(B, M, D, label_offset, dtype):
    compare(
        lambda q, keys, tau: batch_info_nce(q, keys, tau, label_offset),
        unit(B, D, dtype=dtype).requires_grad_(),
        unit(M, D, dtype=dtype).requires_grad_(),
        torch.tensor(0.2, requires_grad=True),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, D", [(2, 3), (13, 7), (35, 40)])
def test_nt_xent(B, D, dtype):
    compare(
        lambda z1, z2, tau: nt_xent(z1, z2, tau),
        unit(B, D, dtype=dtype).requires_grad_(),
        unit(B, D, dtype=dtype).requires_grad_(),
        torch.tensor(0.5, requires_grad=True),
    )


@pytest.mark.parametrize(
    "q_dtype, queue_dtype",
    [
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float64),
        (torch.float64, torch.float32),
    ],
)
def test_mixed_dtypes_are_widened(q_dtype, queue_dtype):
    q, k = unit(5, 9, dtype=q_dtype).requires_grad_(), unit(5, 9, dtype=torch.float32)
    compare(lambda q, k, queue: info_nce(q, k, queue, 0.07), q, k, unit(20, 9, dtype=queue_dtype))
    compare(lambda q, keys: batch_info_nce(q, keys, 0.2), q, unit(6, 9, dtype=queue_dtype).requires_grad_())


def test_strided_rows():
    q, k, queue = unit(9, 5).T, unit(5, 18)[:, ::2], unit(40, 12)[::2, 3:]
    compare(lambda q, k, queue: info_nce(q, k, queue, 0.2), q.requires_grad_(), k, queue)
    compare(lambda q, keys: batch_info_nce(q, keys, 0.2), q, queue.requires_grad_())


@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
def test_any_number_of_parts(multiprocessors):
    """By size of the card: one part of the keys, a few with a short last one, more than are combined at once."""
    q, k, queue = unit(3, 8).requires_grad_(), unit(3, 8), unit(700, 8)
    with tile.assume_card("sm_120", multiprocessors):
        compare(lambda q, k, queue: info_nce(q, k, queue, 0.1), q, k, queue)
        compare(lambda q, keys: batch_info_nce(q, keys, 0.1, 300), q, queue.requires_grad_())


@every_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_every_row_of_the_table(arch, dtype):
    """Also rows wider than the last of the table, which take several programs."""
    with tile.assume_card(arch, 2):
        for widest in contrastive_plan.TILES[arch][dtype.itemsize]:
            D = widest if widest < max(contrastive_plan.TILES[arch][dtype.itemsize]) else widest + 5
            q, k, queue = unit(3, D, dtype=dtype).requires_grad_(), unit(3, D, dtype=dtype), unit(37, D, dtype=dtype)
            compare(lambda q, k, queue: info_nce(q, k, queue, 0.2), q, k, queue)
            compare(lambda z1, z2: nt_xent(z1, z2, 0.2), q, k.requires_grad_())


@pytest.mark.parametrize("tau", [0.01, 1.0])
def test_extremes(tau):
    same = unit(1, 8).expand(4, 8).contiguous()
    with triton_on_cpu():
        torch.testing.assert_close(info_nce(same, same, same, tau).loss, torch.full((4,), math.log(5)))
    q = unit(4, 8)
    compare(lambda q, k, queue: info_nce(q, k, queue, tau), q.requires_grad_(), q.detach(), -q.detach().repeat(9, 1))
    compare(lambda q, k, queue: info_nce(q, k, queue, tau), 100 * q.detach().requires_grad_(), unit(4, 8), unit(30, 8))


def test_nan_propagates_within_its_row():
    q, k, queue = unit(6, 8), unit(6, 8), unit(40, 8)
    q[2, 3] = math.nan
    with triton_on_cpu():
        loss, _ = info_nce(q, k, queue, 0.2)
        every, _ = info_nce(unit(6, 8), k, torch.cat([queue, torch.full((1, 8), math.nan)]), 0.2)
    assert loss.isnan().tolist() == [i == 2 for i in range(6)]
    assert every.isnan().all()


def test_no_negatives_and_no_queries():
    z = unit(1, 8).requires_grad_()
    with triton_on_cpu():
        loss = nt_xent(z, z.detach(), 0.2)
        loss.sum().backward()
    assert loss.abs().max() < 1e-6 and z.grad.abs().max() < 1e-5
    with triton_on_cpu():
        loss, rank = info_nce(unit(3, 8), unit(3, 8), unit(0, 8), 0.2)
        assert loss.abs().max() < 1e-6 and rank.tolist() == [0, 0, 0]
        assert info_nce(unit(0, 8), unit(0, 8), unit(5, 8), 0.2).loss.shape == (0,)
        no_width = torch.empty(3, 0)
        torch.testing.assert_close(info_nce(no_width, no_width, no_width, 0.2).loss, torch.full((3,), math.log(4)))
        keys = unit(5, 8).requires_grad_()
        batch_info_nce(unit(0, 8), keys, 0.2).loss.sum().backward()
        assert keys.grad.shape == keys.shape and not keys.grad.any()


@pytest.mark.parametrize("scale", [1e-7, 65536.0])
def test_float16_keeps_small_and_large_gradients(scale):
    """Softmax times the gradient of the loss is outside float16's range, as with and without a loss scale."""
    q, keys = unit(20, 8, dtype=torch.float16), unit(90, 8, dtype=torch.float16)
    tau, dloss = torch.tensor(0.2), torch.full((20,), scale)
    with dispatch.reference():
        lse = torch.ops.fastssl.batch_info_nce_fwd(q, keys, tau, 0, False)[3]
        truth = torch.ops.fastssl.batch_info_nce_dkeys(*(x.double() for x in (q, keys, tau)), 0, lse.double(), dloss)
    with watch():
        ours = kernels.batch_info_nce_dkeys(q, keys, tau, 0, lse, dloss)
    assert (ours - truth).abs().max() < 2**-10 * truth.abs().max()


def test_offsets_beyond_32_bits():
    queue = sparse((3, 2), (2**30 + 8, 1))
    queue[2, 0] = 1.0
    q = torch.tensor([[1.0, 0.0]])
    with triton_on_cpu():
        loss, rank = info_nce(q, torch.tensor([[0.5, 0.0]]), queue, 1.0)
    torch.testing.assert_close(loss, torch.tensor([math.log(1 + 2 * math.exp(-0.5) + math.exp(0.5))]))
    assert rank.item() == 1


@pytest.mark.parametrize("B, K, D, dtype", [(13, 63, 16, torch.bfloat16), (33, 130, 40, torch.float32)])
@pytest.mark.parametrize("grad", [True, False])
def test_bytes_and_operations_are_the_model(B, K, D, dtype, grad):
    q, k, queue, tau = unit(B, D, dtype=dtype), unit(B, D, dtype=dtype), unit(K, D, dtype=dtype), torch.tensor(0.2)
    expected = model.info_nce_fwd(B, K, D, dtype.itemsize, grad)
    with watch() as seen:
        kernels.info_nce_fwd(q, k, queue, tau, grad)
    assert (seen.bytes, seen.operations) == (expected.requested, expected.operations)


@pytest.mark.parametrize("B, M, D, dtype", [(14, 63, 16, torch.bfloat16), (34, 130, 40, torch.float32)])
def test_bytes_and_operations_of_gradients_of_keys(B, M, D, dtype):
    q, keys, tau, rows = unit(B, D, dtype=dtype), unit(M, D, dtype=dtype), torch.tensor(0.2), torch.randn(B)
    expected = model.batch_info_nce_dkeys(B, M, D, dtype.itemsize)
    with watch() as seen:
        kernels.batch_info_nce_dkeys(q, keys, tau, 0, rows, rows)
    assert (seen.bytes, seen.operations) == (expected.requested, expected.operations)
    expected = model.nt_xent_bwd(B, D, dtype.itemsize)
    with watch() as seen:
        kernels.nt_xent_bwd(q, tau, rows, rows)
    assert (seen.bytes, seen.operations) == (expected.requested, expected.operations)


def test_a_switch_of_torch_allows_tf32():
    assert tile.dot_precision(torch.float32) == "tf32x3"
    torch.set_float32_matmul_precision("high")
    try:
        assert tile.dot_precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
    with tile.assume_card("gfx942"):
        assert tile.dot_precision(torch.float32) == "ieee"
