"""The official DINO step in plain eager torch, as a baseline: network, loss, clipping, momentum update and loop.

Written from what the code of facebookresearch/dino computes, without copying it; see `official.py`.
"""

import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.profiler import record_function

from . import official


class ViT(VisionTransformer):
    """Images of any size → class tokens [B, D], with positions interpolated as in DINO's code."""

    def __init__(self, img_size: tuple[int, int], patch: int, sizes: tuple[int, int, int]):
        dim, depth, heads = sizes
        super().__init__(
            img_size,
            patch,
            num_classes=0,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            norm_layer=official.layer_norm,
            dynamic_img_size=True,
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)  # [B, rows, columns, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], 1) + self.positions(*x.shape[1:3])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def positions(self, rows: int, columns: int) -> Tensor:
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if rows == columns == side:
            return self.pos_embed
        image = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / side, (columns + 0.1) / side)
        image = F.interpolate(image, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], image.permute(0, 2, 3, 1).flatten(1, 2)], 1)


class Head(nn.Module):
    def __init__(self, dim: int, hidden: int, bottleneck: int, prototypes: int):
        super().__init__()
        first, second, third = nn.Linear(dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, bottleneck)
        self.mlp = nn.Sequential(first, nn.GELU(), second, nn.GELU(), third)
        self.last_layer = WeightNormed(bottleneck, prototypes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class WeightNormed(nn.Module):
    """What torch.nn.utils.weight_norm makes of a linear layer without bias."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.weight_g, self.weight_v = nn.Parameter(torch.ones(dim_out, 1)), nn.Parameter(torch.ones(dim_out, dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class Network(nn.Module):
    """Backbone and head; consecutive views of one size share a call of the backbone."""

    def __init__(self, backbone: nn.Module, head: Head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views: tuple[Tensor, ...]) -> Tensor:
        features, start = [], 0
        for end in range(1, len(views) + 1):
            if end == len(views) or views[end].shape[-1] != views[start].shape[-1]:
                features.append(self.backbone(torch.cat(views[start:end])))
                start = end
        return self.head(torch.cat(features))


class Loss(nn.Module):
    """As written, the log-softmax of a view is computed for each pair; the tuned version computes it once."""

    def __init__(self, prototypes: int, student_temp: float, momentum: float, tuned: bool):
        super().__init__()
        self.student_temp, self.momentum, self.tuned = student_temp, momentum, tuned
        self.register_buffer("center", torch.zeros(1, prototypes))

    def forward(self, student: Tensor, teacher: Tensor, teacher_temp: float) -> Tensor:
        targets = F.softmax((teacher - self.center) / teacher_temp, dim=-1).detach().chunk(2)
        views = (student / self.student_temp).chunk(len(student) // len(targets[0]))
        if self.tuned:
            views = tuple(F.log_softmax(view, dim=-1) for view in views)
        total, pairs = torch.zeros((), device=student.device), 0
        for i, target in enumerate(targets):
            for v, view in enumerate(views):
                if v != i:
                    log_p = view if self.tuned else F.log_softmax(view, dim=-1)
                    total = total + torch.sum(-target * log_p, dim=-1).mean()
                    pairs += 1
        with torch.no_grad():
            mean = teacher.sum(0, keepdim=True) / len(teacher)
            self.center.copy_(self.center * self.momentum + mean * (1 - self.momentum))
        return total / pairs


class DINO(nn.Module):
    """Student and teacher, whose weights are loaded later."""

    def __init__(self, student: Network, teacher: Network, loss: Loss, temp: float, tuned: bool):
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.dino_loss, self.temp, self.tuned = loss, temp, tuned
        student.head.last_layer.weight_g.requires_grad_(False)

    def forward(self, *views: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = self.teacher(views[:2])
        student = self.student(views)
        with record_function("loss"):
            return self.dino_loss(student, teacher, self.temp)

    @torch.no_grad()
    def clip(self, norm: float) -> None:
        """Each gradient by its own norm; as written with a wait of the host for each."""
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        if self.tuned:
            norms = torch.stack(torch._foreach_norm(gradients))
            torch._foreach_mul_(gradients, list((norm / (norms + 1e-6)).clamp(max=1).unbind()))
            return
        for gradient in gradients:
            factor = norm / (gradient.norm(2).item() + 1e-6)
            if factor < 1:
                gradient.mul_(factor)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        student, teacher = list(self.student.parameters()), list(self.teacher.parameters())
        if self.tuned:
            torch._foreach_lerp_(teacher, student, 1 - momentum)
            return
        for q, k in zip(student, teacher):
            k.mul_(momentum).add_((1 - momentum) * q)


class Loop(official.Loop):
    """The steps of DINO's loop, whose teacher moves after the optimizer's step."""

    clip_norm, momentum = 3.0, 0.996

    def __call__(self, batch, progress: float) -> Tensor:
        views = batch.views
        with record_function("forward"), torch.autocast(views[0].device.type, self.autocast, self.autocast is not None):
            loss = self.model(*views)
        with record_function("backward"):
            self.optimizer.zero_grad()
            loss.backward()
        with record_function("optimizer"):
            self.model.clip(self.clip_norm)
            self.optimizer.step()
        with record_function("EMA and queue"):
            end = 1 - (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2
            self.model.update_teacher(end)
        return loss.detach()
