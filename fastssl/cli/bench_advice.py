"""What to do about a slow loader, in sentences."""

import math
from typing import NamedTuple

from fastssl.data.parts import Parts

LARGE = 2.0  # shorter side of an image over that of a view, from which a smaller copy saves most of the decoding
PACK_SIDE = 10 / 7  # the same of a pack: 320 pixels for views of 224
SLOW_READ = 0.25  # share of the time from which reading is worth a sentence
SLOW_WHOLE = 0.6  # throughput of the loader over that of its parts, below which something else holds it up
FASTER = 1.1  # throughput of one kind of workers over the other from which it is worth a sentence


class Situation(NamedTuple):
    """What was measured, and on what."""

    parts: Parts
    source: str  # as in --data
    augmentation: str
    image_side: int  # pixels of the shorter side, of the median image
    view_side: int  # of the largest view
    cores: int
    gpu: bool
    engine: str  # that was measured, torchvision or another
    engines: tuple[str, ...]  # those that are installed
    step_rate: float | None = None  # images per second that the step takes
    workers: int = 0
    rates: dict[str, float] = {}  # noqa: RUF012 - {kind of workers: images per second of the whole loader}


def advise(seen: Situation) -> list[str]:
    """Sentences: what the cores make, how many the step needs, and what to change if there are too few."""
    rate = seen.parts.a_worker if seen.gpu else seen.parts.a_core
    made = f"A core makes {rate:,.0f} images/s of {seen.augmentation}, {_cores(seen.cores)} {rate * seen.cores:,.0f}."
    used = min(seen.workers, seen.cores)
    whole = max(seen.rates.values(), default=math.inf)
    if whole < SLOW_WHOLE * rate * used:
        made += (
            f" The whole loader makes {whole:,.0f} with {seen.workers} workers, so other programs use "
            "the cores, or the disk is waited for."
        )
    if seen.step_rate is None:
        how = "whether that is enough: give the step's rate as --step-rate IMAGES/S, or measure it with --method NAME"
        return [made, f"To see {how}.", *_faster(seen)]
    needed = math.ceil(seen.step_rate / rate)
    feed = "feeds" if needed == 1 else "feed"
    step = f"The step takes {seen.step_rate:,.0f} images/s: {_cores(needed)} {feed} it, there are {seen.cores}."
    told = [made, step]
    if needed < seen.cores or (seen.gpu and needed == seen.cores):
        return [*told, f"That is enough: use --workers {needed}.", *_kind(seen)]
    if not seen.gpu:
        told.append("Here the cores also compute the step, which shares them with the loader.")
    return [*told, f"That is too few: use --workers {seen.cores}, and make the loader faster.", *_faster(seen)]


def _faster(seen: Situation) -> list[str]:
    """What makes the loader faster, the part that takes longest first."""
    parts, total = seen.parts, sum(seen.parts)
    shares = {name: value / total for name, value in parts._asdict().items()}
    told = []
    if shares["decode"] >= max(shares["crop"], shares["colours"]):
        told.append(f"Decoding takes {shares['decode']:.0%} of the time: {_pack(seen)}")
    if shares["read"] >= SLOW_READ:
        place = "copy it to a disk of this machine" if seen.source.startswith("pack:") else "pack it on a fast disk"
        told.append(
            f"Reading takes {shares['read']:.0%} of the time: {place}, or use more workers than cores, as they wait."
        )
    augmented = shares["crop"] + shares["colours"]
    other = next((name for name in seen.engines if name not in (seen.engine, "torchvision")), "")
    if augmented > shares["decode"]:
        way = (
            f"--engine {other} does that on the GPU" if seen.gpu and other else "smaller or fewer views, or more cores"
        )
        told.append(f"Crops and colours take {augmented:.0%} of the time: {way}.")
    return [*told, *_kind(seen)]


def _pack(seen: Situation) -> str:
    """The pack that saves decoding: the end of a sentence, without a full stop behind a command to copy."""
    if seen.source.startswith("pack:"):
        return "pack the images again with --kind yuv, which needs no decoding but several times the disk."
    side = max(1, math.ceil(seen.view_side * PACK_SIDE / 32)) * 32
    call = f"fastssl data pack {seen.source} --out FILE.pack"
    if seen.image_side > LARGE * seen.view_side:
        return (
            f"images of {seen.image_side} pixels are large for views of {seen.view_side}, so pack them smaller: "
            f"{call} --side {side}"
        )
    return f"a pack of pixels needs none, for several times the disk: {call} --kind yuv --side {side}"


def _kind(seen: Situation) -> list[str]:
    """Which kind of workers is faster, if it makes a difference."""
    if len(seen.rates) < 2:
        return []
    fast = max(seen.rates, key=seen.rates.__getitem__)
    fastest, slowest = seen.rates[fast], min(seen.rates.values())
    if fastest < FASTER * slowest:
        return []
    return [f"With workers of the kind {fast} the loader is {fastest / slowest - 1:.0%} faster: --worker-kind {fast}."]


def _cores(count: int) -> str:
    return f"{count:,} core" if count == 1 else f"{count:,} cores"
