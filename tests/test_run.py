"""A run folder: what is written, what is read back, and how data and methods are named."""

import json
from pathlib import Path

import pytest

from fastssl.data.source import open_source
from fastssl.method_modules import find_augmentation, method_module, method_name_of
from fastssl.methods import mae, moco_v2, moco_v3
from fastssl.run import Options, Run, absolute_data, open_run
from tests.support import toy_method


def make_run(folder, data="digits"):
    folder.mkdir(exist_ok=True)
    run = Run(folder, "mae", Options(data, weights=Path("w.pth")), mae.Config.small(), {"preset": "small"})
    run.save()
    return run


def test_a_run_is_read_back_as_it_was_written(tmp_path):
    run = make_run(tmp_path / "run")
    assert open_run(tmp_path / "run") == run
    assert open_run(str(tmp_path / "run")).options.weights == Path("w.pth")
    assert repr(run) == f"Run('{tmp_path}/run': mae on digits)"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "does not fit this version"),
        ("{}", r"does not fit this version of fastssl: it lacks method$"),
        ('{"method": "mae", "options": {"data": "digits", "shine": 1}, "config": {}}', "unknown field 'shine'"),
        ('{"method": "none", "options": {"data": "digits"}, "config": {}}', "unknown method 'none'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, text, reason):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        open_run(tmp_path)


def test_the_same_evaluation_is_noted_once(tmp_path):
    run = make_run(tmp_path)
    assert run.evaluations() == []
    run.note("knn", 10, 0.5, k=20)
    run.note("knn", 10, 0.25, k=10)
    run.note("knn", 20, 0.75, k=20)
    run.note("knn", 10, 0.625, k=20)
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert lines == run.evaluations()
    assert [(line["step"], line["k"], line["accuracy"]) for line in lines] == [
        (10, 10, 0.25),
        (20, 20, 0.75),
        (10, 20, 0.625),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "evaluations.jsonl"]


def test_data_paths_are_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for spec, expected in {
        "folder:photos": f"folder:{tmp_path}/photos",
        "folder:/data/photos": "folder:/data/photos",
        "folder:~/photos": "folder:/home/me/photos",
        "arrays:x.npy,y.npy": f"arrays:{tmp_path}/x.npy,{tmp_path}/y.npy",
        "webdataset:shards/{000..146}.tar": f"webdataset:{tmp_path}/shards/{{000..146}}.tar",
        "webdataset:https://host/{0..3}.tar": "webdataset:https://host/{0..3}.tar",
        "cifar10:c": f"cifar10:{tmp_path}/c",
        "idx:m": f"idx:{tmp_path}/m",
        "digits": "digits",
        "shapes:count=20,size=16": "shapes:count=20,size=16",
        "my.source:photos": "my.source:photos",
        "folder:": "folder:",
    }.items():
        assert absolute_data(spec) == expected
        assert absolute_data(expected) == expected


def test_a_split_is_opened_once(monkeypatch, tmp_path):
    opened = []
    monkeypatch.setattr(
        "fastssl.run.open_source", lambda spec, split: opened.append((spec, split)) or open_source(spec)
    )
    run = make_run(tmp_path)
    assert run.source("train") is run.source("train") is run.source("train", "digits")
    assert run.source("test") is not run.source("train")
    run.source("train", "shapes:count=10")
    assert opened == [("digits", "train"), ("digits", "test"), ("shapes:count=10", "train")]


def test_methods_by_name_and_by_module():
    assert method_module("moco_v2") is moco_v2
    assert method_module("tests.support.toy_method") is toy_method
    assert [method_name_of(method) for method in ("mae", mae, toy_method)] == ["mae", "mae", toy_method.__name__]
    with pytest.raises(ValueError, match=r"must be part of a package \(package\.module\), got json$"):
        method_name_of(json)


def test_the_augmentation_of_a_method_follows_the_images():
    small, large = open_source("shapes:count=10"), open_source("shapes:count=10,size=96")
    assert find_augmentation("moco_v2", small) == moco_v2.Config.small().augmentation
    assert find_augmentation("moco_v3", large) == moco_v3.Config.paper().augmentation
    assert find_augmentation("moco_v2", large, (32, 64)).views[0].size == (32, 64)
    assert find_augmentation("tests.support.toy_method", large).views[0].size == (32, 32)
    with pytest.raises(
        ValueError, match=r"^data: unknown augmentation 'x', there are albef, barlow_twins, .*, multi_crop, evaluation$"
    ):
        find_augmentation("x", small)
