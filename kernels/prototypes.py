"""Log-sum-exps over prototypes, and the cross entropy against soft or hard targets, without stored logits.

`prototype_lse_fwd_kernel` serves all forward ops. A program holds BLOCK_B rows and streams prototypes past them; for
each row it keeps the running maximum of its logits, the sum of exp(logit − maximum) and, with targets, their sum, the
mass, and Σ target·(logit − maximum), the cross term, all in float32. The target of a student and a prototype is made
from the teacher's tile of logits in the same program, at the same place of the registers. The loss is mass·log(sum) −
cross, in which no large logits cancel. There are few blocks of rows, so the prototypes are cut into parts that fill the
card, as in contrastive.py; a few numbers of each row and part are combined in plain torch, in a fixed order.

`soft_cross_entropy_bwd_kernel` makes both tiles again, subtracts the targets from mass·softmax in float32, multiplies
by the loss's gradient, rounds once and multiplies by the prototypes (gradient of the students) or by the students
(gradient of the prototypes: a second launch with the roles exchanged). No atomics: the same bits at every call.

A student with G teachers is G pairs of rows, which are independent: the loss is the sum over its pairs. A pair without
a teacher, −1, has mass 0. In units of 2·N·P·D operations, with E = D:

    forward      1 for a log-sum-exp, 2·G with soft targets, 1 with hard ones
    backward     3·G for the students and 3·G for the prototypes; 2 and 2 with hard targets
    bytes        forward: students and teachers once, prototypes once for each block of rows from the L2 cache; backward
                 besides parts·N·G·D·4 of partial results, written and read once
    limit        N = 3,771, P = 65,536, D = 256 in 16 bits: tensor cores, 0.25 TFLOP forward and 0.76 backward

Students are multiplied again for each of their teachers: for two teachers 16 units, where one tile of students with
several of teachers would take 11. Those pairs are few beside the patches of iBOT and DINOv2, which have one teacher.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .prototypes_plan import backward_plan, forward_plan
from .tile import LOWEST, acc_dtype, card, contiguous_rows, dot_in_chunks, load_tile

# The kind of targets: none (a log-sum-exp alone), soft or hard.
NONE, SOFT, HARD = (tl.constexpr(i) for i in range(3))
IGNORED = -100


@triton.jit
def prototype_lse_fwd_kernel(
    x_ptr,  # [N, D], rows contiguous
    weight_ptr,  # [P, D], rows contiguous
    tau_ptr,  # one value
    teacher_ptr,  # [M, E] for SOFT, rows contiguous
    teacher_weight_ptr,  # [P, E] for SOFT, rows contiguous
    teacher_tau_ptr,  # one value, for SOFT
    row_offset_ptr,  # [M], of the targets' exponents for SOFT
    column_offset_ptr,  # [P], of the logits for NONE, of the targets' exponents for SOFT
    rows_ptr,  # [R] int64: the teacher of each pair for SOFT, −1 for none; the target of each row for HARD
    max_ptr,  # [parts, R], written: largest logit of a part
    sum_ptr,  # [parts, R], written: Σ exp(logit − largest)
    mass_ptr,  # [parts, R], written with targets: Σ target
    cross_ptr,  # [parts, R], written with targets: Σ target·(logit − largest)
    R,  # N · G pairs
    P,
    D,
    E,
    tiles_per_part,
    stride_x_n,
    stride_weight_p,
    stride_teacher_m,
    stride_teacher_weight_p,
    G: tl.constexpr,  # pairs of a student
    KIND: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    CHUNK: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One part of the prototypes for one block of pairs."""
    part = tl.program_id(1)
    pair = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_r = pair < R
    student = pair // G
    column = tl.arange(0, BLOCK_D)
    scale = 1 / tl.load(tau_ptr).to(ACC_DTYPE)
    if CHUNK == 0:
        x = load_tile(x_ptr, student, in_r, column, stride_x_n, D).to(OPERAND)
    if KIND != NONE:
        target_row = tl.load(rows_ptr + pair, mask=in_r, other=-1)
    if KIND == SOFT:
        in_m = target_row >= 0
        teacher_scale = 1 / tl.load(teacher_tau_ptr).to(ACC_DTYPE)
        row_offset = tl.load(row_offset_ptr + target_row, mask=in_m, other=float("-inf"))
        if CHUNK == 0:
            teacher = load_tile(teacher_ptr, target_row, in_m, column, stride_teacher_m, E).to(OPERAND)
    running_max = tl.full([BLOCK_B], LOWEST, ACC_DTYPE)
    total, mass, cross = (
        tl.zeros([BLOCK_B], ACC_DTYPE),
        tl.zeros([BLOCK_B], ACC_DTYPE),
        tl.zeros([BLOCK_B], ACC_DTYPE),
    )
    for tile in range(part * tiles_per_part, tl.minimum((part + 1) * tiles_per_part, tl.cdiv(P, BLOCK_K))):
        key = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        in_p = key < P
        if CHUNK == 0:
            keys = load_tile(weight_ptr, key, in_p, column, stride_weight_p, D).to(OPERAND)
            logits = tl.dot(x, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC_DTYPE)
        else:
            logits = dot_in_chunks(
                x_ptr, student, in_r, stride_x_n, weight_ptr, key, in_p, stride_weight_p, D,
                OPERAND, ACC_DTYPE, PRECISION, CHUNK,
            )  # fmt: skip
        logits *= scale  # [BLOCK_B, BLOCK_K]
        if HAS_OFFSET:
            logits += tl.load(column_offset_ptr + key, mask=in_p, other=0.0)[None, :]
        new_max = tl.maximum(running_max, tl.max(tl.where(in_p[None, :], logits, float("-inf")), 1))
        above = logits - new_max[:, None]
        weights = tl.where(in_p[None, :], tl.exp(above), 0.0)
        total = total * tl.exp(running_max - new_max) + tl.sum(weights, 1)
        if KIND == SOFT:
            if CHUNK == 0:
                keys = load_tile(teacher_weight_ptr, key, in_p, column, stride_teacher_weight_p, E).to(OPERAND)
                exponents = tl.dot(teacher, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC_DTYPE)
            else:
                exponents = dot_in_chunks(
                    teacher_ptr, target_row, in_m, stride_teacher_m,
                    teacher_weight_ptr, key, in_p, stride_teacher_weight_p, E,
                    OPERAND, ACC_DTYPE, PRECISION, CHUNK,
                )  # fmt: skip
            column_offset = tl.load(column_offset_ptr + key, mask=in_p, other=float("-inf"))
            exponents = (exponents * teacher_scale + column_offset[None, :]) + row_offset[:, None]
            targets = tl.exp(exponents)
        if KIND == HARD:
            targets = tl.where(key[None, :] == target_row[:, None], 1.0, 0.0).to(ACC_DTYPE)
        if KIND != NONE:
            cross += mass * (running_max - new_max) + tl.sum(targets * tl.where(in_p[None, :], above, 0.0), 1)
            mass += tl.sum(targets, 1)
        running_max = new_max

    partial = part.to(tl.int64) * R + pair
    tl.store(max_ptr + partial, running_max, mask=in_r)
    tl.store(sum_ptr + partial, total, mask=in_r)
    if KIND != NONE:
        tl.store(mass_ptr + partial, mass, mask=in_r)
        tl.store(cross_ptr + partial, cross, mask=in_r)


@triton.jit
def _pair_numbers(
    pair,  # [BLOCK]
    R,
    G: tl.constexpr,
    rows_ptr,  # [R] int64
    lse_ptr,  # [2, N]
    softmax_factor_ptr,  # [R]
    target_factor_ptr,  # [R]
    row_offset_ptr,  # [M] for SOFT
    unit,
    KIND: tl.constexpr,
):
    """(student, teacher or target, −1 for none, its offset, two parts of the log-sum-exp, two factors) of pairs."""
    in_r = pair < R
    student = pair // G
    target_row = tl.load(rows_ptr + pair, mask=in_r, other=-1)
    if KIND == SOFT:
        row_offset = tl.load(row_offset_ptr + target_row, mask=in_r & (target_row >= 0), other=float("-inf"))
    else:
        row_offset = 0.0
    shift = tl.load(lse_ptr + student, mask=in_r, other=0.0)
    rest = tl.load(lse_ptr + R // G + student, mask=in_r, other=0.0)
    softmax_factor = tl.load(softmax_factor_ptr + pair, mask=in_r, other=0.0) / unit
    target_factor = tl.load(target_factor_ptr + pair, mask=in_r, other=0.0) / unit
    return student, target_row, row_offset, shift, rest, softmax_factor, target_factor


@triton.jit
def soft_cross_entropy_bwd_kernel(
    block_ptr,  # [·, D], rows contiguous: the matrix whose gradient is computed, students or prototypes
    stream_ptr,  # [·, D], rows contiguous: the other one
    tau_ptr,  # one value
    block_teacher_ptr,  # [·, E] for SOFT, rows contiguous: teachers, or their prototypes where block_ptr has those
    stream_teacher_ptr,  # [·, E] for SOFT, rows contiguous
    teacher_tau_ptr,  # one value, for SOFT
    row_offset_ptr,  # [M] for SOFT
    column_offset_ptr,  # [P] for SOFT
    rows_ptr,  # [R] int64: the teacher of each pair for SOFT, −1 for none; the target of each row for HARD
    lse_ptr,  # [2, N], shift and rest
    softmax_factor_ptr,  # [R]: gradient of the loss times the pair's mass
    target_factor_ptr,  # [R]: gradient of the loss
    unit_ptr,  # one value, by which weights are divided before they are rounded to 16 bits
    gradient_ptr,  # [parts, R or P, D], written
    R,  # N · G pairs
    P,
    D,
    E,
    tiles_per_part,
    stride_block,
    stride_stream,
    stride_block_teacher,
    stride_stream_teacher,
    G: tl.constexpr,  # pairs of a student
    KIND: tl.constexpr,
    OF_WEIGHT: tl.constexpr,  # the gradient of the prototypes, not of the students
    CHUNK: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of BLOCK_B rows through one part of the other matrix."""
    part = tl.program_id(1)
    index = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    pair_axis: tl.constexpr = 0 if OF_WEIGHT else 1
    rows = P if OF_WEIGHT else R
    others = R if OF_WEIGHT else P
    in_block = index < rows
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    scale = 1 / tl.load(tau_ptr).to(ACC_DTYPE)
    unit = tl.load(unit_ptr).to(ACC_DTYPE)
    row, teacher_row = index, index
    if not OF_WEIGHT:
        row, teacher_row, offset, shift, rest, softmax_factor, target_factor = _pair_numbers(
            index, R, G, rows_ptr, lse_ptr, softmax_factor_ptr, target_factor_ptr, row_offset_ptr, unit, KIND
        )
    elif KIND == SOFT:
        offset = tl.load(column_offset_ptr + index, mask=in_block, other=float("-inf"))
    in_teacher = in_block & (teacher_row >= 0)
    if KIND == SOFT:
        teacher_scale = 1 / tl.load(teacher_tau_ptr).to(ACC_DTYPE)
    if CHUNK == 0:
        block = load_tile(block_ptr, row, in_block, column, stride_block, D).to(OPERAND)
        if KIND == SOFT:
            teacher = load_tile(block_teacher_ptr, teacher_row, in_teacher, column, stride_block_teacher, E).to(OPERAND)
    gradient = tl.zeros([BLOCK_B, BLOCK_D], ACC_DTYPE)
    for tile in range(part * tiles_per_part, tl.minimum((part + 1) * tiles_per_part, tl.cdiv(others, BLOCK_K))):
        other = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        in_stream = other < others
        key, teacher_key = other, other
        if OF_WEIGHT:
            key, teacher_key, key_offset, shift, rest, softmax_factor, target_factor = _pair_numbers(
                other, R, G, rows_ptr, lse_ptr, softmax_factor_ptr, target_factor_ptr, row_offset_ptr, unit, KIND
            )
        elif KIND == SOFT:
            key_offset = tl.load(column_offset_ptr + other, mask=in_stream, other=float("-inf"))
        keys = load_tile(stream_ptr, key, in_stream, column, stride_stream, D).to(OPERAND)
        if CHUNK == 0:
            logits = tl.dot(block, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC_DTYPE)
        else:
            logits = dot_in_chunks(
                block_ptr, row, in_block, stride_block, stream_ptr, key, in_stream, stride_stream, D,
                OPERAND, ACC_DTYPE, PRECISION, CHUNK,
            )  # fmt: skip
        logits *= scale  # [BLOCK_B, BLOCK_K]
        weights = tl.exp((logits - tl.expand_dims(shift, pair_axis)) - tl.expand_dims(rest, pair_axis))
        weights *= tl.expand_dims(softmax_factor, pair_axis)
        subtracted = tl.expand_dims(target_factor, pair_axis)
        if KIND == SOFT:
            in_keys = in_stream & (teacher_key >= 0)
            if CHUNK == 0:
                teacher_keys = load_tile(stream_teacher_ptr, teacher_key, in_keys, column, stride_stream_teacher, E)
                exponents = tl.dot(
                    teacher, tl.trans(teacher_keys.to(OPERAND)), input_precision=PRECISION, out_dtype=ACC_DTYPE
                )
            else:
                exponents = dot_in_chunks(
                    block_teacher_ptr, teacher_row, in_teacher, stride_block_teacher,
                    stream_teacher_ptr, teacher_key, in_keys, stride_stream_teacher, E,
                    OPERAND, ACC_DTYPE, PRECISION, CHUNK,
                )  # fmt: skip
            # In the order of the forward kernel, so that a target is the same number in its mass.
            if OF_WEIGHT:
                exponents = (exponents * teacher_scale + offset[:, None]) + key_offset[None, :]
            else:
                exponents = (exponents * teacher_scale + key_offset[None, :]) + offset[:, None]
            weights -= tl.exp(exponents) * subtracted
        else:
            weights -= tl.where(teacher_row[:, None] == teacher_key[None, :], subtracted, 0.0)
        weights = tl.where(in_stream[None, :], weights, 0.0)
        gradient = tl.dot(weights.to(OPERAND), keys, gradient, input_precision=PRECISION, out_dtype=ACC_DTYPE)
    partial = part.to(tl.int64) * rows + index
    mask = in_block[:, None] & (column < D)[None, :]
    tl.store(gradient_ptr + partial[:, None] * D + column[None, :], gradient * (unit * scale), mask=mask)


def prototype_lse(x: Tensor, weight: Tensor, tau: Tensor, offset: Tensor | None, dim: int) -> Tensor:
    if dim == 0:
        x, weight = weight, x
    shift, total, _, _ = _launch_forward(x, weight, tau, None, None, offset)
    return shift + total.log()


def soft_cross_entropy_fwd(
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
    N, pairs = student.shape[0], _pairs(student, rows)
    G = pairs.numel() // max(1, N)
    if pairs.numel() == 0:
        nothing = student.new_zeros(N, dtype=acc_dtype(student.dtype))
        return nothing, nothing.new_zeros(2, N), nothing.clone()
    targets = teacher, teacher_weight, teacher_tau, row_offset
    shift, total, mass, cross = _launch_forward(student, weight, tau, targets, pairs, column_offset)
    rest = total.log()
    loss, lse = mass * rest - cross, torch.stack([shift.view(N, G)[:, 0], rest.view(N, G)[:, 0]])
    return loss.view(N, G).sum(1), lse, mass.view(N, G).sum(1)


def soft_cross_entropy_bwd(
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
    pairs = _pairs(student, rows)
    N = student.shape[0]
    has_teacher = (pairs >= 0).view(N, pairs.numel() // max(1, N)).to(lse.dtype)
    # A student's softmax is shared among its pairs, so that each subtracts its targets from about its own part.
    mass = (mass / has_teacher.sum(1).clamp(min=1))[:, None] * has_teacher
    targets = teacher, teacher_weight, teacher_tau, row_offset, column_offset
    needs = needs_student, needs_weight
    return _launch_backward(dloss, student, weight, tau, targets, pairs, lse, mass.flatten(), needs)


def linear_cross_entropy_fwd(x: Tensor, weight: Tensor, tau: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    shift, total, mass, cross = _launch_forward(x, weight, tau, None, target.contiguous(), None)
    return mass * total.log() - cross, torch.stack([shift, total.log()])


def linear_cross_entropy_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    tau: Tensor,
    target: Tensor,
    lse: Tensor,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    used = (target != IGNORED).to(lse.dtype)
    return _launch_backward(dloss, x, weight, tau, None, target.contiguous(), lse, used, (needs_x, needs_weight))


def _pairs(student: Tensor, rows: Tensor | None) -> Tensor:
    """The teacher of each pair: all pairs of the first student, then those of the second, …"""
    return torch.arange(len(student), device=student.device) if rows is None else rows.flatten()


def _launch_forward(
    x: Tensor,
    weight: Tensor,
    tau: Tensor,
    targets: tuple[Tensor, ...] | None,
    pairs: Tensor | None,
    column_offset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(shift, sum, mass, cross) of each pair; the last two are empty without targets."""
    (N, D), P, dtype = x.shape, weight.shape[0], acc_dtype(x.dtype)
    kind = SOFT if targets else NONE if pairs is None else HARD
    R = N if pairs is None else pairs.numel()
    x, weight = contiguous_rows(x), contiguous_rows(weight)
    teacher, teacher_weight, teacher_tau, row_offset = targets or (x, weight, tau, tau)
    teacher, teacher_weight = contiguous_rows(teacher), contiguous_rows(teacher_weight)
    E = teacher.shape[1]
    launch_plan = forward_plan(R, P, max(D, E), x.element_size(), card(x))
    blocks, parts, _ = launch_plan.grid
    largest, total = x.new_empty(parts, R, dtype=dtype), x.new_empty(parts, R, dtype=dtype)
    mass, cross = (x.new_empty((parts, R) if kind.value else 0, dtype=dtype) for _ in range(2))
    if R:
        prototype_lse_fwd_kernel[(blocks, parts, 1)](
            x,
            weight,
            tau,
            teacher,
            teacher_weight,
            teacher_tau,
            row_offset,
            tau if column_offset is None else column_offset,
            tau if pairs is None else pairs,
            largest,
            total,
            mass,
            cross,
            R,
            P,
            D,
            E,
            launch_plan.tiles_per_part,
            x.stride(0),
            weight.stride(0),
            teacher.stride(0),
            teacher_weight.stride(0),
            G=max(1, R // max(1, N)),
            KIND=kind.value,
            HAS_OFFSET=kind.value == 0 and column_offset is not None,
            **launch_plan.options(x.dtype, dtype),
        )
    return _combined(largest, total, mass, cross)


def _combined(largest: Tensor, total: Tensor, mass: Tensor, cross: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums of all parts [parts, R], relative to the largest logit of all."""
    if len(largest) == 1:
        return largest[0], total[0], *(x[0] if x.numel() else x for x in (mass, cross))
    shift = largest.amax(0)
    below = largest - shift
    total = (total * below.exp()).sum(0)
    return shift, total, *((mass.sum(0), (cross + mass * below).sum(0)) if mass.numel() else (mass, cross))


def _launch_backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    tau: Tensor,
    targets: tuple[Tensor, ...] | None,
    pairs: Tensor,
    lse: Tensor,
    mass: Tensor,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """(dx, dweight); mass [R] is that of each pair."""
    (N, D), P, R = x.shape, weight.shape[0], pairs.numel()
    x, weight, kind = contiguous_rows(x), contiguous_rows(weight), SOFT if targets else HARD
    teacher, teacher_weight, teacher_tau, row_offset, column_offset = targets or (x, weight, tau, tau, tau)
    teacher, teacher_weight = contiguous_rows(teacher), contiguous_rows(teacher_weight)
    E, G = teacher.shape[1], R // max(1, N)
    target_factor = dloss.to(lse.dtype).repeat_interleave(G) if G != 1 else dloss.to(lse.dtype).contiguous()
    target_factor = target_factor * (mass > 0) if kind.value == HARD.value else target_factor
    softmax_factor = mass * target_factor
    # A gradient may lie outside float16's range: there `unit` brings the largest to 256.
    in_float16 = x.dtype == torch.float16 and R > 0
    unit = (softmax_factor.abs().max() / 256).clamp(min=1e-30) if in_float16 else lse.new_ones(())

    def gradient(
        block: Tensor, stream: Tensor, block_teacher: Tensor, stream_teacher: Tensor, of_weight: bool
    ) -> Tensor:
        rows, others = (P, R) if of_weight else (R, P)
        launch_plan = backward_plan(rows, others, max(D, E), x.element_size(), card(x))
        blocks, parts, _ = launch_plan.grid
        partial = x.new_empty(parts, rows, D, dtype=lse.dtype)
        if rows and D:
            soft_cross_entropy_bwd_kernel[(blocks, parts, triton.cdiv(D, launch_plan.block_d))](
                block,
                stream,
                tau,
                block_teacher,
                stream_teacher,
                teacher_tau,
                row_offset,
                column_offset,
                pairs,
                lse,
                softmax_factor,
                target_factor,
                unit,
                partial,
                R,
                P,
                D,
                E,
                launch_plan.tiles_per_part,
                block.stride(0),
                stream.stride(0),
                block_teacher.stride(0),
                stream_teacher.stride(0),
                G=max(1, G),
                KIND=kind.value,
                OF_WEIGHT=of_weight,
                **launch_plan.options(x.dtype, lse.dtype),
            )
        return partial[0] if parts == 1 else partial.sum(0)

    dx = dweight = lse.new_empty(0)
    if needs[0]:
        dx = gradient(x, weight, teacher, teacher_weight, False).view(N, G, D).sum(1) if R else lse.new_zeros(N, D)
    if needs[1]:
        dweight = gradient(weight, x, teacher_weight, teacher, True)
    return dx, dweight
