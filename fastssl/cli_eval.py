"""`fastssl eval`: what a run's encoder is worth."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from fastssl import distributed
from fastssl.data.source import Source, open_source
from fastssl.eval.features import extract, extract_together, features_of
from fastssl.eval.knn import knn_accuracy
from fastssl.eval.labels import Accuracy, labelled
from fastssl.eval.linear import swept, trained_officially
from fastssl.eval.protocols import Finetune, Official, Sweep, check
from fastssl.machine import device_named, engine_there, share_cores
from fastssl.run import Run, method_module, open_run
from fastssl.train.log import read_metrics

HELP = """fastssl eval: what a run's encoder is worth, on the run's data or another (--data)

  fastssl eval knn RUN       training images vote on the test images: seconds, nothing is trained
  fastssl eval linear RUN    a linear classifier on frozen features: a quick sweep, or the papers' protocol
  fastssl eval finetune RUN  the encoder and a classifier trained end to end

  fastssl eval linear RUN --help lists every option with its default. linear and finetune take --labels 0.01 or 0.1 for
  few labels; knn and linear also run under torchrun.
"""
TAU = 0.07


@dataclass
class Flags:
    run: tyro.conf.Positional[Path]
    """folder of the run"""
    data: str | None = None
    """another source than the run's"""


@dataclass
class TrainFlags(Flags):
    labels: float = 1.0
    """share of the training labels that may be used, the same number of each class"""
    seed: int = 0
    """of the labels that are used, the first weights, order and augmentations"""


def evaluate(words: list[str]) -> None:
    """fastssl eval knn|linear|finetune RUN"""
    commands = {"knn": _knn_command, "linear": _linear_command, "finetune": _finetune_command}
    if words in (["-h"], ["--help"]):
        print(HELP)
        return
    if not words or words[0] not in commands:
        came = words[0] if words else "nothing"
        raise ValueError(f"eval: name an evaluation: knn, linear or finetune, got {came}")
    try:
        commands[words[0]](words[1:])
    finally:
        distributed.shutdown()


def _knn_command(words: list[str]) -> None:
    @dataclass
    class KnnFlags(Flags):
        """Weighted k-nearest-neighbour accuracy of a run's encoder: training images vote on the test images."""

        k: tuple[int, ...] = (10, 20, 200)
        """neighbours that vote, several at once"""
        tau: Annotated[float, tyro.conf.arg(help="temperature of the votes")] = TAU

    flags = tyro.cli(KnnFlags, args=words, prog="fastssl eval knn")
    check(flags)
    opened = _Opened(flags)
    found = _knn(opened.method.features, opened.data, opened.run, opened.device, flags.k, flags.tau)
    assert found is not None  # _Opened refuses a source without labels
    asked = {"tau": flags.tau} if flags.tau != TAU else {}
    for k, share in found.items():
        opened.note("knn", share, k=k, **asked)
    _say(f"kNN of {flags.run} on {opened.data}: " + " · ".join(f"k={k} {share:.1%}" for k, share in found.items()))


def _linear_command(words: list[str]) -> None:
    protocol, run = value_of("--protocol", words) or "features", _run_in(words)
    if protocol not in ("features", "official"):
        raise ValueError(f"eval: --protocol must be features or official, got {protocol!r}")
    papers = method_module(run.method_name).linear_probe(run.config.backbone) if run else Official()
    default: Sweep | Official = papers if protocol == "official" else Sweep()

    @dataclass
    class LinearFlags(TrainFlags):
        protocol: Literal["features", "official"] = "features"
        """features: extracted once, swept in seconds to minutes; official: the paper's, with its augmentations"""
        pool: Literal["token", "avg"] | None = None
        """of a ViT: class token or mean of the patches; if not given, what the method's paper takes, the class token"""
        how: type(default) = field(default_factory=lambda: default)

    LinearFlags.__doc__ = f"{type(default).__doc__}\n\nDefaults below are those of --protocol {protocol}."
    flags = tyro.cli(tyro.conf.OmitArgPrefixes[LinearFlags], args=words, prog="fastssl eval linear")
    check(flags)
    check(flags.how)
    if protocol == "official":
        _alone("eval linear --protocol official")
    opened = _Opened(flags)
    features, size, where = features_of(opened.method, flags.pool), opened.run.config.image_size, opened.where
    train, test = labelled(opened.train, flags.labels, flags.seed), opened.test
    facts: dict[str, Any] = {"protocol": protocol, "pool": flags.pool, **_few(flags)}
    if isinstance(flags.how, Official):
        found = trained_officially(features, train, test, flags.how, size, flags.seed, **where)
        facts |= {"epochs": flags.how.epochs, **_changed(flags.how, default)}
    else:
        both = [extract_together(features, split, size, **where) for split in (train, test)]
        if distributed.rank() > 0:  # the others only helped to extract
            return
        found, setting = swept(*both, len(train.classes), flags.how, flags.seed)
        facts |= {"setting": str(setting)}
    opened.report("linear", found, facts)


def _finetune_command(words: list[str]) -> None:
    run = _run_in(words)
    backbone = run.config.backbone if run else "vit_base"
    small = run is not None and max(run.config.image_size) <= 64
    how = Finetune.small(backbone) if small else Finetune.paper(backbone)

    @dataclass
    class FinetuneFlags(TrainFlags):
        how: Finetune = field(default_factory=lambda: how)

    source = "small images" if small else f"the paper, for {backbone}"
    FinetuneFlags.__doc__ = f"{Finetune.__doc__}\n\nDefaults below are those of {source}."
    from fastssl.eval.finetune import build_classifier, fine_tuned, need_timm  # here: torchvision's models take seconds

    flags = tyro.cli(tyro.conf.OmitArgPrefixes[FinetuneFlags], args=words, prog="fastssl eval finetune")
    check(flags)
    check(flags.how)
    need_timm()
    _alone("eval finetune")
    opened = _Opened(flags)
    train, size = labelled(opened.train, flags.labels, flags.seed), opened.run.config.image_size
    torch.manual_seed(flags.seed)
    stem = getattr(opened.run.config, "small_images", False)
    model = build_classifier(opened.method, backbone, len(train.classes), flags.how.drop_path, stem)
    found = fine_tuned(model, train, opened.test, flags.how, size, flags.seed, **opened.where)
    opened.report("finetune", found, {"epochs": flags.how.epochs, **_few(flags), **_changed(flags.how, how)})


class _Opened:
    """A run's frozen method and the labelled source to try it on. On several ranks each has its own."""

    def __init__(self, flags: Flags):
        self.run = open_run(flags.run)
        self.data = flags.data or self.run.options.data
        self.train, self.test = (open_source(self.data, split) for split in ("train", "test"))
        if self.train.classes is None or self.test.classes is None:
            raise ValueError(f"eval: {self.data} has no labels to compare with")
        state = self.run.state()
        self.step: int = state["step"]
        method = self.run.build()  # before the ranks meet: how large a batch each trained on is no matter here
        method.load_state_dict(state["model"])
        self.device = distributed.setup(device_named("auto"))
        self.method = method.to(self.device).eval().requires_grad_(False)
        self.where = _where(self.run, self.device)

    def note(self, evaluation: str, share: float, **facts: Any) -> None:
        """A line in evaluations.jsonl, by the first rank; facts that are None are left out."""
        if distributed.rank() == 0:
            logged = [line for line in read_metrics(self.run.folder / "metrics.jsonl") if line["step"] == self.step]
            facts = {"data": self.data, "epoch": logged[-1]["epoch"] if logged else None, **facts}
            known = {name: value for name, value in facts.items() if value is not None}
            self.run.note(evaluation, self.step, share, **known)

    def report(self, evaluation: str, found: Accuracy, facts: dict[str, Any]) -> None:
        """Notes and prints an accuracy."""
        top5 = None if found.top5 is None else round(found.top5, 4)
        self.note(evaluation, found.top1, **facts, top5=top5)
        second = "" if found.top5 is None else f", top-5 {found.top5:.1%}"
        how = [str(facts[name]) for name in ("protocol", "setting") if name in facts]
        how += [f"{facts['labels']:.3g} of the labels"] if facts["labels"] < 1 else []
        said = f" ({', '.join(how)})" if how else ""
        _say(f"{evaluation} accuracy of {self.run.folder} on {self.data}: top-1 {found.top1:.1%}{second}{said}")


def _few(flags: TrainFlags) -> dict[str, Any]:
    """What an evaluation with labels is asked for."""
    return {"labels": flags.labels, "seed": flags.seed if flags.labels < 1 else None}


def _changed(asked: Any, default: Any) -> dict[str, Any]:
    """The fields of a dataclass that were asked to differ from its defaults."""
    values = {f.name: (getattr(asked, f.name), getattr(default, f.name)) for f in fields(asked)}
    return {name: value for name, (value, usual) in values.items() if value != usual}


def _alone(command: str) -> None:
    """Refuses several processes."""
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"{command} runs in one process: start it without torchrun, as fastssl {command} RUN")


def _run_in(words: list[str]) -> Run | None:
    """The run that is named, where there is one: the flags' defaults depend on it."""
    named = (Path(word) for word in words if not word.startswith("-"))
    folder = next((folder for folder in named if (folder / "config.json").is_file()), None)
    return open_run(folder) if folder else None


def value_of(flag: str, words: list[str]) -> str | None:
    """What stands behind a flag (or after its =): needed before the flags' defaults are known."""
    for i, word in enumerate(words):
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
        if word == flag and i + 1 < len(words):
            return words[i + 1]
    return None


def write_knn(run: Run, method: torch.nn.Module, step: int, epoch: float, device: torch.device) -> None:
    """Notes the kNN accuracy (k = 20) of the method as it stands; nothing where the source has no labels.

    Before the first step also that of raw pixels. The method is left in evaluation mode, torch's random state as it
    was. All ranks call it together, and the first one notes and prints.
    """
    method.eval()
    data, asked = run.options.data, {"data": run.options.data, "epoch": epoch, "k": 20}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        found = _knn(method.features, data, run, device, (20,))
        if found is None:
            return
        pixels = None
        if step == 0 and max(run.config.image_size) <= 64:  # all pixels of larger images are too much to hold
            pixels = _knn(lambda images: images.flatten(1), data, run, device, (20,))
    if distributed.rank() > 0:
        return
    if pixels is not None:
        run.note("knn of raw pixels", 0, pixels[20], **asked)
    run.note("knn", step, found[20], **asked)
    own = [line for line in run.evaluations() if line["evaluation"].startswith("knn") and line.get("data") == data]
    print("kNN accuracy: " + " · ".join(_phrase(line, run) for line in own if line.get("k") == 20))


def _phrase(line: dict, run: Run) -> str:
    """One kNN result in words."""
    if line["evaluation"] == "knn of raw pixels":
        return f"raw pixels {line['accuracy']:.1%}"
    begun = "given encoder" if run.options.weights else "untrained encoder"
    when = f"epoch {line['epoch']:.4g}" if line["step"] else begun
    return f"{when} {line['accuracy']:.1%}"


def _knn(
    features: Callable[[torch.Tensor], torch.Tensor],
    data: str,
    run: Run,
    device: torch.device,
    ks: tuple[int, ...],
    tau: float = TAU,
) -> dict[int, float] | None:
    """Accuracy for each k, each rank with its part of the images; None where the source has no labels."""
    splits: list[Source] = [open_source(data, split) for split in ("train", "test")]
    if any(split.classes is None for split in splits):
        return None
    part, size = (distributed.rank(), distributed.world_size()), run.config.image_size
    where = _where(run, device)
    (bank, bank_labels, _), (queries, labels, _) = (
        extract(features, split, size, part=part, **where) for split in splits
    )
    return knn_accuracy(bank, bank_labels, queries, labels, ks, tau)


def _where(run: Run, device: torch.device) -> dict[str, Any]:
    """Device, workers and engine that images are loaded with."""
    workers = share_cores(run.options.workers, device, distributed.local_world_size())
    return {"device": device, "workers": workers, "engine": engine_there(run.options.engine, device)}


def _say(text: str) -> None:
    if distributed.rank() == 0:
        print(text, flush=True)
