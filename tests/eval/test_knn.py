import pytest
import torch
import torch.nn.functional as F

from fastssl.data.source import open_source
from fastssl.eval.features import extract
from fastssl.eval.knn import knn_accuracy, nearest


def test_votes_are_the_formula(monkeypatch):
    monkeypatch.setattr("fastssl.eval.knn.TILE", 7)
    bank, queries = torch.randn(60, 5), torch.randn(30, 5)
    bank_labels, labels = torch.randint(0, 4, (60,)), torch.randint(0, 4, (30,))
    right = 0
    for query, label in zip(queries, labels):
        cosine = F.cosine_similarity(query[None], bank)
        votes = torch.zeros(4)
        for i in cosine.topk(9).indices:
            votes[bank_labels[i]] += (cosine[i] / 0.3).exp()
        right += int(votes.argmax() == label)
    assert knn_accuracy(bank, bank_labels, queries, labels, k=9, tau=0.3) == pytest.approx(right / 30)


def test_an_image_is_its_own_neighbour():
    x, labels = torch.randn(40, 8), torch.arange(40)
    assert knn_accuracy(x, labels, x, labels, k=5, tau=0.01) == 1.0
    assert nearest(x, x, 3)[:, 0].tolist() == list(range(40))


def test_k_larger_than_the_bank():
    assert knn_accuracy(torch.ones(2, 3), torch.tensor([1, 1]), torch.ones(4, 3), torch.ones(4).long(), k=20) == 1.0


def test_features_of_a_whole_source_in_order():
    pixels, labels, index = extract(lambda x: x.flatten(1), open_source("digits", "test"), (8, 8), batch_size=100)
    assert pixels.shape == (359, 192)
    assert index.tolist() == list(range(359))
    assert labels.bincount().min() > 20
    train = extract(lambda x: x.flatten(1), open_source("digits"), (8, 8))
    assert knn_accuracy(*train[:2], pixels, labels) > 0.95  # raw pixels of digits are telling
