import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastssl.contract import Batch, Method, RanksNegatives
from fastssl.methods import instdisc, simsiam
from fastssl.methods.instdisc import InstDisc
from fastssl.nn.bank import BankNCE, MemoryBank, bank_cross_entropy, draw_rows
from fastssl.pretraining import new_run, pretrain
from fastssl.weights import export, load_initial_weights, load_weights
from tests.support.contract import refused, rejects
from tests.support.golden import part, read
from tests.support.trainers import constant_rate_trainer
from tests.train.test_loop import Syncs

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def golden_method(**options):
    """InstDisc whose encoder is the identity: the golden file begins with features."""
    golden, meta = read("instdisc")
    model = InstDisc(nn.Identity(), MemoryBank(meta["n_data"], meta["dim"], meta["momentum"]), meta["K"], **options)
    model.double().bank.memory.copy_(golden["nce.state.memory"])
    return model, golden, meta


def test_three_golden_steps():
    """Loss, gradient, Z, and the bank after each step. The features have unit length but for rounding to float32."""
    model, golden, _ = golden_method(tau=0.07)
    for step in range(3):
        expected = part(golden, f"nce.step{step}.")
        indices = expected["input.drawn"].clone()
        indices[:, 0] = expected["input.index"]
        features = expected["input.feature"].double().requires_grad_()
        (loss, _, _), z = model.criterion(features, model.bank.memory, indices)
        loss = loss.mean()
        torch.testing.assert_close(loss.detach(), expected["loss"], **EXACT)
        torch.testing.assert_close(torch.autograd.grad(loss, features)[0], expected["grad.feature"], **EXACT)
        torch.testing.assert_close(z, expected["Z"], **EXACT)
        torch.testing.assert_close(model.bank.memory, expected["memory_before_backward"], **EXACT)
        model.pending = [(expected["input.index"], features.detach(), z)]
        model.after_step(step / 3)
        torch.testing.assert_close(model.bank.memory, expected["memory"], **EXACT)
        torch.testing.assert_close(model.criterion.z, golden["nce.step0.Z"], **EXACT)


def test_golden_softmax_over_the_whole_bank():
    model, golden, meta = golden_method()
    expected = part(golden, "nce.step0.")
    features, index = expected["input.feature"].double().requires_grad_(), expected["input.index"]
    loss = bank_cross_entropy(features, model.bank.memory, index, meta["T"]).loss.mean()
    torch.testing.assert_close(loss.detach(), golden["softmax.loss"], **EXACT)
    torch.testing.assert_close(torch.autograd.grad(loss, features)[0], golden["softmax.grad.feature"], **EXACT)
    model.bank.update(index, features)
    torch.testing.assert_close(model.bank.memory, golden["softmax.memory"], **EXACT)


def test_bank_cross_entropy_is_cross_entropy():
    q, memory = F.normalize(torch.randn(7, 5).double()).requires_grad_(), F.normalize(torch.randn(30, 5).double())
    index = torch.randint(30, (7,))
    for tau in (0.01, 0.1, 2.0):
        loss, rank = bank_cross_entropy(q, memory, index, tau)
        logits = q @ memory.T / tau
        wanted = F.cross_entropy(logits, index, reduction="none")
        torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-12)
        gradients = [torch.autograd.grad(x.sum(), q)[0] for x in (loss, wanted)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
        assert torch.equal(rank, (logits > logits.gather(1, index[:, None]) + 1e-9).sum(1))


def test_rows_are_drawn_uniformly_from_the_seeds_alone():
    index, seed = torch.arange(400), torch.arange(400) * 7919
    rows = draw_rows(index, seed, 500, 20)
    assert torch.equal(rows[:, 0], index) and rows.shape == (400, 501)
    assert torch.equal(draw_rows(index[3:5], seed[3:5], 500, 20), rows[3:5])
    counts = rows[:, 1:].flatten().bincount(minlength=20)
    assert len(counts) == 20 and ((counts - 10_000).abs() < 500).all()  # five standard deviations
    pairs = (20 * rows[:, 1:-1] + rows[:, 2:]).flatten().bincount(minlength=400)
    assert len(pairs) == 400 and ((pairs - 499).abs() < 140).all()
    assert draw_rows(index, None, 500, 20).shape == rows.shape


def tiny(**changes):
    config = instdisc.Config.small()
    for name, value in {"dim": 16, "images": 50, "nce_k": 20, "softmax": False, **changes}.items():
        setattr(config, name, value)
    return instdisc.build(config)


def batch_of(count=8, first=0):
    index = torch.arange(first, first + count)
    return Batch((torch.randn(count, 3, 32, 32),), index, index, index)


@pytest.mark.parametrize("changes", [{}, {"softmax": True}, {"nce_k": 0}])
def test_it_fulfils_the_contract_and_moves_the_rows_of_its_images(changes):
    model = tiny(**changes)
    assert isinstance(model, Method) and isinstance(model, RanksNegatives)
    before, batch = model.bank.memory.clone(), batch_of()
    loss, metrics = model(batch)
    loss.backward()
    assert torch.equal(model.bank.memory, before) and metrics.keys() == {"top1"}
    features = model.pending[0][1]
    model.after_step(0.1)
    moved = F.normalize(0.5 * before[:8] + 0.5 * features)
    torch.testing.assert_close(model.bank.memory[:8], moved)
    assert torch.equal(model.bank.memory[8:], before[8:]) and model.pending == []
    with torch.no_grad():
        rank, count = model.ranks(batch)
    assert rank.shape == (8,) and count == {0: 49, 20: 20}[model.nce_k] and model.pending == []
    assert model.eval().features(batch.views[0]).shape == (8, 256)


def test_z_is_that_of_the_first_step_and_survives_a_state_dict():
    model = tiny()
    for step in range(2):
        model(batch_of())[0].backward()
        model.after_step(step / 2)
        if step == 0:
            first = model.criterion.z.clone()
    assert first > 0 and torch.equal(model.criterion.z, first)
    loaded = tiny()
    loaded.load_state_dict(model.state_dict())
    assert loaded.criterion.has_z and torch.equal(loaded.criterion.z, first)
    assert not BankNCE().has_z
    with torch.no_grad():
        model.eval(), loaded.eval()
        batch = batch_of()
        assert torch.equal(model(batch)[0], loaded(batch)[0])


def test_only_the_first_step_waits_for_the_device():
    config = instdisc.Config.small()
    config.images, config.nce_k, config.softmax = 50, 20, False
    trainer = constant_rate_trainer(instdisc.build(config), config.training, 0.1)
    trainer.step(iter([batch_of()]))
    with Syncs() as syncs:
        trainer.step(iter([batch_of()]))
    assert syncs.seen == []


def test_z_that_is_not_finite_is_not_kept():
    criterion = BankNCE()
    criterion.keep_z([torch.tensor(torch.nan)])
    assert not criterion.has_z and criterion.z == -1
    criterion.keep_z([torch.tensor(2.0), torch.tensor(4.0)])
    criterion.keep_z([torch.tensor(9.0)])
    assert criterion.z == 3


def test_released_weights_load(tmp_path):
    """The official checkpoint has the names of a ResNet, fc included; its bank is in a module pickled beside them."""
    model, source = tiny(), tiny()
    state = {f"module.{name}": x for name, x in source.backbone.state_dict().items()}
    torch.save({"state_dict": state, "arch": "resnet_mini"}, tmp_path / "lemniscate.pth.tar")
    notes = load_initial_weights(model, tmp_path / "lemniscate.pth.tar")
    for name, x in source.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], x), name
    assert [note.partition(" has ")[2] for note in notes] == [
        "no bank and criterion: bank and criterion start at random"
    ]


def test_a_method_trained_on_other_images_gives_all_but_its_bank(tmp_path):
    """A bank's rows belong to the images it was trained on."""
    source, model = tiny(), tiny(images=9)
    other = simsiam.build(simsiam.Config.small())
    path = export(source, "safetensors", tmp_path / "whole")
    bank = model.bank.memory.clone()
    notes = load_initial_weights(model, path)
    assert notes == [f"{path} has bank and criterion of another size: left out, so that they start at random"]
    assert torch.equal(model.bank.memory, bank)
    assert torch.equal(model.backbone.fc.weight, source.backbone.fc.weight)
    load_weights(other, path, encoder_only=True)
    assert torch.equal(other.encoder.conv1.weight, source.encoder.conv1.weight)


def test_the_bank_has_a_row_for_each_training_image(tmp_path):
    run = new_run("instdisc", "digits")
    images = len(run.source("train"))
    assert run.config.images == images and run.build().bank.memory.shape == (images, 128)
    sentence = (
        f"pretrain: --images must be at least the number of training images, {images}, got 50: the method keeps a "
        "feature of each; start a new run (--folder)"
    )
    refused(sentence, ValueError, pretrain, "instdisc", "digits", images=50, folder=tmp_path / "run", tensorboard=False)
    assert not (tmp_path / "run").exists()


def test_refusals():
    with pytest.raises(ValueError, match=r"^instdisc: --images must be the number of training images, got None"):
        tiny(images=None)
    rejects("MemoryBank", "images", "0", ValueError, MemoryBank, 0, 4)
    rejects("MemoryBank", "momentum", "2", ValueError, MemoryBank, 3, 4, 2)
    with pytest.raises(TypeError, match="no call"):
        MemoryBank(3, 4)(torch.zeros(1))


def test_defaults_are_those_of_the_paper():
    config = instdisc.Config.paper()
    t = config.training
    assert (t.optimizer, t.lr, t.weight_decay, t.decay_all, t.momentum) == ("sgd", 0.03, 1e-4, True, 0.9)
    assert (t.epochs, t.batch_size, t.lr_drops, t.lr_by_epoch) == (200, 256, (120, 160), True)
    assert (config.dim, config.nce_k, config.tau, config.bank_momentum, config.softmax) == (128, 4096, 0.07, 0.5, False)
    (view,) = config.augmentation.views
    assert (view.crop, view.jitter, view.jitter_p) == ((0.2, 1.0), (0.4, 0.4, 0.4, 0.4), 1.0)
    assert (view.grayscale_p, view.grayscale_first, view.flip_p, view.blur_p) == (0.2, True, 0.5, 0.0)
    memory = MemoryBank(2000, 128).memory
    assert memory.abs().max() <= (3 / 128) ** 0.5 and abs(memory.norm(dim=1).mean() - 1) < 0.01
    probe = instdisc.linear_probe("resnet50")
    assert (probe.optimizer, probe.lr, probe.epochs, probe.lr_drops) == ("sgd", 30.0, 100, (60, 80))
