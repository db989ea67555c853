"""The number of attempts a job has spent, kept under its name while it waits.

A claim moves the number into its own path, and whatever returns the job writes it here again. It
is kept by name: a job may rewrite its file, or replace it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import NamedTuple

from .claimed import new_id, tag_of
from .system import make_folder, remove, write_new

FOLDER = ".attempts"
CRASHED = "crashed"


class Spent(NamedTuple):
    """The attempts that a waiting job has behind it.

    Attributes:
        attempts: the number of attempts.
        crashed: True if the worker of the last attempt died.
    """

    attempts: int = 0
    crashed: bool = False


def _record(processing: str, name: str) -> str:
    return os.path.join(processing, FOLDER, tag_of(name))


def spent(processing: str, name: str) -> Spent:
    """Return the attempts recorded for a job of this name."""
    path = _record(processing, name)
    with suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as record:
        count, _, crashed = record.read().partition(" ")
        # A power failure can leave the record empty.
        if count.isdecimal():
            return Spent(int(count), crashed == CRASHED)
    return Spent()


def remember(processing: str, name: str, count: int, *, crashed: bool) -> None:
    """Record the attempts of a job before it waits; a recorded number is never lowered."""
    if count <= spent(processing, name).attempts:
        return
    record = _record(processing, name)
    make_folder(os.path.dirname(record))
    written = f"{os.path.dirname(record)}/.{new_id()}"
    write_new(written, f"{count} {CRASHED if crashed else ''}".encode())
    os.replace(written, record)


def forget(processing: str, name: str) -> None:
    """Drop the record: the number is in the path of a claim again."""
    remove(_record(processing, name))
