"""Data-parallel training on several ranks: DistributedDataParallel, or FSDP2 for models too large for one device."""

import contextlib
import functools
import inspect
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from fastssl.distributed import world_size

from .config import Execution, Training


def check_sharding(training: Training, execution: Execution) -> None:
    """Refuse --shard where it does not apply.

    Raises:
        ValueError: there is only one process, or the optimizer is not AdamW.
    """
    if execution.shard and world_size() == 1:
        raise ValueError("train: --shard needs several ranks: torchrun --nproc-per-node N -m fastssl pretrain …")
    # torch's fused SGD does not support shards, and LARS needs the norms of whole weights
    if execution.shard and training.optimizer != "adamw":
        raise ValueError(f"train: --shard works with --optimizer adamw, not with {training.optimizer}")


BUCKET = 2**25  # bytes of gradients that are averaged at once: the sum of one runs while the next is copied


def wrap_parallel(method: nn.Module, shard: bool, graph: bool = False) -> nn.Module:
    """The module to call instead of `method`, so that gradients are means over the ranks; `method` itself on one rank.

    With `graph` it is `method` itself too, with the weights and buffers of rank 0 on all ranks, and the gradients of a
    step must be averaged by `average_gradients`: a CUDA graph cannot hold the hooks of DistributedDataParallel, which
    run in Python.

    With `shard` its parameters are replaced by shards, in place. Each element of a ModuleList (a transformer block) is
    gathered when it runs, and all other parameters are gathered together.
    """
    if shard:
        mesh = init_device_mesh(next(method.parameters()).device.type, (world_size(),))
        for blocks in [module for module in method.modules() if isinstance(module, nn.ModuleList)]:
            for block in blocks:
                fully_shard(block, mesh=mesh)
        fully_shard(method, mesh=mesh)
        register_fsdp_forward_method(method, "features")
        return method
    if world_size() == 1:
        return method
    if graph:
        with torch.no_grad():
            for x in itertools.chain(method.parameters(), method.buffers()):
                dist.broadcast(x, 0)
        return method
    arguments = inspect.signature(DistributedDataParallel.__init__).parameters
    # the argument's name from torch 2.14 on, and before
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in arguments else "broadcast_buffers"
    options: dict[str, Any] = {"gradient_as_bucket_view": True, sync_buffers: False}
    return DistributedDataParallel(method, **options)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradients by their means over the ranks, in place. All ranks must call together.

    Equals DistributedDataParallel's average, after the backward pass instead of during it.
    """
    buckets: list[list[Tensor]] = []
    for gradient in (p.grad for p in parameters if p.grad is not None):
        last = buckets[-1] if buckets else []
        if not last or last[0].dtype != gradient.dtype or sum(g.nbytes for g in last) + gradient.nbytes > BUCKET:
            buckets.append([])
        buckets[-1].append(gradient)
    sums = []
    for bucket in buckets:
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket]).div_(world_size())
        sums.append((flat, dist.all_reduce(flat, async_op=True)))
    for bucket, (flat, work) in zip(buckets, sums):
        work.wait()
        means = [x.view_as(gradient) for x, gradient in zip(flat.split([g.numel() for g in bucket]), bucket)]
        torch._foreach_copy_(bucket, means)


@contextlib.contextmanager
def sync_on_last_micro_batch(module: nn.Module, last: bool) -> Iterator[None]:
    """Context of a micro-batch's forward and backward: gradients are averaged over ranks after the last one only."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
        return
    yield


def full_state(state: Any) -> Any:
    """The same nested state with shards gathered into whole tensors. All ranks must call together."""
    return tree_map_only(DTensor, DTensor.full_tensor, state)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the whole state of an optimizer; state of sharded parameters is sharded like them.

    Hyperparameters are those of `optimizer`, which the run's configuration has made, not those in `state`.

    Raises:
        ValueError: the state does not fit the parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in own] != [group["params"] for group in state["param_groups"]]:
        raise ValueError("its groups of parameters are others")
    _check_moments(optimizer, parameters, state["state"])
    sharded = {
        number: tree_map_only(Tensor, functools.partial(_shard_like, parameters[number]), values)
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({"param_groups": own, "state": sharded})


def _check_moments(
    optimizer: torch.optim.Optimizer, parameters: list[Tensor], state: dict[int, dict[str, Tensor]]
) -> None:
    """Check that what the optimizer keeps of each parameter has its shape."""
    if not state:
        raise ValueError("it holds no state of any parameter")
    needed = ("step", "exp_avg", "exp_avg_sq") if isinstance(optimizer, torch.optim.AdamW) else ("momentum_buffer",)
    for number, values in state.items():
        if not 0 <= number < len(parameters):
            raise ValueError(f"it holds state of parameter {number} of {len(parameters)}")
        for name in needed:
            x, shape = values.get(name), torch.Size() if name == "step" else parameters[number].shape
            if x is None or x.shape != shape or not x.is_floating_point():
                raise ValueError(f"{name} of parameter {number} is missing or of another shape")


def _shard_like(parameter: Tensor, x: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor) or x.shape != parameter.shape:
        return x
    return distribute_tensor(x.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
