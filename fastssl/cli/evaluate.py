"""`fastssl eval`: evaluations of a run's encoder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from fastssl import distributed, evaluation
from fastssl.eval.few_labels_table import Measured, sentences, table_of
from fastssl.eval.labels import Accuracy
from fastssl.eval.protocols import FewLabels
from fastssl.method_modules import SMALL
from fastssl.run import Run
from fastssl.settings import flatten
from fastssl.text import printable

from .flags import first_pass, parse_for_run

HELP = """fastssl eval: accuracy of a run's encoder, on the run's data or another source (--data)

  fastssl eval knn RUN         nearest training images vote on held-out images: seconds, no training
  fastssl eval linear RUN      linear classifier on frozen features: a quick sweep, or the paper's protocol
  fastssl eval finetune RUN    encoder and classifier trained end to end
  fastssl eval few-labels RUN  all three with 10, 100 and 1,000 labels, beside raw pixels and training from scratch

  of methods of images and text:
  fastssl eval zeroshot RUN    sentences about the classes are compared with held-out images: no training
  fastssl eval retrieval RUN   captions are found for held-out images, and images for captions

  fastssl eval linear RUN --help lists every option with its default. --labels 0.01 takes a hundredth of the labels,
  --labels 100 a hundred of them, the same number of each class; knn, linear, zeroshot and retrieval also run under
  torchrun.
"""


@dataclass
class DataFlags:
    data: str | None = None
    """source of images, the run's by default"""
    device: str = "auto"
    """device: cuda, cpu, or auto (cuda if available)"""


@dataclass
class LabelFlags(DataFlags):
    labels: float = 1.0
    """training labels to use, the same number of each class: their share, at most 1, or their number"""
    seed: int = 0
    """random seed of the choice of labels, initial weights, order and augmentation"""


@dataclass
class KnnFlags(DataFlags):
    """Weighted k-nearest-neighbour accuracy of a run's encoder: training images vote on held-out images."""

    k: tuple[int, ...] = (10, 20, 200)
    """numbers of neighbours that vote"""
    tau: float = evaluation.TAU
    """temperature of the votes"""
    labels: float = 1.0
    """training labels that vote, the same number of each class: their share, at most 1, or their number"""
    seed: int = 0
    """random seed of the choice of labels"""


@dataclass
class ZeroshotFlags(DataFlags):
    """Accuracy without labels of a method of images and text: an image gets the class whose sentences are nearest."""

    classes: Path | None = None
    """text file with a name a line, in the order of the labels; the source's own names by default"""
    templates: Path | None = None
    """text file with a sentence a line, with {} for the name; a few of all-purpose ones by default"""


@dataclass
class RetrievalFlags(DataFlags):
    """Retrieval of a method of images and text: captions found for held-out images, and images found for captions."""

    rerank: int = 0
    """number of the best ones that the method sorts again by judging image and text together (albef); 0 for none"""


@dataclass
class FirstFlags:
    """The flags of `eval linear` and `eval finetune` on which the defaults of the others depend."""

    protocol: str = "features"
    epochs: int | None = None


def command(words: list[str]) -> None:
    """fastssl eval knn|linear|finetune|few-labels|zeroshot|retrieval RUN"""
    commands = {
        "knn": _knn,
        "linear": _linear,
        "finetune": _finetune,
        "few-labels": _few_labels,
        "zeroshot": _zeroshot,
        "retrieval": _retrieval,
    }
    if words in (["-h"], ["--help"]):
        print(HELP)
        return
    if not words or words[0] not in commands:
        *names, last = commands
        raise ValueError(
            f"eval: name an evaluation: {', '.join(names)} or {last}, got {words[0] if words else 'nothing'}"
        )
    commands[words[0]](words[1:])


def _knn(words: list[str]) -> None:
    flags, run = parse_for_run(lambda run: KnnFlags, words, "fastssl eval knn")
    accuracies = run.knn(flags.k, flags.tau, flags.data, flags.device, flags.labels, flags.seed)
    results = " · ".join(f"k={k} {accuracy:.1%}" for k, accuracy in accuracies.items())
    if distributed.rank() == 0:
        chosen = "".join(f" ({words})" for words in _label_words(flags))
        print(printable(f"kNN accuracy of {run.folder} on {run.data_name(flags.data)}: {results}{chosen}"))


def _linear(words: list[str]) -> None:
    first = first_pass(FirstFlags, words, "fastssl eval linear")
    chosen = first.protocol

    def flags_of(run: Run | None) -> type:
        default = evaluation.linear_defaults(run, chosen, first.epochs)

        @dataclass
        class Flags(LabelFlags):
            protocol: Literal["features", "official"] = "features"
            """features: extract them once, then sweep settings (minutes); official: the paper's, with augmentation"""
            pool: Literal["token", "avg"] | None = None
            """features of a ViT: class token or mean of the patch tokens; the method's own choice by default"""
            numbers: type(default) = field(default_factory=lambda: default)

        Flags.__doc__ = f"{type(default).__doc__}\n\nDefaults below are those of --protocol {chosen}."
        return Flags

    flags, run = parse_for_run(flags_of, words, "fastssl eval linear")
    options = {"pool": flags.pool, "labels": flags.labels, "seed": flags.seed}
    accuracy = run.linear(flags.protocol, data=flags.data, device=flags.device, **options, **flatten(flags.numbers))
    _print_accuracy("linear", run, accuracy, flags, flags.protocol)


def _finetune(words: list[str]) -> None:
    first = first_pass(FirstFlags, words, "fastssl eval finetune")

    def flags_of(run: Run | None) -> type:
        default = evaluation.finetune_defaults(run, first.epochs)

        @dataclass
        class Flags(LabelFlags):
            numbers: type(default) = field(default_factory=lambda: default)

        small = run is not None and max(run.image_size) <= SMALL
        origin = "small images" if small else f"the paper, for {run.backbone if run else 'vit_base'}"
        Flags.__doc__ = f"{type(default).__doc__}\n\nDefaults below are those of {origin}."
        return Flags

    flags, run = parse_for_run(flags_of, words, "fastssl eval finetune")
    options = {"labels": flags.labels, "seed": flags.seed, "data": flags.data, "device": flags.device}
    accuracy = run.finetune(**options, **flatten(flags.numbers))
    _print_accuracy("finetune", run, accuracy, flags)


def _few_labels(words: list[str]) -> None:
    def flags_of(run: Run | None) -> type:
        default = FewLabels.of_backbone(run.backbone if run else "vit_base")

        @dataclass
        class Flags(DataFlags):
            seed: int = 0
            """random seed of the first draw of the labels, its initial weights, order and crops"""
            numbers: FewLabels = field(default_factory=lambda: default)

        Flags.__doc__ = FewLabels.__doc__
        return Flags

    flags, run = parse_for_run(flags_of, words, "fastssl eval few-labels")
    results = run.few_labels(seed=flags.seed, data=flags.data, device=flags.device, **flatten(flags.numbers))
    _print_table(results, run, printable(run.data_name(flags.data)))


def _zeroshot(words: list[str]) -> None:
    flags, run = parse_for_run(lambda run: ZeroshotFlags, words, "fastssl eval zeroshot")
    accuracy = run.zeroshot(flags.classes, flags.templates, flags.data, flags.device)
    if distributed.rank() == 0:
        _print_accuracy("zero-shot", run, accuracy, flags)


def _retrieval(words: list[str]) -> None:
    flags, run = parse_for_run(lambda run: RetrievalFlags, words, "fastssl eval retrieval")
    recall = run.retrieval(flags.rerank, flags.data, flags.device)
    if distributed.rank() > 0:
        return
    again = f", the first {flags.rerank} sorted again" if flags.rerank else ""
    sizes = f"{recall.images:,} images, {recall.texts:,} texts{again}"
    print(printable(f"retrieval of {run.folder} on {run.data_name(flags.data)}: {sizes}"))
    for direction, shares in (("image to text", recall.image_to_text), ("text to image", recall.text_to_image)):
        print(f"{direction}: " + " · ".join(f"R@{k} {share:.1%}" for k, share in shares.items()))


def _print_accuracy(name: str, run: Run, accuracy: Accuracy | None, flags: Any, *details: str) -> None:
    """Prints an accuracy on the first rank, the only one that has it."""
    if accuracy is None:
        return
    top5 = "" if accuracy.top5 is None else f", top-5 {accuracy.top5:.1%}"
    setting = run.evaluations()[-1].get("setting")
    details = [*details, *([setting] if setting else [])]
    details += _label_words(flags)
    detail_text = f" ({', '.join(details)})" if details else ""
    data = run.data_name(flags.data)
    text = f"{name} accuracy of {run.folder} on {data}: top-1 {accuracy.top1:.1%}{top5}{detail_text}"
    print(printable(text), flush=True)


def _print_table(results: list[Measured], run: Run, data: str) -> None:
    """Prints accuracies with few labels as a table, and what it shows."""
    draws = len(results[0].accuracies)
    spread = f", mean ± standard deviation over {draws} draws of the labels" if draws > 1 else ""
    print(f"accuracy with few labels on held-out images of {data}{spread}")
    (first, *counts), rows = table_of(results, run.short_name)
    table = Table(first, *(Column(count, justify="right") for count in counts), box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
    print(sentences(results, run.short_name), flush=True)


def _label_words(flags: Any) -> list[str]:
    """What an evaluation with fewer than all labels used."""
    if getattr(flags, "labels", 1) == 1:
        return []
    amount = f"{flags.labels:.3g} of the labels" if flags.labels < 1 else f"{flags.labels:g} labels"
    return [f"{amount}, seed {flags.seed}"]
