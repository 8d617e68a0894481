"""Execution options that leave the step as it is: recomputed activations, torch.compile, CUDA graphs."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fastssl.contract import Batch
from fastssl.method_modules import method_module
from fastssl.methods import densecl, mae, moco_v2, moco_v3
from fastssl.nn import MomentumEncoder
from fastssl.train.graph import check_graph
from tests.support import toy_method
from tests.support.small_methods import SMALL, extras_of
from tests.support.trainers import constant_rate_trainer

METHODS = {
    "mae": (mae, {}),
    "moco_v2": (moco_v2, {"queue_size": 64}),
    "densecl": (densecl, {"queue_size": 64}),
    "moco_v3": (moco_v3, {"hidden": 32}),
    "moco_v3, ViT": (moco_v3, {"hidden": 32, "backbone": "vit_mini"}),
    "toy": (toy_method, {}),
    **{name: (method_module(name), changes) for name, changes in SMALL.items()},
}
OTHERS = [  # one of the methods without transformers stays in `make test`
    pytest.param(name, marks=pytest.mark.exhaustive) for name in SMALL if name not in ("byol", "dino")
]


def begin(name, **execution):
    """Trainer of a small method, and a batch; the same at every call."""
    torch.manual_seed(0)
    module, changes = METHODS[name]
    config = module.Config.small()
    for key, value in changes.items():
        setattr(config, key, value)
    trainer = constant_rate_trainer(module.build(config), config.training, 0.01, **execution)
    views = tuple(torch.randn(8, 3, *config.image_size) for _ in config.augmentation.views)
    return trainer, Batch(views, torch.arange(8), torch.arange(8), torch.arange(8), extras_of(config, 8))


def losses(trainer, batch, steps=3):
    return torch.stack([trainer.step(iter([batch])).loss for _ in range(steps)])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["mae", "moco_v3, ViT", "igpt"])
def test_recomputed_activations_change_no_loss(name, precision):
    kept = losses(*begin(name, precision=precision))
    recomputed = losses(*begin(name, precision=precision, recompute=True))
    assert torch.equal(kept, recomputed) and kept[0] != kept[-1]


def test_recomputed_activations_are_not_kept():
    """Tensors saved for the backward pass take less than half of the bytes."""
    kept_bytes = {}
    for recompute in (False, True):
        trainer, batch = begin("mae", recompute=recompute)
        sizes = {}

        def note(x, sizes=sizes):
            sizes[x.data_ptr()] = x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            trainer.method(batch)
        weights = {p.data_ptr() for p in trainer.method.parameters()}
        kept_bytes[recompute] = sum(size for address, size in sizes.items() if address not in weights)
    assert kept_bytes[True] < kept_bytes[False] / 2


def test_recompute_refuses_a_resnet():
    with pytest.raises(ValueError, match="train: --recompute is for transformers"):
        begin("moco_v2", recompute=True)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["mae", "moco_v3", "moco_v3, ViT", "byol", "dino", *OTHERS])
def test_torch_compile_captures_a_whole_method_as_one_graph(name, precision):
    """Forward and loss without a graph break, and the same values."""
    (trainer, batch), dtype = begin(name), torch.bfloat16
    torch._dynamo.reset()
    compiled = torch.compile(trainer.method, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype, enabled=precision == "bf16"):
        expected, _ = trainer.method(batch)
        result, _ = compiled(batch)
    torch.testing.assert_close(result, expected, rtol=1e-5 if precision == "fp32" else 2e-2, atol=0)
    result.backward()
    assert all(p.grad is not None for p in trainer.method.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name not in SMALL] + ["dino"] + OTHERS)
def test_compiled_steps_equal_eager_steps(name, monkeypatch):
    """Also where `before_step` changes a buffer that the compiled forward pass reads (toy)."""
    torch._dynamo.reset()
    compiled = []

    def compile_module(module):
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_module)
    compiled_losses = losses(*begin(name, compile=True))
    assert len(compiled) == 1
    torch.testing.assert_close(compiled_losses, losses(*begin(name)), rtol=1e-4, atol=1e-5)


def tensors_of(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_addresses_do_not_change_from_step_to_step(name, precision):
    """A captured CUDA graph needs this: weights, momentum encoder and its 16-bit copies, queue and optimizer state stay
    at their addresses, and results have the same shapes. (test_loop.py tests that no step waits for the device.)"""
    trainer, batch = begin(name, precision=precision)

    def addresses():
        encoders = [m for m in trainer.method.modules() if isinstance(m, MomentumEncoder) and m._low_precision]
        copies = [w for encoder in encoders for w in encoder._low_precision.copies.values()]
        tensors = [
            *trainer.method.parameters(),
            *trainer.method.buffers(),
            *tensors_of(trainer.optimizer.state_dict()["state"]),
            *copies,
        ]
        return [(x.data_ptr(), x.shape) for x in tensors]

    first = trainer.step(iter([batch]))
    before = addresses()
    second = trainer.step(iter([batch]))
    assert addresses() == before
    assert [x.shape for x in tensors_of(first)] == [x.shape for x in tensors_of(second)]
    copied = sum(isinstance(m, MomentumEncoder) and m._low_precision is not None for m in trainer.method.modules())
    assert copied == (precision == "bf16" and name.startswith(("moco", "byol", "densecl", "dino", "ibot")))


def test_graph_error_sentences():
    with pytest.raises(ValueError, match="train: --graph needs a GPU, got cpu: leave it out"):
        begin("mae", graph=True)
    cuda = torch.device("cuda")
    check_graph(cuda, False, 0)
    with pytest.raises(ValueError, match="train: --graph must be given without --shard, got both: leave out one"):
        check_graph(cuda, True, 0)
    with pytest.raises(
        ValueError, match="train: --profile cannot see inside a CUDA graph: leave out --profile or --graph"
    ):
        check_graph(cuda, False, 3)
