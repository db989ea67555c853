"""The worker processes of a race, as their parent sees them."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from sqlalchemy import Connection

from .database import CommandError, complaint, without_secrets
from .interrupts import deferred, not_inherited
from .results import Call, Key
from .start_barrier import KILLED, TO_BE_KILLED, Board
from .waits import Waits, waited, waits_of
from .workers import Done, Duty, Failure, Handed, Holding, Ready, work

LOOK_EVERY = 0.01
# Every job handed out so often, and then some, is a target that never comes to an end.
REPETITIONS = 10
SLACK = 1000
# A call that takes so much of the time allowed is worth a word.
STANDING = 0.1

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Setting:
    """How a race is held."""

    duty: Duty
    workers: int
    kill: bool
    patience: float
    timeout: float
    progress: Progress | None
    existing: bool


def _context() -> Any:
    """How processes are started: the quickest way is to have one make copies of itself."""
    names = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in names else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([work.__module__])
    return context


@dataclass
class Team:
    """The worker processes, as their parent sees them.

    Attributes:
        watch: a connection of its own to the database.
        takes_limit: whether the target takes a limit.
        calls: the calls that handed out jobs.
        held: the jobs of workers that were killed.
        done: the last word of every worker, by its number.
    """

    setting: Setting
    keys: frozenset[Key]
    watch: Connection
    takes_limit: bool = False
    calls: list[Call] = field(default_factory=list)
    held: set[Key] = field(default_factory=set)
    done: dict[int, Done] = field(default_factory=dict)
    killed: int = 0
    endless: bool = False

    def __post_init__(self) -> None:
        self._context = _context()
        self._board = Board.of(self.setting.workers, self._context)
        self._pipes: dict[Pipe, int] = {}
        self._lives: list[Pipe] = []
        self._processes: list[BaseProcess] = []
        self._start = 0.0
        self._waits: Waits | None = None
        self._last_kill: float | None = None
        self._claimed = 0
        self._handed: set[Key] = set()
        self._killing = self.setting.workers // 2 if self.setting.kill else 0

    def __enter__(self) -> None:
        try:
            with not_inherited():
                for worker in range(self.setting.workers):
                    self._begin(worker)
        except BaseException:
            self.__exit__()
            raise

    def _begin(self, worker: int) -> None:
        pipe, theirs = self._context.Pipe()
        their_life, life = self._context.Pipe(duplex=False)
        victim = worker >= self.setting.workers - self._killing
        arguments = (worker, self.setting.duty, theirs, their_life, self._board)
        process = self._context.Process(
            target=work, args=arguments, kwargs={"victim": victim}, daemon=True
        )
        process.start()
        theirs.close()
        their_life.close()
        self._pipes[pipe] = worker
        self._lives.append(life)
        self._processes.append(process)

    def __exit__(self, *_: object) -> None:
        with deferred():
            for process in self._processes:
                process.kill()
            for process in self._processes:
                process.join()
            for pipe in [*self._pipes, *self._lives]:
                pipe.close()

    def run(self) -> None:
        """Start all at once, and listen to them until they are done.

        Raises:
            CommandError: a worker could not work, or they were not done in time.
        """
        deadline = time.perf_counter() + self.setting.timeout
        waiting = set(self._pipes)
        while waiting:
            for pipe in self._heard(waiting, deadline):
                ready = self._answer(pipe)
                assert isinstance(ready, Ready)
                self.takes_limit = ready.takes_limit
                waiting.remove(pipe)
        self._board.open.value = TO_BE_KILLED if self._killing else 0
        self._start = time.perf_counter()
        deadline = self._start + self.setting.timeout
        for pipe in self._pipes:
            pipe.send(None)
        running = set(self._pipes)
        while running and not self.endless:
            for pipe in self._heard(running, deadline):
                if self._is_last(pipe):
                    running.remove(pipe)
            self._look()
            self._close_if_over()
            if self.setting.progress is not None:
                self.setting.progress(len(self._handed))
            most = REPETITIONS * len(self.keys) * self.setting.workers + SLACK
            self.endless = self._claimed > most

    def _look(self) -> None:
        """Count how long workers wait for locks, but not while they wait for each other."""
        if self._waits is not None:
            self._waits.look()
        elif self._board.met.value:
            self._waits = waits_of(self.watch)

    def blocked(self) -> float | None:
        """How many seconds the workers waited for locks, if the database or they can tell."""
        if self.watch.dialect.name != "sqlite":
            return 0.0 if self._waits is None else self._waits.total()
        locks = [(done.wanted, done.held) for done in self.done.values()]
        return waited(locks, self._board.met.value) if self.done else None

    def met(self) -> float:
        """When the workers had met, in seconds from their start; 0 if they did not."""
        return max(0.0, self._board.met.value - self._start) if self._board.met.value else 0.0

    def last_error(self) -> str | None:
        """Return an error of a target that handed out nothing, without the URL's secrets."""
        errors = [done.last_error for done in self.done.values() if done.last_error]
        return without_secrets(errors[0], self.setting.duty.url) if errors else None

    def _heard(self, pipes: set[Pipe], deadline: float) -> list[Pipe]:
        """Return the pipes that have data to read, or raise after the deadline."""
        if time.perf_counter() > deadline:
            raise CommandError(self._late())
        return [pipe for pipe in wait(pipes, LOOK_EVERY) if isinstance(pipe, Pipe)]

    def _late(self) -> str:
        now = time.perf_counter()
        since = [begin for begin in self._board.calling if begin]
        said = f"the race was not over after {self.setting.timeout:g} seconds (timeout=): "
        if not self._start:
            return f"{said}not all workers had begun"
        said += f"{len(self._handed):,} of {len(self.keys):,} jobs were handed out"
        longest = now - min(since, default=now)
        if longest < STANDING * self.setting.timeout:
            return said
        return (
            f"{said}, and {len(since)} of {self.setting.workers} workers are in a call of "
            f"{self.setting.duty.target}, for up to {longest:.1f} seconds"
        )

    def _answer(self, pipe: Pipe) -> Any:
        worker = self._pipes[pipe]
        try:
            answer = pipe.recv()
        except (EOFError, ConnectionResetError):
            process = self._processes[worker]
            process.join(1)
            raise CommandError(
                f"worker {worker + 1} ended before its time, with exit code {process.exitcode}"
            ) from None
        if isinstance(answer, Failure):
            raise complaint(
                f"worker {worker + 1}", RuntimeError(answer.text), self.setting.duty.url
            )
        return answer

    def _is_last(self, pipe: Pipe) -> bool:
        """Take note of what a worker says, and tell whether it was its last word."""
        worker, answer = self._pipes[pipe], self._answer(pipe)
        if isinstance(answer, Handed):
            begin, end = answer.begin - self._start, answer.end - self._start
            self.calls.append(Call(worker, begin, end, answer.keys, answer.waited))
            self._claimed += len(answer.keys)
            self._handed.update(answer.keys)
            return False
        self._board.leave(worker)
        if isinstance(answer, Holding):
            self._processes[worker].kill()
            self._processes[worker].join()
            self.killed += 1
            self.held.update(answer.keys)
            self._last_kill = time.perf_counter()
        else:
            self.done[worker] = answer
        return True

    def _close_if_over(self) -> None:
        """Let the workers end once the killed ones' jobs are back, or nobody waits for them."""
        if self._board.open.value == TO_BE_KILLED:
            victims = range(self.setting.workers - self._killing, self.setting.workers)
            if all(self._board.idle[worker] for worker in victims):
                self._board.open.value = KILLED
        if self._board.open.value != KILLED or not self._board.all_idle():
            return
        last = self._last_kill
        if (
            last is None
            or self.held <= self._handed
            or time.perf_counter() - last > self.setting.patience
        ):
            self._board.open.value = 0
