"""The training loop: epochs, logs, checkpoints and signals around the trainer's step."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from fastssl.contract import Batch
from fastssl.distributed import rank

from .checkpoint import Checkpoints
from .config import Execution, Training
from .log import Log
from .optim import Groups
from .parallel import check_sharding
from .profile import Profile
from .signals import Interrupted, SignalGuard
from .trainer import Trainer


def train(
    method: nn.Module,
    method_name: str,
    epoch_of: Callable[[int, int], Iterator[Batch]],
    steps_per_epoch: int,
    training: Training,
    execution: Execution,
    folder: Path,
    *,
    resume: dict[str, Any] | None = None,
    after_epoch: Callable[[int], object] = lambda epoch: None,
    parameter_groups: Groups | None = None,
) -> None:
    """Train `method`; write checkpoints and metrics.jsonl to `folder`. All ranks must call with the same arguments.

    Args:
        method: a module that fulfils `fastssl.contract.Method`.
        method_name: stored in the checkpoints.
        epoch_of: ``epoch_of(epoch, first_batch)`` yields the batches of an epoch from `first_batch` on.
        steps_per_epoch: steps of an epoch, of ``training.accumulate`` batches each.
        training: optimizer and schedules.
        execution: precision, parallelism, logs and checkpoints.
        folder: run folder, which exists.
        resume: a loaded checkpoint; the run continues after its step, bit for bit as if it had not stopped.
        after_epoch: called with the number of finished epochs, after the checkpoint of that step if there is one.
        parameter_groups: `parameter_groups` of the method's module, if it defines it.

    Raises:
        Interrupted: SIGTERM or SIGUSR1 was received; the state is saved.
        ValueError: a setting is refused, too many consecutive steps had a loss or gradient that is not finite, or a
            checkpoint could not be written.
    """
    check_sharding(training, execution)
    trainer = Trainer(method, training, execution, steps_per_epoch, parameter_groups=parameter_groups, state=resume)
    total, checkpoint_every = trainer.total_steps, execution.checkpoint_every or steps_per_epoch
    checkpoints = Checkpoints(folder / "checkpoints", execution.keep_last, execution.keep_every * steps_per_epoch)
    profiled_steps = execution.profile if rank() == 0 else 0
    with (
        Log(folder, total, trainer.steps, execution, trainer.device) as log,
        checkpoints,
        Profile(profiled_steps, folder / "profile", trainer.device.type == "cuda") as profile,
        SignalGuard() as signals,
    ):
        if resume and trainer.steps % steps_per_epoch == 0:  # the run may have been killed during after_epoch
            after_epoch(trainer.steps // steps_per_epoch)
        while trainer.steps < total:
            method.train()
            epoch, steps_done = divmod(trainer.steps, steps_per_epoch)
            batches = iter(epoch_of(epoch, steps_done * training.accumulate))
            for _ in range(steps_per_epoch - steps_done):
                log.step(*trainer.step(batches))
                profile.step()
                signal, step = signals.requested(), trainer.steps
                save = step % checkpoint_every == 0 or step == total or signal
                if step % execution.log_every == 0 or save:
                    log.write(step, step / steps_per_epoch, **trainer.scheduled())
                if save:
                    state = {"method": method_name, **trainer.state()}
                    if rank() == 0:
                        checkpoints.save(state, step)
                if signal:
                    checkpoints.wait()
                    raise Interrupted(signal, step)
            with log.paused():
                after_epoch(epoch + 1)
