"""Forward and backward as one CUDA graph: a step then takes what its kernels take, not what it takes to launch them."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fastssl.distributed import world_size

from .config import Training

WARM_UP = 3  # steps made kernel by kernel first: they compile, choose algorithms, and allocate


class Graph:
    """``results = graph(batch)`` is ``run(batch)``, which computes gradients and returns a dict of tensors.

    The first steps run it as it is. Then it is captured, and from there on a batch is copied to where the graph reads
    it, and the graph leaves gradients and results where it left them at the capture. A batch of another size runs as
    it is.

    Args:
        run: works on a GPU, never waits for it, and depends on nothing but the batch and tensors that stay in place.
        parameters: get gradients; none may have one when the graph is called.

    Source: CUDA Programming Guide, "CUDA Graphs".
    """

    def __init__(self, run: Callable[[tuple], dict[str, Tensor]], parameters: Iterable[nn.Parameter]):
        self.run, self.parameters, self.steps = run, list(parameters), 0
        self.stream, self.graph = torch.cuda.Stream(), None

    def __call__(self, batch: tuple) -> dict[str, Tensor]:
        if self.graph is None and self.steps >= WARM_UP:
            self._capture(batch)
        if self.graph is None or _shapes(batch) != _shapes(self.batch):
            self.steps += 1
            return self._aside(batch)
        for own, new in zip(_tensors(self.batch), _tensors(batch)):
            own.copy_(new, non_blocking=True)
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        self.graph.replay()
        return {name: result.clone() for name, result in self.results.items()}  # the next replay overwrites them

    def _aside(self, batch: tuple) -> dict[str, Tensor]:
        """On the stream of the capture, so that what libraries keep for each stream is there before it."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            results = self.run(batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return results

    def _capture(self, batch: tuple) -> None:
        self.batch = _copy(batch)  # kept: the graph reads from there
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.results = self.run(self.batch)
        self.gradients = [(p, p.grad) for p in self.parameters if p.grad is not None]
        self.graph = graph


def check_graph(device: torch.device, training: Training, shard: bool, profile: int) -> None:
    """Refuses what --graph can't do.

    Raises:
        ValueError: no GPU, several processes or shards, micro-batches, or a profile of `profile` steps.
    """
    if device.type != "cuda":
        raise ValueError(f"train: --graph needs a GPU, got {device}: leave it out")
    if world_size() > 1 or shard:
        came = f"{world_size()} processes" + " and --shard" * shard
        raise ValueError(f"train: --graph is for one process without --shard, got {came}: leave it out")
    if training.accumulate > 1:
        raise ValueError(f"train: --graph needs accumulate 1, got {training.accumulate}: its gradients don't add up")
    if profile:
        raise ValueError("train: --profile sees no parts in a graph: leave out one of --profile and --graph")


def _copy(value):
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple):
        parts = map(_copy, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _tensors(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in _tensors(part)] if isinstance(value, tuple) else []


def _shapes(batch: tuple) -> list[tuple]:
    return [(x.shape, x.dtype) for x in _tensors(batch)]
