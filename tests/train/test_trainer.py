"""The trainer's step: schedules, frozen parameters and parameter groups against formulas in plain torch."""

import dataclasses

import pytest
import torch

from fastssl.contract import (
    Autoencodes,
    Batch,
    Completes,
    DefersUpdates,
    Method,
    PreparesEpochs,
    RanksNegatives,
    Reconstructs,
    SchedulesMomentum,
)
from fastssl.methods import (
    albef,
    barlow_twins,
    beit,
    byol,
    clip,
    cpc,
    deepcluster,
    deepcluster_v2,
    densecl,
    dino,
    dinov2,
    dvae,
    ibot,
    igpt,
    mae,
    moco_v1,
    moco_v2,
    moco_v3,
    siglip,
    simclr_v1,
    simmim,
    simsiam,
    swav,
    vicreg,
)
from fastssl.nn import MomentumEncoder
from fastssl.train.config import Execution, Training
from fastssl.train.optim import parameters_to_freeze
from fastssl.train.schedule import cosine_schedule
from fastssl.train.trainer import Trainer
from tests.support import toy_method
from tests.support.ranks import run_ranks
from tests.support.toy_method import Autoencoder

EPOCHS, STEPS = 3, 4
FREEZE = {"freeze": ("decoder",), "freeze_epochs": 1.5}


def toy(dim=8):
    torch.manual_seed(0)
    return Autoencoder(dim).double()


def toy_batch(step, size=8):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(size, 3, 16, 16, generator=generator, dtype=torch.float64)
    return Batch((images,), torch.arange(size), torch.arange(size))


def training_of(optimizer, **changes):
    settings = {"lr": 40.0 if optimizer == "lars" else 0.5, "weight_decay": 0.04, "warmup_epochs": 1} | changes
    return Training(EPOCHS, 8, optimizer, **settings)


def train(training, method=None, parameter_groups=None):
    method = method or toy()
    trainer = Trainer(method, training, Execution(), STEPS, parameter_groups=parameter_groups)
    results = [trainer.step(iter([toy_batch(step)])) for step in range(EPOCHS * STEPS)]
    return method, torch.stack([result.loss for result in results]), trainer


def reference(training, lr_scales=None):
    """The run by formulas: DINO's loop (schedules, clipping, frozen parameters) and the optimizers' update rules."""
    method = toy()
    named, losses = dict(method.named_parameters()), []
    memory = {name: [torch.zeros_like(p), torch.zeros_like(p), 0] for name, p in named.items()}
    total = EPOCHS * STEPS
    for step in range(total):
        epoch = step / STEPS
        peak = training.lr * 8 / 256
        warm = training.warmup_epochs
        cosine = 0.5 * (1 + torch.tensor(torch.pi * (epoch - warm) / (EPOCHS - warm), dtype=torch.float64).cos().item())
        lr = peak * epoch / warm if epoch < warm else peak * cosine
        end = training.weight_decay if training.weight_decay_end is None else training.weight_decay_end
        wave = torch.tensor(torch.pi * step / total, dtype=torch.float64).cos().item()
        decay = end + 0.5 * (training.weight_decay - end) * (1 + wave)
        method.before_step(step / total)
        loss, _ = method(toy_batch(step))
        losses.append(loss.detach())
        gradients = torch.autograd.grad(loss, list(named.values()))
        with torch.no_grad():
            for (name, p), g in zip(named.items(), gradients):
                if name.startswith(training.freeze) and epoch < training.freeze_epochs:
                    continue
                clip = training.clip_parameter_norm
                g = g * min(1.0, float(clip / (g.norm() + 1e-6))) if clip else g
                scale, decay_scale = (lr_scales or {}).get(name, (1.0, float(p.ndim > 1)))
                update(training, memory[name], p, g, lr * scale, decay * decay_scale)
        method.after_step((step + 1) / total)
    return method, torch.stack(losses)


def update(training, memory, p, g, lr, decay):
    if training.optimizer == "adamw":
        (b1, b2), memory[2] = training.betas, memory[2] + 1
        p.mul_(1 - lr * decay)
        memory[0], memory[1] = b1 * memory[0] + (1 - b1) * g, b2 * memory[1] + (1 - b2) * g * g
        denominator = (memory[1] / (1 - b2 ** memory[2])).sqrt() + 1e-8
        p.sub_(lr * memory[0] / (1 - b1 ** memory[2]) / denominator)
        return
    if training.optimizer == "lars":
        if p.ndim > 1:
            g = g + decay * p
            g = g * 0.001 * p.norm() / g.norm()
    else:
        g = g + decay * p
    memory[0] = training.momentum * memory[0] + g
    p.sub_(lr * memory[0])


CASES = {
    "constant": {},
    "weight-decay schedule": {"weight_decay_end": 0.4},
    "falling weight decay": {"weight_decay_end": 0.0},
    "clipping by parameter": {"clip_parameter_norm": 0.003},
    "frozen decoder": FREEZE,
    "all": {"weight_decay_end": 0.4, "clip_parameter_norm": 0.003, **FREEZE},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_runs_equal_the_formulas(optimizer, case):
    training = training_of(optimizer, **CASES[case])
    method, losses, _ = train(training)
    expected, expected_losses = reference(training)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-11, atol=0)
    for (name, p), q in zip(method.named_parameters(), expected.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    if case != "constant":  # else the comparison would show nothing
        plain, _, _ = train(training_of(optimizer))
        assert not torch.allclose(plain.decoder.weight, method.decoder.weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_frozen_parameters_have_no_update_and_no_momentum(optimizer):
    training = training_of(optimizer, **FREEZE, warmup_epochs=0)
    method = toy()
    initial = {name: p.detach().clone() for name, p in method.named_parameters()}
    trainer = Trainer(method, training, Execution(), STEPS)
    for step in range(6):  # 1.5 epochs
        trainer.step(iter([toy_batch(step)]))
        for name, p in method.named_parameters():
            assert torch.equal(p, initial[name]) == name.startswith("decoder."), name
    for p in method.decoder.parameters():
        assert all(not x.any() for x in trainer.optimizer.state[p].values())
    trainer.step(iter([toy_batch(6)]))
    assert not torch.equal(method.decoder.weight, initial["decoder.weight"])


def test_parameter_groups_scale_learning_rate_and_weight_decay():
    """The toy's groups; also where the weight decay follows a schedule."""
    scales = {
        "backbone.2.weight": (1.0, 1.0),
        "backbone.2.bias": (1.0, 1.0),
        "decoder.weight": (0.5, 1.0),
        "decoder.bias": (0.5, 0.0),
    }
    training = training_of("adamw", weight_decay_end=0.4)
    method, losses, trainer = train(training, parameter_groups=toy_method.parameter_groups)
    expected, expected_losses = reference(training, scales)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-11, atol=0)
    for p, q in zip(method.parameters(), expected.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert [len(group["params"]) for group in trainer.optimizer.param_groups] == [2, 1, 1]


def test_parameter_groups_must_be_complete():
    method = toy()
    with pytest.raises(ValueError, match=r"^train: parameter_groups must hold every .* got none with decoder.bias$"):
        Trainer(
            method,
            training_of("adamw"),
            Execution(),
            STEPS,
            parameter_groups=lambda m: toy_method.parameter_groups(m)[:2],
        )


def test_freeze_selects_by_name_and_refuses_others():
    method = mae.build(mae.Config.small())
    selected = {id(p) for p in parameters_to_freeze(method, ("blocks.0", "mask_token"))}
    names = {n for n, p in method.named_parameters() if id(p) in selected}
    assert names == {n for n, _ in method.named_parameters() if n.startswith("blocks.0.")} | {"mask_token"}
    assert parameters_to_freeze(method, ("pos_embed",)) == []  # it is never trained
    with pytest.raises(ValueError, match=r"^train: --freeze must name .* got 'decoder_pred.wieght': .* decoder_pred"):
        parameters_to_freeze(method, ("blocks", "decoder_pred.wieght"))
    with pytest.raises(ValueError, match=r"^train: --freeze must name .* got 'block'"):  # a prefix, but no module
        parameters_to_freeze(method, ("block",))
    with pytest.raises(ValueError, match=r"^train: --freeze must leave parameters to train, got backbone decoder,"):
        parameters_to_freeze(toy(), ("backbone", "decoder"))


def test_scheduled_values_for_the_log():
    config = moco_v3.Config.small()
    config.hidden = 16
    training = dataclasses.replace(config.training, weight_decay=0.1, weight_decay_end=0.3, epochs=2, warmup_epochs=0)
    trainer = Trainer(moco_v3.build(config), training, Execution(), 2)
    images = torch.randn(8, 3, 32, 32)
    for _ in range(2):
        trainer.step(iter([Batch((images, images), torch.arange(8), torch.arange(8))]))
    peak = training.lr * training.batch_size / 256
    assert trainer.scheduled() == pytest.approx(
        {
            "lr": cosine_schedule(peak, 0.0, 0.25),  # as the last step used it
            "weight_decay": cosine_schedule(0.1, 0.3, 0.25),
            "momentum": cosine_schedule(0.95, 1.0, 0.5),  # after the step
        }
    )


@pytest.mark.parametrize("module", [moco_v1, moco_v2, moco_v3])
def test_momentum_schedule(module, monkeypatch):
    """The momentum encoder of every MoCo moves by the scheduled coefficient, from ema_momentum to ema_momentum_end."""
    config = module.Config.small()
    config.ema_momentum, config.ema_momentum_end = 0.5, 0.9
    coefficients = []

    def note(encoder, module, momentum=None):
        coefficients.append(momentum)

    monkeypatch.setattr(MomentumEncoder, "update", note)
    method = module.build(config)
    trainer = Trainer(method, dataclasses.replace(config.training, epochs=2), Execution(), 2)
    images = torch.randn(8, 3, 32, 32)
    for _ in range(4):
        trainer.step(iter([Batch((images, images), torch.arange(8), torch.arange(8))]))
    assert coefficients == [cosine_schedule(0.5, 0.9, progress) for progress in (0.25, 0.5, 0.75, 1.0)]


def test_byols_target_moves_by_the_momentum_of_the_step_itself(monkeypatch):
    """As in the official code: the first update has the initial coefficient."""
    config, coefficients = byol.Config.small(), []
    config.ema_momentum, config.ema_momentum_end = 0.5, 0.9
    monkeypatch.setattr(MomentumEncoder, "update", lambda encoder, module, momentum: coefficients.append(momentum))
    trainer = Trainer(byol.build(config), dataclasses.replace(config.training, epochs=2), Execution(), 2)
    images = torch.randn(8, 3, 32, 32)
    for _ in range(4):
        trainer.step(iter([Batch((images, images), torch.arange(8), torch.arange(8))]))
    assert coefficients == [cosine_schedule(0.5, 0.9, progress) for progress in (0, 0.25, 0.5, 0.75)]


def test_a_group_with_a_constant_learning_rate_has_no_schedule():
    """SimSiam's predictor keeps the peak, also with a warm-up and a schedule by epoch."""
    config = simsiam.Config.small()
    config.training = Training(4, 512, "sgd", lr=0.05, weight_decay=1e-4, warmup_epochs=1, lr_by_epoch=True)
    groups = simsiam.parameter_groups
    trainer = Trainer(simsiam.build(config), config.training, Execution(), 1, parameter_groups=groups)
    rates, images = [], torch.randn(8, 3, 32, 32)
    for _ in range(4):
        trainer.step(iter([Batch((images, images), torch.arange(8), torch.arange(8))]))
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
    assert [rate for _, rate in rates] == [0.1] * 4
    assert [rate for rate, _ in rates] == pytest.approx([0.0, 0.1, 0.075, 0.025])


def test_momentum_is_constant_by_default_for_moco_and_rises_to_1_for_moco_v3():
    for module, end in ((moco_v1, 0.99), (moco_v2, 0.99), (densecl, 0.99), (moco_v3, 1.0)):
        method = module.build(module.Config.small())
        assert method.momentum_at(1.0) == end
        assert method.momentum_at(0.0) == module.Config.small().ema_momentum


def test_methods_fulfil_the_contract():
    abilities = {
        mae: {Reconstructs},
        moco_v1: {RanksNegatives, SchedulesMomentum, DefersUpdates},
        moco_v2: {RanksNegatives, SchedulesMomentum, DefersUpdates},
        moco_v3: {RanksNegatives, SchedulesMomentum},
        simclr_v1: {RanksNegatives},
        byol: {SchedulesMomentum},
        simsiam: set(),
        barlow_twins: set(),
        vicreg: set(),
        densecl: {RanksNegatives, SchedulesMomentum, DefersUpdates},
        cpc: {RanksNegatives},
        dino: {SchedulesMomentum, DefersUpdates},
        ibot: {SchedulesMomentum, DefersUpdates},
        dinov2: {SchedulesMomentum, DefersUpdates},
        swav: {DefersUpdates},
        deepcluster: {PreparesEpochs},
        deepcluster_v2: {DefersUpdates, PreparesEpochs},
        igpt: {PreparesEpochs, Completes},
        clip: set(),
        siglip: set(),
        dvae: {DefersUpdates, Autoencodes},
        beit: set(),  # with a tokenizer that has a decoder {Reconstructs}
        simmim: {Reconstructs},
        toy_method: {DefersUpdates},
        albef: {SchedulesMomentum, DefersUpdates},
    }
    for module, expected in abilities.items():
        method = module.build(module.Config.small())
        assert isinstance(method, Method)
        optional = (
            Autoencodes,
            Reconstructs,
            RanksNegatives,
            SchedulesMomentum,
            DefersUpdates,
            PreparesEpochs,
            Completes,
        )
        assert {ability for ability in optional if isinstance(method, ability)} == expected


@pytest.mark.parametrize("module", [moco_v2, dino, ibot, dinov2, toy_method])
def test_deferred_updates_do_not_depend_on_assignments_in_forward(module):
    """The replay of a CUDA graph returns tensors but executes no Python: queue and centre must change all the same."""
    config = module.Config.small()
    config.queue_size, config.centering = 24, "centering"  # of MoCo, and of DINOv2: Sinkhorn–Knopp keeps no centre
    states = []
    for replayed in (False, True):
        torch.manual_seed(0)
        method = module.build(config).double()
        trainer = Trainer(method, dataclasses.replace(config.training, epochs=1, warmup_epochs=0), Execution(), 4)
        compute_gradients = trainer.compute_gradients

        def replay(batch, compute_gradients=compute_gradients, method=method):
            results = compute_gradients(batch)
            method.pending = []
            return results

        if replayed:
            trainer.compute_gradients = replay
        for step in range(4):
            images = toy_batch(step).views[0].repeat(1, 1, 2, 2)
            trainer.step(iter([Batch((images,) * len(config.augmentation.views), torch.arange(8), torch.arange(8))]))
            assert method.pending == []
        states.append(trainer.state()["model"])
    for name, x in states[0].items():
        assert torch.equal(states[1][name], x), name
    initial = module.build(config).state_dict()
    changed = {name for name, x in states[0].items() if not torch.equal(x, initial[name])}
    assert changed & {"queue_ptr", "centre", "dino_loss.center"}


def test_error_sentences():
    with pytest.raises(TypeError, match=r"^train: a method must have before_step, .* got Linear without encoder: see"):
        Trainer(torch.nn.Linear(2, 2), training_of("sgd"), Execution(), STEPS)
    trainer = Trainer(toy(), training_of("sgd", accumulate=2), Execution(), STEPS)
    with pytest.raises(ValueError, match=r"^train: a step must get 2 batches, got 1$"):
        trainer.step(iter([toy_batch(0)]))
    with pytest.raises(ValueError, match=r"^train: --freeze-epochs must be 0 without --freeze, got 1: name"):
        Trainer(toy(), training_of("sgd", freeze_epochs=1), Execution(), STEPS)
    with pytest.raises(ValueError, match=r"^train: --lr-drops must lie before --epochs 3, got 3: lower it or raise"):
        Trainer(toy(), training_of("sgd", lr_drops=(1, 3)), Execution(), STEPS)
    with pytest.raises(
        ValueError, match=r"^train: --optimizer must be adamw, sgd, lars, lars_simclr or larc, got 'adam'$"
    ):
        Trainer(toy(), training_of("adam"), Execution(), STEPS)
    with pytest.raises(ValueError, match=r"^train: --precision must be fp32, bf16 or fp16, got 'int4'$"):
        Trainer(toy(), training_of("sgd"), Execution(precision="int4"), STEPS)
    with pytest.raises(ValueError, match=r"^train: --log-every must be at least 1, got 0$"):
        Trainer(toy(), training_of("sgd"), Execution(log_every=0), STEPS)


def run_on_rank(rank, world, execution):
    """Losses and final state of the toy, each rank with its share of the batches."""
    training = training_of("adamw", weight_decay_end=0.4, clip_parameter_norm=0.003, **FREEZE)
    trainer = Trainer(toy(), training, Execution(**execution), STEPS, parameter_groups=toy_method.parameter_groups)
    for step in range(EPOCHS * STEPS):
        whole = toy_batch(step)
        share = slice(rank * 8 // world, (rank + 1) * 8 // world)
        trainer.step(iter([Batch((whole.views[0][share],), whole.index[share], whole.label[share])]))
    return trainer.state()["model"]


def run_in_ranks(execution):
    from fastssl.distributed import rank, world_size

    return run_on_rank(rank(), world_size(), execution)


@pytest.mark.parametrize("execution", [{}, {"shard": True}], ids=["DDP", "FSDP2"])
def test_hooks_schedules_and_clipping_on_two_ranks(execution):
    """Two ranks equal one process with the whole batch, also where parameters are sharded."""
    expected = run_on_rank(0, 1, {})
    for state in run_ranks(2, run_in_ranks, execution):
        for name, x in expected.items():
            torch.testing.assert_close(state[name], x, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("module", [moco_v2, densecl, dino, ibot, dinov2, swav])
def test_a_loss_in_evaluation_mode_is_not_kept_for_the_next_step(module):
    """Else a validation loss would move centres and queues."""
    config = module.Config.small()
    config.queue_size, config.centering = 64, "centering"  # of MoCo and SwAV, and of DINOv2
    method = module.build(config)
    images = toy_batch(0).views[0].repeat(1, 1, 2, 2).float()
    batch = Batch((images,) * len(config.augmentation.views), torch.arange(8), torch.arange(8))
    for mode, entries in ((False, 0), (True, 1)):
        with torch.set_grad_enabled(mode):
            method.train(mode)(batch)
        assert len(method.pending) == entries


def test_weights_rounded_once_a_step_give_the_same_run():
    """As rounding them for each product: forward and backward, over micro-batches, after each kind of change."""
    runs = []
    for keep in (True, False):
        torch.manual_seed(0)
        config = mae.Config.small()
        method = mae.build(config)
        training = dataclasses.replace(config.training, accumulate=2, epochs=1, warmup_epochs=0)
        trainer = Trainer(method, training, Execution(precision="bf16"), STEPS)
        trainer.rounded_weights.keep = keep
        losses = []
        for step in range(3):
            images = torch.randn(16, 3, *config.image_size, generator=torch.Generator().manual_seed(step))
            batch = Batch((images,), torch.arange(16), torch.arange(16), seed=torch.arange(16))
            losses.append(trainer.step(iter((batch, batch))).loss)
            if step == 1:
                for p in method.parameters():
                    p.data.mul_(0.9)
        runs.append((*losses, *method.state_dict().values()))
        assert bool(trainer.rounded_weights._copies) == keep
    for kept, rounded in zip(*runs, strict=True):
        torch.testing.assert_close(kept, rounded, rtol=0, atol=0)
