"""The options of ``patch_claims`` and ``claims``, declared once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict

from atomic_claim.errors import PatchError

OF_FILES = frozenset(
    {"directory", "processing", "limit", "worker", "returns", "empty", "when", "ignore"}
    | {"pattern", "key", "layout"}
)
"""What goes with ``directory``."""


class ClaimOptions(TypedDict, total=False):
    """The options of :func:`patch_claims`, which documents them."""

    session: Any
    limit: Any
    where: Any
    order_by: Any
    values: Any
    lease: Any
    worker: Any
    returns: Any
    empty: Any
    when: Any
    commit: Any
    delete: bool
    ignore: Iterable[str]
    directory: Any
    processing: Any
    pattern: str
    key: Callable[[str], Any] | None
    layout: str


NAMES = frozenset(ClaimOptions.__annotations__)


def check_names(options: ClaimOptions) -> None:
    """Refuse keywords that are no options, as a signature would."""
    if unknown := sorted(set(options) - NAMES):
        raise TypeError(
            f"{', '.join(unknown)}: no such option; expected {', '.join(sorted(NAMES))}"
        )


def check_files(options: Mapping[str, Any], target: str) -> None:
    """Refuse options of tables beside ``directory``."""
    others = [name for name, given in options.items() if name not in OF_FILES and given]
    if others:
        raise PatchError(
            f"{target}: {', '.join(others)} cannot go with directory=, whose jobs are files; "
            "leave it out"
        )
