"""The library's system calls one by one: counted, refused, cut short by a kill, interleaved."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from atomic_claim.files import system

# All that the library calls; `renameat2` is its own, made by ctypes.
NAMES = (
    "close",
    "fstat",
    "fsync",
    "link",
    "listdir",
    "lstat",
    "mkdir",
    "open",
    "rename",
    "replace",
    "rmdir",
    "scandir",
    "unlink",
    "utime",
    "write",
)
CHANGING = {*NAMES, "renameat2"} - {"close", "fstat", "fsync", "listdir", "lstat", "scandir"}

Before = Callable[[str, tuple[Any, ...]], None]


class Killed(BaseException):
    """A process ends here: nothing that it would still do has any effect."""


@contextmanager
def before_each(before: Before) -> Iterator[None]:
    """Have a function called ahead of each system call; what it raises is the call's answer."""
    watching = threading.local()

    def call(name: str, real: Callable[..., Any], *args: Any, **options: Any) -> Any:
        # What the function itself calls goes through.
        if not getattr(watching, "inside", False):
            watching.inside = True
            try:
                before(name, args)
            finally:
                watching.inside = False
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            patch.setattr(os, name, partial(call, name, getattr(os, name)))
        patch.setattr(system, "renameat2", partial(call, "renameat2", system.renameat2))
        yield


@contextmanager
def recorded() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """Record the system calls made in the block, with their arguments."""
    calls: list[tuple[str, tuple[Any, ...]]] = []
    with before_each(lambda name, args: calls.append((name, args))):
        yield calls


def no_renameat2(*_: Any) -> None:
    """Raise EINVAL, as NFS and every system but Linux do for ``RENAME_NOREPLACE``."""
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


@contextmanager
def without_renameat2(*, absent: bool = True) -> Iterator[None]:
    """Simulate a file system that cannot rename without overwriting, if `absent`."""
    with pytest.MonkeyPatch.context() as patch:
        if absent:
            patch.setattr(system, "renameat2", no_renameat2)
        yield


def killed_before(place: int, work: Callable[[], Any]) -> bool:
    """Do the work as if killed before its changing call at this place, counted from 0.

    The calls that only look are passed over: what a kill before them leaves is what one before
    the next changing call does.

    Returns:
        Whether it was killed; False if the work has no more changing calls than that.
    """
    count = 0

    def before(name: str, _: tuple[Any, ...]) -> None:
        nonlocal count
        count += name in CHANGING
        # After it, nothing that `finally` and `with` still do has any effect.
        if count > place:
            raise Killed

    try:
        with before_each(before):
            work()
    except Killed:
        return True
    return False


def every_kill(work: Callable[[], Any]) -> Iterator[int]:
    """Kill the work before its first changing call, its second, and so on, until it is done.

    Before each the caller sets the stage, after each it looks at what is left.
    """
    place = 0
    while True:
        done = not killed_before(place, work)
        yield place
        if done:
            return
        place += 1


class Actor:
    """A thread whose work advances by a given number of system calls at a time.

    Args:
        work: what is done, in a thread of its own.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended = False
        self._work = work
        self._go = threading.Semaphore(0)
        self._stands = threading.Semaphore(0)
        self._left: int | None = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._await()

    def _run(self) -> None:
        actors.here = self
        try:
            self.step()
            self.result = self._work()
        except Exception as error:  # noqa: BLE001 - raised by `finish`, in the test's own thread
            self.error = error
        self.ended = True
        self._stands.release()

    def step(self) -> None:
        """Stand before a call until there is leave for it."""
        if self._left is None:
            return
        if self._left == 0:
            self._stands.release()
            self._go.acquire()
        if self._left is not None:
            self._left -= 1

    def _await(self) -> None:
        assert self._stands.acquire(timeout=60), "it does not come to its next call"

    def go(self, calls: int | None) -> None:
        """Let it make some calls, or all it has, and wait until it stands before the next."""
        if self.ended or calls == 0:
            return
        # The first leave is for the start, which is no call.
        self._left = calls
        self._go.release()
        self._await()

    def finish(self) -> Any:
        """Let it come to its end; its result, or what it raised."""
        self.go(None)
        self._thread.join(60)
        if self.error is not None:
            raise self.error
        return self.result


actors = threading.local()


def _step(_: str, __: tuple[Any, ...]) -> None:
    if (actor := getattr(actors, "here", None)) is not None:
        actor.step()


@contextmanager
def stepwise() -> Iterator[None]:
    """Have all actors stand before each of their system calls."""
    with before_each(_step):
        yield
