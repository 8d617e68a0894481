import copy
import functools

import pytest
import torch

from fastssl.contract import Batch, DefersUpdates, Method
from fastssl.methods import dino
from fastssl.methods.dino import DINO
from fastssl.milestones import shorten
from fastssl.nn import DINOHead, DINOLoss, MomentumEncoder
from fastssl.nn.crops import MultiCropNetwork
from fastssl.nn.vit import ViT
from fastssl.train.config import Execution, Training
from fastssl.train.trainer import Trainer
from tests.methods import transcription_prototypes as t
from tests.support.golden import part, read

EXACT = {"rtol": 1e-9, "atol": 1e-11}
POSITIONS = {"pos_embed": "learn", "dynamic_img_size": True, "pos_offset": 0.1, "pos_antialias": False}


def assert_equal(actual, expected, bounds=EXACT):
    assert expected and expected.keys() <= actual.keys()
    for name, x in expected.items():
        torch.testing.assert_close(actual[name].detach(), x, **bounds, msg=lambda m, name=name: f"{name}: {m}")


def golden_method():
    tensors, meta = read("dino_steps")
    vit, head = meta["vit"], meta["head"]
    shape = vit["embed_dim"], vit["depth"], vit["num_heads"], vit["mlp_ratio"]
    encoder = ViT(vit["img_size"], vit["patch_size"], 3, *shape, **POSITIONS)
    sizes = {"hidden_dim": head["hidden"], "bottleneck_dim": head["bottleneck"]}
    projector = DINOHead(vit["embed_dim"], head["out"], norm_last_layer=head["norm_last_layer"], **sizes)
    network = MultiCropNetwork(encoder, projector)
    network.load_state_dict({name: x.double() for name, x in part(tensors, "state.").items()}, strict=True)
    criterion = DINOLoss(head["out"], 0.04, 0.07, 1)
    return DINO(network.double(), criterion, 0.9, 1.0, epochs=3).double()


def test_three_golden_steps():
    """Losses, gradients, AdamW with scheduled weight decay, clipping, freezing, teacher and centre."""
    tensors, meta = read("dino_steps")
    model = golden_method()
    training = Training(
        3,
        256,
        "adamw",
        lr=0.01,
        weight_decay=0.04,
        weight_decay_end=0.4,
        clip_parameter_norm=meta["clip_grad"],
        freeze=("student.head.last_layer",),
        freeze_epochs=1,
    )
    trainer = Trainer(model, training, Execution(), steps_per_epoch=1)
    rates = iter(meta["lr"])  # not those of our schedule: the whole warm-up is one step
    decays = {group["weight_decay_scale"]: group for group in trainer.optimizer.param_groups}
    schedules = trainer._set_schedules

    def set_recorded_rate():
        schedules()
        rate = next(rates)
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate

    trainer._set_schedules = set_recorded_rate
    for step in range(3):
        views = tuple(tensors[f"step{step}.input.crop{i}"].double() for i in range(6))
        batch = Batch(views, torch.arange(3), None)
        if step == 0:
            copied = copy.deepcopy(model)
            copied.before_step(0.0)
            copied(batch)[0].backward()
            gradients = {name: p.grad for name, p in copied.student.named_parameters()}
        result = trainer.step(iter((batch,)))
        assert decays[1.0]["weight_decay"] == pytest.approx(meta["wd"][step], rel=1e-12)
        torch.testing.assert_close(result.loss, tensors[f"step{step}.loss"], **EXACT)
        assert model.momentum_of_step == pytest.approx(meta["momentum"][step], rel=1e-12)
        torch.testing.assert_close(model.dino_loss.center, tensors[f"step{step}.center_after"], **EXACT)
    assert_equal(gradients, part(tensors, "step0.grad."))
    assert_equal(model.student.state_dict(), part(tensors, "step2.student."))
    assert_equal(model.teacher.state_dict(), part(tensors, "step2.teacher."))


def test_positions_of_other_sizes_are_those_of_the_code():
    """Recorded from the student after the third step."""
    tensors, _ = read("dino_steps")
    model = golden_method()
    model.student.load_state_dict(part(tensors, "step2.student."))
    for rows, columns in ((2, 2), (2, 3)):
        expected = tensors[f"pos.encoding_{4 * rows}x{4 * columns}"][:, 1:]
        torch.testing.assert_close(model.student.backbone.positions((rows, columns)), expected, **EXACT)


# Twelve steps of a small method as `build` makes it, beside the plain-torch transcription

STEPS, EPOCHS, BATCH = 12, 4, 2


def small(**changes):
    config = dino.Config.small()
    sizes = {"image_size": (16, 16), "local_size": (8, 8), "local_crops": 3}
    head = {"prototypes": 24, "hidden": 16, "bottleneck": 8, "bn_in_head": False}
    for name, value in {"backbone": "vit_mini", "drop_path": 0.0, **sizes, **head, **changes}.items():
        setattr(config, name, value)
    return config


@functools.cache
def trained(norm_last_layer):
    """Batches, the student's initial state, and losses, student, teacher and centre of our run."""
    training = Training(EPOCHS, BATCH, "adamw", lr=0.512, weight_decay=0.04, weight_decay_end=0.4, warmup_epochs=1)
    training.warmup_includes_peak, training.clip_parameter_norm = True, 0.05
    training.freeze, training.freeze_epochs = ("student.head.last_layer",), 1
    schedule = {"ema_momentum": 0.9, "warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 3}
    config = small(norm_last_layer=norm_last_layer, training=training, **schedule)
    torch.manual_seed(0)
    model = dino.build(config).double()
    initial = {name: x.clone() for name, x in model.student.state_dict().items()}
    sizes = [view.size for view in config.augmentation.views]
    batches = [[torch.randn(BATCH, 3, *size, dtype=torch.float64) for size in sizes] for _ in range(STEPS)]
    trainer = Trainer(model, training, Execution(), STEPS // EPOCHS)
    losses = [trainer.step(iter([Batch(tuple(views), torch.arange(BATCH), None)])).loss for views in batches]
    return (
        batches,
        initial,
        results(losses, model.student.state_dict(), model.teacher.state_dict(), model.dino_loss.center),
    )


def results(losses, student, teacher, centre):
    names = {f"student.{name}": x for name, x in student.items()} | {
        f"teacher.{name}": x for name, x in teacher.items()
    }
    return dict(enumerate(losses)) | names | {"centre": centre}


def replayed(norm_last_layer, **wrong):
    """The initial state, our run, and that of the transcription with some settings changed."""
    batches, initial, ours = trained(norm_last_layer)
    per_epoch = STEPS // EPOCHS
    options = t.Options(
        backbone=lambda p, images: t.vit(p, images, heads=4),
        lr=lambda step: t.warmup_cosine(step, 0.004, 0.0, STEPS, per_epoch),
        decay=lambda step: t.warmup_cosine(step, 0.04, 0.4, STEPS),
        momentum=lambda step: t.warmup_cosine(step, 0.9, 1.0, STEPS),
        teacher_temp=lambda step: t.teacher_temperature(step // per_epoch, 0.04, 0.07, 3),
        clip=0.05,
        frozen_steps=per_epoch,
        fixed=("head.last_layer.weight_g",) if norm_last_layer else (),
    )
    run = t.run_dino(initial, batches, options._replace(**wrong))
    return initial, ours, results(run.losses, run.student, run.teacher, run.centre)


@pytest.mark.parametrize("norm_last_layer", [False, True])
def test_twelve_steps_of_the_transcription(norm_last_layer):
    initial, ours, theirs = replayed(norm_last_layer)
    assert ours.keys() == theirs.keys()
    assert_equal(ours, theirs, {"rtol": 1e-6, "atol": 1e-9})
    moved = {name for name, x in initial.items() if not torch.equal(ours[f"student.{name}"], x)}
    assert initial.keys() - moved == ({"head.last_layer.weight_g"} if norm_last_layer else set())


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip": 0.0},
        {"frozen_steps": 0},
        {"momentum": lambda step: 0.9},
        {"decay": lambda step: 0.04},
        {"teacher_temp": lambda step: 0.07},
        {"student_temp": 0.11},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_wrong_transcription_is_noticed(wrong):
    _, ours, theirs = replayed(False, **wrong)
    with pytest.raises(AssertionError):
        assert_equal(ours, theirs, {"rtol": 1e-4, "atol": 1e-6})


def test_it_fulfils_the_contract_and_evaluates_the_teacher():
    model, images = dino.build(small()).eval(), torch.randn(4, 3, 16, 16)
    assert isinstance(model, Method) and isinstance(model, DefersUpdates)
    assert model.features(images).shape == (4, 128)
    with torch.no_grad():
        for p in model.teacher.parameters():
            p.mul_(1.5)
    features = model.teacher.module.backbone(images)
    torch.testing.assert_close(model.features(images), features)
    assert not torch.allclose(model.student.backbone(images), features)


def test_only_the_student_has_drop_path_and_a_gradient():
    model = dino.build(small(drop_path=0.3))
    assert (model.student.backbone.drop_path_rate, model.teacher.module.backbone.drop_path_rate) == (0.3, 0.0)
    assert isinstance(model.teacher, MomentumEncoder)
    assert not any(p.requires_grad for p in model.teacher.parameters())
    for name, x in model.teacher.state_dict().items():
        assert torch.equal(x, model.student.state_dict()[name])


def test_initial_weights_of_the_vit():
    torch.manual_seed(0)
    vit = dino.build(small(backbone="vit_tiny", patch_size=8, local_size=(8, 8))).student.backbone
    for x in (vit.blocks[3].attn.qkv.weight, vit.blocks[5].mlp.fc2.weight, vit.pos_embed, vit.cls_token):
        assert x.std().item() == pytest.approx(0.02, rel=0.2)
    assert not vit.blocks[0].attn.qkv.bias.any()
    bound = (3 * 8 * 8) ** -0.5  # uniform within it: torch's default for a convolution
    assert 0.95 * bound < vit.patch_embed.proj.weight.abs().max() <= bound and vit.patch_embed.proj.bias.any()


def test_metrics_tell_a_collapse():
    model = dino.build(small())
    batch = Batch((*torch.randn(2, 4, 3, 16, 16), *torch.randn(3, 4, 3, 8, 8)), torch.arange(4), None)
    loss, metrics = model(batch)
    torch.testing.assert_close(metrics["kl"] + metrics["teacher_entropy"], loss.detach())
    assert metrics["kl"] > 0 and 0 < metrics["teacher_entropy"] < torch.tensor(24.0).log() and metrics["std"] > 0.01
    with torch.no_grad():
        for p in model.teacher.module.backbone.parameters():
            p.zero_()
    _, metrics = model(batch)
    assert metrics["std"] < 1e-6
    assert not any(x.requires_grad for x in metrics.values())


def test_the_temperature_of_the_teacher_rises_by_epoch():
    model = dino.build(small(warmup_teacher_temp=0.04, teacher_temp=0.06, warmup_teacher_temp_epochs=3))
    model.epochs = 5
    found = []
    for step in range(5 * 7):
        model.before_step(step / (5 * 7))
        found.append(model.teacher_temp.item())
    assert found == pytest.approx([0.04] * 7 + [0.05] * 7 + [0.06] * 21)


def test_defaults_are_those_of_the_paper_and_the_code():
    config = dino.Config.paper()
    training = config.training
    assert (training.epochs, training.batch_size, training.optimizer, training.lr) == (300, 1024, "adamw", 5e-4)
    assert (training.weight_decay, training.weight_decay_end, training.warmup_epochs) == (0.04, 0.4, 10)
    assert (training.clip_parameter_norm, training.freeze_epochs, training.lr_end * 4) == (3.0, 1, 1e-6)
    assert (config.warmup_teacher_temp, config.teacher_temp, config.warmup_teacher_temp_epochs) == (0.04, 0.07, 30)
    assert (config.ema_momentum, config.ema_momentum_end, config.center_momentum, config.tau) == (0.996, 1.0, 0.9, 0.1)
    assert (config.prototypes, config.hidden, config.bottleneck, config.norm_last_layer) == (65536, 2048, 256, False)
    assert dino.Config.paper("vit_base").norm_last_layer
    first, second, *local = config.augmentation.views
    assert (first.size, first.crop, first.blur_p, first.solarize_p) == ((224, 224), (0.4, 1.0), 1.0, 0.0)
    assert (second.size, second.crop, second.blur_p, second.solarize_p) == ((224, 224), (0.4, 1.0), 0.1, 0.2)
    assert len(local) == 8
    for view in local:
        assert (view.size, view.crop, view.blur_p, view.solarize_p) == ((96, 96), (0.05, 0.4), 0.5, 0.0)
    assert (first.jitter, first.jitter_p, first.grayscale_p, first.flip_p) == ((0.4, 0.4, 0.2, 0.1), 0.8, 0.2, 0.5)
    assert first.interpolation == "bicubic"
    probe = dino.linear_probe("vit_small")
    assert (probe.optimizer, probe.lr, probe.epochs, probe.weight_decay) == ("sgd", 0.001, 100, 0.0)


def test_defaults_of_a_resnet_are_those_of_the_codes_readme():
    config = dino.Config.paper("resnet50")
    training = config.training
    assert (training.optimizer, training.lr, training.weight_decay, training.batch_size) == ("sgd", 0.03, 1e-4, 512)
    assert training.weight_decay_end is None and training.epochs == 100
    views = config.augmentation.views
    assert views[0].crop == (0.14, 1.0) and views[-1].crop == (0.05, 0.14)
    assert config.norm_last_layer and config.teacher_temp == 0.04
    assert "head" not in dino.build(small(backbone="resnet_mini")).encoder.state_dict()


def test_shorter_runs_keep_their_milestones_in_proportion():
    config = shorten(dino.Config.paper(), 30)
    assert (config.warmup_teacher_temp_epochs, config.training.warmup_epochs, config.training.freeze_epochs) == (
        3,
        1,
        0.1,
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"backbone": "vit_nano"}, "dino: unknown backbone 'vit_nano', there are vit_mini, vit_tiny, vit_small, "),
        ({"local_size": (6, 8)}, "dino: --local-size must be divisible by the patch size 8 of vit_mini, got 6 8"),
        ({"patch_size": 5}, "dino: --image-size must be divisible by the patch size 5 of vit_mini, got 16 16"),
    ],
)
def test_bad_settings_are_refused(changes, sentence):
    with pytest.raises(ValueError) as error:
        dino.build(small(**changes))
    assert str(error.value).startswith(sentence)


def test_a_run_without_small_views():
    config = small(local_crops=0)
    model = dino.build(config)
    loss, _ = model(Batch(tuple(torch.randn(2, 4, 3, 16, 16)), torch.arange(4), None))
    assert loss.isfinite()
