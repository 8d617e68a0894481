"""Whole training steps on a GPU: the losses of the CPU, no wait of the host, and one CUDA graph for all of it."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastssl.contract import Batch
from fastssl.methods import mae, moco_v1, moco_v2, moco_v3
from fastssl.train.config import Execution
from fastssl.train.loop import _State, _step
from fastssl.train.profile import times_of_parts

pytestmark = pytest.mark.gpu

METHODS = {
    "mae": (mae, {}),
    "moco_v1": (moco_v1, {"queue_size": 64, "bn_splits": 1}),
    "moco_v2": (moco_v2, {"queue_size": 64, "bn_splits": 1}),
    "moco_v3": (moco_v3, {"hidden": 32}),
    "moco_v3, ViT": (moco_v3, {"hidden": 32, "backbone": "vit_mini"}),
}


def begin(name, device="cuda", **execution):
    """(state, a batch) of a small method, on any device the same."""
    torch.manual_seed(0)
    module, changes = METHODS[name]
    config = module.Config.small()
    for key, value in changes.items():
        setattr(config, key, value)
    method = module.build(config)
    views = tuple(torch.randn(16, 3, *config.image_size).to(device) for _ in config.augmentation.views)
    state = _State(method.to(device), name, config.training, Execution(**execution), None)
    return state, Batch(views, *(torch.arange(16, device=device) for _ in range(3)))


def losses(state, batch, steps=3):
    return torch.stack([_step(state, iter([batch]), 0.001, 10)[0] for _ in range(steps)]).cpu()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", METHODS)
def test_losses_are_those_of_the_cpu(name, precision):
    """Both devices round, in another order: bfloat16 by 2^-8, and a step spreads what it got."""
    expected = losses(*begin(name, "cpu"))
    assert expected.unique().numel() == 3
    tolerance = 2e-3 if precision == "fp32" else 3e-2
    torch.testing.assert_close(losses(*begin(name, precision=precision)), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_does_not_wait(name, precision):
    state, batch = begin(name, precision=precision)
    losses(state, batch)  # compiles kernels, makes the optimizer's state and tables of addresses
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = _step(state, iter([batch]), 0.001, 10)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.isfinite()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_one_cuda_graph(name, precision):
    """Captured whole, with optimizer, twin and queue: its replays are the steps that would have been made."""
    state, batch = begin(name, precision=precision)
    for group in state.optimizer.param_groups:
        group["capturable"] = True  # torch asks for it, of AdamW
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        warm = losses(state, batch, 3)
    torch.cuda.synchronize()
    expected = losses(*begin(name, precision=precision), steps=6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        loss = _step(state, iter([batch]), 0.001, 10)[0]
    found = []
    for _ in range(3):
        graph.replay()
        found.append(loss.clone())
    tolerance = 1e-4 if precision == "fp32" else 1e-2
    # Twins move by a schedule of the step, which a graph keeps as it was: their share of three steps is far smaller.
    torch.testing.assert_close(torch.stack(found).cpu(), expected[3:], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(warm, expected[:3], rtol=tolerance, atol=tolerance)
    assert expected.unique().numel() == 6


def test_compiled_by_inductor():
    state, batch = begin("mae", precision="bf16", compile=True)
    torch.testing.assert_close(losses(state, batch), losses(*begin("mae", precision="bf16")), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", METHODS)
def test_steps_of_a_graph_are_the_steps(name, precision):
    """Three steps to warm up, the capture, and replays; on batches that change, and one of another size."""

    def run(**execution):
        state, batch = begin(name, precision=precision, **execution)
        found = []
        for i in range(7):
            views = tuple(view[: 8 if i == 5 else None].roll(i, 0) for view in batch.views)
            some = Batch(views, *(x[: len(views[0])] for x in batch[1:]))
            loss, *_ = _step(state, iter([some]), 0.001, 10)
            found.append(loss)
        return torch.stack(found).cpu()

    expected = run()
    # Convolutions of float32 are tf32's on GPUs, which rounds by 2^-11, and cuDNN chooses among several.
    tolerance = 2e-3 if precision == "fp32" else 1e-2
    torch.testing.assert_close(run(graph=True), expected, rtol=tolerance, atol=tolerance)
    assert expected.unique().numel() == 7


def test_profile_counts_the_kernels_of_the_backward_pass():
    state, batch = begin("moco_v3, ViT")
    losses(state, batch)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        losses(state, batch)
        torch.cuda.synchronize()
    found = times_of_parts(profiler.events(), cuda=True)
    assert all(found[part] > 0 for part in ("forward", "loss", "backward", "optimizer", "EMA and queue"))
    assert found["backward"] > found["optimizer"] / 10
