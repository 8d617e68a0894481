"""The tables of docs/measurements.md about learning, and the curves, from the stored results."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # works without a display
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastssl.eval.few_labels_table import PIXELS, PRETRAINED, ROWS, Measured
from fastssl.method_modules import method_names

from ..table import PAGE, insert, markdown_table, number, write_or_check
from . import results
from .check import SHARE, stated_lift
from .measure import lift, name_of, stated
from .sabotage import SABOTAGES, caught_by, measured
from .trial import FOUND, K

MARKERS = "<!-- learning:begin -->", "<!-- learning:end -->"
SABOTAGE_MARKERS = "<!-- sabotage:begin -->", "<!-- sabotage:end -->"
FEW_MARKERS = "<!-- few-labels:begin -->", "<!-- few-labels:end -->"
TEXT_MARKERS = "<!-- text:begin -->", "<!-- text:end -->"
FIGURE = PAGE.parent / "learning-curves.png"
HEADER = ("method", "data", "images seen", "minutes", "raw pixels", "untrained", "trained", "lift", "linear", "RankMe")
SABOTAGE_HEADER = ("what is broken", "method", "stated lift", "lift", "caught by")
FEW_HEADER = ("method", "seeds", "labels", "raw pixels", "from scratch", "kNN", "linear", "fine-tuned")
FEW_COLUMNS = [row for row in ROWS if row != (PIXELS, "knn")]
TEXT_HEADER = ("method", "zero-shot", "image → text R@1, 5, 10", "text → image R@1, 5, 10", "kNN untrained", "kNN")
WATCHES = {"lift": "the lift", "watch": "the watch", "failed": "an error"}
COLUMNS = 5  # of the figure

LEGEND = f"""\
Accuracy of weighted kNN (k = {K}) on the held-out images by the labels of all training images, of the preset
`small`: mean ± standard deviation over the seeds. *raw pixels*, *untrained*: the same with pixels, and with the
encoder before its first step; iGPT's images have 16 pixels a side, SimMIM's 24, all others 32. *lift*: what training
added, in points. *linear*: a linear classifier on the frozen features by the same labels (`fastssl eval linear`).
*RankMe*: how many dimensions the features use ([pretraining](pretraining.md#signs-of-a-collapse)). *minutes*: of one
core, training alone. Marked ¹: R@{FOUND}, the share of held-out images whose caption is among the {FOUND} that rank
first, or of captions whose image is; the smaller of the two. Marked ²: the share of the pixels' differences from
their image's mean colour that the codes keep. A name with options is the preset with these settings. The command of
a row is `fastssl pretrain METHOD --data DATA --seed SEED`; the files in benchmarks/results/learning hold it, the
recipe, the curves and the machine."""

SABOTAGE_LEGEND = f"""\
Lifts in points of seed 0; the stated lift is the least of the seeds, not their mean. *quick*: a run on a quarter of
the images. At learning rate 0 the running statistics of batch norms still change. The check fails at either. *The
lift*: less than {SHARE:.0%} of the stated lift is left. *The watch*: log and report warn, as they do in no run of
the whole method, that features look collapsed, embeddings redundant, or the contrast lost or too easy."""
SABOTAGE_UNNOTICED = "*nothing*: neither notices it on this task; tests that replay the official steps do."


TEXT_LEGEND = """\
Percent, mean ± standard deviation over the seeds. *R@k*: held-out images, or captions, that find a right partner among
the first k. *zero-shot*: accuracy over ten shapes by the sentences of `fastssl eval zeroshot`. *kNN*: accuracy of the
image tower's features by kNN (k = 20). By chance R@1 is 0.1 % and accuracy 10 %."""

FEW_LEGEND = """\
Share of the held-out images, mean ± standard deviation over draws of the labels: three for each seed of pretraining,
five different ones for pixels and for training from scratch where there are three seeds, which share draws. *seeds*:
runs that were evaluated with few labels. *raw pixels*: a linear classifier. Presets, recipes and machine are those
of the table of all methods."""


def learned(method: str, folder: Path | None = None, changes: dict[str, Any] | None = None) -> dict | None:
    """The means of a method's rows of the whole present recipe, with `changes`; None if nothing was measured.

    {"rows", "data", "score", "images_seen", "minutes", "raw", "untrained", "trained", "spread", "lift", "rankme", …}
    """
    rows = stated(method, "preset", folder, changes)
    if not rows:
        return None
    trained = [row["trained"] for row in rows]
    means = {name: _mean(rows, name) for name in ("raw", "untrained", "trained", "linear", "rankme")}
    return {
        "rows": rows,
        "data": rows[0]["data"],
        "score": rows[0]["score"],
        "images_seen": rows[0]["images_seen"],
        "minutes": statistics.mean(row["seconds"] for row in rows) / 60,
        "spread": statistics.stdev(trained) if len(rows) > 1 else None,
        "lift": statistics.mean(map(lift, rows)),
        **means,
    }


def _measured(folder: Path | None) -> dict[str, dict]:
    """What was learned, by the name of a method, and of one with changed settings."""
    found = {}
    for method in method_names():
        variants = [row.get("changes", {}) for row in results.read(method, folder) if row["length"] == "preset"]
        for changes in sorted({json.dumps(one): one for one in variants}.values(), key=len):
            found[name_of(method, changes)] = learned(method, folder, changes)
    return {name: means for name, means in found.items() if means}


def _mean(rows: list[dict], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return statistics.mean(values) if values else None


def render(folder: Path | None = None) -> str:
    """The table of all measured methods."""
    measured = _measured(folder)
    if not measured:
        return "No measurements yet: run `python -m benchmarks.learning measure`."
    platforms = {results.platform(row) for found in measured.values() for row in found["rows"]}
    seeds = sorted({row["seed"] for found in measured.values() for row in found["rows"]})
    dates = sorted(row["date"] for found in measured.values() for row in found["rows"])
    about = " · ".join(sorted(platforms))
    days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    about += f" · one core a run · seeds {', '.join(map(str, seeds))} · {days}"
    lines = [_line(method, found) for method, found in measured.items()]
    curves = f"![kNN accuracy of the image features by epoch, of every method]({FIGURE.name})"
    return "\n\n".join([about, markdown_table(HEADER, lines, text_columns=2), LEGEND, curves])


def _line(method: str, found: dict) -> list[str]:
    mark = {"knn": "", "retrieval": " ¹", "reconstruction": " ²"}[found["score"]]
    fewer = f" ({len(found['rows'])} seed{'s' * (len(found['rows']) > 1)})" if len(found["rows"]) != 3 else ""
    spread = "" if found["spread"] is None else f" ± {100 * found['spread']:.1f}"
    return [
        f"`{method}`{mark}",
        found["data"],
        f"{found['images_seen']:,}",
        number(found["minutes"], 2),
        percent(found["raw"]),
        percent(found["untrained"]),
        f"**{100 * found['trained']:.1f}{spread} %**{fewer}",
        f"{100 * found['lift']:+.1f}",
        percent(found["linear"]) + _fewer(found["rows"], "linear"),
        "–" if found["rankme"] is None else number(found["rankme"]),
    ]


def _fewer(rows: list[dict], name: str) -> str:
    """How many rows have a value, if some have none."""
    having = sum(row.get(name) is not None for row in rows)
    return f" ({having} seed{'s' * (having > 1)})" if 0 < having < len(rows) else ""


def render_few(folder: Path | None = None) -> str:
    """The table of accuracies with few labels."""
    lines = [line for name, found in _measured(folder).items() for line in few_labels_lines(name, found["rows"])]
    if not lines:
        return "No measurements yet: `python -m benchmarks.learning measure --few-labels`."
    return "\n\n".join([markdown_table(FEW_HEADER, lines, text_columns=1), FEW_LEGEND])


def few_results(rows: list[dict]) -> list[Measured]:
    """Accuracies with few labels, of the draws of all rows together.

    Row and draw have seeds s and s + i, so that rows share draws. Pixels and training from scratch know nothing of the
    pretraining: the same draw gives the same accuracy again, which counts once.
    """
    cells: dict[tuple, dict[tuple, float]] = {}
    for row in rows:
        for result in (Measured(**result) for result in row.get("few_labels", [])):
            cell = cells.setdefault((*result.row, result.labels), {})
            for i, accuracy in enumerate(result.accuracies):
                cell[row["seed"] if result.start == PRETRAINED else None, row["seed"] + i] = accuracy
    return [Measured(*key, tuple(cell.values())) for key, cell in cells.items()]


def few_labels_lines(name: str, rows: list[dict]) -> list[list[str]]:
    """Cells of the table of accuracies with few labels, over all seeds and draws; a line for each number of labels."""
    found = {(result.labels, result.row): result for result in few_results(rows)}
    seeds = sum("few_labels" in row for row in rows)
    lines = []
    for count in sorted({count for count, _ in found}):
        results = [found[count, row] for row in FEW_COLUMNS]
        lines.append([f"`{name}`", str(seeds), f"{count:,}", *(result.text() for result in results)])
    return lines


def render_text(folder: Path | None = None) -> str:
    """The table of methods of images and text."""
    lines = []
    for name, found in _measured(folder).items():
        rows = [row for row in found["rows"] if "recall" in row]
        if rows:
            ways = [zip(*(row["recall"][way] for row in rows)) for way in ("image_to_text", "text_to_image")]
            recalls = [", ".join(mean_and_spread(shares) for shares in way) for way in ways]
            untrained, trained = (mean_and_spread(shares) for shares in zip(*(row["knn"] for row in rows)))
            zeroshot = mean_and_spread(row["zeroshot"] for row in rows)
            lines.append([f"`{name}`", zeroshot, *recalls, untrained, trained])
    if not lines:
        return "No measurements yet: `python -m benchmarks.learning measure clip siglip albef`."
    return "\n\n".join([markdown_table(TEXT_HEADER, lines, text_columns=1), TEXT_LEGEND])


def mean_and_spread(shares: Iterable[float]) -> str:
    """Mean and standard deviation in percent, without the sign."""
    values = [100 * share for share in shares]
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}".replace("%", " %")


def render_sabotage(folder: Path | None = None) -> str:
    """The table of what notices which sabotage."""
    rows = measured(folder)
    if not rows:
        return "No measurements yet: run `python -m benchmarks.learning sabotage`."
    lines = [
        [
            SABOTAGES[row["sabotage"]].text,
            f"`{row['method']}`" + (", quick" if row["length"] == "quick" else ""),
            f"{100 * stated_lift(row['method'], row['length'], folder):+.1f}",
            f"{100 * row['lift']:+.1f}" if "lift" in row else "–",
            ", ".join(WATCHES[name] for name in caught_by(row, folder)) or "nothing",
        ]
        for row in rows
    ]
    legend = [SABOTAGE_LEGEND] + [SABOTAGE_UNNOTICED] * any(line[-1] == "nothing" for line in lines)
    return "\n\n".join([markdown_table(SABOTAGE_HEADER, lines, text_columns=2), "\n".join(legend)])


def draw(target: Path, folder: Path | None = None) -> None:
    """kNN accuracy by epoch of every method that was measured, one line for each seed, raw pixels dashed."""
    measured = _measured(folder)
    if not measured:
        return
    height = -(-len(measured) // COLUMNS)
    size = (2.3 * COLUMNS, 1.9 * height + 0.3)
    figure, axes = plt.subplots(height, COLUMNS, figsize=size, squeeze=False, sharey=True)
    for panel, (method, found) in zip(axes.flat, measured.items()):
        for row in found["rows"]:
            panel.plot(*zip(*row["curve"]["knn"]), color="#c2410c", linewidth=1.1, alpha=0.8)
        if found["raw"] is not None:
            panel.axhline(found["raw"], color="#64748b", linewidth=1, linestyle=(0, (4, 3)))
        panel.set_title(method, fontsize=8)
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=7)
        panel.set_ylim(0, 1)
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    for panel in axes.flat[len(measured) :]:
        panel.axis("off")
    figure.suptitle("kNN accuracy of the image features by epoch, one line a seed; dashed: raw pixels", fontsize=9)
    figure.tight_layout()
    figure.savefig(target, dpi=110, metadata={"Software": None})  # the same bytes for the same numbers
    plt.close(figure)


def write(check: bool, folder: Path | None = None, page: Path = PAGE, figure: Path = FIGURE) -> int:
    """Writes tables and figure, or with `check` only says whether the tables are out of date. The exit status."""
    if not check:
        draw(figure, folder)
    text = insert(render(folder), page, MARKERS)
    text = insert(render_few(folder), page, FEW_MARKERS, text)
    text = insert(render_text(folder), page, TEXT_MARKERS, text)
    text = insert(render_sabotage(folder), page, SABOTAGE_MARKERS, text)
    return write_or_check({page: text}, check, "python -m benchmarks.learning table")
