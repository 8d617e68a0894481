"""Checkpoint files: written by a background thread, complete or absent, and verified when they are read.

A file is named step-00001200.5891b5b522d5df08.pt: the step, and the first digits of the SHA-256 of its bytes. It is
written under another name, synced to disk and renamed, so that a kill at any moment leaves it complete or absent.
Changed bytes are detected when a file is loaded, and the previous file is loaded instead.
"""

import hashlib
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastssl.files import sync_folder

DIGEST = 16  # hexadecimal digits of the SHA-256 in a name


class Checkpoints:
    """``with Checkpoints(folder, keep_last=2) as checkpoints: … checkpoints.save(state, step)``.

    Args:
        folder: created by the first `save`, in a folder that exists.
        keep_last: number of newest files to keep.
        keep_steps: files whose step is a multiple of it are never deleted; 0 for none.
    """

    def __init__(self, folder: Path, keep_last: int = 2, keep_steps: int = 0):
        self.folder, self.keep_last, self.keep_steps = folder, keep_last, keep_steps
        self._thread: threading.Thread | None = None
        self._error: ValueError | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._join()
        if kind is None:
            self._raise_error()

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
            self._delete_old(path)
        except (OSError, RuntimeError) as error:  # torch's zip writer wraps the exception of the file
            cause = hashed.error if hashed and hashed.error else error
            reason = getattr(cause, "strerror", None) or cause
            partial.unlink(missing_ok=True)
            self._error = ValueError(
                f"checkpoint: step {step} could not be written to {self.folder} ({reason}); {self._newest()}"
            )

    def _delete_old(self, written: Path) -> None:
        """Delete files that are not to be kept, a damaged file of the same step, and partial files of killed runs."""
        earlier = [path for path in files(self.folder) if _step_of(path) != _step_of(written)]
        old = [
            path
            for path in earlier[: len(earlier) + 1 - self.keep_last]
            if not (self.keep_steps and _step_of(path) % self.keep_steps == 0)
        ]
        same_step = [path for path in self.folder.glob(f"{written.name.split('.')[0]}.*.pt") if path != written]
        for path in (*old, *same_step, *self.folder.glob("step-*.writing")):
            path.unlink(missing_ok=True)

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
    return sorted(path for path in folder.glob("step-*.pt") if path.name.count(".") == 2)


def load(folder: Path, method_name: str) -> dict[str, Any]:
    """The newest intact checkpoint, with tensors on the CPU. Damaged ones are reported and skipped.

    Raises:
        ValueError: there is no intact checkpoint, or it is of another method.
    """
    paths = files(folder)
    if not paths:
        raise ValueError(f"checkpoint: no checkpoint in {folder}: was the run stopped before its first one?")
    for path in reversed(paths):
        if (state := _load_intact(path)) is not None:
            if state["method"] != method_name:
                raise ValueError(f"checkpoint: {path} is of the method {state['method']}, not of {method_name}")
            return state
        print(f"checkpoint: {path} is damaged: loading the previous one", flush=True)
    raise ValueError(f"checkpoint: all {len(paths)} checkpoints in {folder} are damaged")


def _load_intact(path: Path) -> dict[str, Any] | None:
    """The content of a checkpoint, or None if its bytes do not have the digest in its name."""
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
