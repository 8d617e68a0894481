"""The Triton kernels of sampled rows of a bank, interpreted."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastssl.kernels import bank as kernels
from fastssl.kernels import tile
from fastssl.ops import bank as module
from fastssl.ops import dispatch, sampled_info_nce, sampled_nce, update_bank_
from tests.kernels.contract import every_architecture, launched
from tests.kernels.interpreter import triton_on_cpu, watch
from tests.support import kernel_model as model
from tests.support.close import assert_as_exact_on_average
from tests.support.contract import plain, sparse

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton is not interpreted")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 0, 1), (3, 63, 5, 7), (2, 50, 70, 33), (0, 3, 4, 5), (2, 7, 31, 0)]  # B, N, m, D


def unit(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(*shape), dim=-1).to(dtype)


def call(size, q_dtype=torch.float32, bank_dtype=torch.float32):
    batch, rows, count, width = size
    indices = torch.randint(rows, (batch, 1 + count))
    tau = torch.tensor(0.2, dtype=torch.promote_types(q_dtype, torch.float32))
    return unit(batch, width, dtype=q_dtype), unit(rows, width, dtype=bank_dtype), indices, tau


def check(q, bank, indices, tau, shift=2.5, with_grad=True):
    """Both kernels against plain torch in float64, with at most the error of plain torch in their dtype."""
    shift = torch.tensor(shift, dtype=torch.float64)
    for launcher, op, rest in (
        (kernels.sampled_info_nce_fwd, module._sampled_info_nce_fwd, (tau, with_grad)),
        (kernels.sampled_nce_fwd, module._sampled_nce_fwd, (tau, shift, with_grad)),
    ):
        made, _ = launched(launcher, q, bank, indices, *rest)
        near = bank if q.dtype == torch.float64 else bank.float()
        exact = plain(op, q.double(), near.double(), indices, *(x.double() if torch.is_tensor(x) else x for x in rest))
        for i, (x, truth, torch_made) in enumerate(zip(made, exact, plain(op, q, bank, indices, *rest), strict=True)):
            if x.dtype == torch.int64:
                assert torch.equal(x, truth), f"{launcher.__name__}: ranks {x.tolist()} for {truth.tolist()}"
            else:
                assert_as_exact_on_average(x, truth, torch_made, f"{launcher.__name__}, result {i}")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size):
    check(*call(size))
    check(*call(size), with_grad=False)


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_mixed_dtypes(dtypes):
    check(*call((2, 20, 37, 19), *dtypes))


@pytest.mark.parametrize("shift", [-30.0, 0.0, 30.0])
def test_far_from_the_noise(shift):
    check(*call((2, 20, 37, 19)), shift=shift)


def test_the_positive_drawn_again_is_not_above_itself():
    q, bank, _, tau = call((4, 9, 0, 33))
    indices = torch.arange(4)[:, None].expand(4, 30)
    check(q, bank, indices, tau)


def test_a_negative_temperature():
    q, bank, indices, tau = call((2, 20, 37, 19))
    check(q, bank, indices, -tau)


def test_any_strides():
    q, bank, indices, tau = call((3, 20, 9, 6))
    wide = torch.full((20, 11), torch.nan)
    wide[:, 2:8] = bank
    check(q.T.contiguous().T, wide[:, 2:8], indices.T.contiguous().T, tau)
    check(q[:1].expand(3, 6), bank[::2], indices[:1].expand(3, 10) // 2, tau)


def test_indices_outside_count_as_rows_of_zeros_and_are_not_updated():
    q, bank, indices, tau = call((2, 9, 12, 5))
    indices[0, 0], indices[1, 3], indices[1, 4] = 9, -1, 2**62
    with_zeros = torch.cat([bank, torch.zeros(1, 5)])
    made, _ = launched(kernels.sampled_info_nce_fwd, q, bank, indices, tau, True)
    inside = torch.where((indices < 0) | (indices > 9), 9, indices)
    for x, wanted in zip(made, plain(module._sampled_info_nce_fwd, q, with_zeros, inside, tau, True)):
        torch.testing.assert_close(x, wanted)
    before = bank.clone()
    with watch():
        kernels.update_bank_(bank, torch.tensor([9, -1, 2**62]), torch.ones(3, 5), 0.5)
    assert torch.equal(bank, before)


def test_offsets_beyond_31_bits():
    far, indices = sparse((4, 4), (2**30, 1), torch.float16), torch.tensor([[3, 1, 2]])
    with watch():
        kernels.update_bank_(far, torch.tensor([3, 1]), torch.eye(4)[:2].half(), 0.5)
    check(torch.randn(1, 4), far, indices, torch.tensor(0.5))
    assert far[[1, 3]].tolist() == torch.eye(4)[[1, 0]].tolist()


def updated(bank, indices, features, momentum):
    expected = bank.clone()
    with dispatch.reference():
        module._update_bank_(expected, indices, features, momentum)
    with watch():
        kernels.update_bank_(bank, indices, features, momentum)
    torch.testing.assert_close(bank, expected)


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_update_with_repeated_indices(dtypes):
    for momentum in (0.0, 0.3, 1.0):
        features = torch.randn(11, 17)[:, ::2].to(dtypes[1])
        updated(torch.randn(6, 20)[:, 3:12].to(dtypes[0]), torch.randint(6, (11,)), features, momentum)
    updated(torch.randn(6, 9), torch.zeros(0, dtype=torch.int64), torch.randn(0, 9), 0.5)


def test_update_leaves_rows_without_direction():
    bank, features = torch.randn(5, 3), torch.randn(5, 3)
    features[0], features[1, 2], features[2, 0], features[3] = -bank[0], torch.nan, torch.inf, 1e30
    before = bank.clone()
    updated(bank, torch.arange(5), features, 0.5)
    assert torch.equal(bank[:4], before[:4]) and not torch.equal(bank[4], before[4])


def test_public_ops():
    q, bank, indices, _ = call((3, 20, 37, 19))
    features, results = torch.randn(3, 19), []
    for run in (dispatch.reference, triton_on_cpu):
        leaf, memory = q.clone().requires_grad_(), bank.clone()
        with run() as seen:
            softmax, nce = sampled_info_nce(leaf, memory, indices, 0.2), sampled_nce(leaf, memory, indices, 0.2, 30.0)
            version = memory._version
            update_bank_(memory, indices[:, 0], features, 0.5)
        assert memory._version > version
        gradient = torch.autograd.grad((softmax.loss + nce.loss).sum(), leaf)[0]
        results.append([*softmax, *nce, gradient, memory])
    for x, wanted in zip(*results):
        torch.testing.assert_close(x, wanted)
    kernel_names = [kernel for kernel, _ in seen.launches]
    assert kernel_names == ["sampled_fwd_kernel", "sampled_combine_kernel"] * 2 + ["update_bank_kernel"]


@every_architecture
def test_every_configuration(arch):
    with tile.assume_card(arch):
        check(*call((2, 30, 140, 130), torch.bfloat16, torch.bfloat16))
    with tile.assume_card(arch, multiprocessors=1):  # one part
        check(*call((2, 30, 140, 130)))
    with tile.assume_card(arch):
        updated(torch.randn(50, 130).bfloat16(), torch.randint(50, (37,)), torch.randn(37, 130), 0.5)


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("size", [(3, 400, 37, 20), (2, 400, 70, 128), (1, 400, 0, 4)], ids=str)
def test_bytes_are_those_of_the_model(size, arch):
    batch, rows, count, width = size
    for q_dtype, bank_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.float16)):
        q, bank, indices, tau = call(size, q_dtype, bank_dtype)
        for nce, grad in itertools.product((False, True), repeat=2):
            launcher = kernels.sampled_nce_fwd if nce else kernels.sampled_info_nce_fwd
            rest = (tau, torch.tensor(2.0), grad) if nce else (tau, grad)
            with tile.assume_card(arch):
                _, counted = launched(launcher, q, bank, indices, *rest)
            sizes = (batch, count, width, q_dtype.itemsize, bank_dtype.itemsize)
            assert counted == model.sampled_fwd(*sizes, grad, nce, arch).requested
    features, unique = torch.randn(9, width), torch.randperm(rows)[:9]
    with tile.assume_card(arch):
        _, counted = launched(lambda *args: [kernels.update_bank_(*args)], bank, unique, features, 0.5)
    assert counted == model.update_bank_(9, width, 2, 4).requested


@pytest.mark.parametrize("arch", tile.ARCHITECTURES)
def test_bytes_are_near_the_least_in_instdisc(arch):
    for size in (4, 2):
        counted = model.sampled_fwd(256, 4096, 128, 4, size, True, True, arch)
        assert counted.least <= counted.moved <= 1.05 * counted.least
