"""The end of a claim: complete, release, fail; each by one rename or unlink of the claimed path.

Nobody else has that path: if nothing is there, the claim is lost, and nothing was changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress

from atomic_claim.errors import ClaimError

from . import attempts
from .claimed import ClaimedFile, StrPath, attempt_of, full_path, lost
from .returning import NameTakenError, put_back, remove_empty, taken_again
from .system import found_at, make_folder, refused, write_new

Files = ClaimedFile | Iterable[ClaimedFile]
End = Callable[[ClaimedFile], bool]


def complete_files(files: Files, *, done: StrPath | None = None) -> int:
    """End claimed jobs: remove their files, or move them away.

    Args:
        files: what :func:`claim_files` returned, some of it, or one file.
        done: a folder to move them to, on the same file system, made if only it is missing; they
            are ``<worker>/<attempt>-<id>/<name>`` below it. Left out, they are removed.

    Returns:
        How many files were ended: all of them.

    Raises:
        ClaimLost: some are no longer this claim's; its ``keys`` has their names. The others are
            ended. (Over NFS up to version 4.0 the server can remove a file, be restarted, and say
            that it was never there: then this is raised of a job that has ended well.)
        ClaimError: the system refuses; the message names the path, and the job is still claimed.
            The others are ended.
    """
    if done is None:
        return _end(files, _remove)
    folder = full_path(done)
    return _end(files, lambda file: _move(file, folder))


def release_files(files: Files) -> int:
    """Give claimed jobs back as if they had not been claimed; the attempt does not count.

    Each waits again under its own name, and so in its own place in the order.

    Args:
        files: as for :func:`complete_files`.

    Returns:
        How many files were given back: all of them.

    Raises:
        ClaimLost: as for :func:`complete_files`.
        ClaimError: another job of that name waits by now, or the system refuses. The job is still
            claimed. The others are given back.
    """
    return _end(files, lambda file: _return(file, file.attempt - 1))


def fail_files(
    files: Files,
    error: str | BaseException | None = None,
    *,
    failed: StrPath | None = None,
    retry: bool = False,
) -> int:
    """Put claimed jobs aside as failed, or give them back for another attempt.

    Args:
        files: as for :func:`complete_files`.
        error: what went wrong; kept beside the job, as ``<attempt>-<id>.reason``.
        failed: a folder to move them to, on the same file system, made if only it is missing; they
            are ``<worker>/<attempt>-<id>/<name>`` below it. Left out, it is ``failed`` beside the
            processing folder.
        retry: ``True`` gives them back at once, like :func:`release_files`, but with the attempt
            counted; the error is not kept.

    Returns:
        How many files were put aside or given back: all of them.

    Raises:
        ClaimLost, ClaimError: as for :func:`complete_files`; with ``retry`` as for
            :func:`release_files`.
    """
    if retry:
        return _end(files, lambda file: _return(file, file.attempt))
    reason = None if error is None else str(error) or type(error).__name__

    def put_aside(file: ClaimedFile) -> bool:
        folder = file.processing.parent / "failed" if failed is None else failed
        return _move(file, full_path(folder), reason)

    return _end(files, put_aside)


def _end(files: Files, end: End) -> int:
    """End each file as far as can be, then say what could not be."""
    wanted = [files] if isinstance(files, ClaimedFile) else list(files)
    for file in wanted:
        if not isinstance(file, ClaimedFile):
            raise ClaimError(
                f"{file!r} is not a claimed file: pass what claim_files returned, or "
                "ClaimedFile.at(path, waiting)"
            )
    gone: list[ClaimedFile] = []
    refusals: list[ClaimError] = []
    for file in wanted:
        try:
            if not end(file):
                gone.append(file)
        except ClaimError as error:
            refusals.append(error)
    remove_empty({str(file.path.parent) for file in wanted})
    if refusals:
        raise refusals[0]
    if gone:
        raise lost(gone, len(wanted))
    return len(wanted)


def _return(file: ClaimedFile, spent: int) -> bool:
    try:
        return put_back(file, spent)
    except NameTakenError:
        raise taken_again(file) from None


def _remove(file: ClaimedFile) -> bool:
    path = str(file.path)
    try:
        found = _to_be_forgotten(file)
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise refused(f"remove {path!r}", error) from error
    _forget(file, found)
    return True


def _move(file: ClaimedFile, folder: str, reason: str | None = None) -> bool:
    """Move a file to a path that is as unique as the one it has."""
    path = str(file.path)
    claim = os.path.join(folder, file.worker, file.path.parent.name)
    target = os.path.join(claim, file.name)
    if attempt_of(file.path.parent.name) is None:
        raise ClaimError(f"{path!r} is not the path of a claimed file, as claim_files gives it")
    try:
        if found_at(path) is None:
            return False
        if not os.path.isdir(folder):
            os.mkdir(folder)
        make_folder(os.path.dirname(claim))
        make_folder(claim)
        if reason is not None:
            # First: a job must not be there without it.
            with suppress(FileExistsError):
                # Of an earlier try, which got no further.
                write_new(f"{claim}.reason", f"{reason}\n".encode("utf-8", "backslashreplace"))
        found = _to_be_forgotten(file)
        if not _renamed(path, target):
            remove_empty([claim])
            return False
    except OSError as error:
        raise refused(f"move {path!r} to {folder!r}", error) from error
    _forget(file, found)
    return True


def _renamed(path: str, target: str) -> bool:
    try:
        os.rename(path, target)
    except FileNotFoundError:
        # rename(2), BUGS: over NFS it may have been renamed all the same.
        if found_at(target) is not None:
            return True
        if found_at(path) is not None:
            raise
        return False
    return True


def _to_be_forgotten(file: ClaimedFile) -> os.stat_result | None:
    """Return the stat that names the markers of earlier attempts, or None for a first attempt."""
    return os.lstat(file.path) if file.attempt > 1 else None


def _forget(file: ClaimedFile, found: os.stat_result | None) -> None:
    if found is not None:
        job = attempts.identity(file.name, found)
        attempts.forget(str(file.processing), job, file.attempt)
