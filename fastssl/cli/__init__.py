"""The command line: each command has a module that parses its flags and calls the Python interface."""

import importlib
import sys
import textwrap

import fastssl
from fastssl.extras import MissingExtra, need, need_train
from fastssl.text import escape_what_cannot_be_encoded, printable

COMMANDS = {  # command: module of fastssl.cli, imported when the command runs
    "pretrain": "pretrain",
    "eval": "evaluate",
    "embed": "embed",
    "report": "report",
    "export": "export",
    "data": "data",
    "bench": "bench",
    "env": "env",
}

HELP = """fastssl {version} · fast self-supervised visual pretraining

  fastssl pretrain METHOD --data SOURCE    pretrain on unlabelled images
  fastssl pretrain --resume RUN            continue a run; some options can change, such as --epochs 200
  torchrun --nproc-per-node N -m fastssl pretrain METHOD …    on several GPUs or processes; srun and mpirun work, too
  fastssl eval knn RUN                     accuracy of the features by nearest neighbours; also linear, finetune
  fastssl embed RUN SOURCE --out FILE      features of images, as .npz or .parquet
  fastssl report RUN [RUN ...]             self-contained report.html of a run, or of several side by side
  fastssl export RUN --format FORMAT       weights for timm, torchvision, the official code, or as safetensors
  fastssl data check SOURCE                splits, classes, sizes, values, bad files, and what is passed over
  fastssl data show SOURCE --augmentation METHOD    augmented views as a picture
  fastssl bench --data SOURCE              images/s of each augmentation and loader engine
  fastssl env                              versions, processor level, and the kernel that runs each op

  METHOD   {methods}
  SOURCE   {sources} (folder:PATH for your own images),
           or your own module: package.module:ARGUMENT

  fastssl pretrain METHOD --help lists every option with its default, the paper's number.
  --debug after any command shows the traceback of an error.
"""


def main() -> None:
    """The `fastssl` command."""
    escape_what_cannot_be_encoded()
    words = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        if words == ["--version"]:
            print(fastssl.__version__)
        else:
            _run(words)
    except KeyboardInterrupt:
        sys.exit("fastssl: stopped; continue a run from its last checkpoint with: fastssl pretrain --resume RUN")
    except (ValueError, OSError, MissingExtra) as error:
        if "--debug" in sys.argv:
            raise
        sys.exit(f"fastssl: {printable(error)}")


def _run(words: list[str]) -> None:
    need("tyro", what="the command line", extra="train")
    need_train("the command line")
    from fastssl.train.signals import Interrupted

    if (words[-1:] in ([], ["-h"], ["--help"]) and words[:-1] in ([], ["pretrain"])) or words == ["pretrain"]:
        print(_help())
        return
    if words[0] not in COMMANDS:
        raise ValueError(f"unknown command {words[0]!r}, there are {', '.join(COMMANDS)}")
    try:
        importlib.import_module(f"fastssl.cli.{COMMANDS[words[0]]}").command(words[1:])
    except Interrupted as interrupted:
        print(f"fastssl: {interrupted}; continue the run with: fastssl pretrain --resume RUN", file=sys.stderr)
        sys.exit(interrupted.code)


def _help() -> str:
    from fastssl.data.source import source_names
    from fastssl.method_modules import method_names

    lines = textwrap.wrap(", ".join([*method_names(), "or your own module: package.module"]), 100)
    methods = "\n           ".join(lines)
    return HELP.format(version=fastssl.__version__, methods=methods, sources=", ".join(source_names()))
