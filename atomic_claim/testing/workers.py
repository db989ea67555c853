"""The task of a race's workers: call the target until no job is left, and report the results."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError, IntegrityError, InternalError, OperationalError
from sqlalchemy.orm.exc import StaleDataError

from atomic_claim.errors import ClaimConflict, ClaimError
from atomic_claim.patch.file import load_patches
from atomic_claim.patch.start import FILE

from .arguments import Offer, Plan, planned
from .database import CommandError, make_engine, one_line, without_secrets
from .harness import Send, Work
from .names import TableName, load_table, owner_and_object, where
from .result_keys import Reader
from .results import Call, Key
from .rows import tables_of
from .start_barrier import TO_BE_KILLED, Board, Meeting

CONFLICTS = (OperationalError, IntegrityError, InternalError, StaleDataError, ClaimConflict)
# A target that only fails gives up after this many times, which take about a second.
FAILURES = 100
LONGEST_PAUSE = 0.02
# How long a worker that got nothing leaves the others to their work, in seconds.
IDLE_PAUSE = 0.002
LIMIT = 10


@dataclass(frozen=True)
class RaceTask:
    """The task of every worker of a race.

    Attributes:
        target: the function, as ``MODULE:NAME``.
        table: the table, likewise.
        call: the function that calls the target, likewise, if there is one.
        patches: the file of patches that are made first, if there is one.
        limit: how many jobs one call may hand out, if that was said.
        url: the database.
        most: more jobs of one call than these are not looked at.
        board: what all workers share.
        victims: the workers that keep the first jobs that they get, and wait to be killed.
    """

    target: str
    table: TableName
    call: str | None
    patches: str | None
    limit: int | None
    url: URL
    most: int
    board: Board
    victims: range

    @contextmanager
    def begun(self, worker: int) -> Iterator[Work]:
        """Import the target and connect, then yield the function that calls it."""
        os.environ["DATABASE_URL"] = self.url.render_as_string(hide_password=False)
        # In a process of `atomic-claim run` they may be there already.
        if self.patches is not None and self.patches != os.environ.get(FILE):
            load_patches(self.patches)
        engine = make_engine(self.url)
        table = load_table(self.table, engine)
        plan, target = self._plan()
        self.board.takes_limit.value = plan.takes_limit
        offer = Offer(
            engine=engine,
            limit=LIMIT if self.limit is None else self.limit,
            worker=f"race-{worker + 1}",
            table=table,
            target=target,
        )
        reader = Reader(table, self.most)

        def take() -> tuple[Key, ...]:
            with offer.opened() as give:
                return reader.keys(offer.awaited(plan.call(give)))

        meeting = Meeting(self.board, worker, tables_of(table), self.url)
        engine.connect().close()
        yield _Loop(worker, self, take, meeting).run
        offer.close()
        engine.dispose()

    def _plan(self) -> tuple[Plan, Any]:
        owner, target = owner_and_object(self.target, "target")
        if self.call is None:
            return planned(target, f"target={self.target}", owner), target
        owner, adapter = owner_and_object(self.call, "call")
        return planned(adapter, f"call={self.call}", owner, adapter=True), target


class Holding(NamedTuple):
    """A worker that is to be killed has jobs, and waits for its end."""

    keys: tuple[Key, ...]


class Done(NamedTuple):
    """A worker has nothing left to do.

    Attributes:
        conflicts: how many of its calls ended with a conflict.
        last_error: what the target raised when it handed out nothing, if it did.
        long: seconds that its longer statements took.
    """

    conflicts: int
    last_error: str | None
    long: float


@dataclass
class _Loop:
    worker: int
    task: RaceTask
    take: Callable[[], tuple[Key, ...]]
    meeting: Meeting
    conflicts: int = 0
    in_a_row: int = 0
    last_error: str | None = None

    def run(self, send: Send) -> Done:
        """Call the target until no worker gets jobs from it."""
        self.meeting.listen()
        board = self.task.board
        while True:
            begin = time.perf_counter()
            self.meeting.call_begins()
            keys = self._keys()
            end = time.perf_counter()
            self.meeting.call_ends()
            if keys is None:
                continue
            if keys and self.worker in self.task.victims:
                send(Holding(keys))
                threading.Event().wait()
            if keys:
                board.idle[self.worker] = 0
                send(Call(self.worker, begin, end, keys, self.meeting.waited))
                # On SQLite the first could otherwise have all before those get any.
                while board.open.value == TO_BE_KILLED:
                    time.sleep(IDLE_PAUSE)
                continue
            board.idle[self.worker] = 1
            if all(board.idle) and not board.open.value:
                return Done(self.conflicts, self.last_error, self.meeting.long)
            time.sleep(IDLE_PAUSE)

    def _keys(self) -> tuple[Key, ...] | None:
        """Return the keys that a call handed out, or None if the call must be repeated."""
        try:
            keys = self.take()
        except CONFLICTS as error:
            self.conflicts += 1
            self.in_a_row += 1
            if self.in_a_row == FAILURES:
                raise CommandError(
                    f"target={self.task.target} failed {FAILURES} times in a row: {one_line(error)}"
                ) from None
            longest = min(LONGEST_PAUSE, 0.0005 * 2**self.in_a_row)
            time.sleep(random.uniform(0, longest))  # noqa: S311 - no secret
            return None
        except CommandError as error:
            raise CommandError(f"target={self.task.target}: {error}") from None
        except (DBAPIError, ClaimError):
            raise
        # Whatever a function raises that is of its own, it hands out nothing.
        except Exception as error:  # noqa: BLE001
            self.last_error = without_secrets(where(error), self.task.url)
            keys = ()
        self.in_a_row = 0
        return keys
