"""Whole pretraining steps: images a second, memory, and where the time goes, beside the official steps in torch.

    python -m benchmarks.step                          # measures all, keeps benchmarks/results/step/<machine>.json,
                                                       # writes the tables
    python -m benchmarks.step --only mae --rounds 3    # the cases with that in their name; other rows stay
    python -m benchmarks.step --render                 # writes the tables again from what was kept
    python -m benchmarks.step --check                  # writes nothing; exit status 1 where a table is out of date
    python -m benchmarks.step --equality               # 20 steps of MAE side by side: docs/step-losses.png

*ours* is what a user gets: the method as `build` makes it, and the trainer's own step. The others are transcriptions in
`official.py`, as they are and as fast as torch has it. All start from the same weights and must have the losses of the
official one in their first two steps, or nothing is timed. Each row is measured in a process of its own, so that none
works in the memory that another one left in pieces.
"""

import argparse
import functools
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastssl.train.graph import WARM_UP
from fastssl.train.profile import PARTS, times_of_parts

from . import store
from .floor import floor
from .harness import TOLERANCE, WrongResult, measure, peak_memory, quartiles, short
from .machine import BUSY, DEVICE, environment, keep_freed_memory, machine, wait
from .step_cases import CASES, PRECISIONS, TOTAL, Case, contestants, state_bytes
from .store import RESULTS, machine_files
from .table import PAGE, insert, megabytes, number, present, times, write_or_check

KEPT = RESULTS / "step"
CHECKED = 2  # steps whose losses are compared before anything is timed
# After a step at the peak rate ReLUs whose sign rounding decides have spread it: torch's own float32 runs of one
# ResNet, in its two layouts, then differ by 4e-4.
KINKS = 1e-3
ROUNDS = 5
MARKERS = "<!-- steps:begin -->", "<!-- steps:end -->"
HEADER = ("step", "", "ours", "official", "torch", "× official", "× best torch", "memory", "products")

LEGEND = """\
Images a second of whole steps, each image counted once; ± is half the distance between the quartiles. *ours*: the
method and the trainer's own step, with the gradient's norm, optimizer, momentum encoder and queue. *official*: the
official code's formulas in plain eager torch with today's timm and torchvision, and the optimizer as torch has it by
default. *torch*: the same with what torch has that is faster, fastest first. bf16 is autocast, for all. × is how many
times as long as ours the other takes, the median over the rounds, which take all in turn, in one process; *best torch*
is the fastest but ours. Losses of the first two steps were compared before. *memory*: what torch holds at the peak of a
step in MB, parameters, optimizer, momentum encoder and queue included: ours / official / fastest other; what a library
takes past torch's allocator is not seen. *products*: ms that the step's linear layers, other matrix products and
convolutions take alone, ours / official, of ms of the whole step; those inside fused attention and losses are not
among them. On a GPU ours is the step with `--graph`.
*busy*: other programs took this share of the processors meanwhile, so no ratio is stated."""


def measure_case(case: Case, precision: str, rounds: int | None = ROUNDS, compiled: bool = True) -> dict:
    """Checks, then measures a case; its row.

    Raises:
        WrongResult: a contestant's losses are not those of the official step.
    """
    batch = case.batch()
    runs, loops, failed = checked(case, batch, precision, compiled)
    memory = {}
    for name, run in runs.items():
        held = state_bytes(loops[name])
        memory[name] = [short(held / 1e6), short(peak_memory(run) / 1e6)]
    split = {name: parts(runs[name]) for name in ("ours", "official")}
    products = {name: floor(runs[name]) for name in ("ours", "official")}
    if DEVICE.type == "cuda":
        loops["ours"].use_graph()
        for _ in range(1 + WARM_UP):
            runs["ours"]()
    seconds, others = measure(runs, rounds)
    ours = seconds["ours"]
    best = min((name for name in seconds if name != "ours"), key=lambda name: statistics.median(seconds[name]))
    rates = {name: quartiles([case.images / s for s in values]) for name, values in seconds.items()}
    slower = {
        name: statistics.median(theirs / own for theirs, own in zip(seconds[name], ours))
        for name in seconds
        if name != "ours"
    }
    return {
        "size": case.size,
        "precision": precision,
        "images": case.images,
        "rounds": len(ours),
        "images_per_second": {name: [short(rate) for rate in three] for name, three in rates.items()},
        "ms": {name: short(1e3 * statistics.median(values)) for name, values in seconds.items()},
        "ratio": {name: short(ratio) for name, ratio in slower.items()},
        "best_torch": best,
        "memory_mb": memory,  # [from step to step, beyond that at the peak of one]
        "parts_ms": {name: {part: short(1e3 * s) for part, s in found.items()} for name, found in split.items()},
        "products_ms": {name: short(1e3 * s) for name, s in products.items()},
        "failed": failed,
        "others": others,
        "busy": (others or 0) > BUSY,
    }


def checked(case: Case, batch: Any, precision: str, compiled: bool) -> tuple[dict, dict, dict]:
    """(calls without arguments, the loops they call, why what is missing failed), after CHECKED steps of each, whose
    losses are those of the official one."""
    losses: dict[str, list[float]] = {}
    runs, loops, failed = {}, {}, {}
    for name, loop in contestants(case, precision, compiled):
        try:
            losses[name] = [float(loop(batch, step / TOTAL)) for step in range(CHECKED)]
        except Exception as error:
            if not name.startswith("torch.compile"):
                raise
            failed[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
            continue
        loops[name], runs[name] = loop, functools.partial(loop, batch, CHECKED / TOTAL)
    allowed = TOLERANCE[PRECISIONS[precision] or torch.float32]
    for name, found in losses.items():
        for step, (loss, expected) in enumerate(zip(found, losses["official"])):
            bound = max(allowed, KINKS) if step and case.backbone == "resnet" else allowed
            if not abs(loss - expected) <= bound * abs(expected):  # also where it is NaN
                where = f"{case.size}, {precision}: {name}, step {step}"
                raise WrongResult(f"{where} has loss {loss:.7g}, official {expected:.7g}: not timed")
    return runs, loops, failed


def parts(run: Callable[[], Any], steps: int = 2) -> dict[str, float]:
    """Seconds a step of each part of `train.profile.PARTS`, without what lies in it of other parts: the official MoCos
    move their momentum encoder inside of forward."""
    cuda = DEVICE.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        for _ in range(steps):
            run()
        wait()
    return {part: seconds / steps for part, seconds in times_of_parts(profiler.events(), cuda).items()}


def _alone(name: str, precision: str, rounds: int | None, compiled: bool) -> dict:
    """What the process of a row does."""
    keep_freed_memory()
    return {"case": name, **measure_case(CASES[name](), precision, rounds, compiled)}


def rows(only: str, precisions: list[str], rounds: int | None, compiled: bool) -> Iterator[dict]:
    for name in CASES:
        for precision in precisions if only in name else ():
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                yield process.submit(_alone, name, precision, rounds, compiled).result()


def keep(row: dict, about: dict, made: dict, folder: Path) -> None:
    """Writes the row into the machine's file, in the place of the one it had. Rows stand under the environment in which
    they were measured."""
    measured = (row["case"], row["precision"])
    store.add(folder, about, made, [row], replaces=lambda other: (other["case"], other["precision"]) == measured)


def render(paths: list[Path]) -> str:
    blocks = []
    for path in paths:
        document = store.read(path)
        for run in document["runs"]:
            rows = sorted(run["rows"], key=_place)
            blocks += [_about(document["machine"], run["environment"]), _table(HEADER, map(_cells, rows), 2)]
            blocks += [
                f"{row['size']}, {row['precision']}: {name} failed: {why}"
                for row in rows
                for name, why in row["failed"].items()
            ]
            split = (cells for row in rows for cells in _parts_cells(row))
            blocks.append(_table(("ms of a step", "", "", *PARTS), split, 3))
    return "\n\n".join([*blocks, LEGEND]) if blocks else "No measurements yet: `make bench-step` makes them."


def _about(about: dict, made: dict) -> str:
    software = f"torch {made['torch']}, torchvision {made['torchvision']}, timm {made['timm']}"
    return (
        f"**{about['name']}** · level {made['level']} · {made['threads']} threads · {software} · "
        f"Python {made['python']} · commit `{made['commit']}` · {made['date']}"
    )


def _table(header: tuple, cells: Iterator[list[str]], words: int) -> str:
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *cells))


def _place(row: dict) -> tuple:
    """The order of the cases; those no longer among them last."""
    names = list(CASES)
    return (names.index(row["case"]) if row["case"] in names else len(names), row["case"], row["precision"] != "fp32")


def _cells(row: dict) -> list[str]:
    rate = row["images_per_second"]
    low, median, high = rate["ours"]
    others = sorted((name for name in rate if name not in ("ours", "official")), key=lambda name: -rate[name][1])
    ratio = {} if row["busy"] else row["ratio"]
    memory = [megabytes(sum(row["memory_mb"][name])) for name in ("ours", "official", *others[:1])]
    products, whole = row["products_ms"], row["ms"]
    return [
        row["size"],
        row["precision"] + (f" (busy: {row['others']:.0%})" if row["busy"] else ""),
        f"{number(median)} ± {number((high - low) / 2, 1)}",
        number(rate["official"][1]),
        "<br>".join(f"{number(rate[name][1])} ({name})" for name in others) or "–",
        times(ratio.get("official")),
        times(ratio.get(row["best_torch"])),
        " / ".join(memory),
        " / ".join(f"{number(products[name])} of {number(whole[name])}" for name in ("ours", "official")),
    ]


def _parts_cells(row: dict) -> Iterator[list[str]]:
    for name, found in row["parts_ms"].items():
        whole = sum(found.values()) or 1
        shares = (f"{number(max(ms, 0))} ({max(ms, 0) / whole:.0%})" for ms in found.values())
        yield [row["size"], row["precision"], name, *shares]


def main(arguments: list[str] | None = None, folder: Path = KEPT, page: Path = PAGE) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="WORD", help=f"cases with it in their name: {', '.join(CASES)}")
    parser.add_argument("--precision", choices=[*PRECISIONS], help="one of them, not both")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"turns of each contestant ({ROUNDS})")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes minutes a case")
    parser.add_argument("--render", action="store_true", help="write the tables from what was kept")
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if a table is out of date")
    parser.add_argument("--equality", action="store_true", help="20 steps of MAE side by side, as a picture")
    options = parser.parse_args(arguments)
    if options.equality:
        from .step_equality import draw_equality

        print(f"wrote {draw_equality(PAGE.parent / 'step-losses.png')}")
        return 0
    if not (options.render or options.check):
        precisions = [options.precision] if options.precision else [*PRECISIONS]
        _measure_and_keep(rows(options.only, precisions, options.rounds, not options.no_compile), folder)
    paths = machine_files(folder, shown_in=present(page, MARKERS) if options.check else None)
    return write_or_check(
        {page: insert(render(paths), page, MARKERS)}, options.check, "python -m benchmarks.step --render"
    )


def _measure_and_keep(measured: Iterator[dict], folder: Path) -> None:
    from importlib.metadata import version

    import cpuinfo

    about = machine(cpuinfo.get_cpu_info()["brand_raw"])
    made = {**environment(), **{name: version(name) for name in ("torchvision", "timm")}}
    print("| " + " | ".join(HEADER) + " |", flush=True)
    for row in measured:
        print("| " + " | ".join(_cells(row)) + " |", flush=True)
        keep(row, about, made, folder)  # at once, so that a run of an hour that stops leaves what it has


if __name__ == "__main__":
    sys.exit(main())
