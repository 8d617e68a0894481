"""One pretraining as a measurement: what it learned, what it took, and what was watched on the way.

Every trial runs in a process with one core of its own, so that its seconds are seconds of one core whatever else the
machine does.
"""

import contextlib
import dataclasses
import io
import re
import shlex
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import fastssl
from fastssl import pretraining
from fastssl.contract import Autoencodes, EmbedsText
from fastssl.eval.features import evaluation_loader
from fastssl.eval.retrieval import Recall
from fastssl.method_modules import method_module
from fastssl.run import Run
from fastssl.settings import differences, flag, flatten

from ..pinned import run_pinned

DATA = "patterns"  # the embedded task
IMAGES = 4096  # its training images by default
CAPTIONS = "captions"  # the task of methods of images and text
TASKS = dict.fromkeys(("clip", "siglip", "albef"), CAPTIONS)
K = 20  # neighbours that vote
FOUND = 10  # a pair counts as found if it is among so many
TOKENIZERS = {"beit": "dvae"}  # method: the method whose run it needs as tokenizer
POINTS = 40  # largest number of points of the curve of the loss
CURVE = 7  # evaluations on the way

KINDS = {  # what a score is, by the abilities of the method
    "knn": "kNN",
    "retrieval": f"R@{FOUND}",
    "reconstruction": "variance explained",
}


@dataclasses.dataclass(frozen=True, eq=False)  # compared and hashed as objects, since settings are a dict
class Trial:
    """A run of a method.

    Args:
        method: name of the method.
        data: source of images; its default arguments are those of the task.
        settings: changes to the preset `small`, by name.
        seed: of weights, order, views and masks.
        bank: other data to evaluate on, where `data` has fewer images; there is then no evaluation before and during
            training.
        curve: evaluate on the way, too.
        linear: train a linear classifier on the frozen features, too.
        few_labels: train networks with few labels, too, as `fastssl eval few-labels` does.
        sabotage: name of a change that must spoil the method, see sabotage.py.
    """

    method: str
    data: str = ""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    bank: str | None = None
    curve: bool = False
    linear: bool = False
    few_labels: bool = False
    sabotage: str | None = None

    @property
    def source(self) -> str:
        """The data, by default the method's task."""
        return self.data or task(self.method)

    @property
    def command(self) -> str:
        """The command that repeats the run."""
        words = ["fastssl", "pretrain", self.method, "--data", self.source, "--seed", str(self.seed)]
        for name, value in self.settings.items():
            values = value if isinstance(value, tuple | list) else [value]
            words += [flag(name), *map(str, values)]
        if tokenizer := TOKENIZERS.get(self.method):
            first = f"fastssl pretrain {tokenizer} --data {self.source} --seed {self.seed} --folder runs/tokenizer"
            return f"{first} && {shlex.join([*words, '--tokenizer', 'runs/tokenizer'])}"
        return shlex.join(words)


def task(method: str) -> str:
    """The embedded task of a method."""
    return TASKS.get(method, DATA)


def preset(method: str) -> Any:
    """The method's preset for small images."""
    return method_module(method).Config.small()


def recipe(method: str, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the preset, with `settings`, sets differently from the paper's numbers: rows of another recipe are old."""
    config = preset(method)
    changed = {name: after for name, (_, after) in differences((type(config)(),), (config,)).items()}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in {**changed, **(settings or {})}.items()}


def run_all(trials: Iterable[Trial], processes: int) -> Iterator[tuple[Trial, dict]]:
    """(trial, its row) of every trial as it ends, in so many processes, each on a core of its own."""
    yield from run_pinned(run_trial, trials, processes)


def run_trial(trial: Trial) -> dict:
    """The row of a trial; one with "failed" where the run ended with an error."""
    from .sabotage import sabotaged

    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(printed), sabotaged(trial.sabotage):
        try:
            return _row(trial, Path(folder), printed)
        except Exception as error:  # so that one method that fails does not end the runs of the others
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            return {"seed": trial.seed, "command": trial.command, "failed": reason}


def _row(trial: Trial, folder: Path, printed: io.StringIO) -> dict:
    settings = dict(trial.settings)
    if trial.method in TOKENIZERS:
        settings["tokenizer"] = _tokenizer(trial, folder)
    epochs = settings.get("epochs", preset(trial.method).training.epochs)
    with _timed(evaluate=trial.bank is None) as spent:
        run = fastssl.pretrain(
            trial.method,
            trial.source,
            preset="small",
            folder=folder / "run",
            seed=trial.seed,
            tensorboard=False,
            keep_last=1,
            knn_every=max(1, -(-epochs // CURVE)) if trial.curve else 0,
            **settings,
        )
    metrics, training = run.metrics(), run.config.training
    row = {
        "seed": trial.seed,
        "data": trial.source,
        "command": trial.command,
        "recipe": recipe(trial.method, trial.settings),
        "epochs": training.epochs,
        "images_seen": metrics[-1]["step"] * training.batch_size,
        "seconds": round(spent["train"] - spent["evaluations within"], 1),
        "evaluation_seconds": round(spent["evaluations"], 1),
        **_scores(trial, run, folder),
    }
    if trial.linear and row["score"] == "knn":
        row["linear"] = round(run.linear(seed=trial.seed).top1, 4)
    if trial.few_labels and row["score"] == "knn":
        row["few_labels"] = [found._asdict() for found in run.few_labels(seed=trial.seed)]
    row["curve"] = curve_of(run)
    row["warnings"] = re.findall("^warning: (.*)$", printed.getvalue(), re.MULTILINE)
    return row


def _tokenizer(trial: Trial, folder: Path) -> str:
    """The folder of a run of the method's tokenizer on the same images."""
    made = folder / "tokenizer"
    with _timed(evaluate=False):
        fastssl.pretrain(TOKENIZERS[trial.method], trial.source, folder=made, seed=trial.seed, tensorboard=False)
    return str(made)


@contextlib.contextmanager
def _timed(evaluate: bool) -> Iterator[dict[str, float]]:
    """Seconds of the processor that training and kNN evaluations take; without `evaluate` there are no evaluations."""
    spent = dict.fromkeys(("train", "evaluations", "evaluations within"), 0.0)
    train, note_knn, inside = pretraining.train, pretraining.note_knn, []

    def timed_train(*args: Any, **options: Any) -> None:
        start = time.process_time()
        inside.append(True)
        train(*args, **options)
        inside.clear()
        spent["train"] = time.process_time() - start

    def timed_note(*args: Any, **options: Any) -> None:
        start = time.process_time()
        if evaluate:
            note_knn(*args, **options)
        spent["evaluations"] += time.process_time() - start
        spent["evaluations within"] += (time.process_time() - start) * bool(inside)

    pretraining.train, pretraining.note_knn = timed_train, timed_note
    try:
        yield spent
    finally:
        pretraining.train, pretraining.note_knn = train, note_knn


def _scores(trial: Trial, run: Run, folder: Path) -> dict[str, Any]:
    """{"score": its kind, "raw", "untrained", "trained"} and the spectrum of the trained features."""
    method = run.load()
    if trial.bank is not None:
        run.knn((K,), data=trial.bank)
    lines = [line for line in run.evaluations() if line.get("k") == K]
    knn = [line for line in lines if line["evaluation"] == "knn"]
    raw = [line["accuracy"] for line in lines if line["evaluation"] == "knn of raw pixels"]
    names = ("rankme", "two_directions", "deviation", "ranked_first", "rank_entropy")
    watched = {name: knn[-1][name] for name in names if name in knn[-1]}
    if len(knn) > 1:
        watched |= {f"untrained_{name}": knn[0][name] for name in names[:3] if name in knn[0]}
    if isinstance(method, EmbedsText):
        trained, untrained = run.retrieval(data=trial.bank or trial.source), None
        if trial.bank is None:
            few = f"{trial.source.partition(':')[0]}:count={run.config.training.batch_size}"
            start = {"epochs": 1, "lr": 0.0, "tensorboard": False, "seed": trial.seed, "folder": folder / "untrained"}
            with _timed(evaluate=False):
                first = fastssl.pretrain(trial.method, few, preset="small", **start)
            untrained = _found(first.retrieval(data=trial.source))
            ways = {"image_to_text": trained.image_to_text, "text_to_image": trained.text_to_image}
            recall = {way: [round(share, 4) for _, share in sorted(found.items())] for way, found in ways.items()}
            accuracies = [round(line["accuracy"], 4) for line in (knn[0], knn[-1])]
            watched |= {"recall": recall, "zeroshot": round(run.zeroshot().top1, 4), "knn": accuracies}
        return {"score": "retrieval", "raw": None, "untrained": untrained, "trained": _found(trained), **watched}
    if isinstance(method, Autoencodes):
        torch.manual_seed(trial.seed)
        untrained, trained = (_explained(other, run) for other in (run.build().eval(), method))
        return {"score": "reconstruction", "raw": None, "untrained": untrained, "trained": trained, **watched}
    untrained = knn[0]["accuracy"] if len(knn) > 1 else None
    scores = {"raw": raw[0] if raw else None, "untrained": untrained, "trained": knn[-1]["accuracy"]}
    return {"score": "knn", **scores, **watched}


def _found(recall: Recall) -> float:
    """Share of held-out pairs found among the first `FOUND`, in the worse direction."""
    return round(min(recall.image_to_text[FOUND], recall.text_to_image[FOUND]), 4)


@torch.no_grad()
def _explained(method: torch.nn.Module, run: Run) -> float:
    """Share of the squared differences of held-out pixels from their image's mean colour that codes keep, at least
    0."""
    wrong = total = 0.0
    for batch in evaluation_loader(run.source("test"), run.image_size, **run.normalisation).epoch(0):
        images = batch.views[0]
        wrong += float((method.autoencode(images) - images).square().sum())
        total += float((images - images.mean((2, 3), keepdim=True)).square().sum())
    return round(max(0.0, 1 - wrong / total), 4)


def curve_of(run: Run) -> dict[str, list]:
    """[epoch, value] of the loss, of the share of positives ranked first and of kNN accuracy."""
    metrics = run.metrics()
    lines = metrics[:: -(-len(metrics) // POINTS)]
    curve = {
        name: [[_short(line["epoch"]), _short(line[name])] for line in lines if line.get(name) is not None]
        for name in ("loss", "top1")
    }
    evaluated = [line for line in run.evaluations() if line["evaluation"] == "knn" and line.get("k") == K]
    curve["knn"] = [[_short(line["epoch"]), line["accuracy"]] for line in evaluated]
    return {name: points for name, points in curve.items() if points}


def _short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def settings_of(method: str) -> set[str]:
    """Names of the settings that a trial may change."""
    return set(flatten(preset(method)))
