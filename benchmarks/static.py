"""GPU kernels without a GPU: compiled ahead of time for each architecture, with resources and predicted times.

    python -m benchmarks.static                 # the sizes of the papers' recipes, as a table
    python -m benchmarks.static --json          # the same as JSON
    python -m benchmarks.static --all --check   # every configuration: exit status 1 for a spill, for more shared memory
                                                # than the card has, for a matrix product without tensor cores, or for
                                                # over 10 % more registers than benchmarks/resources.json records
    python -m benchmarks.static --write         # records the registers there, and writes docs/gpu-kernels.md

`predicted_us` is a prediction, not a measurement: the longer of bytes / bandwidth and operations / rate, with the
numbers of the card's data sheet in CARDS, divided by the part of its multiprocessors that the programs fill. It
leaves out launches, latencies and whatever else keeps a kernel from these limits.
"""

import argparse
import collections
import itertools
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import triton

from fastssl.kernels import tile
from tests.support import kernel_model as model
from tests.support import nvcc

from .ahead_of_time import Launch, Resources, ahead_of_time
from .static_cases import Case, recipes
from .static_variants import variants

RESOURCES = Path(__file__).parent / "resources.json"
PAGE = Path(__file__).parent.parent / "docs" / "gpu-kernels.md"
VIT_B = 86_567_656  # parameters of timm's vit_base_patch16_224
GROWTH = 1.1  # registers that a kernel may take, as a multiple of those recorded


class Card(NamedTuple):
    """Numbers of a data sheet."""

    name: str
    bandwidth: float  # bytes a second
    rate: dict[int, float]  # {bytes of a factor: operations a second}; float32 is three products of tf32 parts
    shared_bytes: int  # most shared memory of a block


CARDS = {
    "sm_80": Card("A100 80 GB", 2.04e12, {2: 312e12, 4: 156e12 / 3, 8: 19.5e12}, 163 * 1024),
    "sm_90": Card("H100 SXM", 3.35e12, {2: 989e12, 4: 495e12 / 3, 8: 67e12}, 227 * 1024),
    "sm_100": Card("B200", 8.0e12, {2: 2250e12, 4: 1125e12 / 3, 8: 40e12}, 227 * 1024),
    "sm_120": Card("RTX 5090", 1.79e12, {2: 209e12, 4: 104e12 / 3, 8: 1.6e12}, 99 * 1024),
    "gfx942": Card("MI300X", 5.3e12, {2: 1307e12, 4: 163e12, 8: 163e12}, 64 * 1024),
}


def rows_of(case: Case, arch: str) -> list[dict]:
    """One row for each kernel that the case launches. Bytes, operations and prediction are those of the whole op, in
    the row of its first kernel."""
    with ahead_of_time(arch) as launches:
        case.launcher(*case.args)
    return _rows(case, arch, launches)


def ema_rows(arch: str) -> list[dict]:
    """Rows of the kernel in CUDA C++; none where nvcc is not found. A program takes 16,384 parameters."""
    if not nvcc.is_available() or arch not in nvcc.ARCHITECTURES:
        return []
    facts, rows = nvcc.resources(arch)["fastssl::ema_update"], []
    local_bytes = facts["spill_bytes"] + facts["stack_bytes"]
    resources = Resources(facts["registers"], local_bytes, facts["shared_bytes"], None, False)
    for dtypes, source_bytes, shadow_bytes in (
        ("fp32", 4, 0),
        ("bf16 sources", 2, 0),
        ("bf16 sources, bf16 shadows", 2, 2),
    ):
        moved = model.ema_update_(VIT_B, source_bytes, shadow_bytes)
        case = Case("ema_update_", f"ViT-B, {dtypes}", ema_rows, (), lambda _, moved=moved: moved)
        rows += _rows(case, arch, [Launch("ema_update", "", VIT_B // 16384, resources)])
    return rows


def _rows(case: Case, arch: str, launches: list[Launch]) -> list[dict]:
    rows = []
    for launch in launches:
        row = {"op": case.op, "size": case.size, "kernel": launch.kernel, "arch": arch, "config": launch.config}
        row |= launch.resources._asdict() | {"programs": launch.programs}
        if case.moved and not rows:
            row |= prediction(case, arch, launch.programs)
        rows.append(row)
    return rows


def prediction(case: Case, arch: str, programs: int) -> dict:
    card, moved = CARDS[arch], case.moved(arch)
    fill = min(1.0, programs / tile.CARDS[arch].multiprocessors)
    seconds = max(moved.moved / card.bandwidth, moved.operations / card.rate[case.factor_bytes]) / fill
    rate = card.rate[case.factor_bytes] / 1e12
    numbers = f"{card.name}: {card.bandwidth / 1e12:.3g} TB/s" + (f", {rate:.4g} TFLOP/s" if moved.operations else "")
    return {
        "bytes_moved": moved.moved,
        "bytes_min": moved.least,
        "flops": moved.operations,
        "predicted_us": float(f"{1e6 * seconds:.3g}"),
        "predicted_at": numbers,
    }


def compile_all(everything: bool, archs: list[str]) -> list[dict]:
    """All rows, two architectures at a time."""
    with ProcessPoolExecutor(min(2, len(archs))) as pool:
        return list(itertools.chain(*pool.map(_compile_for, archs, itertools.repeat(everything))))


def _compile_for(arch: str, everything: bool) -> list[dict]:
    cases = recipes() + (variants() if everything else [])
    return [*itertools.chain(*(rows_of(case, arch) for case in cases)), *ema_rows(arch)]


def key(row: dict) -> str:
    return f"{row['arch']} {row['op']}, {row['size']}: {row['kernel']}"


def faults(rows: list[dict], recorded: dict[str, int] | None) -> list[str]:
    """One sentence for each fault; registers are compared where `recorded` is given."""
    sentences = []
    for row in rows:
        name, limit = key(row), CARDS[row["arch"]].shared_bytes
        if row["spill_bytes"]:
            sentences.append(f"{name}: {row['spill_bytes']} bytes are spilled or in local memory")
        if row["shared_bytes"] > limit:
            sentences.append(f"{name}: {row['shared_bytes']} bytes of shared memory, the limit is {limit}")
        # GeForce cards have no tensor cores for float64.
        if row["product"] and not row["tensor_core"] and not (row["arch"] == "sm_120" and "fp64" in row["size"]):
            sentences.append(f"{name}: a matrix product without tensor-core instructions")
        if recorded is not None:
            if name not in recorded:
                sentences.append(f"{name}: not in {RESOURCES.name}: run `python -m benchmarks.static --write`")
            elif row["registers"] > GROWTH * recorded[name]:
                sentences.append(f"{name}: {row['registers']} registers, {recorded[name]} were recorded")
    return sentences


def recorded() -> dict[str, int] | None:
    """{key: registers}, or None if another version of Triton recorded them, which compiles differently."""
    document = json.loads(RESOURCES.read_text())
    return document["registers"] if document["triton"] == triton.__version__ else None


def table(rows: list[dict]) -> str:
    names = (
        "op",
        "size",
        "kernel",
        "arch",
        "registers",
        "spill_bytes",
        "shared_bytes",
        "tensor_core",
        "programs",
        "bytes_moved",
        "bytes_min",
        "flops",
        "predicted_us",
    )
    return markdown(names, [[_cell(row.get(name)) for name in names] for row in rows])


def page(rows: list[dict]) -> str:
    """Text of docs/gpu-kernels.md: a line for each kernel, with its resources and predicted time on each card."""
    archs, lines = list(CARDS), {}
    for row in rows:
        by_arch = lines.setdefault((row["op"], row["size"], row["kernel"]), {})
        first = by_arch.setdefault(row["arch"], row)  # an op may launch a kernel twice, in two variants
        by_arch[row["arch"]] = first | {name: max(first[name], row[name]) for name in ("registers", "shared_bytes")}
    cells = []
    for (op, size, kernel), by_arch in lines.items():
        row = next(iter(by_arch.values()))
        work = [
            f"{row['bytes_moved'] / 1e6:,.4g} / {row['bytes_min'] / 1e6:,.4g}" if "bytes_moved" in row else "–",
            f"{row['flops'] / 1e9:,.3g}" if row.get("flops") else "–",
        ]
        cells.append(
            [
                f"`{op.split(',')[0]}`{op[len(op.split(',')[0]) :]}",
                size,
                f"`{kernel}`",
                *work,
                *(_page_cell(op, by_arch.get(arch)) for arch in archs),
            ]
        )
    cards = [f"{arch}, {CARDS[arch].name}" for arch in archs]
    header = ("op", "size", "kernel", "MB moved / least", "GFLOP", *cards)
    rates = [
        f"- {arch}, {card.name}: {card.bandwidth / 1e12:.3g} TB/s; in TFLOP/s bf16 {card.rate[2] / 1e12:.4g}, "
        f"fp32 {card.rate[4] / 1e12:.3g}, fp64 {card.rate[8] / 1e12:.3g}"
        for arch, card in CARDS.items()
    ]
    return PAGE_TEXT.format(table=markdown(header, cells), rates="\n".join(rates), triton=triton.__version__)


PAGE_TEXT = """\
# GPU kernels, compiled and predicted

Written by `python -m benchmarks.static --write` with Triton {triton}. **Nothing on this page was measured on a GPU.**
Registers and shared memory are those of the compiled code; times are predictions.

A cell has the registers of a thread / kB of shared memory of a program / predicted µs. No kernel spills registers or
uses local memory, in any configuration of any architecture (`make static`). *MB moved* are the bytes between memory and
the card with sm_80's tiles, *least* what any implementation must move; tests compare these formulas with counts in
Triton's interpreter. A prediction is the longer of bytes / bandwidth and operations / rate, with the numbers of the
data sheets below, divided by the part of the multiprocessors that the programs fill. It is a lower bound, without
launches, latencies and exponentials (which may limit attention with narrow heads on the fastest cards). It is given
once for all kernels of an op, in the row of the first.

{rates}

{table}
"""


def _page_cell(op: str, row: dict | None) -> str:
    if row is None:  # EMA is CUDA C++; a card's table chooses one of the two backward kernels of attention
        return "plain torch" if op == "ema_update_" else "–"
    predicted = f" / {row['predicted_us']:,.3g}" if "predicted_us" in row else ""
    return f"{row['registers']} / {row['shared_bytes'] / 1024:.3g}{predicted}"


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "–" if value is None else str(value)


def markdown(header: Sequence[str], cells: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *cells))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every configuration, not only the sizes of the recipes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--check", action="store_true", help="print faults only; compare with benchmarks/resources.json"
    )
    parser.add_argument("--write", action="store_true", help="write benchmarks/resources.json and docs/gpu-kernels.md")
    parser.add_argument("--arch", action="append", choices=tile.ARCHITECTURES, help="only this architecture")
    options = parser.parse_args(arguments)
    rows = compile_all(options.all or options.write, options.arch or list(tile.ARCHITECTURES))
    if options.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    elif not (options.check or options.write):
        print(table(rows))
    if options.write:
        registers: dict[str, int] = {}
        for row in rows:  # an op may launch a kernel twice, in two variants
            registers[key(row)] = max(row["registers"], registers.get(key(row), 0))
        document = {"triton": triton.__version__, "registers": registers}
        RESOURCES.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        predicted = {(row["op"], row["size"]) for row in rows if "predicted_us" in row}
        PAGE.write_text(page([row for row in rows if (row["op"], row["size"]) in predicted]))
    sentences = faults(rows, recorded() if options.check else None)
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    counts = collections.Counter(row["arch"] for row in rows)
    print(f"compiled {dict(counts)}, {len(sentences)} faults", file=sys.stderr)
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
