"""Twelve steps of ALBEF by the trainer against a transcription in plain torch."""

import pytest
import torch

from fastssl.contract import Batch
from fastssl.methods.albef import NEGATIVES, parameter_groups
from fastssl.nn.masking import seeded_noise
from fastssl.train.config import Execution, Training
from fastssl.train.trainer import Trainer
from tests.methods.test_albef import small
from tests.methods.transcription_albef import run_albef

STEPS, EPOCH, LR = 12, 5, 2e-3


def replay(**changes):
    """(losses and state of the trainer, those of the transcription). `changes` are those of the method alone."""
    training = Training(
        3, 256, "adamw", LR, 0.02, warmup_lr=LR / 10, lr_end=LR / 10, warmup_stair=changes.pop("stair", 2)
    )
    method = small(ema_momentum=0.9, tau=0.5, **changes).double()
    with torch.no_grad():
        for p in method.parameters():
            if p.requires_grad and p.ndim > 1:
                p.mul_(3)  # so that rows differ
        method.update_twins()
        for name in ("visual_encoder", "text_encoder", "vision_proj", "text_proj"):
            getattr(method, f"{name}_m").load_state_dict(getattr(method, name).state_dict())
    method.config.training = training
    initial = {name: x.clone() for name, x in method.state_dict().items()}
    batches, plain = [], []
    for step in range(STEPS):
        tokens = torch.randint(1000, 1040, (6, 8), generator=torch.Generator().manual_seed(step))
        tokens[:, 0], tokens[2:, 6:] = 101, 0
        images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        seed = torch.arange(6) + 1000 * step
        batches.append(Batch((images,), torch.arange(6), torch.zeros(6), seed, {"tokens": tokens}))
        corrupted, masked = method.mask(tokens, seed)
        plain.append({"images": images, "ids": tokens, "corrupted": corrupted, "masked": masked})
        plain[-1]["noise"] = seeded_noise(2, NEGATIVES, seed)
    trainer = Trainer(method, training, Execution(tensorboard=False), EPOCH, parameter_groups=parameter_groups)
    metrics = [trainer.step(iter([batch])).metrics for batch in batches]
    ours = torch.stack([torch.stack([m[f"loss_{name}"] for name in ("itc", "itm", "mlm")]) for m in metrics])
    settings = {"steps_per_epoch": EPOCH, "epochs": 3, "lr": LR, "heads": 2, "momentum": 0.9}
    theirs, final = run_albef(initial, plain, **settings)
    return (ours, method.state_dict()), (theirs, final), initial


def largest_difference(ours, theirs):
    return max(
        ((ours[n] - x).abs() / (x.abs() + 1e-3)).max().item() for n, x in theirs.items() if x.is_floating_point()
    )


@pytest.mark.exhaustive
def test_twelve_steps_equal_the_transcription():
    """Losses, the weights and the queues. The trainer moves the twins after its last step, the code before its
    next one, so they are one update ahead."""
    (ours, state), (theirs, final), initial = replay()
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    student = {name: x for name, x in final.items() if not name.split(".")[0].endswith("_m")}
    assert largest_difference(state, student) < 1e-6
    twins = {
        name: 0.9 * x + 0.1 * final[f"{name.partition('.')[0][:-2]}.{name.partition('.')[2]}"]
        for name, x in final.items()
        if name.split(".")[0].endswith("_m")
    }
    assert largest_difference(state, twins) < 1e-6
    assert torch.equal(state["queue_ptr"], final["queue_ptr"])
    assert largest_difference(initial, student) > 0.01  # the weights moved


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "change", [{"alpha": 0.0}, {"alpha_epochs": 2}, {"itm_weight": 0.5}, {"mlm_weight": 2.0}, {"stair": 1}]
)
def test_the_replay_notices(change):
    (ours, _), (theirs, _), _ = replay(**change)
    assert not torch.allclose(ours, theirs, rtol=1e-5)
