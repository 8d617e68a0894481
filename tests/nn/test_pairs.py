"""Pairs of images and texts: the distilled contrast, hard negatives, the queue of pairs; masks of tokens."""

import pytest
import torch
import torch.nn.functional as F

from fastssl.nn.bert import CLS, MASK, PAD
from fastssl.nn.masking import seeded_noise
from fastssl.nn.pairs import PairQueue, distilled_contrast, hard_negatives, negative_weights
from fastssl.nn.token_masks import IGNORED, distilled_token_loss, mask_tokens, masked_positions, most_masked
from tests.support.contract import refused


def units(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def dense_contrast(student, twin, keys, tau, alpha):
    targets = alpha * (twin @ keys.T / tau.detach()).softmax(1)
    targets = targets + (1 - alpha) * torch.eye(len(keys), dtype=twin.dtype)[: len(twin)]
    return F.cross_entropy(student @ keys.T / tau, targets)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_distilled_contrast_equals_its_formula_with_all_logits(alpha):
    torch.manual_seed(0)
    student, twin, keys = units(5, 6).requires_grad_(), units(5, 6), units(40, 6)
    tau = torch.tensor([0.07], dtype=torch.float64, requires_grad=True)
    results = []
    for contrast in (distilled_contrast, dense_contrast):
        loss = contrast(student, twin, keys, tau, alpha)
        results.append([loss.detach(), *torch.autograd.grad(loss, (student, tau))])
    for ours, dense in zip(*results):
        torch.testing.assert_close(ours, dense, rtol=1e-11, atol=1e-12)


def test_the_contrast_needs_the_keys_of_its_rows():
    refused(
        "distilled_contrast: keys must begin with those of the 5 rows, got 4 keys",
        ValueError,
        distilled_contrast,
        *(units(5, 6), units(5, 6), units(4, 6), torch.tensor(0.07), 0.4),
    )


def test_hard_negatives_are_drawn_by_their_weights():
    torch.manual_seed(0)
    queries, keys, tau = units(6, 4), units(6, 4), torch.tensor(0.5)
    weights = negative_weights(queries, keys, tau)
    expected = (queries @ keys.T / tau).softmax(1) + 1e-4
    torch.testing.assert_close(weights, expected.fill_diagonal_(0), rtol=1e-12, atol=0)
    counts = torch.zeros(6, 6)
    for noise in seeded_noise(6, torch.arange(3_000)):
        counts[torch.arange(6), hard_negatives(queries, keys, tau, noise)] += 1
    assert (counts.diagonal() == 0).all()
    share = weights / weights.sum(1, keepdim=True)
    assert ((counts / 3_000 - share).abs() <= 4.5 * (share / 3_000).sqrt()).all()


def test_hard_negatives_of_a_saturated_softmax_of_two_rows_and_of_nan():
    """The reference's draw raises where a row's own key takes the whole softmax. The largest noise is still below 1."""
    keys, tau = torch.eye(4), torch.tensor(0.001)
    for noise, expected in ((0.0, [1, 0, 0, 0]), (1 - 2**-24, [3, 3, 3, 2])):
        drawn = hard_negatives(keys, keys, tau, torch.full((4,), noise))
        assert drawn.tolist() == expected
    assert hard_negatives(keys[:2], keys[:2], tau, torch.rand(2)).tolist() == [1, 0]
    drawn = hard_negatives(torch.full((4, 4), torch.nan), keys, tau, torch.rand(4))
    assert ((drawn >= 0) & (drawn < 4) & (drawn != torch.arange(4))).all()
    sentence = "hard_negatives: queries must have at least two rows, got 1"
    refused(sentence, ValueError, hard_negatives, keys[:1], keys[:1], tau, torch.rand(1))


def test_the_queue_keeps_pairs_and_has_the_official_layout():
    queue = PairQueue(3, 8)
    norms = queue.queue.unflatten(1, (2, 3)).norm(dim=2)
    torch.testing.assert_close(norms, torch.ones(8, 2))
    images, texts = torch.randn(5, 3), torch.randn(5, 3)
    texts[2, 1] = torch.nan  # the old pair stays in its place
    before = queue.queue.clone()
    queue.enqueue(torch.cat([images, texts], 1))
    state = queue.state_dict()
    assert {name: list(x.shape) for name, x in state.items()} == {
        **{"queue_ptr": [1], "image_queue": [3, 8], "text_queue": [3, 8]}
    }
    kept = [0, 1, 3, 4]
    assert torch.equal(state["image_queue"].T[kept], images[kept])
    assert torch.equal(state["text_queue"].T[kept], texts[kept])
    assert torch.equal(queue.queue[[2, 5, 6, 7]], before[[2, 5, 6, 7]])
    other = PairQueue(3, 8)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other.queue, queue.queue)
    assert other.queue_ptr.item() == 5
    image_keys, text_keys = queue.columns(images[:2], images[2:4])
    assert torch.equal(image_keys, torch.cat([images[:2], queue.queue[:, :3]]))
    assert torch.equal(text_keys, torch.cat([images[2:4], queue.queue[:, 3:]]))


def test_masks_have_the_shares_of_bert():
    ids = torch.randint(1000, 30_000, (2_000, 32))
    ids[:, 0], ids[:, 30:] = CLS, PAD
    noise = seeded_noise(96, torch.arange(2_000)).unflatten(1, (-1, 3))
    corrupted, masked = mask_tokens(ids, noise, 0.15, 30_522)
    assert not masked[:, 0].any() and not masked[:, 30:].any()
    assert torch.equal(corrupted[~masked], ids[~masked])
    assert masked[:, 1:30].float().mean().item() == pytest.approx(0.15, abs=0.006)
    replaced, original = corrupted[masked], ids[masked]
    assert (replaced == MASK).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (replaced == original).float().mean().item() == pytest.approx(0.1, abs=0.015)
    others = replaced[(replaced != MASK) & (replaced != original)]
    assert others.min() < 500 and others.max() > 30_000  # of the whole vocabulary
    shorter = mask_tokens(ids[:, :24], noise[:, :24], 0.15, 30_522)
    assert torch.equal(shorter[0], corrupted[:, :24])  # cutting a batch does not change its masks


def test_all_masked_positions_are_gathered_in_a_number_that_is_known_before_on_gpus(monkeypatch):
    targets = torch.full((64, 24), IGNORED)
    masked = torch.rand(64, 24) < 0.15
    targets[masked] = 7
    expected = masked.flatten().nonzero()[:, 0]
    assert torch.equal(masked_positions(targets, 0.15), expected)
    assert masked_positions(torch.full((2, 3), IGNORED), 0.15).tolist() == [0]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    positions = masked_positions(targets, 0.15)
    assert torch.equal(positions[: len(expected)], expected)
    assert len(positions) == len(positions.unique()) == most_masked(64 * 24, 0.15) == 360  # 230.4 + 8 · √230.4 + 8
    assert len(masked_positions(targets[:1], 0.15)) == 24
    share = torch.distributions.Binomial(1536, torch.tensor(0.15).double())
    beyond = share.log_prob(torch.arange(361, 1537).double()).exp().sum()
    assert beyond < 1e-14


def test_the_loss_of_masked_tokens():
    torch.manual_seed(0)
    logits, twin = torch.randn(2, 6, 9, dtype=torch.float64)
    logits.requires_grad_()
    targets = torch.tensor([3, 8, IGNORED, 0, IGNORED, IGNORED])
    soft = F.cross_entropy(logits[[0, 1, 3]], twin[[0, 1, 3]].softmax(1))
    expected = 0.6 * F.cross_entropy(logits, targets) + 0.4 * soft
    loss = distilled_token_loss(logits, twin, targets, 0.4)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    assert distilled_token_loss(logits, twin, torch.full((6,), IGNORED), 0.4) == 0
    without = distilled_token_loss(logits, None, targets, 0.4)
    torch.testing.assert_close(without, F.cross_entropy(logits, targets), rtol=1e-12, atol=0)
    assert distilled_token_loss(logits, None, torch.full((6,), IGNORED), 0.4) == 0
