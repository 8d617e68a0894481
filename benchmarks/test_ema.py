"""The momentum encoder's update: the only work is memory traffic and the calls themselves."""

import pytest
import torch
import torchvision

from fastssl.ops import ema_update_

from .harness import DTYPES, Case, compare
from .machine import DEVICE

MOMENTUM = 0.999


def parameter_shapes(model: str) -> list[torch.Size]:
    with torch.device("meta"):
        return [parameter.shape for parameter in getattr(torchvision.models, model)().parameters()]


SHAPES = {
    "ResNet-50": lambda: parameter_shapes("resnet50"),
    "ViT-B": lambda: parameter_shapes("vit_b_16"),
    "small": lambda: [torch.Size([64, 64]), torch.Size([64])] * 5,
}


def ours(targets, sources, shadows):
    ema_update_(targets, sources, MOMENTUM, shadows or None)
    return targets + shadows


def official(targets, sources, shadows):
    """The reference code of MoCo: equation 2 of the paper in a loop over the parameters."""
    for i, source in enumerate(sources):
        targets[i] = targets[i] * MOMENTUM + source * (1 - MOMENTUM)
        if shadows:
            shadows[i].copy_(targets[i])
    return targets + shadows


def foreach_lerp(targets, sources, shadows):
    torch._foreach_lerp_(targets, [s.to(t.dtype) for s, t in zip(sources, targets)], 1 - MOMENTUM)
    if shadows:
        torch._foreach_copy_(shadows, targets)
    return targets + shadows


def foreach_mul_add(targets, sources, shadows):
    torch._foreach_mul_(targets, MOMENTUM)
    torch._foreach_add_(targets, sources, alpha=1 - MOMENTUM)
    if shadows:
        torch._foreach_copy_(shadows, targets)
    return targets + shadows


@pytest.mark.parametrize(
    "model, dtype, with_shadows",
    [
        ("ResNet-50", "fp32", False),
        ("ResNet-50", "bf16", False),
        ("ViT-B", "fp32", False),
        ("ViT-B", "bf16", False),
        ("ViT-B", "bf16", True),
        ("small", "fp32", False),
    ],
)
def test_ema_update(benchmark, model, dtype, with_shadows):
    shapes = SHAPES[model]()
    start = [torch.randn(shape, device=DEVICE) for shape in shapes]
    sources = [torch.randn(shape, device=DEVICE).to(DTYPES[dtype]) for shape in shapes]
    ways = {
        "ours": ours,
        "official": official,
        "_foreach_lerp_": foreach_lerp,
        "_foreach_mul_, _foreach_add_": foreach_mul_add,
    }
    if dtype != "fp32":  # _foreach_lerp_ refuses two dtypes
        ways["cast, _foreach_lerp_"] = ways.pop("_foreach_lerp_")

    def contestant(way):
        targets = [tensor.clone() for tensor in start]
        shadows = [tensor.bfloat16() for tensor in start] if with_shadows else []
        return lambda: way(targets, sources, shadows)

    contestants = {name: contestant(way) for name, way in ways.items()}
    values = sum(tensor.numel() for tensor in start)
    case = Case(
        op="ema_update_",
        size=f"{model}, {len(shapes)} tensors, {dtype} sources" + (", bf16 shadows" if with_shadows else ""),
        kernel="ema_update_",
        contestants=contestants,
        bytes_moved=0 if model == "small" else values * (8 + DTYPES[dtype].itemsize + 2 * with_shadows),
    )
    compare(benchmark, case)
