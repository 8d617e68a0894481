import copy
import dataclasses

import pytest
import torch

from fastssl import distributed
from fastssl.contract import Batch, DefersUpdates, EmbedsText, MatchesText, Method, SchedulesMomentum
from fastssl.data.loader import Loader
from fastssl.data.sources.captions import open_split
from fastssl.data.token_table import build_table
from fastssl.methods import albef
from fastssl.methods.albef import ALBEF, MatchingALBEF, parameter_groups
from fastssl.nn.bert import PAD, BertForMaskedLM
from fastssl.nn.pairs import distilled_contrast, negative_weights
from fastssl.nn.vit import ViT
from fastssl.train.config import Execution, Training
from fastssl.train.recompute import recompute_blocks
from fastssl.train.trainer import Trainer
from tests.support.contract import refused
from tests.support.golden import part, read
from tests.support.ranks import run_ranks


def golden_model(meta, **changes):
    vit, bert = meta["vit"], meta["bert"]
    sizes = tuple(vit["img_size"]), vit["patch"], 3, vit["embed_dim"], vit["depth"], vit["heads"]
    images = ViT(*sizes, pos_embed="learn", global_pool="", norm_eps=vit["eps"])
    text = BertForMaskedLM(
        bert["encoder_width"],
        bert["hidden_size"],
        bert["num_hidden_layers"],
        bert["num_attention_heads"],
        bert["fusion_layer"],
        vocabulary=bert["vocab_size"],
        positions=bert["max_position_embeddings"],
        hidden=bert["intermediate_size"],
        dropout=0.0,
    )
    config = albef.Config(dim=meta["embed_dim"], queue_size=meta["queue_size"], ema_momentum=meta["momentum"])
    config.mlm_probability = meta["mlm_probability"]
    config.training = Training(2, meta["batch"], "adamw", 2e-2, 0.02)
    for name, value in changes.items():
        setattr(config, name, value)
    return MatchingALBEF(images, text, config)


def golden_batch(golden, step, model, dtype):
    """A batch of the golden file, whose draws replace those of the model."""
    inputs = {name: x.long() for name, x in part(golden, f"step{step}.input.").items() if name != "images"}
    negatives = inputs["neg_image_of_text"], inputs["neg_text_of_image"]
    model.negatives = lambda student, twin, seed: negatives
    model.mask = lambda tokens, seed: (inputs["mlm_input_ids"], inputs["mlm_labels"] >= 0)
    tokens = inputs["input_ids"]
    assert torch.equal(inputs["attention_mask"], (tokens != PAD).long())
    return Batch((golden[f"step{step}.input.images"].to(dtype),), None, None, None, {"tokens": tokens})


def contrast_of_the_reference(student, twin, keys, tau, alpha):
    """The reference keeps the share of the true key in float32, also in float64."""
    soft, hard = (distilled_contrast(student, twin, keys, tau, share) for share in (1.0, 0.0))
    return alpha * soft + (1 - alpha).float().to(hard.dtype) * hard


@pytest.mark.parametrize(
    ("dtype", "contrast", "bound"),
    [
        (torch.float64, contrast_of_the_reference, 1e-9),
        (torch.float64, distilled_contrast, 2e-7),
        (torch.float32, distilled_contrast, 2e-4),
    ],
)
def test_three_golden_steps(dtype, contrast, bound, monkeypatch):
    """Losses, gradients, the temperature, both queues, which wrap, momentum encoders, weights of the negatives; AdamW
    with the official rule of weight decay."""
    monkeypatch.setattr(albef, "distilled_contrast", contrast)
    golden, meta = read("albef")
    model = golden_model(meta).to(dtype)
    model.load_state_dict(part(golden, "state."), strict=True)
    groups = parameter_groups(model)
    for group in groups:
        group["weight_decay"] = 0.02 * group.pop("weight_decay_scale", 1.0)
    optimizer = torch.optim.AdamW(groups, lr=2e-2)

    def check(name, ours, expected):
        expected = expected.to(dtype)
        torch.testing.assert_close(ours.detach(), expected, rtol=bound, atol=bound / 10, msg=lambda m: f"{name}: {m}")

    model.update_twins()  # the reference updates them in its forward pass, also in the first
    for step in range(3):
        expected = part(golden, f"step{step}.")
        batch = golden_batch(golden, step, model, dtype)
        model.before_step(step / 4)
        check("alpha", model.alpha, expected["alpha"])
        check("temp", model.temp[0], expected["temp"])
        check("twin", model.vision_proj_m.module.weight, expected["momentum.vision_proj_m.weight"])
        tokens = batch.extras["tokens"]
        student, twin = model.encode(batch.views[0], tokens), model.encode(batch.views[0], tokens, twin=True)
        for name, ours in (("", student), ("_m", twin)):
            check(f"image_feat{name}", ours.image_z, expected[f"image_feat{name}"])
            check(f"text_feat{name}", ours.text_z, expected[f"text_feat{name}"])
        matched, _ = model.fuse(student, tokens != PAD, model.negatives(student, twin, None))
        check("itm_logits", matched, expected["itm_logits"])
        for name, queries, keys in (("t2i", student.text_z, twin.image_z), ("i2t", student.image_z, twin.text_z)):
            weights = negative_weights(queries, keys, model.temp)
            raised = 1e-4 * (1 - torch.eye(4, dtype=torch.float64))
            check(f"weights_{name}", weights.to(dtype), expected[f"weights_{name}"] + raised)
        loss, metrics = model(batch)
        loss.backward()
        check("loss_ita", metrics["loss_itc"], expected["loss_ita"])
        check("loss_itm", metrics["loss_itm"], expected["loss_itm"])
        check("loss_mlm", metrics["loss_mlm"], expected["loss_mlm"])
        total = sum(expected[f"loss_{name}"] for name in ("ita", "itm", "mlm"))
        check("loss", loss, total)
        for name, gradient in part(expected, "grad.").items():
            check(f"gradient of {name}", model.get_parameter(name).grad.reshape(gradient.shape), gradient)
        optimizer.step()
        optimizer.zero_grad()
        check("temp after the step", model.temp[0], expected["stepped.temp"])
        check("weight after the step", model.vision_proj.weight, expected["stepped.vision_proj.weight"])
        model.after_step((step + 1) / 4)
        state = model.state_dict()
        for name in ("image_queue", "text_queue"):
            check(name, state[name], expected[name])
        assert torch.equal(state["queue_ptr"], expected["queue_ptr"].long())


def small(**changes):
    """The method with tiny networks."""
    torch.manual_seed(0)
    sizes = {"dim": 8, "queue_size": 24, "alpha": 0.4, "ema_momentum": 0.99}
    config = dataclasses.replace(albef.Config.small(), **sizes | changes)
    config.training = Training(2, 8, "adamw", 0.1, 0.02)
    images = ViT(32, 16, 3, 32, 2, 2, pos_embed="learn", global_pool="")
    text = BertForMaskedLM(32, 16, 2, 2, 1, dropout=config.dropout)
    return (MatchingALBEF if config.itm_weight else ALBEF)(images, text, config)


def batch_of(count=4, length=8):
    tokens = torch.randint(1000, 30_000, (count, length))
    tokens[:, 0], tokens[1:, 5:] = 101, PAD
    seed = torch.arange(count) + 17
    return Batch((torch.randn(count, 3, 32, 32),), torch.arange(count), torch.zeros(count), seed, {"tokens": tokens})


def test_it_fulfils_the_contract():
    method, batch = small().eval(), batch_of()
    for protocol in (Method, SchedulesMomentum, DefersUpdates, EmbedsText, MatchesText):
        assert isinstance(method, protocol)
    (images,), tokens = batch.views, batch.extras["tokens"]
    features = method.features(images)
    assert torch.equal(features, method.encoder(images))
    assert torch.equal(features, method.visual_encoder(images)[:, 0])
    for z in (method.embed_images(images), method.embed_text(tokens)):
        assert z.shape == (4, 8)
        torch.testing.assert_close(z.norm(dim=1), torch.ones(4))
    one = torch.stack([method.match(images[:1], tokens[i : i + 1])[0] for i in range(4)])
    torch.testing.assert_close(method.match(images[:1], tokens), one)
    torch.testing.assert_close(method.match(images, tokens)[0], one[0])
    longer = torch.cat([tokens, torch.full((4, 8), PAD)], 1)
    torch.testing.assert_close(method.match(images, longer), method.match(images, tokens))
    torch.testing.assert_close(method.embed_text(longer), method.embed_text(tokens))


def test_names_and_sizes_are_the_official_ones():
    with torch.device("meta"):
        method = albef.build(albef.Config.paper())
        state = method.state_dict()
    shapes = {name: tuple(x.shape) for name, x in state.items()}
    assert shapes["visual_encoder.pos_embed"] == (1, 257, 768)
    assert shapes["text_encoder.bert.encoder.layer.6.crossattention.self.key.weight"] == (768, 768)
    assert "text_encoder.bert.encoder.layer.5.crossattention.self.key.weight" not in shapes
    assert shapes["text_encoder_m.cls.predictions.bias"] == (30522,)
    assert shapes["image_queue"] == shapes["text_queue"] == (256, 65536)
    assert (shapes["queue_ptr"], shapes["temp"], shapes["itm_head.weight"]) == ((1,), (), (2, 768))
    parts = {"visual_encoder", "text_encoder", "vision_proj", "text_proj"}
    assert {name.split(".")[0] for name in state} == {
        *parts,
        *(f"{name}_m" for name in parts),
        *("itm_head", "temp", "image_queue", "text_queue", "queue_ptr"),
    }
    assert round(sum(p.numel() for p in method.visual_encoder.parameters()) / 1e6, 1) == 85.8


def test_defaults_are_those_of_the_code():
    config = albef.Config.paper()
    t = config.training
    assert (t.epochs, t.batch_size, t.optimizer, t.weight_decay, t.betas) == (30, 512, "adamw", 0.02, (0.9, 0.999))
    assert (t.lr * 2, t.lr_end * 2, t.warmup_lr * 2, t.warmup_stair) == (1e-4, 1e-5, 1e-5, 100)
    assert (config.tau, config.alpha, config.alpha_epochs, config.ema_momentum) == (0.07, 0.4, 1, 0.995)
    assert (config.queue_size, config.dim, config.mlm_probability, config.dropout) == (65536, 256, 0.15, 0.1)
    (view,) = config.augmentation.views
    assert (view.size, view.crop, view.flip_p, view.interpolation) == ((256, 256), (0.2, 1.0), 0.5, "bicubic")
    assert view.random_augment and not albef.Config.small().augmentation.views[0].random_augment
    assert (config.text.tokenizer, config.text.length) == ("bert", 25)
    assert (config.text.separator, config.text.clean) == (False, True)


def test_weight_decay_is_for_all_but_vectors_and_biases():
    method = small()
    names = {id(p): name for name, p in method.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in parameter_groups(method))
    assert {"temp", "visual_encoder.cls_token", "visual_encoder.pos_embed"} <= decayed
    assert "text_encoder.bert.embeddings.word_embeddings.weight" in decayed
    assert {"visual_encoder.norm.weight", "text_encoder.cls.predictions.bias", "itm_head.bias"} <= spared


def test_alpha_and_the_temperature_are_set_before_a_step():
    golden, method = read("schedules_text")[0], small(alpha_epochs=1)
    for i, expected in enumerate(golden["albef.alpha_epoch0"].tolist()):  # every 50 of 2,350 steps
        method.before_step(i * 50 / 2350 / 2)
        assert method.alpha.item() == pytest.approx(expected, rel=1e-6)
    for progress in (0.5, 0.9):
        method.before_step(progress)
        assert method.alpha.item() == pytest.approx(0.4)
    for value, kept in ((0.7, 0.5), (0.0001, 0.001), (0.2, 0.2)):
        torch.nn.init.constant_(method.temp, value)
        method.before_step(0.0)
        assert method.temp.item() == pytest.approx(kept)
    constant = small(alpha_epochs=0)
    constant.before_step(0.0)
    assert constant.alpha.item() == pytest.approx(0.4)


def test_forward_reads_and_after_step_writes():
    method, batch = small(), batch_of()
    before = copy.deepcopy(method.state_dict())
    loss, metrics = method(batch)
    loss.backward()
    assert all(torch.equal(x, before[name]) for name, x in method.state_dict().items())
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    total = sum(metrics[f"loss_{name}"] for name in ("itc", "itm", "mlm"))
    torch.testing.assert_close(loss.detach(), total)
    torch.optim.SGD(method.parameters(), lr=0.1).step()
    image_keys, text_keys = method.pending[0]
    method.after_step(0.0)
    state = method.state_dict()
    assert torch.equal(state["image_queue"][:, :4].T, image_keys)
    assert torch.equal(state["text_queue"][:, :4].T, text_keys)
    assert state["queue_ptr"].item() == 4 and not method.pending
    name = "visual_encoder{}.blocks.0.mlp.fc1.weight"
    expected = 0.99 * before[name.format("_m")] + 0.01 * state[name.format("")]
    torch.testing.assert_close(state[name.format("_m")], expected)


def test_draws_follow_the_seeds_and_not_the_batch():
    """A sample's masks are its own in another order and beside a longer caption; negatives are other pairs."""
    method, batch = small(), batch_of()
    tokens = batch.extras["tokens"]
    corrupted, masked = method.mask(tokens, batch.seed)
    order = torch.tensor([2, 0, 3, 1])
    longer = torch.cat([tokens, torch.full((4, 8), PAD)], 1)
    others = method.mask(longer[order], batch.seed[order])
    assert torch.equal(others[0][:, :8], corrupted[order]) and torch.equal(others[1][:, :8], masked[order])
    assert not torch.equal(method.mask(tokens, batch.seed + 1)[1], masked)
    student = method.encode(batch.views[0], tokens)
    for drawn in method.negatives(student, student, batch.seed):
        assert (drawn != torch.arange(4)).all()
    again = method.negatives(student, student, batch.seed)
    assert all(map(torch.equal, again, method.negatives(student, student, batch.seed)))
    without = batch._replace(seed=None)
    assert method(without)[0].isfinite()


@pytest.mark.parametrize(("itm", "mlm"), [(0, 0), (1, 0), (0, 1)])
def test_a_loss_of_weight_0_is_not_computed_and_its_parts_are_not_trained(itm, mlm):
    method = small(itm_weight=float(itm), mlm_weight=float(mlm))
    loss, metrics = method(batch_of())
    loss.backward()
    assert ("loss_itm" in metrics, "loss_mlm" in metrics) == (bool(itm), bool(mlm))
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    assert method.itm_head.weight.requires_grad == bool(itm)
    assert method.text_encoder.cls["predictions"].bias.requires_grad == bool(mlm)
    fusion = next(method.text_encoder.fusion_layers[0].parameters())
    assert fusion.requires_grad == bool(itm or mlm)
    assert isinstance(method, MatchesText) == bool(itm)


def test_without_distillation_masked_texts_have_no_twin():
    """At α = 0 they would have no share in the targets; the loss is the same without their pass."""
    with_twin, without, batch = small(), small(alpha=0.0), batch_of()
    assert with_twin.alpha == without.alpha == 0
    torch.testing.assert_close(with_twin(batch)[0], without(batch)[0])
    passes = []
    twin = without.text_encoder_m
    twin.register_forward_hook(lambda module, args, kwargs, out: passes.append(args), with_kwargs=True)
    without(batch)
    assert [len(args[0]) for args in passes] == [4]


def test_positions_of_a_narrow_image_encoder_are_seen_from_the_start():
    """With deviations of 0.02 beside 0.8 of patches, R@1 of the preset `small` was a third lower."""
    vit = albef.build(albef.Config.small()).visual_encoder
    source = open_split("count=32", "train")
    pixels = torch.stack([torch.from_numpy(source.read(i)) for i in range(32)]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (albef.MEAN, albef.STD))
    patches = vit.embed((pixels - mean) / std)
    assert 0.2 < vit.pos_embed.std() / patches.std() < 1
    base = ViT(32, 16, 3, 768, 1, 12, pos_embed="learn", global_pool="")
    before = base.pos_embed.clone()
    albef.raise_gain(base, 768)
    assert torch.equal(base.pos_embed, before)


def test_refusals():
    method, batch = small(), batch_of()
    sentence = "albef: a batch must have the tokens of captions, got none: use a source with captions"
    refused(sentence, ValueError, method, batch._replace(extras={}))
    config = albef.Config.small()
    for changes, sentence in [
        (
            {"backbone": "resnet50"},
            "albef: unknown backbone 'resnet50', there are vit_mini, vit_tiny, vit_small, vit_base, vit_large, "
            "vit_giant",
        ),
        ({"text_model": "gpt"}, "albef: unknown --text-model 'gpt', there are bert_mini, bert_base"),
        ({"patch_size": 5}, "albef: --image-size must be divisible by the patch size 5 of vit_mini, got 32 32"),
        (
            {"training": Training(2, 4, "adamw", 0.1, 0.0, accumulate=4)},
            "albef: --batch-size must give at least 2 images at once, since a negative is another pair of the same "
            "micro-batch and rank, got 4 in 4 micro-batches (--accumulate)",
        ),
    ]:
        refused(sentence, ValueError, albef.build, dataclasses.replace(config, **changes))


def trained(steps, state=None, shard=False, accumulate=1, **changes):
    """Losses and state of steps of 16 captioned images in float64, from a state or from the start; 3 are an epoch."""
    method = small(**changes).double()
    torch.manual_seed(distributed.rank())
    training = Training(2, 16, "adamw", 0.1, 0.02, accumulate=accumulate)
    source = open_split("count=48", "train")
    tokens, world = build_table(source, method.config.text), distributed.world_size()
    ranks = {"rank": distributed.rank(), "world": world}
    loader = Loader(source, method.config.augmentation, 16 // world // accumulate, **ranks, tokens=tokens)
    execution = Execution(tensorboard=False, shard=shard)
    trainer = Trainer(method, training, execution, 3, parameter_groups=parameter_groups, state=state)
    losses = []
    while trainer.steps < steps:
        epoch, start = divmod(trainer.steps, 3)
        batches = loader.epoch(epoch, start * accumulate)
        result = trainer.step(batch._replace(views=(batch.views[0].double(),)) for batch in batches)
        losses.append(distributed.all_mean(torch.stack([result.loss, result.grad_norm.double()])))
    return losses, trainer.state()


def same(one, two, bound):
    for ours, theirs in zip(one[0], two[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=0)
    for name, x in one[1]["model"].items():
        torch.testing.assert_close(two[1]["model"][name], x, rtol=bound, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shard", "changes"),
    [
        (False, {}),
        pytest.param(False, {"itm_weight": 0.0, "mlm_weight": 0.0}, marks=pytest.mark.exhaustive),
        pytest.param(True, {}, marks=pytest.mark.exhaustive),
    ],
)
def test_two_ranks_equal_two_micro_batches_of_one_process(shard, changes):
    """As in the code, a rank contrasts with its own pairs and the queue: its part of a batch is a micro-batch. Losses,
    queues in the order of the whole batch, weights; the draws follow the samples."""
    one = trained(3, accumulate=2, **changes)
    for two in run_ranks(2, _call, 3, {"shard": shard, **changes}):
        same(one, two, 1e-8)


def _call(steps, options):
    return trained(steps, **options)


def test_a_resumed_run_is_bit_equal():
    """With dropout, whose random state is in the checkpoint, in the middle of an epoch."""
    whole = trained(5, dropout=0.1)
    first = trained(2, dropout=0.1)
    rest = trained(5, first[1], dropout=0.1)
    assert all(map(torch.equal, [*first[0], *rest[0]], whole[0]))
    for name, x in whole[1]["model"].items():
        assert torch.equal(rest[1]["model"][name], x), name


def test_recomputing_blocks_repeats_their_dropout():
    """--recompute runs a block twice; with another mask the second time the gradient would be wrong."""
    gradients = []
    for recompute in (False, True):
        method, batch = small(dropout=0.3), batch_of()
        if recompute:
            recompute_blocks(method)
        torch.manual_seed(1)
        method(batch)[0].backward()
        gradients.append([p.grad for p in method.parameters() if p.requires_grad])
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two)


@pytest.mark.exhaustive
def test_torch_compile_captures_the_method_as_one_graph():
    """Forward and loss without a graph break, and the same values: nothing waits for the number of masked tokens."""
    method, batch = small(), batch_of()
    torch._dynamo.reset()
    expected, _ = method(batch)
    loss, _ = torch.compile(method, fullgraph=True, backend="aot_eager")(batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
