"""What a run tells: `metrics.jsonl` for machines, a progress bar (or a line now and then) for people."""

import json
import math
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

LINE_EVERY = 20.0  # seconds between lines where the output is no terminal


class Log:
    """Collects values on the device and writes their mean when asked; only then does the host wait for the device.

    A line of metrics.jsonl: {"step", "epoch", "lr", "loss", the method's own metrics, "images_per_second",
    "data_wait"}: means over the steps since the line before; data_wait is the share of time spent waiting for data.
    """

    def __init__(self, path: Path, total_steps: int, first_step: int):
        _forget_after(path, first_step)
        self._file = path.open("a")
        self._values: list[dict[str, Tensor]] = []
        self._images, self._waited, self._since = 0, 0.0, time.perf_counter()
        self._spoken = 0.0
        console = Console()
        self._progress = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                       TextColumn("{task.fields[text]}"))  # fmt: skip
            self._progress = Progress(*columns, console=console)
            self._task = self._progress.add_task("step", total=total_steps, completed=first_step, text="")
            self._progress.start()

    def step(self, loss: Tensor, metrics: dict[str, Tensor], images: int, waited: float) -> None:
        """Notes one step; nothing is read from the device."""
        self._values.append({"loss": loss.detach(), **metrics})
        self._images += images
        self._waited += waited
        if self._progress:
            self._progress.advance(self._task)

    def write(self, step: int, epoch: float, lr: float) -> None:
        """Writes the mean of what was noted since the last time.

        Raises:
            ValueError: the loss is not finite.
        """
        if not self._values:
            return
        names = list(self._values[0])
        table = torch.stack([torch.stack([values[name].double() for name in names]) for values in self._values])
        means = dict(zip(names, table.mean(0).tolist()))  # the one host sync
        seconds = max(time.perf_counter() - self._since, 1e-9)
        speed, wait = self._images / seconds, self._waited / seconds
        record = {"step": step, "epoch": epoch, "lr": lr, **means, "images_per_second": speed, "data_wait": wait}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if not math.isfinite(means["loss"]):
            raise ValueError(
                f"train: the loss is {means['loss']} at step {step}; checkpoints written before it are intact"
            )
        self._values, self._images, self._waited, self._since = [], 0, 0.0, time.perf_counter()
        self._say(f"loss {means['loss']:.4f} · {speed:.0f} images/s · {wait:.0%} waiting for data", step, epoch)

    def _say(self, text: str, step: int, epoch: float) -> None:
        if self._progress:
            self._progress.update(self._task, text=text)
        elif time.monotonic() - self._spoken >= LINE_EVERY:
            print(f"step {step} · epoch {epoch:.1f} · {text}", flush=True)
            self._spoken = time.monotonic()

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
        self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; one that a kill left half written at the end is left out."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _forget_after(path: Path, step: int) -> None:
    """Drops lines that a killed run wrote after its last checkpoint: the resumed run writes them again."""
    kept = [json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] <= step]
    beside = path.with_name(path.name + ".writing")
    beside.write_text("".join(kept))
    beside.replace(path)
