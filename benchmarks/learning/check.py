"""The regression check: a method must still reach two thirds of the lift that is stated for it."""

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


def check(
    methods: Iterable[str], processes: int, length: str = "preset", seed: int = 0, folder: Path | None = None
) -> list[str]:
    """Trains each method and compares its lift with the stated one; prints a line for each.

    Args:
        methods: names of methods.
        processes: runs at a time, each on a core of its own.
        length: a key of `measure.LENGTHS`.
        seed: of the runs.
        folder: of the results.

    Returns:
        A sentence for each method that has lost too much, or that failed.

    Raises:
        ValueError: a method has no stated lift.
    """
    lifts = {method: stated_lift(method, length, folder) for method in methods}
    for method in [method for method in lifts if lifts[method] < LEAST]:
        print(f"{method}: not checked, its stated lift of {100 * lifts.pop(method):.1f} points is within chance")
    trials, lost = {trial_of(method, length, seed): lifts[method] for method in lifts}, []
    for trial, row in run_all(trials, processes):
        print(line(trial.method, row), flush=True)
        if sentence := judge(trial.method, row, trials[trial]):
            lost.append(sentence)
            print(sentence, flush=True)
    return lost


def judge(method: str, row: dict, healthy: float) -> str | None:
    """A sentence if a run has lost a third of the stated lift or more."""
    if "failed" in row:
        return f"{method}: the run failed: {row['failed']}"
    if lift(row) >= SHARE * healthy:
        return None
    watched = " ".join(row["warnings"][-2:])
    return (
        f"{method}: training added {100 * lift(row):.1f} points, less than two thirds of the stated "
        f"{100 * healthy:.1f}. {watched}".strip()
    )
