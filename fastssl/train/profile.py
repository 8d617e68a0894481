"""Profile of a step by its parts: `--profile N` writes a table, and a trace for chrome://tracing or Perfetto."""

import json
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

WARM_UP = 3  # steps before the profile, which allocate memory and choose algorithms
PARTS = ("data", "forward", "loss", "backward", "optimizer", "EMA and queue")


class Profile:
    """``with Profile(steps, folder, cuda) as profile: … profile.step()`` after each step.

    The parts are ranges that the trainer and the methods mark with ``record_function``; "loss" lies inside "forward",
    whose time does not include it. On a GPU times are those of the device, except for "data".

    Writes ``table.json``, {"rows": [{"part", "ms" per step, "share" of the step}]}, and ``trace.json`` to `folder`.
    """

    def __init__(self, steps: int, folder: Path, cuda: bool):
        self.steps, self.folder, self.cuda = steps, folder, cuda
        self._done = 0
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        self._profiler = profile(activities=activities) if steps else None

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._profiler and self._done > WARM_UP:  # the run ended before all requested steps were profiled
            self._write(self._profiler, self._done - WARM_UP)

    def step(self) -> None:
        """Count one step; the profile starts after the warm-up and is written after its last step."""
        if self._profiler is None:
            return
        self._done += 1
        if self._done == WARM_UP:
            self._profiler.start()
        elif self._done == WARM_UP + self.steps:
            self._write(self._profiler, self.steps)

    def _write(self, profiler: profile, steps: int) -> None:
        self._profiler = None
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json"))
        rows = _rows(profiler.events() or (), steps, self.cuda)
        (self.folder / "table.json").write_text(json.dumps({"steps": steps, "rows": rows}, indent=1) + "\n")
        table = Table("part", "ms per step", "share")
        for row in rows:
            table.add_row(row["part"], f"{row['ms']:.2f}", f"{row['share']:.1%}")
        Console().print(table)
        print(f"profile of {steps} steps; trace: {self.folder / 'trace.json'}", flush=True)


def times_of_parts(events: Iterable, cuda: bool) -> dict[str, float]:
    """Seconds of each of `PARTS` in a profile, without other parts inside it.

    On a GPU these are the times of the kernels that any thread launched during the part; the backward pass has its own
    thread.
    """
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    ranges = sorted((event for event in on_host if event.name in PARTS), key=lambda event: event.time_range.start)

    def innermost(moment: float, candidates: list) -> str | None:
        inside = [part.name for part in candidates if part.time_range.start <= moment < part.time_range.end]
        return inside[-1] if inside else None

    microseconds = dict.fromkeys(PARTS, 0.0)
    for i, part in enumerate(ranges):
        if not cuda or part.name == "data":
            duration = part.time_range.elapsed_us()
            microseconds[part.name] += duration
            if outer := innermost(part.time_range.start, ranges[:i]):
                microseconds[outer] -= duration
    for event in on_host if cuda else ():
        if event.kernels and (name := innermost(event.time_range.start, ranges)):
            microseconds[name] += sum(kernel.duration for kernel in event.kernels)
    return {name: duration / 1e6 for name, duration in microseconds.items()}


def _rows(events: Iterable, steps: int, cuda: bool) -> list[dict]:
    """Milliseconds per step and share of each part."""
    ms = {part: 1e3 * seconds / steps for part, seconds in times_of_parts(events, cuda).items()}
    total = sum(ms.values()) or 1.0
    return [{"part": part, "ms": time, "share": time / total} for part, time in ms.items()]
