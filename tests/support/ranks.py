"""Functions in separate processes: several ranks connected by gloo, as under torchrun, or one that a test kills."""

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Processes are forked from one that has imported these and has no threads: importing them anew takes seconds each.
multiprocessing.set_forkserver_preload(
    [
        "pytest",
        "timm",
        "torch.distributed",
        "torch.testing",
        "torch.nn.parallel",
        "torch.distributed.fsdp",
        "fastssl.nn",
        "fastssl.cli.evaluate",
        "fastssl.cli.pretrain",
        "fastssl.methods.mae",
        "fastssl.methods.moco_v2",
        "fastssl.methods.moco_v3",
        "fastssl.data.torchvision",
        "fastssl.data.sources.arrays",
        "fastssl.data.sources.shapes",
    ]
)


def run_ranks(world: int, function: Callable, *args) -> list:
    """What ``function(*args)`` returned in each of `world` processes, in rank order. An assertion that fails in one of
    them fails here. The function must be at the top level of its module."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (world, folder, function, args), world, start_method="forkserver")
        return [torch.load(Path(folder, f"result{rank}"), weights_only=False) for rank in range(world)]


def start_process(function: Callable, *args) -> multiprocessing.Process:
    """A started process that calls ``function(*args)`` on one torch thread; the function is at the top level of its
    module. It is forked from one that has imported the package."""
    process = multiprocessing.get_context("forkserver").Process(target=_one_thread, args=(function, args))
    process.start()
    return process


def _one_thread(function: Callable, args: tuple) -> None:
    import fastssl.machine

    fastssl.machine.cores = lambda: 1  # commands choose their threads by the number of cores
    torch.set_num_threads(1)
    function(*args)


def _rank(rank: int, world: int, folder: str, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    try:
        torch.save(function(*args), Path(folder, f"result{rank}"))
    finally:
        dist.destroy_process_group()
