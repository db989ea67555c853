"""A claim is compiled once a shape, however often it is made."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, DateTime, Integer, String
from sqlalchemy.orm import Session

from atomic_claim import JobTable, claim_jobs, claim_statement
from tests.databases import Database
from tests.jobs import bound, fill, ids, job_table, mapped
from tests.statements import compiled_by

# A sequence of several statements, in a transaction with its own round trips, takes its time.
CLAIMS = {"sqlite": 1001, "postgresql": 1001}
FEWER = 60
# Claim and check; engine of the table, candidates, lock, mark and read; elsewhere one statement.
STATEMENTS = {"sqlite": 2, "mysql": 5, "mariadb": 5}
ROLES: dict[str, Any] = {
    "worker": "worker",
    "token": "claim_token",
    "lease": "lease_until",
    "attempts": "attempts",
}
Options = Callable[[Any, int], dict[str, Any]]

one_statement = pytest.mark.databases("sqlite", "postgresql")
by_rows_and_entities = pytest.mark.parametrize("kind", ["engine", "session"])


def made(database: Database, kind: str, count: int = 60) -> tuple[sa.Engine, JobTable]:
    """Create an engine, and a table with more free jobs than will be claimed."""
    engine = database.engine()
    if database.name == "sqlite":
        sa.event.listen(engine, "connect", hasten)
    table = job_table(
        Column("worker", String(20)),
        Column("claim_token", String(32)),
        Column("lease_until", DateTime),
        Column("attempts", Integer, nullable=False, default=0),
    )
    fill(engine, table, count + 1)
    given = mapped(table) if kind == "session" else table
    return engine, JobTable(given, state="processing", **ROLES)


def hasten(connection: Any, _record: object) -> None:
    """Have SQLite wait for no disk: a thousand commits are waited for otherwise."""
    connection.execute("PRAGMA synchronous = OFF")


def plain(_table: Any, _turn: int) -> dict[str, Any]:
    """Nothing but a limit."""
    return {}


def leased(_table: Any, turn: int) -> dict[str, Any]:
    """Another worker and another lease each time."""
    return {"worker": f"worker {turn}", "lease": timedelta(hours=1, seconds=turn)}


def composed(table: Any, turn: int) -> dict[str, Any]:
    """Conditions, an order and values that are built at each call, with other values in them."""
    return {
        "where": [table.c.id > -turn, sa.or_(table.c.note.is_(None), table.c.note != f"{turn}")],
        "order_by": [table.c.created_at.desc(), table.c.id],
        "values": {table.c.note: f"turn {turn}"},
    }


def statements(database: Database, kind: str) -> int:
    """Count the statements of a claim, and what an own transaction asks once per connection."""
    asks = kind == "engine" and database.name != "sqlite"
    return STATEMENTS.get(database.name, 1) + asks


@by_rows_and_entities
@pytest.mark.parametrize("options", [plain, leased, composed])
def test_one_shape_is_compiled_once(database: Database, kind: str, options: Options) -> None:
    """Claims of one shape, a thousand of the plainest, come from one compilation a statement."""
    count = CLAIMS.get(database.name, FEWER) if options is plain else FEWER
    engine, jobs = made(database, kind, count)
    compiled = compiled_by(engine)
    claimed: set[int] = set()
    with bound(engine, kind) as bind:
        for turn in range(count):
            claimed.update(ids(claim_jobs(bind, jobs, **options(jobs.table, turn))))
            if isinstance(bind, Session):
                bind.commit()
    assert len(claimed) == count
    # The time that a lease must exceed is read before the mark, but for one statement.
    reads = database.name != "postgresql" and options is leased
    assert len(compiled) == statements(database, kind) + reads


@by_rows_and_entities
@one_statement
def test_limits_are_one_shape(database: Database, kind: str) -> None:
    """All limits come from one compilation."""
    engine, jobs = made(database, kind)
    compiled = compiled_by(engine)
    with bound(engine, kind) as bind:
        found = [len(claim_jobs(bind, jobs, limit)) for limit in (2, 3, 1, 7, 2, 1, 30)]
    assert found == [2, 3, 1, 7, 2, 1, 30]
    assert len(compiled) == statements(database, kind)


@by_rows_and_entities
@one_statement
def test_equal_declarations_share_their_text(database: Database, kind: str) -> None:
    """A `JobTable` declared again for every claim still finds the compiled text."""
    engine, jobs = made(database, kind)
    compiled = compiled_by(engine)
    with bound(engine, kind) as bind:
        for turn in range(1, 21):
            declared = JobTable(jobs.entity or jobs.table, state="processing", **ROLES)
            assert ids(claim_jobs(bind, declared)) == [turn]
    assert len(compiled) == statements(database, kind)


@one_statement
def test_the_construct_is_compiled_once(database: Database) -> None:
    """A construct that is created for every execution is compiled only once."""
    engine, jobs = made(database, "session")
    compiled = compiled_by(engine)
    with Session(engine) as session:
        for turn in range(1, 21):
            assert ids(session.scalars(claim_statement(jobs))) == [turn]
    assert len(compiled) == 1


def test_a_construct_without_a_cache_key_is_compiled_again(database: Database) -> None:
    """The twin: a subclass of Update that says nothing of its cache key is compiled every time."""
    engine, jobs = made(database, "engine")

    class Uncached(sa.Update):
        pass

    compiled = compiled_by(engine)
    with engine.connect() as connection:
        for turn in range(1, 4):
            claim = Uncached(jobs.table).where(jobs.table.c.id == turn).values(processing=True)
            if turn == 1:
                with pytest.warns(sa.exc.SAWarning, match="will not make use of SQL compilation"):
                    connection.execute(claim)
            else:
                connection.execute(claim)
    assert len(compiled) == 3
