"""The programs of docs/examples run, on tiny sizes."""

import math
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "docs" / "examples"


def example(name: str) -> Callable:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_every_example_has_its_test():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"moco_loop", "accelerate_timm", "mae_folder"}


@pytest.mark.slow
def test_moco_loop_trains_every_epoch():
    sizes = ["--data", "shapes:count=64,size=32", "--batch-size", "16", "--queue-size", "32", "--epochs", "3"]
    losses, untrained = (example("moco_loop")([*sizes, "--lr", lr]) for lr in ("0.06", "0"))
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
    assert losses[-1] != untrained[-1]


def test_accelerate_replaces_the_attention_of_every_block(capsys):
    replaced = example("accelerate_timm")(["--batch-size", "1", "--steps", "1"])
    assert replaced == [f"blocks.{i}.attn" for i in range(12)]
    output = capsys.readouterr().out
    difference = float(output.split("largest difference of the outputs: ")[1].split()[0])
    assert difference < 1e-3
    assert output.count("ms a step") == 2


@pytest.mark.slow
def test_mae_folder_goes_from_images_to_a_report(tmp_path, capsys):
    run = tmp_path / "run"
    sizes = ["--epochs", "2", "--batch-size", "16", "--images-per-class", "20"]
    accuracies = example("mae_folder")(["--run", str(run), *sizes])
    assert accuracies and all(0 <= accuracy <= 1 for accuracy in accuracies.values())
    assert (run / "report.html").is_file()
    assert "3 classes" in capsys.readouterr().out
