"""DINO in plain torch: a reference for whole training runs.

Written from the paper and from what the official code does: formulas on a dict of tensors, nothing of fastssl.
tests/methods/test_transcription_prototypes.py proves them by the golden numbers. All computes in float64.

Tensors have the official names: `backbone.*` of the vision transformer and `head.*` of the projection head, whose last
layer is `head.last_layer.weight_g` and `weight_v`.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = dict[str, Tensor]


# Vision transformer


def linear(p: Tensors, name: str, x: Tensor) -> Tensor:
    x = x @ p[f"{name}.weight"].T
    return x + p[f"{name}.bias"] if f"{name}.bias" in p else x


def layer_norm(p: Tensors, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(p: Tensors, name: str, x: Tensor, heads: int) -> Tensor:
    batch, length, dim = x.shape
    qkv = linear(p, f"{name}.qkv", x).view(batch, length, 3, heads, dim // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(dim // heads)).softmax(-1)
    return linear(p, f"{name}.proj", (weights @ v).transpose(1, 2).reshape(batch, length, dim))


def positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """The table [1, 1 + N, D] of a square grid for rows × columns patches.

    Bicubic, with the scale (n + 0.1) / √N of a side of n patches: the 0.1 moves the sampled points.
    """
    count = table.shape[1] - 1
    if count == rows * columns and rows == columns:
        return table
    side = math.isqrt(count)
    image = table[:, 1:].view(1, side, side, -1).permute(0, 3, 1, 2)
    scale = ((rows + 0.1) / math.sqrt(count), (columns + 0.1) / math.sqrt(count))
    image = F.interpolate(image, scale_factor=scale, mode="bicubic")
    return torch.cat([table[:, :1], image.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def vit(p: Tensors, images: Tensor, heads: int, prefix: str = "backbone.") -> Tensor:
    """Class tokens [B, D] after the last norm."""
    p = {name.removeprefix(prefix): x for name, x in p.items() if name.startswith(prefix)}
    patch = p["patch_embed.proj.weight"].shape[-1]
    tokens = F.conv2d(images, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=patch)
    grid = tokens.shape[2:]
    tokens = tokens.flatten(2).transpose(1, 2)
    x = torch.cat([p["cls_token"].expand(len(images), -1, -1), tokens], 1) + positions(p["pos_embed"], *grid)
    for i in range(len({name.split(".")[1] for name in p if name.startswith("blocks.")})):
        block = f"blocks.{i}"
        x = x + attention(p, f"{block}.attn", layer_norm(p, f"{block}.norm1", x), heads)
        hidden = gelu(linear(p, f"{block}.mlp.fc1", layer_norm(p, f"{block}.norm2", x)))
        x = x + linear(p, f"{block}.mlp.fc2", hidden)
    return layer_norm(p, "norm", x)[:, 0]


# Head and loss


def head(p: Tensors, x: Tensor, prefix: str = "head.") -> Tensor:
    """Scores [N, K]: three linear layers with GELU between them, unit length, and a weight-normed linear layer."""
    for name in ("0", "2", "4"):
        x = linear(p, f"{prefix}mlp.{name}", x if name == "0" else gelu(x))
    x = x / x.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)
    v = p[f"{prefix}last_layer.weight_v"]
    return x @ (p[f"{prefix}last_layer.weight_g"] * v / v.square().sum(1, keepdim=True).sqrt()).T


def multi_crop(p: Tensors, views: Sequence[Tensor], backbone: Callable[[Tensors, Tensor], Tensor]) -> Tensor:
    """Scores of all views, view by view: views of one size in a row share a call, and the head sees all at once."""
    features, start = [], 0
    for end in range(1, len(views) + 1):
        if end == len(views) or views[end].shape[-1] != views[start].shape[-1]:
            features.append(backbone(p, torch.cat(list(views[start:end]))))
            start = end
    return head(p, torch.cat(features))


def dino_loss(student: Tensor, teacher: Tensor, centre: Tensor, teacher_temp: float, student_temp: float) -> Tensor:
    """Mean cross entropy over all pairs of one of two teacher views and another student view."""
    targets = ((teacher - centre) / teacher_temp).softmax(1).detach().chunk(2)
    log_p = (student / student_temp).log_softmax(1)
    views = log_p.view(-1, len(targets[0]), log_p.shape[1])
    pairs = [-(t * views[v]).sum(1).mean() for i, t in enumerate(targets) for v in range(len(views)) if v != i]
    return torch.stack(pairs).mean()


def moved_centre(centre: Tensor, teacher: Tensor, momentum: float = 0.9) -> Tensor:
    return momentum * centre + (1 - momentum) * teacher.detach().mean(0, keepdim=True)


# Schedules, clipping, optimizer


def warmup_cosine(step: int, base: float, end: float, total: int, warmup: int = 0, last_included: bool = True) -> float:
    """A line from 0 to `base` over `warmup` steps, then half a cosine to `end`.

    The official line has both ends, so that its last step has `base`; without `last_included` the step after it has.
    """
    if step < warmup:
        return base * step / max(warmup - last_included, 1)
    return end + (base - end) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def teacher_temperature(epoch: int, start: float, end: float, warmup_epochs: int) -> float:
    """A line over the first epochs, whose first has `start` and whose last has `end`; constant within an epoch."""
    if epoch >= warmup_epochs:
        return end
    return start + (end - start) * epoch / max(warmup_epochs - 1, 1)


def clipped(gradient: Tensor, largest: float) -> Tensor:
    """The gradient, shorter where its own norm exceeds `largest`."""
    factor = largest / (gradient.square().sum().sqrt() + 1e-6)
    return gradient * factor if factor < 1 else gradient


def without_decay(p: Tensors) -> set[str]:
    """Biases and everything of one dimension."""
    return {name for name, x in p.items() if name.endswith(".bias") or x.ndim == 1}


class Moments(NamedTuple):
    """AdamW's state of one tensor."""

    steps: int
    first: Tensor
    second: Tensor


def adamw(x: Tensor, gradient: Tensor, moments: Moments | None, lr: float, decay: float) -> tuple[Tensor, Moments]:
    """The tensor after a step with betas .9, .999 and eps 1e-8, and its moments."""
    steps, first, second = moments or Moments(0, torch.zeros_like(x), torch.zeros_like(x))
    steps, first, second = steps + 1, 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
    update = (first / (1 - 0.9**steps)) / ((second / (1 - 0.999**steps)).sqrt() + 1e-8)
    return x * (1 - lr * decay) - lr * update, Moments(steps, first, second)


# Whole runs


class Options(NamedTuple):
    """Settings of a run; schedules are functions of the step."""

    backbone: Callable[[Tensors, Tensor], Tensor]  # (tensors, images) → features
    lr: Callable[[int], float]
    decay: Callable[[int], float]
    momentum: Callable[[int], float]
    teacher_temp: Callable[[int], float]
    student_temp: float = 0.1
    clip: float = 3.0
    frozen_steps: int = 0  # steps in which the last layer has no gradient
    fixed: Collection[str] = ()  # tensors that are never trained


class Replay(NamedTuple):
    losses: list[Tensor]
    gradients: list[Tensors]  # of the student, before clipping and freezing
    student: Tensors
    teacher: Tensors
    centre: Tensor


def run_dino(tensors: Tensors, batches: Sequence[Sequence[Tensor]], options: Options) -> Replay:
    """Train from `tensors`, with which the teacher starts too; the first two views of a batch are the large ones."""
    student = {name: x.detach().double().clone() for name, x in tensors.items()}
    teacher = {name: x.clone() for name, x in student.items()}
    centre = torch.zeros(1, len(student["head.last_layer.weight_v"]), dtype=torch.float64)
    trained = [name for name in student if name not in options.fixed]
    exempt, moments = without_decay(student), {}
    losses, gradients = [], []
    for step, views in enumerate(batches):
        views = [view.double() for view in views]
        leaves = {name: x.requires_grad_(name in trained) for name, x in student.items()}
        teacher_scores = multi_crop(teacher, views[:2], options.backbone)
        scores = multi_crop(leaves, views, options.backbone)
        loss = dino_loss(scores, teacher_scores, centre, options.teacher_temp(step), options.student_temp)
        centre = moved_centre(centre, teacher_scores)
        found = dict(zip(trained, torch.autograd.grad(loss, [leaves[name] for name in trained])))
        student = {name: x.detach() for name, x in student.items()}
        for name, gradient in found.items():
            if step < options.frozen_steps and "last_layer" in name:
                continue
            decay = 0.0 if name in exempt else options.decay(step)
            gradient = clipped(gradient, options.clip) if options.clip else gradient
            student[name], moments[name] = adamw(student[name], gradient, moments.get(name), options.lr(step), decay)
        m = options.momentum(step)
        teacher = {name: m * x + (1 - m) * student[name] for name, x in teacher.items()}
        losses.append(loss.detach())
        gradients.append(found)
    return Replay(losses, gradients, student, teacher, centre)
