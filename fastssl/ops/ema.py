"""Exponential moving average of parameters: the update of a momentum encoder."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import check
from .dispatch import call_in_place, fake, op


def ema_update_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float, shadows: Sequence[Tensor] | None = None
) -> None:
    """Moves each target towards its source, in place: the update of a momentum encoder.

    Equals ``t.lerp_(s.to(t.dtype), 1 - momentum)`` for each target t and source s, that is t ← m·t + (1 − m)·s, and
    then ``shadow.copy_(t)``.

    Args:
        targets: n tensors of any shape, float32 or float64 (see Raises), changed in place. Computed in their dtype.
        sources: n tensors of the same shapes and any floating dtype; not changed, no gradient.
        momentum: m in [0, 1], a number; 0.999 in MoCo.
        shadows: n tensors of the same shapes, usually bfloat16: low-precision copies of the targets, written in the
            same pass, with which a momentum encoder can compute its keys without casting its weights again.

    Raises:
        ValueError: counts, shapes or devices differ, momentum is outside [0, 1], or a target or shadow shares memory
            with itself or another tensor (a target may be its own source).
        TypeError: a target is bfloat16 or float16: 1.0 + 0.001·(2.0 − 1.0) rounds to 1.0 there, so the average would
            never move.

    Memory: none beyond the arguments; on a GPU a table of their addresses. When an address changes, the table is made
        again and the host waits once for the GPU, so pass the same tensors at every step. Layout: any strides; pairs
        stored in the same dense order are fastest.

    Source: He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2020, equation 2.
    """
    for name, tensors in (("targets", targets), ("sources", sources), ("shadows", shadows)):
        if not isinstance(tensors, Iterable) and not (tensors is None and name == "shadows"):
            check.fail("ema_update_", f"{name} must be a list of tensors, got {type(tensors).__name__}", TypeError)
    targets, sources = list(targets), list(sources)
    shadows = [] if shadows is None else list(shadows)
    check.number("ema_update_", momentum=momentum)
    for name, tensors in (("sources", sources), ("shadows", shadows)):
        if len(tensors) != len(targets) and (tensors or name == "sources"):
            check.fail("ema_update_", f"{name} must hold {len(targets)} tensors like targets, got {len(tensors)}")
    if not 0 <= momentum <= 1:
        check.fail("ema_update_", f"momentum must be between 0 and 1, got {momentum}")
    if targets:
        try:
            call_in_place(_ema_update_, [*targets, *shadows], targets, sources, float(momentum), shadows)
        except RuntimeError:  # a kernel raises before it writes where lists do not fit, and does not name the tensor
            _check_lists(targets, sources, shadows)
            _check_memory(targets, sources, shadows)
            raise


def _check_lists(targets: Sequence[Tensor], sources: Sequence[Tensor], shadows: Sequence[Tensor]) -> None:
    for i, target in enumerate(targets):
        check.is_tensor("ema_update_", f"targets[{i}]", target)
        if target.dtype not in (torch.float32, torch.float64):
            expected = "float32 or float64 (an update vanishes in 16 bits: pass float32 targets, 16-bit shadows)"
            got = check.dtype_name(target.dtype)
            check.fail("ema_update_", f"targets[{i}] must be {expected}, got {got}", TypeError)
        if target.device != targets[0].device:
            device = targets[0].device
            message = f"targets[{i}] must be on {device} like targets[0], got {target.device}; call it once per device"
            check.fail("ema_update_", message)
        for name, tensor in (("sources", sources[i]), *([("shadows", shadows[i])] if shadows else [])):
            check.is_tensor("ema_update_", f"{name}[{i}]", tensor)
            if tensor.shape != target.shape:
                expected = f"{list(target.shape)} like targets[{i}]"
                check.fail("ema_update_", f"{name}[{i}] must have shape {expected}, got {list(tensor.shape)}")
            check.floating("ema_update_", **{f"{name}[{i}]": tensor})
            check.same_device("ema_update_", **{f"targets[{i}]": target, f"{name}[{i}]": tensor})


def _check_memory(targets: Sequence[Tensor], sources: Sequence[Tensor], shadows: Sequence[Tensor]) -> None:
    """A tensor that is written may share no memory with another one, because all are updated in parallel."""
    same = [t.data_ptr() == s.data_ptr() and t.stride() == s.stride() for t, s in zip(targets, sources)]
    written = {f"targets[{i}]": t for i, t in enumerate(targets)} | {f"shadows[{i}]": t for i, t in enumerate(shadows)}
    read = {f"sources[{i}]": s for i, s in enumerate(sources) if not (same[i] and s.dtype == targets[i].dtype)}
    check.separate("ema_update_", written, read)


@op("ema_update_", mutates_args=("targets", "shadows"))
def _ema_update_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float, shadows: Sequence[Tensor]
) -> None:
    _check_lists(targets, sources, shadows)
    _check_memory(targets, sources, shadows)
    torch._foreach_lerp_(list(targets), [s.to(t.dtype) for t, s in zip(targets, sources)], 1 - momentum)
    if shadows:
        torch._foreach_copy_(list(shadows), list(targets))


@fake(_ema_update_)
def _(targets, sources, momentum, shadows):
    _check_lists(targets, sources, shadows)  # torch comes here where any tensor of the lists is on the meta device
