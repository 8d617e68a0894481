"""The rule that holds out the test split, and the sentences on labels."""

import numpy as np
import pytest

from fastssl.data.split import NOTHING_HELD_OUT, describe_labels, describe_sides, hold_out
from tests.support.contract import refused


def identities(count):
    return [f"class/{i}.jpg" for i in range(count)]


def divide(names, labels):
    """(training, held-out) identities, as sets."""
    rows = (hold_out(names, labels, split, "photos") for split in ("train", "test"))
    return tuple({names[row] for row in part} for part in rows)


@pytest.mark.parametrize("period", [1, 2, 3, 5, 7, 10, 25])
def test_labels_with_a_period_keep_every_class_on_both_sides(period):
    """Each class has a rounded fifth in the test split, whatever the order of its labels."""
    labels = np.arange(200) % period
    train, test = (hold_out(identities(200), labels, split, "photos") for split in ("train", "test"))
    assert sorted([*train, *test]) == list(range(200))
    counts = np.bincount(labels)
    assert np.bincount(labels[test]).tolist() == [(2 * count + 5) // 10 for count in counts]
    assert set(labels[train]) == set(labels[test]) == set(range(period))


@pytest.mark.parametrize(("count", "held_out"), [(1, 0), (2, 1), (3, 1), (7, 1), (8, 2), (12, 2), (13, 3)])
def test_a_class_of_two_images_or_more_has_one_held_out(count, held_out):
    labels = np.array([0] * count + [1] * 10)
    test = hold_out(identities(count + 10), labels, "test", "photos")
    assert (labels[test] == 0).sum() == held_out


def test_any_order_of_the_images_gives_the_same_split():
    names, labels = np.array(identities(300)), np.arange(300) % 7
    expected = divide(names, labels)
    order = np.random.default_rng(0).permutation(300)
    assert divide(names[order], labels[order]) == expected


def test_another_image_moves_one_other_at_most():
    names, labels = identities(60), np.arange(60) % 3
    train, test = divide(names, labels)
    for i in range(20):
        new_train, new_test = divide([*names, f"new/{i}.jpg"], np.append(labels, i % 3))
        assert len(train & new_test) + len(test & new_train) <= 1


def test_the_split_is_the_same_on_every_machine():
    """Fixed numbers: a changed hash would move images from one side to the other in everybody's data."""
    assert hold_out(identities(20), np.zeros(20, int), "test", "photos").tolist() == [1, 2, 11, 17]
    assert hold_out(["Ünï", "\udcff", "日本"], None, "test", "photos").tolist() == [2]


def test_training_without_labels_takes_every_image():
    for labels in (None, np.full(7, -1)):
        assert np.array_equal(hold_out(identities(7), labels, "train", "photos"), np.arange(7))
        assert len(hold_out(identities(7), labels, "test", "photos")) == 1
    assert len(hold_out(identities(1), None, "test", "photos")) == 1


def test_images_without_a_label_train():
    labels = np.where(np.arange(100) % 4 == 0, -1, np.arange(100) % 3)
    train, test = (hold_out(identities(100), labels, split, "photos") for split in ("train", "test"))
    assert (labels[test] >= 0).all()
    assert (labels[train] < 0).sum() == 25
    assert len(train) + len(test) == 100


@pytest.mark.parametrize("labels", [[0, 1, 2], [-1, 0, 1], []])
def test_an_empty_test_split_is_refused(labels):
    sentence = (
        "data: photos must have a class with two labelled images or more, as a fifth of each class is held out for "
        f"evaluation, got {len(labels)} images without such a class: use it without labels, or give it a test split of "
        "its own"
    )
    names, labels = identities(len(labels)), np.array(labels, dtype=np.int64)
    refused(sentence, ValueError, hold_out, names, labels, "test", "photos")
    assert len(hold_out(names, labels, "train", "photos")) == len(labels)


def test_images_without_labels_and_lone_images_are_named():
    labels, classes = np.array([0, 0, 1, -1, 2, -1, 2]), ["cat", "dog\x1b", "fox"]
    unlabelled = "2 of 7 images have no label: they train, and evaluations leave them out"
    lone = r"no image is held out of classes that have only one: dog\x1b"
    assert describe_labels(labels, classes) == (unlabelled, lone)
    assert describe_labels(labels, classes, held_out=False) == (unlabelled,)
    one = "1 of 3 images has no label: it trains, and evaluations leave it out"
    assert describe_labels(np.array([0, 0, -1]), ["cat"]) == (one,)
    assert describe_labels(labels.astype(np.uint64)[labels >= 0], classes) == (lone,)
    for missing in (None, np.array([-1])):
        assert describe_labels(missing, None) == (NOTHING_HELD_OUT,)
        assert describe_labels(missing, None, held_out=False) == ()


def test_labels_on_one_side_alone_are_named():
    sentence = "the held-out split has no labels, unlike the training split: nothing can be evaluated"
    assert describe_sides({"training": True, "held-out": False}) == (sentence,)
    assert describe_sides({"training": False, "held-out": True})[0].startswith(
        "the training split has no labels, unlike"
    )
    for sides in ({"training": True, "held-out": True}, {"training": False, "held-out": False}, {"training": False}):
        assert describe_sides(sides) == ()
