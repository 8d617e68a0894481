import dataclasses
import shlex
from pathlib import Path

import pytest
import tyro

from fastssl.methods import mae, moco_v1, moco_v3
from fastssl.report.command import reproduce
from fastssl.run import Options, Run


def parsed(words, module, config):
    """Options and config as the command line parses them: the fields of both are flags."""

    @dataclasses.dataclass
    class Flags:
        options: Options
        config: module.Config = dataclasses.field(default_factory=lambda: config)
        preset: str = "paper"

    return tyro.cli(tyro.conf.OmitArgPrefixes[Flags], args=words)


@pytest.mark.parametrize("module", [mae, moco_v1, moco_v3])
@pytest.mark.parametrize("preset", ["small", "paper"])
def test_the_command_makes_the_same_run(module, preset):
    """Every option is the same after a shell and the parser."""
    options = Options('folder:a b/$HOME\'s "x"', seed=3, workers=2, weights=Path("some dir/w.pth"), max_bad=0.5)
    options.execution.precision, options.execution.tensorboard = "bf16", False
    config = getattr(module.Config, preset)()
    config.training.lr, config.training.lr_drops, config.image_size = 0.123, (3, 4), (48, 32)
    run = Run(Path("runs/x"), module.__name__.split(".")[-1], options, config)
    words = shlex.split(reproduce(run))
    assert words[:5] == ["fastssl", "pretrain", run.method_name, "--data", options.data]
    flags = parsed(words[3:], module, module.Config.paper(config.backbone))
    assert flags.options == options
    assert flags.config == config


def test_defaults_and_the_folder_are_left_out():
    run = Run(Path("runs/x"), "mae", Options("digits", folder=Path("runs/x")), mae.Config.paper())
    assert reproduce(run) == "fastssl pretrain mae --data digits --preset paper --backbone vit_base"


def test_empty_values_and_switches_are_kept():
    config = moco_v1.Config.paper()
    config.training.lr_drops, config.symmetric = (), True
    run = Run(Path("runs/x"), "moco_v1", Options("digits"), config)
    words = shlex.split(reproduce(run))
    assert parsed(words[3:], moco_v1, moco_v1.Config.paper()).config == config
