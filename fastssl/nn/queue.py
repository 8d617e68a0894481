"""MoCo's queue of keys."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import all_gather, rank, world_size
from fastssl.ops import enqueue_


class KeyQueue(nn.Module):
    """A queue of the last K keys of all ranks: first in, first out, for any batch size.

    Buffers are `queue` [K, D] and `queue_ptr` [1]. Both are saved in the official layout: in state dicts `queue` is
    [D, K].

    All ranks must enqueue equal numbers of keys. Queues that are not sharded start equal if the ranks' seeds are equal
    or DistributedDataParallel broadcasts buffers.

    Args:
        dim: width of the keys (D).
        queue_size: number of keys (K), at first random unit vectors.
        shard: keep K / world keys on each rank, key n on rank n mod world. The shard is not a buffer, because
            DistributedDataParallel would overwrite it with that of rank 0. State dicts still hold the whole queue, so
            all ranks must call `state_dict()` together.

    Raises:
        ValueError: queue_size or dim is less than 1, or queue_size is not divisible by the number of ranks.
        RuntimeError: by a call, the queue was sharded over another number of ranks.

    Source: He et al., 2020 (MoCo), section 3.2, "Dictionary as a queue".
    """

    def __init__(self, dim: int, queue_size: int, shard: bool = False):
        super().__init__()
        name = type(self).__name__
        for argument, value in (("queue_size", queue_size), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name}: {argument} must be at least 1, got {value}")
        if shard and queue_size % world_size():
            raise ValueError(f"{name}: queue_size must be divisible by the {world_size()} ranks, got {queue_size}")
        self.shard, self._ranks = shard, world_size()
        queue = F.normalize(torch.randn(queue_size, dim), dim=1)
        ptr = torch.zeros(1, dtype=torch.int64)
        if shard:
            self.queue, self.queue_ptr = self._local_keys(queue), ptr
        else:
            self.register_buffer("queue", queue)
            self.register_buffer("queue_ptr", ptr)
        self.register_state_dict_post_hook(_save)
        self.register_load_state_dict_pre_hook(_load)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises: a queue has two uses, writing and reading, and is not called."""
        raise TypeError(f"{type(self).__name__}: write keys by enqueue(keys) and read them as .queue [K, D]: no call")

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Writes the keys [B, D] of all ranks, in rank order, over the oldest.

        A key that is not finite is not written, since it would spoil every loss until it left the queue: the old key
        stays in its row.
        """
        self._check_ranks()
        keys = all_gather(keys.detach())
        keys = self._local_keys(keys) if self.shard else keys
        rows = (self.queue_ptr + torch.arange(keys.shape[0], device=keys.device)) % self.queue.shape[0]
        finite = keys.isfinite().all(1, keepdim=True)
        enqueue_(self.queue, self.queue_ptr, torch.where(finite, keys, self.queue[rows].to(keys.dtype)))

    def full_queue(self) -> Tensor:
        """All keys [K, D], gathered from the ranks if the queue is sharded."""
        if not self.shard:
            return self.queue
        self._check_ranks()
        shards = all_gather(self.queue).unflatten(0, (world_size(), -1))
        return shards.transpose(0, 1).flatten(0, 1)

    def _check_ranks(self) -> None:
        if self.shard and self._ranks != world_size():
            got = f"sharded over {self._ranks} ranks, and there are {world_size()}"
            raise RuntimeError(f"{type(self).__name__}: this queue was {got}: build it after init_process_group")

    def _local_keys(self, keys: Tensor) -> Tensor:
        """The rows of `keys` [N, D], the keys of all ranks, that belong to this rank."""
        return keys[rank() :: world_size()].contiguous()

    def _apply(self, fn, recurse: bool = True) -> "KeyQueue":
        """Also moves and converts shards, which are no buffers, for `.to(…)` and the like."""
        super()._apply(fn, recurse)
        if self.shard:
            self.queue, self.queue_ptr = fn(self.queue), fn(self.queue_ptr)
        return self


def _save(module: KeyQueue, state: dict, prefix: str, metadata: dict) -> None:
    state[f"{prefix}queue"] = module.full_queue().detach().T.contiguous()
    if module.shard:
        state[f"{prefix}queue_ptr"] = module.queue_ptr * world_size()


def _load(module: KeyQueue, state: dict, prefix: str, metadata: dict, strict: bool, missing: list, *_) -> None:
    names = [f"{prefix}queue", f"{prefix}queue_ptr"]
    if not module.shard:
        if names[0] in state:
            state[names[0]] = state[names[0]].T.contiguous()
        return
    tensors = [state.pop(name) for name in names if name in state]
    if len(tensors) < 2:
        missing.extend(names)
        return
    queue_DK, ptr = tensors
    if queue_DK.shape != (module.queue.shape[1], module.queue.shape[0] * world_size()):
        got = list(queue_DK.shape)
        raise ValueError(f"{type(module).__name__}: the queue to load must have shape [D, K] of this one, got {got}")
    # A shard's pointer can express only multiples of world in the whole queue, so the queue is rotated until it is one.
    remainder = int(ptr) % world_size()
    shard, shard_ptr = module._local_keys(queue_DK.T.roll(-remainder, 0)), ptr.div(world_size(), rounding_mode="floor")
    if metadata.get("assign_to_params_buffers"):
        module.queue, module.queue_ptr = shard, shard_ptr
    else:
        module.queue.copy_(shard)
        module.queue_ptr.copy_(shard_ptr)
