"""The image files below a folder, and counts of everything else that is passed over.

The list is cached in ~/.cache/fastssl (or $XDG_CACHE_HOME) until one of the folders changes: adding, removing or
renaming a file changes the modification time of its folder.
"""

import hashlib
import json
import operator
import os
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fastssl.files import write_atomically

from .formats import SUFFIXES
from .reading import open_regular
from .source import cache_folder

PREVIEW = "fastssl-"  # start of the names of the pictures that fastssl writes of a folder
RUNS = "runs"  # folder in which a run's own folder is by default
MAX_CACHE = 2**31  # bytes of a cached list, which somebody may have made larger: paths of ten million images
LONGEST_SUFFIX = 12  # a longer one is a part of a name with a dot
IMAGES = frozenset(SUFFIXES)
SETTLED = 2 * 10**9  # nanoseconds after which a change is safe to cache: two changes in one clock tick look like one
_NAME = operator.attrgetter("name")


class Listing(NamedTuple):
    """What is below a root. Hidden files and folders (their names start with a dot) do not count."""

    paths: list[str]  # image files, relative to the root, in sorted order: a number is the same image on every machine
    others: dict[str, dict[str, int]]  # {folder in the root, "" for the root itself: {suffix: files that are no image}}
    tops: list[str]  # folders in the root
    ours: list[str]  # folders that fastssl wrote, such as runs; nothing in them counts


def list_files(root: Path) -> Listing:
    """The listing of a folder, from the cache if no folder in it has changed.

    Raises:
        OSError: a folder cannot be read.
    """
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:24]
    cache = cache_folder() / f"folder-{name}.json"
    if (cached := _read_cache(cache, root)) is not None:
        return cached
    started = time.time_ns()
    folders, listing = _walk(root)
    if max(changed for *_, changed, _ in folders.values()) > started - SETTLED:
        return listing
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(cache) as file:
            file.write(json.dumps({"suffixes": SUFFIXES, "folders": folders, **listing._asdict()}))
    except OSError:  # no space or no permission: the next call walks again
        pass
    return listing


def is_ours(name: str, entries: Iterable[str]) -> bool:
    """True for a folder that fastssl wrote: `runs` itself, and the folder of a run, wherever it is.

    Args:
        name: the folder's path relative to the root.
        entries: names of its files and folders.
    """
    return name == RUNS or ("config.json" in entries and ("metrics.jsonl" in entries or "checkpoints" in entries))


def is_folder(entry: os.DirEntry) -> bool:
    """True for a folder or a link to one; False for a link that cannot be followed, such as one to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _read_cache(cache: Path, root: Path) -> Listing | None:
    """The cached listing; None if there is none, a folder or the readable formats changed, or the cache is damaged."""
    try:
        with open_regular(cache) as file:
            if os.fstat(file.fileno()).st_size > MAX_CACHE:
                return None
            content = json.loads(file.readall())
        listing = Listing(*(content[field] for field in Listing._fields))
        listing.paths.sort()  # takes no time unless somebody changed their order
        if content["suffixes"] != list(SUFFIXES) or not _is_below(listing.paths) or not _is_below(content["folders"]):
            return None
        changed = any(_state(os.stat(root / folder)) != state for folder, state in content["folders"].items())
        return None if changed or not _is_plain(listing) else listing
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _is_below(paths: Iterable[str]) -> bool:
    """True if each of the relative paths stays in its root: a cache that somebody edited must not lead elsewhere."""
    paths = list(paths)
    text = "\0" + "\0".join(paths) + "\0"  # one search of all paths is 20 times faster than one of each
    steps = text.replace(os.sep, "\0")
    return text.count("\0") == len(paths) + 1 and f"\0{os.sep}" not in text and "\0..\0" not in steps


def _is_plain(listing: Listing) -> bool:
    """True if the parts other than the paths have their types."""
    counts = [count for kinds in listing.others.values() for count in kinds.values()]
    names = [*listing.tops, *listing.ours]
    return all(type(count) is int for count in counts) and all(type(name) is str for name in names)


def _state(folder: os.stat_result) -> list[int]:
    """Identity of a folder and times of its last change; the last one (ctime) can't be set back."""
    return [folder.st_dev, folder.st_ino, folder.st_mtime_ns, folder.st_ctime_ns]


def _walk(root: Path) -> tuple[dict[str, list[int]], Listing]:
    """The state of each folder below the root, and what it holds."""
    folders: dict[str, list[int]] = {}
    listing = Listing([], {}, [], [])
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while pending:
        folder, parents = pending.pop()
        stat = os.stat(root / folder)
        if (stat.st_dev, stat.st_ino) in parents:  # a link to a parent folder
            continue
        parents = (*parents, (stat.st_dev, stat.st_ino))
        if folder != RUNS:  # a running training would change its state
            folders[folder] = _state(stat)
        with os.scandir(root / folder) as scanned:
            entries = sorted((entry for entry in scanned if not entry.name.startswith(".")), key=_NAME)
        if folder and is_ours(folder, {entry.name for entry in entries}):
            listing.ours.append(folder)
            continue
        others: Counter[str] = Counter()
        prefix, below = os.path.join(folder, ""), []
        for entry in entries:
            if is_folder(entry):
                below.append((prefix + entry.name, parents))
            elif kind := _other_kind(entry):
                others[kind] += 1
            else:
                listing.paths.append(prefix + entry.name)
        pending += reversed(below)
        if others:
            top = folder.partition(os.sep)[0]
            listing.others[top] = dict(others + Counter(listing.others.get(top, {})))
        if not folder:
            listing.tops.extend(path for path, _ in pending)
    listing.paths.sort()  # nearly sorted, as each folder is: a third of the time
    listing.ours.sort()
    tops = sorted(set(listing.tops) - set(listing.ours))
    return folders, listing._replace(tops=tops)


def _other_kind(entry: os.DirEntry) -> str:
    """The suffix of a file that is passed over, or a phrase for it; "" for an image file.

    A link that leads nowhere or to a pipe counts as an image, which is then named among the images that are bad.
    """
    if not (entry.is_symlink() or entry.is_file()):
        return "pipe or device"
    name = entry.name.lower()
    _, dot, suffix = name.rpartition(".")
    if dot + suffix in IMAGES:
        return f"{PREVIEW}*" if name.startswith(PREVIEW) else ""
    if not dot:
        return "without a suffix"
    return "with other suffixes" if suffix.isdecimal() or len(suffix) >= LONGEST_SUFFIX else dot + suffix
