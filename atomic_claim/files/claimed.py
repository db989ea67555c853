"""A claimed job: a file at a path that no other claim has."""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from atomic_claim.errors import ClaimError, ClaimLost

from .system import refused

CLAIM = re.compile(r"([1-9][0-9]*)-([0-9a-f]{16})[0-9a-f]{16}")
# Folders between a claimed file and the processing folder: the claim's and the worker's.
DEPTH = 3
LONGEST = 255  # bytes: NAME_MAX of all common file systems

StrPath = str | os.PathLike[str]


def new_id() -> str:
    """Return 64 random bits as 16 hexadecimal digits."""
    return secrets.token_hex(8)


def tag_of(name: str) -> str:
    """Return a name of 16 hexadecimal digits that stands for a job's name of any length."""
    return blake2b(os.fsencode(name), digest_size=8).hexdigest()


def claim_folder(attempt: int, name: str) -> str:
    """Return a new name for the folder of one claim of one job."""
    return f"{attempt}-{tag_of(name)}{new_id()}"


def attempt_of(folder: str, name: str) -> int | None:
    """Return the attempt in a claim folder's name, or None if the claim is not of this file.

    Any other file in the folder was written by the job, and is no job.
    """
    found = CLAIM.fullmatch(folder)
    return int(found[1]) if found is not None and found[2] == tag_of(name) else None


def full_path(path: StrPath) -> str:
    """Return the absolute path, which stays valid when the process changes its directory."""
    return os.path.abspath(os.fsdecode(path))


def checked_name(name: object, what: str) -> str:
    """Return the name, or raise if it is no valid file name or begins with a dot."""
    if (
        not isinstance(name, str)
        or os.path.basename(name) != name
        or name[:1] in {"", "."}
        or "\0" in name
        or len(os.fsencode(name)) > LONGEST
    ):
        raise ClaimError(
            f"{what} is {name!r}; expected a str that is one file name of at most {LONGEST} bytes "
            "without a dot in front, since hidden files may be half-written"
        )
    return name


@dataclass(frozen=True)
class ClaimedFile:
    """A claimed job's file. The job is yours for as long as the file is at this path.

    It can be passed wherever a path can (``open(file)``), and can be pickled. A job may rewrite
    its file, or replace it by a rename. Other files that it writes beside it are never jobs.

    Attributes:
        path: ``processing/<worker>/<attempt>-<id>/<name>``; unique to this claim.
        name: the name under which it waited.
        attempt: 1 at the first claim; one more for each attempt that was recovered or retried.
        worker: the name of the worker that claimed it.
        waiting: the folder that it was claimed from.
    """

    path: Path
    name: str
    attempt: int
    worker: str
    waiting: Path

    @classmethod
    def at(cls, path: StrPath, waiting: StrPath) -> ClaimedFile:
        """Return the claim of a claimed file's path, for code that received only the path.

        Args:
            path: the :attr:`path` of a claimed file.
            waiting: the folder that it was claimed from.

        Returns:
            The claim. Whether a file is at its path is not looked at.

        Raises:
            ClaimError: the path is not one that :func:`claim_files` makes.
        """
        found = Path(full_path(path))
        attempt = attempt_of(found.parent.name, found.name)
        if attempt is None or len(found.parts) <= DEPTH:
            raise ClaimError(
                f"{os.fspath(path)!r} is not the path of a claimed file; expected "
                "processing/<worker>/<attempt>-<id>/<name>, as claim_files returns it"
            )
        worker = found.parent.parent.name
        return cls(found, found.name, attempt, worker, Path(full_path(waiting)))

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def processing(self) -> Path:
        """Return the processing folder."""
        return self.path.parents[DEPTH - 1]

    def read_bytes(self) -> bytes:
        """Return the job's content.

        Raises:
            ClaimLost: it was recovered, or has ended.
            ClaimError: it cannot be read.
        """
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            raise lost([self], 1) from None
        except OSError as error:
            raise refused(f"read {str(self.path)!r}", error) from error

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return the job's content as text, without translating line ends.

        Args:
            encoding: as for :meth:`bytes.decode`.
            errors: as for :meth:`bytes.decode`.

        Raises:
            ClaimLost: it was recovered, or has ended.
            ClaimError: it cannot be read.
            UnicodeDecodeError: it is not in this encoding.
        """
        return self.read_bytes().decode(encoding, errors)


def lost(files: list[ClaimedFile], asked: int) -> ClaimLost:
    """Return the error for files that are no longer where their claim moved them."""
    paths = [str(file.path) for file in files]
    others = f". The other {asked - len(files)} were changed" if asked > len(files) else ""
    return ClaimLost(
        f"{len(files)} of {asked} jobs are no longer this claim's: nothing is at {paths!r}. They "
        "were recovered and may be another worker's, or they have ended: do not apply their "
        f"results{others}",
        keys=[(file.name,) for file in files],
    )
