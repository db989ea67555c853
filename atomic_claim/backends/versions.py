"""Server versions that a claim needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Dialect

from atomic_claim.errors import UnsupportedDialect


def require(
    dialect: Dialect,
    product: str,
    least: tuple[int, ...],
    because: str,
    *,
    prefix: tuple[int, ...] = (),
) -> None:
    """Refuse a server older than ``least``; a dialect that never connected has no version.

    ``prefix`` is what may stand before the version that counts.
    """
    found = tuple(dialect.server_version_info or ())
    if prefix and len(found) > len(prefix) and found[: len(prefix)] == prefix:
        found = found[len(prefix) :]
    if not found or found[: len(least)] >= least:
        return
    raise UnsupportedDialect(
        f"{product} {_dotted(found)} cannot claim rows atomically: {because} came with "
        f"{product} {_dotted(least)}; upgrade the server"
    )


def _dotted(version: Iterable[Any]) -> str:
    return ".".join(str(part) for part in version)
