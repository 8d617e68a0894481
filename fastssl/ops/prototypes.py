"""Softmax over prototypes: log-sum-exps, and the cross entropy against soft or hard targets, without stored logits.

SwAV, DINO, iBOT and DINOv2 compare a student's softmax over thousands of prototypes w_j with a teacher's. All their
targets have one form,

    T_mj = exp(t_m·v_j / τ_t + a_m + b_j):

centring has b = −centre/τ_t and a = −lse over the prototypes; Sinkhorn–Knopp has its two potentials, alternately
b = −lse over the rows and a = −lse over the prototypes. So an op takes features, prototypes and offsets instead of
targets, and a kernel makes logits and targets tile by tile. With z_ij = s_i·w_j / τ, q_ij = Σ_g T[rows[i,g], j] and the
mass m_i = Σ_j q_ij, the loss and its gradient are

    loss_i = m_i lse_i − Σ_j q_ij z_ij,    ∂loss_i/∂z_ij = m_i softmax(z_i)_j − q_ij.

The ops behind the public functions, for those who write kernels. All matrices of a call have one dtype, in any strides;
tau and teacher_tau are 0-dim; offsets are contiguous; offsets and results have the dtype of sums, float32 or float64
(`acc_dtype`):

    prototype_lse(x [N, D], weight [P, D], tau, offset [P or N] | None, dim) -> lse [N] (dim 1) or [P] (dim 0)
    soft_cross_entropy_fwd(student [N, D], weight [P, D], tau, teacher [M, E], teacher_weight [P, E], teacher_tau,
        row_offset [M], column_offset [P], rows [N, G] | None) -> (loss [N], lse [2, N], mass [N])
    soft_cross_entropy_bwd(dloss [N], …the nine arguments of the forward op…, lse, mass, needs_student, needs_weight)
        -> (dstudent [N, D], dweight [P, D]); what is not needed is empty, [0]
    linear_cross_entropy_fwd(x, weight, tau, target [N]) -> (loss [N], lse [2, N])
    linear_cross_entropy_bwd(dloss, x, weight, tau, target, lse, needs_x, needs_weight) -> (dx, dweight), likewise

The log-sum-exp of logits is kept as two numbers, a shift (the largest logit) and the rest: softmax(z)_j =
exp(z_j − lse[0] − lse[1]). As one float32 number it would lose the decimals of the rest beside a logit of thousands.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import check
from .dispatch import Function, acc_dtype, autocast_dtype, fake, first_order, op, register_triton

IGNORED = -100  # the target of a row without a loss, as in torch


def _kernels():
    """The Triton kernels, imported at the first call on a GPU."""
    from fastssl.kernels import prototypes

    return prototypes


class PrototypeTargets(NamedTuple):
    """Soft targets exp(teacher·weightᵀ / tau + row_offset + column_offset) over P prototypes, never stored."""

    teacher: Tensor  # [M, E] floating, features
    weight: Tensor  # [P, E] floating, the teacher's prototypes
    tau: float | Tensor  # temperature > 0
    row_offset: Tensor  # [M] floating
    column_offset: Tensor  # [P] floating


def prototype_lse(x: Tensor, weight: Tensor, tau: float | Tensor, offset: Tensor | None = None, dim: int = 1) -> Tensor:
    """Log-sum-exp of the logits of features against prototypes, over the prototypes or over the features.

    Equals ``logits = x @ weight.T / tau``, then ``(logits + offset).logsumexp(1)`` for dim 1 and
    ``(logits + offset[:, None]).logsumexp(0)`` for dim 0. Three of each are Sinkhorn–Knopp; dim 1 with the offset
    ``-centre / tau`` is what centring subtracts.

    Args:
        x: [N, D] floating, features. Under autocast it and weight are first converted to its dtype, except float64.
        weight: [P, D] floating, prototypes.
        tau: temperature > 0, a number, or a tensor with one element.
        offset: floating and below +∞, added to the logits: [P] for dim 1, [N] for dim 0, or None.
        dim: the dimension of the logits [N, P] that is summed, 0 or 1.

    Returns: [N] for dim 1, [P] for dim 0; −∞ where nothing is summed. float32, float64 where a matrix is float64. It
        has no gradient.

    Raises:
        ValueError: a shape or device does not fit, a number tau is not in 1e-30 … 1e30, dim is neither 0 nor 1, or an
            argument requires a gradient outside `torch.no_grad`.
        TypeError: an argument is not floating.

    Memory: a kernel needs O((N + P)·D); the plain-torch body makes logits [N, P].

    Source: Cuturi, "Sinkhorn Distances", 2013, with potentials in place of scalings; Caron et al., 2021 (DINO).
    """
    check.tensor("prototype_lse", "x", x, "N D")
    check.tensor("prototype_lse", "weight", weight, "P D", D=x.shape[1])
    if dim not in (0, 1):
        check.fail("prototype_lse", f"dim must be 0 (over the features) or 1 (over the prototypes), got {dim!r}")
    matrices = {"x": x, "weight": weight}
    check.floating("prototype_lse", **matrices)
    offsets = {}
    if offset is not None:
        letter, size = ("P", weight.shape[0]) if dim == 1 else ("N", x.shape[0])
        check.tensor("prototype_lse", "offset", offset, letter, **{letter: size})
        offsets = {"offset": offset}
        check.floating("prototype_lse", **offsets)
    check.same_device("prototype_lse", **matrices, **offsets)
    if torch.is_grad_enabled():
        _refuse_gradients("prototype_lse", **matrices, **offsets)
    dtype = _compute_dtype(x, weight)
    acc = torch.promote_types(dtype, torch.float32)
    tau = _temperature("prototype_lse", tau, x, acc)
    with torch.no_grad():
        offset = None if offset is None else offset.to(acc).contiguous()
        return _prototype_lse(x.to(dtype), weight.to(dtype), tau, offset, int(dim))


@op("prototype_lse")
def _prototype_lse(x: Tensor, weight: Tensor, tau: Tensor, offset: Tensor | None, dim: int) -> Tensor:
    logits = _logits(x, weight, tau)
    if offset is not None:
        logits += offset if dim == 1 else offset[:, None]
    return logits.logsumexp(dim)


@fake(_prototype_lse)
def _(x, weight, tau, offset, dim):
    return x.new_empty(x.shape[0] if dim == 1 else weight.shape[0], dtype=acc_dtype(x))


register_triton(_prototype_lse, lambda: _kernels().prototype_lse)


def soft_cross_entropy(
    student: Tensor, weight: Tensor, tau: float | Tensor, targets: PrototypeTargets, rows: Tensor | None = None
) -> Tensor:
    """Cross entropy of each student's softmax over prototypes against the soft targets of its teachers, summed.

    Equals ``T = (teacher @ teacher_weight.T / teacher_tau + row_offset[:, None] + column_offset).exp()``,
    ``log_p = (student @ weight.T / tau).log_softmax(1)``, ``loss[i] = −Σ_g (T[rows[i, g]] * log_p[i]).sum()``. The
    targets need not sum to one.

    Args:
        student: [N, D] floating. Gradient. Under autocast all matrices are first converted to its dtype, except
            float64.
        weight: [P, D] floating, the student's prototypes, P ≥ 1. Gradient.
        tau: temperature > 0, a number, or a tensor with one element; no gradient.
        targets: `PrototypeTargets` of M teachers; no gradient.
        rows: [N, G] int64, the teachers of each student; −1 for none. None: N = M, and teacher i is student i's.

    Returns: loss [N], the sum over the teachers of a student, 0 where it has none. Computed and summed in float32, in
        float64 where a matrix is float64; the gradients have the dtypes of their tensors, and that of a float32 weight
        is not rounded to 16 bits.

    Raises:
        ValueError: a shape or device does not fit, a number tau is not in 1e-30 … 1e30, or an argument without a
            gradient requires one.
        TypeError: an argument is not floating, rows is not int64, or targets is no `PrototypeTargets`.
        RuntimeError: on a CPU, a row is not between −1 and M − 1.

    Memory: a kernel needs O((N + M + P)·D); the plain-torch body makes several matrices [N, P].

    Source: Caron et al., 2020 (SwAV), equation 2, and 2021 (DINO), equations 1 and 2; Zhou et al., 2022 (iBOT).
    """
    name = "soft_cross_entropy"
    check.tensor(name, "student", student, "N D")
    check.tensor(name, "weight", weight, "P D", D=student.shape[1])
    if weight.shape[0] == 0:
        check.fail(name, f"weight must have at least one prototype, got {list(weight.shape)}")
    if not isinstance(targets, PrototypeTargets):
        check.fail(name, f"targets must be PrototypeTargets, got {type(targets).__name__}", TypeError)
    teacher, teacher_weight, teacher_tau, row_offset, column_offset = targets
    check.tensor(name, "targets.teacher", teacher, "M E")
    check.tensor(name, "targets.weight", teacher_weight, "P E", P=weight.shape[0], E=teacher.shape[1])
    check.tensor(name, "targets.row_offset", row_offset, "M", M=teacher.shape[0])
    check.tensor(name, "targets.column_offset", column_offset, "P", P=weight.shape[0])
    constants = {"targets.teacher": teacher, "targets.weight": teacher_weight}
    constants |= {"targets.row_offset": row_offset, "targets.column_offset": column_offset}
    check.floating(name, student=student, weight=weight, **constants)
    if rows is not None:
        check.tensor(name, "rows", rows, "N G", N=student.shape[0])
        check.index(name, rows=rows)
        check.same_device(name, student=student, rows=rows)
    elif teacher.shape[0] != student.shape[0]:
        message = f"N={student.shape[0]}, got M={teacher.shape[0]}; pass rows [N, G] to choose the teachers"
        check.fail(name, f"without rows, targets.teacher must have as many rows as student, {message}")
    check.same_device(name, student=student, weight=weight, **constants)
    _refuse_gradients(name, **constants)
    dtype = _compute_dtype(student, weight, teacher, teacher_weight)
    acc = torch.promote_types(dtype, torch.float32)
    tau = _temperature(name, tau, student, acc)
    teacher_tau = _temperature(name, teacher_tau, student, acc)
    row_offset, column_offset = row_offset.to(acc).contiguous(), column_offset.to(acc).contiguous()
    args = student, weight, tau, teacher, teacher_weight, teacher_tau, row_offset, column_offset, rows
    return _SoftCrossEntropy.apply(*args, dtype)


@op("soft_cross_entropy_fwd")
def _soft_cross_entropy_fwd(
    student: Tensor,
    weight: Tensor,
    tau: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    teacher_tau: Tensor,
    row_offset: Tensor,
    column_offset: Tensor,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [N], log-sum-exp of the student's logits [2, N], mass of its targets [N])."""
    targets_NP = _targets(teacher, teacher_weight, teacher_tau, row_offset, column_offset, rows)
    logits_NP = _logits(student, weight, tau)
    loss_N = -(targets_NP * logits_NP.log_softmax(1)).sum(1)
    return loss_N, _shift_and_rest(logits_NP), targets_NP.sum(1)


@fake(_soft_cross_entropy_fwd)
def _(student, weight, tau, teacher, teacher_weight, teacher_tau, row_offset, column_offset, rows):
    loss, lse = _fake_loss(student)
    return loss, lse, torch.empty_like(loss)


register_triton(_soft_cross_entropy_fwd, lambda: _kernels().soft_cross_entropy_fwd)


@op("soft_cross_entropy_bwd")
def _soft_cross_entropy_bwd(
    dloss: Tensor,
    student: Tensor,
    weight: Tensor,
    tau: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    teacher_tau: Tensor,
    row_offset: Tensor,
    column_offset: Tensor,
    rows: Tensor | None,
    lse: Tensor,
    mass: Tensor,
    needs_student: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(dstudent [N, D], dweight [P, D]) in float32 or wider."""
    targets_NP = _targets(teacher, teacher_weight, teacher_tau, row_offset, column_offset, rows)
    dlogits_NP = mass[:, None] * _softmax(student, weight, tau, lse) - targets_NP
    return _matrix_gradients(dlogits_NP, dloss, student, weight, tau, needs_student, needs_weight)


@fake(_soft_cross_entropy_bwd)
def _(dloss, student, weight, *args):
    return _fake_gradients(student, weight, *args[-2:])


register_triton(_soft_cross_entropy_bwd, lambda: _kernels().soft_cross_entropy_bwd)


class _SoftCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx, student, weight, tau, teacher, teacher_weight, teacher_tau, row_offset, column_offset, rows, dtype
    ):
        matrices = student, weight, teacher, teacher_weight
        s, w, t, v = (x.to(dtype) for x in matrices)
        loss, lse, mass = _soft_cross_entropy_fwd(s, w, tau, t, v, teacher_tau, row_offset, column_offset, rows)
        ctx.dtype = dtype
        ctx.save_for_backward(*matrices, tau, teacher_tau, row_offset, column_offset, rows, lse, mass)
        return loss

    @staticmethod
    @first_order("soft_cross_entropy")
    def backward(ctx, dloss):
        student, weight, teacher, teacher_weight, tau, teacher_tau, *offsets, rows, lse, mass = ctx.saved_tensors
        s, w, t, v = (x.to(ctx.dtype) for x in (student, weight, teacher, teacher_weight))
        needs = ctx.needs_input_grad[:2]
        gradients = _soft_cross_entropy_bwd(dloss, s, w, tau, t, v, teacher_tau, *offsets, rows, lse, mass, *needs)
        return *_converted(gradients, (student, weight), needs), *[None] * 8


def linear_cross_entropy(x: Tensor, weight: Tensor, tau: float | Tensor, target: Tensor) -> Tensor:
    """Cross entropy of each row's softmax over prototypes, or classes, against its target index.

    Equals ``F.cross_entropy(x @ weight.T / tau, target, reduction="none")``; the logits are never stored.

    Args:
        x: [N, D] floating. Gradient. Under autocast it and weight are first converted to its dtype, except float64.
        weight: [P, D] floating, P ≥ 1. Gradient.
        tau: temperature > 0, a number, or a tensor with one element; no gradient.
        target: [N] int64, or −100 for a row that is ignored: its loss and its gradient are 0.

    Returns: loss [N]. Computed and summed in float32, in float64 where a matrix is float64; the gradients have the
        dtypes of their tensors, and that of a float32 weight is not rounded to 16 bits.

    Raises:
        ValueError: a shape or device does not fit, or a number tau is not in 1e-30 … 1e30.
        TypeError: a matrix is not floating, or target is not int64.
        RuntimeError: on a CPU, a target is neither −100 nor between 0 and P − 1.

    Memory: a kernel needs O((N + P)·D); the plain-torch body makes logits [N, P].

    Source: Caron et al., "Deep Clustering for Unsupervised Learning of Visual Features", 2018, equation 1.
    """
    check.tensor("linear_cross_entropy", "x", x, "N D")
    check.tensor("linear_cross_entropy", "weight", weight, "P D", D=x.shape[1])
    if weight.shape[0] == 0:
        check.fail("linear_cross_entropy", f"weight must have at least one prototype, got {list(weight.shape)}")
    check.tensor("linear_cross_entropy", "target", target, "N", N=x.shape[0])
    check.floating("linear_cross_entropy", x=x, weight=weight)
    check.index("linear_cross_entropy", target=target)
    check.same_device("linear_cross_entropy", x=x, weight=weight, target=target)
    dtype = _compute_dtype(x, weight)
    tau = _temperature("linear_cross_entropy", tau, x, torch.promote_types(dtype, torch.float32))
    return _LinearCrossEntropy.apply(x, weight, tau, target, dtype)


@op("linear_cross_entropy_fwd")
def _linear_cross_entropy_fwd(x: Tensor, weight: Tensor, tau: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(loss [N], log-sum-exp of the logits [2, N])."""
    _check_indices("linear_cross_entropy", "target", target, IGNORED, weight.shape[0], "P")
    logits_NP = _logits(x, weight, tau)
    used_N = target != IGNORED
    picked_N = logits_NP.log_softmax(1).gather(1, target.where(used_N, 0)[:, None])[:, 0]
    return -picked_N.where(used_N, 0), _shift_and_rest(logits_NP)


@fake(_linear_cross_entropy_fwd)
def _(x, weight, tau, target):
    return _fake_loss(x)


register_triton(_linear_cross_entropy_fwd, lambda: _kernels().linear_cross_entropy_fwd)


@op("linear_cross_entropy_bwd")
def _linear_cross_entropy_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    tau: Tensor,
    target: Tensor,
    lse: Tensor,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(dx [N, D], dweight [P, D]) in float32 or wider."""
    _check_indices("linear_cross_entropy", "target", target, IGNORED, weight.shape[0], "P")
    used_N = target != IGNORED
    dlogits_NP = _softmax(x, weight, tau, lse)
    dlogits_NP.scatter_add_(1, target.where(used_N, 0)[:, None], -torch.ones_like(dlogits_NP[:, :1]))
    return _matrix_gradients(dlogits_NP, dloss.where(used_N, 0), x, weight, tau, needs_x, needs_weight)


@fake(_linear_cross_entropy_bwd)
def _(dloss, x, weight, *args):
    return _fake_gradients(x, weight, *args[-2:])


register_triton(_linear_cross_entropy_bwd, lambda: _kernels().linear_cross_entropy_bwd)


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx, x, weight, tau, target, dtype):
        loss, lse = _linear_cross_entropy_fwd(x.to(dtype), weight.to(dtype), tau, target)
        ctx.dtype = dtype
        ctx.save_for_backward(x, weight, tau, target, lse)
        return loss

    @staticmethod
    @first_order("linear_cross_entropy")
    def backward(ctx, dloss):
        x, weight, tau, target, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        gradients = _linear_cross_entropy_bwd(dloss, x.to(ctx.dtype), weight.to(ctx.dtype), tau, target, lse, *needs)
        return *_converted(gradients, (x, weight), needs), None, None, None


def _refuse_gradients(op: str, **tensors: Tensor) -> None:
    for name, value in tensors.items():
        if value.requires_grad:
            check.fail(op, f"{name} must not require a gradient, got requires_grad=True; pass {name}.detach()")


def _compute_dtype(x: Tensor, *others: Tensor) -> torch.dtype:
    """The one dtype in which a call multiplies its matrices."""
    dtype = x.dtype
    for other in others:
        dtype = torch.promote_types(dtype, other.dtype)
    autocast = autocast_dtype(x)
    return autocast if autocast and dtype != torch.float64 else dtype


def _temperature(op: str, tau: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """tau as a 0-dim tensor of `dtype`; it has no gradient."""
    if isinstance(tau, Tensor):
        _refuse_gradients(op, tau=tau)
    return check.temperature(op, tau, like).to(dtype)


def _logits(x: Tensor, weight: Tensor, tau: Tensor) -> Tensor:
    """Logits [N, P] in float32 or wider."""
    dtype = acc_dtype(x)
    return (x.to(dtype) @ weight.to(dtype).T) / tau


def _shift_and_rest(logits_NP: Tensor) -> Tensor:
    shift = logits_NP.amax(1)
    return torch.stack([shift, (logits_NP - shift[:, None]).exp().sum(1).log()])


def _softmax(x: Tensor, weight: Tensor, tau: Tensor, lse: Tensor) -> Tensor:
    return (_logits(x, weight, tau) - lse[0, :, None] - lse[1, :, None]).exp()


def _targets(
    teacher: Tensor, weight: Tensor, tau: Tensor, row_offset: Tensor, column_offset: Tensor, rows: Tensor | None
) -> Tensor:
    """The targets [N, P] of the students, summed over the teachers of each."""
    targets_MP = (_logits(teacher, weight, tau) + column_offset + row_offset[:, None]).exp()
    if rows is None:
        return targets_MP
    _check_indices("soft_cross_entropy", "rows", rows, -1, targets_MP.shape[0], "M")
    none_P = targets_MP.new_zeros(1, targets_MP.shape[1])
    with_none = torch.cat([targets_MP, none_P])  # row −1
    total_NP = targets_MP.new_zeros(rows.shape[0], targets_MP.shape[1])
    for teachers_N in rows.unbind(1):
        total_NP += with_none[teachers_N]
    return total_NP


def _matrix_gradients(
    dlogits_NP: Tensor, dloss: Tensor, x: Tensor, weight: Tensor, tau: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    dlogits_NP = dlogits_NP * (dloss / tau)[:, None]
    dx = dlogits_NP @ weight.to(dlogits_NP.dtype) if needs_x else dlogits_NP.new_empty(0)
    return dx, dlogits_NP.T @ x.to(dlogits_NP.dtype) if needs_weight else dlogits_NP.new_empty(0)


def _converted(
    gradients: tuple[Tensor, Tensor], tensors: tuple[Tensor, Tensor], needs: tuple[bool, bool]
) -> tuple[Tensor | None, ...]:
    return tuple(g.to(x.dtype) if needed else None for g, x, needed in zip(gradients, tensors, needs))


def _check_indices(op: str, name: str, indices: Tensor, special: int, length: int, letter: str) -> None:
    """Checks the values of indices on a CPU; the C++ kernels check them by themselves."""
    if not indices.is_cpu:
        return
    wrong = indices[((indices < 0) | (indices >= length)) & (indices != special)]
    if wrong.numel():
        expected = f"{name} must be {special} or between 0 and {letter}-1={length - 1}"
        check.fail(op, f"{expected}, got {int(wrong[0])}", RuntimeError)


def _fake_loss(x: Tensor) -> tuple[Tensor, Tensor]:
    """Empty (loss, lse)."""
    return x.new_empty(x.shape[0], dtype=acc_dtype(x)), x.new_empty(2, x.shape[0], dtype=acc_dtype(x))


def _fake_gradients(x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool) -> tuple[Tensor, Tensor]:
    """Empty (dx, dweight)."""
    dtype = acc_dtype(x)
    dx = x.new_empty(x.shape if needs_x else 0, dtype=dtype)
    return dx, weight.new_empty(weight.shape if needs_weight else 0, dtype=dtype)
