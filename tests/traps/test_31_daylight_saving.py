"""Trap 31: seconds that are added to the clock on the wall, in the night in which it is put.

The zones are those of the environment variable ATOMIC_CLAIM_ZONES, separated by commas, or `all`;
Europe/Berlin without it. `python -m tests.zones` prints how long each lease lasts.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import DateTime

from tests.conftest import skip_or_fail
from tests.databases import Database, PostgreSQLDatabase
from tests.debian import PackageError
from tests.faked_time import FakedPostgreSQL, faked_postgresql
from tests.servers import Unavailable
from tests.zones import (
    COLUMNS,
    INNODB_COLUMNS,
    MINUTE,
    SECOND,
    Night,
    TimeColumn,
    allowed,
    chosen_zones,
    innodb_night,
    postgresql_night,
    spring,
    sqlite_nights,
)

pytestmark = pytest.mark.once
INNODB = pytest.mark.databases("mysql", "mariadb")
in_each_zone = pytest.mark.parametrize("zone", chosen_zones())


@pytest.fixture(scope="module")
def faked_server() -> Iterator[FakedPostgreSQL]:
    """Yield PostgreSQL by a clock that the test sets, or skip the test."""
    with faked_postgresql() as server:
        reason = ""
        try:
            server.admin.connect().close()
        except Unavailable as error:
            reason = str(error)
        if reason:
            skip_or_fail(reason)
        yield server


def check(night: Night, zone: str, column: TimeColumn) -> None:
    """Check how long the leases of a night last."""
    assert night.excesses(zone) == allowed(zone, column)


@in_each_zone
@pytest.mark.parametrize("column", INNODB_COLUMNS)
@INNODB
def test_nights_on_innodb(database: Database, zone: str, column: str) -> None:
    """A lease or a delay lasts what was asked across the gap, and no less across the overlap."""
    kind = INNODB_COLUMNS[column]
    check(innodb_night(database, zone, kind), zone, kind)


@in_each_zone
@pytest.mark.parametrize("column", COLUMNS["postgresql"])
def test_nights_on_postgresql(faked_server: FakedPostgreSQL, zone: str, column: str) -> None:
    """Likewise, on a server whose clock is libfaketime's."""
    kind = COLUMNS["postgresql"][column]
    with PostgreSQLDatabase(faked_server) as database:
        check(postgresql_night(database, faked_server, zone, kind), zone, kind)


@in_each_zone
def test_nights_on_sqlite(zone: str) -> None:
    """Likewise, in a process whose clock is libfaketime's."""
    try:
        found, reason = sqlite_nights(zone), ""
    except PackageError as error:
        found, reason = {}, str(error)
    if reason:
        skip_or_fail(reason)
    assert found == {name: allowed(zone, kind) for name, kind in COLUMNS["sqlite"].items()}


def wall_trap(night: Night, zone: str, wall: str, now: str) -> None:
    """Check that half an hour on the wall, from a minute before the gap, is over after a minute."""
    night.at(spring(zone) - MINUTE)
    with night.engine.connect() as connection:
        until = connection.exec_driver_sql(wall).scalar_one()
    night.at(spring(zone) + SECOND)
    with night.engine.connect() as connection:
        current = connection.exec_driver_sql(now).scalar_one()
    # Where the gap is half an hour, it is over at that very moment.
    assert until <= current + SECOND


@in_each_zone
@INNODB
def test_seconds_added_to_the_clock_on_the_wall(database: Database, zone: str) -> None:
    """The trap on MySQL and MariaDB."""
    night = innodb_night(database, zone, INNODB_COLUMNS["DATETIME, server"])
    wall = "SELECT TIMESTAMPADD(MINUTE, 30, CURRENT_TIMESTAMP(6))"
    wall_trap(night, zone, wall, "SELECT CURRENT_TIMESTAMP(6)")


@in_each_zone
def test_an_interval_added_to_a_local_timestamp(faked_server: FakedPostgreSQL, zone: str) -> None:
    """The trap on PostgreSQL: its LOCALTIMESTAMP knows no zone."""
    with PostgreSQLDatabase(faked_server) as database:
        column = COLUMNS["postgresql"]["TIMESTAMP, server"]
        night = postgresql_night(database, faked_server, zone, column)
        wall_trap(
            night, zone, "SELECT LOCALTIMESTAMP + interval '30 minutes'", "SELECT LOCALTIMESTAMP"
        )


@INNODB
def test_a_lease_without_fractions(database: Database) -> None:
    """Trap 32: a lease is rounded up, where the column has whole seconds."""
    column = TimeColumn(DateTime(), exact=False, naive_times="server")
    night = innodb_night(database, "Europe/Berlin", column)
    moment = datetime(2024, 6, 1, tzinfo=UTC) + timedelta(seconds=0.9)
    for way in ("claim", "extend"):
        night.hold(way, moment, SECOND)
        assert not night.is_free(moment + SECOND - timedelta(milliseconds=10))
        assert night.is_free(moment + 2.5 * SECOND)
