"""Gradient clipping parameter by parameter."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fastssl.distributed import all_sum


@torch.no_grad()
def clip_parameter_norms(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale down, in place, each parameter's gradient whose own norm exceeds `max_norm`.

    Equals, for each parameter, ``grad *= min(1, max_norm / (‖grad‖ + 1e-6))``. The host does not wait for the device.

    Args:
        parameters: parameters without a gradient are ignored; sharded ones (FSDP2) are clipped by the norm of the whole
            gradient, and all ranks must call together.
        max_norm: largest norm of a gradient.

    Source: Caron et al., 2021 (DINO), `clip_gradients` of its code.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    shards = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    norms = torch.stack(torch._foreach_norm(shards))
    if isinstance(gradients[0], DTensor):
        norms = all_sum(norms.square()).sqrt()
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(shards, list(factors.unbind()))
