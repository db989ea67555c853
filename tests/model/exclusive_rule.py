"""Search all states of the rule for exclusive keys for two rows of one key that run at once.

The rule: whatever makes or keeps a row running (a claim, the extension of a lease) locks the key
first, looks for running rows of the key in a later statement that reads committed data and its own
writes, and keeps the lock until the commit. The end of a job takes no lock on the key.

The model has two rows of one key that may run one of them, and workers that begin these operations
as often as they like and interleave their steps in every order:

=======  ============================================  =======================================
         the look succeeds if                          the mark, under a row lock, succeeds if
=======  ============================================  =======================================
claim    the row is claimable, and no row runs         the row is claimable
extend   the worker owns the row, and its lease lasts  the worker owns the row, by its token
end      (no look)                                     the worker owns the row, by its token
release  (no look)                                     the worker owns the row, by its token
=======  ============================================  =======================================

A row is claimable if it is free, or running with a lease that is over; a row with such a lease does
not count as running. A claim is for one of the two rows, as by `where`. It may follow an end or a
release in the same transaction. Before its commit a worker may roll back at any step, which
releases its locks: it crashed, or a step did not succeed. A lease, committed or not, may run out
between any two steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, get_args

Operation = Literal["claim", "extend", "end", "release"]


@dataclass(frozen=True)
class Rule:
    """The rule as built, or without some of its parts.

    Attributes:
        lock_until_commit: the key is unlocked after the commit, not before.
        lock_before_look: the look is a later statement than the lock, and reads no snapshot from
            before it.
        reads_committed: the look does not see what other workers have not committed.
        extension_locks: an extension locks the key.
    """

    lock_until_commit: bool = True
    lock_before_look: bool = True
    reads_committed: bool = True
    extension_locks: bool = True

    def steps(self, operation: Operation) -> tuple[str, ...]:
        """Return the steps of an operation."""
        if operation in {"end", "release"}:
            return ("mark", "commit")
        if operation == "extend" and not self.extension_locks:
            return ("look", "mark", "commit")
        first = ("lock", "look") if self.lock_before_look else ("look", "lock")
        last = ("commit", "unlock") if self.lock_until_commit else ("unlock", "commit")
        return (*first, "mark", *last)


class Row(NamedTuple):
    """A version of a row.

    Attributes:
        lasts: whether the row is running with a lease that is not over.
        owner: the worker whose token a running row has. An uncommitted version has the worker
            that wrote it, which holds the row lock.
    """

    state: Literal["free", "running", "ended"] = "free"
    lasts: bool = False
    owner: int | None = None

    def allows(self, operation: Operation, worker: int) -> bool:
        """Return True if a worker may mark the row in an operation."""
        if operation == "claim":
            return self.state == "free" or (self.state == "running" and not self.lasts)
        return self.state == "running" and self.owner == worker


RUNNING: Final = Row("running", lasts=True)
MARKS: Final = {"claim": RUNNING, "extend": RUNNING, "end": Row("ended"), "release": Row("free")}


class Worker(NamedTuple):
    """The operation that a worker is in, its row, and the steps that are left of it."""

    operation: Operation = "claim"
    place: int = 0
    left: tuple[str, ...] = ()


class State(NamedTuple):
    """The committed rows, their uncommitted versions, the holder of the key, and the workers."""

    rows: tuple[Row, ...]
    written: tuple[Row | None, ...]
    holder: int | None
    workers: tuple[Worker, ...]

    def seen(self, me: int, *, dirty: bool) -> tuple[Row, ...]:
        """Return the rows as a worker reads them: committed, with its own writes."""
        return tuple(
            version if version and (dirty or version.owner == me) else row
            for row, version in zip(self.rows, self.written, strict=True)
        )

    def finished(self, me: int) -> State:
        """Return the state without the uncommitted versions of a worker."""
        others = tuple(row if row and row.owner != me else None for row in self.written)
        return self._replace(written=others)


def search(rule: Rule, workers: int) -> list[str] | None:
    """Return the shortest steps to a state that is not safe, or None if all states are safe."""
    origins = explore(rule, workers)
    state = next(reversed(origins))
    if not is_unsafe(state):
        return None
    steps: list[str] = []
    while origin := origins[state]:
        state, step = origin
        steps.insert(0, step)
    return steps


def explore(rule: Rule, workers: int) -> dict[State, tuple[State, str] | None]:
    """Return the reachable states, each with the state and the step that first led to it.

    The search is breadth first. It stops at the first state that is not safe.
    """
    origins: dict[State, tuple[State, str] | None] = {start(workers): None}
    waiting = deque(origins)
    while waiting:
        state = waiting.popleft()
        for step, after in successors(rule, state):
            if after not in origins:
                origins[after] = (state, step)
                waiting.append(after)
                if is_unsafe(after):
                    return origins
    return origins


def start(workers: int) -> State:
    """Return the first state: two free rows, and workers that do nothing."""
    return State((Row(), Row()), (None, None), None, (Worker(),) * workers)


def is_unsafe(state: State) -> bool:
    """Return True if both rows really run.

    A row really runs while its committed lease lasts, from the commit of a claim, which tells the
    worker that it owns the row, to the commit of the end. The search waits until nothing is
    uncommitted, so that its steps include the rollback of an end. This hides no violation: a
    worker that has not committed can roll back in the next step.
    """
    return all(row.lasts for row in state.rows) and not any(state.written)


def successors(rule: Rule, state: State) -> Iterator[tuple[str, State]]:
    """Yield each possible step and the state after it."""
    for me in range(len(state.workers)):
        for worker in choices(rule, state, me):
            if after := advance(rule, state, me, worker):
                does = f"{worker.operation} row {worker.place + 1}: {worker.left[0]}"
                yield f"worker {me + 1}, {does}", after
    for place, (row, version) in enumerate(zip(state.rows, state.written, strict=True)):
        if row.lasts:
            rows = put(state.rows, place, row._replace(lasts=False))
            yield f"the lease of row {place + 1} runs out", state._replace(rows=rows)
        if version and version.lasts:
            written = put(state.written, place, version._replace(lasts=False))
            yield f"the new lease of row {place + 1} runs out", state._replace(written=written)


def choices(rule: Rule, state: State, me: int) -> list[Worker]:
    """Return what a worker may do next: go on, roll back, or begin one of its operations."""
    worker = state.workers[me]
    found = [worker] if worker.left else []
    if worker.left not in {(), ("unlock",)}:
        found.append(worker._replace(left=("roll back",)))
    if not worker.left or worker.operation in {"end", "release"}:
        found += [
            Worker(operation, place, rule.steps(operation))
            for place, row in enumerate(state.rows)
            for operation in get_args(Operation)
            if operation == "claim" or (row.owner == me and not worker.left)
        ]
    return found


def advance(rule: Rule, state: State, me: int, worker: Worker) -> State | None:
    """Return the state after a worker's next step, or None if it has to wait or is refused."""
    operation, place, (step, *left) = worker
    after = worker._replace(left=tuple(left)) if left else Worker()
    state = state._replace(workers=put(state.workers, me, after))
    rows = state.seen(me, dirty=step == "look" and not rule.reads_committed)
    is_allowed = rows[place].allows(operation, me)
    if step == "lock":
        return state._replace(holder=me) if state.holder is None else None
    if step == "look":
        fits = rows[place].lasts if operation == "extend" else not any(row.lasts for row in rows)
        return state if is_allowed and fits else None
    if step == "mark":
        version = state.written[place]
        is_locked = version is not None and version.owner != me
        written = put(state.written, place, MARKS[operation]._replace(owner=me))
        return state._replace(written=written) if is_allowed and not is_locked else None
    if step == "commit":
        rows = tuple(row if row.state == "running" else Row(row.state) for row in rows)
        return state.finished(me)._replace(rows=rows)
    if step == "roll back":
        state = state.finished(me)
    return state._replace(holder=None) if state.holder == me else state


def put(values: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    """Return the values with another one in a place."""
    return (*values[:place], value, *values[place + 1 :])
