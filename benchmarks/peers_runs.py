"""One run of a method by fastssl or by lightly: kNN accuracy on the way, seconds of a core, images a second.

Both start from the same encoder and have the images in memory, the same views, batch, optimizer and schedule, one
thread and no workers. The clock counts the processor time of whole epochs, with their views, and no evaluation.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastssl.data.loader import Loader
from fastssl.data.source import open_source
from fastssl.data.sources.arrays import Arrays
from fastssl.eval.features import extract
from fastssl.eval.knn import knn_accuracy
from fastssl.eval.spectrum import measure_spectrum
from fastssl.method_modules import method_module
from fastssl.milestones import shorten
from fastssl.train.config import Execution
from fastssl.train.optim import build_optimizer
from fastssl.train.schedule import learning_rate, peak_learning_rate, weight_decay
from fastssl.train.trainer import Trainer

from .machine import BUSY, OtherPrograms, keep_freed_memory

K = 20  # neighbours
POINTS = 10  # evaluations after that of the untrained encoder
HELD_OUT = 2000  # most held-out images
LIBRARIES = ("fastssl", "lightly")


class Cell(NamedTuple):
    """What one run measures."""

    data: str  # source, as in `open_source`
    method: str  # name of our method
    library: str  # one of LIBRARIES
    seed: int
    images: int  # most training images
    epochs: int | None = None  # None: those of the preset

    @property
    def key(self) -> tuple:
        """What a stored row must have in common with this cell to be its measurement."""
        return (short_name(self.data), self.method, self.library, self.seed, self.images, settings(self))


def short_name(data: str) -> str:
    """The source without the folders of its path: `idx:/usr/share/datasets/fashion-mnist` is `fashion-mnist`."""
    argument = data.partition(":")[2]
    return argument.rstrip("/").rpartition("/")[2] if "/" in argument else data


def command(cell: Cell) -> str:
    """The command that measures a cell."""
    chosen = f"--data {cell.data} --methods {cell.method} --seeds {cell.seed} --images {cell.images}"
    return f"python -m benchmarks.learning_peers {chosen}" + (f" --epochs {cell.epochs}" if cell.epochs else "")


def config_of(cell: Cell) -> Any:
    """The preset `small` of the method, shortened where the cell says so."""
    return shorten(method_module(cell.method).Config.small(), cell.epochs)


def settings(cell: Cell) -> str:
    """A digest of all numbers of the configuration: a changed preset is measured again."""
    return hashlib.sha256(repr(dataclasses.asdict(config_of(cell))).encode()).hexdigest()[:12]


def in_memory(data: str, split: str, most: int) -> Arrays:
    """The first images of a source as an array, so that no clock counts how they are drawn or decoded."""
    source = open_source(data, split)
    if source.size is None or source.classes is None:
        raise ValueError(f"learning_peers: {data} must have images of one size, with labels")
    count = min(most, len(source))
    pixels = np.stack([source.read(index) for index in range(count)])
    labels = np.array([source.label(index) for index in range(count)])
    return Arrays(pixels, labels, source.classes, np.arange(count), data)


class Ours:
    """Our method, loader and trainer, as `fastssl.pretrain` puts them together.

    Args:
        cell: the run.
        config: its method's configuration.
        source: training images.
    """

    def __init__(self, cell: Cell, config: Any, source: Arrays):
        module = method_module(cell.method)
        torch.manual_seed(cell.seed)
        self.method, training = module.build(config), config.training
        self.loader = Loader(source, config.augmentation, training.batch_size // training.accumulate, seed=cell.seed)
        groups = getattr(module, "parameter_groups", None)
        self.steps = len(self.loader) // training.accumulate
        self.trainer = Trainer(self.method, training, Execution(), self.steps, parameter_groups=groups)

    def epoch(self, number: int) -> None:
        batches = self.loader.epoch(number)
        for _ in range(self.steps):
            self.trainer.step(batches)

    def features(self, images: Tensor) -> Tensor:
        return self.method.features(images)


class Pictures(Dataset):
    """Pillow images in memory with lightly's transform, as one of torchvision's datasets has them."""

    def __init__(self, source: Arrays, transform: Callable[[Image.Image], list[Tensor]]):
        self.pictures = [Image.fromarray(source.read(index)) for index in range(len(source))]
        self.labels, self.transform = [source.label(index) for index in range(len(source))], transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        return self.transform(self.pictures[index]), self.labels[index]


class Lightly:
    """The same method of lightly's parts, in a plain training loop; the arguments are those of `Ours`.

    The optimizer is torch's, with the groups and numbers of ours, its fused form.
    """

    def __init__(self, cell: Cell, config: Any, source: Arrays):
        from .peers_lightly import PEERS, parameter_groups

        build, views = PEERS[cell.method]
        training = config.training
        if training.accumulate > 1 or (training.freeze_epochs and cell.method != "dino"):
            raise ValueError(f"learning_peers: {cell.method} has settings that the loop for lightly lacks")
        torch.manual_seed(cell.seed)
        self.method = build(config, method_module(cell.method).build(config).encoder)
        np.random.seed(cell.seed)  # noqa: NPY002 - lightly's transforms draw from it
        self.loader = DataLoader(Pictures(source, views(config)), training.batch_size, shuffle=True, drop_last=True)
        self.optimizer = build_optimizer(self.method, training, parameter_groups(cell.method, config))
        self.training, self.step = training, 0

    def epoch(self, number: int) -> None:
        length = len(self.loader)
        total = self.training.epochs * length
        for views, _ in self.loader:
            self._set_schedules(self.step / length, length, self.step / total)
            self.method.before_step(self.step, total)
            self.method.loss(views).backward()
            self.method.after_backward(self.step / length)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1

    def _set_schedules(self, epochs: float, steps_per_epoch: int, progress: float) -> None:
        training = self.training
        rate, decay = learning_rate(training, epochs, steps_per_epoch), weight_decay(training, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = (peak_learning_rate(training) if group.get("constant_lr") else rate) * group["lr_scale"]
            group["weight_decay"] = decay * group["weight_decay_scale"]

    def features(self, images: Tensor) -> Tensor:
        return self.method.features(images)


def measure(cell: Cell) -> dict:
    """The row of a cell. The process keeps to one thread.

    Returns: facts of the cell; "curve": [epoch, seconds of a core, kNN accuracy] of the untrained encoder and of
        `POINTS` epochs; "images_per_second" of a core, "core_seconds" and "wall_seconds" of all epochs.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    config = config_of(cell)
    splits = in_memory(cell.data, "train", cell.images), in_memory(cell.data, "test", HELD_OUT)
    learner = (Ours if cell.library == "fastssl" else Lightly)(cell, config, splits[0])
    epochs, batch = config.training.epochs, config.training.batch_size
    due = {round(point * epochs / POINTS) for point in range(1, POINTS + 1)}
    programs = OtherPrograms()
    core_seconds = wall_seconds = 0.0
    curve, tables = [[0, 0.0, accuracy(learner, config, splits)[0]]], None
    for epoch in range(epochs):
        learner.method.train()
        clock, wall = time.process_time(), time.perf_counter()
        learner.epoch(epoch)
        core_seconds, wall_seconds = (
            core_seconds + time.process_time() - clock,
            wall_seconds + time.perf_counter() - wall,
        )
        if epoch + 1 in due:
            correct, tables = accuracy(learner, config, splits)
            curve.append([epoch + 1, round(core_seconds, 2), correct])
    seen, share = epochs * (len(splits[0]) // batch * batch), programs.share()
    return {
        "data": short_name(cell.data),
        "method": cell.method,
        "library": cell.library,
        "seed": cell.seed,
        "images": cell.images,
        "settings": settings(cell),
        "command": command(cell),
        "training_images": len(splits[0]),
        "held_out_images": len(splits[1]),
        "epochs": epochs,
        "batch": batch,
        "backbone": config.backbone,
        "images_seen": seen,
        "core_seconds": round(core_seconds, 2),
        "wall_seconds": round(wall_seconds, 2),
        "images_per_second": round(seen / core_seconds, 1),
        "knn_raw": raw_accuracy(config, splits),
        "knn_untrained": curve[0][2],
        "knn": curve[-1][2],
        "rankme": round(measure_spectrum(tables[0]).rankme, 2),
        "curve": curve,
        "others": None if share is None else round(share, 3),
        "busy": (share or 0) > BUSY,
    }


def accuracy(learner: Ours | Lightly, config: Any, splits: tuple[Arrays, Arrays]) -> tuple[float, tuple]:
    """kNN accuracy of the learner's features, and the features of the training images with their labels."""
    learner.method.eval()
    return _knn(learner.features, config, splits)


def raw_accuracy(config: Any, splits: tuple[Arrays, Arrays]) -> float:
    """kNN accuracy of raw pixels."""
    return _knn(lambda images: images.flatten(1), config, splits)[0]


def _knn(
    features: Callable[[Tensor], Tensor], config: Any, splits: tuple[Arrays, Arrays]
) -> tuple[float, tuple[Tensor, Tensor]]:
    view = config.augmentation.views[0]
    normalisation = getattr(config, "normalisation", None) or {"mean": view.mean, "std": view.std}
    bank, queries = (extract(features, split, config.image_size, **normalisation)[:2] for split in splits)
    return round(knn_accuracy(*bank, *queries, (K,))[K], 4), bank
