"""Which held-out images a report shows with their nearest neighbours."""

from fastssl.report.images import QUERIES, choose_queries


def test_queries_are_of_different_classes():
    labels = [i % 10 for i in range(100)]  # evenly spaced places would all be of one class or two
    chosen = choose_queries(labels)
    assert len(chosen) == QUERIES and len({labels[place] for place in chosen}) == QUERIES
    assert choose_queries([3, 3, 0]) == [0, 2]


def test_queries_without_labels_or_with_one_class_are_evenly_spaced():
    assert choose_queries([-1] * 101) == [0, 20, 40, 60, 80, 100]
    assert choose_queries([0, -1, 1, -1]) == [0, 1, 2, 3]
    assert choose_queries([2, 2]) == [0, 1]
