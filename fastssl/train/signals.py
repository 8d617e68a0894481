"""Leaving early: SIGTERM and SIGUSR1 let the step end, save, and go."""

import signal
import threading

import torch
import torch.distributed as dist

from fastssl.distributed import world_size

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):
    """The run saved its state and stopped because a signal asked for it.

    `code` is what the process should exit with: 128 + the signal's number, which shells and schedulers take for "ended
    by that signal", as against 1 for an error.
    """

    def __init__(self, number: int, step: int):
        super().__init__(f"{signal.Signals(number).name}: saved after step {step}")
        self.code = 128 + number


class SignalGuard:
    """``with SignalGuard() as guard: …  guard.requested()`` after each step.

    The ranks must leave at the same step, and a signal reaches them at different ones. So each tells the others after
    every step, on the CPU and without waiting; what they said is read a step later. No device is waited for.
    """

    def __enter__(self) -> "SignalGuard":
        self._number, self._said, self._before = 0, None, {}
        if threading.current_thread() is threading.main_thread():  # others may not
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        self._number = number

    def requested(self) -> int:
        """The number of the signal that asks all ranks to leave, 0 for none. To be called after each step."""
        if world_size() == 1:
            return self._number
        asked = 0
        if self._said is not None:
            number, work = self._said
            work.wait()
            asked = int(number)
        number = torch.tensor(self._number)
        self._said = number, dist.all_reduce(number, dist.ReduceOp.MAX, async_op=True)
        return asked
