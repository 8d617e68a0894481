"""Whole training steps on a GPU: losses equal to the CPU's, no host synchronisation, CUDA graphs."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastssl.contract import Batch
from fastssl.method_modules import method_module
from fastssl.methods import densecl, mae, moco_v1, moco_v2, moco_v3
from fastssl.train.profile import times_of_parts
from tests.support import toy_method
from tests.support.small_methods import SMALL, extras_of
from tests.support.trainers import constant_rate_trainer

pytestmark = pytest.mark.gpu

METHODS = {
    "mae": (mae, {}),
    "moco_v1": (moco_v1, {"queue_size": 64, "bn_splits": 1}),
    "moco_v2": (moco_v2, {"queue_size": 64, "bn_splits": 1}),
    "densecl": (densecl, {"queue_size": 64, "bn_splits": 1}),
    "moco_v3": (moco_v3, {"hidden": 32}),
    "moco_v3, ViT": (moco_v3, {"hidden": 32, "backbone": "vit_mini"}),
    "toy": (toy_method, {}),
    **{name: (method_module(name), changes) for name, changes in SMALL.items()},
}


def begin(name, device="cuda", accumulate=1, **execution):
    """Trainer of a small method, and a batch; the same on any device."""
    torch.manual_seed(0)
    module, changes = METHODS[name]
    config = module.Config.small()
    for key, value in changes.items():
        setattr(config, key, value)
    config.training.accumulate = accumulate
    method = module.build(config)
    views = tuple(torch.randn(16, 3, *config.image_size).to(device) for _ in config.augmentation.views)
    trainer = constant_rate_trainer(method.to(device), config.training, 0.001, **execution)
    numbers = (torch.arange(16, device=device) for _ in range(3))
    return trainer, Batch(views, *numbers, extras_of(config, 16, device))


def losses(trainer, batch, steps=3):
    return torch.stack([trainer.step(iter([batch])).loss for _ in range(steps)]).cpu()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", METHODS)
def test_losses_equal_those_of_the_cpu(name, precision):
    """Both devices round in another order: bfloat16 by 2^-8, and each step amplifies the difference."""
    expected = losses(*begin(name, "cpu"))
    assert expected.unique().numel() == 3
    tolerance = 2e-3 if precision == "fp32" else 3e-2
    torch.testing.assert_close(losses(*begin(name, precision=precision)), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_does_not_synchronise(name, precision):
    trainer, batch = begin(name, precision=precision)
    losses(trainer, batch)  # compiles kernels, makes the optimizer's state and tables of addresses
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = trainer.step(iter([batch])).loss
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.isfinite()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "toy"])  # which schedules its forward pass
def test_a_step_is_one_cuda_graph(name, precision):
    """Captured whole, with optimizer, momentum encoder and queue: replays equal steps without a graph."""
    trainer, batch = begin(name, precision=precision)
    for group in trainer.optimizer.param_groups:
        group["capturable"] = True  # AdamW requires it under capture
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        warm = losses(trainer, batch, 3)
    torch.cuda.synchronize()
    expected = losses(*begin(name, precision=precision), steps=6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        loss = trainer.step(iter([batch])).loss
    replayed = []
    for _ in range(3):
        graph.replay()
        replayed.append(loss.clone())
    tolerance = 1e-4 if precision == "fp32" else 1e-2
    # The graph keeps the momentum coefficient of the captured step, whose effect on three steps is far smaller.
    torch.testing.assert_close(torch.stack(replayed).cpu(), expected[3:], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(warm, expected[:3], rtol=tolerance, atol=tolerance)
    assert expected.unique().numel() == 6


def test_compiled_by_inductor():
    trainer, batch = begin("mae", precision="bf16", compile=True)
    torch.testing.assert_close(losses(trainer, batch), losses(*begin("mae", precision="bf16")), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", METHODS)
def test_steps_with_a_graph_equal_steps_without(name, precision):
    """Three warm-up steps, the capture, and replays; batches differ, and one has another size."""

    def run(**execution):
        trainer, batch = begin(name, precision=precision, **execution)
        noise = torch.Generator("cuda").manual_seed(0)
        results = []
        for i in range(7):
            size = 8 if i == 5 else 16
            views = tuple(torch.randn(size, *x.shape[1:], generator=noise, device="cuda") for x in batch.views)
            part = Batch(
                views,
                batch.index[:size],
                batch.label[:size],
                batch.seed[:size],
                {k: x[:size] for k, x in batch.extras.items()},
            )
            results.append(trainer.step(iter([part])).loss)
        return torch.stack(results).cpu(), trainer.state()["model"]

    expected, expected_state = run()
    # Convolutions of float32 are tf32's on GPUs, which rounds by 2^-11, and cuDNN chooses among several.
    tolerance = 2e-3 if precision == "fp32" else 1e-2
    losses_of_graph, state = run(graph=True)
    torch.testing.assert_close(losses_of_graph, expected, rtol=tolerance, atol=tolerance)
    assert expected.unique().numel() == 7
    for key in {"queue", "queue_ptr", "centre"} & set(state):  # what after_step writes, also after replays
        torch.testing.assert_close(state[key], expected_state[key], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["mae", "moco_v3, ViT"])
def test_micro_batches_with_a_graph_equal_those_without(name):
    """Gradients of three micro-batches are added up between the replays."""

    def run(**execution):
        trainer, batch = begin(name, accumulate=3, **execution)
        noise = torch.Generator("cuda").manual_seed(0)
        results = []
        for _ in range(5):
            views = [tuple(torch.randn(x.shape, generator=noise, device="cuda") for x in batch.views) for _ in range(3)]
            results.append(trainer.step(iter([batch._replace(views=parts) for parts in views])).loss)
        return torch.stack(results).cpu()

    expected = run()
    assert expected.unique().numel() == 5
    torch.testing.assert_close(run(graph=True), expected, rtol=2e-3, atol=2e-3)


def test_profile_counts_the_kernels_of_the_backward_pass():
    trainer, batch = begin("moco_v3, ViT")
    losses(trainer, batch)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        losses(trainer, batch)
        torch.cuda.synchronize()
    seconds = times_of_parts(profiler.events(), cuda=True)
    assert all(seconds[part] > 0 for part in ("forward", "loss", "backward", "optimizer", "EMA and queue"))
    assert seconds["backward"] > seconds["optimizer"] / 10
