"""The record of a race, kept while its workers run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Connection

from .results import Call, Key
from .start_barrier import KILLED, STARTING, TO_BE_KILLED
from .waits import Waits
from .workers import Done, Holding, RaceTask

# Every job handed out so often, and then some, is a target that never comes to an end.
REPETITIONS = 10
SLACK = 1000
# A call that takes so much of the time allowed is worth a word.
STANDING = 0.1


@dataclass
class Record:
    """The messages of the workers, as they arrive.

    Attributes:
        task: what the workers do.
        keys: the jobs.
        patience: how long the others go on asking for those jobs, in seconds.
        watch: a connection of its own to the database, in autocommit.
        progress: told how many jobs were handed out.
        calls: the calls that handed out jobs; their times are of ``perf_counter``.
        held: the jobs of workers that were killed.
        killed: how many those were.
        endless: whether the same jobs are handed out again and again.
    """

    task: RaceTask
    keys: frozenset[Key]
    patience: float
    watch: Connection
    progress: Callable[[int], None]
    calls: list[Call] = field(default_factory=list)
    held: set[Key] = field(default_factory=set)
    killed: int = 0
    endless: bool = False
    _claimed: int = 0
    _handed: set[Key] = field(default_factory=set)
    _last_kill: float = 0.0
    _waits: Waits | None = None

    def receive(self, worker: int, message: Call | Holding) -> bool:
        """Record a worker's jobs; return whether it is to be killed."""
        if isinstance(message, Call):
            self.calls.append(message)
            self._claimed += len(message.keys)
            self._handed.update(message.keys)
            return False
        self.task.board.idle[worker] = 1
        self.killed += 1
        self.held.update(message.keys)
        self._last_kill = time.perf_counter()
        return True

    def tick(self) -> bool:
        """Look at the database's waits and the victims; return whether the race is endless."""
        # Waits are counted from the meeting on: before, the workers wait for each other.
        if self._waits is not None:
            self._waits.look()
        elif self.task.board.met.value and self.watch.dialect.name != "sqlite":
            self._waits = Waits(self.watch)
        self._close_if_over()
        self.progress(len(self._handed))
        workers = len(self.task.board.idle)
        self.endless = self._claimed > REPETITIONS * len(self.keys) * workers + SLACK
        return self.endless

    def _close_if_over(self) -> None:
        """End the workers after the victims' jobs were handed out again, or after the patience."""
        opened = self.task.board.open
        if opened.value == TO_BE_KILLED and all(
            self.task.board.idle[each] for each in self.task.victims
        ):
            opened.value = KILLED
        if opened.value != KILLED or not all(self.task.board.idle):
            return
        waits_for = self._last_kill + self.patience
        if self.held <= self._handed or time.perf_counter() > waits_for:
            opened.value = 0

    def blocked(self, last: Sequence[Done]) -> float | None:
        """Return the seconds of waits for locks, if the server or the workers can tell."""
        if self.watch.dialect.name == "sqlite":
            return sum(done.long for done in last) if last else None
        return 0.0 if self._waits is None else self._waits.total()

    def standing(self, timeout: float) -> str:
        """Describe how far the race has come, and the calls that take long."""
        if STARTING in self.task.board.doing:
            return "not all workers had begun"
        said = f"{len(self._handed):,} of {len(self.keys):,} jobs were handed out"
        now = time.perf_counter()
        since = [begin for begin in self.task.board.calling if begin]
        longest = now - min(since, default=now)
        if longest < STANDING * timeout:
            return said
        return (
            f"{said}, and {len(since)} of {len(self.task.board.calling)} workers are in a call of "
            f"{self.task.target}, for up to {longest:.1f} seconds"
        )
