"""Trap 24: a row that was found free is another's by the time that it is marked."""

from typing import Any

import pytest
import sqlalchemy as sa

from atomic_claim import claim_jobs
from atomic_claim.backends import base
from atomic_claim.backends.innodb import InnoDBStatements
from atomic_claim.plan import LIMIT, ClaimPlan
from atomic_claim.sql_elements import ByKey
from tests.databases import Database
from tests.jobs import fill, ids, job_table
from tests.stepping import stopped

pytestmark = pytest.mark.databases("mysql", "mariadb")
JOBS = job_table()


def between(database: Database, order: Any = None) -> tuple[list[int], list[int]]:
    """Claim twice, the second time between the first one's search and its lock."""
    engine = database.engine()
    fill(engine, JOBS, 3)

    def claim() -> list[int]:
        return ids(claim_jobs(engine, JOBS, 2, order_by=order))

    with stopped(engine, claim, "FOR UPDATE") as first:
        second = ids(claim_jobs(database.engine(), JOBS, 2, order_by=order))
        return first.go(), second


def test_the_lock_looks_again(database: Database) -> None:
    """A row that another claim has marked meanwhile is passed over for the next one."""
    assert between(database) == ([3], [1, 2])


def test_the_lock_looks_again_in_another_order(database: Database) -> None:
    """Where the keys do not ascend in the order of the claim, by another statement."""
    assert between(database, JOBS.c.id.desc()) == ([1], [3, 2])


def test_the_lock_looks_again_in_the_callers_transaction(database: Database) -> None:
    """There is no second try there, in which the mark's guard would be enough."""
    engine = database.engine()
    fill(engine, JOBS, 3)

    def claim() -> list[int]:
        level = {"isolation_level": "READ COMMITTED"}
        with engine.connect().execution_options(**level) as connection, connection.begin():
            return ids(claim_jobs(connection, JOBS, 2))

    with stopped(engine, claim, "FOR UPDATE") as first:
        assert ids(claim_jobs(database.engine(), JOBS, 2)) == [1, 2]
        assert first.go() == [3]


def test_a_lock_that_does_not_look(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap: both get the same rows."""
    usual = InnoDBStatements.__init__

    def prepare(self: InnoDBStatements, plan: ClaimPlan, *how: Any) -> None:
        usual(self, plan, *how)
        locking = plan.source(*plan.key_attributes).with_for_update(skip_locked=True)
        locking = locking.order_by(*plan.key_attributes)
        locking = locking.limit(sa.bindparam(LIMIT, 1))
        self.lock = self.lock_first = ByKey(plan.job_table.key, locking.where)

    monkeypatch.setattr(InnoDBStatements, "__init__", prepare)
    # The mark looks once more, and the claim is tried again. An order of its own has the plan, and
    # so the statements, made anew.
    assert between(database, JOBS.c.id.asc()) == ([3], [1, 2])
    monkeypatch.setattr(base.predicates, "claimable", lambda _: sa.true())
    monkeypatch.setattr(ClaimPlan, "refuse_fault", lambda *_: None)
    engine = database.engine()
    with engine.begin() as connection:
        connection.execute(sa.delete(JOBS))
    assert between(database, JOBS.c.id.asc()) == ([1, 2], [1, 2])
