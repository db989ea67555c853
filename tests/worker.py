"""A worker in a process of its own, which may be killed or paused at any time."""

import time
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from atomic_claim import ClaimLost, claim_jobs, complete_jobs, keep_claims
from tests.counting import counted_jobs, undone

WORK: Final = 0.02
"""Seconds that a batch takes."""
IDLE: Final = 0.05
"""Seconds after which a worker that found nothing looks again."""


def drain(url: sa.URL, name: str, lease: timedelta) -> None:
    """Claim and complete jobs, five at a time, until none is left to be done."""
    engine, jobs = sa.create_engine(url), counted_jobs()
    while undone(engine, jobs):
        claim = claim_jobs(engine, jobs, 5, lease=lease, worker=name)
        if not claim:
            time.sleep(IDLE)
            continue
        time.sleep(WORK)
        try:
            complete_jobs(engine, claim)
        except ClaimLost:
            continue
    engine.dispose()


def complete_when_told(
    url: sa.URL, lease: timedelta, pipe: Connection, *, keeping: bool = False
) -> None:
    """Claim two jobs, say so, and complete them when told; tell what became of it.

    What is told: the claim's token; then the keys that the heartbeat calls lost; then those that
    the completion was refused for.
    """
    engine, jobs = sa.create_engine(url, poolclass=NullPool), counted_jobs()
    claim: Any = claim_jobs(engine, jobs, 2, lease=lease, worker="paused")
    lost: tuple[Any, ...] = ()
    if keeping:
        # Paused between two beats, since a transaction that is open keeps its locks.
        with keep_claims(engine, claim, every=0.95 * lease) as keeper:
            pipe.send(claim.token)
            pipe.recv()
            lost = keeper.lost
    else:
        pipe.send(claim.token)
        pipe.recv()
    pipe.send(lost)
    try:
        complete_jobs(engine, claim)
        pipe.send(())
    except ClaimLost as refused:
        pipe.send(refused.keys)
