"""Preparation of a run: whatever may be refused is refused here, before anything is written."""

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from fastssl import distributed
from fastssl.contract import Batch, PreparesEpochs, ReadsWeights, TrainingImages
from fastssl.data.augmentation import evaluation
from fastssl.data.fingerprint import Fingerprint, describe_changes, read_fingerprint, take_fingerprint
from fastssl.data.loader import Loader
from fastssl.data.source import Source
from fastssl.data.text import TextInput
from fastssl.data.token_table import TokenTable, build_table, with_captions
from fastssl.extras import MissingExtra, need
from fastssl.machine import available_engine, keep_freed_memory, select_engine, share_cores
from fastssl.run import Run, open_run
from fastssl.settings import flag
from fastssl.text import printable
from fastssl.train import checkpoint
from fastssl.train.epochs import continue_count
from fastssl.train.lock import Lock
from fastssl.train.parallel import check_sharding
from fastssl.train.trainer import Trainer
from fastssl.weights import load_initial_weights

WRITTEN = ("metrics.jsonl", "evaluations.jsonl", "checkpoints")  # what a run folder without config.json may not hold
TRAINING, HELD_OUT = "data.npz", "held-out.npz"  # files with the fingerprints of the two splits
T = TypeVar("T")


class Prepared(NamedTuple):
    """What a run trains with, made before anything is written."""

    source: Source
    test: Source
    method: torch.nn.Module
    loader: Loader
    state: dict[str, Any] | None  # checkpoint to continue from
    fingerprints: dict[str, Fingerprint]  # by the names of their files; on the first rank
    data_changes: list[str]  # how the images differ from those that the run was started with
    weight_changes: list[str]  # the same of weights that the method reads from other runs and files
    notes: tuple[str, ...]  # sentences on the captions


def on_all_ranks(check: Callable[[], T]) -> T:
    """The result of `check`; if it fails on a rank, its error is raised on every rank, so that none goes on alone."""
    result: Any = None
    error: Exception | None = None
    try:
        result = check()
    except (ValueError, OSError, MissingExtra) as caught:
        error = caught
    sentences = distributed.all_gather_object(None if error is None else str(error))
    if error is not None:
        raise error
    if failed := [sentence for sentence in sentences if sentence is not None]:
        raise ValueError(failed[0])
    return result


def prepare(
    run: Run, changes: dict[str, tuple[Any, Any]] | None, allow_changed_data: bool, device: torch.device
) -> Prepared:
    """Opens the data and builds the method and the loader. Writes nothing but cached tokens of captions."""
    options, training = run.options, run.config.training
    check_sharding(training, options.execution)
    if options.execution.tensorboard:
        need("tensorboard", what="--tensorboard", extra="train")
    if options.execution.wandb:
        need("wandb", what="--wandb", extra="wandb")
    workers = share_cores(options.workers, device, distributed.local_world_size())
    if device.type == "cpu":
        keep_freed_memory()
    state = None
    if changes is not None:
        run.metrics(), run.evaluations()  # names lines without a record; raises where these are no files
        state = _state_to_resume(run)
    source, test = run.source("train"), run.source("test")
    text = getattr(run.config, "text", None)
    if text is not None:
        source = with_captions(source)
        if options.execution.graph:  # it needs batches of one shape
            text = dataclasses.replace(text, trim=False)
    fingerprints, data_changes = {}, []
    if distributed.rank() == 0:
        fingerprints = {TRAINING: take_fingerprint(source, text is not None), HELD_OUT: take_fingerprint(test)}
        data_changes = _changes_of_data(run, changes, fingerprints, allow_changed_data)
    rows = getattr(run.config, "images", None)
    if rows is not None and rows < len(source):
        raise ValueError(
            f"pretrain: --images must be at least the number of training images, {len(source)}, got {rows}: the method "
            f"keeps a feature of each; start a new run (--folder)"
        )
    method = _build_method(run, state, device)
    weight_changes = []
    if isinstance(method, ReadsWeights) and distributed.rank() == 0:
        weight_changes = _changes_of_weights(run, method.checksums(), changes is None, allow_changed_data)
    chosen_now = changes is None or "engine" in changes
    engine = (select_engine if chosen_now else available_engine)(options.engine, device)
    tokens = _tokens(run, source, text) if text is not None else None
    loader = _loader(run, source, tokens, device, workers, engine)
    if isinstance(method, PreparesEpochs):
        method.check_images(len(source), len(loader) // training.accumulate * training.batch_size)
    count = continue_count(state, len(loader) // training.accumulate)
    if state and state["step"] > count.last_step(training.epochs):
        done, begun = count.place(state["step"])
        raise ValueError(
            f"pretrain: --epochs must be at least {done + (begun > 0)}, which {run.folder} has begun, got "
            f"{training.epochs}"
        )
    notes = () if tokens is None else tokens.notes()
    return Prepared(source, test, method, loader, state, fingerprints, data_changes, weight_changes, notes)


def _tokens(run: Run, source: Source, text: TextInput) -> TokenTable:
    """The token ids of the captions.

    Raises:
        ValueError: the method has embeddings of fewer tokens than there are.
    """
    tokens = build_table(source, text)
    vocabulary = getattr(run.config, "vocabulary", tokens.vocabulary)
    if vocabulary < tokens.vocabulary:
        raise ValueError(
            f"pretrain: --vocabulary must be at least {tokens.vocabulary:,}, the tokens of the tokenizer "
            f"{text.tokenizer}, got {vocabulary:,}"
        )
    return tokens


def claim_folder(run: Run, trainer: Trainer, lock: Lock, is_new: bool) -> None:
    """Creates and locks the folder of a new run, and checks that there is space for the checkpoints."""
    if distributed.rank() > 0:
        return
    folder = run.folder
    checkpoints = run.checkpoints
    if os.path.lexists(checkpoints) and not (checkpoints.is_dir() and os.access(checkpoints, os.W_OK)):
        raise ValueError(f"pretrain: {run.checkpoints} is no folder that can be written: move it away")
    _check_space(run, trainer)
    if not is_new:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"pretrain: {folder} cannot be created ({reason}): choose another --folder") from error
    lock.acquire()
    stored = stored_run(folder)  # another process may have trained here since the first look
    if stored is not None and stored.has_begun:
        raise ValueError(taken(folder))
    for name in ("evaluations.jsonl", "bad_files.txt"):  # of a start that made no step
        (folder / name).unlink(missing_ok=True)


def stored_run(folder: Path) -> Run | None:
    """The run in a folder, None if the folder is free.

    Raises:
        ValueError: the folder holds what a run writes but no config.json, or one of something else than a run.
    """
    if (folder / "config.json").exists():
        return open_run(folder)
    if written := [name for name in WRITTEN if os.path.lexists(folder / name)]:
        raise ValueError(
            f"pretrain: {folder} holds {written[0]} but no config.json: a new run would overwrite it; choose another "
            f"folder (--folder), or move it away"
        )
    return None


def taken(folder: Path) -> str:
    return (
        f"pretrain: {folder} has a run already: continue it (--resume {folder}, or --resume auto beside its original "
        f"options) or choose another folder (--folder)"
    )


def _state_to_resume(run: Run) -> dict[str, Any] | None:
    """The newest checkpoint; None where the run was stopped before its first one."""
    if checkpoint.files(run.checkpoints):
        return run.state(checkpoint.RESUMED)
    lines = run.metrics()
    every = run.options.execution.checkpoint_every
    has_had_one = lines and (lines[-1]["step"] > 2 * every if every else lines[-1]["epoch"] > 2)
    if has_had_one:
        raise ValueError(
            f"pretrain: {run.folder} has metrics up to step {lines[-1]['step']} and no checkpoint in "
            f"{run.checkpoints}: put its checkpoints back, or start a new run in another folder (--folder)"
        )
    return None


def _changes_of_data(
    run: Run, changes: dict[str, tuple[Any, Any]] | None, fingerprints: dict[str, Fingerprint], allowed: bool
) -> list[str]:
    """How the images differ from those that a resumed run was started with.

    Other held-out images change nothing that is learned: they are named only, because accuracies before and after
    cannot be compared.

    Raises:
        ValueError: the training images differ, and that is not allowed.
    """
    if changes is None:
        return []
    fingerprint = fingerprints[TRAINING]
    before, images = read_fingerprint(run.folder / TRAINING), len(fingerprint.hashes)
    if before is not None:
        found = describe_changes(before, fingerprint)
    else:  # a run of a version without fingerprints, or somebody removed it
        count = run.facts.get("images", images)
        print_once(f"{run.folder} has no data.npz: of its images only the number is compared with that at its start")
        found = [f"{images} images instead of {count}"] if count != images else []
    if found and not allowed:
        raise ValueError(
            f"pretrain: the images of {run.options.data} are not those that {run.folder} was started with: "
            f"{'; '.join(found)}; name the folder or file of the original ones (--data), or go on with these "
            f"(--allow-changed-data)"
        )
    held_out = read_fingerprint(run.folder / HELD_OUT)
    others = [] if held_out is None else describe_changes(held_out, fingerprints[HELD_OUT])
    return found + [f"held-out images: {change}" for change in others]


def _changes_of_weights(run: Run, checksums: dict[str, str], is_new: bool, allowed: bool) -> list[str]:
    """Which weights of other runs and files differ from those that a resumed run was started with; keeps their
    checksums in the run's facts.

    Raises:
        ValueError: weights differ, and that is not allowed.
    """
    changes = []
    for name, checksum in checksums.items():
        fact, option = f"{name} checksum", f"{flag(name)} {printable(getattr(run.config, name))}"
        if not is_new and fact not in run.facts:  # a run of a version without checksums
            print_once(
                f"{run.folder} has no checksum of {option}: its weights are not compared with those at its start"
            )
        elif not is_new and run.facts[fact] != checksum:
            changes.append(f"{option}: other weights")
            if not allowed:
                raise ValueError(
                    f"pretrain: the weights of {option} are not those that {run.folder} was started with: put these "
                    f"back there, or go on with the others (--allow-changed-data)"
                )
        run.facts[fact] = checksum
    return changes


def _build_method(run: Run, state: dict | None, device: torch.device) -> torch.nn.Module:
    """The method on its device, with equal weights on all ranks; later random numbers differ between ranks."""
    seed = run.options.seed
    torch.manual_seed(seed)
    method = run.build()
    if run.options.weights and state is None:
        for note in load_initial_weights(method, run.options.weights):
            print_once(note)
    if rank := distributed.rank():
        torch.manual_seed((seed + 0x9E3779B97F4A7C15 * rank) % 2**63)
    return method.to(device)


def _loader(
    run: Run, source: Source, tokens: TokenTable | None, device: torch.device, workers: int, engine: str
) -> Loader:
    """Loader of this rank's micro-batches."""
    options, training, world = run.options, run.config.training, distributed.world_size()
    if training.batch_size > len(source):
        raise ValueError(
            f"data: the batch of {training.batch_size} is larger than the data, which has {len(source)} images"
        )
    if training.batch_size % (world * training.accumulate):
        raise ValueError(
            f"pretrain: --batch-size must be divisible by {world} ranks times --accumulate "
            f"{training.accumulate}, got {training.batch_size}"
        )
    return Loader(
        source,
        dataclasses.replace(run.config.augmentation, reduced=not options.full_decode),
        training.batch_size // (world * training.accumulate),
        seed=options.seed,
        workers=workers,
        worker_kind=options.worker_kind,
        device=device,
        engine=engine,
        rank=distributed.rank(),
        world=world,
        bad_files=run.folder / "bad_files.txt",
        max_bad=options.max_bad,
        tokens=tokens,
    )


def training_images(run: Run, source: Source, loader: Loader, epoch: int) -> TrainingImages:
    """The images of an epoch for a method that prepares it."""
    rank, world = distributed.rank(), distributed.world_size()
    workers = share_cores(run.options.workers, loader.device, distributed.local_world_size())
    engine = available_engine(run.options.engine, loader.device)
    centre = 1.0 if source.size is not None and max(source.size) <= max(run.image_size) else 0.875

    def plain() -> Iterator[Batch]:
        options: dict[str, Any] = {"workers": workers, "engine": engine, "rank": rank, "world": world}
        views = evaluation(run.image_size, centre)
        return Loader(source, views, 256, device=loader.device, train=False, max_bad=world, **options).epoch(0)

    return TrainingImages(len(source), len(loader), functools.partial(loader.epoch, epoch), plain)


def _check_space(run: Run, trainer: Trainer) -> None:
    """Checks that the checkpoints to keep, and the one that is being written, fit on the disk."""
    slots = 2 if run.config.training.optimizer == "adamw" else 1  # tensors of optimizer state for each parameter
    model = sum(x.numel() * x.element_size() for x in (*trainer.method.parameters(), *trainer.method.buffers()))
    size = model + slots * sum(p.numel() * p.element_size() for p in trainer.method.parameters() if p.requires_grad)
    existing = next(path for path in (run.folder, *run.folder.absolute().parents) if path.exists())
    missing = max(1, run.options.execution.keep_last + 1 - len(checkpoint.files(run.checkpoints)))
    free = shutil.disk_usage(existing).free
    if free < missing * size:
        raise ValueError(
            f"pretrain: {run.folder} needs {_bytes(missing * size)} for {missing} checkpoints and its disk has "
            f"{_bytes(free)} free: choose another --folder or a smaller --keep-last"
        )


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 or not count else f"{count / 1e6:,.2f} MB"


def print_once(text: str) -> None:
    """Prints a line on the first rank."""
    if distributed.rank() == 0:
        print(printable(text), flush=True)
