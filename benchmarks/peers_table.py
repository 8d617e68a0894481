"""The table and the picture of fastssl beside lightly, from the stored runs of `learning_peers.py`."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import store
from .machine import BUSY
from .peers_runs import LIBRARIES
from .table import markdown_table, number, times

METHODS = ("moco_v2", "simclr_v1", "byol", "simsiam", "dino", "mae")
MARKERS = "<!-- peers:begin -->", "<!-- peers:end -->"
HEADER = (
    "images",
    "method",
    "pixels, untrained, %",
    "fastssl, %",
    "lightly, %",
    "difference",
    "fastssl, images/s",
    "lightly, images/s",
    "×",
    "whole run, min",
    "lightly to fastssl's, min",
    "to the same, min",
    "×",
)
VERSIONS = "torch", "torchvision", "timm", "lightly"
LEGEND = """\
*%*: kNN accuracy (k = 20) of held-out images by raw pixels, by the untrained encoder, and at the end of training: mean
± standard deviation over the seeds. *difference*: fastssl less lightly in points, ± its standard error. *images/s*:
training images, each counted once however many views it has, per second of processor time of one core, with views,
optimizer and momentum encoder. *min*: minutes of a core, without evaluation, fastssl / lightly. *lightly to fastssl's*:
until the mean curve of lightly reaches fastssl's last accuracy; "–": not in its whole run, which ends with its learning
rate at 0. *to the same*: until each reaches the smaller of both last accuracies. Both are "–" where that accuracy is
not above the untrained encoder's.

Both have the same images in memory, initial encoder, batch, epochs, schedule and laws of the views, one thread and no
workers; the numbers are those of the preset `small`. lightly's parts are put together as in its documentation around
torch's and timm's modules, with what makes plain torch faster on a CPU: channels-last layout, the fused optimizer, and
freed memory that stays in the process. Its heads have their own initial weights, its batch norms see one view at a time
(SimCLR, DINO), its BYOL starts with a copy as the target network."""
DISTURBED = "*busy*: other programs used this share of the core during a run, so no ratio is stated."
FAR = 2  # standard errors beyond which a difference of accuracies is named
PICTURE = "learning-peers.png"
SHOWN = f"![kNN accuracy of fastssl and of lightly against minutes of a core]({PICTURE})"


class Line(NamedTuple):
    """Stored runs of both libraries with the same images, method and settings."""

    data: str
    method: str
    rows: dict[str, list[dict]]  # by library

    def final(self, library: str) -> list[float]:
        return [row["knn"] for row in self.rows[library]]

    def curve(self, library: str) -> list[tuple[float, float]]:
        """(minutes of a core, accuracy), means over the seeds."""
        points = zip(*(row["curve"] for row in self.rows[library]))
        return [(_mean(p[1] for p in point) / 60, _mean(p[2] for p in point)) for point in points]

    def rate(self, library: str) -> float:
        return _mean(row["images_per_second"] for row in self.rows[library])

    @property
    def busy(self) -> float:
        """Largest share of a core that other programs used."""
        return max((row["others"] or 0 for rows in self.rows.values() for row in rows), default=0)

    @property
    def difference(self) -> float:
        """Accuracy of fastssl less lightly's."""
        return _mean(self.final("fastssl")) - _mean(self.final("lightly"))

    @property
    def error(self) -> float | None:
        """Standard error of the difference; None of a single seed."""
        finals = [self.final(library) for library in LIBRARIES]
        if min(map(len, finals)) < 2:
            return None
        return sum(statistics.variance(final) / len(final) for final in finals) ** 0.5

    def faster(self) -> float | None:
        """Images per second, as a multiple of lightly's; None if other programs were busy."""
        return None if self.busy > BUSY else self.rate("fastssl") / self.rate("lightly")

    def minutes_to_same(self) -> list[float | None]:
        """Minutes of each library to the smaller of both last accuracies, if that is above the untrained encoder's."""
        curves = [self.curve(library) for library in LIBRARIES]
        last = min(curve[-1][1] for curve in curves)
        untrained = _mean(row["knn_untrained"] for row in self.rows["fastssl"])
        return [minutes_to(curve, last) if last > untrained else None for curve in curves]

    def sooner(self) -> float | None:
        """Minutes of lightly to the same accuracy, as a multiple of fastssl's; None where that is not known."""
        ours, theirs = self.minutes_to_same()
        return None if self.busy > BUSY or not ours or theirs is None else theirs / ours


def files(folder: Path, shown_in: str | None = None) -> list[Path]:
    """Files of results, one per machine. With `shown_in`, only of machines that this text names in bold."""
    paths = sorted(folder.glob("peers-*.json"))
    return [path for path in paths if shown_in is None or f"**{store.read(path)['machine']['name']}**" in shown_in]


def lines_of(rows: Iterable[dict]) -> list[Line]:
    """The lines of the table: methods in the order of METHODS, for one source of images after the other."""
    rows = list(rows)
    sources = list(dict.fromkeys(row["data"] for row in rows))  # as they were measured
    groups: dict[tuple, dict[str, list[dict]]] = {}
    for row in rows:
        key = sources.index(row["data"]), METHODS.index(row["method"]), row["images"], row["settings"]
        groups.setdefault(key, {library: [] for library in LIBRARIES})[row["library"]].append(row)
    return [
        Line(sources[key[0]], METHODS[key[1]], group) for key, group in sorted(groups.items()) if all(group.values())
    ]


def minutes_to(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Minutes after which a curve of (minutes, accuracy) first reaches an accuracy, between two points along a line."""
    before = curve[0]
    for point in curve:
        if point[1] >= target:
            rise = point[1] - before[1]
            return before[0] + (point[0] - before[0]) * ((target - before[1]) / rise if rise > 0 else 1)
        before = point
    return None


def render(paths: list[Path]) -> str:
    """The table of each machine, as Markdown."""
    parts = []
    for path in paths:
        document = store.read(path)
        lines = lines_of(row for run in document["runs"] for row in run["rows"])
        if lines:
            table = markdown_table(HEADER, map(_cells, lines), text_columns=2)
            parts += [*_about(document), *_summary(lines), table, _facts(lines)]
            parts += [DISTURBED] * any(line.busy > BUSY for line in lines)
    return (
        "\n\n".join([*parts, LEGEND, SHOWN]) if parts else "No measurements yet: `python -m benchmarks.learning_peers`."
    )


def draw(paths: list[Path], target: Path) -> bool:
    """Writes the picture: accuracy against minutes of a core, a panel for each method and source of images.

    Lines are means over the seeds, bands reach from the smallest to the largest. Of several machines the first one with
    results is shown. Returns whether there are any.
    """
    from .plots import COLOURS, plt

    lines = next(filter(None, (lines_of(store.rows_of(path)) for path in paths)), [])
    if not lines:
        return False
    sources = list(dict.fromkeys(line.data for line in lines))
    methods = [method for method in METHODS if any(line.method == method for line in lines)]
    size = 2.5 * len(methods), 2.5 * len(sources)
    figure, axes = plt.subplots(len(sources), len(methods), figsize=size, squeeze=False, layout="constrained")
    colours = {"fastssl": COLOURS["ours"], "lightly": COLOURS["official"]}
    for panel in axes.flat:
        panel.set_visible(False)
    for line in lines:
        panel = axes[sources.index(line.data), methods.index(line.method)]
        panel.set_visible(True)
        for library, rows in line.rows.items():
            x, y = zip(*line.curve(library))
            spread = list(zip(*([point[2] for point in row["curve"]] for row in rows)))
            low, high = ([100 * end(values) for values in spread] for end in (min, max))
            panel.plot(x, [100 * value for value in y], color=colours[library], label=library)
            panel.fill_between(x, low, high, color=colours[library], alpha=0.2, linewidth=0)
        panel.set_title(f"{line.method}, {line.data}", fontsize=8)
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=7)
        if line is lines[0]:
            panel.legend(fontsize=7)
    figure.supxlabel("minutes of a core", fontsize=8)
    figure.supylabel("kNN accuracy, %", fontsize=8)
    figure.savefig(target, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True


def _cells(line: Line) -> list[str]:
    curves = [line.curve(library) for library in LIBRARIES]
    first = line.rows["fastssl"][0]
    raw, untrained = first["knn_raw"], _mean(row["knn_untrained"] for row in line.rows["fastssl"])
    last = curves[0][-1][1]
    return [
        line.data + (f" (busy: {line.busy:.0%})" if line.busy > BUSY else ""),
        f"`{line.method}`",
        f"{100 * raw:.1f}, {100 * untrained:.1f}",
        *(_spread(line.final(library)) for library in LIBRARIES),
        _difference(line),
        *(number(line.rate(library)) for library in LIBRARIES),
        times(line.faster()),
        " / ".join(number(curve[-1][0], 2) for curve in curves),
        _minutes(minutes_to(curves[1], last) if last > untrained else None),
        " / ".join(map(_minutes, line.minutes_to_same())),
        times(line.sooner()),
    ]


def _span(values: list[float]) -> str:
    """Smallest and largest of some ratios."""
    return " to ".join(dict.fromkeys(number(end(values), 2) for end in (min, max)))


def _minutes(value: float | None) -> str:
    return "–" if value is None else number(value, 2)


def _spread(values: list[float]) -> str:
    """Mean ± standard deviation in per cent."""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * _mean(values):.1f}{deviation}"


def _difference(line: Line) -> str:
    """Difference of the means in points ± its standard error."""
    return f"{100 * line.difference:+.1f}" + ("" if line.error is None else f" ± {100 * line.error:.1f}")


def _summary(lines: list[Line]) -> list[str]:
    """What the table shows, a sentence each on speed, accuracy and time to the same accuracy, as one paragraph."""
    text = []
    if faster := [value for line in lines if (value := line.faster())]:
        text.append(f"fastssl trains on {_span(faster)} times as many images per second as lightly.")
    if known := [line for line in lines if line.error is not None]:
        far = [line for line in known if abs(line.difference) > FAR * line.error]
        names = ", ".join(f"`{line.method}` on {line.data} ({_difference(line)})" for line in far)
        text.append(
            f"In {len(known) - len(far)} of {len(known)} rows the accuracies differ by at most {FAR} standard errors"
            + (f", by more in {names}" if far else "")
            + f"; fastssl's is the smaller in {sum(line.difference < 0 for line in known)}. The standard errors reach "
            f"{100 * max(line.error or 0 for line in known):.1f} points."
        )
    if sooner := [value for line in lines if (value := line.sooner())]:
        text.append(
            f"To the same accuracy lightly takes {_span(sooner)} times as long as fastssl; it is there first in "
            f"{sum(value < 1 for value in sooner)} of the {len(sooner)} rows that rise above the untrained encoder."
        )
    return [" ".join(text)] * bool(text)


def _facts(lines: list[Line]) -> str:
    """Sentences on how many images, epochs and seeds the lines are of."""
    sentences = []
    for data in dict.fromkeys(line.data for line in lines):
        rows = [row for line in lines if line.data == data for row in line.rows["fastssl"]]
        seeds = ", ".join(f"{line.method} {len(line.rows['fastssl'])}" for line in lines if line.data == data)
        epochs = ", ".join(f"{row['method']} {row['epochs']}" for row in {row["method"]: row for row in rows}.values())
        sentences.append(
            f"*{data}*: {rows[0]['training_images']:,} training and {rows[0]['held_out_images']:,} held-out images, "
            f"seeds: {seeds}; epochs: {epochs}."
        )
    return "\n".join(sentences).replace("_", "\\_")


def _about(document: dict) -> list[str]:
    """Machine and versions, a line for each set of versions with its commits."""
    commits: dict[str, dict[str, None]] = {}
    for software in (run["environment"] for run in document["runs"]):
        versions = ", ".join(f"{name} {software[name]}" for name in VERSIONS)
        about = f"**{document['machine']['name']}** · level {software['level']} · {versions}"
        commits.setdefault(about, {})[f"`{software['commit']}`"] = None
    return [f"{about} · commit {', '.join(names)}" for about, names in commits.items()]


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)
