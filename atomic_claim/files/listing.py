"""The names that wait, in order: one reading of a large folder serves many claims.

A folder of up to 1,000 names is read at every claim, which is then in order exactly. The listing of
a larger one is kept until it is used up, or until it is a second old, or ten times as old as its
reading took: until then a job that came in meanwhile waits behind the listed ones, whatever its
name. What this process itself puts, releases or recovers takes its place in the listing at once.
"""

from __future__ import annotations

import heapq
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from .system import refused

SMALL = 1_000
SECONDS = 1.0
READINGS = 10
FOLDERS = 16

Key = Callable[[str], Any]
Entry = tuple[Any, str]


@dataclass(frozen=True)
class Query:
    """The names that are asked for, and their order."""

    waiting: str
    pattern: str
    suffix: str
    key: Key

    def matches(self, name: str) -> bool:
        """Check whether the name is a job's; hidden files may be incomplete."""
        return (
            not name.startswith(".")
            and name.endswith(self.suffix)
            and fnmatchcase(name, self.pattern)
        )

    def entry(self, name: str) -> Entry:
        """Return what is sorted: equal keys are ordered by name."""
        return self.key(name), name


@dataclass
class Listing:
    """The names of one reading that this process has not tried yet, as a heap."""

    entries: list[Entry]
    expires: float

    def pop_all(self) -> Iterator[str]:
        """Remove and yield one name after the other until none is left."""
        while True:
            with _lock:
                if not self.entries:
                    return
                _, name = heapq.heappop(self.entries)
            yield name

    def push(self, entry: Entry) -> None:
        """Put a name in its place."""
        with _lock:
            heapq.heappush(self.entries, entry)


_known: dict[Query, Listing] = {}
_lock = threading.Lock()


def names(query: Query) -> Iterator[str]:
    """Yield the waiting names in order for one call of the claim.

    Raises:
        ClaimError: the folder cannot be read.
    """
    listing = _known.get(query)
    if listing is not None and time.monotonic() <= listing.expires:
        yield from listing.pop_all()
    yield from _read(query).pop_all()


def note(waiting: str, name: str) -> None:
    """Give a name that has come to wait its place in the listings of this process."""
    for query, listing in list(_known.items()):
        # A key that looks at the file misses it if another worker has claimed it already.
        with suppress(FileNotFoundError):
            if query.waiting == waiting and query.matches(name):
                listing.push(query.entry(name))


def drop(query: Query) -> None:
    """Forget a listing: a name was taken from it, and the job was not."""
    _known.pop(query, None)


def _read(query: Query) -> Listing:
    begin = time.monotonic()
    entries = sorted(_entries(query))
    lasts = max(SECONDS, READINGS * (time.monotonic() - begin)) if len(entries) > SMALL else 0
    listing = Listing(entries, begin + lasts)
    with _lock:
        # The oldest reading is the first.
        _known.pop(query, None)
        _known[query] = listing
        while len(_known) > FOLDERS:
            del _known[next(iter(_known))]
    return listing


def _entries(query: Query) -> Iterator[Entry]:
    try:
        with os.scandir(query.waiting) as found:
            for each in found:
                # A key that looks at the file misses it if another worker has claimed it.
                with suppress(FileNotFoundError):
                    if query.matches(each.name) and not each.is_dir(follow_symlinks=False):
                        yield query.entry(each.name)
    except OSError as error:
        raise refused(f"list the waiting jobs in {query.waiting!r}", error) from error
