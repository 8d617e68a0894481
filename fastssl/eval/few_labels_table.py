"""Rows, cells and the sentence of the table of accuracies with few labels."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

PIXELS, SCRATCH, PRETRAINED = "raw pixels", "scratch", "pretrained"  # what a classifier starts from
ROWS = {  # (start, classifier) of each row, and its name behind that of the start
    (PIXELS, "knn"): "kNN",
    (PIXELS, "linear"): "linear",
    (SCRATCH, "finetune"): "",
    (PRETRAINED, "knn"): "kNN",
    (PRETRAINED, "linear"): "linear",
    (PRETRAINED, "finetune"): "fine-tuned",
}
TOLD = 100  # number of labels of the sentence, if it was measured


class Measured(NamedTuple):
    """Accuracy of one classifier with one number of labels."""

    start: str  # PIXELS, SCRATCH or PRETRAINED
    classifier: str  # "knn", "linear" or "finetune"
    labels: int
    accuracies: tuple[float, ...]  # shares of the held-out images, one for each draw of the labels

    @property
    def row(self) -> tuple[str, str]:
        """Key in `ROWS`."""
        return self.start, self.classifier

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the draws; None of a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def text(self) -> str:
        """Mean and spread in percent."""
        return f"{self.mean:.1%}" + ("" if self.spread is None else f" ± {self.spread:.1%}")


def row_name(row: tuple[str, str], method: str) -> str:
    """Name of a row for a run of this method."""
    start = {PIXELS: PIXELS, SCRATCH: "trained from scratch", PRETRAINED: method}[row[0]]
    return ", ".join(filter(None, (start, ROWS[row])))


def table_of(results: Sequence[Measured], method: str) -> tuple[list[str], list[list[str]]]:
    """(names of the columns, rows of cells); a cell that was not measured is "–"."""
    counts, cells = counts_of(results), {(result.row, result.labels): result.text() for result in results}
    rows = [row for row in ROWS if any(result.row == row for result in results)]
    head = ["", *(f"{count:,} labels" for count in counts)]
    return head, [[row_name(row, method), *(cells.get((row, count), "–") for count in counts)] for row in rows]


def counts_of(results: Sequence[Measured]) -> list[int]:
    """Numbers of labels, ascending."""
    return sorted({result.labels for result in results})


def sentences(results: Sequence[Measured], method: str) -> str:
    """What the table shows, in one or two sentences, by the means of the draws.

    The first compares with `TOLD` labels, or with the middle one of other numbers. The second names the largest number
    with which training from scratch does not reach what fine-tuning does with those, if there is one. "" where a row
    was not measured.
    """
    counts = counts_of(results)
    told = TOLD if TOLD in counts else counts[len(counts) // 2]
    means = {(result.row, result.labels): result.mean for result in results}
    tuned, scratch = (PRETRAINED, "finetune"), (SCRATCH, "finetune")
    if any((row, told) not in means for row in ROWS if row[0] != PIXELS):
        return ""
    text = (
        f"With {told:,} labels, training from scratch reaches {means[scratch, told]:.0%}; the same network, pretrained "
        f"by {method} without labels, reaches {means[tuned, told]:.0%} fine-tuned, "
        f"{means[(PRETRAINED, 'linear'), told]:.0%} by a linear classifier and "
        f"{means[(PRETRAINED, 'knn'), told]:.0%} by kNN"
    )
    if pixels := [means[row, told] for row in ROWS if row[0] == PIXELS and (row, told) in means]:
        text += f"; raw pixels {max(pixels):.0%}"
    above = [count for count in counts if count > told and means[scratch, count] <= means[tuned, told]]
    return f"{text}. From scratch, {above[-1]:,} labels give {means[scratch, above[-1]]:.0%}." if above else f"{text}."
