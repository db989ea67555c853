"""Trap 17: a worker whose lease ran out overwrites what its successor has done."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from atomic_claim import (
    Claim,
    ClaimLost,
    JobTable,
    claim_jobs,
    complete_jobs,
    extend_jobs,
    fail_jobs,
    release_jobs,
)
from tests.counting import completions, make_counted
from tests.databases import Database
from tests.ending.test_lease import LEASE, expire, row

LATE_CALLS: dict[str, Callable[..., int]] = {
    "complete": complete_jobs,
    "fail": lambda bind, claim: fail_jobs(bind, claim, error="late"),
    "retry": lambda bind, claim: fail_jobs(bind, claim, retry=timedelta(0), error="late"),
    "release": release_jobs,
    "extend": lambda bind, claim: extend_jobs(bind, claim, lease=timedelta(days=365)),
}
UNGUARDED = {
    "by key": "id = 1",
    "by state": "id = 1 AND processing AND done_at IS NULL",
    "by the worker's name": "id = 1 AND worker = 'w1'",
    "by the attempt": "id = 1 AND attempts = 1",
}


def two_workers(
    database: Database, *, released: bool = False
) -> tuple[sa.Engine, JobTable, Claim[Any], Claim[Any]]:
    """Create a job that one worker held until its lease expired and another worker holds now.

    They have the same name, as a worker does after its restart. If released, a third worker had it
    in between, and gave it back.
    """
    engine = database.engine()
    jobs = make_counted(engine, 1)
    late = claim_jobs(engine, jobs, lease=LEASE, worker="w1")
    expire(engine, jobs, 1)
    if released:
        # As a hand does that resets a stuck row: the attempts are counted from the beginning.
        with engine.begin() as connection:
            connection.execute(jobs.table.update().values(processing=False, attempts=0))
    owner = claim_jobs(engine, jobs, lease=LEASE, worker="w1")
    assert len(owner) == 1
    return engine, jobs, late, owner


@pytest.mark.parametrize("call", LATE_CALLS)
@pytest.mark.parametrize("released", [False, True], ids=["expired", "reset"])
def test_a_late_call_changes_nothing(database: Database, call: str, released: bool) -> None:
    """Whatever a late worker wants to do to the row, it is told that it has lost it."""
    engine, jobs, late, owner = two_workers(database, released=released)
    before = row(engine, jobs, 1)
    with pytest.raises(ClaimLost) as raised:
        LATE_CALLS[call](engine, late)
    assert raised.value.keys == ((1,),)
    assert row(engine, jobs, 1) == before
    assert complete_jobs(engine, owner) == 1
    done = row(engine, jobs, 1)
    with pytest.raises(ClaimLost):
        LATE_CALLS[call](engine, late)
    assert row(engine, jobs, 1) == done
    assert completions(engine) == [(1, owner.token)]


@pytest.mark.parametrize("call", LATE_CALLS)
def test_a_late_call_in_a_transaction(database: Database, call: str) -> None:
    """In the caller's transaction too nothing is changed, and the transaction can go on."""
    engine, jobs, late, owner = two_workers(database)
    before = row(engine, jobs, 1)
    with engine.begin() as connection:
        with pytest.raises(ClaimLost):
            LATE_CALLS[call](connection, late)
        connection.execute(sa.select(jobs.table)).all()
    assert row(engine, jobs, 1) == before
    assert complete_jobs(engine, owner) == 1


@pytest.mark.parametrize("guard", UNGUARDED)
def test_other_guards_let_it_pass(database: Database, guard: str) -> None:
    """The twin: neither key nor state nor name nor attempt tells the late worker from the owner."""
    engine, jobs, _, owner = two_workers(database, released=guard == "by the attempt")
    update = sa.text(
        f"UPDATE jobs SET done_at = created_at, note = 'late' WHERE {UNGUARDED[guard]}"
    )
    with engine.begin() as connection:
        assert connection.execute(update).rowcount == 1
    assert row(engine, jobs, 1).note == "late"
    with pytest.raises(ClaimLost):
        complete_jobs(engine, owner)
    assert completions(engine) == [(1, owner.token)]


def test_the_owner_overwrites_what_was_done_late(database: Database) -> None:
    """The twin's other half: where no owner is compared, a job is completed twice."""
    engine, _, _, owner = two_workers(database)
    for _ in ("late", "owner"):
        with engine.begin() as connection:
            connection.execute(sa.text("UPDATE jobs SET done_at = created_at WHERE id = 1"))
    assert completions(engine) == [(1, owner.token)] * 2


def test_a_release_lowers_the_attempts(database: Database) -> None:
    """A claim after a release has the same ``attempts``, so ``attempts`` is no token."""
    engine = database.engine()
    jobs = make_counted(engine, 1)
    first = claim_jobs(engine, jobs, lease=LEASE)
    release_jobs(engine, first)
    second = claim_jobs(engine, jobs, lease=LEASE)
    assert first[0].attempts == second[0].attempts == 1
    assert first.token != second.token
    with pytest.raises(ClaimLost):
        complete_jobs(engine, first)
