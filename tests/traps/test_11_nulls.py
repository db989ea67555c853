"""Trap 11: NULL is neither true nor false, and every flag has to say what it means there."""

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Boolean, Column, Integer, String

from atomic_claim import JobTable, claim_jobs
from tests.databases import Database
from tests.jobs import ids, job_table, rows

# 1 and 4 say nothing, 2 and 5 say no, 3 says yes.
THREE_WAYS = [None, False, True, None, False]

of_each_flag_type = pytest.mark.parametrize("type_", [Boolean, Integer])


def filled(
    database: Database, name: str, type_: Any = Boolean, values: Any = THREE_WAYS
) -> tuple[sa.Engine, sa.Table]:
    """Five jobs, some with NULL in the column of this name; the others are free."""
    engine = database.engine()
    column = Column(name, type_)
    table = job_table(processing=column) if name == "processing" else job_table(column)
    table.metadata.create_all(engine)
    some = zip(rows(len(values)), values, strict=True)
    with engine.begin() as connection:
        connection.execute(
            table.insert(),
            [row | {name: type_of(type_)(value)} for row, value in some],
        )
    return engine, table


def type_of(type_: Any) -> Any:
    """Return a function that converts a value to the column's type."""
    if type_ is Integer:
        return lambda value: None if value is None else int(value)
    return lambda value: value


def drained(engine: sa.Engine, jobs: Any) -> list[int]:
    """Return the ids of all claimable rows; assert that a second claim finds none."""
    found = ids(claim_jobs(engine, jobs, 10))
    assert claim_jobs(engine, jobs, 10) == []
    return found


def test_a_null_state_is_not_free(database: Database) -> None:
    """Neither inferred nor declared is a NULL in the state taken for free."""
    engine, table = filled(database, "processing")
    with engine.connect() as connection:
        for given in (table, JobTable(table, state="processing")):
            assert ids(claim_jobs(connection, given, 10)) == [2, 5]
            connection.rollback()


@of_each_flag_type
def test_a_null_state_is_free_if_declared(database: Database, type_: Any) -> None:
    """With `null_is_free` the rows that say nothing are claimed like those that say no."""
    engine, table = filled(database, "processing", type_)
    flags: dict[str, Any] = {} if type_ is Boolean else {"free": 0, "claimed": 1}
    jobs = JobTable(table, state="processing", null_is_free=True, **flags)
    assert drained(engine, jobs) == [1, 2, 4, 5]


@pytest.mark.parametrize("free", ["w", ("w", "x")], ids=["one", "two"])
def test_a_null_state_of_strings(database: Database, free: Any) -> None:
    """A NULL in a string state is free only if declared, also beside several free values."""
    values = [None, "w", "r", None, "x"]
    engine, table = filled(database, "state", String(5), values)
    others = {"state": "state", "free": free, "claimed": "r"}
    expected = [2] if free == "w" else [2, 5]
    assert drained(engine, JobTable(table, **others)) == expected
    rest = JobTable(table, **others, null_is_free=True)
    assert drained(engine, rest) == [1, 4]


def test_a_null_state_that_is_free_and_done(database: Database) -> None:
    """Where NULL is free, a mark of the end that writes NULL is told by its other columns."""
    engine, table = filled(database, "state", String(5), [None, "w", None])
    done = {"state": None, "note": "over"}
    jobs = JobTable(table, state="state", free="w", claimed="r", done=done, null_is_free=True)
    with engine.begin() as connection:
        connection.execute(table.update().where(table.c.id == 3).values(note="over"))
    assert drained(engine, jobs) == [1, 2]


def test_an_inverted_state(database: Database) -> None:
    """A flag that is true where the job is free is asked for in the same way."""
    engine, table = filled(database, "visible")
    assert drained(engine, JobTable(table, state="visible", free=True)) == [3]
    jobs = JobTable(table, state="visible", free=True, null_is_free=True)
    assert drained(engine, jobs) == [1, 4]


@of_each_flag_type
def test_a_null_mark_of_failure_has_not_failed(database: Database, type_: Any) -> None:
    """`has_error` that is NULL keeps no row from being claimed."""
    engine, table = filled(database, "has_error", type_)
    value = True if type_ is Boolean else 1
    jobs = JobTable(table, state="processing", failed={"has_error": value})
    assert drained(engine, jobs) == [1, 2, 4, 5]


@pytest.mark.parametrize("role", ["done", "failed", "withdrawn"])
def test_no_null_ends_a_job(database: Database, role: str) -> None:
    """Nor does a NULL mean that the job is done or withdrawn, be the flag declared or inferred."""
    name = {"done": "is_done", "failed": "has_error", "withdrawn": "cancelled"}[role]
    engine, table = filled(database, name)
    declared: dict[str, Any] = {role: {name: True}}
    with engine.connect() as connection:
        jobs = JobTable(table, state="processing", **declared)
        assert ids(claim_jobs(connection, jobs, 10)) == [1, 2, 4, 5]
        connection.rollback()
    assert drained(engine, table) == [1, 2, 4, 5]


def test_a_flag_that_ends_a_job_by_being_false(database: Database) -> None:
    """Where false is the end, NULL is not yet the end."""
    engine, table = filled(database, "wanted")
    jobs = JobTable(table, state="processing", withdrawn={"wanted": False})
    assert drained(engine, jobs) == [1, 3, 4]


def test_null_attempts_are_none(database: Database) -> None:
    """A job whose attempts were never counted has had none, and the count begins."""
    engine, table = filled(database, "attempts", Integer, [None, 0, 2, None])
    jobs = JobTable(table, state="processing", attempts="attempts", max_attempts=2)
    claimed = claim_jobs(engine, jobs, 10)
    assert [(job.id, job.attempts) for job in claimed] == [(1, 1), (2, 1), (4, 1)]


def test_a_comparison_drops_nulls(database: Database) -> None:
    """The twin: `has_error != true`, and its negation, find no row where it is NULL."""
    engine, table = filled(database, "has_error")
    with engine.connect() as connection:
        for condition in (table.c.has_error != sa.true(), sa.not_(table.c.has_error)):
            query = sa.select(table.c.id).where(condition).order_by(table.c.id)
            assert list(connection.scalars(query)) == [2, 5]
