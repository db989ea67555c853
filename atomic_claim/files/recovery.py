"""Recovery: return the files of dead workers to the waiting folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from atomic_claim.errors import ClaimError

from .claimed import ClaimedFile, StrPath, checked_name, new_id
from .ends import put_aside
from .folders import checked_folders, refuse_unclaimed, visible
from .platformatic import layout_of, left_by_theirs
from .returning import NameTakenError, claimed_in, move_back, names_in, put_back, remove_empty
from .system import found_at, make_folder, refused, remove, write_new
from .workers import HEARTBEAT, last_beat

# The folder of the claims that a recovery has taken from their workers.
TAKEN = ".recovered"


def recover_files(
    *,
    waiting: StrPath,
    processing: StrPath,
    older_than: timedelta | float,
    max_attempts: int | None = None,
    failed: StrPath | None = None,
    worker: str | None = None,
    layout: str = "plain",
) -> list[Path]:
    """Return the jobs of dead workers: those without a sign of life for a given time.

    A sign of life is the worker's heartbeat file, renewed by every claim and by
    :func:`touch_worker`; how long a job has been claimed does not count. The age is counted by
    the clock of the file system. The attempt counts as spent. Any number of processes may recover
    at once. A worker that was merely slow gets ``ClaimLost`` when it ends such a job.

    Files that a job wrote beside its own are not returned. They stay in
    ``processing/.recovered/<attempt>-<id>`` until you remove them.

    Args:
        waiting: the folder that the jobs were claimed from.
        processing: the folder of the claimed jobs.
        older_than: the time without a sign of life, as a ``timedelta`` or in seconds; longer than
            any pause between two signs of life of a worker.
        max_attempts: the number of attempts after which a job is moved to the failed ones, with
            its reason, instead of being returned.
        failed: the folder of the failed jobs, as for :func:`fail_files`.
        worker: recover the jobs of this worker only. A worker with a fixed name calls it with
            ``older_than=0`` when it starts, before it claims: otherwise its new claims keep the
            jobs from before its restart with it.
        layout: as for :func:`claim_files`. With ``"platformatic"``, jobs are returned, too, that
            a consumer of theirs moved at least so long ago without writing that it has them, since
            their reaper never returns these. They wait under the number 0: theirs is not known.

    Returns:
        The paths that wait again, in the order of their names. A job whose name waits already
        stays claimed, and comes with a later call.

    Raises:
        ClaimError: a folder is missing or forbids it; the folders are swapped; or there is no
            rename that never overwrites (NFS; systems other than Linux, macOS and Windows). The
            message names the path. Everything else that could be returned is waiting.
        ValueError: ``older_than`` is negative, or not a time.
    """
    shared = layout_of(layout)[0] != ""
    source, target = checked_folders(waiting, processing)
    if worker is not None:
        checked_name(worker, "worker")
    before = _clock(target, source) - _nanoseconds(older_than)
    refuse_unclaimed(target)
    recovery = Recovery(source, target, before, max_attempts, failed, shared)
    workers = [each.name for each in visible(target) if each.is_dir(follow_symlinks=False)]
    for name in [TAKEN, *(sorted(workers) if worker is None else [worker])]:
        with recovery.noted(os.path.join(target, name)):
            recovery.recover(name)
    if recovery.refusals:
        raise recovery.refusals[0]
    return [Path(path) for path in sorted(recovery.returned)]


def _nanoseconds(older_than: timedelta | float) -> int:
    seconds = older_than.total_seconds() if isinstance(older_than, timedelta) else older_than
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
        raise ValueError(f"older_than is {older_than!r}; expected a timedelta or seconds, from 0")
    return int(seconds * 1_000_000_000)


def _clock(processing: str, waiting: str) -> int:
    """Return the file system's time in nanoseconds, on NFS the server's.

    The file that tells it takes the way of a returned job: it is refused where one would be.
    """
    here, there = (os.path.join(each, f".probe-{new_id()}") for each in (processing, waiting))
    try:
        write_new(here, b"")
        os.utime(here)
        now = os.lstat(here).st_mtime_ns
        move_back(here, there)
    except OSError as error:
        raise refused(f"recover from {processing!r} into {waiting!r}", error) from error
    finally:
        remove(here)
        remove(there)
    return now


@dataclass
class Recovery:
    """One call's recovery of one worker after the other.

    Attributes:
        waiting: the full path of the waiting folder.
        processing: the full path of the processing folder.
        before: workers without a sign of life since this time are dead, in nanoseconds.
        max_attempts: the number of attempts after which a job is failed, or None.
        failed: the folder of the failed jobs, or None for the usual one.
        shared: True if consumers of platformatic's work on the folders.
        returned: the paths that wait again.
        refusals: the errors of jobs that could not be returned.
    """

    waiting: str
    processing: str
    before: int
    max_attempts: int | None
    failed: StrPath | None
    shared: bool
    returned: list[str] = field(default_factory=list)
    refusals: list[ClaimError] = field(default_factory=list)

    @contextmanager
    def noted(self, path: str) -> Iterator[None]:
        """Note what the system refuses in the block, and go on."""
        try:
            yield
        except (FileNotFoundError, NameTakenError):
            # Another recovery was faster, or its worker ended it; or it comes with a later call.
            pass
        except ClaimError as error:
            self.refusals.append(error)
        except OSError as error:
            self.refusals.append(refused(f"recover {path!r}", error))

    def recover(self, worker: str) -> None:
        """Return a dead worker's jobs, and remove its folder if nothing is left in it.

        Raises:
            FileNotFoundError: there is no such worker.
            OSError: the system refuses.
        """
        folder = os.path.join(self.processing, worker)
        claims = [os.path.join(folder, claim) for claim in names_in(folder)]
        files = [file for claim in claims for file in claimed_in(claim, self.waiting)]
        # After the look at the files: a living worker has touched it before it claimed any of them.
        if worker != TAKEN and last_beat(self.processing, worker) > self.before:
            return
        for file in files:
            with self.noted(str(file.path)):
                self._return(file)
        remove_empty(claims)
        if worker != TAKEN:
            self._remove_worker(worker)
            if self.shared:
                self._return_theirs(worker)

    def _return(self, file: ClaimedFile) -> None:
        spent = self.max_attempts is not None and file.attempt >= self.max_attempts
        target = os.path.join(self.waiting, file.name)
        if not spent and found_at(target) is not None:
            return
        if file.worker != TAKEN:
            file = self._taken(file)
        if spent:
            reason = f"its worker died in attempt {file.attempt} of {self.max_attempts}"
            put_aside(file, self.failed, reason)
        elif put_back(file, file.attempt, crashed=True):
            self.returned.append(target)
        remove_empty([str(file.path.parent)])

    def _taken(self, file: ClaimedFile) -> ClaimedFile:
        """Take the claim's folder from its worker, which may still be writing into it."""
        above = os.path.join(self.processing, TAKEN)
        taken = os.path.join(above, file.path.parent.name)
        make_folder(above)
        os.rename(file.path.parent, taken)
        return ClaimedFile.at(os.path.join(taken, file.name), self.waiting)

    def _remove_worker(self, worker: str) -> None:
        folder = os.path.join(self.processing, worker)
        # One without a heartbeat may be that of a platformatic consumer, which needs its folder.
        removable = ([HEARTBEAT],) if self.shared else ([HEARTBEAT], [])
        if names_in(folder) in removable and last_beat(self.processing, worker) <= self.before:
            remove(os.path.join(folder, HEARTBEAT))
            remove_empty([folder])

    def _return_theirs(self, worker: str) -> None:
        for path, name in left_by_theirs(self.processing, worker, self.before):
            target = os.path.join(self.waiting, name)
            with self.noted(path):
                if move_back(path, target):
                    self.returned.append(target)
