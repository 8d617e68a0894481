import pytest
import torch
import torch.nn.functional as F

from fastssl import pretrain
from fastssl.contract import Batch, Method, PreparesEpochs, TrainingImages
from fastssl.methods import deepcluster, deepcluster_v2
from fastssl.methods.deepcluster import DeepCluster
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


def training_images(batch=4, steps=3, count=14):
    """Two images of the source are in no batch of an epoch."""
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(count, generator=generator)[: batch * steps]
    crops = [torch.randn(batch, 3, *size, generator=generator) for size in ((32, 32), (32, 32), (16, 16)) * steps]
    batches = [Batch(tuple(crops[3 * i : 3 * i + 3]), index, None) for i, index in enumerate(order.split(batch))]
    everything = torch.randn(count, 3, 32, 32, generator=generator)
    plain = [Batch((everything[i : i + 5],), torch.arange(count)[i : i + 5], None) for i in range(0, count, 5)]
    return TrainingImages(count, steps, lambda: iter(batches), lambda: iter(plain)), batches


def tiny_v2(**changes):
    config = deepcluster_v2.Config.small()
    for name, value in {"dim": 8, "hidden": 16, "prototypes": (5, 4, 3), **changes}.items():
        setattr(config, name, value)
    return deepcluster_v2.build(config)


def test_v2_fills_its_memory_before_the_first_epoch_and_ignores_images_outside_it():
    model, (images, batches) = tiny_v2(), training_images()
    assert isinstance(model, Method) and isinstance(model, PreparesEpochs)
    before = model.backbone.bn1.running_mean.clone()
    model.before_epoch(images)
    assert model.training and not torch.equal(model.backbone.bn1.running_mean, before)  # the pass trains batch norms
    assert len(model.memory) == 12 and torch.equal(model.memory.index, torch.cat([b.index for b in batches]))
    absent = sorted(set(range(14)) - set(model.memory.index.tolist()))
    assert (model.assignments[:, absent] == -100).all()
    for head, clusters in zip(model.prototypes.values(), model.assignments[:, model.memory.index]):
        torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(head.out_features))
        assert clusters.min() >= 0 and clusters.max() < head.out_features
    batch = batches[0]._replace(index=torch.tensor([*absent, *batches[0].index[2:].tolist()]))
    loss, _ = model(batch)
    loss.backward()
    assert loss > 0 and all(p.grad is None and not p.requires_grad for p in model.prototypes.parameters())
    unknown, _ = model(batch._replace(index=torch.tensor(absent * 2)))
    assert unknown == 0
    filled = model.memory.embeddings.clone()
    model.before_epoch(images._replace(augmented=None))  # the memory is not filled again
    assert torch.equal(model.memory.embeddings, filled)


def test_v2_fills_its_memory_again_for_other_images_and_refuses_too_many_clusters():
    model, (images, _) = tiny_v2(), training_images()
    model.before_epoch(images)
    more, _ = training_images(steps=5, count=24)
    model.before_epoch(more)
    assert len(model.memory) == 20 and model.assignments.shape == (3, 24)
    other = tiny_v2()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.assignments, model.assignments) and len(other.memory) == 20
    sentence = "^deepcluster_v2: --prototypes must be at most the 12 images of an epoch, got 13$"
    with pytest.raises(ValueError, match=sentence):
        tiny_v2(prototypes=(5, 13)).before_epoch(images)


def test_assignments_keep_their_place_in_memory_for_cuda_graphs():
    """A graph that is replayed in the second epoch reads the memory that it read in the first."""
    images, _ = training_images()
    for model in (tiny(), tiny_v2()):
        model.before_epoch(images)
        place, old = model.assignments.data_ptr(), model.assignments.clone()
        model.assignments.fill_(7)
        model.before_epoch(images)
        assert model.assignments.data_ptr() == place and not (model.assignments == 7).any() and old.max() < 7


@pytest.mark.parametrize("method", [deepcluster, deepcluster_v2])
def test_too_many_clusters_are_refused_before_anything_is_written(tmp_path, method):
    """DeepCluster-v2 clusters the images of whole batches alone."""
    name = method.__name__.rpartition(".")[2]
    sentence = {"deepcluster": "--clusters must be at most the 50 images", "deepcluster_v2": "at most the 48 images of"}
    options = {"clusters": 60} if name == "deepcluster" else {"prototypes": (60, 60)}
    with pytest.raises(ValueError, match=sentence[name]):
        pretrain(name, "shapes:count=50", folder=tmp_path / "run", batch_size=16, workers=0, **options)
    assert not (tmp_path / "run").exists()


def tiny(**changes):
    config = deepcluster.Config.small()
    for name, value in {"clusters": 4, "components": 6, **changes}.items():
        setattr(config, name, value)
    return deepcluster.build(config)


def test_v1_clusters_features_in_evaluation_mode_and_draws_a_new_layer():
    model, (images, _) = tiny(), training_images()
    assert isinstance(model, Method) and isinstance(model, PreparesEpochs)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    model.before_epoch(images)
    for name, x in model.backbone.state_dict().items():
        assert torch.equal(x, state[f"backbone.{name}"]), name  # running statistics too
    assert model.training and not torch.equal(model.top_layer.weight, state["top_layer.weight"])
    assert model.top_layer.bias.eq(0).all() and abs(model.top_layer.weight.std() - 0.01) < 0.002
    sizes = torch.bincount(model.assignments, minlength=4)
    assert sizes.sum() == 14 and (sizes > 0).all()
    model.eval()
    x = deepcluster.whitened(torch.cat([model.features(b.views[0]) for b in images.plain()]).detach(), 6)
    means = torch.stack([x[model.assignments == k].mean(0) for k in range(4)])
    assert torch.equal(torch.cdist(x, means).argmin(1), model.assignments)  # k-means has converged
    with pytest.raises(ValueError, match=r"^deepcluster: --clusters must be at most the 14 images, got 15$"):
        tiny(clusters=15).before_epoch(images)


def test_v1s_loss_has_the_expectation_of_a_sampler_uniform_over_clusters():
    model, (images, _) = tiny(), training_images()
    model.before_epoch(images)
    model.eval()
    x = torch.cat([b.views[0] for b in images.plain()])
    loss, _ = model(Batch((x,), torch.arange(14), None))
    losses = F.cross_entropy(model.top_layer(model.features(x)), model.assignments, reduction="none")
    by_cluster = [losses[model.assignments == k].mean() for k in range(4)]
    torch.testing.assert_close(loss, torch.stack(by_cluster).mean())
    unknown, _ = model(Batch((x[:2],), torch.tensor([99, 99]), None))
    assert unknown == 0


def test_v1s_layer_has_no_momentum():
    optimizer = build_optimizer(tiny(), deepcluster.Config.paper().training, deepcluster.parameter_groups)
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-5, 1e-5]


def test_v1s_alexnet():
    alexnet = deepcluster.build(deepcluster.Config(clusters=50)).eval()
    names = {name: tuple(x.shape) for name, x in alexnet.backbone.state_dict().items()}
    assert names["sobel.1.weight"] == (2, 1, 3, 3) and names["features.0.weight"] == (96, 2, 11, 11)
    assert names["classifier.1.weight"] == (4096, 9216) and alexnet.top_layer.weight.shape == (50, 4096)
    assert not any(p.requires_grad for p in alexnet.backbone.sobel.parameters())
    across, down = alexnet.backbone.sobel(torch.arange(8.0).expand(1, 3, 8, 8))[0, :, 1:-1, 1:-1]
    torch.testing.assert_close(across, torch.full((6, 6), -8.0))
    torch.testing.assert_close(down, torch.zeros(6, 6), rtol=0, atol=1e-5)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = alexnet.backbone.before_relu(images)
        assert torch.equal(alexnet.features(images), before.relu()) and before.min() < 0
    for name, size in (("alexnet", 62), ("vgg16", 31)):
        with pytest.raises(ValueError, match=f"^SobelNet: {name} needs images of at least"):
            deepcluster.SobelNet(name, (size, 224))


@pytest.mark.slow
def test_v1s_vgg():
    vgg = deepcluster.SobelNet("vgg16", (32, 64)).eval()
    assert vgg.features[0].in_channels == 2 and vgg.classifier[0].in_features == 1024
    assert vgg(torch.randn(1, 3, 32, 64)).shape == (1, 4096)


def test_v1_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"^deepcluster: --sobel is for alexnet and vgg16, got resnet18$"):
        deepcluster.build(deepcluster.Config("resnet18"))
    with pytest.raises(ValueError, match=r"^deepcluster: --components must be at most the 256 features of resnet_mini"):
        tiny(components=300)
    assert isinstance(tiny(), DeepCluster) and deepcluster.Config.paper("resnet50").sobel is False


def test_defaults_are_those_of_the_papers():
    config = deepcluster.Config.paper()
    t = config.training
    assert (t.optimizer, t.lr, t.lr_end, t.weight_decay, t.decay_all) == ("sgd", 0.05, 0.05, 1e-5, True)
    assert (t.epochs, t.batch_size, t.momentum, config.clusters) == (200, 256, 0.9, 10000)
    assert (config.components, config.kmeans_rounds, config.sobel) == (256, 20, True)
    (view,) = config.augmentation.views
    assert (view.crop, view.flip_p, view.jitter, view.interpolation) == ((0.08, 1.0), 0.5, (0, 0, 0, 0), "bilinear")
    second = deepcluster_v2.Config.paper()
    assert (second.prototypes, second.tau, second.kmeans_rounds, second.dim) == ((3000,) * 3, 0.1, 10, 128)
    assert (second.training.freeze, second.training.lr, second.training.epochs) == ((), 0.3, 800)
