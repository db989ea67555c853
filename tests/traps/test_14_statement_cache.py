"""Trap 14: what a compile hook reads from a Python attribute is frozen into the first text."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, DateTime, Integer, String
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from atomic_claim import JobTable, claim_jobs, claim_statement
from tests.databases import Database
from tests.jobs import BINDS, bound, fill, ids, job_table, mapped

by_each_bind = pytest.mark.parametrize("kind", BINDS)


def made(database: Database, kind: str = "engine") -> tuple[sa.Engine, JobTable]:
    """Ten free jobs with columns for a worker, a token and a lease."""
    engine = database.engine()
    table = job_table(
        Column("worker", String(20)),
        Column("claim_token", String(32)),
        Column("lease_until", DateTime),
    )
    fill(engine, table, 10)
    given = mapped(table) if kind.startswith("session") else table
    roles = {"worker": "worker", "token": "claim_token", "lease": "lease_until"}
    return engine, JobTable(given, state="processing", **roles)


def column(engine: sa.Engine, found: sa.Column[Any]) -> list[Any]:
    """Return a column's values in the order of the key."""
    with engine.connect() as connection:
        return list(connection.scalars(sa.select(found).order_by(found.table.c.id)))


@by_each_bind
def test_each_worker_is_written_by_name(database: Database, kind: str) -> None:
    """Rows claimed for alice have her name, and rows claimed next for bob have his."""
    engine, jobs = made(database, kind)
    with bound(engine, kind) as bind:
        for worker in ("alice", "bob", None, "carol"):
            claimed = claim_jobs(bind, jobs, 2, worker=worker)
            assert claimed.worker == worker
            assert [job.worker for job in claimed] == [worker, worker]
        if kind in {"connection", "session"}:
            bind.commit()
    expected = ["alice"] * 2 + ["bob"] * 2 + [None] * 2 + ["carol"] * 2
    assert column(engine, jobs.table.c.worker)[:8] == expected


@by_each_bind
def test_each_claim_writes_its_own_token(database: Database, kind: str) -> None:
    """No two claims bear one token, and each knows the one that it wrote."""
    engine, jobs = made(database, kind)
    tokens: list[str | None] = []
    with bound(engine, kind) as bind:
        for _ in range(5):
            claimed = claim_jobs(bind, jobs, 2)
            assert [job.claim_token for job in claimed] == [claimed.token] * 2
            tokens += [claimed.token] * 2
        if kind in {"connection", "session"}:
            bind.commit()
    assert len(set(tokens)) == 5
    assert column(engine, jobs.table.c.claim_token) == tokens


@by_each_bind
def test_each_lease_is_as_long_as_asked_for(database: Database, kind: str) -> None:
    """An hour's lease is followed by a day's, and then by none."""
    engine, jobs = made(database, kind)
    with bound(engine, kind) as bind:
        leases = [
            claim_jobs(bind, jobs, 1, lease=lease)[0].lease_until
            for lease in (timedelta(hours=1), timedelta(days=1), None)
        ]
    assert timedelta(hours=22) < leases[1] - leases[0] < timedelta(hours=24)
    assert leases[2] is None


@by_each_bind
def test_each_limit_is_kept(database: Database, kind: str) -> None:
    """A claim of two is followed by one of three, of one and of two."""
    engine, jobs = made(database, kind)
    with bound(engine, kind) as bind:
        found = [ids(claim_jobs(bind, jobs, limit)) for limit in (2, 3, 1, 2)]
    assert found == [[1, 2], [3, 4, 5], [6], [7, 8]]


@by_each_bind
def test_each_declaration_keeps_its_values(database: Database, kind: str) -> None:
    """Two readings of one table, alike but for the values, are not mistaken for each other."""
    engine = database.engine()
    table = job_table(Column("state", String(20)), Column("tries", Integer, nullable=False))
    table.metadata.create_all(engine)
    fill(engine, table, 4, state="mail", tries=1)
    fill(engine, table, 4, first=5, state="post", tries=1)
    given = mapped(table) if kind.startswith("session") else table

    def declared(free: str, claimed: str, most: int) -> JobTable:
        return JobTable(
            given,
            state="state",
            free=free,
            claimed=claimed,
            attempts="tries",
            max_attempts=most,
        )

    with bound(engine, kind) as bind:
        found = [
            [(job.id, job.state) for job in claim_jobs(bind, declared(*values), 2)]
            for values in (
                ("mail", "mailing", 3),
                ("post", "posting", 3),
                ("mail", "sending", 3),
                ("post", "posting", 1),
            )
        ]
    assert found == [
        [(1, "mailing"), (2, "mailing")],
        [(5, "posting"), (6, "posting")],
        [(3, "sending"), (4, "sending")],
        [],
    ]


@pytest.mark.databases("sqlite", "postgresql")
def test_a_construct_writes_another_token_each_time(database: Database) -> None:
    """Executed twice, one construct claims with two tokens; made for bob, it writes his name."""
    engine, jobs = made(database, "session")
    again = claim_statement(jobs, 2, worker="alice")
    with Session(engine) as session:
        found = [
            session.scalars(statement).all()
            for statement in (again, again, claim_statement(jobs, 2, worker="bob"))
        ]
        assert [{job.worker for job in some} for some in found] == [{"alice"}, {"alice"}, {"bob"}]
        tokens = [{job.claim_token for job in some} for some in found]
    assert [len(some) for some in tokens] == [1, 1, 1]
    assert len(set.union(*tokens)) == 3


class Name(FunctionElement[str]):
    """A worker's name that is in no cache key."""

    inherit_cache = True
    type = String()

    def __init__(self, name: str) -> None:
        super().__init__()
        self.worker = name


@compiles(Name)
def _(element: Name, compiler: SQLCompiler, **_: Any) -> str:
    return compiler.render_literal_value(element.worker, element.type)


class Named(sa.Update):
    """An UPDATE that writes a worker's name which is in no cache key."""

    inherit_cache = True

    def __init__(self, table: sa.Table, name: str) -> None:
        super().__init__(table)
        self.worker = name


@compiles(Named)
def _(element: Named, compiler: SQLCompiler, **kw: Any) -> str:
    sql = compiler.visit_update(element, **kw)
    return sql.replace(" SET ", f" SET worker='{element.worker}', ", 1)


@pytest.mark.parametrize(
    "written_by",
    [
        lambda table, name: table.update().values(processing=True, worker=Name(name)),
        lambda table, name: Named(table, name).values(processing=True),
    ],
    ids=["element", "statement"],
)
def test_an_attribute_is_frozen(
    database: Database, written_by: Callable[[sa.Table, str], sa.Update]
) -> None:
    """The twin: what a hook reads from an attribute stays alice, though it is bob's turn."""
    engine, jobs = made(database)
    with engine.begin() as connection:
        for number, worker in enumerate(["alice", "bob"], 1):
            claim = written_by(jobs.table, worker).where(jobs.table.c.id == number)
            connection.execute(claim)
    assert column(engine, jobs.table.c.worker)[:2] == ["alice", "alice"]
