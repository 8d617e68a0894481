"""A run as the report reads it: what its files say, and what can be loaded of it."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastssl.data.source import Source, Subset, open_source
from fastssl.eval.features import extract
from fastssl.run import Run
from fastssl.train.log import read_metrics

from .parts import short

BANK = 5000  # training images that neighbours are searched among
ASKED = 2000  # test images that are mapped
T = TypeVar("T")


class Opened:
    """One run of the report.

    Raises:
        ValueError: it has no metrics yet.
    """

    def __init__(self, run: Run, name: str, colour: str):
        self.run, self.name, self.colour = run, name, colour
        self.metrics = read_metrics(run.folder / "metrics.jsonl")
        if not self.metrics:
            raise ValueError(f"report: {run.folder} has no metrics yet")
        self.evaluations = run.evaluations()
        self.missing: list[str] = []  # why parts of the report are missing, a sentence each
        self.method: nn.Module | None = None
        self.train_source: Source | None = None
        self.test_source: Source | None = None
        self.parameters: tuple[int, int] | None = None  # trained, all

    def load(self) -> None:
        """Loads the method, onto the GPU if there is one, and opens the data; what can't be had is said in `missing`:
        a run may have no checkpoint yet, and its data may have moved."""
        self.method = self.attempt(self.run.load)
        sources = self.attempt(lambda: tuple(open_source(self.run.options.data, split) for split in ("train", "test")))
        self.train_source, self.test_source = sources or (None, None)
        if self.method is not None:
            sizes = [(p.numel(), p.requires_grad) for p in self.method.parameters()]
            self.parameters = sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
            self.method.to("cuda" if torch.cuda.is_available() else "cpu")

    def release(self) -> None:
        """Frees the memory of the method: of several runs one is loaded at a time."""
        self.method = None

    def attempt(self, makes: Callable[[], T]) -> T | None:
        """What `makes` returns, or None and a sentence in `missing`: what there is of a run is still reported."""
        try:
            return makes()
        except (ValueError, OSError) as error:
            if str(error) not in self.missing:
                self.missing.append(str(error))
            return None

    @property
    def size(self) -> tuple[int, int]:
        return self.run.config.image_size

    @property
    def last(self) -> dict:
        return self.metrics[-1]

    def epoch_of(self, step: int) -> float:
        return step * self.last["epoch"] / self.last["step"] if self.last["step"] else 0.0

    def knn(self) -> tuple[list[tuple[float, float]], float | None]:
        """([(epoch, accuracy)] of the encoder, by epoch, and the accuracy of raw pixels if known), on the run's own
        data, with the k and τ that were asked for most."""
        own = [e for e in self.evaluations if e.get("data", self.run.options.data) == self.run.options.data]
        curve, raw = ([e for e in own if e["evaluation"] == kind] for kind in ("knn", "knn of raw pixels"))
        if curve:
            usual = Counter((e.get("k"), e.get("tau")) for e in curve).most_common(1)[0][0]
            curve = [e for e in curve if (e.get("k"), e.get("tau")) == usual]
        points = sorted((e.get("epoch", self.epoch_of(e["step"])), e["accuracy"]) for e in curve)
        return points, raw[-1]["accuracy"] if raw else None

    def at_the_start(self) -> str:
        return "given encoder" if self.run.options.weights else "untrained encoder"

    def features(self, source: Source, count: int) -> tuple[Tensor, Tensor, list[int]]:
        """(features [N, F] float32, labels [N], image numbers) of up to `count` images from all over a source, on the
        CPU. The method is on the device that it is computed on."""
        step = -(-len(source) // count)
        part = Subset(source, range(0, len(source), step))
        device = next(self.method.parameters()).device
        features, labels, index = extract(self.method.features, part, self.size, device=device)
        return features.cpu(), labels.cpu(), [part.indices[i] for i in index.tolist()]


def names_of(runs: list[Run]) -> list[str]:
    """Names that tell runs apart: of their folders, with as many of the folders above as it takes."""
    folders = [run.folder.resolve().parts for run in runs]
    deepest = max(map(len, folders))
    for depth in range(1, deepest + 1):
        names = [str(Path(*parts[-depth:])) for parts in folders]
        if len(set(names)) == len(names):
            return [short(name) for name in names]
    twice = next(run.folder for i, run in enumerate(runs) if folders[i] in folders[:i])
    raise ValueError(f"report: {twice} is named twice")
