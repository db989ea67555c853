"""The meeting of a race's workers: each waits for the others before its first write.

A race that shows itself only now and then proves nothing by its absence. All workers have found
their jobs before the first of them marks its own, so that a function which finds and then marks
hands the same jobs to all of them. One that locks or claims is not disturbed by it: who waits for
a lock that another holds at the meeting is noticed, and not waited for.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from ctypes import c_double, c_int
from multiprocessing import RawArray, RawValue
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, Table, event
from sqlalchemy.engine import Connection

from .database import CommandError, family, masked

STARTING, AT_WORK, IN_STATEMENT, AT_MEETING, PAST = range(5)
TO_BE_KILLED, KILLED = 2, 1
# A statement that takes longer than this waits for a lock, as far as the meeting is concerned.
BLOCKED = 0.3
# A worker that is in a call for this long without a statement is not waited for: it may wait for a
# lock outside of the database.
ABSENT = 2.0
# SQLite's busy handler sleeps for a millisecond at the least.
LEAST_WAIT = 0.001
PAUSE = 0.0005
WRITE = re.compile(
    r"\s*(INSERT|UPDATE|DELETE|REPLACE|MERGE)\b|"
    r"\s*WITH\b.*\b(INSERT\s+INTO|(?<!FOR )(?<!KEY )UPDATE|DELETE\s+FROM)\b",
    re.IGNORECASE | re.DOTALL,
)


class Board:
    """Memory that all workers and their parent share; each worker writes a place of its own.

    Args:
        workers: how many there are.

    Attributes:
        doing: what each worker does.
        since: since when it has been in its statement, in seconds of ``perf_counter``.
        calling: since when it has been in a call of the target, or 0.
        idle: whether its last call gave nothing.
        met: when the meeting was over, or 0 while it is not.
        open: whether there may be more to do although all are idle: ``TO_BE_KILLED`` while some
            have yet to be killed, ``KILLED`` while the others may get those jobs, else 0.
        takes_limit: whether the target takes a limit.
    """

    def __init__(self, workers: int) -> None:
        self.doing = RawArray(c_int, workers)
        self.since = RawArray(c_double, workers)
        self.calling = RawArray(c_double, workers)
        self.idle = RawArray(c_int, workers)
        self.met = RawValue(c_double, 0.0)
        self.open = RawValue(c_int, 0)
        self.takes_limit = RawValue(c_int, 0)

    def _is_awaited(self, worker: int) -> bool:
        doing, now = self.doing[worker], time.perf_counter()
        if doing == IN_STATEMENT:
            return now - self.since[worker] < BLOCKED
        if doing == AT_WORK:
            return now - self.calling[worker] < ABSENT
        return doing == STARTING

    def wait_for_others(self) -> None:
        """Return when no worker is still on its way here."""
        while not self.met.value and any(map(self._is_awaited, range(len(self.doing)))):
            time.sleep(PAUSE)
        # Who has waited too may find it over, and leaves the time as it is.
        self.met.value = self.met.value or time.perf_counter()


class Meeting:
    """One worker's way to the meeting, seen by the statements that it sends.

    Attributes:
        waited: seconds of the present call in which it waited for the others.
        long: seconds that its longer statements took since the meeting, added up.

    Args:
        board: what all share.
        worker: which one it is.
        tables: the tables whose first write is waited for.
        url: the database of the race; those tables must not be asked for in any other.
    """

    def __init__(self, board: Board, worker: int, tables: Sequence[Table], url: URL) -> None:
        self.waited = 0.0
        self.long = 0.0
        self._board = board
        self._worker = worker
        names = "|".join(re.escape(table.name) for table in tables)
        self._names_table = re.compile(rf"(?<!\w)({names})(?!\w)", re.IGNORECASE)
        self._url = url

    def listen(self) -> None:
        """Listen to every engine of this process, that of the user's module included."""
        event.listen(Engine, "before_cursor_execute", self._before)
        event.listen(Engine, "after_cursor_execute", self._after)
        event.listen(Engine, "handle_error", self._after)

    def call_begins(self) -> None:
        """Record that a call of the target begins."""
        self.waited = 0.0
        self._board.calling[self._worker] = time.perf_counter()
        if self._board.doing[self._worker] == STARTING:
            self._board.doing[self._worker] = AT_WORK

    def call_ends(self) -> None:
        """Record that the call has ended; the others no longer wait for this worker."""
        self._board.calling[self._worker] = 0.0
        self._board.doing[self._worker] = PAST

    def _before(self, connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        if self._names_table.search(statement):
            self._check(connection.engine.url)
            if not self._board.met.value and WRITE.match(statement):
                begin = time.perf_counter()
                self._board.doing[self._worker] = AT_MEETING
                self._board.wait_for_others()
                self.waited += time.perf_counter() - begin
        self._board.since[self._worker] = time.perf_counter()
        self._board.doing[self._worker] = IN_STATEMENT

    def _after(self, *_: Any) -> None:
        took = time.perf_counter() - self._board.since[self._worker]
        # Errors outside of a statement come here, too.
        is_long = self._board.doing[self._worker] == IN_STATEMENT and took >= LEAST_WAIT
        if is_long and self._board.met.value:
            self.long += took
        self._board.doing[self._worker] = AT_WORK

    def _check(self, url: URL) -> None:
        """Refuse to race in another database than that which was named for it."""
        if _place(url) != _place(self._url):
            raise CommandError(
                f"it works on {masked(url)}, and the race is to be in {masked(self._url)}: let it "
                "take its session or engine as an argument, or its URL from DATABASE_URL, which "
                "is set for it"
            )


def _place(url: URL) -> tuple[Any, ...]:
    if family(url) == "sqlite":
        return ("sqlite", Path(str(url.database or "").removeprefix("file:")).resolve())
    host = {"localhost": "127.0.0.1", None: ""}.get(url.host, url.host)
    return (family(url), host, url.port, url.database)
