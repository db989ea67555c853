"""A race: a claim function called by several processes at once, on a table of jobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import URL

from .database import CommandError, chosen, connected, masked, server_title
from .harness import Overdue, run_workers
from .names import TableName, load, load_table
from .record import SLACK, Record
from .results import Race
from .start_barrier import TO_BE_KILLED, Board
from .tables import filled
from .workers import LIMIT, RaceTask

WORKERS = 4
JOBS = 500
TIMEOUT = 60.0
PATIENCE = 2.0


def race(
    target: str | Callable[..., Any],
    *,
    table: TableName | type[Any],
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
    progress: Callable[[int], None] | None = None,
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
            session, sessionmaker, engine, connection, limit, worker or table; an asynchronous
            function gets them in their asynchronous kinds. A session or connection that it got is
            committed after each call. It returns or yields entities, rows, dictionaries or keys,
            one or several; None, nothing, or an exception of its own where no job is left.
        table: the ``Table``, mapped class or ``JobTable``, as ``"module:name"``, or a class itself;
            or the name of a table in the database, with ``use_existing_table``. A mapping of the
            arguments of ``JobTable.infer`` declares the table that its ``table`` names so.
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
        raise CommandError("workers is 1, and a race that kills half of them needs two or more")
    maker = load(factory, "factory") if isinstance(factory, str) else factory
    with chosen(url) as address, connected(address) as engine:
        task = RaceTask(
            target=_name(target, "target"),
            table=table if isinstance(table, Mapping) else _name(table, "table"),
            call=None if call is None else _name(call, "call"),
            patches=None if patches is None else str(Path(patches).resolve()),
            limit=limit,
            url=address,
            most=2 * jobs + SLACK,
            board=Board(workers),
            victims=range(workers - workers // 2 if kill else workers, workers),
        )
        given = load_table(task.table, None if url is None else engine)
        made = filled(engine, given, jobs, factory=maker, existing=use_existing_table)
        # Each statement of its sees the server's present state.
        seeing = engine.execution_options(isolation_level="AUTOCOMMIT")
        with seeing.connect() as watch, made as keys:
            record = Record(task, keys, patience, watch, progress or (lambda _: None))
            found = _run(task, record, timeout, None if url is None else masked(address))
    _check_result(found, existing=use_existing_table)
    return found


def _check_numbers(**given: Any) -> None:
    for name, value in given.items():
        if value is not None and (value < 0 or (value == 0 and name != "patience")):
            raise CommandError(f"{name} is {value!r}; expected a number above 0")


def _name(given: Any, what: str) -> str:
    """Return the name by which a worker imports what was given."""
    if isinstance(given, str):
        return given
    module, name = getattr(given, "__module__", None), getattr(given, "__qualname__", None)
    if not (module and name) or "<locals>" in name:
        raise CommandError(
            f"{what} is {given!r}, which other processes cannot import: put it into a module, and "
            "name it as 'module:name'"
        )
    return f"{module}:{name}"


def _run(task: RaceTask, record: Record, timeout: float, shown: str | None) -> Race:
    """Hold the race on a table that is filled; return its result, with the URL to show."""
    workers = len(task.board.idle)
    task.board.open.value = TO_BE_KILLED if task.victims else 0
    try:
        start, last = run_workers(
            task.begun,
            workers,
            seconds=timeout,
            receive=record.receive,
            tick=record.tick,
            url=task.url,
        )
    except Overdue:
        said = record.standing(timeout)
        raise CommandError(f"the race was not over after {timeout:g} seconds: {said}") from None
    return Race(
        name=task.target if task.patches is None else f"{task.target} (patched)",
        target=task.target,
        database=server_title(record.watch),
        url=shown,
        workers=workers,
        keys=record.keys,
        limit=task.limit or (LIMIT if task.board.takes_limit.value else None),
        calls=tuple(call.since(start) for call in record.calls),
        met=max(0.0, task.board.met.value - start),
        killed=record.killed,
        held=frozenset(record.held) & record.keys,
        blocked=record.blocked(last),
        conflicts=sum(done.conflicts for done in last),
        endless=record.endless,
        patched=task.patches is not None,
        last_error=next((done.last_error for done in last if done.last_error), None),
    )


def _check_result(found: Race, *, existing: bool) -> None:
    """Raise if no worker received a job, since such a race proves nothing.

    Raises:
        CommandError: there was no job.
    """
    if found.claimed or found.held:
        return
    if found.calls and not existing:
        key = ", ".join(found.calls[0].keys[0])
        why = (
            f"handed out {key!r}, which is no primary key of a row: it has to return the jobs "
            "themselves, or their keys"
        )
    elif found.last_error is not None:
        why = f"handed out nothing: {found.last_error}"
    else:
        why = (
            f"handed out none of {found.jobs:,} jobs: its query finds none of the rows that were "
            "made; give rows that are free to it with factory="
        )
    raise CommandError(f"target={found.target} {why}")
