"""Evaluation of a run: loads its encoder, opens the data, and notes the results in evaluations.jsonl."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastssl import distributed
from fastssl.contract import EmbedsText, MatchesText, RanksNegatives, Reconstructs
from fastssl.data.source import Source, Subset
from fastssl.eval.embedding import Embedding
from fastssl.eval.features import block_features, extract, extract_on_all_ranks, features_of
from fastssl.eval.few_labels_table import Measured
from fastssl.eval.knn import knn_accuracy
from fastssl.eval.labels import Accuracy, labelled, labelled_subset
from fastssl.eval.linear import sweep, train_official
from fastssl.eval.prompts import Lines, class_names, name_of_lines, read_templates
from fastssl.eval.protocols import FewLabels, Finetune, Official, Sweep, check_evaluation, check_protocol
from fastssl.eval.ranks import Ranks, collect_ranks, lost_contrast
from fastssl.eval.retrieval import WHOLE, Recall, captioned, retrieve
from fastssl.eval.spectrum import measure_spectrum, redundant_embeddings
from fastssl.eval.texts import Texts
from fastssl.eval.zeroshot import build_prompts, class_features, zeroshot_accuracy
from fastssl.machine import available_engine, select_device, share_cores
from fastssl.method_modules import SMALL, method_module
from fastssl.milestones import shorten
from fastssl.run import Run, Sources
from fastssl.settings import differences, update
from fastssl.text import printable
from fastssl.train.checkpoint import load_model

TAU = 0.07  # temperature of kNN votes
ONLINE_K = 20  # neighbours of the kNN evaluation during a run
QUERIES = 256  # images whose positives are ranked during a run
WATCHED = 1000  # images without labels whose features are looked at during a run


class Frozen(NamedTuple):
    """The method of a run with the weights of its newest checkpoint, in evaluation mode and without gradients."""

    method: nn.Module
    step: int  # steps of the checkpoint
    device: torch.device
    loading: dict[str, Any]  # how images are normalised, and device, workers and engine for loading them


def load_frozen(run: Run, device: str = "auto") -> Frozen:
    """Loads the method of a run for evaluation. On several ranks each has a copy; the caller leaves their group.

    Raises:
        ValueError: the run has no intact checkpoint, or the device is not available.
    """
    run.metrics(), run.evaluations()  # raises before the work where the result could not be noted
    state = run.state()
    method = run.build()  # before `setup`: in one process `build` does not divide the training batch among ranks
    load_model(method, state)
    rank_device = distributed.setup(select_device(device))
    method = method.to(rank_device).eval().requires_grad_(False)
    return Frozen(method, state["step"], rank_device, _loading(run, rank_device))


@distributed.group_scope()
def knn(
    run: Run,
    ks: tuple[int, ...] = (10, 20, 200),
    tau: float = TAU,
    data: str | Sources | None = None,
    device: str = "auto",
    labels: float = 1.0,
    seed: int = 0,
) -> dict[int, float]:
    """Evaluates weighted kNN; see `Run.knn`. On several ranks each extracts its part of the images."""
    check_evaluation(k=ks, tau=tau, labels=labels, seed=seed)
    train, test = _labelled_splits(run, data)
    splits = labelled_subset(train, labels, seed), test
    frozen = load_frozen(run, device)
    tables = _tables(frozen.method.features, splits, run, frozen.loading)
    accuracies, results = knn_accuracy(*tables, ks, tau), measure_spectrum(tables[0]).results()
    for k, accuracy in accuracies.items():
        facts = {"k": k, "tau": None if tau == TAU else tau, **(_label_facts(labels, seed) if labels != 1 else {})}
        _note(run, frozen.step, "knn", accuracy, data, results, **facts)
    return accuracies


@distributed.group_scope()
def linear(
    run: Run,
    protocol: Literal["features", "official"] = "features",
    pool: Literal["token", "avg"] | None = None,
    labels: float = 1.0,
    seed: int = 0,
    data: str | Sources | None = None,
    device: str = "auto",
    settings: dict[str, Any] | None = None,
) -> Accuracy | None:
    """Trains a linear classifier on the frozen encoder; see `Run.linear`."""
    default = linear_defaults(run, protocol, (settings or {}).get("epochs"))
    (numbers,) = update((default,), settings or {}, "eval")
    check_evaluation(labels=labels, seed=seed)
    check_protocol(numbers)
    if protocol == "official":
        _refuse_ranks("eval linear --protocol official")
    train, test = _labelled_splits(run, data)
    train = labelled_subset(train, labels, seed)
    frozen = load_frozen(run, device)
    if isinstance(numbers, Sweep) and numbers.blocks and pool:
        raise ValueError(f"eval: --blocks and --pool choose the features of a ViT, got both: leave out --pool {pool}")
    features, size = features_of(frozen.method, pool), run.image_size
    facts: dict[str, Any] = {"protocol": protocol, "pool": pool, **_label_facts(labels, seed)}
    if isinstance(numbers, Official):
        accuracy = train_official(features, train, test, numbers, size, seed, **frozen.loading)
        facts |= {"epochs": numbers.epochs, **_changes(default, numbers)}
    else:
        kinds = None
        if numbers.blocks:
            kinds, features = block_features(frozen.method, numbers.blocks)
        tables = [extract_on_all_ranks(features, split, size, **frozen.loading) for split in (train, test)]
        if distributed.rank() > 0:  # the other ranks extract features only
            return None
        accuracy, setting, kind = sweep(*tables, len(train.classes), numbers, seed, kinds)
        facts |= {"setting": str(setting), "features": kind or None}
    _note(run, frozen.step, "linear", accuracy.top1, data, **facts, top5=_rounded(accuracy.top5))
    return accuracy


def linear_defaults(run: Run | None, protocol: str, epochs: int | None = None) -> Sweep | Official:
    """Default numbers of a linear evaluation; of the protocol "official" those of the method's paper.

    With fewer epochs than the paper's, warm-up and drops of the learning rate are scaled in proportion.

    Raises:
        ValueError: the protocol is unknown, or it is "official" and the method defines no linear probe.
    """
    if protocol not in ("features", "official"):
        raise ValueError(f"eval: --protocol must be features or official, got {protocol!r}")
    if protocol == "features":
        return Sweep()
    if run is None:
        return shorten(Official(), epochs)
    module = method_module(run.method_name)
    if not hasattr(module, "linear_probe"):
        raise ValueError(
            f"eval: --protocol official is the linear probe of the method's paper, and {run.method_name} defines none: "
            "use --protocol features"
        )
    return shorten(module.linear_probe(run.backbone), epochs)


def finetune(
    run: Run,
    labels: float = 1.0,
    seed: int = 0,
    data: str | Sources | None = None,
    device: str = "auto",
    settings: dict[str, Any] | None = None,
) -> Accuracy:
    """Trains the encoder and a classifier end to end; see `Run.finetune`."""
    default = finetune_defaults(run, (settings or {}).get("epochs"))
    (numbers,) = update((default,), settings or {}, "eval")
    check_evaluation(labels=labels, seed=seed)
    check_protocol(numbers)
    from fastssl.eval import finetuning  # here: torchvision's models take seconds to import

    finetuning.need_timm()
    _refuse_ranks("eval finetune")
    train, test = _labelled_splits(run, data)
    train = labelled_subset(train, labels, seed)
    frozen = load_frozen(run, device)
    torch.manual_seed(seed)
    small_images = getattr(run.config, "small_images", False)
    classes = len(train.classes)
    model = finetuning.build_classifier(frozen.method, run.backbone, classes, numbers.drop_path, small_images)
    accuracy = finetuning.finetune(model, train, test, numbers, run.image_size, seed, **frozen.loading)
    facts = {"epochs": numbers.epochs, **_label_facts(labels, seed), **_changes(default, numbers)}
    _note(run, frozen.step, "finetune", accuracy.top1, data, **facts, top5=_rounded(accuracy.top5))
    return accuracy


def finetune_defaults(run: Run | None, epochs: int | None = None) -> Finetune:
    """Default numbers of fine-tuning: a short preset for small images, else those of the method's paper if its module
    defines `finetuning`, else MAE's or SwAV's for the backbone.

    With fewer epochs, warm-up and drops of the learning rate are scaled in proportion.
    """
    if run is None:
        return shorten(Finetune.paper("vit_base"), epochs)
    if max(run.image_size) <= SMALL:
        return shorten(Finetune.small(run.backbone), epochs)
    of_paper = getattr(method_module(run.method_name), "finetuning", Finetune.paper)
    return shorten(of_paper(run.backbone), epochs)


def few_labels(
    run: Run,
    seed: int = 0,
    data: str | Sources | None = None,
    device: str = "auto",
    settings: dict[str, Any] | None = None,
) -> list[Measured]:
    """Compares the encoder with raw pixels and training from scratch on few labels; see `Run.few_labels`."""
    default = FewLabels.of_backbone(run.backbone)
    (numbers,) = update((default,), settings or {}, "eval")
    check_evaluation(seed=seed)
    check_protocol(numbers)
    from fastssl.eval import few_labels, finetuning  # here: torchvision's models take seconds to import

    finetuning.need_timm("eval few-labels")
    _refuse_ranks("eval few-labels")
    train, test = _labelled_splits(run, data)
    draws = few_labels.draw_labels(train, numbers, seed, printable(run.data_name(data)))
    frozen = load_frozen(run, device)
    small_images = getattr(run.config, "small_images", False)

    def build(start: str, drawn: int) -> nn.Module:
        torch.manual_seed(drawn)
        method = run.build() if start == few_labels.SCRATCH else frozen.method
        return finetuning.build_classifier(method, run.backbone, len(train.classes), small_images=small_images)

    results = few_labels.compare(
        frozen.method.features, build, train, test, draws, numbers, run.image_size, **frozen.loading
    )
    facts = {"draws": numbers.draws, "seed": seed, **_changes(default, numbers)}
    for result in results:
        named = {"start": result.start, "classifier": result.classifier, "labels": result.labels}
        measured = {"spread": result.spread, "accuracies": list(result.accuracies)}
        _note(run, frozen.step, "few labels", result.mean, data, measured, **named, **facts)
    return results


def embed(
    run: Run, data: str | Sources | None = None, split: Literal["all", "train", "test"] = "all", device: str = "auto"
) -> Embedding:
    """Features of every image that can be decoded, in the order of the source.

    Args:
        run: a run with a checkpoint.
        data: another source than the run's.
        split: "all" is the training images, then the held-out ones.
        device: cuda, cpu, or auto.

    Raises:
        ValueError: the split is unknown, or none of its images can be decoded.
    """
    if split not in ("all", "train", "test"):
        raise ValueError(f"embed: --split must be all, train or test, got {split!r}")
    _refuse_ranks("embed")
    chosen = ("train", "test") if split == "all" else (split,)
    sources = {name: run.source(name, data) for name in chosen}
    frozen = load_frozen(run, device)
    tables, names, splits = [], [], []
    for name, source in sources.items():
        table = extract(frozen.method.features, source, run.image_size, **frozen.loading)
        tables.append([column.cpu() for column in table])
        numbers = tables[-1][2].tolist()
        names += [source.name(number) for number in numbers]
        splits += [name] * len(numbers)
        if missing := len(source) - len(numbers):
            print(f"embed: {missing} of {len(source)} images of the {name} split could not be decoded", flush=True)
    return Embedding(*(torch.cat(column) for column in zip(*tables)), names, splits)


@distributed.group_scope()
def zeroshot(
    run: Run,
    classes: Lines | None = None,
    templates: Lines | None = None,
    data: str | Sources | None = None,
    device: str = "auto",
) -> Accuracy:
    """Classifies held-out images by sentences about the classes; see `Run.zeroshot`. On several ranks each embeds its
    part of images and sentences."""
    texts, source = _texts(run, "zeroshot"), run.source("test", data)
    test, name = labelled(source), run.data_name(data)
    if not len(test):
        raise ValueError(f"eval zeroshot: the held-out split of {printable(name)} has no labels to compare with")
    names, sentences = class_names(classes, test.classes, name), read_templates(templates)
    prompts = build_prompts(names, sentences, texts)
    frozen = load_frozen(run, device)
    _need_ability(run, frozen.method, EmbedsText, "zeroshot")
    _tell_left_out(len(source) - len(test), len(source), "label")
    part = (distributed.rank(), distributed.world_size())
    images, labels, _ = extract(
        frozen.method.embed_images, test, run.image_size, part=part, centre=WHOLE, **frozen.loading
    )
    features = class_features(frozen.method.embed_text, prompts, texts, frozen.device)
    accuracy = zeroshot_accuracy(images, labels, features)
    facts = {"classes": name_of_lines(classes), "templates": name_of_lines(templates)}
    _note(run, frozen.step, "zeroshot", accuracy.top1, data, **facts, top5=_rounded(accuracy.top5))
    return accuracy


@distributed.group_scope()
def retrieval(run: Run, rerank: int = 0, data: str | Sources | None = None, device: str = "auto") -> Recall:
    """Searches held-out texts for images and images for texts; see `Run.retrieval`. On several ranks each embeds its
    part of both."""
    check_evaluation(rerank=rerank)
    texts, test = _texts(run, "retrieval"), run.source("test", data)
    source, captions = captioned(test, texts.encode)
    if not len(source):
        name = printable(run.data_name(data))
        raise ValueError(f"eval retrieval: the held-out split of {name} has no captions to search for")
    frozen = load_frozen(run, device)
    _need_ability(run, frozen.method, EmbedsText, "retrieval")
    if rerank and not isinstance(frozen.method, MatchesText):
        raise ValueError(
            f"eval retrieval: --rerank is for methods that judge pairs of an image and a text, such as albef, and "
            f"{run.method_name} does not: leave it out"
        )
    _tell_left_out(len(test) - len(source), len(test), "caption")
    recall = retrieve(frozen.method, source, captions, run.image_size, texts, rerank, **frozen.loading).recall()
    for direction, shares in (("image to text", recall.image_to_text), ("text to image", recall.text_to_image)):
        results = {f"r{k}": round(share, 4) for k, share in shares.items() if k > 1}
        results |= {"images": recall.images, "texts": recall.texts}
        _note(run, frozen.step, "retrieval", shares[1], data, results, direction=direction, rerank=rerank or None)
    return recall


def _texts(run: Run, evaluation: str) -> Texts:
    """Reads texts as the run's method does.

    Raises:
        ValueError: the method has no text.
    """
    text = getattr(run.config, "text", None)
    if text is None:
        raise ValueError(
            f"eval {evaluation}: the run must be of a method of images and text, such as clip, got {run.method_name}: "
            "use eval knn or eval linear"
        )
    return Texts(text)


def _need_ability(run: Run, method: nn.Module, ability: type, evaluation: str) -> None:
    """Checks that the method has the functions of a protocol.

    Raises:
        ValueError: it lacks them.
    """
    if not isinstance(method, ability):
        raise ValueError(
            f"eval {evaluation}: the method {run.method_name} must have the functions of fastssl.contract."
            f"{ability.__name__}, got {type(method).__name__} without them"
        )


def _tell_left_out(count: int, total: int, lack: str) -> None:
    """Says on the first rank how many held-out images are left out, if there are any."""
    if count and distributed.rank() == 0:
        print(f"eval: {count:,} of {total:,} images of the held-out split have no {lack} and are left out")


def note_knn(run: Run, method: nn.Module, step: int, epoch: float, device: torch.device) -> None:
    """Notes and prints the kNN accuracy (k = 20) of a method during its run, if both splits have labels, how many
    dimensions its features use, and, if it ranks negatives, where the positives stand.

    Before the first step it also notes that of raw pixels. Without labels the rest is only printed. The method is left
    in evaluation mode, torch's random state unchanged. All ranks call it together; the first one notes and prints.
    """
    method.eval()
    train = run.source("train")
    splits = labelled(train), labelled(run.source("test"))
    loading, encoder, pixels = _loading(run, device), None, None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if all(map(len, splits)):
            tables = _tables(method.features, splits, run, loading)
            encoder, features = knn_accuracy(*tables, (ONLINE_K,), TAU), tables[0]
            if step == 0 and max(run.image_size) <= SMALL:  # the pixels of larger images need too much memory
                tables = _tables(lambda images: images.flatten(1), splits, run, loading)
                pixels = knn_accuracy(*tables, (ONLINE_K,), TAU)
        else:
            some = Subset(train, range(0, len(train), -(-len(train) // WATCHED)))
            features = _table(method.features, some, run, loading)[0]
        spread = measure_spectrum(features)
        ranks = _ranks(run, method) if isinstance(method, RanksNegatives) else None
    if distributed.rank() > 0:
        return
    if encoder is not None:
        facts = {"data": run.options.data, "epoch": epoch, "k": ONLINE_K}
        if pixels is not None:
            run.note("knn of raw pixels", 0, pixels[ONLINE_K], **facts)
        run.note("knn", step, encoder[ONLINE_K], spread.results() | (ranks.results() if ranks else {}), **facts)
        _print_curve(run, len(splits[0]))
    print(f"features: {spread.text()}")
    if ranks:
        print(f"positives: {ranks.text()}")
    masked, metrics = isinstance(method, Reconstructs), run.metrics()
    lost = ranks and (ranks.warning() or lost_contrast(metrics))
    warnings = [("warning", sentence) for sentence in (spread.warning(masked), redundant_embeddings(metrics), lost)]
    for kind, sentence in [*warnings, ("note", spread.note(masked))]:
        if step and sentence:
            print(f"{kind}: {sentence[0].lower()}{sentence[1:]}")


def _ranks(run: Run, method: nn.Module) -> Ranks | None:
    """Ranks of the positives on some of the training images."""
    batch_size = run.config.training.batch_size
    return collect_ranks(method, run.source("train"), run.config.augmentation, batch_size, run.options.seed, QUERIES)


def _print_curve(run: Run, labels: int) -> None:
    """Prints all kNN results of the run's own data, which have so many labels."""
    curve = [line for line in run.evaluations() if line["evaluation"].startswith("knn")]
    curve = [line for line in curve if run.is_own(line.get("data", run.options.data)) and "labels" not in line]
    phrases = (_phrase(line, run) for line in curve if line.get("k") == ONLINE_K)
    print(f"kNN accuracy with {labels:,} labels: {' · '.join(phrases)}")


def _phrase(line: dict, run: Run) -> str:
    """One kNN result as text."""
    if line["evaluation"] == "knn of raw pixels":
        return f"raw pixels {line['accuracy']:.1%}"
    start = "given encoder" if run.options.weights else "untrained encoder"
    moment = f"epoch {line['epoch']:.4g}" if line["step"] else start
    return f"{moment} {line['accuracy']:.1%}"


def _tables(
    features: Callable[[Tensor], Tensor], splits: tuple[Source, Source], run: Run, loading: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(features, labels) of the training and of the held-out images; each rank extracts its part of the images."""
    (bank, bank_labels, _), (queries, labels, _) = (_table(features, split, run, loading) for split in splits)
    return bank, bank_labels, queries, labels


def _table(
    features: Callable[[Tensor], Tensor], source: Source, run: Run, loading: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """(features, labels, indices) of a source; each rank extracts its part of the images."""
    return extract(features, source, run.image_size, part=(distributed.rank(), distributed.world_size()), **loading)


def _labelled_splits(run: Run, data: str | Sources | None) -> tuple[Source, Source]:
    """The images with labels of the training and of the held-out split.

    Raises:
        ValueError: a split has no labels; the sentence says which one.
    """
    name, splits = printable(run.data_name(data)), (run.source("train", data), run.source("test", data))
    parts = labelled(splits[0]), labelled(splits[1])
    if not any(map(len, parts)):
        raise ValueError(f"eval: {name} has no labels to compare with")
    for side, split, part in zip(("training", "held-out"), splits, parts):
        if not len(part):
            notes = "".join(f"; {note}" for note in getattr(split, "notes", ()))
            raise ValueError(
                f"eval: the {side} split of {name} has no labels to compare with, the other one has{notes}"
            )
        if len(part) < len(split) and distributed.rank() == 0:
            left_out = len(split) - len(part)
            print(f"eval: {left_out:,} of {len(split):,} images of the {side} split have no label and are left out")
    return parts


def _note(
    run: Run,
    step: int,
    evaluation: str,
    accuracy: float,
    data: str | Sources | None,
    results: dict[str, Any] | None = None,
    **facts: Any,
) -> None:
    """Appends a record to evaluations.jsonl on the first rank; facts that are None are left out."""
    if distributed.rank() > 0:
        return
    epochs = [line["epoch"] for line in run.metrics() if line["step"] == step]
    facts = {"data": run.data_name(data), "epoch": epochs[-1] if epochs else None, **facts}
    run.note(evaluation, step, accuracy, results, **{name: value for name, value in facts.items() if value is not None})


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 4)


def _label_facts(labels: float, seed: int) -> dict[str, Any]:
    """Fields of evaluations.jsonl that describe the choice of labels."""
    return {"labels": labels, "seed": None if labels == 1 else seed}


def _changes(default: Any, numbers: Any) -> dict[str, Any]:
    """Fields of a protocol that differ from its defaults."""
    return {name: value for name, (_, value) in differences((default,), (numbers,)).items()}


def _refuse_ranks(command: str) -> None:
    """Checks that the command runs in one process.

    Raises:
        ValueError: several processes were started together.
    """
    if launcher := distributed.launched_together():
        raise ValueError(f"{command} runs in one process: start it without {launcher}, as fastssl {command} RUN")


def _loading(run: Run, device: torch.device) -> dict[str, Any]:
    """How images are normalised, and device, workers and engine for loading them."""
    workers = share_cores(run.options.workers, device, distributed.local_world_size())
    engine = available_engine(run.options.engine, device)
    return {"device": device, "workers": workers, "engine": engine, **run.normalisation}
