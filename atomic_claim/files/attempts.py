"""How often a job was claimed, kept beside it while it waits under its own name.

A marker a spent attempt, named after what a rename does not change: the inode, the time of the last
write, the name. Nobody has to read and rewrite a number, so nobody can set one back.
"""

from __future__ import annotations

import os
from contextlib import suppress
from hashlib import blake2b

from .system import MAKE, found_at, make_folder

FOLDER = ".attempts"


def identity(name: str, found: os.stat_result) -> str:
    """Return an id that differs from those of other files with the same name or a reused inode."""
    digest = blake2b(os.fsencode(name), digest_size=8).hexdigest()
    return f"{found.st_ino:x}-{found.st_mtime_ns:x}-{digest}"


def _marker(processing: str, job: str, attempt: int) -> str:
    return os.path.join(processing, FOLDER, f"{job}.{attempt}")


def spent(processing: str, job: str, known: int = 0) -> int:
    """How many attempts are spent, at least those that are known to be."""
    while found_at(_marker(processing, job, known + 1)) is not None:
        known += 1
    return known


def remember(processing: str, job: str, count: int) -> None:
    """Have this many attempts counted as spent; never fewer than before."""
    if count == 0 or found_at(_marker(processing, job, count)) is not None:
        return
    make_folder(os.path.join(processing, FOLDER))
    for attempt in range(1, count + 1):
        # An empty file: there is nothing of it that could be half-written.
        os.close(os.open(_marker(processing, job, attempt), MAKE, 0o666))


def forget(processing: str, job: str, count: int) -> None:
    """Drop the markers of a job that has ended; what is left of them does no harm."""
    for attempt in range(count, 0, -1):
        with suppress(OSError):
            os.unlink(_marker(processing, job, attempt))
