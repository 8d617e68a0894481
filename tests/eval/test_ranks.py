import numpy as np
import pytest
import torch

from fastssl.eval.ranks import Ranks, bins, lost_contrast


def test_bins_double_and_hold_every_rank_once():
    assert bins(1).tolist() == [0, 1, 2]
    assert bins(7).tolist() == [0, 1, 2, 4, 8]
    assert bins(8).tolist() == [0, 1, 2, 4, 9]
    for negatives in (1, 2, 3, 31, 512, 65536):
        edges = bins(negatives)
        assert np.histogram(np.arange(negatives + 1), bins=edges)[0].sum() == negatives + 1
        assert (np.diff(edges) > 0).all()


@pytest.mark.parametrize("negatives", [7, 8, 512])
def test_entropy_is_0_for_first_ranks_and_1_for_random_ones(negatives):
    every = torch.arange(negatives + 1)
    assert Ranks(torch.zeros(50, dtype=torch.int64), negatives, 32).entropy == 0
    assert Ranks(every, negatives, 32).entropy == pytest.approx(1)
    half = Ranks(torch.cat([torch.zeros_like(every), every]), negatives, 32)
    assert 0 < half.entropy < 1


def test_random_ranks_and_first_ranks_are_named():
    assert "the views of an image may be too much alike" in Ranks(torch.zeros(2000).long(), 512, 32).warning()
    assert Ranks(torch.tensor([0] * 99 + [1]), 512, 32).warning() is None
    assert "as if at random" in Ranks(torch.arange(513), 512, 32).warning()
    good = Ranks(torch.tensor([0, 0, 0, 1, 5]), 7, 32)
    assert good.warning() is None
    assert good.text() == "60.0% rank first among 7 negatives; the entropy of their ranks is 59% of that of random ones"
    assert good.results() == {"ranked_first": 0.6, "rank_entropy": 0.5903}


def lines(*shares):
    """Two records an epoch with these shares of positives ranked first, after one of the first steps."""
    first = {"epoch": 0.1, "top1": 1.0}  # a queue of random keys
    return [first, *({"epoch": 0.1 + i / 2, "top1": share} for i, share in enumerate(shares, 1))]


def test_a_contrast_that_is_lost_is_named():
    assert lost_contrast([]) is None
    assert lost_contrast([{"epoch": 1.0, "loss": 2.0}, {"epoch": 2.0, "top1": None}]) is None
    assert lost_contrast(lines(0.5, 0.3, 0.2, 0.2)) is None
    assert lost_contrast(lines(0.02, 0.04, 0.3, 0.9)) is None  # it rises
    sentence = lost_contrast(lines(0.6, 0.1, 0.2, 0.03, 0.04))
    assert sentence == "The contrast looks lost: 3.5% of the positives rank first in epoch 3, after 60.0% in epoch 1."
