"""Steps counted in epochs, also of epochs that change their length."""

import pytest

from fastssl.train.epochs import EpochCount, continue_count


def test_epochs_of_one_length():
    count = continue_count(None, 100)
    assert count == EpochCount(100)
    assert (count.epochs(250), count.place(250), count.last_step(3)) == (2.5, (2, 50), 300)
    assert continue_count({"step": 250, "epochs": list(count)}, 100) == count
    assert continue_count({"step": 250}, 100) == count  # a checkpoint of an older version


@pytest.mark.parametrize(
    ("step", "length", "epochs", "left"),
    [
        (300, 280, 3.0, 560),  # images were added: two of five epochs are left, of 280 steps each
        (300, 10, 3.0, 20),  # a shrunk folder is not done
        (250, 280, 2.5, 700),
        (250, 7, 2 + 3 / 7, 18),
        (0, 50, 0.0, 250),
    ],
)
def test_epochs_that_change_their_length(step, length, epochs, left):
    count = continue_count({"step": step, "epochs": list(EpochCount(100))}, length)
    assert count.epochs(step) == pytest.approx(epochs)
    assert count.last_step(5) - step == left
    assert (count.first, count.steps_per_epoch) == (step, length)
    assert count.place(count.last_step(5)) == (5, 0)
    back = continue_count({"step": step + length, "epochs": list(count)}, 100)  # and back
    assert back.epochs(step + length) == pytest.approx(epochs + 1, abs=1 / 100)
