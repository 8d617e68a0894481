"""The one way to compare: check the results, then time all contestants in turn, in one process.

A machine's speed drifts, so absolute times from two runs say little. Here every round times every contestant, and the
ratio to a baseline is the median of the rounds' ratios.

That cancels a slow processor, but not a shared one. Where another program holds a core, whatever runs in many short
parallel pieces waits at the end of each, and what runs in one piece hardly notices: an update that is level with
`_foreach_lerp_` on a quiet machine measured 28 times as fast beside one busy process. So the share of the processors
that others took is measured with each case, a busy case is measured again, and one that stays busy is marked in the
row; the table states no ratio for it.

`ours` is the public op as it is served; `official` is the paper's formula in plain eager torch; any other contestant is
named for what it uses and is the best we know to do with torch (or with lightly, where that has the loss).
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

ROUND_S = 0.005  # a contestant is called so often in a round that its turn takes at least this long
# Of all rounds of a case together, but for the least number of rounds. A GPU goes by its own clock, and steadier.
BUDGET_S = 3.0 if DEVICE.type == "cpu" else 1.0
ROUNDS = (7, 100)  # least and most
LONG_S = 4.0  # a round that takes longer than this is repeated only SHORTEST times
SHORTEST = 3
ATTEMPTS = 2  # to find the machine quiet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # as the sizes call them

# Largest difference allowed, as a part of the largest expected value. This finds a result that is wrong; how exact a
# kernel is, the tests ask.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


class WrongResult(Exception):
    """A contestant's result differs from what is expected, so its speed means nothing."""


@dataclasses.dataclass
class Case:
    """One row of the table.

    Each contestant is called without arguments and returns a tensor, or a sequence of tensors, that must agree with
    those of the others. One that works in place has state of its own, equal to the others' at the start: the results of
    the first calls are compared.
    """

    op: str  # the public op
    size: str  # shapes, dtype, and whether the gradient is in it
    kernel: str  # name of the torch op that `dispatch.table()` lists: says which implementation serves it
    contestants: dict[str, Callable[[], Any]]  # "ours", "official" and the others by name
    expected: Callable[[], Any] | None = None  # called once for the comparison; `official` if None
    # What turns the result of the contestant of that name into what is compared; not timed.
    adapt: dict[str, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)
    # The least that must move through memory and be multiplied, for `limit`. 0 for small sizes: their bytes stay in a
    # cache.
    bytes_moved: int = 0
    operations: int = 0
    dtype: torch.dtype = torch.float32
    # The curves of benchmarks/plots.py to which the row belongs: {what the horizontal axis shows: its place there}
    points: dict[str, int] = dataclasses.field(default_factory=dict)


def compare(benchmark, case: Case) -> None:
    """Checks a case, measures it, and hands the row to pytest-benchmark's fixture, as `extra_info`.

    With --benchmark-disable it only checks.
    """
    check(case)
    if not benchmark.enabled:
        benchmark.pedantic(lambda: None)
        return
    memory = {name: peak_memory(run) for name, run in case.contestants.items()}
    times, others = measure(case.contestants)
    benchmark.group = case.op
    benchmark.extra_info.update({**_row(case, times, memory), "others": others, "busy": (others or 0) > BUSY})
    CLOCK.replay(benchmark, times["ours"])


def check(case: Case) -> None:
    """Calls every contestant once; raises WrongResult for one that does not agree with what is expected."""

    def results(name: str, run: Callable[[], Any]) -> list[Tensor]:
        result = case.adapt.get(name, lambda x: x)(run())
        return [result] if isinstance(result, Tensor) else list(result)

    found = {name: results(name, run) for name, run in case.contestants.items()}
    expected = results("expected", case.expected) if case.expected else found["official"]
    for name, tensors in found.items():
        where = f"{case.op}, {case.size}: {name}"
        if len(tensors) != len(expected):
            raise WrongResult(f"{where} returns {len(tensors)} tensors, expected {len(expected)}")
        for i, (tensor, wanted) in enumerate(zip(tensors, expected)):
            _agree(f"{where}, result {i}", tensor.detach(), wanted.detach())


def measure(
    contestants: dict[str, Callable[[], Any]], rounds: int | None = None
) -> tuple[dict[str, list[float]], float | None]:
    """Seconds a call, one number a round, and the share of the processors that other programs took meanwhile: of the
    first attempt on a quiet machine, or of the quietest. As many rounds as the budget has room for if None."""
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
    """Seconds a call of each contestant, one number a round. The order within a round rotates, so that no contestant
    always finds the cache that one other left behind."""
    calls, round_s = {}, 0.0
    for name, run in contestants.items():
        seconds = _passing(run, 1)
        seconds = seconds if seconds > ROUND_S else _passing(run, 10)
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
    """The same with `forward` given to torch.compile."""
    return forward_backward(torch.compile(forward, dynamic=False), *inputs, upstream=upstream)


class Clock:
    """The timer that pytest-benchmark is given: it shows the time the harness measured, not the time that passes.

    The fixture times one function by itself and knows no turns. With this timer its statistics, table and JSON hold
    the rounds of `ours` that were measured in turn with the others.
    """

    __name__ = "measured"  # what pytest-benchmark calls it in its JSON

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


def _passing(run: Callable[[], Any], calls: int) -> float:
    """Seconds that a measured call takes, with what measuring it takes: on a GPU far more than the call itself."""
    start = time.perf_counter()
    _time_calls(run, calls)
    return (time.perf_counter() - start) / calls


def _time_on_gpu(run: Callable[[], Any]) -> float:
    """By the GPU's own clock, with nothing of the inputs left in its caches, as a training step would find it. The GPU
    first waits for some 2 ms, in which the host gets ahead, so that its time for the launches is not counted."""
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush().zero_()
    torch.cuda._sleep(4_000_000)  # clock cycles; what torch's own tests use for this
    started.record()
    run()
    ended.record()
    ended.synchronize()
    return started.elapsed_time(ended) / 1e3


@functools.cache
def _flush() -> Tensor:
    """More than any cache holds."""
    return torch.empty(2**30, dtype=torch.uint8, device=DEVICE)


def _agree(what: str, result: Tensor, expected: Tensor) -> None:
    if result.shape != expected.shape:
        raise WrongResult(f"{what} has shape {list(result.shape)}, expected {list(expected.shape)}")
    if not result.is_floating_point():
        if not torch.equal(result, expected):
            raise WrongResult(f"{what}: {int((result != expected).sum())} of {result.numel()} integers differ")
        return
    allowed = max(TOLERANCE[result.dtype], TOLERANCE[expected.dtype])
    largest = float(expected.abs().max())
    error = float((result.double() - expected.double()).abs().max())
    if not error <= allowed * largest:  # also where it is NaN
        raise WrongResult(f"{what} is wrong by {error:.1e}, {allowed:.0e} of {largest:.3g} is allowed: not timed")


def _row(case: Case, times: dict[str, list[float]], memory: dict[str, int]) -> dict:
    """Quartiles in ms, the baselines' time as a multiple of ours, memory in MB, the limit; all per call."""
    ours = times["ours"]
    row = {
        "op": case.op,
        "size": case.size,
        "implementation": implementation(case.kernel),
        "rounds": len(ours),
        "ms": {name: [short(1e3 * s) for s in quartiles(values)] for name, values in times.items()},
        "ratio": {
            name: short(statistics.median(theirs / own for theirs, own in zip(values, ours)))
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
