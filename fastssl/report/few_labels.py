"""Accuracy against the number of labels: the pretrained encoder, the same network from scratch, raw pixels."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from fastssl.eval.few_labels_table import PIXELS, PRETRAINED, ROWS, SCRATCH, Measured, row_name, sentences, table_of

from .parts import Picture, Table, Text
from .pictures import COLOURS, GREY, draw
from .run_data import RunData

LINES = {  # colour and dash of each row
    (PIXELS, "knn"): (GREY, (0, (1, 2))),
    (PIXELS, "linear"): (GREY, (0, (4, 3))),
    (SCRATCH, "finetune"): (COLOURS[1], "-"),
    (PRETRAINED, "knn"): (COLOURS[2], "-"),
    (PRETRAINED, "linear"): (COLOURS[4], "-"),
    (PRETRAINED, "finetune"): (COLOURS[0], "-"),
}
MARKS = {(PIXELS, "knn"): "dots", (PIXELS, "linear"): "dash"}  # in the legend


def parts(run: RunData) -> list[Any]:
    """Picture, table and sentences of the newest `eval few-labels` of a run; [] without one."""
    results = newest(run.evaluations)
    if not results:
        return []
    head, rows = table_of(results, run.run.short_name)
    table = Table(head, rows, numbers=set(range(1, len(head))))
    text = sentences(results, run.run.short_name)
    return [picture(results, run.run.short_name), table, *([Text(text)] if text else [])]


def newest(evaluations: list[dict]) -> list[Measured]:
    """Results with the step, the data and the seed of the newest record; lines that are no results are passed over."""
    lines = [line for line in evaluations if line["evaluation"] == "few labels" and _is_result(line)]
    same = [[line.get(name) for name in ("step", "data", "draws", "seed")] for line in lines]
    found = [
        Measured(line["start"], line["classifier"], line["labels"], tuple(line["accuracies"]))
        for line, key in zip(lines, same)
        if key == same[-1]
    ]
    return list({(result.row, result.labels): result for result in found}.values())


def _is_result(line: dict) -> bool:
    """Whether a record of evaluations.jsonl, which others may have edited, has a row, labels and accuracies."""
    labels, shares = line.get("labels"), line.get("accuracies")
    if not isinstance(labels, int) or labels < 1 or not isinstance(shares, list) or not shares:
        return False
    return [line.get("start"), line.get("classifier")] in map(list, ROWS) and all(isinstance(x, float) for x in shares)


def picture(results: list[Measured], method: str) -> Picture:
    """Mean accuracy by number of labels; see `plot_results`."""
    lines = lines_of(results)
    legend = [(LINES[row][0], MARKS.get(row, "disc"), row_name(row, method)) for row in lines]
    ends = ", ".join(f"{row_name(row, method)} {line[-1].mean:.1%}" for row, line in lines.items())
    most = max(result.labels for result in results)
    alt = f"accuracy by number of labels; with {most:,} labels: {ends}"
    return draw("accuracy against labels", alt, lambda axes: plot_results(axes, results), 2.6, legend=legend)


def plot_results(axes: Axes, results: list[Measured]) -> None:
    """Draws mean accuracies by number of labels, on a logarithmic axis; bands are one standard deviation."""
    counts = sorted({result.labels for result in results})
    axes.set_xscale("log")
    for row, line in lines_of(results).items():
        colour, dash = LINES[row]
        labels, means = [r.labels for r in line], np.array([r.mean for r in line])
        spread = np.array([r.spread or 0.0 for r in line])
        axes.fill_between(labels, means - spread, means + spread, color=colour, alpha=0.15, linewidth=0)
        axes.plot(labels, means, color=colour, linewidth=1.4, linestyle=dash, marker="o", markersize=3.5)
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("labels")
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="y", nbins=6)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")


def lines_of(results: list[Measured]) -> dict[tuple[str, str], list[Measured]]:
    """The results of each row that has some, by number of labels."""
    lines = {row: sorted((r for r in results if r.row == row), key=lambda r: r.labels) for row in ROWS}
    return {row: line for row, line in lines.items() if line}
