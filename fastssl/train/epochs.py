"""Steps counted in epochs, whose length changes when a run is resumed on changed data."""

from typing import Any, NamedTuple


class EpochCount(NamedTuple):
    """Position of a run: ``(step + offset) / steps_per_epoch`` epochs are done after `step` steps."""

    steps_per_epoch: int
    first: int = 0  # step from which on epochs have this length
    offset: int = 0

    def epochs(self, step: int) -> float:
        """Epochs done after `step` steps."""
        return (step + self.offset) / self.steps_per_epoch

    def place(self, step: int) -> tuple[int, int]:
        """(whole epochs, steps of the next one) done after `step` steps."""
        return divmod(step + self.offset, self.steps_per_epoch)

    def last_step(self, epochs: int) -> int:
        """The number of steps of a run of so many epochs."""
        return epochs * self.steps_per_epoch - self.offset


def continue_count(state: dict[str, Any] | None, steps_per_epoch: int) -> EpochCount:
    """The count of a run that continues from a checkpoint with epochs of `steps_per_epoch` steps.

    If they had another length, as many whole epochs are done as before, and the same share of the next one.
    """
    if state is None or "epochs" not in state:
        return EpochCount(steps_per_epoch)
    count, step = EpochCount(*state["epochs"]), state["step"]
    if count.steps_per_epoch == steps_per_epoch:
        return count
    epochs, steps = count.place(step)
    position = epochs * steps_per_epoch + steps * steps_per_epoch // count.steps_per_epoch
    return EpochCount(steps_per_epoch, step, position - step)
