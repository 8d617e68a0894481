"""Losses of twenty steps of ours and of the official code, from the same weights on the same images."""

from collections.abc import Iterator
from pathlib import Path

import torch

from fastssl.contract import Batch
from fastssl.data.augmentation import Augmentation, View
from fastssl.data.loader import Loader
from fastssl.data.source import open_source

from .machine import DEVICE
from .plots import draw_losses
from .step_cases import PRECISIONS, TOTAL, Case, Ours, as_dtype, mae_case, plain

STEPS = 20


def losses_of(case: Case, batches: list[Batch], exact: bool = True) -> dict[str, list[float]]:
    """Losses of each step: "official fp32", "ours fp32", "official bf16", "ours bf16"; `exact` adds "official fp64"."""
    torch.manual_seed(0)
    model = case.ours()
    state = {name: x.detach().clone() for name, x in model.state_dict().items()}
    losses = {}
    if exact:
        losses["official fp64"] = _run(plain(case, state, None, torch.float64), batches, torch.float64)
    for precision, autocast in PRECISIONS.items():
        losses[f"official {precision}"] = _run(plain(case, state, autocast), batches)
        model.load_state_dict(state)
        losses[f"ours {precision}"] = _run(Ours(case, model, precision), batches)
    return losses


def _run(loop, batches: list[Batch], dtype: torch.dtype = torch.float32) -> list[float]:
    return [float(loop(as_dtype(batch, dtype), step / TOTAL)) for step, batch in enumerate(batches)]


def draw_equality(target: Path, case: Case | None = None, batches: list[Batch] | None = None) -> Path:
    """Draw the losses of MAE ViT-S/16 with eight images per step: `docs/step-losses.png`."""
    # The peak learning rate for 4,096 images: with that for eight images, losses would hardly change in twenty steps.
    case = case or mae_case("vit_small", (224, 224), 8, training={"lr": 1.5e-4 * 4096 / 8})
    curves = losses_of(case, batches or list(_shapes(8)), exact=False)
    draw_losses(curves, f"{case.size}: {len(next(iter(curves.values())))} steps from the same weights", target)
    return target


def _shapes(batch: int) -> Iterator[Batch]:
    """First batches of a run on the embedded images, with the augmentation of MAE."""
    augmentation = Augmentation((View((224, 224), crop=(0.2, 1.0), interpolation="bicubic", flip_p=0.5),))
    source = open_source(f"shapes:count={batch * STEPS},size=224")
    yield from Loader(source, augmentation, batch, workers=0, device=DEVICE).epoch(0)
