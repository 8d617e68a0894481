"""Turns measurements into the tables of README.md and docs/measurements.md, so that no number is typed by hand.

    python -m benchmarks.table build/benchmark.json   # takes a run of pytest-benchmark in, then writes the tables
    python -m benchmarks.table                        # writes the tables again from benchmarks/results/*.json
    python -m benchmarks.table --check                # writes nothing; exit status 1 where a table is out of date

benchmarks/results/<machine>.json keeps one row a case, without samples. A run replaces the rows of the families (files
of benchmarks/) that it measured; those of other families stay, under the environment in which they were measured.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from .plots import draw

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SUMMARY, PAGE = ROOT / "README.md", ROOT / "docs" / "measurements.md"
MARKERS = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"

# The sizes that README shows, those of the papers' recipes; the other page shows all.
HEADLINE = re.compile(
    r"B=256, (D=128, K=65,536|L=196|196|50|224)|B=M=4,096|2 × 4,096|ViT-B|B=\d+, H=1[26], L=(50|197)"
    r"|vit_base|^3,152 rows|ResNet-50, fp32; ours|2 × 2,048, D=128|B=64, 224"
)

FAMILIES = (
    "ema",
    "queue",
    "masking",
    "patches",
    "norm",
    "contrastive",
    "attention",
    "augment",
    "dropin",
)  # order of the rows; others follow by name

LEGEND = """\
Median times of one call, in ms; ± is half the distance between the quartiles. All contestants of a row were checked
against each other and then timed in turn, in one process; × is how many times as long as ours the other takes, as the
median over the rounds. *official*: the paper's formula in plain eager torch. *best torch*: what else torch, or lightly,
has for it, fastest first, and × of the fastest. *limit*: the time that the row's bytes or operations would take at the
memory bandwidth or matrix-product rate measured in the same run; none for small sizes, and what stays in a cache can
be faster. *memory*: the most that one call holds beyond its inputs, in MB: ours / official / fastest other. *busy*:
other programs took this share of the processors meanwhile, so the times mean little and no ratio is stated."""

HEADER = (
    "op",
    "size",
    "implementation",
    "ours",
    "official",
    "best torch",
    "limit",
    "× official",
    "× best torch",
    "memory",
)


class Problem(Exception):
    """One sentence for the user."""


def take_in(raw_path: Path, results: Path) -> Path:
    """Writes the compact form of a run into `results`, beside the rows of families that it did not measure."""
    if not raw_path.is_file() or not raw_path.stat().st_size:
        raise Problem(f"{raw_path} does not exist or is empty: run `make bench`")
    raw = json.loads(raw_path.read_text())
    rows = [{"family": _family(entry["fullname"]), **entry["extra_info"]} for entry in raw["benchmarks"]]
    if not rows:
        raise Problem(f"{raw_path} holds no measurements")
    facts = raw["machine_info"]["fastssl"]
    path = results / f"{facts['machine']['slug']}.json"
    measured = {row["family"] for row in rows}
    runs = []
    for run in json.loads(path.read_text())["runs"] if path.exists() else []:
        kept = [row for row in run["rows"] if row["family"] not in measured]
        if kept:
            runs.append({**run, "rows": kept})
    runs.append({"environment": facts["environment"], "rows": rows})
    results.mkdir(exist_ok=True)
    path.write_text(compact_json(facts["machine"], runs))
    return path


def render(results: Path, summary: bool = False) -> str:
    """The tables of all machines, as Markdown; of the headline sizes alone for a summary."""
    parts = []
    for path in sorted(results.glob("*.json")):
        document = json.loads(path.read_text())
        for run in document["runs"]:
            rows = [row for row in sorted(run["rows"], key=_place) if not summary or HEADLINE.search(row["size"])]
            if rows:
                parts.append(_about(document["machine"], run["environment"]))
                parts.append(_markdown_table([_cells(row) for row in rows]))
    return "\n\n".join([*parts, LEGEND]) if parts else "No measurements yet: `make bench` makes them."


def insert(tables: str, page: Path, markers: tuple[str, str] = MARKERS) -> str:
    """The page's text with the tables between its markers."""
    begin, end = markers
    if not page.is_file():
        raise Problem(f"{page} does not exist: make it, with the lines {begin} and {end}, between which the tables go")
    text = page.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise Problem(f"{page} must hold the lines {begin} and {end}, once each and in this order")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{tables}\n{end}{rest.split(end)[1]}"


def main(
    arguments: list[str] | None = None, results: Path = RESULTS, pages: tuple[Path, Path] = (SUMMARY, PAGE)
) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__.split("\n")[0])
    either = parser.add_mutually_exclusive_group()
    either.add_argument("raw", nargs="?", type=Path, help="JSON that pytest --benchmark-json wrote: taken in first")
    either.add_argument("--check", action="store_true", help="write nothing, exit with 1 if a table is out of date")
    options = parser.parse_args(arguments)
    try:
        if options.raw:
            _take_in_and_tell(options.raw, results)
        new = {page: insert(render(results, summary=page is pages[0]), page) for page in pages}
    except Problem as problem:
        print(f"benchmarks.table: {problem}", file=sys.stderr)
        return 1
    if not options.check:
        for picture in draw(results, pages[1].parent):
            print(f"wrote {picture}")
    stale = [page for page, text in new.items() if page.read_text() != text]
    for page in stale:
        if options.check:
            print(f"{page} is out of date: run `python -m benchmarks.table`", file=sys.stderr)
        else:
            page.write_text(new[page])
            print(f"wrote {page}")
    return 1 if options.check and stale else 0


def _take_in_and_tell(raw_path: Path, results: Path) -> None:
    path = take_in(raw_path, results)
    print(f"wrote {path}")
    rows = [row for run in json.loads(path.read_text())["runs"] for row in run["rows"]]
    busy = [row for row in rows if row["busy"]]
    if busy:
        share = max(row["others"] for row in busy)
        print(
            f"benchmarks.table: {len(busy)} of {len(rows)} cases were measured while other programs took up to "
            f"{share:.0%} of the processors; they get no ratio: run them again on a quiet machine",
            file=sys.stderr,
        )


def number(value: float, digits: int = 3) -> str:
    """Three digits that count: 0.0123, 1.23, 12.3, 1,230."""
    rounded = float(f"{value:.{digits}g}")
    if rounded == 0:
        return "0"
    decimals = digits - 1
    while abs(rounded) >= 10 and decimals:
        rounded, decimals = rounded / 10, decimals - 1
    while abs(rounded) < 1:
        rounded, decimals = rounded * 10, decimals + 1
    return f"{float(f'{value:.{digits}g}'):,.{decimals}f}"


def _family(fullname: str) -> str:
    return Path(fullname.split("::")[0]).stem.removeprefix("test_")


def _place(row: dict) -> tuple:
    """Families in the order of FAMILIES; inside one the order of the file, which sorting keeps."""
    family = row["family"]
    return (FAMILIES.index(family), "") if family in FAMILIES else (len(FAMILIES), family)


def _about(machine: dict, environment: dict) -> str:
    return (
        f"**{machine['name']}** · level {environment['level']} · {environment['threads']} threads · "
        f"torch {environment['torch']} · Python {environment['python']} · fastssl {environment['fastssl']}, "
        f"commit `{environment['commit']}` · {environment['date']}"
    )


def _cells(row: dict) -> list[str]:
    others = sorted(
        (name for name in row["ms"] if name not in ("ours", "official")), key=lambda name: row["ms"][name][1]
    )
    low, median, high = row["ms"]["ours"]
    ratio = {} if row["busy"] else row["ratio"]
    compared = ["ours", "official", *others[:1]]
    return [
        f"`{row['op']}`",
        row["size"] + (f" (busy: {row['others']:.0%})" if row["busy"] else ""),
        row["implementation"],
        f"{number(median)} ± {number((high - low) / 2, 1)}",
        number(row["ms"]["official"][1]),
        "<br>".join(f"{number(row['ms'][name][1])} ({_code(name)})" for name in others) or "–",
        number(row["limit_ms"]) if "limit_ms" in row else "–",
        times(ratio.get("official")),
        times(ratio.get(others[0]) if others else None),
        " / ".join(megabytes(row["memory_mb"][name]) for name in compared),
    ]


def _code(name: str) -> str:
    """Names with an underscore as code: Markdown would take it for emphasis."""
    return f"`{name}`" if "_" in name else name


def times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{number(ratio, 2)}×"


def megabytes(value: float) -> str:
    return number(value, 2) if value >= 0.01 or value == 0 else "< 0.01"


def _markdown_table(rows: list[list[str]]) -> str:
    rule = ["---"] * 3 + ["---:"] * (len(HEADER) - 3)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (HEADER, rule, *rows))


def compact_json(machine: dict, runs: list[dict]) -> str:
    """One row a line, so that a change in one measurement is a change in one line."""
    blocks = []
    for run in runs:
        rows = ",\n".join("   " + json.dumps(row, ensure_ascii=False) for row in run["rows"])
        blocks.append(f' {{"environment": {json.dumps(run["environment"])},\n  "rows": [\n{rows}\n  ]}}')
    return f'{{"machine": {json.dumps(machine)},\n "runs": [\n' + ",\n".join(blocks) + "\n ]}\n"


if __name__ == "__main__":
    sys.exit(main())
