"""The return of a claimed file to its own name, never over another job of that name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress

from atomic_claim.errors import ClaimError

from . import attempts, listing
from .claimed import ClaimedFile, attempt_of
from .system import NoReplaceUnknownError, found_at, refused, rename_new


class NameTakenError(ClaimError):
    """Raised if another job waits under the name; the file is where it was."""


def put_back(file: ClaimedFile, spent: int, *, crashed: bool = False) -> bool:
    """Return a claimed file to the waiting folder.

    Args:
        file: the claimed file.
        spent: the number of attempts to be counted.
        crashed: True if the worker of the last attempt died.

    Returns:
        True if this call returned it; False if it was no longer at its path.

    Raises:
        NameTakenError: another job waits under its name.
        ClaimError: the system refuses, or cannot do it safely.
    """
    path, processing = str(file.path), str(file.processing)
    target = os.path.join(file.waiting, file.name)
    try:
        taken = found_at(target) is not None
        # Only now: else what waits could be this very file, returned meanwhile by a recovery.
        if found_at(path) is None:
            return False
        if taken:
            raise _taken(path, target)
        # Before it waits: the next claim must find the number.
        attempts.remember(processing, file.name, spent, crashed=crashed)
        try:
            returned = move_back(path, target)
        except (OSError, ClaimError):
            attempts.forget(processing, file.name)
            raise
    except OSError as error:
        raise refused(f"return {path!r} to {str(file.waiting)!r}", error) from error
    if returned:
        listing.note(str(file.waiting), file.name)
    return returned


def move_back(path: str, target: str) -> bool:
    """Rename a file to a name in the waiting folder, unless that name exists.

    Returns:
        False if the file is no longer at this path.

    Raises:
        NameTakenError: the name is taken; the file is where it was.
        ClaimError: there is no rename here that never overwrites; the file is where it was.
        OSError: the system refuses; the file is where it was.
    """
    try:
        rename_new(path, target)
    except NoReplaceUnknownError as error:
        raise ClaimError(
            f"cannot return {path!r} to {target!r}: this system or file system (NFS, for one) has "
            "no rename that never overwrites, and a job put under that name meanwhile would be "
            "lost. The job is left where it was; complete it, fail it without retry, or keep the "
            "queue on a local file system of Linux, macOS or Windows"
        ) from error
    except (FileExistsError, FileNotFoundError) as error:
        if found_at(path) is None:
            return False
        if isinstance(error, FileExistsError):
            raise _taken(path, target) from None
        raise
    return True


def _taken(path: str, target: str) -> NameTakenError:
    return NameTakenError(
        f"cannot return {path!r}: another job waits as {target!r}. It stays claimed: release it "
        "once that one is claimed, or complete or fail it"
    )


def remove_empty(folders: Iterable[str]) -> None:
    """Remove those of the folders that are empty; the others are in use."""
    for folder in folders:
        with suppress(OSError):
            os.rmdir(folder)


def names_in(folder: str) -> list[str]:
    """Return the sorted names in a folder, or an empty list if there is no such folder."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def claimed_in(folder: str, waiting: str) -> list[ClaimedFile]:
    """Return the job in the folder of a claim, if it is there: the other files are no jobs."""
    return [
        ClaimedFile.at(os.path.join(folder, name), waiting)
        for name in names_in(folder)
        if attempt_of(os.path.basename(folder), name) is not None
    ]
