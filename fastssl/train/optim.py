"""Optimizers of the papers.

The trainer sets their attribute `found_inf`, a tensor; where it is 1, a step leaves parameters and state unchanged. So
a step whose gradient is not finite is skipped on the device, without a wait of the host. This is the interface that
torch's GradScaler uses for fused optimizers.
"""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.sgd import sgd

from .config import Training

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # modules whose weights have no weight decay

Groups = Callable[[nn.Module], list[dict]]  # `parameter_groups` of a method's module


def build_optimizer(
    method: nn.Module, training: Training, parameter_groups: Groups | None = None
) -> torch.optim.Optimizer:
    """The optimizer of `training` over all parameters that require a gradient; its learning rate is still 0.

    Args:
        method: module whose parameters are optimized.
        training: optimizer, weight decay and momentum.
        parameter_groups: ``parameter_groups(method)`` returns the groups: dicts of "params" and, where they differ from
            1, "lr_scale" (factor of the learning rate) and "weight_decay_scale" (factor of the weight decay);
            "constant_lr": True keeps the peak learning rate without warm-up and schedule; "still_epochs": learning rate
            0 for so many epochs, in which the optimizer's moments grow; "part": a name, see `clip_parameter_norms`;
            "adapt" is that of `LARS`.
            The default has two groups: without weight decay, and for LARS without trust ratio, all biases, weights of
            normalisation layers and parameters of one dimension, unless ``decay_all``; the rest with both.

    Raises:
        ValueError: the groups leave out a parameter that requires a gradient.
    """
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    groups = parameter_groups(method) if parameter_groups else _default_groups(method, training.decay_all)
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
        return torch.optim.AdamW(groups, lr=0.0, betas=training.betas, eps=training.eps, fused=True)
    optimizer: torch.optim.Optimizer
    if training.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=training.momentum, fused=True)
    else:
        form = {"lr_in_momentum": training.optimizer == "lars_simclr", "larc": training.optimizer == "larc"}
        optimizer = LARS(groups, lr=0.0, momentum=training.momentum, **form)
    for p in trained.values():  # a skipped first step of torch's fused SGD would leave momentum buffers uninitialised
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def _default_groups(method: nn.Module, decay_all: bool) -> list[dict]:
    norms = {id(p) for m in method.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    groups: tuple[list, list] = [], []
    for name, p in method.named_parameters():
        if p.requires_grad:
            exempt = p.ndim <= 1 or name.endswith(".bias") or id(p) in norms
            groups[exempt and not decay_all].append(p)
    return [{"params": groups[0], "adapt": True}, {"params": groups[1], "adapt": False, "weight_decay_scale": 0.0}]


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
    """SGD whose step on each tensor is scaled by ‖w‖ / ‖gradient + λ·w‖, in the three forms of published code.

    With gradient g, weight decay λ, momentum coefficient m and trust coefficient η:

    - by default, as BYOL, Barlow Twins, VICReg, DINO and MoCo v3:
      v ← m·v + s·(g + λ·w), w ← w − lr·v, with s = η·‖w‖ / ‖g + λ·w‖, or 1 where a norm is zero;
    - with `lr_in_momentum`, as SimCLR: v ← m·v + lr·s·(g + λ·w), w ← w − v;
    - with `larc`, as apex's LARC around SGD without clipping (SwAV, linear probes of SimSiam): the first form with
      s = η·‖w‖ / (‖g‖ + λ·‖w‖ + 1e-8); where ‖w‖ or ‖g‖ is zero, neither scaling nor weight decay.

    Args:
        params: parameters or groups. The group's "adapt" says whether its tensors are scaled and decayed; others take
            g as it is. Without it those of more than one dimension are, with `larc` all.
        lr: learning rate.
        weight_decay: λ.
        momentum: m.
        trust: η.
        lr_in_momentum: form of SimCLR.
        larc: form of LARC.

    Raises:
        ValueError: both forms are asked for.

    Source: You et al., "Large Batch Training of Convolutional Networks", 2017, algorithm 1.
    """

    _step_supports_amp_scaling = True  # `found_inf` is respected: see the head of this file

    def __init__(
        self,
        params: Iterable,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
        *,
        lr_in_momentum: bool = False,
        larc: bool = False,
    ):
        if lr_in_momentum and larc:
            raise ValueError("LARS: lr_in_momentum must be False with larc, got True: choose one form")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})
        self.lr_in_momentum, self.larc = lr_in_momentum, larc

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            default = group.get("adapt")
            adapted: list[Tensor] = []
            plain: list[Tensor] = []
            for p in group["params"]:
                if p.grad is not None:
                    adapt = (self.larc or p.ndim > 1) if default is None else default
                    (adapted if adapt else plain).append(p)
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            if adapted:
                self._update(adapted, self._directions(adapted, group), group)
            if plain:
                self._update(plain, _gradients(plain), group)
        return loss

    def _directions(self, params: list[Tensor], group: dict) -> list[Tensor]:
        """s·(g + λ·w) of each tensor, in its memory format, without a wait of the host."""
        grads, decay, trust = _gradients(params), group["weight_decay"], group["trust"]
        p_norm = torch.stack(torch._foreach_norm(params))
        if self.larc:
            norm = torch.stack(torch._foreach_norm(grads))
            applies = (p_norm > 0) & (norm > 0)
            decays = torch.where(applies, decay, torch.zeros_like(norm))
            directions = list(torch._foreach_mul(params, list(decays)))
            torch._foreach_add_(directions, grads)
            scale = trust * p_norm / (norm + decay * p_norm + 1e-8)
        else:
            directions = list(torch._foreach_mul(params, decay))
            torch._foreach_add_(directions, grads)
            norm = torch.stack(torch._foreach_norm(directions))
            applies = (p_norm > 0) & (norm > 0)
            scale = trust * p_norm / norm
        torch._foreach_mul_(directions, list(torch.where(applies, scale, 1.0)))
        return directions

    def _update(self, params: list[Tensor], directions: list[Tensor], group: dict) -> None:
        """v ← m·v + direction, w ← w − lr·v, in one pass, which torch leaves out where `found_inf` is 1."""
        lr = group["lr"]
        if self.lr_in_momentum:
            directions, lr = list(torch._foreach_mul(directions, lr)), 1.0
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        found_inf = getattr(self, "found_inf", None)
        settings: dict[str, Any] = {"weight_decay": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False}
        sgd(params, directions, buffers, fused=True, found_inf=found_inf, lr=lr, momentum=group["momentum"], **settings)


def _gradients(params: list[Tensor]) -> list[Tensor]:
    """The gradients of those parameters that have one."""
    return [p.grad for p in params if p.grad is not None]
