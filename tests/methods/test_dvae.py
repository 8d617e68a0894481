"""dVAE: schedules, codes in use, names, weights, and ten steps beside a transcription of the paper's formulas."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fastssl.contract import Autoencodes, Batch, DefersUpdates, Method
from fastssl.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, evaluation
from fastssl.data.loader import Loader
from fastssl.data.source import open_source
from fastssl.methods import dvae
from fastssl.nn.dvae import Encoder, load_tokenizer
from fastssl.nn.gumbel import gumbel_noise
from fastssl.train.config import Execution, Training
from fastssl.train.trainer import Trainer
from fastssl.weights import export, load_initial_weights, load_weights
from tests.support.contract import refused
from tests.support.golden import part, read

TINY = {
    "network": "dalle",
    "image_size": (8, 12),
    "codes": 20,
    "width": 4,
    "inner": 6,
    "groups": 3,
    "blocks": 1,
    "kl_weight_end": None,
}


def tiny(**changes):
    config = dvae.Config.small()
    for name, value in {**TINY, **changes}.items():
        setattr(config, name, value)
    return config


def images(count=6, size=(8, 12)):
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (torch.rand(count, 3, *size) - mean) / std


def batch(count=6, first=0):
    numbers = torch.arange(first, first + count)
    return Batch((images(count),), numbers, -torch.ones_like(numbers), numbers * 7919)


@pytest.mark.parametrize(("network", "width"), [("dalle", 16), ("beit", 4)])
def test_it_fulfils_the_contract(network, width):
    model = dvae.build(tiny(network=network)).eval()
    assert isinstance(model, Method) and isinstance(model, Autoencodes) and isinstance(model, DefersUpdates)
    assert model.features(images()).shape == (6, width)
    assert model.encoder.codes(images()).shape == (6, 2, 3)
    assert model.autoencode(images()).shape == (6, 3, 8, 12)


def test_defaults_are_those_of_the_paper():
    config = dvae.Config.paper()
    assert (config.codes, config.width, config.inner, config.groups, config.blocks) == (8192, 256, 128, 4, 2)
    assert (config.tau, config.tau_end, config.kl_weight, config.ema_momentum) == (1.0, 1 / 16, 6.6, 0.999)
    assert (config.tau_share * 3e6, config.kl_share * 3e6) == (150_000, 5_000)
    t = config.training
    assert (t.optimizer, t.weight_decay, t.betas, t.batch_size) == ("adamw", 1e-4, (0.9, 0.999), 512)
    assert (t.lr * 2, t.lr_end * 2) == (1e-4, 1.25e-6)  # per 256 images


def test_schedules():
    model = dvae.build(tiny(tau=1.0, tau_end=0.25, tau_share=0.5, kl_weight=4.0, kl_share=0.2))
    seen = []
    for progress in (0.0, 0.1, 0.25, 0.5, 1.0):
        model.before_step(progress)
        seen.append((model.tau.item(), model.kl_weight.item()))
    expected = [(1.0, 0.0), (0.25 + 0.375 * (1 + math.cos(0.2 * math.pi)), 2.0), (0.625, 4.0), (0.25, 4.0), (0.25, 4.0)]
    assert [pytest.approx(pair, rel=1e-6) for pair in expected] == seen
    model = dvae.build(tiny(kl_weight=4.0, kl_weight_end=1.0, kl_share=0.5))
    seen = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        model.before_step(progress)
        seen.append(model.kl_weight.item())
    assert seen == pytest.approx([0.0, 0.5 * (1 + 1.5 * (1 + math.cos(0.25 * math.pi))), 2.5, 1.0], rel=1e-6)


def test_golden_loss_by_the_method():
    """The method's own way to the golden loss: images normalised as for ImageNet, in float32."""
    golden, meta = read("dvae")
    changes = {"image_size": (24, 32), "codes": 24, "width": 4, "inner": 8, "groups": 4, "blocks": 2}
    model = dvae.build(tiny(**changes, kl_weight=meta["beta"], tau_end=meta["tau"], tau_share=0.5, kl_share=0.5))
    model.load_state_dict({**model.state_dict(), **part(golden, "state.")}, strict=True)
    model.before_step(0.5)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    given = (golden["input.images"] - mean) / std
    noise = golden["input.gumbel"]
    nll, kl, _ = model.dvae.losses(given, noise.clone(), model.tau)
    loss = nll + model.kl_weight * kl / (3 * 64)
    torch.testing.assert_close(loss, golden["loss"], rtol=1e-5, atol=1e-5)


def test_forward_reads_and_after_step_writes():
    model = dvae.build(tiny(ema_momentum=0.5))
    before = copy.deepcopy(model.state_dict())
    loss, metrics = model(batch())
    loss.backward()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert set(metrics) == {"nll", "kl", "perplexity", "codes_used", "tau"}
    assert 1 <= metrics["perplexity"] <= 20 and 0 < metrics["codes_used"] <= 1
    torch.optim.SGD(model.dvae.parameters(), lr=0.1).step()
    model.after_step(0.01)
    state = model.state_dict()
    assert state["counts"].sum() == 6 * 2 * 3 and not model.pending
    name = "encoder.blocks.input.w"
    torch.testing.assert_close(state[f"ema.{name}"], (before[name] + state[name]) / 2)


def test_few_codes_in_use_are_told_at_the_end_of_an_epoch_alone(capsys):
    model = dvae.build(tiny(codes=30, training=Training(4, 16, "adamw", 1e-3, 0.0)))
    model.pending = [torch.tensor([5, 0, 40, *[0] * 27])]
    model.after_step(0.2)
    assert not capsys.readouterr().out and model.counts.sum() == 45
    model.pending = [torch.tensor([5, 0, 40, *[0] * 27])]
    model.after_step(0.25)
    assert capsys.readouterr().out == (
        "dvae: epoch 1 used 2 of 30 codes: they collapse; a larger --kl-weight, a slower --tau-share or a smaller --lr "
        "keeps more of them in use\n"
    )
    assert not model.counts.any()
    model.pending = [torch.tensor([5, 4, 40, *[0] * 27])]
    model.after_step(0.5)
    assert not capsys.readouterr().out


def test_noise_is_that_of_the_samples():
    """Two halves of a batch have the loss of the whole."""
    model, whole = dvae.build(tiny()), batch()
    halves = [Batch((whole.views[0][rows],), *(x[rows] for x in whole[1:4])) for rows in (slice(0, 3), slice(3, 6))]
    together, apart = model(whole)[0], [model(half)[0] for half in halves]
    torch.testing.assert_close(together, torch.stack(apart).mean())
    assert model(whole._replace(seed=whole.seed + 1))[0] != together


def plain_forward(p, x, groups, blocks, decoder=False):
    """The official graph from its names alone."""
    x = F.conv2d(x, p["blocks.input.w"], p["blocks.input.b"], padding=p["blocks.input.w"].shape[-1] // 2)
    for g in range(1, groups + 1):
        for b in range(1, blocks + 1):
            prefix, y = f"blocks.group_{g}.block_{b}", x
            for i in range(1, 5):
                w = p[f"{prefix}.res_path.conv_{i}.w"]
                y = F.conv2d(y.relu(), w, p[f"{prefix}.res_path.conv_{i}.b"], padding=w.shape[-1] // 2)
            if f"{prefix}.id_path.w" in p:
                x = F.conv2d(x, p[f"{prefix}.id_path.w"], p[f"{prefix}.id_path.b"])
            x = x + y / (groups * blocks) ** 2
        if g < groups:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3) if decoder else F.max_pool2d(x, 2)
    return F.conv2d(x.relu(), p["blocks.output.conv.w"], p["blocks.output.conv.b"])


def plain_loss(encoder, decoder, x, noise, tau, beta):
    """(sum of −ln f over the values + β · sum of KL over the places) / values, of each image, then the mean."""
    logits = plain_forward(encoder, x, 3, 1)
    relaxed = ((logits + noise) / tau).softmax(1)
    location, log_b = plain_forward(decoder, relaxed, 3, 1, decoder=True).chunk(2, 1)
    logit = (x / (1 - x)).log()
    density = (-(logit - location).abs() / log_b.exp()).exp() / (2 * log_b.exp() * x * (1 - x))
    q = logits.softmax(1)
    kl = (q * (q / (1 / logits.shape[1])).log()).sum(1)
    return ((-density.log()).flatten(1).sum(1) + beta * kl.flatten(1).sum(1)).div(x[0].numel()).mean()


def test_ten_steps_beside_a_transcription():
    """Losses, weights and their averages in float64; schedules, AdamW and the average are written out."""
    steps, epochs, per_epoch, lr, momentum = 10, 5, 2, 3e-3, 0.9
    training = Training(epochs, 256, "adamw", lr, 0.05, warmup_epochs=1, lr_end=1e-4, decay_all=True)
    config = tiny(tau_end=1 / 16, tau_share=0.6, kl_weight=3.0, kl_share=0.4, ema_momentum=momentum, training=training)
    torch.manual_seed(1)
    model = dvae.build(config).double()
    parts = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in (model.dvae.encoder, model.dvae.decoder)]
    averages = [{n: x.clone() for n, x in p.items()} for p in parts]
    moments = [{n: [torch.zeros_like(x)] * 2 for n, x in p.items()} for p in parts]
    batches = [batch(first=6 * i) for i in range(steps)]
    batches = [b._replace(views=(b.views[0].double(),)) for b in batches]
    trainer = Trainer(model, training, Execution(), per_epoch)
    mean, std = (torch.tensor(x).double().view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    model.dvae.encoder.scale.copy_(0.8 * std)  # the constants of float32 in float64
    model.dvae.encoder.shift.copy_(0.8 * mean + 0.1)
    for step, one in enumerate(batches):
        result = trainer.step(iter([one]))
        t = step / steps
        tau = 1 / 16 + (1 - 1 / 16) * (1 + math.cos(math.pi * min(t / 0.6, 1))) / 2
        beta = 3.0 * min(t / 0.4, 1)
        rate = lr * step / 2 if step < 2 else 1e-4 + (lr - 1e-4) * (1 + math.cos(math.pi * (step - 2) / 8)) / 2
        p = [{n: x.requires_grad_() for n, x in some.items()} for some in parts]
        x = 0.8 * (one.views[0] * std + mean) + 0.1
        loss = plain_loss(*p, x, gumbel_noise(one.seed, (20, 2, 3)).double(), tau, beta)
        torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-9, atol=1e-9)
        for i, some in enumerate(p):
            gradients = dict(zip(some, torch.autograd.grad(loss, some.values(), retain_graph=True)))
            for n, g in gradients.items():
                m, v = moments[i][n]
                moments[i][n] = m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                change = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                parts[i][n] = (some[n].detach() * (1 - rate * 0.05) - rate * change).detach()
                averages[i][n] = momentum * averages[i][n] + (1 - momentum) * parts[i][n]
    for network, average in ((model.dvae, averages), (model.ema.module, averages)):
        expected = parts if network is model.dvae else average
        for some, module in zip(expected, (network.encoder, network.decoder)):
            for n, value in some.items():
                torch.testing.assert_close(module.get_parameter(n).detach(), value, rtol=1e-9, atol=1e-9)


def test_the_network_of_beits_code(tmp_path):
    """Its loss with its weight of the divergence, which is of a sum: ours is of a value."""
    model = dvae.build(tiny(network="beit", kl_weight=0.01 * 36 * 48, kl_share=0.5))
    state = model.state_dict()
    assert {name.split(".")[0] for name in state} == {"codebook", "encoder", "decoder", "ema", "counts"}
    model.before_step(1.0)
    loss, metrics = model(batch())
    torch.testing.assert_close(loss.detach(), metrics["nll"] + 0.01 * 36 * metrics["kl"])  # 6 images of 6 places
    loss.backward()
    model.after_step(1.0)
    path = export(model, "safetensors", tmp_path / "all")
    tokenizer, pixels = load_tokenizer(path), torch.rand(3, 3, 8, 12)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    expected = model.encoder.codes((pixels - mean) / std)
    assert (tokenizer.codes(2 * pixels - 1) != expected).float().mean() < 0.02
    other = dvae.build(tiny(network="beit"))
    load_weights(other, path)
    assert all(torch.equal(x, y) for x, y in zip(other.state_dict().values(), model.state_dict().values()))


def test_names_are_the_official_ones_and_come_back(tmp_path):
    model = dvae.build(tiny())
    state = model.state_dict()
    assert "encoder.blocks.group_2.block_1.id_path.w" in state and "ema.decoder.blocks.output.conv.b" in state
    assert {name.split(".")[0] for name in state} == {"encoder", "decoder", "ema", "counts"}
    path = export(model, "safetensors", tmp_path / "all")
    other = dvae.build(tiny())
    load_weights(other, path)
    assert all(torch.equal(x, state[name]) for name, x in other.state_dict().items())
    for layout in ("timm", "torchvision"):
        sentence = f"export: {layout} has no encoder of codes: use --format safetensors"
        refused(sentence, ValueError, export, model, layout, tmp_path / "encoder")
    tokenizer = load_tokenizer(path)
    pixels = torch.rand(3, 3, 8, 12)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    expected = model.encoder.codes((pixels - mean) / std)
    assert (tokenizer.codes(0.8 * pixels + 0.1) != expected).float().mean() < 0.02


def test_a_run_starts_from_the_public_weights_converted(tmp_path):
    """Encoder and decoder alone: the averages become copies, and nothing has been counted."""
    source, model = dvae.build(tiny()), dvae.build(tiny())
    state = {name: x for name, x in source.state_dict().items() if name.startswith(("encoder.", "decoder."))}
    save_file(state, tmp_path / "dalle.safetensors")
    notes = load_initial_weights(model, tmp_path / "dalle.safetensors")
    assert len(notes) == 1 and "ema is a copy of dvae" in notes[0], notes
    loaded = model.state_dict()
    for name, x in state.items():
        assert torch.equal(loaded[name], x) and torch.equal(loaded[f"ema.{name}"], x)


def test_error_sentences():
    sentence = "dvae: --image-size must be divisible by 4, the stride of 3 groups, got 30 32"
    refused(sentence, ValueError, dvae.build, tiny(image_size=(30, 32)))
    refused("dvae: --width must be divisible by 4, got 6", ValueError, dvae.build, tiny(width=6))
    sentence = "dvae: --width, --groups and --blocks choose the network, not --backbone vit_base"
    refused(sentence, ValueError, dvae.Config.paper, "vit_base")


def test_the_encoder_takes_images_as_evaluation_gives_them():
    encoder = dvae.build(tiny()).encoder
    assert isinstance(encoder, Encoder) and (encoder.mean, encoder.std) == (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.exhaustive
def test_it_learns_codes_that_show_the_images():
    """Four epochs of shapes: held-out images come back closer than their mean colour, by a good part of the codes."""
    config = dvae.Config.small()
    config.training.epochs = 4
    torch.manual_seed(0)
    model = dvae.build(config)
    loader = Loader(open_source("shapes"), config.augmentation, config.training.batch_size)
    (held_out,) = next(Loader(open_source("shapes", "test"), evaluation((32, 32), 1.0), 256).epoch(0)).views
    std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
    trainer = Trainer(model, config.training, Execution(), len(loader))
    for epoch in range(4):
        batches = loader.epoch(epoch)
        for _ in range(len(loader)):
            trainer.step(batches)
    model.eval()
    share = torch.bincount(model.encoder.codes(held_out).flatten(), minlength=config.codes) / (256 * 64)
    perplexity = share.xlogy(share).sum().neg().exp().item()
    error, of_mean = (
        ((made - held_out) * std).abs().mean().item()
        for made in (model.autoencode(held_out), held_out.mean((2, 3), keepdim=True))
    )
    print(f"error {error:.4f}, of the mean colour {of_mean:.4f}; perplexity {perplexity:.1f}")
    assert error < 0.4 * of_mean and perplexity > 10
