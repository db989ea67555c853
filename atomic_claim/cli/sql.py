"""``atomic-claim sql``: what will be run on a database, without connecting to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.syntax import Syntax
from sqlalchemy import Dialect

from atomic_claim.backends import backend_for
from atomic_claim.errors import ClaimError
from atomic_claim.job_table import JobTable
from atomic_claim.lifecycle import owning
from atomic_claim.outcomes import Outcome, completion, extension, failures, release
from atomic_claim.plan import TOKEN, WORKER
from atomic_claim.sql_elements import KEYS
from atomic_claim.testing.database import CommandError, parse_url

from .layout import laid_out
from .options import JsonOption, UrlOption, console
from .targets import TableOption, load_job_table
from .texts import DIALECTS, SHOWN_LEASE, dialect_of, rendered, shown_claim

SHOWN_PAUSE = timedelta(minutes=1)

DialectsOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help=f"The database: {', '.join(DIALECTS)}; can be repeated. Default: that of --url, or "
        "else all.",
    ),
]


@dataclass(frozen=True)
class Step:
    """One statement.

    Attributes:
        sql: its text, with ``:named`` parameters; ``:keys`` is a list of primary keys.
        parameters: their values, where there is one to show.
    """

    sql: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Sequenced:
    """The statements of one call.

    Attributes:
        call: the call.
        steps: its statements, one after the other.
        transaction: whether they need a transaction around them.
        refused: why this table cannot have it, if it cannot.
    """

    call: str
    steps: tuple[Step, ...] = ()
    transaction: bool = False
    refused: str | None = None


def sql(
    *,
    table: TableOption = None,
    dialect: DialectsOption = None,
    limit: Annotated[int, typer.Option(min=1, help="The limit of the claim.")] = 10,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print every statement that the claim and the end of a job run, without connecting.

    The parameters are :named, :keys stands for a list of primary keys, and what is declared is a
    literal. Of several statements those in between BEGIN and COMMIT belong into one transaction.
    """
    names = chosen_dialects(dialect, url)
    _, job_table = load_job_table(table, url)
    found = {name: list(sequences(job_table, dialect_of(name), limit)) for name in names}
    if as_json:
        plain = {name: [asdict(each) for each in calls] for name, calls in found.items()}
        name = job_table.table.fullname
        typer.echo(json.dumps({"table": name, "limit": limit, "dialects": plain}, indent=2))
        return
    shown = console()
    for name, calls in found.items():
        text = "\n\n".join([f"-- {name}: {job_table.table.fullname}", *map(_text, calls)])
        show_sql(shown, text)


def chosen_dialects(given: Sequence[str] | None, url: str | None) -> Sequence[str]:
    """Return the dialects given by ``--dialect``, else the URL's, else all."""
    if not given:
        if url is None:
            return DIALECTS
        name = parse_url(url).get_backend_name()
        return [name] if name in DIALECTS else ["postgresql"]
    for name in given:
        if name not in DIALECTS:
            raise CommandError(f"--dialect {name}: expected one of {', '.join(DIALECTS)}")
    return list(dict.fromkeys(given))


def show_sql(console: Console, text: str) -> None:
    """Print SQL in colours; where it goes into a file or a pipe, as it is."""
    if not console.is_terminal:
        typer.echo(text)
        return
    syntax = Syntax(text, "sql", theme="ansi_dark", background_color="default", word_wrap=True)
    console.print(syntax)


def sequences(job_table: JobTable, dialect: Dialect, limit: int) -> Iterator[Sequenced]:
    """Yield the statements of each call on a database.

    Raises:
        CommandError: the table cannot be claimed from on this database.
    """
    backend = backend_for(dialect)
    try:
        plan, request = shown_claim(job_table, limit, "worker")
        statements = backend.statements(plan)
    except ClaimError as error:
        name = job_table.table.fullname
        raise CommandError(f"{name} cannot be claimed from on {dialect.name}: {error}") from None
    said = [f"{name}=..." for name in ("worker", "lease") if getattr(request, name) is not None]
    call = f"claim_jobs({', '.join(['engine', job_table.table.name, str(limit), *said])})"
    one_key = None if len(job_table.key) == 1 else (None,) * len(job_table.key)
    given = {**request.parameters(), TOKEN: None, WORKER: None, KEYS: [one_key]}
    steps = [_step(statement, dialect, given) for statement in statements]
    yield Sequenced(call, tuple(steps), transaction=not backend.is_single(plan))
    consent = ", unfenced=True" if job_table.token is None else ""
    endings: dict[str, Callable[[JobTable], Sequence[Outcome]]] = {
        f"complete_jobs(engine, claim{consent})": completion,
        f"fail_jobs(engine, claim, error=...{consent})": partial(
            failures, retry=False, error="..."
        ),
        f"fail_jobs(engine, claim, retry=...{consent})": partial(
            failures, retry=SHOWN_PAUSE, error=None
        ),
        f"release_jobs(engine, claim{consent})": release,
        "extend_jobs(engine, claim)": _shown_extension,
    }
    guard = owning(job_table, "")
    for name, outcomes_of in endings.items():
        try:
            changes = backend.changes(job_table, guard, outcomes_of(job_table)[-1].values)
        except ClaimError as error:
            yield Sequenced(name, refused=str(error))
        else:
            changed = tuple(_step(change, dialect, {}) for change in changes)
            yield Sequenced(name, changed, transaction=len(changed) > 1)


def _shown_extension(job_table: JobTable) -> Sequence[Outcome]:
    if job_table.exclusive_by is not None:
        raise ClaimError("with exclusive keys it takes locks that statements alone do not show")
    return (Outcome(extension(job_table, SHOWN_LEASE)),)


def _step(statement: Any, dialect: Dialect, given: dict[str, Any]) -> Step:
    text, parameters = rendered(statement, dialect, given)
    shown = {
        name: value if isinstance(value, (int, float, str)) and value != "" else None
        for name, value in parameters.items()
    }
    return Step(laid_out(text), shown)


def _text(call: Sequenced) -> str:
    if call.refused is not None:
        return f"-- {call.call}: not on this table: {call.refused}"
    lines = [f"-- {call.call}"]
    named = {name: value for step in call.steps for name, value in step.parameters.items()}
    if named:
        shown = [f":{n}" if value is None else f":{n} = {value!r}" for n, value in named.items()]
        lines.append(f"-- {', '.join(shown)}")
    texts = [f"{step.sql};" for step in call.steps]
    return "\n".join([*lines, *(["BEGIN;", *texts, "COMMIT;"] if call.transaction else texts)])
