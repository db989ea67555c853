"""Legacy callables made safe without editing them.

:func:`patch_claims` replaces a function that finds jobs and marks them by an atomic claim.
:func:`lock_reads` and :func:`claim_reads` let a function run as it is, and make its reads lock, or
hand it rows that are claimed already.
"""

from .claimed_reads import claim_reads
from .claiming import claims, patch_claims
from .locking import lock_reads
from .patches import Patch

__all__ = ["Patch", "claim_reads", "claims", "lock_reads", "patch_claims"]
