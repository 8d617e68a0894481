"""Forward and backward as one CUDA graph, which avoids the overhead of launching each kernel."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fastssl.contract import Batch
from fastssl.distributed import world_size

WARM_UP = 3  # steps without a graph: they compile kernels, choose algorithms and allocate


class Graph:
    """``results = graph(batch)`` is ``run(batch)``, which computes gradients and returns tensors in dicts and lists.

    The first steps call `run` directly. Then one call is captured; from there on a batch is copied into the captured
    input tensors, and the graph writes gradients and results to their captured addresses. A batch of other shapes is
    passed to `run` directly.

    Args:
        run: works on a GPU, never waits for it, and reads only the batch and tensors whose addresses do not change.
            Python code in it has no effect in a replay.
        parameters: receive gradients.
        accumulate: add the gradients to those that the parameters have, of earlier micro-batches. A replay overwrites
            the captured gradients, so they are added to other tensors: one more pass over the gradients for each
            micro-batch. Without it no parameter may have a gradient when the graph is called.

    Source: CUDA Programming Guide, "CUDA Graphs".
    """

    def __init__(self, run: Callable[[Batch], Any], parameters: Iterable[nn.Parameter], accumulate: bool = False):
        self.run, self.parameters, self.accumulate, self.steps = run, list(parameters), accumulate, 0
        self.stream = torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch) -> Any:
        first = all(parameter.grad is None for parameter in self.parameters)  # micro-batch of a step
        if self.graph is None and self.steps >= WARM_UP and first:
            self._capture(batch)
        if self.graph is None or _shapes(batch) != _shapes(self.batch):
            self.steps += 1
            return self._run_on_capture_stream(batch)
        for captured, new in zip(_tensors(self.batch), _tensors(batch)):
            captured.copy_(new, non_blocking=True)
        if first:
            for parameter, gradient in self.sums:
                parameter.grad = gradient
        self.graph.replay()
        if self.accumulate:
            sums = [parameter.grad for parameter, _ in self.sums if parameter.grad is not None]
            if first:
                torch._foreach_copy_(sums, self.gradients)
            else:
                torch._foreach_add_(sums, self.gradients)
        return tree_map_only(Tensor, Tensor.clone, self.results)  # the next replay overwrites them

    def _run_on_capture_stream(self, batch: Batch) -> Any:
        """Libraries keep workspaces for each stream: those of the capture's stream must exist before it."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            results = self.run(batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return results

    def _capture(self, batch: Batch) -> None:
        self.batch = tree_map_only(Tensor, Tensor.clone, batch)  # input tensors of the graph
        graph = torch.cuda.CUDAGraph()
        # with NCCL a thread asks for the state of collectives, which a capture of all threads would forbid
        mode = "thread_local" if world_size() > 1 else "global"
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode=mode):
            self.results = self.run(self.batch)
        self._keep_gradients()
        self.graph = graph

    def _keep_gradients(self) -> None:
        """Keeps the captured gradients, and the tensors that become the gradients of the parameters."""
        captured = [(p, p.grad) for p in self.parameters if p.grad is not None]
        self.gradients = [gradient for _, gradient in captured]
        self.sums = [(p, torch.empty_like(g)) for p, g in captured] if self.accumulate else captured


def check_graph(device: torch.device, shard: bool, profile: int) -> None:
    """Refuse --graph where a CUDA graph cannot be captured.

    Raises:
        ValueError: no GPU, shards, or a profile of `profile` steps.
    """
    if device.type != "cuda":
        raise ValueError(f"train: --graph needs a GPU, got {device}: leave it out")
    if shard:
        raise ValueError("train: --graph must be given without --shard, got both: leave out one of them")
    if profile:
        raise ValueError("train: --profile cannot see inside a CUDA graph: leave out --profile or --graph")


def _tensors(batch: Batch) -> list[Tensor]:
    return [x for x in tree_leaves(batch) if isinstance(x, Tensor)]


def _shapes(batch: Batch) -> list[tuple]:
    return [(x.shape, x.dtype) for x in _tensors(batch)]
