"""Processes that train together, and the collectives of methods, on torch.distributed.

In one process a collective returns its argument. All ranks must call a collective together and with equal shapes.
Gradients through collectives are those of the sum of all ranks' losses; DistributedDataParallel then averages, which
gives the gradient of the mean loss.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if hasattr(dist, "all_gather_single"):  # names from torch 2.14 on, where the older ones warn
    _all_gather_single: Any = dist.all_gather_single
    _reduce_scatter_single: Any = dist.reduce_scatter_single
elif dist.is_available():
    _all_gather_single, _reduce_scatter_single = dist.all_gather_into_tensor, dist.reduce_scatter_tensor


def setup(device: torch.device) -> torch.device:
    """Joins the process group of torchrun and returns the device of this process; without torchrun, `device`.

    Collectives use NCCL for tensors on GPUs and gloo for those on the CPU.

    Args:
        device: CPU, or a GPU; one without an index becomes that of the local rank.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or world_size() > 1:
        return device
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    return device


def shutdown() -> None:
    """Destroys the process group that `setup` created."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_peer_failure(error: RuntimeError) -> bool:
    """True if a collective raised `error` because another process has ended."""
    messages = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
    return world_size() > 1 and (isinstance(error, dist.DistError) or any(text in str(error) for text in messages))


def local_world_size() -> int:
    """Number of processes on this machine that train together."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world_size() > 1 else 1


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 … world_size() − 1."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def all_gather(x: Tensor) -> Tensor:
    """[B, …] of every rank → [world · B, …] in rank order; no gradient."""
    return _all_gather(x) if world_size() > 1 else x


def all_gather_with_grad(x: Tensor) -> Tensor:
    """[B, …] of every rank → [world · B, …] in rank order, with gradient to every rank's part."""
    return _AllGather.apply(x) if world_size() > 1 else x


def all_to_all(x: Tensor) -> Tensor:
    """[world, …] → [world, …]: row d is sent to rank d, row r of the result is from rank r; with gradient."""
    return _AllToAll.apply(x) if world_size() > 1 else x


def all_sum(x: Tensor) -> Tensor:
    """The sum of every rank's x, with gradient."""
    return _AllSum.apply(x) if world_size() > 1 else x


@torch.no_grad()
def all_mean(x: Tensor) -> Tensor:
    """The mean of every rank's x; no gradient."""
    return _AllSum.apply(x) / world_size() if world_size() > 1 else x


def all_gather_object(x: object) -> list:
    """Every rank's x in rank order, pickled: for small objects and rare calls."""
    if world_size() == 1:
        return [x]
    objects: list = [None] * world_size()
    dist.all_gather_object(objects, x)
    return objects


@torch.no_grad()
def broadcast_buffers(module: nn.Module) -> None:
    """Overwrites the buffers of every rank with those of rank 0.

    Each rank's batch norms have running statistics of its own batches; those of rank 0 are saved and evaluated, as with
    the reference code of MoCo.
    """
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


@torch.no_grad()
def shuffle(x: Tensor) -> tuple[Tensor, Tensor]:
    """Redistributes the samples of all ranks at random, so that a rank's batch norms see another set of samples.

    Every rank sends an equal share of its batch, chosen at random, to every rank: B samples are sent per rank, where
    gathering all batches sends world · B.

    Args:
        x: [B, …], B equal on all ranks.

    Returns: samples of all ranks [B, …] and the order [B] int64 that `unshuffle` needs.

    Source: He et al., 2020 (MoCo), section 3.3, "Shuffling BN".
    """
    order = torch.randperm(x.shape[0], device=x.device)
    return _redistribute(x[order], back=False), order


@torch.no_grad()
def unshuffle(x: Tensor, order: Tensor) -> Tensor:
    """Reverses `shuffle` for the results of its samples [B, …]: row i is the result of this rank's sample i."""
    return _redistribute(x, back=True)[order.argsort()]


def _redistribute(x: Tensor, back: bool) -> Tensor:
    """Sends a share of the rows of x [B, …] to each rank, or with `back` returns the received rows to their ranks."""
    world, this_rank = world_size(), rank()
    if world == 1:
        return x
    shares = [len(part) for part in torch.arange(x.shape[0]).tensor_split(world)]
    sent = [shares[(r - this_rank) % world] for r in range(world)]  # rows to rank r; each rank receives B in all
    received = [shares[(this_rank - r) % world] for r in range(world)]
    if back:
        sent, received = received, sent
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), received, sent)
    return out


def _all_gather(x: Tensor) -> Tensor:
    out = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
    _all_gather_single(out, x.contiguous())
    return out


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return _all_gather(x)

    @staticmethod
    def backward(ctx, dout):
        dx = dout.new_empty(dout.shape[0] // world_size(), *dout.shape[1:])
        _reduce_scatter_single(dx, dout.contiguous())
        return dx


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, dout):
        return _AllToAll.apply(dout)


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx, dout):
        return _AllSum.apply(dout)
