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
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol

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


class Task(Protocol):
    """The work of every worker, as a picklable object."""

    def begun(self, worker: int) -> AbstractContextManager[Work]:
        """Prepare the worker with this number, from 0, and yield the function that works.

        The function gets another one, which sends a message to the parent; it returns the last.
        """
        ...


class Ended(NamedTuple):
    """The end of all workers.

    Attributes:
        start: when they were started, in seconds of ``perf_counter``.
        last: the last value of each worker that came to its end, by its number.
    """

    start: float
    last: dict[int, Any]


class Overdue(CommandError):
    """The workers were not done in time.

    Attributes:
        begun: whether all had begun.
    """

    def __init__(self, seconds: float, *, begun: bool) -> None:
        said = "done" if begun else "all ready"
        super().__init__(f"the workers were not {said} after {seconds:g} seconds")
        self.begun = begun


class _Last(NamedTuple):
    value: Any


class _Failure(NamedTuple):
    text: str


@dataclass(frozen=True)
class _Worker:
    number: int
    process: BaseProcess
    life: Pipe

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


Workers = dict[Pipe, _Worker]


def run_workers(
    task: Task,
    count: int,
    *,
    seconds: float,
    receive: Callable[[int, Any], bool],
    tick: Callable[[], bool],
    url: URL | None = None,
) -> Ended:
    """Do a task in several processes that start at once.

    Args:
        task: what each of them does.
        count: how many there are.
        seconds: how long they may prepare, and then work.
        receive: called with a worker's number and a message of its; the worker is killed if it
            returns True.
        tick: called every few milliseconds while they work; True ends the work of all.
        url: a URL; its secrets are removed from all messages.

    Raises:
        CommandError: a worker failed, or ended before its time.
        Overdue: they were not done in time.
    """
    context = _context(task)
    workers: Workers = {}
    try:
        with not_inherited():
            for number in range(count):
                pipe, worker = _started(context, number, task, 2 * seconds + GRACE)
                workers[pipe] = worker
        return _run(workers, seconds, receive, tick)
    except _Failed as error:
        text = str(error) if url is None else without_secrets(str(error), url)
        raise CommandError(text) from None
    finally:
        with deferred():
            for worker in workers.values():
                worker.process.kill()
            for pipe, worker in workers.items():
                worker.process.join()
                pipe.close()
                worker.life.close()


def _context(task: Task) -> Any:
    """Return how processes are started: quickest is a process that makes copies of itself."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([type(task).__module__])
    return context


def _started(context: Any, number: int, task: Task, seconds: float) -> tuple[Pipe, _Worker]:
    pipe, theirs = context.Pipe()
    their_life, life = context.Pipe(duplex=False)
    options = {"life": their_life, "seconds": seconds, "environment": dict(os.environ)}
    process = context.Process(
        target=_work, args=(number, task, theirs), kwargs=options, daemon=True
    )
    process.start()
    theirs.close()
    their_life.close()
    return pipe, _Worker(number, process, life)


def _run(
    workers: Workers,
    seconds: float,
    receive: Callable[[int, Any], bool],
    tick: Callable[[], bool],
) -> Ended:
    deadline = time.perf_counter() + seconds
    waiting = set(workers)
    while waiting:
        if time.perf_counter() > deadline:
            raise Overdue(seconds, begun=False)
        waiting -= {pipe for pipe, _ in _heard(workers, waiting)}
    start = time.perf_counter()
    for pipe in workers:
        pipe.send(None)
    last: dict[int, Any] = {}
    running = set(workers)
    while running and not tick():
        if time.perf_counter() > start + seconds:
            raise Overdue(seconds, begun=True)
        for pipe, message in _heard(workers, running):
            worker = workers[pipe]
            if isinstance(message, _Last):
                last[worker.number] = message.value
                running.remove(pipe)
            elif receive(worker.number, message):
                worker.kill()
                running.remove(pipe)
    return Ended(start, last)


class _Failed(Exception):
    """A worker failed; the message may hold secrets."""


def _heard(workers: Workers, pipes: set[Pipe]) -> Iterator[tuple[Pipe, Any]]:
    for pipe in wait(list(pipes), LOOK_EVERY):
        assert isinstance(pipe, Pipe)
        worker = workers[pipe]
        try:
            message = pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join(1)
            raise _Failed(
                f"worker {worker.number + 1} ended before its time, with exit code "
                f"{worker.process.exitcode}"
            ) from None
        if isinstance(message, _Failure):
            raise _Failed(f"worker {worker.number + 1}: {message.text}")
        yield pipe, message


def _work(
    number: int,
    task: Task,
    pipe: Pipe,
    *,
    life: Pipe,
    seconds: float,
    environment: Mapping[str, str],
) -> None:
    """Run a worker process from start to exit."""
    _die_with_parent(life, seconds)
    # A copy of the fork server has the variables with which that was started.
    os.environ.clear()
    os.environ.update(environment)
    with suppress(EOFError, BrokenPipeError):
        try:
            with task.begun(number) as work:
                pipe.send(None)
                pipe.recv()
                pipe.send(_Last(work(pipe.send)))
        except CommandError as error:
            pipe.send(_Failure(str(error)))
        except (SQLAlchemyError, ClaimError) as error:
            pipe.send(_Failure(one_line(error)))


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
