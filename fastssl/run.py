"""A run folder: config.json says what was asked for, checkpoints hold what was learned.

config.json          method, data, every option; enough to open or resume the run
metrics.jsonl        a line every few steps (train/log.py)
checkpoints/         the last ones, and those kept for good (train/checkpoint.py)
evaluations.jsonl    a line for each evaluation: kNN before, during and after training, linear and fine-tuned accuracy
reconstructions/     of MAE, at each evaluation
tensorboard/         the same curves for TensorBoard
profile/             where the time of a step goes, by --profile
bad_files.txt        images that could not be decoded, where there were any
skipped-RANK.jsonl   steps whose loss or gradient was not finite, and their images
report.html          by `fastssl report`
"""

import dataclasses
import importlib
import json
import pkgutil
import typing
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from torch import nn

import fastssl.methods
from fastssl.bounds import NOT_NEGATIVE
from fastssl.train import checkpoint
from fastssl.train.config import Execution


def method_names() -> list[str]:
    """The methods there are: the modules of fastssl/methods."""
    return sorted(module.name for module in pkgutil.iter_modules(fastssl.methods.__path__))


def method_module(name: str) -> ModuleType:
    """The module of that name: it has `Config` and `build(config)`."""
    if name not in method_names():
        raise ValueError(f"pretrain: unknown method {name!r}, there are {', '.join(method_names())}")
    return importlib.import_module(f"fastssl.methods.{name}")


@dataclass
class Options:
    """What a run needs beside its method."""

    data: str
    """digits, shapes, folder:PATH, webdataset:SHARDS, arrays:FILE, idx:PATH, cifar10:PATH or cifar100:PATH"""
    folder: Path | None = None
    """folder of the run, runs/METHOD-DATA if not given"""
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """of weights, order, augmentations and masks"""
    workers: Annotated[int | None, NOT_NEGATIVE] = None
    """processes (dali: threads) that load data; if not given, a quarter of the cores, beside a GPU up to 8"""
    engine: str = "auto"
    """torchvision, dali, or auto: dali on a GPU where it is installed"""
    weights: Path | None = None
    """file to start from: an official checkpoint of the method, or a whole model that `fastssl export` wrote"""
    device: str = "auto"
    """cuda, cpu, or auto: cuda where there is one"""
    max_bad: Annotated[float, NOT_NEGATIVE] = 0.01
    """share of images that may be undecodable"""
    knn_every: Annotated[int, NOT_NEGATIVE] = 0
    """epochs between kNN evaluations during the run, 0 for one before and one after it"""
    execution: Execution = field(default_factory=Execution)


@dataclass
class Run:
    """An opened run folder."""

    folder: Path
    method_name: str
    options: Options
    config: Any  # the method's Config
    facts: dict = field(default_factory=dict)  # versions and machine it ran on

    def save(self) -> None:
        record = {
            "method": self.method_name,
            "options": dataclasses.asdict(self.options),
            "config": dataclasses.asdict(self.config),
            "facts": self.facts,
        }
        (self.folder / "config.json").write_text(json.dumps(record, indent=1, default=str) + "\n")

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def state(self) -> dict:
        """The newest checkpoint that is intact.

        Raises:
            ValueError: there is none.
        """
        return checkpoint.load(self.checkpoints, self.method_name)

    def build(self) -> nn.Module:
        """The method with fresh weights."""
        return method_module(self.method_name).build(self.config)

    def note(self, evaluation: str, step: int, accuracy: float, **facts: Any) -> None:
        """Adds a line to evaluations.jsonl, {"evaluation", "step", "accuracy" (0 … 1), and the facts: what was asked
        for}; one that asked for the same at the same step is replaced."""
        record = {"evaluation": evaluation, "step": step, **facts}
        kept = [known for known in self.evaluations() if {**known, **record} != known]
        lines = [json.dumps(line) + "\n" for line in (*kept, {**record, "accuracy": accuracy})]
        beside = self.folder / "evaluations.jsonl.writing"
        beside.write_text("".join(lines))
        beside.replace(self.folder / "evaluations.jsonl")

    def evaluations(self) -> list[dict]:
        """The lines of evaluations.jsonl."""
        path = self.folder / "evaluations.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def load(self) -> nn.Module:
        """The method with the weights of the last checkpoint, in evaluation mode."""
        method = self.build()
        method.load_state_dict(self.state()["model"])
        return method.eval()


def open_run(folder: Path) -> Run:
    """Reads the config of a run folder.

    Raises:
        ValueError: it is no run folder, or its config does not fit this version.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"run: {folder} is no run folder: it has no config.json")
    try:
        record = json.loads(path.read_text())
        options = _from_json(Options, record["options"])
        config = _from_json(method_module(record["method"]).Config, record["config"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"run: {path} does not fit this version of fastssl ({error})") from error
    return Run(folder, record["method"], options, config, record.get("facts", {}))


def _from_json(cls: type, values: dict) -> Any:
    """A dataclass from its JSON form, where tuples are lists and paths are strings."""
    hints = typing.get_type_hints(cls)
    if unknown := set(values) - set(hints):
        raise TypeError(f"unknown field {sorted(unknown)[0]!r}")
    fields = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = _from_json(hints[name], value)
        elif isinstance(value, list):
            value = tuple(value)
        elif hints[name] == Path | None and value is not None:
            value = Path(value)
        fields[name] = value
    return cls(**fields)
