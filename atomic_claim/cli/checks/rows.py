"""Checks of the rows: NULLs that a condition skips, and jobs that appear stuck."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.elements import BinaryExpression, Null

from atomic_claim import predicates
from atomic_claim.inference import DUE, ORDER, is_flag, is_text, plain_type
from atomic_claim.job_table import JobTable
from atomic_claim.outcomes import failures
from atomic_claim.sql_elements import DatabaseTime, InlineLiteral

from .catalog import finding
from .findings import Finding, Level, Patient, Reading, age, count

K = TypeVar("K")
STUCK = "stuck rows"


def nulls(reading: Reading) -> Iterator[Finding]:
    """Count the rows that a condition takes, or passes over, because a column is NULL there."""
    job_table = reading.job_table
    never, always = _never(job_table), _always(job_table)
    groups = {(column, False): condition for column, condition in never.items()}
    groups |= {(column, True): condition for column, condition in always.items()}
    found = [
        _trapped(reading, column, number, taken=taken)
        for (column, taken), number in counts(reading, groups).items()
        if number
    ]
    names = ", ".join(dict.fromkeys(column.name for column in (*never, *always)))
    fine = f"none in {names}" if names else "no state can be NULL"
    yield from found or [Finding("NULL in a state", Level.FINE, fine)]


def _never(job_table: JobTable) -> dict[sa.Column[Any], sa.ColumnElement[bool]]:
    """Return, by column, the rows that are neither free nor running nor ended, as it is NULL.

    Whatever is declared: of a NOT NULL that the database has not, a condition is NULL too.
    """
    found: dict[sa.Column[Any], sa.ColumnElement[bool]] = {}
    idle = sa.not_(sa.func.coalesce(predicates.is_running(job_table), sa.false()))
    open_ = [sa.func.coalesce(each, sa.true()) for each in predicates.not_ended(job_table)]
    for part in visitors.iterate(predicates.is_free(job_table)):
        if isinstance(part, sa.Column) and not _means_null(job_table, part):
            lost = sa.not_(sa.func.coalesce(predicates.is_free(job_table), sa.false()))
            found[part] = sa.and_(part.is_(None), lost, idle, *open_)
    for part in (job_table.attempts, job_table.due):
        if part is not None and not part.nullable:
            found[part] = sa.and_(part.is_(None), predicates.is_free(job_table))
    return found


def _means_null(job_table: JobTable, column: sa.Column[Any]) -> bool:
    """Check whether the declaration assigns NULL in the column a meaning."""
    marks = (job_table.released, job_table.done, job_table.failed, job_table.withdrawn)
    if any(mark.get(column, ...) is None for mark in marks):
        return True
    return any(
        isinstance(part, BinaryExpression)
        and part.operator in (operators.is_, operators.is_not)
        and part.left is column
        and isinstance(part.right, Null)
        for part in visitors.iterate(predicates.is_free(job_table))
    )


def _always(job_table: JobTable) -> dict[sa.Column[Any], sa.ColumnElement[bool]]:
    """Return, by flag of an end, the free rows with NULL there, which is read as not ended."""
    flags = _flags_of_ends(job_table)
    return {
        column: sa.and_(column.is_(None), predicates.is_free(job_table))
        for column in job_table.table.columns
        if column in flags and column.nullable and column is not job_table.state
    }


def _flags_of_ends(job_table: JobTable) -> dict[sa.Column[Any], InlineLiteral]:
    """Return the flags that mark an ended row, with their values there."""
    ends = {**job_table.failed, **job_table.done, **job_table.withdrawn}
    return {
        column: value
        for column, value in ends.items()
        if is_flag(column) and isinstance(value, InlineLiteral)
    }


def _trapped(reading: Reading, column: sa.Column[Any], number: int, *, taken: bool) -> Finding:
    """Report the rows that a NULL hides from every claim, or from other loops than claims."""
    job_table, name = reading.job_table, column.name
    values = _unset(job_table)
    sql: tuple[str, ...] = ()
    if column in values:
        where = f"{reading.quoted(name)} IS NULL"
        sql = (update_text(reading, {column: values[column]}, where),)
    words = {"rows": count(number), "column": name}
    if taken:
        return finding("null_taken", sql, **words)
    others = any(column is each for each in (job_table.attempts, job_table.due))
    condition = sa.and_(*predicates.is_due(job_table)) if others else predicates.is_free(job_table)
    fix = f"say what NULL in {name} means with JobTable(free=...)"
    if sql:
        fix = "if they wait, say so in the rows; or say it with JobTable(null_is_free=True)"
    return finding("null_passed_over", sql, **words, condition=reading.text(condition), fix=fix)


def _unset(job_table: JobTable) -> dict[sa.Column[Any], Any]:
    """Return the values of a free row, as far as they can be told."""
    flags = _flags_of_ends(job_table).items()
    found: dict[sa.Column[Any], Any] = {
        column: InlineLiteral(not flag.value, flag.type) for column, flag in flags
    }
    if job_table.attempts is not None:
        found[job_table.attempts] = InlineLiteral(0, sa.Integer())
    if job_table.due is not None:
        found[job_table.due] = job_table.now(job_table.due)
    return {**found, **job_table.released}


def update_text(patient: Patient, values: Mapping[sa.Column[Any], Any], where: str) -> str:
    """Render an UPDATE with literal values."""
    changes = ", ".join(
        f"{patient.quoted(column.name)} = {patient.text(_clause(column, value))}"
        for column, value in values.items()
    )
    return f"UPDATE {patient.name} SET {changes} WHERE {where}"  # noqa: S608 - to be read


def _clause(column: sa.Column[Any], value: Any) -> sa.ColumnElement[Any]:
    return value if isinstance(value, sa.ColumnElement) else sa.literal(value, column.type)


def stuck(reading: Reading) -> Iterator[Finding]:
    """Count the rows that have been running for long, and that no lease brings back."""
    job_table = reading.job_table
    if job_table.unleased is not None:
        yield Finding(STUCK, Level.FINE, f"are free again after {job_table.unleased}")
        return
    running = is_marked(job_table)
    if job_table.lease is not None:
        running = sa.and_(running, job_table.lease.is_(None))
    claimed = claimed_at(job_table)
    since = dated_by(job_table) if claimed is None else claimed
    seconds = reading.stuck_after.total_seconds()
    groups = {"old": running}
    if since is not None:
        limit = job_table.now(since, sa.literal(-seconds, sa.Float()))
        groups = {
            "old": sa.and_(running, since <= limit),
            "undated": sa.and_(running, since.is_(None)),
        }
    counted = counts(reading, groups)
    if counted["old"]:
        certain = claimed is not None
        yield _stuck(reading, counted["old"], groups["old"], since, certain=certain)
    if counted.get("undated"):
        yield _stuck(reading, counted["undated"], groups["undated"], None, certain=False)
    if not any(counted.values()):
        yield Finding(STUCK, Level.FINE, f"none has run for {age(seconds)} without a lease")


def spent(reading: Reading) -> Iterator[Finding]:
    """Count the rows without attempts left, and those whose lease ended long ago."""
    job_table = reading.job_table
    seconds = reading.stuck_after.total_seconds()
    unspent = predicates.is_unspent(job_table)
    lease, groups = job_table.lease, {}
    if lease is not None:
        long_ago = lease <= job_table.now(lease, sa.literal(-seconds, sa.Float()))
        groups["overdue"] = sa.and_(predicates.is_running(job_table), long_ago, *unspent)
    if unspent and job_table.failed:
        groups["spent"] = sa.and_(*map(sa.not_, unspent), predicates.is_unowned(job_table))
    counted = counts(reading, groups)
    if number := counted.get("spent"):
        values = failures(job_table, retry=False, error="all attempts are spent")[0].values
        sql = update_text(reading, values, reading.text(groups["spent"]))
        yield finding("spent", (sql,), rows=count(number))
    if number := counted.get("overdue"):
        yield finding("overdue", rows=count(number), age=age(seconds))


def is_marked(job_table: JobTable) -> sa.ColumnElement[bool]:
    """Build the condition that a row's state is claimed, ignoring the claim's other columns."""
    state = job_table.state
    if state is None:
        return predicates.is_running(job_table)
    value = job_table.claimed[state]
    is_claimed = state.is_not(None) if isinstance(value, DatabaseTime) else state == value
    return sa.and_(is_claimed, *predicates.not_ended(job_table))


def claimed_at(job_table: JobTable) -> sa.Column[Any] | None:
    """Return the column that holds the time of a row's claim, if there is one."""
    return next(iter(predicates.running_since(job_table)), None)


def dated_by(job_table: JobTable) -> sa.Column[Any] | None:
    """Return the column that tells how long a job has been there, if there is one."""
    terms = (*job_table.order, job_table.due)
    return next((each for each in terms if is_clock(job_table, each)), None)


def is_clock(job_table: JobTable, column: Any) -> bool:
    """Check whether a column's times can be compared with the database's clock."""
    if not isinstance(column, sa.Column):
        return False
    if is_text(column):
        return job_table.text_times is not None and column.name in (*ORDER, *DUE)
    return isinstance(plain_type(column.type), sa.DateTime)


def _stuck(
    reading: Reading,
    number: int,
    running: sa.ColumnElement[bool],
    since: sa.Column[Any] | None,
    *,
    certain: bool,
) -> Finding:
    job_table, more = reading.job_table, ""
    if job_table.lease is None:
        lacking = ",".join(r for r in ("lease", "token") if getattr(job_table, r) is None)
        more = "; with leases they come back by themselves: atomic-claim migration --add " + lacking
    elif certain:
        more = "; JobTable(unleased=...) has them come back by themselves"
    rows = f"{count(number)} {'runs' if number == 1 else 'run'} without a lease"
    oldest = "" if since is None else age(seconds_since_oldest(reading, since, running) or 0)
    if certain:
        return finding("stuck", rows=rows, oldest=oldest, table=reading.spec, more=more)
    oldest = oldest and f", the oldest from {oldest} ago by {getattr(since, 'name', '')}"
    return finding("undated", rows=rows, oldest=oldest, more=more)


def counts(reading: Reading, conditions: Mapping[K, sa.ColumnElement[bool]]) -> dict[K, int]:
    """Count the rows that meet each condition, by one read of the table."""
    if not conditions:
        return {}
    sums = [sa.func.sum(sa.case((each, 1), else_=0)) for each in conditions.values()]
    statement = sa.select(*sums).select_from(reading.job_table.table)
    row = reading.connection.execute(statement).one()
    return {name: int(value or 0) for name, value in zip(conditions, row, strict=True)}


def seconds_since_oldest(
    reading: Reading, since: sa.Column[Any], condition: sa.ColumnElement[bool]
) -> float | None:
    """Return the age of the earliest time in seconds, or None if no row matches."""
    job_table = reading.job_table
    oldest = sa.func.min(since, type_=since.type)
    statement = (
        sa.select(oldest, job_table.now(since)).select_from(job_table.table).where(condition)
    )
    first, now = map(_as_time, reading.connection.execute(statement).one())
    if first is None or now is None:
        return None
    return (now - first).total_seconds()


def _as_time(value: Any) -> datetime | None:
    """Convert a stored time, or its text, to a naive datetime, in UTC if it has a zone."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, datetime) and value.tzinfo is not None:
        return value.astimezone(UTC).replace(tzinfo=None)
    return value if isinstance(value, datetime) else None
