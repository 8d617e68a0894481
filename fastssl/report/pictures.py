"""Pictures of a run, as PNG bytes in base64."""

import base64
import io

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastssl.data.recipe import IMAGENET_MEAN, IMAGENET_STD
from fastssl.ops import patchify, unpatchify

matplotlib.use("agg")  # no window system needed


def png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return base64.b64encode(buffer.getvalue()).decode()


def curves(metrics: list[dict]) -> str:
    """Loss, the method's own metrics, learning rate, speed and the share of time spent waiting for data, by epoch."""
    hidden = {"step", "epoch"}
    names = [
        "loss",
        *(name for name in metrics[0] if name not in {"loss", "lr", "images_per_second", "data_wait"} | hidden),
    ]
    names += ["lr", "images_per_second", "data_wait"]
    columns = 2
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(9, 2.3 * rows))
    for i, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.plot([m["epoch"] for m in metrics], [m[name] for m in metrics], linewidth=1.2)
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.set_xlabel("epoch", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if name in ("images_per_second", "data_wait"):
            axes.set_ylim(bottom=0)
    figure.tight_layout()
    return png(figure)


def grid(rows: list[tuple[str, Tensor]]) -> str:
    """Rows of images [N, 3, H, W] in 0..1, each row with its name at the left."""
    count = max(len(images) for _, images in rows)
    figure = Figure(figsize=(0.9 * count + 1.2, 0.95 * len(rows)))
    for r, (name, images) in enumerate(rows):
        for c in range(count):
            axes = figure.add_subplot(len(rows), count, r * count + c + 1)
            axes.set_axis_off()
            if c < len(images):
                axes.imshow(images[c].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            if c == 0:
                axes.text(-0.15, 0.5, name, transform=axes.transAxes, ha="right", va="center", fontsize=9)
    figure.subplots_adjust(wspace=0.06, hspace=0.06)
    return png(figure)


def pixels(images: Tensor) -> Tensor:
    """Undoes the normalisation: [N, 3, H, W] in 0..1."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return images * std + mean


@torch.no_grad()
def reconstructions(mae, images: Tensor) -> str:
    """Four rows: what the model should see, what it saw, what it made of it, and that with the seen patches put in."""
    patch, (height, width) = mae.patch_size, images.shape[2:]
    noise = torch.rand(len(images), mae.length, generator=torch.Generator().manual_seed(0))
    pred, mask = mae.reconstruct(images, noise)
    target = patchify(images, patch)
    if mae.norm_pix_loss:  # predicted is the shape of each patch; its brightness and contrast are the true ones
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        pred = pred * (variance + 1e-6).sqrt() + mean
    hidden = mask.unsqueeze(-1)
    grey = torch.zeros_like(target)  # the mean colour of ImageNet
    parts = {
        "input": target, "masked": torch.where(hidden > 0, grey, target), "output": pred,
        "output in\nthe holes": torch.where(hidden > 0, pred, target),
    }  # fmt: skip
    return grid([(name, pixels(unpatchify(part, patch, height, width))) for name, part in parts.items()])
