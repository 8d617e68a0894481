"""Metrics of a run: `metrics.jsonl` for programs, a progress bar (or a line per minute) for people."""

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastssl.distributed import all_mean, rank, world_size

from .config import Execution
from .records import read_records, rewrite_records

METRICS: dict[str, type] = {"step": int, "epoch": float}  # fields that every line has
LINE_EVERY = 60.0  # seconds between printed lines if the console is not a terminal


class Log:
    """Metrics of a run: `step` keeps values on the device; `write` writes their means and waits for the device.

    A line of metrics.jsonl has {"step", "epoch", "lr" and other scheduled values, "loss", the method's metrics,
    "grad_norm", "skipped", "images_per_second", "data_wait", "peak_memory"}. Losses, metrics and norms are means over
    the ranks and over the steps since the previous line, without skipped steps; `skipped` counts those; `data_wait` is
    the share of time spent waiting for data; `peak_memory` is in bytes, of the device, or of this process on a CPU.

    Rank 0 writes; every rank writes the images of its skipped steps to skipped-RANK.jsonl.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        first_step: int,
        execution: Execution,
        device: torch.device,
        run_id: str = "",
    ):
        self.folder, self.max_skipped, self.device = folder, execution.max_skipped, device
        self._last_step = total_steps
        self._values: list[dict[str, Tensor]] = []
        self._indices: list[Tensor] = []
        self._consecutive_skips = 0
        self._data_seconds, self._start, self._last_line = 0.0, time.perf_counter(), -math.inf
        self._progress: Progress | None = None
        self._sinks: list[Callable[[dict], object]] = []
        self._closers: list[Callable[[], object]] = []
        self._skipped = folder / f"skipped-{rank()}.jsonl"
        drop_lines_after(self._skipped, first_step)
        if rank() == 0:
            self._open_metrics(first_step)
            self._open_dashboards(execution, first_step, run_id)
            self._show_progress(total_steps, first_step)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        for close in self._closers:
            close()

    def step(
        self, loss: Tensor, metrics: dict[str, Tensor], grad_norm: Tensor, index: Tensor, data_seconds: float
    ) -> None:
        """Record one step of this rank without reading from the device. A norm that is not finite marks a skipped step.

        Args:
            loss, metrics, grad_norm, index, data_seconds: see `trainer.StepResult`.
        """
        self._values.append({"loss": loss, **metrics, "grad_norm": grad_norm})
        self._indices.append(index)
        self._data_seconds += data_seconds
        if self._progress:
            self._progress.advance(self._task)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose duration is not part of the measured training time."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def write(self, step: int, epoch: float, **scheduled: float) -> None:
        """Write the means of the steps since the last call, `step` being the newest. All ranks must call together.

        Raises:
            ValueError: more than `max_skipped` consecutive steps were skipped.
        """
        if not self._values:
            return
        names = list(self._values[0])
        table = torch.stack([torch.stack([values[name].double() for name in names]) for values in self._values])
        finite = table[:, names.index("grad_norm")].isfinite()
        means = all_mean(torch.where(finite[:, None], table, 0).sum(0) / finite.sum())
        rows, finite_steps = table.tolist(), finite.tolist()  # the host waits for the device
        seconds = max(time.perf_counter() - self._start, 1e-9)
        images = world_size() * sum(map(len, self._indices))
        record = {
            "step": step,
            "epoch": epoch,
            **scheduled,
            **dict(zip(names, means.tolist())),
            "skipped": finite_steps.count(False),
            "images_per_second": images / seconds,
            "data_wait": self._data_seconds / seconds,
            "peak_memory": peak_memory(self.device),
        }
        record = {name: value if math.isfinite(value) else None for name, value in record.items()}
        for sink in self._sinks:
            sink(record)
        steps = [dict(zip(names, row)) for row in rows]
        self._check_skipped(step, steps, finite_steps, scheduled.get("loss_scale"))
        self._show(record)
        self._values, self._indices, self._data_seconds, self._start = [], [], 0.0, time.perf_counter()

    def _check_skipped(self, last: int, steps: list[dict[str, float]], finite: list[bool], scale: float | None) -> None:
        first = last - len(finite) + 1
        for i, values in enumerate(steps):
            self._consecutive_skips = 0 if finite[i] else self._consecutive_skips + 1
            if finite[i]:
                continue
            loss, norm = float(self._values[i]["loss"]), values["grad_norm"]
            record = {
                "step": first + i,
                "loss": str(loss),
                "grad_norm": str(norm),
                "loss_scale": scale,
                "indices": self._indices[i].tolist(),
            }
            with self._skipped.open("a") as file:
                file.write(json.dumps(record) + "\n")
            if self._consecutive_skips > self.max_skipped:
                scaled = f", loss scale {scale:g}" if scale else ""
                raise ValueError(
                    f"train: loss {loss} and gradient norm {norm} in step {first + i}{scaled}: "
                    f"{self._consecutive_skips} consecutive steps were skipped, more than --max-skipped "
                    f"{self.max_skipped}; their images are listed in {self._skipped}, and earlier checkpoints are "
                    f"intact"
                )

    def _show(self, record: dict) -> None:
        loss = "none" if record["loss"] is None else f"{record['loss']:.4f}"
        text = (
            f"loss {loss} · {record['images_per_second']:.0f} images/s · {record['data_wait']:.0%} waiting for data"
            f" · {record['peak_memory'] / 1e9:.1f} GB"
        )
        if record["skipped"]:
            text += f" · {record['skipped']} steps skipped"
        if self._progress:
            self._progress.update(self._task, text=text)
            return
        is_due = time.monotonic() - self._last_line >= LINE_EVERY or record["step"] == self._last_step
        if rank() == 0 and is_due:
            print(f"step {record['step']} · epoch {record['epoch']:.1f} · {text}", flush=True)
            self._last_line = time.monotonic()

    def _open_metrics(self, first_step: int) -> None:
        path = self.folder / "metrics.jsonl"
        drop_lines_after(path, first_step)
        last = max((record["step"] for record in read_metrics(path)), default=0)
        if last < first_step:  # a checkpoint is written after the line of its step
            print(f"{path} has no lines of the steps {last + 1} to {first_step}: they have been lost", flush=True)
        file = path.open("a", buffering=1)  # by lines
        self._sinks.append(lambda record: file.write(json.dumps(record) + "\n"))
        self._closers.append(file.close)

    def _open_dashboards(self, execution: Execution, first_step: int, run_id: str) -> None:
        if execution.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=first_step + 1)
            self._sinks.append(_scalar_sink(writer.add_scalar))
            self._closers.append(writer.close)
        if execution.wandb:
            try:
                import wandb
            except ImportError as error:
                raise ValueError("train: --wandb needs a package: pip install 'fastssl-engine[wandb]'") from error
            place = {"project": execution.wandb, "name": self.folder.name, "dir": str(self.folder)}
            run = wandb.init(**place, id=run_id or None, resume="allow")
            logged = getattr(run, "starting_step", 0) or 0  # steps before it reached the server before the run stopped
            self._sinks.append(lambda record: record["step"] >= logged and run.log(record, step=record["step"]))
            self._closers.append(run.finish)

    def _show_progress(self, total_steps: int, first_step: int) -> None:
        console = Console()
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._progress = Progress(*columns, console=console)
            self._task: TaskID = self._progress.add_task("step", total=total_steps, completed=first_step, text="")
            self._progress.start()
            self._closers.append(self._progress.stop)


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes allocated on the device so far; on a CPU, the peak memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; lines that hold none are named and passed over."""
    return read_records(path, METRICS)


def _scalar_sink(add_scalar: Callable[[str, float, int], object]) -> Callable[[dict], None]:
    def sink(record: dict) -> None:
        for name, value in record.items():
            if value is not None and name != "step":
                add_scalar(name, value, record["step"])

    return sink


def drop_lines_after(path: Path, step: int) -> None:
    """Drop records that a killed run wrote after its last checkpoint; the resumed run writes them again."""
    if os.path.lexists(path):
        rewrite_records(path, lambda record: record["step"] <= step)
