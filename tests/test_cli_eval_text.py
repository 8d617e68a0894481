"""`fastssl eval zeroshot` and `eval retrieval`, their records, and one sentence for each mistake."""

import json
import shutil

import pytest
import torch

from fastssl import evaluation
from fastssl.data.augmentation import Augmentation, View
from fastssl.methods import mae
from fastssl.run import open_run
from tests.support import toy_text
from tests.support.command import refused, run
from tests.support.ranks import run_ranks
from tests.support.runs import make_run
from tests.support.toy_captions import Colours

DATA = "tests.support.toy_captions"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("text") / "run", toy_text, DATA).folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the run for the records of evaluations."""
    return shutil.copytree(made, tmp_path / "run")


def noted(folder):
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def test_zeroshot(monkeypatch, capsys, folder, tmp_path):
    run(monkeypatch, "eval", "zeroshot", folder)
    assert capsys.readouterr().out == f"zero-shot accuracy of {folder} on {DATA}: top-1 100.0%, top-5 100.0%\n"
    names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
    names.write_text("\n".join(["green", "red", "blue", "yellow", "purple", "orange"]))  # two are exchanged
    templates.write_text("something {}\n")
    for _ in range(2):  # the same question has one line
        run(monkeypatch, "eval", "zeroshot", folder, "--classes", names, "--templates", templates)
    own, exchanged = noted(folder)
    facts = {"evaluation": "zeroshot", "step": 30, "data": DATA, "epoch": 3.0}
    assert own == {**facts, "accuracy": 1.0, "top5": 1.0}
    assert exchanged == {
        **facts,
        "classes": str(names),
        "templates": str(templates),
        "accuracy": pytest.approx(2 / 3, abs=1e-4),
        "top5": 1.0,
    }


def test_retrieval(monkeypatch, capsys, folder):
    run(monkeypatch, "eval", "retrieval", folder)
    run(monkeypatch, "eval", "retrieval", folder, "--rerank", "3")
    left_out, first, *_ = capsys.readouterr().out.splitlines()
    assert left_out == "eval: 3 of 30 images of the held-out split have no caption and are left out"
    assert first == f"retrieval of {folder} on {DATA}: 27 images, 23 texts"
    images, texts, again, _ = noted(folder)
    assert 0.2 < images.pop("accuracy") < 1.0  # the number cannot be seen, and four texts have the image's colour
    assert 0.2 < texts.pop("accuracy") < 1.0
    facts = {"evaluation": "retrieval", "step": 30, "data": DATA, "epoch": 3.0, "images": 27, "texts": 23}
    assert images == {**facts, "direction": "image to text", "r5": 1.0, "r10": 1.0}
    assert texts["r5"] <= texts["r10"] == 1.0
    assert again["rerank"] == 3


def test_python_returns_the_shares(folder):
    opened = open_run(folder)
    assert opened.zeroshot(templates=["a {}", "{}"]).top1 == 1.0
    assert noted(folder)[-1]["templates"] == "2 in a list"
    recall = opened.retrieval()
    assert list(recall.image_to_text) == [1, 5, 10]
    assert (recall.images, recall.texts) == (27, 23)
    sources = Colours("train"), Colours("test")
    assert opened.retrieval(data=sources) == recall
    assert opened.knn(k=1)[1] == 1.0  # kNN and linear probe use the image tower
    assert opened.linear(optimizers=["lbfgs"], epochs=3).top1 == 1.0


def _both(folder):
    opened = open_run(folder)
    return opened.zeroshot(), opened.retrieval(2)


def test_ranks_find_and_note_what_one_process_does(folder, tmp_path):
    single = _both(folder)
    other = shutil.copytree(folder, tmp_path / "ranks")
    (other / "evaluations.jsonl").unlink()
    assert run_ranks(2, _both, other) == [single, single]
    assert noted(other) == noted(folder)


def test_mistakes_get_one_sentence(monkeypatch, tmp_path, folder):
    image_method = make_run(tmp_path / "mae", mae, "digits").folder
    missing = tmp_path / "missing.txt"
    not_text = "the run must be of a method of images and text, such as clip, got mae: use eval knn or eval linear"
    for words, sentence in {
        ("zeroshot", image_method): f"eval zeroshot: {not_text}",
        ("retrieval", image_method): f"eval retrieval: {not_text}",
        (
            *("retrieval", folder, "--data", "digits"),
        ): "eval retrieval: the held-out split of digits has no captions to search for",
        ("retrieval", folder, "--rerank", "-1"): "eval: --rerank must be at least 0, got -1",
        (
            *("zeroshot", folder, "--classes", missing),
        ): f"eval zeroshot: --classes {missing} cannot be read (No such file or directory)",
        ("zeroshot", folder, "--data", "nowhere"): None,
    }.items():
        if sentence:
            refused(monkeypatch, sentence, "eval", *words)
        else:
            with pytest.raises(SystemExit, match=r"^fastssl: data: unknown source 'nowhere'"):
                run(monkeypatch, "eval", *words)
    assert not (folder / "evaluations.jsonl").exists()


def test_labels_and_abilities_are_needed(monkeypatch, folder):
    class Unlabelled(Colours):
        def label(self, index):
            return -1

    opened, sources = open_run(folder), (Unlabelled("train"), Unlabelled("test"))
    with pytest.raises(ValueError, match=r"^eval zeroshot: the held-out split of python:Unlabelled has no labels to"):
        opened.zeroshot(data=sources)
    whole = toy_text.build(opened.config)

    class NoMatch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.words = whole.backbone, whole.words
            self.embed_images, self.embed_text = whole.embed_images, whole.embed_text

    monkeypatch.setattr(toy_text, "build", lambda config: NoMatch())
    sentence = (
        r"^eval retrieval: --rerank is for methods that judge pairs of an image and a text, such as albef, and "
        r"tests\.support\.toy_text does not: leave it out$"
    )
    with pytest.raises(ValueError, match=sentence):
        opened.retrieval(rerank=5)
    monkeypatch.setattr(toy_text, "build", lambda config: torch.nn.ParameterDict({"scale": torch.ones(3)}))
    monkeypatch.setattr(evaluation, "load_model", lambda method, state: None)
    with pytest.raises(
        ValueError, match=r"must have the functions of fastssl\.contract\.EmbedsText, got ParameterDict"
    ):
        opened.zeroshot()
    assert not (folder / "evaluations.jsonl").exists()


def test_images_are_normalised_as_in_training(monkeypatch, folder):
    """A method of images and text often has other numbers than ImageNet's."""
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.25)
    own = Augmentation((View((32, 32), mean=mean, std=std),))
    monkeypatch.setattr(toy_text.Config, "augmentation", property(lambda config: own))
    source, seen = Colours("test"), []
    monkeypatch.setattr(toy_text.ColourWords, "embed_images", lambda self, x: seen.append(x) or x.mean((2, 3)))
    monkeypatch.setattr(toy_text.ColourWords, "features", lambda self, x: seen.append(x) or x.mean((2, 3)))
    opened = open_run(folder)
    pixels = torch.stack([torch.from_numpy(source.read(i)) for i in range(30)]).permute(0, 3, 1, 2) / 255
    wanted = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    opened.zeroshot()
    torch.testing.assert_close(seen[-1], wanted)
    opened.knn(k=1)
    torch.testing.assert_close(seen[-1], wanted)
