"""Curves of metrics and kNN accuracy, of several runs in the same axes."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fastssl.eval.spectrum import redundant_embeddings

from .parts import Picture, Section
from .pictures import GREY, draw
from .run_data import RunData

POINTS = 300  # largest number of points of a line: more would not be visible and make the file large
TITLES = {
    "loss": "loss",
    "top1": "positives ranked first",
    "lr": "learning rate",
    "momentum": "momentum of the momentum encoder",
    "grad_norm": "norm of the gradient",
    "loss_scale": "loss scale",
    "skipped": "skipped steps",
    "images_per_second": "images/s",
    "data_wait": "waiting for data",
}
FIRST, LAST = ["loss"], ["lr", "momentum", "grad_norm", "loss_scale", "skipped", "images_per_second", "data_wait"]
HIDDEN = {"step", "epoch", "peak_memory"}
SHARES = {"top1", "data_wait"}
FROM_ZERO = {"images_per_second", "data_wait", "top1", "skipped"}


def training(runs: list[RunData]) -> Section:
    """Curves of every metric by epoch."""
    names = {name: None for run in runs for line in run.metrics for name in line}  # in order of appearance
    others = [name for name in names if name not in {*FIRST, *LAST, *HIDDEN}]
    pictures = []
    for name in [*FIRST, *others, *LAST]:
        lines = [(run, *_series(run, name)) for run in runs]
        lines = [line for line in lines if len(line[1])]
        if not lines or (name == "skipped" and not any(values.any() for *_, values in lines)):
            continue
        for group in _comparable(name, lines):
            suffix = f" of {group[0][0].run.method_name}" if name == "loss" and len(group) < len(lines) else ""
            pictures.append(_picture(name, TITLES.get(name, name.replace("_", " ")) + suffix, group))
    text = "Means over the steps since the previous record."
    if any(len(run.metrics) > POINTS for run in runs):
        text += f" Lines of more than {POINTS} points are averaged; the band is their range."
    if len({run.run.method_name for run in runs}) > 1:
        text += " Losses of different methods are not comparable: each method has its own axes."
    for run in runs:
        if sentence := redundant_embeddings(run.metrics):
            text += f" {run.name}: {sentence}" if len(runs) > 1 else f" {sentence}"
    return Section("curves", "Curves", text, pictures)


def _series(run: RunData, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(epochs [N], values [N]) of the records with a finite value."""
    pairs = [(line["epoch"], line[name]) for line in run.metrics if line.get(name) is not None]
    epochs, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    return epochs, values


def _comparable(name: str, lines: list) -> list[list]:
    """Groups of lines that share axes: losses only with those of the same method."""
    if name != "loss":
        return [lines]
    groups = {}
    for line in lines:
        groups.setdefault(line[0].run.method_name, []).append(line)
    return list(groups.values())


def _picture(name: str, title: str, lines: list) -> Picture:
    several = len(lines) > 1

    def plot(axes: Axes) -> None:
        for run, epochs, values in lines:
            _line(axes, epochs, values, run.colour)
        axes.set_xlabel("epoch")
        _ranges(axes, name)

    ends = [(run.colour if several else "", _number(name, values[-1])) for run, _, values in lines]
    description = ", ".join(
        f"{run.name}: {_number(name, values[-1])}" if several else end
        for (run, _, values), (_, end) in zip(lines, ends)
    )
    return draw(title, f"{title} by epoch; at the end {description}", plot, values=ends)


def _line(axes: Axes, epochs: np.ndarray, values: np.ndarray, colour: str) -> None:
    if len(values) > POINTS:
        stretches = list(zip(np.array_split(epochs, POINTS), np.array_split(values, POINTS)))
        low, high = ([reduce(v) for _, v in stretches] for reduce in (np.min, np.max))
        epochs, values = (np.array([part[i].mean() for part in stretches]) for i in (0, 1))
        axes.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(epochs, values, color=colour, linewidth=1.4, marker="o" if len(values) < 3 else None, markersize=4)


def _ranges(axes: Axes, name: str) -> None:
    axes.locator_params(axis="both", nbins=5)
    if name in FROM_ZERO:
        axes.set_ylim(bottom=0)
    if name in SHARES:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    elif name == "lr":
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _number(name: str, value: float) -> str:
    return f"{value:.1%}" if name in SHARES else f"{value:.0f}" if name == "images_per_second" else f"{value:.4g}"


def knn(runs: list[RunData]) -> Picture | None:
    """kNN accuracy by epoch, raw pixels as a dashed line; None without evaluations."""
    lines = [(run, *run.knn()) for run in runs]
    lines = [line for line in lines if line[1]]
    if not lines:
        return None
    several = len(runs) > 1

    def plot(axes: Axes) -> None:
        for run, points, raw in lines:
            epochs, accuracy = zip(*points)
            axes.plot(epochs, accuracy, color=run.colour, linewidth=1.4, marker="o", markersize=3.5)
            if raw is not None:
                axes.axhline(raw, color=run.colour if several else GREY, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xlabel("epoch")
        axes.locator_params(axis="y", nbins=6)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))  # evaluations follow whole epochs
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")

    best = [(run.colour if several else "", f"{max(a for _, a in points):.1%}") for run, points, _ in lines]
    legend = [(run.colour, "disc", run.name if several else "features of the encoder") for run, *_ in lines]
    if any(raw is not None for *_, raw in lines):
        legend.append((GREY, "dash", "raw pixels"))
    description = ", ".join(f"{run.name} {end}" for (run, *_), (_, end) in zip(lines, best))
    return draw(
        "kNN accuracy, best", f"kNN accuracy by epoch; best: {description}", plot, 2.4, values=best, legend=legend
    )
