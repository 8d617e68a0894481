"""Methods broken on purpose: what the check of their learning, or a watch on the way, must notice.

Each sabotage takes one part out of a method's training, or feeds it something wrong, and leaves everything else as it
is: losses stay finite, and most of them still fall.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch.nn.functional as F
from torch import nn

from fastssl.contract import Batch
from fastssl.data.loader import Loader
from fastssl.methods import byol, mae, simmim, simsiam
from fastssl.nn.bank import MemoryBank
from fastssl.nn.momentum import MomentumEncoder
from fastssl.nn.prototype_losses import DINOLoss, IBOTPatchLoss
from fastssl.nn.queue import KeyQueue

from . import results
from .check import SHARE, new_warnings, stated_lift, usual_warnings
from .measure import lift, stated, trial_of
from .trial import Trial, recipe, run_all

NAME = "sabotage"  # of the file with the results
Patches = list[tuple[Any, str, Any]]  # object, attribute, what stands in its place


@dataclasses.dataclass(frozen=True)
class Sabotage:
    """A way to break methods.

    Args:
        text: what is broken.
        methods: the methods that it should spoil.
        patches: gives what is replaced while the method trains.
        settings: that break a method instead.
    """

    text: str
    methods: tuple[str, ...]
    patches: Callable[[], Patches] = list
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def _nothing(self: Any, *_: Any, **__: Any) -> None:
    """Stands in the place of an update."""


def _of_views(change: Callable[[Batch], Batch]) -> Patches:
    """Changes the batches of training, which have two views or more."""
    epoch = Loader.epoch

    def changed(self: Loader, number: int, start: int = 0) -> Iterator[Batch]:
        for batch in epoch(self, number, start):
            yield change(batch) if len(batch.views) > 1 else batch

    return [(Loader, "epoch", changed)]


def _equal_views(batch: Batch) -> Batch:
    """All views of one size are the first of them."""
    first: dict = {}
    return batch._replace(views=tuple(first.setdefault(view.shape, view) for view in batch.views))


def _strangers(batch: Batch) -> Batch:
    """The second view is that of another image."""
    first, second, *others = batch.views
    return batch._replace(views=(first, second.roll(1, 0), *others))


def _rows_of_strangers() -> Patches:
    """Each image writes the bank's row of another one."""
    update = MemoryBank.update
    return [(MemoryBank, "update", lambda self, index, features: update(self, index.roll(1), features))]


def _captions_of_strangers() -> Patches:
    """Each image comes with the caption of another one."""
    epoch = Loader.epoch

    def changed(self: Loader, number: int, start: int = 0) -> Iterator[Batch]:
        for batch in epoch(self, number, start):
            yield batch._replace(extras={name: value.roll(1, 0) for name, value in batch.extras.items()})

    return [(Loader, "epoch", changed)]


def _pixels_of_strangers() -> Patches:
    """Masked patches must be predicted from another image."""
    mse, kept = mae.masked_patch_mse, simmim.keep_patches
    return [
        (mae, "masked_patch_mse", lambda pred, images, *rest: mse(pred, images.roll(1, 0), *rest)),
        (simmim, "keep_patches", lambda images, *rest: kept(images.roll(1, 0), *rest)),
    ]


def _gradient_to_both() -> Patches:
    """SimSiam's loss with a gradient to the projections, too."""

    def forward(self: simsiam.SimSiam, batch: Batch) -> tuple:
        z1, z2 = (self.backbone(view) for view in batch.views)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        loss = (self.criterion(p1, z2) + self.criterion(p2, z1)) / 2
        return loss, {"std": F.normalize(z1.detach(), dim=1).std(0).mean()}

    return [(simsiam.SimSiam, "forward", forward)]


def _no_predictor() -> Patches:
    """Projections are compared as they are."""

    def without(cls: type) -> Callable:
        init = cls.__init__

        def changed(self: nn.Module, *args: Any, **options: Any) -> None:
            init(self, *args, **options)
            self.predictor = nn.Identity()

        return changed

    return [(cls, "__init__", without(cls)) for cls in (byol.BYOL, simsiam.SimSiam)]


MOMENTUM = ("moco_v2", "moco_v3", "byol", "dino", "ibot")
PAIRS = ("moco_v2", "moco_v3", "simclr_v1", "byol", "simsiam", "barlow_twins", "vicreg", "swav")
SABOTAGES = {
    "lr-0": Sabotage("learning rate 0", ("moco_v2", "simclr_v1", "byol", "dino", "mae", "clip"), settings={"lr": 0.0}),
    "momentum": Sabotage("momentum encoder not updated", MOMENTUM, lambda: [(MomentumEncoder, "update", _nothing)]),
    "queue": Sabotage(
        "queue not written", ("moco_v1", "moco_v2", "densecl"), lambda: [(KeyQueue, "enqueue", _nothing)]
    ),
    "bank": Sabotage("memory bank not written", ("instdisc", "cmc"), lambda: [(MemoryBank, "update", _nothing)]),
    "rows": Sabotage("rows of the memory bank shuffled", ("instdisc",), _rows_of_strangers),
    "gradient": Sabotage("no stop-gradient", ("simsiam",), _gradient_to_both),
    "predictor": Sabotage("no predictor", ("byol", "simsiam"), _no_predictor),
    "centre": Sabotage(
        "centre not updated",
        ("dino", "ibot"),
        lambda: [(DINOLoss, "update_center", _nothing), (IBOTPatchLoss, "update_center", _nothing)],
    ),
    "variance": Sabotage("no variance term", ("vicreg",), settings={"std_weight": 0.0}),
    "covariance": Sabotage("no covariance term", ("vicreg",), settings={"cov_weight": 0.0}),
    "redundancy": Sabotage("no redundancy term", ("barlow_twins",), settings={"redundancy_weight": 0.0}),
    "views": Sabotage("both views equal", PAIRS, lambda: _of_views(_equal_views)),
    "positives": Sabotage("positives of other images", PAIRS, lambda: _of_views(_strangers)),
    "pixels": Sabotage("masked pixels of other images", ("mae", "simmim"), _pixels_of_strangers),
    "captions": Sabotage("captions of other images", ("clip", "siglip", "albef"), _captions_of_strangers),
}


@contextlib.contextmanager
def sabotaged(name: str | None) -> Iterator[None]:
    """Context in which the named sabotage is done; None changes nothing."""
    with contextlib.ExitStack() as stack:
        for target, attribute, replacement in SABOTAGES[name].patches() if name else []:
            stack.enter_context(mock.patch.object(target, attribute, replacement))
        yield


def sabotage(
    names: list[str], methods: list[str], processes: int, length: str, again: bool = False, folder: Path | None = None
) -> list[dict]:
    """Runs the check of each method with each sabotage; writes and returns the rows, which `caught_by` judges.

    Args:
        names: keys of `SABOTAGES`.
        methods: only these methods; all if empty.
        processes: runs at a time.
        length: of the check, a key of `measure.LENGTHS`.
        again: repeat what is measured already.
        folder: of the results.

    Raises:
        ValueError: a method has no stated lift.
    """
    done = {_key(row): row for row in measured(folder)}
    trials, rows = [], []
    for name in names:
        for method in SABOTAGES[name].methods:
            if methods and method not in methods:
                continue
            stated_lift(method, length, folder)  # raises before the first run where none is stated
            known = done.get(_key({"sabotage": name, "method": method}))
            if known and not again and known["length"] == length:
                rows.append(known)
                continue
            trial = trial_of(method, length, 0)
            changed = {**trial.settings, **SABOTAGES[name].settings}
            trials.append(dataclasses.replace(trial, settings=changed, sabotage=name))
    for trial, row in run_all(trials, processes):
        row = {"sabotage": trial.sabotage, "method": trial.method, "length": length, **_kept(trial, row)}
        print(line(row, folder), flush=True)
        results.add(NAME, row, lambda old, new=row: _key(old) == _key(new), _key, folder)
        rows.append(row)
    return sorted(rows, key=_key)


def measured(folder: Path | None = None) -> list[dict]:
    """Rows of methods whose lift is stated, of the present recipes."""
    return [
        row
        for row in results.read(NAME, folder)
        if stated(row["method"], row["length"], folder)
        and row["recipe"] == recipe(row["method"], SABOTAGES[row["sabotage"]].settings)
    ]


def caught_by(row: dict, folder: Path | None = None) -> list[str]:
    """What the check fails at: "lift", "watch" (a kind of warning that the whole method does not have) or "failed" (the
    run ended with an error)."""
    if "failed" in row:
        return ["failed"]
    about = row["method"], row["length"], folder
    lost, warnings = row["lift"] < SHARE * stated_lift(*about), new_warnings(row, usual_warnings(*about))
    return ["lift"] * lost + ["watch"] * bool(warnings)


def _kept(trial: Trial, row: dict) -> dict:
    """What a row of the results has of a run."""
    kept = {"recipe": recipe(trial.method, trial.settings)}
    if "failed" in row:
        return {**kept, "failed": row["failed"]}
    numbers = ("untrained", "trained", "rankme", "two_directions", "deviation", "ranked_first", "rank_entropy")
    kept |= {name: row[name] for name in numbers if name in row}
    return {**kept, "lift": round(lift(row), 4), "warnings": row["warnings"]}


def line(row: dict, folder: Path | None = None) -> str:
    """One row as a line of text."""
    healthy = stated_lift(row["method"], row["length"], folder)
    after = row["failed"] if "failed" in row else f"lift {healthy:.1%} -> {row['lift']:.1%}"
    caught = ", ".join(caught_by(row, folder)) or "NOTHING"
    return f"{SABOTAGES[row['sabotage']].text}, {row['method']}: {after}; caught by {caught} {row.get('warnings', '')}"


def _key(row: dict) -> tuple:
    return (list(SABOTAGES).index(row["sabotage"]), row["method"])
