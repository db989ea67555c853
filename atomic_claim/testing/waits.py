"""How long sessions wait for locks, as the server tells it."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

# How often PostgreSQL is looked at, in seconds.
EVERY = 0.01
# PostgreSQL counts no waits, and so is asked again and again who waits now.
WAITERS = text(
    "SELECT count(*) FROM pg_stat_activity "
    "WHERE wait_event_type = 'Lock' AND datname = current_database() AND backend_type = "
    "'client backend'"
)
# InnoDB's own sum of the milliseconds that all sessions waited for rows.
COUNTER = text("SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_time'")


class Waits:
    """Adds up the seconds for which sessions wait for locks, from now on.

    Args:
        connection: a connection of its own to PostgreSQL, MySQL or MariaDB, in autocommit, so that
            each statement sees the server's present state.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._is_sampled = connection.dialect.name == "postgresql"
        self._is_refused = False
        self._sampled = 0.0
        self._last = time.perf_counter()
        self._begin = 0.0 if self._is_sampled else self._ask(COUNTER)

    def look(self) -> None:
        """Count the waiting sessions for the time since the last look, if the server does not."""
        now = time.perf_counter()
        if self._is_sampled and not self._is_refused and now - self._last >= EVERY:
            self._sampled += self._ask(WAITERS) * (now - self._last)
            self._last = now

    def total(self) -> float | None:
        """Return the seconds of all sessions together, or None if a query failed."""
        counted = 0.0 if self._is_sampled else (self._ask(COUNTER) - self._begin) / 1000
        return None if self._is_refused else counted + self._sampled

    def _ask(self, statement: Any) -> float:
        try:
            return float(self._connection.execute(statement).one()[-1])
        except SQLAlchemyError:
            self._is_refused = True
            return 0.0
