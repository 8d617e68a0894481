"""`fastssl eval`: evaluations of a run's encoder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastssl import distributed, evaluation
from fastssl.eval.labels import Accuracy
from fastssl.method_modules import SMALL
from fastssl.run import Run
from fastssl.settings import flatten
from fastssl.text import printable

from .flags import first_pass, parse_for_run

HELP = """fastssl eval: accuracy of a run's encoder, on the run's data or another source (--data)

  fastssl eval knn RUN       nearest training images vote on held-out images: seconds, no training
  fastssl eval linear RUN    linear classifier on frozen features: a quick sweep, or the paper's protocol
  fastssl eval finetune RUN  encoder and classifier trained end to end

  of methods of images and text:
  fastssl eval zeroshot RUN  sentences about the classes are compared with held-out images: no training
  fastssl eval retrieval RUN captions are found for held-out images, and images for captions

  fastssl eval linear RUN --help lists every option with its default. linear and finetune take --labels 0.01 or 0.1 for
  few labels; knn, linear, zeroshot and retrieval also run under torchrun.
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
    """share of the training labels to use, the same number of each class"""
    seed: int = 0
    """random seed of the choice of labels, initial weights, order and augmentation"""


@dataclass
class KnnFlags(DataFlags):
    """Weighted k-nearest-neighbour accuracy of a run's encoder: training images vote on held-out images."""

    k: tuple[int, ...] = (10, 20, 200)
    """numbers of neighbours that vote"""
    tau: float = evaluation.TAU
    """temperature of the votes"""


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
    """fastssl eval knn|linear|finetune|zeroshot|retrieval RUN"""
    commands = {"knn": _knn, "linear": _linear, "finetune": _finetune, "zeroshot": _zeroshot, "retrieval": _retrieval}
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
    accuracies = run.knn(flags.k, flags.tau, flags.data, flags.device)
    results = " · ".join(f"k={k} {accuracy:.1%}" for k, accuracy in accuracies.items())
    if distributed.rank() == 0:
        print(printable(f"kNN accuracy of {run.folder} on {run.data_name(flags.data)}: {results}"))


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
    labels = getattr(flags, "labels", 1)
    details += [f"{labels:.3g} of the labels"] if labels < 1 else []
    detail_text = f" ({', '.join(details)})" if details else ""
    data = run.data_name(flags.data)
    text = f"{name} accuracy of {run.folder} on {data}: top-1 {accuracy.top1:.1%}{top5}{detail_text}"
    print(printable(text), flush=True)
