"""The regression check: a method still reaches two thirds of the lift that is stated for it, without new warnings."""

import re
from collections.abc import Iterable
from pathlib import Path

from .measure import lift, line, stated, trial_of
from .trial import run_all

SHARE = 2 / 3  # of the stated lift that must be left
LEAST = 0.05  # stated lift below which a third of it is chance


def stated_lift(method: str, length: str, folder: Path | None = None) -> float:
    """Least lift of a method over the measured seeds: that of a quick run differs much between seeds.

    Raises:
        ValueError: none was measured with the present recipe.
    """
    rows = stated(method, length, folder)
    if not rows:
        raise ValueError(
            f"check: no lift is stated for the present recipe of {method}: run `python -m benchmarks.learning measure "
            f"{method} --length {length}`"
        )
    return min(map(lift, rows))


def usual_warnings(method: str, length: str, folder: Path | None = None) -> set[str]:
    """The kinds of warnings that the measured runs of a method have."""
    return {_kind(warning) for row in stated(method, length, folder) for warning in row["warnings"]}


def new_warnings(row: dict, usual: set[str]) -> list[str]:
    """Warnings of a run that the measured runs do not have."""
    return [warning for warning in row["warnings"] if _kind(warning) not in usual]


def _kind(warning: str) -> str:
    """What a warning says, without its numbers."""
    return re.sub(r"\d[\d.,]*", "N", warning)


def check(
    methods: Iterable[str], processes: int, length: str = "preset", seed: int = 0, folder: Path | None = None
) -> list[str]:
    """Trains each method and compares its lift and its warnings with the stated ones; prints a line for each.

    Args:
        methods: names of methods.
        processes: runs at a time, each on a core of its own.
        length: a key of `measure.LENGTHS`.
        seed: of the runs.
        folder: of the results.

    Returns:
        A sentence for each method that has lost too much, that warns as the measured runs do not, or that failed.

    Raises:
        ValueError: a method has no stated lift.
    """
    lifts = {method: stated_lift(method, length, folder) for method in methods}
    for method in [method for method in lifts if lifts[method] < LEAST]:
        print(f"{method}: not checked, its stated lift of {100 * lifts.pop(method):.1f} points is within chance")
    trials, lost = {trial_of(method, length, seed): lifts[method] for method in lifts}, []
    for trial, row in run_all(trials, processes):
        print(line(trial.method, row), flush=True)
        usual = usual_warnings(trial.method, length, folder)
        if sentence := judge(trial.method, row, trials[trial], usual):
            lost.append(sentence)
            print(sentence, flush=True)
    return lost


def judge(method: str, row: dict, healthy: float, usual: set[str]) -> str | None:
    """A sentence if a run has lost a third of the stated lift or more, or has other warnings than the `usual` ones."""
    if "failed" in row:
        return f"{method}: the run failed: {row['failed']}"
    said = f"{method}: training added {100 * lift(row):.1f} points"
    if lift(row) < SHARE * healthy:
        lost = f"{said}, less than two thirds of the stated {100 * healthy:.1f}."
        return " ".join([lost, *row["warnings"][-2:]])
    if new := new_warnings(row, usual):
        return f"{said}, with a warning that the measured runs lack: {new[-1]}"
    return None
