import dataclasses
import itertools
import shlex
from pathlib import Path

import pytest
import tyro

from fastssl.methods import mae, moco_v1, moco_v3
from fastssl.milestones import shorten
from fastssl.pretraining import preset_config
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


def default_of(module, words):
    """The configuration that `fastssl pretrain` starts from for these words."""
    value = dict(itertools.pairwise(words)).get
    backbone, epochs = value("--backbone"), value("--epochs")
    _, config = preset_config(module, None, value("--preset"), backbone)
    return shorten(config, epochs and int(epochs))


@pytest.mark.parametrize("module", [mae, moco_v1, moco_v3])
@pytest.mark.parametrize("preset", ["small", "paper"])
def test_the_command_makes_the_same_run(module, preset):
    """Every option is the same after a shell and the parser."""
    options = Options('folder:a b/$HOME\'s "x"', seed=3, workers=2, weights=Path("some dir/w.pth"), max_bad=0.5)
    options.execution.precision, options.execution.tensorboard = "bf16", False
    config = getattr(module.Config, preset)()
    config.training.lr, config.training.lr_drops, config.image_size = 0.123, (3, 4), (48, 32)
    config.training.epochs += 10
    for stated in ("small", "paper"):
        run = Run(Path("runs/x"), module.__name__.split(".")[-1], options, config, {"preset": stated})
        words = shlex.split(reproduce(run))
        assert words[:7] == ["fastssl", "pretrain", run.method_name, "--data", options.data, "--preset", stated]
        flags = parsed(words[3:], module, default_of(module, words))
        assert flags.options == options
        assert flags.config == config


def test_milestones_that_do_not_follow_the_epochs_are_kept():
    """The command line scales the milestones of a preset to fewer epochs, so a run with others has to name them."""
    config = mae.Config.paper()
    config.training.epochs //= 2
    run = Run(Path("runs/x"), "mae", Options("digits"), config, {"preset": "paper"})
    words = shlex.split(reproduce(run))
    assert "--warmup-epochs" in words
    assert parsed(words[3:], mae, default_of(mae, words)).config == config
    run.config = shorten(mae.Config.paper(), config.training.epochs)
    words = shlex.split(reproduce(run))
    assert "--warmup-epochs" not in words
    assert parsed(words[3:], mae, default_of(mae, words)).config == run.config


def test_a_preset_as_it_is_has_no_further_options():
    run = Run(Path("runs/x"), "mae", Options("patterns"), mae.Config.small(), {"preset": "small"})
    assert reproduce(run) == "fastssl pretrain mae --data patterns --preset small"


def test_defaults_and_the_folder_are_left_out():
    run = Run(Path("runs/x"), "mae", Options("digits", folder=Path("runs/x")), mae.Config.paper())
    assert reproduce(run) == "fastssl pretrain mae --data digits --preset paper --backbone vit_base"


def test_empty_values_and_switches_are_kept():
    config = moco_v1.Config.paper()
    config.training.lr_drops, config.symmetric = (), True
    run = Run(Path("runs/x"), "moco_v1", Options("digits"), config)
    words = shlex.split(reproduce(run))
    assert parsed(words[3:], moco_v1, moco_v1.Config.paper()).config == config
