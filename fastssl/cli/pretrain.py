"""`fastssl pretrain`: starts a run or resumes one."""

import dataclasses

import tyro

from fastssl.method_modules import method_module, method_names
from fastssl.milestones import shorten
from fastssl.pretraining import check_method, new_run, preset_config, replace_options, resume_run, start
from fastssl.run import Options, absolute_data, open_run
from fastssl.settings import differences

from .flags import first_pass, parse

PROG = "fastssl pretrain"


@dataclasses.dataclass
class FirstFlags:
    """Flags on which the defaults of the others depend."""

    method: tyro.conf.Positional[tuple[str, ...]] = ()
    data: str | None = None
    preset: str | None = None
    backbone: str | None = None
    resume: str | None = None
    epochs: int | None = None


def command(words: list[str]) -> None:
    """fastssl pretrain METHOD --data SOURCE [--resume auto] [options] | fastssl pretrain --resume RUN [options]"""
    first = first_pass(FirstFlags, words, PROG)
    if first.resume in (None, "auto"):
        _start(words, first)
    else:
        _resume(words, first)


def _start(words: list[str], first: FirstFlags) -> None:
    if not first.method:
        raise ValueError(f"pretrain: a method is needed as the first word: {', '.join(method_names())}")
    module, run = method_module(first.method[0]), None
    if first.data is None:  # the parser then shows the help, or an error that names --data
        chosen, preset_numbers = preset_config(module, None, first.preset, first.backbone)
    else:
        run = new_run(first.method[0], first.data, first.preset, first.backbone)
        chosen, preset_numbers = run.facts["preset"], run.config
    default = shorten(preset_numbers, first.epochs)

    @dataclasses.dataclass
    class Flags:
        method: tyro.conf.Positional[str]
        """name of the method, or package.module"""
        options: Options
        config: module.Config = dataclasses.field(default_factory=lambda: default)
        preset: str = chosen
        """paper: the paper's numbers; small: minutes on a laptop, the default for images of one size up to 64 pixels"""
        resume: str | None = None
        """folder of a run to continue, or auto: continue the run in --folder if there is one, else start it"""
        allow_changed_data: bool = False
        """with --resume: go on although images or labels have changed since the run was started"""

    Flags.__doc__ = f"{module.Config.__doc__}\n\nDefaults below are those of the preset `{chosen}`."
    flags = parse(Flags, words, PROG)
    flags.options.data = absolute_data(flags.options.data)
    new = replace_options(run, flags.options, flags.config)
    start(new, flags.resume, preset_numbers, flags.allow_changed_data)


def _resume(words: list[str], first: FirstFlags) -> None:
    run = open_run(first.resume)
    check_method(run, first.method[0] if first.method else None)

    @dataclasses.dataclass
    class Flags:
        method: tyro.conf.Positional[str] = run.method_name
        """name of the method"""
        options: Options = dataclasses.field(default_factory=lambda: run.options)
        config: type(run.config) = dataclasses.field(default_factory=lambda: run.config)
        resume: str = ""
        """folder of the run to continue"""
        allow_changed_data: bool = False
        """go on although images or labels have changed since the run was started"""

    Flags.__doc__ = (
        f"Continues {run.folder} from its newest checkpoint. Defaults below are the run's options; changes that would "
        "affect what was learned so far are refused."
    )
    flags = parse(Flags, words, PROG)
    flags.options.data = run.options.data if first.data is None else absolute_data(first.data)
    changes = differences((run.options, run.config), (flags.options, flags.config))
    settings = {name: new for name, (_, new) in changes.items()}
    resume_run(run, settings=settings, allow_changed_data=flags.allow_changed_data)
