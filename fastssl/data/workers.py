"""Worker processes that make batches: how they are started, and one sentence when one is lost or memory is full.

Workers send batches in shared memory, /dev/shm on Linux. Docker gives a container 64 MB of it by default.
"""

import contextlib
import gc
import multiprocessing
import os
import re
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

SHARED_MEMORY = "/dev/shm"
PREFETCH = 2  # batches that each worker makes ahead
WAYS_OUT = (
    f"use fewer --workers or smaller batches, or give the machine or container more memory ({SHARED_MEMORY} of a "
    "container: docker run --shm-size=8g)"
)
CAUSES: dict[int, str] = {  # of the signals that end a worker when memory is short
    signal.SIGKILL: "which the system sends when memory runs out",
    signal.SIGBUS: f"which the system sends when {SHARED_MEMORY} is full",
}


class LostWorker(ValueError):
    """Worker processes can't be started, were killed or ran out of memory; one sentence with ways out."""


def make_batch_whole(batch: Any) -> Any:
    """The batch as it is, for datasets whose samples are whole batches."""
    return batch


class Workers:
    """A `DataLoader` that never hangs on a lost worker, and names memory, --workers and /dev/shm instead.

    Args:
        dataset: makes the batches, or the samples of batches. An exception that it returns is raised here.
        workers: number of processes; 0 makes the batches in this process.
        collate: makes a batch of samples.
        batch_bytes: size of a batch, to see at the start whether the shared memory is large enough.
        options: of `DataLoader`.

    Raises:
        LostWorker: the shared memory can't hold the batches that the workers make ahead; while iterating, a worker was
            killed or can't get memory.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        workers: int,
        collate: Callable[[Any], Any] = make_batch_whole,
        batch_bytes: int = 0,
        **options: Any,
    ):
        self._loader: DataLoader = DataLoader(
            dataset, num_workers=workers, collate_fn=_Sharing(collate), worker_init_fn=_freeze_garbage, **options
        )
        self._count, self._batch_bytes = workers, batch_bytes
        self._processes: list[BaseProcess] = []

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        """The batches; workers start now, or go on if they persist."""
        if not self._count:
            return map(_raise_error, self._loader)
        if not self._processes:
            check_shared_memory(self._batch_bytes, min(PREFETCH * self._count, len(self)) + 1, self._count)
            gc.collect()  # what a process inherits stays in its memory
        known = multiprocessing.active_children()
        batches = self._guard(lambda: iter(self._loader))
        self._processes = [
            process for process in multiprocessing.active_children() if process not in known
        ] or self._processes
        _note_only_own_losses()
        _running.add(self)
        end = object()
        return map(_raise_error, iter(lambda: self._guard(lambda: next(batches, end)), end))

    def _guard(self, wait_for_workers: Callable[[], Any]) -> Any:
        """Calls a function that waits for the workers."""
        self._check_all_alive()
        try:
            with _waits_for(self):
                return wait_for_workers()
        except Exception as error:  # of the dataset, or of a connection to a process that is gone
            if isinstance(error, OSError | EOFError | RuntimeError):  # a connection breaks before its process has ended
                ended = wait([process.sentinel for process in self._processes], timeout=2)
                for process in self._processes:
                    if process.sentinel in ended:
                        process.join()
            self._check_all_alive(error)
            if isinstance(error, OSError) and not self._processes:  # no memory for a process or its semaphores
                reason = error.strerror or error
                raise LostWorker(f"data: worker processes can't be started ({reason}): {WAYS_OUT}") from error
            raise

    def _check_all_alive(self, cause: Exception | None = None) -> None:
        lost = [process for process in self._processes if process.exitcode]
        if not lost:
            return
        for process in self._processes:
            process.terminate()  # torch would wait for each of them
        raise LostWorker(f"data: worker process {lost[0].pid} {_describe_end(lost[0].exitcode)}: {WAYS_OUT}") from cause


def check_shared_memory(batch_bytes: int, batches: int, workers: int) -> None:
    """Check that /dev/shm holds the batches that workers make ahead. A system without it is not checked.

    Args:
        batch_bytes: size of a batch.
        batches: number of batches at a time.
        workers: number of processes, for the error.

    Raises:
        LostWorker: it is too small.
    """
    try:
        state = os.statvfs(SHARED_MEMORY)
    except OSError:
        return
    free, needed = state.f_bavail * state.f_frsize, batch_bytes * batches
    if state.f_blocks and needed > free:  # without a limit there are no blocks
        raise LostWorker(
            f"data: {workers} workers keep up to {batches} batches of {_megabytes(batch_bytes)} in {SHARED_MEMORY}, "
            f"which has {_megabytes(free)} free: {WAYS_OUT}"
        )


class _Sharing:
    """Makes a batch of samples and, in a worker, moves it to shared memory at once.

    torch would do that in a thread whose errors it prints and forgets: the loader would wait for the batch for ever.
    """

    def __init__(self, collate: Callable[[Any], Any]):
        self.collate = collate

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        if get_worker_info() is None:
            return batch
        try:
            _share(batch)
        except (RuntimeError, MemoryError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return LostWorker(f"data: a worker has no shared memory for a batch ({reason}): {WAYS_OUT}")
        return batch


def _share(batch: Any) -> None:
    """Moves the tensors of a batch to shared memory, in place."""
    if isinstance(batch, Tensor):
        batch.share_memory_()
    elif isinstance(batch, dict | list | tuple):
        for part in batch.values() if isinstance(batch, dict) else batch:
            _share(part)


def _raise_error(batch: Any) -> Any:
    if isinstance(batch, Exception):
        try:
            raise batch
        finally:
            del batch  # which has this frame in its traceback: a cycle would keep the workers alive
    return batch


def _describe_end(code: int | None) -> str:
    """How a process ended, by its exit code: a negative one is a signal."""
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    reason = CAUSES.get(-code)
    return f"was killed by {signal.Signals(-code).name}{f', {reason}' if reason else ''}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _freeze_garbage(worker: int) -> None:
    """Keeps the garbage collector of a worker from objects that it inherited from its parent.

    A DALI pipeline waits for its threads when it is collected; a forked process has no such threads and would hang.
    """
    gc.freeze()


# torch raises an error in the main thread as soon as a worker dies, wherever that thread is: in a step, or while it
# writes a checkpoint. The error belongs to the iteration over the batches, so it is raised only while that waits.
_running: weakref.WeakSet[Workers] = weakref.WeakSet()
_waiting: Workers | None = None  # those that the main thread waits for
_handles_losses = False


@contextlib.contextmanager
def _waits_for(workers: Workers) -> Iterator[None]:
    """Lets torch raise the loss of one of these workers; outside of it the loss is found at the next batch."""
    global _waiting
    if threading.current_thread() is not threading.main_thread():  # signals arrive in the main thread alone
        yield
        return
    previous, _waiting = _waiting, workers
    try:
        yield
    finally:
        _waiting = previous


def _note_only_own_losses() -> None:
    """Puts a handler around torch's, once."""
    global _handles_losses
    handler = signal.getsignal(signal.SIGCHLD)
    if _handles_losses or not callable(handler) or threading.current_thread() is not threading.main_thread():
        return
    _handles_losses = True

    def handle(number: int, frame: FrameType | None) -> None:
        try:
            handler(number, frame)
        except RuntimeError as error:
            match = re.search(r"\(pid (\d+)\)", str(error))
            owners = [w for w in _running if match and int(match[1]) in {process.pid for process in w._processes}]
            if not owners or _waiting in owners:
                raise  # of a DataLoader of somebody else, or of the one that is waited for
            # the owner finds the lost process when its next batch is asked for

    signal.signal(signal.SIGCHLD, handle)
