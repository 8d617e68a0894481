"""The rule that holds out the test split."""

import numpy as np
import pytest

from fastssl.data.split import hold_out
from tests.support.contract import refused


@pytest.mark.parametrize("count", [5, 9, 10, 11, 1797])
def test_every_fifth_image_is_held_out(count):
    train, test = (hold_out(count, split, True, "photos") for split in ("train", "test"))
    assert test.tolist() == list(range(4, count, 5))
    assert train.tolist() == [i for i in range(count) if i % 5 != 4]


def test_training_without_labels_takes_every_image():
    assert np.array_equal(hold_out(7, "train", False, "photos"), np.arange(7))
    assert hold_out(7, "test", False, "photos").tolist() == [4]


@pytest.mark.parametrize("labelled", [True, False])
def test_an_empty_test_split_is_refused(labelled):
    sentence = "data: photos must have at least 5 images, as every fifth is the test split, got 4"
    refused(sentence, ValueError, hold_out, 4, "test", labelled, "photos")
    assert len(hold_out(4, "train", labelled, "photos")) == 4
