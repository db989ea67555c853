"""The folders that a caller names: two, and not swapped."""

from __future__ import annotations

import os

from atomic_claim.errors import ClaimError

from .attempts import FOLDER
from .claimed import StrPath, full_path
from .system import found_at


def checked_folders(waiting: StrPath, processing: StrPath) -> tuple[str, str]:
    """Return the full paths of both folders.

    Raises:
        ClaimError: they are the same, or the waiting folder is the processing folder of claims.
    """
    source, target = full_path(waiting), full_path(processing)
    if source == target:
        raise ClaimError(
            f"{source!r} cannot be both the waiting and the processing folder: name another"
        )
    if found_at(os.path.join(source, FOLDER)) is not None:
        raise ClaimError(
            f"waiting is {source!r}, but {FOLDER!r} in it shows that it is the processing folder "
            f"of earlier claims. If the two are swapped, write waiting={target!r}, "
            f"processing={source!r}"
        )
    return source, target


def refuse_unclaimed(processing: str) -> None:
    """Refuse a processing folder that holds files and that no job was ever claimed into."""
    if found_at(os.path.join(processing, FOLDER)) is not None:
        return
    for each in visible(processing):
        if each.is_file(follow_symlinks=False):
            raise ClaimError(
                f"processing is {processing!r}, which no job was claimed into, but which holds the "
                f"file {each.name!r}. If waiting= and processing= are swapped, exchange them; "
                "otherwise move its files out, or name an empty folder"
            )


def visible(folder: str) -> list[os.DirEntry[str]]:
    """Return the entries of a folder whose names do not begin with a dot."""
    with os.scandir(folder) as entries:
        return [each for each in entries if not each.name.startswith(".")]
