"""A claimed job: a path that is nobody else's."""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from atomic_claim.errors import ClaimError, ClaimLost

from .system import refused

CLAIM = re.compile(r"([1-9][0-9]*)-([0-9a-f]{32})")
# Between a claimed path and the folder of all that is claimed: the claim, the worker.
DEPTH = 3

StrPath = str | os.PathLike[str]


def new_id() -> str:
    """128 random bits: no two claims have ever the same."""
    return secrets.token_hex(16)


def claim_folder(attempt: int, id_: str) -> str:
    """Return the name of a claim's folder."""
    return f"{attempt}-{id_}"


def attempt_of(folder: str) -> int | None:
    """Parse the attempt from the name of a claim's folder, or return None for other folders."""
    found = CLAIM.fullmatch(folder)
    return None if found is None else int(found[1])


def full_path(path: StrPath) -> str:
    """Return the absolute path, which stays valid when the process changes its directory."""
    return os.path.abspath(os.fsdecode(path))


def checked_name(name: object, what: str) -> str:
    """Return the name, or raise if it is no valid file name or begins with a dot."""
    if not isinstance(name, str):
        raise ClaimError(f"{what} is {name!r}; expected a str")
    if not name or os.path.split(name)[1] != name or "\0" in name:
        raise ClaimError(
            f"{what} is {name!r}; expected one name without a slash, that stays in its folder"
        )
    if name.startswith("."):
        raise ClaimError(
            f"{what} is {name!r}; expected a name that begins with no dot: such files are never "
            "claimed, since they may be half-written"
        )
    if len(os.fsencode(name)) > 255:  # noqa: PLR2004 - NAME_MAX of all common file systems
        raise ClaimError(f"{what} is {name!r}; expected a name of at most 255 bytes")
    return name


@dataclass(frozen=True)
class ClaimedFile:
    """A job's file that is ours as long as it is at this path.

    It goes wherever a path goes (``open(file)``), and, pickled, to other processes.

    Attributes:
        path: ``processing/<worker>/<attempt>-<id>/<name>``; unique to this claim.
        name: the name under which it waited.
        attempt: 1 at the first claim; recovered and retried jobs count on.
        worker: who claimed it.
        waiting: the folder that it was claimed from.
    """

    path: Path
    name: str
    attempt: int
    worker: str
    waiting: Path

    @classmethod
    def at(cls, path: StrPath, waiting: StrPath) -> ClaimedFile:
        """Create the claim for a claimed file's path, for code that received only the path.

        Args:
            path: a :attr:`path`.
            waiting: the folder that it was claimed from.

        Raises:
            ClaimError: the path is not one that :func:`claim_files` makes.
        """
        found = Path(full_path(path))
        attempt = attempt_of(found.parent.name)
        if attempt is None or len(found.parts) <= DEPTH:
            raise ClaimError(
                f"{os.fspath(path)!r} is not the path of a claimed file; expected "
                "processing/<worker>/<attempt>-<id>/<name>, as claim_files gives it"
            )
        worker = found.parent.parent.name
        return cls(found, found.name, attempt, worker, Path(full_path(waiting)))

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def processing(self) -> Path:
        """The folder of all that is claimed."""
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
