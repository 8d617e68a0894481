"""Cross entropy over prototypes against the formulas of the methods, float64, plain torch and torch's own losses."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.ops import PrototypeTargets, dispatch, linear_cross_entropy, prototype_lse, prototypes, soft_cross_entropy
from fastssl.ops.dispatch import acc_dtype
from tests.support.close import assert_as_exact_on_average, assert_same
from tests.support.contract import (
    compiles,
    gradcheck,
    opcheck,
    refused,
    refuses_second_derivative,
    rejects,
    torch_threads,
)
from tests.support.memory import peak_memory
from tests.support.products import EVERY_PRODUCT

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EXACT = dict(rtol=1e-11, atol=1e-12)


def unit(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype)


def centred(teacher, weight, tau, centre):
    """Targets softmax((teacher · weight − centre) / tau) of DINO."""
    column_offset = -centre / tau
    row_offset = -prototype_lse(teacher, weight, tau, column_offset)
    return PrototypeTargets(teacher, weight, tau, row_offset, column_offset)


def soft_formula(student, weight, tau, targets, rows=None):
    teacher, teacher_weight, teacher_tau, row_offset, column_offset = targets
    q = (teacher @ teacher_weight.T / teacher_tau + row_offset[:, None] + column_offset).exp()
    log_p = (student @ weight.T / tau).log_softmax(1)
    if rows is not None:
        q = torch.stack([sum((q[r] for r in row if r >= 0), torch.zeros_like(weight[:, 0])) for row in rows.tolist()])
    return -(q * log_p).sum(1)


def gradients(function, leaves):
    loss = function()
    return loss, *torch.autograd.grad((loss * torch.linspace(0.5, 2, len(loss)).to(loss)).sum(), leaves)


@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1), (13, 5, 63, 5, 7), (97, 40, 1000, 64, 16)], ids=str)
def test_soft_cross_entropy_is_cross_entropy(size):
    count, teachers, length, width, teacher_width = size
    student, weight = unit(count, width).requires_grad_(), unit(length, width).requires_grad_()
    targets = centred(unit(teachers, teacher_width), unit(length, teacher_width), 0.04, torch.randn(length).double())
    rows = torch.randint(-1, teachers, (count, 3))
    ours = gradients(lambda: soft_cross_entropy(student, weight, 0.1, targets, rows), (student, weight))
    wanted = gradients(lambda: soft_formula(student, weight, 0.1, targets, rows), (student, weight))
    for one, other in zip(ours, wanted):
        torch.testing.assert_close(one, other, **EXACT)


def test_one_teacher_each_needs_no_rows():
    student, weight, targets = unit(20, 8), unit(300, 8), centred(unit(20, 4), unit(300, 4), 0.05, torch.zeros(300))
    torch.testing.assert_close(
        soft_cross_entropy(student, weight, 0.1, targets), soft_formula(student, weight, 0.1, targets), **EXACT
    )
    rows = torch.arange(20)[:, None]
    assert_same(
        soft_cross_entropy(student, weight, 0.1, targets), soft_cross_entropy(student, weight, 0.1, targets, rows)
    )


def test_targets_need_not_sum_to_one():
    """With the sum kept, the gradient is exact for any offsets, as between two rounds of Sinkhorn–Knopp."""
    student, weight = unit(5, 4).requires_grad_(), unit(9, 4).requires_grad_()
    targets = PrototypeTargets(unit(3, 4), unit(9, 4), 0.3, torch.randn(3).double(), torch.randn(9).double())
    rows = torch.tensor([[0, 1], [2, -1], [-1, -1], [1, 1], [0, 2]])
    ours = gradients(lambda: soft_cross_entropy(student, weight, 0.1, targets, rows), (student, weight))
    for one, other in zip(
        ours, gradients(lambda: soft_formula(student, weight, 0.1, targets, rows), (student, weight))
    ):
        torch.testing.assert_close(one, other, **EXACT)
    assert ours[0][2] == 0 and not ours[1][2].any()
    gradcheck(lambda s, w: soft_cross_entropy(s, w, 0.1, targets, rows), student, weight)


@pytest.mark.parametrize("size", [(1, 1, 1), (13, 63, 5), (97, 1000, 64)], ids=str)
def test_linear_cross_entropy_is_cross_entropy(size):
    count, length, width = size
    x, weight = unit(count, width).requires_grad_(), unit(length, width).requires_grad_()
    target = torch.randint(length, (count,))
    target[1:2] = -100
    ours = gradients(lambda: linear_cross_entropy(x, weight, 0.1, target), (x, weight))
    wanted = gradients(lambda: F.cross_entropy(x @ weight.T / 0.1, target, reduction="none"), (x, weight))
    for one, other in zip(ours, wanted):
        torch.testing.assert_close(one, other, **EXACT)
    if count < 20:
        gradcheck(lambda x, w: linear_cross_entropy(x, w, 0.1, target), x, weight)


@pytest.mark.parametrize("size", [(1, 1, 1), (13, 63, 5), (300, 1000, 64), (4, 0, 3), (0, 4, 3)], ids=str)
def test_prototype_lse_is_logsumexp(size):
    count, length, width = size
    x, weight, rows, columns = unit(count, width), unit(length, width), torch.randn(count), torch.randn(length)
    logits = x @ weight.T / 0.05
    torch.testing.assert_close(prototype_lse(x, weight, 0.05), logits.logsumexp(1), **EXACT)
    torch.testing.assert_close(
        prototype_lse(x, weight, 0.05, columns), (logits + columns.double()).logsumexp(1), **EXACT
    )
    torch.testing.assert_close(prototype_lse(x, weight, 0.05, dim=0), logits.logsumexp(0), **EXACT)
    wanted = (logits + rows.double()[:, None]).logsumexp(0)
    torch.testing.assert_close(prototype_lse(x, weight, 0.05, rows, 0), wanted, **EXACT)


def test_sinkhorn_by_potentials():
    """Three rounds of Sinkhorn–Knopp on exp(scores / 0.04), as SwAV writes them, without an exponential that overflows
    in float32."""
    teacher, weight = 3 * unit(12, 6), 2 * unit(7, 6)
    q = (teacher @ weight.T / 0.04).exp().T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True) * 7
        q /= q.sum(0, keepdim=True) * 12
    row_offset, column_offset = torch.zeros(12).double(), torch.zeros(7).double()
    for _ in range(3):
        column_offset = -prototype_lse(teacher, weight, 0.04, row_offset, 0)
        row_offset = -prototype_lse(teacher, weight, 0.04, column_offset)
    student, prototype = unit(12, 5), unit(7, 5)
    targets = PrototypeTargets(teacher, weight, 0.04, row_offset, column_offset)
    wanted = -((q * 12).T * (student @ prototype.T / 0.1).log_softmax(1)).sum(1)
    torch.testing.assert_close(soft_cross_entropy(student, prototype, 0.1, targets), wanted, rtol=1e-9, atol=1e-9)
    single = [x.float() for x in (teacher, weight)]
    column_offset = -prototype_lse(*single, 0.04, dim=0)
    assert column_offset.isfinite().all() and (single[0] @ single[1].T / 0.04).exp().isinf().any()


def ops_of(student, weight, tau, teacher, teacher_weight, teacher_tau, row_offset, column_offset, rows, target):
    """Results of every op of the file on the same inputs."""
    soft = student, weight, tau, teacher, teacher_weight, teacher_tau, row_offset, column_offset, rows
    dloss = torch.linspace(0.5, 2, len(student)).to(acc_dtype(student))
    loss, lse, mass = prototypes._soft_cross_entropy_fwd(*soft)
    results = {"soft loss": loss, "mass": mass, "lse": lse.sum(0)}
    results["soft dx"], results["soft dweight"] = prototypes._soft_cross_entropy_bwd(
        dloss, *soft, lse, mass, True, True
    )
    hard = student, weight, tau, target
    results["hard loss"], lse = prototypes._linear_cross_entropy_fwd(*hard)
    results["hard dx"], results["hard dweight"] = prototypes._linear_cross_entropy_bwd(dloss, *hard, lse, True, True)
    results["lse of rows"] = prototypes._prototype_lse(teacher, teacher_weight, teacher_tau, column_offset, 1)
    results["lse of columns"] = prototypes._prototype_lse(teacher, teacher_weight, teacher_tau, row_offset, 0)
    return results


def drawn(size, dtype, tau=0.1, teacher_tau=0.04, group=2):
    """Arguments of `ops_of`."""
    count, teachers, length, width, teacher_width = size
    student, weight = unit(count, width, dtype=dtype), unit(length, width, dtype=dtype)
    teacher, teacher_weight = unit(teachers, teacher_width, dtype=dtype), unit(length, teacher_width, dtype=dtype)
    acc = acc_dtype(student)
    column_offset = torch.randn(length, dtype=torch.float64)
    logits = teacher.double() @ teacher_weight.double().T / teacher_tau + column_offset
    offsets = -logits.logsumexp(1).to(acc), column_offset.to(acc)
    taus = torch.tensor(tau, dtype=acc), torch.tensor(teacher_tau, dtype=acc)
    rows = None if group is None else torch.randint(-1, teachers, (count, group))
    target = torch.randint(length, (count,)).where(torch.arange(count) % 5 != 2, -100)
    return student, weight, taus[0], teacher, teacher_weight, taus[1], *offsets, rows, target


def in_float64(args):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]


SIZES = [(13, 5, 63, 5, 7), (97, 97, 1000, 64, 64), (200, 40, 3333, 33, 17), (300, 128, 2500, 96, 48)]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_error_is_at_most_torch_s(dtype, size):
    """Of the plain-torch body, which computes in float32. The next test is about the gradients of bfloat16."""
    args = drawn(size, dtype, group=None if size[0] == size[1] else 3)
    ours = ops_of(*args)
    with dispatch.reference():
        plain, truth = ops_of(*args), ops_of(*in_float64(args))
    for name, result in ours.items():
        if dtype != torch.bfloat16 or ("dx" not in name and "dweight" not in name):
            assert_as_exact_on_average(result, truth[name], plain[name], name)


@EVERY_PRODUCT
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bfloat16_gradients_are_as_exact_as_torch_s(size, products):
    """Of logits whose product takes bfloat16, with the softmax in float32, as under autocast."""
    student, weight, tau, *teacher, rows, target = drawn(size, torch.bfloat16)
    x, w, targets = student.requires_grad_(), weight.requires_grad_(), PrototypeTargets(*teacher)
    exact_targets = PrototypeTargets(*(part.double() for part in targets))
    exact = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()

    def half(a, b):
        return (a @ b.T).float() / tau

    q = exact_targets.teacher @ exact_targets.weight.T / exact_targets.tau + exact_targets.column_offset
    q = (q + exact_targets.row_offset[:, None]).exp()
    q = torch.cat([q, torch.zeros(1, len(weight))])[rows].sum(1).float()
    rivals = {
        "soft": (
            gradients(lambda: soft_cross_entropy(x, w, tau, targets, rows), (x, w)),
            gradients(lambda: -(q * half(x, w).log_softmax(1)).sum(1), (x, w)),
            gradients(lambda: soft_formula(*exact, tau.double(), exact_targets, rows), exact),
        ),
        "hard": (
            gradients(lambda: linear_cross_entropy(x, w, tau, target), (x, w)),
            gradients(lambda: F.cross_entropy(half(x, w), target, reduction="none"), (x, w)),
            gradients(lambda: F.cross_entropy(exact[0] @ exact[1].T / tau.double(), target, reduction="none"), exact),
        ),
    }
    for name, (ours, plain, truth) in rivals.items():
        for i, (result, of_torch, wanted) in enumerate(zip(ours, plain, truth)):
            assert_as_exact_on_average(result, wanted.detach(), of_torch, f"{name}, result {i}")


@given(
    sizes=st.tuples(
        st.integers(0, 120), st.integers(1, 60), st.integers(1, 500), st.integers(1, 70), st.integers(1, 40)
    ),
    dtype=st.sampled_from(DTYPES),
    tau=st.sampled_from([0.05, 0.2, 2.0]),
    group=st.integers(0, 4),
)
@settings(max_examples=60)
def test_any_shape(sizes, dtype, tau, group):
    torch.manual_seed(0)
    args = drawn(sizes, dtype, tau, tau / 2, group)
    with dispatch.reference():
        expected = ops_of(*args)
    for name, ours in ops_of(*args).items():
        wanted = expected[name]
        assert (ours.dtype, ours.shape) == (wanted.dtype, wanted.shape) and ours.is_contiguous(), name
        rough = dtype == torch.bfloat16 and ("dx" in name or "dweight" in name)
        tolerance = 1e-2 if rough else 1e-10 if dtype == torch.float64 else 2e-5
        finite = wanted.isfinite()
        assert torch.equal(ours.isfinite(), finite), name
        if wanted.numel():
            allowed = tolerance * wanted[finite].double().abs().max() if finite.any() else 0
            assert ((ours - wanted)[finite].double().abs() <= allowed).all(), name


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: x[:1].expand_as(x),
        lambda x: x[:, :1].expand_as(x),
        lambda x: x.repeat_interleave(2, 0)[::2],
    ],
    ids=["columns first", "wider rows", "one row expanded", "one column expanded", "every other row"],
)
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_any_strides(view, dtype):
    args = [view(x) if x.ndim == 2 else x for x in drawn((20, 7, 250, 24, 24), dtype)]
    copies = [x.clone(memory_format=torch.contiguous_format) for x in args]
    for (name, ours), same in zip(ops_of(*args).items(), ops_of(*copies).values()):
        assert_same(ours, same, name)


@pytest.mark.parametrize("size", [(3, 3, 5000, 32, 32), (700, 90, 900, 33, 20)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_same_bits_on_one_thread_and_on_two(size, dtype):
    args, results = drawn(size, dtype), []
    for threads in (1, 2):
        with torch_threads(threads):
            results.append(ops_of(*args))
    for name, one in results[0].items():
        assert_same(results[1][name], one, name)


@EVERY_PRODUCT
def test_bfloat16_products_give_the_same_bits_on_any_number_of_threads(products):
    args, results = drawn((250, 90, 900, 33, 20), torch.bfloat16), []
    for threads in (1, 2):
        with torch_threads(threads):
            results.append(ops_of(*args))
    for name, one in results[0].items():
        assert_same(results[1][name], one, name)


def test_gradients_that_nobody_needs_are_not_computed():
    args = drawn((20, 7, 250, 24, 24), torch.float32)
    soft, hard = args[:9], (*args[:3], args[9])
    loss, lse, mass = prototypes._soft_cross_entropy_fwd(*soft)
    whole = prototypes._soft_cross_entropy_bwd(loss, *soft, lse, mass, True, True)
    whole_hard = prototypes._linear_cross_entropy_bwd(loss, *hard, lse, True, True)
    for needs in ((True, False), (False, True), (False, False)):
        parts = prototypes._soft_cross_entropy_bwd(loss, *soft, lse, mass, *needs)
        parts_hard = prototypes._linear_cross_entropy_bwd(loss, *hard, lse, *needs)
        for part, full, needed in zip((*parts, *parts_hard), (*whole, *whole_hard), needs * 2):
            assert_same(part, full if needed else full.new_empty(0))


def test_nan_of_a_student_and_of_a_prototype_propagate():
    args = list(drawn((120, 7, 300, 8, 8), torch.float32))
    args[0][3, 2] = float("nan")
    results = ops_of(*args)
    others = [i for i in range(120) if i != 3]
    for name in ("soft loss", "soft dx"):
        assert results[name][3].isnan().all() and results[name][others].isfinite().all(), name
    assert results["soft dweight"].isnan().all()
    args = list(drawn((12, 7, 300, 8, 8), torch.float32))
    args[1][250, 1] = float("nan")
    assert ops_of(*args)["soft loss"].isnan().all()


def test_offsets_of_minus_infinity_mask():
    x, weight, offset = unit(5, 4).float(), unit(300, 4).float(), torch.zeros(300)
    offset[100:] = float("-inf")
    torch.testing.assert_close(prototype_lse(x, weight, 0.1, offset), prototype_lse(x, weight[:100], 0.1))
    assert torch.equal(
        prototype_lse(x, weight, 0.1, torch.full((300,), float("-inf"))), torch.full((5,), float("-inf"))
    )


@pytest.mark.parametrize("tau", [1e-30, 1e-10, 1e-4, 1e10, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_temperatures_equal_plain_torch(tau, dtype):
    student, weight, _, *teacher, rows, target = drawn((40, 11, 300, 16, 16), dtype)
    targets = PrototypeTargets(*teacher)

    def results():
        leaves = student.clone().requires_grad_(), weight.clone().requires_grad_()
        soft = gradients(lambda: soft_cross_entropy(*leaves, tau, targets, rows), leaves)
        hard = gradients(lambda: linear_cross_entropy(*leaves, tau, target), leaves)
        return *soft, *hard, prototype_lse(student, weight, tau)

    ours = results()
    with dispatch.reference():
        plain = results()
    for result, wanted in zip(ours, plain, strict=True):
        assert result.isfinite().all()
        largest = wanted.double().abs().max().item()
        torch.testing.assert_close(result, wanted, rtol=0, atol=(0.02 if dtype == torch.bfloat16 else 1e-4) * largest)


def test_extra_memory_does_not_grow_with_the_prototypes():
    """No logits: beyond the gradient of the prototypes, the memory of a longer list is that of a shorter one."""
    student, teacher = unit(200, 32, dtype=torch.float32), unit(200, 32, dtype=torch.float32)
    weight, offset = unit(1, 32, dtype=torch.float32), torch.zeros(1)

    def peak(length):
        w = weight.expand(length, 32).clone()
        targets = PrototypeTargets(teacher, w, 0.1, torch.zeros(200), offset.expand(length).contiguous())
        leaves = student.clone().requires_grad_(), w.clone().requires_grad_()
        return peak_memory(lambda: gradients(lambda: soft_cross_entropy(*leaves, 0.1, targets), leaves)) - w.nbytes

    assert peak(65536) <= 1.05 * peak(16384) < 30e6


def test_autocast_multiplies_in_its_dtype_and_keeps_float32_gradients():
    student, weight, tau, *teacher, rows, target = drawn((20, 7, 250, 24, 24), torch.float32)
    leaves = student.requires_grad_(), weight.requires_grad_()
    targets = PrototypeTargets(*teacher)
    half = targets._replace(teacher=targets.teacher.bfloat16(), weight=targets.weight.bfloat16())
    halves = [x.detach().bfloat16().requires_grad_() for x in leaves]
    for function in (
        lambda s, w, t: soft_cross_entropy(s, w, tau, t, rows),
        lambda s, w, t: linear_cross_entropy(s, w, tau, target),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            inside = gradients(functools.partial(function, *leaves, targets), leaves)
        outside = gradients(functools.partial(function, *halves, half), halves)
        assert_same(inside[0], outside[0])
        for one, other in zip(inside[1:], outside[1:]):
            assert one.dtype == torch.float32
            assert_same(one.bfloat16(), other)
    with torch.autocast("cpu", torch.bfloat16):
        double = [x.detach().double() for x in leaves]
        assert linear_cross_entropy(*double, tau, target).dtype == torch.float64


def test_mixed_dtypes_are_promoted():
    student, weight, tau, *teacher, rows, target = drawn((20, 7, 250, 24, 24), torch.float32)
    targets = PrototypeTargets(*teacher)
    half = student.bfloat16().requires_grad_()
    loss = soft_cross_entropy(half, weight, tau, targets, rows)
    assert_same(loss, soft_cross_entropy(half.float(), weight, tau, targets, rows))
    assert torch.autograd.grad(loss.sum(), half)[0].dtype == torch.bfloat16
    assert linear_cross_entropy(half, weight.double(), tau, target).dtype == torch.float64


def test_contract():
    args = drawn((6, 4, 30, 5, 3), torch.float32)
    soft, hard, dloss = args[:9], (*args[:3], args[9]), torch.ones(6)
    for one_to_one in (False, True):
        if one_to_one:
            args = drawn((6, 6, 30, 5, 3), torch.float32, group=None)
            soft = args[:9]
        opcheck(prototypes._soft_cross_entropy_fwd, *soft)
        _, lse, mass = prototypes._soft_cross_entropy_fwd(*soft)
        opcheck(prototypes._soft_cross_entropy_bwd, dloss, *soft, lse, mass, True, not one_to_one)
    opcheck(prototypes._linear_cross_entropy_fwd, *hard)
    opcheck(prototypes._linear_cross_entropy_bwd, dloss, *hard, lse, True, True)
    opcheck(prototypes._prototype_lse, *hard[:3], None, 1)
    opcheck(prototypes._prototype_lse, *hard[:3], torch.zeros(6), 0)
    student, weight, rows, targets = (
        soft[0].requires_grad_(),
        soft[1].requires_grad_(),
        args[8],
        PrototypeTargets(*soft[3:8]),
    )
    compiles(lambda s, w: soft_cross_entropy(s, w, 0.1, targets, rows), student, weight)
    compiles(lambda s, w, y: linear_cross_entropy(s, w, 0.1, y), student, weight, hard[3])
    compiles(lambda t, v: prototype_lse(t, v, 0.1), targets.teacher, targets.weight)
    meta = linear_cross_entropy(student.to("meta"), weight.to("meta"), 0.1, hard[3].to("meta"))
    assert meta.is_meta and meta.shape == (6,)
    refuses_second_derivative(lambda s: soft_cross_entropy(s, weight, 0.1, targets, rows), student)
    refuses_second_derivative(lambda s: linear_cross_entropy(s, weight, 0.1, hard[3]), student)


def test_error_sentences():
    x, weight, target = unit(4, 8), unit(9, 8), torch.tensor([0, 1, 8, -100])
    targets = PrototypeTargets(unit(3, 5), unit(9, 5), 0.1, torch.zeros(3), torch.zeros(9))
    rows = torch.tensor([[0], [1], [-1], [2]])
    refused(
        "soft_cross_entropy: without rows, targets.teacher must have as many rows as student, N=4, got M=3; pass rows "
        "[N, G] to choose the teachers",
        ValueError, soft_cross_entropy, x, weight, 0.1, targets,
    )  # fmt: skip
    sentence = "soft_cross_entropy: rows must be -1 or between 0 and M-1=2, got "
    for wrong in (3, -2, 2**62):
        bad = rows.clone()
        bad[2] = wrong
        refused(f"{sentence}{wrong}", RuntimeError, soft_cross_entropy, x, weight, 0.1, targets, bad)
        with dispatch.reference():
            refused(f"{sentence}{wrong}", RuntimeError, soft_cross_entropy, x, weight, 0.1, targets, bad)
    for wrong in (9, -1, 2**62):
        bad = target.clone()
        bad[1] = wrong
        sentence = f"linear_cross_entropy: target must be -100 or between 0 and P-1=8, got {wrong}"
        refused(sentence, RuntimeError, linear_cross_entropy, x, weight, 0.1, bad)
    name = "soft_cross_entropy"
    rejects(name, "weight", "[9, 7]", ValueError, soft_cross_entropy, x, weight[:, :7], 0.1, targets, rows)
    rejects(name, "weight", "[0, 8]", ValueError, soft_cross_entropy, x, weight[:0], 0.1, targets, rows)
    rejects(name, "targets", "tuple", TypeError, soft_cross_entropy, x, weight, 0.1, tuple(targets), rows)
    rejects(name, "rows", "int32", TypeError, soft_cross_entropy, x, weight, 0.1, targets, rows.int())
    rejects(name, "rows", "[4]", ValueError, soft_cross_entropy, x, weight, 0.1, targets, rows[:, 0])
    rejects(name, "tau", "0", ValueError, soft_cross_entropy, x, weight, 0, targets, rows)
    wrong = targets._replace(tau=float("nan"))
    rejects(name, "tau", "nan", ValueError, soft_cross_entropy, x, weight, 0.1, wrong, rows)
    wrong = targets._replace(weight=targets.weight.clone().requires_grad_())
    rejects(name, "targets.weight", "requires_grad=True", ValueError, soft_cross_entropy, x, weight, 0.1, wrong, rows)
    wrong = targets._replace(row_offset=torch.zeros(4))
    rejects(name, "targets.row_offset", "[4]", ValueError, soft_cross_entropy, x, weight, 0.1, wrong, rows)
    rejects("linear_cross_entropy", "target", "float64", TypeError, linear_cross_entropy, x, weight, 0.1, x[:, 0])
    rejects("prototype_lse", "dim", "2", ValueError, prototype_lse, x, weight, 0.1, None, 2)
    rejects("prototype_lse", "offset", "[4]", ValueError, prototype_lse, x, weight, 0.1, torch.zeros(4))
    rejects("prototype_lse", "x", "requires_grad=True", ValueError, prototype_lse, x.requires_grad_(), weight, 0.1)
    with torch.no_grad():
        assert prototype_lse(x, weight, 0.1).shape == (4,)
