"""The claim: one rename from the waiting folder to a path that no other claim has."""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from atomic_claim.errors import ClaimError

from . import attempts, listing
from .claimed import ClaimedFile, StrPath, claim_folder
from .folders import checked_folders, refuse_unclaimed
from .platformatic import layout_of, refuse_theirs
from .returning import claimed_in, put_back, remove_empty
from .system import found_at, make_folder, refused
from .workers import TRIES, beat, worker_name


def claim_files(
    limit: int = 1,
    *,
    waiting: StrPath,
    processing: StrPath,
    worker: str | None = None,
    pattern: str = "*",
    key: listing.Key | None = None,
    layout: str = "plain",
) -> list[ClaimedFile]:
    """Claim up to ``limit`` waiting files: each goes to exactly one caller.

    A claim is one rename(2) into a new folder below ``processing/<worker>``; the file is read only
    afterwards. If two workers want the same file, the second finds it gone (``ENOENT``) and takes
    the next. Files whose names begin with a dot are never claimed.

    The files are ordered by name, as the folder was last read. It is read at every call while it
    has at most 1,000 files. A larger folder is read again once the listing is used up, or is older
    than a second and than ten times the time its reading took. Until then, files that other
    processes put are claimed after the listed ones, whatever their names.

    A job whose last worker died is claimed alone: if it kills the next worker too, no other job
    loses an attempt.

    Args:
        limit: the largest number of files, an ``int`` of at least 1.
        waiting: the folder of the waiting jobs.
        processing: the folder of the claimed jobs, on the same file system. It may be inside the
            waiting folder: folders are never claimed.
        worker: the worker's name, unique among all workers of these folders; by default a name
            of this process.
        pattern: the names to claim, as for :func:`fnmatch.fnmatchcase`.
        key: a function of the name that gives the sort key; equal keys are ordered by name. Pass
            the same function at every call: a listing is kept for each. A key that looks at the
            file may raise ``FileNotFoundError``: another worker has claimed it.
        layout: ``"plain"``, or ``"platformatic"`` for a folder on which consumers of platformatic's
            job-queue (FileStorage 0.5) work, too: names that end in ``.msg``, ordered by the
            number before the first ``-``. Its ``waiting`` is their ``queue``.

    Returns:
        The claimed files in order, empty if nothing waits. There are fewer if one of them cannot
        be claimed: the next call begins with it, and raises.

    Raises:
        ClaimError: a folder is missing, is on another file system, forbids the claim or is full;
            the folders are swapped; or an entry of the waiting folder is neither a file nor a
            folder. Nothing was claimed. The message names the path.
        ValueError, TypeError: ``limit`` is not an ``int`` of at least 1.
    """
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"limit is {limit!r}; expected an int of at least 1")
    if limit < 1:
        raise ValueError(f"limit is {limit!r}; expected an int of at least 1")
    name = worker_name(worker)
    source, target = checked_folders(waiting, processing)
    suffix, order = layout_of(layout)
    query = listing.Query(source, pattern, suffix, key or order)
    if suffix:
        refuse_theirs(target, name)
    # First: a job must never be with a worker that has shown no sign of life since.
    beat(target, name)
    batch = Batch(source, target, name)
    try:
        batch.fill(query, limit)
    except ClaimError:
        listing.drop(query)
        batch.give_back(batch.taken)
        if not batch.taken:
            raise
    except BaseException:
        batch.give_back([])
        raise
    if not batch.taken:
        refuse_unclaimed(target)
    return batch.taken


class Batch:
    """The files that one call claims.

    Args:
        waiting: the full path of the waiting folder.
        processing: the full path of the processing folder.
        worker: the worker's name.
    """

    def __init__(self, waiting: str, processing: str, worker: str) -> None:
        self.taken: list[ClaimedFile] = []
        self._waiting = waiting
        self._processing = processing
        self._worker = worker
        self._folders: list[str] = []

    def fill(self, query: listing.Query, limit: int) -> None:
        """Claim listed files up to the limit, or one file whose last worker died.

        Raises:
            ClaimError: a file waits, and cannot be claimed.
        """
        for name in listing.names(query):
            source = os.path.join(self._waiting, name)
            try:
                if not _is_file(source, source):
                    continue
                crashed = attempts.spent(self._processing, name).crashed
                if crashed and self.taken:
                    listing.note(self._waiting, name)
                    return
                self._take(source, name)
            except OSError as error:
                raise refused(f"claim {source!r} into {self._processing!r}", error) from error
            if self.taken and (crashed or len(self.taken) == limit):
                return

    def give_back(self, kept: list[ClaimedFile]) -> None:
        """Return the other files in this call's folders, noted as taken or not yet."""
        for folder in self._folders:
            for file in claimed_in(folder, self._waiting):
                # A file that cannot be returned now comes with a recovery.
                with suppress(ClaimError):
                    if file not in kept:
                        put_back(file, file.attempt - 1)
        remove_empty(self._folders)

    def _take(self, source: str, name: str) -> None:
        if not self._folders:
            # Its presence tells the processing folder from the waiting one.
            make_folder(os.path.join(self._processing, attempts.FOLDER))
        if (path := self._moved(source, name)) is None:
            return
        # It may have been exchanged between the look and the rename, or been recovered already.
        if _is_file(source, path) and (file := self._numbered(ClaimedFile.at(path, self._waiting))):
            self.taken.append(file)

    def _moved(self, source: str, name: str) -> str | None:
        """Move the file into a new folder; return None if another worker was faster."""
        for _ in range(TRIES):
            folder = self._folder(claim_folder(1, name))
            path = os.path.join(folder, name)
            try:
                make_folder(folder)
                os.rename(source, path)
            except FileNotFoundError:
                # rename(2), BUGS: over NFS it may have been renamed all the same.
                if found_at(path) is not None:
                    return path
                remove_empty([folder])
                if found_at(source) is None:
                    return None
                # A recovery took this worker for dead and removed its empty folders.
                beat(self._processing, self._worker)
            else:
                return path
        # Recoveries are faster than this worker, or NFS shows a file that is gone: it comes later.
        return None

    def _numbered(self, file: ClaimedFile) -> ClaimedFile | None:
        """Move the attempts that the job has spent into its path; return None if it is gone.

        Only now is the number certain: no other worker can claim the job and spend one.
        """
        count = attempts.spent(self._processing, file.name).attempts
        if count == 0:
            return file
        unnumbered = file.path.parent.name
        folder = self._folder(f"{count + 1}-{unnumbered.partition('-')[2]}")
        path = os.path.join(folder, file.name)
        try:
            os.rename(file.path.parent, folder)
        except FileNotFoundError:
            if found_at(path) is None:
                return None
        attempts.forget(self._processing, file.name)
        return ClaimedFile.at(path, self._waiting)

    def _folder(self, claim: str) -> str:
        folder = os.path.join(self._processing, self._worker, claim)
        # Before it is made: an interrupted call must find it.
        self._folders.append(folder)
        return folder


def _is_file(source: str, path: str) -> bool:
    """Return False if nothing is at the path.

    Raises:
        ClaimError: an entry is there that is not a file; it names the source.
    """
    if (found := found_at(path)) is None or stat.S_ISREG(found.st_mode):
        return found is not None
    what, cure = "not a file", "move it out of the waiting folder"
    if stat.S_ISLNK(found.st_mode):
        what = f"a symbolic link to {os.readlink(path)!r}"
        cure = "put the file itself there: a claim moves the link, and not what it leads to"
    raise ClaimError(f"cannot claim {source!r}: it is {what}, and a job is a file; {cure}")
