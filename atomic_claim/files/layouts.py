"""How a directory queue is laid out: which names are jobs, and what comes first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from atomic_claim.errors import ClaimError

from .platformatic import SUFFIX, place

Key = Callable[[str], Any]


@dataclass(frozen=True)
class Layout:
    """The rules of one kind of directory queue.

    Attributes:
        name: what callers say.
        suffix: what a job's name ends in.
        key: what orders the names, if not they themselves.
        shared: whether platformatic's own consumers work on the same folders.
    """

    name: str
    suffix: str = ""
    key: Key | None = None
    shared: bool = False


LAYOUTS = {
    layout.name: layout
    for layout in (Layout("plain"), Layout("platformatic", SUFFIX, place, shared=True))
}


def layout_of(name: str) -> Layout:
    """Return the layout of this name."""
    if name not in LAYOUTS:
        raise ClaimError(f"layout is {name!r}; expected one of {sorted(LAYOUTS)}")
    return LAYOUTS[name]
