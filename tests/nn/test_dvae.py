import math

import pytest
import torch
from safetensors.torch import save_file

from fastssl.nn import dvae, gumbel
from fastssl.nn.beit_dvae import BEiTVAE
from fastssl.nn.dvae import Conv2d, Decoder, DiscreteVAE, Encoder, load_tokenizer, logit_laplace_nll
from fastssl.nn.gumbel import gumbel_noise, relax
from tests.support.contract import refused
from tests.support.golden import part, read
from tests.support.memory import peak_memory

EXACT = {"rtol": 1e-5, "atol": 1e-5}  # the reference insists on float32


def golden_model():
    golden, meta = read("dvae")
    sizes = (meta["encoder"]["n_hid"], meta["encoder"]["vocab_size"], 4, meta["encoder"]["n_blk_per_group"])
    model = DiscreteVAE(Encoder(*sizes), Decoder(*sizes, meta["decoder"]["n_init"]))
    model.load_state_dict(part(golden, "state."), strict=True)
    return model, golden, meta


def test_golden_codes_and_pixels():
    """Images → logits → codes → statistics → pixels, by the official modules."""
    model, golden, _ = golden_model()
    images = dvae.map_pixels(golden["input.images"])
    torch.testing.assert_close(images, golden["mapped"], **EXACT)
    torch.testing.assert_close(model.encoder.logits(images), golden["logits"], **EXACT)
    codes = model.encoder.codes(images)
    assert codes.dtype == torch.int64 and torch.equal(codes, golden["codes"].long())
    one_hot = torch.nn.functional.one_hot(codes, 24).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(model.decoder(one_hot), golden["stats"], **EXACT)
    torch.testing.assert_close(dvae.unmap_pixels(model.decoder.pixels(codes)), golden["reconstruction"], **EXACT)
    torch.testing.assert_close(dvae.unmap_pixels(model.autoencode(images)), golden["reconstruction"], **EXACT)


def test_golden_loss_and_gradients():
    model, golden, meta = golden_model()
    images, stride = golden["mapped"], 8
    relaxed, divergence = relax(golden["logits"], golden["input.gumbel"].clone(), meta["tau"])
    torch.testing.assert_close(relaxed, golden["relaxed"], **EXACT)
    torch.testing.assert_close(divergence.mean(), golden["kl_per_position"], **EXACT)
    nll, divergence, codes = model.losses(images, golden["input.gumbel"].clone(), torch.tensor(meta["tau"]))
    torch.testing.assert_close(nll, golden["nll"], **EXACT)
    loss = nll + meta["beta"] * divergence / (3 * stride**2)
    torch.testing.assert_close(loss, golden["loss"], **EXACT)
    assert torch.equal(codes, golden["codes"].long())
    loss.backward()
    gradients = part(golden, "grad.")
    assert len(gradients) > 10
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, **EXACT)


def test_golden_customised_autoencoder():
    """BEiT's own: logits, codes, reconstruction, loss and all gradients in float64."""
    golden, meta = read("dvae_customized")
    state = part(golden, "state.")
    sizes = BEiTVAE.sizes(state)
    assert sizes == (meta["hidden_dim"], meta["num_tokens"], meta["num_layers"], meta["codebook_dim"])
    model, images = BEiTVAE(*sizes).double(), golden["input.images"].double()
    model.load_state_dict(state, strict=True)
    exact = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(model.logits(images), golden["logits"], **exact)
    assert torch.equal(model.codes(images), golden["codes"].long())
    error, divergence, codes = model.losses(images, golden["input.gumbel"].clone(), meta["temp"])
    torch.testing.assert_close(error, golden["mse"], **exact)
    rounding = -math.log(20) - torch.tensor(1 / 20).log().double()  # the reference's ln(1 / V) is in float32
    total = (divergence + rounding) * codes.numel()  # and its divergence is a sum
    # recorded as the difference of loss and error, divided by the weight of 0.01
    torch.testing.assert_close(total, golden["kl"], rtol=0, atol=1e-9 / meta["kl_div_loss_weight"])
    loss = error + meta["kl_div_loss_weight"] * total
    torch.testing.assert_close(loss, golden["loss"], **exact)
    loss.backward()
    for name, gradient in part(golden, "grad.").items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, **exact)


def plain_relaxation(logits, noise, tau):
    p = logits.softmax(1)
    return ((logits + noise) / tau).softmax(1), (p * (p * logits.shape[1]).log()).sum(1)


@pytest.mark.parametrize("tau", [0.7, 1 / 16, torch.tensor(1.3)], ids=str)
def test_relax_is_the_formula_with_its_gradient(tau):
    logits = torch.randn(3, 11, 4, 5, dtype=torch.float64, requires_grad=True)
    noise = gumbel_noise(torch.arange(3), (11, 4, 5)).double()
    weights, others = torch.randn(3, 11, 4, 5).double(), torch.randn(3, 4, 5).double()
    gradients, values = [], []
    for function in (relax, plain_relaxation):
        relaxed, divergence = function(logits, noise.clone(), tau)
        values += [relaxed, divergence]
        gradients += torch.autograd.grad((relaxed * weights).sum() + (divergence * others).sum(), logits)
    torch.testing.assert_close(values[:2], values[2:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


def test_relax_passes_gradcheck():
    logits = torch.randn(2, 5, 2, 1, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(2, 5, 2, 1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: relax(x, noise.clone(), 0.5), logits)


def test_relax_takes_less_memory_than_its_expression():
    """In tensors of the size of the logits: noise, result, and both gradients, with one for intermediate results."""
    logits = torch.randn(4, 512, 32, 32, requires_grad=True)
    size, peaks = logits.numel() * 4, []
    for function in (relax, plain_relaxation):

        def step(function=function):
            relaxed, divergence = function(logits, torch.zeros_like(logits), 0.5)
            return torch.autograd.grad(relaxed[:, 0].sum() + divergence.sum(), logits)

        peaks.append(peak_memory(step) / size)
    assert peaks[0] <= 5.1 < 6.9 <= peaks[1], peaks


def test_the_density_of_the_logit_laplace_integrates_to_1():
    x = torch.linspace(0.1, 0.9, 400_001, dtype=torch.float64)[1:-1]
    for location, scale in ((0.0, 0.2), (-1.0, 0.1), (1.2, 0.15)):
        statistics = torch.tensor([location, math.log(scale)]).double().view(1, 2, 1, 1).expand(1, 2, 1, len(x))
        density = (-logit_laplace_nll(statistics, x.view(1, 1, 1, -1))).exp()
        left, right = (math.exp(-abs(math.log(e / (1 - e)) - location) / scale) / 2 for e in (0.1, 0.9))
        assert density.sum().item() * 0.8 / 400_000 == pytest.approx(1 - left - right, abs=1e-4)


def test_gumbel_noise_is_that_of_the_distribution_and_of_the_sample():
    noise = gumbel_noise(torch.arange(1000), (7, 9, 5))
    assert noise.shape == (1000, 7, 9, 5) and noise.isfinite().all()
    values = noise.double()
    assert values.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert values.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    assert (values <= 0).double().mean().item() == pytest.approx(math.exp(-1), abs=0.005)
    flat = values.flatten(1)
    for a, b in ((flat[:, 0], flat[:, 1]), (flat[:-1, 0], flat[1:, 0]), (flat[:, 0], flat[:, -1])):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.12
    assert torch.equal(gumbel_noise(torch.tensor([17, 3]), (7, 9, 5)), noise[[17, 3]])


def test_noise_that_is_made_in_parts_is_the_same(monkeypatch):
    seeds = torch.tensor([5, 2**62, 0, 77, 1])
    whole = gumbel_noise(seeds, (3, 5))
    monkeypatch.setattr(gumbel, "NOISE_AT_ONCE", 31)
    assert torch.equal(gumbel_noise(seeds, (3, 5)), whole)


def test_sizes_and_names_are_those_of_the_public_weights():
    with torch.device("meta"):
        encoder, decoder = Encoder(), Decoder()
    assert sum(p.numel() for p in encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in decoder.parameters()) == 43_829_766
    shapes = {name: tuple(p.shape) for name, p in encoder.named_parameters()}
    assert shapes["blocks.input.w"] == (256, 3, 7, 7) and shapes["blocks.output.conv.w"] == (8192, 2048, 1, 1)
    assert shapes["blocks.group_2.block_1.id_path.w"] == (512, 256, 1, 1)
    assert "blocks.group_1.block_1.id_path.w" not in shapes
    assert shapes["blocks.group_4.block_2.res_path.conv_3.b"] == (512,)
    assert encoder.blocks.group_1.block_1.gain == decoder.blocks.group_3.block_2.gain == 1 / 64
    assert encoder.stride == 8


def test_initial_weights_are_those_of_the_code():
    conv = Conv2d(64, 200, 3)
    assert conv.w.std().item() == pytest.approx(1 / math.sqrt(64 * 9), rel=0.02)
    assert not conv.b.any()


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (2, 2), (3, 4), (4, 8)])
def test_the_number_of_groups_sets_the_stride(groups, stride):
    model = DiscreteVAE(Encoder(4, 6, groups, 1), Decoder(4, 6, groups, 1, 5))
    images = torch.rand(2, 3, 16, 24) * 0.8 + 0.1
    codes = model.encoder.codes(images)
    assert codes.shape == (2, 16 // stride, 24 // stride) and model.encoder.stride == stride
    assert model.autoencode(images).shape == images.shape


def test_images_of_another_normalisation_give_the_same_codes():
    """As a method gets them, and as a tokenizer does."""
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    pixels = torch.rand(2, 3, 16, 16)
    other, tokenizer = Encoder(4, 50, mean=mean, std=std), Encoder(4, 50)
    tokenizer.load_state_dict(other.state_dict())
    normalised = [
        (pixels - torch.tensor(m).view(1, 3, 1, 1)) / torch.tensor(s).view(1, 3, 1, 1)
        for m, s in ((mean, std), (tokenizer.mean, tokenizer.std))
    ]
    torch.testing.assert_close(normalised[1], 0.8 * pixels + 0.1)
    torch.testing.assert_close(other.mapped(normalised[0]), normalised[1])
    torch.testing.assert_close(other.unmapped(normalised[1]), normalised[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(other.codes(normalised[0]), tokenizer.codes(normalised[1]))


def test_autocast_leaves_logits_and_the_first_layer_of_the_decoder_in_float32():
    encoder, decoder = Encoder(8, 12, 2, 1), Decoder(8, 12, 2, 1, 6)
    seen = []
    decoder.blocks.input.register_forward_hook(lambda *x: seen.append(x[-1].dtype))
    decoder.blocks.group_2.register_forward_hook(lambda *x: seen.append(x[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = encoder.logits(torch.rand(1, 3, 8, 8))
        assert encoder.hidden(torch.rand(1, 3, 8, 8)).dtype == torch.bfloat16
        decoder(logits.softmax(1))
    assert logits.dtype == torch.float32 and seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("prefix", ["", "encoder.", "ema.encoder."])
def test_a_tokenizer_from_a_file(prefix, tmp_path):
    encoder = Encoder(8, 33, 3, 1)
    state = {f"{prefix}{name}": x for name, x in encoder.state_dict().items()}
    if prefix.startswith("ema."):  # beside the weights that were trained, which are not taken
        state |= {f"encoder.{name}": x + 1 for name, x in encoder.state_dict().items()}
    save_file(state, tmp_path / "tokenizer.safetensors")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.safetensors")
    assert (tokenizer.vocabulary, tokenizer.stride) == (33, 4)
    assert (tokenizer.mean, tokenizer.std) == ((-0.125,) * 3, (1.25,) * 3)
    assert not tokenizer.training and not any(p.requires_grad for p in tokenizer.parameters())
    images = torch.rand(2, 3, 8, 12)
    assert torch.equal(tokenizer.codes(images), encoder.codes(images))


@pytest.mark.parametrize("prefix", ["", "ema."])
def test_a_tokenizer_of_beits_own_kind_from_a_file(prefix, tmp_path):
    model, images = BEiTVAE(5, 12, 2, 7), torch.randn(2, 3, 8, 12)
    save_file({f"{prefix}{name}": x for name, x in model.state_dict().items()}, tmp_path / "beit.safetensors")
    tokenizer = load_tokenizer(tmp_path / "beit.safetensors")
    assert (tokenizer.vocabulary, tokenizer.stride, tokenizer.mean, tokenizer.std) == (12, 4, (0.5,) * 3, (0.5,) * 3)
    assert torch.equal(tokenizer.codes(images), model.codes(images))
    assert model.autoencode(images).shape == images.shape


def test_error_sentences(tmp_path):
    refused(
        f"tokenizer: {tmp_path / 'none'} is neither the folder of a run of dvae nor a weights file: name one, or put "
        "it back there to resume a run that was started with it",
        ValueError,
        load_tokenizer,
        tmp_path / "none",
    )
    with pytest.raises(ValueError, match=r"^tokenizer: .* must be a run of dvae with a checkpoint .checkpoint: no"):
        load_tokenizer(tmp_path)
    save_file({"fc.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    refused(
        f"tokenizer: {tmp_path / 'other.safetensors'} has no encoder of DALL-E's discrete autoencoder "
        "(blocks.output.conv.w): name the folder of a run of dvae, or the public encoder converted as docs/methods.md "
        "describes",
        ValueError,
        load_tokenizer,
        tmp_path / "other.safetensors",
    )
    save_file({"blocks.output.conv.w": torch.zeros(5, 4, 1, 1)}, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"cut.safetensors does not fit Encoder: Missing key"):
        load_tokenizer(tmp_path / "cut.safetensors")
    state = Encoder(8, 33, 3, 1).state_dict()
    save_file({**state, "blocks.input.w": torch.zeros(8, 3, 5, 5)}, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=r"wrong.safetensors does not fit Encoder: size mismatch for blocks"):
        load_tokenizer(tmp_path / "wrong.safetensors")
    sentence = "Encoder: height and width of images must be divisible by 8, got 12×16"
    refused(sentence, ValueError, Encoder(4, 5).codes, torch.zeros(1, 3, 12, 16))
