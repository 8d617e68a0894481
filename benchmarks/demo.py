"""What `make demo` measures, for the documentation: accuracies with few labels, beside training from scratch.

make demo && python -m benchmarks.demo     # keep its results; write tables, picture and README's sentence
python -m benchmarks.demo --render         # write tables, picture and sentence of the kept results
python -m benchmarks.demo --check          # exit status 1 if a table or the sentence is out of date
"""

import argparse
import json
import sys

import cpuinfo
import matplotlib

matplotlib.use("Agg")  # works without a display
import matplotlib.pyplot as plt

from fastssl.eval.few_labels_table import Measured, row_name, sentences, table_of
from fastssl.report.few_labels import lines_of, newest, plot_results
from fastssl.run import open_run

from .machine import environment, machine
from .store import RESULTS
from .table import PAGE, SUMMARY, insert, markdown_table, write_or_check

RUNS = ("runs/demo-simclr", "runs/demo-mae")
KEPT = RESULTS / "learning" / "demo.json"
TARGET = PAGE.parent / "getting-started.md"
FIGURE = PAGE.parent / "few-labels.png"
MARKERS = "<!-- demo:begin -->", "<!-- demo:end -->"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="write table and picture of the kept results")
    parser.add_argument("--check", action="store_true", help="exit status 1 if the table is out of date")
    options = parser.parse_args(arguments)
    if not options.render and not options.check:
        keep()
    runs = read()
    if not options.check:
        draw(runs)
    pages = {TARGET: insert(render(runs), TARGET, MARKERS), SUMMARY: insert(summarise(runs), SUMMARY, MARKERS)}
    return write_or_check(pages, options.check, "python -m benchmarks.demo --render")


def keep() -> None:
    """Writes the results of the demo's runs, with machine and software."""
    facts = environment()
    about = {"machine": machine(cpuinfo.get_cpu_info()["brand_raw"])["name"]}
    about |= {name: facts[name] for name in ("date", "commit", "torch", "python", "level")}
    runs = []
    for folder in RUNS:
        run = open_run(folder)
        rows = newest(run.evaluations())
        training = {"method": run.short_name, "data": run.options.data, "epochs": run.config.training.epochs}
        runs.append({**training, "seed": run.options.seed, "rows": [row._asdict() for row in rows]})
    lines = ",\n".join(" " + json.dumps(run) for run in runs)
    KEPT.write_text(f'{{"command": "make demo", "about": {json.dumps(about)}, "runs": [\n{lines}\n]}}\n')
    print(f"wrote {KEPT}")


def read() -> list[tuple[str, list[Measured]]]:
    """(method, its results) of the kept runs."""
    return [
        (run["method"], [Measured(**{**row, "accuracies": tuple(row["accuracies"])}) for row in run["rows"]])
        for run in json.loads(KEPT.read_text())["runs"]
    ]


def render(runs: list[tuple[str, list[Measured]]]) -> str:
    """Tables and sentences of the runs."""
    about = json.loads(KEPT.read_text())["about"]
    parts = [f"{about['machine']}, {about['date']}, seed 0; mean ± standard deviation over draws of the labels:"]
    for method, results in runs:
        (_, *counts), rows = table_of(results, method)
        head = (f"{len(results[0].accuracies)} draws", *counts)
        parts += [f"`{method}`:", markdown_table(head, rows, text_columns=1), sentences(results, method)]
    return "\n\n".join(parts)


def summarise(runs: list[tuple[str, list[Measured]]]) -> str:
    """README's sentence on what the demo's first run shows."""
    method, results = runs[0]
    text = sentences(results, method)
    return f"Its result: {text[0].lower()}{text[1:]} [All figures](docs/{TARGET.name}#what-pretraining-is-worth)."


def draw(runs: list[tuple[str, list[Measured]]]) -> None:
    """Accuracy by number of labels, one panel a run."""
    figure, axes = plt.subplots(1, len(runs), figsize=(4.2 * len(runs), 3.8), sharey=True)
    for panel, (method, results) in zip(axes, runs):
        plot_results(panel, results)
        names = [row_name(row, method) for row in lines_of(results)]
        marks = [line for line in panel.lines if line.get_marker() == "o"]
        panel.legend(marks, names, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        panel.set_title(method, fontsize=9)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on held-out images")
    figure.tight_layout()
    figure.savefig(FIGURE, dpi=110, metadata={"Software": None})  # the same bytes for the same numbers
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
