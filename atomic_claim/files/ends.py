"""The end of a claim: complete, release, fail; each by one rename or unlink of the claimed path.

No other claim has that path: if nothing is there, the claim is lost, and nothing was changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress

from atomic_claim.errors import ClaimError

from .claimed import LONGEST, ClaimedFile, StrPath, full_path, lost, tag_of
from .returning import put_back, remove_empty
from .system import NoReplaceUnknownError, found_at, refused, remove, rename_new, write_new

Files = ClaimedFile | Iterable[ClaimedFile]
End = Callable[[ClaimedFile], bool]


def complete_files(files: Files, *, done: StrPath | None = None) -> int:
    """End claimed jobs: remove their files, or move them away.

    Args:
        files: what :func:`claim_files` returned, some of it, or one file.
        done: a folder to move them to, on the same file system; created if only it is missing.
            Each is ``done/<name>``; if that exists, or where no rename is known not to overwrite
            (see :func:`put_file`), it is ``done/<name>.<attempt>-<id>``, as in its claimed path.
            Names that would exceed 255 bytes are cut and end in ``~`` and 16 hexadecimal digits.
            By default the files are removed.

    Returns:
        The number of files: all were ended.

    Raises:
        ClaimLost: some are no longer this claim's; its ``keys`` has their names. The others are
            ended. (Over NFS up to version 4.0 the server can remove a file, restart, and answer
            that it was never there: then this is raised for a job that has ended well.)
        ClaimError: the system refuses; the message names the path, and the job is still claimed.
            The others are ended.
    """
    if done is None:
        return _end(files, _remove)
    return _end(files, lambda file: put_aside(file, done))


def release_files(files: Files) -> int:
    """Return claimed jobs as if they had not been claimed; the attempt does not count.

    Each waits again under its own name, and so in its own place in the order.

    Args:
        files: as for :func:`complete_files`.

    Returns:
        The number of files: all were returned.

    Raises:
        ClaimLost: as for :func:`complete_files`.
        ClaimError: another job of that name waits by now; the system refuses; or there is no
            rename that never overwrites (NFS; systems other than Linux, macOS and Windows). The
            job is still claimed. The others are returned.
    """
    return _end(files, lambda file: put_back(file, file.attempt - 1))


def fail_files(
    files: Files,
    error: str | BaseException | None = None,
    *,
    failed: StrPath | None = None,
    retry: bool = False,
    max_attempts: int | None = None,
) -> int:
    """Move claimed jobs to the failed ones, or return them for another attempt.

    Args:
        files: as for :func:`complete_files`.
        error: the reason, kept beside each file as ``<name>.reason``. The reason of an exception
            is its message, or its type if it has none.
        failed: a folder to move them to, on the same file system; created if only it is missing.
            The names in it are as for ``done`` in :func:`complete_files`; a name is passed over
            if its reason exists, too. By default ``failed`` beside the processing folder.
        retry: ``True`` returns them at once, like :func:`release_files`, but the attempt counts;
            the error is not kept.
        max_attempts: with ``retry``, the number of attempts after which a job is failed instead.

    Returns:
        The number of files: all were failed or returned.

    Raises:
        ClaimLost, ClaimError: as for :func:`complete_files`; with ``retry`` as for
            :func:`release_files`.
    """
    reason = "" if error is None else str(error) or type(error).__name__

    def end(file: ClaimedFile) -> bool:
        if retry and (max_attempts is None or file.attempt < max_attempts):
            return put_back(file, file.attempt)
        return put_aside(file, failed, reason)

    return _end(files, end)


def _end(files: Files, end: End) -> int:
    """End each file that can be, then raise for the others."""
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


def _remove(file: ClaimedFile) -> bool:
    path = str(file.path)
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise refused(f"remove {path!r}", error) from error
    return True


def put_aside(file: ClaimedFile, into: StrPath | None, reason: str | None = None) -> bool:
    """Move a claimed file into a flat folder.

    Args:
        file: the claimed file.
        into: the folder, made if only it is missing; None for that of the failed jobs.
        reason: written beside it, unless empty; None in a folder without reasons.

    Returns:
        False if the file was no longer at its path.

    Raises:
        ClaimError: the system refuses; the file is where it was.
    """
    path = str(file.path)
    folder = full_path(file.processing.parent / "failed" if into is None else into)
    if folder in {str(file.waiting), str(file.processing)}:
        raise ClaimError(
            f"cannot move {path!r} to {folder!r}: jobs wait or are claimed there; name another"
        )
    try:
        if found_at(path) is None:
            return False
        with suppress(FileExistsError):
            os.mkdir(folder)
        try:
            return _moved(path, folder, file.name, "", reason)
        except (FileExistsError, NoReplaceUnknownError):
            # The claim's name is in use nowhere else.
            return _moved(path, folder, file.name, f".{file.path.parent.name}", reason)
    except OSError as error:
        raise refused(f"move {path!r} to {folder!r}", error) from error


def _moved(path: str, folder: str, name: str, suffix: str, reason: str | None) -> bool:
    target = os.path.join(folder, _shortened(name, suffix))
    beside = os.path.join(folder, _shortened(name, f"{suffix}.reason"))
    if not suffix and (found_at(target) or (reason is not None and found_at(beside))):
        raise FileExistsError
    if reason:
        # First: a failed job must not be there without it, nor with another job's.
        try:
            write_new(beside, f"{reason}\n".encode("utf-8", "backslashreplace"))
        except FileExistsError:
            # A recovery that was killed has written it for this claim.
            if not suffix:
                raise
    try:
        if suffix:
            os.rename(path, target)
        else:
            rename_new(path, target)
    except (OSError, NoReplaceUnknownError):
        # rename(2), BUGS: over NFS it may have been renamed all the same.
        if suffix and found_at(target) is not None:
            return True
        if reason:
            remove(beside)
        if found_at(path) is not None:
            raise
        return False
    return True


def _shortened(name: str, suffix: str) -> str:
    """Return the name with the suffix; a name that is too long is cut and marked by its hash."""
    if len(os.fsencode(name + suffix)) <= LONGEST:
        return name + suffix
    ending = f"~{tag_of(name)}{suffix}"
    return os.fsencode(name)[: LONGEST - len(ending)].decode(errors="ignore") + ending
