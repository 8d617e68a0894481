"""Twelve training steps of SwAV and DeepCluster-v2, through the trainer, equal those of plain torch.

The reference is tests/methods/transcription_swav.py. Both sides compute in float64 from the same weights and images.
"""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from fastssl.contract import Batch, TrainingImages
from fastssl.distributed import rank, world_size
from fastssl.methods import deepcluster_v2, swav
from fastssl.train.config import Execution, Training
from fastssl.train.trainer import Trainer
from tests.methods import transcription_family as family
from tests.methods import transcription_swav as t
from tests.methods.test_replay_family import LEAST, TIMES, distance, disturbed, trunk
from tests.support.ranks import run_ranks

EPOCHS, LENGTH, BATCH, IMAGES, QUEUE = 4, 3, 8, 26, 16  # two images of each epoch are left out
STEPS = EPOCHS * LENGTH
LARGE, SMALL = (32, 32), (16, 16)
TRAINING = Training(
    EPOCHS,
    BATCH,
    "larc",
    32.0,
    0.01,
    decay_all=True,
    warmup_epochs=1,
    warmup_lr=8.0,
    warmup_includes_peak=True,
    lr_end=1.0,
)
PROJECTOR = ("projection_head.0", "projection_head.1", "projection_head.3")


MODULES = {"swav": swav, "deepcluster_v2": deepcluster_v2}


def config_of(module):
    sizes = {"image_size": LARGE, "local_size": SMALL, "local_crops": 2, "dim": 8, "hidden": 24}
    if module is swav:
        training = dataclasses.replace(TRAINING, freeze=("prototypes",), freeze_epochs=2 / 3)
        options = {"prototypes": 7, "epsilon": 0.05, "queue_size": QUEUE, "queue_start": 1, "training": training}
    else:
        options = {"prototypes": (5, 4, 6), "kmeans_rounds": 4, "training": TRAINING}
    return dataclasses.replace(module.Config.small(), **sizes, **options)


@functools.cache
def images_of_steps():
    """(index, crops) of each step."""
    generator = torch.Generator().manual_seed(4)
    orders = [torch.randperm(IMAGES, generator=generator)[: BATCH * LENGTH] for _ in range(EPOCHS)]
    return [
        (index, [torch.randn(BATCH, 3, *size, generator=generator).double() for size in (LARGE, LARGE, SMALL, SMALL)])
        for order in orders
        for index in order.split(BATCH)
    ]


def batches():
    """Those of this rank."""
    for index, crops in images_of_steps():
        parts = [x.chunk(world_size())[rank()] for x in (index, *crops)]
        yield Batch(tuple(parts[1:]), parts[0], None)


def trained(module, state, seed=1):
    """(losses, state dict) of the trainer's run from a state."""
    method = module.build(config_of(module)).double()
    method.load_state_dict(state)
    torch.manual_seed(seed)
    trainer = Trainer(method, config_of(module).training, Execution(), LENGTH)
    losses, all_batches = [], list(batches())
    for epoch in range(EPOCHS):
        of_epoch = all_batches[epoch * LENGTH : (epoch + 1) * LENGTH]
        if module is deepcluster_v2:
            method.before_epoch(TrainingImages(IMAGES, LENGTH, lambda of_epoch=of_epoch: iter(of_epoch), None))
        for batch in of_epoch:
            losses.append(trainer.step(iter([batch])).loss)
    return losses, {name: x.clone() for name, x in method.state_dict().items()}


def transcribed(module, state, seed=1, **changes):
    warmup = np.linspace(BATCH / 256 * 8, BATCH / 256 * 32, LENGTH).tolist()

    def lr(step, name):
        if step < LENGTH:
            return warmup[step]
        q = family.cosine((step - LENGTH) / (STEPS - LENGTH))
        return BATCH / 256 * (32 * q + 1 - q)

    options = {"backbone": trunk(""), "projector": PROJECTOR, "optimizer": family.Optimizer(family.lars_c, lr, 0.01)}
    state = {name: x for name, x in state.items() if not name.startswith(("queue", "memory", "assignments"))}
    steps = images_of_steps()
    torch.manual_seed(seed)
    if module is swav:
        options |= {"queue": QUEUE, "queue_start": LENGTH, "frozen": 2}
        return t.run_swav(state, [crops for _, crops in steps], **options | changes)
    options |= {"images": IMAGES, "heads": 3, "epoch_length": LENGTH, "rounds": 4}
    return t.run_deepcluster(state, steps, **options | changes)


def initial_state(module):
    torch.manual_seed(0)
    return module.build(config_of(module)).double().state_dict()


@functools.cache
def ours(module):
    """(initial state, losses, state dict) of one process."""
    initial = {name: x.clone() for name, x in initial_state(module).items()}
    return initial, *trained(module, initial)


def of_a_rank(name, initial):
    return trained(MODULES[name], initial)


@pytest.mark.parametrize("module", [swav, deepcluster_v2])
def test_twelve_steps(module):
    initial, losses, state = ours(module)
    replay, ruler = transcribed(module, initial), transcribed(module, disturbed(initial))
    allowed = TIMES * distance(replay.losses, ruler.losses) + LEAST
    assert distance(losses, replay.losses) <= allowed < 1e-7
    names = [name for name in replay.tensors if name in state and state[name].is_floating_point()]
    assert len(names) > 40 and {"conv1.weight", "projection_head.3.bias"} <= set(names)
    expected = [replay.tensors[name].detach() for name in names]
    allowed = TIMES * distance(expected, [ruler.tensors[name].detach() for name in names]) + LEAST
    assert distance([state[name] for name in names], expected) <= allowed < 1e-6
    still = [n for n in names if state[n].ndim > 1 and distance([state[n]], [initial[n]]) < 5e-4]
    assert not still, f"{still[0]} hardly moved: the comparison would show nothing"
    if module is deepcluster_v2:
        assert distance([state["memory.embeddings"]], [replay.tensors["memory"]]) <= allowed
        assert torch.equal(state["memory.index"], replay.tensors["memory_index"])


CHANGES = {
    "no queue": (swav, {"queue": 0}),
    "an earlier queue": (swav, {"queue_start": LENGTH - 1}),
    "prototypes frozen longer": (swav, {"frozen": 3}),
    "more rounds": (swav, {"rounds": 4}),
    "another temperature": (deepcluster_v2, {"tau": 0.11}),
    "more rounds of k-means": (deepcluster_v2, {"rounds": 1}),
    "clusters from other rows": (deepcluster_v2, {"seed": 2}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_transcription_is_noticed(name):
    module, changes = CHANGES[name]
    initial, losses, _ = ours(module)
    assert distance(losses, transcribed(module, initial, **changes).losses) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_two_ranks_equal_one_process(name):
    """Sinkhorn, queue, k-means, memory, batch norms: the whole run."""
    module = MODULES[name]
    initial, losses, state = ours(module)
    ruler = distance(losses, trained(module, disturbed(initial))[0])
    results = run_ranks(2, of_a_rank, name, initial)
    means = [torch.stack(pair).mean() for pair in zip(*(losses for losses, _ in results))]
    assert distance(means, losses) <= 100 * ruler + LEAST < 1e-7
    for _, other in results:
        assert other.keys() == state.keys()
        for key in [key for key in state if key.startswith(("queue", "memory", "assignments", "prototypes"))]:
            torch.testing.assert_close(other[key], state[key], rtol=1e-6, atol=1e-7)
