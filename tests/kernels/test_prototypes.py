"""The Triton kernels of prototypes, interpreted, behind the public ops."""

import math

import pytest
import torch
from torch import Tensor

from fastssl.kernels import prototypes as kernels
from fastssl.kernels import prototypes_plan, tile
from fastssl.ops import dispatch, linear_cross_entropy, prototype_lse, soft_cross_entropy
from fastssl.ops.prototypes import PrototypeTargets
from tests.kernels.contract import every_architecture
from tests.kernels.interpreter import triton_on_cpu, watch
from tests.support import kernel_model as model
from tests.support.close import assert_as_exact_on_average, assert_exact
from tests.support.contract import sparse

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton is not interpreted")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1, 1), (13, 63, 7, 9), (40, 100, 33, 20)]  # N, P, D, E


def feature(*shape, dtype=torch.float32):
    return (torch.randn(*shape) / math.sqrt(shape[-1])).to(dtype)


def centred(teacher: Tensor, weight: Tensor, tau: float) -> PrototypeTargets:
    """Targets that sum to one, with a random centre."""
    column_offset = torch.randn(len(weight), dtype=tile.acc_dtype(teacher.dtype))
    with dispatch.reference():
        lse = prototype_lse(teacher.detach(), weight, tau, column_offset)
    return PrototypeTargets(teacher, weight, tau, -lse, column_offset)


def run(function, tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The result of `function`, and the gradients of the tensors that require one."""
    inputs = [x.detach().to(dtype if dtype and x.is_floating_point() else x.dtype) for x in tensors]
    inputs = [x.requires_grad_(y.requires_grad) for x, y in zip(inputs, tensors)]
    result = function(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    upstream = torch.linspace(0.5, 1.5, len(result), dtype=result.dtype) / max(1, len(result))
    return [result.detach(), *(torch.autograd.grad(result, wanted, upstream) if wanted else [])]


def compare(function, *tensors: Tensor) -> list[Tensor]:
    """No result of the kernels errs more than plain torch's. A kernel rounds the weights of a 16-bit product, so its
    gradients are compared on average."""
    with triton_on_cpu() as seen:
        ours = run(function, tensors)
    assert seen.launches, "no kernel ran"
    with dispatch.reference():
        truth, plain = run(function, tensors, torch.float64), run(function, tensors)
    for i, (result, exact, torch_made) in enumerate(zip(ours, truth, plain, strict=True)):
        if i and result.dtype.itemsize == 2:
            assert_as_exact_on_average(result, exact, torch_made, f"result {i}")
        else:
            assert_exact(result, exact, torch_made, f"result {i}")
    return ours


def soft(tau: float, teacher_tau: float, rows: Tensor | None = None):
    """soft_cross_entropy as a function of tensors alone."""

    def function(student, weight, teacher, teacher_weight, row_offset, column_offset):
        targets = PrototypeTargets(teacher, teacher_weight, teacher_tau, row_offset, column_offset)
        return soft_cross_entropy(student, weight, tau, targets, rows)

    return function


def tensors_for(N, P, D, E, M, dtype, teacher_tau=0.3) -> list[Tensor]:
    """Arguments of `soft`."""
    student, weight = feature(N, D, dtype=dtype).requires_grad_(), feature(P, D, dtype=dtype).requires_grad_()
    targets = centred(feature(M, E, dtype=dtype), feature(P, E, dtype=dtype), teacher_tau)
    return [student, weight, targets.teacher, targets.weight, targets.row_offset, targets.column_offset]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_prototype_lse(dim, dtype):
    for N, P, D, _ in SIZES:
        x, weight = feature(N, D, dtype=dtype), feature(P, D, dtype=dtype)
        offset = torch.randn(P if dim == 1 else N)
        compare(lambda x, w: prototype_lse(x, w, 0.1, None, dim), x, weight)
        compare(lambda x, w, o: prototype_lse(x, w, 0.1, o, dim), x, weight, offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, P, D, E", SIZES)
def test_one_teacher_each(N, P, D, E, dtype):
    compare(soft(0.2, 0.3), *tensors_for(N, P, D, E, N, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_teachers_and_none(dtype):
    """As in DINO, where a crop has the teachers of other crops; a student without one has no loss and no gradient."""
    rows = torch.randint(-1, 5, (13, 3))
    rows[4] = -1
    loss, dstudent, _ = compare(soft(0.2, 0.3, rows), *tensors_for(13, 63, 7, 9, 5, dtype))
    assert loss[4] == 0 and not dstudent[4].any() and dstudent[3].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, P, D, E", SIZES)
def test_linear_cross_entropy(N, P, D, E, dtype):
    target = torch.randint(P, (N,))
    target[N // 2 + 1 :: 3] = -100
    x, weight = feature(N, D, dtype=dtype).requires_grad_(), feature(P, D, dtype=dtype).requires_grad_()
    loss, dx, _ = compare(lambda x, w: linear_cross_entropy(x, w, 0.2, target), x, weight)
    assert not loss[target == -100].any() and not dx[target == -100].any()


def test_one_gradient_alone():
    rows = torch.randint(-1, 5, (13, 2))
    for frozen in (0, 1):
        tensors = tensors_for(13, 63, 7, 9, 5, torch.float32)
        tensors[frozen] = tensors[frozen].detach()
        assert len(compare(soft(0.2, 0.3, rows), *tensors)) == 2


@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
def test_any_number_of_parts(multiprocessors):
    """By size of the card: one part of the prototypes, a few with a short last one, one for each tile."""
    with tile.assume_card("sm_120", multiprocessors):
        compare(soft(0.25, 0.25), *tensors_for(5, 700, 8, 8, 5, torch.float32, 0.25))
        compare(soft(0.25, 0.25), *tensors_for(90, 20, 8, 8, 90, torch.float32, 0.25))
        compare(lambda x, w: prototype_lse(x, w, 0.1, None, 0), feature(300, 8), feature(20, 8))


@pytest.mark.exhaustive
@every_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_every_row_of_the_tables(arch, dtype):
    """Also rows wider than the last of a table, and teachers of another width than students."""
    with tile.assume_card(arch, 2):
        for table in (prototypes_plan.FORWARD, prototypes_plan.BACKWARD):
            for widest in table[arch][dtype.itemsize]:
                for D, E in ((widest, widest), (widest + 5, 9), (9, widest + 5)):
                    compare(soft(0.25, 0.25), *tensors_for(3, 37, D, E, 3, dtype, 0.25))


def test_rows_that_are_not_contiguous():
    tensors = tensors_for(13, 63, 8, 8, 5, torch.float32)
    for i in (0, 1, 2, 3):
        for layout in (
            tensors[i].mT.contiguous().mT,
            tensors[i].repeat(1, 2)[:, ::2],
            tensors[i].repeat(2, 2)[::2, 3:11],
        ):
            changed = layout.detach().requires_grad_(tensors[i].requires_grad)
            args = [changed if j == i else x for j, x in enumerate(tensors)]
            with triton_on_cpu():
                ours = run(soft(0.2, 0.3, torch.arange(13)[:, None].expand(13, 2) % 5), args)
            with dispatch.reference():
                plain = run(soft(0.2, 0.3, torch.arange(13)[:, None].expand(13, 2) % 5), args)
            for result, expected in zip(ours, plain, strict=True):
                torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1000.0])
def test_small_and_large_logits(scale):
    """Logits of thousands, whose log-sum-exp as one float32 number would lose the decimals of its rest.

    The second kernel sums a logit in another order than the first, so a softmax errs by as much as its logits.
    """
    tensors = tensors_for(13, 63, 8, 8, 13, torch.float32)
    tensors[0] = (tensors[0].detach() * scale).requires_grad_()
    target = torch.arange(13)
    largest = (tensors[0] @ tensors[1].T / 0.2).abs().max().item()
    for function, args in (
        (soft(0.2, 0.3), tensors),
        (lambda x, w: linear_cross_entropy(x, w, 0.2, target), tensors[:2]),
    ):
        with triton_on_cpu():
            loss, *gradients = run(function, args)
        with dispatch.reference():
            (exact_loss, *exact), (plain_loss, *_) = run(function, args, torch.float64), run(function, args)
        assert_exact(loss, exact_loss, plain_loss, "loss")
        for result, truth in zip(gradients, exact, strict=True):
            assert (result - truth).abs().max() < 2**-22 * max(4, largest) * truth.abs().max()


def test_a_gradient_of_students_that_agree_with_their_teachers():
    """Softmax and targets are subtracted before they are rounded: the difference, not each of them, is accurate."""
    teacher, weight = feature(40, 16, dtype=torch.bfloat16), feature(100, 16, dtype=torch.bfloat16)
    student = (teacher.float() * 1.004).bfloat16()
    with dispatch.reference():
        targets = PrototypeTargets(teacher, weight, 0.2, -prototype_lse(teacher, weight, 0.2), torch.zeros(100))
    args = [student.requires_grad_(), weight.clone().requires_grad_(), teacher, weight, *targets[3:]]
    compare(soft(0.2, 0.2), *args)


@pytest.mark.parametrize("scale", [1e-7, 65536.0])
def test_float16_keeps_small_and_large_gradients(scale):
    """Softmax times the gradient of the loss is outside float16's range, as with and without a loss scale."""
    x, weight, target = feature(20, 8, dtype=torch.float16), feature(90, 8, dtype=torch.float16), torch.arange(20)
    tau, dloss = torch.tensor(0.2), torch.full((20,), scale)
    with dispatch.reference():
        _, lse = torch.ops.fastssl.linear_cross_entropy_fwd(x, weight, tau, target)
        args = [dloss, x, weight, tau, target, lse, True, True]
        wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        truth = torch.ops.fastssl.linear_cross_entropy_bwd(*wide)
    with watch():
        ours = kernels.linear_cross_entropy_bwd(*args)
    for result, exact in zip(ours, truth, strict=True):
        assert (result - exact).abs().max() < 2**-10 * exact.abs().max()


def test_nan_propagates_within_its_row():
    tensors = tensors_for(6, 40, 8, 8, 6, torch.float32)
    student, teacher = tensors[0].detach().clone(), tensors[2].clone()
    student[2, 3], teacher[4, 1] = math.nan, math.nan
    with triton_on_cpu():
        loss = soft(0.2, 0.3)(student, *tensors[1:2], teacher, *tensors[3:])
        lse = prototype_lse(student, tensors[1].detach(), 0.2)
    assert loss.isnan().tolist() == [i in (2, 4) for i in range(6)]
    assert lse.isnan().tolist() == [i == 2 for i in range(6)]


def test_nothing_to_sum():
    w, none = feature(7, 5), feature(0, 5)
    with triton_on_cpu():
        assert prototype_lse(none, w, 0.1).shape == (0,)
        assert (prototype_lse(none, w, 0.1, None, 0) == -math.inf).all()
        assert (prototype_lse(w, none, 0.1) == -math.inf).all()
        assert (prototype_lse(w, w, 0.1, torch.full((7,), -math.inf)) == -math.inf).all()
        for rows, teachers in ((None, 0), (torch.zeros(0, 2).long(), 3)):
            student, weight = none.clone().requires_grad_(), w.clone().requires_grad_()
            loss = soft(0.2, 0.3, rows)(student, weight, feature(teachers, 5), w, torch.zeros(teachers), torch.zeros(7))
            loss.sum().backward()
            assert loss.shape == (0,) and student.grad.shape == (0, 5) and not weight.grad.any()
        for rows in (torch.zeros(4, 0).long(), torch.full((4, 2), -1)):
            student, weight = feature(4, 5).requires_grad_(), w.clone().requires_grad_()
            loss = soft(0.2, 0.3, rows)(student, weight, none, w, torch.zeros(0), torch.zeros(7))
            loss.sum().backward()
            assert not loss.any() and not student.grad.any() and not weight.grad.any()


def test_offsets_beyond_32_bits():
    weight = sparse((3, 2), (2**30 + 8, 1))
    weight[2, 0] = 1.0
    x = torch.tensor([[1.0, 0.0]])
    with triton_on_cpu():
        lse = prototype_lse(x, weight, 1.0)
        loss = linear_cross_entropy(x, weight, 1.0, torch.tensor([2]))
    torch.testing.assert_close(lse, torch.tensor([math.log(2 + math.e)]))
    torch.testing.assert_close(loss, torch.tensor([math.log(2 + math.e) - 1]))


@pytest.mark.parametrize("N, P, D, E, dtype", [(13, 63, 16, 8, torch.bfloat16), (34, 130, 40, 72, torch.float32)])
def test_bytes_and_operations_are_the_model(N, P, D, E, dtype):
    student, weight, teacher, teacher_weight, a, b = (x.detach() for x in tensors_for(N, P, D, E, N, dtype))
    tau, size = torch.tensor(0.2), dtype.itemsize

    def counted(launcher, *args):
        with watch() as seen:
            launcher(*args)
        return seen.bytes, seen.operations

    expected = model.prototype_lse(N, P, D, size, True)
    assert counted(kernels.prototype_lse, student, weight, tau, b, 1) == (expected.requested, expected.operations)
    args = student, weight, tau, teacher, teacher_weight, tau, a, b, None
    expected = model.soft_cross_entropy_fwd(N, P, D, E, size)
    assert counted(kernels.soft_cross_entropy_fwd, *args) == (expected.requested, expected.operations)
    numbers = torch.zeros(2, N), torch.ones(N)
    for of_weight in (False, True):
        expected = model.soft_cross_entropy_bwd(N, P, D, E, size, of_weight)
        seen = counted(kernels.soft_cross_entropy_bwd, a, *args, *numbers, not of_weight, of_weight)
        assert seen == (expected.requested, expected.operations)
    target = torch.arange(N)
    expected = model.linear_cross_entropy_fwd(N, P, D, size)
    seen = counted(kernels.linear_cross_entropy_fwd, student, weight, tau, target)
    assert seen == (expected.requested, expected.operations)
    for of_weight in (False, True):
        expected = model.linear_cross_entropy_bwd(N, P, D, size, of_weight)
        args = a, student, weight, tau, target, numbers[0], not of_weight, of_weight
        assert counted(kernels.linear_cross_entropy_bwd, *args) == (expected.requested, expected.operations)


@pytest.mark.parametrize("arch", tile.ARCHITECTURES)
def test_no_logits_in_memory(arch):
    """iBOT's patches: beside the arguments and results, forward moves a few numbers of each row and part."""
    moved = model.soft_cross_entropy_fwd(3771, 65_536, 256, 256, 2, arch=arch)
    assert moved.moved < 1.1 * moved.least < 0.2 * 2 * 3771 * 65_536
    for of_weight in (False, True):
        moved = model.soft_cross_entropy_bwd(3771, 65_536, 256, 256, 2, of_weight, arch=arch)
        assert moved.moved < 3 * moved.least
