"""Checkpoint files: written by a background thread, complete or absent, and verified when they are read.

A file is named step-00001200.5891b5b522d5df08.pt: the step, and the first digits of the SHA-256 of its bytes. It is
written under another name, synced to disk and renamed, so that a kill at any moment leaves it complete or absent.
When files are loaded, one with changed bytes, or whose content is not that of its name and run, is named and the
previous one taken.
"""

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastssl.files import sync_folder
from fastssl.text import printable

DIGEST = 16  # hexadecimal digits of the SHA-256 in a name
NAME = re.compile(rf"step-(\d{{8,18}})\.[0-9a-f]{{{DIGEST}}}\.pt")
EVALUATED = ("method", "model", "step")  # what a checkpoint must hold to be evaluated
RESUMED = (*EVALUATED, "optimizer", "scaler", "random")  # and to be resumed


class Checkpoints:
    """``with Checkpoints(folder, keep_last=2) as checkpoints: … checkpoints.save(state, step)``.

    Args:
        folder: created by the first `save`, in a folder that exists.
        keep_last: number of newest files to keep.
        keep: whether the file of a step is never deleted; by default none is.
    """

    def __init__(self, folder: Path, keep_last: int = 2, keep: Callable[[int], bool] = lambda step: False):
        self.folder, self.keep_last, self.keep = folder, keep_last, keep
        self._thread: threading.Thread | None = None
        self._error: ValueError | None = None
        self._newest_written: Path | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._join()
        if kind is None:
            self._raise_error()
            if self._newest_written is not None and not self._newest_written.exists():
                raise ValueError(f"checkpoint: {self._newest_written} has been removed after it was written")
        elif self._error is not None:
            print(self._error, flush=True)

    def save(self, state: dict[str, Any], step: int) -> None:
        """Wait for an earlier write, copy `state` and return; a thread writes the copy.

        Raises:
            ValueError: a weight or statistic is not finite, or an earlier file could not be written.
        """
        self.wait()
        for name, x in state["model"].items():
            if isinstance(x, Tensor) and x.is_floating_point() and not x.isfinite().all():
                raise ValueError(f"checkpoint: {name} is not finite after step {step}: not saved; {self._newest()}")
        copy = tree_map_only(Tensor, _cpu_copy, state)
        self._thread = threading.Thread(target=self._write, args=(copy, step))
        self._thread.start()

    def wait(self) -> None:
        """Return when everything is on disk.

        Raises:
            ValueError: a file could not be written.
        """
        self._join()
        self._raise_error()

    def _write(self, state: dict[str, Any], step: int) -> None:
        partial, hashed = self.folder / f"step-{step:08d}.writing", None
        try:
            self.folder.mkdir(exist_ok=True)  # without parents: the folder of a deleted run is not created again
            with partial.open("wb") as file:
                hashed = _HashedFile(file)
                torch.save(state, cast(IO[bytes], hashed))
                file.flush()
                os.fsync(file.fileno())
            path = self.folder / f"step-{step:08d}.{hashed.sha.hexdigest()[:DIGEST]}.pt"
            partial.replace(path)
            sync_folder(self.folder)
            self._newest_written = path
            self._delete_old(path)
        except BaseException as error:  # whatever ends this thread must end the run: nobody else would notice
            cause = hashed.error if hashed and hashed.error else error  # torch's zip writer wraps the file's exception
            reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
            self._error = ValueError(f"checkpoint: step {step} could not be written to {self.folder} ({reason})")
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._error = ValueError(f"{self._error}; {self._newest()}")

    def _delete_old(self, written: Path) -> None:
        """Delete files that are not to be kept, a damaged file of the same step, and partial files of killed runs."""
        earlier = [path for path in files(self.folder) if _step_of(path) < _step_of(written)]
        old = [path for path in earlier[: max(0, len(earlier) + 1 - self.keep_last)] if not self.keep(_step_of(path))]
        same_step = [path for path in self.folder.glob(f"{written.name.split('.')[0]}.*.pt") if path != written]
        for path in (*old, *same_step, *self.folder.glob("step-*.writing")):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:  # the new file is on disk: that an old one stays must not end the run
                print(f"checkpoint: {path} could not be deleted ({error.strerror or error})", flush=True)

    def _newest(self) -> str:
        """End of an error sentence: the checkpoint to return to."""
        paths = files(self.folder)
        return f"that of step {_step_of(paths[-1])} is intact" if paths else "there is none before it"

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error


class _HashedFile:
    """Binary file that hashes the bytes written to it and keeps the exception of a failed write."""

    def __init__(self, file: IO[bytes]):
        self.file, self.sha = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sha.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def files(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted((path for path in folder.glob("step-*.pt") if NAME.fullmatch(path.name)), key=_step_of)


def load(folder: Path, method_name: str, run_id: str = "", needed: tuple[str, ...] = EVALUATED) -> dict[str, Any]:
    """The newest checkpoint that is intact and the run's own, with tensors on the CPU; others are named.

    Args:
        folder: the checkpoints.
        method_name: the run's method.
        run_id: the run's id; "" for a run of a version without ids. Checkpoints of such a version have none either.
        needed: what the checkpoint must hold: `EVALUATED` or `RESUMED`.

    Raises:
        ValueError: there is no such checkpoint; the reason is that of the newest.
    """
    paths, reasons = files(folder), []
    if not paths:
        raise ValueError(f"checkpoint: no checkpoint in {folder}: was the run stopped before its first one?")
    for path in reversed(paths):
        state, reason = _load_intact(path, needed)
        reason = reason or _misfit(state, _step_of(path), method_name, run_id)
        if not reason:
            return state
        reasons.append(f"{path} {reason}")
        if path != paths[0]:
            print(f"checkpoint: {reasons[-1]}: loading the previous one", flush=True)
    more = f", and {len(paths) - 1} earlier ones cannot be loaded either" if len(paths) > 1 else ""
    raise ValueError(f"checkpoint: {reasons[0]}{more}")


def _load_intact(path: Path, needed: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """(content, ""), or ({}, reason) where the file is damaged or holds something else than a checkpoint."""
    sha = hashlib.sha256()
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            return {}, "is no regular file"
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                sha.update(block)
        if sha.hexdigest()[:DIGEST] != path.name.split(".")[1]:
            return {}, "is damaged"
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        return {}, f"cannot be read ({error.strerror or error})"
    except MemoryError:
        raise
    except Exception as error:  # zip, pickle and key errors of foreign content have no common base
        return {}, f"holds something else than a checkpoint ({type(error).__name__})"
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        return {}, "holds something else than a checkpoint"
    if missing := [name for name in needed if name not in state]:
        return {}, f"is no checkpoint of a run: it lacks {missing[0]}"
    if wrong := [name for name, is_right in PARTS.items() if name in state and not is_right(state[name])]:
        return {}, f"is no checkpoint of a run: its {wrong[0]} is something else"
    return state, ""


def _is_optimizer(part: Any) -> bool:
    """Whether this has the form of an optimizer's state; whether it fits is known when it is loaded."""
    if not (isinstance(part, dict) and isinstance(part.get("state"), dict)):
        return False
    groups, states = part.get("param_groups"), part["state"].values()
    return (
        isinstance(groups, list)
        and all(isinstance(group, dict) and _are(int, group.get("params")) for group in groups)
        and _are(int, list(part["state"]))
        and all(isinstance(values, dict) and _are(Tensor, list(values.values())) for values in states)
    )


def _are_random(part: Any) -> bool:
    """Whether this holds the result of `random_state` for each rank."""
    size = torch.get_rng_state().shape
    return (
        _are(dict, part)
        and len(part) > 0
        and all({"cpu", "cuda"} <= set(rank) for rank in part)
        and all(_is_bytes(rank["cpu"]) and rank["cpu"].shape == size for rank in part)
        and all(rank["cuda"] is None or _is_bytes(rank["cuda"]) for rank in part)
    )


def _is_bytes(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dtype == torch.uint8


def _are(kind: type, part: Any) -> bool:
    return isinstance(part, list) and all(isinstance(x, kind) and not isinstance(x, bool) for x in part)


PARTS: dict[str, Callable[[Any], bool]] = {  # parts of a checkpoint, and what they must be
    "method": lambda part: isinstance(part, str),
    "step": lambda part: _are(int, [part]),
    "epochs": lambda part: _are(int, part) and len(part) == 3 and part[0] > 0,
    "random": _are_random,
    "scaler": lambda part: isinstance(part, dict) and all(isinstance(x, int | float) for x in part.values()),
    "optimizer": _is_optimizer,
}


def _misfit(state: dict[str, Any], step: int, method_name: str, run_id: str) -> str:
    """What makes an intact checkpoint not the run's own, or not that of its name; "" if nothing does."""
    if state["method"] != method_name:
        return f"is of the method {printable(state['method'])}, not of {printable(method_name)}"
    if run_id and state.get("run", run_id) != run_id:
        return f"is of the run {printable(state['run'])}, not of this one ({printable(run_id)})"
    if state["step"] != step:
        return f"is of step {printable(state['step'])}, not of the step in its name"
    return ""


def load_model(method: nn.Module, state: dict[str, Any]) -> None:
    """Load the weights of a checkpoint.

    Raises:
        ValueError: names, shapes or kinds of numbers do not fit the method, or a weight is not finite.
    """
    checkpoint, own = f"checkpoint: that of step {state['step']}", method.state_dict()
    for name, x in state["model"].items():
        expected = own.get(name)
        if not (isinstance(x, Tensor) and isinstance(expected, Tensor)):
            continue
        if x.dtype != expected.dtype:  # torch would convert them without a word, complex numbers too
            kinds = f"{name} has numbers of {x.dtype}, not of {expected.dtype}"
            raise ValueError(f"{checkpoint} does not fit the method: {printable(kinds)}")
        if x.is_floating_point() and not x.isfinite().all():
            raise ValueError(f"{checkpoint} cannot be used: {printable(name)} is not finite")
    try:
        method.load_state_dict(state["model"])
    except (RuntimeError, AttributeError) as error:
        reason = printable(str(error).splitlines()[-1].strip())
        raise ValueError(f"{checkpoint} does not fit the method: {reason}") from error


def _step_of(path: Path) -> int:
    return int(path.name.split(".")[0].removeprefix("step-"))


def _cpu_copy(x: Tensor) -> Tensor:
    return x.detach().cpu() if x.device.type != "cpu" else x.detach().clone()


def random_state() -> dict[str, Tensor | None]:
    """State of torch's random number generators, of the CPU and of this process's GPU."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Tensor | None]) -> None:
    """Restore the result of `random_state`."""
    cpu, cuda = state["cpu"], state["cuda"]
    if cpu is not None:
        torch.set_rng_state(cpu)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
