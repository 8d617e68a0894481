"""Tile sizes of Triton kernels, timed beside the row that their table has, and the best one as a proposal."""

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.machine import DEVICE
from fastssl.ops import batch_info_nce, info_nce, masked_patch_mse, random_masking, residual_norm, resized_crops_

from .record import Clock, Record

REPEATS = 20


class Sweep(NamedTuple):
    """Candidates for one entry of a table of tile sizes."""

    name: str  # the table and the entry, as in the code
    table: Any  # dict that holds the entry
    key: Any
    candidates: list[Any]  # other values of the entry
    run: Callable[[], Tensor]  # a call whose kernel reads the entry; its result must not change


def sweeps(clock: Clock, record: Record, dry: bool) -> None:
    """Rows {entry, value, µs, fits} of every candidate; notes the best value of each entry."""
    from .phases import about_machine

    about_machine(record, dry)
    proposals = {}
    for sweep in _dry() if dry else _on_card():
        if clock.over():
            break
        if proposal := measure(sweep, clock, record, 2 if dry else REPEATS):
            proposals[sweep.name] = proposal
    record.note(proposals=proposals)


def measure(sweep: Sweep, clock: Clock, record: Record, repeats: int) -> str | None:
    """Times the entry as it is and each candidate; a sentence if a candidate is at least 3 % faster."""
    present = sweep.table[sweep.key]
    expected, times = sweep.run(), {}
    for value in [present, *(other for other in sweep.candidates if other != present)]:
        if clock.over() and times:
            break
        row: dict[str, Any] = {"entry": sweep.name, "value": str(value), "present": value == present}
        with _entry(sweep, value):
            try:
                error = float((sweep.run().double() - expected.double()).abs().max())
                if error > 1e-2 * float(expected.double().abs().max()):
                    raise harness.WrongResult(f"wrong by {error:.1e}")
                times[str(value)] = 1e6 * statistics.median(harness._time_calls(sweep.run, 1) for _ in range(repeats))
                row["us"] = round(times[str(value)], 2)
            except Exception as error:  # a tile that does not fit the card, a compiler that refuses it
                row["failed"] = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        record.add(row)
    if str(present) not in times:
        return None
    best = min(times, key=times.__getitem__)
    gain = times[str(present)] / times[best]
    return f"{present} → {best}: {times[str(present)]:.1f} → {times[best]:.1f} µs" if gain > 1.03 else None


@contextlib.contextmanager
def _entry(sweep: Sweep, value: Any) -> Iterator[None]:
    """Gives the entry another value within this context."""
    present = sweep.table[sweep.key]
    sweep.table[sweep.key] = value
    try:
        yield
    finally:
        sweep.table[sweep.key] = present


def _dry() -> list[Sweep]:
    """A table that decides how many rows a product takes at a time: the smaller they are, the slower."""
    table, x = {"rows": 4}, torch.randn(64, 64)
    return [
        Sweep('table["rows"]', table, "rows", [1, 64], lambda: torch.cat([part @ x for part in x.split(table["rows"])]))
    ]


def _on_card() -> list[Sweep]:
    """Sweeps of the entries that this card uses at the recipes' sizes, the least certain first."""
    from fastssl.kernels import contrastive_plan, crops, norm, patches
    from fastssl.kernels.tile import Launch, card

    arch = card(torch.empty(0, device=DEVICE)).arch

    def unit(rows: int, width: int) -> Tensor:
        return F.normalize(torch.randn(rows, width, device=DEVICE), dim=1).bfloat16()

    q, k, queue, big = unit(256, 128), unit(256, 128), unit(65536, 128), unit(4096, 256)
    other = unit(4096, 256)
    tiles = contrastive_plan.TILES[arch][2]
    shapes = [(128, 64), (128, 128), (64, 64), (64, 128), (256, 64), (128, 32)]
    narrow = [(b, k, 0, w, s, p) for b, k in shapes for w, s, p in ((8, 3, 1), (4, 3, 2), (8, 4, 1), (4, 4, 1))]
    wide = [(b, k, c, w, s, 1) for b, k in shapes for c in (0, 64) for w, s in ((8, 2), (8, 3), (4, 3))]
    x, delta = torch.randn(256 * 50, 768, device=DEVICE), torch.randn(256 * 50, 768, device=DEVICE).bfloat16()
    weight, bias = torch.randn(768, device=DEVICE), torch.randn(768, device=DEVICE)
    images = torch.randn(256, 3, 224, 224, device=DEVICE)
    ids = random_masking(torch.rand(256, 196, device=DEVICE), 49).ids_masked
    pred = torch.randn(256, 147, 768, device=DEVICE, requires_grad=True)

    def patch_loss() -> Tensor:
        return torch.autograd.grad(masked_patch_mse(pred, images, ids, 16, norm_pix=True), pred)[0]

    photos = list(torch.randint(256, (256, 400, 600, 3), dtype=torch.uint8, device=DEVICE))
    windows = torch.tensor([[10, 15, 380, 380]] * 256)

    def crop() -> Tensor:
        return resized_crops_(
            torch.empty(256, 3, 224, 224, dtype=torch.uint8, device=DEVICE), photos, windows, "bicubic"
        )

    small = [Launch(warps, size) for warps in (1, 2, 4, 8) for size in (256, 512, 1024, 2048)]
    launches = [Launch(warps, size) for warps in (1, 2, 4, 8) for size in (2048, 4096, 8192)]
    return [
        Sweep(f"contrastive_plan.TILES[{arch!r}][2][128]", tiles, 128, narrow, lambda: info_nce(q, k, queue, 0.2).loss),
        Sweep(
            f"contrastive_plan.TILES[{arch!r}][2][256]", tiles, 256, wide, lambda: batch_info_nce(big, other, 0.2).loss
        ),
        Sweep(f"crops.CROPS[{arch!r}]", crops.CROPS, arch, small, crop),
        Sweep(f"norm.NORM[{arch!r}]", norm.NORM, arch, launches, lambda: residual_norm(x, delta, weight, bias)[1]),
        Sweep(f"patches.LOSS[{arch!r}]", patches.LOSS, arch, launches, patch_loss),
    ]
