"""Optimizers of the papers.

All of them leave everything as it is where the tensor `found_inf`, which the trainer sets on them, is 1: a step whose
gradient is not finite is skipped on the device, and the host need not wait to know. It is what torch's GradScaler asks
of fused optimizers.
"""

import torch
from torch import Tensor, nn

from .config import Training


def build_optimizer(method: nn.Module, training: Training) -> torch.optim.Optimizer:
    """The recipe's optimizer over all parameters that require a gradient, its learning rate still to be set."""
    trained = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    undecayed = [p for name, p in trained if not training.decay_all and (p.ndim <= 1 or name.endswith(".bias"))]
    ids = set(map(id, undecayed))
    groups = [
        {"params": [p for _, p in trained if id(p) not in ids], "weight_decay": training.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=training.betas, fused=True)
    kind = torch.optim.SGD if training.optimizer == "sgd" else LARS
    optimizer = kind(groups, lr=0.0, momentum=training.momentum, **({"fused": True} if kind is torch.optim.SGD else {}))
    for _, p in trained:  # torch's fused SGD would begin with memory as it finds it, were its first step skipped
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


class LARS(torch.optim.Optimizer):
    """SGD whose step on each matrix is scaled by ‖w‖ / ‖gradient + decay·w‖; vectors get neither decay nor scaling.

    v ← m·v + s·(g + λ·w), w ← w − lr·v, with s = trust·‖w‖ / ‖g + λ·w‖ (1 where a norm is zero).

    Source: You et al., "Large Batch Training of Convolutional Networks", 2017, in the form of MoCo v3's code.
    """

    _step_supports_amp_scaling = True  # see the head of this file

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.9, trust: float = 0.001):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        skip = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(p)
                    velocity = state["momentum_buffer"]
                    after = velocity * group["momentum"] + _lars_direction(p, group)
                    moved = p - group["lr"] * after
                    for x, new in ((velocity, after), (p, moved)):
                        x.copy_(new if skip is None else torch.where(skip > 0, x, new))
        return loss


def _lars_direction(p: Tensor, group: dict) -> Tensor:
    if p.ndim <= 1:
        return p.grad
    direction = p.grad.add(p, alpha=group["weight_decay"])
    p_norm, norm = p.norm(), direction.norm()
    scale = torch.where((p_norm > 0) & (norm > 0), group["trust"] * p_norm / norm, 1.0)  # no host sync
    return direction * scale
