"""Gradient clipping by the norm of each parameter, or of each part of a model."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fastssl.distributed import all_sum


@torch.no_grad()
def clip_parameter_norms(
    parameters: Sequence[nn.Parameter], max_norm: float, parts: Sequence[str | None] | None = None
) -> None:
    """Scale down, in place, each parameter's gradient whose own norm exceeds `max_norm`.

    Equals, for each parameter, ``grad *= min(1, max_norm / (‖grad‖ + 1e-6))``. The host does not wait for the device.

    Args:
        parameters: parameters without a gradient are ignored; sharded ones (FSDP2) are clipped by the norm of the whole
            gradient, and all ranks must call together.
        max_norm: largest norm of a gradient.
        parts: for each parameter the name of the part that it belongs to, whose gradients are scaled together by their
            joint norm; None for a parameter on its own.

    Source: Caron et al., 2021 (DINO), `clip_gradients` of its code; Oquab et al., 2024 (DINOv2), whose code clips
    backbone and heads apart.
    """
    named = [(p.grad, part) for p, part in zip(parameters, parts or [None] * len(parameters)) if p.grad is not None]
    if not named:
        return
    gradients = [gradient for gradient, _ in named]
    shards = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    norms = torch.stack(torch._foreach_norm(shards))
    if isinstance(gradients[0], DTensor):
        norms = all_sum(norms.square()).sqrt()
    if parts is not None and any(part is not None for _, part in named):
        squares: dict[str | int, list[torch.Tensor]] = {}
        owners = [i if part is None else part for i, (_, part) in enumerate(named)]
        for owner, norm in zip(owners, norms.unbind()):
            squares.setdefault(owner, []).append(norm.square())
        joint = {owner: torch.stack(terms).sum().sqrt() for owner, terms in squares.items()}
        norms = torch.stack([joint[owner] for owner in owners])
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(shards, list(factors.unbind()))
