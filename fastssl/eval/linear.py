"""Linear probing: a linear classifier on frozen features, in two protocols.

`sweep` works on features extracted once and takes seconds to minutes. Features are standardised as in MAE's probe,
(x − mean) / √(variance + 1e-6), with the statistics of all training features, as if its batch norm without weights saw
them in a single batch. `train_official` is the published protocol with augmentation.
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

EPS = 1e-6  # epsilon of MAE's batch norm
AT_ONCE = 65536  # largest number of features in one matrix product of L-BFGS


class Affine(NamedTuple):
    """A linear classifier on standardised features."""

    mean: Tensor  # [F]
    scale: Tensor  # [F], 1 / √(variance + EPS)
    weight: Tensor  # [C, F]
    bias: Tensor  # [C]

    def __call__(self, x: Tensor) -> Tensor:
        """[N, F] → logits [N, C]."""
        return F.linear((x - self.mean) * self.scale, self.weight, self.bias)


def sweep(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: int,
    numbers: Sweep,
    seed: int = 0,
    kinds: dict[str, int] | None = None,
) -> tuple[Accuracy, Setting, str]:
    """(accuracy on `test` of the best of `numbers.settings`, that setting, the best kind of features).

    A tenth of `train` is held out for validation, and each setting is trained on the rest. The one with the highest
    validation accuracy, among equals with the smaller cross entropy, is trained again on all of `train`; `test` is used
    once, at the end. With few labels the held-out tenth is a few images and the choice is coarse; with one image per
    class there is nothing to compare, and the first setting is taken.

    Args:
        train, test: (features [N, F] float32, labels [N] int64) on one device; labels of `train` in 0 … classes − 1.
        classes: number of classes C of `train`.
        numbers: optimizers, learning rates, epochs and batch size.
        seed: random seed of the held-out tenth, the initial weights and the order.
        kinds: {name of a kind of features: number of its columns}, if the features are of several kinds, side by side
            in this order. The kind is chosen together with the setting. By default there is one, named "".

    Raises:
        ValueError: fewer than two images, or features that are not finite.
    """
    if len(train[0]) < 2:
        raise ValueError(f"eval: a linear classifier needs two labelled images or more, got {len(train[0])}")
    if not train[0].isfinite().all() or not test[0].isfinite().all():
        raise ValueError("eval: some of the encoder's features are not finite")
    kinds = kinds or {"": train[0].shape[1]}
    names, widths = list(kinds), list(kinds.values())
    (tables, y), settings = (train[0].split(widths, 1), train[1]), numbers.settings
    best, setting = 0, settings[0]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    held, rest = order.tensor_split([max(1, len(y) // 10)])
    held = held[torch.isin(y[held], y[rest])]  # a class that is held out whole has no training images
    if len(held) and len(settings) * len(tables) > 1:
        tried = [_fit(x[rest], y[rest], classes, settings, numbers, seed) for x in tables]
        scores = {
            (kind, i): _score(classifier(tables[kind][held]), y[held])
            for kind, classifiers in enumerate(tried)
            for i, classifier in enumerate(classifiers)
        }
        best, i = max(scores, key=scores.__getitem__)
        setting = settings[i]
    (classifier,) = _fit(tables[best], y, classes, [setting], numbers, seed)
    return accuracy(classifier(test[0].split(widths, 1)[best]), test[1]), setting, names[best]


def _score(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """(accuracy, −cross entropy): the larger, the better."""
    if not logits.isfinite().all():
        return -1.0, 0.0
    return (logits.argmax(1) == labels).float().mean().item(), -F.cross_entropy(logits, labels).item()


def _fit(x: Tensor, y: Tensor, classes: int, settings: list[Setting], numbers: Sweep, seed: int) -> list[Affine]:
    """A classifier for each setting, in their order. Those of SGD and LARS are trained together."""
    variance, mean = torch.var_mean(x, dim=0, correction=0)
    scale = (variance + EPS).rsqrt()
    stepwise = [setting for setting in settings if setting.optimizer != "lbfgs"]
    fitted = dict(zip(stepwise, fit_sgd(x, y, (mean, scale), classes, stepwise, numbers, seed)))
    for setting in settings:
        if setting not in fitted:
            fitted[setting] = fit_lbfgs((x - mean) * scale, y, classes, setting.value, 2 * numbers.epochs)
    return [Affine(mean, scale, *fitted[setting]) for setting in settings]


def fit_lbfgs(x: Tensor, y: Tensor, classes: int, l2: float, iterations: int) -> tuple[Tensor, Tensor]:
    """(weight [C, F], bias [C]) that minimise mean cross entropy + ½ · l2 · ‖weight‖², by L-BFGS from zero."""
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


def fit_sgd(
    x: Tensor,
    y: Tensor,
    standard: tuple[Tensor, Tensor],
    classes: int,
    settings: list[Setting],
    numbers: Sweep,
    seed: int,
) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of each setting of SGD and LARS; one matrix product computes the logits of all settings.

    A setting that diverges does not affect the others.
    """
    if not settings:
        return []
    (mean, scale), generator = standard, torch.Generator().manual_seed(seed)
    first = 0.01 * torch.randn(classes, x.shape[1], generator=generator).to(x.device)
    pairs = [(first.clone().requires_grad_(), x.new_zeros(classes).requires_grad_()) for _ in settings]
    batch = min(numbers.batch_size, len(x))
    trainings = [Training(numbers.epochs, batch, setting.optimizer, setting.value, 0.0) for setting in settings]
    optimizers = []
    for kind, name in ((torch.optim.SGD, "sgd"), (LARS, "lars")):
        groups = [
            {"params": list(pair), "schedule": training}
            for pair, training in zip(pairs, trainings)
            if training.optimizer == name
        ]
        optimizers += [kind(groups, lr=0.0, momentum=0.9)] if groups else []
    steps, progress = len(x) // batch, Progress(f"linear, {len(settings)} settings at once", numbers.epochs)
    for epoch in range(numbers.epochs):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for step, rows in enumerate(order[: steps * batch].split(batch)):
            weight, bias = (torch.cat(parts) for parts in zip(*pairs))
            logits = F.linear((x[rows] - mean) * scale, weight, bias).view(-1, classes)  # [B · S, C]
            loss = F.cross_entropy(logits, y[rows].repeat_interleave(len(settings)), reduction="sum") / batch
            loss.backward()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(group["schedule"], epoch + step / steps)
                optimizer.step()
                optimizer.zero_grad()
        progress(epoch + 1, loss / len(settings))
    return [(weight.detach(), bias.detach()) for weight, bias in pairs]


def train_official(
    features: Callable[[Tensor], Tensor],
    train: Source,
    test: Source,
    official: Official,
    size: tuple[int, int],
    seed: int = 0,
    **loading,
) -> Accuracy:
    """Accuracy on `test` of the paper's linear probe, after the last epoch.

    Every step passes new random crops (area 0.08 to 1, flipped with probability 0.5) through the frozen encoder. Images
    that cannot be decoded are replaced by others of their batch.

    Args:
        features: images [B, 3, H, W] → features [B, F] of a method in evaluation mode; computed without gradient.
        train, test: sources with labels; images of classes that only `test` has count as errors.
        official: optimizer, schedule and augmentation of the probe.
        size: (height, width) in pixels.
        seed: random seed of initial weights, order and crops.
        loading: `mean`, `std`, `device`, `workers` and `engine`, as for `evaluation_loader`.

    Raises:
        ValueError: the batch is larger than the data.
    """
    training, device = official.training, loading.get("device", "cpu")
    if official.batch_size > len(train):
        raise ValueError(
            f"eval: --batch-size must be at most the {len(train)} labelled images, got {official.batch_size}"
        )
    colours = {name: loading[name] for name in ("mean", "std") if name in loading}
    view = View(size, crop=(0.08, 1.0), interpolation=official.interpolation, flip_p=0.5, **colours)
    loader = Loader(
        train,
        Augmentation((view,), reduced=False),
        official.batch_size // official.pieces,
        seed=seed,
        max_bad=1.0,
        **{name: value for name, value in loading.items() if name not in colours},
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
    logits, labels, _ = extract(lambda images: probe(features(images).float()), test, size, **loading)
    return accuracy(logits, labels)


def _probe(width: int, classes: int, standardise: bool, seed: int) -> nn.Module:
    """Linear classifier with weights from normal(0, 0.01) and bias 0, as in the code of MoCo, MoCo v3 and MAE."""
    linear = nn.utils.skip_init(nn.Linear, width, classes)  # does not use the global generator
    nn.init.normal_(linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(width, eps=EPS, affine=False), linear) if standardise else linear
