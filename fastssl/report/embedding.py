"""A map of the features: each test image a point, near those whose features are alike."""

from collections import Counter
from types import ModuleType
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor

from .parts import Picture, short
from .pictures import COLOURS, GREY, draw

Embedding = Literal["pca", "umap"]
NAMED = 20  # classes with a colour and a name; the others are grey
FEWEST = 4  # images: fewer make no map
MARKS = {"disc": "o", "diamond": "D"}


def check(embedding: str) -> None:
    """Refuses a map that can't be made, before anything is computed.

    Raises:
        ValueError: it is unknown, or its package is not installed.
    """
    if embedding not in ("pca", "umap"):
        raise ValueError(f"report: --map must be pca or umap, got {embedding!r}")
    if embedding == "umap":
        _umap()


def _umap() -> ModuleType:
    try:
        import umap
    except ImportError as error:
        raise ValueError("report: --map umap needs umap-learn: pip install 'fastssl-engine[umap]'") from error
    return umap


def flat(features: Tensor, embedding: Embedding) -> tuple[np.ndarray, str]:
    """(places [N, 2], how they were made) of features [N, F], compared by cosine as in kNN; N ≥ `FEWEST`."""
    unit = F.normalize(features.double(), dim=1)
    if embedding == "umap":
        few = min(15, len(unit) - 1)
        reducer = _umap().UMAP(n_components=2, n_neighbors=few, metric="cosine", random_state=0, n_jobs=1)
        return np.asarray(reducer.fit_transform(unit.numpy())), f"UMAP by cosine, {few} neighbours."
    centred = unit - unit.mean(0)
    _, scales, directions = torch.linalg.svd(centred, full_matrices=False)
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    places = (
        centred @ (directions * largest.sign())[:2].T
    )  # the sign of a direction is arbitrary: fixed, for comparison
    shares = scales.square() / scales.square().sum().clamp_min(1e-30)
    return F.pad(
        places, (0, 2 - places.shape[1])
    ).numpy(), f"PCA; two directions hold {shares[:2].sum():.0%} of the variance."


def scatter(places: np.ndarray, labels: list[int], classes: list[str] | None) -> Picture:
    """Points at `places` [N, 2], coloured by label; the names of the `NAMED` most frequent classes in the legend."""
    counts = Counter(label for label in labels if classes and 0 <= label < len(classes))
    named = sorted(label for label, _ in counts.most_common(NAMED))
    looks = {label: (COLOURS[i % len(COLOURS)], list(MARKS)[i // len(COLOURS)]) for i, label in enumerate(named)}
    colour_of_rest = GREY if named else COLOURS[0]
    labels = np.array(labels)
    rest = ~np.isin(labels, named)
    area = max(4, min(20, 6000 / len(labels)))

    def onto(axes: Axes) -> None:
        axes.scatter(*places[rest].T, s=area, c=colour_of_rest, alpha=0.5, linewidths=0, rasterized=True)
        for label, (colour, mark) in looks.items():
            chosen = places[labels == label].T
            axes.scatter(*chosen, s=area, c=colour, marker=MARKS[mark], alpha=0.75, linewidths=0, rasterized=True)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
        axes.margins(0.03)

    legend = [(colour, mark, short(classes[label])) for label, (colour, mark) in looks.items()]
    if named and rest.any():
        legend.append((GREY, "disc", "others"))
    alt = f"{len(labels)} test images as points" + (f", coloured by {len(named)} classes" if named else "")
    return draw("", alt, onto, 3.0, legend=legend)
