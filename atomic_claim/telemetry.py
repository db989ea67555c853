"""Events of claims and of their ends, for subscribers and for the log.

The logger is ``atomic_claim``: rows that are claimed, ended and requeued at DEBUG, everything else
at WARNING. Events have the keys of rows, and never their other values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from logging import DEBUG, WARNING
from typing import Any

from sqlalchemy import Row

from .backends.reading import Key
from .backends.recovery import logger
from .job_table import JobTable
from .predicates import running_since, waiting_since


@dataclass(frozen=True)
class Event:
    """An event of one table.

    In the caller's transaction it tells what was done there, which a rollback undoes.

    Attributes:
        table: the table's name, with its schema if it has one.
        keys: the primary keys of the rows, a tuple each.
    """

    table: str
    keys: tuple[Key, ...]


@dataclass(frozen=True)
class Claimed(Event):
    """A claim has returned rows, or none; their number is the number of keys.

    Attributes:
        waits: for each row, the time from when it was due, or else created, until it was claimed;
            None where the claimed row does not show it. A retry waits from when it was due.
        worker: the worker's name, if one was given.
        unreadable: the primary keys of the rows that the claim passed over.
        seconds: how long the call took.
    """

    waits: tuple[timedelta | None, ...]
    worker: str | None
    unreadable: tuple[Key, ...]
    seconds: float


@dataclass(frozen=True)
class Ended(Event):
    """Claimed rows have ended, each of them "done", "failed", "retried" or "released"."""

    outcomes: tuple[str, ...]


class Lost(Event):
    """Sent if rows no longer belong to their claim, as an end, extension or heartbeat found."""


@dataclass(frozen=True)
class Retried(Event):
    """A transaction of the call's own runs again; the keys of its rows are not known.

    Attributes:
        tried: how often it has run.
        disconnected: whether it lost its connection, or could not get a new one.
    """

    tried: int
    disconnected: bool


class Swept(Event):
    """Sent if rows that had no attempts left were marked as failed."""


class Requeued(Event):
    """Failed rows were freed again."""


subscribers: dict[object, Callable[[Event], object]] = {}
logs_claims = partial(logger.isEnabledFor, DEBUG)
"""Claims and their ends build no event if this is false and there are no subscribers."""


def subscribe(callback: Callable[[Event], object]) -> Callable[[], object]:
    """Call ``callback`` with each :class:`Event` of this process, once it has happened.

    It runs in the thread that makes the call, which waits for it; with :mod:`atomic_claim.aio`, in
    the event loop's. An exception that it raises is logged and not passed on.

    Args:
        callback: takes the event. It is added each time, even if it subscribes already.

    Returns:
        A function without arguments that ends this subscription.
    """
    entry = object()
    subscribers[entry] = callback
    return partial(subscribers.pop, entry, None)


def report(event: Event) -> None:
    """Log an event and give it to the subscribers."""
    usual = isinstance(event, (Claimed, Ended, Requeued))
    logger.log(DEBUG if usual else WARNING, "%r", event)
    for callback in tuple(subscribers.values()):
        try:
            callback(event)
        except Exception:  # noqa: BLE001 - what the call has done must reach its caller
            logger.exception("a subscriber raised; the event was %s", type(event).__name__)


def report_claim(claim: Any, began: float) -> None:
    """Report a ``Claim`` whose call began at this time of ``time.perf_counter()``."""
    waits, name = tuple(_waited(claim.table, job) for job in claim.jobs), claim.table.table.fullname
    seconds = time.perf_counter() - began
    report(Claimed(name, claim.keys, waits, claim.worker, claim.unreadable, seconds))


def report_ends(job_table: JobTable, outcomes: Mapping[Key, str]) -> None:
    """Report the outcomes of claimed rows."""
    report(Ended(job_table.table.fullname, tuple(outcomes), tuple(outcomes.values())))


def _waited(job_table: JobTable, job: Any) -> timedelta | None:
    """Return how long a row has waited: by the database's clock, if the row has a claim time."""
    since = _first_time(job_table, job, job_table.prepare(waiting_since))
    now = _first_time(job_table, job, running_since(job_table))
    if since is None or (now is None and since.tzinfo is None and job_table.naive_times != "utc"):
        return None
    if now is None or (now.tzinfo is None) != (since.tzinfo is None):
        now = datetime.now(UTC).replace(tzinfo=since.tzinfo and UTC)
    return max(timedelta(0), now - since)


def _first_time(job_table: JobTable, job: Any, columns: Iterable[Any]) -> datetime | None:
    """Return the first time that a row or entity holds; what is not loaded is not read."""
    if isinstance(job, Row):
        found = [job._mapping.get(column.key) for column in columns]  # noqa: SLF001 - public name
    else:
        names = job_table.prepare(_attribute_names)
        found = [vars(job).get(names.get(column, "")) for column in columns]
    return next((value for value in found if isinstance(value, datetime)), None)


def _attribute_names(job_table: JobTable) -> dict[Any, str]:
    mapper: Any = job_table.mapper
    return {column: each.key for each in mapper.column_attrs for column in each.columns}
