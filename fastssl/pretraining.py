"""Pretraining: starts a run or resumes one. Both `fastssl.pretrain` and the command `fastssl pretrain` use it."""

import functools
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from fastssl import distributed
from fastssl.bounds import check_ranges
from fastssl.contract import Reconstructs
from fastssl.data.loader import Loader
from fastssl.data.source import Source
from fastssl.eval.reconstruction import first_images, save_snapshot
from fastssl.evaluation import note_knn
from fastssl.extras import need
from fastssl.machine import available_engine, facts, keep_freed_memory, select_device, select_engine, share_cores
from fastssl.run import (
    Options,
    Run,
    Sources,
    absolute_data,
    has_small_images,
    method_module,
    method_name_of,
    method_names,
    open_run,
    sources_name,
)
from fastssl.settings import differences, flag, update
from fastssl.train import checkpoint
from fastssl.train.loop import train
from fastssl.train.parallel import check_sharding
from fastssl.weights import load_weights, read_weights

CHANGEABLE = {  # settings that may change when a run is resumed; all others are fixed when it starts
    *("data", "workers", "engine", "device", "max_bad", "knn_every"),
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
    **settings: Any,
) -> Run:
    """Pretrains an encoder without labels and returns the run.

    ``pretrain("moco_v2", data="folder:photos", backbone="resnet18", epochs=10)`` starts a run,
    ``pretrain(resume="runs/moco_v2-folder", epochs=20)`` continues one.

    Args:
        method: a method of `fastssl.methods` (mae, moco_v1, moco_v2, moco_v3), the dotted name of your own module, or
            that module; fastssl/contract.py describes what it must define.
        data: source of images: digits, shapes, folder:PATH, webdataset:SHARDS, arrays:FILE, idx:PATH, cifar10:PATH,
            cifar100:PATH, package.module:ARGUMENT, or a pair of sources (training, held-out).
        preset: "paper" for the paper's numbers, "small" for minutes on a laptop; by default "small" where all images
            have one size of at most 64 pixels.
        folder: the run folder, runs/METHOD-DATA by default.
        resume: folder of a run to continue, without a method; or "auto": continue the run in `folder` if there is one,
            else start it, so that the same call can be repeated.
        settings: options by name, as the flags of `fastssl pretrain METHOD --help`: fields of `run.Options`, the
            method's `Config`, `train.config.Training` and `train.config.Execution`. A resumed run accepts only those
            in `CHANGEABLE`, not for instance batch size, learning rate, seed or the method's own.

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
        return resume_run(run, data, settings)
    if method is None:
        raise ValueError(f"pretrain: a method is needed: {', '.join(method_names())}")
    if data is None:
        raise ValueError("pretrain: data is needed, such as folder:PATH, shapes or digits")
    run = new_run(method, data, preset, settings.get("backbone"))
    options, config = update((run.options, run.config), settings, "pretrain")
    if folder is not None:
        options.folder = Path(folder)
    return start(replace_options(run, options, config), resume)


def new_run(
    method: str | ModuleType, data: str | Sources, preset: str | None = None, backbone: str | None = None
) -> Run:
    """A run with the defaults of a preset. Its folder is not written yet."""
    name = method_name_of(method)
    module = method_module(name)
    options = Options(absolute_data(data) if isinstance(data, str) else sources_name(data))
    run = Run(default_folder(name, options.data), name, options, None)
    if not isinstance(data, str):
        run.keep_sources(data)
    preset, run.config = preset_config(module, run.source("train"), preset, backbone)
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
    changed = Run(options.folder or run.folder, run.method_name, options, config, run.facts)
    changed._sources = run._sources
    return changed


def check_method(run: Run, method_name: str | None) -> None:
    """Checks that a run folder belongs to the method, if one is named."""
    if method_name not in (None, run.method_name):
        raise ValueError(f"pretrain: {run.folder} is a run of {run.method_name}, not of {method_name}")


def start(run: Run, resume: str | Path | None = None) -> Run:
    """Starts a new run; with "auto" continues the one in its folder, if there is one."""
    _check_numbers(run.options, run.config)
    if not (run.folder / "config.json").exists():
        return _join_ranks_and_train(run)
    if resume is None or str(resume) != "auto":
        raise ValueError(
            f"pretrain: {run.folder} has a run already: continue it (--resume {run.folder}, or --resume auto beside "
            f"its original options) or choose another folder (--folder)"
        )
    stored = open_run(run.folder)
    check_method(stored, run.method_name)
    stored._sources = run._sources
    return _resume(stored, run.options, run.config, "--resume auto takes the original options")


def resume_run(run: Run, data: str | Sources | None = None, settings: dict[str, Any] | None = None) -> Run:
    """Continues a run from its newest checkpoint, with some options changed."""
    if "folder" in (settings or {}):
        raise ValueError(f"pretrain: folder belongs to a new run, got {settings['folder']} beside resume={run.folder}")
    options, config = update((run.options, run.config), settings or {}, "pretrain")
    if data is not None:
        options.data = run.data_name(data)
        if not isinstance(data, str):
            run.keep_sources(data)
    return _resume(run, options, config, "start a new run (--folder)")


def _resume(run: Run, options: Options, config: Any, remedy: str) -> Run:
    """Continues `run` with other options; prints each option that changed."""
    changes = differences((run.options, run.config), (options, config))
    changes.pop("folder", None)  # the folder may have been moved
    for name, (old, new) in changes.items():
        if name not in CHANGEABLE:
            raise ValueError(
                f"pretrain: {run.folder} is a run with {flag(name)} {old}, which cannot change to {new} when it is "
                f"resumed: {remedy}"
            )
    _check_numbers(options, config)
    options.folder = run.options.folder
    resumed = replace_options(run, options, config)
    resumed.folder = run.folder
    return _join_ranks_and_train(resumed, changes)


def _check_numbers(options: Options, config: Any) -> None:
    """Checks numbers and choices against their annotations; the method's `build` checks the rest."""
    check_ranges(options, "pretrain")
    check_ranges(config, "pretrain")
    _ = config.augmentation  # its views check their sizes, of which the model is built
    config.training.check("pretrain")


def _join_ranks_and_train(run: Run, changes: dict[str, tuple[Any, Any]] | None = None) -> Run:
    """Trains a new run, or a resumed one with the `changes` to its options, on all ranks."""
    device = distributed.setup(select_device(run.options.device))
    try:
        _train(run, changes, device)
    except RuntimeError as error:
        if distributed.is_peer_failure(error):
            raise ValueError(
                f"pretrain: rank {distributed.rank()} of {distributed.world_size()} lost the connection to another "
                f"rank; checkpoints are intact, continue with: --resume {run.folder}"
            ) from error
        raise
    return run


def _train(run: Run, changes: dict[str, tuple[Any, Any]] | None, device: torch.device) -> None:
    """Trains and evaluates. All settings are checked before anything is written."""
    options, training = run.options, run.config.training
    check_sharding(training, options.execution)
    if options.execution.tensorboard:
        need("tensorboard", what="--tensorboard", extra="train")
    if options.execution.wandb:
        need("wandb", what="--wandb", extra="wandb")
    workers = share_cores(options.workers, device, distributed.local_world_size())
    if device.type == "cpu":
        keep_freed_memory()
    state = run.state() if checkpoint.files(run.checkpoints) else None
    source = run.source("train")
    method = _build_method(run, state, device)
    chosen_now = changes is None or "engine" in changes
    engine = (select_engine if chosen_now else available_engine)(options.engine, device)
    loader = _loader(run, source, device, workers, engine)
    steps = len(loader) // training.accumulate
    test = run.source("test")
    _check_resumable(run, source, state, steps)
    distributed.all_gather_object(None)  # no rank writes before all have checked
    if changes is None:
        _announce_start(run, source, test)
    else:
        _announce_resume(run, state, changes)
    evaluate = functools.partial(_evaluate, run, method, device, test, steps)
    if state is None:
        evaluate(0)
    train(
        method,
        run.method_name,
        loader.epoch,
        steps,
        training,
        options.execution,
        run.folder,
        resume=state,
        after_epoch=lambda epoch: _is_due(options, training, epoch) and evaluate(epoch),
        parameter_groups=getattr(method_module(run.method_name), "parameter_groups", None),
    )
    if loader.bad_count:
        print(f"{loader.bad_count} of {len(source)} images could not be decoded: see {run.folder / 'bad_files.txt'}")
    evaluate(training.epochs)
    _print(f"done: {run.folder} · fastssl report {run.folder}")


def _check_resumable(run: Run, source: Source, state: dict | None, steps_per_epoch: int) -> None:
    """Checks that a resumed run has the images it was started with, and has not passed its new last epoch."""
    images, epochs = run.facts.get("images", len(source)), run.config.training.epochs
    if images != len(source):
        raise ValueError(
            f"pretrain: {run.folder} was started with {images} images and {run.options.data} has {len(source)}: a run "
            f"is resumed with the same images"
        )
    if state and state["step"] > epochs * steps_per_epoch:
        done = -(-state["step"] // steps_per_epoch)
        raise ValueError(f"pretrain: --epochs must be at least {done}, which {run.folder} has begun, got {epochs}")


def _announce_start(run: Run, source: Source, test: Source) -> None:
    """Writes the run folder and prints what is trained."""
    run.facts["images"] = len(source)
    if distributed.rank() == 0:
        run.folder.mkdir(parents=True, exist_ok=True)
        run.save()
    training, held_out = run.config.training, len(test) if source.classes is not None else 0
    _print(
        f"{run.method_name} on {run.options.data}, preset `{run.facts.get('preset')}`: {training.epochs} epochs of "
        f"{len(source)} images ({held_out} held-out images for kNN), batch {training.batch_size}"
        f"{_parts(training.accumulate)} → {run.folder}"
    )


def _announce_resume(run: Run, state: dict | None, changes: dict[str, tuple[Any, Any]]) -> None:
    """Writes the changed options to config.json and prints one line for each."""
    step, world = state["step"] if state else 0, distributed.world_size()
    _print(f"{run.method_name} on {run.options.data}: resuming after step {step} of {run.folder}")
    lines = [f"{flag(name)}: {old} -> {new}" for name, (old, new) in changes.items()]
    if changes:
        history = [run.facts["changed"]] if "changed" in run.facts else []
        run.facts["changed"] = "; ".join([*history, f"after step {step}: {', '.join(lines)}"])
        if distributed.rank() == 0:
            run.save()
    for name, line in zip(changes, lines):
        schedule = f" (schedules are those of {run.config.training.epochs} epochs from here on)"
        _print(line + schedule * (name == "epochs"))
    if state and len(state["random"]) != world:
        _print(
            f"the number of ranks changes from {len(state['random'])} to {world}: same images in the same order, but "
            f"sums and shuffles differ, so that results are not bit-equal to those of an uninterrupted run"
        )


def _build_method(run: Run, state: dict | None, device: torch.device) -> torch.nn.Module:
    """The method on its device, with equal weights on all ranks; later random numbers differ between ranks."""
    seed = run.options.seed
    torch.manual_seed(seed)
    method = run.build()
    if run.options.weights and state is None and _start_from(method, run.options.weights):
        _print(f"{run.options.weights} has an encoder only: the decoder starts from random weights")
    if rank := distributed.rank():
        torch.manual_seed((seed + 0x9E3779B97F4A7C15 * rank) % 2**63)
    return method.to(device)


def _start_from(method: torch.nn.Module, path: Path) -> bool:
    """Loads initial weights; returns True if the file has only the encoder of a MAE."""
    has_decoder = any(name.startswith("decoder_") for name in method.state_dict())
    encoder_only = has_decoder and not any(name.startswith("decoder_") for name in read_weights(path))
    load_weights(method, path, encoder_only=encoder_only)
    return encoder_only


def _loader(run: Run, source: Source, device: torch.device, workers: int, engine: str) -> Loader:
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
        run.config.augmentation,
        training.batch_size // (world * training.accumulate),
        seed=options.seed,
        workers=workers,
        device=device,
        engine=engine,
        rank=distributed.rank(),
        world=world,
        bad_files=run.folder / "bad_files.txt",
        max_bad=options.max_bad,
    )


def _is_due(options: Options, training, epoch: int) -> bool:
    """True if this epoch is followed by an evaluation; the last epoch is not counted, as it always has one."""
    return bool(options.knn_every) and epoch % options.knn_every == 0 and epoch < training.epochs


def _evaluate(run: Run, method, device: torch.device, test: Source, steps_per_epoch: int, epoch: int) -> None:
    """Notes the kNN accuracy and, for a method that reconstructs, writes reconstructions. All ranks call together."""
    if run.options.execution.shard:
        _print("with --shard there is no kNN evaluation during the run: fastssl eval knn evaluates its checkpoints")
        return
    distributed.broadcast_buffers(method)
    note_knn(run, method, epoch * steps_per_epoch, epoch, device)
    if isinstance(method, Reconstructs) and distributed.rank() == 0:
        images = first_images(test, run.image_size).to(device)
        save_snapshot(method, images, run.folder / "reconstructions" / f"step-{epoch * steps_per_epoch:06d}.npz")


def _parts(accumulate: int) -> str:
    """Text with the numbers of ranks and micro-batches that share a step."""
    world = distributed.world_size()
    parts = [f"{world} ranks"] * (world > 1) + [f"{accumulate} micro-batches"] * (accumulate > 1)
    return f" over {' and '.join(parts)}" if parts else ""


def _print(text: str) -> None:
    """Prints on the first rank."""
    if distributed.rank() == 0:
        print(text, flush=True)
