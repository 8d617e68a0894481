"""iBOT and DINOv2 in plain torch: a reference for whole training runs.

Written from the papers and from what the official code does: formulas on a dict of tensors, nothing of fastssl.
tests/methods/test_transcription_dinov2.py proves them by the golden numbers. All computes in float64.

A network's tensors have the names of the official code behind a prefix: `backbone.blocks.0.attn.qkv.weight`,
`dino_head.mlp.0.weight`. `run_ibot` and `run_dinov2` train `student` from the initial tensors of both networks, and
return a `Replay`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = dict[str, Tensor]


class Step(NamedTuple):
    """What one step is given."""

    crops: Sequence[Tensor]  # 2 large ones [B, 3, H, W], then small ones
    mask: Tensor  # [2B, L] bool: rows of the first large crop, then of the second
    lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    patch_temp: float  # of the teacher's patches
    last_layer_lr: float | None = None  # DINOv2; None for lr
    freeze_last_layer: bool = False  # iBOT: no gradient


class Replay(NamedTuple):
    losses: list[Tensor]
    student: Tensors
    teacher: Tensors
    centres: Tensors


class Vit(NamedTuple):
    patch: int
    heads: int
    prefix: str = "backbone."
    mask_token: str = "mask_token"
    offset: float = 0.1
    antialias: bool = False
    eps: float = 1e-6


# Networks


def linear(p: Tensors, name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def layer_norm(p: Tensors, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    x = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def attention(p: Tensors, name: str, x: Tensor, heads: int) -> Tensor:
    batch, length, width = x.shape
    q, k, v = linear(p, f"{name}.qkv", x).view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(width // heads)).softmax(-1)
    return linear(p, f"{name}.proj", (weights @ v).transpose(1, 2).reshape(batch, length, width))


def positions(table: Tensor, rows: int, columns: int, vit: Vit) -> Tensor:
    """Those of the class token and of a grid of patches [1, 1 + rows · columns, D]."""
    side = math.isqrt(table.shape[1] - 1)
    if (rows, columns) == (side, side):
        return table
    image = table[:, 1:].view(1, side, side, -1).permute(0, 3, 1, 2)
    if vit.offset:
        factors = ((rows + vit.offset) / side, (columns + vit.offset) / side)
        image = F.interpolate(image, scale_factor=factors, mode="bicubic", antialias=vit.antialias)
    else:
        image = F.interpolate(image, size=(rows, columns), mode="bicubic", antialias=vit.antialias)
    return torch.cat([table[:, :1], image.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def vit_tokens(p: Tensors, vit: Vit, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Normalised class token [B, D] and patches [B, L, D]; masked patches are replaced before positions are added."""
    p = {name.removeprefix(vit.prefix): x for name, x in p.items() if name.startswith(vit.prefix)}
    weight = p["patch_embed.proj.weight"]
    x = F.conv2d(images, weight, p["patch_embed.proj.bias"], stride=vit.patch)
    rows, columns = x.shape[2:]
    x = x.flatten(2).transpose(1, 2)
    if mask is not None:
        x = torch.where(mask[..., None], p[vit.mask_token], x)
    x = torch.cat([p["cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + positions(p["pos_embed"], rows, columns, vit)
    registers = p.get("register_tokens")
    count = 0 if registers is None else registers.shape[1]
    if registers is not None:
        x = torch.cat([x[:, :1], registers.expand(len(x), -1, -1), x[:, 1:]], 1)
    for i in range(sum(name.endswith("norm1.weight") for name in p)):
        block = f"blocks.{i}"
        out = attention(p, f"{block}.attn", layer_norm(p, f"{block}.norm1", x, vit.eps), vit.heads)
        x = x + out * p.get(f"{block}.ls1.gamma", 1)
        out = linear(p, f"{block}.mlp.fc1", layer_norm(p, f"{block}.norm2", x, vit.eps))
        out = linear(p, f"{block}.mlp.fc2", gelu(out))
        x = x + out * p.get(f"{block}.ls2.gamma", 1)
    x = layer_norm(p, "norm", x, vit.eps)
    return x[:, 0], x[:, 1 + count :]


def head(p: Tensors, name: str, x: Tensor, last: str = "last_layer") -> Tensor:
    """Three linear layers with GELU, unit rows, and a layer whose rows have length g."""
    for i in (0, 2, 4):
        x = linear(p, f"{name}.mlp.{i}", x)
        x = gelu(x) if i < 4 else x
    x = x / x.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
    v = p[f"{name}.{last}.weight_v"]
    return x @ (p[f"{name}.{last}.weight_g"] * v / v.square().sum(1, keepdim=True).sqrt()).T


# Losses


def cross_entropy(student: Tensor, target: Tensor, temp: float = 0.1) -> Tensor:
    """Of each row."""
    return -(target * (student / temp).log_softmax(-1)).sum(-1)


def sinkhorn(scores: Tensor, temp: float, rounds: int = 3) -> Tensor:
    """Codes [N, K] of scores: columns, then rows are normalised in each round; rows sum to 1 at the end."""
    q = (scores / temp).exp()
    q = q / q.sum()
    for _ in range(rounds):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q * q.shape[0]


def koleo(x: Tensor) -> Tensor:
    x = x / x.square().sum(1, keepdim=True).sqrt().clamp(min=1e-8)
    nearest = (x @ x.T).detach().fill_diagonal_(-1).argmax(1)
    distances = (x - x[nearest] + 1e-8).square().sum(1).sqrt()
    return -(distances + 1e-8).log().mean()


def dino_pairs(student: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean cross entropy over rows, and over pairs of different crops (DINO, iBOT)."""
    pairs = [(s, t) for t in range(len(targets)) for s in range(len(student)) if s != t]
    return sum(cross_entropy(student[s], targets[t]).mean() for s, t in pairs) / len(pairs)


def ibot_patches(student: Sequence[Tensor], targets: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """[B, L, K] of each large crop: mean over images and crops of the mean over masked patches, 0 without any."""
    total = 0
    for s, t, mask in zip(student, targets, masks):
        rows = (cross_entropy(s, t) * mask).sum(1) / mask.sum(1).clamp(min=1)
        total = total + rows.mean()
    return total / len(student)


def dinov2_terms(
    local: Sequence[Tensor], large: Tensor, targets: Tensor, patches: Tensor, patch_targets: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """The cross entropies that are optimised: small crops, large ones, masked patches.

    `large` and `targets` [2B, K] have the rows of the first large crop, then of the second; `patches` are the masked
    ones in the order of `mask` [2B, L].
    """
    terms = 2 + 2 * len(local)
    swapped = torch.cat(targets.chunk(2)[::-1])
    small = sum(cross_entropy(s, t).mean() for s in local for t in targets.chunk(2))
    weights = (1 / mask.sum(1).clamp(min=1).double())[:, None].expand_as(mask)[mask]
    return {
        "local": small / terms,
        "global": 2 * cross_entropy(large, swapped).mean() / terms,
        "patch": (cross_entropy(patches, patch_targets) * weights).sum() / len(mask),
    }


# Updates


def adamw(p: Tensor, grad: Tensor, state: dict, lr: float, decay: float):
    """In place; betas 0.9 and 0.999, eps 1e-8."""
    state["step"] = state.get("step", 0) + 1
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * grad
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * grad.square()
    m, v = state["m"] / (1 - 0.9 ** state["step"]), state["v"] / (1 - 0.999 ** state["step"])
    p.mul_(1 - lr * decay).sub_(lr * m / (v.sqrt() + 1e-8))


def clip(grads: Tensors, limit: float, names: Sequence[Sequence[str]]):
    """Scale each set of gradients to a joint norm of at most `limit`."""
    for part in names:
        norm = sum(grads[name].square().sum() for name in part).sqrt()
        for name in part:
            grads[name] = grads[name] * min(1.0, float(limit / (norm + 1e-6)))


def dinov2_scales(name: str, depth: int, decay: float = 0.9, patch_embed: float = 0.2) -> tuple[float, float]:
    """Factors of learning rate and weight decay of a student's parameter."""
    layer = depth + 1
    if name.startswith("backbone."):
        inner = name.removeprefix("backbone.")
        if inner.startswith(("pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens")):
            layer = 0
        elif inner.startswith("blocks."):
            layer = int(inner.split(".")[1]) + 1
    lr = decay ** (depth + 1 - layer) * (patch_embed if "patch_embed" in name else 1)
    return lr, float(not (name.endswith(".bias") or "norm" in name or "gamma" in name))


def no_decay(name: str, x: Tensor) -> bool:
    """DINO's and iBOT's rule."""
    return name.endswith(".bias") or x.ndim == 1


def trained(tensors: Tensors, fixed: Sequence[str] = ()) -> Tensors:
    return {name: x.detach().clone().requires_grad_(name not in fixed) for name, x in tensors.items()}


def follow(teacher: Tensors, student: Tensors, momentum: float):
    for name, x in teacher.items():
        x.mul_(momentum).add_((1 - momentum) * student[name].detach())


# Runs


def run_ibot(
    student: Tensors, teacher: Tensors, steps: Sequence[Step], vit: Vit, *, clip_norm: float, fixed: Sequence[str] = ()
) -> Replay:
    """iBOT with one last layer for class tokens and patches. `fixed`: parameters that are not trained."""
    p, teacher = trained(student, fixed), {name: x.clone() for name, x in teacher.items()}
    width = p["head.last_layer.weight_v"].shape[0]
    centres = {"cls": torch.zeros(width, dtype=torch.float64), "patch": torch.zeros(width, dtype=torch.float64)}
    losses, states = [], {name: {} for name in p}
    for step in steps:
        large, masks = step.crops[:2], step.mask.chunk(2)
        with torch.no_grad():
            scores = [[head(teacher, "head", x) for x in vit_tokens(teacher, vit, crop)] for crop in large]
            targets = [((cls - centres["cls"]) / step.teacher_temp).softmax(-1) for cls, _ in scores]
            patch_targets = [((patch - centres["patch"]) / step.patch_temp).softmax(-1) for _, patch in scores]
        tokens = [vit_tokens(p, vit, crop, mask) for crop, mask in zip(large, masks)]
        tokens += [vit_tokens(p, vit, crop) for crop in step.crops[2:]]
        cls = [head(p, "head", cls) for cls, _ in tokens]
        patches = [head(p, "head", patch) for _, patch in tokens[:2]]
        loss = dino_pairs(cls, targets) + ibot_patches(patches, patch_targets, masks)
        names = [name for name, x in p.items() if x.requires_grad]
        grads = dict(zip(names, torch.autograd.grad(loss, [p[name] for name in names])))
        clip(grads, clip_norm, [[name] for name in names])
        with torch.no_grad():
            centres["cls"] = 0.9 * centres["cls"] + 0.1 * torch.cat([cls for cls, _ in scores]).mean(0)
            centres["patch"] = 0.9 * centres["patch"] + 0.1 * torch.cat([x for _, x in scores]).mean((0, 1))
            for name, grad in grads.items():
                if not (step.freeze_last_layer and "last_layer" in name):
                    decay = 0.0 if no_decay(name, p[name]) else step.weight_decay
                    adamw(p[name], grad, states[name], step.lr, decay)
            follow(teacher, p, step.momentum)
        losses.append(loss.detach())
    return Replay(losses, p, teacher, centres)


def run_dinov2(
    student: Tensors,
    teacher: Tensors,
    steps: Sequence[Step],
    vit: Vit,
    *,
    clip_norm: float,
    centering: bool,
    scales: dict[str, float],
) -> Replay:
    """DINOv2, by centring or Sinkhorn; patches have a head of their own if there is one in the tensors. `scales` are
    further arguments of `dinov2_scales`."""
    p, teacher = trained(student), {name: x.clone() for name, x in teacher.items()}
    depth = sum(name.endswith("norm1.weight") for name in p)
    patch_head = "ibot_head" if "ibot_head.mlp.0.weight" in p else "dino_head"
    centres = {
        key: torch.zeros(p[f"{name}.last_layer.weight_v"].shape[0], dtype=torch.float64)
        for key, name in (("cls", "dino_head"), ("patch", patch_head))
    }
    parts = [[name for name in p if name.startswith(part)] for part in ("backbone.", "dino_head.", "ibot_head.")]
    losses, states = [], {name: {} for name in p}
    for step in steps:
        large, mask = torch.cat(list(step.crops[:2])), step.mask
        with torch.no_grad():
            cls, patches = vit_tokens(teacher, vit, large)
            scores = head(teacher, "dino_head", cls), head(teacher, patch_head, patches[mask])
            if centering:
                targets = ((scores[0] - centres["cls"]) / step.teacher_temp).softmax(-1)
                patch_targets = ((scores[1] - centres["patch"]) / step.patch_temp).softmax(-1)
                for key, x in zip(("cls", "patch"), scores):
                    centres[key] = 0.9 * centres[key] + 0.1 * x.mean(0)
            else:
                targets, patch_targets = sinkhorn(scores[0], step.teacher_temp), sinkhorn(scores[1], step.patch_temp)
        cls, patches = vit_tokens(p, vit, large, mask)
        local = [head(p, "dino_head", vit_tokens(p, vit, crop)[0]) for crop in step.crops[2:]]
        masked = head(p, patch_head, patches[mask])
        terms = dinov2_terms(local, head(p, "dino_head", cls), targets, masked, patch_targets, mask)
        loss = sum(terms.values()) + 0.1 * sum(koleo(x) for x in cls.chunk(2))
        grads = dict(zip(p, torch.autograd.grad(loss, list(p.values()))))
        clip(grads, clip_norm, [names for names in parts if names])
        with torch.no_grad():
            for name, grad in grads.items():
                lr_scale, decay_scale = dinov2_scales(name, depth, **scales)
                lr = step.lr if step.last_layer_lr is None or "last_layer" not in name else step.last_layer_lr
                adamw(p[name], grad, states[name], lr * lr_scale, step.weight_decay * decay_scale)
            follow(teacher, p, step.momentum)
        losses.append(loss.detach())
    return Replay(losses, p, teacher, centres)
