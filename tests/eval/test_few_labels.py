"""Accuracy with few labels: the same labels, images and steps for every row; draws; what the data does not allow."""

import math
from collections import Counter

import pytest
import torch
from torch import nn

from fastssl.data.source import Subset, open_source
from fastssl.eval import few_labels
from fastssl.eval.few_labels import PIXELS, PRETRAINED, SCRATCH, Draws, Kept, draw_labels
from fastssl.eval.few_labels_table import ROWS, Measured, sentences, table_of
from fastssl.eval.protocols import FewLabels
from tests.support.contract import torch_threads

SIZE = (8, 8)
QUICK = FewLabels(counts=(10, 30), draws=2, steps=4, batch_size=16, lr=1e-2, scratch_lr=1e-2)


class Net(nn.Module):
    """A linear classifier of pixels, with what each forward pass in training got."""

    def __init__(self, seed):
        super().__init__()
        self.fc, self.seen = nn.Linear(192, 10), []
        nn.init.normal_(self.fc.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.fc.bias)

    def forward(self, images):
        if self.training:
            self.seen.append(images.clone())
        return self.fc(images.flatten(1))


@pytest.fixture(scope="module")
def digits():
    return Kept(open_source("digits"), range(400)), Kept(open_source("digits", "test"), range(100))


def test_draws_are_balanced_nested_and_differ(digits):
    draws = Draws(digits[0], (10, 30), 2, seed=5)
    assert draws.seeds == (5, 6)
    for seed in draws.seeds:
        few, more = (draws.images(count, seed) for count in (10, 30))
        assert set(few) < set(more)
        assert set(Counter(digits[0].label(i) for i in more).values()) == {3}
    assert draws.images(10, 5) != draws.images(10, 6)
    assert draws.all_images() == sorted({*draws.images(30, 5), *draws.images(30, 6)})


def test_numbers_that_the_images_do_not_allow_are_left_out_and_named(digits, capsys):
    numbers = FewLabels(counts=(1000, 2, 100, 100), draws=1)
    assert draw_labels(digits[0], numbers, 0, "digits").counts == (100,)
    limits = "from the 10 classes to the 400 labelled images of digits"
    assert capsys.readouterr().out == f"eval few-labels: 2 and 1,000 labels are left out, as counts go {limits}\n"
    numbers = FewLabels(counts=(5, 1000))
    with pytest.raises(ValueError, match=f"^eval few-labels: --counts must be {limits}, got 5 and 1,000$"):
        draw_labels(digits[0], numbers, 0, "digits")


def test_fine_tuning_and_scratch_see_the_same_images_in_the_same_steps(digits):
    part = Subset(digits[0], Draws(digits[0], (10,), 1, 0).images(10, 0))
    nets = [
        few_labels.train_on_few(Net(0), part, QUICK, start, SIZE, seed=3) for start in (SCRATCH, PRETRAINED, SCRATCH)
    ]
    for net in nets[1:]:
        assert len(net.seen) == QUICK.steps
        assert all(map(torch.equal, net.seen, nets[0].seen))
    assert nets[0].seen[0].shape == (10, 3, *SIZE)  # no more than there are labels
    assert torch.equal(nets[0].fc.weight, nets[2].fc.weight)
    other = few_labels.train_on_few(Net(0), part, QUICK, SCRATCH, SIZE, seed=4)
    assert not torch.equal(other.fc.weight, nets[0].fc.weight)


def test_each_start_has_its_learning_rate(digits):
    part = Subset(digits[0], range(20))
    numbers = FewLabels(steps=1, lr=1.0, scratch_lr=2.0, weight_decay=0.0)
    assert few_labels.share_of_peak(0.0) == 0  # a single step has rate 0
    moved = {}
    for start in (SCRATCH, PRETRAINED):
        longer = FewLabels(steps=2, lr=1.0, scratch_lr=2.0, weight_decay=0.0)
        net = few_labels.train_on_few(Net(0), part, longer, start, SIZE, seed=0)
        moved[start] = (net.fc.bias.detach()).abs().max().item()
    assert moved[SCRATCH] == pytest.approx(2 * moved[PRETRAINED], rel=1e-5) and moved[SCRATCH] > 0.1
    still = few_labels.train_on_few(Net(0), part, numbers, SCRATCH, SIZE, seed=0)
    assert torch.equal(still.fc.weight, Net(0).fc.weight)


def test_the_learning_rate_rises_and_falls_once():
    shares = [few_labels.share_of_peak(i / 1000) for i in range(1001)]
    assert shares[0] == 0 and shares[100] == 1 and shares[-1] == pytest.approx(0, abs=1e-12)
    assert shares[50] == pytest.approx(0.5) and shares[550] == pytest.approx(0.5)
    assert all(math.isfinite(share) and 0 <= share <= 1 for share in shares)


def pixels(images):
    return images.flatten(1)


def build(start, seed):
    return Net(seed)


def test_all_rows_in_order(digits, monkeypatch):
    monkeypatch.setattr(few_labels, "ITERATIONS", 20)
    draws = Draws(digits[0], QUICK.counts, QUICK.draws, seed=0)
    with torch_threads(1):
        found = few_labels.compare(pixels, build, *digits, draws, QUICK, SIZE)
    assert [(result.row, result.labels) for result in found] == [(row, count) for row in ROWS for count in (10, 30)]
    by_key = {(result.row, result.labels): result.accuracies for result in found}
    for classifier in ("knn", "linear"):  # the encoder's features are the pixels here
        assert by_key[(PIXELS, classifier), 30] == by_key[(PRETRAINED, classifier), 30]
        assert min(by_key[(PIXELS, classifier), 30]) > 0.4
    for count in (10, 30):  # the same network and learning rate
        assert by_key[(SCRATCH, "finetune"), count] == by_key[(PRETRAINED, "finetune"), count]


def test_networks_trained_at_once_are_those_trained_alone(digits):
    draws = Draws(digits[0], QUICK.counts, QUICK.draws, seed=0)
    with torch_threads(1):
        alone = few_labels.train_networks(build, *digits, draws, QUICK, SIZE)
    with torch_threads(2):
        assert few_labels.train_networks(build, *digits, draws, QUICK, SIZE, at_once=2) == alone
        assert torch.get_num_threads() == 2
    assert len({result.accuracies for result in alone[:2]}) == 2


def test_pixels_of_large_images_are_left_out():
    train, test = open_source("shapes:size=72,count=40"), Subset(open_source("shapes:size=72", "test"), range(10))
    quick, draws = FewLabels(counts=(10,), draws=1, steps=1), Draws(train, (10,), 1, 0)

    def cropping(start, seed):
        net = Net(seed)
        net.forward = lambda images: net.fc(images[:, :, :8, :8].flatten(1))
        return net

    found = few_labels.compare(lambda images: images.mean((2, 3)), cropping, train, test, draws, quick, (72, 72))
    assert [result.start for result in found] == [SCRATCH, PRETRAINED, PRETRAINED, PRETRAINED]


def test_separable_features_are_classified_without_error(digits):
    draws = Draws(digits[0], (10,), 2, seed=0)
    labels = torch.tensor([digits[0].label(i) for i in range(400)])
    rows = torch.nn.functional.one_hot(labels).float(), labels, torch.arange(400)
    found = few_labels.classify_features(PRETRAINED, rows, rows, draws, l2=1e-3)
    assert [(result.classifier, result.accuracies) for result in found] == [("knn", (1, 1)), ("linear", (1, 1))]


def results(scratch=0.31):
    means = dict(zip(ROWS, (0.2, 0.22, scratch, 0.5, 0.6, 0.62)))
    return [
        Measured(*row, count, (mean - 0.1 / count, mean + 0.1 / count))
        for row, mean in means.items()
        for count in (10, 100, 1000)
    ]


def test_the_table_and_its_sentences():
    head, rows = table_of(results(), "moco_v2")
    assert head == ["", "10 labels", "100 labels", "1,000 labels"]
    assert rows[2] == ["trained from scratch", "31.0% ± 1.4%", "31.0% ± 0.1%", "31.0% ± 0.0%"]
    assert [row[0] for row in rows[3:]] == ["moco_v2, kNN", "moco_v2, linear", "moco_v2, fine-tuned"]
    first = (
        "With 100 labels, training from scratch reaches {}; the same network, pretrained by moco_v2 without labels, "
        "reaches 62% fine-tuned, 60% by a linear classifier and 50% by kNN; raw pixels 22%."
    )
    assert sentences(results(0.7), "moco_v2") == first.format("70%")
    assert sentences(results(), "moco_v2") == first.format("31%") + " From scratch, 1,000 labels give 31%."
    single = [result._replace(accuracies=(result.mean,), labels=20) for result in results() if result.labels == 10]
    assert single[0].spread is None
    assert table_of(single[2:], "mae")[1][0] == ["trained from scratch", "31.0%"]
    assert sentences(single[2:], "mae").endswith("by a linear classifier and 50% by kNN.")
