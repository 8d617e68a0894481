"""Data of a run for its report: metrics, evaluations, method and images."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.data.source import Source, Subset
from fastssl.eval.features import extract
from fastssl.run import Run

from .parts import short

BANK = 5000  # training images to search for nearest neighbours
MAPPED = 2000  # held-out images in the map of the features
T = TypeVar("T")


class RunData:
    """One run of a report.

    Args:
        run: the run folder.
        name: short name that distinguishes the runs of a report.
        colour: colour of the run in curves.

    Raises:
        ValueError: the run has no metrics yet.
    """

    def __init__(self, run: Run, name: str, colour: str):
        self.run, self.name, self.colour = run, name, colour
        self.metrics = run.metrics()
        if not self.metrics:
            raise ValueError(f"report: {run.folder} has no metrics yet")
        self.evaluations = run.evaluations()
        self.missing: list[str] = []  # reasons why parts of the report are missing
        self.method: nn.Module | None = None
        self.train_source: Source | None = None
        self.test_source: Source | None = None
        self.parameters: tuple[int, int] | None = None  # (trained, all)

    def load(self) -> None:
        """Loads the method, to a GPU if available, and opens the data.

        A run may have no checkpoint yet, and its data may have moved: `missing` then has the reason.
        """
        self.method = self.attempt(self.run.load)
        sources = self.attempt(lambda: tuple(self.run.source(split) for split in ("train", "test")))
        self.train_source, self.test_source = sources or (None, None)
        if self.method is not None:
            sizes = [(p.numel(), p.requires_grad) for p in self.method.parameters()]
            self.parameters = sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
            self.method.to("cuda" if torch.cuda.is_available() else "cpu")

    def release(self) -> None:
        """Frees the method, so that the methods of several runs are in memory one at a time."""
        self.method = None

    def attempt(self, function: Callable[[], T]) -> T | None:
        """The result of `function`, or None if it fails; the reason is then added to `missing`."""
        try:
            return function()
        except (ValueError, OSError) as error:
            if str(error) not in self.missing:
                self.missing.append(str(error))
            return None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the method's images."""
        return self.run.image_size

    @property
    def last(self) -> dict:
        """The last record of the metrics."""
        return self.metrics[-1]

    def epoch_of(self, step: int) -> float:
        """The epoch of a step; between lines of the metrics their epochs are interpolated."""
        lines = [{"step": 0, "epoch": 0.0}, *self.metrics]
        return float(np.interp(step, [line["step"] for line in lines], [line["epoch"] for line in lines]))

    def knn(self) -> tuple[list[tuple[float, float]], float | None]:
        """([(epoch, accuracy)] of the encoder by epoch, accuracy of raw pixels or None) on the run's data.

        Of several k and τ the most frequent pair is taken, and nothing that was measured with few labels.
        """
        lines = [e for e in self.evaluations if self.run.is_own(e.get("data", self.run.options.data))]
        curve, raw = ([e for e in lines if e["evaluation"] == kind] for kind in ("knn", "knn of raw pixels"))
        curve = [e for e in curve if "labels" not in e]
        if curve:
            most_frequent = Counter((e.get("k"), e.get("tau")) for e in curve).most_common(1)[0][0]
            curve = [e for e in curve if (e.get("k"), e.get("tau")) == most_frequent]
        points = sorted((e.get("epoch", self.epoch_of(e["step"])), e["accuracy"]) for e in curve)
        return points, raw[-1]["accuracy"] if raw else None

    def initial_encoder(self) -> str:
        """Name of the encoder before the first step."""
        return "given encoder" if self.run.options.weights else "untrained encoder"

    def features(self, source: Source, count: int) -> tuple[Tensor, Tensor, list[int]]:
        """(features [N, F] float32, labels [N], indices) of at most `count` evenly spaced images of a source.

        Results are on the CPU; features are computed on the method's device.
        """
        step = -(-len(source) // count)
        part = Subset(source, range(0, len(source), step))
        device = next(self.method.parameters()).device
        features, labels, index = extract(self.method.features, part, self.size, device=device)
        return features.cpu(), labels.cpu(), [part.indices[i] for i in index.tolist()]


def names_of(runs: list[Run]) -> list[str]:
    """Names that distinguish runs: their folders' names, with as many parent folders as needed."""
    folders = [run.folder.resolve().parts for run in runs]
    deepest = max(map(len, folders))
    for depth in range(1, deepest + 1):
        names = [str(Path(*parts[-depth:])) for parts in folders]
        if len(set(names)) == len(names):
            return [short(name) for name in names]
    duplicate = next(run.folder for i, run in enumerate(runs) if folders[i] in folders[:i])
    raise ValueError(f"report: {duplicate} is named twice")
