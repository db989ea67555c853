"""The producer: a job waits whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from atomic_claim.errors import ClaimError

from . import listing
from .claimed import StrPath, checked_name, full_path, new_id
from .system import NoReplaceUnknownError, refused, remove, rename_new, sync_folder, write_new

PREFIX = ".put-"

Data = bytes | bytearray | memoryview | str


def put_file(waiting: StrPath, name: str, data: Data, *, durable: bool = True) -> Path:
    """Put a job into the queue, whole or not at all, and never over another.

    It is written under a hidden name in the same folder, and renamed in one step that does not
    overwrite: by renameat2(2) with ``RENAME_NOREPLACE`` on Linux, its like on macOS, and Windows'
    own rename. Where there is none (NFS, other systems) link(2) gives it its name.

    Platformatic's consumers drop a job that their producer has not registered: put jobs for them
    with their producer.

    Args:
        waiting: the folder of the waiting jobs.
        name: the job's name there, of at most 255 bytes, without a dot in front.
        data: its content; a ``str`` is written as UTF-8.
        durable: True to flush the file and the folder by fsync(2), so that the job outlives a
            power failure once this returns.

    Returns:
        The path under which it waits.

    Raises:
        ClaimError: a job of this name waits, the folder is missing, forbids it or is full, or the
            name is not valid. Nothing waits that did not before, unless the message says so.
    """
    folder = full_path(waiting)
    target = os.path.join(folder, checked_name(name, "name"))
    content = data.encode() if isinstance(data, str) else bytes(data)
    hidden = os.path.join(folder, f"{PREFIX}{new_id()}")
    kept = "Nothing was put"
    try:
        write_new(hidden, content, durable=durable)
        _place(hidden, target)
        listing.note(folder, name)
        kept = "The job waits, but may not outlive a power failure"
        if durable:
            sync_folder(folder)
    except FileExistsError:
        raise ClaimError(
            f"cannot put {target!r}: a job, or a folder, of that name is there already and was "
            "left as it is; choose another name"
        ) from None
    except OSError as error:
        raise refused(f"put {target!r}", error, kept=kept) from error
    finally:
        remove(hidden)
    return Path(target)


def _place(hidden: str, target: str) -> None:
    try:
        rename_new(hidden, target)
    except NoReplaceUnknownError:
        # A kill after it leaves the hidden name, which is never claimed.
        try:
            os.link(hidden, target)
        except FileExistsError:
            # link(2), BUGS: over NFS it may have been linked all the same.
            if not os.path.samefile(hidden, target):
                raise
