"""The command line. Flags are made from the dataclasses that the parts own; here they are only put together."""

import dataclasses
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

import fastssl
from fastssl import cli_data
from fastssl.data.loader import Loader, has_dali
from fastssl.data.source import Source, open_source
from fastssl.data.source import names as source_names
from fastssl.data.timing import cores
from fastssl.eval.features import extract
from fastssl.eval.knn import knn_accuracy
from fastssl.run import Options, Run, method_module, method_names, open_run
from fastssl.train import checkpoint
from fastssl.train.loop import train
from fastssl.weights import FORMATS, export, load_weights, read_weights

HELP = f"""fastssl {fastssl.__version__} · fast self-supervised visual pretraining

  fastssl pretrain METHOD --data SOURCE    learn from unlabelled images
  fastssl pretrain --resume RUN            go on with a run that was stopped
  fastssl eval knn RUN                     how well do the features separate the classes?
  fastssl report RUN                       one self-contained report.html of a run
  fastssl export RUN --format FORMAT       weights for timm, torchvision, the official code, or as safetensors
  fastssl data check SOURCE                every image: sizes, formats, bad files, images/s of each engine
  fastssl data show SOURCE --recipe METHOD augmented views, as a picture
  fastssl bench --data SOURCE              images/s of each recipe and engine
  fastssl env                              versions, processor level, and which kernel serves which op

  METHOD   {", ".join(method_names())}
  SOURCE   {", ".join(source_names())} (folder:PATH for your own images)

  fastssl pretrain METHOD --help lists every option with its default, the number of the paper.
  --debug after any command shows the traceback of an error.
"""


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--debug"]
    commands = {"pretrain": pretrain, "eval": evaluate, "report": report, "export": export_weights, "env": env,
                "data": cli_data.data, "bench": cli_data.bench}  # fmt: skip
    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        return
    try:
        if words[0] == "--version":
            print(fastssl.__version__)
        elif words[0] not in commands:
            raise ValueError(f"unknown command {words[0]!r}, there are {', '.join(commands)}")
        else:
            commands[words[0]](words[1:])
    except KeyboardInterrupt:
        sys.exit("fastssl: stopped; a run goes on from its last checkpoint with: fastssl pretrain --resume RUN")
    except (ValueError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        sys.exit(f"fastssl: {error}")


def pretrain(words: list[str]) -> None:
    """fastssl pretrain METHOD --data SOURCE [options] | fastssl pretrain [METHOD] --resume RUN"""
    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        return
    method_name = None if words[0].startswith("-") else words[0]
    rest = words[1:] if method_name else words
    if "--resume" in rest:
        run, state = _resumed(rest, method_name)
    else:
        run, state = _begun(rest, method_name), None
    _pretrain(run, state)


def _begun(words: list[str], method_name: str | None) -> Run:
    if method_name is None:
        raise ValueError(f"pretrain: name a method: {', '.join(method_names())}")
    module = method_module(method_name)
    data = _value_of("--data", words)
    source = open_source(data) if data is not None else None
    small = source is not None and source.size is not None and max(source.size) <= 64
    chosen = _value_of("--preset", words) or ("small" if small else "paper")
    if chosen not in ("small", "paper"):
        raise ValueError(f"pretrain: --preset must be small or paper, got {chosen!r}")
    backbone = _value_of("--backbone", words)
    paper = module.Config.paper(backbone) if backbone else module.Config.paper()  # its numbers may depend on it
    default = module.Config.small() if chosen == "small" else paper

    @dataclasses.dataclass
    class Flags:
        options: Options
        config: module.Config = dataclasses.field(default_factory=lambda: default)
        preset: str = chosen
        """paper: its numbers; small: minutes on a laptop, the default for sources of fixed size up to 64 pixels"""

    Flags.__doc__ = f"{module.Config.__doc__}\n\nDefaults below are those of the preset `{chosen}`."
    flags = tyro.cli(tyro.conf.OmitArgPrefixes[Flags], args=words, prog=f"fastssl pretrain {method_name}")
    options, config = flags.options, flags.config
    _check_numbers(options, config)
    engine = _engine(options.engine, _device(options.device))
    folder = options.run or Path("runs", f"{method_name}-{options.data.split(':')[0]}")
    if (folder / "config.json").exists():
        raise ValueError(
            f"pretrain: {folder} holds a run already: go on with it (--resume {folder}) or name another (--run)"
        )
    run = Run(folder, method_name, options, config, _facts())
    method = run.build()  # refuses impossible sizes before anything is written
    if options.weights:
        _start_from(method, options.weights)
    Loader(source, config.recipe, config.training.batch_size, engine=engine)
    asked = len(open_source(options.data, "test")) if source.classes is not None else 0  # refused now, not at the end
    folder.mkdir(parents=True, exist_ok=True)
    run.save()
    print(f"{method_name} on {options.data} with the preset `{chosen}`: {config.training.epochs} epochs of "
          f"{len(source)} images ({asked} others for kNN), batch {config.training.batch_size} → {folder}")  # fmt: skip
    return run


def _check_numbers(options: Options, config) -> None:
    """Refuses what no method can be asked for; what a method alone can know, its `build` refuses."""
    training = config.training
    if options.precision not in ("fp32", "bf16"):
        raise ValueError(f"pretrain: --precision must be fp32 or bf16, got {options.precision!r}")
    counts = {"log_every": options.log_every, "batch_size": training.batch_size, "epochs": training.epochs}
    for name, value in {**counts, **vars(config)}.items():  # whole numbers of a method are all sizes
        values = value if isinstance(value, tuple) else (value,)
        if any(type(number) is int and number < 1 for number in values):
            raise ValueError(f"pretrain: {_flag(name)} must be at least 1, got {' '.join(map(str, values))}")
    for name, value in {**vars(options), **vars(config), **vars(training)}.items():
        if isinstance(value, float) and not 0 <= value < float("inf"):
            raise ValueError(f"pretrain: {_flag(name)} must be a number from 0 on, got {value}")
    for name, value in (("workers", options.workers or 0), ("seed", options.seed)):
        if not 0 <= value < 2**63:
            raise ValueError(f"pretrain: {_flag(name)} must be a number from 0 on, got {value}")
    if drops := [epoch for epoch in training.lr_drops if epoch >= training.epochs]:
        raise ValueError(f"pretrain: --lr-drops must lie before --epochs {training.epochs}, got {drops[0]}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _start_from(method: torch.nn.Module, path: Path) -> bool:
    """Loads the weights to begin with; True where they are of a MAE's encoder alone."""
    has_decoder = any(name.startswith("decoder_") for name in method.state_dict())
    alone = has_decoder and not any(name.startswith("decoder_") for name in read_weights(path))
    load_weights(method, path, encoder_only=alone)
    return alone


def _value_of(flag: str, words: list[str]) -> str | None:
    """What stands behind a flag (or after its =): needed before the flags' defaults are known."""
    for i, word in enumerate(words):
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
        if word == flag and i + 1 < len(words):
            return words[i + 1]
    return None


def _resumed(words: list[str], method_name: str | None) -> tuple[Run, dict | None]:
    if len(words) != 2 or words[0] != "--resume":
        raise ValueError("pretrain: --resume RUN takes every option from the run, and no other beside it")
    run = open_run(Path(words[1]))
    if method_name not in (None, run.method_name):
        raise ValueError(f"pretrain: {run.folder} is a run of {run.method_name}, not of {method_name}")
    state = checkpoint.load(run.checkpoint, run.method_name) if run.checkpoint.exists() else None
    step = state["step"] if state else 0
    print(f"{run.method_name} on {run.options.data}: going on after step {step} of {run.folder}")
    return run, state


def _pretrain(run: Run, state: dict | None) -> None:
    options, training = run.options, run.config.training
    device = _device(options.device)
    workers = _share_cores(options, device)
    torch.manual_seed(options.seed)
    method = run.build()
    if options.weights and state is None and _start_from(method, options.weights):
        print(f"{options.weights} holds an encoder alone: the decoder starts from random weights")
    method.to(device)
    source = open_source(options.data)
    if state is None:
        _write_knn(run, method, "given" if options.weights else "untrained", device)
    loader = Loader(
        source, run.config.recipe, training.batch_size, seed=options.seed, workers=workers, device=device,
        engine=_engine_there(options.engine, device), bad_files=run.folder / "bad_files.txt", max_bad=options.max_bad,
    )  # fmt: skip
    train(
        method, run.method_name, loader.epoch, len(loader), training, run.folder, precision=options.precision,
        log_every=options.log_every, checkpoint_every=options.checkpoint_every, resume=state,
    )  # fmt: skip
    if loader.bad:
        print(f"{loader.bad} of {len(source)} images could not be decoded: see {run.folder / 'bad_files.txt'}")
    _write_knn(run, method, "trained", device)
    print(f"done: {run.folder} · fastssl report {run.folder}")


def evaluate(words: list[str]) -> None:
    """fastssl eval knn RUN"""

    @dataclasses.dataclass
    class Flags:
        """Weighted k-nearest-neighbour accuracy of a run's encoder: training images vote on the test images."""

        run: tyro.conf.Positional[Path]
        """folder of the run"""
        data: str | None = None
        """another source than the run's"""
        k: int = 20
        """neighbours that vote"""
        tau: Annotated[float, tyro.conf.arg(help="temperature of the votes")] = 0.07

    if not words or words[0] != "knn":
        raise ValueError(f"eval: name an evaluation: knn, got {words[0] if words else 'nothing'}")
    flags = tyro.cli(Flags, args=words[1:], prog="fastssl eval knn")
    if flags.k < 1 or not flags.tau > 0:
        raise ValueError(f"eval: --k must be at least 1 and --tau > 0, got {flags.k} and {flags.tau}")
    run = open_run(flags.run)
    device = _device("auto")
    data = flags.data or run.options.data
    accuracy = _knn(run.load().to(device).features, data, run, device, flags.k, flags.tau)
    if accuracy is None:
        raise ValueError(f"eval: {data} has no labels to compare with")
    print(f"kNN (k={flags.k}) of {flags.run} on {data}: {accuracy:.1%}")


def report(words: list[str]) -> None:
    """fastssl report RUN"""

    @dataclasses.dataclass
    class Flags:
        """One self-contained report.html: curves, kNN, pictures."""

        run: tyro.conf.Positional[Path]
        """folder of the run"""

    from fastssl.report.page import write_report  # here: matplotlib takes a second to import

    run = open_run(tyro.cli(Flags, args=words, prog="fastssl report").run)
    train_source, test_source = (open_source(run.options.data, split) for split in ("train", "test"))
    print(write_report(run, run.load(), train_source, test_source))


def export_weights(words: list[str]) -> None:
    """fastssl export RUN --format timm|torchvision|safetensors|moco|mae"""

    @dataclasses.dataclass
    class Flags:
        """The weights of a run's last checkpoint in another layout."""

        run: tyro.conf.Positional[Path]
        """folder of the run"""
        format: Literal[FORMATS]
        """timm, torchvision: the encoder in their names; mae, moco: an official checkpoint; safetensors: the whole"""
        to: Path | None = None
        """file to write, RUN/METHOD-FORMAT if not given; its suffix is set"""

    flags = tyro.cli(Flags, args=words, prog="fastssl export")
    run = open_run(flags.run)
    to = flags.to or run.folder / f"{run.method_name}-{flags.format}"
    print(export(run.load(), flags.format, to, run.config.backbone))


def env(words: list[str]) -> None:
    """fastssl env: versions, processor level, and which kernel serves which op"""
    from fastssl.ops import dispatch

    console = Console()
    for name, value in _facts().items():
        console.print(f"{name:<20} {value}", highlight=False)
    table = Table("op", "cpu", "cuda")
    rows: dict[str, dict[str, str]] = {}
    for op, device, implementation in dispatch.table():
        rows.setdefault(op, {})[device] = implementation
    for op, served in sorted(rows.items()):
        table.add_row(op, served["cpu"], served["cuda"])
    console.print(table)


def _write_knn(run: Run, method: torch.nn.Module, name: str, device: torch.device) -> None:
    """Adds the kNN accuracy of the method as it stands to knn.json; nothing where the source has no labels."""
    method.eval()
    accuracy = _knn(method.features, run.options.data, run, device)
    if accuracy is None:
        return
    path = run.folder / "knn.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    if name != "trained" and max(run.config.image_size) <= 64:  # all pixels of larger images are too much to hold
        known["raw pixels"] = _knn(lambda images: images.flatten(1), run.options.data, run, device)
    known[f"{name} encoder"] = accuracy
    path.write_text(json.dumps(known) + "\n")
    print("kNN accuracy: " + " · ".join(f"{name} {value:.1%}" for name, value in known.items()))


def _knn(features, data: str, run: Run, device: torch.device, k: int = 20, tau: float = 0.07) -> float | None:
    splits: list[Source] = [open_source(data, split) for split in ("train", "test")]
    if any(split.classes is None for split in splits):
        return None
    size, workers = run.config.image_size, _share_cores(run.options, device)
    (bank, bank_labels, _), (queries, labels, _) = (
        extract(features, split, size, device=device, workers=workers, engine=_engine_there(run.options.engine, device))
        for split in splits
    )
    return knn_accuracy(bank, bank_labels, queries, labels, k, tau)


def _share_cores(options: Options, device: torch.device) -> int:
    """Workers that load data; on a CPU the other cores compute.

    Threads and workers must not share cores: an OpenMP thread that waits for a core which a worker holds stops all
    the others, and a step takes several times as long. So two cores load and compute in turn, without workers.
    """
    available = cores()
    if device.type != "cpu":
        return min(8, available) if options.workers is None else options.workers
    workers = available // 4 if options.workers is None else options.workers
    torch.set_num_threads(max(1, available - workers))
    return workers


def _engine(name: str, device: torch.device) -> str:
    """The engine meant by "auto". On a CPU DALI is slower: it resamples in several times torchvision's time."""
    if name == "auto":
        return "dali" if device.type == "cuda" and has_dali() else "torchvision"
    return name


def _engine_there(name: str, device: torch.device) -> str:
    """That of a run begun elsewhere; where it is not installed the other, and says so: both draw the same."""
    if name == "dali" and not has_dali():
        print("the engine dali, which the run asks for, is not installed: torchvision makes the same views instead")
        return "torchvision"
    return _engine(name, device)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not (name.startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(f"pretrain: --device must be auto, cpu or a cuda device that is there, got {name!r}")
    return torch.device(name)


def _facts() -> dict[str, str]:
    from fastssl.ops import dispatch
    from fastssl.ops.attention import LONGEST

    level = dispatch.native_level()
    facts = {"fastssl": fastssl.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("torchvision", "triton", "xformers", "nvidia-dali-cuda130"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["processor"] = f"{platform.machine()}, {cores()} cores, {torch.get_num_threads()} threads"
    facts["kernels"] = f"native {level}" if level else "none: this build has no native kernels"
    if level:
        from fastssl import _C

        build = _C.build_facts()
        cuda = "with" if build["cuda"] else "without"
        facts["build"] = f"{build['compiler']}, levels {' '.join(build['levels'])}, {cuda} CUDA"
    beyond = (
        "torch" if facts["xformers"] == "not installed" else "xformers on GPUs where it supports the call, else torch"
    )
    facts["attention"] = f"kernels up to {LONGEST} tokens, beyond that {beyond}"
    facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return facts
