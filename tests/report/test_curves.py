import base64
import json
from types import SimpleNamespace

import numpy as np
import pytest

from fastssl.methods import barlow_twins, mae, moco_v2
from fastssl.report import curves, tables
from fastssl.report.run_data import RunData
from tests.support.runs import make_run


@pytest.fixture
def drawn(monkeypatch):
    """Keyword arguments of each drawing by title, without drawing."""
    pictures = {}

    def draw(title, alt, onto, *height, **around):
        pictures[title] = SimpleNamespace(alt=alt, onto=onto, **around)
        return title

    monkeypatch.setattr(curves, "draw", draw)
    return pictures


def opened(run, colour="#123456"):
    return RunData(run, run.folder.name, colour)


def test_lines_may_lack_keys_and_values(tmp_path, drawn):
    run = make_run(tmp_path / "run", moco_v2, "digits", trained=False)
    lines = [
        {"step": 1, "epoch": 1, "loss": None, "lr": 0.5},
        {"step": 2, "epoch": 2, "loss": 3.0, "top1": 0.5},
        {"step": 3, "epoch": 3, "loss": 2.0, "surprise_of_mine": 7, "skipped": 2},
    ]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    section = curves.training([opened(run)])
    assert section.parts == ["loss", "positives ranked first", "surprise of mine", "learning rate", "skipped steps"]
    assert drawn["loss"].values == [("", "2")]
    assert drawn["loss"].alt == "loss by epoch; at the end 2"
    assert drawn["positives ranked first"].values == [("", "50.0%")]


def test_redundant_embeddings_are_said_of_each_run(tmp_path, drawn):
    runs = [
        opened(make_run(tmp_path / name, barlow_twins, "digits", trained=False, redundancy=value))
        for name, value in (("whole", 0.1), ("broken", 0.95))
    ]
    sentence = (
        "The embeddings look redundant: in epoch 3 the mean squared correlation of two of their dimensions is 0.95."
    )
    assert curves.training(runs).text.endswith(f" broken: {sentence}") and "whole:" not in curves.training(runs).text
    assert curves.training(runs[1:]).text.endswith(f"record. {sentence}")


def test_losses_of_one_method_share_axes(tmp_path, drawn):
    runs = [
        make_run(tmp_path / name, module, "digits", trained=False)
        for name, module in (("a", mae), ("b", moco_v2), ("c", mae))
    ]
    section = curves.training([opened(run, colour) for run, colour in zip(runs, ("red", "green", "blue"))])
    assert section.parts[:2] == ["loss of mae", "loss of moco_v2"]
    assert [colour for colour, _ in drawn["loss of mae"].values] == ["red", "blue"]
    assert len(drawn["learning rate"].values) == 3


def test_long_lines_are_averaged_and_keep_their_range():
    axes = SimpleNamespace(
        plot=lambda *line, **_: shown.append(line), fill_between=lambda *band, **_: bands.append(band)
    )
    shown, bands = [], []
    epochs, values = np.arange(10_000.0), np.tile([0.0, 1.0], 5_000)
    curves._line(axes, epochs, values, "red")
    assert len(shown[0][0]) == len(shown[0][1]) == curves.POINTS
    np.testing.assert_allclose(shown[0][1], 0.5, atol=0.02)
    assert set(bands[0][1]) == {0.0}
    assert set(bands[0][2]) == {1.0}


def test_drawings_carry_no_dates_and_do_not_change(tmp_path):
    run = opened(make_run(tmp_path / "run", mae, "digits", lines=400, trained=False))
    first, again = (curves.training([run]).parts[0] for _ in range(2))
    assert first.light == again.light
    assert first.light != first.dark
    svg = base64.b64decode(first.light.split(",")[1]).decode()
    assert "epoch</text>" in svg  # as text, in the font of the reader
    assert len(svg) < 60_000


def test_knn_is_the_run_s_own(tmp_path, drawn):
    """Evaluations on other data or with another k are in the table, not in the curve."""
    run = make_run(tmp_path / "run", mae, "digits", trained=False)
    for step, accuracy, facts in (
        (0, 0.2, {"k": 20}),
        (30, 0.4, {"k": 20}),
        (30, 0.9, {"k": 1}),
        (30, 0.8, {"k": 20, "data": "cifar10:x"}),
    ):
        run.note("knn", step, accuracy, **{"data": "digits", **facts})
    run.note("knn of raw pixels", 0, 0.3, data="digits", k=20)
    seen = opened(run)
    assert seen.knn() == ([(0.0, 0.2), (3.0, 0.4)], 0.3)
    assert curves.knn([seen]) == "kNN accuracy, best"
    assert drawn["kNN accuracy, best"].values == [("", "40.0%")]
    assert len(tables.evaluations([seen]).rows) == 5
    facts = tables.summary(seen)
    assert facts["kNN accuracy, best"] == "40.0% at epoch 3"
    assert facts["kNN, untrained encoder"] == "20.0%"
    assert facts["kNN, raw pixels"] == "30.0%"


def test_speed_in_numbers(tmp_path):
    run = opened(make_run(tmp_path / "run", mae, "digits", images_per_second=128.0, data_wait=0.25))
    facts = tables.speed(run)
    assert facts["images/s, median"] == "128"
    assert facts["time per step, median"] == "500 ms"  # of 64 images
    assert facts["waiting for data, median"] == "25.0%"
    assert facts["peak memory"] == "2.00 GB"
    assert facts["steps"] == "30"
    run.load()
    assert tables.speed(run)["parameters, all"] == f"{sum(p.numel() for p in run.method.parameters()) / 1e6:.2f} M"
