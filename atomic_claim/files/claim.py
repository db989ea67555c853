"""The claim: one rename from the waiting folder to a path that nobody else can have."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from atomic_claim.errors import ClaimError

from . import attempts, listing
from .claimed import ClaimedFile, StrPath, claim_folder, full_path, new_id
from .layouts import Key, layout_of
from .platformatic import refuse_theirs
from .returning import (
    NameTakenError,
    drop_second_names,
    names_in,
    put_back,
    remove_empty,
)
from .system import found_at, make_folder, refused
from .workers import TRIES, beat, worker_name


def claim_files(
    waiting: StrPath,
    processing: StrPath,
    limit: int = 1,
    *,
    worker: str | None = None,
    pattern: str = "*",
    key: Key | None = None,
    layout: str = "plain",
) -> list[ClaimedFile]:
    """Claim up to ``limit`` waiting files: each goes to exactly one caller.

    A claim is one rename(2) into the worker's own folder below ``processing``, to a path that is
    unique to it; the file is read only afterwards. Of two workers that want the same file the
    second finds it gone (``ENOENT``) and takes the next. Files whose names begin with a dot are
    never claimed.

    The order is that of the names when the folder was last read. That is at every call while it
    has at most 1,000 files. A larger one is read again once the listing is used up, or older than
    a second and than ten times its reading took: until then jobs that other processes put
    meanwhile come after those listed, whatever their names.

    Args:
        waiting: the folder of the waiting jobs.
        processing: the folder of the claimed ones, on the same file system. Below the waiting
            folder it, and a folder ``failed`` beside it, are passed over.
        limit: how many files at most, an ``int`` of at least 1.
        worker: the claiming worker's name, unique to it among all that work on these folders;
            left out, one of this process's own.
        pattern: which names, as for :func:`fnmatch.fnmatchcase`.
        key: what the names are ordered by, given a name; equal keys are ordered by name. Pass the
            same function at every call: a listing is kept for each. A key that looks at the file
            may raise ``FileNotFoundError``: the file has been claimed.
        layout: ``"plain"``, or ``"platformatic"`` for a folder that consumers of platformatic's
            job-queue (FileStorage 0.5) work on, too: names that end in ``.msg``, ordered by the
            number before the first ``-``. Its ``waiting`` is their ``queue``.

    Returns:
        The claimed files in order, empty if nothing waits. Fewer than are there, if one of them
        cannot be claimed: the next call begins with it, and raises.

    Raises:
        ClaimError: a folder is missing, is on another file system or forbids it, the disk is
            full, or what waits is no file; nothing was claimed. The message names the path.
        ValueError, TypeError: ``limit`` is not an ``int`` of at least 1.
    """
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"limit is {limit!r}; expected an int of at least 1")
    if limit < 1:
        raise ValueError(f"limit is {limit!r}; expected an int of at least 1")
    name = worker_name(worker)
    kind = layout_of(layout)
    batch = Batch(full_path(waiting), full_path(processing), name)
    ask = listing.Ask(batch.waiting, pattern, key, kind, _passed_over(batch))
    if kind.shared:
        refuse_theirs(batch.processing, name)
    # First of all: a job must never be with a worker that has shown no sign of life since.
    beat(batch.processing, name)
    with batch:
        try:
            for waiting_name in listing.names(ask):
                batch.take(waiting_name)
                if len(batch.taken) == limit:
                    break
        except ClaimError:
            listing.drop(ask)
            if not batch.taken:
                raise
        if batch.taken:
            drop_second_names(batch.processing, batch.taken)
    return batch.taken


def _passed_over(batch: Batch) -> frozenset[str]:
    """Return the names in the waiting folder that contain folders of the queue itself."""
    below = os.path.join(batch.waiting, "")
    own = (batch.processing, os.path.join(os.path.dirname(batch.processing), "failed"))
    return frozenset(
        path.removeprefix(below).split(os.sep)[0] for path in own if path.startswith(below)
    )


class Batch:
    """The files that one call claims; they are released if it raises, even KeyboardInterrupt.

    Args:
        waiting: the full path of the waiting folder.
        processing: the full path of the folder of all that is claimed.
        worker: the worker's name.
    """

    def __init__(self, waiting: str, processing: str, worker: str) -> None:
        if waiting == processing:
            raise ClaimError(
                f"{waiting!r} cannot be both the waiting and the processing folder: name another"
            )
        self.waiting = waiting
        self.processing = processing
        self.taken: list[ClaimedFile] = []
        self._worker = worker
        self._id = new_id()
        # A folder an attempt, made when the first file needs it.
        self._folders: dict[int, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._give_back()
        remove_empty(self._folders.values())

    def _give_back(self) -> None:
        """Return all that is in this call's own folders, noted as taken or not yet."""
        for attempt, folder in self._folders.items():
            for name in names_in(folder):
                # What cannot be returned now comes with a recovery.
                with suppress(ClaimError, NameTakenError):
                    put_back(self._file(os.path.join(folder, name), attempt), attempt - 1)

    def take(self, name: str) -> None:
        """Claim one file, if it still waits.

        Raises:
            ClaimError: it waits, and cannot be claimed.
        """
        source = os.path.join(self.waiting, name)
        try:
            before = found_at(source)
            if before is None:
                return
            if not stat.S_ISREG(before.st_mode):
                raise _refusal(source, before, at=source)
            attempt = self._next_attempt(name, before)
            path = self._moved(source, name, attempt)
            if path is None:
                return
            after = found_at(path)
            if after is None:
                # It was recovered already: this process has slept for longer than older_than.
                return
            file = self._file(path, attempt)
            if not stat.S_ISREG(after.st_mode):
                # It was exchanged between the look and the rename.
                refusal = _refusal(source, after, at=path)
                with suppress(NameTakenError):
                    put_back(file, 0)
                raise refusal
            if (counted := self._next_attempt(name, after, attempt)) > attempt:
                # Somebody else had it in between, and spent an attempt.
                recounted = self._recounted(file, counted)
                if recounted is None:
                    return
                file = recounted
        except OSError as error:
            raise refused(f"claim {source!r} into {self.processing!r}", error) from error
        self.taken.append(file)

    def _next_attempt(self, name: str, found: os.stat_result, known: int = 1) -> int:
        job = attempts.identity(name, found)
        return attempts.spent(self.processing, job, known - 1) + 1

    def _file(self, path: str, attempt: int) -> ClaimedFile:
        name = os.path.basename(path)
        return ClaimedFile(Path(path), name, attempt, self._worker, Path(self.waiting))

    def _recounted(self, file: ClaimedFile, attempt: int) -> ClaimedFile | None:
        """Move the file to its real attempt's folder; return None if it was already recovered."""
        try:
            path = os.path.join(self._folder(attempt), file.name)
            os.rename(file.path, path)
        except FileNotFoundError:
            return None
        return self._file(path, attempt)

    def _moved(self, source: str, name: str, attempt: int) -> str | None:
        """Where the file is now; None if another worker was quicker."""
        for _ in range(TRIES):
            try:
                folder = self._folder(attempt)
                path = os.path.join(folder, name)
                os.rename(source, path)
            except FileNotFoundError:
                # rename(2), BUGS: over NFS it may have been renamed all the same. Only this call
                # can have made this path.
                if (folder := self._folders.get(attempt, "")) and found_at(folder) is not None:
                    path = os.path.join(folder, name)
                    return path if found_at(path) is not None else None
                # A recovery took this worker for dead, and its empty folders away.
                self._folders.pop(attempt, None)
                beat(self.processing, self._worker)
            else:
                return path
        raise ClaimError(
            f"cannot claim {source!r}: the folder of the claim below {self.processing!r} vanished "
            f"{TRIES} times. Is a recovery running with an older_than that is shorter than a "
            "claim takes?"
        )

    def _folder(self, attempt: int) -> str:
        if attempt not in self._folders:
            worker = os.path.join(self.processing, self._worker)
            folder = os.path.join(worker, claim_folder(attempt, self._id))
            make_folder(folder)
            self._folders[attempt] = folder
        return self._folders[attempt]


def _refusal(path: str, found: os.stat_result, *, at: str) -> ClaimError:
    """Return the error for an entry at a path that is no file; ``at`` is its present path."""
    what, cure = "neither a file nor a folder", "move it out of the waiting folder"
    if stat.S_ISDIR(found.st_mode):
        what = "a folder"
        cure = f"{cure}, or claim with a pattern= that it does not match"
    elif stat.S_ISLNK(found.st_mode):
        what = f"a symbolic link to {os.readlink(at)!r}"
        cure = "put the file itself there: a claim moves the link, and not what it leads to"
    return ClaimError(f"cannot claim {path!r}: it is {what}, and a job is a file; {cure}")
