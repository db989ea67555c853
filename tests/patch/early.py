"""A module that bound a legacy function before anybody patched it."""

from tests.patch.legacy import Repository, claim_next
from tests.patch.legacy import claim_next as renamed

claim_batch = Repository.claim_batch
__all__ = ["claim_batch", "claim_next", "renamed"]
