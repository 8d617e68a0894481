import sys
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA

from fastssl.report import feature_map, parts


def test_pca_is_scikit_learn_s_on_unit_features():
    features = torch.randn(50, 8)
    points, text = feature_map.project(features, "pca")
    pca = PCA(2).fit(F.normalize(features, dim=1).double().numpy())
    expected = pca.transform(F.normalize(features, dim=1).double().numpy())
    np.testing.assert_allclose(np.abs(points), np.abs(expected), atol=1e-6)
    assert f"{pca.explained_variance_ratio_.sum():.0%}" in text
    np.testing.assert_allclose(feature_map.project(features * 3, "pca")[0], points, atol=1e-6)


def test_one_feature_and_equal_features_have_two_coordinates():
    for features in (torch.ones(5, 1), torch.ones(5, 3)):
        points, _ = feature_map.project(features, "pca")
        assert points.shape == (5, 2)
        assert np.isfinite(points).all()


def test_umap_compares_by_cosine(monkeypatch):
    arguments = {}

    def reducer(**settings):
        arguments.update(settings)
        return SimpleNamespace(fit_transform=lambda x: x[:, :2])

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=reducer))
    feature_map.check_projection("umap")
    points, text = feature_map.project(torch.randn(9, 4), "umap")
    assert points.shape == (9, 2)
    assert arguments == {"n_components": 2, "n_neighbors": 8, "metric": "cosine", "random_state": 0, "n_jobs": 1}
    assert text == "UMAP by cosine, 8 neighbours."


def test_the_legend_has_the_twenty_most_frequent_classes():
    labels = [label for label in range(25) for _ in range(1 if label < 5 else 2)]
    picture = feature_map.scatter(np.random.default_rng(0).normal(size=(45, 2)), labels, [f"${i}" for i in range(25)])
    names = [name for *_, name in picture.legend]
    assert names == [*(f"${i}" for i in range(5, 25)), "others"]
    assert len({(colour, mark) for colour, mark, _ in picture.legend}) == 21
    assert picture.alt == "45 held-out images as points, coloured by 20 classes"


def test_images_without_labels_have_one_colour():
    for labels, classes in (([-1] * 6, ["a"]), ([0] * 6, None)):
        picture = feature_map.scatter(np.zeros((6, 2)), labels, classes)
        assert picture.legend == []
        assert picture.alt == "6 held-out images as points"


def test_names_are_short_printable_and_on_one_line():
    assert parts.short("a\n b\tc") == "a b c"
    assert parts.short("\x00\u202ea\udcff") == r"\x00\u202ea\udcff"
    assert len(parts.short("x" * 500)) == parts.SHORT
