"""Accuracy with few labels: a pretrained encoder beside raw pixels and the same network trained from scratch.

Each row of the table has the same labels and the same held-out images:

* raw pixels and the frozen encoder's features, by kNN and by a linear classifier;
* all of the network and a new classifier, trained from scratch and fine-tuned from the pretrained encoder by the same
  recipe: AdamW for a fixed number of steps with a warm-up and half a cosine, random crops, weight decay. Only initial
  weights, learning rate and layer decay differ. Steps are fixed, not epochs, of which ten labels would need hundreds.

The learning rates were chosen, for each of the two, by a sweep on images that are not held out:
`python -m benchmarks.few_labels`.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.data.augmentation import Augmentation, View
from fastssl.data.loader import Loader
from fastssl.data.source import Source, Subset
from fastssl.nn.backbones import ForeignNetwork

from .features import extract
from .few_labels_table import PIXELS, PRETRAINED, ROWS, SCRATCH, Measured
from .finetuning import parameter_groups
from .knn import knn_accuracy
from .labels import accuracy, labelled_subset
from .linear import EPS, Affine, fit_lbfgs
from .protocols import FewLabels, Finetune

SMALL = 64  # pixels of the longer side up to which images stay in memory, and their pixels are classified too
K, TAU = 20, 0.07  # largest number of neighbours that vote, and temperature of their votes
ITERATIONS = 100  # of L-BFGS at most
WARMUP = 0.1  # share of the steps in which the learning rate rises from 0
EVERY = 30.0  # seconds between lines on the progress
Rows = tuple[Tensor, Tensor, Tensor]  # features [N, F] float32, labels [N], numbers of the images [N]
T, R = TypeVar("T"), TypeVar("R")


class Kept(Subset):
    """Images of a source that stay in memory once they are read: small images, which are read many times."""

    def __init__(self, source: Source, indices: Sequence[int]):
        super().__init__(source, indices)
        self._kept: dict[int, Any] = {}

    def read(self, index: int) -> Any:
        number = self.indices[index]
        if number not in self._kept:
            self._kept[number] = self.source.read(number)
        return self._kept[number]


class Draws:
    """Several draws of the labels. A draw of fewer labels is part of that of more.

    Args:
        source: images with labels.
        counts: numbers of labels.
        number: number of draws.
        seed: seed of the first draw; the next ones have the next seeds.
    """

    def __init__(self, source: Source, counts: Sequence[int], number: int, seed: int):
        self.counts, self.seeds = tuple(counts), tuple(range(seed, seed + number))
        keys = itertools.product(self.counts, self.seeds)
        self._images = {key: list(cast(Subset, labelled_subset(source, *key)).indices) for key in keys}

    def images(self, count: int, seed: int) -> list[int]:
        """Numbers of the images of a draw, in order."""
        return self._images[count, seed]

    def all_images(self) -> list[int]:
        """Numbers of the images of any draw, in order."""
        return sorted(set().union(*self._images.values()))


def draw_labels(source: Source, numbers: FewLabels, seed: int, name: str) -> Draws:
    """The draws of the labels. Numbers of labels that the images do not allow are left out, and named.

    There must be two labels, one of each class with images, and an image for each label.

    Args:
        source: images with labels.
        numbers: numbers of labels and of draws.
        seed: seed of the first draw.
        name: the data in messages.

    Raises:
        ValueError: the images allow none of the numbers of labels.
    """
    classes = len({source.label(number) for number in range(len(source))})
    counts = sorted(set(numbers.counts))
    fitting = [count for count in counts if max(2, classes) <= count <= len(source)]
    left_out = " and ".join(f"{count:,}" for count in counts if count not in fitting)
    limits = f"the {classes:,} classes to the {len(source):,} labelled images of {name}"
    if not fitting:
        raise ValueError(f"eval few-labels: --counts must be from {limits}, got {left_out}")
    if left_out:
        print(f"eval few-labels: {left_out} labels are left out, as counts go from {limits}", flush=True)
    return Draws(source, fitting, numbers.draws, seed)


def classify_features(start: str, train: Rows, test: Rows, draws: Draws, l2: float) -> list[Measured]:
    """Accuracies of kNN and of a linear classifier for all draws.

    As many neighbours vote as a class has labels, at most `K`, with the temperature `TAU`. The linear classifier
    minimises mean cross entropy + ½ · l2 · ‖weight‖² on features that are standardised by the images with labels:
    (x − mean) / √(variance + mean variance / 10), where ten images alone would make some variances far too small.

    Args:
        start: what the features are, for the results.
        train: rows of the images of all draws.
        test: rows of the held-out images.
        draws: the draws of the labels; their images that `train` lacks are passed over.
        l2: weight of the penalty.

    Raises:
        ValueError: features are not finite.
    """
    (x, y, numbers), (queries, labels, _) = train, test
    row_of, classes = {number: row for row, number in enumerate(numbers.tolist())}, int(y.max()) + 1
    found = []
    for count in draws.counts:
        near, straight = [], []
        for seed in draws.seeds:
            rows = torch.tensor([row_of[n] for n in draws.images(count, seed) if n in row_of], device=x.device)
            bank, bank_labels = x[rows], y[rows]
            k = max(1, min(K, count // len(bank_labels.unique())))
            near.append(knn_accuracy(bank, bank_labels, queries, labels, (k,), TAU)[k])
            variance, mean = torch.var_mean(bank, dim=0, correction=0)
            scale = (variance + variance.mean() / 10 + EPS).rsqrt()
            fitted = fit_lbfgs((bank - mean) * scale, bank_labels, classes, l2, ITERATIONS)
            straight.append(accuracy(Affine(mean, scale, *fitted)(queries), labels).top1)
        found.append(Measured(start, "knn", count, tuple(near)))
        found.append(Measured(start, "linear", count, tuple(straight)))
    return found


def train_on_few(
    model: nn.Module, train: Source, numbers: FewLabels, start: str, size: tuple[int, int], seed: int, **loading: Any
) -> nn.Module:
    """Trains all of a model on few images, in place, and returns it in evaluation mode.

    Images that cannot be decoded are replaced by others of their batch.

    Args:
        model: a model of `finetuning.build_classifier`.
        train: images with labels.
        numbers: steps, batch size, learning rates, weight decay, augmentation.
        start: SCRATCH or PRETRAINED, which decides learning rate and layer decay.
        size: (height, width) in pixels.
        seed: seed of order and crops.
        loading: `mean`, `std`, `device`, `workers` and `engine`, as for `evaluation_loader`.
    """
    colours = {name: loading.pop(name) for name in ("mean", "std") if name in loading}
    view = View(size, (numbers.crop_min, 1.0), interpolation="bicubic", flip_p=numbers.flip_p, **colours)
    batch = min(numbers.batch_size, len(train))
    repeated = Subset(train, [i % len(train) for i in range(numbers.steps * batch)])  # one epoch has all steps
    loader = Loader(repeated, Augmentation((view,), reduced=False), batch, seed=seed, max_bad=1.0, **loading)
    peak, layer_decay = (numbers.scratch_lr, 1.0) if start == SCRATCH else (numbers.lr, numbers.layer_decay)
    groups = parameter_groups(model, Finetune(weight_decay=numbers.weight_decay, layer_decay=layer_decay))
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    model.to(loader.device).train()
    for step, data in enumerate(loader.epoch(0)):
        for group in optimizer.param_groups:
            group["lr"] = peak * share_of_peak(step / numbers.steps) * group["lr_scale"]
        F.cross_entropy(model(data.views[0]), data.label).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def share_of_peak(done: float) -> float:
    """Learning rate as a share of the largest, when this share of the steps is done: warm-up, then half a cosine."""
    return done / WARMUP if done < WARMUP else 0.5 + 0.5 * math.cos(math.pi * (done - WARMUP) / (1 - WARMUP))


def train_networks(
    build: Callable[[str, int], nn.Module],
    train: Source,
    test: Source,
    draws: Draws,
    numbers: FewLabels,
    size: tuple[int, int],
    at_once: int = 1,
    **loading: Any,
) -> list[Measured]:
    """Accuracies of training from scratch and of fine-tuning for all draws.

    Args:
        build: a new network with a classifier by its start (SCRATCH or PRETRAINED) and a seed.
        train, test: images with labels.
        draws: the draws of the labels.
        numbers, size, loading: as for `train_on_few`.
        at_once: networks to train at a time, on a CPU, with a thread each; results do not depend on it, if it is not 1.
    """

    def measure(job: tuple[str, int, int, nn.Module]) -> float:
        start, count, seed, model = job
        model = train_on_few(model, Subset(train, draws.images(count, seed)), numbers, start, size, seed, **loading)
        logits, labels, _ = extract(model, test, size, **loading)
        return accuracy(logits, labels).top1

    cells = list(itertools.product((SCRATCH, PRETRAINED), draws.counts))
    jobs = ((start, count, seed, build(start, seed)) for start, count in cells for seed in draws.seeds)
    number = len(draws.seeds)
    shares = list(_reported(_map_in_threads(measure, jobs, at_once), len(cells) * number))
    return [
        Measured(start, "finetune", count, tuple(shares[i * number : (i + 1) * number]))
        for i, (start, count) in enumerate(cells)
    ]


def _map_in_threads(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """`function` of each item, in their order, by several threads, of which torch uses one in each.

    Two small networks with a thread each take less time than one after the other with two.
    """
    if threads == 1:
        yield from map(function, items)
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread, and of threads that begin from now on
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(function, items)
    finally:
        torch.set_num_threads(before)


def _reported(results: Iterable[R], total: int) -> Iterator[R]:
    """The results; prints how many there are, every `EVERY` seconds."""
    printed = time.monotonic()
    for done, result in enumerate(results, 1):
        if time.monotonic() - printed >= EVERY and done < total:
            print(f"few labels: {done} of {total} networks trained, from scratch and fine-tuned", flush=True)
            printed = time.monotonic()
        yield result


def compare(
    features: Callable[[Tensor], Tensor],
    build: Callable[[str, int], nn.Module],
    train: Source,
    test: Source,
    draws: Draws,
    numbers: FewLabels,
    size: tuple[int, int],
    **loading: Any,
) -> list[Measured]:
    """All accuracies, row by row of the table. Raw pixels of large images are left out.

    Args:
        features: normalised images [B, 3, H, W] → [B, F] of the frozen encoder.
        build, train, test, draws, numbers, size, loading: as for `train_networks`.

    Raises:
        ValueError: features are not finite, or none of the images can be decoded.
    """
    small = max(size) <= SMALL and train.size is not None and max(train.size) <= SMALL
    if small:
        train, test = Kept(train, range(len(train))), Kept(test, range(len(test)))
    chosen, found = draws.all_images(), []
    for start, function in ((PIXELS, _pixels), (PRETRAINED, features)):
        if start == PRETRAINED or small:
            x, labels, rows = extract(function, Subset(train, chosen), size, **loading)
            bank = x, labels, torch.tensor(chosen)[rows.cpu()]
            found += classify_features(start, bank, extract(function, test, size, **loading), draws, numbers.l2)
    # networks of other libraries may draw random numbers in training, from the one global generator
    alone = not small or torch.device(loading.get("device", "cpu")).type != "cpu"
    alone = alone or isinstance(build(PRETRAINED, 0), ForeignNetwork)
    found += train_networks(
        build, train, test, draws, numbers, size, at_once=1 if alone else torch.get_num_threads(), **loading
    )
    return sorted(found, key=lambda result: list(ROWS).index(result.row))


def _pixels(images: Tensor) -> Tensor:
    return images.flatten(1)
