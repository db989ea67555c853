"""Trap 18: an entity that a commit has expired reads its successor's token, and passes with it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from atomic_claim import (
    Claim,
    ClaimLost,
    claim_jobs,
    complete_jobs,
    extend_jobs,
    fail_jobs,
    release_jobs,
)
from tests.counting import completions, make_counted
from tests.databases import Database
from tests.ending.test_lease import LEASE, expire, mapped, row

CALLS: dict[str, Callable[..., int]] = {
    "complete": complete_jobs,
    "fail": fail_jobs,
    "release": release_jobs,
    "extend": lambda bind, claim, jobs: extend_jobs(bind, claim, jobs, lease=timedelta(days=365)),
}


@contextmanager
def outlived(database: Database) -> Iterator[tuple[Session, Claim[Any], Claim[Any], sa.Engine]]:
    """Yield a session whose committed claim has expired, and the claim that came after it."""
    engine = database.engine()
    jobs = make_counted(engine, 1)
    _, declared = mapped(jobs)
    with Session(engine) as session:
        late = claim_jobs(session, declared, lease=LEASE)
        session.commit()
        expire(engine, jobs, 1)
        owner = claim_jobs(engine, jobs, lease=LEASE)
        assert len(owner) == 1
        yield session, late, owner, engine


def rows_changed(session: Session, update: sa.Update) -> int:
    """How many rows an UPDATE changes."""
    result: Any = session.execute(update)
    return int(result.rowcount)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("reloaded", [False, True], ids=["not reloaded", "reloaded"])
def test_the_token_is_the_claims_own(database: Database, call: str, reloaded: bool) -> None:
    """Neither the claim nor its entities end the successor's work, whatever they have read."""
    with outlived(database) as (session, late, owner, engine):
        if reloaded:
            assert late[0].claim_token == owner.token
            session.rollback()
        for jobs in (None, late, [late[0]]):
            with pytest.raises(ClaimLost) as raised:
                CALLS[call](session, late, jobs)
            assert raised.value.keys == ((1,),)
        session.commit()
        assert late.token != owner.token
        assert row(engine, owner.table, 1).done_at is None
        assert complete_jobs(engine, owner) == 1
        assert completions(engine) == [(1, owner.token)]


def test_an_entitys_token_passes(database: Database) -> None:
    """The twin: compared with the entity's token, the late worker completes the owner's job."""
    with outlived(database) as (session, late, owner, engine):
        table = owner.table.table
        update = table.update().where(table.c.id == 1, table.c.claim_token == late[0].claim_token)
        assert rows_changed(session, update.values(done_at=sa.func.now())) == 1
        session.commit()
        with pytest.raises(ClaimLost):
            complete_jobs(engine, owner)


def test_an_entity_that_is_kept_loaded_does_not_pass(database: Database) -> None:
    """The twin's other side: with expire_on_commit off the same code is refused, by luck."""
    engine = database.engine()
    jobs = make_counted(engine, 1)
    _, declared = mapped(jobs)
    with Session(engine, expire_on_commit=False) as session:
        late = claim_jobs(session, declared, lease=LEASE)
        session.commit()
        expire(engine, jobs, 1)
        owner = claim_jobs(engine, jobs, lease=LEASE)
        assert late[0].claim_token == late.token != owner.token
        table = jobs.table
        update = table.update().where(table.c.id == 1, table.c.claim_token == late[0].claim_token)
        assert rows_changed(session, update.values(done_at=sa.func.now())) == 0
        session.rollback()
    assert complete_jobs(engine, owner) == 1
