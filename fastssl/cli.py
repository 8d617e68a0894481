"""The command line. Flags are made from the dataclasses that the parts own; here they are only put together."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

import fastssl
from fastssl import cli_data
from fastssl.cli_eval import evaluate
from fastssl.cli_pretrain import pretrain
from fastssl.data.source import source_names
from fastssl.machine import facts
from fastssl.run import method_names, open_run
from fastssl.train.signals import Interrupted
from fastssl.weights import FORMATS, export

HELP = f"""fastssl {fastssl.__version__} · fast self-supervised visual pretraining

  fastssl pretrain METHOD --data SOURCE    learn from unlabelled images
  fastssl pretrain --resume RUN            go on with a run that was stopped
  torchrun --nproc-per-node N -m fastssl pretrain METHOD …    on several GPUs or processes
  fastssl eval knn RUN                     how well do the features separate the classes? also linear, finetune
  fastssl report RUN [RUN ...]             one self-contained report.html of a run, or of several side by side
  fastssl export RUN --format FORMAT       weights for timm, torchvision, the official code, or as safetensors
  fastssl data check SOURCE                every image: sizes, formats, bad files, images/s of each engine
  fastssl data show SOURCE --augmentation METHOD augmented views, as a picture
  fastssl bench --data SOURCE              images/s of each augmentation and engine
  fastssl env                              versions, processor level, and which kernel serves which op

  METHOD   {", ".join(method_names())}
  SOURCE   {", ".join(source_names())} (folder:PATH for your own images)

  fastssl pretrain METHOD --help lists every option with its default, the number of the paper.
  --debug after any command shows the traceback of an error.
"""


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--debug"]
    commands = {
        "pretrain": pretrain,
        "eval": evaluate,
        "report": report,
        "export": export_weights,
        "env": env,
        "data": cli_data.data,
        "bench": cli_data.bench,
    }
    if (words[-1:] in ([], ["-h"], ["--help"]) and words[:-1] in ([], ["pretrain"])) or words == ["pretrain"]:
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
    except Interrupted as interrupted:
        print(f"fastssl: {interrupted}; the run goes on with: fastssl pretrain --resume RUN", file=sys.stderr)
        sys.exit(interrupted.code)
    except (ValueError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        sys.exit(f"fastssl: {error}")


def report(words: list[str]) -> None:
    """fastssl report RUN [RUN ...] [--to FILE] [--map pca|umap]"""

    @dataclasses.dataclass
    class Flags:
        """One self-contained report.html: curves, evaluations, pictures; several runs side by side."""

        runs: tyro.conf.Positional[tuple[Path, ...]]
        """folders of the runs"""
        to: Path | None = None
        """file to write, RUN/report.html if not given; of several runs report.html in the folder they have in common"""
        map: Literal["pca", "umap"] = "pca"
        """how the map of the features is made; umap needs the extra of that name"""

    from fastssl.report.page import write_report  # here: matplotlib takes a second to import

    flags = tyro.cli(Flags, args=words, prog="fastssl report")
    if not flags.runs:
        raise ValueError("report: name a run")
    print(write_report([open_run(run) for run in flags.runs], flags.to, flags.map))


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
    for name, value in facts().items():
        console.print(f"{name:<20} {value}", highlight=False)
    table = Table("op", "cpu", "cuda")
    rows: dict[str, dict[str, str]] = {}
    for op, device, implementation in dispatch.table():
        rows.setdefault(op, {})[device] = implementation
    for op, served in sorted(rows.items()):
        table.add_row(op, served["cpu"], served["cuda"])
    console.print(table)
