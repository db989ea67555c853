"""A race: a claim function called by several processes at once, on a table of jobs."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine

from atomic_claim.errors import ClaimError
from atomic_claim.patch.file import read_file

from .database import (
    CommandError,
    chosen,
    complaint,
    connected,
    masked,
    one_line,
    server_title,
)
from .interrupts import deferred, not_inherited
from .meeting import KILLED, TO_BE_KILLED, Board
from .names import load
from .results import Call, Key, Race
from .tables import filled
from .waits import Waits, waited, waits_of, watching
from .workers import LIMIT, Done, Duty, Failure, Handed, Holding, Ready, work

WORKERS = 4
JOBS = 500
TIMEOUT = 60.0
PATIENCE = 2.0
LOOK_EVERY = 0.01
# Every job handed out so often, and then some, is a target that never comes to an end.
REPETITIONS = 10
SLACK = 1000
# Workers begin, and then race, for as long as the timeout each; they are given some seconds more.
GRACE = 30.0
# A call that takes so much of the time allowed is worth a word.
STANDING = 0.1

Progress = Callable[[int], None]


def race(
    target: str | Callable[..., Any],
    *,
    table: str | type[Any],
    url: str | URL | None = None,
    workers: int = WORKERS,
    jobs: int = JOBS,
    limit: int | None = None,
    factory: str | Callable[..., Any] | None = None,
    call: str | Callable[..., Any] | None = None,
    patches: str | Path | None = None,
    kill: bool = False,
    patience: float = PATIENCE,
    use_existing_table: bool = False,
    timeout: float = TIMEOUT,
    progress: Progress | None = None,
) -> Race:
    """Call a claim function in several processes at once, and count how often each job is given.

    The table is made from its metadata, with the parents that its foreign keys need, filled, and
    dropped at the end. All workers wait for each other before the first write, so that a function
    which finds jobs and then marks them shows its race at every run. ``DATABASE_URL`` is set for
    the workers, for functions that have an engine of their own. A script that calls this needs
    ``if __name__ == "__main__":``, since the workers import it.

    Args:
        target: the function, as ``"module:function"`` or ``"module:Class.method"``, or itself if
            workers can import it. Its parameters get what their names and annotations ask for: a
            session, sessionmaker, engine, connection, limit, worker or table. A session or
            connection that it got is committed after each call. It returns entities, rows,
            dictionaries or keys, one or several; None, nothing, or an exception of its own where
            no job is left.
        table: the ``Table``, mapped class or ``JobTable``, as ``"module:name"``, or a class itself.
        url: a database that may be filled; left out, an SQLite file that is gone afterwards.
        workers: how many processes.
        jobs: how many jobs.
        limit: how many jobs one call may hand out; it is passed to a target that takes one. Left
            out, 10 are asked for, and a target that takes no limit may hand out any number.
        factory: gives rows where constraints ask for more than can be read of them: called with
            a row's number, from 1, it returns a dictionary of columns (the others are made), or
            a mapped object; or, called with a count, as many of those.
        call: a function called in place of the target, which it gets as its parameter ``target``.
        patches: a file of patches, such as ``pyproject.toml``, that are made in the workers first.
        kill: whether half of the workers are killed once they have jobs.
        patience: with ``kill``, how long the others go on asking for those jobs, in seconds;
            longer than the lease.
        use_existing_table: use tables that are there. The rows made are deleted again.
        timeout: how long the race may take, in seconds, from its start.
        progress: told again and again how many jobs were handed out.

    Returns:
        What the race showed; ``duplicates``, ``lost``, ``over_limit`` and ``stuck`` are counts of
        jobs, and ``exact`` is whether all are 0.

    Raises:
        RaceError: the race could not be held: its message is one line, which says why.
    """
    _check_numbers(workers=workers, jobs=jobs, limit=limit, timeout=timeout, patience=patience)
    if kill and workers == 1:
        raise CommandError("a race in which workers are killed needs two or more of them")
    duty = Duty(
        target=_name(target, "target"),
        table=_name(table, "table"),
        call=None if call is None else _name(call, "call"),
        patches=None if patches is None else _checked_patches(Path(patches)),
        limit=limit,
        url=URL.create("sqlite"),
        seconds=2 * timeout + GRACE,
        most=2 * jobs + SLACK,
        environment=dict(os.environ),
        path=(),
    )
    given = load(duty.table, "--table")
    maker = load(factory, "--factory") if isinstance(factory, str) else factory
    text = url.render_as_string(hide_password=False) if isinstance(url, URL) else url
    with chosen(text) as address, connected(address) as engine:
        duty = _with(duty, url=address, path=tuple(sys.path))
        made = filled(engine, given, jobs, factory=maker, existing=use_existing_table)
        held = _Held(duty, workers, kill, patience, timeout, progress, use_existing_table)
        return _run(engine, made, held, shown=None if url is None else masked(address))


def _with(duty: Duty, **changes: Any) -> Duty:
    return Duty(**{**vars(duty), **changes})


def _check_numbers(**given: Any) -> None:
    for name, value in given.items():
        if value is None or value > 0 or (name == "patience" and value == 0):
            continue
        raise CommandError(f"{name} is {value!r}; expected a number above 0")


def _name(given: Any, what: str) -> str:
    """How a worker finds what was given."""
    if isinstance(given, str):
        return given
    module, name = getattr(given, "__module__", None), getattr(given, "__qualname__", None)
    if not (module and name) or "<locals>" in name:
        raise CommandError(
            f"{what} is {given!r}, which other processes cannot import: put it into a module, and "
            "name it as 'module:name'"
        )
    return f"{module}:{name}"


def _checked_patches(path: Path) -> str:
    try:
        read_file(path)
    except ClaimError as error:
        raise CommandError(one_line(error)) from None
    return str(path.resolve())


@dataclass(frozen=True)
class _Held:
    """How a race is held."""

    duty: Duty
    workers: int
    kill: bool
    patience: float
    timeout: float
    progress: Progress | None
    existing: bool


def _run(engine: Engine, made: AbstractContextManager[Any], held: _Held, shown: str | None) -> Race:
    duty = held.duty
    with watching(engine) as watch, made as jobs:
        title = server_title(watch)
        team = _Team(held, jobs.keys, watch)
        with team:
            team.run()
        blocked = team.blocked()
    found = Race(
        target=duty.target,
        database=title,
        url=shown,
        workers=held.workers,
        keys=jobs.keys,
        limit=duty.limit if duty.limit is not None or not team.takes_limit else LIMIT,
        calls=tuple(team.calls),
        killed=team.killed,
        held=frozenset(team.held) & jobs.keys,
        blocked=blocked,
        conflicts=sum(done.conflicts for done in team.done.values()),
        endless=team.endless,
        patched=duty.patches is not None,
        last_error=next((d.last_error for d in team.done.values() if d.last_error), None),
    )
    _check_result(found, team, existing=held.existing)
    return found


def _check_result(found: Race, team: _Team, *, existing: bool) -> None:
    """A race in which nobody got one of its jobs says nothing.

    Raises:
        CommandError: there was no job.
    """
    if found.claimed or found.held:
        return
    if team.calls and not existing:
        key = ", ".join(team.calls[0].keys[0])
        raise CommandError(
            f"TARGET {found.target} handed out {key!r}, which is no primary key of a row: it has "
            "to return the jobs themselves, or their keys"
        )
    if found.last_error is not None:
        raise CommandError(f"TARGET {found.target} handed out nothing: {found.last_error}")
    raise CommandError(
        f"TARGET {found.target} handed out none of {found.jobs:,} jobs: its query finds none of "
        "the rows that were made; give rows that are free to it with --factory MODULE:FUNCTION"
    )


def _context() -> Any:
    """How processes are started: the quickest way is to have one make copies of itself."""
    names = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in names else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([work.__module__])
    return context


@dataclass
class _Team:
    """The worker processes, as their parent sees them.

    Attributes:
        watch: a connection of its own to the database.
        takes_limit: whether the target takes a limit.
        calls: the calls that handed out jobs.
        held: the jobs of workers that were killed.
        done: the last word of every worker, by its number.
    """

    setting: _Held
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
        self._met = 0.0
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
            self._met = time.perf_counter()
            self._waits = waits_of(self.watch)

    def blocked(self) -> float | None:
        """How many seconds the workers waited for locks, if the database or they can tell."""
        if self.watch.dialect.name != "sqlite":
            return 0.0 if self._waits is None else self._waits.total()
        locks = [(done.wanted, done.held) for done in self.done.values()]
        return waited(locks, self._met) if self.done else None

    def _heard(self, pipes: set[Pipe], deadline: float) -> list[Pipe]:
        """The pipes in which something is to be read by now."""
        if time.perf_counter() > deadline:
            raise CommandError(self._late())
        return [pipe for pipe in wait(pipes, LOOK_EVERY) if isinstance(pipe, Pipe)]

    def _late(self) -> str:
        now = time.perf_counter()
        since = [begin for begin in self._board.calling if begin]
        said = f"the race was not over after {self.setting.timeout:g} seconds (--timeout): "
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
