"""Worker processes that stay, and claim in whatever way they are told for as long as they are told.

A process opens each way once, so that its connection and what is prepared on it are warm.
"""

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

AHEAD = 0.15
_processes = multiprocessing.get_context("spawn")


@dataclass
class Share:
    """Results of one worker process.

    Attributes:
        jobs: what it claimed, one by one.
        times: the seconds of each call that claimed something, or wrote something.
        seconds: until the last of them had ended.
        errors: how often an error reached the caller, by its name or number.
    """

    jobs: list[Any] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    seconds: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)


class Worker(Protocol):
    """One way to claim, opened in a process of its own."""

    def run(self, begin: float, seconds: float) -> Share:
        """Claim from then on for so long, or until nothing is left."""


class Caller:
    """A worker whose claim is a plain call that returns what it claimed.

    Args:
        claim: is called again and again.
        work: the seconds to sleep after each call, which are not measured.
        idle: the seconds to sleep after a call that found nothing; None ends the turn.
    """

    def __init__(
        self, claim: Callable[[], Sequence[Any]], *, work: float = 0, idle: float | None = None
    ) -> None:
        self.claim = claim
        self.work = work
        self.idle = idle

    def run(self, begin: float, seconds: float) -> Share:
        """Claim from then on for so long, or until nothing is left."""
        share = Share()
        time.sleep(max(0, begin - time.monotonic()))
        while (called := time.monotonic()) < begin + seconds:
            try:
                jobs = self.claim()
            except Exception as error:  # noqa: BLE001 - counted, and shown
                share.errors[name_of(error)] += 1
                continue
            ended = time.monotonic()
            if not jobs:
                if self.idle is None:
                    break
                time.sleep(self.idle)
                continue
            share.jobs += jobs
            share.times.append(ended - called)
            share.seconds = ended - begin
            if self.work:
                time.sleep(self.work)
        return share


def name_of(error: BaseException) -> str:
    """Return an error's name, with its number or SQLSTATE if the database gave one."""
    original = getattr(error, "orig", None) or getattr(error.__cause__, "orig", None) or error
    number = original.args[0] if original.args else ""
    code = number if isinstance(number, int) else getattr(original, "sqlstate", None)
    return f"{type(error).__name__}{f' {code}' if code else ''}"


@dataclass(frozen=True)
class Task:
    """A way to claim, as a process can import it.

    Attributes:
        opener: ``module:function``, which makes a :class:`Worker` of what follows.
        arguments: what it is called with.
    """

    opener: str
    arguments: tuple[Any, ...]

    def open(self) -> Worker:
        """Open it, in the process that runs it."""
        module, _, name = self.opener.partition(":")
        worker: Worker = getattr(import_module(module), name)(*self.arguments)
        return worker


class Crew:
    """A group of worker processes that lasts until the block ends."""

    def __init__(self, size: int) -> None:
        self._pipes = []
        self._processes = []
        for _ in range(size):
            near, far = _processes.Pipe()
            process = _processes.Process(target=_work, args=(far,), daemon=True)
            process.start()
            far.close()
            self._pipes.append(near)
            self._processes.append(process)

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()

    def open(self, tasks: Sequence[Task]) -> None:
        """Have the first processes open a task each, so that it is not measured."""
        self._tell([("open", task) for task in tasks])

    def run(self, tasks: Sequence[Task], seconds: float) -> list[Share]:
        """Have the first processes run a task each, all from the same moment on."""
        self.open(tasks)
        begin = time.monotonic() + AHEAD
        shares: list[Share] = self._tell([("run", task, begin, seconds) for task in tasks])
        return shares

    def _tell(self, orders: Sequence[Any]) -> list[Any]:
        pipes = self._pipes[: len(orders)]
        for pipe, order in zip(pipes, orders, strict=True):
            pipe.send(order)
        answers = [pipe.recv() for pipe in pipes]
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers


def _work(pipe: Any) -> None:
    opened: dict[Task, Worker] = {}
    while True:
        try:
            order, task, *more = pipe.recv()
        except EOFError:
            # Pools and loops of other packages would complain of an end that is not theirs.
            os._exit(0)
        try:
            if task not in opened:
                opened[task] = task.open()
            pipe.send(opened[task].run(*more) if order == "run" else None)
        except Exception as error:  # noqa: BLE001 - the crew's leader raises it
            pipe.send(RuntimeError(f"{task.opener}: {type(error).__name__}: {error}"))


def rate(shares: Sequence[Share]) -> float:
    """Jobs per second of all of them together."""
    seconds = max((share.seconds for share in shares), default=0)
    return sum(len(share.jobs) for share in shares) / seconds if seconds else 0.0


def doubled(shares: Sequence[Share]) -> int:
    """How many claims there were beyond each job's first."""
    jobs = [job for share in shares for job in share.jobs]
    return len(jobs) - len(set(jobs))


def errors(shares: Sequence[Share]) -> Counter[str]:
    """Sum up the errors of all processes by name."""
    return sum((share.errors for share in shares), Counter())
