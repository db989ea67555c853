"""Options shared by all commands, and how a command ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from atomic_claim.testing.database import CommandError
from atomic_claim.testing.interrupts import as_exceptions

FAILED = 1
UNUSABLE = 2
INTERRUPTED = 128 + signal.SIGINT

UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        envvar=["ATOMIC_CLAIM_URL", "DATABASE_URL"],
        # The variable's value may hold a password.
        show_default=False,
        help="The database, as an SQLAlchemy URL such as postgresql://user@host/database.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the figures as JSON in place of the table.")
]


@contextmanager
def plain_ending() -> Iterator[None]:
    """End a command that cannot go on with one line and exit code 2, never a traceback.

    A request to end reaches the command as an exception, so that it cleans up.
    """
    try:
        with as_exceptions():
            yield
    except CommandError as error:
        typer.echo(f"atomic-claim: {error}", err=True)
        raise typer.Exit(UNUSABLE) from None
    except KeyboardInterrupt:
        typer.echo("atomic-claim: interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
