"""BEiT: the official code's golden numbers, its recipe, and two ranks against one process."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastssl
from fastssl import distributed
from fastssl.contract import Batch, Reconstructs
from fastssl.data.loader import Loader
from fastssl.data.source import open_source
from fastssl.methods import beit
from fastssl.nn import dvae
from fastssl.nn.beit import BEIT_SIZES, Beit
from fastssl.nn.dvae import load_tokenizer
from fastssl.ops import dispatch
from fastssl.train.config import Execution
from fastssl.train.optim import build_optimizer
from fastssl.train.schedule import learning_rate
from fastssl.train.trainer import Trainer
from fastssl.weight_files import read_file
from tests.support.contract import refused
from tests.support.golden import part, read
from tests.support.ranks import run_ranks
from tests.support.runs import make_run
from tests.support.tokenizers import save_tokenizer

GOLDEN = ["beit_shared_bias", "beit_block_bias", "beit_abs_pos"]
KINDS = {"shared": "use_shared_rel_pos_bias", "block": "use_rel_pos_bias"}


def tiny(**changes):
    """The small preset on a grid of 6 × 6 patches."""
    sizes = {"image_size": (24, 24), "mask_patches": 14, "mask_min": 4}
    return dataclasses.replace(beit.Config.small(), **{**sizes, **changes})


@pytest.fixture
def tokenizer(tmp_path):
    return save_tokenizer(tmp_path / "tokenizer.safetensors")


@pytest.fixture
def golden_model(monkeypatch):
    """Builds the method with golden weights, in float64."""

    def build(name):
        golden, meta = read(name)
        sizes = meta["embed_dim"], meta["depth"], meta["num_heads"], meta["patch_size"]
        monkeypatch.setitem(BEIT_SIZES, "vit_mini", sizes)
        kind = next((kind for kind, flag in KINDS.items() if meta[flag]), "none")
        config = beit.Config(
            "vit_mini", tuple(meta["img_size"]), mask_patches=10, mask_min=6, relative_bias=kind, drop_path=0
        )
        config.abs_pos, config.layer_scale = meta["use_abs_pos_emb"], meta["init_values"]
        model = beit.build(config)
        model.lm_head = beit.CodeHead(meta["embed_dim"], meta["vocab_size"])
        state = part(golden, "state.")
        model.load_state_dict(state, strict=True)
        assert {n: x.shape for n, x in model.state_dict().items()} == {n: x.shape for n, x in state.items()}
        images, codes = golden["input.images"].double(), golden["input.codes"].flatten(1).long()
        return model.double(), golden, (images, codes, golden["input.mask"].flatten(1))

    return build


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_loss_and_gradients(name, golden_model):
    model, golden, inputs = golden_model(name)
    loss, metrics = model.loss(*inputs)
    torch.testing.assert_close(loss.detach(), golden["loss"], rtol=1e-9, atol=0)
    assert metrics["code_accuracy"].item() == pytest.approx(golden["mlm_acc"].item(), rel=1e-6)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    expected = part(golden, "grad.")
    assert name == "beit_abs_pos" or set(gradients) == set(expected)
    for key, x in expected.items():
        torch.testing.assert_close(gradients[key], x, rtol=1e-9, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


def test_a_fixed_number_of_rows_gives_the_same(golden_model, monkeypatch):
    """On GPUs and in compiled graphs the host does not wait for the number of masked patches."""
    results = []
    for exact in (True, False):
        monkeypatch.setattr("fastssl.nn.patch_masks.reads_are_free", lambda mask, exact=exact: exact)
        model, _, inputs = golden_model("beit_shared_bias")
        loss, metrics = model.loss(*inputs)
        loss.backward()
        results.append((loss.detach(), metrics["code_accuracy"], {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)
    with dispatch.reference():
        model, _, inputs = golden_model("beit_shared_bias")
        torch.testing.assert_close(model.loss(*inputs)[0].detach(), results[0][0], rtol=1e-12, atol=0)


def test_the_head_never_has_all_logits():
    torch.manual_seed(0)
    head, x = beit.CodeHead(16, 50), torch.randn(2500, 16, requires_grad=True)
    codes = torch.randint(50, (2500,)).index_fill(0, torch.tensor([3, 7]), -100)
    logits = torch.nn.functional.linear(x, head.weight, head.bias)
    assert torch.equal(head.predict(x), logits.argmax(1))
    expected = torch.nn.functional.cross_entropy(logits, codes, reduction="none")
    loss = head.cross_entropy(x, codes)
    torch.testing.assert_close(loss, expected)
    weights = torch.randn(2500)
    inputs = [x, head.weight, head.bias]
    gradients = [torch.autograd.grad((y * weights).sum(), inputs, retain_graph=True) for y in (loss, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_learning_rates_are_those_of_the_official_code():
    golden, _ = read("schedules_text")
    for name, warmup in (("beit.lr", 2), ("beit.lr_warmup_steps", 7 / 5)):
        training = dataclasses.replace(beit.Config().training, epochs=8, warmup_epochs=warmup)
        rates = [learning_rate(training, step / 5, 5) for step in range(40)]
        torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), golden[name], rtol=1e-9, atol=0)


def test_the_recipe_is_that_of_the_paper(tokenizer):
    config = beit.Config.paper()
    training = config.training
    assert (training.epochs, training.batch_size, training.weight_decay) == (800, 2048, 0.05)
    assert (training.betas, training.clip_parameter_norm) == ((0.9, 0.999), 3.0)
    assert (config.mask_patches, config.mask_min, config.drop_path, config.layer_scale) == (75, 16, 0.1, 0.1)
    assert beit.Config.paper("vit_large").layer_scale == 1e-5
    config.tokenizer = tokenizer
    first, second = config.augmentation.views
    assert (first.size, first.crop, first.interpolation, first.flip_p) == ((224, 224), (0.08, 1.0), "bicubic", 0.5)
    assert first.jitter == (0.4, 0.4, 0.4, 0.0) and first.grayscale_p == first.blur_p == 0
    assert (second.size, second.interpolation, second.same_crop) == ((112, 112), "lanczos", True)
    assert second.mean == (-0.125,) * 3 and second.std == (1.25,) * 3
    with torch.device("meta"):
        model = Beit(mask_token=True)
    groups = beit.parameter_groups(model)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for p in groups[0]["params"]}
    table = "rel_pos_bias.relative_position_bias_table"
    weights = {n for n, p in model.named_parameters() if n.endswith(".weight") and p.ndim > 1}
    assert decayed == weights | {"mask_token", table}
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(85.67, abs=0.01)


def test_the_whole_gradient_is_clipped(tokenizer):
    method = small(tokenizer)
    optimizer = build_optimizer(method, method.config_training, beit.parameter_groups)
    assert {group["part"] for group in optimizer.param_groups} == {"all"}


def small(tokenizer, **changes):
    config = tiny(tokenizer=tokenizer, **changes)
    method = beit.build(config)
    method.config_training = config.training
    return method


def test_views_are_one_crop_for_encoder_and_tokenizer(tokenizer):
    """The tokenizer's codes of its view change with the crop as the encoder's view does."""
    config = tiny(tokenizer=tokenizer, flip_p=0.5)
    method = beit.build(config)
    batch = next(iter(Loader(open_source("shapes:count=16,size=64"), config.augmentation, 16, seed=1).epoch(0)))
    images, second = batch.views
    assert images.shape == (16, 3, 24, 24) and second.shape == (16, 3, 48, 48)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (beit.IMAGENET_MEAN, beit.IMAGENET_STD))
    pixels = second * 1.25 - 0.125
    shrunk = torch.nn.functional.interpolate(pixels, (24, 24), mode="bicubic", antialias=True)
    assert (shrunk - (images * std + mean)).abs().mean() < 0.02
    codes = method.codes(second)
    assert codes.shape == (16, 36) and len(codes.unique()) > 8
    assert torch.equal(codes, load_tokenizer(tokenizer).codes(second).flatten(1))


def test_the_tokenizer_is_frozen_and_not_saved(tokenizer):
    method = small(tokenizer)
    before = [x.clone() for x in method.tokenizer.parameters()]
    trainer = Trainer(method, method.config_training, Execution(), 4, parameter_groups=beit.parameter_groups)
    for _ in range(3):
        trainer.step(iter([batch_of(8)]))
    assert all(torch.equal(a, b) for a, b in zip(before, method.tokenizer.parameters()))
    assert not any("tokenizer" in name for name in (*method.state_dict(), *dict(method.named_parameters())))
    assert method.double().tokenizer.blocks.output.conv.w.dtype == torch.float64
    assert "tokenizer" not in dict(method.encoder.named_modules())


def batch_of(count, dtype=torch.float32, start=0):
    generator = torch.Generator().manual_seed(start)
    views = [torch.randn(count, 3, side, side, generator=generator).to(dtype) for side in (24, 48)]
    return Batch(tuple(views), torch.arange(count), None, start + torch.arange(count))


def test_a_resumed_run_is_bit_equal(tokenizer):
    """With drop path, whose random numbers are part of the state."""
    results, states = [], {}
    for resumed in (False, True):
        torch.manual_seed(0)
        method = small(tokenizer, drop_path=0.3)
        options = {"parameter_groups": beit.parameter_groups, "state": states.get(resumed)}
        trainer = Trainer(method, method.config_training, Execution(), 4, **options)
        for step in range(trainer.steps, 6):
            if step == 3 and not resumed:
                states[True] = copy.deepcopy(trainer.state())
            loss = trainer.step(iter([batch_of(8, start=step)])).loss
        results.append((loss, {n: x.clone() for n, x in method.state_dict().items()}))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(x, results[1][1][name]) for name, x in results[0][1].items())


def test_an_encoder_is_evaluated_without_its_tokenizer(tokenizer, tmp_path):
    """The file may be gone, or hold no decoder; then there are no pictures of predictions."""
    method, images = small(tokenizer).eval(), torch.randn(2, 3, 24, 24)
    other = small(str(tmp_path / "gone")).eval()
    other.load_state_dict(method.state_dict(), strict=True)
    assert torch.equal(other.features(images), method.features(images))
    assert not isinstance(other, Reconstructs)
    encoder = {n: x for n, x in load_file(tokenizer).items() if n.startswith("encoder.")}
    save_file(encoder, tmp_path / "encoder.safetensors")
    assert not isinstance(small(str(tmp_path / "encoder.safetensors")), Reconstructs)


def test_a_run_is_evaluated_without_its_tokenizer(tmp_path):
    run = make_run(tmp_path / "run", beit, "shapes:count=16")
    run.config.tokenizer = str(tmp_path / "gone")
    assert run.embed(split="test")[0].shape[1] == 128


def test_a_tokenizer_that_changed_is_refused_at_a_resume(tokenizer, tmp_path, capsys):
    """It would have other codes; its decoder may change."""
    folder, path = tmp_path / "run", Path(tokenizer)
    data, settings = (open_source("shapes:count=16", "train"),) * 2, {"image_size": (24, 24), "mask_patches": 14}
    settings |= {"preset": "small", "batch_size": 16, "tokenizer": tokenizer, "workers": 0}
    run = fastssl.pretrain("beit", data, folder=folder, epochs=1, **settings)
    assert run.facts["tokenizer checksum"] == dvae.tokenizer_checksum(load_tokenizer(tokenizer))
    original = load_file(path)
    save_file({n: x + n.startswith("decoder.") for n, x in original.items()}, path)
    run.resume(data, epochs=2)
    save_file({n: x + n.endswith("output.conv.b") for n, x in original.items()}, path)
    refused(
        f"pretrain: the weights of --tokenizer {path} are not those that {folder} was started with: put these back "
        "there, or go on with the others (--allow-changed-data)",
        ValueError,
        lambda: run.resume(data, epochs=3),
    )
    resumed = fastssl.open_run(folder).resume(data, epochs=3, allow_changed_data=True)
    assert f"--tokenizer {path}: other weights" in capsys.readouterr().out
    assert resumed.facts["changed"].endswith("--epochs: 2 -> 3, --tokenizer " + f"{path}: other weights")
    with pytest.raises(ValueError, match=r"^pretrain: the weights of --tokenizer "):
        save_file(original, path)
        fastssl.open_run(folder).resume(data, epochs=4)


def test_the_tokenizer_is_read_once_for_its_view(tokenizer, monkeypatch):
    read = []
    monkeypatch.setattr(dvae, "read_file", lambda *args, **options: read.append(1) or read_file(*args, **options))
    config = tiny(tokenizer=tokenizer)
    assert [config.augmentation.views[1].size for _ in range(3)] == [(48, 48)] * 3 and len(read) == 1
    save_tokenizer(Path(tokenizer), groups=3)
    assert [config.augmentation.views[1].size for _ in range(3)] == [(24, 24)] * 3 and len(read) == 2


def test_masks_follow_the_seed(tokenizer):
    method, seed = small(tokenizer), torch.arange(64)
    masks = method.masks(seed)
    assert torch.equal(method.masks(seed.flip(0)), masks.flip(0))
    assert masks.sum(1).max() == 14 and masks.sum(1).float().mean() > 12
    assert not torch.equal(method.forward(batch_of(8))[0], method.forward(batch_of(8)._replace(seed=seed[8:16]))[0])


def test_reconstructions_decode_predicted_codes(tokenizer):
    method = small(tokenizer).eval()
    assert isinstance(method, Reconstructs)
    images, noise = torch.randn(5, 3, 24, 24), torch.rand(5, method.length)
    pred, mask = method.reconstruct(images, noise)
    assert pred.shape == (5, 36, 48) and mask.shape == (5, 36)
    assert set(mask.unique().tolist()) == {0.0, 1.0} and (mask.sum(1) <= 14).all()
    torch.testing.assert_close(method.reconstruct(images, noise), (pred, mask))
    torch.nn.init.normal_(method.lm_head.weight)
    assert not torch.equal(method.reconstruct(images, noise)[0], pred)


def _loss_and_gradients(path, world):
    rank = distributed.rank()
    torch.manual_seed(0)
    method = small(path, mask_patches=35, mask_min=16).double()
    batch = batch_of(8, torch.float64)
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    mine = Batch(tuple(x[share] for x in batch.views), batch.index[share], None, batch.seed[share])
    loss, _ = method(mine)
    loss.backward()
    gradients = {n: distributed.all_sum(p.grad) / world for n, p in method.named_parameters()}
    return (distributed.all_sum(loss.detach()) / world), gradients, method.masks(mine.seed).sum()


@pytest.mark.slow
def test_two_ranks_equal_one_process(tokenizer):
    """Also where they mask different numbers of patches: each masked patch of the batch counts the same."""
    (loss, gradients, _) = _loss_and_gradients(tokenizer, 1)
    ranks = run_ranks(2, _loss_and_gradients, tokenizer, 2)
    assert ranks[0][2] != ranks[1][2]
    for other, others, _ in ranks:
        torch.testing.assert_close((other, others), (loss, gradients), rtol=1e-9, atol=1e-12)


def test_refusals(tokenizer):
    config = tiny()
    wanted = "beit: --tokenizer must name a run of dvae, or a weights file of one or of DALL-E's encoder, got none: "
    refused(wanted + "fastssl pretrain dvae trains one", ValueError, lambda: config.augmentation)
    sentence = (
        "tokenizer: /nowhere is neither the folder of a run of dvae nor a weights file: name one, or put it back there "
        "to resume a run that was started with it"
    )
    refused(sentence, ValueError, lambda: dataclasses.replace(config, tokenizer="/nowhere").augmentation)
    refused(
        "beit: --mask-patches must be at least --mask-min 4, else most masks are empty, and below the 36 patches of an "
        "image, got 3",
        ValueError,
        beit.build,
        dataclasses.replace(config, mask_patches=3),
    )
    for size in ((24, 25), (22, 24)):
        with pytest.raises(ValueError, match=r"^beit: --image-size must be divisible by the patch size 4 of vit_mini"):
            beit.build(dataclasses.replace(config, image_size=size))
    with pytest.raises(ValueError, match=r"^beit: unknown backbone 'resnet50', there are vit_mini"):
        beit.build(beit.Config("resnet50"))
    untrained = beit.build(config)  # an encoder is evaluated without its tokenizer
    assert untrained.features(torch.randn(2, 3, 24, 24)).shape == (2, 128)
    refused(
        "BEiT: tokenizer must not be None for training: name one by Config(tokenizer=…)",
        ValueError,
        untrained,
        batch_of(2),
    )
