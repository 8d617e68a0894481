"""The training step: gradients of the micro-batches, the optimizer, and the state of the method."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import check_ranges
from fastssl.contract import Batch, DefersUpdates, Method, SchedulesMomentum
from fastssl.distributed import all_gather_object, rank, world_size
from fastssl.ops.products import RoundedWeights
from fastssl.text import printable

from .checkpoint import load_model, random_state, set_random_state
from .clipping import clip_parameter_norms
from .config import Execution, Training
from .epochs import continue_count
from .graph import Graph, check_graph
from .optim import Groups, build_optimizer, parameters_to_freeze
from .parallel import (
    average_gradients,
    check_sharding,
    full_state,
    load_optimizer,
    sync_on_last_micro_batch,
    wrap_parallel,
)
from .recompute import recompute_blocks
from .schedule import learning_rate, peak_learning_rate, weight_decay

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # autocast's dtype


class StepResult(NamedTuple):
    """Values of one step on this rank, on the device."""

    loss: Tensor  # scalar, mean over the micro-batches
    metrics: dict[str, Tensor]  # scalars of the method, means over the micro-batches
    grad_norm: Tensor  # scalar, norm of the whole gradient before clipping; not finite where the step was skipped
    index: Tensor  # type: ignore[assignment]  # [B] int64, numbers of the images in their source
    data_seconds: float  # time the step waited for batches


class Trainer:
    """A method in training: ``result = trainer.step(batches)``.

    ``trainer.steps`` is the number of steps so far. A step whose loss or gradient is not finite changes neither
    parameters nor optimizer, but it is counted, and the schedules advance.

    Args:
        method: a module that fulfils `fastssl.contract.Method`, on its device; trained in place.
        training: optimizer and schedules.
        execution: precision, sharding, compilation and clipping; options of logs and checkpoints are ignored.
        steps_per_epoch: steps of an epoch, each of ``training.accumulate`` batches. Another number than that of `state`
            continues at the same share of the same epoch.
        parameter_groups: ``parameter_groups(method)`` returns groups for the optimizer, see `build_optimizer`.
        state: result of `state()` of an earlier trainer, to continue bit for bit.

    Raises:
        TypeError: the method lacks a member of the contract.
        ValueError: settings are out of range or contradict each other, ``training.freeze`` selects no parameter, or
            `state` is not that of such a method.
    """

    def __init__(
        self,
        method: nn.Module,
        training: Training,
        execution: Execution,
        steps_per_epoch: int,
        *,
        parameter_groups: Groups | None = None,
        state: dict[str, Any] | None = None,
    ):
        _check(method, training, execution)
        self.method, self.training, self.execution = method, training, execution
        self.steps, self.count = 0, continue_count(state, steps_per_epoch)
        self.total_steps = self.count.last_step(training.epochs)
        self.device, self.dtype = next(method.parameters()).device, PRECISIONS[execution.precision]
        if state:
            load_model(method, state)
        if execution.recompute:
            recompute_blocks(method)
        if execution.compile:
            method.compile()
        self.parallel = wrap_parallel(method.train(), execution.shard, execution.graph)
        self.optimizer = build_optimizer(method, training, parameter_groups)
        self.frozen = parameters_to_freeze(method, training.freeze)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=execution.precision == "fp16")
        self.compute_gradients: Callable[[Batch], tuple[dict[str, Tensor], list]] = self._compute_gradients
        self.graph_of_rank = execution.graph and world_size() > 1  # whose gradients are not means over the ranks yet
        self.rounded_weights = RoundedWeights(keep=not execution.shard)
        if execution.graph:
            self.use_graph()
        if state:
            _load_state(self.optimizer, self.scaler, state)
            self.steps = state["step"]

    @property
    def progress(self) -> float:
        """Share of the run's steps that are done, 0 … 1."""
        return self._progress_after(self.steps)

    def step(self, batches: Iterator[Batch]) -> StepResult:
        """One optimizer step on the next ``training.accumulate`` batches. The host does not wait for the device.

        Raises:
            ValueError: there are fewer batches.
        """
        results, pending, indices, data_seconds = [], [], [], 0.0
        hooks, accumulate = cast(Method, self.method), self.training.accumulate
        self._set_schedules()
        hooks.before_step(self.progress)
        self.rounded_weights.refresh()
        for i in range(accumulate):
            start = time.perf_counter()
            with record_function("data"):
                batch = next(batches, None)
            if batch is None:
                raise ValueError(f"train: a step must get {accumulate} batches, got {i}")
            data_seconds += time.perf_counter() - start
            with self.rounded_weights, sync_on_last_micro_batch(self.parallel, last=i == accumulate - 1):
                values, deferred = self.compute_gradients(batch)
            results.append(values)
            pending += deferred
            indices.append(batch.index)
        if self.graph_of_rank:
            average_gradients(self.method.parameters())
        with record_function("optimizer"):
            grad_norm = self._update()
        with record_function("EMA and queue"):
            self.steps += 1
            if isinstance(self.method, DefersUpdates):
                self.method.pending = pending
            hooks.after_step(self.progress)
        means = {name: torch.stack([result[name] for result in results]).mean() for name in results[0]}
        return StepResult(means.pop("loss"), means, grad_norm, torch.cat(indices), data_seconds)

    def scheduled(self) -> dict[str, float]:
        """Scheduled values of the last step, by their names in metrics.jsonl. With fp16 the host waits for the device.

        "lr"; "weight_decay" where it has a schedule; "momentum" of a momentum encoder; "loss_scale" with fp16.
        """
        step = max(self.steps - 1, 0)
        values = {"lr": self._learning_rate(step)}
        if self.training.weight_decay_end is not None:
            values["weight_decay"] = weight_decay(self.training, self._progress_after(step))
        if isinstance(self.method, SchedulesMomentum):
            values["momentum"] = self.method.momentum_at(self.progress)
        if self.scaler.is_enabled():
            values["loss_scale"] = self.scaler.get_scale()
        return values

    def state(self) -> dict[str, Any]:
        """State from which a run continues, with shards gathered into whole tensors. All ranks must call together."""
        return {
            "model": full_state(self.method.state_dict()),
            "optimizer": full_state(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "step": self.steps,
            "epochs": list(self.count),
            "random": all_gather_object(random_state()),
        }

    def use_graph(self) -> None:
        """Capture forward and backward as a CUDA graph in one of the next steps, and replay it from then on.

        Raises:
            ValueError: not on a GPU, or together with shards or a profile, or for several ranks after a start without
                ``execution.graph``, whose gradients DistributedDataParallel averages.
        """
        check_graph(self.device, self.execution.shard, self.execution.profile)
        if world_size() > 1 and not self.graph_of_rank:
            raise ValueError("train: a graph on several ranks must be asked for by Execution(graph=True), got it later")
        parameters, accumulate = self.method.parameters(), self.training.accumulate > 1
        self.compute_gradients = Graph(self._compute_gradients, parameters, accumulate)

    def _progress_after(self, step: int) -> float:
        return (step + self.count.offset) / (self.training.epochs * self.count.steps_per_epoch)

    def _learning_rate(self, step: int) -> float:
        return learning_rate(self.training, self.count.epochs(step), self.count.steps_per_epoch)

    def _set_schedules(self) -> None:
        lr, peak = self._learning_rate(self.steps), peak_learning_rate(self.training)
        decay = weight_decay(self.training, self.progress)
        for group in self.optimizer.param_groups:
            still = self.count.epochs(self.steps) < group.get("still_epochs", 0)
            group["lr"] = 0.0 if still else (peak if group.get("constant_lr") else lr) * group["lr_scale"]
            group["weight_decay"] = decay * group["weight_decay_scale"]

    def _compute_gradients(self, batch: Batch) -> tuple[dict[str, Tensor], list]:
        """Forward and backward: gradients are added to those of the parameters.

        Returns the loss with the method's metrics, and the tensors that `forward` appended to `pending`. They are
        returned because a CUDA graph replays returned tensors, but no assignments in Python.
        """
        with record_function("forward"), torch.autocast(self.device.type, self.dtype, self.dtype is not None):
            loss, metrics = self.parallel(batch)
        with record_function("backward"):  # a loss that is not finite makes every gradient NaN, on all ranks
            weight = torch.full_like(loss, 1 / self.training.accumulate, requires_grad=False)
            self.scaler.scale(loss).backward(weight.masked_fill_(~loss.isfinite(), torch.nan))
        deferred: list = []
        if isinstance(self.method, DefersUpdates):
            deferred, self.method.pending = self.method.pending, []
        return {"loss": loss.detach(), **metrics}, deferred

    def _update(self) -> Tensor:
        """Make the optimizer's step, unless a gradient is not finite; return the norm of the whole gradient."""
        if self.steps + self.count.offset < self.training.freeze_epochs * self.count.steps_per_epoch:
            for p in self.frozen:
                p.grad = None  # no update, no weight decay, no momentum
        self.scaler.unscale_(self.optimizer)
        grouped = [(p, group) for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        parameters = [p for p, _ in grouped]
        norm = full_state(nn.utils.get_total_norm([p.grad for p in parameters]))
        if self.execution.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.execution.clip_norm, norm)
        if self.training.clip_parameter_norm:
            parts = [group.get("part") for _, group in grouped]
            clip_parameter_norms(parameters, self.training.clip_parameter_norm, parts)
        # 1 makes the optimizer skip the step on the device, so that the host need not wait for the norm
        self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm


def _load_state(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, state: dict[str, Any]) -> None:
    """Load what a checkpoint holds beside the weights."""
    try:
        part = "optimizer"
        load_optimizer(optimizer, state["optimizer"])
        part = "loss scale"
        scaler.load_state_dict(state["scaler"])
        part = "random state"
        if len(state["random"]) == world_size():  # else each rank continues with a random state of its own
            set_random_state(state["random"][rank()])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        reason = printable(str(error).splitlines()[0])
        raise ValueError(
            f"train: the {part} of the checkpoint of step {state['step']} does not fit the method ({reason})"
        ) from error


def _check(method: nn.Module, training: Training, execution: Execution) -> None:
    training.check("train")
    check_sharding(training, execution)
    check_ranges(execution, "train")
    missing = [name for name in ("encoder", "before_step", "after_step", "features") if not hasattr(method, name)]
    if missing:
        raise TypeError(
            f"train: a method must have before_step, forward, after_step, features and encoder, got "
            f"{type(method).__name__} without {missing[0]}: see fastssl/contract.py"
        )
    if execution.clip_norm and training.clip_parameter_norm:
        raise ValueError(
            f"train: --clip-norm must be 0 with --clip-parameter-norm {training.clip_parameter_norm:g}, got "
            f"{execution.clip_norm:g}: choose one"
        )
