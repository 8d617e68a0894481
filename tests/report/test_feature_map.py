import sys
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA

from fastssl.report import embedding, parts


def test_pca_is_scikit_learn_s_on_unit_features():
    features = torch.randn(50, 8)
    places, text = embedding.flat(features, "pca")
    pca = PCA(2).fit(F.normalize(features, dim=1).double().numpy())
    expected = pca.transform(F.normalize(features, dim=1).double().numpy())
    np.testing.assert_allclose(np.abs(places), np.abs(expected), atol=1e-6)
    assert f"{pca.explained_variance_ratio_.sum():.0%}" in text
    np.testing.assert_allclose(embedding.flat(features * 3, "pca")[0], places, atol=1e-6)


def test_one_feature_and_equal_features_are_flat_too():
    for features in (torch.ones(5, 1), torch.ones(5, 3)):
        places, _ = embedding.flat(features, "pca")
        assert places.shape == (5, 2)
        assert np.isfinite(places).all()


def test_umap_is_asked_by_cosine(monkeypatch):
    asked = {}

    def reducer(**settings):
        asked.update(settings)
        return SimpleNamespace(fit_transform=lambda x: x[:, :2])

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=reducer))
    embedding.check("umap")
    places, text = embedding.flat(torch.randn(9, 4), "umap")
    assert places.shape == (9, 2)
    assert asked == {"n_components": 2, "n_neighbors": 8, "metric": "cosine", "random_state": 0, "n_jobs": 1}
    assert text == "UMAP by cosine, 8 neighbours."


def test_twenty_classes_are_named_the_others_grey():
    labels = [label for label in range(25) for _ in range(1 if label < 5 else 2)]
    picture = embedding.scatter(np.random.default_rng(0).normal(size=(45, 2)), labels, [f"${i}" for i in range(25)])
    names = [name for *_, name in picture.legend]
    assert names == [*(f"${i}" for i in range(5, 25)), "others"]
    assert len({(colour, mark) for colour, mark, _ in picture.legend}) == 21
    assert picture.alt == "45 test images as points, coloured by 20 classes"


def test_without_labels_there_is_one_colour():
    for labels, classes in (([-1] * 6, ["a"]), ([0] * 6, None)):
        picture = embedding.scatter(np.zeros((6, 2)), labels, classes)
        assert picture.legend == []
        assert picture.alt == "6 test images as points"


def test_names_are_short_printable_and_on_one_line():
    assert parts.short("a\n b\tc") == "a b c"
    assert parts.short("\x00\u202ea\udcff") == r"\x00\u202ea\udcff"
    assert len(parts.short("x" * 500)) == parts.SHORT
