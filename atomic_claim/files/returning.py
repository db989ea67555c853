"""The way back of a claimed file: to its own name, and never over another job of that name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from atomic_claim.errors import ClaimError

from . import attempts, listing
from .claimed import ClaimedFile, attempt_of, claim_folder, new_id
from .system import NoReplaceUnknownError, found_at, is_same, make_folder, refused, rename_new

FOLDER = ".returning"


class NameTakenError(Exception):
    """Another job waits under the name; the file is where it was."""


def put_back(file: ClaimedFile, spent: int) -> bool:
    """Let a claimed file wait again.

    Args:
        file: what was claimed.
        spent: how many attempts are to be counted.

    Returns:
        Whether it is this call that put it back; else it was not at its path any more.

    Raises:
        NameTakenError: another job waits under its name.
        ClaimError: the system refuses.
    """
    path, processing = str(file.path), str(file.processing)
    try:
        found = found_at(path)
        if found is None:
            return False
        # Before it waits: whoever claims it next must find the number.
        attempts.remember(processing, attempts.identity(file.name, found), spent)
        returned = move_back(path, os.path.join(file.waiting, file.name), processing)
    except OSError as error:
        raise refused(f"return {path!r} to {str(file.waiting)!r}", error) from error
    if returned:
        listing.note(str(file.waiting), file.name)
    return returned


def move_back(path: str, target: str, processing: str) -> bool:
    """Give a claimed file a name in the waiting folder, unless there is one like it.

    Returns:
        False if the file is not at this path any more.

    Raises:
        NameTakenError: the name is taken; the file is where it was.
        OSError: the system refuses; the file is where it was.
    """
    try:
        rename_new(path, target)
    except FileExistsError:
        if found_at(path) is None:
            return False
        raise NameTakenError from None
    except FileNotFoundError:
        if found_at(path) is None:
            return False
        raise
    except NoReplaceUnknownError:
        return _by_link(path, target, processing)
    return True


def _by_link(path: str, target: str, processing: str) -> bool:
    """Do the same by link(2), which never overwrites either, and unlink(2)."""
    if found_at(target) is not None:
        if found_at(path) is None:
            return False
        raise NameTakenError
    claim = os.path.basename(os.path.dirname(path))
    if attempt_of(claim) is None:
        # A consumer of platformatic's had it.
        claim = claim_folder(1, new_id())
    stage = Stage.make(processing, claim)
    # Under the name that it is to have: whoever goes on with it knows no other.
    staged = os.path.join(stage.folder, os.path.basename(target))
    try:
        # From here on it is not at its path: nobody completes it, nor returns it a second time.
        os.rename(path, staged)
    except FileNotFoundError:
        # rename(2), BUGS: over NFS it may have been renamed all the same.
        if found_at(staged) is None:
            stage.remove()
            return False
    moved = False
    try:
        moved = _linked(staged, target)
    finally:
        if not moved:
            with suppress(OSError):
                # Else it stays there, and the next recovery goes on with it.
                make_folder(os.path.dirname(path))
                os.rename(staged, path)
        stage.remove()
    return True


def _linked(staged: str, target: str) -> bool:
    """Give the staged file its waiting name, and no other."""
    try:
        os.link(staged, target)
    except FileExistsError:
        if not is_same(found_at(staged), found_at(target)):
            raise NameTakenError from None
    except FileNotFoundError:
        if found_at(staged) is not None:
            raise
        # A recovery goes on with it.
        return True
    # It waits. Should this name stay, the next claim or recovery removes it: see above.
    with suppress(OSError):
        os.unlink(staged)
    return True


@dataclass(frozen=True)
class Stage:
    """A folder from which nothing is claimed, where a file gets its second name."""

    folder: str

    @classmethod
    def make(cls, processing: str, claim: str) -> Stage:
        """Make it under the name of the claim, which is nobody else's."""
        above = os.path.join(processing, FOLDER)
        make_folder(above)
        stage = cls(os.path.join(above, claim))
        make_folder(stage.folder)
        return stage

    def remove(self) -> None:
        """Remove it, if it is empty."""
        remove_empty([self.folder])


def remove_empty(folders: Iterable[str]) -> None:
    """Remove those of the folders that are empty; the others are in use."""
    for folder in folders:
        with suppress(OSError):
            os.rmdir(folder)


def staged_files(processing: str) -> Iterator[tuple[str, str]]:
    """Yield the claim's folder and the name of each file that is being returned."""
    folder = os.path.join(processing, FOLDER)
    for claim in names_in(folder):
        if attempt_of(claim) is not None:
            for name in names_in(os.path.join(folder, claim)):
                yield claim, name


def names_in(folder: str) -> list[str]:
    """Return the sorted names in a folder, or an empty list if there is no such folder."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def drop_second_names(processing: str, files: Iterable[ClaimedFile]) -> None:
    """Remove what a SIGKILL between link and unlink has left of files that are claimed by now.

    Before their work begins: after it, the left name would be the only one, and a job.
    """
    if not (staged := list(staged_files(processing))):
        return
    claimed = {file.name: found_at(str(file.path)) for file in files}
    for claim, name in staged:
        path = os.path.join(processing, FOLDER, claim, name)
        try:
            if name in claimed and is_same(found_at(path), claimed[name]):
                os.unlink(path)
                remove_empty([os.path.dirname(path)])
        except FileNotFoundError:
            # A recovery has removed it.
            continue
        except OSError as error:
            raise refused(f"remove {path!r}, a second name of a claimed job", error) from error


def finish_returns(
    processing: str, waiting: str, before: int, refusals: list[ClaimError]
) -> list[str]:
    """Bring to its end what others began to return, whether they still live or not.

    Args:
        processing: the folder of all that is claimed.
        waiting: the folder that it was claimed from.
        before: what has a second name since a later time, in nanoseconds of the file system's
            clock, and is not seen under it, is left: over NFS that can still be to come.
        refusals: gets what is said where the system refuses.

    Returns:
        The names that wait by now.
    """
    done = []
    for claim, name in staged_files(processing):
        old = os.path.join(processing, FOLDER, claim, name)
        try:
            if _finish(old, name, processing, waiting, before):
                done.append(name)
        except (FileNotFoundError, NameTakenError):
            # Another recovery was quicker; or it comes with a later one.
            continue
        except OSError as error:
            refusals.append(refused(f"return {old!r} to {waiting!r}", error))
    return done


def _finish(old: str, name: str, processing: str, waiting: str, before: int) -> bool:
    folder = os.path.dirname(old)
    found = _freshly_found(old)
    if _has_other_name(found, name, processing, waiting):
        os.unlink(old)
        remove_empty([folder])
        return True
    # A second name that nobody sees is the user's own, such as a backup's.
    settled = found.st_ctime_ns <= before
    if found.st_nlink > 1 and not settled:
        return False
    attempt = attempt_of(os.path.basename(folder)) or 1
    stage = Stage.make(processing, claim_folder(attempt, new_id()))
    staged = os.path.join(stage.folder, name)
    try:
        # Whoever was about to link it finds it gone: from here on it is ours alone.
        os.rename(old, staged)
        if _freshly_found(staged).st_nlink > found.st_nlink:
            # Linked since that look: this name goes with the next claim or recovery.
            return False
        _linked(staged, os.path.join(waiting, name))
        listing.note(waiting, name)
    finally:
        remove_empty([stage.folder, folder])
    return True


def _has_other_name(found: os.stat_result, name: str, processing: str, waiting: str) -> bool:
    """Check whether the same file is already waiting or claimed."""
    if found.st_nlink == 1:
        return False

    def seen(folder: str) -> bool:
        return is_same(found, found_at(os.path.join(folder, name)))

    # Twice: on its way back from a claim it could be missed.
    for _ in range(2):
        if seen(waiting):
            return True
        for worker in names_in(processing):
            folder = os.path.join(processing, worker)
            # Those on their way back are not claimed.
            if worker != FOLDER and any(
                seen(os.path.join(folder, claim)) for claim in names_in(folder)
            ):
                return True
    return False


def _freshly_found(path: str) -> os.stat_result:
    """Return the file's stat after opening it: NFS then asks the server (nfs(5), close-to-open)."""
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except PermissionError:
        return os.lstat(path)
    try:
        return os.fstat(number)
    finally:
        os.close(number)


def taken_again(file: ClaimedFile) -> ClaimError:
    """Return the error for a file whose name is already in use in the waiting folder."""
    return ClaimError(
        f"cannot return {str(file.path)!r}: another job waits as "
        f"{os.path.join(file.waiting, file.name)!r}. It stays claimed: release it once that one "
        "is claimed, or complete or fail it"
    )
