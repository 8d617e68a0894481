"""Gradients of CUDA graphs on a CPU: the capture is emulated, so that what happens around the replay is tested."""

import functools

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fastssl import distributed
from fastssl.contract import Batch
from fastssl.train import trainer as trainer_module
from fastssl.train.graph import WARM_UP, Graph
from fastssl.train.parallel import average_gradients
from tests.support import toy_method
from tests.support.ranks import run_ranks
from tests.support.trainers import constant_rate_trainer


class EmulatedGraph(Graph):
    """A graph whose replay calls `run` on the captured input tensors and writes to the captured results."""

    def __init__(self, run, parameters, accumulate=False):
        self.run, self.parameters, self.accumulate, self.steps = run, list(parameters), accumulate, 0
        self.graph, self.replays = None, 0

    def _run_on_capture_stream(self, batch):
        return self.run(batch)

    def _capture(self, batch):
        self.batch = tree_map_only(torch.Tensor, torch.Tensor.clone, batch)
        self.results = self.run(self.batch)
        self._keep_gradients()
        self.graph = self

    def replay(self):
        self.replays += 1
        gradients = [parameter.grad for parameter, _ in self.sums]
        for parameter in self.parameters:
            parameter.grad = None
        results = self.run(self.batch)
        for captured, (parameter, _) in zip(self.gradients, self.sums):
            captured.copy_(parameter.grad)
        for captured, new in zip(tree_leaves(self.results), tree_leaves(results)):
            captured.copy_(new)
        for (parameter, _), gradient in zip(self.sums, gradients):
            parameter.grad = gradient


def batches(count, sizes=(4,)):
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    numbers = [torch.arange(sizes[i % len(sizes)]) for i in range(count)]
    return [Batch((draw(len(n), 3, 2, 2),), n, n, n) for n in numbers]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 2))


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("sizes", [(4,), (4, 4, 4, 4, 3, 4, 4)], ids=["equal batches", "one of another size"])
def test_gradients_are_those_without_a_graph(micro_batches, sizes):
    """Sums over micro-batches, over warm-up, capture and replays, with a direct call in between."""

    def run(net, batch):
        loss = net(batch.views[0]).square().mean()
        loss.backward()
        return {"loss": loss.detach()}

    plain, graphed = model(), model()
    graph = EmulatedGraph(functools.partial(run, graphed), graphed.parameters(), micro_batches > 1)
    parts = iter(batches(9 * micro_batches, sizes))
    for _ in range(9):
        for batch in [next(parts) for _ in range(micro_batches)]:
            assert torch.equal(run(plain, batch)["loss"], graph(batch)["loss"])
        for ours, theirs in zip(graphed.parameters(), plain.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-7)
            ours.grad = theirs.grad = None
    assert graph.replays >= 9 * micro_batches - 2 * WARM_UP - 2 * (len(sizes) > 1) * micro_batches


def train(world, graph, monkeypatch=None):
    """Weights after steps of a toy method on this rank's share of the batches."""
    torch.manual_seed(distributed.rank())  # rank 0's weights must be those of all
    config = toy_method.Config()
    config.training.accumulate = 2
    execution = {"graph": True} if graph else {}
    trainer = constant_rate_trainer(toy_method.build(config), config.training, 0.1, **execution)
    size = config.image_size[0]
    torch.manual_seed(5)
    whole = torch.randn(12, 8, 3, size, size)
    share = 8 // world
    rows = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    numbers = torch.arange(share)
    steps = iter([Batch(tuple(x[rows] for _ in config.augmentation.views), numbers, numbers, numbers) for x in whole])
    for _ in range(6):
        trainer.step(steps)
    return {name: x.clone() for name, x in trainer.method.state_dict().items()}


def train_with_emulated_graph(world, graph):
    trainer_module.Graph, trainer_module.check_graph = EmulatedGraph, lambda *args: None
    return train(world, graph)


@pytest.mark.slow
def test_ranks_with_a_graph_equal_ranks_without():
    """Accumulated gradients are averaged after the graph as DistributedDataParallel averages them."""
    expected = run_ranks(2, train, 2, False)
    found = run_ranks(2, train_with_emulated_graph, 2, True)
    for name, x in expected[0].items():
        torch.testing.assert_close(found[0][name], x, rtol=1e-6, atol=1e-7)
        assert torch.equal(found[0][name], found[1][name])


def average(sizes):
    parameters = [nn.Parameter(torch.zeros(n, dtype=d)) for n, d in sizes] + [nn.Parameter(torch.zeros(3))]
    for i, parameter in enumerate(parameters[:-1]):  # the last has no gradient
        parameter.grad = torch.full_like(parameter, i + 10.0 * distributed.rank())
    average_gradients(parameters)
    return [None if p.grad is None else p.grad.unique().tolist() for p in parameters]


@pytest.mark.slow
def test_buckets():
    """Gradients of two dtypes, one larger than a bucket."""
    sizes = [(5, torch.float32), (2**23 + 1, torch.float32), (0, torch.float32), (7, torch.float64), (2, torch.float64)]
    for result in run_ranks(2, average, sizes):
        assert result == [[5.0], [6.0], [], [8.0], [9.0], None]
