"""How long workers waited for locks: asked of the server, or seen by the workers on SQLite."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any, Protocol

from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.exc import SQLAlchemyError

# How often PostgreSQL is looked at, in seconds.
EVERY = 0.01
WAITERS = text(
    "SELECT count(*) FROM pg_stat_activity "
    "WHERE wait_event_type = 'Lock' AND datname = current_database() AND backend_type = "
    "'client backend'"
)
COUNTER = "SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_time'"
NO_LOCK = re.compile(r"\s*(SELECT|PRAGMA|WITH\b.*\)\s*SELECT)\b", re.IGNORECASE | re.DOTALL)

Span = tuple[float, float]


class Waits(Protocol):
    """Adds up the seconds for which workers wait for locks."""

    def look(self) -> None:
        """Look at the server, if it is time."""

    def total(self) -> float | None:
        """Return the seconds of all workers together, or None if the database reports none."""


class _Watched:
    """A connection of its own to the server; what it may not ask, it does not tell."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._refused = False

    def _ask(self, statement: Any) -> Any:
        try:
            return self._connection.execute(statement).one()
        except SQLAlchemyError:
            self._refused = True
            return None


class Sampled(_Watched):
    """PostgreSQL counts no waits, and so is asked again and again who waits now."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._total = 0.0
        self._last = time.perf_counter()

    def look(self) -> None:
        """Count the waiting sessions of the database, for the time since the last look."""
        now = time.perf_counter()
        if self._refused or now - self._last < EVERY:
            return
        row = self._ask(WAITERS)
        if row is not None:
            self._total += row[0] * (now - self._last)
        self._last = now

    def total(self) -> float | None:
        """Return the accumulated seconds, or None if a query failed."""
        return None if self._refused else self._total


class StatusCounter(_Watched):
    """InnoDB's own sum of the milliseconds that all sessions waited for rows."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._begin = self._ask(text(COUNTER))

    def look(self) -> None:
        """There is nothing to do in between."""

    def total(self) -> float | None:
        """Return the seconds since the beginning, or None if a query failed."""
        end = None if self._refused else self._ask(text(COUNTER))
        return None if end is None else (int(end[1]) - int(self._begin[1])) / 1000


class Told:
    """SQLite has no such figures: see :class:`FileLocks`."""

    def look(self) -> None:
        """There is nothing to do."""

    def total(self) -> float | None:
        """Return None: the workers measure their waits themselves."""
        return None


def waits_of(connection: Connection) -> Waits:
    """Return the measurement of lock waits for this database, which starts now."""
    name = connection.dialect.name
    if name == "sqlite":
        return Told()
    return Sampled(connection) if name == "postgresql" else StatusCounter(connection)


class FileLocks:
    """When a worker wanted the lock of SQLite's one writer, and when it had it.

    Attributes:
        wanted: from the beginning of each statement that needs the lock to its end.
        held: from then to the end of the transaction.
    """

    def __init__(self) -> None:
        self.wanted: list[Span] = []
        self.held: list[Span] = []
        self._begun = 0.0
        self._since: float | None = None
        self._ending = False

    def listen(self) -> None:
        """Listen to every engine of this process."""
        event.listen(Engine, "before_cursor_execute", self._before)
        event.listen(Engine, "after_cursor_execute", self._after)
        event.listen(Engine, "commit", self._ends)
        event.listen(Engine, "rollback", self._ends)
        event.listen(Engine, "begin", self._next)
        event.listen(Engine, "engine_connect", self._next)

    def finish(self) -> None:
        """Record the end of the call's transaction."""
        self._next()

    def _before(self, *_: Any) -> None:
        self._next()
        self._begun = time.perf_counter()

    def _after(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if self._since is None and not NO_LOCK.match(statement):
            self._since = time.perf_counter()
            self.wanted.append((self._begun, self._since))

    def _ends(self, *_: Any) -> None:
        self._ending = True

    def _next(self, *_: Any) -> None:
        """Record that the ending transaction has ended."""
        if self._ending and self._since is not None:
            self.held.append((self._since, time.perf_counter()))
            self._since = None
        self._ending = False


def waited(locks: Sequence[tuple[Sequence[Span], Sequence[Span]]], since: float) -> float:
    """How long workers wanted a lock while another had it, from a point in time, in seconds.

    Args:
        locks: of each worker, when it wanted the lock, and when it held it.
        since: what was before does not count.
    """
    total = 0.0
    for worker, (wanted, _) in enumerate(locks):
        others = sorted(
            span for other, (_, held) in enumerate(locks) if other != worker for span in held
        )
        place = 0
        for first, end in wanted:
            begin = max(first, since)
            while place < len(others) and others[place][1] <= begin:
                place += 1
            for left, right in others[place:]:
                if left >= end:
                    break
                total += max(0.0, min(end, right) - max(begin, left))
    return total


def watching(engine: Engine) -> Connection:
    """Open an autocommit connection: each of its statements sees the server's present state."""
    return engine.connect().execution_options(isolation_level="AUTOCOMMIT")
