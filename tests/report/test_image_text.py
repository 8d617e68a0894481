"""Retrieved pairs and zero-shot confusions of a method of images and text."""

import pytest

from fastssl.report import image_text, images
from fastssl.report import page as report_page
from fastssl.report.page import write_report
from fastssl.report.parts import Answers, Table, Tiles
from fastssl.report.run_data import RunData
from tests.report.test_page import check_self_contained
from tests.support import toy_text
from tests.support.runs import Page, make_run
from tests.support.toy_captions import COLOURS, Colours

DATA = "tests.support.toy_captions"


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """Fewer images, since features take most of the time."""
    monkeypatch.setattr(report_page, "MAPPED", 20)
    monkeypatch.setattr(images, "BANK", 20)


@pytest.fixture
def data(tmp_path):
    loaded = RunData(make_run(tmp_path / "run", toy_text, DATA), "run", "#000000")
    loaded.load()
    return loaded


def test_a_page_shows_pairs_and_confusions(tmp_path):
    run = make_run(tmp_path / "run", toy_text, DATA)
    run.retrieval()
    page = Page(write_report([run]))
    check_self_contained(page)
    assert {"retrieval", "zeroshot"} <= set(page.sections)
    for text in ("✓", "✗", "Searched: 27 images, 23 texts.", "100.0% of 30 images get their class", "R@1"):
        assert text in page.text
    assert "Left out" not in page.text


def test_pairs_are_marked_by_the_captions(data):
    (_, answers, _, found, _) = image_text.retrieved(data)
    assert isinstance(answers, Answers) and isinstance(found, Tiles)
    assert len(answers.rows) == len(found.rows) == image_text.QUERIES
    source = Colours("test")
    numbers = {source.name(i): i for i in range(30)}
    for tile, texts in answers.rows:
        own = source.captions(numbers[tile.alt.rpartition(": ")[2]])
        assert [(text, right) for text, right in texts] == [(text, text in own) for text, _ in texts]
        assert len(texts) == image_text.FOUND
    for text, tiles in found.rows:
        has = [text in source.captions(numbers[tile.alt.rpartition(": ")[2]]) for tile in tiles]
        assert [tile.mark == "" for tile in tiles] == has
        assert any(has)


def test_confusions_follow_the_newest_evaluation(data, tmp_path):
    names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
    exchanged = ["green", "red", *list(COLOURS)[2:]]
    names.write_text("\n".join(exchanged))
    templates.write_text("{}")
    text, table = image_text.confusions(data)
    assert isinstance(table, Table)
    assert {row[2] for row in table.rows} == {"100.0%"}
    data.run.zeroshot(names, templates)
    data.evaluations = data.run.evaluations()
    text, table = image_text.confusions(data)
    assert text.text == "66.7% of 30 images get their class, by one sentence about each."
    assert [row[:3] for row in table.rows[:2]] == [["green", "5", "0.0%"], ["red", "5", "0.0%"]]
    assert [row[3] for row in table.rows[:2]] == ["red 100%", "green 100%"]
    names.unlink()
    assert data.attempt(lambda: image_text.confusions(data)) is None
    assert data.missing == [f"eval zeroshot: --classes {names} cannot be read (No such file or directory)"]


def test_without_captions_or_labels_there_is_nothing(data):
    class Bare(Colours):
        def label(self, index):
            return -1

        def captions(self, index):
            return ()

    data.test_source = Bare("test")
    assert image_text.retrieved(data) == image_text.confusions(data) == []
