"""Longer pretrainings, each killed once and resumed: what the recipes of minutes learn in most of an hour.

    python -m benchmarks.long_run              # MoCo v3 and MAE on Fashion-MNIST, each on a core of its own
    python -m benchmarks.long_run --methods mae --data patterns --processes 1
    python -m benchmarks.long_run --render     # write the table of the stored results
    python -m benchmarks.long_run --check      # write nothing; exit status 1 if the table is out of date

Each is a process of `fastssl pretrain … --resume auto` that is killed (SIGKILL) halfway through its epochs. The same
command then continues it. Fashion-MNIST is Debian's package dataset-fashion-mnist. Runs stay in runs/long-METHOD.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fastssl.data.timing import cores
from fastssl.run import open_run

from .learning import results
from .learning.table import FEW_HEADER, few_labels_lines, percent
from .learning.trial import K, curve_of
from .peers_runs import short_name
from .pinned import run_pinned
from .table import PAGE, insert, markdown_table, number, write_or_check

DATA = "idx:/usr/share/datasets/fashion-mnist"
EPOCHS = {"moco_v3": 8, "mae": 20}
NAME = "long-run"  # of the file with the results
MARKERS = "<!-- long-run:begin -->", "<!-- long-run:end -->"
EVERY = 2.0  # seconds between looks at the metrics of a run
POINTS = 5  # kNN evaluations while it trains
HEADER = ("method", "images seen", "minutes", "killed, resumed", "raw pixels", "untrained", "kNN", "linear")
LEGEND = """\
One core and one seed a run, of the preset `small` with more epochs. *minutes*: from the first start to the end, with
kNN evaluations and what was trained again after the kill. *killed, resumed*: the epoch at which the process was
killed, and that of the checkpoint from which the same command went on. *raw pixels* to *linear*: accuracy on all
held-out images with the labels of all training images; kNN with k = 20. Few labels: share of the held-out images,
mean ± standard deviation over draws of the labels, as `fastssl eval few-labels` gives it; raw pixels by a linear
classifier."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(EPOCHS), choices=list(EPOCHS), help="methods (all)")
    parser.add_argument("--data", default=DATA, metavar="SOURCE", help=f"images with labels ({DATA})")
    parser.add_argument("--epochs", type=int, help=f"epochs of each run ({EPOCHS})")
    parser.add_argument("--processes", type=int, default=cores(), help="runs at a time (all cores)")
    parser.add_argument("--render", action="store_true", help="write the table of the stored results")
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if the table is out of date")
    options = parser.parse_args(arguments)
    if not options.render and not options.check:
        runs = [(method, options.data, options.epochs or EPOCHS[method]) for method in options.methods]
        if there := [str(folder_of(method)) for method in options.methods if folder_of(method).exists()]:
            parser.error(f"{' and '.join(there)} exists: move or remove it")
        for _, row in run_pinned(measure, runs, options.processes):
            results.add(NAME, row, lambda old, new=row: _key(old) == _key(new), _key)
            print(f"{row['method']}: kNN {row['untrained']:.1%} to {row['trained']:.1%}, {row['minutes']} minutes")
    remedy = "python -m benchmarks.long_run --render"
    return write_or_check({PAGE: insert(render(), PAGE, MARKERS)}, options.check, remedy)


def folder_of(method: str) -> Path:
    """The run folder of a method."""
    return Path("runs", f"long-{method}")


def measure(run: tuple[str, str, int]) -> dict[str, Any]:
    """The row of a run (method, source, epochs): trains, kills, resumes, evaluates."""
    method, data, epochs = run
    folder, start = folder_of(method), time.monotonic()
    words = ["pretrain", method, "--data", data, "--preset", "small", "--epochs", str(epochs), "--folder", str(folder)]
    words += ["--knn-every", str(max(1, epochs // POINTS)), "--resume", "auto"]
    killed = kill_at(words, folder, epochs // 2 + 0.5)
    resumed = open_run(folder).state()["step"] * killed["epoch"] / killed["step"]
    subprocess.run([sys.executable, "-m", "fastssl", *words], check=True)
    minutes = (time.monotonic() - start) / 60
    done = open_run(folder)
    linear, few = done.linear().top1, done.few_labels()
    knn, raw = (
        [line for line in done.evaluations() if line["evaluation"] == name and line.get("k") == K]
        for name in ("knn", "knn of raw pixels")
    )
    return {
        "method": method,
        "data": short_name(data),
        "command": " ".join(["fastssl", *words]),
        "epochs": epochs,
        "images_seen": done.metrics()[-1]["step"] * done.config.training.batch_size,
        "minutes": round(minutes, 1),
        "killed": round(killed["epoch"], 2),
        "resumed": round(resumed, 2),
        "raw": raw[0]["accuracy"],
        "untrained": knn[0]["accuracy"],
        "trained": knn[-1]["accuracy"],
        "rankme": round(knn[-1]["rankme"], 1),
        "linear": round(linear, 4),
        "few_labels": [one._asdict() for one in few],
        "curve": curve_of(done),
    }


def kill_at(words: list[str], folder: Path, epoch: float) -> dict[str, Any]:
    """Starts `fastssl` with these words, kills it once its metrics have reached the epoch, and returns their last line.

    Raises:
        RuntimeError: it ended before.
    """
    process = subprocess.Popen([sys.executable, "-m", "fastssl", *words])
    try:
        while process.poll() is None:
            time.sleep(EVERY)
            metrics = open_run(folder).metrics() if (folder / "metrics.jsonl").is_file() else []
            if metrics and metrics[-1]["epoch"] >= epoch:
                return metrics[-1]
        raise RuntimeError(f"long_run: {' '.join(words)} ended with status {process.returncode} before epoch {epoch:g}")
    finally:
        process.kill()
        process.wait()


def render() -> str:
    """The tables of the stored results."""
    rows = results.read(NAME)
    if not rows:
        return "No measurements yet: `python -m benchmarks.long_run`."
    about = dict.fromkeys(f"{results.platform(row)}, {row['date']}" for row in rows)
    parts = [" · ".join(about)]
    for data in dict.fromkeys(row["data"] for row in rows):
        chosen = [row for row in rows if row["data"] == data]
        few = [line for row in chosen for line in few_labels_lines(row["method"], [{"seed": 0, **row}])]
        parts += [f"`{data}`:", markdown_table(HEADER, map(_cells, chosen), text_columns=1)]
        parts += [markdown_table(FEW_HEADER[:1] + FEW_HEADER[2:], [[x[0], *x[2:]] for x in few], text_columns=1)]
    return "\n\n".join([*parts, LEGEND])


def _cells(row: dict) -> list[str]:
    stopped = f"{row['killed']:.2f}, {row['resumed']:.2f}"
    accuracies = [percent(row[name]) for name in ("raw", "untrained", "trained", "linear")]
    return [f"`{row['method']}`", f"{row['images_seen']:,}", number(row["minutes"], 2), stopped, *accuracies]


def _key(row: dict) -> tuple:
    return (row["data"], list(EPOCHS).index(row["method"]))


if __name__ == "__main__":
    sys.exit(main())
