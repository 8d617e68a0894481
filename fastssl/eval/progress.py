"""How far a long training is."""

import time

from torch import Tensor


class Progress:
    """Prints a line every `every` seconds at most; nothing about what takes less."""

    def __init__(self, what: str, epochs: int, every: float = 30.0):
        self.what, self.epochs, self.every = what, epochs, every
        self._said = time.monotonic()

    def __call__(self, epoch: float, loss: Tensor) -> None:
        """`epoch` is how many are done, `loss` a scalar that is read only when it is printed."""
        if time.monotonic() - self._said >= self.every:
            print(f"{self.what}: epoch {epoch:.1f} of {self.epochs}, loss {loss.item():.3f}", flush=True)
            self._said = time.monotonic()
