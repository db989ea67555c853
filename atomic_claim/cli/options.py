"""Options shared by all commands, and how a command ends."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from atomic_claim.errors import ClaimError
from atomic_claim.testing.database import (
    CommandError,
    complaint,
    connected,
    masked,
    one_line,
    parse_url,
)
from atomic_claim.testing.interrupts import as_exceptions

SPACES = re.compile(r"[ ]+$", re.MULTILINE)
# A parameter of the library's in a message: only as a word of its own, as `?timeout=3` in a URL is
# none of ours.
PARAMETER = re.compile(
    r"(?<![^\s(])(target|table|url|jobs|factory|call|timeout|use_existing_table)=(True\b|\w)?"
)
FAILED = 1
UNUSABLE = 2
INTERRUPTED = 128 + signal.SIGINT

# An option without a value; recent versions of Typer show "<bool>" behind it.
Flag = partial(typer.Option, metavar="")
Seconds = partial(typer.Option, min=0, metavar="SECONDS")
UrlOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar=["ATOMIC_CLAIM_URL", "DATABASE_URL"],
        # The variable's value may hold a password.
        show_default=False,
        help="The database, as an SQLAlchemy URL such as postgresql://user@host/database.",
    ),
]
JsonOption = Annotated[bool, Flag("--json", help="Print JSON in place of text.")]
WorkersOption = Annotated[int, typer.Option(min=1, help="The number of worker processes.")]
JobsOption = Annotated[int, typer.Option(min=1, help="The number of jobs.")]
StuckAfterOption = Annotated[float, Seconds(help="For how long a job may run without a lease.")]


class Trimmed:
    """Standard output without the spaces that Rich fills lines with, unless it is a terminal."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)

    def write(self, text: str) -> int:
        """Write the text, of whose lines nothing visible is lost."""
        return sys.stdout.write(text if sys.stdout.isatty() else SPACES.sub("", text))


def console() -> Console:
    """Create a console; lines that go into a file or a pipe end where their text ends.

    Rich honours NO_COLOR, and draws in ASCII where the encoding has no lines.
    """
    file: Any = Trimmed()
    return Console(highlight=False, file=file)


def end(*, is_well: bool) -> None:
    """End a command that has found something wrong by the exit code that says so."""
    if not is_well:
        raise typer.Exit(FAILED)


def typed(context: typer.Context, name: str) -> bool:
    """Check whether an option was given on the command line, not by the environment."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def is_unicode() -> bool:
    """Check whether standard output has other characters than ASCII's."""
    return (sys.stdout.encoding or "").lower().startswith("utf")


@contextmanager
def plain_ending() -> Iterator[None]:
    """End a command that cannot go on with one line and exit code 2, never a traceback.

    The line names flags in place of the library's parameters. A request to end reaches the command
    as an exception, so that it cleans up.
    """
    try:
        with as_exceptions():
            yield
    except (CommandError, ClaimError) as error:
        typer.echo(f"atomic-claim: {PARAMETER.sub(_flag, one_line(error))}", err=True)
        raise typer.Exit(UNUSABLE) from None
    except OSError as error:
        # A reader that wants no more is no fault.
        if error.filename is None:
            raise
        typer.echo(f"atomic-claim: {error.filename}: {error.strerror}", err=True)
        raise typer.Exit(UNUSABLE) from None
    except KeyboardInterrupt:
        typer.echo("atomic-claim: interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _flag(found: re.Match[str]) -> str:
    flag = "TARGET" if found[1] == "target" else f"--{found[1].replace('_', '-')}"
    return flag if found[2] in {None, "True"} else f"{flag} {found[2]}"


@contextmanager
def server(url: str | None) -> Iterator[Engine]:
    """Yield an engine; database errors become one-line command errors."""
    if url is None:
        raise CommandError(
            "which database? Give --url, or set ATOMIC_CLAIM_URL or DATABASE_URL to one such as "
            "postgresql://user@host/database"
        )
    address = parse_url(url)
    with connected(address) as engine:
        try:
            yield engine
        except SQLAlchemyError as error:
            raise complaint(f"cannot read {masked(address)}", error, address) from None
