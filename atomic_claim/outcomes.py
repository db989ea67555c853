"""The values that end a claim: done, failed, freed, extended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, case, func, literal, not_, null
from sqlalchemy.types import JSON, Float

from .errors import ClaimError
from .inference import plain_type
from .job_table import JobTable
from .predicates import is_unspent
from .roles import check_duration
from .sql_elements import RandomFraction
from .state_values import opposite

Values = dict[Any, Any]

FIRST_RETRY = timedelta(seconds=10)
DOUBLINGS = 12
# Bytes of an error's text at most: MySQL's TEXT; and of a text that was refused: its TINYTEXT.
LONGEST_TEXT, LONGEST_PLAIN = 65_535, 255
CUT = "..."
_ZERO = literal(0.0, Float())


@dataclass(frozen=True, eq=False)
class Outcome:
    """The values that an end writes, their conditions, and the statements by backend."""

    values: Values
    conditions: tuple[ColumnElement[bool], ...] = ()
    statements: dict[Any, Any] = field(default_factory=dict)
    name: str = field(default="", kw_only=True)


def common_values(job_table: JobTable) -> Values:
    """Return the values common to all outcomes: clear the lease, set the stamps."""
    values: Values = {column: job_table.now(column) for column in job_table.stamps}
    if (lease := job_table.lease) is not None:
        # A lease that cannot be NULL ends now.
        values[lease] = null() if lease.nullable else job_table.now(lease, _ZERO, floor=True)
    # The token stays: after a lost reply it tells whose change it was.
    return values | job_table.next_version


def freeing(job_table: JobTable) -> Values:
    """Return the values that free a row; the attempt stays counted.

    Raises:
        ClaimError: the declaration does not say how a row becomes free again.
    """
    if not job_table.released:
        raise ClaimError(
            f"nothing says how a row of {job_table.table.fullname!r} becomes free again: say it "
            "with JobTable(released={column: value})"
        )
    values = {**common_values(job_table), **job_table.released}
    if (worker := job_table.worker) is not None:
        values[worker] = null() if worker.nullable else ""
    return values


def completion(job_table: JobTable) -> Sequence[Outcome]:
    """Return the outcome that marks rows as done."""
    return (Outcome(_ending(job_table, "done"), name="done"),)


def failures(
    job_table: JobTable,
    *,
    retry: bool | timedelta,
    error: str | BaseException | None,
    plain: bool = False,
) -> Sequence[Outcome]:
    """Return the outcomes of a failure: rows without attempts left are not freed for another.

    ``plain`` reduces the error's text to what every column can hold.
    """
    text: Values = {}
    if error is not None and job_table.error is not None:
        said = error if isinstance(error, str) else str(error) or type(error).__qualname__
        text = {job_table.error: error_value(job_table, said, plain=plain)}
    if retry is False:
        return (Outcome(_ending(job_table, "failed") | text, name="failed"),)
    values, due = freeing(job_table), job_table.needed("due", "fail_jobs(retry=...)")
    values[due] = job_table.now(due, _delay(job_table, retry), floor=True)
    retried = Outcome(values | text, name="retried")
    if not job_table.failed or not is_unspent(job_table):
        return (retried,)
    spent = tuple(map(not_, is_unspent(job_table)))
    return Outcome(_ending(job_table, "failed") | text, spent, name="failed"), retried


def sweeping(job_table: JobTable) -> Sequence[Outcome]:
    """Return the outcome that marks spent rows as failed, and keeps the last error."""
    values = _ending(job_table, "failed")
    if (error := job_table.error) is not None:
        spent = literal(error_value(job_table, "all attempts are spent"), error.type)
        values[error] = func.coalesce(error, spent)
    return (Outcome(values),)


def release(job_table: JobTable) -> Sequence[Outcome]:
    """Return the outcome that frees rows and does not count the attempt."""
    values = freeing(job_table)
    if (attempts := job_table.attempts) is not None:
        values[attempts] = case((attempts > 0, attempts - 1), else_=0)
    return (Outcome(values, name="released"),)


def requeuing(job_table: JobTable, *, keep_error: bool) -> Sequence[Outcome]:
    """Return the outcome that frees failed rows, with all their attempts."""
    failed, values = _mark(job_table, "failed"), freeing(job_table)
    for column, value in failed.items():
        if column in job_table.released:
            continue
        if (other := opposite(value)) is not None:
            values[column] = other
        elif column.nullable:
            values[column] = null()
        else:
            raise ClaimError(
                f"nothing says what {column.name!r} of {job_table.table.fullname!r} is for a row "
                "that has not failed, and it cannot be NULL: say it with "
                "JobTable(released={column: value})"
            )
    if job_table.attempts is not None:
        values[job_table.attempts] = 0
    if job_table.error is not None and not keep_error:
        values[job_table.error] = null()
    return (Outcome(values),)


def extension(job_table: JobTable, lease: timedelta | None) -> Values:
    """Return the values that extend a row's lease, counted from now."""
    column = job_table.needed("lease", "extend_jobs")
    if lease is None:
        raise ClaimError(
            "the claim has no lease: claim with claim_jobs(..., lease=...), or say how long with "
            "extend_jobs(..., lease=...)"
        )
    check_duration("lease", lease)
    return {column: job_table.now(column, literal(lease.total_seconds(), Float()))}


def error_value(job_table: JobTable, text: str, *, plain: bool = False) -> Any:
    """Return an error's text as the column can hold it, cut visibly where it is too long.

    NUL and surrogates are escaped, which no database stores; ``plain`` escapes all that is not
    ASCII, for a column whose character set is not known.
    """
    type_ = plain_type(job_table.error.type)
    escaped = text.replace("\0", "\\x00").encode("ascii" if plain else "utf-8", "backslashreplace")
    most = LONGEST_PLAIN if plain else LONGEST_TEXT
    if len(escaped) > most:
        escaped = escaped[: most - len(CUT)] + CUT.encode()
    text = escaped.decode("utf-8", "ignore")
    if isinstance(type_, JSON):
        return {"message": text}
    length = getattr(type_, "length", None)
    if length is None or len(text) <= length:
        return text
    return text[: max(0, length - len(CUT))] + CUT[:length]


def _mark(job_table: JobTable, role: str) -> Values:
    if not (mark := getattr(job_table, role)):
        raise ClaimError(
            f"nothing marks a row of {job_table.table.fullname!r} as {role}: say it with "
            f"JobTable({role}=...)"
        )
    return dict(mark)


def _ending(job_table: JobTable, role: str) -> Values:
    mark = _mark(job_table, role)
    # The mark alone keeps the row from being claimed, so a flag can go back to what it was.
    undone = {} if job_table.state in mark else job_table.released
    kept = {column: value for column, value in undone.items() if column is job_table.state}
    return {**kept, **common_values(job_table), **mark}


def _delay(job_table: JobTable, retry: bool | timedelta) -> ColumnElement[Any]:
    """Return the delay before the next attempt, in seconds."""
    if isinstance(retry, timedelta):
        check_duration("retry", retry, zero=True)
        return literal(retry.total_seconds(), Float())
    if retry is not True:
        raise ClaimError(f"retry is {retry!r}; expected True, False or a timedelta")
    # The database draws, so that every row of a batch has a delay of its own.
    first = FIRST_RETRY.total_seconds() * (RandomFraction() + literal(0.5, Float()))
    if job_table.attempts is None:
        return first
    doubled = func.coalesce(job_table.attempts, 1) - 1
    # A chain of CASEs: SQLite's power() is not always built in.
    factor = case(
        *((doubled <= place, literal(float(2**place), Float())) for place in range(DOUBLINGS)),
        else_=literal(float(2**DOUBLINGS), Float()),
    )
    return first * factor
