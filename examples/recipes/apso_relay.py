"""apso-domain-events: a relay that finds, delivers and marks in one transaction.

There is no claimed state, and none is needed: its SELECT locks.
"""

from apso_domain_events.model import DomainEvent

from atomic_claim import Patch, lock_reads


def patch() -> Patch:
    """One line."""
    return lock_reads("apso_domain_events.relay:DomainEventRelay.process_pending", DomainEvent)
