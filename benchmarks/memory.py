"""Memory of the losses of all methods at real size: the reference's formula against ours.

    python -m benchmarks.memory              # NT-Xent with 2 × 32,768 views, and DenseCL at batch 256: prints memory
    python -m benchmarks.memory --measure    # every loss, into benchmarks/results/memory and docs/methods.md
    python -m benchmarks.memory --runs RUN…  # adds what runs with the preset `small` learned to that page
    python -m benchmarks.memory --check      # writes nothing; exit status 1 where the page is out of date

Memory is the most that forward and backward hold at a time beside the loss's inputs, with the inputs' gradients, in
float32. Ours is measured at the size of the row. The reference's formula is followed allocation by allocation on
torch's meta device, which computes nothing and has room for any size; at a small size the same formula is also run,
and its measured peak must agree with the one that was followed.
"""

import argparse
import json
import resource
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cpuinfo
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastssl.ops import dispatch
from tests.support.memory import peak_memory

from . import store
from .harness import short
from .machine import DEVICE, environment, machine
from .memory_cases import CONTRASTIVE_AND_REDUNDANCY, DEMO, IMAGES_AND_TEXTS, Case
from .memory_prototypes import PROTOTYPES_AND_BANKS
from .table import ROOT, insert, markdown_table, megabytes, number, write_or_check

CASES = CONTRASTIVE_AND_REDUNDANCY + PROTOTYPES_AND_BANKS + IMAGES_AND_TEXTS
RESULTS = store.RESULTS / "memory"
PAGE, MARKERS = ROOT / "docs" / "methods.md", ("<!-- memory:begin -->", "<!-- memory:end -->")
HEADER = (
    "method",
    "loss",
    "its size",
    "command",
    "reference, MB",
    "ours, MB",
    "images",
    "kNN untrained",
    "kNN trained",
)
OTHER_DATA = {"clip": "captions", "siglip": "captions"}  # where a method does not learn from `shapes`
AGREEMENT = 0.02  # largest difference of followed and measured memory, as a share, at the small size


class Allocations(TorchDispatchMode):
    """Follows the memory of tensors made inside it, on any device.

    Attributes:
        peak: most bytes at a time.
    """

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        results = func(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given | self.known:
                self._add(x.untyped_storage())
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)

        def remove() -> None:
            self.held -= size
            self.known.discard(key)

        weakref.finalize(storage, remove)


def followed(case: Case, small: bool = False) -> int:
    """Peak bytes of the reference's formula on the meta device."""
    with torch.device("meta"):
        run = case.reference(*(case.small if small else case.real))
    with Allocations() as allocations:
        result = run()  # named, so that it lives until the peak is read
    del result
    return allocations.peak


def measured(make: Callable[..., Callable[[], Any]], sizes: tuple[int, ...]) -> tuple[int, float]:
    """Peak bytes of one call, and its seconds; the inputs are made before it."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        run = make(*sizes)
    start = time.perf_counter()
    peak = peak_memory(run)
    return peak, time.perf_counter() - start


def row_of(case: Case) -> dict:
    """The row of a case: memory in MB.

    Raises:
        ValueError: the followed memory of the reference is not what a run of it takes.
    """
    small_peak, _ = measured(case.reference, case.small)
    expected = followed(case, small=True)
    if abs(small_peak - expected) > AGREEMENT * expected + 1e5:
        raise ValueError(f"{case.loss}: followed {expected:,} bytes, but a run takes {small_peak:,}")
    ours, seconds = measured(case.ours, case.real)
    memory = {"reference": followed(case), "ours": ours, "reference, small size": small_peak}
    return {
        "loss": case.loss,
        "methods": list(case.methods),
        "size": case.size,
        "memory_mb": {name: short(value / 1e6) for name, value in memory.items()},
        "seconds": short(seconds),
    }


def measure() -> None:
    """Measures every case and adds the rows to the results of this machine."""
    for case in CASES:
        row = row_of(case)
        memory = row["memory_mb"]
        print(f"{case.loss}, {case.size}: reference {memory['reference']:,} MB, ours {memory['ours']:,} MB", flush=True)
        same = (case.loss, list(case.methods), case.size)
        _add([row], lambda old, same=same: (old.get("loss"), old.get("methods"), old.get("size")) == same)


def add_runs(folders: list[Path]) -> None:
    """Adds what runs learned: kNN accuracy before the first and after the last epoch.

    Raises:
        ValueError: a folder has no two kNN evaluations.
    """
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
        accuracies = [line["accuracy"] for line in lines if line["evaluation"] == "knn"]
        if len(accuracies) < 2:
            raise ValueError(f"{folder} must have kNN evaluations before and after training, got {len(accuracies)}")
        row = {"method": config["method"], "data": config["options"]["data"]}
        row["epochs"] = config["config"]["training"]["epochs"]
        row |= {"untrained": short(accuracies[0]), "trained": short(accuracies[-1])}
        _add([row], lambda old, method=row["method"]: old.get("method") == method)


def _add(rows: list[dict], replaces: Callable[[dict], bool]) -> None:
    about = machine(cpuinfo.get_cpu_info()["brand_raw"])
    path = store.add(RESULTS, about, environment(), rows, replaces)
    print(f"wrote {path}")


def render() -> str:
    """The table of docs/methods.md: a line for each method with a measured loss or run."""
    rows = [row for path in store.machine_files(RESULTS) for row in store.rows_of(path)]
    runs = {row["method"]: row for row in rows if "method" in row}
    losses = [(method, row) for row in rows if "loss" in row for method in row["methods"]]
    lines = []
    for method, row in sorted(losses, key=lambda item: (item[0], item[1]["loss"])):
        memory = [megabytes(row["memory_mb"][name]) for name in ("reference", "ours")]
        lines.append(_line(method, row["loss"], row["size"], memory, runs.get(method)))
    lines += [_line(m, "–", "–", ["–", "–"], run) for m, run in sorted(runs.items()) if m not in dict(losses)]
    return markdown_table(HEADER, lines, text_columns=4)


def _line(method: str, loss: str, size: str, memory: list[str], run: dict | None) -> list[str]:
    command = f"fastssl pretrain {method} --data {OTHER_DATA.get(method, 'shapes')}"
    learned = ["–", "–", "–"]
    if run is not None:
        command = f"fastssl pretrain {method} --data {run['data']} --epochs {run['epochs']}"
        images = int(run["data"].partition("count=")[2] or 4096)
        learned = [f"{images:,}", f"{run['untrained']:.1%}", f"{run['trained']:.1%}"]
    return [f"`{method}`", loss, size, f"`{command}`", *memory, *learned]


def demonstrate() -> int:
    """Runs the cases of `DEMO` and prints their memory, the reference's, and this process's. The exit status."""
    if missing := [op for op in ("nt_xent_fwd", "info_nce_fwd") if not dispatch.has_kernel(op, DEVICE.type)]:
        reason = "plain torch stores all logits: build the native kernels (`fastssl env` names what serves each op)"
        print(f"benchmarks.memory: {missing[0]} has no kernel here, and {reason}", file=sys.stderr)
        return 1
    for case in DEMO:
        wanted = followed(case) / 1e9
        small_peak, _ = measured(case.reference, case.small)
        ours, seconds = measured(case.ours, case.real)
        print(f"{case.loss}, {case.size}, forward and backward:")
        print(f"  ours       {number(ours / 1e6)} MB beside the inputs, measured, in {number(seconds)} s")
        print(f"  reference  {number(wanted)} GB, its allocations followed without computing")
        shape = " × ".join(map(str, case.small))
        small = number(followed(case, small=True) / 1e6)
        print(f"             at {shape}: {number(small_peak / 1e6)} MB measured, {small} MB followed", flush=True)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"this process, with torch and all inputs: {number(resident / 1e9)} GB at most")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n")[0])
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--measure", action="store_true", help="measure every loss and write the table")
    either.add_argument("--runs", nargs="+", type=Path, help="folders of runs whose kNN accuracies enter the table")
    either.add_argument("--check", action="store_true", help="write nothing, exit with 1 if the table is out of date")
    options = parser.parse_args(arguments)
    if options.measure:
        measure()
    elif options.runs:
        add_runs(options.runs)
    elif not options.check:
        return demonstrate()
    return write_or_check(
        {PAGE: insert(render(), PAGE, MARKERS)}, options.check, "python -m benchmarks.memory --measure"
    )


if __name__ == "__main__":
    sys.exit(main())
