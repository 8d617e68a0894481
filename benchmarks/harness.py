"""Comparison of implementations: their results first, then their times, in turn, in one process.

A machine's speed drifts, so times of two runs cannot be compared. Each round times every contestant, and the ratio to a
baseline is the median of the rounds' ratios.

This cancels a slow processor, but not a shared one. If another program uses a core, code with many short parallel
sections waits at the end of each, and serial code does not: an update as fast as `_foreach_lerp_` on a quiet machine
measured 28 times as fast beside one busy process. So the share of the processors that other programs use is measured
with each case. A busy case is measured again, and one that stays busy is marked in its row; the table has no ratio for
it.

`ours` is the public op with its kernel. `official` is the paper's formula in plain eager torch. Other contestants are
named after what they use: they are the fastest known implementations in torch, and lightly's for its losses. A wrong
result of ours or of a formula in torch is an error; a rival (another package, a backend of torch, torch.compile) whose
result is wrong, or that fails, is left out of the row, with its reason.
"""

import dataclasses
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support.memory import peak_memory

from .machine import BUSY, DEVICE, OtherPrograms, implementation, limit, wait

ROUND_S = 0.005  # a turn repeats its call for at least this long
# Time of all rounds of a case, beyond the minimum of rounds. Times on a GPU vary less.
BUDGET_S = 3.0 if DEVICE.type == "cpu" else 1.0
ROUNDS = (7, 100)  # minimum and maximum
LONG_S = 4.0  # rounds that take longer are repeated only SHORTEST times
SHORTEST = 3
ATTEMPTS = 2  # number of attempts to measure on a quiet machine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by their names in `Case.size`

# Largest allowed difference, as a part of the largest expected value. It finds wrong results; the tests measure
# exactness.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


class WrongResult(Exception):
    """A contestant's result differs from the expected one, so it is not timed."""


@dataclasses.dataclass
class Case:
    """One row of the table.

    Each contestant is called without arguments and returns a tensor, or a sequence of tensors, that must agree with
    those of the others. A contestant that works in place has its own state, equal to the others' at the start; the
    results of the first calls are compared.
    """

    op: str  # the public op
    size: str  # shapes, dtype, and whether the gradient is included
    kernel: str  # name of the op in `dispatch.table()`
    contestants: dict[str, Callable[[], Any]]  # "ours", "official" and further ones
    expected: Callable[[], Any] | None = None  # reference for the comparison; `official` if None
    rivals: dict[str, Callable[[], Any]] = dataclasses.field(default_factory=dict)  # left out where wrong or failing
    # Conversion of the result of a contestant before the comparison; not timed.
    adapt: dict[str, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)
    # Minimal memory traffic and arithmetic, for `limit`. 0 bytes for small sizes, which stay in a cache.
    bytes_moved: int = 0
    operations: int = 0
    dtype: torch.dtype = torch.float32
    # Curves of benchmarks/plots.py with this row: {label of the horizontal axis: value on it}
    points: dict[str, int] = dataclasses.field(default_factory=dict)


def compare(benchmark, case: Case) -> None:
    """Checks a case, measures it, and adds the row to pytest-benchmark's fixture as `extra_info`.

    With --benchmark-disable it only checks.
    """
    expected = check(case)
    rivals, left_out = right_rivals(case, expected)
    if not benchmark.enabled:
        benchmark.pedantic(lambda: None)
        return
    contestants = case.contestants | rivals
    memory = {name: peak_memory(run) for name, run in contestants.items()}
    times, others = measure(contestants)
    benchmark.group = case.op
    row = {**_row(case, times, memory), "others": others, "busy": (others or 0) > BUSY}
    benchmark.extra_info.update(row | ({"left_out": left_out} if left_out else {}))
    CLOCK.replay(benchmark, times["ours"])


def check(case: Case) -> list[Tensor]:
    """Calls every contestant once and returns the expected results; raises WrongResult if one does not agree."""
    results = {name: _results(case, name, run) for name, run in case.contestants.items()}
    expected = _results(case, "expected", case.expected) if case.expected else results["official"]
    for name, tensors in results.items():
        _check_contestant(case, name, tensors, expected)
    return expected


def right_rivals(case: Case, expected: list[Tensor]) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The rivals of a case with the expected results, and for each other one the reason why it is left out."""
    right, left_out = {}, {}
    for name, run in case.rivals.items():
        try:
            _check_contestant(case, name, _results(case, name, run), expected)
            right[name] = run
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    return right, left_out


def _results(case: Case, name: str, run: Callable[[], Any]) -> list[Tensor]:
    result = case.adapt.get(name, lambda x: x)(run())
    return [result] if isinstance(result, Tensor) else list(result)


def _check_contestant(case: Case, name: str, results: list[Tensor], expected: list[Tensor]) -> None:
    contestant = f"{case.op}, {case.size}: {name}"
    if len(results) != len(expected):
        raise WrongResult(f"{contestant} returns {len(results)} tensors, expected {len(expected)}")
    for i, (tensor, reference) in enumerate(zip(results, expected)):
        _check_agreement(f"{contestant}, result {i}", tensor.detach(), reference.detach())


def measure(
    contestants: dict[str, Callable[[], Any]], rounds: int | None = None
) -> tuple[dict[str, list[float]], float | None]:
    """Seconds per call for each round, and the share of the processors that other programs used: in
    the first attempt on a quiet machine, or in the quietest attempt. If `rounds` is None, there are as many rounds as
    the time budget allows."""
    quietest = None
    for _ in range(ATTEMPTS):
        programs = OtherPrograms()
        times = time_in_turn(contestants, rounds)
        others = programs.share()
        if others is None:
            return times, None
        if quietest is None or others < quietest[1]:
            quietest = times, round(others, 3)
        if others <= BUSY:
            break
    return quietest


def time_in_turn(contestants: dict[str, Callable[[], Any]], rounds: int | None = None) -> dict[str, list[float]]:
    """Seconds per call of each contestant for each round. The order rotates from round to round, so that no contestant
    always runs after the same other one, with the cache that it left."""
    calls, round_s = {}, 0.0
    for name, run in contestants.items():
        seconds = _elapsed(run, 1)
        seconds = seconds if seconds > ROUND_S else _elapsed(run, 10)
        calls[name] = max(1, math.ceil(ROUND_S / seconds))
        round_s += calls[name] * seconds
    if rounds is None:
        rounds = SHORTEST if round_s > LONG_S else min(max(int(BUDGET_S / round_s), ROUNDS[0]), ROUNDS[1])

    names = list(contestants)
    times = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(_time_calls(contestants[name], calls[name]))
    finally:
        gc.enable()
    return times


def forward_backward(forward: Callable[[], Tensor], *inputs: Tensor, upstream: Tensor | None = None) -> Callable:
    """A contestant that returns the result of `forward` and the gradients of `inputs`; `upstream` is the gradient of
    the result, 1 if None."""

    def run() -> tuple[Tensor, ...]:
        result = forward()
        return result.detach(), *torch.autograd.grad(result, inputs, upstream)

    return run


def compiled(forward: Callable[[], Tensor], *inputs: Tensor, upstream: Tensor | None = None) -> Callable:
    """`forward_backward` of the compiled function."""
    return forward_backward(torch.compile(forward, dynamic=False), *inputs, upstream=upstream)


def compiled_on_gpu(
    official: Callable[[], Any], *inputs: Tensor, upstream: Tensor | None = None
) -> dict[str, Callable]:
    """The rival "torch.compile" of a row on a GPU; none on a CPU, where chosen rows have it among their contestants.

    Args:
        official: the formula to compile.
        inputs: tensors whose gradients the row includes; none for a forward pass alone.
        upstream: gradient of the result.
    """
    if DEVICE.type == "cpu":
        return {}
    run = compiled(official, *inputs, upstream=upstream) if inputs else torch.compile(official, dynamic=False)
    return {"torch.compile": run}


class Clock:
    """Timer for pytest-benchmark that returns the times measured by the harness.

    The fixture times one function alone, without turns. With this timer its statistics, table and JSON have the rounds
    of `ours` that the harness measured in turn with the other contestants.
    """

    __name__ = "measured"  # the timer's name in the JSON of pytest-benchmark

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, benchmark, times: list[float]) -> None:
        rounds = iter(times)

        def advance():
            self.now += next(rounds)

        benchmark.pedantic(advance, rounds=len(times))


CLOCK = Clock()


def _time_calls(run: Callable[[], Any], calls: int) -> float:
    if DEVICE.type == "cuda":
        return sum(_time_on_gpu(run) for _ in range(calls)) / calls
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    return (time.perf_counter() - start) / calls


def _elapsed(run: Callable[[], Any], calls: int) -> float:
    """Seconds per call including the overhead of the measurement, which on a GPU is far more than the call itself."""
    start = time.perf_counter()
    _time_calls(run, calls)
    return (time.perf_counter() - start) / calls


def _time_on_gpu(run: Callable[[], Any]) -> float:
    """Seconds by the GPU's clock, with cold caches, as in a training step. The GPU first waits for about 2 ms, while
    the host queues the launches, so that launch overhead is not counted."""
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _cache_flusher().zero_()
    torch.cuda._sleep(4_000_000)  # clock cycles
    started.record()
    run()
    ended.record()
    ended.synchronize()
    return started.elapsed_time(ended) / 1e3


@functools.cache
def _cache_flusher() -> Tensor:
    """A buffer larger than any cache."""
    return torch.empty(2**30, dtype=torch.uint8, device=DEVICE)


def _check_agreement(name: str, result: Tensor, expected: Tensor) -> None:
    if result.shape != expected.shape:
        raise WrongResult(f"{name} has shape {list(result.shape)}, expected {list(expected.shape)}")
    if not result.is_floating_point():
        if not torch.equal(result, expected):
            raise WrongResult(f"{name}: {int((result != expected).sum())} of {result.numel()} integers differ")
        return
    allowed = max(TOLERANCE[result.dtype], TOLERANCE[expected.dtype])
    largest = float(expected.abs().max())
    error = float((result.double() - expected.double()).abs().max())
    if not error <= allowed * largest:  # also true of NaN
        raise WrongResult(f"{name} is wrong by {error:.1e}, {allowed:.0e} of {largest:.3g} is allowed: not timed")


def _row(case: Case, times: dict[str, list[float]], memory: dict[str, int]) -> dict:
    """Row of the table: quartiles in ms, ratios to ours, memory in MB and the limit, for one call."""
    ours = times["ours"]
    row = {
        "op": case.op,
        "size": case.size,
        "implementation": implementation(case.kernel),
        "rounds": len(ours),
        "ms": {name: [short(1e3 * s) for s in quartiles(values)] for name, values in times.items()},
        "ratio": {
            name: short(statistics.median(theirs / our for theirs, our in zip(values, ours)))
            for name, values in times.items()
            if name != "ours"
        },
        "memory_mb": {name: short(value / 1e6) for name, value in memory.items()},
    }
    if case.points:
        row["points"] = case.points
    if case.bytes_moved or case.operations:
        milliseconds, reason = limit(case.bytes_moved, case.operations, case.dtype)
        row |= {"limit_ms": short(milliseconds), "limit": reason}
    return row


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def short(value: float) -> float:
    return float(f"{value:.4g}")
