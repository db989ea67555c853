"""The claim in the shape of a legacy function: so many of whatever that gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .claim import claim_files
from .claimed import ClaimedFile, StrPath
from .layouts import Key

T = TypeVar("T")


def claiming(
    waiting: StrPath,
    processing: StrPath,
    *,
    gives: Callable[[ClaimedFile], T],
    worker: str | None = None,
    pattern: str = "*",
    key: Key | None = None,
    layout: str = "plain",
) -> Callable[[int], list[T]]:
    """Return a function of a limit that claims files and returns what the legacy function returned.

    It is what a patch puts in the place of a function that lists a folder, copies and unlinks. The
    rest of the legacy code may go on as it is: it reads the path, and unlinks it at the end, which
    completes the job. If it was recovered meanwhile, the unlink raises ``FileNotFoundError``. A
    path alone becomes a claim again by :meth:`ClaimedFile.at`.

    Args:
        waiting: as for :func:`claim_files`.
        processing: as for :func:`claim_files`.
        gives: what is given of each claimed file: ``Path`` or ``os.fspath`` for its path,
            ``ClaimedFile.read_text`` for its content. The job stays claimed all the same, and
            whoever gets only the content cannot end it: let ``gives`` keep the file, or end it.
        worker: as for :func:`claim_files`.
        pattern: as for :func:`claim_files`.
        key: as for :func:`claim_files`.
        layout: as for :func:`claim_files`.

    Returns:
        The function; it raises as :func:`claim_files` does.
    """

    def claim(limit: int = 1) -> list[T]:
        files = claim_files(
            waiting, processing, limit, worker=worker, pattern=pattern, key=key, layout=layout
        )
        return [gives(file) for file in files]

    return claim
