"""Pretraining: starts a run or resumes one. Both `fastssl.pretrain` and the command `fastssl pretrain` use it."""

import contextlib
import functools
import secrets
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from fastssl import distributed
from fastssl.bounds import check_ranges
from fastssl.contract import Autoencodes, PreparesEpochs, Reconstructs, TrainingImages
from fastssl.data.source import Source
from fastssl.data.split import describe_sides
from fastssl.eval.labels import labelled
from fastssl.eval.reconstruction import first_images, save_snapshot
from fastssl.evaluation import note_knn
from fastssl.machine import facts, select_device
from fastssl.method_modules import has_small_images, method_module, method_name_of, method_names
from fastssl.milestones import adopt, check_milestones, describe_scaled, milestone_epochs, shorten
from fastssl.preparation import claim_folder, on_all_ranks, prepare, print_once, stored_run, taken, training_images
from fastssl.run import Options, Run, Sources, absolute_data, open_run, sources_name
from fastssl.settings import differences, flag, update
from fastssl.text import printable
from fastssl.train.lock import Lock
from fastssl.train.loop import train
from fastssl.train.trainer import Trainer

CHANGEABLE = {  # settings that may change when a run is resumed; all others are fixed when it starts
    *("data", "workers", "worker_kind", "engine", "device", "max_bad", "knn_every"),
    *("epochs", "shard", "recompute", "compile", "graph", "max_skipped"),
    *("log_every", "checkpoint_every", "keep_last", "keep_every", "profile", "tensorboard", "wandb"),
}
PRESETS = ("small", "paper")


def pretrain(
    method: str | ModuleType | None = None,
    data: str | Sources | None = None,
    *,
    preset: Literal["small", "paper"] | None = None,
    folder: str | Path | None = None,
    resume: str | Path | None = None,
    allow_changed_data: bool = False,
    **settings: Any,
) -> Run:
    """Pretrains an encoder without labels and returns the run.

    ``pretrain("moco_v2", data="folder:photos", backbone="resnet18", epochs=10)`` starts a run,
    ``pretrain(resume="runs/moco_v2-folder", epochs=20)`` continues one.

    Args:
        method: a method of `fastssl.methods`, such as dino or mae, the dotted name of your own module, or
            that module; fastssl/contract.py describes what it must define.
        data: source of images: patterns, digits, captions, folder:PATH, webdataset:SHARDS, csv:FILE, arrays:FILE,
            idx:PATH, cifar10:PATH, package.module:ARGUMENT and others, or a pair of sources (training, held-out).
        preset: "paper" for the paper's numbers, "small" for minutes on a laptop; by default "small" where all images
            have one size of at most 64 pixels.
        folder: the run folder, runs/METHOD-DATA by default.
        resume: folder of a run to continue, without a method; or "auto": continue the run in `folder` if there is one,
            else start it, so that the same call can be repeated.
        allow_changed_data: resume although images or labels have changed since the run was started; it continues at the
            same share of the same epoch.
        settings: options by name, as the flags of `fastssl pretrain METHOD --help`: fields of `run.Options`, the
            method's `Config`, `train.config.Training` and `train.config.Execution`. A resumed run accepts only those
            in `CHANGEABLE`, not for instance batch size, learning rate, seed or the method's own. With fewer `epochs`
            than the preset, its milestones (warm-up, learning-rate drops, end of freezing) are scaled in proportion,
            unless they are given.

    Raises:
        ValueError: a setting is unknown, ambiguous, out of range or cannot be changed, the data or method cannot be
            opened, or the folder has a run already.
        Interrupted: SIGTERM or SIGUSR1 arrived; the state is saved.
    """
    if resume is not None and str(resume) != "auto":
        for name, value in (("preset", preset), ("folder", folder)):
            if value is not None:
                raise ValueError(f"pretrain: {name} belongs to a new run, got {value} beside resume={resume}")
        run = open_run(resume)
        check_method(run, None if method is None else method_name_of(method))
        return resume_run(run, data, settings, allow_changed_data)
    if method is None:
        raise ValueError(f"pretrain: a method is needed: {', '.join(method_names())}")
    if data is None:
        raise ValueError("pretrain: data is needed, such as folder:PATH, patterns or digits")
    run = new_run(method, data, preset, settings.get("backbone"))
    preset_numbers, numbers = run.config, shorten(run.config, settings.get("epochs"))
    options, config = update((run.options, numbers), settings, "pretrain")
    if folder is not None:
        options.folder = Path(folder)
    return start(replace_options(run, options, config), resume, preset_numbers, allow_changed_data)


def new_run(
    method: str | ModuleType, data: str | Sources, preset: str | None = None, backbone: str | None = None
) -> Run:
    """A run with the defaults of a preset. Its folder is not written yet."""
    name = method_name_of(method)
    module = method_module(name)
    options = Options(absolute_data(data) if isinstance(data, str) else sources_name(data))
    run = Run(default_folder(name, options.data), name, options, None, id=secrets.token_hex(8))
    if not isinstance(data, str):
        run.keep_sources(data)
    preset, run.config = preset_config(module, run.source("train"), preset, backbone)
    if getattr(run.config, "images", 0) is None:
        run.config.images = len(run.source("train"))
    run.facts = {"preset": preset, **facts()}
    return run


def preset_config(
    module: ModuleType, source: Source | None, preset: str | None = None, backbone: str | None = None
) -> tuple[str, Any]:
    """(preset, the method's configuration): by default "small" for small images, else "paper"."""
    preset = preset or ("small" if source is not None and has_small_images(source) else "paper")
    if preset not in PRESETS:
        raise ValueError(f"pretrain: --preset must be small or paper, got {preset!r}")
    if preset == "small":
        return preset, module.Config.small()
    backbones = (backbone,) if backbone else ()  # the paper's numbers may depend on it
    return preset, module.Config.paper(*backbones)


def default_folder(method_name: str, data: str) -> Path:
    """runs/METHOD-DATA, without packages and arguments."""
    source = data.partition(":")[0].rpartition(".")[2]
    return Path("runs", f"{method_name.rpartition('.')[2]}-{source}")


def replace_options(run: Run, options: Options, config: Any) -> Run:
    """A copy of the run with other options; it shares the opened sources."""
    changed = Run(options.folder or run.folder, run.method_name, options, config, run.facts, run.id)
    changed._sources = run._sources
    return changed


def check_method(run: Run, method_name: str | None) -> None:
    """Checks that a run folder belongs to the method, if one is named."""
    if method_name not in (None, run.method_name):
        raise ValueError(f"pretrain: {run.folder} is a run of {run.method_name}, not of {method_name}")


def start(run: Run, resume: str | Path | None = None, preset: Any = None, allow_changed_data: bool = False) -> Run:
    """Starts a new run; with "auto" continues the one in its folder, if there is one.

    Args:
        run: a run whose folder may not be written yet.
        resume: "auto" or None.
        preset: the preset's configuration, from which the run's milestones may have been scaled.
        allow_changed_data: continue although images or labels have changed.
    """
    preset = run.config if preset is None else preset
    _check_numbers(run.options, run.config)
    stored = stored_run(run.folder)
    if stored is None or not stored.has_begun:
        if scaled := describe_scaled(preset, run.config):
            run.facts["milestones"] = scaled
        return _join_ranks_and_train(run)
    if resume is None or str(resume) != "auto":
        raise ValueError(taken(run.folder))
    check_method(stored, run.method_name)
    stored._sources = run._sources
    config = adopt(run.config, preset, stored.config)
    return _resume(stored, run.options, config, "--resume auto takes the original options", allow_changed_data)


def resume_run(
    run: Run,
    data: str | Sources | None = None,
    settings: dict[str, Any] | None = None,
    allow_changed_data: bool = False,
) -> Run:
    """Continues a run from its newest checkpoint, with some options changed."""
    if "folder" in (settings or {}):
        raise ValueError(f"pretrain: folder belongs to a new run, got {settings['folder']} beside resume={run.folder}")
    options, config = update((run.options, run.config), settings or {}, "pretrain")
    if data is not None:
        options.data = run.data_name(data)
        if not isinstance(data, str):
            run.keep_sources(data)
    return _resume(run, options, config, "start a new run (--folder)", allow_changed_data)


def _resume(run: Run, options: Options, config: Any, remedy: str, allow_changed_data: bool) -> Run:
    """Continues `run` with other options; prints each option that changed."""
    _check_ranges(options, config)
    changes = differences((run.options, run.config), (options, config))
    changes.pop("folder", None)  # the folder may have been moved
    for name, (old, new) in changes.items():
        if name not in CHANGEABLE:
            raise ValueError(
                f"pretrain: {run.folder} is a run with {flag(name)} {printable(old)}, which cannot change to "
                f"{printable(new)} when it is resumed: {remedy}"
            )
    latest = max((max(values, default=0) for values in milestone_epochs(config).values()), default=0)
    if "epochs" in changes and 0 < config.training.epochs <= latest:
        raise ValueError(
            f"pretrain: --epochs must be above {latest:g}, a milestone of the schedules of {run.folder} "
            f"({_milestone_text(config)}), got {config.training.epochs}"
        )
    _check_numbers(options, config)
    options.folder = run.options.folder
    resumed = replace_options(run, options, config)
    resumed.folder = run.folder
    return _join_ranks_and_train(resumed, changes, allow_changed_data)


def _milestone_text(config: Any) -> str:
    given = {name: values for name, values in milestone_epochs(config).items() if any(values)}
    return ", ".join(f"{flag(name)} {' '.join(f'{value:g}' for value in values)}" for name, values in given.items())


def _check_ranges(options: Options, config: Any) -> None:
    """Checks each number and choice by itself."""
    check_ranges(options, "pretrain")
    check_ranges(config, "pretrain")


def _check_numbers(options: Options, config: Any) -> None:
    """Checks numbers and choices against their annotations; the method's `build` checks the rest."""
    _check_ranges(options, config)
    _ = config.augmentation  # its views check their sizes, of which the model is built
    config.training.check("pretrain")
    check_milestones(config, "pretrain")


@distributed.group_scope()
def _join_ranks_and_train(
    run: Run, changes: dict[str, tuple[Any, Any]] | None = None, allow_changed_data: bool = False
) -> Run:
    """Trains a new run, or a resumed one with the `changes` to its options, on all ranks."""
    device = distributed.setup(select_device(run.options.device))
    try:
        with contextlib.closing(Lock(run.folder)) as lock:
            _train(run, changes, allow_changed_data, device, lock)
    except RuntimeError as error:
        if distributed.is_peer_failure(error):
            raise ValueError(
                f"pretrain: rank {distributed.rank()} of {distributed.world_size()} lost the connection to another "
                f"rank; checkpoints are intact, continue with: --resume {run.folder}"
            ) from error
        raise
    return run


def _train(
    run: Run, changes: dict[str, tuple[Any, Any]] | None, allow_changed_data: bool, device: torch.device, lock: Lock
) -> None:
    """Trains and evaluates. Whatever may be refused is refused before anything is written."""
    training, is_new = run.config.training, changes is None
    if not is_new:
        on_all_ranks(lambda: distributed.rank() == 0 and lock.acquire())
    prepared = on_all_ranks(lambda: prepare(run, changes, allow_changed_data, device))
    source, test, method, loader, state, fingerprints, data_changes, weight_changes, text_notes = prepared
    trainer = Trainer(
        method,
        training,
        run.options.execution,
        len(loader) // training.accumulate,
        parameter_groups=getattr(method_module(run.method_name), "parameter_groups", None),
        state=state,
    )
    on_all_ranks(lambda: claim_folder(run, trainer, lock, is_new))
    for name, fingerprint in fingerprints.items():
        if is_new or data_changes or not (run.folder / name).exists():
            fingerprint.write(run.folder / name)
    if changes is None:
        _announce_start(run, source, test)
    else:
        _announce_resume(run, trainer, state, changes, data_changes, weight_changes)
    notes = dict.fromkeys(note for split in (source, test) for note in getattr(split, "notes", ()))
    sides = describe_sides({"training": source.classes is not None, "held-out": test.classes is not None})
    for note in (*notes, *sides, *text_notes):
        print_once(note)
    run.id = distributed.all_gather_object(run.id)[0]  # the first rank's, which is in config.json
    evaluate = functools.partial(_evaluate, run, trainer, device, test)
    if state is None:
        evaluate(0)
    train(
        trainer,
        run.method_name,
        loader.epoch,
        run.folder,
        run_id=run.id,
        before_epoch=lambda epoch: _prepare_epoch(trainer, training_images(run, source, loader, epoch)),
        after_epoch=lambda epoch: _is_due(run.options, training, epoch) and evaluate(epoch),
    )
    if loader.bad_count:
        print(f"{loader.bad_count} of {len(source)} images could not be decoded: see {run.folder / 'bad_files.txt'}")
    evaluate(training.epochs)
    distributed.all_gather_object(None)  # no rank returns before the first has written everything
    print_once(f"done: {run.folder} · fastssl report {run.folder}")


def _announce_start(run: Run, source: Source, test: Source) -> None:
    """Writes config.json and prints what is trained."""
    run.facts["images"] = len(source)
    if distributed.rank() == 0:
        run.save()
    training, held_out = run.config.training, len(labelled(test)) if len(labelled(source)) else 0
    print_once(
        f"{run.method_name} on {run.options.data}, preset `{run.facts.get('preset')}`: {training.epochs} epochs of "
        f"{len(source)} images ({held_out} held-out images for kNN), batch {training.batch_size}"
        f"{_parts(training.accumulate)} → {run.folder}"
    )
    if scaled := run.facts.get("milestones"):
        print_once(scaled)


def _announce_resume(
    run: Run,
    trainer: Trainer,
    state: dict | None,
    changes: dict[str, tuple[Any, Any]],
    data_changes: list[str],
    weight_changes: list[str],
) -> None:
    """Writes the changed options to config.json and prints one line for each."""
    step, world = trainer.steps, distributed.world_size()
    print_once(
        f"{run.method_name} on {run.options.data}: resuming after step {step} (epoch {trainer.count.epochs(step):.4g}) "
        f"of {run.folder}"
    )
    lines = [f"{flag(name)}: {old} -> {new}" for name, (old, new) in changes.items()]
    lines += [f"data: {change}" for change in data_changes] + weight_changes
    if distributed.rank() == 0 and (lines or not run.id):
        if lines:
            history = [run.facts["changed"]] if "changed" in run.facts else []
            run.facts["changed"] = "; ".join([*history, f"after step {step}: {', '.join(lines)}"])
        if "data" in changes and not data_changes:  # evaluations before and after are on the same images
            run.facts["moved_from"] = [*run.facts.get("moved_from", []), changes["data"][0]]
        run.id = run.id or secrets.token_hex(8)
        run.facts["images"] = len(run.source("train"))
        run.save()
    for line in lines:
        schedule = f" (schedules are those of {run.config.training.epochs} epochs from here on)"
        print_once(line + schedule * line.startswith("--epochs:"))
    if state and len(state["random"]) != world:
        print_once(
            f"the number of ranks changes from {len(state['random'])} to {world}: same images in the same order, but "
            f"sums and shuffles differ, so that results are not bit-equal to those of an uninterrupted run"
        )


def _is_due(options: Options, training, epoch: int) -> bool:
    """True if this epoch is followed by an evaluation; the last epoch is not counted, as it always has one."""
    return bool(options.knn_every) and epoch % options.knn_every == 0 and epoch < training.epochs


def _prepare_epoch(trainer: Trainer, images: TrainingImages) -> None:
    """Calls the method's hook between epochs, if it has one, with the precision of its training."""
    if isinstance(trainer.method, PreparesEpochs):
        with torch.autocast(trainer.device.type, trainer.dtype, trainer.dtype is not None):
            trainer.method.before_epoch(images)


def _evaluate(run: Run, trainer: Trainer, device: torch.device, test: Source, epoch: int) -> None:
    """Notes the kNN accuracy and, for a method that reconstructs, writes reconstructions. All ranks call together."""
    if run.options.execution.shard:
        print_once("with --shard there is no kNN evaluation during the run: fastssl eval knn evaluates its checkpoints")
        return
    method = trainer.method
    distributed.broadcast_buffers(method)
    note_knn(run, method, trainer.steps, epoch, device)
    if isinstance(method, Reconstructs | Autoencodes) and distributed.rank() == 0:
        images = first_images(test, run.image_size, **run.normalisation).to(device)
        path = run.folder / "reconstructions" / f"step-{trainer.steps:06d}.npz"
        save_snapshot(method, images, path, **run.normalisation)


def _parts(accumulate: int) -> str:
    """Text with the numbers of ranks and micro-batches that share a step."""
    world = distributed.world_size()
    parts = [f"{world} ranks"] * (world > 1) + [f"{accumulate} micro-batches"] * (accumulate > 1)
    return f" over {' and '.join(parts)}" if parts else ""
