"""Workers that make batches: how they are started, and one sentence when one is lost or memory is full.

Processes make batches in shared memory, see `shared.py`. What has no room there goes through /dev/shm, of which Docker
gives a container 64 MB by default. Threads need neither. Python's global lock lets one thread at a time run what is not
decoding or arithmetic, and the step of a run waits for it too; so threads are the choice on a Python without that lock.
"""

import contextlib
import gc
import itertools
import multiprocessing
import os
import re
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from .shared import NoSharedMemory, Ring, Sent, map_tensors, pin_in_this_thread

SHARED_MEMORY = "/dev/shm"
KINDS = ("auto", "process", "thread")
PREFETCH = 2  # batches that each worker makes ahead
HELD = 2  # batches that stay readable while later ones are made: the reader's last one, and the one before it
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


def choose_kind(kind: str) -> str:
    """The kind of workers, "process" or "thread"; "auto" is threads on a Python without its global lock.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"data: --worker-kind must be {', '.join(KINDS[:-1])} or {KINDS[-1]}, got {kind!r}")
    has_lock = getattr(sys, "_is_gil_enabled", lambda: True)()
    return kind if kind != "auto" else "process" if has_lock else "thread"


class Workers:
    """A `DataLoader` that never hangs on a lost worker, and names memory, --workers and /dev/shm instead.

    Args:
        dataset: makes the batches, or the samples of batches. An exception that it returns is raised here.
        workers: number of processes or threads; 0 makes the batches in this process.
        collate: makes a batch of samples.
        batch_bytes: size of a batch. If `options` have a sampler of whole batches, processes make them in shared memory
            of that size, which is reused: a batch is valid until the next one but one is asked for.
        kind: "process" or "thread". Threads read one dataset, whose items must depend on their keys alone.
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
        kind: str = "process",
        **options: Any,
    ):
        self._count, self._batch_bytes = workers, batch_bytes
        self._processes: list[BaseProcess] = []
        self._threads = _Threads(dataset, workers, collate, **options) if workers and kind == "thread" else None
        if self._threads:
            workers, options = 0, {**options, "persistent_workers": False, "pin_memory": False}
        self._ring: Ring | None = None
        if workers and batch_bytes and "sampler" in options:
            try:
                self._ring = Ring(PREFETCH * workers + HELD, batch_bytes)
            except OSError as error:
                raise LostWorker(
                    f"data: no memory for the batches of {workers} workers ({error}): {WAYS_OUT}"
                ) from error
            dataset = _InSlots(dataset, self._ring)
            options["sampler"] = _WithSlots(options["sampler"], self._ring.slots)
        self._loader: DataLoader = DataLoader(
            dataset,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            collate_fn=_Sharing(collate),
            worker_init_fn=_prepare_process,
            **options,
        )

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        """The batches; workers start now, or go on if they persist."""
        if self._threads:
            return map(_raise_error, self._threads.run())
        if not self._count:
            return map(_raise_error, self._loader)
        if not self._processes:
            if not (self._ring and multiprocessing.get_start_method() == "fork"):  # which needs no /dev/shm
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
        return map(_open, iter(lambda: self._guard(lambda: next(batches, end)), end))

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


class _Threads:
    """Threads that make batches, in the order of their keys."""

    def __init__(self, dataset: Any, count: int, collate: Callable[[Any], Any], **options: Any):
        self._dataset, self._count, self._collate = dataset, count, collate
        self._keys, self._pin = options.get("sampler"), options.get("pin_memory", False)
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[Future] = deque()

    def run(self) -> Iterator[Any]:
        """The batches; those of an earlier, unfinished run are no longer made."""
        self._cancel(self._pending)
        self._pool = pool = self._pool or self._start()
        keys: Iterator[Any] = iter(range(len(self._dataset)) if self._keys is None else self._keys)
        pending: deque[Future] = deque()
        self._pending = pending

        def begin(count: int) -> None:
            pending.extend(pool.submit(self._make, key) for key in itertools.islice(keys, count))

        def batches() -> Iterator[Any]:
            try:
                while pending:
                    batch = pending.popleft().result()
                    begin(1)
                    yield batch
            finally:  # an error, Ctrl-C, or a reader that stopped
                self._cancel(pending)

        begin(PREFETCH * self._count)
        return batches()

    def _make(self, key: Any) -> Any:
        return self._collate(self._dataset[key])

    @staticmethod
    def _cancel(pending: deque[Future]) -> None:
        while pending:
            pending.pop().cancel()

    def _start(self) -> ThreadPoolExecutor:
        """Threads in which torch computes with one thread each; in this one it keeps its number."""
        threads, started = torch.get_num_threads(), threading.Barrier(self._count + 1)
        pool = ThreadPoolExecutor(self._count, "fastssl-data", _prepare_thread, (self._pin,))
        try:
            for _ in range(self._count):
                pool.submit(started.wait)
            started.wait()
        except RuntimeError as error:
            started.abort()
            raise LostWorker(f"data: worker threads can't be started ({error}): {WAYS_OUT}") from error
        finally:
            torch.set_num_threads(threads)
        weakref.finalize(self, pool.shutdown, wait=False, cancel_futures=True)
        return pool


def _prepare_thread(pin: bool) -> None:
    torch.get_num_threads()  # which would otherwise set the number at the first computation
    torch.set_num_threads(1)
    if pin:
        pin_in_this_thread()


class _WithSlots(Sampler):
    """The keys of a sampler, each with the number of the slot for its batch; slots follow each other in turn."""

    def __init__(self, keys: Any, slots: int):
        self._keys, self._slots = keys, slots

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return ((number % self._slots, key) for number, key in enumerate(self._keys))

    def __len__(self) -> int:
        return len(self._keys)


class _InSlots(Dataset):
    """A dataset of whole batches that are made in the slots of a ring."""

    def __init__(self, dataset: Dataset, ring: Ring):
        self._dataset, self._ring = dataset, ring

    def __getitem__(self, key: tuple[int, Any]) -> Any:
        number, key = key
        try:
            return self._ring.make(number, lambda: self._dataset[key])
        except NoSharedMemory as error:
            return _no_shared_memory(error)


class _Sharing:
    """Makes a batch of samples and, in a worker process, moves it to shared memory at once.

    torch would do that in a thread whose errors it prints and forgets: the loader would wait for the batch for ever.
    """

    def __init__(self, collate: Callable[[Any], Any]):
        self.collate = collate

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        if get_worker_info() is None or isinstance(batch, Sent):
            return batch
        try:
            map_tensors(Tensor.share_memory_, batch)
        except (RuntimeError, MemoryError, OSError) as error:
            return _no_shared_memory(error)
        return batch


def _no_shared_memory(error: Exception) -> LostWorker:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return LostWorker(f"data: a worker has no shared memory for a batch ({reason}): {WAYS_OUT}")


def _open(batch: Any) -> Any:
    """A batch as the reader gets it."""
    return batch.open() if isinstance(batch, Sent) else _raise_error(batch)


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


def _prepare_process(worker: int) -> None:
    """Prepares a worker process: inherited objects are never collected, and it ends when its parent does.

    A DALI pipeline waits for its threads when it is collected; a forked process has no such threads and would hang.
    torch's own check for a killed parent compares `os.getppid()`, which under the start method "forkserver" is the
    server: without the thread here, workers of a killed run would stay for ever.
    """
    gc.freeze()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), name="fastssl-parent", daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    """Ends this process when its parent has ended."""
    wait([parent.sentinel])
    os._exit(1)


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
