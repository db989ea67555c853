"""Trap 31: seconds that are added to the clock on the wall, in the night in which it is put.

The zones are those of the environment variable ATOMIC_CLAIM_ZONES, separated by commas, such as
``America/New_York,Australia/Lord_Howe``; Europe/Berlin without it.
"""

import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, DateTime, String, event
from sqlalchemy.dialects import mysql

from atomic_claim import JobTable, claim_jobs, extend_jobs, fail_jobs
from tests.databases import Database
from tests.jobs import ids, job_table, rows

pytestmark = pytest.mark.once
ZONES = os.environ.get("ATOMIC_CLAIM_ZONES", "Europe/Berlin").split(",")
INNODB = pytest.mark.databases("mysql", "mariadb")
HALF_AN_HOUR, FIVE_MINUTES, MINUTE = (timedelta(minutes=n) for n in (30, 5, 1))
SECOND = timedelta(seconds=1)
COLUMNS: dict[str, tuple[Any, Any]] = {
    "DATETIME, server": (mysql.DATETIME(fsp=6), "server"),
    "DATETIME, utc": (mysql.DATETIME(fsp=6), "utc"),
    "TIMESTAMP": (mysql.TIMESTAMP(fsp=6), "server"),
}

in_each_zone = pytest.mark.parametrize("zone", ZONES)
each_column = pytest.mark.parametrize("column", COLUMNS)


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


def add_zone(database: Database, zone: str) -> str:
    """Tell the server of a zone, by a name that no other one has, and return the name."""
    name = f"Test/{database.url.database}/{zone}"
    found = list(changes(zone))
    offsets = [found[0][1], *(after for _, _, after in found)]
    moments = [0, *(int(at.timestamp()) for at, _, _ in found)]
    with database.engine().begin() as connection:
        run = connection.exec_driver_sql
        run("INSERT INTO mysql.time_zone (use_leap_seconds) VALUES ('N')")
        number = run("SELECT last_insert_id()").scalar_one()
        run("INSERT INTO mysql.time_zone_name VALUES (%s, %s)", (name, number))
        for place, (offset, moment) in enumerate(zip(offsets, moments, strict=True)):
            seconds = int(offset.total_seconds())
            kind = (number, place, seconds, 0, "X")
            run("INSERT INTO mysql.time_zone_transition_type VALUES (%s, %s, %s, %s, %s)", kind)
            passing = (number, moment, place)
            run("INSERT INTO mysql.time_zone_transition VALUES (%s, %s, %s)", passing)
    return name


class Night:
    """A job table on a server whose clock the test sets.

    Attributes:
        engine: an engine with sessions in the zone, at the moment that was set last.
        jobs: the table.
    """

    def __init__(self, database: Database, zone: str, type_: Any, naive_times: Any) -> None:
        self.engine = database.engine()
        table = job_table(
            Column("lease_until", type_, nullable=True),
            Column("run_at", type_, nullable=True),
            Column("claim_token", String(32)),
        )
        self.jobs = JobTable(
            table,
            state="processing",
            lease="lease_until",
            due="run_at",
            token="claim_token",
            naive_times=naive_times,
        )
        table.metadata.create_all(self.engine)
        name, self._now = add_zone(database, zone), 0.0

        @event.listens_for(self.engine, "checkout")
        def checkout(connection: Any, _: object, __: object) -> None:
            with connection.cursor() as cursor:
                cursor.execute(f"SET time_zone = '{name}', timestamp = {self._now}")

    def at(self, moment: datetime) -> None:
        """Set the clock."""
        self._now = moment.timestamp()

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
        if way == "extend":
            extend_jobs(self.engine, claim, lease=length)
        if way == "retry":
            fail_jobs(self.engine, claim, retry=length)


@in_each_zone
@each_column
@INNODB
def test_nights_on_innodb(database: Database, zone: str, column: str) -> None:
    """A lease or a delay lasts what was asked across the gap, and no less across the overlap."""
    night = Night(database, zone, *COLUMNS[column])
    forward, (back, overlap) = spring(zone), autumn(zone)
    longer = timedelta(0) if "utc" in column else overlap
    for way in ("claim", "extend", "retry"):
        for moment, length, more in (
            (forward - MINUTE, HALF_AN_HOUR, timedelta(0)),
            (back - MINUTE, FIVE_MINUTES, longer),
            (back - overlap + MINUTE, FIVE_MINUTES, timedelta(0)),
            (back + MINUTE, FIVE_MINUTES, timedelta(0)),
        ):
            night.hold(way, moment, length)
            free = [night.is_free(moment + each) for each in (MINUTE, length - SECOND)]
            free.append(night.is_free(moment + length + more + SECOND))
            assert free == [False, False, True], (way, moment)


@in_each_zone
@INNODB
def test_seconds_added_to_the_clock_on_the_wall(database: Database, zone: str) -> None:
    """The trap: half an hour from a minute before the gap is over after a minute."""
    night = Night(database, zone, *COLUMNS["DATETIME, server"])
    night.at(spring(zone) - MINUTE)
    with night.engine.connect() as connection:
        wall = "SELECT TIMESTAMPADD(MINUTE, 30, CURRENT_TIMESTAMP(6))"
        until = connection.exec_driver_sql(wall).scalar_one()
    night.at(spring(zone) + SECOND)
    with night.engine.connect() as connection:
        now = connection.exec_driver_sql("SELECT CURRENT_TIMESTAMP(6)").scalar_one()
    # Where the gap is half an hour, it is over at that very moment.
    assert until <= now + SECOND


# The clocks of the others cannot be set, so what they are asked is told another moment.


def clock(
    database: Database, zone: str, monkeypatch: pytest.MonkeyPatch, type_: Any, naive_times: Any
) -> Callable[[datetime, timedelta | None], Any]:
    """Return a function of a moment and an offset that returns what a column would hold."""
    options = {"options": f"-c TimeZone={zone}"} if database.name == "postgresql" else {}
    engine = database.engine(connect_args=options)
    if database.name == "sqlite":
        monkeypatch.setenv("TZ", zone)
        time.tzset()
    token = Column("claim_token", String(32))
    table = job_table(Column("lease_until", type_, nullable=True), token)
    jobs = JobTable(
        table, state="processing", lease="lease_until", token=token, naive_times=naive_times
    )

    def value(moment: datetime, offset: timedelta | None = None) -> Any:
        seconds = None if offset is None else sa.literal(offset.total_seconds(), sa.Float())
        asked = sa.select(jobs.now(jobs.lease, seconds))
        text = str(asked.compile(engine, compile_kwargs={"literal_binds": True}))
        text = text.replace("statement_timestamp()", f"TIMESTAMPTZ '{moment.isoformat()}'")
        text = text.replace("'now'", f"'{moment:%Y-%m-%d %H:%M:%S}'")
        with engine.connect() as connection:
            return connection.exec_driver_sql(text).scalar_one()

    return value


@pytest.fixture
def own_zone() -> Iterator[None]:
    """Have the process in its own time zone again."""
    yield
    time.tzset()


@in_each_zone
@pytest.mark.parametrize("sense", ["server", "utc", "zoned"])
@pytest.mark.databases("postgresql", "sqlite")
def test_nights_elsewhere(
    database: Database,
    zone: str,
    sense: str,
    own_zone: None,  # noqa: ARG001 - comes after monkeypatch
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Likewise on PostgreSQL and SQLite, by the expressions that are written and compared."""
    if sense == "zoned" and database.name == "sqlite":
        pytest.skip("SQLite has no zoned columns")
    naive_times = None if sense == "zoned" else sense
    value = clock(database, zone, monkeypatch, DateTime(timezone=sense == "zoned"), naive_times)
    forward, (back, overlap) = spring(zone), autumn(zone)
    longer = overlap if sense == "server" else timedelta(0)
    for moment, length, more in (
        (forward - MINUTE, HALF_AN_HOUR, timedelta(0)),
        (back - MINUTE, FIVE_MINUTES, longer),
        (back - overlap + MINUTE, FIVE_MINUTES, timedelta(0)),
        (back + MINUTE, FIVE_MINUTES, timedelta(0)),
    ):
        until = value(moment, length)
        over = [value(moment + each, None) >= until for each in (MINUTE, length - SECOND)]
        over.append(value(moment + length + more + SECOND, None) >= until)
        assert over == [False, False, True], moment


@INNODB
def test_a_lease_without_fractions(database: Database) -> None:
    """Trap 32: a lease is rounded up, where the column has whole seconds."""
    night = Night(database, "Europe/Berlin", DateTime(), "server")
    moment = datetime(2024, 6, 1, tzinfo=UTC) + timedelta(seconds=0.9)
    for way in ("claim", "extend"):
        night.hold(way, moment, SECOND)
        assert not night.is_free(moment + SECOND - timedelta(milliseconds=10))
        assert night.is_free(moment + 2.5 * SECOND)
