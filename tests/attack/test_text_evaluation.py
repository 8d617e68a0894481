"""Damaged and hostile names, templates and captions through zero-shot classification, retrieval and the report."""

import json
import os
import random

import pytest
from PIL import Image

from fastssl.data.text import TextInput
from fastssl.eval.prompts import class_names, read_templates
from fastssl.eval.texts import Texts
from fastssl.eval.zeroshot import build_prompts
from fastssl.run import open_run
from tests.report.test_page import check_self_contained
from tests.support import toy_text
from tests.support.command import run
from tests.support.runs import Page, make_run
from tests.support.toy_captions import COLOURS

from .files import BYTES, check_sentence

CLASSES = ["red", "green", "blue"]
NAMES = "a red fox\nKrähe 🐦\n  the blue whale\n".encode()
TEMPLATES = b"a photo of a {}.\nein Bild: {}\n{}\n"
CAPTIONS = (
    "a red square",
    "x" * 100_000,
    '<script>alert(1)</script> & "quotes" \' ` {{ 7 * 7 }}',
    "\u202eright to left \u200b\x1b[31m\x07",
    "nul \0 inside",
    "🙂🙃",
    "Σίσυφος ﬁ １２ &amp;lt;",
    "[PAD] [SEP] [MASK] [CLS]",
    "a red\nsquare",
    "\ud800 lone",
    os.fsdecode(b"not utf-8 \xff"),
    "the " * 5_000,
)


def outcome(function, *words):
    """What a function returns, or the sentence that it refuses with."""
    try:
        return function(*words)
    except ValueError as error:
        check_sentence(str(error), "eval zeroshot: ")
        return str(error)


def attack(seed: int, count: int, path) -> dict[str, int]:
    reader, outcomes = Texts(TextInput("bert", 12)), {"texts": 0, "refused": 0}
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        data = bytearray(rng.choice((NAMES, TEMPLATES)))
        for _ in range(rng.choice((0, 1, 1, 2))):
            if data:
                rng.choice(BYTES)(rng, data)
        path.write_bytes(data.decode(errors="ignore").encode("utf-16") if rng.random() < 0.1 else data)
        names, templates = outcome(class_names, path, CLASSES, "x"), outcome(read_templates, path)
        names = CLASSES if isinstance(names, str) else names
        refused = isinstance(templates, str)
        prompts = outcome(build_prompts, names, ["{}"] if refused else templates, reader)
        assert isinstance(prompts, str) or len(prompts) == 3
        outcomes["refused" if refused else "texts"] += 1
    return outcomes


def test_files_of_names_and_templates(tmp_path):
    outcomes = attack(0, 300, tmp_path / "x.txt")
    assert min(outcomes.values()) > 30


@pytest.mark.exhaustive
def test_many_files_of_names_and_templates(tmp_path):
    attack(1, 20_000, tmp_path / "x.txt")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run") / "run", toy_text, "tests.support.toy_captions").folder


def images(root, captions):
    """A tar-free source of files with these captions, in class folders of colours."""
    listed, names = [], []
    for number, caption in enumerate(captions):
        colour = list(COLOURS)[number % 6]
        path = root / f"{number}.png"
        Image.new("RGB", (32, 32), COLOURS[colour]).save(path)
        listed.append({"id": number, "file_name": path.name})
        names += [{"image_id": number, "caption": text} for text in caption]
    for split in ("train", "val"):
        (root / "annotations").mkdir(exist_ok=True)
        content = json.dumps({"images": listed, "annotations": names})
        (root / "annotations" / f"captions_{split}2017.json").write_text(content)
        (root / f"{split}2017").symlink_to(root)
    return f"coco:{root}"


def test_hostile_captions(monkeypatch, capsys, made, tmp_path):
    captions = [(first, second) for first, second in zip(CAPTIONS, (*CAPTIONS[1:], "a red square"))]
    data = images(tmp_path, [*captions, ("", "  "), ()])
    run(monkeypatch, "eval", "retrieval", made, "--data", data, "--rerank", "2")
    out = capsys.readouterr().out
    for line in out.splitlines():
        check_sentence(line)
    opened = open_run(made)
    opened.options.data = data
    opened.save()
    page = Page(opened.report(tmp_path / "report.html"))
    check_self_contained(page)
    assert "retrieval" in page.sections
    assert "zeroshot" not in page.sections  # there are no labels
    assert "{{ 7 * 7 }}" in page.text


def test_images_that_cannot_be_decoded_take_their_captions_along(monkeypatch, capsys, made, tmp_path):
    data = images(tmp_path, [("a red square",), ("a blue one",), ("only this one",)])
    (tmp_path / "2.png").write_bytes(b"broken")
    run(monkeypatch, "eval", "retrieval", made, "--data", data)
    assert "2 images, 2 texts" in capsys.readouterr().out
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(b"broken")
    with pytest.raises(SystemExit, match=r"^fastssl: .*decoded"):
        run(monkeypatch, "eval", "retrieval", made, "--data", data)
