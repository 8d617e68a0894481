import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.data.source import Subset, open_source
from fastssl.distributed import rank, world_size
from fastssl.eval import knn
from fastssl.eval.features import extract, extract_on_all_ranks
from fastssl.eval.knn import knn_accuracy, nearest
from tests.support.ranks import run_ranks

KS = (1, 3, 9, 200)


def by_formula(bank, bank_labels, queries, labels, k, tau):
    """Plain O(N · M): neighbours sorted by (−cosine, label), votes exp(cos / τ)."""
    cosines = F.normalize(queries.double(), dim=1) @ F.normalize(bank.double(), dim=1).T
    right = 0
    for row, label in zip(cosines.tolist(), labels.tolist()):
        voters = sorted(zip((-round(c, 6) for c in row), bank_labels.tolist()))[:k]
        votes = {}
        for minus, voter in voters:
            votes[voter] = votes.get(voter, 0.0) + math.exp(-minus / tau)
        right += max(votes, key=votes.get) == label
    return right / len(queries)


def data(seed, bank=60, queries=30, width=5, classes=4):
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.randint(0, classes, (n,), generator=generator) for n in (bank, queries))
    x, y = (torch.randn(n, width, generator=generator) for n in (bank, queries))
    return x, next(labels), y, next(labels)


@pytest.mark.parametrize("tile", [4, 7, 1024])
@pytest.mark.parametrize("tau", [0.07, 0.3])
def test_votes_are_the_formula(monkeypatch, tile, tau):
    monkeypatch.setattr(knn, "TILE", tile)
    x, labels, y, wanted = data(1)
    found = knn_accuracy(x, labels, y, wanted, KS, tau)
    assert list(found) == list(KS)
    for k, share in found.items():
        assert share == pytest.approx(by_formula(x, labels, y, wanted, k, tau)), k


@pytest.mark.parametrize("tile", [3, 1024])
def test_among_equally_near_features_smaller_labels_vote(monkeypatch, tile):
    """Features along a few axes: most cosines are equal, and the order of the bank must not matter."""
    monkeypatch.setattr(knn, "TILE", tile)
    generator = torch.Generator().manual_seed(2)
    x = F.one_hot(torch.randint(0, 4, (40,), generator=generator)).float()
    labels, wanted = (torch.randint(0, 3, (n,), generator=generator) for n in (40, 20))
    y = F.one_hot(torch.randint(0, 4, (20,), generator=generator)).float()
    order = torch.randperm(40, generator=generator)
    for k in (1, 2, 5, 11):
        share = knn_accuracy(x, labels, y, wanted, (k,), 0.1)[k]
        assert share == pytest.approx(by_formula(x, labels, y, wanted, k, 0.1))
        assert share == knn_accuracy(x[order], labels[order], y, wanted, (k,), 0.1)[k]


def test_nearest_rows_are_in_order_and_ties_take_the_earlier(monkeypatch):
    monkeypatch.setattr(knn, "TILE", 7)
    x, _, y, _ = data(3)
    wanted = (F.normalize(y, dim=1) @ F.normalize(x, dim=1).T).argsort(dim=1, descending=True)
    torch.testing.assert_close(nearest(x, y, 9), wanted[:, :9])
    assert nearest(torch.ones(20, 3), torch.ones(2, 3), 4).tolist() == [[0, 1, 2, 3]] * 2
    assert nearest(x, y, 100).shape == (30, 60)
    assert nearest(-torch.eye(3), torch.eye(3)[:1], 3).tolist() == [[1, 2, 0]]  # −0 of the products is 0


def test_an_image_is_its_own_neighbour():
    x, labels = torch.randn(40, 8), torch.arange(40)
    assert knn_accuracy(x, labels, x, labels, (5,), 0.01) == {5: 1.0}
    assert nearest(x, x, 3)[:, 0].tolist() == list(range(40))


def test_k_larger_than_the_bank():
    labels = torch.tensor([1, 1])
    assert knn_accuracy(torch.ones(2, 3), labels, torch.ones(4, 3), torch.ones(4).long()) == dict.fromkeys(
        (10, 20, 200), 1.0
    )


def test_opposite_neighbours_vote_too():
    """exp(cos / τ) of a cosine of −1 underflows to 0; a query with only opposite neighbours still gets a class."""
    assert knn_accuracy(
        -torch.ones(3, 2), torch.tensor([2, 2, 2]), torch.ones(1, 2), torch.tensor([2]), (3,), 1e-3
    ) == {3: 1.0}


def test_labels_missing_in_the_bank_count_as_errors():
    x = torch.eye(3)
    assert knn_accuracy(x, torch.tensor([0, 1, 1]), x, torch.tensor([0, 1, 7]), (1,))[1] == pytest.approx(2 / 3)


def test_refusals():
    x, labels = torch.ones(2, 3), torch.zeros(2).long()
    with pytest.raises(ValueError, match=r"^knn: ks must be at least 1 and tau > 0, got \(0,\) and 0\.07$"):
        knn_accuracy(x, labels, x, labels, (0,))
    with pytest.raises(ValueError, match=re.escape("got (1,) and nan")):
        knn_accuracy(x, labels, x, labels, (1,), math.nan)
    sentence = "knn: bank and queries must be finite features, bank labels at least 0, got 2 features and 2 queries"
    for bank, bank_labels in ((x * math.inf, labels), (x, labels - 1)):
        with pytest.raises(ValueError, match=f"^{sentence}, some of which are not$"):
            knn_accuracy(bank, bank_labels, x, labels)
    with pytest.raises(ValueError, match=r"got 0 features and 2 queries$"):
        knn_accuracy(x[:0], labels[:0], x, labels)


class Largest(TorchDispatchMode):
    """Largest number of values in a tensor created inside."""

    values = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.values = max(self.values, x.numel())
        return out


def test_memory_is_that_of_tiles(monkeypatch):
    monkeypatch.setattr(knn, "TILE", 16)
    x, labels, y, wanted = data(4, bank=700, queries=600, width=2)
    with Largest() as largest:
        knn_accuracy(x, labels, y, wanted, (5,))
    assert largest.values == 700 * 2  # the normalised bank; a tile is 16 × 21, all cosines would be 420,000
    with Largest() as largest:
        nearest(x, y, 5)
    assert largest.values == 600 * 5  # what it returns


def test_features_of_a_whole_source_in_order():
    pixels, labels, index = extract(lambda x: x.flatten(1), open_source("digits", "test"), (8, 8), batch_size=100)
    assert pixels.shape == (359, 192)
    assert index.tolist() == list(range(359))
    assert labels.bincount().min() > 20
    train = extract(lambda x: x.flatten(1), open_source("digits"), (8, 8))
    assert knn_accuracy(*train[:2], pixels, labels)[20] > 0.95  # raw pixels of digits are telling


def _whole(tied):
    x, labels, y, wanted = data(5, bank=97, queries=41)
    return (x.sign(), labels, y.sign(), wanted) if tied else (x, labels, y, wanted)


def _shares(sizes):
    return [_share(tied, sizes) for tied in (False, True)]


def _share(tied, sizes):
    """(accuracies, nearest rows) from this rank's part of bank and queries, of the given sizes."""
    x, labels, y, wanted = _whole(tied)
    pick = [torch.arange(n).tensor_split(sizes)[rank()] for n in (len(x), len(y))]
    found = knn_accuracy(x[pick[0]], labels[pick[0]], y[pick[1]], wanted[pick[1]], KS)
    keys = knn._merge_ranks(knn._nearest(F.normalize(x[pick[0]]), pick[0], F.normalize(y), 9))
    return found, knn._unpack(keys)[1]


@pytest.mark.parametrize(("world", "sizes"), [(2, (30,)), (3, (0, 41))])  # the first of three has nothing
def test_ranks_find_what_one_process_finds(world, sizes):
    x, _, y, _ = _whole(tied=False)
    single = [knn_accuracy(*_whole(tied), KS) for tied in (False, True)]
    for ranks in run_ranks(world, _shares, sizes):
        assert [found for found, _ in ranks] == single
        torch.testing.assert_close(ranks[0][1], nearest(x, y, 9))


def _extracted(count, batch_size):
    source = Subset(open_source("digits"), range(count))
    mine = extract(_flat, source, (8, 8), batch_size=batch_size, part=(rank(), world_size()))
    return mine, extract_on_all_ranks(_flat, source, (8, 8), batch_size=batch_size)


def _flat(images):
    return images.flatten(1)


@pytest.mark.parametrize(("world", "count", "batch_size"), [(2, 25, 4), (3, 2, 4)])  # of three ranks one gets none
def test_ranks_extract_their_parts_and_gather_the_whole(world, count, batch_size):
    source = Subset(open_source("digits"), range(count))
    features, labels, index = extract(_flat, source, (8, 8))
    parts, together = zip(*run_ranks(world, _extracted, count, batch_size))
    assert sorted(i for _, _, mine in parts for i in mine.tolist()) == index.tolist()
    assert {part[0].shape[1] for part in parts} == {192}
    for found, found_labels in together:
        assert torch.equal(found, features)
        assert torch.equal(found_labels, labels)
