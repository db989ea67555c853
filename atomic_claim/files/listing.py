"""The names that wait, in order: one reading of a large folder serves many claims.

A folder of up to 1,000 names is read at every claim, which is then in order exactly. The listing of
a larger one is kept until it is used up, or until it is a second old, or ten times as old as its
reading took: until then a job that came in meanwhile waits behind those listed, whatever its name.
What this process itself puts, releases or recovers takes its place in the listing at once.
"""

from __future__ import annotations

import fnmatch
import heapq
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .layouts import Key, Layout
from .system import refused

SMALL = 1_000
# So many names are kept of a folder that has more: some 20 MB.
LARGEST = 100_000
SECONDS = 1.0
READINGS = 10
FOLDERS = 16


@dataclass(frozen=True)
class Ask:
    """Which names are asked for, and in what order."""

    waiting: str
    pattern: str
    key: Key | None
    layout: Layout
    skipped: frozenset[str] = frozenset()

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        return re.compile(fnmatch.translate(self.pattern))

    def matches(self, name: str) -> bool:
        """Check whether the name is a job's; hidden files may be incomplete."""
        return (
            not name.startswith(".")
            and name.endswith(self.layout.suffix)
            and self._compiled.match(name) is not None
        )

    def entry(self, name: str) -> Any:
        """Return the sort key of a name; equal keys are ordered by name."""
        key = self.key or self.layout.key
        return name if key is None else (key(name), name)


@dataclass
class Listing:
    """The names of one reading that nobody here has tried yet, as a heap."""

    entries: list[Any]
    seen: int
    made: float
    seconds: float
    # The last entry, where the folder had more than are kept.
    end: Any = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def stale(self) -> bool:
        """Check whether the folder must be read again before the next claim."""
        age = time.monotonic() - self.made
        return self.seen <= SMALL or age > max(SECONDS, READINGS * self.seconds)

    def pop(self) -> str | None:
        """Remove and return the next name, or return None if none is left."""
        with self.lock:
            if not self.entries:
                return None
            entry = heapq.heappop(self.entries)
        return entry if isinstance(entry, str) else entry[1]

    def push(self, entry: Any) -> None:
        """Put a name in its place, unless it comes after all that are kept."""
        with self.lock:
            if self.end is None or entry < self.end:
                heapq.heappush(self.entries, entry)


_known: OrderedDict[Ask, Listing] = OrderedDict()
_lock = threading.Lock()


def names(ask: Ask) -> Iterator[str]:
    """Yield the waiting names in order for one call of the claim.

    Raises:
        ClaimError: the folder cannot be read.
    """
    with _lock:
        listing = _known.get(ask)
    fresh = listing is None or listing.stale
    if listing is None or fresh:
        listing = _read(ask)
    while True:
        if (name := listing.pop()) is not None:
            yield name
        elif fresh and listing.end is None:
            return
        else:
            listing, fresh = _read(ask), True


def note(waiting: str, name: str) -> None:
    """Give a name that has come to wait its place in the listings of this process."""
    with _lock:
        found = [(ask, listing) for ask, listing in _known.items() if ask.waiting == waiting]
    for ask, listing in found:
        # A key that looks at the file misses it if somebody has claimed it already.
        with suppress(FileNotFoundError):
            if ask.matches(name):
                listing.push(ask.entry(name))


def drop(ask: Ask) -> None:
    """Forget a listing: a name was taken from it, and the job was not."""
    with _lock:
        _known.pop(ask, None)


def _read(ask: Ask) -> Listing:
    begin = time.monotonic()
    entries = sorted(_entries(ask))
    end = entries[LARGEST - 1] if len(entries) > LARGEST else None
    listing = Listing(entries[:LARGEST], len(entries), begin, time.monotonic() - begin, end)
    with _lock:
        _known[ask] = listing
        _known.move_to_end(ask)
        while len(_known) > FOLDERS:
            _known.popitem(last=False)
    return listing


def _entries(ask: Ask) -> Iterator[Any]:
    try:
        with os.scandir(ask.waiting) as found:
            for each in found:
                name = each.name
                if not ask.matches(name):
                    continue
                if name in ask.skipped and each.is_dir(follow_symlinks=False):
                    continue
                try:
                    yield ask.entry(name)
                except FileNotFoundError:
                    # A key that looks at the file: somebody has claimed it meanwhile.
                    continue
    except OSError as error:
        raise refused(f"list the waiting jobs in {ask.waiting!r}", error) from error
