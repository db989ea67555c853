"""Ways to claim from our own table, opened in a process of their own."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any

import psycopg
import sqlalchemy as sa
from sqlalchemy import false, select, true, update
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import QueuePool

from atomic_claim import claim_jobs, complete_jobs
from atomic_claim.plan import TOKEN
from tests.benchmarks.crew import Caller
from tests.benchmarks.ground import job_table, with_class
from tests.jobs import mapped

# So many seconds a worker waits that found nothing.
IDLE = 0.02


def engine_of(url: str) -> sa.Engine:
    """Create an engine with a single connection."""
    made = sa.make_url(url)
    arguments = {"timeout": 60} if made.drivername.startswith("sqlite") else {}
    return sa.create_engine(
        made, pool_size=1, max_overflow=0, poolclass=QueuePool, connect_args=arguments
    )


def by_engine(url: str, limit: int, token: bool = False) -> Caller:
    """``claim_jobs(engine, table, limit)``."""
    engine, jobs = engine_of(url), job_table(token=token)
    return Caller(lambda: [row.id for row in claim_jobs(engine, jobs, limit)])


def by_session(url: str, limit: int, token: bool = False) -> Caller:
    """``claim_jobs(session, Job, limit)``, and the session's commit."""
    jobs = job_table(token=token)
    session, entity = Session(engine_of(url), expire_on_commit=False), with_class(jobs)

    def claim() -> Sequence[Any]:
        found = [job.id for job in claim_jobs(session, entity, limit)]
        session.commit()
        return found

    return Caller(claim)


def by_engine_with_lease(url: str, limit: int, name: str) -> Caller:
    """``claim_jobs(engine, table, limit, lease=...)``."""
    engine, jobs = engine_of(url), job_table(name, lease=True)
    lease = timedelta(minutes=5)
    return Caller(lambda: [row.id for row in claim_jobs(engine, jobs, limit, lease=lease)])


def by_legacy_loop(url: str, limit: int) -> Caller:
    """Find, then mark each: what applications have. Two of them find the same rows."""
    table = job_table().table
    entity, maker = mapped(table), sessionmaker(engine_of(url))

    def claim() -> Sequence[Any]:
        with maker() as session:
            free = select(entity).where(_free(table)).order_by(table.c.created_at).limit(limit)
            found = session.scalars(free).all()
            keys = []
            for job in found:
                keys.append(job.id)
                job.processing = True
                session.commit()
            return keys

    return Caller(claim)


def by_waiting_lock(url: str, limit: int) -> Caller:
    """``FOR UPDATE`` without SKIP LOCKED, then one UPDATE: everybody waits for the first."""
    return _two_statements(url, limit, lambda query: query.with_for_update())


def by_article_form(url: str, limit: int) -> Caller:
    """``UPDATE … WHERE id IN (SELECT … SKIP LOCKED) RETURNING``, as articles have it."""
    engine, table = engine_of(url), job_table().table
    found = _ordered(table, limit).with_for_update(skip_locked=True).scalar_subquery()
    statement = update(table).values(processing=true()).where(table.c.id.in_(found))
    statement = statement.returning(table)

    def claim() -> Sequence[Any]:
        with engine.begin() as connection:
            return [row.id for row in connection.execute(statement)]

    return Caller(claim)


def by_psycopg(url: str, limit: int, literal: str) -> Caller:
    """Run the claim's own SQL with psycopg in autocommit, with the limit as a parameter."""
    plain = sa.make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = psycopg.connect(plain, autocommit=True)
    bound = literal.replace(f"LIMIT {limit}", "LIMIT %(bench_limit)s")

    def claim() -> Sequence[Any]:
        with connection.cursor() as cursor:
            cursor.execute(bound, {"bench_limit": limit, TOKEN: token_hex(16)})
            return [row[0] for row in cursor.fetchall()]

    return Caller(claim)


def by_engine_and_complete(url: str, limit: int, name: str, work: float = 0) -> Caller:
    """Claim with a lease, and complete what was claimed; look again soon if there was nothing."""
    engine, jobs = engine_of(url), job_table(name, lease=True)

    def claim() -> Sequence[Any]:
        claimed = claim_jobs(engine, jobs, limit, lease=timedelta(minutes=5))
        if claimed:
            complete_jobs(engine, claimed)
        return [row.id for row in claimed]

    return Caller(claim, work=work, idle=IDLE)


def by_inserting(url: str, count: int, name: str, pause: float = 0) -> Caller:
    """Insert `count` new jobs per transaction, with a pause between two transactions."""
    engine, jobs = engine_of(url), job_table(name, lease=True)
    base = {"processing": False, "payload": "new", "attempts": 0}

    def insert() -> Sequence[Any]:
        now = datetime.now(UTC).replace(tzinfo=None)
        new = [base | {"created_at": now} for _ in range(count)]
        with engine.begin() as connection:
            connection.execute(jobs.table.insert(), new)
        return new

    return Caller(insert, work=pause)


def _two_statements(url: str, limit: int, lock: Any) -> Caller:
    engine, table = engine_of(url), job_table().table

    def claim() -> Sequence[Any]:
        with engine.begin() as connection:
            found = list(connection.scalars(lock(_ordered(table, limit))))
            marked = update(table).values(processing=true()).where(table.c.id.in_(found))
            connection.execute(marked)
            return found

    return Caller(claim)


def _ordered(table: sa.Table, limit: int) -> Any:
    return select(table.c.id).where(_free(table)).order_by(table.c.created_at).limit(limit)


def _free(table: sa.Table) -> Any:
    return (table.c.processing == false()) & table.c.completed_at.is_(None)
