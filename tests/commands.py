"""The command `atomic-claim`, run by tests, and how it ended."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.databases import Database, SQLiteDatabase

REPOSITORY = Path(__file__).parent.parent
PASSWORD = "Swordfish-7"  # noqa: S105 - to be looked for in what is said
VARIABLES = ("ATOMIC_CLAIM_URL", "DATABASE_URL")


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    def refused(self) -> str:
        """Return the one error line of a command that failed, after checking its form."""
        assert self.code == 2, self
        assert not self.out
        assert self.err.startswith("atomic-claim: "), self
        assert self.err.endswith("\n"), self
        assert self.err.count("\n") == 1, self
        assert PASSWORD not in self.err
        return self.err


Command = Callable[..., Ended]


def real(*arguments: str, **options: Any) -> Ended:
    """Run the command in a subprocess."""
    done = subprocess.run(
        [sys.executable, "-m", "atomic_claim", *arguments],
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
        **options,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def address(database: Database) -> str:
    """Return the value for --url; on SQLite create the file first."""
    if isinstance(database, SQLiteDatabase):
        database.path.touch()
    return database.url.render_as_string(hide_password=False)
