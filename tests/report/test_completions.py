"""Completed images in the report."""

import dataclasses

import pytest
import torch

from fastssl.methods import igpt
from fastssl.report import completions
from fastssl.report import page as report_page
from fastssl.report.page import write_report
from fastssl.report.run_data import RunData
from tests.support.runs import Page, make_run


@pytest.mark.parametrize("objective", ["autoregressive", "bert"])
def test_the_report_completes_images(tmp_path, monkeypatch, objective):
    small = igpt.Config.small
    monkeypatch.setattr(report_page, "MAPPED", 20)
    monkeypatch.setattr(
        igpt.Config, "small", lambda: dataclasses.replace(small(), image_size=(6, 6), colours=8, objective=objective)
    )
    run = make_run(tmp_path / "run", igpt, "shapes:count=64")
    page = Page(write_report([run]))
    assert ("completions" in page.sections) == (objective == "autoregressive")
    assert "Left out" not in page.text
    if objective == "bert":
        return
    alts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    for row in ("input", "given", "drawn, temperature 1", "drawn, temperature 0.8"):
        assert f"{row} 1" in alts and f"{row} 10" in alts
    data = RunData(run, "run", "#000")
    data.load()
    _, rows = completions.completed_images(data)
    assert len(rows.rows) == 5 and rows.crisp
    images = torch.randn(2, 3, 6, 6)
    assert torch.equal(data.method.complete(images)[:, :, :3], data.method.complete(images, seed=1)[:, :, :3])
