"""A clock that stands still where a test sets it, for PostgreSQL and for Python: libfaketime's."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests import debian
from tests.processes import Workspace
from tests.servers import PostgreSQL, Programs


class FakedClock:
    """The clock of the programs that are started with `environment`.

    Attributes:
        environment: what makes a program read this clock, and no other.

    Raises:
        PackageError: libfaketime is not available.
    """

    def __init__(self, workspace: Workspace) -> None:
        folder = debian.unpacked("libfaketime")
        found = next(folder.glob("usr/lib/*/faketime/libfaketime.so.1"))
        # The server's account may not reach the home of who runs the tests.
        library = workspace.folder / found.name
        shutil.copyfile(found, library)
        library.chmod(0o755)
        self._file = workspace.folder / "clock"
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            # Seconds since 1970, since a time on the wall is told twice in the hour in question.
            "FAKETIME_FMT": "%s",
            "FAKETIME_NO_CACHE": "1",
            # Waits with a limit end as ever.
            "DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }
        self.set(datetime.now(UTC))

    def set(self, moment: datetime) -> None:
        """Set the clock."""
        set_clock(self._file, moment)

    @property
    def file(self) -> Path:
        """The file that holds the time."""
        return self._file


def set_clock(file: Path, moment: datetime) -> None:
    """Set the clock that is read from a file; a process that reads it now finds it whole."""
    new = file.with_suffix(".new")
    new.write_text(str(int(moment.timestamp())), encoding="ascii")
    new.chmod(0o644)
    new.replace(file)


class FakedPostgreSQL(PostgreSQL):
    """PostgreSQL by a clock that a test sets."""

    clock: FakedClock

    def _words(self, programs: Programs) -> list[str]:
        self.clock = FakedClock(self.workspace)
        variables = [f"{name}={value}" for name, value in self.clock.environment.items()]
        return ["env", *variables, *super()._words(programs)]


@contextmanager
def faked_postgresql() -> Iterator[FakedPostgreSQL]:
    """Yield a private server that has not been started.

    Its `admin` raises Unavailable where there is no PostgreSQL or no libfaketime.
    """
    with Workspace() as workspace, pytest.MonkeyPatch.context() as environment:
        # The clock of a server that somebody named in the environment cannot be set.
        environment.delenv(PostgreSQL.variable, raising=False)
        yield FakedPostgreSQL(workspace)
