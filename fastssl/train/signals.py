"""Graceful interruption: on SIGTERM and SIGUSR1 a run finishes its step, saves its state and exits."""

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from fastssl.distributed import world_size

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):
    """The run saved its state and stopped because of a signal.

    `code` is the exit status for the process: 128 + the number of the signal, by which shells and schedulers recognise
    a process that a signal ended; 1 is an error.
    """

    def __init__(self, number: int, step: int):
        super().__init__(f"{signal.Signals(number).name}: saved after step {step}")
        self.code = 128 + number


class SignalGuard:
    """``with SignalGuard() as guard: …  guard.requested()`` after each step.

    All ranks must stop at the same step, but signals reach them at different steps. Each rank therefore takes part in
    an asynchronous all-reduce on the CPU after every step, and reads its result one step later. The host never waits
    for a GPU.
    """

    def __enter__(self) -> "SignalGuard":
        self._number = 0
        self._reduction: tuple[torch.Tensor, Any] | None = None
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in this thread only
            self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._number = number

    def requested(self) -> int:
        """The number of the signal on which all ranks must stop, 0 for none. Must be called after each step."""
        if world_size() == 1:
            return self._number
        agreed = 0
        if self._reduction is not None:
            largest, work = self._reduction
            work.wait()
            agreed = int(largest)
        number = torch.tensor(self._number)
        self._reduction = number, dist.all_reduce(number, dist.ReduceOp.MAX, async_op=True)
        return agreed
