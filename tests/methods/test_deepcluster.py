import pytest
import torch

from fastssl.contract import Batch, TrainingImages
from fastssl.methods import deepcluster_v2
from fastssl.methods.deepcluster_v2 import DeepClusterV2
from fastssl.nn.heads import mlp_head
from fastssl.train.config import Training
from fastssl.train.optim import build_optimizer
from tests.methods import test_swav as swav_tests
from tests.methods import transcription_family as family
from tests.methods import transcription_swav as t
from tests.support.golden import part, read

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def golden_state(golden, model):
    """The golden file's initial state and memory, as a state dict of ours."""
    memory = golden["input.memory_embeddings"].to(model.memory.embeddings.dtype)
    state = {"embeddings": memory, "index": golden["input.memory_index"], "place": torch.tensor([4, 0])}
    state = {f"memory.{name}": x for name, x in state.items()}
    return {**part(golden, "state."), **state, "assignments": golden["assignments"]}


@pytest.fixture
def initial_rows(monkeypatch):
    """The golden file's initial centroids, in place of random rows."""
    golden, meta = read("deepcluster_v2")
    rows = iter([golden[f"head{head}.initial_rows"] for head in range(len(meta["heads"]))])
    monkeypatch.setattr(deepcluster_v2, "random_rows", lambda x, count, numbers: x[next(rows)])


def test_golden_clustering_and_step(initial_rows):
    """k-means of three heads, loss, gradients, LARC and memory of the official code, in float64: rows that are equal
    make equal centroids, between which float32 would choose by rounding."""
    golden, meta = read("deepcluster_v2")
    dtype, exact = torch.float64, EXACT
    projector = mlp_head(12, 12, 6, bias=True, last_bias=True)
    model = DeepClusterV2(swav_tests.Body(), projector, 6, meta["heads"], meta["temperature"], 10).to(dtype)
    state = golden_state(golden, model)
    del state["assignments"]
    model.load_state_dict(state, strict=False)
    model.assignments = torch.full((3, meta["dataset"]), -100)
    model.before_epoch(TrainingImages(meta["dataset"], 10, augmented=None, plain=None))  # the memory is filled
    assert torch.equal(model.assignments, golden["assignments"])
    for i, head in enumerate(model.prototypes.values()):
        torch.testing.assert_close(head.weight.data, golden[f"head{i}.centroids"].to(dtype), **exact)
    settings = meta["larc"]
    optimizer = build_optimizer(model, Training(1, 1, "larc", 0.0, settings["weight_decay"], decay_all=True))
    for group in optimizer.param_groups:
        group["lr"] = meta["lr"]
    crops = tuple(golden[f"train.input.crop{i}"].to(dtype) for i in range(6))
    loss, _ = model(Batch(crops, golden["train.input.index"], None))
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["train.loss"].to(dtype), **exact)
    gradients = {name.removeprefix("backbone."): p.grad for name, p in model.named_parameters()}
    for name, gradient in part(golden, "train.grad.").items():
        torch.testing.assert_close(gradients[name], gradient.to(dtype), **exact)
    optimizer.step()
    model.after_step(1.0)
    torch.testing.assert_close(model.memory.embeddings, golden["train.memory_embeddings"].to(dtype), **exact)
    assert torch.equal(model.memory.index, golden["train.memory_index"])
    state = model.state_dict()
    for name, x in part(golden, "train.state.").items():
        torch.testing.assert_close(state[name], x.to(state[name].dtype), **exact)


def test_the_transcription_meets_the_golden_step(monkeypatch):
    golden, meta = read("deepcluster_v2")
    memory = golden["input.memory_embeddings"].double(), golden["input.memory_index"]
    rows = iter([golden[f"head{head}.initial_rows"] for head in range(3)])
    monkeypatch.setattr(torch, "randperm", lambda count: next(rows))
    optimizer = family.Optimizer(family.lars_c, lambda step, name: meta["lr"], meta["larc"]["weight_decay"])
    batch = golden["train.input.index"], [golden[f"train.input.crop{i}"] for i in range(6)]
    options = {"projector": swav_tests.PROJECTOR, "images": meta["dataset"], "heads": 3, "memory": memory}
    options |= {"backbone": swav_tests.golden_body, "epoch_length": 10}
    replay = t.run_deepcluster(part(golden, "state."), [batch], optimizer=optimizer, **options)
    torch.testing.assert_close(replay.losses[0], golden["train.loss"], **EXACT)
    for name, gradient in part(golden, "train.grad.").items():
        torch.testing.assert_close(replay.gradients[0][name], gradient, **EXACT)
    for name, x in part(golden, "train.state.").items():
        torch.testing.assert_close(replay.tensors[name].detach(), x, **EXACT)
    torch.testing.assert_close(replay.tensors["memory"], golden["train.memory_embeddings"], **EXACT)
    assert torch.equal(replay.tensors["memory_index"], golden["train.memory_index"])
