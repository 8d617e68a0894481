"""Figures of each method's preset over seeds, which the regression check compares with.

A length is `preset`, the whole recipe, or `quick`, its epochs on a quarter of the images: seconds for a fast method, in
`make test`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastssl.settings import flag

from . import results
from .trial import IMAGES, KINDS, Trial, recipe, run_all, task

LENGTHS = ("preset", "quick")
QUICK_IMAGES = IMAGES // 4
SEEDS = (0, 1, 2)
IN_TESTS = ("simclr_v1",)  # methods whose quick run is checked by `make test`


def trial_of(method: str, length: str, seed: int, changes: dict[str, Any] | None = None, **more: bool) -> Trial:
    """The run of a method of that length, with `changes` of its preset, and `more` evaluations."""
    data = f"{task(method)}:count={QUICK_IMAGES}" if length == "quick" else ""
    return Trial(method, data, changes or {}, seed=seed, curve=length == "preset", **more)


def measure(
    methods: Iterable[str],
    seeds: Iterable[int],
    processes: int,
    length: str = "preset",
    again: bool = False,
    changes: dict[str, Any] | None = None,
    folder: Path | None = None,
    **more: bool,
) -> None:
    """Measures and writes the rows that are missing, or all of them `again`.

    Args:
        methods: names of methods.
        seeds: seeds of each.
        processes: runs at a time, each on a core of its own.
        length: a key of `LENGTHS`.
        again: replace rows that exist.
        changes: of the presets, by name; their rows stand beside those of the preset.
        folder: of the results.
        more: evaluations beside kNN, `linear` and `few_labels` of `Trial`.
    """
    trials = [trial_of(method, length, seed, changes, **more) for seed in seeds for method in methods]
    trials = [trial for trial in trials if again or not _is_measured(trial, length, folder)]
    for trial, row in run_all(trials, processes):
        row = {"length": length, **({"changes": changes} if changes else {}), **row}
        print(line(trial.method, row), flush=True)
        if "failed" not in row:
            results.add(trial.method, row, lambda old, new=row: _key(old) == _key(new), _key, folder)


def stated(method: str, length: str, folder: Path | None = None, changes: dict[str, Any] | None = None) -> list[dict]:
    """Rows of the present recipe, with `changes` of it."""
    wanted = trial_of(method, length, 0, changes)
    rows = [
        row
        for row in results.read(method, folder)
        if (row["length"], row.get("changes", {})) == (length, changes or {})
    ]
    return [row for row in rows if row["recipe"] == recipe(method, wanted.settings) and row["data"] == wanted.source]


def lift(row: dict) -> float:
    """What training added to the untrained encoder's score."""
    return row["trained"] - row["untrained"]


def name_of(method: str, changes: dict[str, Any]) -> str:
    """A method and the options that change its preset, as the command line has them."""
    return " ".join([method, *(f"{flag(name)} {value}" for name, value in changes.items())])


def line(method: str, row: dict) -> str:
    """One run as a line of text."""
    start = f"{name_of(method, row.get('changes', {}))}, seed {row['seed']}"
    if "failed" in row:
        return f"{start}: {row['failed']}"
    raw = "" if row["raw"] is None else f"raw {row['raw']:.1%}, "
    linear = f", linear {row['linear']:.1%}" if "linear" in row else ""
    spread = f", RankMe {row['rankme']:.3g}" if "rankme" in row else ""
    return (
        f"{start}: {KINDS[row['score']]} {raw}untrained {row['untrained']:.1%}, trained {row['trained']:.1%}{linear}"
        f"{spread} ({row['images_seen']:,} images, {row['seconds'] / 60:.1f} min of a core)"
    )


def _is_measured(trial: Trial, length: str, folder: Path | None) -> bool:
    rows = [row for row in stated(trial.method, length, folder, trial.settings) if row["seed"] == trial.seed]
    wanted = [name for name in ("linear", "few_labels") if getattr(trial, name)]
    return any(row["score"] != "knn" or all(name in row for name in wanted) for row in rows)


def _key(row: dict) -> tuple:
    return (LENGTHS.index(row["length"]), str(row.get("changes", "")), row["seed"])
