"""The training loop: the step and the epoch on one screen each."""

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.distributed import all_gather_object, rank, world_size

from .checkpoint import Checkpoints, random_state, set_random_state
from .config import Execution, Training
from .graph import Graph, check_graph
from .log import Log
from .optim import build_optimizer
from .parallel import check_sharding, full_state, load_optimizer, sync_on_last_micro_batch, wrap_parallel
from .profile import Profile
from .recompute import recompute_blocks
from .schedule import learning_rate
from .signals import Interrupted, SignalGuard

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(
    method: nn.Module,
    method_name: str,
    epoch_of: Callable[[int, int], Iterator],
    steps_per_epoch: int,
    training: Training,
    execution: Execution,
    folder: Path,
    *,
    resume: dict | None = None,
    after_epoch: Callable[[int], object] = lambda epoch: None,
) -> None:
    """Trains `method` and leaves checkpoints and metrics.jsonl in `folder`. On several ranks all call it alike.

    Args:
        method: ``method(batch) -> (loss, metrics)`` reads state, ``method.after_step(progress)`` writes it.
        method_name: kept in the checkpoint.
        epoch_of: ``epoch_of(epoch, first_batch)`` yields the batches of an epoch from `first_batch` on.
        steps_per_epoch: whole steps of an epoch, of `training.accumulate` batches each.
        training: optimizer and schedule.
        execution: how to go about it.
        resume: a loaded checkpoint; the run goes on from its step, bit for bit as if it had not stopped.
        after_epoch: called with the number of epochs done, after the checkpoint there may be.

    Raises:
        Interrupted: SIGTERM or SIGUSR1 came; the state is saved.
        ValueError: too many steps had a loss or gradient that is not finite, or a checkpoint could not be written.
    """
    check_sharding(training, execution)
    state = _State(method, method_name, training, execution, resume)
    total, device = training.epochs * steps_per_epoch, state.device
    checkpoint_every = execution.checkpoint_every or steps_per_epoch
    checkpoints = Checkpoints(folder / "checkpoints", execution.keep_last, execution.keep_every * steps_per_epoch)
    with (
        Log(folder, total, state.step, execution, device) as log,
        checkpoints,
        Profile(execution.profile * (rank() == 0), folder / "profile", device.type == "cuda") as profile,
        SignalGuard() as signals,
    ):
        if resume and state.step % steps_per_epoch == 0:  # the run may have been killed while at it
            after_epoch(state.step // steps_per_epoch)
        while state.step < total:
            method.train()
            done = state.step % steps_per_epoch
            batches = iter(epoch_of(state.step // steps_per_epoch, done * training.accumulate))
            for _ in range(steps_per_epoch - done):
                lr = learning_rate(training, state.step / steps_per_epoch)
                log.step(*_step(state, batches, lr, total))
                profile.step()
                signal, step = signals.requested(), state.step
                at_checkpoint = step % checkpoint_every == 0 or step == total or signal
                if step % execution.log_every == 0 or at_checkpoint:
                    log.write(step, step / steps_per_epoch, lr=lr, **state.scheduled(step / total))
                if at_checkpoint:
                    state.save(checkpoints)
                if signal:
                    checkpoints.wait()
                    raise Interrupted(signal, step)
            with log.paused():
                after_epoch(state.step // steps_per_epoch)


def _step(state: "_State", batches: Iterator, lr: float, total: int) -> tuple[Tensor, dict, Tensor, Tensor, float]:
    """One step of `accumulate` micro-batches; what the log notes of it. Nothing here waits for the device."""
    results, indices, waited = [], [], 0.0
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.method.before_step(state.step / total)
    for i in range(state.accumulate):
        asked = time.perf_counter()
        with record_function("data"):
            batch = next(batches)
        waited += time.perf_counter() - asked
        with sync_on_last_micro_batch(state.parallel, last=i == state.accumulate - 1):
            results.append(state.gradients_of(batch))
        indices.append(batch.index)
    with record_function("optimizer"):
        norm = state.update()
    with record_function("EMA and queue"):
        state.step += 1
        state.method.after_step(state.step / total)
    means = {name: torch.stack([result[name] for result in results]).mean() for name in results[0]}
    return means.pop("loss"), means, norm, torch.cat(indices), waited


def _gradients_of(state: "_State", batch) -> dict[str, Tensor]:
    """Forward and backward: gradients stay at the parameters. The loss and the method's metrics."""
    with record_function("forward"), torch.autocast(state.device.type, state.dtype, state.dtype is not None):
        loss, metrics = state.parallel(batch)
    with record_function("backward"):  # a loss that is not finite makes every gradient so, on all ranks
        share = torch.full_like(loss, 1 / state.accumulate, requires_grad=False)
        state.scaler.scale(loss).backward(share.masked_fill_(~loss.isfinite(), torch.nan))
    return {"loss": loss.detach(), **metrics}


class _State:
    """What a step changes: the method, its optimizer, the loss scale, and how many steps were made."""

    def __init__(self, method, method_name: str, training: Training, execution: Execution, resume: dict | None):
        self.method, self.name, self.step, self.accumulate = method, method_name, 0, training.accumulate
        self.device, self.dtype = next(method.parameters()).device, PRECISIONS[execution.precision]
        self.clip_norm = execution.clip_norm
        if resume:
            method.load_state_dict(resume["model"])
        if execution.recompute:
            recompute_blocks(method)
        if execution.compile:
            method.compile()
        self.parallel = wrap_parallel(method.train(), execution.shard)
        self.optimizer = build_optimizer(method, training)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=execution.precision == "fp16")
        self.gradients_of = functools.partial(_gradients_of, self)
        if execution.graph:
            check_graph(self.device, training, execution.shard, execution.profile)
            self.gradients_of = Graph(self.gradients_of, method.parameters())
        if resume:
            load_optimizer(self.optimizer, resume["optimizer"])
            self.scaler.load_state_dict(resume["scaler"])
            self.step = resume["step"]
            if len(resume["random"]) == world_size():  # else each rank goes on with a state of its own
                set_random_state(resume["random"][rank()])

    def update(self) -> Tensor:
        """The optimizer's step, unless a gradient is not finite; the norm of the gradient."""
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = full_state(nn.utils.get_total_norm([p.grad for p in parameters]))
        if self.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        self.optimizer.found_inf = (~norm.isfinite()).float()  # 1: it changes nothing, and the host need not know
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm

    def scheduled(self, progress: float) -> dict[str, float]:
        """What a schedule decides beside the learning rate."""
        values = {"momentum": self.method.momentum_at(progress)} if hasattr(self.method, "momentum_at") else {}
        return {**values, "loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else values

    def save(self, checkpoints: Checkpoints) -> None:
        """All ranks together; rank 0 writes."""
        state = {
            "method": self.name,
            "model": full_state(self.method.state_dict()),
            "optimizer": full_state(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "random": all_gather_object(random_state()),
        }
        if rank() == 0:
            checkpoints.save(state, self.step)
