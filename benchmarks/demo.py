"""What `make demo` measures, for the documentation: accuracies with few labels, beside training from scratch.

make demo && python -m benchmarks.demo     # keep its results; write tables, sentences and picture
python -m benchmarks.demo --render         # write tables, sentences and picture from the stored results
python -m benchmarks.demo --check          # exit status 1 if a table or a sentence is out of date

The tables are of the demo's runs; README's sentences and the picture are of the seeds that were trained by
`python -m benchmarks.learning measure --few-labels`.
"""

import argparse
import json
import sys

import cpuinfo
import matplotlib

matplotlib.use("Agg")  # works without a display
import matplotlib.pyplot as plt

from fastssl.eval.few_labels_table import PRETRAINED, SCRATCH, Measured, row_name, sentences, table_of
from fastssl.report.few_labels import lines_of, newest, plot_results
from fastssl.run import open_run

from .learning.measure import stated
from .learning.table import few_results
from .machine import environment, machine
from .store import RESULTS
from .table import PAGE, SUMMARY, insert, markdown_table, write_or_check

RUNS = ("runs/demo-simclr", "runs/demo-mae")
KEPT = RESULTS / "learning" / "demo.json"
TARGET = PAGE.parent / "getting-started.md"
FIGURE = PAGE.parent / "few-labels.png"
LONGER = KEPT.with_name("few-labels-simclr_v1-patterns-scratch-1500-steps.json")
MARKERS = "<!-- demo:begin -->", "<!-- demo:end -->"
STEPS, LONGER_STEPS = 150, 1500  # of training with labels in the stored runs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--render", action="store_true", help="write tables, sentences and picture from the stored results"
    )
    parser.add_argument("--check", action="store_true", help="exit status 1 if a table or a sentence is out of date")
    options = parser.parse_args(arguments)
    if not options.render and not options.check:
        keep()
    runs = read()
    if not options.check:
        draw([method for method, _ in runs])
    told = over_seeds(runs[0][0])
    picture = f"![Accuracy against the number of labels, over seeds](docs/{FIGURE.name})"
    more = f"[What pretraining is worth](docs/{TARGET.name}#what-pretraining-is-worth)"
    pages = {
        TARGET: insert(f"{render(runs)}\n\nThese are of one run. {told}", TARGET, MARKERS),
        SUMMARY: insert(f"{picture}\n\n{told} {more}.", SUMMARY, MARKERS),
    }
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


def over_seeds(method: str) -> str:
    """What the runs of several seeds show together, in some sentences."""
    rows = rows_of_seeds(method)
    means = {(result.row, result.labels): f"{result.mean:.0%}" for result in few_results(rows)}
    scratch, tuned, linear = (SCRATCH, "finetune"), (PRETRAINED, "finetune"), (PRETRAINED, "linear")
    longer = max(json.loads(LONGER.read_text())["rows"], key=lambda row: row["accuracy"])
    pretraining = f"pretrained by {method} for some minutes on 4,096 of these images without labels"
    return (
        f"With 100 labels of ten kinds of small drawings (`{rows[0]['data']}`, chance 10%), {STEPS} steps from scratch "
        f"reach {means[scratch, 100]}. The same network, {pretraining}, reaches {means[tuned, 100]} when fine-tuned as "
        f"long, and {means[linear, 100]} with a linear classifier on its features: means over {len(rows)} pretrained "
        f"networks. From scratch, {LONGER_STEPS:,} steps reach {longer['accuracy']:.0%} at the best of the learning "
        f"rates tried; 1,000 labels and {STEPS} steps {means[scratch, 1000]}."
    )


def rows_of_seeds(method: str) -> list[dict]:
    """Rows of the method's present preset that have accuracies with few labels.

    Raises:
        ValueError: there are none.
    """
    rows = [row for row in stated(method, "preset") if "few_labels" in row]
    if not rows:
        command = f"python -m benchmarks.learning measure {method} --few-labels"
        raise ValueError(f"demo: no accuracies with few labels of {method}'s present preset: run `{command}`")
    return rows


def draw(methods: list[str]) -> None:
    """Accuracy by number of labels over the seeds of the presets, one panel a method."""
    figure, axes = plt.subplots(1, len(methods), figsize=(4.2 * len(methods), 3.8), sharey=True)
    for panel, method in zip(axes, methods):
        rows = rows_of_seeds(method)
        results = few_results(rows)
        plot_results(panel, results)
        names = [row_name(row, method) for row in lines_of(results)]
        marks = [line for line in panel.lines if line.get_marker() == "o"]
        panel.legend(marks, names, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        panel.set_title(f"{method}, {len(rows)} seeds", fontsize=9)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on held-out images")
    figure.tight_layout()
    figure.savefig(FIGURE, dpi=110, metadata={"Software": None})  # the same bytes for the same numbers
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
