"""Processes that train together, and the collectives of methods, on torch.distributed.

In one process a collective returns its argument, and one without gradient the argument detached. All ranks must call a
collective together and with equal shapes. Gradients through collectives are those of the sum of all ranks' losses;
DistributedDataParallel then averages, which gives the gradient of the mean loss.
"""

import contextlib
import datetime
import os
import socket
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastssl.launch import Launch, read_launch

if hasattr(dist, "all_gather_single"):  # names from torch 2.14 on, where the older ones warn
    _all_gather_single: Any = dist.all_gather_single
    _reduce_scatter_single: Any = dist.reduce_scatter_single
elif dist.is_available():
    _all_gather_single, _reduce_scatter_single = dist.all_gather_into_tensor, dist.reduce_scatter_tensor

# Seconds that a process waits for the others: when it starts, and when it joins again, since a rank may have gone on
# while rank 0 still computes alone.
FIRST_WAIT, LATER_WAIT = 300, 3600

_launch: Launch | None = None  # of the process group that `setup` created
_store: Any = None  # where the processes meet; it outlives a process group
_joined = 0  # number of process groups created on it


def setup(device: torch.device) -> torch.device:
    """Joins the processes that torchrun, mpirun, srun or variables set by hand started together (`launch.read_launch`).

    Returns the device of this process; for a process alone, and where a process group exists already, `device`.
    Collectives use NCCL for tensors on GPUs and gloo for those on the CPU. `group_scope` leaves the group.

    Args:
        device: CPU, or a GPU; one without an index becomes that of the local rank.

    Raises:
        ValueError: the variables are incomplete, a process is missing, or there are fewer GPUs than local ranks.
    """
    global _launch
    launch = None if dist.is_available() and dist.is_initialized() else read_launch(os.environ)
    if launch is None:
        return device
    if not dist.is_available():
        raise ValueError(
            f"distributed: {launch.launcher} started {launch.world_size} processes, which this torch can't join"
        )
    if device.type == "cuda" and device.index is None:
        device = torch.device(
            "cuda", gpu_index(launch, torch.cuda.device_count(), "CUDA_VISIBLE_DEVICES" in os.environ)
        )
        torch.cuda.set_device(device)
    store = _meet(launch)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size)
    _launch = launch
    return device


def gpu_index(launch: Launch, count: int, restricted: bool) -> int:
    """Index of the GPU of a process.

    Args:
        launch: how the process was started.
        count: number of GPUs that it sees.
        restricted: whether a variable restricts what it sees: srun and others may give each process a GPU of its own.

    Raises:
        ValueError: the local rank is not known or has no GPU.
    """
    if count == 1 and (launch.local_rank is None or (restricted and launch.launcher != "torchrun")):
        return 0
    if launch.local_rank is None:
        raise ValueError(
            f"distributed: rank {launch.rank} sees {count} GPUs: set LOCAL_RANK to the number of the process on its "
            "machine, 0, 1, …"
        )
    if launch.local_rank >= count:
        raise ValueError(
            f"distributed: rank {launch.rank} needs GPU {launch.local_rank} of its machine, which has {count}: start "
            "one process for each GPU, or use --device cpu"
        )
    return launch.local_rank


def _meet(launch: Launch) -> Any:
    """A store for a new process group, once all processes have come."""
    global _store, _joined
    seconds = LATER_WAIT if _joined else FIRST_WAIT
    where, me = f"{launch.address}:{launch.port}", f"rank {launch.rank} of {launch.world_size}"
    remedy = f"start all {launch.world_size} alike, or a process alone without {launch.launcher}"
    if _store is None:
        _check_address(launch)
        try:
            _store = _open_store(launch, datetime.timedelta(seconds=seconds))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if launch.rank == 0:
                raise ValueError(
                    f"distributed: {me} can't open {where}: set MASTER_PORT to a free port ({reason})"
                ) from error
            raise ValueError(
                f"distributed: {me} found no rank 0 at {where} in {seconds} s: {remedy} ({reason})"
            ) from error
    store = dist.PrefixStore(f"fastssl-{_joined}", _store)  # names of an earlier group must not be met again
    store.set(f"rank {launch.rank}", "here")
    try:
        store.wait([f"rank {rank}" for rank in range(launch.world_size)], datetime.timedelta(seconds=seconds))
    except RuntimeError as error:
        absent = _absent(store, launch.world_size)
        more = f" and {len(absent) - 3} others" if len(absent) > 3 else ""
        raise ValueError(
            f"distributed: {me} waited {seconds} s at {where} for rank {', '.join(absent[:3])}{more}: all ranks make "
            f"the same calls; {remedy}"
        ) from error
    _joined += 1
    return store


def _check_address(launch: Launch) -> None:
    """Refuses at once a name that no machine has, which torch would try for minutes."""
    try:
        socket.getaddrinfo(launch.address, launch.port)
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: a part of the name is too long
        if getattr(error, "errno", socket.EAI_NONAME) == socket.EAI_NONAME:
            raise ValueError(
                f"distributed: rank {launch.rank} of {launch.world_size} knows no machine {launch.address!r}: "
                "set MASTER_ADDR to the name or number of the machine of rank 0"
            ) from error


def _open_store(launch: Launch, timeout: datetime.timedelta) -> Any:
    if launch.launcher == "torchrun":  # whose agent may have opened it
        return next(iter(dist.rendezvous("env://", timeout=timeout)))[0]
    return dist.TCPStore(
        launch.address, launch.port, launch.world_size, launch.rank == 0, timeout, wait_for_workers=False
    )


def _absent(store: Any, world_size: int) -> list[str]:
    """Ranks that have not come; rank 0 if the store, which is there, can't be asked."""
    try:
        return [str(rank) for rank in range(world_size) if not store.check([f"rank {rank}"])]
    except RuntimeError:
        return ["0"]


@contextlib.contextmanager
def group_scope() -> Iterator[None]:
    """Leaves at its end the process group that `setup` created inside it.

    A group that existed before, such as one of the program that calls this package, is left alone. Also a decorator.
    """
    existed = dist.is_available() and dist.is_initialized()
    try:
        yield
    finally:
        if not existed:
            shutdown()


def shutdown() -> None:
    """Destroys the process group, if there is one."""
    global _launch
    _launch = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def launched_together() -> str | None:
    """Name of what started this process together with others; None for a process alone."""
    launch = read_launch(os.environ)
    return launch.launcher if launch else None


def is_peer_failure(error: RuntimeError) -> bool:
    """True if a collective raised `error` because another process has ended."""
    messages = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
    return world_size() > 1 and (isinstance(error, dist.DistError) or any(text in str(error) for text in messages))


def local_world_size() -> int:
    """Number of processes on this machine that train together."""
    if world_size() == 1:
        return 1
    return _launch.local_world_size if _launch else int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 … world_size() − 1."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def all_gather(x: Tensor) -> Tensor:
    """[B, …] of every rank → [world · B, …] in rank order; no gradient."""
    return _all_gather(x) if world_size() > 1 else x.detach()


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
    return _AllSum.apply(x) / world_size() if world_size() > 1 else x.detach()


@torch.no_grad()
def all_max(x: Tensor) -> Tensor:
    """The largest of every rank's x, element by element; no gradient."""
    if world_size() == 1:
        return x.detach()
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, dist.ReduceOp.MAX)
    return out


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
