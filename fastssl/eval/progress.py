"""Progress of a long evaluation."""

import time

from torch import Tensor


class Progress:
    """Prints a line every `every` seconds at most; a training that takes less time prints nothing."""

    def __init__(self, what: str, epochs: int, every: float = 30.0):
        self.what, self.epochs, self.every = what, epochs, every
        self._printed = time.monotonic()

    def __call__(self, epoch: float, loss: Tensor) -> None:
        """Reports the number of epochs done; `loss`, a scalar, is read only when it is printed."""
        if time.monotonic() - self._printed >= self.every:
            print(f"{self.what}: epoch {epoch:.1f} of {self.epochs}, loss {loss.item():.3f}", flush=True)
            self._printed = time.monotonic()
