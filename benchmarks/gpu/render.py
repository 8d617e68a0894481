"""Tables of docs/gpu.md, written from benchmarks/results/gpu.

python -m benchmarks.gpu.render           # writes the tables
python -m benchmarks.gpu.render --check   # writes nothing; exit status 1 where a table is out of date
"""

import json
import sys
from collections import Counter
from pathlib import Path

from benchmarks.store import RESULTS
from benchmarks.table import insert, markdown_table, number, write_or_check

PAGE = Path(__file__).parent.parent.parent / "docs" / "gpu.md"
MARKERS = "<!-- gpu:begin -->", "<!-- gpu:end -->"
SHOWN = 15  # kernels of the profile


def render(results: Path = RESULTS) -> str:
    """The tables of every card in results/gpu."""
    parts = []
    for folder in sorted((results / "gpu").glob("*")):
        phases = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        about = next(iter(phases.values()))
        software = about["environment"]
        parts.append(
            f"**{about['machine']['name']}** · torch {software['torch']} · commit `{software['commit']}` · "
            f"{software['date']}"
        )
        parts += [tables[name](phase) for name, phase in phases.items() if name in tables]
    return "\n\n".join(parts) if parts else "Nothing has been measured by this command yet."


def _facts(phase: dict) -> str:
    rows = [[row["fact"], f"{number(row['value'], 4)} {row['unit']}"] for row in phase["rows"]]
    rows += [[name, str(phase[name])] for name in ("driver", "cuda", "multiprocessors", "memory_gb") if name in phase]
    return markdown_table(("fact", "value"), rows, 1)


def _tests(phase: dict) -> str:
    counts = Counter(row["outcome"] for row in phase["rows"])
    failed = [f"- `{row['test']}`: {row['reason']}" for row in phase["rows"] if row["outcome"] == "failed"]
    return "\n".join([f"Tests: {', '.join(f'{count} {outcome}' for outcome, count in counts.items())}.", *failed])


def _loaders(phase: dict) -> str:
    rows = [
        [f"`{row['augmentation']}`", row["engine"], str(row["workers"]), number(row["images_per_second"], 4)]
        for row in phase["rows"]
    ]
    text = markdown_table(("augmentation", "engine", "workers or threads", "images/s"), rows, 2)
    return "\n".join([text, *(f"\nSlower with `{name}`: {which}." for name, which in phase.get("slower", {}).items())])


def _sweeps(phase: dict) -> str:
    proposals = [f"- `{entry}`: {text}" for entry, text in phase.get("proposals", {}).items()]
    about = f"{len(phase['rows'])} tile sizes were timed; faster than those in the tables:"
    return "\n".join([about, *(proposals or ["- none"])])


def _profile(phase: dict) -> str:
    rows = [
        [f"`{row['kernel'][:80]}`", number(row["ms"]), number(row["calls"]), f"{row['share']:.1%}"]
        for row in phase["rows"][:SHOWN]
    ]
    about = f"{phase['case']}: {phase['step_ms']} ms a step, {phase['gaps_ms']} ms of it without a kernel."
    return about + "\n\n" + markdown_table(("kernel", "ms per step", "calls per step", "share"), rows, 1)


tables = {"facts": _facts, "tests": _tests, "loaders": _loaders, "sweeps": _sweeps, "profile": _profile}


def render_page(check: bool = False) -> int:
    return write_or_check({PAGE: insert(render(), PAGE, MARKERS)}, check, "python -m benchmarks.gpu.render")


if __name__ == "__main__":
    sys.exit(render_page("--check" in sys.argv[1:]))
