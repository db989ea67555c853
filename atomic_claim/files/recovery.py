"""Recovery: return the files of dead workers to the waiting folder."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from atomic_claim.errors import ClaimError

from .claimed import ClaimedFile, StrPath, attempt_of, checked_name, full_path
from .layouts import layout_of
from .platformatic import left_by_theirs
from .returning import (
    NameTakenError,
    finish_returns,
    move_back,
    names_in,
    put_back,
    remove_empty,
)
from .system import refused
from .workers import HEARTBEAT, clock, last_beat


def recover_files(
    processing: StrPath,
    waiting: StrPath,
    older_than: timedelta | float,
    *,
    worker: str | None = None,
    layout: str = "plain",
) -> list[Path]:
    """Return the jobs of workers that have shown no sign of life for so long.

    A sign of life is the worker's heartbeat file, renewed by every claim and by
    :func:`touch_worker`; how long a job has been claimed does not count. The age is counted by
    the clock of the file system. The attempt counts as spent. Any number of processes may recover
    at once. A worker that was merely slow gets ``ClaimLost`` when it ends such a job.

    Args:
        processing: the folder of all that is claimed.
        waiting: the folder that it was claimed from.
        older_than: for how long a worker must have been silent, as a ``timedelta`` or in seconds;
            longer than any pause between two of its signs of life.
        worker: recover this one's jobs alone. A worker that has a name of its own calls it, with
            ``older_than=0``, when it starts again, before it claims: else its new life keeps the
            jobs of its old one.
        layout: as for :func:`claim_files`. With ``"platformatic"``, also what a consumer of theirs
            moved at least so long ago without ever writing that it has it, which their reaper
            never returns; it waits under the number 0, since its own is not known any more.

    Returns:
        The paths that wait again, in the order of their names. A job whose name waits already
        stays claimed, and comes with a later call.

    Raises:
        ClaimError: a folder is missing or forbids it; the message names the path. Whatever else
            could be returned is waiting.
    """
    age = _nanoseconds(older_than)
    kind = layout_of(layout)
    folder, target = full_path(processing), full_path(waiting)
    if worker is not None:
        checked_name(worker, "worker")
    for needed in (folder, target):
        _check_folder(needed)
    before = clock(folder) - age
    refusals: list[ClaimError] = []
    finished = finish_returns(folder, target, before, refusals)
    returned = [os.path.join(target, name) for name in finished]
    for name in [worker] if worker is not None else _workers(folder):
        try:
            returned += _recover(folder, target, name, before, refusals)
            _remove_worker(folder, name, before, shared=kind.shared)
            if kind.shared:
                returned += _recover_theirs(folder, target, name, before)
        except FileNotFoundError:
            # Another recovery was quicker, or there never was such a worker.
            continue
        except OSError as error:
            refusals.append(refused(f"recover {os.path.join(folder, name)!r}", error))
    if refusals:
        raise refusals[0]
    return [Path(path) for path in sorted(returned)]


def _nanoseconds(older_than: timedelta | float) -> int:
    if isinstance(older_than, timedelta):
        older_than = older_than.total_seconds()
    if isinstance(older_than, bool) or not isinstance(older_than, int | float):
        raise TypeError(f"older_than is {older_than!r}; expected a timedelta or seconds")
    if not older_than >= 0:
        raise ValueError(f"older_than is {older_than!r}; expected at least zero")
    return int(older_than * 1_000_000_000)


def _check_folder(path: str) -> None:
    try:
        os.scandir(path).close()
    except OSError as error:
        raise refused(f"recover from or into {path!r}", error) from error


def _workers(processing: str) -> list[str]:
    with os.scandir(processing) as entries:
        return sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
        )


def _recover(
    processing: str, waiting: str, worker: str, before: int, refusals: list[ClaimError]
) -> list[str]:
    folder = os.path.join(processing, worker)
    claims = [name for name in names_in(folder) if attempt_of(name) is not None]
    files = [
        ClaimedFile.at(os.path.join(folder, claim, name), waiting)
        for claim in claims
        for name in names_in(os.path.join(folder, claim))
        if not name.startswith(".")
    ]
    # After the look at the files: a living worker has touched it before it claimed any of them.
    if last_beat(processing, worker) > before:
        return []
    returned = []
    for file in files:
        try:
            if put_back(file, file.attempt):
                returned.append(os.path.join(waiting, file.name))
        except NameTakenError:
            continue
        except ClaimError as error:
            refusals.append(error)
    remove_empty(os.path.join(folder, claim) for claim in claims)
    return returned


def _remove_worker(processing: str, worker: str, before: int, *, shared: bool) -> None:
    """Remove a dead worker's folder, if nothing but its heartbeat is in it."""
    folder = os.path.join(processing, worker)
    # One without may be that of a consumer of platformatic's, which counts on its own folder.
    removable = ([HEARTBEAT],) if shared else ([HEARTBEAT], [])
    if names_in(folder) in removable and last_beat(processing, worker) <= before:
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, HEARTBEAT))
        remove_empty([folder])


def _recover_theirs(processing: str, waiting: str, worker: str, before: int) -> list[str]:
    returned = []
    for path, name in left_by_theirs(processing, worker, before):
        target = os.path.join(waiting, name)
        try:
            if move_back(path, target, processing):
                returned.append(target)
        except NameTakenError:
            continue
    return returned
