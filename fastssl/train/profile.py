"""Where the time of a step goes: `--profile N` writes a table and a trace for chrome://tracing or Perfetto."""

import json
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

WARM_UP = 3  # steps that are let pass first: they allocate, and choose algorithms
PARTS = ("data", "forward", "loss", "backward", "optimizer", "EMA and queue")


class Profile:
    """``with Profile(steps, folder, cuda) as profile: … profile.step()`` after each step.

    Parts are the ranges that the trainer and the methods mark with ``record_function``; "loss" lies inside "forward"
    and is taken off it. On a GPU times are those of the device, and of the host for "data".

    Writes ``table.json``, {"rows": [{"part", "ms" a step, "share" of the step}]}, and ``trace.json`` into `folder`.
    """

    def __init__(self, steps: int, folder: Path, cuda: bool):
        self.steps, self.folder, self.cuda = steps, folder, cuda
        self._done = 0
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        self._profiler = profile(activities=activities) if steps else None

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        if self._profiler and self._done > WARM_UP:  # the run was shorter than what was asked for
            self._write(self._done - WARM_UP)

    def step(self) -> None:
        if self._profiler is None:
            return
        self._done += 1
        if self._done == WARM_UP:
            self._profiler.start()
        elif self._done == WARM_UP + self.steps:
            self._write(self.steps)

    def _write(self, steps: int) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json"))
        rows = _rows(profiler.events(), steps, self.cuda)
        (self.folder / "table.json").write_text(json.dumps({"steps": steps, "rows": rows}, indent=1) + "\n")
        table = Table("part", "ms a step", "share")
        for row in rows:
            table.add_row(row["part"], f"{row['ms']:.2f}", f"{row['share']:.1%}")
        Console().print(table)
        print(f"of {steps} steps; trace: {self.folder / 'trace.json'}", flush=True)


def times_of_parts(events: Iterable, cuda: bool) -> dict[str, float]:
    """Seconds of each of `PARTS` in a profile, without those of other parts that lie in it.

    On a GPU those of the kernels that were launched meanwhile, by whichever thread: the backward pass has its own.
    """
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    ranges = sorted((event for event in on_host if event.name in PARTS), key=lambda event: event.time_range.start)

    def innermost(moment: float, among: list) -> str | None:
        inside = [part.name for part in among if part.time_range.start <= moment < part.time_range.end]
        return inside[-1] if inside else None

    microseconds = dict.fromkeys(PARTS, 0.0)
    for i, part in enumerate(ranges):
        if not cuda or part.name == "data":
            took = part.time_range.elapsed_us()
            microseconds[part.name] += took
            if around := innermost(part.time_range.start, ranges[:i]):
                microseconds[around] -= took
    for event in on_host if cuda else ():
        if event.kernels and (part := innermost(event.time_range.start, ranges)):
            microseconds[part] += sum(kernel.duration for kernel in event.kernels)
    return {part: took / 1e6 for part, took in microseconds.items()}


def _rows(events: Iterable, steps: int, cuda: bool) -> list[dict]:
    """Milliseconds a step and share of each part."""
    ms = {part: 1e3 * seconds / steps for part, seconds in times_of_parts(events, cuda).items()}
    total = sum(ms.values()) or 1.0
    return [{"part": part, "ms": time, "share": time / total} for part, time in ms.items()]
