"""The transcription of BEiT has the golden numbers of the official code."""

import pytest
import torch

from tests.methods import transcription_beit as t
from tests.support.golden import part, read

GOLDEN = ["beit_shared_bias", "beit_block_bias", "beit_abs_pos"]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers(name):
    golden, meta = read(name)
    state = {n: x.double().requires_grad_() for n, x in part(golden, "state.").items() if x.is_floating_point()}
    grid = tuple(side // meta["patch_size"] for side in meta["img_size"])
    size = t.Size(grid, meta["patch_size"], meta["num_heads"])
    images, mask = golden["input.images"].double(), golden["input.mask"].flatten(1)
    step = t.Step(images, mask, golden["input.codes"].flatten(1).long())
    for ours, key in ((t.tokens(state, images, mask, size), "features"), (t.logits(state, step, size), "logits")):
        torch.testing.assert_close(ours.detach(), golden[key], rtol=1e-9, atol=1e-11)
    unmasked = t.tokens(state, images, None, size).detach()
    torch.testing.assert_close(unmasked, golden["features_unmasked"], rtol=1e-9, atol=1e-11)
    loss = t.loss(state, step, size)
    torch.testing.assert_close(loss.detach(), golden["loss"], rtol=1e-9, atol=0)
    loss.backward()
    for key, expected in part(golden, "grad.").items():
        torch.testing.assert_close(
            state[key].grad, expected, rtol=1e-9, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_learning_rates():
    """The official code reaches the peak in the last step of the warm-up and has it again in the step after."""
    golden, _ = read("schedules_text")
    for name, warmup in (("beit.lr", 10), ("beit.lr_warmup_steps", 7)):
        ours = torch.tensor(t.learning_rates(1.5e-3, 1e-5, warmup, 40), dtype=torch.float64)
        torch.testing.assert_close(ours, golden[name], rtol=1e-12, atol=0)
        assert ours[warmup - 1] == pytest.approx(1.5e-3) == ours[warmup]
