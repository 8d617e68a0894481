"""Whole pretraining steps: images per second, memory and time by part, compared with the official steps in torch.

    python -m benchmarks.step                          # measure all cases, save benchmarks/results/step/<machine>.json,
                                                       # write the tables
    python -m benchmarks.step --only mae --rounds 3    # only cases with "mae" in their name; other rows stay
    python -m benchmarks.step --render                 # write the tables from the saved results
    python -m benchmarks.step --check                  # write nothing; exit status 1 if a table is out of date
    python -m benchmarks.step --equality               # losses of 20 steps of MAE: docs/step-losses.png

*ours* is what a user gets: the method as `build` returns it, and the step of the trainer. The others are
reimplementations in `official.py`, as written and with torch's faster alternatives. All start from the same weights,
and the losses of their first two steps must equal the official ones, or nothing is timed. Each row is measured in a
separate process, so that fragmented memory of one case does not affect the next.
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
from .floor import floor, operations
from .harness import TOLERANCE, WrongResult, measure, peak_memory, quartiles, short
from .machine import BUSY, DEVICE, environment, keep_freed_memory, machine, product_rate, wait
from .step_cases import CASES, COMPILED, PRECISIONS, TOTAL, Case, contestants, state_bytes
from .store import RESULTS, machine_files
from .table import PAGE, insert, is_ours, megabytes, number, present, times, without_compile, write_or_check

KEPT = RESULTS / "step"
CHECKED = 2  # steps whose losses are compared before anything is timed
# Relative difference allowed to a ResNet's second step: rounding decides the sign of some inputs of ReLUs, and float32
# runs of one ResNet in torch's two memory layouts differ by 4e-4 after a step at the peak learning rate.
KINKS = 1e-3
ROUNDS = 5
MARKERS = "<!-- steps:begin -->", "<!-- steps:end -->"
HEADER = ("step", "", "ours", "official", "torch", "× official", "× best torch", "memory", "products", "of the rate")

LEGEND = """\
Images per second of whole steps, each image counted once; ± is half the interquartile range. *ours*: the method and the
step of the trainer, including the gradient norm, optimizer, momentum encoder and queue. *official*: the formulas of the
official code in plain eager torch with current timm and torchvision, and torch's default optimizer. *torch*: the same
with torch's faster alternatives, fastest first. bf16 is autocast for all. × is the time of the other step divided by
the time of ours, the median over rounds that run all steps in turn, in one process; *best torch* is the fastest step
except ours, † where torch.compile was not among them. The losses of the first two steps were compared before. *memory*:
peak of torch's allocator during a step in MB, including parameters, optimizer, momentum encoder and queue: ours /
official / fastest other; memory that libraries allocate themselves is not included. *products*: ms that the step's
linear layers, other matrix products and convolutions take by themselves, ours / official, of the ms of the whole step;
products inside fused attention and losses are not included. *of the rate*: operations of the official step's products
and convolutions, divided by the time of our step, as a share of the rate of one large product measured in the same run;
"–" where it was not measured. On a GPU ours is the step with `--graph`.
DINO is measured without drop path, whose random numbers differ, and behind its first epoch, in which the last layer
rests.
*busy*: other programs used this share of the processors during the measurement, so no ratio is stated."""


def measure_case(case: Case, precision: str, rounds: int | None = ROUNDS, modes: tuple[str, ...] = COMPILED) -> dict:
    """The row of a case: losses are checked, then all steps are measured.

    Args:
        case: the step.
        precision: a key of `step_cases.PRECISIONS`.
        rounds: rounds in which all steps are timed once.
        modes: modes of torch.compile, each of which is a step to compare.

    Raises:
        WrongResult: losses differ from those of the official step.
    """
    batch = case.batch()
    runs, loops, failed = checked(case, batch, precision, modes)
    memory = {}
    for name, run in runs.items():
        memory[name] = [short(state_bytes(loops[name]) / 1e6), short(peak_memory(run) / 1e6)]
    seconds_of_parts = {name: parts(runs[name]) for name in ("ours", "official")}
    products = {name: floor(runs[name]) for name in ("ours", "official")}
    arithmetic, rate = operations(runs["official"]), product_rate(PRECISIONS[precision] or torch.float32)
    if DEVICE.type == "cuda":
        loops["ours"].use_graph()
        for _ in range(1 + WARM_UP):
            runs["ours"]()
    seconds, busy_share = measure(runs, rounds)
    ours = seconds["ours"]
    best = min((name for name in seconds if not is_ours(name)), key=lambda name: statistics.median(seconds[name]))
    rates = {name: quartiles([case.images / s for s in values]) for name, values in seconds.items()}
    ratios = {
        name: statistics.median(other / our for other, our in zip(seconds[name], ours))
        for name in seconds
        if name != "ours"
    }
    return {
        "size": case.size,
        "precision": precision,
        "images": case.images,
        "rounds": len(ours),
        "images_per_second": {name: [short(rate) for rate in values] for name, values in rates.items()},
        "ms": {name: short(1e3 * statistics.median(values)) for name, values in seconds.items()},
        "ratio": {name: short(ratio) for name, ratio in ratios.items()},
        "best_torch": best,
        "memory_mb": memory,  # [between steps, additional peak during a step]
        "parts_ms": {
            name: {part: short(1e3 * s) for part, s in values.items()} for name, values in seconds_of_parts.items()
        },
        "products_ms": {name: short(1e3 * s) for name, s in products.items()},
        "operations": arithmetic,  # of the official step's matrix products and convolutions
        "share_of_product_rate": short(arithmetic / (statistics.median(ours) * rate)) if rate else None,
        "failed": failed,
        "others": busy_share,
        "busy": (busy_share or 0) > BUSY,
    }


def checked(case: Case, batch: Any, precision: str, modes: tuple[str, ...]) -> tuple[dict, dict, dict]:
    """Calls without arguments, their loops, and reasons of failure, after CHECKED steps with the official losses.

    A step of torch.compile that fails, or whose losses are wrong, is left out of the row, with the reason.
    """
    losses: dict[str, list[float]] = {}
    runs, loops, failed = {}, {}, {}
    for name, loop in contestants(case, precision, modes):
        try:
            losses[name] = [float(loop(batch, step / TOTAL)) for step in range(CHECKED)]
        except Exception as error:
            if not name.startswith("torch.compile"):
                raise
            failed[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
            continue
        loops[name], runs[name] = loop, functools.partial(loop, batch, CHECKED / TOTAL)
    allowed = TOLERANCE[PRECISIONS[precision] or torch.float32]
    for name, values in losses.items():
        for step, (loss, expected) in enumerate(zip(values, losses["official"])):
            bound = max(allowed, KINKS) if step and case.backbone == "resnet" else allowed
            if not abs(loss - expected) <= bound * abs(expected):  # also true of NaN
                wrong = f"step {step} has loss {loss:.7g}, official {expected:.7g}: not timed"
                if not name.startswith("torch.compile"):
                    raise WrongResult(f"{case.size}, {precision}: {name}, {wrong}")
                failed[name] = wrong
    kept = [name for name in runs if name not in failed]
    return {name: runs[name] for name in kept}, {name: loops[name] for name in kept}, failed


def parts(run: Callable[[], Any], steps: int = 2) -> dict[str, float]:
    """Seconds per step of each part of `train.profile.PARTS`, without other parts inside it: the official MoCos update
    their momentum encoder within forward."""
    cuda = DEVICE.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        for _ in range(steps):
            run()
        wait()
    return {part: seconds / steps for part, seconds in times_of_parts(profiler.events(), cuda).items()}


def _measure_in_process(name: str, precision: str, rounds: int | None, modes: tuple[str, ...]) -> dict:
    """The row of a case, in its own process."""
    keep_freed_memory()
    return {"case": name, **measure_case(CASES[name](), precision, rounds, modes)}


def rows(only: str, precisions: list[str], rounds: int | None, modes: tuple[str, ...]) -> Iterator[dict]:
    """Rows of the cases with `only` in their name, measured one after the other."""
    for name in CASES:
        for precision in precisions if only in name else ():
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                yield process.submit(_measure_in_process, name, precision, rounds, modes).result()


def keep(row: dict, about: dict, environment: dict, folder: Path) -> None:
    """Write the row to the machine's file, in place of an earlier one of the same case, under its environment."""
    key = (row["case"], row["precision"])
    store.add(folder, about, environment, [row], replaces=lambda other: (other["case"], other["precision"]) == key)


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
            blocks.append(_table(("ms per step", "", "", *PARTS), split, 3))
    return "\n\n".join([*blocks, LEGEND]) if blocks else "No measurements yet: run `make bench-step`."


def _about(about: dict, environment: dict) -> str:
    software = f"torch {environment['torch']}, torchvision {environment['torchvision']}, timm {environment['timm']}"
    return (
        f"**{about['name']}** · level {environment['level']} · {environment['threads']} threads · {software} · "
        f"Python {environment['python']} · commit `{environment['commit']}` · {environment['date']}"
    )


def _table(header: tuple, cells: Iterator[list[str]], text_columns: int) -> str:
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *cells))


def _place(row: dict) -> tuple:
    """Sort key: the order of CASES; unknown cases last."""
    names = list(CASES)
    return (names.index(row["case"]) if row["case"] in names else len(names), row["case"], row["precision"] != "fp32")


def _cells(row: dict) -> list[str]:
    rate = row["images_per_second"]
    low, median, high = rate["ours"]
    others = (name for name in rate if name != "official" and not is_ours(name))
    variants = sorted(others, key=lambda name: -rate[name][1])
    without_graph = f" (no graph: {number(rate['ours, no graph'][1])})" if "ours, no graph" in rate else ""
    ratio = {} if row["busy"] else row["ratio"]
    memory = [megabytes(sum(row["memory_mb"][name])) for name in ("ours", "official", *variants[:1])]
    products, whole = row["products_ms"], row["ms"]
    return [
        row["size"],
        row["precision"] + (f" (busy: {row['others']:.0%})" if row["busy"] else ""),
        f"{number(median)} ± {number((high - low) / 2, 1)}{without_graph}",
        number(rate["official"][1]),
        "<br>".join(f"{number(rate[name][1])} ({name})" for name in variants) or "–",
        times(ratio.get("official")),
        times(ratio.get(row["best_torch"])) + without_compile(variants),
        " / ".join(memory),
        " / ".join(f"{number(products[name])} of {number(whole[name])}" for name in ("ours", "official")),
        f"{row['share_of_product_rate']:.0%}" if row.get("share_of_product_rate") else "–",
    ]


def _parts_cells(row: dict) -> Iterator[list[str]]:
    for name, parts_ms in row["parts_ms"].items():
        whole = sum(parts_ms.values()) or 1
        shares = (f"{number(max(ms, 0))} ({max(ms, 0) / whole:.0%})" for ms in parts_ms.values())
        yield [row["size"], row["precision"], name, *shares]


def main(arguments: list[str] | None = None, folder: Path = KEPT, page: Path = PAGE) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", default="", metavar="WORD", help=f"only cases with WORD in their name: {', '.join(CASES)}"
    )
    parser.add_argument("--precision", choices=[*PRECISIONS], help="only this precision (both)")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"number of rounds, each of one measurement per step ({ROUNDS})"
    )
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes minutes per case")
    parser.add_argument("--render", action="store_true", help="write the tables from the saved results")
    parser.add_argument(
        "--check", action="store_true", help="write nothing, exit with status 1 if a table is out of date"
    )
    parser.add_argument("--equality", action="store_true", help="draw the losses of 20 steps of MAE, ours and official")
    options = parser.parse_args(arguments)
    if options.equality:
        from .step_equality import draw_equality

        print(f"wrote {draw_equality(PAGE.parent / 'step-losses.png')}")
        return 0
    if not (options.render or options.check):
        precisions = [options.precision] if options.precision else [*PRECISIONS]
        modes = () if options.no_compile else COMPILED
        _measure_and_keep(rows(options.only, precisions, options.rounds, modes), folder)
    paths = machine_files(folder, shown_in=present(page, MARKERS) if options.check else None)
    return write_or_check(
        {page: insert(render(paths), page, MARKERS)}, options.check, "python -m benchmarks.step --render"
    )


def _measure_and_keep(measured: Iterator[dict], folder: Path) -> None:
    from importlib.metadata import version

    import cpuinfo

    about = machine(cpuinfo.get_cpu_info()["brand_raw"])
    versions = {**environment(), **{name: version(name) for name in ("torchvision", "timm")}}
    print("| " + " | ".join(HEADER) + " |", flush=True)
    for row in measured:
        print("| " + " | ".join(_cells(row)) + " |", flush=True)
        keep(row, about, versions, folder)  # after each row, so that an interrupted run keeps its results


if __name__ == "__main__":
    sys.exit(main())
