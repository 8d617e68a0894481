"""`fastssl pretrain`: begins a run or goes on with one."""

import dataclasses
import functools
from pathlib import Path

import torch
import tyro

from fastssl import distributed
from fastssl.bounds import check_ranges
from fastssl.cli_eval import value_of, write_knn
from fastssl.data.loader import Loader
from fastssl.data.source import Source, open_source
from fastssl.eval.reconstruction import first_images, save_snapshot
from fastssl.machine import device_named, engine_named, engine_there, facts, keep_memory, share_cores
from fastssl.run import Options, Run, method_module, method_names, open_run
from fastssl.train import checkpoint
from fastssl.train.loop import train
from fastssl.train.parallel import check_sharding
from fastssl.weights import load_weights, read_weights


def pretrain(words: list[str]) -> None:
    """fastssl pretrain METHOD --data SOURCE [options] [--resume auto] | fastssl pretrain [METHOD] --resume RUN"""
    method_name = None if words[0].startswith("-") else words[0]
    rest = words[1:] if method_name else words
    resume = value_of("--resume", rest)
    if resume != "auto" and any(word.split("=")[0] == "--resume" for word in rest):
        run, begin = _resumed(rest, method_name, resume), False
    else:
        run = _asked(rest, method_name)
        begin = not (run.folder / "config.json").exists()
        if not begin:
            run = _same(run, resume)
    device = distributed.setup(device_named(run.options.device))
    try:
        _pretrain(run, begin, device)
    except RuntimeError as error:
        if distributed.is_peer_failure(error):
            raise ValueError(
                f"pretrain: rank {distributed.rank()} of {distributed.world_size()} lost another one; checkpoints are "
                f"intact, go on with: --resume {run.folder}"
            ) from error
        raise
    finally:
        distributed.shutdown()


def _asked(words: list[str], method_name: str | None) -> Run:
    """The run that the words ask for; nothing is written."""
    if method_name is None:
        raise ValueError(f"pretrain: name a method: {', '.join(method_names())}")
    module = method_module(method_name)
    data = value_of("--data", words)
    source = open_source(data) if data is not None else None
    small = source is not None and source.size is not None and max(source.size) <= 64
    chosen = value_of("--preset", words) or ("small" if small else "paper")
    if chosen not in ("small", "paper"):
        raise ValueError(f"pretrain: --preset must be small or paper, got {chosen!r}")
    backbone = value_of("--backbone", words)
    paper = module.Config.paper(backbone) if backbone else module.Config.paper()  # its numbers may depend on it
    default = module.Config.small() if chosen == "small" else paper

    @dataclasses.dataclass
    class Flags:
        options: Options
        config: module.Config = dataclasses.field(default_factory=lambda: default)
        preset: str = chosen
        """paper: its numbers; small: minutes on a laptop, the default for sources of fixed size up to 64 pixels"""
        resume: str | None = None
        """auto: go on with the run if its folder holds one, else begin it, so that a command can be given again; or a
        run's folder, and no other option beside it"""

    Flags.__doc__ = f"{module.Config.__doc__}\n\nDefaults below are those of the preset `{chosen}`."
    flags = tyro.cli(tyro.conf.OmitArgPrefixes[Flags], args=words, prog=f"fastssl pretrain {method_name}")
    options, config = flags.options, flags.config
    _check_numbers(options, config)
    folder = options.folder or Path("runs", f"{method_name}-{options.data.split(':')[0]}")
    return Run(folder, method_name, options, config, {"preset": chosen, **facts()})


def _same(asked: Run, resume: str | None) -> Run:
    """The run in the folder, which must be the one that was asked for."""
    if resume != "auto":
        raise ValueError(
            f"pretrain: {asked.folder} holds a run already: go on with it (--resume {asked.folder}, or --resume auto "
            f"beside the options it was begun with) or name another (--folder)"
        )
    run = open_run(asked.folder)
    for mine, theirs in ((asked.options, run.options), (asked.config, run.config)):
        for name, value in _flat(dataclasses.asdict(mine)).items():
            known = _flat(dataclasses.asdict(theirs)).get(name)
            if value != known and name not in ("device", "workers", "folder"):
                raise ValueError(
                    f"pretrain: {asked.folder} is a run with {_flag(name)} {known}, not {value}: --resume auto needs "
                    f"the options it was begun with"
                )
    if asked.method_name != run.method_name:
        raise ValueError(f"pretrain: {run.folder} is a run of {run.method_name}, not of {asked.method_name}")
    return run


def _flat(values: dict) -> dict:
    inner = {name: v for value in values.values() if isinstance(value, dict) for name, v in value.items()}
    return {**{name: value for name, value in values.items() if not isinstance(value, dict)}, **inner}


def _check_numbers(options: Options, config) -> None:
    """Check numbers and choices against their annotations; the method's `build` checks the rest."""
    check_ranges(options, "pretrain")
    check_ranges(config, "pretrain")
    config.training.check("pretrain")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _resumed(words: list[str], method_name: str | None, folder: str | None) -> Run:
    if words not in (["--resume", folder], [f"--resume={folder}"]):
        raise ValueError("pretrain: --resume RUN takes every option from the run, and no other beside it")
    run = open_run(Path(folder))
    if method_name not in (None, run.method_name):
        raise ValueError(f"pretrain: {run.folder} is a run of {run.method_name}, not of {method_name}")
    return run


def _pretrain(run: Run, begin: bool, device: torch.device) -> None:
    """All that may be refused is refused before anything is written."""
    options, training, world = run.options, run.config.training, distributed.world_size()
    check_sharding(training, options.execution)
    workers = share_cores(options.workers, device, distributed.local_world_size())
    if device.type == "cpu":
        keep_memory()
    state = run.state() if checkpoint.files(run.checkpoints) else None
    source = open_source(options.data)
    method = _built(run, state, device)
    engine = (engine_named if begin else engine_there)(options.engine, device)
    loader = _loader(run, source, device, workers, engine)
    others = len(open_source(options.data, "test")) if source.classes is not None else 0
    steps = len(loader) // training.accumulate
    if begin:
        distributed.all_gather_object(None)  # none writes before all have looked
        if distributed.rank() == 0:
            run.folder.mkdir(parents=True, exist_ok=True)
            run.save()
        _say(
            f"{run.method_name} on {options.data} with the preset `{run.facts['preset']}`: {training.epochs} epochs "
            f"of {len(source)} images ({others} others for kNN), batch {training.batch_size}"
            f"{_shares(training.accumulate)} → {run.folder}"
        )
    else:
        step = state["step"] if state else 0
        _say(f"{run.method_name} on {options.data}: going on after step {step} of {run.folder}")
        if state and len(state["random"]) != world:
            _say(
                f"the run was on {len(state['random'])} ranks and is on {world} now: the same images in the same "
                f"order, other sums and shuffles: no longer bit for bit the run that it would have been"
            )
    evaluate = functools.partial(_evaluate, run, method, device, open_source(options.data, "test"), steps)
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
        after_epoch=lambda epoch: _due(options, training, epoch) and evaluate(epoch),
        parameter_groups=getattr(method_module(run.method_name), "parameter_groups", None),
    )
    if loader.bad_count:
        print(f"{loader.bad_count} of {len(source)} images could not be decoded: see {run.folder / 'bad_files.txt'}")
    evaluate(training.epochs)
    _say(f"done: {run.folder} · fastssl report {run.folder}")


def _built(run: Run, state: dict | None, device: torch.device) -> torch.nn.Module:
    """The method on its device, alike on all ranks, whose random numbers differ from here on."""
    seed = run.options.seed
    torch.manual_seed(seed)
    method = run.build()
    if run.options.weights and state is None and _start_from(method, run.options.weights):
        _say(f"{run.options.weights} holds an encoder alone: the decoder starts from random weights")
    if rank := distributed.rank():
        torch.manual_seed((seed + 0x9E3779B97F4A7C15 * rank) % 2**63)
    return method.to(device)


def _start_from(method: torch.nn.Module, path: Path) -> bool:
    """Loads the weights to begin with; True where they are of a MAE's encoder alone."""
    has_decoder = any(name.startswith("decoder_") for name in method.state_dict())
    alone = has_decoder and not any(name.startswith("decoder_") for name in read_weights(path))
    load_weights(method, path, encoder_only=alone)
    return alone


def _loader(run: Run, source: Source, device: torch.device, workers: int, engine: str) -> Loader:
    """Micro-batches of this rank."""
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


def _due(options: Options, training, epoch: int) -> bool:
    """True where an evaluation follows this epoch; after the last there is one anyway."""
    return bool(options.knn_every) and epoch % options.knn_every == 0 and epoch < training.epochs


def _evaluate(run: Run, method, device: torch.device, test: Source, steps_per_epoch: int, epoch: int) -> None:
    """kNN, and the reconstructions of methods that have them; all ranks together."""
    if run.options.execution.shard:
        _say("with --shard there is no kNN during the run: fastssl eval knn has it of the checkpoints")
        return
    distributed.broadcast_buffers(method)
    write_knn(run, method, epoch * steps_per_epoch, epoch, device)
    if hasattr(method, "reconstruct") and distributed.rank() == 0:
        images = first_images(test, run.config.image_size).to(device)
        save_snapshot(method, images, run.folder / "reconstructions" / f"step-{epoch * steps_per_epoch:06d}.npz")


def _shares(accumulate: int) -> str:
    world = distributed.world_size()
    parts = [f"{world} ranks"] * (world > 1) + [f"{accumulate} micro-batches"] * (accumulate > 1)
    return f" over {' and '.join(parts)}" if parts else ""


def _say(text: str) -> None:
    if distributed.rank() == 0:
        print(text, flush=True)
