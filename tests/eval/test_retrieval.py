"""Retrieval against the formula: all cosines, sorted."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastssl.contract import EmbedsText, MatchesText
from fastssl.data.source import BadImage
from fastssl.data.text import TextInput
from fastssl.distributed import rank
from fastssl.eval import knn, retrieval, texts
from fastssl.eval.knn import nearest_on_all_ranks
from fastssl.eval.retrieval import KS, captioned, retrieve
from fastssl.eval.texts import Texts
from tests.support.ranks import run_ranks
from tests.support.toy_captions import SILENT, Colours
from tests.support.toy_text import ColourWords

TEXT = TextInput("bert", 12)
LOADING = {"device": "cpu", "workers": 0, "engine": "torchvision"}
WORDS = ["small", "large", "red", "green", "star", "box", "left", "right", "dark", "light"]


class Words:
    """Random images whose captions are a few random words: some are equal, some images have none, one is broken."""

    classes, size, shards = None, (6, 6), None
    broken = 7

    def __init__(self, count: int = 40):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> np.ndarray:
        if index == self.broken:
            raise BadImage(f"{index}: broken")
        return np.random.default_rng(index).integers(0, 256, (6, 6, 3), dtype=np.uint8)

    def name(self, index: int) -> str:
        return str(index)

    def label(self, index: int) -> int:
        return -1

    def captions(self, index: int) -> tuple[str, ...]:
        if index == self.broken:
            return "only the broken one says this", "red box"
        generator = np.random.default_rng([1, index])
        own = [" ".join(generator.choice(WORDS, 2)) for _ in range(generator.integers(0, 4))]
        return tuple(own) + ((own[0].upper() + " ",) if own and index % 3 == 0 else ())


class Random(nn.Module):
    """Random projections of pixels and words, and a judgement that follows neither."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.images = nn.Parameter(torch.randn(108, 5, generator=generator))
        self.words = nn.Parameter(torch.randn(30_522, 5, generator=generator))
        self.calls: list[tuple[int, int]] = []  # images and texts of calls of match

    def embed_images(self, images):
        return F.normalize(images.flatten(1) @ self.images, dim=1)

    def embed_text(self, tokens):
        return F.normalize((self.words[tokens] * (tokens != 0)[..., None]).sum(1), dim=1)

    def match(self, images, tokens):
        self.calls.append((len(images), len(tokens)))
        own = (self.words[tokens] * (tokens != 0)[..., None]).sum(1)
        return (images.flatten(1) @ self.images).sin().sum(1) - own.cos().sum(1) * images.mean((1, 2, 3))


def table(method):
    """(cosines [N, U] and scores [N, U] of all pairs, whether they belong together) of the images that are left."""
    source, reader = Words(), Texts(TEXT)
    images = [i for i in range(len(source)) if i != source.broken and source.captions(i)]
    own = {i: {reader.encode(c) for c in source.captions(i)} for i in images}
    rows = list(dict.fromkeys(reader.encode(c) for i in images for c in source.captions(i)))
    pixels = torch.stack([torch.from_numpy(source.read(i)) for i in images]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x, tokens = (pixels - mean) / std, reader.batch(rows)
    cosines = (method.embed_images(x) @ method.embed_text(tokens).T).double()
    scores = torch.stack([method.match(image[None], tokens) for image in x]).double()
    return cosines, scores, torch.tensor([[row in own[i] for row in rows] for i in images])


def recall_by_formula(cosines, scores, right, k):
    shares = {n: 0.0 for n in KS}
    for row, score, mine in zip(cosines, scores, right):
        order = row.argsort(descending=True, stable=True)
        order = torch.cat([order[:k][score[order[:k]].argsort(descending=True, stable=True)], order[k:]])
        for n in KS:
            shares[n] += mine[order[:n]].any().item() / len(cosines)
    return shares


def found(k=0, source=None):
    method, reader = Random(), Texts(TEXT)
    images, captions = captioned(source or Words(), reader.encode)
    with torch.no_grad():
        return method, retrieve(method, images, captions, (6, 6), reader, k, **LOADING)


@pytest.mark.parametrize("k", [0, 4, 12])
@torch.no_grad()
def test_recall_is_the_formula(monkeypatch, k):
    monkeypatch.setattr(knn, "TILE", 7)
    monkeypatch.setattr(texts, "BATCH", 5)
    monkeypatch.setattr(retrieval, "PAIRS", 3)
    method, result = found(k)
    calls = method.calls
    cosines, scores, right = table(Random())
    recall = result.recall()
    assert (recall.images, recall.texts) == tuple(right.shape)
    assert right.sum() > right.shape[1], "no two images share a caption"
    assert recall.image_to_text == pytest.approx(recall_by_formula(cosines, scores, right, k))
    assert recall.text_to_image == pytest.approx(recall_by_formula(cosines.T, scores.T, right.T, k))
    if k:
        unsorted = found()[1].recall()
        assert unsorted != recall
        assert all(images == 1 for images, _ in calls)  # an image is encoded once for all of its texts
        assert sum(count for _, count in calls) < 2 * k * max(right.shape)


def test_the_protocols_know_the_toys():
    assert isinstance(Random(), EmbedsText) and isinstance(Random(), MatchesText)
    assert isinstance(ColourWords(), EmbedsText)
    assert not isinstance(nn.Linear(1, 1), EmbedsText)


def test_equal_captions_are_one_text_of_all_their_images():
    source, captions = captioned(Colours("test"), Texts(TEXT).encode)
    spoken = [i for i in range(30) if i % SILENT != SILENT - 1]
    assert [source.name(i) for i in range(len(source))] == [f"test {i}" for i in spoken]
    assert sorted(captions.texts) == sorted({text for i in spoken for text in Colours("test").captions(i)})
    assert len(captions.pairs) == 2 * len(spoken)
    for image, text in captions.pairs.tolist():
        assert captions.texts[text] in Colours("test").captions(spoken[image])
    whole, _ = captioned(source, Texts(TEXT).encode)
    assert whole is source


def test_captions_that_the_tokenizer_cannot_tell_apart_are_one():
    @dataclasses.dataclass
    class Two(Words):
        given: tuple = ()
        broken = -1

        def __len__(self):
            return len(self.given)

        def captions(self, index):
            return self.given[index]

    two = Two(given=(("A red box", "a  RED box", "   ", ""), ("a red box",), ("a red box " + "and so on " * 20,), ()))
    source, captions = captioned(two, Texts(TextInput("bert", 5)).encode)
    assert captions.texts == ["A red box"]
    assert captions.pairs.tolist() == [[0, 0], [1, 0], [2, 0]]
    assert len(source) == 3


def test_a_collapsed_method_finds_by_chance(monkeypatch):
    """All vectors are equal: the first images and texts are found, not the right ones."""
    monkeypatch.setattr(Random, "embed_images", lambda self, x: torch.ones(len(x), 5))
    monkeypatch.setattr(Random, "embed_text", lambda self, tokens: torch.ones(len(tokens), 5))
    _, result = found()
    assert result.texts_of_images[:, 0].unique().tolist() == [0]
    assert result.recall().text_to_image[1] < 0.1


def test_a_few_images_have_fewer_places_than_ten():
    source = Words(4)
    result = found(source=source)[1]
    assert result.images_of_texts.shape[1] == len(result.images) < 5
    assert result.recall().text_to_image[10] == 1.0


def test_what_is_refused(monkeypatch):
    monkeypatch.setattr(Random, "match", lambda self, images, tokens: torch.full((len(tokens),), torch.nan))
    with pytest.raises(ValueError, match=r"^eval retrieval: scores of match must be finite"):
        found(2)
    monkeypatch.setattr(Random, "embed_text", lambda self, tokens: torch.full((len(tokens), 5), torch.nan))
    with pytest.raises(ValueError, match=r"^eval: features must be finite, some of them are not$"):
        found()


def _found_on_ranks(k, count):
    return found(k, Words(count))[1]


@pytest.mark.parametrize(("world", "k", "count"), [(2, 5, 40), (3, 0, 4)])  # of three ranks one has no image
def test_ranks_find_what_one_process_finds(world, k, count):
    single = _found_on_ranks(k, count)
    for ranks in run_ranks(world, _found_on_ranks, k, count):
        for name in ("images", "texts_of_images", "images_of_texts"):
            torch.testing.assert_close(getattr(ranks, name), getattr(single, name))
        assert ranks.captions.texts == single.captions.texts
        assert ranks.recall() == single.recall()


def test_batches_of_texts_are_trimmed_and_in_order(monkeypatch):
    monkeypatch.setattr(texts, "BATCH", 2)
    reader, shapes = Texts(TextInput("bert", 20)), []
    rows = [reader.encode("red " * n) for n in (15, 1, 9, 3, 2)]

    def embed(tokens):
        shapes.append(tuple(tokens.shape))
        return (tokens != 0).sum(1, keepdim=True).double()

    assert reader.embed(embed, rows).flatten().tolist() == [17, 3, 11, 5, 4]
    assert shapes == [(2, 8), (2, 16), (1, 20)]
    assert reader.embed(embed, []).shape == (0, 1)
    whole = Texts(TextInput("bert", 20, trim=False))
    assert whole.batch([whole.encode("red")]).shape == (1, 20)


def test_memory_is_that_of_tiles(monkeypatch):
    from tests.eval.test_knn import Largest

    monkeypatch.setattr(knn, "TILE", 16)
    x, y = torch.randn(700, 2), torch.randn(600, 2)
    with Largest() as largest:
        rows = nearest_on_all_ranks(x, torch.arange(700), y, 5)
    assert largest.values == 600 * 5  # what it returns; all cosines would be 420,000
    torch.testing.assert_close(rows, knn.nearest(x, y, 5))
    assert rank() == 0
