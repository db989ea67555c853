"""Checks of the rows: NULLs that a condition skips, and jobs that appear stuck."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    DateTime,
    Float,
    Integer,
    and_,
    case,
    false,
    func,
    literal,
    not_,
    null,
    or_,
    select,
    true,
)
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.elements import BinaryExpression, False_, Null, True_

from atomic_claim import predicates
from atomic_claim.inference import DUE, ORDER, is_flag, is_text, plain_type
from atomic_claim.job_table import JobTable
from atomic_claim.outcomes import failures
from atomic_claim.sql_elements import DatabaseTime, InlineLiteral

from .findings import Finding, Level, Patient, Reading, age, count

NULLS = "NULL in a state"
STUCK = "stuck rows"


def nulls(reading: Reading) -> Iterator[Finding]:
    """Count the rows that a condition takes, or passes over, because a column is NULL there."""
    job_table = reading.job_table
    never, always = _never(job_table), _always(job_table)
    conditions = {f"never {column.name}": condition for column, condition in never.items()}
    conditions |= {f"always {column.name}": condition for column, condition in always.items()}
    counted = counts(reading, conditions)
    trapped = False
    for column in never:
        if number := counted[f"never {column.name}"]:
            trapped = True
            yield _never_claimed(reading, column, number)
    for column in always:
        if number := counted[f"always {column.name}"]:
            trapped = True
            yield _always_claimed(reading, column, number)
    if not trapped:
        names = ", ".join(dict.fromkeys(column.name for column in (*never, *always)))
        yield Finding(NULLS, Level.FINE, f"none in {names}" if names else "no state can be NULL")


def _never(job_table: JobTable) -> dict[Column[Any], ColumnElement[bool]]:
    """Return, by column, the rows that are neither free nor running nor ended, as it is NULL.

    Whatever is declared: of a NOT NULL that the database has not, a condition is NULL too.
    """
    found: dict[Column[Any], ColumnElement[bool]] = {}
    idle = not_(func.coalesce(predicates.is_running(job_table), false()))
    open_ = [func.coalesce(each, true()) for each in predicates.not_ended(job_table)]
    for part in visitors.iterate(predicates.is_free(job_table)):
        if isinstance(part, Column) and not _means_null(job_table, part):
            lost = not_(func.coalesce(predicates.is_free(job_table), false()))
            found[part] = and_(part.is_(None), lost, idle, *open_)
    for part in (job_table.attempts, job_table.due):
        if part is not None and not part.nullable:
            found[part] = and_(part.is_(None), predicates.is_free(job_table))
    return found


def _means_null(job_table: JobTable, column: Column[Any]) -> bool:
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


def _always(job_table: JobTable) -> dict[Column[Any], ColumnElement[bool]]:
    """Return, by flag of an end, the free rows with NULL there, which is read as not ended."""
    marks = (job_table.failed, job_table.done, job_table.withdrawn)
    flags = {
        column
        for mark in marks
        for column, value in mark.items()
        if column is not job_table.state
        and column.nullable
        and is_flag(column)
        and isinstance(value, (True_, False_, InlineLiteral))
    }
    ordered = [column for column in job_table.table.columns if column in flags]
    return {column: and_(column.is_(None), predicates.is_free(job_table)) for column in ordered}


def _never_claimed(reading: Reading, column: Column[Any], number: int) -> Finding:
    patient, job_table = reading.patient, reading.job_table
    name = patient.quoted(column.name)
    fix = f"say what NULL in {column.name} means with JobTable(free=...)"
    sql: tuple[str, ...] = ()
    if (free := _unset(job_table).get(column)) is not None:
        fix = "if they wait, say so in the rows; or say it with JobTable(null_is_free=True)"
        sql = (update_text(patient, {column: free}, f"{name} IS NULL"),)
    return Finding(
        NULLS,
        Level.PROBLEM,
        f"{count(number)} whose {column.name} is NULL: no claim ever takes them",
        f"a condition on NULL is neither true nor false: {patient.text(_taken(job_table, column))}",
        fix,
        sql,
    )


def _always_claimed(reading: Reading, column: Column[Any], number: int) -> Finding:
    patient = reading.patient
    name = patient.quoted(column.name)
    value = _unset(reading.job_table)[column]
    return Finding(
        NULLS,
        Level.NOTE,
        f"{count(number)} whose {column.name} is NULL: the claim takes them",
        f"a loop that asks for {column.name} != true passes them over, so it and the claim do "
        "different jobs",
        "write what the claim reads",
        (update_text(patient, {column: value}, f"{name} IS NULL"),),
    )


def _unset(job_table: JobTable) -> dict[Column[Any], Any]:
    """Return the values of a free row, as far as they can be told."""
    ends = {**job_table.failed, **job_table.done, **job_table.withdrawn}
    found = {
        column: _opposite(value)
        for column, value in ends.items()
        if is_flag(column) and isinstance(value, (True_, False_, InlineLiteral))
    }
    if job_table.attempts is not None:
        found[job_table.attempts] = InlineLiteral(0, Integer())
    if job_table.due is not None:
        found[job_table.due] = job_table.now(job_table.due)
    return {**found, **job_table.released}


def _taken(job_table: JobTable, column: Column[Any]) -> ColumnElement[bool]:
    others = any(column is each for each in (job_table.attempts, job_table.due))
    return and_(*predicates.is_due(job_table)) if others else predicates.is_free(job_table)


def _opposite(value: Any) -> ColumnElement[Any]:
    if isinstance(value, InlineLiteral):
        return InlineLiteral(int(not value.value), value.type)
    opposite: ColumnElement[Any] = ~value
    return opposite


def update_text(patient: Patient, values: Mapping[Column[Any], Any], where: str) -> str:
    """Render an UPDATE with literal values."""
    changes = ", ".join(
        f"{patient.quoted(column.name)} = {patient.text(_clause(column, value))}"
        for column, value in values.items()
    )
    return f"UPDATE {patient.name} SET {changes} WHERE {where}"  # noqa: S608 - to be read


def _clause(column: Column[Any], value: Any) -> ColumnElement[Any]:
    if value is None:
        return null()
    return value if isinstance(value, ColumnElement) else literal(value, column.type)


def stuck(reading: Reading) -> Iterator[Finding]:
    """Count the rows that have been running for long, and that no lease brings back."""
    job_table = reading.job_table
    if job_table.unleased is not None:
        yield Finding(STUCK, Level.FINE, f"are free again after {job_table.unleased}")
        return
    running = is_marked(job_table)
    if job_table.lease is not None:
        running = and_(running, job_table.lease.is_(None))
    since, certain = _since(job_table)
    seconds = reading.patient.stuck_after.total_seconds()
    groups = {"old": running}
    if since is not None:
        limit = job_table.now(since, literal(-seconds, Float()))
        groups = {"old": and_(running, since <= limit), "undated": and_(running, since.is_(None))}
    counted = counts(reading, groups)
    if counted["old"]:
        yield _stuck(reading, counted["old"], groups["old"], since, certain=certain)
    if counted.get("undated"):
        yield _stuck(reading, counted["undated"], groups["undated"], None, certain=False)
    if not any(counted.values()):
        yield Finding(STUCK, Level.FINE, f"none has run for {age(seconds)} without a lease")


def spent(reading: Reading) -> Iterator[Finding]:
    """Count the rows without attempts left, and those whose lease ended long ago."""
    job_table = reading.job_table
    seconds = reading.patient.stuck_after.total_seconds()
    lease, groups = job_table.lease, {}
    unowned = [predicates.is_free(job_table)]
    if lease is not None:
        expired = and_(predicates.is_running(job_table), lease <= job_table.now(lease))
        unowned.append(expired)
        long_ago = lease <= job_table.now(lease, literal(-seconds, Float()))
        groups["overdue"] = and_(expired, long_ago, *predicates.is_unspent(job_table))
    if predicates.is_unspent(job_table) and job_table.failed:
        groups["spent"] = and_(not_(and_(*predicates.is_unspent(job_table))), or_(*unowned))
    counted = counts(reading, groups)
    if number := counted.get("spent"):
        values = failures(job_table, retry=False, error="all attempts are spent")[0].values
        sql = update_text(reading.patient, values, reading.patient.text(groups["spent"]))
        why = "no claim takes them any more, and nothing says that they have failed"
        fix = "call sweep_jobs(engine, table) from time to time; for now:"
        yield Finding("attempts", Level.NOTE, f"{count(number)} spent", why, fix, (sql,))
    if number := counted.get("overdue"):
        found = f"{count(number)} whose lease ended more than {age(seconds)} ago"
        why = "any claim would take them, so that no worker seems to ask"
        fix = "see whether the workers run, and whether they ask for these rows (where=...)"
        yield Finding("leases", Level.NOTE, found, why, fix)


def is_marked(job_table: JobTable) -> ColumnElement[bool]:
    """Build the condition that a row's state is claimed, ignoring the claim's other columns."""
    state = job_table.state
    if state is None:
        return predicates.is_running(job_table)
    value = job_table.claimed[state]
    is_claimed = state.is_not(None) if isinstance(value, DatabaseTime) else state == value
    return and_(is_claimed, *predicates.not_ended(job_table))


def claimed_at(job_table: JobTable) -> Column[Any] | None:
    """Return the column that holds the time of a row's claim, if there is one."""
    return next(iter(predicates.running_since(job_table)), None)


def _since(job_table: JobTable) -> tuple[Column[Any] | None, bool]:
    """Return the column closest to a row's claim time, and whether it is exactly that time."""
    if (written := claimed_at(job_table)) is not None:
        return written, True
    for term in (*job_table.order, job_table.due):
        if isinstance(term, Column) and is_clock(job_table, term):
            return term, False
    return None, False


def is_clock(job_table: JobTable, column: Any) -> bool:
    """Check whether a column's times can be compared with the database's clock."""
    if not isinstance(column, Column):
        return False
    if is_text(column):
        return job_table.text_times is not None and column.name in (*ORDER, *DUE)
    return isinstance(plain_type(column.type), DateTime)


def _stuck(
    reading: Reading,
    number: int,
    running: ColumnElement[bool],
    since: Column[Any] | None,
    *,
    certain: bool,
) -> Finding:
    job_table = reading.job_table
    found = f"{count(number)} {'runs' if number == 1 else 'run'} without a lease"
    if since is not None:
        oldest = age_of_oldest(reading, since, running)
        what = "claimed" if certain else f"from {oldest} ago by {since.name}"
        found += f", the oldest {what}" + (f" {oldest} ago" if certain else "")
    if not certain:
        found += "; no column says when they were claimed"
    cure = f"atomic-claim jobs --table {reading.patient.spec} --release-stuck gives them back"
    if not certain:
        cure = "only their workers can tell whether they still run"
    if job_table.lease is None:
        cure += "; with leases they come back by themselves: atomic-claim migration --add "
        cure += ",".join(r for r in ("lease", "token") if getattr(job_table, r) is None)
    elif certain:
        cure += "; JobTable(unleased=...) has them come back by themselves"
    why = "a worker that dies leaves its row claimed, and no claim takes it again"
    return Finding(STUCK, Level.PROBLEM if certain else Level.NOTE, found, why, cure)


def counts(reading: Reading, conditions: Mapping[str, ColumnElement[bool]]) -> dict[str, int]:
    """Count the rows that meet each condition, by one read of the table."""
    if not conditions:
        return {}
    sums = [func.sum(case((each, 1), else_=0)) for each in conditions.values()]
    statement = select(*sums).select_from(reading.job_table.table)
    row = reading.patient.connection.execute(statement).one()
    return {name: int(value or 0) for name, value in zip(conditions, row, strict=True)}


def age_of_oldest(
    reading: Reading, since: Column[Any], condition: ColumnElement[bool]
) -> str | None:
    """Return the age of the earliest of some rows' times, by the database's clock."""
    seconds = seconds_since_oldest(reading, since, condition)
    return None if seconds is None else age(seconds)


def seconds_since_oldest(
    reading: Reading, since: Column[Any], condition: ColumnElement[bool]
) -> float | None:
    """Return the age of the earliest time in seconds, or None if no row matches."""
    job_table = reading.job_table
    oldest = func.min(since, type_=since.type)
    statement = select(oldest, job_table.now(since)).select_from(job_table.table).where(condition)
    first, now = map(_as_time, reading.patient.connection.execute(statement).one())
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
