"""Ctrl-C and other requests to end, so that a command cleans up before it follows them."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, NoReturn

ENDING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
ORDINARY = (signal.SIG_DFL, signal.default_int_handler)


@contextmanager
def as_exceptions() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` or ``SystemExit`` at the first request to end.

    Those that follow are ignored: cleaning up has begun, and takes seconds at the most.
    """
    # Under nohup a hangup is ignored, and stays so.
    before = {number: was for number, was in _handlers().items() if was in ORDINARY}

    def end(number: int, _: FrameType | None) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    with _handled(before, end):
        yield


@contextmanager
def deferred() -> Iterator[None]:
    """Defer requests to end until the block is done."""
    came: list[int] = []
    before = {number: was for number, was in _handlers().items() if was is not signal.SIG_IGN}
    try:
        with _handled(before, lambda number, _: came.append(number)):
            yield
    finally:
        for number in came[:1]:
            signal.raise_signal(number)


@contextmanager
def not_inherited() -> Iterator[None]:
    """Make processes that are started meanwhile ignore Ctrl-C."""
    with deferred():
        if not hasattr(signal, "pthread_sigmask"):
            yield
            return
        # multiprocessing starts its tracker with the first process, and unblocks Ctrl-C after that.
        resource_tracker.ensure_running()
        # The mask outlives the exec of a new interpreter, which a handler does not.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _handlers() -> dict[int, Any]:
    """Return the handlers of requests to end; only the main thread may set others."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in ENDING}


@contextmanager
def _handled(
    before: dict[int, Any], handler: Callable[[int, FrameType | None], Any]
) -> Iterator[None]:
    """Send these signals to the handler."""
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)
