"""A call that runs beside the test and stops before one of its statements, until it is let go."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import sqlalchemy as sa

from tests.jobs import in_thread

T = TypeVar("T")
PATIENCE = 60
COMMIT = "COMMIT"


def commit_after(statement: str) -> Callable[[str], bool]:
    """Build the condition of the commit that follows a statement which contains this text."""
    seen = list[bool]()

    def is_it(said: str) -> bool:
        if statement in said:
            seen.append(True)
        return bool(seen) and said == COMMIT

    return is_it


class Stepped(Generic[T]):
    """A call that has stopped.

    Attributes:
        future: what it returns once it has been let go.
    """

    def __init__(self, wanted: Callable[[str], bool]) -> None:
        self.future: Future[T] = Future()
        self._wanted = wanted
        self._reached = threading.Event()
        self._released = threading.Event()

    def go(self) -> T:
        """Let it go on, and return what it returns."""
        self._released.set()
        return self.future.result(PATIENCE)

    def let_go(self) -> None:
        """Let it go on, and do not wait: it may have to wait for a lock."""
        self._released.set()

    def pause(self, statement: str) -> None:
        """Stop if this is the statement."""
        if self._wanted(statement) and not self._reached.is_set():
            self._reached.set()
            assert self._released.wait(PATIENCE), "nobody let the call go on"

    def wait(self) -> None:
        """Wait until it has stopped."""
        while not self._reached.wait(0.01):
            if self.future.done():
                raise AssertionError(f"the call did not stop: {self.future}")


@contextmanager
def stopped(
    engine: sa.Engine, call: Callable[[], T], before: str | Callable[[str], bool]
) -> Iterator[Stepped[T]]:
    """Run a call in a thread until it is about to execute a statement of this engine's.

    `before` is what the statement contains, or a condition; `COMMIT` stands for the commit.
    """
    wanted = before if callable(before) else lambda statement: before in statement
    step = Stepped[T](wanted)

    def execute(_: Any, __: Any, statement: str, *___: Any) -> None:
        if threading.current_thread() is not main:
            step.pause(statement)

    def commit(_: Any) -> None:
        if threading.current_thread() is not main:
            step.pause(COMMIT)

    main = threading.current_thread()
    sa.event.listen(engine, "before_cursor_execute", execute)
    sa.event.listen(engine, "commit", commit)
    try:
        with in_thread(call) as future:
            step.future = future
            try:
                step.wait()
                yield step
            finally:
                step.let_go()
    finally:
        sa.event.remove(engine, "before_cursor_execute", execute)
        sa.event.remove(engine, "commit", commit)
