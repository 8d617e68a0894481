"""Losses over prototypes: DINO's of all crops and iBOT's and DINOv2's of masked patches, forward and backward.

Each contestant takes the features in front of the last layer, the prototypes and the centre, and computes the mean loss
and the gradients of the student's features and prototypes. Logits of bfloat16 products become float32 in front of the
softmax, as under autocast on a GPU.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.ops import PrototypeTargets, linear_cross_entropy, prototype_lse, soft_cross_entropy

from .harness import DTYPES, Case, compare, compiled, forward_backward
from .machine import DEVICE, GPU_SIZE

TAU, TEACHER_TAU, WIDTH = 0.1, 0.04, 256
CROPS, TEACHERS = 10, 2  # DINO's two large and eight small crops, of which the teacher sees the large ones
PAIRS = TEACHERS * (CROPS - 1)


def unit(rows: int, dtype: torch.dtype) -> Tensor:
    return F.normalize(torch.randn(rows, WIDTH, device=DEVICE), dim=1).to(dtype)


def lightly(name: str, **options):
    """A loss of lightly whose centre stays as it is; None if lightly is not installed."""
    try:
        import lightly.loss
    except ImportError:
        return None
    return getattr(lightly.loss, name)(student_temp=TAU, teacher_temp=TEACHER_TAU, center_momentum=1.0, **options).to(
        DEVICE
    )


def centred(teacher: Tensor, weight: Tensor, centre: Tensor) -> PrototypeTargets:
    column_offset = -centre / TEACHER_TAU
    row_offset = -prototype_lse(teacher, weight, TEACHER_TAU, column_offset)
    return PrototypeTargets(teacher, weight, TEACHER_TAU, row_offset, column_offset)


def logits(features: Tensor, weight: Tensor) -> Tensor:
    return (features @ weight.T).float()


def operations(students: int, teachers: int, length: int) -> int:
    """Of the logits of both, and the products of the student's gradient with prototypes and features."""
    return 2 * (3 * students + teachers) * length * WIDTH


def torch_cross_entropy(student: Tensor, weight: Tensor, targets, divisor: int) -> dict:
    """The rival that never stores all logits: torch's own, with class probabilities or class indices."""
    if not hasattr(F, "linear_cross_entropy"):
        return {}
    options = torch.nn.LinearCrossEntropyOptions()

    def loss() -> Tensor:
        total = F.linear_cross_entropy(student / TAU, weight, targets(), reduction="sum", options=options)
        return total / divisor

    return {"linear_cross_entropy": forward_backward(loss, student, weight)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("length", [4096, 65536, 131072])
def test_dino(benchmark, length, dtype, batch=64):
    """Teacher crop v against all student crops but v: each student row has one or two teacher rows."""
    student, weight = (unit(n, DTYPES[dtype]).requires_grad_() for n in (CROPS * batch, length))
    teacher, teacher_weight = (unit(n, DTYPES[dtype]) for n in (TEACHERS * batch, length))
    centre = 0.05 * torch.randn(length, device=DEVICE)
    image, crop = torch.arange(batch, device=DEVICE), torch.arange(CROPS, device=DEVICE)
    views = torch.arange(TEACHERS, device=DEVICE)
    rows = torch.where(crop[:, None, None] != views, views * batch + image[:, None], -1).flatten(0, 1)

    def probabilities() -> Tensor:
        return F.softmax((logits(teacher, teacher_weight) - centre) / TEACHER_TAU, dim=-1)

    def official() -> Tensor:
        """DINO's code: a log-softmax for each pair of crops."""
        students = (logits(student, weight) / TAU).chunk(CROPS)
        teachers = probabilities().chunk(TEACHERS)
        losses = [
            torch.sum(-q * F.log_softmax(students[v], dim=-1), dim=-1).mean()
            for i, q in enumerate(teachers)
            for v in range(CROPS)
            if v != i
        ]
        return sum(losses) / len(losses)

    def ours() -> Tensor:
        return soft_cross_entropy(student, weight, TAU, centred(teacher, teacher_weight, centre), rows).sum() / (
            PAIRS * batch
        )

    def summed_probabilities() -> Tensor:
        first, second = probabilities().chunk(TEACHERS)
        return torch.cat([second, first, *[first + second] * (CROPS - TEACHERS)]).to(student.dtype)

    contestants = {
        "ours": forward_backward(ours, student, weight),
        "official": forward_backward(official, student, weight),
    }
    rivals = {"torch.compile": compiled(official, student, weight)}
    rivals |= torch_cross_entropy(student, weight, summed_probabilities, PAIRS * batch)
    if dtype == "fp32" and (loss := lightly("DINOLoss", output_dim=length)):  # whose float32 errs by 1e-3 at P = 65,536
        loss.center.copy_(centre)

        def of_lightly() -> Tensor:
            return loss(logits(teacher, teacher_weight).chunk(TEACHERS), logits(student, weight).chunk(CROPS))

        rivals["lightly"] = forward_backward(of_lightly, student, weight)
    case = Case(
        op="soft_cross_entropy, DINO",
        size=f"N={CROPS * batch}, M={TEACHERS * batch}, P={length:,}, D={WIDTH}, {dtype}, forward + backward",
        kernel="soft_cross_entropy_fwd",
        contestants=contestants,
        rivals=rivals,
        operations=operations(CROPS * batch, TEACHERS * batch, length),
        dtype=DTYPES[dtype],
    )
    compare(benchmark, case)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("images, masked, length", [
    (64, 10, 4096),
    (64, 10, 65536),
    (64, 10, 131072),
    (9, 419, 4096),
    (9, 419, 65536),
    pytest.param(9, 419, 131072, marks=pytest.mark.skipif(**GPU_SIZE)),
])  # fmt: skip
def test_ibot(benchmark, images, masked, length, dtype):
    """Masked patches one to one, as many in each image: iBOT's and DINOv2's weights of rows are then equal."""
    count = images * masked
    student, weight = (unit(n, DTYPES[dtype]).requires_grad_() for n in (count, length))
    teacher, teacher_weight = (unit(n, DTYPES[dtype]) for n in (count, length))
    centre = 0.05 * torch.randn(length, device=DEVICE)

    def probabilities() -> Tensor:
        return F.softmax((logits(teacher, teacher_weight) - centre) / TEACHER_TAU, dim=-1)

    def official() -> Tensor:
        return torch.sum(-probabilities() * F.log_softmax(logits(student, weight) / TAU, dim=-1), dim=-1).mean()

    def ours() -> Tensor:
        return soft_cross_entropy(student, weight, TAU, centred(teacher, teacher_weight, centre)).mean()

    contestants = {
        "ours": forward_backward(ours, student, weight),
        "official": forward_backward(official, student, weight),
    }
    rivals = {"torch.compile": compiled(official, student, weight)}
    rivals |= torch_cross_entropy(student, weight, lambda: probabilities().to(student.dtype), count)
    if dtype == "fp32" and (loss := lightly("IBOTPatchLoss", output_dim=length)):
        loss.center.center.copy_(centre)
        mask = torch.ones(images, 1, masked, dtype=torch.bool, device=DEVICE)

        def of_lightly() -> Tensor:
            return loss(logits(teacher, teacher_weight), logits(student, weight), mask)

        rivals["lightly"] = forward_backward(of_lightly, student, weight)
    case = Case(
        op="soft_cross_entropy, iBOT",
        size=f"N=M={count:,}, P={length:,}, D={WIDTH}, {dtype}, forward + backward",
        kernel="soft_cross_entropy_fwd",
        contestants=contestants,
        rivals=rivals,
        operations=operations(count, count, length),
        dtype=DTYPES[dtype],
    )
    compare(benchmark, case)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("length", [4096, 65536])
def test_linear_cross_entropy(benchmark, length, dtype, batch=640):
    """DeepCluster's loss: hard targets."""
    x, weight = (unit(n, DTYPES[dtype]).requires_grad_() for n in (batch, length))
    target = torch.randint(length, (batch,), device=DEVICE)

    def official() -> Tensor:
        return F.cross_entropy(logits(x, weight) / TAU, target)

    contestants = {
        "ours": forward_backward(lambda: linear_cross_entropy(x, weight, TAU, target).mean(), x, weight),
        "official": forward_backward(official, x, weight),
    }
    case = Case(
        op="linear_cross_entropy",
        size=f"N={batch}, P={length:,}, D={WIDTH}, {dtype}, forward + backward",
        kernel="linear_cross_entropy_fwd",
        contestants=contestants,
        rivals={"torch.compile": compiled(official, x, weight)} | torch_cross_entropy(x, weight, lambda: target, batch),
        operations=operations(batch, 0, length),
        dtype=DTYPES[dtype],
    )
    compare(benchmark, case)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("length", [4096, 65536])
def test_sinkhorn(benchmark, length, dtype, batch=640):
    """Three rounds of Sinkhorn–Knopp over the rows and the prototypes; the result is the column offset of the codes."""
    x, weight = (unit(n, DTYPES[dtype]) for n in (batch, length))

    def official() -> Tensor:
        """DINOv2's: the product of the factors by which each prototype was divided."""
        q, factor = (logits(x, weight) / TEACHER_TAU).exp().T, torch.ones(length, device=DEVICE)
        q = q / q.sum()
        for _ in range(3):
            sums = q.sum(1)
            factor, q = factor * sums, q / sums[:, None] / length
            q = q / q.sum(0) / batch
        return -factor.log()

    def ours() -> Tensor:
        rows = None
        for _ in range(3):
            columns = -prototype_lse(x, weight, TEACHER_TAU, rows, 0)
            rows = -prototype_lse(x, weight, TEACHER_TAU, columns)
        return columns

    def relative(offset: Tensor) -> Tensor:
        return (offset - offset.mean()).to(x.dtype)

    case = Case(
        op="prototype_lse, Sinkhorn",
        size=f"N={batch}, P={length:,}, D={WIDTH}, {dtype}, three rounds",
        kernel="prototype_lse",
        contestants={"ours": ours, "official": official},
        rivals={"torch.compile": torch.compile(official, dynamic=False)},
        adapt={name: relative for name in ("ours", "official", "torch.compile")},
        operations=2 * batch * length * WIDTH,  # of the logits once
        dtype=DTYPES[dtype],
    )
    compare(benchmark, case)
