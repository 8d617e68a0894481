import pytest
import torch
from torch import nn

from fastssl.contract import Batch, Method
from fastssl.eval.finetuning import build_classifier
from fastssl.methods import dinov2
from fastssl.methods.dinov2 import DINOv2, counted_mean
from fastssl.nn import DINOHead, patch_masks
from fastssl.nn.heads import FactoredLogits
from fastssl.nn.patch_network import DINOv2Network, patch_cross_entropy
from fastssl.nn.prototype_losses import mean_logits
from fastssl.nn.vit import ViT
from fastssl.ops import soft_cross_entropy
from fastssl.train.config import Execution, Training
from fastssl.train.optim import build_optimizer
from fastssl.train.trainer import Trainer
from fastssl.weight_names import rename, student_and_teacher
from tests.support.contract import refused
from tests.support.golden import part, read

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def golden_method(mode):
    """DINOv2 with the weights of the golden step, loaded by the names of the official code."""
    tensors, meta = read("dinov2_step")
    vit, heads = meta["vit"], meta["heads"]
    sizes = {key: vit[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    options = {"init_values": vit["layerscale"], "reg_tokens": vit["register_tokens"], "no_embed_reg": True}
    options |= {"pos_embed": "learn", "dynamic_img_size": True, "pos_antialias": False, "mask_token": True}
    backbone = ViT(**sizes, **options, pos_offset=vit["interpolate_offset"])
    sizes = {"hidden_dim": heads["hidden"], "bottleneck_dim": heads["bottleneck"], "norm_last_layer": False}
    is_separate = mode == "sinkhorn_knopp"
    ibot_head = DINOHead(16, heads["ibot_out"], **sizes) if is_separate else None
    student = DINOv2Network(backbone, DINOHead(16, heads["dino_out"], **sizes), ibot_head)
    config = dinov2.Config(centering=mode, warmup_teacher_temp=meta["teacher_temp"], teacher_temp=meta["teacher_temp"])
    model = DINOv2(student, config)
    state = part(tensors, "centering.state.")  # the backbone is the same in both cases
    if is_separate:
        state = {name: x for name, x in state.items() if ".backbone." in name} | part(tensors, f"{mode}.state.")
    missing, unexpected = model.load_state_dict(student_and_teacher(state, fold=False), strict=False)
    assert not unexpected and all(name.endswith("_loss.center") for name in missing)
    return model.double()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", ["centering", "sinkhorn_knopp"])
def test_golden_step(mode, padded, monkeypatch):
    """Loss, its terms and all recorded gradients; also with rows that only fill up, as on a GPU."""
    tensors, _ = read("dinov2_step")
    expected, model, mask = part(tensors, f"{mode}."), golden_method(mode), tensors["input.masks"]
    monkeypatch.setattr(patch_masks, "reads_are_free", lambda x: not padded)
    rows = patch_masks.masked_rows(mask, torch.float64, most=11)
    assert len(rows.rows) == (11 if padded else 8)
    torch.testing.assert_close(rows.weights[:8], tensors["input.masks_weight"], rtol=1e-12, atol=0)
    monkeypatch.setattr(model, "masked_rows", lambda batch: (rows, mask))
    views = (*tensors["input.global_crops"].double().chunk(2), *tensors["input.local_crops"].double().chunk(3))
    model.before_step(0.0)
    loss, metrics = model(Batch(views, None, None))
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected["total"], **EXACT)
    torch.testing.assert_close(metrics["patch"], 2 * expected["ibot_loss"], **EXACT)
    torch.testing.assert_close(0.1 * metrics["koleo"], expected["koleo_loss"], **EXACT)
    cls = expected["dino_global_crops_loss"] + expected["dino_local_crops_loss"]
    torch.testing.assert_close(metrics["cls"], cls, **EXACT)
    for name, gradient in part(expected, "grad.").items():
        ours = model.student.get_parameter(rename(name, ((r"register_tokens", "reg_token"),)))
        torch.testing.assert_close(ours.grad, gradient, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


def given_logits(x):
    """Logits as features, with unit vectors as prototypes."""
    return FactoredLogits(x, torch.eye(x.shape[1], dtype=x.dtype))


def probabilities(targets):
    logits = targets.teacher @ targets.weight.T / targets.tau
    return (logits + targets.row_offset[:, None] + targets.column_offset).exp()


@pytest.mark.parametrize("mode", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize("step", range(3))
def test_golden_patch_losses(step, mode):
    """Targets, loss and gradient for varying numbers of masked patches, with rows that only fill up."""
    golden, meta = read("dinov2_losses")
    case = part(golden, f"patch.step{step}.")
    expected = part(case, f"{mode.removesuffix('_knopp')}.")
    model = tiny(centering=mode, prototypes=9)
    model.teacher_temp = torch.tensor(meta["patch"]["teacher_temp"], dtype=torch.float64)
    model.ibot_patch_loss.center = case["center_used"]
    student = case["input.student"].double().requires_grad_()
    teacher = torch.cat([case["input.teacher"].double(), torch.ones(3, 9, dtype=torch.float64)])
    count = len(case["masks_weight"])
    counted, weights = torch.arange(count + 3) < count, torch.zeros(count + 3, dtype=torch.float64)
    weights[:count] = case["masks_weight"]
    targets = model.targets(given_logits(teacher), model.ibot_patch_loss, counted)
    torch.testing.assert_close(probabilities(targets)[:count], expected["probabilities"], **EXACT)
    rows = patch_masks.MaskedRows(None, weights, counted)
    loss = patch_cross_entropy(given_logits(student), targets, 0.1, rows, len(case["mask"]))
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected["loss"], **EXACT)
    torch.testing.assert_close(student.grad, expected["grad.student"], **EXACT)


@pytest.mark.parametrize("step", range(3))
def test_golden_class_token_losses(step):
    """The code's loss takes all pairs that it is given: here six students with both halves of the teacher."""
    golden, meta = read("dinov2_losses")
    case = part(golden, f"cls.step{step}.")
    model = tiny(prototypes=9)
    model.teacher_temp = torch.tensor(meta["cls"]["teacher_temp"], dtype=torch.float64)
    model.dino_loss.center = case["center_used"]
    targets = model.targets(given_logits(case["input.teacher"].double()), model.dino_loss, None)
    torch.testing.assert_close(probabilities(targets), case["probabilities"], **EXACT)
    student = case["input.student"].double().requires_grad_()
    teachers = torch.tensor([[i, 4 + i] for i in range(4)] * 6)
    loss = soft_cross_entropy(*given_logits(student.flatten(0, 1)), 0.1, targets, teachers).sum() / 4
    loss.backward()
    torch.testing.assert_close(loss.detach(), case["loss"], **EXACT)
    torch.testing.assert_close(student.grad, case["grad.student"], **EXACT)


@pytest.mark.parametrize("rows", [4, 12, 40])
def test_golden_sinkhorn_targets(rows):
    golden, _ = read("dinov2_losses")
    model = tiny(centering="sinkhorn_knopp", prototypes=9)
    model.teacher_temp = torch.tensor(0.07, dtype=torch.float64)
    targets = model.targets(given_logits(golden[f"sinkhorn.n{rows}.input"].double()), model.dino_loss, None)
    torch.testing.assert_close(probabilities(targets), golden[f"sinkhorn.n{rows}.output"], **EXACT)


def test_golden_centres_are_means_over_masked_patches_alone():
    """Three steps of DINOv2's centre, from logits: the first rows of a padded batch count."""
    golden, _ = read("dinov2_losses")
    model = tiny(centering="centering")
    centre = torch.zeros(1, 9, dtype=torch.float64)
    for step in range(3):
        teacher = golden[f"patch.step{step}.input.teacher"].double()
        torch.testing.assert_close(centre, golden[f"patch.step{step}.center_used"][0], **EXACT)
        padded = torch.cat([teacher, torch.randn(3, 9, dtype=torch.float64)])
        counted = torch.arange(len(padded)) < len(teacher)
        mean = mean_logits(counted_mean(given_logits(padded), counted))
        model.ibot_patch_loss.center = centre
        model.ibot_patch_loss.update_center(mean[None])
        centre = model.ibot_patch_loss.center
    torch.testing.assert_close(centre, golden["patch.center_after"][0], **EXACT)


def test_golden_parameter_groups():
    """Factors of learning rate and weight decay, the last layer apart, the parts that are clipped together."""
    expected = read("dinov2_misc")[1]["param_groups"]
    model = tiny(layer_decay=expected["layerwise_decay"], patch_embed_lr=expected["patch_embed_lr_mult"], registers=2)
    model.student.backbone.blocks = model.student.backbone.blocks[: expected["depth"]]
    groups = dinov2.parameter_groups(model)
    names = {id(p): name for name, p in model.student.named_parameters()}
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    table = expected["table"]
    assert len(found) == len(table) == sum(len(group["params"]) for group in groups)
    for name, (lr, decay, is_last) in table.items():
        name = rename(name, ((r"^(?!dino_head)", "backbone."), ("register_tokens", "reg_token")))
        group = found[name]
        assert (group["lr_scale"], group["weight_decay_scale"]) == pytest.approx((lr, decay), rel=1e-12), name
        assert (group["still_epochs"] > 0) == is_last
        assert group["part"] == name.partition(".")[0]


def test_golden_schedules():
    """The warm-ups of the code reach their end a step earlier: its lines include both ends."""
    golden, _ = read("dinov2_misc")
    model = tiny(warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=3, epochs=10)
    steps, warmup = 50, 15
    for step in range(steps):
        stretched = step * warmup / (warmup - 1) if step < warmup else step
        model.before_step(stretched / steps)
        assert model.teacher_temp.item() == pytest.approx(golden["schedule.teacher_temp"][step].item(), rel=1e-6)
    start, end = golden["schedule.momentum"][0].item(), golden["schedule.momentum"][50].item()
    model.momentum, model.momentum_end = start, end
    for step in range(steps):
        assert model.momentum_at(step / steps) == pytest.approx(golden["schedule.momentum"][step].item(), rel=1e-12)


def tiny(epochs=None, **changes):
    config = dinov2.Config.small()
    sizes = {"patch_size": 4, "hidden": 24, "prototypes": 16, "bottleneck": 8}
    sizes |= {"patch_prototypes": 12, "patch_bottleneck": 6, "centering": "centering", "koleo_weight": 0.1}
    sizes |= {"norm_last_layer": False, "layer_scale": 0.1, "patch_embed_lr": 0.2, "still_epochs": 0.5}
    for name, value in {**sizes, **changes}.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    config.training.epochs = epochs or config.training.epochs
    return dinov2.build(config)


def batch_of(images=4):
    views = (*torch.randn(2, images, 3, 32, 32), *torch.randn(4, images, 3, 16, 16))
    return Batch(views, torch.arange(images), torch.arange(images), torch.arange(images))


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize("separate_head", [False, True])
def test_it_fulfils_the_contract(centering, separate_head):
    model = tiny(centering=centering, separate_head=separate_head, registers=2, drop_path=0.4)
    assert isinstance(model, Method)
    batch = batch_of()
    model.before_step(0.0)
    loss, metrics = model(batch)
    loss.backward()
    assert all(p.grad is not None for p in model.student.parameters() if p.requires_grad)
    assert all(x.isfinite() for x in metrics.values())
    centre = model.dino_loss.center.clone()
    model.after_step(0.1)
    assert torch.equal(model.dino_loss.center, centre) == (centering == "sinkhorn_knopp")
    assert model.features(batch.views[0]).shape == (4, 128)
    assert "mask_token" not in model.encoder.state_dict()


def test_masks_are_functions_of_the_batchs_seeds():
    model = tiny()
    batch = batch_of(16)
    (rows, mask), (_, again) = model.masked_rows(batch), model.masked_rows(batch)
    assert torch.equal(mask, again) and mask.shape == (32, 64)
    other = batch._replace(seed=batch.seed + 1)
    assert not torch.equal(mask, model.masked_rows(other)[1])
    assert (mask.sum(1) > 0).sum() == 16
    assert len(rows.rows) == mask.sum()
    torch.testing.assert_close(rows.weights.sum(), torch.tensor(16.0))


def test_the_last_layer_stands_still_while_its_moments_grow():
    """Unlike DINO's, whose gradient is left out."""
    torch.manual_seed(0)
    model = tiny(still_epochs=1, separate_head=True)
    training = Training(2, 256, "adamw", 1e-2, 0.0, clip_parameter_norm=3.0)
    trainer = Trainer(model, training, Execution(), 1, parameter_groups=dinov2.parameter_groups)
    last = model.student.dino_head.last_layer.weight_v, model.student.ibot_head.last_layer.weight_v
    before = [p.detach().clone() for p in last]
    trainer.step(iter([batch_of()]))
    for p, x in zip(last, before):
        assert torch.equal(p, x) and trainer.optimizer.state[p]["exp_avg"].abs().max() > 0
    trainer.step(iter([batch_of()]))
    for p, x in zip(last, before):
        assert not torch.equal(p, x)


def test_backbone_and_heads_are_clipped_apart(monkeypatch):
    model = tiny(separate_head=True)
    training = Training(1, 256, "adamw", 1e-2, 0.0, clip_parameter_norm=1e-3)
    trainer = Trainer(model, training, Execution(), 1, parameter_groups=dinov2.parameter_groups)
    norms = []

    def measured(*args):
        for module in (model.student.backbone, model.student.dino_head, model.student.ibot_head):
            norms.append(nn.utils.get_total_norm([p.grad for p in module.parameters()]).item())

    monkeypatch.setattr(trainer.optimizer, "step", measured)
    trainer.step(iter([batch_of()]))
    assert norms == pytest.approx([1e-3] * 3, rel=0.1)


def test_without_masked_patches_their_loss_is_0():
    model = tiny(mask_probability=0.0)
    loss, metrics = model(batch_of())
    loss.backward()
    assert metrics["patch"] == 0 and loss.isfinite()
    model.after_step(0.5)
    assert model.ibot_patch_loss.center.isfinite().all()


def test_a_classifier_takes_the_teacher_with_registers():
    model, images = tiny(registers=2).eval(), torch.randn(2, 3, 32, 32)
    classifier = build_classifier(model, "vit_mini", 5).eval()
    tokens = model.encoder.encode(
        model.encoder.embed(images) + model.encoder.positions((8, 8)), torch.float32
    )  # normalised, where the classifier normalises the mean
    assert classifier(images).shape == (2, 5) and tokens.shape == (2, 3 + 64, 128)
    model.encoder.norm.weight.data.fill_(1.0)
    expected = model.encoder.norm(classifier.forward_features(images))[1]
    torch.testing.assert_close(expected, tokens, rtol=1e-4, atol=1e-4)


def test_bad_settings_get_a_sentence():
    config = dinov2.Config.small()
    config.training.batch_size = 1
    with pytest.raises(ValueError, match="dinov2: --batch-size must give at least 2 images at once, since KoLeo"):
        dinov2.build(config)
    refused("dinov2: --mask-ratio must be a range below 1, got 0.5 0.1", ValueError, tiny, mask_ratio=(0.5, 0.1))
    sentence = "dinov2: backbone must be a ViT of ours, whose patches are masked, got 'resnet_mini'"
    refused(sentence, ValueError, tiny, backbone="resnet_mini")


def test_defaults_are_those_of_the_short_recipe():
    config = dinov2.Config.paper()
    t = config.training
    assert (t.optimizer, t.lr_scaling, t.weight_decay, t.weight_decay_end, t.betas) == (
        "adamw",
        "sqrt",
        0.04,
        0.4,
        (0.9, 0.999),
    )
    assert t.lr * 2 == pytest.approx(4e-3) and t.lr_end * 8**0.5 == pytest.approx(1e-6)  # for 1024 and for 2048 images
    assert (config.backbone, config.drop_path, config.layer_scale, config.registers) == ("vit_large", 0.3, 1e-5, 0)
    assert (config.prototypes, config.hidden, config.bottleneck, config.separate_head) == (65536, 2048, 256, False)
    assert (config.ema_momentum, config.koleo_weight, config.layer_decay, config.patch_embed_lr) == (
        0.992,
        0.1,
        0.9,
        0.2,
    )
    first, second, *small = config.augmentation.views
    assert (first.blur_p, second.blur_p, small[0].blur_p, len(small)) == (0.0, 0.9, 0.5, 8)
    assert (first.crop, small[0].crop, second.solarize_p) == ((0.32, 1.0), (0.05, 0.32), 0.2)
    groups = dinov2.parameter_groups(tiny())
    optimizer = build_optimizer(tiny(), t, dinov2.parameter_groups)
    assert {group["part"] for group in optimizer.param_groups} == {group["part"] for group in groups}
