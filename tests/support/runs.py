"""Run folders as training writes them, made without training, and a parser of report pages."""

import json
from html.parser import HTMLParser

import torch

from fastssl.method_modules import method_name_of
from fastssl.run import Options, Run
from fastssl.train.checkpoint import Checkpoints

LINE = {
    "lr": 0.1,
    "loss": 2.5,
    "grad_norm": 1.5,
    "skipped": 0,
    "images_per_second": 90.0,
    "data_wait": 0.1,
    "peak_memory": 2_000_000_000,
}


def make_run(folder, module, data, lines=3, trained=True, **own):
    """A run of the small preset with `lines` lines of metrics, one per epoch, which contain the values `own`. If
    `trained`, the run has a checkpoint."""
    name = method_name_of(module)
    run = Run(folder, name, Options(data), module.Config.small(), {"processor": "a fast one"})
    folder.mkdir(parents=True)
    run.save()
    records = [{"step": 10 * i, "epoch": float(i), **LINE, **own} for i in range(1, lines + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if trained:
        torch.manual_seed(0)
        with Checkpoints(folder / "checkpoints") as checkpoints:
            checkpoints.save({"method": name, "model": run.build().state_dict(), "step": 10 * lines}, 10 * lines)
    return run


class Page(HTMLParser):
    """The tags, attributes and text of a report."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.texts).split())
        self.sections = [value for tag, name, value in self.attributes if tag == "section" and name == "id"]

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data):
        self.texts.append(data)

    def values(self, *names):
        return [value for _, name, value in self.attributes if name in names]
