"""Results of the benchmarks on disk: only this module reads and writes them.

A folder holds one JSON file per machine:

    {"machine": {…}, "runs": [{"environment": {…}, "rows": [{…}, …]}, …]}

Rows stand under the environment (software, commit, date) in which they were measured. A new measurement takes the place
of the rows that it repeats; the others stay. benchmarks/results holds the ops (table.py), its folder `step` the
training steps (step.py), `loader` the data loaders (loader.py).
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from fastssl.files import write_atomically

RESULTS = Path(__file__).parent / "results"


def machine_files(folder: Path, shown_in: str | None = None) -> list[Path]:
    """Files of a folder of results, one per machine. With `shown_in`, only of machines that this text names in bold."""
    paths = sorted(folder.glob("*.json"))
    return [path for path in paths if shown_in is None or f"**{read(path)['machine']['name']}**" in shown_in]


def read(path: Path) -> dict:
    """Machine and runs of one file; no runs if there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else {"machine": {}, "runs": []}


def rows_of(path: Path) -> list[dict]:
    """Rows of all runs of one file."""
    return [row for run in read(path)["runs"] for row in run["rows"]]


def add(
    folder: Path, machine: dict, environment: dict, rows: Iterable[dict], replaces: Callable[[dict], bool], **facts
) -> Path:
    """Adds rows to the file of a machine and returns its path.

    Args:
        folder: the folder of results; created if missing.
        machine: `machine.machine()`; its "slug" names the file.
        environment: `machine.environment()` and versions of further packages.
        rows: the new rows.
        replaces: tells whether a row already in the file is replaced by the new rows.
        facts: further values of this run, such as the seconds to open a source.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{machine['slug']}.json"
    runs = [{**run, "rows": [row for row in run["rows"] if not replaces(row)]} for run in read(path)["runs"]]
    about = {"environment": environment, **facts}
    run = next((run for run in runs if {key: run[key] for key in run if key != "rows"} == about), None)
    if run is None:
        runs.append(run := {**about, "rows": []})
    run["rows"] += rows
    with write_atomically(path) as file:
        file.write(as_text(machine, [run for run in runs if run["rows"]]))
    return path


def as_text(machine: dict, runs: list[dict]) -> str:
    """JSON with one row per line, so that a new measurement changes one line."""
    blocks = []
    for run in runs:
        facts = ", ".join(f'"{key}": {json.dumps(value)}' for key, value in run.items() if key != "rows")
        rows = ",\n".join("   " + json.dumps(row, ensure_ascii=False) for row in run["rows"])
        blocks.append(f' {{{facts},\n  "rows": [\n{rows}\n  ]}}')
    return f'{{"machine": {json.dumps(machine)},\n "runs": [\n' + ",\n".join(blocks) + "\n ]}\n"
