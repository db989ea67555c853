"""A worker process of a race: calls the target until no job is left, and reports the results."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any, NamedTuple

from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError, IntegrityError, InternalError, OperationalError
from sqlalchemy.orm.exc import StaleDataError

from atomic_claim.errors import ClaimConflict, ClaimError
from atomic_claim.patch.file import load_patches
from atomic_claim.patch.start import FILE

from .arguments import Offer, Plan, planned
from .database import CommandError, make_engine, one_line
from .names import load_table, owner_and_object, where
from .result_keys import Reader
from .results import Key
from .rows import tables_of
from .start_barrier import TO_BE_KILLED, Board, Meeting
from .waits import FileLocks, Span

CONFLICTS = (OperationalError, IntegrityError, InternalError, StaleDataError, ClaimConflict)
# A target that does nothing but fail gives up after so many times in so many seconds.
FAILURES = 20
FAILING = 1.0
LONGEST_PAUSE = 0.02
# How long a worker that got nothing leaves the others to their work, in seconds.
IDLE_PAUSE = 0.002
LIMIT = 10


@dataclass(frozen=True)
class Duty:
    """The task of every worker, sent to it by the parent.

    Attributes:
        target: the function, as ``MODULE:NAME``.
        table: the table, likewise.
        call: the function that calls the target, likewise, if there is one.
        patches: the file of patches that are made first, if there is one.
        limit: how many jobs one call may hand out, if that was said.
        url: the database.
        seconds: no worker lives longer, whatever happens.
        most: more jobs of one call than these are not looked at.
        environment: the variables of the process that began the race.
        path: where its modules are found.
    """

    target: str
    table: str
    call: str | None
    patches: str | None
    limit: int | None
    url: URL
    seconds: float
    most: int
    environment: Mapping[str, str]
    path: tuple[str, ...]


class Ready(NamedTuple):
    """A worker has connected, and waits for the start."""

    takes_limit: bool


class Handed(NamedTuple):
    """A call handed out jobs; the times are of ``perf_counter``."""

    begin: float
    end: float
    keys: tuple[Key, ...]
    waited: float


class Holding(NamedTuple):
    """A worker that is to be killed has jobs, and waits for its end."""

    keys: tuple[Key, ...]


class Done(NamedTuple):
    """A worker has nothing left to do."""

    conflicts: int
    last_error: str | None
    wanted: list[Span]
    held: list[Span]


class Failure(NamedTuple):
    """A worker cannot go on."""

    text: str


def work(worker: int, duty: Duty, pipe: Pipe, life: Pipe, board: Board, *, victim: bool) -> None:
    """Run a worker process from start to exit.

    Args:
        worker: which one it is, from 0.
        duty: what to do.
        pipe: where it reports, and hears of the start.
        life: its other end is closed when the parent has ended, however that was.
        board: what all workers share.
        victim: whether it keeps the first jobs that it gets, and waits to be killed.
    """
    _die_with_parent(life, duty.seconds)
    with suppress(EOFError, BrokenPipeError):
        try:
            _begin(worker, duty, pipe, board, victim=victim)
        except CommandError as error:
            pipe.send(Failure(str(error)))
        except (DBAPIError, ClaimError) as error:
            pipe.send(Failure(one_line(error)))


def _die_with_parent(life: Pipe, seconds: float) -> None:
    # Ctrl-C at a terminal goes to all its processes; the parent sees to this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "setitimer"):
        # Linux' PR_SET_PDEATHSIG would tell of the fork server, which lives as long as its forks.
        # This ends a worker too that lets no thread run, and can hear of no end.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def watch() -> None:
        with suppress(EOFError, OSError):
            life.recv()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _begin(worker: int, duty: Duty, pipe: Pipe, board: Board, *, victim: bool) -> None:
    os.environ.clear()
    os.environ.update(duty.environment)
    os.environ["DATABASE_URL"] = duty.url.render_as_string(hide_password=False)
    sys.path[:] = duty.path
    # In a process of `atomic-claim run` they may be there already.
    if duty.patches is not None and duty.patches != os.environ.get(FILE):
        try:
            load_patches(duty.patches)
        except ClaimError as error:
            raise CommandError(one_line(error)) from None
    engine = make_engine(duty.url)
    table = load_table(duty.table, engine)
    plan, target = _plan(duty)
    offer = Offer(
        engine=engine,
        limit=LIMIT if duty.limit is None else duty.limit,
        worker=f"race-{worker + 1}",
        table=table,
        target=target,
    )
    reader = Reader(table, duty.most)

    def take() -> tuple[Key, ...]:
        with offer.opened() as give:
            return reader.keys(offer.awaited(plan.call(give)))

    names = [each.name for each in tables_of(table)]
    meeting = Meeting(board, worker, names, duty.url)
    locks = FileLocks()
    engine.connect().close()
    pipe.send(Ready(plan.takes_limit))
    pipe.recv()
    meeting.listen()
    if engine.dialect.name == "sqlite":
        locks.listen()
    pipe.send(_Loop(worker, duty.target, take, pipe, board, meeting, locks, victim).run())
    offer.close()
    engine.dispose()


def _plan(duty: Duty) -> tuple[Plan, Any]:
    owner, target = owner_and_object(duty.target, "target")
    if duty.call is None:
        return planned(target, f"target={duty.target}", owner), target
    owner, adapter = owner_and_object(duty.call, "call")
    return planned(adapter, f"call={duty.call}", owner, adapter=True), target


@dataclass
class _Loop:
    worker: int
    target: str
    take: Callable[[], tuple[Key, ...]]
    pipe: Pipe
    board: Board
    meeting: Meeting
    locks: FileLocks
    victim: bool
    conflicts: int = 0
    in_a_row: int = 0
    failing_since: float = 0.0
    last_error: str | None = None

    def run(self) -> Done:
        """Call the target until nobody gets anything any more."""
        while True:
            begin = time.perf_counter()
            self.meeting.call_begins()
            keys = self._keys()
            end = time.perf_counter()
            self.meeting.call_ends()
            self.locks.finish()
            if keys is None:
                continue
            if keys and self.victim:
                self.pipe.send(Holding(keys))
                self.pipe.recv()
            if keys:
                self.board.idle[self.worker] = 0
                self.pipe.send(Handed(begin, end, keys, self.meeting.waited))
                # On SQLite the first could otherwise have all before those get any.
                while self.board.open.value == TO_BE_KILLED:
                    time.sleep(IDLE_PAUSE)
                continue
            self.board.idle[self.worker] = 1
            if self.board.all_idle() and not self.board.open.value:
                return Done(self.conflicts, self.last_error, self.locks.wanted, self.locks.held)
            time.sleep(IDLE_PAUSE)

    def _keys(self) -> tuple[Key, ...] | None:
        """Return the keys that a call handed out, or None if the call must be repeated."""
        try:
            keys = self.take()
        except CONFLICTS as error:
            self._failed(error)
            return None
        except CommandError as error:
            raise CommandError(f"target={self.target}: {error}") from None
        except (DBAPIError, ClaimError):
            raise
        # Whatever a function raises that is of its own, it hands out nothing.
        except Exception as error:  # noqa: BLE001
            self.last_error = where(error)
            keys = ()
        self.in_a_row = 0
        return keys

    def _failed(self, error: Exception) -> None:
        """Pause before a retry after a deadlock or other conflict, and raise if it persists."""
        self.conflicts += 1
        self.in_a_row += 1
        now = time.perf_counter()
        if self.in_a_row == 1:
            self.failing_since = now
        elif self.in_a_row >= FAILURES and now - self.failing_since > FAILING:
            raise CommandError(
                f"target={self.target} failed {self.in_a_row} times in a row: {one_line(error)}"
            )
        longest = min(LONGEST_PAUSE, 0.0005 * 2**self.in_a_row)
        time.sleep(random.uniform(0, longest))  # noqa: S311 - no secret
