"""Twelve training steps of SimCLR, BYOL, SimSiam, Barlow Twins and VICReg equal those of plain torch.

The reference is tests/methods/transcription_family.py, which was written from the papers and the official code, without
the methods of this package. Both sides compute in float64 from the same weights and images, and differ by rounding.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fastssl.contract import Batch
from fastssl.methods import barlow_twins, byol, simclr_v1, simclr_v2, simsiam, vicreg
from fastssl.train.config import Training
from fastssl.train.optim import build_optimizer
from fastssl.train.schedule import learning_rate, peak_learning_rate
from tests.methods import transcription_family as t

STEPS, EPOCHS, WARMUP, BATCH = 12, 4, 1, 8  # three steps per epoch: the warm-up ends during the run
SIZE = (32, 32)

# Rounding grows during a run, by how much depends on the method. So the ruler is the transcription's own run from
# weights that differ in the last place: ours may differ from it by some times as much (on two seeds it was 0.4 to 4).
TIMES, LEAST = 20, 1e-13  # LEAST: where the disturbed run happens to be closer than rounding


def trunk(prefix):
    """ResNet-mini without its last layer: a 3×3 stem of stride 2, then one basic block for each of the four widths."""

    def features(p, images):
        def conv(name, norm, x, stride=1):
            weight = p[f"{prefix}{name}.weight"]
            x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
            return t.batch_norm(p, f"{prefix}{norm}", x)

        x = conv("conv1", "bn1", images, 2).relu()
        for layer, stride in (("layer1.0", 1), ("layer2.0", 2), ("layer3.0", 2), ("layer4.0", 2)):
            out = conv(f"{layer}.conv1", f"{layer}.bn1", x, stride).relu()
            out = conv(f"{layer}.conv2", f"{layer}.bn2", out)
            if stride == 2:
                x = conv(f"{layer}.downsample.0", f"{layer}.downsample.1", x, stride)
            x = (out + x).relu()
        return x.mean((2, 3))

    return features


def names(prefix, layers, last_norm=False):
    """(linear layer, batch norm or None) of each layer of an `mlp_head`."""
    return [
        (f"{prefix}{3 * i}", f"{prefix}{3 * i + 1}" if i < layers - 1 or last_norm else None) for i in range(layers)
    ]


@dataclasses.dataclass
class Case:
    """A method, and the call of the transcription that must give the same run."""

    module: object
    config: object
    run: object  # of the transcription
    rule: object
    options: dict
    rename: tuple[str, str] | None = None  # prefix of ours and of the transcription
    constant: str | None = None  # prefix of the parameters with a constant learning rate
    vector_scale: float = 1.0  # factor of the learning rate of vectors

    def transcribed(self, name):
        ours, theirs = self.rename or ("", "")
        return theirs + name.removeprefix(ours) if self.rename and name.startswith(ours) else name


def training(optimizer, lr, weight_decay, **changes):
    return Training(EPOCHS, BATCH, optimizer, lr, weight_decay, warmup_epochs=WARMUP, **changes)


def small(module, **changes):
    return dataclasses.replace(module.Config.small(), image_size=SIZE, **changes)


def simclr(module, layers, **changes):
    config = small(module, dim=16, hidden=24, tau=0.2, layers=layers, training=training("lars_simclr", 64.0, 0.01))
    options = {"projector": names("backbone.fc.", layers, last_norm=True), "tau": 0.2, "fixed": {last_bias(layers)}}
    options |= {"backbone": trunk("backbone.")}
    return Case(module, config, t.run_simclr, t.lars_b, options | changes)


def last_bias(layers):
    return f"backbone.fc.{3 * layers - 2}.bias"


def byol_case(**changes):
    config = small(byol, dim=16, hidden=24, ema_momentum=0.9, training=training("lars", 64.0, 0.01))
    options = {"projector": names("fc.", 2), "predictor": names("predictor.", 2), "backbone": trunk("")}
    options |= {"tau": lambda step: t.byol_tau(step, 0.9, STEPS)}
    return Case(byol, config, t.run_byol, t.lars_a, options | changes, rename=("predictor.", "online.predictor."))


def simsiam_case(**changes):
    config = small(simsiam, dim=16, hidden=8, training=training("sgd", 3.2, 0.01, decay_all=True))
    options = {"projector": names("encoder.fc.", 3, last_norm=True), "predictor": names("predictor.", 2)}
    options |= {"backbone": trunk("encoder.")}
    return Case(simsiam, config, t.run_simsiam, t.sgd, options | changes, constant="predictor.")


def barlow_case(**changes):
    config = small(barlow_twins, dim=24, vector_lr=0.024, training=training("lars", 64.0, 0.01))
    options = {"projector": names("projector.", 3), "lambd": config.redundancy_weight, "backbone": trunk("backbone.")}
    return Case(barlow_twins, config, t.run_barlow, t.lars_a, options | changes, vector_scale=0.024)


def vicreg_case(**changes):
    config = small(vicreg, dim=24, training=training("lars", 64.0, 0.01))
    options = {"projector": names("projector.", 3), "backbone": trunk("backbone.")}
    weights = (config.sim_weight, config.std_weight, config.cov_weight)
    return Case(vicreg, config, t.run_vicreg, t.lars_a, options | {"coefficients": weights} | changes)


CASES = {
    "simclr_v1": lambda **changes: simclr(simclr_v1, 2, **changes),
    "simclr_v2": lambda **changes: simclr(simclr_v2, 3, **changes),
    "byol": byol_case,
    "simsiam": simsiam_case,
    "barlow_twins": barlow_case,
    "vicreg": vicreg_case,
}


def ours(model, case, batches):
    """The loss of each step, trained as fastssl/train/trainer.py does."""
    training, losses = case.config.training, []
    optimizer = build_optimizer(model, training, getattr(case.module, "parameter_groups", None))
    for step, views in enumerate(batches):
        for group in optimizer.param_groups:
            scheduled = learning_rate(training, step * EPOCHS / STEPS)
            group["lr"] = (peak_learning_rate(training) if group.get("constant_lr") else scheduled) * group["lr_scale"]
        model.before_step(step / STEPS)
        loss, _ = model(Batch(views, None, None))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step((step + 1) / STEPS)
        losses.append(loss.detach())
    return losses


def theirs(initial, case, batches):
    """The transcription's run from the same weights."""
    training = case.config.training
    tensors = {case.transcribed(name): x for name, x in initial.items()}
    vectors = t.vectors(tensors)

    def lr(step, name):
        if case.constant and name.startswith(case.constant):
            return training.lr * BATCH / 256
        scale = case.vector_scale if name in vectors else 1.0
        peak = training.lr * BATCH / 256
        return scale * t.warmup_cosine(step, peak, WARMUP * STEPS // EPOCHS, STEPS)

    excluded = () if case.rule is t.sgd else vectors
    optimizer = t.Optimizer(case.rule, lr, training.weight_decay, excluded)
    return case.run(tensors, batches, optimizer=optimizer, **case.options)


def both(case, seed=0):
    """The trained model, its initial state, its losses, and the transcription's runs: as it is, and disturbed."""
    torch.manual_seed(seed)
    model = case.module.build(case.config).double()
    initial = {name: x.clone() for name, x in model.state_dict().items()}
    batches = [tuple(torch.randn(2, BATCH, 3, *SIZE, dtype=torch.float64).unbind()) for _ in range(STEPS)]
    return (
        model,
        initial,
        ours(model, case, batches),
        theirs(initial, case, batches),
        theirs(disturbed(initial), case, batches),
    )


def disturbed(state):
    """The state with a third of its values one unit in the last place larger, and a third smaller."""
    unit = torch.finfo(torch.float64).eps
    signs = {name: torch.randint(-1, 2, x.shape) for name, x in state.items()}
    return {name: x * (1 + unit * signs[name].double()) if x.is_floating_point() else x for name, x in state.items()}


def distance(tensors, others):
    return max(float((a - b).abs().max()) for a, b in zip(tensors, others, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_twelve_steps(name):
    case = CASES[name]()
    model, initial, losses, replay, ruler = both(case)
    state = {case.transcribed(key): x for key, x in model.state_dict().items()}
    assert state.keys() == replay.tensors.keys()
    allowed = TIMES * distance(replay.losses, ruler.losses) + LEAST
    assert distance(losses, replay.losses) <= allowed < 1e-8
    keys = [key for key, x in state.items() if x.is_floating_point()]
    expected = [replay.tensors[key].detach() for key in keys]
    allowed = TIMES * distance(expected, [ruler.tensors[key].detach() for key in keys]) + LEAST
    assert distance([state[key] for key in keys], expected) <= allowed < 1e-7
    before = {case.transcribed(key): x for key, x in initial.items()}
    moved = {key: distance([state[key]], [before[key]]) for key in keys if state[key].ndim > 1}
    still = [key for key, way in moved.items() if way < 5e-4]
    assert not still, f"{still[0]} moved by only {moved[still[0]]:.1e}: the comparison would show nothing"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("simclr_v1", {"joint": False}),
        ("simclr_v1", {"tau": 0.21}),
        ("byol", {"tau": lambda step: t.byol_tau(step + 1, 0.9, STEPS)}),
        ("barlow_twins", {"lambd": 0.006}),
        ("vicreg", {"coefficients": (25.0, 50.0, 1.0)}),
    ],
)
def test_a_wrong_transcription_is_noticed(name, changes):
    _, _, losses, replay, _ = both(CASES[name](**changes))
    assert distance(losses, replay.losses) > 1e-6


@pytest.mark.parametrize("rule", [t.lars_b, t.lars_c, t.sgd])
def test_another_optimizer_is_noticed(rule):
    case = dataclasses.replace(CASES["vicreg"](), rule=rule)
    _, _, losses, replay, _ = both(case)
    assert distance(losses, replay.losses) > 1e-6
