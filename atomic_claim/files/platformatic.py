"""The folders of platformatic's job-queue, FileStorage 0.5.

Read in ``@platformatic/job-queue`` 0.5.0 (``src/storage/file.ts``, ``consumer.ts``, ``reaper.ts``)
and in ``fast-write-atomic`` 0.4:

- ``queue/<number>-<id>.msg`` waits, ordered by the number alone; a producer begins with the highest
  number that it finds, so two of them can give the same. ``queue/.<pid>.<n>`` is half-written.
- A consumer moves it to ``processing/<worker>/<id>.msg`` by a rename, then writes
  ``processing:<time>:<worker>`` into ``jobs/<id>.state``. ``stop()`` deletes its whole folder.
- A retry, and the reaper, unlink exactly ``processing/<worker>/<id>.msg`` and write a new file into
  ``queue``. The reaper looks only at jobs whose state is ``processing``.

So a claim of ours, one folder deeper and below another worker's name, is none of theirs.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from atomic_claim.errors import ClaimError

from .system import found_at

SUFFIX = ".msg"
NUMBER = re.compile("[0-9]+")
# Theirs to return (`processing`), or at their end already.
THEIRS = ("processing:", "completed:", "failed:")
# Their numbers begin with 1: what was taken from the queue before goes before all of them.
FIRST = "000000000000-"


def place(name: str) -> float:
    """Return the number before the first ``-``, which orders the names, or infinity without one.

    Equal numbers are ordered by name (by their consumers not at all).
    """
    found = NUMBER.match(name)
    return int(found[0]) if found is not None else math.inf


# The end of the names, and what orders them. Only platformatic's folders are shared.
LAYOUTS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "plain": ("", str),
    "platformatic": (SUFFIX, place),
}


def layout_of(layout: str) -> tuple[str, Callable[[str], Any]]:
    """Return the end of the names of a layout, empty for a plain one, and their sort key."""
    if layout not in LAYOUTS:
        raise ClaimError(f"layout is {layout!r}; expected one of {sorted(LAYOUTS)}")
    return LAYOUTS[layout]


def refuse_theirs(processing: str, worker: str) -> None:
    """Refuse the name of a worker that is one of their consumers: its ``stop()`` deletes all."""
    registered = os.path.join(os.path.dirname(processing), "workers", f"{worker}.worker")
    if found_at(registered) is not None:
        raise ClaimError(
            f"worker is {worker!r}, and {registered!r} says that a consumer of platformatic's has "
            "that name: when it stops it deletes its whole folder, with our jobs. Choose another"
        )


def left_by_theirs(processing: str, worker: str, before: int) -> Iterator[tuple[str, str]]:
    """Yield the jobs that a platformatic consumer took and that its reaper will never return.

    They are those that it moved before the time given, by the file system's clock, without ever
    writing that it has them: it died in between.

    Yields:
        The job's path, and the name that it is to wait under: its own is not known any more.
    """
    folder = os.path.join(processing, worker)
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name.endswith(SUFFIX))
    for name in names:
        path = os.path.join(folder, name)
        found = found_at(path)
        # A rename sets this time, on the common file systems of Linux.
        if found is None or found.st_ctime_ns > before:
            continue
        if not _is_theirs(processing, name.removesuffix(SUFFIX)):
            yield path, FIRST + name


def _is_theirs(processing: str, job: str) -> bool:
    path = os.path.join(os.path.dirname(processing), "jobs", f"{job}.state")
    with suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read(100).startswith(THEIRS)
    return False
