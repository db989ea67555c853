"""Overhead of ``claim_jobs`` over the same SQL run by the bare driver."""

import asyncio
import re
import sqlite3
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import psycopg
import pymysql
import sqlalchemy as sa
from pymysql.cursors import Cursor
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from atomic_claim import JobTable, aio, claim_jobs
from tests.benchmarks.ground import Ground, Rows, fill, job_table
from tests.benchmarks.measuring import Line, Way, check_whole, in_turns, rates, ratios
from tests.jobs import mapped
from tests.statements import Sent, sent_by

FIGURE = "overhead"
LIMITS = (1, 10, 100, 1000)
# By PostgreSQL and limit: by engine against a bound and a literal limit, entities by session.
WANTED = {1: (0.90, 0.70, 0.60), 100: (0.95, 0.90, 0.75)}
JOBS_A_TURN = {1: 300, 10: 1500, 100: 4000, 1000: 10_000}


def measure(ground: Ground, *, rounds: int, limits: Sequence[int] = LIMITS) -> Iterator[list[Line]]:
    """Claims per second against those of the driver alone, for every database and limit."""
    for name in ground.kinds():
        for limit in limits:
            yield _measured(ground, name, limit, rounds)


def _measured(ground: Ground, name: str, limit: int, rounds: int) -> list[Line]:
    engine, jobs = ground.engine(name), job_table()
    calls = max(3, JOBS_A_TURN.get(limit, 10 * limit) // limit)
    rows = Rows(limit * (calls + 2) + 1000)
    fill(engine, jobs, rows)
    with by_hand(engine, jobs, limit) as bare, _ours(engine, jobs, limit) as ours:
        refill = _refilling(engine, jobs)
        found = in_turns({**bare, **ours}, rounds=rounds, calls=calls, before=refill)
    speed = {way: rates(turns) for way, turns in found.items()}
    lines = []
    for way in ours:
        for other in bare:
            in_transaction = way.endswith("session, entities")
            if name == "postgresql" and in_transaction is not ("transaction" in other):
                continue
            lines.append(
                Line(
                    FIGURE,
                    f"{name}, {way}, limit {limit:,}",
                    statistics.median(speed[way]),
                    "claims/s",
                    other,
                    ratios(speed[way], speed[other]),
                    least=_wanted(name, limit, way, other),
                )
            )
    return lines


def _wanted(name: str, limit: int, way: str, other: str) -> float | None:
    if name in {"mysql", "mariadb"}:
        return 0.85 if way == "engine" else None
    if name == "sqlite":
        return 0.85 if way == "engine" and limit == 100 and "bound" in other else None
    bound, literal, entities = WANTED.get(limit, (None, None, None))
    if way == "session, entities":
        return entities
    if way != "engine":
        return None
    return bound if "bound" in other else literal


def _refilling(engine: sa.Engine, jobs: JobTable) -> Callable[[str], None]:
    """Free every row again: each turn finds the same table."""
    vacuum = {"postgresql": "VACUUM ANALYZE bench_jobs"}.get(engine.dialect.name)
    automatic = engine.execution_options(isolation_level="AUTOCOMMIT")

    def refill(_: str) -> None:
        free = jobs.table.update().values(processing=False)
        with engine.begin() as connection:
            connection.execute(free.where(jobs.table.c.processing == sa.true()))
        if vacuum is not None:
            with automatic.connect() as connection:
                connection.exec_driver_sql(vacuum)

    return refill


@contextmanager
def _ours(engine: sa.Engine, jobs: JobTable, limit: int) -> Iterator[dict[str, Way]]:
    entity = JobTable(
        mapped(jobs.table),
        state="processing",
        order="created_at",
        done={"completed_at": sa.func.now()},
        naive_times="utc",
    )
    maker = sessionmaker(engine)
    with Session(engine) as session, _asynchronous(engine, jobs, entity, limit) as later:

        def by_session() -> None:
            check_whole(claim_jobs(session, entity, limit), limit)
            session.commit()

        yield {
            "engine": lambda: check_whole(claim_jobs(engine, jobs, limit), limit),
            "sessionmaker, entities": lambda: check_whole(claim_jobs(maker, entity, limit), limit),
            "session, entities": by_session,
            **_by_the_orm(session, jobs, entity, limit),
            **later,
        }


def _by_the_orm(session: Session, jobs: JobTable, entity: JobTable, limit: int) -> dict[str, Way]:
    """Run the same SQL with SQLAlchemy alone, which loads the entities and commits.

    What that takes nobody who hands out entities can save.
    """
    engine = session.get_bind()
    assert isinstance(engine, sa.Engine)
    if engine.dialect.name != "postgresql":
        return {}
    [(sql, given)] = statements_of(engine, jobs, limit)
    named = re.sub(r"%\((\w+)\)s", r":\1", sql).replace("%%", "%")
    columns = sa.text(named).columns(*jobs.table.columns)
    query, values = sa.select(entity.entity).from_statement(columns), dict(given)

    def claim() -> None:
        check_whole(session.scalars(query, values).all(), limit)
        session.commit()

    return {"SQLAlchemy alone, session, entities": claim}


@contextmanager
def _asynchronous(
    engine: sa.Engine, jobs: JobTable, entity: JobTable, limit: int
) -> Iterator[dict[str, Way]]:
    """Yield the asyncio variants of a claim, each awaited on one long-lived event loop."""
    drivers = {"postgresql": "postgresql+psycopg", "sqlite": "sqlite+aiosqlite"}
    if engine.dialect.name not in drivers:
        yield {}
        return
    url = engine.url.set(drivername=drivers[engine.dialect.name])
    with asyncio.Runner() as runner:
        own = create_async_engine(url)

        async def by_engine() -> None:
            check_whole(await aio.claim_jobs(own, jobs, limit), limit)

        async def by_session() -> None:
            async with AsyncSession(own) as session:
                check_whole(await aio.claim_jobs(session, entity, limit), limit)
                await session.commit()

        yield {
            "async engine": lambda: runner.run(by_engine()),
            "async session, entities": lambda: runner.run(by_session()),
        }
        runner.run(own.dispose())


def statements_of(engine: sa.Engine, jobs: JobTable, limit: int) -> list[Sent]:
    """Return the statements of a claim as they reach the driver."""
    listening = sa.create_engine(engine.url)
    sent = sent_by(listening)
    check_whole(claim_jobs(listening, jobs, limit), limit)
    sent.clear()
    check_whole(claim_jobs(listening, jobs, limit), limit)
    listening.dispose()
    return list(sent)


@contextmanager
def by_hand(engine: sa.Engine, jobs: JobTable, limit: int) -> Iterator[Mapping[str, Way]]:
    """Yield ways to run the same SQL with the driver alone, on one open connection."""
    sent = statements_of(engine, jobs, limit)
    makers = {"postgresql": _bare_postgresql, "sqlite": _bare_sqlite}
    make = makers.get(engine.dialect.name, _bare_mysql)
    with make(engine.url, sent, limit) as found:
        yield found


@contextmanager
def _bare_postgresql(url: sa.URL, sent: list[Sent], limit: int) -> Iterator[Mapping[str, Way]]:
    [(literal, given)] = sent
    values = dict(given)
    bound = literal.replace(f"LIMIT {limit}", "LIMIT %(bench_limit)s")
    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as auto, psycopg.connect(plain) as transaction:

        def claim(connection: Any, text: str, values: Any) -> None:
            with connection.cursor() as cursor:
                cursor.execute(text, values)
                check_whole(cursor.fetchall(), limit)

        def in_transaction() -> None:
            claim(transaction, bound, values | {"bench_limit": limit})
            transaction.commit()

        yield {
            "psycopg, bound LIMIT": lambda: claim(auto, bound, values | {"bench_limit": limit}),
            "psycopg, literal LIMIT": lambda: claim(auto, literal, values),
            "psycopg, in a transaction": in_transaction,
        }


@contextmanager
def _bare_sqlite(url: sa.URL, sent: list[Sent], limit: int) -> Iterator[Mapping[str, Way]]:
    [(literal, values)] = sent
    bound = literal.replace(f"LIMIT {limit}", "LIMIT ?")
    connection = sqlite3.connect(url.database or "", isolation_level=None)

    def claim(text: str, values: Any) -> None:
        check_whole(connection.execute(text, values).fetchall(), limit)

    yield {
        "sqlite3, bound LIMIT": lambda: claim(bound, (limit, *values)),
        "sqlite3, literal LIMIT": lambda: claim(literal, values),
    }
    connection.close()


@contextmanager
def _bare_mysql(url: sa.URL, sent: list[Sent], limit: int) -> Iterator[Mapping[str, Way]]:
    """Yield ways to run the sequence by hand: the candidates, their locks, the marks, the rows.

    Locks, marks and rows take as many statements as the library sends, since it sends a great
    many keys in several.
    """
    candidates, *others = sent
    by_key = {
        kind: [_of_keys(each) for each in others if _kind(each) == kind]
        for kind in ("lock", "mark", "row")
    }
    connection = pymysql.connect(
        host=url.host or "",
        port=url.port or 3306,
        user=url.username,
        password=str(url.password or ""),
        database=url.database,
    )

    def in_parts(cursor: Cursor, kind: str, keys: Sequence[Any]) -> list[Any]:
        found, left = [], iter(keys)
        for text, count in by_key[kind]:
            cursor.execute(text, {"keys": list(islice(left, count))})
            found += cursor.fetchall()
        return found

    def claim() -> None:
        connection.begin()
        with connection.cursor() as cursor:
            cursor.execute(candidates.text)
            seen = [row[0] for row in cursor.fetchall()]
            keys = [row[0] for row in in_parts(cursor, "lock", seen)]
            in_parts(cursor, "mark", keys)
            check_whole(in_parts(cursor, "row", keys), limit)
        connection.commit()

    yield {"PyMySQL, the same sequence": claim}
    connection.close()


def _kind(sent: Sent) -> str:
    """Return the purpose of a statement that selects by key: lock, mark or row."""
    if sent.text.startswith("UPDATE"):
        return "mark"
    return "lock" if "FOR UPDATE" in sent.text else "row"


def _of_keys(sent: Sent) -> tuple[str, int]:
    """Return the SQL with its keys as one parameter for PyMySQL to expand, and their number."""
    text = re.sub(r"IN \(%\(.*?\)s\)", "IN %(keys)s", sent.text, flags=re.DOTALL)
    return text, len(sent.parameters)
