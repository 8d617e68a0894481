"""Exponential moving average of parameters: the update of a momentum encoder."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version  # a kernel writes without autograd's knowledge

from . import check
from .dispatch import fake, op


def ema_update_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float, shadows: Sequence[Tensor] | None = None
) -> None:
    """Moves each target towards its source, in place: the momentum encoder's update.

    Equals, for each pair, ``t.lerp_(s.to(t.dtype), 1 - momentum)``, that is t ← m·t + (1 − m)·s, and then
    ``shadow.copy_(t)``.

    Args:
        targets: n tensors of any shape, float32 or float64 (see Raises), changed in place. Computed in their dtype.
        sources: n tensors of the same shapes and any floating dtype; not changed, no gradient.
        momentum: m in [0, 1]; MoCo's 0.999. A number, so that it is known before the step is launched.
        shadows: n tensors of the same shapes, usually bfloat16: low-precision copies written in the same pass, from
            which a momentum encoder can compute its keys without casting its weights again.

    Raises:
        ValueError: counts, shapes or devices differ, or momentum is outside [0, 1].
        TypeError: a target is bfloat16 or float16: 1.0 + 0.001·(2.0 − 1.0) rounds back to 1.0 there, so the average
            would never move.

    Memory: none beyond the arguments (on a GPU a table of their addresses, made when it meets new ones, for which the
        host waits once: keep the tensors from step to step). Layout: any strides; pairs stored in the same dense order
        are fastest.

    Source: He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2020, equation 2.
    """
    targets, sources = list(targets), list(sources)
    shadows = [] if shadows is None else list(shadows)
    for name, others in (("sources", sources), ("shadows", shadows)):
        if len(others) != len(targets) and (others or name == "sources"):
            check.fail("ema_update_", f"{name} must hold {len(targets)} tensors like targets, got {len(others)}")
    if not 0 <= momentum <= 1:
        check.fail("ema_update_", f"momentum must be between 0 and 1, got {momentum}")
    if targets:
        try:
            with torch.no_grad():
                _ema_update_(targets, sources, float(momentum), shadows)
        except RuntimeError:  # a kernel refuses lists that do not fit before it writes, without saying which and why
            _check_lists(targets, sources, shadows)
            raise
        increment_version([*targets, *shadows])


def _check_lists(targets: Sequence[Tensor], sources: Sequence[Tensor], shadows: Sequence[Tensor]) -> None:
    for i, target in enumerate(targets):
        if target.dtype not in (torch.float32, torch.float64):
            wanted = "float32 or float64 (steps of 1 - momentum vanish in 16 bits: keep float32 targets, pass shadows)"
            came = str(target.dtype).removeprefix("torch.")
            check.fail("ema_update_", f"targets[{i}] must be {wanted}, got {came}", TypeError)
        if target.device != targets[0].device:
            wanted = f"{targets[0].device} like targets[0] (call once a device)"
            check.fail("ema_update_", f"targets[{i}] must be on {wanted}, got {target.device}")
        for name, other in (("sources", sources[i]), *([("shadows", shadows[i])] if shadows else [])):
            if other.shape != target.shape:
                wanted, came = list(target.shape), list(other.shape)
                check.fail("ema_update_", f"{name}[{i}] must have shape {wanted} like targets[{i}], got {came}")
            check.floating("ema_update_", **{f"{name}[{i}]": other})
            check.same_device("ema_update_", **{f"targets[{i}]": target, f"{name}[{i}]": other})


@op("ema_update_", mutates_args=("targets", "shadows"))
def _ema_update_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float, shadows: Sequence[Tensor]
) -> None:
    _check_lists(targets, sources, shadows)
    torch._foreach_lerp_(targets, [s.to(t.dtype) for t, s in zip(targets, sources)], 1 - momentum)
    if shadows:
        torch._foreach_copy_(shadows, targets)


@fake(_ema_update_)
def _(targets, sources, momentum, shadows):
    pass
