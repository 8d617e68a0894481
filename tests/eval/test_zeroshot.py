"""Zero-shot classification, and the files of names and templates."""

import os

import pytest
import torch
import torch.nn.functional as F

from fastssl.data.text import TextInput
from fastssl.distributed import rank, world_size
from fastssl.eval import prompts, texts
from fastssl.eval.prompts import TEMPLATES, class_names, read_templates
from fastssl.eval.texts import Texts
from fastssl.eval.zeroshot import build_prompts, class_features, zeroshot_accuracy
from tests.support.ranks import run_ranks

READER = Texts(TextInput("bert", 12))
NAMES = ["red fox", "cat", "large dog", "star", "box", "circle", "tree"]
FEW = ["a {}", "the small {}", "{}"]


def embed(tokens):
    table = torch.randn(30_522, 6, generator=torch.Generator().manual_seed(1))
    return F.normalize((table[tokens] * (tokens != 0)[..., None]).sum(1), dim=1)


def by_formula():
    """The unit mean of unit vectors of each class."""
    rows = []
    for name in NAMES:
        vectors = [embed(READER.batch([READER.encode(template.replace("{}", name))]))[0] for template in FEW]
        mean = sum(vectors) / len(vectors)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


@pytest.mark.parametrize("batch", [1, 7, 256])
def test_a_class_is_the_unit_mean_of_its_sentences(monkeypatch, batch):
    monkeypatch.setattr("fastssl.eval.zeroshot.BATCH", batch)
    monkeypatch.setattr(texts, "BATCH", batch)
    found = class_features(embed, build_prompts(NAMES, FEW, READER), READER)
    torch.testing.assert_close(found, by_formula())


def test_accuracy_is_the_share_of_nearest_classes():
    classes, images, labels = torch.randn(7, 5), torch.randn(40, 5), torch.arange(40) % 7
    ranked = (F.normalize(images, dim=1) @ F.normalize(classes, dim=1).T).argsort(1, descending=True)
    top1, top5 = zeroshot_accuracy(images, labels, classes)
    assert top1 == pytest.approx((ranked[:, 0] == labels).double().mean().item())
    assert top5 == pytest.approx((ranked[:, :5] == labels[:, None]).any(1).double().mean().item())
    assert zeroshot_accuracy(images[:3], labels[:3], classes[:4]).top5 is None
    same = zeroshot_accuracy(images, labels, torch.ones(7, 5))
    assert same.top1 == pytest.approx((labels == 0).double().mean().item())  # among equal classes the first


def test_vectors_must_be_finite():
    with pytest.raises(ValueError, match=r"^eval zeroshot: features must be finite, got those of 2 images, some of"):
        zeroshot_accuracy(torch.full((2, 3), torch.nan), torch.zeros(2).long(), torch.eye(3))
    with pytest.raises(ValueError, match=r"got those of 0 images$"):
        zeroshot_accuracy(torch.ones(0, 3), torch.zeros(0).long(), torch.eye(3))


def _on_ranks(names):
    """(class vectors, accuracy) from this rank's part of the images."""
    classes = class_features(embed, build_prompts(names, FEW, READER), READER)
    generator = torch.Generator().manual_seed(2)
    images, labels = torch.randn(5, 6, generator=generator), torch.arange(5) % len(names)
    own = slice(0, 5) if world_size() == 1 else slice(5 * (rank() == 1), 5 if rank() == 1 else 5 * (rank() == 0))
    return classes, zeroshot_accuracy(images[own], labels[own], classes)


@pytest.mark.parametrize(("world", "names"), [(2, NAMES), (3, NAMES[:2])])  # with fewer classes than ranks
def test_ranks_find_what_one_process_finds(world, names):
    classes, accuracy = _on_ranks(names)
    for found, found_accuracy in run_ranks(world, _on_ranks, names):
        torch.testing.assert_close(found, classes)
        assert found_accuracy == accuracy


def test_classes_must_differ_to_the_tokenizer():
    message = (
        r'^eval zeroshot: classes must differ in their names, got "cat" for class 1 and "CAT" for class 2, equal '
        r"tokens to the method \(tokenizer bert, at most 12 a text\): tell them apart in --classes FILE$"
    )
    with pytest.raises(ValueError, match=message):
        build_prompts(["dog", "cat", "CAT"], FEW, READER)
    long = "a very very very very very very very very very very very long name of a "
    with pytest.raises(ValueError, match="equal tokens"):
        build_prompts([long + "cat", long + "dog"], FEW, READER)


def test_names_come_from_the_source_or_a_file(tmp_path):
    assert class_names(None, ["red_fox", "n01", "a  b", "_"], "x") == ["red fox", "n01", "a b", "_"]
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffKrähe\r\n  grey   crane\tbird \r\nten_of_them\n\n \n".encode())
    assert class_names(path, ["a", "b", "c"], "x") == ["Krähe", "grey crane bird", "ten_of_them"]
    assert class_names(str(path), ["a", "b", "c"], "x") == class_names(path, ["a", "b", "c"], "x")
    path.write_bytes(b"one\rtwo")
    assert class_names(path, ["a", "b"], "x") == ["one", "two"]
    assert class_names(("one", "two"), ["a", "b"], "x") == ["one", "two"]
    assert read_templates(None) == list(TEMPLATES)
    path.write_text("a {}.\n{} of {c}\n")
    assert read_templates(path) == ["a {}.", "{} of {c}"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    {
        b"": "--classes must have a line at least, got none in PATH",
        b" \n\n": "--classes must have a line at least, got none in PATH",
        b"a\n\nb\n": "--classes must have an entry in each line, got a blank line 2",
        b"a\n": "--classes must name the 2 classes of folder:x (cat, dog), one a line in this order, got 1 name",
        b"a\nb\nc": "--classes must name the 2 classes of folder:x (cat, dog), one a line in this order, got 3 names",
        b"a\nb\xff\n": "--classes must be UTF-8 text, got other bytes in line 2 of PATH: save it as UTF-8",
        "a\nb\n".encode("utf-16"): "--classes must be UTF-8 text, got other bytes in line 1 of PATH: save it as UTF-8",
        "a\nb\n".encode("utf-16-le"): '--classes must be text without control characters, got "a\\x00" in line 1',
        b"a\x1b[31m\nb": '--classes must be text without control characters, got "a\\x1b[31m" in line 1',
    }.items(),
    ids=repr,
)
def test_wrong_files_of_names(tmp_path, content, sentence):
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        class_names(path, ["cat", "dog"], "folder:x")
    assert str(error.value) == "eval zeroshot: " + sentence.replace("PATH", str(path))


@pytest.mark.parametrize(
    ("content", "sentence"),
    {
        "": "--templates must have a line at least, got none in PATH",
        "a {}\na photo\n": "every line of --templates must have {} once, where the name of the class goes, got "
        '"a photo" in line 2',
        "{} and {}": 'every line of --templates must have {} once, where the name of the class goes, got "{} and {}" '
        "in line 1",
        "a {c}.": "every line of --templates must have {} once, where the name of the class goes, got "
        '"a {c}." in line 1',
        "a {}\nb {}\n a  {}": 'the lines of --templates must differ, got "a {}" in lines 1 and 3',
    }.items(),
)
def test_wrong_files_of_templates(tmp_path, content, sentence):
    path = tmp_path / "templates.txt"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        read_templates(path)
    assert str(error.value) == "eval zeroshot: " + sentence.replace("PATH", str(path))


def test_files_that_cannot_be_read(monkeypatch, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"a\n" * 20)
    monkeypatch.setattr(prompts, "MAX_BYTES", 30)
    for path, reason in {
        tmp_path / "missing": "cannot be read (No such file or directory)",
        tmp_path: "cannot be read (Is a directory)",
        tmp_path / "pipe": "cannot be read (not a regular file)",
        "~nobody-of-this-name/x": "cannot be read (Could not determine home directory.)",
    }.items():
        with pytest.raises(ValueError) as error:
            class_names(path, ["a"], "x")
        assert str(error.value) == f"eval zeroshot: --classes {path} {reason}"
    sentence = f"^eval zeroshot: --templates must be a text file of at most 30 bytes, got 40 in {tmp_path}/large$"
    with pytest.raises(ValueError, match=sentence):
        read_templates(tmp_path / "large")
    with pytest.raises(ValueError, match=r"^eval zeroshot: --classes must be texts, got 3 in line 2$"):
        class_names(["a", 3], ["a", "b"], "x")
    with pytest.raises(
        ValueError, match=r"^eval zeroshot: --templates must have a line at least, got none in nothing$"
    ):
        read_templates([])
