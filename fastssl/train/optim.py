"""Optimizers of the papers.

The trainer sets their attribute `found_inf`, a tensor; where it is 1, a step leaves parameters and state unchanged. So
a step whose gradient is not finite is skipped on the device, without a wait of the host. This is the interface that
torch's GradScaler uses for fused optimizers.
"""

import difflib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .config import Training

Groups = Callable[[nn.Module], list[dict]]  # `parameter_groups` of a method's module


def build_optimizer(
    method: nn.Module, training: Training, parameter_groups: Groups | None = None
) -> torch.optim.Optimizer:
    """The optimizer of `training` over all parameters that require a gradient; its learning rate is still 0.

    Args:
        method: module whose parameters are optimized.
        training: optimizer, weight decay and momentum.
        parameter_groups: ``parameter_groups(method)`` returns the groups: dicts of "params" and, where they differ from
            1, "lr_scale" (factor of the learning rate) and "weight_decay_scale" (factor of the weight decay). The
            default has two groups: without weight decay all biases and parameters of one dimension, unless
            ``decay_all``; with weight decay the rest.

    Raises:
        ValueError: the groups leave out a parameter that requires a gradient.
    """
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    groups = parameter_groups(method) if parameter_groups else _default_groups(trained, training.decay_all)
    groups = [
        {"lr_scale": 1.0, "weight_decay_scale": 1.0, **group, "params": list(group["params"])} for group in groups
    ]
    grouped = {id(p) for group in groups for p in group["params"]}
    if missing := [name for name, p in trained.items() if id(p) not in grouped]:
        raise ValueError(
            f"train: parameter_groups must hold every parameter that requires a gradient, got none with {missing[0]}"
        )
    groups = [group for group in groups if group["params"]]
    for group in groups:
        group["weight_decay"] = training.weight_decay * group["weight_decay_scale"]
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=training.betas, fused=True)
    optimizer: torch.optim.Optimizer
    if training.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=training.momentum, fused=True)
    else:
        optimizer = LARS(groups, lr=0.0, momentum=training.momentum)
    for p in trained.values():  # a skipped first step of torch's fused SGD would leave momentum buffers uninitialised
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def _default_groups(trained: dict[str, nn.Parameter], decay_all: bool) -> list[dict]:
    decayed = {n: decay_all or (p.ndim > 1 and not n.endswith(".bias")) for n, p in trained.items()}
    return [
        {"params": [p for n, p in trained.items() if decayed[n]]},
        {"params": [p for n, p in trained.items() if not decayed[n]], "weight_decay_scale": 0.0},
    ]


def parameters_to_freeze(method: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
    """The trained parameters selected by `names`, the names of parameters or of modules.

    Raises:
        ValueError: a name selects no parameter, or together they select all trained ones.
    """
    named = dict(method.named_parameters())
    selected: dict[str, nn.Parameter] = {}
    for name in names:
        inside = {n: p for n, p in named.items() if n == name or n.startswith(f"{name}.")}
        if not inside:
            known = [*named, *(n for n, _ in method.named_modules() if n)]
            near = difflib.get_close_matches(name, known, n=3) or list(dict(method.named_children()))
            raise ValueError(
                f"train: --freeze must name parameters or modules of the method, got {name!r}: there are for instance "
                f"{', '.join(near)}"
            )
        selected |= {n: p for n, p in inside.items() if p.requires_grad}
    if selected and len(selected) == sum(p.requires_grad for p in named.values()):
        raise ValueError(f"train: --freeze must leave parameters to train, got {' '.join(names)}, which are all")
    return list(selected.values())


class LARS(torch.optim.Optimizer):
    """SGD whose step on each matrix is scaled by ‖w‖ / ‖gradient + decay·w‖; vectors get neither decay nor scaling.

    v ← m·v + s·(g + λ·w), w ← w − lr·v, with s = trust·‖w‖ / ‖g + λ·w‖ (1 where a norm is zero).

    Source: You et al., "Large Batch Training of Convolutional Networks", 2017, in the form of MoCo v3's code.
    """

    _step_supports_amp_scaling = True  # `found_inf` is respected: see the head of this file

    def __init__(
        self, params: Iterable, lr: float, weight_decay: float = 0.0, momentum: float = 0.9, trust: float = 0.001
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
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
                    v = state["momentum_buffer"]
                    new_v = v * group["momentum"] + _lars_direction(p, p.grad, group)
                    new_p = p - group["lr"] * new_v
                    for x, new in ((v, new_v), (p, new_p)):
                        x.copy_(new if skip is None else torch.where(skip > 0, x, new))
        return loss


def _lars_direction(p: Tensor, grad: Tensor, group: dict) -> Tensor:
    if p.ndim <= 1:
        return grad
    direction = grad.add(p, alpha=group["weight_decay"])
    p_norm, norm = p.norm(), direction.norm()
    scale = torch.where((p_norm > 0) & (norm > 0), group["trust"] * p_norm / norm, 1.0)  # without a host sync
    return direction * scale
