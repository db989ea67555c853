"""Worker processes that do the same task side by side: started at once, watched, and always ended.

A worker connects and reports that it is ready, waits for the start of all, sends messages, and
ends with a last value. It does not outlive the process that started it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from atomic_claim.errors import ClaimError

from .database import CommandError, one_line, without_secrets
from .interrupts import deferred, not_inherited

LOOK_EVERY = 0.01
# Workers begin, and then work, for as long as the limit each; they are given some seconds more.
GRACE = 30.0

Send = Callable[[Any], None]
Work = Callable[[Send], Any]
Task = Callable[[int], AbstractContextManager[Work]]
"""The work of every worker, picklable: it prepares the worker with this number, from 0.

It yields the function that works. That gets another one, which sends a message to the parent, and
returns the last.
"""


class Overdue(CommandError):
    """The workers were not done in time."""


class _Last(NamedTuple):
    value: Any


class _Worker(NamedTuple):
    number: int
    process: BaseProcess


Workers = dict[Pipe, _Worker]


def run_workers(
    task: Task,
    count: int,
    *,
    seconds: float,
    receive: Callable[[int, Any], bool],
    tick: Callable[[], bool],
    url: URL | None = None,
) -> tuple[float, list[Any]]:
    """Run a task in several processes that start at once.

    Args:
        task: what each of them does.
        count: how many there are.
        seconds: how long they may prepare, and then work.
        receive: called with a worker's number and a message of its; the worker is killed if it
            returns True.
        tick: called every few milliseconds; True ends the work of all.
        url: a URL; its secrets are removed from all messages.

    Returns:
        When they were started, in seconds of ``perf_counter``, and the last value of each worker
        that came to its end.

    Raises:
        CommandError: a worker failed, or ended before its time.
        Overdue: they were not done in time.
    """
    context = _context(task)
    workers: Workers = {}
    try:
        with not_inherited():
            for number in range(count):
                pipe, theirs = context.Pipe()
                rest = {"seconds": 2 * seconds + GRACE, "url": url, "environment": dict(os.environ)}
                process = context.Process(
                    target=_work, args=(number, task, theirs), kwargs=rest, daemon=True
                )
                process.start()
                theirs.close()
                workers[pipe] = _Worker(number, process)
        return _run(workers, seconds, receive, tick)
    finally:
        with deferred():
            for worker in workers.values():
                worker.process.kill()
            for pipe, worker in workers.items():
                worker.process.join()
                pipe.close()


def _context(task: Task) -> Any:
    """Return how processes are started: quickest is a process that makes copies of itself."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([task.__module__])
    return context


def _run(
    workers: Workers,
    seconds: float,
    receive: Callable[[int, Any], bool],
    tick: Callable[[], bool],
) -> tuple[float, list[Any]]:
    start, last = time.perf_counter(), []
    waiting, running = set(workers), set(workers)
    while running and not tick():
        if time.perf_counter() > start + seconds:
            end = "all ready" if waiting else "done"
            raise Overdue(f"the workers were not {end} after {seconds:g} seconds")
        for pipe, message in _heard(workers, running):
            if pipe in waiting:
                waiting.remove(pipe)
                if not waiting:
                    start = time.perf_counter()
                    for each in workers:
                        each.send(None)
            elif isinstance(message, _Last):
                last.append(message.value)
                running.remove(pipe)
            elif receive(workers[pipe].number, message):
                workers[pipe].process.kill()
                workers[pipe].process.join()
                running.remove(pipe)
    return start, last


def _heard(workers: Workers, pipes: set[Pipe]) -> Iterator[tuple[Pipe, Any]]:
    for pipe in wait(list(pipes), LOOK_EVERY):
        assert isinstance(pipe, Pipe)
        worker = workers[pipe]
        try:
            message = pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join(1)
            raise CommandError(
                f"worker {worker.number + 1} ended before its time, with exit code "
                f"{worker.process.exitcode}"
            ) from None
        if isinstance(message, CommandError):
            raise CommandError(f"worker {worker.number + 1}: {message}")
        yield pipe, message


def _work(
    number: int,
    task: Task,
    pipe: Pipe,
    *,
    seconds: float,
    url: URL | None,
    environment: Mapping[str, str],
) -> None:
    """Run a worker process from start to exit."""
    # Ctrl-C at a terminal goes to all its processes; the parent sees to this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "setitimer"):
        # Linux' PR_SET_PDEATHSIG would tell of the fork server, which lives as long as its forks.
        # This ends a worker too that lets no thread run, and can hear of no end.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    started = threading.Event()
    threading.Thread(target=_listen, args=(pipe, started), daemon=True).start()
    # A copy of the fork server has the variables with which that was started.
    os.environ.clear()
    os.environ.update(environment)
    with suppress(BrokenPipeError):
        try:
            with task(number) as work:
                pipe.send(None)
                started.wait()
                pipe.send(_Last(work(pipe.send)))
        except (CommandError, SQLAlchemyError, ClaimError) as error:
            said = one_line(error)
            pipe.send(CommandError(said if url is None else without_secrets(said, url)))


def _listen(pipe: Pipe, started: threading.Event) -> None:
    """Hear of the start from the parent, and end this process when the parent has ended."""
    with suppress(EOFError, OSError):
        pipe.recv()
        started.set()
        pipe.recv()
    os._exit(1)
