"""How long a lease lasts in the nights in which the clocks are put, on every database.

`python -m tests.zones` runs and prints all of it: for each zone, database and kind of column, the
minutes by which a claim, an extension and a delay lasted longer than was asked.

MySQL and MariaDB have a clock that a session sets; PostgreSQL and SQLite run by libfaketime's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal
from zoneinfo import ZoneInfo

import sqlalchemy as sa
from sqlalchemy import Column, DateTime, String, event
from sqlalchemy.dialects import mysql
from sqlalchemy.pool import NullPool

from atomic_claim import JobTable, claim_jobs, extend_jobs, fail_jobs
from tests.databases import KINDS, NAMES, Database, PostgreSQLDatabase
from tests.faked_time import FakedClock, FakedPostgreSQL, faked_postgresql, set_clock
from tests.jobs import ids, job_table, rows
from tests.processes import Workspace

REPOSITORY: Final = Path(__file__).parent.parent
ALL_ZONES: Final = ("Europe/Berlin", "America/New_York", "Australia/Lord_Howe")
HALF_AN_HOUR, FIVE_MINUTES, MINUTE = (timedelta(minutes=n) for n in (30, 5, 1))
SECOND = timedelta(seconds=1)
WAYS: Final = ("claim", "extend", "retry")

LEGEND: Final = """\
Minutes by which a lease by claim_jobs (c) or extend_jobs (e), or a delay by fail_jobs (r), lasted
longer than asked; - where it was shorter. It begins
  S  a minute before the gap in spring, for half an hour
  O  a minute before the hour that comes twice, for half an hour
  W  a minute after the beginning of that hour, for five minutes
  B  a minute before the clocks are put back, for half an hour
  A  a minute after that, for half an hour
"""

Excesses = dict[str, dict[str, "int | None"]]


def chosen_zones() -> list[str]:
    """Return the zones that ATOMIC_CLAIM_ZONES names: separated by commas, `all`, or Berlin."""
    named = os.environ.get("ATOMIC_CLAIM_ZONES", "Europe/Berlin")
    return list(ALL_ZONES) if named == "all" else named.split(",")


def changes(zone: str) -> Iterator[tuple[datetime, timedelta, timedelta]]:
    """Find when the clocks were put in 2024, and the offsets from UTC before and after."""
    step, at = HALF_AN_HOUR, datetime(2024, 1, 1, tzinfo=UTC)
    while at.year == 2024:
        before, after = (
            moment.astimezone(ZoneInfo(zone)).utcoffset() for moment in (at, at + step)
        )
        assert before is not None
        assert after is not None
        at += step
        if before != after:
            yield at, before, after


def spring(zone: str) -> datetime:
    """Return when the clocks were put forward."""
    return next(at for at, before, after in changes(zone) if after > before)


def autumn(zone: str) -> tuple[datetime, timedelta]:
    """Return when the clocks were put back, and by how much."""
    return next((at, before - after) for at, before, after in changes(zone) if after < before)


def leases(zone: str) -> dict[str, tuple[datetime, timedelta]]:
    """Return when the leases begin, and how long they are."""
    forward, (back, overlap) = spring(zone), autumn(zone)
    return {
        "spring": (forward - MINUTE, HALF_AN_HOUR),
        # It ends at a time on the wall that comes twice.
        "overlap": (back - overlap - MINUTE, HALF_AN_HOUR),
        "within": (back - overlap + MINUTE, FIVE_MINUTES),
        # It ends at a time on the wall that has been.
        "autumn": (back - MINUTE, HALF_AN_HOUR),
        "after": (back + MINUTE, HALF_AN_HOUR),
    }


@dataclass(frozen=True)
class TimeColumn:
    """A kind of column for times, and how the table is declared for it.

    Attributes:
        exact: whether it tells an hour from the same one after the clocks were put back.
    """

    type: Any
    exact: bool
    naive_times: Literal["server", "utc"] | None = None
    text_times: str | None = None


INNODB_COLUMNS: Final = {
    "DATETIME, server": TimeColumn(mysql.DATETIME(fsp=6), exact=False, naive_times="server"),
    "DATETIME, utc": TimeColumn(mysql.DATETIME(fsp=6), exact=True, naive_times="utc"),
    "TIMESTAMP": TimeColumn(mysql.TIMESTAMP(fsp=6), exact=False, naive_times="server"),
}
COLUMNS: Final[dict[str, dict[str, TimeColumn]]] = {
    "mysql": INNODB_COLUMNS,
    "mariadb": INNODB_COLUMNS,
    "postgresql": {
        "TIMESTAMP, server": TimeColumn(DateTime(), exact=False, naive_times="server"),
        "TIMESTAMP, utc": TimeColumn(DateTime(), exact=True, naive_times="utc"),
        "TIMESTAMPTZ": TimeColumn(DateTime(timezone=True), exact=True),
    },
    "sqlite": {
        "DateTime, server": TimeColumn(DateTime(), exact=False, naive_times="server"),
        "DateTime, utc": TimeColumn(DateTime(), exact=True, naive_times="utc"),
        "text": TimeColumn(String(40), exact=True, text_times="%Y-%m-%dT%H:%M:%fZ"),
    },
}


class Night:
    """A job table in a database whose clock is set.

    Args:
        engine: an engine with sessions in the zone.
        column: the kind of its lease and of its due time.
        at: what sets the clock.

    Attributes:
        engine: the engine.
        jobs: the table.
        at: what sets the clock.
    """

    def __init__(
        self, engine: sa.Engine, column: TimeColumn, at: Callable[[datetime], None]
    ) -> None:
        self.engine = engine
        self.at = at
        table = job_table(
            Column("lease_until", column.type, nullable=True),
            Column("run_at", column.type, nullable=True),
            Column("claim_token", String(32)),
        )
        self.jobs = JobTable(
            table,
            state="processing",
            lease="lease_until",
            due="run_at",
            token="claim_token",
            naive_times=column.naive_times,
            text_times=column.text_times,
        )
        table.metadata.drop_all(engine)
        table.metadata.create_all(engine)

    def is_free(self, moment: datetime) -> bool:
        """Check whether the row could be claimed, and leave it as it is."""
        self.at(moment)
        with self.engine.connect() as connection:
            return ids(claim_jobs(connection, self.jobs)) == [1]

    def hold(self, way: str, moment: datetime, length: timedelta) -> None:
        """Have a fresh row held for a while by a claim, an extension or a later attempt."""
        self.at(moment)
        with self.engine.begin() as connection:
            connection.execute(sa.delete(self.jobs.table))
            connection.execute(sa.insert(self.jobs.table), rows(1))
        claim = claim_jobs(self.engine, self.jobs, lease=length if way == "claim" else SECOND)
        assert ids(claim) == [1]
        if way == "extend":
            extend_jobs(self.engine, claim, lease=length)
        if way == "retry":
            fail_jobs(self.engine, claim, retry=length)

    def excess(
        self, way: str, moment: datetime, length: timedelta, overlap: timedelta
    ) -> int | None:
        """Return the minutes that a lease lasted too long; less than none if it was short.

        None stands for more than the overlap.
        """
        self.hold(way, moment, length)
        end = moment + length
        for early in (MINUTE, length / 2, length - SECOND):
            if self.is_free(moment + early):
                return -((length - early) // MINUTE) - 1
        if self.is_free(end + SECOND):
            return 0
        return overlap // MINUTE if self.is_free(end + overlap + SECOND) else None

    def excesses(self, zone: str) -> Excesses:
        """Return the excess of each way at each of the zone's leases."""
        _, overlap = autumn(zone)
        return {
            way: {name: self.excess(way, *lease, overlap) for name, lease in leases(zone).items()}
            for way in WAYS
        }


def allowed(zone: str, column: TimeColumn) -> Excesses:
    """Return what the excesses of a column have to be."""
    _, overlap = autumn(zone)
    autumnal = 0 if column.exact else overlap // MINUTE
    expected = {"spring": 0, "overlap": 0, "within": 0, "autumn": autumnal, "after": 0}
    return {way: dict(expected) for way in WAYS}


def _add_zone(engine: sa.Engine, name: str, zone: str) -> None:
    """Tell MySQL or MariaDB of a zone."""
    found = list(changes(zone))
    offsets = [found[0][1], *(after for _, _, after in found)]
    starts = [0, *(int(at.timestamp()) for at, _, _ in found)]
    with engine.begin() as connection:
        run = connection.exec_driver_sql
        run("INSERT INTO mysql.time_zone (use_leap_seconds) VALUES ('N')")
        number = run("SELECT last_insert_id()").scalar_one()
        run("INSERT INTO mysql.time_zone_name VALUES (%s, %s)", (name, number))
        for place, (offset, start) in enumerate(zip(offsets, starts, strict=True)):
            seconds = int(offset.total_seconds())
            kind = (number, place, seconds, 0, "X")
            run("INSERT INTO mysql.time_zone_transition_type VALUES (%s, %s, %s, %s, %s)", kind)
            passing = (number, start, place)
            run("INSERT INTO mysql.time_zone_transition VALUES (%s, %s, %s)", passing)


def innodb_night(database: Database, zone: str, column: TimeColumn) -> Night:
    """Return a night on MySQL or MariaDB, by a name of the zone that no other database has."""
    engine, name, now = database.engine(), f"Test/{database.url.database}/{zone}", 0.0
    _add_zone(engine, name, zone)

    def at(moment: datetime) -> None:
        nonlocal now
        now = moment.timestamp()

    @event.listens_for(engine, "checkout")
    def checkout(connection: Any, _: object, __: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET time_zone = '{name}', timestamp = {now}")

    return Night(engine, column, at)


def postgresql_night(
    database: Database, server: FakedPostgreSQL, zone: str, column: TimeColumn
) -> Night:
    """Return a night on PostgreSQL."""
    engine = database.engine(connect_args={"options": f"-c TimeZone={zone}"})
    return Night(engine, column, server.clock.set)


def sqlite_nights(zone: str) -> dict[str, Excesses]:
    """Return the excesses of each column on SQLite, measured in a process with another clock."""
    with Workspace() as workspace:
        clock = FakedClock(workspace)
        done = subprocess.run(
            [sys.executable, "-m", "tests.zones", "--child", str(clock.file), zone],
            cwd=REPOSITORY,
            env=os.environ | clock.environment | {"TZ": zone},
            check=False,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    found: dict[str, Excesses] = json.loads(done.stdout)
    return found


def _child(file: Path, zone: str) -> dict[str, Excesses]:
    """Return the excesses on SQLite, by this process's clock."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        engine = sa.create_engine(f"sqlite:///{folder}/jobs.sqlite", poolclass=NullPool)
        for name, column in COLUMNS["sqlite"].items():
            night = Night(engine, column, lambda moment: set_clock(file, moment))
            found[name] = night.excesses(zone)
    return found


def server_nights(name: str, zone: str, stack: ExitStack) -> dict[str, Excesses]:
    """Return the excesses of each column on a server of this run's own."""
    found = {}
    if name == "postgresql":
        server = stack.enter_context(faked_postgresql())
        for label, column in COLUMNS[name].items():
            with PostgreSQLDatabase(server) as database:
                found[label] = postgresql_night(database, server, zone, column).excesses(zone)
        return found
    kind, database_kind = KINDS[name]
    own = kind(stack.enter_context(Workspace()))
    for label, column in COLUMNS[name].items():
        with database_kind(own) as database:
            found[label] = innodb_night(database, zone, column).excesses(zone)
    return found


def _cell(minutes: int | None) -> str:
    return "more" if minutes is None else f"{minutes:+d}" if minutes else "0"


def line(zone: str, database: str, column: str, cells: Mapping[str, Any]) -> str:
    """Return a line of the table."""
    texts = [_cell(cells[way][at]) for way in WAYS for at in cells[way]]
    return f"| {zone:<19} | {database:<10} | {column:<17} | " + " | ".join(
        f"{text:>4}" for text in texts
    )


def main() -> int:
    """Print the table; the exit code is 1 if a lease was shorter or longer than it may be."""
    parser = argparse.ArgumentParser(prog="python -m tests.zones", description=__doc__)
    parser.add_argument("zones", nargs="*", help="the zones (default: all three)")
    parser.add_argument("--child", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        sys.stdout.write(json.dumps(_child(given.child, given.zones[0])))
        return 0
    letters = " | ".join(f"{way[0]} {letter:>2}" for way in WAYS for letter in "SOWBA")
    out = sys.stdout
    out.write(f"{LEGEND}\n| {'zone':<19} | {'database':<10} | {'column':<17} | {letters}\n")
    wrong = 0
    for zone in given.zones or ALL_ZONES:
        for name in NAMES:
            with ExitStack() as stack:
                all_found = (
                    sqlite_nights(zone) if name == "sqlite" else server_nights(name, zone, stack)
                )
            for label, found in all_found.items():
                out.write(f"{line(zone, name, label, found)}\n")
                out.flush()
                wrong += found != allowed(zone, COLUMNS[name][label])
    out.write(f"\n{wrong} of the lines are not as they have to be\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
