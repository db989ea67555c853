"""The results of workers, counted from their records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

Key = tuple[str, ...]
"""A job's primary key, as text, so that 7 and "7" are the same job."""

COUNTS = ("jobs", "claimed", "duplicates", "lost", "over_limit", "stuck")


class Call(NamedTuple):
    """A call of the target that handed out jobs, or the run of a job, as the worker recorded it.

    Attributes:
        worker: which process called, from 0.
        begin: when, in seconds from the start of all workers.
        end: when the jobs were the worker's: its transaction committed, if it was its own.
        keys: the jobs, as they were handed out.
        waited: how much of the time the worker waited for the others' first write, in seconds.
    """

    worker: int
    begin: float
    end: float
    keys: tuple[Key, ...]
    waited: float = 0.0

    @property
    def seconds(self) -> float:
        """The duration of the call in seconds."""
        return self.end - self.begin - self.waited

    def since(self, start: float) -> Call:
        """Return the call with its times counted from the start."""
        return self._replace(begin=self.begin - start, end=self.end - start)


@dataclass(frozen=True, kw_only=True, repr=False)
class Counted:
    """Counts of what several workers did with the same jobs, from the record of their calls.

    Attributes:
        name: what the workers called.
        workers: how many processes there were.
        keys: the jobs' primary keys, as text.
        limit: how many jobs one call may hand out, or None without a limit.
        calls: every call that handed out jobs, by worker and time.
        met: when they had met before their first write, in seconds from their start.
        held: the jobs that killed workers had.
    """

    name: str
    workers: int
    keys: frozenset[Key]
    limit: int | None
    calls: Sequence[Call]
    met: float = 0.0
    held: frozenset[Key] = frozenset()

    @property
    def workload(self) -> str:
        """The numbers of jobs and workers, and the limit, in words."""
        limit = f", limit {self.limit:,}" if self.limit else ""
        return f"{_count(self.jobs, 'job')}, {_count(self.workers, 'worker')}{limit}"

    @cached_property
    def times(self) -> Counter[Key]:
        """The number of times each job was handed out."""
        handed_out = (key for call in self.calls for key in call.keys)
        return Counter(key for key in handed_out if key in self.keys)

    @property
    def jobs(self) -> int:
        """The number of jobs."""
        return len(self.keys)

    @property
    def claimed(self) -> int:
        """The number of times that a job was handed out, with repetitions."""
        return self.times.total()

    @cached_property
    def duplicated(self) -> frozenset[Key]:
        """The jobs that were handed out more than once."""
        return frozenset(key for key, times in self.times.items() if times > 1)

    @property
    def duplicates(self) -> int:
        """The number of jobs that were handed out more than once."""
        return len(self.duplicated)

    @property
    def lost(self) -> int:
        """The number of jobs never handed out, without those of killed workers."""
        return len(self.keys - self.times.keys() - self.held)

    @property
    def stuck(self) -> int:
        """The number of jobs of killed workers that were not handed out again."""
        return len(self.held - self.times.keys())

    @property
    def over_limit(self) -> int:
        """The number of jobs that calls handed out beyond their limit."""
        if self.limit is None:
            return 0
        return sum(max(0, len(call.keys) - self.limit) for call in self.calls)

    @property
    def exact(self) -> bool:
        """Check that each job was handed out once, no call gave too many and no job is stuck."""
        return not (self.duplicates or self.lost or self.over_limit or self.stuck)

    @property
    def seconds(self) -> float:
        """The seconds from the common start of all workers to the last job."""
        return max(0.0, max((call.end for call in self.calls), default=0.0) - self.met)

    @property
    def claims_per_second(self) -> float:
        """The number of jobs that were handed out in a second, with repetitions."""
        return self.claimed / self.seconds if self.seconds else 0.0


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


@dataclass(frozen=True, kw_only=True, repr=False)
class Race(Counted):
    """The result of a race.

    Attributes:
        target: the function, as ``"module:function"``; ``name`` adds whether it was patched.
        database: product and version.
        url: the database's address without its password, or None for a temporary file.
        killed: how many workers were killed.
        blocked: seconds that workers waited for locks, all added up, or None if the database does
            not tell; on SQLite, those of statements that took a millisecond or more.
        conflicts: how often a call ended with a conflict of the database's, such as a deadlock,
            and was made again.
        endless: whether the race was ended since it handed out the same jobs again and again.
        patched: whether the target was patched from a file.
        last_error: what the target raised when it handed out nothing, if it did.
    """

    target: str
    database: str
    url: str | None
    killed: int = 0
    blocked: float | None = None
    conflicts: int = 0
    endless: bool = False
    patched: bool = False
    last_error: str | None = None

    def __repr__(self) -> str:
        figures = ", ".join(f"{name}={value}" for name, value in self.counts.items())
        return f"<Race of {self.name!r} on {self.database}: {figures}>"

    @property
    def counts(self) -> dict[str, int]:
        """The number of jobs, how often they were claimed, and the figures that should be 0."""
        return {name: getattr(self, name) for name in COUNTS}

    @property
    def p50(self) -> float:
        """The median time of the calls that handed out jobs, in seconds."""
        return self._quantile(50)

    @property
    def p99(self) -> float:
        """The 99th percentile of the times of the calls that handed out jobs, in seconds."""
        return self._quantile(99)

    def _quantile(self, percent: int) -> float:
        taken = sorted(call.seconds for call in self.calls)
        return taken[-(-len(taken) * percent // 100) - 1] if taken else 0.0
