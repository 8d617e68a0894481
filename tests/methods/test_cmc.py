import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastssl.contract import Batch, Method, RanksNegatives
from fastssl.data.augmentation import IMAGENET_MEAN, IMAGENET_STD
from fastssl.data.lab import lab_channels, rgb_to_lab
from fastssl.methods import cmc
from fastssl.methods.cmc import CMC, LabEncoders
from fastssl.nn.bank import MemoryBank
from fastssl.nn.resnet import HalfResNet, build_resnet
from fastssl.weights import export, load_initial_weights
from tests.support.golden import part, read

EXACT = {"rtol": 1e-9, "atol": 1e-10}


class Features(LabEncoders):
    """Stands for the encoders: the golden file begins with features of L and ab, side by side in the view."""

    def both(self, images):
        return images.chunk(2, 1)


@pytest.mark.parametrize("softmax", [False, True])
def test_two_golden_steps(softmax, monkeypatch):
    golden, meta = read("cmc")
    monkeypatch.setattr("fastssl.methods.cmc.l2_normalize", lambda x: x)  # they have unit length but for rounding
    banks = [MemoryBank(meta["n_data"], meta["dim"], meta["momentum"]) for _ in range(2)]
    model = CMC(Features(nn.Identity(), nn.Identity()), *banks, meta["K"], meta["T"], softmax).double()
    for name, bank in (("l", model.bank_l), ("ab", model.bank_ab)):
        bank.memory.copy_(golden[f"state.memory_{name}"])
    for step in range(2):
        given = part(golden, f"step{step}.input.")
        expected = part(golden, f"{'softmax' if softmax else 'nce'}.step{step}.")
        features = torch.cat([given["l"], given["ab"]], 1).double().requires_grad_()
        indices = given["idx"].clone()
        indices[:, 0] = given["index"]
        model.draw = lambda batch, indices=indices: indices
        loss, metrics = model(Batch((features,), given["index"], None))
        torch.testing.assert_close(loss.detach(), expected["loss_l"] + expected["loss_ab"], **EXACT)
        gradients = torch.autograd.grad(loss, features)[0].chunk(2, 1)
        model.after_step(step / 2)
        for i, (name, bank) in enumerate((("l", model.bank_l), ("ab", model.bank_ab))):
            torch.testing.assert_close(metrics[f"loss_{name}"], expected[f"loss_{name}"], **EXACT)
            torch.testing.assert_close(gradients[i], expected[f"grad.{name}"], **EXACT)
            torch.testing.assert_close(bank.memory, expected[f"memory_{name}"], **EXACT)
            torch.testing.assert_close(getattr(model, f"criterion_{name}").z, expected["Z"][i], **EXACT)


KNOWN = {  # sRGB → L, a, b by scikit-image's rgb2lab
    (0.0, 0.0, 0.0): (0.0, 0.0, 0.0),
    (1.0, 1.0, 1.0): (100.0, -0.0025, 0.0047),
    (1.0, 0.0, 0.0): (53.2406, 80.0923, 67.2028),
    (0.0, 1.0, 0.0): (87.7351, -86.1829, 83.1797),
    (0.0, 0.0, 1.0): (32.2957, 79.1878, -107.8602),
    (0.5, 0.5, 0.5): (53.3890, -0.0015, 0.0028),
}


def test_lab_of_known_colours():
    rgb, lab = (torch.tensor(list(values), dtype=torch.float64) for values in (KNOWN.keys(), KNOWN.values()))
    made = rgb_to_lab(rgb[:, :, None, None])[:, :, 0, 0]
    torch.testing.assert_close(made, lab, rtol=0, atol=0.01)
    torch.testing.assert_close(rgb_to_lab(rgb.float()[:, :, None, None])[:, :, 0, 0].double(), made, rtol=0, atol=1e-3)


def test_channels_of_normalised_images_fill_the_range_of_1():
    colours = torch.cartesian_prod(*[torch.linspace(0, 1, 9)] * 3).double()[:, :, None, None]
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    lightness, ab = lab_channels((colours - mean) / std, IMAGENET_MEAN, IMAGENET_STD)
    assert lightness.shape == (729, 1, 1, 1) and ab.shape == (729, 2, 1, 1)
    for channel in (lightness, ab[:, 0], ab[:, 1]):
        assert abs(channel.min() + 1) < 1e-3 and abs(channel.max() - 1) < 1e-3
    grey = colours[(colours == colours[:, :1]).all(1).flatten()]
    assert rgb_to_lab(grey)[:, 1:].abs().max() < 0.01


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet_mini"])
def test_half_resnets_have_the_names_of_resnets_and_half_their_channels(name):
    half, whole = HalfResNet(name, 2, 16), build_resnet(name, 16)
    names = whole.state_dict()
    assert half.state_dict().keys() == names.keys()
    for key, x in half.state_dict().items():
        if x.ndim == 4 and key != "conv1.weight":
            assert [2 * n for n in x.shape[:2]] == list(names[key].shape[:2]), key
    assert half.conv1.weight.shape[:2] == (names["conv1.weight"].shape[0] // 2, 2)
    assert half.fc.in_features == whole.fc.in_features // 2
    assert half(torch.randn(2, 2, 64, 64)).shape == (2, 16)
    with pytest.raises(ValueError, match="unknown backbone 'vgg'"):
        HalfResNet("vgg", 2, 16)
    assert HalfResNet("resnet18", 1, 16, small_images=True)(torch.randn(2, 1, 32, 32)).shape == (2, 16)


def tiny(**changes):
    config = cmc.Config.small()
    for name, value in {"dim": 16, "images": 50, "nce_k": 20, **changes}.items():
        setattr(config, name, value)
    return cmc.build(config)


@pytest.mark.parametrize("softmax", [False, True])
def test_it_fulfils_the_contract_and_moves_the_rows_of_its_images(softmax):
    model = tiny(softmax=softmax)
    assert isinstance(model, Method) and isinstance(model, RanksNegatives)
    before, index = model.bank_l.memory.clone(), torch.arange(3, 11)
    batch = Batch((torch.randn(8, 3, 32, 32),), index, index, index)
    loss, metrics = model(batch)
    loss.backward()
    torch.testing.assert_close(loss.detach(), metrics["loss_l"] + metrics["loss_ab"])
    features = model.pending[0][1]
    model.after_step(0.1)
    torch.testing.assert_close(model.bank_l.memory[3:11], F.normalize(0.5 * before[3:11] + 0.5 * features))
    rank, count = model.ranks(batch)
    assert rank.shape == (16,) and count == 20
    assert model.eval().features(batch.views[0]).shape == (8, 256)
    assert model.criterion_l.has_z == model.criterion_ab.has_z == (not softmax)


def test_official_weights_load(tmp_path):
    """The official file has the encoders under the names of two wrappers, and the banks apart."""
    model, source = tiny(), tiny()
    names = [name for name in source.state_dict() if name.startswith("encoder.")]
    assert {name.split(".")[1] for name in names} == {"l_to_ab", "ab_to_l"}
    wrapped = {"module." + name.replace("encoder.", "encoder.module."): source.state_dict()[name] for name in names}
    torch.save({"model": wrapped}, tmp_path / "cmc.pth")
    notes = load_initial_weights(model, tmp_path / "cmc.pth")
    for name in names:
        assert torch.equal(model.state_dict()[name], source.state_dict()[name]), name
    assert len(notes) == 1 and "bank_ab" in notes[0] and "at random" in notes[0]
    with pytest.raises(ValueError, match=r"^export: neither timm nor torchvision has CMC's two encoders"):
        export(model, "torchvision", tmp_path / "encoder.pth")


def test_defaults_are_those_of_the_code():
    config = cmc.Config.paper()
    t = config.training
    assert (t.optimizer, t.lr * t.batch_size / 256, t.weight_decay, t.decay_all) == ("sgd", 0.03, 1e-4, True)
    assert (t.epochs, t.batch_size, t.lr_drops, t.lr_by_epoch) == (240, 128, (120, 160, 200), True)
    assert (config.dim, config.nce_k, config.tau, config.bank_momentum) == (128, 16384, 0.07, 0.5)
    (view,) = config.augmentation.views
    assert (view.crop, view.flip_p, view.jitter, view.grayscale_p) == ((0.08, 1.0), 0.5, (0, 0, 0, 0), 0.0)
    config.infomin_views = True
    (view,) = config.augmentation.views
    assert (view.jitter, view.jitter_p, view.grayscale_p, view.blur_p) == ((0.8, 0.8, 0.8, 0.2), 0.8, 0.2, 0.5)
    with pytest.raises(ValueError, match=r"^cmc: --images must be the number of training images, got None"):
        tiny(images=None)
    assert cmc.linear_probe("resnet50").lr == 30.0
