"""Takes the results of a run on a GPU into benchmarks/results, and writes the tables of the documentation."""

import json
import shutil
import sys
from pathlib import Path

from benchmarks import step, store, table
from benchmarks.store import RESULTS

PAGE = Path(__file__).parent.parent.parent / "docs" / "gpu.md"


def adopt(folder: Path, results: Path = RESULTS, pages: bool = True) -> int:
    """Adds the rows of ops and steps to the machine's files, in place of rows of the same case, and keeps the other
    phases as they are in results/gpu/MACHINE. Returns an exit status."""
    phases = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    phases.pop("summary", None)
    if not phases:
        print(f"benchmarks.gpu: {folder} holds no results of a run", file=sys.stderr)
        return 1
    if dry := [name for name, phase in phases.items() if phase.get("dry_run", True)]:
        print(f"benchmarks.gpu: {folder} is of a dry run, whose figures mean nothing ({dry[0]})", file=sys.stderr)
        return 1
    for name, keys, place in (("ops", ("op", "size"), results), ("steps", ("case", "precision"), results / "step")):
        if name in phases:
            phase = phases[name]
            rows = [row for row in phase["rows"] if "failed" not in row or "ms" in row]
            new = {tuple(row[key] for key in keys) for row in rows}
            store.add(
                place,
                phase["machine"],
                phase["environment"],
                rows,
                replaces=lambda row, keys=keys, new=new: tuple(row.get(key) for key in keys) in new,
            )
    for name, phase in phases.items():
        if name not in ("ops", "steps"):
            target = results / "gpu" / phase["machine"]["slug"]
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / f"{name}.json", target / f"{name}.json")
    if pages:
        from .render import render_page

        return table.main([]) or step.main(["--render"]) or render_page()
    return 0
