"""The package's exceptions, one class for each reason.

.. code-block:: text

    ClaimError
     ├── AmbiguousTable     the columns cannot be read with certainty
     ├── ClaimConflict      the database asks for the transaction to be tried again
     ├── ClaimLost          the claim no longer owns some of its rows
     ├── PatchError         a legacy callable cannot be patched as declared
     └── UnsupportedDialect the database cannot run an atomic claim (also a CompileError)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy.exc import CompileError


class ClaimError(Exception):
    """Base class of the package's errors: a call was refused."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").partition("\n")[0])


class AmbiguousTable(ClaimError):
    """Raised if the meaning of the table's columns cannot be read with certainty."""


class ClaimConflict(ClaimError):
    """Raised if another transaction was in the way: roll back and claim again."""


class ClaimLost(ClaimError):
    """Raised if some rows no longer belong to the claim.

    Attributes:
        keys: their primary keys, a tuple each.
    """

    def __init__(self, message: str | None = None, *, keys: Sequence[tuple[Any, ...]] = ()) -> None:
        super().__init__(message)
        self.keys = tuple(keys)


class PatchError(ClaimError):
    """Raised if a callable cannot be patched as declared."""


class UnsupportedDialect(ClaimError, CompileError):
    """Raised if the database has no statement that claims rows atomically."""
