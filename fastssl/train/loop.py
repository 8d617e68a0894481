"""The training loop: the step and the epoch on one screen."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from . import checkpoint
from .log import Log
from .optim import build_optimizer
from .recipe import Training
from .schedule import learning_rate


def train(
    method: nn.Module,
    method_name: str,
    epoch_of: Callable[[int, int], Iterator],
    steps_per_epoch: int,
    training: Training,
    folder: Path,
    *,
    precision: str = "fp32",
    log_every: int = 10,
    checkpoint_every: int = 0,
    resume: dict | None = None,
) -> None:
    """Trains `method` and leaves checkpoint.pt and metrics.jsonl in `folder`.

    Args:
        method: ``method(batch) -> (loss, metrics)`` reads state, ``method.after_step(progress)`` writes it.
        method_name: kept in the checkpoint.
        epoch_of: ``epoch_of(epoch, first_batch)`` yields the batches of an epoch from `first_batch` on.
        steps_per_epoch: batches of a whole epoch.
        training: optimizer and schedule.
        precision: "fp32", or "bf16" for autocast in the forward pass.
        log_every: steps between lines of metrics.
        checkpoint_every: steps between checkpoints; 0 for one an epoch. There is always one at the end.
        resume: a loaded checkpoint; the run goes on from its step, bit for bit as if it had not stopped.
    """
    device = next(method.parameters()).device
    optimizer = build_optimizer(method, training)
    step = _restore(resume, method, optimizer) if resume else 0
    total, checkpoint_every = training.epochs * steps_per_epoch, checkpoint_every or steps_per_epoch
    log = Log(folder / "metrics.jsonl", total, step)
    method.train()
    try:
        while step < total:
            batches = iter(epoch_of(step // steps_per_epoch, step % steps_per_epoch))
            while (batch := _next(batches)) is not None:
                batch, waited = batch
                epoch = step / steps_per_epoch
                lr = learning_rate(training, epoch)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    loss, metrics = method(batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                method.after_step(step / total)
                log.step(loss, metrics, len(batch.index), waited)
                at_checkpoint = step % checkpoint_every == 0 or step == total
                if step % log_every == 0 or at_checkpoint:
                    log.write(step, step / steps_per_epoch, lr)
                if at_checkpoint:
                    checkpoint.save(_state(method_name, method, optimizer, step), folder / "checkpoint.pt")
    finally:
        log.close()


def _next(batches: Iterator) -> tuple[object, float] | None:
    """The next batch and how long it was waited for, or None at the end of the epoch."""
    asked = time.perf_counter()
    batch = next(batches, None)
    return None if batch is None else (batch, time.perf_counter() - asked)


def _state(method_name: str, method: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict:
    return {
        "method": method_name,
        "model": method.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "random": checkpoint.random_state(),
    }


def _restore(state: dict, method: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    method.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    checkpoint.set_random_state(state["random"])
    return state["step"]
