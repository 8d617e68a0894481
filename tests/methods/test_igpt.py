"""iGPT: golden numbers of the official code, replay of a transcription, palette, completions, weights."""

import copy
import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastssl import distributed
from fastssl.contract import Batch, Completes, Method, PreparesEpochs, TrainingImages
from fastssl.methods import igpt
from fastssl.methods.igpt import AutoregressiveIGPT, MaskedIGPT
from fastssl.nn.igpt import ImageGPT
from fastssl.nn.palette import Palette, fit_palette, spread_colours
from fastssl.train.config import Execution, Training
from fastssl.train.trainer import Trainer
from fastssl.weights import export, load_initial_weights, load_weights
from tests.methods import transcription_igpt as t
from tests.support.golden import part, read
from tests.support.ranks import run_ranks

OBJECTIVES = {"ar": "autoregressive", "bert": "bert"}
HEADS = igpt.SIZES["igpt_mini"][2]


def from_official(p):
    """Weights in the official names and layouts → ours, without the palette."""
    sos = p.get("sos", torch.zeros_like(p["wpe"][0]))
    state = {"wte.weight": torch.cat([p["wte"], sos[None]]), "wpe.weight": p["wpe"], "ln_f.weight": p["ln_f.g"]}
    for i in range(t.depth_of(p)):
        ours, theirs = f"h.{i}", f"h{i}"
        state |= {f"{ours}.{norm}.weight": p[f"{theirs}.{norm}.g"] for norm in ("ln_1", "ln_2")}
        packed = torch.cat([p[f"{theirs}.attn.{name}_proj"].flatten(0, 1) for name in "qkv"])
        state |= {f"{ours}.attn.c_attn.weight": packed}
        state |= {f"{ours}.attn.c_proj.weight": p[f"{theirs}.attn.c_proj"].flatten(0, 1).T}
        state |= {f"{ours}.mlp.{name}.weight": p[f"{theirs}.mlp.{name}.w"].T for name in ("c_fc", "c_proj")}
    return {**{f"transformer.{name}": x for name, x in state.items()}, "lm_head.weight": p["wtet"]}


def to_official(state, heads):
    """Ours, weights or gradients, in the official names and layouts."""
    inner = {name.removeprefix("transformer."): x for name, x in state.items() if name.startswith("transformer.")}
    table = inner["wte.weight"]
    p = {"wte": table[:-1], "sos": table[-1], "wpe": inner["wpe.weight"], "ln_f.g": inner["ln_f.weight"]}
    p["wtet"] = state["lm_head.weight"]
    for i in range(sum(name.endswith("ln_1.weight") for name in inner)):
        p |= {f"h{i}.{norm}.g": inner[f"h.{i}.{norm}.weight"] for norm in ("ln_1", "ln_2")}
        packed = inner[f"h.{i}.attn.c_attn.weight"].chunk(3)
        p |= {f"h{i}.attn.{name}_proj": x.unflatten(0, (heads, -1)) for name, x in zip("qkv", packed)}
        p |= {f"h{i}.attn.c_proj": inner[f"h.{i}.attn.c_proj.weight"].T.unflatten(0, (heads, -1))}
        p |= {f"h{i}.mlp.{name}.w": inner[f"h.{i}.mlp.{name}.weight"].T for name in ("c_fc", "c_proj")}
    return p


def golden_method(which, golden, meta):
    network = ImageGPT(meta["n_vocab"], meta["n_ctx"], meta["n_embd"], meta["n_layer"], meta["n_head"])
    palette, size = Palette(meta["n_vocab"], (0, 0, 0), (1, 1, 1)), (meta["n_px"], meta["n_px"])
    if which == "ar":
        method = AutoregressiveIGPT(palette, network, 1, size)
    else:
        method = MaskedIGPT(palette, network, 1, meta["bert_mask_prob"])
    method.load_state_dict(from_official(part(golden, f"{which}.state.")), strict=False)
    return method.double()


def tiny(**changes):
    config = dataclasses.replace(igpt.Config.small(), image_size=(6, 4), colours=9, **changes)
    return config, igpt.build(config)


def with_random_head(method):
    torch.nn.init.normal_(method.lm_head.weight, std=0.5)
    return method


@pytest.mark.parametrize("which", OBJECTIVES)
def test_golden_numbers(which):
    golden, meta = read("igpt")
    method, codes = golden_method(which, golden, meta), golden["input.X"].long()
    masked = None if which == "ar" else golden["input.u"] <= meta["bert_mask_prob"]
    for layer in range(3):
        x = method.transformer(codes, masked, which == "ar", before=layer).mean(1)
        torch.testing.assert_close(x, golden[f"{which}.hidden.{layer}"], rtol=1e-9, atol=1e-12)
    outputs = method.transformer(codes, masked, which == "ar")
    logits = method.lm_head(outputs)
    torch.testing.assert_close(logits, golden[f"{which}.gen_logits"], rtol=1e-9, atol=1e-12)
    loss = method.nats(codes).mean() if which == "ar" else method.masked_loss(codes, masked)
    torch.testing.assert_close(loss, golden[f"{which}.gen_loss"], rtol=1e-9, atol=0)
    classifier = golden[f"{which}.state.clf.wclf"].double()
    clf_loss = torch.nn.functional.cross_entropy(outputs.mean(1) @ classifier.T, golden["input.Y"].long())
    torch.testing.assert_close(clf_loss, golden[f"{which}.clf_loss"], rtol=1e-9, atol=0)
    (loss + clf_loss).backward()
    gradients = to_official({name: p.grad for name, p in method.named_parameters()}, meta["n_head"])
    expected = part(golden, f"{which}.grad.")
    assert expected.keys() - {"clf.wclf"} == gradients.keys() - ({"sos"} if which == "bert" else set())
    for name in expected.keys() - {"clf.wclf"}:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("which", OBJECTIVES)
def test_the_transcription_has_the_golden_numbers(which):
    golden, meta = read("igpt")
    p = {name: x.double() for name, x in part(golden, f"{which}.state.").items()}
    codes = golden["input.X"]
    kept = None if which == "ar" else golden["input.u"] > meta["bert_mask_prob"]
    loss = t.autoregressive(p, codes) if kept is None else t.bert(p, codes, kept)
    torch.testing.assert_close(loss, golden[f"{which}.gen_loss"], rtol=1e-9, atol=0)
    for x, layer in zip(t.states(p, codes, kept), range(3), strict=True):
        torch.testing.assert_close(x.mean(1), golden[f"{which}.hidden.{layer}"], rtol=1e-9, atol=1e-12)
    assert torch.equal(t.codes_of(golden["palette.pixels"], golden["palette.clusters"]), golden["palette.codes"].long())


@pytest.mark.parametrize("objective", OBJECTIVES.values())
def test_twelve_steps_of_the_transcription(objective):
    """Trained by the trainer: rates, Adam, and for BERT the masks of the samples' seeds, some without any pixel."""
    torch.manual_seed(1)
    steps, training = 12, Training(4, 4, "adamw", lr=0.64, weight_decay=0.0, betas=(0.9, 0.95), warmup_epochs=1)
    _, method = tiny(objective=objective, mask_p=0.04, training=training)
    method = method.double()
    method.palette.clusters.copy_(torch.rand(9, 3) * 2 - 1)
    p = {name: x.clone() for name, x in to_official(method.state_dict(), HEADS).items()}
    trainer = Trainer(method, training, Execution(), steps // 4)
    batches = [
        Batch((torch.randn(4, 3, 6, 4, dtype=torch.float64),), *[4 * i + torch.arange(4)] * 3) for i in range(steps)
    ]
    losses = [trainer.step(iter([batch])).loss for batch in batches]
    functions, without = [], 0
    for batch in batches:
        pixels = method.palette.bytes(batch.views[0]).unflatten(1, (6, 4))
        codes = t.codes_of(pixels, method.palette.clusters)
        kept = igpt.seeded_noise(24, igpt._MASK, batch.seed) > 0.04 if objective == "bert" else None
        without += 0 if kept is None else int(kept.all(1).sum())
        loss = functools.partial(t.autoregressive if kept is None else t.bert, codes=codes)
        functions.append(loss if kept is None else functools.partial(loss, kept=kept))
    rates = [t.learning_rate(step, 0.01, steps // 4, steps) for step in range(steps)]
    trained, expected = t.train(p, functions, rates)
    assert (without > 0) == (objective == "bert")
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-9, atol=1e-12)
    ours = to_official(method.state_dict(), HEADS)
    for name, x in trained.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-6, atol=1e-8, msg=name)
    assert float((trained["wte"] - p["wte"]).abs().max()) > 0.01


def test_the_first_loss_is_ln_v_and_only_the_output_matrix_gets_gradient():
    for objective in OBJECTIVES.values():
        _, method = tiny(objective=objective, mask_p=1.0)
        loss, metrics = method(Batch((torch.randn(3, 3, 6, 4),), torch.arange(3), torch.arange(3), torch.arange(3)))
        assert float(loss.detach()) == pytest.approx(math.log(9), rel=1e-6) == float(metrics["nats_per_pixel"])
        loss.backward()
        moved = {name for name, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert moved == {"lm_head.weight"}


def test_initial_weights():
    torch.manual_seed(0)
    network = ImageGPT(512, 1024, 96, 3, 4)
    expected = {"wte": 0.02, "wpe": 0.01, "c_attn": 96**-0.5, "attn.c_proj": (96 * 3) ** -0.5, "mlp": 0.02}
    for name, x in network.named_parameters():
        if x.ndim == 2:
            (std,) = (std for key, std in expected.items() if key in name)
            assert float(x.detach().std()) == pytest.approx(std, rel=0.03), name
        else:
            assert (x == 1).all()


@pytest.mark.parametrize(("name", "millions"), [("igpt_small", 76.6), ("igpt_medium", 455), ("igpt_large", 1362)])
def test_sizes_are_the_papers(name, millions):
    with torch.device("meta"):
        dim, depth, heads = igpt.SIZES[name]
        network = ImageGPT(512, 1024, dim, depth, heads)
    count = sum(p.numel() for p in network.parameters()) + 512 * dim
    assert count / 1e6 == pytest.approx(millions, rel=2e-3)


def test_an_output_depends_on_earlier_codes_alone():
    _, method = tiny()
    codes = torch.randint(9, (1, 24))
    other = codes.clone()
    other[0, 10] = (other[0, 10] + 1) % 9
    a, b = (method.transformer(x) for x in (codes, other))
    changed = (a != b).any(-1)[0]
    assert not changed[:11].any() and changed[11:].all()
    last = codes.clone()
    last[0, -1] = (last[0, -1] + 1) % 9
    assert torch.equal(method.transformer(last), a)


def test_masks_are_a_coin_of_each_pixel_and_of_the_samples_seed():
    _, method = tiny(objective="bert")
    seeds = torch.arange(4000)
    masked = igpt.seeded_noise(24, igpt._MASK, seeds) <= method.mask_p
    counts = masked.sum(1).float()
    assert float(masked.float().mean()) == pytest.approx(0.15, abs=0.005) and float(counts.std()) > 1.5
    method = with_random_head(method)
    images = torch.randn(6, 3, 6, 4)
    batch = Batch((images,), torch.arange(6), torch.arange(6), torch.arange(6))
    half = [method(Batch((images[s],), *[torch.arange(6)[s]] * 3))[0] for s in (slice(3), slice(3, 6))]
    torch.testing.assert_close(method(batch)[0], sum(half) / 2)


def test_bert_without_a_masked_pixel_is_no_nan():
    _, method = tiny(objective="bert")
    method = with_random_head(method)
    codes, masked = torch.randint(9, (2, 24)), torch.zeros(2, 24, dtype=torch.bool)
    assert not method.masked_loss(codes, masked).detach()
    masked[1, :5] = True
    loss = method.masked_loss(codes, masked)
    torch.testing.assert_close(loss, method.masked_loss(codes[1:], masked[1:]) / 2)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_features_are_the_mean_input_of_the_probe_layer():
    images = torch.randn(5, 3, 6, 4)
    for objective in OBJECTIVES.values():
        for layer in (None, 0, 4):
            _, method = tiny(objective=objective, probe_layer=layer)
            codes = method.palette.codes(images)
            p = to_official(method.state_dict(), HEADS)
            kept = torch.ones_like(codes) if objective == "bert" else None
            expected = t.states(p, codes, kept)[2 if layer is None else layer].mean(1)
            torch.testing.assert_close(method.features(images), expected, rtol=1e-4, atol=1e-6)
            assert torch.equal(method.encoder(images), method.features(images))
    assert not any(name.startswith("lm_head") for name in method.encoder.state_dict())


def test_completions_draw_from_the_models_probabilities():
    torch.manual_seed(0)
    _, method = tiny()
    method = with_random_head(method)
    images = torch.randn(3, 3, 6, 4)
    codes = method.palette.codes(images)
    for temperature in (1.0, 0.5):
        completed = method.complete(images, temperature, seed=7)
        drawn = method.palette.codes(completed)
        assert torch.equal(drawn[:, :12], codes[:, :12])
        logits = method.lm_head(method.transformer(drawn)).double() / temperature  # without kept keys and values
        cumulative = logits.softmax(-1).cumsum(-1)
        noise = igpt.seeded_noise(24, igpt._DRAW, 7, torch.arange(3))
        expected = (cumulative <= noise[..., None]).sum(-1)
        assert torch.equal(drawn[:, 12:], expected[:, 12:])
    assert torch.equal(completed, method.complete(images, 0.5, seed=7))
    assert not torch.equal(completed, method.complete(images, 0.5, seed=8))


def test_images_of_one_line_are_drawn_whole():
    config = dataclasses.replace(igpt.Config.small(), image_size=(1, 8), colours=9)
    images = igpt.build(config).complete(torch.randn(2, 3, 1, 8))
    assert images.shape == (2, 3, 1, 8) and images.isfinite().all()


def test_contract():
    for objective in OBJECTIVES.values():
        _, method = tiny(objective=objective)
        assert isinstance(method, Method) and isinstance(method, PreparesEpochs)
        assert isinstance(method, Completes) == (objective == "autoregressive")


def images_of(batches, images=100):
    def plain():
        return iter(batches)

    return TrainingImages(images, len(batches), plain, plain)


def test_the_palette_is_found_once_and_kept_in_the_state():
    torch.manual_seed(0)
    _, method = tiny()
    colours = torch.rand(9, 3)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (method.palette.mean, method.palette.std))
    pixels = colours[torch.randint(9, (100, 6, 4))].mul(255).round().div(255).permute(0, 3, 1, 2)
    numbers = torch.arange(100)
    batches = [Batch(((pixels[i] - mean) / std,), i, i) for i in numbers.split(30)]
    place = method.palette.clusters.data_ptr()
    method.before_epoch(images_of(batches))
    found = method.palette.clusters.clone()
    expected = (colours * 255).round() / 127.5 - 1
    nearest = torch.cdist(expected, found).amin(1)
    assert float(nearest.max()) < 1e-6 and method.palette.clusters.data_ptr() == place
    method.before_epoch(images_of([]))  # later epochs change nothing
    assert torch.equal(method.palette.clusters, found)
    _, resumed = tiny()
    resumed.load_state_dict(method.state_dict())
    resumed.before_epoch(images_of([]))
    assert torch.equal(resumed.palette.clusters, found)


def test_a_palette_from_a_file(tmp_path):
    path, clusters = tmp_path / "centers.npy", np.random.default_rng(0).uniform(-1, 1, (9, 3))
    np.save(path, clusters)
    _, method = tiny(palette=str(path))
    method.check_images(100, 96)
    method.before_epoch(images_of([]))
    assert np.allclose(method.palette.clusters.numpy(), clusters, atol=1e-7)
    for content, sentence in (
        (clusters[:8], "must hold 9 colours .*, got float64 .8, 3."),
        (clusters * 200, "got float64 .9, 3. from "),
        ((clusters * 100).astype(np.int16), "got int16"),
        (np.full((9, 3), np.nan), "got float64 .9, 3. from nan"),
    ):
        np.save(path, content)
        with pytest.raises(ValueError, match=f"^palette: .*{sentence}"):
            method.check_images(100, 96)
    path.write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"^palette: .* cannot be read"):
        method.check_images(100, 96)
    path.unlink()
    with pytest.raises(ValueError, match=r"^palette: .* cannot be read .No such file"):
        method.check_images(100, 96)


@pytest.mark.exhaustive
def test_the_palette_does_not_depend_on_the_ranks():
    """Bit for bit, though each rank sees its part of the pixels in an order of its own."""
    pixels = torch.randint(256, (500, 3), generator=torch.Generator().manual_seed(0)).double()
    expected = fit_palette(pixels, 7)
    for found in run_ranks(3, fit_on_a_rank, pixels):
        assert torch.equal(found, expected)
    few = fit_palette(pixels[:3].repeat(9, 1), 7)
    assert float(torch.cdist(pixels[:3] / 127.5 - 1, few.double()).amin(1).max()) < 0.01
    with pytest.raises(ValueError, match=r"^palette: k-means needs pixels, got none"):
        fit_palette(pixels[:0], 7)


def fit_on_a_rank(pixels):
    parts = (pixels[400:].flip(0), pixels[:0], pixels[:400].flip(0))
    return fit_palette(parts[distributed.rank()], 7)


def test_a_palette_covers_its_pixels_better_than_random_ones():
    generator = torch.Generator().manual_seed(0)
    pixels = (torch.randn(3000, 3, generator=generator) * 30 + 128).clamp(0, 255).round().double()
    found = fit_palette(pixels, 16)
    errors = [torch.cdist(pixels / 127.5 - 1, p.double()).amin(1).square().mean() for p in (found, spread_colours(16))]
    drawn = pixels[torch.randperm(3000, generator=generator)[:16]] / 127.5 - 1
    errors.append(torch.cdist(pixels / 127.5 - 1, drawn).amin(1).square().mean())
    assert errors[0] < 0.75 * errors[2] < errors[1]


def test_sampled_pixels_depend_on_the_images_alone(monkeypatch):
    monkeypatch.setattr("fastssl.nn.palette.PIXELS", 40)
    palette, images = Palette(4, (0, 0, 0), (1, 1, 1)), torch.rand(20, 3, 5, 5)
    whole = palette.sample(images, torch.arange(20), 20)
    halves = [palette.sample(images[i], i, 20) for i in torch.arange(20).split(10)]
    assert torch.equal(whole, torch.cat(halves)) and whole.shape == (40, 3)
    few = palette.sample(images, torch.arange(20), 100)  # every third image, a pixel each
    assert few.shape == (7, 3)


def test_a_step_stores_no_attention_matrix():
    """At 1,024 places: for the backward pass of either objective nothing as large as [B, H, L, L] is kept."""
    for objective in OBJECTIVES.values():
        config = dataclasses.replace(igpt.Config.small(), image_size=(32, 32), objective=objective)
        method, largest = with_random_head(igpt.build(config)), 0

        def note(x):
            nonlocal largest
            largest = max(largest, x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            method(Batch((torch.randn(1, 3, 32, 32),), *[torch.arange(1)] * 3))
        assert largest <= 1024 * 4 * 64 < HEADS * 1024 * 1024


def test_a_resumed_trainer_gives_the_same_bits():
    for objective in OBJECTIVES.values():
        torch.manual_seed(0)
        config, method = tiny(objective=objective)
        method.palette.prepare([(torch.randn(40, 3, 6, 4), torch.arange(40))], 40)
        batches = [Batch((torch.randn(4, 3, 6, 4),), *[torch.arange(4) + i] * 3) for i in range(6)]
        trainer = Trainer(method, config.training, Execution(), 4)
        losses = [trainer.step(iter([batch])).loss for batch in batches[:3]]
        state = copy.deepcopy(trainer.state())
        losses += [trainer.step(iter([batch])).loss for batch in batches[3:]]
        resumed = Trainer(tiny(objective=objective)[1], config.training, Execution(), 4, state=state)
        assert [resumed.step(iter([batch])).loss for batch in batches[3:]] == losses[3:]
        for name, x in method.state_dict().items():
            assert torch.equal(resumed.method.state_dict()[name], x), name


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"backbone": "vit_base"}, "^igpt: unknown backbone 'vit_base', there are igpt_mini, igpt_small"),
        ({"probe_layer": 5}, "^igpt: --probe-layer must be at most the 4 blocks of igpt_mini, got 5"),
    ],
)
def test_refusals(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny(**changes)


def hugging_face(method):
    """The method's weights in the names and layouts of Hugging Face's ImageGPT."""
    state, found = method.state_dict(), {}
    for name, x in state.items():
        if name.startswith("palette."):
            continue
        layer = ".c_" in name
        found[name] = x.T.contiguous() if layer else x
        if layer:
            found[name.replace("weight", "bias")] = torch.zeros(len(x))
    return found


def test_weights_of_hugging_face(tmp_path):
    torch.manual_seed(0)
    _, method = tiny()
    method, (_, other) = with_random_head(method), tiny()
    state = hugging_face(method)
    path = tmp_path / "model.safetensors"
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    save_file({**state, **masks}, path)
    notes = load_initial_weights(other, path)
    assert notes == [f"{path} has no palette: the palette comes from --palette or k-means"]
    for name, x in method.state_dict().items():
        assert torch.equal(other.state_dict()[name], x) or name.startswith("palette."), name
    _, strict = tiny()
    with pytest.raises(ValueError, match=r"lacks palette.clusters"):
        load_weights(strict, path)
    strict.palette.is_set.fill_(True)
    load_weights(strict, path)
    assert torch.equal(strict.lm_head.weight, method.lm_head.weight)
    written = load_file(export(method, "imagegpt", tmp_path / "out"))
    assert {name: x for name, x in written.items() if not name.startswith("palette.")}.keys() == state.keys()
    assert all(torch.equal(written[name], x) for name, x in state.items())
    assert torch.equal(written["palette.clusters"], method.palette.clusters)
    _, back = tiny()
    load_weights(back, tmp_path / "out.safetensors")
    assert all(torch.equal(x, method.state_dict()[name]) for name, x in back.state_dict().items())
    save_file({**state, "transformer.h.1.mlp.c_fc.bias": torch.full((256,), 0.5)}, path)
    with pytest.raises(ValueError, match=r"transformer.h.1.mlp.c_fc.bias must be zero, since iGPT has no biases"):
        load_weights(strict, path)
    for layout in ("timm", "torchvision"):
        with pytest.raises(ValueError, match=r"^export: neither timm nor torchvision has an encoder like iGPT"):
            export(method, layout, tmp_path / "encoder")


@pytest.mark.exhaustive
def test_transformers_computes_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    _, method = tiny()
    method = with_random_head(method)
    config = transformers.ImageGPTConfig(vocab_size=10, n_positions=24, n_embd=64, n_layer=4, n_head=HEADS)
    model = transformers.ImageGPTForCausalImageModeling(config)
    state = load_file(export(method, "imagegpt", tmp_path / "igpt"))
    names = [name for name in state if not name.startswith("palette.")]
    model.load_state_dict({name: state[name] for name in names})
    codes = torch.randint(9, (2, 24))
    read = method.transformer.shifted(codes)
    expected = model.double().eval()(input_ids=read).logits
    torch.testing.assert_close(method.double().lm_head(method.transformer(codes)), expected, rtol=1e-9, atol=1e-12)
    back = tmp_path / "back.safetensors"
    save_file(model.float().state_dict(), back)
    _, other = tiny()
    load_initial_weights(other, back)
    assert torch.equal(other.transformer.h[3].mlp.c_fc.weight, method.float().transformer.h[3].mlp.c_fc.weight)
