"""A run folder, and the class `Run` that reads it, evaluates the run and exports its weights.

config.json          method, data and every option; read when the run is opened or resumed
metrics.jsonl        training metrics, one line per logging interval (train/log.py)
checkpoints/         the newest checkpoints, and those that are kept for good (train/checkpoint.py)
evaluations.jsonl    one line per evaluation: kNN before, during and after training, linear and fine-tuned accuracy
reconstructions/     reconstructed images at each evaluation, of methods that reconstruct
tensorboard/         the metrics for TensorBoard
profile/             time of each part of a step (--profile)
data.npz             fingerprint of the training images (data/fingerprint.py)
held-out.npz         that of the held-out images
run.lock             held by the process that trains (train/lock.py)
bad_files.txt        images that could not be decoded, if there are any
skipped-RANK.jsonl   steps with a loss or gradient that was not finite, and their images
report.html          the report that `fastssl report` writes
"""

import dataclasses
import json
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from fastssl.bounds import NOT_NEGATIVE, Range, check_ranges
from fastssl.data.augmentation import IMAGENET_MEAN, IMAGENET_STD
from fastssl.data.source import Source, expand_user, open_source
from fastssl.files import write_atomically
from fastssl.method_modules import method_module
from fastssl.settings import from_json
from fastssl.train import checkpoint
from fastssl.train.config import Execution
from fastssl.train.log import read_metrics
from fastssl.train.records import read_records, rewrite_records

if TYPE_CHECKING:
    from fastssl.eval.labels import Accuracy
    from fastssl.eval.retrieval import Recall

PATH_SOURCES = (  # their argument is a path
    *("folder", "webdataset", "pack", "arrays", "idx", "cifar10", "cifar100", "csv", "tsv", "coco"),
)
OBJECTS = "python"  # stands for the source's name where the sources were given as Python objects
IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
EVALUATIONS = {"evaluation": str, "step": int, "accuracy": float}  # fields of every line of evaluations.jsonl
WORKERS = Range(0, 1024)  # more processes than any machine has cores for would only fill its memory
Sources = tuple[Source, Source]  # training and held-out split


def absolute_data(spec: str) -> str:
    """A data specification with absolute paths, ~ expanded: a run can then be resumed and evaluated from any folder.

    Embedded sources, URLs and sources outside the package stay as they are.
    """
    name, _, argument = spec.partition(":")
    if name not in PATH_SOURCES or not argument or "://" in argument:
        return spec
    paths = argument.split(",") if name == "arrays" else [argument]
    return f"{name}:" + ",".join(str(expand_user(path).absolute()) if path else path for path in paths)


@dataclass
class Options:
    """Options of a run that do not depend on its method."""

    data: str
    """source of images: patterns, digits, shapes, captions, emoji, folder:PATH, webdataset:SHARDS, pack:FILE, csv:FILE,
    tsv:FILE, coco:PATH, arrays:FILE, idx:PATH, cifar10:PATH, cifar100:PATH, or package.module:ARGUMENT for your own
    source"""
    folder: Path | None = None
    """folder of the run; runs/METHOD-DATA by default"""
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """random seed of initial weights, order, augmentations and masks"""
    workers: Annotated[int | None, WORKERS] = None
    """processes or threads (dali: threads) that load data; by default a quarter of the cores, or up to 8 with a GPU"""
    worker_kind: Literal["auto", "process", "thread"] = "auto"
    """kind of workers of the engines torchvision and device; auto: threads on a Python without its global lock"""
    engine: str = "auto"
    """loader engine: torchvision, device (crops and colours on the GPU), dali, or auto (dali on a GPU if it is
    installed)"""
    full_decode: bool = False
    """decode all JPEGs in full; else large ones are decoded at 1/2, 1/4 or 1/8 where the views need no more pixels"""
    weights: Path | None = None
    """file with initial weights: a whole checkpoint of the method, or an encoder of timm, torchvision, Hugging Face or
    another method"""
    device: str = "auto"
    """device: cuda, cpu, or auto (cuda if available)"""
    max_bad: Annotated[float, NOT_NEGATIVE] = 0.01
    """largest share of images that cannot be decoded; above it the run stops"""
    knn_every: Annotated[int, NOT_NEGATIVE] = 0
    """epochs between kNN evaluations during the run; 0: one before and one after it"""
    execution: Execution = field(default_factory=Execution)


@dataclass(repr=False)
class Run:
    """A run folder: its configuration, its weights, and evaluations of them.

    `fastssl.pretrain` and `fastssl.open_run` return it. Evaluations use the newest checkpoint and note their result in
    evaluations.jsonl; `data` is another source than the run's, as text or as a pair of sources (training, held-out).

    Args:
        folder: the run folder.
        method_name: name or dotted module name of the method.
        options: data, seed, execution.
        config: the method's `Config`.
        facts: versions and machine that the run was started on.
        id: distinguishes the run from all others; "" for a run of a version without ids.
    """

    folder: Path
    method_name: str
    options: Options
    config: Any
    facts: dict = field(default_factory=dict)
    id: str = ""
    _sources: dict[tuple[str, str], Source] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}: {self.method_name} on {self.options.data})"

    # The folder's content

    def save(self) -> None:
        """Writes config.json."""
        record = {
            "method": self.method_name,
            "id": self.id,
            "options": dataclasses.asdict(self.options),
            "config": dataclasses.asdict(self.config),
            "facts": self.facts,
        }
        with write_atomically(self.folder / "config.json") as file:
            file.write(json.dumps(record, indent=1, default=str) + "\n")

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the method's images: `image_size` of its config, else the size of its first view."""
        size = getattr(self.config, "image_size", None)
        return size or self.config.augmentation.views[0].size

    @property
    def normalisation(self) -> dict[str, tuple[float, float, float]]:
        """{"mean", "std"} of evaluations: `normalisation` of its config, else those of the method's first view;
        ImageNet's for views that are not RGB."""
        if (own := getattr(self.config, "normalisation", None)) is not None:
            return own
        view = self.config.augmentation.views[0]
        return {"mean": view.mean, "std": view.std} if view.colour_space == "rgb" else IMAGENET

    @property
    def backbone(self) -> str:
        """Name of the backbone; "" for a method without that field."""
        return getattr(self.config, "backbone", "")

    def state(self, needed: tuple[str, ...] = checkpoint.EVALUATED) -> dict:
        """The newest checkpoint that is intact and this run's own; it holds at least what is `needed`.

        Raises:
            ValueError: there is none.
        """
        return checkpoint.load(self.checkpoints, self.method_name, self.id, needed)

    @property
    def has_begun(self) -> bool:
        """Whether the run has made a step that is worth keeping: it has metrics or a checkpoint."""
        has_checkpoint = self.checkpoints.is_dir() and any(self.checkpoints.glob("*.pt"))
        return has_checkpoint or bool(self.metrics())

    def metrics(self) -> list[dict]:
        """Records of metrics.jsonl, in the order of the steps. Lines that hold none are named and passed over."""
        return read_metrics(self.folder / "metrics.jsonl")

    def evaluations(self) -> list[dict]:
        """Records of evaluations.jsonl. Lines that hold none are named and passed over."""
        return read_records(self.folder / "evaluations.jsonl", EVALUATIONS)

    def note(
        self, evaluation: str, step: int, accuracy: float, results: dict[str, float] | None = None, **facts: Any
    ) -> None:
        """Appends {"evaluation", "step", "accuracy" (0 … 1), results, facts} to evaluations.jsonl.

        A record of the same evaluation with the same facts at the same step is replaced, whatever its results.
        """
        record = {"evaluation": evaluation, "step": step, **facts}
        path, new = self.folder / "evaluations.jsonl", {**record, "accuracy": accuracy, **(results or {})}
        rewrite_records(path, lambda known: {**known, **record} != known, [new], EVALUATIONS)

    def source(self, split: Literal["train", "test"], data: str | Sources | None = None) -> Source:
        """A split of the run's data, or of other data; each is opened once.

        Raises:
            ValueError: the data cannot be opened, or the run's data was given as objects and is not in memory.
        """
        if data is not None and not isinstance(data, str):
            return data[split == "test"]
        spec = self.data_name(data)
        if (spec, split) not in self._sources:
            if spec.startswith(f"{OBJECTS}:"):
                raise ValueError(
                    f"run: {self.folder} was trained on sources given as objects ({spec}): give them again as data=…"
                )
            self._sources[spec, split] = open_source(spec, split)
        return self._sources[spec, split]

    def keep_sources(self, data: Sources) -> None:
        """Keeps a pair of sources (training, held-out) that was given as objects."""
        for split, source in zip(("train", "test"), data):
            self._sources[sources_name(data), split] = source

    def data_name(self, data: str | Sources | None = None) -> str:
        """Name of the data in evaluations.jsonl: its specification with absolute paths."""
        if data is None:
            return self.options.data
        return absolute_data(data) if isinstance(data, str) else sources_name(data)

    def is_own(self, data: str) -> bool:
        """Whether this names the run's data, or the same images where they lay before they were moved."""
        moved = self.facts.get("moved_from", [])
        return data == self.options.data or (isinstance(moved, list) and data in moved)

    # The method

    def build(self) -> nn.Module:
        """The method with fresh weights.

        Raises:
            ValueError: an option does not fit the method, or the model is too large for the memory.
        """
        try:
            return method_module(self.method_name).build(self.config)
        except (RuntimeError, MemoryError, OverflowError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if isinstance(error, RuntimeError) and not re.search("alloc|overflow", reason, re.IGNORECASE):
                raise
            raise ValueError(
                f"{self.short_name}: a model of these sizes cannot be built, it is too large ({reason})"
            ) from error

    def load(self) -> nn.Module:
        """The method with the weights of the newest checkpoint, in evaluation mode, on the CPU."""
        state, method = self.state(), self.build()
        checkpoint.load_model(method, state)
        return method.eval()

    def encoder(self) -> nn.Module:
        """The pretrained encoder in evaluation mode, on the CPU: images [B, 3, H, W] → features [B, F].

        Images are normalised by `normalisation`; (H, W) is `image_size`.
        Its state dict has the names of timm or torchvision.
        """
        return self.load().encoder.eval()

    def export(self, layout: str, to: str | Path | None = None) -> Path:
        """Writes the weights of the newest checkpoint in another layout and returns the file.

        Args:
            layout: timm or torchvision (the encoder in their names), safetensors (the whole model), or the name of the
                reference checkpoint's layout, where the method defines `OFFICIAL`.
            to: file to write, RUN/METHOD-LAYOUT by default; its suffix is set.
        """
        from safetensors import SafetensorError

        from fastssl.weights import export

        path = Path(to or self.folder / f"{self.short_name}-{layout}")
        method = self.load()
        try:
            return export(method, layout, path, self.backbone)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap the system's error
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise ValueError(f"export: {path} cannot be written ({reason}): name a file by --to") from error

    @property
    def short_name(self) -> str:
        """The method's name without its package."""
        return self.method_name.rpartition(".")[2]

    # Actions. Their modules import this one, so they are imported when an action is called

    def resume(self, data: str | Sources | None = None, *, allow_changed_data: bool = False, **settings: Any) -> "Run":
        """Continues the run from its newest checkpoint and returns it.

        Args:
            data: new location of the same images.
            allow_changed_data: go on although images or labels have changed since the run was started.
            settings: options that may change when a run is resumed, such as epochs, workers, device or log_every; see
                `fastssl.pretraining.CHANGEABLE`.
        """
        from fastssl.pretraining import resume_run

        return resume_run(self, data, settings, allow_changed_data)

    def knn(
        self,
        k: int | Sequence[int] = (10, 20, 200),
        tau: float = 0.07,
        data: str | Sources | None = None,
        device: str = "auto",
        labels: float = 1.0,
        seed: int = 0,
    ) -> dict[int, float]:
        """Weighted k-nearest-neighbour accuracy: training images vote on held-out images. {k: accuracy}.

        Args:
            k: numbers of neighbours.
            tau: temperature of the votes.
            data: another source than the run's.
            device: cuda, cpu, or auto.
            labels, seed: as for `linear`: which training images vote.

        Raises:
            ValueError: the source has no labels, or a number is out of range.
        """
        from fastssl.evaluation import knn

        return knn(self, (k,) if isinstance(k, int) else tuple(k), tau, data, device, labels, seed)

    def linear(
        self,
        protocol: Literal["features", "official"] = "features",
        *,
        pool: Literal["token", "avg"] | None = None,
        labels: float = 1.0,
        seed: int = 0,
        data: str | Sources | None = None,
        device: str = "auto",
        **settings: Any,
    ) -> "Accuracy | None":
        """Accuracy of a linear classifier on the frozen encoder.

        Args:
            protocol: "features" extracts features once and sweeps optimizers and learning rates; "official" is the
                protocol of the method's paper, with augmentation.
            pool: features of a ViT: class token or mean of the patch tokens; the method's own choice by default.
            labels: share of the training labels to use, at most 1, or their number; the same number of each class.
            seed: random seed of the choice of labels, initial weights, order and augmentation.
            data: another source than the run's.
            device: cuda, cpu, or auto.
            settings: fields of `eval.protocols.Sweep` (features) or `eval.protocols.Official` (official).

        Returns:
            Accuracy (top1, top5); None on ranks other than the first.
        """
        from fastssl.evaluation import linear

        return linear(self, protocol, pool, labels, seed, data, device, settings)

    def finetune(
        self,
        *,
        labels: float = 1.0,
        seed: int = 0,
        data: str | Sources | None = None,
        device: str = "auto",
        **settings: Any,
    ) -> "Accuracy":
        """Accuracy of the encoder and a classifier trained end to end. Needs the extra `finetune`.

        Args:
            labels, seed, data, device: as for `linear`.
            settings: fields of `eval.protocols.Finetune`.
        """
        from fastssl.evaluation import finetune

        return finetune(self, labels, seed, data, device, settings)

    def zeroshot(
        self,
        classes: str | Path | Sequence[str] | None = None,
        templates: str | Path | Sequence[str] | None = None,
        data: str | Sources | None = None,
        device: str = "auto",
    ) -> "Accuracy":
        """Accuracy without training on labels: an image gets the class whose sentences are nearest to it.

        For methods of images and text. Images are held-out ones.

        Args:
            classes: names in the order of the labels, as a list or a UTF-8 text file with one a line; the source's own
                by default, with blanks for underscores.
            templates: sentences with ``{}`` for the name, as a list or such a file; `eval.prompts.TEMPLATES` by
                default.
            data, device: as for `knn`.

        Raises:
            ValueError: the method has no text, the source no labels, or names or templates are not as described.
        """
        from fastssl.evaluation import zeroshot

        return zeroshot(self, classes, templates, data, device)

    def retrieval(self, rerank: int = 0, data: str | Sources | None = None, device: str = "auto") -> "Recall":
        """Shares of held-out images that find one of their captions among the first 1, 5 and 10, and the reverse.

        For methods of images and text. Captions with equal tokens are one text, which belongs to all of their images.

        Args:
            rerank: number of the best ones that the method sorts again by judging image and text together; 0 for none.
            data, device: as for `knn`.

        Raises:
            ValueError: the method has no text or cannot judge pairs, or the source has no captions.
        """
        from fastssl.evaluation import retrieval

        return retrieval(self, rerank, data, device)

    @torch.no_grad()
    def embed(
        self, data: str | Sources | None = None, split: Literal["all", "train", "test"] = "all", device: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """(features [N, F] float32, labels [N] int64) of every image that can be decoded, on the CPU.

        Args:
            data: another source than the run's.
            split: "all" is the training images, then the held-out ones.
            device: cuda, cpu, or auto.

        Returns:
            Labels are −1 where the source has none. `fastssl.evaluation.embed` also returns names and numbers.
        """
        from fastssl.evaluation import embed

        features, labels, *_ = embed(self, data, split, device)
        return features, labels

    def report(self, to: str | Path | None = None, map: Literal["pca", "umap"] = "pca") -> Path:
        """Writes a self-contained report.html and returns its path. Needs the extra `report`.

        Args:
            to: file to write, RUN/report.html by default.
            map: projection of the features to two dimensions; umap needs the extra of that name.
        """
        from fastssl.report.page import write_report

        return write_report([self], None if to is None else Path(to), map)


def open_run(folder: str | Path) -> Run:
    """Opens a run folder.

    Raises:
        ValueError: the folder has no config.json, or it does not fit this version of fastssl: it is damaged, a value
            has another type or is out of range, or a field is unknown.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"run: {folder} is not a run folder: it has no config.json")
    owner = f"run: {path} does not fit this version of fastssl"
    try:
        record = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{owner} ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{owner} (it must be an object, got {reprlib.repr(record)})")
    if unknown := set(record) - {"method", "id", "options", "config", "facts"}:
        raise ValueError(f"{owner}: unknown field {reprlib.repr(min(unknown))}")
    if missing := [name for name in ("method", "options", "config") if name not in record]:
        raise ValueError(f"{owner}: it lacks {missing[0]}")
    method_name, facts, run_id = record["method"], record.get("facts", {}), record.get("id", "")
    if not (isinstance(method_name, str) and isinstance(facts, dict) and isinstance(run_id, str)):
        raise ValueError(f"{owner} (method, facts or id has another type)")
    options = from_json(Options, record["options"], owner)
    config = from_json(method_module(method_name).Config, record["config"], owner)
    for part in (options, config):
        check_ranges(part, owner)
    return Run(folder, method_name, options, config, facts, run_id)


def sources_name(data: Sources) -> str:
    """Name of sources that are given as objects."""
    return f"{OBJECTS}:{type(data[0]).__name__}"
