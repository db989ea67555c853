"""``atomic-claim jobs``: the jobs of a table by what becomes of them, and freeing dead ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text
from sqlalchemy import Column, ColumnElement, Engine, Float, and_, func, literal, or_, select
from sqlalchemy.types import Enum

from atomic_claim import predicates
from atomic_claim.inference import plain_type
from atomic_claim.job_table import JobTable
from atomic_claim.lifecycle import Change, requeue_jobs
from atomic_claim.outcomes import Outcome, freeing
from atomic_claim.testing.database import CommandError

from .checks.findings import count
from .checks.rows import claimed_at, is_marked
from .options import Flag, JsonOption, StuckAfterOption, UrlOption, console, server
from .targets import TableOption, load_job_table

ROLES = ("state", "due", "worker", "lease", "attempts", "error")
CONVERT: Mapping[type, Callable[[str], Any]] = {
    int: int,
    float: float,
    str: str,
    bool: lambda text: {"true": True, "1": True, "false": False, "0": False}[text.lower()],
    datetime: datetime.fromisoformat,
}


Freeing = Callable[[Engine, JobTable, ColumnElement[bool]], int]
"""Frees the jobs that meet a condition, and returns how many."""

FailedOption = Annotated[bool, Flag("--failed", help="Jobs that have failed.")]
StuckOption = Annotated[
    bool,
    Flag(
        "--stuck",
        help="Jobs whose lease has ended, or that run without one for --stuck-after.",
    ),
]
RunningOption = Annotated[bool, Flag("--running", help="Jobs that are claimed.")]
WaitingOption = Annotated[bool, Flag("--waiting", help="Jobs that a claim would take now.")]
WhereOption = Annotated[
    list[str] | None,
    typer.Option(metavar="COLUMN=VALUE", help="Only jobs with this value; can be repeated."),
]
LimitOption = Annotated[int, typer.Option(min=1, help="The most jobs that are shown.")]
RequeueOption = Annotated[
    bool,
    Flag(
        "--requeue",
        help="Free all failed jobs, also those not shown, and reset their attempts; the error "
        "stays.",
    ),
]
ReleaseOption = Annotated[
    bool,
    Flag(
        "--release-stuck",
        help="Free all stuck jobs, also those not shown; the attempt stays counted.",
    ),
]
YesOption = Annotated[bool, Flag("--yes", help="Do not ask.")]


def jobs(
    *,
    table: TableOption = None,
    failed: FailedOption = False,
    stuck: StuckOption = False,
    running: RunningOption = False,
    waiting: WaitingOption = False,
    where: WhereOption = None,
    limit: LimitOption = 20,
    stuck_after: StuckAfterOption = 3600,
    requeue: RequeueOption = False,
    release_stuck: ReleaseOption = False,
    yes: YesOption = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the jobs of a table, and free those of dead workers and those that have failed.

    Only --release-stuck and --requeue change jobs, after their number and their workers were shown
    and you have agreed.
    """
    with server(url) as engine:
        listed = {"failed": failed, "stuck": stuck, "running": running, "waiting": waiting}
        kind, is_changed = _asked(listed, {"failed": requeue, "stuck": release_stuck})
        _, job_table = load_job_table(table, url)
        conditions = [_equal(job_table, given) for given in where or ()]
        condition = and_(_condition(job_table, kind, stuck_after), *conditions)
        total, rows = _listed(engine, job_table, condition, limit)
        said: dict[str, int] = {}
        if is_changed:
            if total and not yes:
                holders = _holders(engine, job_table, condition) if kind == "stuck" else ""
                _agree(count(total, f"{kind} job"), holders)
            done, free = CHANGES[kind]
            said[done] = free(engine, job_table, condition) if total else 0
        if as_json:
            shown = {"table": job_table.table.fullname, "jobs": rows, "total": total}
            typer.echo(json.dumps(shown | said, indent=2, default=str))
            return
        typer.echo(f"{job_table.table.fullname}: {count(total, f'{kind} job')}")
        _show(rows)
        if total > len(rows):
            typer.echo(f"{total - len(rows):,} more; see --limit")
        for done, number in said.items():
            typer.echo(f"{done}: {count(number, 'job')}")


def _asked(listed: Mapping[str, bool], changed: Mapping[str, bool]) -> tuple[str, bool]:
    """Return the kind of jobs that was asked for, and whether they are changed."""
    kinds = {kind for kind, wanted in (*listed.items(), *changed.items()) if wanted}
    if len(kinds) != 1:
        raise CommandError(
            "which jobs? Give one of --failed, --stuck, --running and --waiting; "
            "--requeue goes with --failed, --release-stuck with --stuck"
        )
    return kinds.pop(), any(changed.values())


def _condition(job_table: JobTable, kind: str, stuck_after: float) -> ColumnElement[bool]:
    if kind == "waiting":
        return predicates.claimable(job_table)
    if kind == "running":
        return is_marked(job_table)
    if kind == "failed":
        if not job_table.failed:
            raise CommandError(
                f"nothing marks a row of {job_table.table.fullname} as failed: say it with "
                "JobTable(failed=...), and give that as --table"
            )
        return predicates.is_failed(job_table)
    return _stuck(job_table, stuck_after)


def _stuck(job_table: JobTable, seconds: float) -> ColumnElement[bool]:
    """Build the condition of a row whose worker is dead, as far as anything tells."""
    running, lease, since = is_marked(job_table), job_table.lease, claimed_at(job_table)
    reasons: list[ColumnElement[bool]] = []
    unleased: list[ColumnElement[bool]] = []
    if lease is not None:
        reasons.append(lease <= job_table.now(lease))
        unleased.append(lease.is_(None))
    if since is not None:
        old = since <= job_table.now(since, literal(-seconds, Float()))
        reasons.append(and_(*unleased, old))
    if not reasons:
        raise CommandError(
            f"no column of {job_table.table.fullname} says when a job was claimed, so that a dead "
            "worker's cannot be told from one that is being done. Add a lease: atomic-claim "
            "migration --add lease,token"
        )
    return and_(running, or_(*reasons))


def _equal(job_table: JobTable, given: str) -> ColumnElement[bool]:
    name, equals, text = given.partition("=")
    columns = {column.name: column for column in job_table.table.columns}
    if not equals or name not in columns:
        raise CommandError(
            f"--where {given}: expected COLUMN=VALUE with one of {', '.join(columns)}"
        )
    column: Column[Any] = columns[name]
    if text == "NULL":
        return column.is_(None)
    type_ = plain_type(column.type)
    try:
        wanted = str if isinstance(type_, Enum) else type_.python_type
        value = CONVERT[wanted](text)
    except (KeyError, ValueError, NotImplementedError):
        raise CommandError(f"--where {given}: {text!r} is no value of {type_}") from None
    return column.in_([value])


def _listed(
    engine: Engine, job_table: JobTable, condition: ColumnElement[bool], limit: int
) -> tuple[int, list[dict[str, Any]]]:
    """Return how many jobs there are, and the first of them, by column name."""
    roles = [getattr(job_table, role) for role in ROLES]
    shown = [*job_table.key, *roles, claimed_at(job_table), *job_table.failed]
    columns = list(dict.fromkeys(each for each in shown if each is not None))
    order = job_table.order or job_table.key
    statement = select(*columns).where(condition).order_by(*order).limit(limit)
    number = select(func.count()).select_from(job_table.table).where(condition)
    with engine.connect() as connection:
        total = int(connection.scalar(number) or 0)
        rows = connection.execute(statement).all()
    names = [column.name for column in columns]
    return total, [dict(zip(names, row, strict=True)) for row in rows]


def _holders(engine: Engine, job_table: JobTable, condition: ColumnElement[bool]) -> str:
    """Name the workers of some rows, each with its number of them."""
    worker = job_table.worker
    if worker is None:
        return "no column says whose they are"
    number = func.count()
    statement = select(worker, number).where(condition).group_by(worker).order_by(number.desc())
    with engine.connect() as connection:
        rows = connection.execute(statement).all()
    return ", ".join(f"{'no worker' if who is None else who}: {n:,}" for who, n in rows)


def _agree(jobs: str, holders: str) -> None:
    """Ask before a change.

    Raises:
        CommandError: standard input is no terminal, or the answer is no.
    """
    whose = f" ({holders})" if holders else ""
    if not sys.stdin.isatty():
        raise CommandError(f"{jobs} would be freed{whose}: agree with --yes")
    if not typer.confirm(f"Free {jobs}{whose}?", err=True):
        raise CommandError("nothing was changed")


def _release(engine: Engine, job_table: JobTable, condition: ColumnElement[bool]) -> int:
    """Free the rows that still match and that no other transaction has locked."""
    query = select(*job_table.key).where(condition)
    change = Change(engine, job_table, condition, [Outcome(freeing(job_table))], query=query)
    changed = len(change.execute())
    if error := change.refusal(changed):
        raise error
    return changed


# By the kind of jobs, what is done to them, and how.
CHANGES: Mapping[str, tuple[str, Freeing]] = {
    "failed": ("requeued", lambda engine, table, where: requeue_jobs(engine, table, where=where)),
    "stuck": ("released", _release),
}


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the jobs, without the columns that are NULL in all of them."""
    names = [name for name in (rows or [{}])[0] if any(row[name] is not None for row in rows)]
    shown = Table(*names, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in shown.columns:
        column.overflow = "fold"
    for row in rows:
        shown.add_row(*(_text(row[name]) for name in names))
    if rows:
        console().print(shown)


def _text(value: object) -> Text:
    """Return a value for people: times to the second, and no markup."""
    if isinstance(value, datetime):
        return Text(value.isoformat(" ", "seconds"))
    return Text("" if value is None else str(value))
