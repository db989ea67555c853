"""System calls that ``os`` does not have, and the cures of their errors."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
from contextlib import suppress
from typing import Any

from atomic_claim.errors import ClaimError

# macOS has the same call under another name, with constants of its own.
CALL, AT_FDCWD, NO_REPLACE = (
    ("renameatx_np", -2, 4) if sys.platform == "darwin" else ("renameat2", -100, 1)
)
# Answers of a kernel, a C library or a file system that does not know the flag.
UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
MAKE = os.O_WRONLY | os.O_CREAT | NO_FOLLOW

CURES = {
    errno.ENOENT: "make the missing folder, or correct the path",
    errno.ENOTDIR: "a file or a symbolic link stands where a folder is expected: correct the path",
    errno.EXDEV: "a rename cannot leave its file system: put all folders of a queue on one",
    errno.EACCES: "let this user write to, and search, both folders; workers share one user",
    errno.EPERM: "let this user write to both folders; in a sticky one files must be its own",
    errno.EROFS: "mount the file system for writing",
    errno.ENOSPC: "the disk is full, or out of inodes: make room",
    errno.EDQUOT: "the quota is used up: make room",
    errno.ENAMETOOLONG: "choose a shorter name, or folders nearer to the root",
    errno.ELOOP: "a symbolic link stands in the way: put the folder or file itself there",
}


class NoReplaceUnknownError(Exception):
    """Raised where the system or file system has no rename that never overwrites."""


def refused(
    doing: str, error: OSError, *, kept: str = "The job is left where it was"
) -> ClaimError:
    """Return the error for a failed system call.

    Args:
        doing: what could not be done, with its path, as it follows "cannot".
        error: the system's answer.
        kept: what has become of the job.
    """
    name = errno.errorcode.get(error.errno or 0, type(error).__name__)
    cure = CURES.get(error.errno or 0, "see errno(3)")
    return ClaimError(f"cannot {doing}: {error.strerror or error} ({name}). {kept}; {cure}")


try:
    # glibc has it from 2.28, musl from 1.2.5, macOS from 10.12.
    _renameat2: Any = getattr(ctypes.CDLL(None, use_errno=True), CALL)
except (OSError, AttributeError, TypeError):
    _renameat2 = None


def renameat2(source: str, target: str, flags: int) -> None:
    """Rename by the system call of this name.

    Raises:
        OSError: as the system says; ``ENOSYS`` where there is no such call.
    """
    number = errno.ENOSYS
    if _renameat2 is not None:
        names = os.fsencode(source), os.fsencode(target)
        if _renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], flags) == 0:
            return
        number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), source, None, target)


def rename_new(source: str, target: str) -> None:
    """Rename in one step, and never overwrite.

    Raises:
        FileExistsError: the target is there; nothing was changed.
        NoReplaceUnknownError: this system or file system has no such call.
        OSError: any other refusal.
    """
    if os.name == "nt":
        # By the documentation of `os.rename` it never overwrites on Windows.
        os.rename(source, target)
        return
    try:
        renameat2(source, target, NO_REPLACE)
    except OSError as error:
        if error.errno in UNKNOWN:
            raise NoReplaceUnknownError from error
        raise


def found_at(path: str) -> os.stat_result | None:
    """Return the stat at a path, without following a symbolic link, or None if nothing exists."""
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def make_folder(path: str) -> None:
    """Make a folder, if it does not exist.

    Raises:
        OSError: it cannot be made; ``ENOTDIR`` if a file, or a link to a folder, is in its place.
    """
    try:
        os.mkdir(path)
    except FileExistsError:
        found = found_at(path)
        if found is not None and not stat.S_ISDIR(found.st_mode):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None


def write_new(path: str, content: bytes, *, durable: bool = False) -> None:
    """Write a file that does not exist yet; remove it again if it cannot be written whole.

    Args:
        path: the path of the new file.
        content: all of its content.
        durable: True to flush it by fsync(2).
    """
    number = os.open(path, MAKE | os.O_EXCL, 0o666)
    try:
        rest = memoryview(content)
        # A disk that fills up, or a signal, can end a write early without an error.
        while rest:
            rest = rest[os.write(number, rest) :]
        if durable:
            os.fsync(number)
    except BaseException:
        remove(path)
        raise
    finally:
        os.close(number)


def remove(path: str) -> None:
    """Remove a file of the library's own, if the system lets it."""
    with suppress(OSError):
        os.unlink(path)


def sync_folder(path: str) -> None:
    """Flush the folder, so that its entries outlive a power failure (fsync(2))."""
    if os.name == "nt":
        # No folder can be opened there, and NTFS keeps a journal of its names.
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
