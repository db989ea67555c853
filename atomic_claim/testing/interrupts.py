"""Ctrl-C and other requests to end, so that a command cleans up before it follows them."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import NoReturn

ENDING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
ORDINARY = (signal.SIG_DFL, signal.default_int_handler)


@contextmanager
def as_exceptions() -> Iterator[None]:
    """Have the first request to end raise ``KeyboardInterrupt`` or ``SystemExit``.

    Those that follow are ignored: cleaning up has begun, and takes seconds at the most.
    """
    if not _in_main_thread():
        yield
        return
    # Under nohup a hangup is ignored, and stays so.
    before = {n: was for n in ENDING if (was := signal.getsignal(n)) in ORDINARY}

    def end(number: int, _: FrameType | None) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Have requests to end wait until the block is done."""
    if not _in_main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


@contextmanager
def not_inherited() -> Iterator[None]:
    """Have the processes that are started meanwhile leave Ctrl-C to this one."""
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


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
