"""The training loop: epochs, logs, checkpoints and signals around the trainer's step."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from fastssl.contract import Batch
from fastssl.distributed import rank

from .checkpoint import Checkpoints
from .log import Log
from .profile import Profile
from .signals import Interrupted, SignalGuard
from .trainer import Trainer


def train(
    trainer: Trainer,
    method_name: str,
    epoch_of: Callable[[int, int], Iterator[Batch]],
    folder: Path,
    *,
    run_id: str = "",
    before_epoch: Callable[[int], object] = lambda epoch: None,
    after_epoch: Callable[[int], object] = lambda epoch: None,
) -> None:
    """Train to the last epoch; write checkpoints and metrics.jsonl to `folder`. All ranks must call together.

    Args:
        trainer: the method, its optimizer and their state. One built from a checkpoint continues after its step, bit
            for bit as if the run had not stopped.
        method_name: stored in the checkpoints.
        epoch_of: ``epoch_of(epoch, first_batch)`` yields the batches of an epoch from `first_batch` on.
        folder: run folder, which exists.
        run_id: id of the run, stored in the checkpoints, and the id of its run at Weights & Biases.
        before_epoch: called with the number of each epoch, from 0 on, before its first step.
        after_epoch: called with the number of finished epochs, after the checkpoint of that step if there is one.

    Raises:
        Interrupted: SIGTERM or SIGUSR1 was received; the state is saved.
        ValueError: too many consecutive steps had a loss or gradient that is not finite, or a checkpoint could not be
            written.
    """
    execution, training, count, total = trainer.execution, trainer.training, trainer.count, trainer.total_steps
    resumed = trainer.steps > 0
    checkpoints = Checkpoints(folder / "checkpoints", execution.keep_last, functools.partial(_is_kept, trainer))
    profiled_steps = execution.profile if rank() == 0 else 0
    with (
        Log(folder, total, trainer.steps, execution, trainer.device, run_id) as log,
        checkpoints,
        Profile(profiled_steps, folder / "profile", trainer.device.type == "cuda") as profile,
        SignalGuard() as signals,
    ):
        epoch, steps_done = count.place(trainer.steps)
        if resumed and steps_done == 0:  # the run may have been killed during after_epoch
            after_epoch(epoch)
        while trainer.steps < total:
            trainer.method.train()
            epoch, steps_done = count.place(trainer.steps)
            if steps_done == 0:
                with log.paused():
                    before_epoch(epoch)
            batches = iter(epoch_of(epoch, steps_done * training.accumulate))
            for _ in range(count.steps_per_epoch - steps_done):
                log.step(*trainer.step(batches))
                profile.step()
                signal, step = signals.requested(), trainer.steps
                save = _is_due(trainer) or step == total or signal
                if step % execution.log_every == 0 or save:
                    log.write(step, count.epochs(step), **trainer.scheduled())
                if save:
                    state = {"method": method_name, "run": run_id, **trainer.state()}
                    if rank() == 0:
                        checkpoints.save(state, step)
                if signal:
                    checkpoints.wait()
                    raise Interrupted(signal, step)
            with log.paused():
                after_epoch(epoch + 1)


def _is_due(trainer: Trainer) -> bool:
    """Whether a checkpoint is due after the trainer's newest step."""
    every = trainer.execution.checkpoint_every
    return trainer.steps % every == 0 if every else trainer.count.place(trainer.steps)[1] == 0


def _is_kept(trainer: Trainer, step: int) -> bool:
    """Whether the checkpoint of a step is never deleted. How epochs were counted before `first` is not known here."""
    count, keep = trainer.count, trainer.execution.keep_every * trainer.count.steps_per_epoch
    return keep > 0 and (step < count.first or (step + count.offset) % keep == 0)
