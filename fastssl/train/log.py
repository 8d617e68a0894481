"""What a run tells: `metrics.jsonl` for machines, a progress bar (or a line a minute) for people."""

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastssl.distributed import all_mean, rank, world_size

from .config import Execution

LINE_EVERY = 60.0  # seconds between lines where the output is no terminal


class Log:
    """Collects values on the device and writes their means when asked; only then does the host wait for the device.

    A line of metrics.jsonl: {"step", "epoch", "lr", "loss", the method's own metrics, "grad_norm", "skipped",
    "images_per_second", "data_wait", "peak_memory"}: means over the steps since the line before that were not skipped,
    and over the ranks; `skipped` counts those that were; `data_wait` is the share of time spent waiting for data;
    `peak_memory` is in bytes, of the device, or of this process on a CPU. With fp16 also "loss_scale".

    Rank 0 writes; every rank notes the images of its skipped steps in skipped-RANK.jsonl.
    """

    def __init__(self, folder: Path, total_steps: int, first_step: int, execution: Execution, device: torch.device):
        self.folder, self.max_skipped, self.device = folder, execution.max_skipped, device
        self._last_step = total_steps
        self._values: list[dict[str, Tensor]] = []
        self._indices: list[Tensor] = []
        self._streak = 0
        self._waited, self._since, self._spoken = 0.0, time.perf_counter(), -math.inf
        self._progress, self._sinks, self._close = None, [], []
        self._skipped = folder / f"skipped-{rank()}.jsonl"
        _forget_after(self._skipped, first_step)
        if rank() == 0:
            path = folder / "metrics.jsonl"
            _forget_after(path, first_step)
            file = path.open("a")
            self._sinks.append(lambda record: (file.write(json.dumps(record) + "\n"), file.flush()))
            self._close.append(file.close)
            self._open_others(execution, first_step)
            self._show(total_steps, first_step)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        for close in self._close:
            close()

    def step(self, loss: Tensor, metrics: dict[str, Tensor], grad_norm: Tensor, indices: Tensor, waited: float) -> None:
        """Notes one step of this rank; nothing is read from the device. Where the norm is not finite it was skipped."""
        self._values.append({"loss": loss, **metrics, "grad_norm": grad_norm})
        self._indices.append(indices)
        self._waited += waited
        if self._progress:
            self._progress.advance(self._task)

    @contextlib.contextmanager
    def paused(self):
        """What happens inside takes none of the time that speeds are computed with."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def write(self, step: int, epoch: float, **scheduled: float) -> None:
        """Writes the means of what was noted since the last time, `step` being the last one noted. All ranks together.

        Raises:
            ValueError: more than `max_skipped` steps in a row were skipped.
        """
        if not self._values:
            return
        names = list(self._values[0])
        table = torch.stack([torch.stack([values[name].double() for name in names]) for values in self._values])
        norms = table[:, names.index("grad_norm")]
        taken = norms.isfinite()
        means = all_mean(torch.where(taken[:, None], table, 0).sum(0) / taken.sum())
        here, norms, taken = dict(zip(names, means.tolist())), norms.tolist(), taken.tolist()  # the host waits
        seconds = max(time.perf_counter() - self._since, 1e-9)
        images = world_size() * sum(map(len, self._indices))
        record = {
            "step": step,
            "epoch": epoch,
            **scheduled,
            **here,
            "skipped": taken.count(False),
            "images_per_second": images / seconds,
            "data_wait": self._waited / seconds,
            "peak_memory": peak_memory(self.device),
        }
        record = {name: value if math.isfinite(value) else None for name, value in record.items()}
        for sink in self._sinks:
            sink(record)
        self._check(step, norms, taken, scheduled.get("loss_scale"))
        self._say(record)
        self._values, self._indices, self._waited, self._since = [], [], 0.0, time.perf_counter()

    def _check(self, last: int, norms: list[float], taken: list[bool], scale: float | None) -> None:
        first = last - len(taken) + 1
        for i, (fine, norm) in enumerate(zip(taken, norms)):
            self._streak = 0 if fine else self._streak + 1
            if fine:
                continue
            loss = float(self._values[i]["loss"])
            note = {
                "step": first + i,
                "loss": str(loss),
                "grad_norm": str(norm),
                "loss_scale": scale,
                "indices": self._indices[i].tolist(),
            }
            with self._skipped.open("a") as file:
                file.write(json.dumps(note) + "\n")
            if self._streak > self.max_skipped:
                scaled = f", loss scale {scale:g}" if scale else ""
                raise ValueError(
                    f"train: loss {loss} and gradient norm {norm} in step {first + i}{scaled}: {self._streak} steps in "
                    f"a row were skipped, more than --max-skipped {self.max_skipped}; their images are numbered in "
                    f"{self._skipped}, and checkpoints written before are intact"
                )

    def _say(self, record: dict) -> None:
        loss = "none" if record["loss"] is None else f"{record['loss']:.4f}"
        text = (
            f"loss {loss} · {record['images_per_second']:.0f} images/s · {record['data_wait']:.0%} waiting for data"
            f" · {record['peak_memory'] / 1e9:.1f} GB"
        )
        if record["skipped"]:
            text += f" · {record['skipped']} steps skipped"
        if self._progress:
            self._progress.update(self._task, text=text)
        elif rank() == 0 and (time.monotonic() - self._spoken >= LINE_EVERY or record["step"] == self._last_step):
            print(f"step {record['step']} · epoch {record['epoch']:.1f} · {text}", flush=True)
            self._spoken = time.monotonic()

    def _show(self, total_steps: int, first_step: int) -> None:
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
            self._task = self._progress.add_task("step", total=total_steps, completed=first_step, text="")
            self._progress.start()
            self._close.append(self._progress.stop)

    def _open_others(self, execution: Execution, first_step: int) -> None:
        if execution.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=first_step + 1)
            self._sinks.append(_scalars(writer.add_scalar))
            self._close.append(writer.close)
        if execution.wandb:
            try:
                import wandb
            except ImportError as error:
                raise ValueError("train: --wandb needs a package: pip install 'fastssl-engine[wandb]'") from error
            run = wandb.init(project=execution.wandb, name=self.folder.name, dir=str(self.folder), resume="allow")
            self._sinks.append(lambda record: run.log(record, step=record["step"]))
            self._close.append(run.finish)


def peak_memory(device: torch.device) -> int:
    """The most bytes that the device's tensors took so far; on a CPU the most that this process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; one that a kill left half written at the end is left out."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _scalars(add: Callable[[str, float, int], None]) -> Callable[[dict], None]:
    def sink(record: dict) -> None:
        for name, value in record.items():
            if value is not None and name != "step":
                add(name, value, record["step"])

    return sink


def _forget_after(path: Path, step: int) -> None:
    """Drops lines that a killed run wrote after its last checkpoint: the resumed run writes them again."""
    if not path.exists():
        return
    kept = [json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] <= step]
    beside = path.with_name(path.name + ".writing")
    beside.write_text("".join(kept))
    beside.replace(path)
