"""Linear probing: a linear classifier on frozen features, in two protocols.

`swept` works on features extracted once and takes seconds to minutes. They are standardised as MAE's probe has it,
(x − mean) / √(variance + 1e-6) of each feature, with the statistics of all features that it trains on: what its batch
norm without weights would do with one batch. `trained_officially` is the published protocol with its augmentations.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.data.augmentation import Augmentation, View
from fastssl.data.loader import Loader
from fastssl.data.source import Source
from fastssl.train.config import Training
from fastssl.train.optim import LARS, build_optimizer
from fastssl.train.schedule import learning_rate

from .features import extract
from .labels import Accuracy, accuracy
from .progress import Progress
from .protocols import Official, Setting, Sweep

EPS = 1e-6  # of MAE's batch norm
AT_ONCE = 65536  # features whose logits L-BFGS holds


class Affine(NamedTuple):
    """A linear classifier on standardised features."""

    mean: Tensor  # [F]
    scale: Tensor  # [F], 1 / √(variance + EPS)
    weight: Tensor  # [C, F]
    bias: Tensor  # [C]

    def __call__(self, x: Tensor) -> Tensor:
        """[N, F] → logits [N, C]."""
        return F.linear((x - self.mean) * self.scale, self.weight, self.bias)


def swept(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int, sweep: Sweep, seed: int = 0
) -> tuple[Accuracy, Setting]:
    """Accuracy on `test` of the best of `sweep.settings`, and which it was.

    A tenth of `train`, chosen by `seed`, is held out. Each setting is trained on the rest; the one that is most often
    right about the held-out tenth is trained once more on all of `train`; among equals that with the smaller cross
    entropy is taken. `test` is looked at last and once. With few labels the held-out tenth is a few images, and the
    choice as coarse; with one of each class nothing can be compared, and the first setting is taken.

    Args:
        train, test: (features [N, F] float32, labels [N] int64) on one device; labels of `train` in 0 … classes − 1.
        classes: C, of `train`.
        seed: of the held-out tenth, the first weights and the order.

    Raises:
        ValueError: fewer than two images, or features that are not finite.
    """
    x, y = train
    if len(x) < 2:
        raise ValueError(f"eval: a linear classifier needs two labelled images or more, got {len(x)}")
    if not x.isfinite().all() or not test[0].isfinite().all():
        raise ValueError("eval: some of the encoder's features are not finite")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    held, rest = order.tensor_split([max(1, len(x) // 10)])
    held = held[torch.isin(y[held], y[rest])]  # a class that was held out whole says nothing
    settings, best = sweep.settings, sweep.settings[0]
    if len(held) and len(settings) > 1:
        tried = _fitted(x[rest], y[rest], classes, settings, sweep, seed)
        scores = [_score(classifier(x[held]), y[held]) for classifier in tried]
        best = settings[max(range(len(settings)), key=scores.__getitem__)]
    (classifier,) = _fitted(x, y, classes, [best], sweep, seed)
    return accuracy(classifier(test[0]), test[1]), best


def _score(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """What the choice goes by, the larger the better."""
    if not logits.isfinite().all():
        return -1.0, 0.0
    return (logits.argmax(1) == labels).float().mean().item(), -F.cross_entropy(logits, labels).item()


def _fitted(x: Tensor, y: Tensor, classes: int, settings: list[Setting], sweep: Sweep, seed: int) -> list[Affine]:
    """A classifier of each setting, in their order. Those of sgd and lars are trained all at once."""
    variance, mean = torch.var_mean(x, dim=0, correction=0)
    scale = (variance + EPS).rsqrt()
    stepwise = [setting for setting in settings if setting.optimizer != "lbfgs"]
    made = dict(zip(stepwise, _descended(x, y, (mean, scale), classes, stepwise, sweep, seed)))
    for setting in settings:
        if setting not in made:
            made[setting] = _minimised((x - mean) * scale, y, classes, setting.value, 2 * sweep.epochs)
    return [Affine(mean, scale, *made[setting]) for setting in settings]


def _minimised(x: Tensor, y: Tensor, classes: int, l2: float, iterations: int) -> tuple[Tensor, Tensor]:
    """(weight [C, F], bias [C]) of least mean cross entropy + ½ · l2 · ‖weight‖², by L-BFGS from 0."""
    weight, bias = (x.new_zeros(classes, *shape).requires_grad_() for shape in ((x.shape[1],), ()))
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = 0.5 * l2 * weight.square().sum()
        total.backward()
        for rows, labels in zip(x.split(AT_ONCE), y.split(AT_ONCE)):
            loss = F.cross_entropy(F.linear(rows, weight, bias), labels, reduction="sum") / len(x)
            loss.backward()
            total = total.detach() + loss.detach()
        return total

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _descended(
    x: Tensor,
    y: Tensor,
    standard: tuple[Tensor, Tensor],
    classes: int,
    settings: list[Setting],
    sweep: Sweep,
    seed: int,
) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of each setting of sgd and lars, in one pass for all: one matrix product gives all their logits.

    One that diverges has no influence on the others.
    """
    if not settings:
        return []
    (mean, scale), generator = standard, torch.Generator().manual_seed(seed)
    first = 0.01 * torch.randn(classes, x.shape[1], generator=generator).to(x.device)
    made = [(first.clone().requires_grad_(), x.new_zeros(classes).requires_grad_()) for _ in settings]
    batch = min(sweep.batch_size, len(x))
    trainings = [Training(sweep.epochs, batch, setting.optimizer, setting.value, 0.0) for setting in settings]
    optimizers = []
    for kind, name in ((torch.optim.SGD, "sgd"), (LARS, "lars")):
        groups = [
            {"params": list(pair), "schedule": training}
            for pair, training in zip(made, trainings)
            if training.optimizer == name
        ]
        optimizers += [kind(groups, lr=0.0, momentum=0.9)] if groups else []
    steps, progress = len(x) // batch, Progress(f"linear, {len(settings)} settings at once", sweep.epochs)
    for epoch in range(sweep.epochs):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for step, rows in enumerate(order[: steps * batch].split(batch)):
            weight, bias = (torch.cat(parts) for parts in zip(*made))
            logits = F.linear((x[rows] - mean) * scale, weight, bias).view(-1, classes)  # [B · S, C]
            loss = F.cross_entropy(logits, y[rows].repeat_interleave(len(settings)), reduction="sum") / batch
            loss.backward()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(group["schedule"], epoch + step / steps)
                optimizer.step()
                optimizer.zero_grad()
        progress(epoch + 1, loss / len(settings))
    return [(weight.detach(), bias.detach()) for weight, bias in made]


def trained_officially(
    features: Callable[[Tensor], Tensor],
    train: Source,
    test: Source,
    official: Official,
    size: tuple[int, int],
    seed: int = 0,
    **where,
) -> Accuracy:
    """Accuracy on `test` of the probe that `official` describes; the last epoch's, none is chosen.

    Every step takes new random crops (area 0.08 to 1, flipped or not) through the frozen encoder. Images that can't be
    decoded are replaced by others of their batch.

    Args:
        features: of images [B, 3, H, W], of a method in evaluation mode; no gradient reaches it and it stays as it is.
        train, test: with labels; classes that only `test` has are never right.
        size: (height, width) in pixels.
        seed: of the first weights, the order and the crops.
        where: `device`, `workers` and `engine`, as for the loader.

    Raises:
        ValueError: the batch is larger than the data.
    """
    training, device = official.training, where.get("device", "cpu")
    if official.batch_size > len(train):
        raise ValueError(
            f"eval: --batch-size must be at most the {len(train)} labelled images, got {official.batch_size}"
        )
    view = View(size, crop=(0.08, 1.0), interpolation=official.interpolation, flip_p=0.5)
    loader = Loader(
        train, Augmentation((view,)), official.batch_size // official.pieces, seed=seed, max_bad=1.0, **where
    )
    with torch.no_grad():
        width = features(torch.zeros(1, 3, *size, device=device)).shape[1]
    probe = _probe(width, len(train.classes), official.standardise, seed).to(device)
    optimizer, progress = build_optimizer(probe, training), Progress("linear", training.epochs)
    steps = len(loader) // official.pieces
    for epoch in range(training.epochs):
        batches = loader.epoch(epoch)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(training, epoch + step / steps)
            for _ in range(official.pieces):
                batch = next(batches)
                with torch.no_grad():
                    x = features(batch.views[0]).float()
                loss = F.cross_entropy(probe(x), batch.label) / official.pieces
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            progress(epoch + (step + 1) / steps, loss * official.pieces)
    probe.eval()
    logits, labels, _ = extract(lambda images: probe(features(images).float()), test, size, **where)
    return accuracy(logits, labels)


def _probe(width: int, classes: int, standardise: bool, seed: int) -> nn.Module:
    """Weights from normal(0, 0.01), bias 0, as in the code of MoCo, MoCo v3 and MAE."""
    linear = nn.utils.skip_init(nn.Linear, width, classes)  # draws nothing from the global generator
    nn.init.normal_(linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(width, eps=EPS, affine=False), linear) if standardise else linear
