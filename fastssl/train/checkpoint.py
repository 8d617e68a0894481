"""Checkpoints: written beside the step by a thread, whole or not there at all, and known to be intact when read.

A file is called step-00001200.5891b5b522d5df08.pt: the step, and the beginning of the SHA-256 of its bytes. It is
written beside, synced and renamed, so that a kill at any moment leaves it complete or absent; and what a disk did to it
later is found when it is read, and the one before it taken.
"""

import hashlib
import os
import threading
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastssl.files import sync_folder

DIGEST = 16  # hexadecimal digits of the SHA-256 in a name


class Checkpoints:
    """``with Checkpoints(folder, keep_last=2) as checkpoints: … checkpoints.save(state, step)``.

    Args:
        folder: made if it is not there.
        keep_last: newest files that are kept.
        keep_steps: files of steps that it divides are kept for good; 0 for none.
    """

    def __init__(self, folder: Path, keep_last: int = 2, keep_steps: int = 0):
        self.folder, self.keep_last, self.keep_steps = folder, keep_last, keep_steps
        self._thread: threading.Thread | None = None
        self._failed: ValueError | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        self._end()
        if kind is None:
            self._raise()

    def save(self, state: dict, step: int) -> None:
        """Copies `state` and returns; a thread writes the copy. One that is still being written is waited for.

        Raises:
            ValueError: a weight or statistic is not finite, or an earlier file could not be written.
        """
        self._end()
        self._raise()
        for name, x in state["model"].items():
            if isinstance(x, Tensor) and x.is_floating_point() and not x.isfinite().all():
                raise ValueError(f"checkpoint: {name} is not finite after step {step}: not saved; {self._intact()}")
        self._thread = threading.Thread(target=self._write, args=(tree_map_only(Tensor, _cpu_copy, state), step))
        self._thread.start()

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
            ValueError: a file could not be written.
        """
        self._end()
        self._raise()

    def _write(self, state: dict, step: int) -> None:
        beside, hashed = self.folder / f"step-{step:08d}.writing", None
        try:
            self.folder.mkdir(exist_ok=True)  # without parents: the folder of a run that was removed is not made again
            with beside.open("wb") as file:
                hashed = _Hashed(file)
                torch.save(state, hashed)
                file.flush()
                os.fsync(file.fileno())
            path = self.folder / f"step-{step:08d}.{hashed.sha.hexdigest()[:DIGEST]}.pt"
            beside.replace(path)
            sync_folder(self.folder)
            self._prune(path)
        except (OSError, RuntimeError) as error:  # torch's zip writer wraps what the file raised
            cause = hashed.failed if hashed and hashed.failed else error
            reason = getattr(cause, "strerror", None) or cause
            beside.unlink(missing_ok=True)
            self._failed = ValueError(
                f"checkpoint: step {step} could not be written to {self.folder} ({reason}); {self._intact()}"
            )

    def _prune(self, written: Path) -> None:
        """Removes what is not to be kept, a damaged file of the same step, and what a killed run left half written."""
        others = [path for path in files(self.folder) if _step_of(path) != _step_of(written)]
        old = [
            path
            for path in others[: len(others) + 1 - self.keep_last]
            if not (self.keep_steps and _step_of(path) % self.keep_steps == 0)
        ]
        same = [path for path in self.folder.glob(f"{written.name.split('.')[0]}.*.pt") if path != written]
        for path in (*old, *same, *self.folder.glob("step-*.writing")):
            path.unlink(missing_ok=True)

    def _intact(self) -> str:
        known = files(self.folder)
        return f"that of step {_step_of(known[-1])} is intact" if known else "there is none before it"

    def _end(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise(self) -> None:
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed


class _Hashed:
    """A file that hashes what is written to it, and remembers why it failed."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha, self.failed = file, hashlib.sha256(), None

    def write(self, data) -> int:
        self.sha.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.failed = error
            raise

    def flush(self) -> None:
        self.file.flush()


def files(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*.pt") if path.name.count(".") == 2)


def load(folder: Path, method_name: str) -> dict:
    """The newest checkpoint that is intact, tensors on the CPU; damaged ones are named and passed over.

    Raises:
        ValueError: there is none, or it belongs to another method.
    """
    known = files(folder)
    if not known:
        raise ValueError(f"checkpoint: {folder} holds none: was the run stopped before its first checkpoint?")
    for path in reversed(known):
        if (state := _intact(path)) is not None:
            if state["method"] != method_name:
                raise ValueError(f"checkpoint: {path} is of the method {state['method']}, not of {method_name}")
            return state
        print(f"checkpoint: {path} is damaged: taking the one before it", flush=True)
    raise ValueError(f"checkpoint: all {len(known)} in {folder} are damaged")


def _intact(path: Path) -> dict | None:
    """What a checkpoint holds, or None if its bytes are not those that were written."""
    sha = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                sha.update(block)
        if sha.hexdigest()[:DIGEST] != path.name.split(".")[1]:
            return None
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        return None


def _step_of(path: Path) -> int:
    return int(path.name.split(".")[0].removeprefix("step-"))


def _cpu_copy(x: Tensor) -> Tensor:
    return x.detach().cpu() if x.device.type != "cpu" else x.detach().clone()


def random_state() -> dict:
    """State of torch's generators, on this process's devices."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
