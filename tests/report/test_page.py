import json
import re
import sys

import pytest
import torch
from PIL import Image

from fastssl.eval.reconstruction import save_snapshot
from fastssl.extras import MissingExtra
from fastssl.methods import mae, moco_v2, moco_v3
from fastssl.report import images, ranks, tables
from fastssl.report import page as report_page
from fastssl.report.page import write_report
from fastssl.report.run_data import RunData
from tests.support.runs import Page, make_run

HOSTILE = ["<script>alert(1)<", "quotes \" ' `", "$x^$ \\frac", "two\nlines", "long " * 45, "{{ 7 * 7 }}", "<!-- -->"]


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """Fewer images, since features take most of the time."""
    monkeypatch.setattr(report_page, "MAPPED", 40)
    monkeypatch.setattr(images, "BANK", 40)
    monkeypatch.setattr(ranks, "QUERIES", 32)


def check_self_contained(page):
    """Checks that a page loads nothing, runs nothing, describes every picture, and links to itself only."""
    assert not {"script", "link", "iframe", "object", "embed", "base", "svg"} & set(page.tags)
    for value in page.values("src", "srcset"):
        assert re.fullmatch(r"data:image/(png|jpeg|svg\+xml);base64,[A-Za-z0-9+/=]+", value)
    assert set(page.values("href")) == {f"#{section}" for section in page.sections}
    assert not re.search(r"url\(|@import|javascript:", page.source)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    alts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(alts) == page.tags.count("img")
    assert all(alts)
    assert page.tags.count("style") == 1
    assert len(page.source) < 3_000_000


@pytest.mark.parametrize(("module", "data"), [(mae, "digits"), (moco_v2, "shapes:count=64")])
def test_report_is_self_contained_and_shows_everything(tmp_path, module, data):
    own = {"top1": 0.5} if module is moco_v2 else {}
    run = make_run(tmp_path / "run", module, data, **own)
    asked = {"data": data, "k": 20}
    run.note("knn of raw pixels", 0, 0.2, epoch=0, **asked)
    run.note("knn", 0, 0.25, epoch=0, **asked)
    run.note("knn", 30, 0.5, epoch=3, **asked)
    run.note("linear", 30, 0.625, epoch=3, protocol="of the paper", data=data)
    facts = {"start": "scratch", "classifier": "finetune", "labels": 10, "data": data}
    run.note("few labels", 30, 0.375, {"accuracies": [0.375]}, **facts)
    (run.folder / "profile").mkdir()
    rows = [{"part": "forward", "ms": 75.0, "share": 0.75}, {"part": "loss", "ms": 25.0, "share": 0.25}]
    (run.folder / "profile" / "table.json").write_text(json.dumps({"rows": rows}))
    if module is mae:
        for step in (0, 30):
            save_snapshot(run.load(), torch.randn(4, 3, 32, 32), run.folder / "reconstructions" / f"step-{step}.npz")
    page = Page(write_report([run]))
    check_self_contained(page)
    pictured = ["neighbours", "map", "ranks"]
    if module is mae:
        pictured = ["reconstructions", "attention", "patches", "neighbours", "map"]
    assert page.sections == ["labels", "curves", "evaluations", *pictured, "speed", "environment", "again"]
    for text in (
        "50.0% at epoch 3",
        "untrained encoder 25.0%",
        "62.50%",
        "trained from scratch 37.5%",
        "protocol of the paper",
        "3 of 3",
        "2.00 GB",
        "Profiled: 100.0 ms per step",
        "75.0%",
        "a fast one",
        "norm of the gradient",
    ):
        assert text.replace("3 of 3", f"3 of {run.config.training.epochs}") in page.text
    assert "Left out" not in page.text
    assert ("positives rank first among 512 negatives" in page.text) == (module is moco_v2)
    assert ("epoch 0" in page.text) == (module is mae)


def test_hostile_names_are_text(tmp_path):
    """Names of classes, files, data, folders and facts, and reasons why an image is bad."""
    data = tmp_path / "data <" / "style> $a$ '\""
    for i, name in enumerate(HOSTILE):
        (data / name).mkdir(parents=True)
        for k in range(6):
            Image.new("RGB", (24, 24), (30 * i, 40 * k, 99)).save(data / name / f"<b>{k}$.png")
    run = make_run(tmp_path / "<i>run", mae, f"folder:{data}")
    run.facts = {"<script>alert(1)</script>": "</style><script>alert(2)</script>", "undecodable": "\udcff"}
    run.note("knn", 0, 0.5, epoch=0, data=run.options.data, labels="<script>")
    (run.folder / "bad_files.txt").write_text("".join(f"<img src=http://x/{i}>: $broken$\n" for i in range(12)))
    (run.folder / "skipped-0.jsonl").write_text('{"step": 7, "loss": "<nan>", "grad_norm": "inf", "indices": [1]}\n')
    page = Page(write_report([run]))
    check_self_contained(page)
    names = ["<script>alert(1)<", "quotes \" ' `", "$x^$ \\frac", "two lines", "{{ 7 * 7 }}", "alert(2)", "\\udcff"]
    bad = ["12 images could not be decoded; the first 10:", "http://x/9>", "1 step was skipped:", "<nan>"]
    for text in names + bad:
        assert text in page.text
    assert "http://x/10>" not in page.text
    assert any("<b>0$.png" in value for value in page.values("alt"))


def test_runs_side_by_side(tmp_path):
    first = make_run(tmp_path / "one" / "run", mae, "digits")
    second = make_run(tmp_path / "two" / "run", moco_v2, "shapes:count=64", top1=0.5)
    first.note("knn", 10, 0.75, epoch=1, data="digits", k=20)
    second.note("knn", 10, 0.5, epoch=1, data="shapes:count=64", k=20)
    path = write_report([first, second])
    assert path == tmp_path / "report.html"
    page = Page(path)
    check_self_contained(page)
    assert "2 runs: one/run, two/run" in page.text
    assert "Losses of different methods are not comparable" in page.text
    assert "loss of mae" in page.text
    assert "loss of moco_v2" in page.text
    assert "images/s 90 90" in page.text  # in the same axes
    assert page.text.count("fastssl pretrain") == 2
    assert page.sections.count("ranks") == 1


def test_evaluations_name_other_data_than_the_runs_and_round_numbers(tmp_path):
    run = make_run(tmp_path / "run", mae, "digits", trained=False)
    run.note("knn", 10, 0.75, {"rankme": 12.3456}, data="digits", k=20)
    run.note("linear", 10, 0.5, data="shapes", labels=1.0)
    details = [row[-1] for row in tables.evaluations([RunData(run, "run", "#000")]).rows]
    assert details == ["k 20, rankme 12.3", "data shapes, labels 1"]


def test_a_run_without_checkpoint_has_its_curves(tmp_path):
    run, to = make_run(tmp_path / "run", moco_v3, "shapes:count=64", 1, trained=False, loss=None), tmp_path / "x.html"
    (run.folder / "profile").mkdir()
    (run.folder / "profile" / "table.json").write_text('{"rows": [')
    assert write_report([run], to=to) == to
    page = Page(to)
    check_self_contained(page)
    assert page.sections == ["curves", "speed", "environment", "again"]
    assert "Left out: checkpoint:" in page.text
    assert "table.json is damaged: the profile is left out" in page.text


def test_a_run_whose_data_moved_has_its_curves(tmp_path):
    run = make_run(tmp_path / "run", mae, f"folder:{tmp_path / 'gone'}")
    save_snapshot(run.load(), torch.randn(4, 3, 32, 32), run.folder / "reconstructions" / "step-000010.npz")
    page = Page(write_report([run]))
    assert page.sections == ["curves", "reconstructions", "speed", "environment", "again"]
    assert "Left out: data:" in page.text
    assert "parameters, trained" in page.text


def test_mistakes_get_one_sentence(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", mae, "digits", trained=False)
    empty = make_run(tmp_path / "empty", mae, "digits", lines=0, trained=False)
    monkeypatch.setitem(sys.modules, "umap", None)
    for words, sentence in (
        (([],), "report: a run is needed"),
        (([empty],), f"report: {empty.folder} has no metrics yet"),
        (([run, run],), f"report: {run.folder} is named twice"),
        (([run], tmp_path), f"report: {tmp_path} must be a file in a folder that exists"),
        (([run], tmp_path / "no" / "x.html"), f"report: {tmp_path / 'no' / 'x.html'} must be a file in a folder that"),
        (([run], None, "tsne"), "report: --map must be pca or umap, got 'tsne'"),
        (([run], None, "umap"), "report: --map umap needs umap-learn: pip install 'fastssl-engine[umap]'"),
    ):
        with pytest.raises((ValueError, MissingExtra), match=f"^{re.escape(sentence)}"):
            write_report(*words)
