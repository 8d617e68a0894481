"""One method on several ranks, by torch's DistributedDataParallel, or by FSDP2 where it is too large for one device."""

import contextlib
import inspect

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fastssl.distributed import world_size

from .config import Execution, Training


def check_sharding(training: Training, execution: Execution) -> None:
    """Refuses what can't be sharded.

    Raises:
        ValueError: there is one process alone, or the optimizer is not AdamW.
    """
    if execution.shard and world_size() == 1:
        raise ValueError("train: --shard needs several ranks: torchrun --nproc-per-node N -m fastssl pretrain …")
    if execution.shard and training.optimizer != "adamw":  # torch's fused SGD knows no shards, LARS needs whole norms
        raise ValueError(f"train: --shard works with --optimizer adamw, not with {training.optimizer}")


def wrap_parallel(method: nn.Module, shard: bool) -> nn.Module:
    """What to call instead of `method`, so that gradients are means over the ranks: in one process the method itself.

    With `shard` its parameters become shards, in place: each element of a ModuleList (a transformer's block) is
    gathered when it is its turn, the rest as a whole.
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
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    unsynced = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # until torch 2.13
    return DistributedDataParallel(method, gradient_as_bucket_view=True, **{unsynced: False})


@contextlib.contextmanager
def sync_on_last_micro_batch(module: nn.Module, last: bool):
    """Around forward and backward of a micro-batch: the ranks' gradients are averaged after the last one alone."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
        return
    yield


def full_state(state):
    """The same state without shards; all ranks must ask together."""
    if isinstance(state, DTensor):
        return state.full_tensor()
    if isinstance(state, dict):
        return {key: full_state(value) for key, value in state.items()}
    return type(state)(map(full_state, state)) if isinstance(state, list | tuple) else state


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Loads a whole state; what belongs to a sharded parameter is sharded like it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = {
        number: {name: _like(x, parameters[number]) for name, x in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": own})


def _like(x, parameter: Tensor):
    if isinstance(parameter, DTensor) and isinstance(x, Tensor) and x.shape == parameter.shape:
        return distribute_tensor(
            x.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return x
