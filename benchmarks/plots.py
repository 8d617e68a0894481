"""Figures docs/benchmarks-*.png from benchmarks/results: time over K, B and L, memory over K; and losses of steps.

Each figure shows the rows with a value on its axis (`Case.points`), one line per contestant, with both axes
logarithmic, in one figure per machine.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # works without a display
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, MaxNLocator

from . import store

COLOURS = {"ours": "#c2410c", "official": "#64748b"}  # other contestants take matplotlib's colours
TITLES = {
    "queue length K": "info_nce, forward + backward, B=256, D=128, float32",
    "batch B": "info_nce, forward + backward, K=65,536, D=128, float32",
    "tokens L": "attention, forward + backward, 12 heads of 64, 3,200 tokens in all, float32",
}


def draw(results: Path, docs: Path) -> list[Path]:
    """Writes the figures of all machines; returns their paths."""
    written = []
    for path in store.machine_files(results):
        document = store.read(path)
        rows = [row for run in document["runs"] for row in run["rows"] if not row["busy"]]
        for axis, title in TITLES.items():
            points = sorted((row for row in rows if axis in row.get("points", {})), key=lambda row: row["points"][axis])
            if len(points) < 2:
                continue
            panels = ["ms", "memory_mb"] if axis == "queue length K" else ["ms"]
            figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.6), squeeze=False)
            for panel, kind in zip(axes[0], panels):
                _draw_lines(panel, points, kind, [row["points"][axis] for row in points])
                panel.set_xlabel(axis)
            figure.suptitle(f"{title} · {document['machine']['name']}", fontsize=9)
            figure.tight_layout()
            target = docs / f"benchmarks-{axis.split()[-1]}-{path.stem}.png"
            figure.savefig(target, dpi=110, metadata={"Software": None})  # the same bytes for the same numbers
            plt.close(figure)
            written.append(target)
    return written


def draw_losses(curves: dict[str, list[float]], title: str, target: Path) -> None:
    """Losses by step, and below them their differences from those of "official fp32"."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(6.4, 6.0), sharex=True)
    expected = curves["official fp32"]
    for name, losses in curves.items():
        implementation, precision = name.split()
        style = {"color": COLOURS[implementation], "linestyle": "-" if precision == "fp32" else "--", "label": name}
        above.plot(losses, **style, linewidth=3 if implementation == "official" else 1.2)
        if name != "official fp32":
            differences = [abs(loss - reference) for loss, reference in zip(losses, expected)]
            below.plot(differences, marker="o", markersize=3, **style)
    above.set_ylabel("loss")
    below.set_yscale("symlog", linthresh=1e-8)  # a difference may be 0
    below.set_ylabel("|loss − official fp32|")
    below.set_xlabel("step")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in (above, below):
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(target, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _draw_lines(panel, points: list[dict], kind: str, positions: list[int]) -> None:
    for name in sorted({name for row in points for name in row[kind]}, key=lambda name: (name != "ours", name)):
        x = [position for position, row in zip(positions, points) if name in row[kind]]
        values = [row[kind][name] for row in points if name in row[kind]]
        y = [value[1] for value in values] if kind == "ms" else values
        panel.plot(x, y, marker="o", markersize=3.5, label=name, color=COLOURS.get(name))
    if kind == "ms" and all("limit_ms" in row for row in points):
        panel.plot(positions, [row["limit_ms"] for row in points], "k:", label="limit", linewidth=1)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panel.tick_params(axis="x", labelrotation=30, labelsize=8)
    panel.set_ylabel("time, ms" if kind == "ms" else "memory beyond the inputs, MB")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)
