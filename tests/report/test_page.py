import re
from html.parser import HTMLParser

import pytest
import torch

from fastssl.data.source import open_source
from fastssl.methods import mae, moco_v2
from fastssl.report import pictures
from fastssl.report.page import write_report
from fastssl.run import Options, Run

LINE = '{"step": %d, "epoch": %d.0, "lr": 0.1, "loss": 2.5, "top1": 0.5, "images_per_second": 9.0, "data_wait": 0.1}\n'


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize(("module", "data"), [(mae, "digits"), (moco_v2, "shapes:count=64")])
def test_report_is_self_contained_and_shows_everything(tmp_path, module, data):
    config = module.Config.small()
    run = Run(
        tmp_path, module.__name__.split(".")[-1], Options(data), config, {"processor": "<script>alert(1)</script>"}
    )
    (tmp_path / "metrics.jsonl").write_text(LINE % (1, 1) + LINE % (2, 2))
    (tmp_path / "knn.json").write_text('{"raw pixels": 0.2, "untrained encoder": 0.25, "trained encoder": 0.5}')
    path = write_report(run, module.build(config).eval(), open_source(data), open_source(data, "test"))
    page = Page(path.read_text())
    text = " ".join(page.text)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert len(page.sources) == (3 if module is mae else 2)
    assert "25.0%" in text
    assert "50.0%" in text
    assert "<script>alert(1)</script>" in text  # escaped in the source, so it is text, not a tag
    assert "script" not in page.tags
    assert re.search(r"fastssl pretrain \w+ --data \S+ --seed 0 --preset paper --backbone \w+_mini", text)


def test_reconstruction_rows_show_what_they_say(monkeypatch):
    """The masked row is the input where the mask is 0, and the last row is the output in the holes."""
    shown = {}
    monkeypatch.setattr(pictures, "grid", lambda rows: shown.update(rows) or "")
    model = mae.build(mae.Config.small()).eval()
    images = torch.randn(3, 3, 24, 24)
    pictures.reconstructions(model, images)
    torch.testing.assert_close(shown["input"], pictures.pixels(images))
    grey = pictures.pixels(torch.zeros(1, 3, 1, 1)).expand(3, 3, 24, 24)
    kept = (shown["masked"] == shown["input"]).all(1)
    assert kept.float().mean() == pytest.approx(model.keep / model.length, abs=0.01)
    hidden = ~kept.unsqueeze(1).expand_as(images)
    assert torch.equal(shown["masked"][hidden], grey[hidden])
    assert torch.equal(shown["output in\nthe holes"][hidden], shown["output"][hidden])
    assert torch.equal(shown["output in\nthe holes"][~hidden], shown["input"][~hidden])
