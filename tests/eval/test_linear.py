from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastssl.data.source import Subset, open_source
from fastssl.eval import linear
from fastssl.eval.features import block_features
from fastssl.eval.linear import sweep as sweep_settings
from fastssl.eval.linear import train_official
from fastssl.eval.protocols import Official, Setting, Sweep
from fastssl.methods import mae, moco_v1, moco_v2, moco_v3
from fastssl.nn import ViT


def clusters(count=300, classes=6, width=12, spread=0.3, seed=0):
    """Features around one centre per class, on axes of very different scale and offset."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    x = centres[labels] + spread * torch.randn(count, width, generator=generator)
    return x * torch.logspace(-2, 2, width) + torch.linspace(-50, 50, width), labels


@pytest.mark.parametrize("optimizer", ["lbfgs", "sgd", "lars"])
def test_separable_features_are_separated(optimizer):
    found, setting, _ = sweep_settings(clusters(), clusters(seed=1), 6, Sweep((optimizer,), epochs=100))
    assert found.top1 > 0.98
    assert found.top5 == 1.0
    assert setting.optimizer == optimizer


def test_lbfgs_is_the_minimum_that_scikit_learn_finds():
    from sklearn.linear_model import LogisticRegression

    (x, y), (tx, ty) = clusters(spread=1.5), clusters(spread=1.5, seed=1)
    standard = (x - x.mean(0)) / x.std(0, correction=0), (tx - x.mean(0)) / x.std(0, correction=0)
    l2 = 1e-3
    weight, bias = linear.fit_lbfgs(standard[0], y, 6, l2, 500)
    theirs = LogisticRegression(C=1 / (l2 * len(x)), max_iter=5000, tol=1e-8).fit(standard[0].numpy(), y.numpy())
    torch.testing.assert_close(weight, torch.tensor(theirs.coef_).float(), atol=2e-3, rtol=1e-2)
    ours = (F.linear(standard[1], weight, bias).argmax(1) == ty).float().mean().item()
    assert ours == pytest.approx(theirs.score(standard[1].numpy(), ty.numpy()), abs=0.01)


def test_lbfgs_in_parts_equals_lbfgs_on_the_whole(monkeypatch):
    x, y = clusters(spread=1.0)
    whole = linear.fit_lbfgs(F.normalize(x), y, 6, 1e-2, 50)
    monkeypatch.setattr(linear, "AT_ONCE", 70)
    for mine, theirs in zip(linear.fit_lbfgs(F.normalize(x), y, 6, 1e-2, 50), whole):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)


def test_settings_trained_together_equal_those_trained_alone():
    (x, y), sweep = clusters(), Sweep(epochs=3)
    settings = [Setting("sgd", 0.1), Setting("lars", 3.0), Setting("sgd", 3e38), Setting("sgd", 0.01)]
    together = linear._fit(x, y, 6, settings, sweep, 0)
    for setting, classifier in zip(settings, together):
        (alone,) = linear._fit(x, y, 6, [setting], sweep, 0)
        torch.testing.assert_close(classifier.weight, alone.weight, equal_nan=True)
    assert not together[2].weight.isfinite().all()  # it diverged, and did not touch the others


def test_a_setting_that_diverges_is_not_chosen():
    sweep = Sweep(("sgd",), lrs=(3e38, 0.1), epochs=5)
    assert sweep_settings(clusters(), clusters(seed=1), 6, sweep)[1] == Setting("sgd", 0.1)


def test_the_choice_does_not_use_the_held_out_split():
    """Wrong labels and features of the held-out split change the accuracy, not the chosen setting."""
    train, (x, y) = clusters(spread=2.0), clusters(spread=2.0, seed=1)
    sweep = Sweep(epochs=5)
    honest, setting, _ = sweep_settings(train, (x, y), 6, sweep)
    for poisoned in ((x, (y + 1) % 6), (-x, y), (x[:1], y[:1])):
        assert sweep_settings(train, poisoned, 6, sweep)[1] == setting
    assert honest.top1 > 0.5
    assert sweep_settings(train, (x, (y + 1) % 6), 6, sweep)[0].top1 < 0.2


def test_few_labels_and_refusals():
    x, y = clusters()
    rows = torch.stack([(y == c).nonzero()[0, 0] for c in range(6)])  # one of each: nothing to compare settings by
    found, setting, _ = sweep_settings((x[rows], y[rows]), clusters(seed=1), 6, Sweep(epochs=20))
    assert setting == Sweep().settings[0]
    assert found.top1 > 0.9
    with pytest.raises(ValueError, match=r"needs two labelled images or more, got 1$"):
        sweep_settings((x[:1], y[:1]), (x, y), 6, Sweep())
    with pytest.raises(ValueError, match=r"^eval: some of the encoder's features are not finite$"):
        sweep_settings((x * torch.inf, y), (x, y), 6, Sweep())


def test_the_same_seed_gives_the_same_numbers_and_leaves_the_global_generator():
    before = torch.random.get_rng_state()
    first, second = (
        sweep_settings(clusters(spread=2.0), clusters(seed=1), 6, Sweep(epochs=3), seed=4) for _ in range(2)
    )
    assert first == second
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_papers_numbers():
    assert mae.linear_probe("vit_base") == Official(90, 16384, "lars", 0.1, 0.0, 10)
    assert mae.linear_probe("vit_base").pieces == 32  # the paper's 32 GPUs
    for method in (moco_v1, moco_v2):
        training = method.linear_probe("resnet50").training
        assert (training.optimizer, training.lr, training.epochs, training.lr_drops) == ("sgd", 30.0, 100, (60, 80))
    assert moco_v3.linear_probe("resnet50").lr == 0.1
    assert moco_v3.linear_probe("vit_small").lr == 3.0
    assert Official(batch_size=1025).pieces == 5  # of 205: equal parts


def small(**changes):
    return Official(**{"epochs": 6, "batch_size": 60, "warmup_epochs": 0, "optimizer": "sgd", "lr": 1.0, **changes})


@pytest.mark.parametrize("standardise", [True, False])
def test_the_official_protocol_does_not_change_the_encoder(standardise):
    """The encoder, running statistics included, stays bit-equal; the probe learns through the augmentations."""
    method = moco_v1.build(moco_v1.Config.small()).eval()
    before = {name: x.clone() for name, x in method.state_dict().items()}
    train, test = (Subset(open_source("digits", split), range(240)) for split in ("train", "test"))
    random = torch.random.get_rng_state()
    how = small(epochs=8, lr=1.0, standardise=standardise)
    first, second = (train_official(method.features, train, test, how, (16, 16), 1) for _ in range(2))
    assert first == second
    assert first.top1 > (0.3 if standardise else 0)  # unscaled features of fresh weights hardly differ
    assert all(torch.equal(x, before[name]) for name, x in method.state_dict().items())
    assert all(p.grad is None for p in method.parameters())
    assert torch.equal(random, torch.random.get_rng_state())


def test_a_step_in_parts_equals_that_of_the_whole_batch():
    train, test = (Subset(open_source("digits", split), range(120)) for split in ("train", "test"))

    def found(**changes):
        how = small(epochs=20, standardise=False, lr=0.05, **changes)
        return train_official(lambda images: images.flatten(1), train, test, how, (8, 8))

    whole = found()
    assert whole.top1 > 0.5
    assert whole == found(at_once=20)
    with pytest.raises(ValueError, match=r"^eval: --batch-size must be at most the 120 labelled images, got 121$"):
        found(batch_size=121)


def test_undecodable_images_do_not_stop_the_probe(tmp_path):
    for i in range(50):
        path = tmp_path / "ab"[i % 2] / f"{i:03}.png"
        path.parent.mkdir(exist_ok=True)
        if i % 10 < 2:
            path.write_bytes(b"broken")
        else:
            Image.new("RGB", (20, 16), (255 * (i % 2), 99, i)).save(path)
    train, test = (open_source(f"folder:{tmp_path}", split) for split in ("train", "test"))
    found = train_official(lambda images: images.flatten(1), train, test, small(batch_size=8), (16, 16))
    assert found == (1.0, None)  # red or not; two classes have no top-5


def test_kinds_of_features():
    """The kind and the setting with the best validation accuracy are chosen together, and named."""
    torch.manual_seed(0)
    y = torch.arange(400) % 4
    noise, signal = torch.randn(400, 6), F.one_hot(y, 4) + 0.3 * torch.randn(400, 4)
    x = torch.cat([noise, signal, noise], 1)
    numbers = Sweep(("lbfgs",), epochs=20)
    widths = {"first": 6, "second": 4, "third": 6}
    best, setting, kind = sweep_settings((x[:300], y[:300]), (x[300:], y[300:]), 4, numbers, kinds=widths)
    alone = sweep_settings((signal[:300], y[:300]), (signal[300:], y[300:]), 4, numbers)
    assert kind == "second" and (best, setting) == alone[:2] and best.top1 > 0.9


def test_features_of_blocks():
    vit = ViT(16, 4, embed_dim=16, depth=3, num_heads=2, reg_tokens=2).eval()
    method = SimpleNamespace(encoder=vit)
    images = torch.randn(2, 3, 16, 16)
    kinds, features = block_features(method, (1, 3))
    assert kinds == {
        "class token of last block": 16,
        "class token of last block, patch mean": 32,
        "class token of last 3 blocks": 48,
        "class token of last 3 blocks, patch mean": 64,
    }
    with torch.no_grad():
        table, tokens = features(images), vit.forward_features(images)
    one, one_mean, three, _ = table.split(list(kinds.values()), 1)
    torch.testing.assert_close(one, tokens[:, 0])
    torch.testing.assert_close(one_mean, torch.cat([tokens[:, 0], tokens[:, 3:].mean(1)], 1))
    torch.testing.assert_close(three[:, 32:], tokens[:, 0])
    vit.blocks = vit.blocks[:2]  # the first two blocks alone give the second of the three
    with torch.no_grad():
        torch.testing.assert_close(three[:, 16:32], vit.forward_features(images)[:, 0])
    without = ViT(16, 4, embed_dim=16, depth=2, num_heads=2, class_token=False, global_pool="avg", fc_norm=False)
    assert block_features(SimpleNamespace(encoder=without), (2,))[0] == {"patch mean of last 2 blocks": 32}
    with pytest.raises(ValueError, match="--blocks must be at most the 2 blocks of the encoder, got 4"):
        block_features(SimpleNamespace(encoder=without), (1, 4))
    with pytest.raises(ValueError, match="--blocks is for ViTs"):
        block_features(SimpleNamespace(encoder=torch.nn.Linear(1, 1)), (1,))
