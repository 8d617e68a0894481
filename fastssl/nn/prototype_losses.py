"""Self-distillation over prototypes: the losses of DINO, iBOT and DINOv2 on factored or multiplied-out logits.

The losses for `FactoredLogits` never store logits: see `ops.soft_cross_entropy`. Those for logits [N, K] are for heads
that give no others; they store targets and gradients.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastssl.distributed import all_mean
from fastssl.ops import check
from fastssl.ops.dispatch import acc_dtype, first_order, without_autocast
from fastssl.ops.prototypes import PrototypeTargets, prototype_lse, soft_cross_entropy

from .heads import FactoredLogits

CHUNK = 2**22  # elements of temporary tensors in losses of multiplied-out logits


class DINOLoss(nn.Module):
    """``loss = criterion(teacher_out, student_out, epoch=epoch)``. Replaces lightly's of the same name.

    Cross entropy between the softmax of the teacher's views, centred and sharpened, and that of the student's other
    views; a mean over all such pairs. The views are a list of logits [B, K] each, or the `FactoredLogits` of
    `DINOHead.factored` with the rows of all views, view by view: then no logits are stored.

    A call updates the centre after its use, over all ranks. `cross_entropy` and `update_center` are its two halves.

    Args:
        output_dim: K, the number of prototypes.
        warmup_teacher_temp: temperature of the teacher in the first epoch.
        teacher_temp: temperature of the teacher after the warm-up.
        warmup_teacher_temp_epochs: epochs over which it changes along a line; it is constant within an epoch.
        student_temp: temperature of the student.
        center_momentum: m of centre ← m·centre + (1 − m)·mean of the teacher's logits.
        center_mode: "mean", the only one, for calls that name it as lightly's do.
        teacher_views: number of views of the teacher, the first ones of the student's; of `FactoredLogits` alone.

    State dicts of lightly's, DINO's and DINOv2's loss load.

    Raises:
        ValueError: a number is out of range; by a call, views have other shapes than [B, K].
        TypeError: an argument has another type; by a call, logits are not floating.

    Source: Caron et al., 2021 (DINO), algorithm 1 and section 3.1, and its code.
    """

    center: Tensor

    def __init__(
        self,
        output_dim: int = 65536,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: float = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_mode: str = "mean",
        teacher_views: int = 2,
    ):
        super().__init__()
        _check_temperatures("DINOLoss", warmup_teacher_temp, teacher_temp, student_temp)
        _check_epochs("DINOLoss", "warmup_teacher_temp_epochs", warmup_teacher_temp_epochs)
        _check_centre("DINOLoss", output_dim, center_momentum, center_mode)
        self.warmup_teacher_temp, self.teacher_temp = warmup_teacher_temp, teacher_temp
        self.warmup_teacher_temp_epochs, self.student_temp = warmup_teacher_temp_epochs, student_temp
        self.center_momentum, self.teacher_views = center_momentum, teacher_views
        self.register_buffer("center", torch.zeros(1, output_dim))
        self.register_load_state_dict_pre_hook(_fit_centre)

    def forward(
        self,
        teacher_out: FactoredLogits | Sequence[Tensor],
        student_out: FactoredLogits | Sequence[Tensor],
        teacher_temp: float | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        """A scalar, float32 (float64 for float64), with gradient to the student.

        Args:
            teacher_out: logits of each of the teacher's views [B, K], or `FactoredLogits` of all.
            student_out: the same of the student's views, of which the first ones are the teacher's.
            teacher_temp: temperature of the teacher; None for that of `epoch`, or without it `self.teacher_temp`.
            epoch: number of finished epochs.
        """
        if teacher_temp is None:
            teacher_temp = self.teacher_temp if epoch is None else self.teacher_temp_at(epoch)
        loss = self.cross_entropy(teacher_out, student_out, teacher_temp)
        self.update_center(mean_logits(teacher_out))
        return loss

    def cross_entropy(
        self,
        teacher_out: FactoredLogits | Sequence[Tensor],
        student_out: FactoredLogits | Sequence[Tensor],
        teacher_temp: float | Tensor,
    ) -> Tensor:
        """The loss alone, which changes no state; arguments as in `forward`."""
        _check_temperatures("DINOLoss", teacher_temp)
        if isinstance(teacher_out, FactoredLogits) and isinstance(student_out, FactoredLogits):
            _check_prototypes("DINOLoss", self.center, teacher_out, student_out)
            targets = centred_targets(teacher_out, teacher_temp, self.center)
            return view_cross_entropy(student_out, targets, self.student_temp, self.teacher_views)
        if isinstance(teacher_out, FactoredLogits) or isinstance(student_out, FactoredLogits):
            raise ValueError("DINOLoss: teacher_out and student_out must both be FactoredLogits, or both be logits")
        return self._of_logits(teacher_out, student_out, teacher_temp)

    def _of_logits(self, teacher: Sequence[Tensor], student: Sequence[Tensor], teacher_temp: float | Tensor) -> Tensor:
        _check_logits("DINOLoss", self.center.numel(), teacher_out=teacher, student_out=student)
        _check_views("DINOLoss", len(teacher), len(student))
        targets = [_centred_softmax(logits, self.center, teacher_temp) for logits in teacher]
        total = targets[0] if len(targets) == 1 else torch.stack(targets).sum(0)
        losses = []
        for number, logits in enumerate(student):
            if number < len(targets) == 1:
                continue  # its own view is the only teacher's
            others = total - targets[number] if number < len(targets) else total
            losses.append(cross_entropy(logits, others, self.student_temp).mean())
        return torch.stack(losses).sum() / _pairs(len(teacher), len(student))

    @torch.no_grad()
    def update_center(self, teacher_out: Tensor) -> None:
        """Move the centre towards the mean of the teacher's logits [..., K], such as `mean_logits` gives, over ranks.

        Logits that are not finite leave it unchanged.
        """
        move_centre_(self.center, teacher_out, self.center_momentum)

    def teacher_temp_at(self, epoch: float) -> float:
        """Temperature of the teacher after `epoch` epochs."""
        _check_epochs("DINOLoss", "epoch", epoch)
        epoch, warmup = math.floor(epoch), self.warmup_teacher_temp_epochs
        if epoch >= warmup:
            return self.teacher_temp
        share = epoch / max(math.ceil(warmup) - 1, 1)
        return self.warmup_teacher_temp + share * (self.teacher_temp - self.warmup_teacher_temp)


class IBOTPatchLoss(nn.Module):
    """``loss = criterion(teacher_out, student_out, mask)``. Replaces lightly's of the same name.

    Cross entropy between the teacher's and the student's softmax of masked patches alone: a mean over the masked
    patches of an image, then over all images, of which those without masked patches count 0. This is the loss of iBOT
    and of DINOv2; their centres differ: the mean over all patches in iBOT, over the masked ones in DINOv2, lightly and
    here. `cross_entropy` and `update_center` are the two halves of a call.

    Args:
        output_dim: K, the number of prototypes.
        teacher_temp: temperature of the teacher.
        student_temp: temperature of the student.
        center_mode: "mean", the only one, for calls that name it as lightly's do.
        center_momentum: m of centre ← m·centre + (1 − m)·mean of the teacher's logits.

    State dicts of lightly's and DINOv2's loss load.

    Raises:
        ValueError: a number is out of range; by a call, mask has another number of patches than there are rows, or
            rows have other shapes than [M, K].
        TypeError: an argument has another type; by a call, logits are not floating.

    Source: Zhou et al., 2022 (iBOT), equation 2; Oquab et al., 2024 (DINOv2), section 4, and their code.
    """

    center: Tensor

    def __init__(
        self,
        output_dim: int = 65536,
        teacher_temp: float = 0.04,
        student_temp: float = 0.1,
        center_mode: str = "mean",
        center_momentum: float = 0.9,
    ):
        super().__init__()
        _check_temperatures("IBOTPatchLoss", teacher_temp, student_temp)
        _check_centre("IBOTPatchLoss", output_dim, center_momentum, center_mode)
        self.teacher_temp, self.student_temp, self.center_momentum = teacher_temp, student_temp, center_momentum
        self.register_buffer("center", torch.zeros(1, output_dim))
        self.register_load_state_dict_pre_hook(_fit_centre)

    def forward(
        self,
        teacher_out: FactoredLogits | Tensor,
        student_out: FactoredLogits | Tensor,
        mask: Tensor,
        teacher_temp: float | None = None,
    ) -> Tensor:
        """A scalar, float32 (float64 for float64), with gradient to the student.

        Args:
            teacher_out: logits of the masked patches [M, K], image by image, or their `FactoredLogits`.
            student_out: the same of the student.
            mask: [B, H, W] or [B, L] bool, True for the M masked patches.
            teacher_temp: temperature of the teacher; None for `self.teacher_temp`.
        """
        rows = teacher_out.features if isinstance(teacher_out, FactoredLogits) else teacher_out
        check.is_tensor("IBOTPatchLoss", "teacher_out", rows)
        weights = patch_weights(mask, acc_dtype(rows))
        if rows.shape[0] != weights.shape[0]:
            check.fail(
                "IBOTPatchLoss", f"teacher_out must have the {weights.shape[0]} rows of mask, got {rows.shape[0]}"
            )
        loss = self.cross_entropy(teacher_out, student_out, weights, teacher_temp) / mask.shape[0]
        self.update_center(mean_logits(teacher_out))
        return loss

    def cross_entropy(
        self,
        teacher_out: FactoredLogits | Tensor,
        student_out: FactoredLogits | Tensor,
        weights: Tensor,
        teacher_temp: float | Tensor | None = None,
    ) -> Tensor:
        """The sum over patches of their weights [M] times their losses; changes no state.

        Weights are those of `patch_weights`; 0 for rows that only fill a tensor up. Divide by the number of images.
        """
        temp = self.teacher_temp if teacher_temp is None else teacher_temp
        _check_temperatures("IBOTPatchLoss", temp)
        if isinstance(teacher_out, FactoredLogits) and isinstance(student_out, FactoredLogits):
            _check_prototypes("IBOTPatchLoss", self.center, teacher_out, student_out)
            targets = centred_targets(teacher_out, temp, self.center)
            losses = soft_cross_entropy(*student_out, self.student_temp, targets)
        elif isinstance(teacher_out, FactoredLogits) or isinstance(student_out, FactoredLogits):
            raise ValueError("IBOTPatchLoss: teacher_out and student_out must both be FactoredLogits, or both logits")
        else:
            sizes = {"M": weights.shape[0], "K": self.center.numel()}
            for name, logits in (("teacher_out", teacher_out), ("student_out", student_out)):
                check.tensor("IBOTPatchLoss", name, logits, "M K", **sizes)
                check.floating("IBOTPatchLoss", **{name: logits})
            losses = cross_entropy(student_out, _centred_softmax(teacher_out, self.center, temp), self.student_temp)
        return (losses * weights.to(losses.dtype)).sum()

    @torch.no_grad()
    def update_center(self, teacher_out: Tensor) -> None:
        """Move the centre towards the mean of the teacher's logits [..., K], as `DINOLoss.update_center`."""
        move_centre_(self.center, teacher_out, self.center_momentum)


# Parts of losses on factored logits


def centred_targets(teacher: FactoredLogits, tau: float | Tensor, centre: Tensor) -> PrototypeTargets:
    """Targets softmax((logits − centre) / tau) of the teacher, as `ops.soft_cross_entropy` takes them.

    Args:
        teacher: M rows and K prototypes.
        tau: temperature, a number or a tensor with one element.
        centre: [..., K] with K elements.
    """
    features, prototypes = (x.detach() for x in teacher)
    with torch.no_grad():
        column_offset = -centre.flatten() / tau
        row_offset = -prototype_lse(features, prototypes, tau, column_offset)
    return PrototypeTargets(features, prototypes, tau, row_offset, column_offset)


def view_cross_entropy(student: FactoredLogits, targets: PrototypeTargets, tau: float, teacher_views: int) -> Tensor:
    """Mean cross entropy over all pairs of a teacher's view and another view of the student, of the same image.

    Args:
        student: rows of V views [V·B, D], view by view; the first views are the teacher's.
        targets: rows of the teacher's views [T·B, E], view by view.
        tau: temperature of the student.
        teacher_views: T.

    Raises:
        ValueError: the numbers of rows do not fit, or there is no pair of different views.
    """
    name, rows, teacher_rows = "view_cross_entropy", student.features.shape[0], targets.teacher.shape[0]
    batch = teacher_rows // teacher_views
    if not batch or teacher_rows % teacher_views or rows % batch:
        expected = (
            f"student and teacher must have the rows of whole views of B = {teacher_rows} / {teacher_views} images"
        )
        check.fail(name, f"{expected}, got {rows} and {teacher_rows} rows")
    views = rows // batch
    _check_views(name, teacher_views, views)
    others = _teachers_of_views(views, teacher_views, batch, student.features.device)
    return soft_cross_entropy(*student, tau, targets, others).sum() / (_pairs(teacher_views, views) * batch)


def _teachers_of_views(views: int, teacher_views: int, batch: int, device: torch.device) -> Tensor:
    """[V·B, T] int64: rows of the same image in the teacher's views; −1 for the view itself."""
    view, image, teacher = (torch.arange(n, device=device) for n in (views, batch, teacher_views))
    rows = (image[:, None] + teacher * batch).expand(views, batch, teacher_views)
    return rows.masked_fill((view[:, None] == teacher)[:, None], -1).flatten(0, 1)


def _check_views(name: str, teacher_views: int, views: int) -> None:
    if not 1 <= teacher_views <= views or views < 2:
        expected = "there must be at least two views of the student, of which the teacher's are the first"
        check.fail(name, f"{expected}, got {views} of the student and {teacher_views} of the teacher")


def _pairs(teacher_views: int, views: int) -> int:
    """Number of pairs of a teacher's view and another view of the student."""
    return teacher_views * (views - 1)


def patch_weights(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight of each masked patch [M], image by image: 1 / number of masked patches of its image.

    Args:
        mask: [B, …] bool.
        dtype: dtype of the weights.
    """
    check.is_tensor("patch_weights", "mask", mask)
    if mask.dtype != torch.bool or mask.ndim < 2:
        got = f"{list(mask.shape)} of {mask.dtype}"
        check.fail("patch_weights", f"mask must be bool of shape [B, H, W] or [B, L], got {got}")
    mask = mask.flatten(1)
    return mask.sum(1, keepdim=True, dtype=dtype).clamp(min=1).reciprocal().expand_as(mask)[mask]


@torch.no_grad()
def mean_logits(logits: FactoredLogits | Tensor | Sequence[Tensor]) -> Tensor:
    """The mean of logits over all rows [K], of `FactoredLogits` by one product of a vector."""
    if isinstance(logits, FactoredLogits):
        features, prototypes = logits
        acc = acc_dtype(features)
        with without_autocast(features):
            return prototypes.to(acc) @ features.to(acc).mean(0)
    if isinstance(logits, Tensor):
        return logits.flatten(0, -2).mean(0, dtype=acc_dtype(logits))
    return torch.stack([mean_logits(view) for view in logits]).mean(0)


@torch.no_grad()
def move_centre_(centre: Tensor, logits: Tensor, momentum: float) -> None:
    """centre ← momentum · centre + (1 − momentum) · mean over rows and ranks, in place.

    Ranks must have the same number of rows. A mean that is not finite leaves the centre unchanged.

    Args:
        centre: K elements.
        logits: [..., K].
        momentum: m.
    """
    mean = all_mean(mean_logits(logits if logits.ndim > 1 else logits[None])).view_as(centre).to(centre.dtype)
    moved = momentum * centre + (1 - momentum) * mean
    centre.copy_(torch.where(moved.isfinite().all(), moved, centre))


@torch.no_grad()
def teacher_entropy(targets: PrototypeTargets, rows_at_once: int = 32) -> Tensor:
    """Mean entropy of the teacher's targets, a scalar: 0 or ln K is the sign of a collapse.

    The logits of `rows_at_once` rows exist at a time.
    """
    teacher, weight, tau, row_offset, column_offset = targets
    acc = row_offset.dtype
    total = row_offset.new_zeros(())
    with without_autocast(teacher):
        for features, offset in zip(teacher.split(rows_at_once), row_offset.split(rows_at_once)):
            log_p = (features.to(acc) @ weight.to(acc).T / tau).add_(column_offset).add_(offset[:, None])
            total = total - (log_p.exp() * log_p).sum()
    return total / teacher.shape[0]


# Losses of multiplied-out logits


def cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0, bw_inplace: bool = False) -> Tensor:
    """Cross entropy of logits against soft targets: the function that DINOv2's code imports from xformers.

    Equals ``−(teacher * (student / temperature).log_softmax(-1)).sum(-1)``. No log-softmax is stored: the backward pass
    computes the softmax again, in pieces. In DINOv2's repository `from fastssl.nn import cross_entropy` replaces
    `from xformers.ops import cross_entropy`, which xformers does not have.

    Args:
        student: [..., K] floating, logits. Gradient.
        teacher: [..., K] floating, targets, which need not sum to one; no gradient.
        temperature: divides the logits, > 0.
        bw_inplace: the backward pass writes the gradient over `student`, which must not be used afterwards.

    Returns: [...], float32 (float64 for float64).

    Raises:
        ValueError: shapes or devices differ, temperature is not positive, or teacher requires a gradient.
        TypeError: a tensor is not floating.
    """
    check.is_tensor("cross_entropy", "student", student)
    check.is_tensor("cross_entropy", "teacher", teacher)
    if student.ndim < 1 or student.shape != teacher.shape or not student.shape[-1]:
        shapes = f"got {list(student.shape)} and {list(teacher.shape)}"
        check.fail("cross_entropy", f"student and teacher must have one shape [..., K], {shapes}")
    check.floating("cross_entropy", student=student, teacher=teacher)
    check.same_device("cross_entropy", student=student, teacher=teacher)
    if teacher.requires_grad:
        check.fail("cross_entropy", "teacher must not require a gradient: pass teacher.detach()")
    _check_temperatures("cross_entropy", temperature)
    return _LogitsCrossEntropy.apply(student, teacher, temperature, bw_inplace)


class _LogitsCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, temperature, inplace):
        rows, targets = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, student.shape[-1])
        acc = torch.promote_types(acc_dtype(student), acc_dtype(teacher))
        lse, mass, cross = (rows.new_empty(rows.shape[0], dtype=acc) for _ in range(3))
        for part in _pieces(rows):
            logits, target = rows[part].to(acc) / temperature, targets[part].to(acc)
            lse[part], mass[part], cross[part] = logits.logsumexp(1), target.sum(1), (target * logits).sum(1)
        ctx.temperature, ctx.inplace = temperature, inplace
        ctx.save_for_backward(student, teacher, lse, mass)
        return (mass * lse - cross).view(student.shape[:-1])

    @staticmethod
    @first_order("cross_entropy")
    def backward(ctx, dloss):
        student, teacher, lse, mass = ctx.saved_tensors
        rows, targets = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, student.shape[-1])
        gradient = rows if ctx.inplace else torch.empty_like(rows)
        dloss = dloss.reshape(-1).to(lse.dtype) / ctx.temperature
        for part in _pieces(rows):
            softmax = (rows[part].to(lse.dtype) / ctx.temperature - lse[part, None]).exp_()
            softmax.mul_(mass[part, None]).sub_(targets[part]).mul_(dloss[part, None])
            gradient[part] = softmax.to(gradient.dtype)
        return gradient.view(student.shape), None, None, None


def _pieces(rows: Tensor) -> list[slice]:
    """Slices of the rows [N, K] with at most `CHUNK` elements, of at least a row."""
    length = max(1, CHUNK // max(1, rows.shape[1]))
    return [slice(start, start + length) for start in range(0, rows.shape[0], length)]


@torch.no_grad()
def _centred_softmax(logits: Tensor, centre: Tensor, tau: float | Tensor) -> Tensor:
    """softmax((logits − centre) / tau) of logits [N, K], float32 (float64 for float64)."""
    return ((logits.to(acc_dtype(logits)) - centre.flatten()) / tau).softmax(-1)


def _check_temperatures(name: str, *temperatures: float | Tensor) -> None:
    for value in temperatures:
        if isinstance(value, Tensor):
            continue  # it may be on a device, for which the host need not wait
        check.number(name, temperature=value)
        if not value > 0:
            check.fail(name, f"temperatures must be above 0, got {value}")


def _check_epochs(name: str, argument: str, epochs: float) -> None:
    check.number(name, **{argument: epochs})
    if not epochs >= 0:
        check.fail(name, f"{argument} must be at least 0, got {epochs}")


def _check_centre(name: str, output_dim: int, momentum: float, mode: str) -> None:
    check.integer(name, output_dim=output_dim)
    if output_dim < 1:
        check.fail(name, f"output_dim must be at least 1, got {output_dim}")
    if isinstance(momentum, str) or not 0 <= momentum <= 1:
        check.fail(name, f"center_momentum must be between 0 and 1, got {momentum}")
    if mode != "mean":
        check.fail(name, f"center_mode must be 'mean', got {mode!r}")


def _check_logits(name: str, prototypes: int, **arguments: Sequence[Tensor]) -> None:
    """Checks that all views of all arguments have logits of one shape [B, K]."""
    sizes = {"K": prototypes}
    for argument, views in arguments.items():
        if not isinstance(views, Sequence | Tensor):
            got = f"got {type(views).__name__}"
            check.fail(name, f"{argument} must be a list of the logits [B, K] of each view, {got}", TypeError)
        for number, logits in enumerate(views):
            check.tensor(name, f"{argument}[{number}]", logits, "B K", **sizes)
            check.floating(name, **{f"{argument}[{number}]": logits})
            sizes["B"] = logits.shape[0]


def _check_prototypes(name: str, centre: Tensor, *arguments: FactoredLogits) -> None:
    for logits in arguments:
        check.is_tensor(name, "prototypes", logits.prototypes)
        if logits.prototypes.shape[0] != centre.numel():
            got = f"got {logits.prototypes.shape[0]}"
            check.fail(name, f"FactoredLogits must have output_dim={centre.numel()} prototypes, {got}")


def _fit_centre(module: nn.Module, state: dict, prefix: str, *rest) -> None:
    """Takes the centre of others' losses: [1, 1, K], or in a module of its own as in lightly's `IBOTPatchLoss`."""
    name = f"{prefix}center"
    stored = state.pop(f"{name}.center", state.get(name))
    if stored is not None:
        fits = stored.numel() == module.center.numel()  # type: ignore[operator]
        state[name] = stored.reshape(module.center.shape) if fits else stored
