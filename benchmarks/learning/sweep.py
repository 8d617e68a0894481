"""A sweep: changed settings of a preset, each with the same budget of seconds of one core; the best come first.

Successive halving with thirds: all configurations get a ninth of the seconds, the best third of them a third, the best
third of those all. The images are other ones than those of the figures (another seed of the task), so that a recipe is
not chosen by the images that it is judged on. Learning rates follow the shorter runs, milestones in proportion.
"""

import ast
import itertools
import json
import math
from pathlib import Path
from typing import Any

from ..table import number
from . import results
from .grids import GRIDS
from .trial import IMAGES, KINDS, Trial, preset, recipe, run_all, settings_of, task

SEED_OF_TASK = 1  # of the images that a sweep draws
FEWEST_EPOCHS = 4  # where the seconds are short, the images become fewer than the epochs
BANK_EPOCHS = 10  # the same of methods with a memory bank, whose rows an epoch renews once


def grids_of(method: str, given: list[list[str]]) -> list[dict[str, tuple]]:
    """Grids from words; the method's own where there are none."""
    own = GRIDS[method]
    return [parse_grid(words, method) for words in given] or ([own] if isinstance(own, dict) else list(own))


def parse_grid(words: list[str], method: str, option: str = "sweep: --grid") -> dict[str, tuple]:
    """{setting: values} of words such as "lr=0.4,0.8", which `option` takes.

    Raises:
        ValueError: a word has no "=", or the preset no such setting.
    """
    grid = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.lstrip("-").replace("-", "_")
        if not equals or name not in settings_of(method):
            raise ValueError(f"{option} takes settings of {method} as NAME=VALUE,VALUE, got {word!r}")
        try:
            values = ast.literal_eval(f"[{text}]")
        except (ValueError, SyntaxError):
            values = text.split(",")  # words
        grid[name] = tuple(values)
    return grid


def parse_changes(words: list[str], methods: list[str]) -> dict[str, Any]:
    """{setting: value} of words such as "lr=0.4", which are settings of all those methods.

    Raises:
        ValueError: as `parse_grid`, or a setting has several values.
    """
    grids = [parse_grid(words, method, "measure: --set") for method in methods]
    every = configurations(grids[:1])
    if len(every) != 1:
        raise ValueError(f"measure: --set takes one value of each setting, got {' '.join(words)!r}")
    return every[0]


def configurations(grids: list[dict[str, tuple]]) -> list[dict]:
    """Every combination of the values of each grid, as JSON keeps them."""
    every = [dict(zip(grid, values)) for grid in grids for values in itertools.product(*grid.values())]
    return json.loads(json.dumps(every))


def plan(method: str, images: float) -> tuple[str, int]:
    """(data, epochs) of a run that sees about so many images."""
    least = BANK_EPOCHS if hasattr(preset(method), "images") else FEWEST_EPOCHS
    count = max(256, min(IMAGES, round(images / least)))
    return f"{task(method)}:count={count},seed={SEED_OF_TASK}", max(1, round(images / count))


def sweep(
    method: str,
    grids: list[dict[str, tuple]],
    seconds: float,
    processes: int,
    halve: bool = True,
    folder: Path | None = None,
) -> list[dict]:
    """Rows of all trials, best first. Each is written when it ends; a stored one of the same budget is not repeated.

    Args:
        method: name of the method.
        grids: values of each setting; of several grids the trials of all.
        seconds: of one core that each surviving trial trains.
        processes: trials at a time, each on a core of its own.
        halve: drop two thirds of the trials twice on the way, if there are more than three.
        folder: of the results.
    """
    name, configs = f"sweep-{method}", configurations(grids)
    rungs = [seconds / 9, seconds / 3, seconds] if halve and len(configs) > 3 else [seconds]
    rates, done = dict.fromkeys(range(len(configs)), _images_per_second(method)), []
    alive = list(rates)
    for rung in rungs:
        rows = {}
        trials = {}
        for i in alive:
            data, epochs = plan(method, rates[i] * rung)
            settings = {**configs[i], "epochs": epochs}
            stored = _stored(name, method, configs[i], rung, folder)
            if stored:
                rows[i] = stored
            else:
                trials[Trial(method, data, settings, bank=f"{task(method)}:seed={SEED_OF_TASK}")] = i
        for trial, row in run_all(trials, processes):
            i = trials[trial]
            rows[i] = {"budget": round(rung, 1), "settings": configs[i], **row}
            results.add(name, rows[i], lambda old, new=rows[i]: _key(old) == _key(new), _order, folder)
            print(line(rows[i]), flush=True)
        for i, row in rows.items():
            if row.get("seconds"):
                rates[i] = row["images_seen"] / row["seconds"]
        done += rows.values()
        alive = sorted(rows, key=lambda i: -rows[i].get("trained", -1))[: math.ceil(len(rows) / 3)]
    return sorted(done, key=_order)


def line(row: dict) -> str:
    """One trial as a line of text."""
    settings = " ".join(f"{name}={value}" for name, value in row["settings"].items())
    if "failed" in row:
        return f"{settings}: {row['failed']}"
    spread = f", RankMe {number(row['rankme'])}" if "rankme" in row else ""
    return (
        f"{row['trained']:.1%} {KINDS[row['score']]}{spread}: {settings} "
        f"({row['images_seen']:,} images, {row['seconds']:.0f} of {row['budget']:.0f} s)"
    )


def _images_per_second(method: str) -> float:
    """Training images per second of one core, of the preset."""
    batch = preset(method).training.batch_size
    data, bank = f"{task(method)}:count={max(256, 4 * batch)},seed={SEED_OF_TASK}", f"{task(method)}:count=64"
    ((_, row),) = run_all([Trial(method, data, {"epochs": 2}, bank=bank)], 1)
    if "failed" in row:
        raise ValueError(f"sweep: {row['failed']}")
    return row["images_seen"] / max(row["seconds"], 0.1)


def _stored(name: str, method: str, settings: dict, budget: float, folder: Path | None) -> dict | None:
    """A finished trial of the same settings, budget and preset."""
    wanted = recipe(method, settings)
    for row in results.read(name, folder):
        if row["settings"] == settings and row["budget"] == round(budget, 1) and "failed" not in row:
            same = {key: value for key, value in row["recipe"].items() if key != "epochs"}
            if same == {key: value for key, value in wanted.items() if key != "epochs"}:
                return row
    return None


def _key(row: dict) -> tuple:
    return (row["budget"], sorted(row["settings"].items()))


def _order(row: dict) -> tuple:
    """Longest first, and of equal length the best."""
    return (-row["budget"], -row.get("trained", -1))
