"""Map of the features: held-out images as points in the plane; images with similar features are close."""

from collections import Counter
from types import ModuleType
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor

from fastssl.extras import need

from .parts import Picture, short
from .pictures import COLOURS, GREY, draw

Projection = Literal["pca", "umap"]
NAMED = 20  # largest number of classes with a colour and a name; the others are grey
FEWEST = 4  # smallest number of images for a map
MARKS = {"disc": "o", "diamond": "D"}


def check_projection(projection: str) -> None:
    """Checks a projection before anything is computed.

    Raises:
        ValueError: the projection is unknown.
        MissingExtra: umap-learn is not installed.
    """
    if projection not in ("pca", "umap"):
        raise ValueError(f"report: --map must be pca or umap, got {projection!r}")
    if projection == "umap":
        _umap()


def _umap() -> ModuleType:
    return need("umap", what="report: --map umap", extra="umap", distribution="umap-learn")


def project(features: Tensor, projection: Projection) -> tuple[np.ndarray, str]:
    """(points [N, 2], description) of features [N, F], compared by cosine as in kNN; N ≥ `FEWEST`."""
    unit = F.normalize(features.double(), dim=1)
    if projection == "umap":
        few = min(15, len(unit) - 1)
        reducer = _umap().UMAP(n_components=2, n_neighbors=few, metric="cosine", random_state=0, n_jobs=1)
        return np.asarray(reducer.fit_transform(unit.numpy())), f"UMAP by cosine, {few} neighbours."
    points, share = principal_components(unit, 2)
    return points.numpy(), f"PCA; two directions have {share:.0%} of the variance."


def principal_components(x: Tensor, count: int) -> tuple[Tensor, float]:
    """(the first `count` principal components [N, count] of x [N, F] float64, their share of the variance).

    The sign of a component is that in which the largest coefficient of its direction is positive. Zeros stand for
    those that x does not have.
    """
    centred = x - x.mean(0)
    _, scales, directions = torch.linalg.svd(centred, full_matrices=False)
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    components = centred @ (directions * largest.sign())[:count].T
    share = scales[:count].square().sum() / scales.square().sum().clamp_min(1e-30)
    return F.pad(components, (0, count - components.shape[1])), float(share)


def scatter(points: np.ndarray, labels: list[int], classes: list[str] | None) -> Picture:
    """Scatter plot of `points` [N, 2], coloured by label; the legend has the `NAMED` most frequent classes."""
    counts = Counter(label for label in labels if classes and 0 <= label < len(classes))
    named = sorted(label for label, _ in counts.most_common(NAMED))
    styles = {label: (COLOURS[i % len(COLOURS)], list(MARKS)[i // len(COLOURS)]) for i, label in enumerate(named)}
    colour_of_rest = GREY if named else COLOURS[0]
    labels = np.array(labels)
    rest = ~np.isin(labels, named)
    area = max(4, min(20, 6000 / len(labels)))

    def plot(axes: Axes) -> None:
        axes.scatter(*points[rest].T, s=area, c=colour_of_rest, alpha=0.5, linewidths=0, rasterized=True)
        for label, (colour, mark) in styles.items():
            chosen = points[labels == label].T
            axes.scatter(*chosen, s=area, c=colour, marker=MARKS[mark], alpha=0.75, linewidths=0, rasterized=True)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
        axes.margins(0.03)

    legend = [(colour, mark, short(classes[label])) for label, (colour, mark) in styles.items()]
    if named and rest.any():
        legend.append((GREY, "disc", "others"))
    alt = f"{len(labels)} held-out images as points" + (f", coloured by {len(named)} classes" if named else "")
    return draw("", alt, plot, 3.0, legend=legend)
