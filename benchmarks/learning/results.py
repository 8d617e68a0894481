"""Results on disk, benchmarks/results/learning: METHOD.json with a row for each length and seed, and sweep-METHOD.json
with a row for each trial. Only this module reads and writes them.

    {"method": "moco_v2", "rows": [
     {"length": "preset", "seed": 0, "data": …, "command": …, "raw": …, "untrained": …, "trained": …, …},
     …
    ]}

Each row holds its machine, commit and versions, so that it can be read alone.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import cpuinfo

from fastssl.files import write_atomically

from ..machine import environment, machine
from ..store import RESULTS

FOLDER = RESULTS / "learning"
NAMED = ("date", "commit", "torch", "python", "level")  # facts of the software that a row keeps


@functools.cache
def about() -> dict[str, str]:
    """Machine and software of a row. A trial has one core of the machine."""
    facts = environment()
    return {"machine": machine(cpuinfo.get_cpu_info()["brand_raw"])["name"], **{name: facts[name] for name in NAMED}}


def platform(row: dict) -> str:
    """Machine and software of a row, for the line above a table; without the number of cores, as a run has one."""
    return f"**{row['machine'].rpartition(', ')[0]}**, torch {row['torch']}, level {row['level']}"


def read(name: str, folder: Path | None = None) -> list[dict]:
    """Rows of a method, or of its sweep (`sweep-METHOD`); none if there is no such file."""
    path = (folder or FOLDER) / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def add(
    name: str, row: dict, replaces: Callable[[dict], bool], order: Callable[[dict], tuple], folder: Path | None = None
):
    """Writes a row in place of those that it `replaces`; the file is sorted by `order`, one row a line."""
    folder = folder or FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    rows = [old for old in read(name, folder) if not replaces(old)]
    rows = sorted([*rows, {**row, **about()}], key=order)
    lines = ",\n".join(" " + json.dumps(row, ensure_ascii=False) for row in rows)
    with write_atomically(folder / f"{name}.json") as file:
        file.write(f'{{"method": "{name.removeprefix("sweep-")}", "rows": [\n{lines}\n]}}\n')
