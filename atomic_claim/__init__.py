"""Atomic claims of rows of existing job tables."""

import importlib
import typing

from .claim import Claim, claim_jobs
from .errors import (
    AmbiguousTable,
    ClaimConflict,
    ClaimError,
    ClaimLost,
    PatchError,
    UnsupportedDialect,
)
from .job_table import JobTable
from .lifecycle import complete_jobs, extend_jobs, fail_jobs, release_jobs, requeue_jobs, sweep_jobs
from .statement import ClaimStatement, claim_statement

if typing.TYPE_CHECKING:
    from .heartbeat import keep_claims
    from .patch import Patch, claim_reads, claims, lock_reads, patch_claims

__all__ = [
    "AmbiguousTable",
    "Claim",
    "ClaimConflict",
    "ClaimError",
    "ClaimLost",
    "ClaimStatement",
    "JobTable",
    "Patch",
    "PatchError",
    "UnsupportedDialect",
    "claim_jobs",
    "claim_reads",
    "claim_statement",
    "claims",
    "complete_jobs",
    "extend_jobs",
    "fail_jobs",
    "keep_claims",
    "lock_reads",
    "patch_claims",
    "release_jobs",
    "requeue_jobs",
    "sweep_jobs",
]

if not typing.TYPE_CHECKING:
    # Type checkers would take any name for one of these.

    def __getattr__(name: str) -> typing.Any:
        """Import the heartbeat or the patches when a name of theirs is first used."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = ".heartbeat" if name == "keep_claims" else ".patch"
        found = getattr(importlib.import_module(home, __name__), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        """Return all names, also of modules that are not imported yet."""
        return sorted({*globals(), *__all__})
