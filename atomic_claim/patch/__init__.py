"""Legacy callables made safe without editing them.

:func:`patch_claims` replaces a function that finds jobs and marks them by an atomic claim.
"""

from .claiming import claims, patch_claims
from .patches import Patch

__all__ = ["Patch", "claims", "patch_claims"]
