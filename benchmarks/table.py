"""Tables of measurements in README.md and docs/measurements.md, written from benchmarks/results.

    python -m benchmarks.table build/benchmark.json   # adds a run of pytest-benchmark to the results, writes the tables
    python -m benchmarks.table build/benchmark.json --default-allocation build/benchmark-default.json
                                                      # with a second run, of processes that do not keep freed memory
    python -m benchmarks.table                        # writes the tables from benchmarks/results
    python -m benchmarks.table --check                # writes nothing; exit status 1 where a table is out of date

benchmarks/results/<machine>.json holds one row per case, without samples. A run replaces the rows of the families
(files of benchmarks/) that it measured; rows of other families stay, under the environment in which they were measured.

docs/measurements.md shows every row of every machine, README.md the rows named in HEADLINE. `--check` compares the
machines that a page shows: results of a new machine are not an error; the next run without `--check` adds them.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from . import store
from .plots import draw
from .store import RESULTS, machine_files

ROOT = Path(__file__).parent.parent
SUMMARY, PAGE = ROOT / "README.md", ROOT / "docs" / "measurements.md"
MARKERS = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
HEADLINE_MARKERS = "<!-- headline:begin -->", "<!-- headline:end -->"
NUMBER_MARKERS = "<!-- number:begin -->", "<!-- number:end -->"

# README's rows: a file of results, a name, and what selects the row there.
EPYC, H200 = "amd-epyc-2-cores.json", "nvidia-h200.json"
HEADLINE: tuple[tuple[str, str, dict[str, str]], ...] = (
    (f"step/{H200}", "training step", {"case": "mae-vit-base", "precision": "bf16"}),
    (H200, "`masked_patch_mse`", {"op": "masked_patch_mse", "size": "B=256, "}),
    (
        H200,
        "`restore_tokens`",
        {"op": "restore_tokens", "size": "B=256, 50 → 197 tokens, D=512, fp32, forward + backward"},
    ),
    (f"step/{EPYC}", "training step", {"case": "mae-vit-base", "precision": "bf16"}),
    (f"step/{EPYC}", "training step", {"case": "moco_v2-resnet50", "precision": "bf16"}),
    (EPYC, "`info_nce`", {"op": "info_nce", "size": "B=256, D=128, K=65,536, fp32"}),
    (EPYC, "`nt_xent`", {"op": "nt_xent", "size": "2 × 4,096, "}),
    (EPYC, "`attention_packed`", {"op": "attention_packed", "size": "B=64, H=12, L=50, E=64, fp32"}),
)
# README's one number: a file of results, and what selects the row there.
NUMBER = EPYC, {"op": "info_nce", "size": "B=256, D=128, K=65,536, fp32"}
HEADLINE_HEADER = ("", "size", "machine", "ours", "official", "best torch", "× official", "× best torch", "memory, MB")
HEADLINE_LEGEND = """\
*official*: the paper's formula, or the official code's step, in plain eager torch. *best torch*: the fastest other
implementation by torch or lightly. × is how many times as long as ours the other takes: the median over rounds in which
all take turns in one process, after their results were compared. †: torch.compile was not among the others.
*memory*: the peak of a step with its parameters and optimizer, or what one call holds beyond its inputs: ours /
official."""

# Order of the families of rows; other families follow in the order of the file.
FAMILIES = (
    *(
        "ema",
        "queue",
        "masking",
        "block_masks",
        "patches",
        "norm",
        "gelu",
        "batchnorm",
        "contrastive",
        "pairwise",
        "bank",
        "scores",
    ),
    *("correspondence", "prototypes", "attention", "augment", "crops", "dropin"),
)

LEGEND = """\
Median times of one call, in ms; ± is half the distance between the quartiles. The results of all contestants of a row
were compared first; then they were timed in turn, in one process. × is how many times as long as ours the other takes,
the median over the rounds. *official*: the paper's formula in plain eager torch. *best torch*: other implementations by
torch, lightly or another package, fastest first, and × of the fastest; † where torch.compile was not among them.
*limit*: the time that the row's bytes or operations take at the memory bandwidth or matrix-product rate measured in
the same run; left out for small sizes. What stays in a cache can be faster than the limit. *memory*: peak memory of one
call beyond its inputs, in MB: ours / official / fastest other. *busy*: other programs used this share of the processors
during the measurement, so no ratio is stated. *default allocation*, where it was measured: ours in ms, × official and ×
best torch in a process that leaves memory to the C library; in the other columns freed memory stays in the process."""

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
DEFAULT_ALLOCATION = "default allocation"  # a further column, where a row of the table has it


class Problem(Exception):
    """A mistake of the user, in one sentence."""


def add_run(raw_path: Path, results: Path, default_path: Path | None = None) -> Path:
    """Adds a run of pytest-benchmark to the machine's results, in place of the rows of the families it measured.

    A second run, with --default-allocation, adds its times to the rows of the first.
    """
    raw, rows = _raw_rows(raw_path)
    facts = raw["machine_info"]["fastssl"]
    defaults = {}
    if default_path:
        default_raw, default_rows = _raw_rows(default_path)
        if _undated(default_raw["machine_info"]["fastssl"]) != _undated(facts):
            raise Problem(f"{default_path} must be of the same machine and software as {raw_path}: run `make bench`")
        defaults = {(row["op"], row["size"]): row for row in default_rows}
    for row in rows:
        if default := defaults.get((row["op"], row["size"])):
            row["default_allocation"] = {key: default[key] for key in ("ms", "ratio", "busy")}
    measured = {row["family"] for row in rows}
    return store.add(
        results, facts["machine"], facts["environment"], rows, replaces=lambda row: row["family"] in measured
    )


def _undated(facts: dict) -> dict:
    """Machine and software of a run, without its date."""
    return {**facts, "environment": {**facts["environment"], "date": None}}


def _raw_rows(path: Path) -> tuple[dict, list[dict]]:
    """A file of pytest-benchmark, and the rows that it holds."""
    if not path.is_file() or not path.stat().st_size:
        raise Problem(f"{path} does not exist or is empty: run `make bench`")
    raw = json.loads(path.read_text())
    rows = [{"family": _family(entry["fullname"]), **entry["extra_info"]} for entry in raw["benchmarks"]]
    if not rows:
        raise Problem(f"{path} holds no measurements")
    return raw, rows


def render(paths: list[Path]) -> str:
    """The tables of all machines, as Markdown."""
    parts = []
    for path in paths:
        document = store.read(path)
        for run in document["runs"]:
            parts.append(_about(document["machine"], run["environment"]))
            rows = sorted(run["rows"], key=_place)
            header, cells = HEADER, [_cells(row) for row in rows]
            if any("default_allocation" in row for row in rows):
                header = (*HEADER, DEFAULT_ALLOCATION)
                cells = [[*line, _default_allocation(row)] for line, row in zip(cells, rows)]
            parts.append(markdown_table(header, cells, text_columns=3))
    return "\n\n".join([*parts, LEGEND]) if parts else "No measurements yet: run `make bench`."


def render_headline(results: Path) -> str:
    """The rows of HEADLINE as one table, each with its machine, and below it the versions of torch.

    Raises:
        Problem: a row is not among the results, or other programs disturbed it.
    """
    lines, versions = [], []
    for file, name, selection in HEADLINE:
        machine, environment, row = _headline_row(results / file, selection)
        on_gpu = machine["device"] == "cuda"
        place = machine["name"] if on_gpu else f"{machine['name']}, {environment['level']}"
        lines.append(_headline_cells(name, row, place))
        version = f"{machine['name']}: torch {environment['torch'].partition('+')[0]}"
        if version not in versions:
            versions.append(version)
    table = markdown_table(HEADLINE_HEADER, lines, text_columns=3)
    return f"{table}\n\n{HEADLINE_LEGEND}\n{'; '.join(versions)}."


def render_number(results: Path) -> str:
    """The row of NUMBER, one op beside every other implementation that was measured, as a sentence."""
    file, selection = NUMBER
    machine, environment, row = _headline_row(results / file, selection)
    ms, memory = ({name: number(_median(value)) for name, value in row[key].items()} for key in ("ms", "memory_mb"))
    others = sorted((name for name in row["ms"] if name not in ("ours", "official")), key=lambda n: row["ms"][n][1])
    beside = ", ".join(f"{_code(name)} {ms[name]} ms" for name in others)
    return (
        f"**MoCo's loss against 65,536 negatives, forward and backward: {ms['ours']} ms and {memory['ours']} MB** "
        f"beyond its inputs\n({machine['name']}, {environment['level']}, {row['size']}).\nThe official formula "
        f"in plain torch takes {ms['official']} ms and {memory['official']} MB; {beside}."
    )


def _median(value: float | list[float]) -> float:
    """The median of a measurement: the second of its quartiles."""
    return value[1] if isinstance(value, list) else value


def _headline_row(path: Path, selection: dict[str, str]) -> tuple[dict, dict, dict]:
    """The machine, the environment and the row that a selection finds in a file of results."""
    document = store.read(path)
    for run in document["runs"]:
        for row in run["rows"]:
            if _matches(row, selection) and not row["busy"]:
                return document["machine"], run["environment"], row
    raise Problem(f"{path} must hold an undisturbed row with {selection}: measure it, or change HEADLINE")


def insert(tables: str, page: Path, markers: tuple[str, str] = MARKERS, text: str | None = None) -> str:
    """The page's text, or another text for it, with the tables between its markers."""
    before, _, after = _split(page, markers, text)
    return f"{before}{markers[0]}\n{tables}\n{markers[1]}{after}"


def present(page: Path, markers: tuple[str, str] = MARKERS) -> str:
    """The text between the markers of a page."""
    return _split(page, markers)[1]


def _split(page: Path, markers: tuple[str, str], text: str | None = None) -> tuple[str, str, str]:
    """The page's text before its markers, between them, and after them."""
    begin, end = markers
    if not page.is_file():
        raise Problem(f"{page} does not exist: write it, with the lines {begin} and {end} where the tables go")
    text = page.read_text() if text is None else text
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise Problem(f"{page} must hold the lines {begin} and {end}, once each and in this order")
    before, rest = text.split(begin)
    between, after = rest.split(end)
    return before, between, after


def main(
    arguments: list[str] | None = None, results: Path = RESULTS, pages: tuple[Path, Path] = (SUMMARY, PAGE)
) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__.split("\n")[0])
    either = parser.add_mutually_exclusive_group()
    either.add_argument("raw", nargs="?", type=Path, help="JSON file of pytest --benchmark-json to add to the results")
    parser.add_argument("--default-allocation", type=Path, help="JSON file of a run with pytest --default-allocation")
    either.add_argument("--check", action="store_true", help="write nothing, exit with 1 if a table is out of date")
    options = parser.parse_args(arguments)
    if options.default_allocation and not options.raw:
        parser.error("--default-allocation must come with the run whose rows it completes, got no other file")
    summary, page = pages
    try:
        if options.raw:
            _report_run(add_run(options.raw, results, options.default_allocation))
        paths = machine_files(results, shown_in=present(page) if options.check else None)
        text = insert(render_number(results), summary, NUMBER_MARKERS)
        text = insert(render_headline(results), summary, HEADLINE_MARKERS, text)
        texts = {summary: text, page: insert(render(paths), page)}
    except Problem as problem:
        print(f"benchmarks.table: {problem}", file=sys.stderr)
        return 1
    if not options.check:
        for picture in draw(results, page.parent):
            print(f"wrote {picture}")
    return write_or_check(texts, options.check, "python -m benchmarks.table")


def write_or_check(texts: dict[Path, str], check: bool, command: str) -> int:
    """Writes the pages whose text changed; to check, names them and the command that writes them. The exit status."""
    stale = [page for page, text in texts.items() if page.read_text() != text]
    for page in stale:
        if check:
            print(f"{page} is out of date: run `{command}`", file=sys.stderr)
        else:
            page.write_text(texts[page])
            print(f"wrote {page}")
    return int(check and bool(stale))


def _report_run(path: Path) -> None:
    print(f"wrote {path}")
    rows = store.rows_of(path)
    busy = [row for row in rows if row["busy"]]
    if busy:
        share = max(row["others"] for row in busy)
        print(
            f"benchmarks.table: other programs used up to {share:.0%} of the processors while {len(busy)} of "
            f"{len(rows)} cases were measured; these get no ratio: run them again on a quiet machine",
            file=sys.stderr,
        )


def _matches(row: dict, selection: dict[str, str]) -> bool:
    """Whether the row has the selected values; a size is selected by its beginning."""
    return all(row.get(k, "").startswith(v) if k == "size" else row.get(k) == v for k, v in selection.items())


def _headline_cells(name: str, row: dict, machine: str) -> list[str]:
    """The cells of a row of HEADLINE: times of an op, images per second of a whole step."""
    rate = "images_per_second" in row
    values = {who: quartiles[1] for who, quartiles in (row["images_per_second"] if rate else row["ms"]).items()}
    others = [who for who in values if who != "official" and not is_ours(who)]
    best = (max if rate else min)(others, key=values.__getitem__, default=None)
    unit = "images/s" if rate else "ms"
    memory = {who: sum(mb) if isinstance(mb, list) else mb for who, mb in row["memory_mb"].items()}
    size = row["size"] + (f", {row['precision']}" if rate else "")
    return [
        name,
        size,
        machine,
        f"{number(values['ours'])} {unit}",
        number(values["official"]),
        f"{number(values[best])} ({_code(best)})" if best else "–",
        times(row["ratio"]["official"]),
        times(row["ratio"].get(best)) + without_compile(others),
        f"{megabytes(memory['ours'])} / {megabytes(memory['official'])}",
    ]


def is_ours(name: str) -> bool:
    """Whether a contestant is ours: "ours", and of steps on a GPU "ours, no graph"."""
    return name.split(",")[0] == "ours"


def without_compile(others: Iterable[str]) -> str:
    """A mark for the ratio to the best of `others` where torch.compile is not among them."""
    return "" if any(name.startswith("torch.compile") for name in others) else " †"


def number(value: float, digits: int = 3) -> str:
    """A number with three significant digits: 0.0123, 1.23, 12.3, 1,230."""
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
    """Sorting key: families in the order of FAMILIES, rows of one family as in the file (the sort is stable)."""
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
        times(ratio.get(others[0]) if others else None) + without_compile(others),
        " / ".join(megabytes(row["memory_mb"][name]) for name in compared),
    ]


def _default_allocation(row: dict) -> str:
    """Our time, and the ratios to the official and to the fastest other contestant: "6.50 · 2.1× · 1.8×"."""
    default = row.get("default_allocation")
    if not default:
        return "–"
    others = [name for name in default["ms"] if name not in ("ours", "official")]
    best = min(others, key=lambda name: default["ms"][name][1], default=None)
    ratio = {} if default["busy"] else default["ratio"]
    return " · ".join([number(default["ms"]["ours"][1]), times(ratio.get("official")), times(ratio.get(best))])


def _code(name: str) -> str:
    """A name as code if it has an underscore, which Markdown takes for emphasis."""
    return f"`{name}`" if "_" in name else name


def times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{number(ratio, 2)}×"


def megabytes(value: float) -> str:
    return number(value, 2) if value >= 0.01 or value == 0 else "< 0.01"


def markdown_table(header: tuple[str, ...], rows: Iterable[list[str]], text_columns: int) -> str:
    """A Markdown table whose columns after the first `text_columns` are aligned right."""
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


if __name__ == "__main__":
    sys.exit(main())
