"""Worker names, and the heartbeat that tells a slow worker from a dead one."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from functools import cache

from atomic_claim.errors import ClaimError

from .claimed import StrPath, checked_name, full_path, new_id
from .system import MAKE, make_folder, refused

HEARTBEAT = ".heartbeat"
# A recovery may remove the folder of a worker that was silent, just as it wakes up.
TRIES = 10


@cache
def _own_name(pid: int) -> str:
    """Return a name for a process, which tells it from an earlier one with the same pid."""
    host = socket.gethostname().replace(os.sep, "_").lstrip(".")[:64]
    return f"{host}-{pid}-{new_id()[:8]}"


def worker_name(worker: str | None) -> str:
    """Return the worker's name, which is also its folder's name; None for this process's."""
    return _own_name(os.getpid()) if worker is None else checked_name(worker, "worker")


def touch_worker(processing: StrPath, worker: str | None = None) -> None:
    """Record that a worker is alive, as every claim does.

    Call it more often than the ``older_than`` of :func:`recover_files`, for as long as the worker
    has jobs: from its loop, or from a thread that ends with it.

    Args:
        processing: the folder of the claimed jobs.
        worker: the worker's name; by default the name of this process.

    Raises:
        ClaimError: the folder is missing or cannot be written.
    """
    beat(full_path(processing), worker_name(worker))


def beat(processing: str, worker: str) -> None:
    """Renew the heartbeat; create it and the worker's folder if necessary."""
    folder = os.path.join(processing, worker)
    heartbeat = os.path.join(folder, HEARTBEAT)
    try:
        for _ in range(TRIES):
            make_folder(folder)
            with suppress(FileNotFoundError):
                os.close(os.open(heartbeat, MAKE, 0o666))
                # Without a time it is the file system's: on NFS the server's (utimensat(2)).
                os.utime(heartbeat)
                return
        raise ClaimError(
            f"cannot renew {heartbeat!r}: its folder vanished {TRIES} times. Call recover_files "
            "with an older_than that is longer than a claim takes"
        )
    except OSError as error:
        raise refused(f"renew {heartbeat!r}", error) from error


def last_beat(processing: str, worker: str) -> int:
    """Return the worker's last sign of life, in nanoseconds of the file system's clock.

    Raises:
        FileNotFoundError: there is no such worker.
    """
    folder = os.path.join(processing, worker)
    try:
        return os.lstat(os.path.join(folder, HEARTBEAT)).st_mtime_ns
    except FileNotFoundError:
        # The folder is made just before it, and both are removed together.
        return os.lstat(folder).st_mtime_ns
