"""Summary, speed, evaluations, profile and problems of a run, as tables."""

import json
import statistics
from collections.abc import Callable

from fastssl.train.records import read_records

from .parts import Table, Text, short
from .run_data import RunData

NAMED_BAD = 10  # largest number of undecodable images, and of skipped steps, in the list
COLUMNS = {"evaluation", "step", "epoch", "accuracy"}  # fields of an evaluation that have a column
NONE = "–"


def summary(run: RunData) -> dict[str, str]:
    """Main facts of a run."""
    points, raw = run.knn()
    training = run.run.config.training
    facts = {"method": run.run.method_name, "data": short(run.run.options.data, 120)}
    if run.run.backbone:
        facts["backbone"] = run.run.backbone
    if points:
        best, epoch = max((accuracy, -epoch) for epoch, accuracy in points)
        facts["kNN accuracy, best"] = f"{best:.1%}" + (f" at epoch {-epoch:.3g}" if len(points) > 1 else "")
        if points[0][0] == 0:
            facts[f"kNN, {run.initial_encoder()}"] = f"{points[0][1]:.1%}"
    if raw is not None:
        facts["kNN, raw pixels"] = f"{raw:.1%}"
    facts["epochs"] = f"{run.last['epoch']:.4g} of {training.epochs}"
    if speeds := _speeds(run):
        facts["images/s"] = _number(statistics.median(speeds))
    return facts


def speed(run: RunData) -> dict[str, str]:
    """Speed, memory and size of a run."""
    training, execution, speeds = run.run.config.training, run.run.options.execution, _speeds(run)
    facts = {
        "steps": f"{run.last['step']:,}",
        "epochs": f"{run.last['epoch']:.4g} of {training.epochs}",
        "images per step": f"{training.batch_size:,}",
        "precision": execution.precision,
    }
    if speeds:
        median = statistics.median(speeds)
        facts["images/s, median"] = _number(median)
        facts["time per step, median"] = f"{_number(1000 * training.batch_size / median)} ms" if median else NONE
    if waits := _values(run, "data_wait"):
        facts["waiting for data, median"] = f"{statistics.median(waits):.1%}"
    if peaks := _values(run, "peak_memory"):
        facts["peak memory"] = f"{max(peaks) / 1e9:.2f} GB"
    if run.parameters:
        facts["parameters, trained"], facts["parameters, all"] = (f"{count / 1e6:.2f} M" for count in run.parameters)
    return facts


def _values(run: RunData, name: str) -> list[float]:
    return [line[name] for line in run.metrics if line.get(name) is not None]


def _speeds(run: RunData) -> list[float]:
    return _values(run, "images_per_second")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def facts(run: RunData) -> dict[str, str]:
    """Versions and machine."""
    return {name: str(value) for name, value in run.run.facts.items()}


def compare(runs: list[RunData], facts_of: Callable[[RunData], dict[str, str]]) -> Table:
    """A table with a row for each fact and a column for each run."""
    columns = [facts_of(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(column.get(name, NONE) for column in columns)] for name in names]
    if len(runs) == 1:
        return Table([], rows)
    return Table(
        ["", *(run.name for run in runs)], rows, same={i for i, row in enumerate(rows) if len(set(row[1:])) == 1}
    )


def evaluations(runs: list[RunData]) -> Table | None:
    """All records of evaluations.jsonl, without those with few labels, which have a table; None without any."""
    rows, shares = [], []
    for run in runs:
        for line in (line for line in run.evaluations if line["evaluation"] != "few labels"):
            epoch = line.get("epoch", run.epoch_of(line["step"]))
            details = {name: value for name, value in line.items() if name not in COLUMNS and value is not None}
            if run.run.is_own(details.get("data", "")):
                del details["data"]
            detail_text = ", ".join(f"{name.replace('_', ' ')} {_brief(value)}" for name, value in details.items())
            name = [run.name] if len(runs) > 1 else []
            rows.append(
                [*name, line["evaluation"], f"{epoch:.4g}", f"{line['step']:,}", f"{line['accuracy']:.2%}", detail_text]
            )
            shares.append(line["accuracy"])
    head = [*(["run"] if len(runs) > 1 else []), "evaluation", "epoch", "step", "accuracy", "details"]
    accuracy = head.index("accuracy")
    return Table(head, rows, {accuracy - 2, accuracy - 1, accuracy}, {accuracy: shares}) if rows else None


def _brief(value: object) -> str:
    """A value of a record: floats with three digits, long text cut."""
    return _number(value) if isinstance(value, float) else short(str(value))


def profile(run: RunData) -> list[Table | Text]:
    """Time of each part of a step, if the run was profiled."""
    path = run.run.folder / "profile" / "table.json"
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text())["rows"]
        cells = [[row["part"], f"{row['ms']:.2f}", f"{row['share']:.1%}"] for row in rows]
        table = Table(["part of a step", "ms", "share"], cells, {1, 2}, {2: [row["share"] for row in rows]})
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        return [Text(f"{path} is damaged: the profile is left out.")]
    total = sum(row["ms"] for row in rows)
    return [Text(f"Profiled: {total:.1f} ms per step, including the cost of profiling."), table]


def problems(run: RunData) -> list[Text]:
    """Images that could not be decoded and steps that were skipped; [] without any."""
    parts, path = [], run.run.folder / "bad_files.txt"
    if bad := path.read_text(errors="replace").splitlines() if path.is_file() else []:
        parts.append(
            Text(
                _counted(len(bad), "image could not be decoded", "images could not be decoded"),
                items=[short(line, 300) for line in bad[:NAMED_BAD]],
            )
        )
    skipped = [line for path in sorted(run.run.folder.glob("skipped-*.jsonl")) for line in read_records(path)]
    if steps := {line["step"]: line for line in reversed(skipped)}:  # every rank writes them
        items = [
            f"step {step}: loss {line.get('loss')}, norm of the gradient {line.get('grad_norm')}"
            for step, line in sorted(steps.items())[:NAMED_BAD]
        ]
        parts.append(Text(_counted(len(steps), "step was skipped", "steps were skipped"), items=items))
    return parts


def _counted(count: int, one: str, many: str) -> str:
    named = f"; the first {NAMED_BAD}" if count > NAMED_BAD else ""
    return f"{count:,} {one if count == 1 else many}{named}:"
