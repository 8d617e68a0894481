"""Ways to run the same step: activations made again, torch.compile, a graph captured once."""

import dataclasses
import functools

import pytest
import torch
from torch import nn

from fastssl.contract import Batch
from fastssl.methods import mae, moco_v2, moco_v3
from fastssl.nn import MomentumEncoder
from fastssl.train.config import Execution
from fastssl.train.graph import check_graph
from fastssl.train.loop import _State, _step

METHODS = {
    "mae": (mae, {}),
    "moco_v2": (moco_v2, {"queue_size": 64}),
    "moco_v3": (moco_v3, {"hidden": 32}),
    "moco_v3, ViT": (moco_v3, {"hidden": 32, "backbone": "vit_mini"}),
}


def begin(name, **execution):
    """(state, a batch) of a small method, always the same."""
    torch.manual_seed(0)
    module, changes = METHODS[name]
    config = module.Config.small()
    for key, value in changes.items():
        setattr(config, key, value)
    state = _State(module.build(config), name, config.training, Execution(**execution), None)
    views = tuple(torch.randn(8, 3, *config.image_size) for _ in config.augmentation.views)
    return state, Batch(views, torch.arange(8), torch.arange(8), torch.arange(8))


def losses(state, batch, steps=3):
    return torch.stack([_step(state, iter([batch]), 0.01, 10)[0] for _ in range(steps)])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["mae", "moco_v3, ViT"])
def test_activations_made_again_change_nothing(name, precision):
    kept = losses(*begin(name, precision=precision))
    again = losses(*begin(name, precision=precision, recompute=True))
    assert torch.equal(kept, again) and kept[0] != kept[-1]


def test_activations_made_again_are_not_kept():
    """What is saved for the backward pass: fewer bytes by more than half."""
    held = {}
    for recompute in (False, True):
        state, batch = begin("mae", recompute=recompute)
        sizes = {}

        def note(x, sizes=sizes):
            sizes[x.data_ptr()] = x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            state.method(batch)
        weights = {p.data_ptr() for p in state.method.parameters()}
        held[recompute] = sum(size for at, size in sizes.items() if at not in weights)
    assert held[True] < held[False] / 2


def test_a_resnet_is_not_run_again():
    with pytest.raises(ValueError, match="train: --recompute is for transformers"):
        begin("moco_v2", recompute=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["mae", "moco_v3", "moco_v3, ViT"])
def test_whole_methods_are_one_graph(name, precision):
    """Forward and loss without a break, and the same numbers."""
    (state, batch), dtype = begin(name), torch.bfloat16
    torch._dynamo.reset()
    compiled = torch.compile(state.method, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype, enabled=precision == "bf16"):
        expected, _ = state.method(batch)
        result, _ = compiled(batch)
    torch.testing.assert_close(result, expected, rtol=1e-5 if precision == "fp32" else 2e-2, atol=0)
    result.backward()
    assert all(p.grad is not None for p in state.method.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_step_is_the_step(name, monkeypatch):
    torch._dynamo.reset()
    compiled = []

    def compile_module(module):
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_module)
    found = losses(*begin(name, compile=True))
    assert len(compiled) == 1
    torch.testing.assert_close(found, losses(*begin(name)), rtol=1e-4, atol=1e-5)


def tensors_of(value):
    """All tensors in lists and dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [x for v in inner for x in tensors_of(v)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_finds_everything_where_the_last_one_left_it(name, precision):
    """As a captured CUDA graph needs it: weights, twin and its 16-bit copies, queue and optimizer stay at their
    addresses, and results have the same shapes. (That no step reads a value on the host, test_loop.py shows.)"""
    state, batch = begin(name, precision=precision)

    def addresses():
        twins = [m for m in state.method.modules() if isinstance(m, MomentumEncoder) and m._low_precision]
        copies = [w for twin in twins for w in twin._low_precision.copies.values()]
        held = [
            *state.method.parameters(),
            *state.method.buffers(),
            *tensors_of(state.optimizer.state_dict()["state"]),
            *copies,
        ]
        return [(x.data_ptr(), x.shape) for x in held]

    step = functools.partial(_step, state, lr=0.01, total=10)
    first = step(iter([batch]))
    before = addresses()
    second = step(iter([batch]))
    assert addresses() == before
    assert [x.shape for x in tensors_of(list(first))] == [x.shape for x in tensors_of(list(second))]
    shadows = sum(isinstance(m, MomentumEncoder) and m._low_precision is not None for m in state.method.modules())
    assert shadows == (precision == "bf16" and name != "mae")


def test_what_a_graph_can_not_do():
    with pytest.raises(ValueError, match="train: --graph needs a GPU, got cpu: leave it out"):
        begin("mae", graph=True)
    cuda, training = torch.device("cuda"), mae.Config.small().training
    check_graph(cuda, training, False, 0)
    with pytest.raises(ValueError, match="train: --graph needs accumulate 1, got 2: its gradients don't add up"):
        check_graph(cuda, dataclasses.replace(training, accumulate=2), False, 0)
    with pytest.raises(
        ValueError, match="train: --graph is for one process without --shard, got 1 processes and --shard: leave"
    ):
        check_graph(cuda, training, True, 0)
    with pytest.raises(ValueError, match="train: --profile sees no parts in a graph: leave out one of"):
        check_graph(cuda, training, False, 3)
