"""Atomic claims on the job tables that are already there."""

from .claim import Claim, claim_jobs
from .columns import JobTable
from .errors import (
    AmbiguousTable,
    ClaimConflict,
    ClaimError,
    ClaimLost,
    PatchError,
    UnsupportedDialect,
)
from .heartbeat import keep_claims
from .lease import complete_jobs, extend_jobs, fail_jobs, release_jobs, sweep_jobs
from .patch import Patch, claim_reads, claims, lock_reads, patch_claims
from .statement import ClaimStatement, claim_statement

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
    "sweep_jobs",
]
