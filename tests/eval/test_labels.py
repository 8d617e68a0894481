import math
from collections import Counter

import pytest
import torch

from fastssl.data.source import open_source
from fastssl.eval.labels import accuracy, labelled, labelled_subset
from fastssl.eval.progress import Progress
from tests.support.contract import refused


class Labels:
    """A source with labels only."""

    size = shards = None

    def __init__(self, labels, classes=("a", "b", "c")):
        self.labels, self.classes = labels, classes

    def __len__(self):
        return len(self.labels)

    def label(self, index):
        return self.labels[index]


def chosen(source, share, seed):
    return set(labelled_subset(source, share, seed).indices)


def test_subsets_are_balanced_nested_and_reproducible():
    source = open_source("digits")
    torch.manual_seed(5)
    one, ten = (chosen(source, share, 3) for share in (0.01, 0.1))
    torch.manual_seed(6)
    assert one == chosen(source, 0.01, 3)
    assert one < ten
    assert ten != chosen(source, 0.1, 4)
    for subset, each in ((one, 1), (ten, 14)):
        assert Counter(source.label(i) for i in subset) == dict.fromkeys(range(10), each)
    part = labelled_subset(source, 0.1, 3)
    assert part.classes == source.classes
    assert [part.label(i) for i in range(140)] == [source.label(i) for i in part.indices]


def test_a_number_of_labels_is_balanced_nested_and_exact():
    source, before = open_source("digits"), set()
    for count in (10, 25, 100, 1000, 1438):
        subset = chosen(source, count, 3)
        assert len(subset) == count and before < subset
        sizes = Counter(source.label(i) for i in subset)
        assert len(sizes) == 10 and (count > 1000 or max(sizes.values()) - min(sizes.values()) <= 1)
        before = subset
    assert chosen(source, 100, 3) != chosen(source, 100, 4)
    extra = [{c for c, n in Counter(source.label(i) for i in chosen(source, 25, s)).items() if n == 3} for s in (3, 4)]
    assert extra[0] != extra[1]


def test_other_classes_fill_up_where_one_has_too_few_images():
    source = Labels([0] * 50 + [1] * 48 + [2] * 2 + [-1] * 20)
    assert Counter(source.label(i) for i in chosen(source, 30, 0)) == {0: 14, 1: 14, 2: 2}
    for count in (2, 101):
        sentence = f"eval: --labels must be at least the 3 classes and at most the 100 labelled images, got {count}"
        refused(sentence, ValueError, labelled_subset, source, count, 0)


def test_the_global_generator_is_unchanged():
    before = torch.random.get_rng_state()
    labelled_subset(open_source("digits"), 0.1, 3)
    assert torch.equal(before, torch.random.get_rng_state())


def test_small_classes_are_taken_whole_and_unlabelled_images_left_out():
    source = Labels([0] * 50 + [1] * 48 + [2] * 2 + [-1] * 20)
    assert Counter(source.label(i) for i in chosen(source, 0.3, 0)) == {0: 10, 1: 10, 2: 2}
    assert Counter(source.label(i) for i in chosen(source, 1e-6, 0)) == {0: 1, 1: 1, 2: 1}
    assert len(labelled_subset(source, 1, 0)) == 100
    complete = Labels([0, 1, 2])
    assert labelled_subset(complete, 1, 0) is complete


@pytest.mark.parametrize("source", [Labels([0, 1], None), Labels([-1, -1])])
def test_a_source_without_labels(source):
    with pytest.raises(ValueError, match=r"^eval: the source has no labels to learn from$"):
        labelled_subset(source, 0.1, 0)


def test_accuracy_by_hand():
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1]])
    top1, top5 = accuracy(logits, torch.tensor([0, 1, 5, 6]))  # 6 is a class that training did not have
    assert (top1, top5) == (0.25, 0.5)
    assert accuracy(logits[:, :5], torch.tensor([0, 4, 0, 1])) == (0.75, None)
    assert accuracy(logits[:, :1], torch.tensor([0, 0, 0, 1])).top1 == 0.75


def test_progress_is_rare(capsys):
    progress = Progress("linear", 9, every=math.inf)
    progress(1, torch.tensor(math.nan))
    assert capsys.readouterr().out == ""
    progress.every = 0
    progress(1.25, torch.tensor(2.0))
    assert capsys.readouterr().out == "linear: epoch 1.2 of 9, loss 2.000\n"


def test_images_with_a_label():
    complete, part = Labels([0, 1, 2]), labelled(Labels([-1, 0, -1, 2]))
    assert labelled(complete) is complete
    assert [part.label(i) for i in range(len(part))] == [0, 2]
    assert len(labelled(Labels([0, 1], None))) == len(labelled(Labels([-1, -1]))) == 0
