"""Trap 16: the database's clock is the one that counts, and the right one of its clocks."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, DateTime
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import DataError

from atomic_claim import AmbiguousTable, ClaimError, JobTable, claim_jobs, claim_statement
from tests.databases import Database
from tests.jobs import BINDS, bound, fill, ids, job_table, rows, taken

ZONES = {"Tokyo": ("Asia/Tokyo", "+09:00"), "New York": ("America/New_York", "-05:00")}
# What a column without a zone holds, and how it is said to the database.
CLOCKS = {
    ("postgresql", "utc"): "timezone('UTC', clock_timestamp())",
    ("postgresql", "server"): "CAST(clock_timestamp() AS timestamp)",
    ("mysql", "utc"): "UTC_TIMESTAMP(6)",
    ("mysql", "server"): "NOW(6)",
    ("mariadb", "utc"): "UTC_TIMESTAMP(6)",
    ("mariadb", "server"): "NOW(6)",
}
MINUTE, FIVE_HOURS = timedelta(minutes=1), timedelta(hours=5)
ISO = "%Y-%m-%dT%H:%M:%fZ"

in_both_zones = pytest.mark.parametrize("zone", ZONES)
on_servers = pytest.mark.databases("postgresql", "mysql", "mariadb")
in_either_sense = pytest.mark.parametrize("sense", ["utc", "server"])


def zoned(database: Database, zone: str) -> sa.Engine:
    """Create an engine whose sessions are in a time zone."""
    name, offset = ZONES[zone]
    if database.name == "postgresql":
        return database.engine(connect_args={"options": f"-c TimeZone={name}"})
    return database.engine(connect_args={"init_command": f"SET time_zone = '{offset}'"})


def now(database: Database, engine: sa.Engine, sense: str) -> datetime:
    """Return the database's clock as a column without a zone would store it."""
    with engine.connect() as connection:
        found = connection.scalar(sa.text(f"SELECT {CLOCKS[database.name, sense]}"))
    assert isinstance(found, datetime)
    return found


def timed_table(type_: Any = DateTime, *more: Any) -> sa.Table:
    """Build a job table with columns for a due time, a stamp and a lease."""
    return job_table(
        Column("wait_until", type_, nullable=True),
        Column("updated_at", type_, nullable=True),
        Column("lease_until", type_, nullable=True),
        Column("claim_token", sa.String(32)),
        *more,
    )


def fill_due(engine: sa.Engine, table: sa.Table, instant: Any) -> None:
    """One row due a minute ago, one in a minute, one in five hours, and one at any time."""
    due = [instant - MINUTE, instant + MINUTE, instant + FIVE_HOURS, None]
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        for row, wait_until in zip(rows(4), due, strict=True):
            connection.execute(table.insert().values(row | {"wait_until": wait_until}))


def check_asked(engine: sa.Engine, table: sa.Table, role: str) -> None:
    """No claim is made before it is said what the column's times mean."""
    fill(engine, table, 3)
    for kind in BINDS:
        with bound(engine, kind) as bind, pytest.raises(ClaimError) as raised:
            claim_jobs(bind, table, 1)
        for words in (f"'{role}'", 'naive_times="utc"', 'naive_times="server"', "time zone is"):
            assert words in str(raised.value)
    assert taken(engine, table) == []


@in_both_zones
@on_servers
def test_times_without_a_zone_have_to_be_declared(database: Database, zone: str) -> None:
    """Whatever the claim compares or writes, it asks what it means before anything is written."""
    engine = zoned(database, zone)
    for role in ("wait_until", "updated_at", "lease_until"):
        more = (Column(role, DateTime), Column("claim_token", sa.String(32)))
        check_asked(engine, job_table(*more, name=f"jobs_{role}"), role)


@on_servers
def test_a_claims_time_beside_a_flag_has_to_be_declared(database: Database) -> None:
    """A `locked_at` that the claim writes beside `processing` has to be declared too."""
    table = job_table(Column("locked_at", DateTime))
    check_asked(zoned(database, "Tokyo"), table, "locked_at")


def declared(table: sa.Table, **said: Any) -> JobTable:
    """Declare the table with all of its times."""
    return JobTable(
        table,
        state="processing",
        due="wait_until",
        stamps="updated_at",
        lease="lease_until",
        token="claim_token",
        **said,
    )


def check_claimed(engine: sa.Engine, table: Any, instant: datetime) -> None:
    """Assert that rows due at this instant are claimed, stamped and leased for five hours."""
    claimed = claim_jobs(engine, table, 4, lease=FIVE_HOURS)
    assert ids(claimed) == [1, 4]
    for job in claimed:
        assert abs(job.updated_at - instant) < MINUTE
        assert abs(job.lease_until - FIVE_HOURS - instant) < MINUTE


@pytest.mark.databases("postgresql")
def test_a_zone_set_later_counts(database: Database) -> None:
    """A transaction that sets its time zone by itself is asked too."""
    engine, table = database.engine(), job_table(Column("wait_until", DateTime))
    fill(engine, table, 3)
    with engine.connect() as connection:
        assert ids(claim_jobs(connection, table, 1)) == [1]
        connection.execute(sa.text("SET LOCAL TIME ZONE 'Asia/Tokyo'"))
        with pytest.raises(ClaimError, match="'Asia/Tokyo'"):
            claim_jobs(connection, table, 1)


@pytest.mark.databases("mysql", "mariadb")
def test_a_zone_set_later_counts_on_innodb(database: Database) -> None:
    """A time zone that is set later in a session counts on MySQL and MariaDB too."""
    engine, table = database.engine(), job_table(Column("wait_until", DateTime))
    fill(engine, table, 3)
    with engine.connect() as connection:
        assert ids(claim_jobs(connection, table, 1)) == [1]
        connection.execute(sa.text("SET time_zone = '+09:00'"))
        with pytest.raises(ClaimError, match=r"\+9 h from UTC"):
            claim_jobs(connection, table, 1)


@pytest.mark.databases("postgresql")
def test_the_construct_has_to_be_declared_too(database: Database) -> None:
    """The construct, executed by the caller in another zone, is not taken to mean UTC."""
    engine, table = zoned(database, "Tokyo"), job_table(Column("wait_until", DateTime))
    fill(engine, table, 3)
    with engine.begin() as connection, pytest.raises(DataError, match="naive_times"):
        connection.execute(claim_statement(table, 1))


@pytest.mark.databases("mysql", "mariadb")
def test_a_zone_that_the_database_drops_has_to_be_declared(database: Database) -> None:
    """`DateTime(timezone=True)` is a DATETIME here, which has no zone."""
    engine, table = (
        zoned(database, "Tokyo"),
        job_table(Column("wait_until", DateTime(timezone=True))),
    )
    fill(engine, table, 3)
    with pytest.raises(ClaimError, match="naive_times"):
        claim_jobs(engine, table, 1)


@in_either_sense
@in_both_zones
@on_servers
def test_what_is_due_and_written_in_a_zone(database: Database, zone: str, sense: str) -> None:
    """A row due a minute ago is claimed, one due in five hours is not, and stamps agree."""
    engine, table = zoned(database, zone), timed_table()
    instant = now(database, engine, sense)
    fill_due(engine, table, instant)
    check_claimed(engine, declared(table, naive_times=sense), instant)


def aware(database: Database) -> Any:
    """Return the type that stores points in time, independent of the session's zone."""
    return DateTime(timezone=True) if database.name == "postgresql" else mysql.TIMESTAMP(fsp=6)


@in_both_zones
@on_servers
def test_points_in_time_need_no_declaration(database: Database, zone: str) -> None:
    """`timestamptz` and TIMESTAMP know what they mean, compared and written."""
    engine, table = zoned(database, zone), timed_table(aware(database))
    with engine.connect() as connection:
        instant = connection.scalar(sa.select(sa.func.now()))
    fill_due(engine, table, instant)
    check_claimed(engine, table, instant)


@in_both_zones
@on_servers
def test_a_plain_comparison_in_a_zone(database: Database, zone: str) -> None:
    """The twin: by `now()`, in Tokyo what is due in five hours is due, in New York nothing is."""
    engine, table = zoned(database, zone), timed_table()
    fill_due(engine, table, now(database, engine, "utc"))
    due = sa.select(table.c.id).where(table.c.wait_until <= sa.func.now()).order_by(table.c.id)
    with engine.connect() as connection:
        found = list(connection.scalars(due))
    assert found == {"Tokyo": [1, 2, 3], "New York": []}[zone]


def long_transaction(engine: sa.Engine, table: sa.Table) -> tuple[sa.Connection, datetime]:
    """Begin a transaction and return it with the due time of a row that was added later."""
    connection = engine.connect()
    begun = connection.scalar(sa.select(sa.func.now()))
    with engine.begin() as producer:
        due = producer.scalar(sa.select(sa.func.clock_timestamp()))
        producer.execute(table.insert().values(rows(1)[0] | {"wait_until": due}))
    assert begun < due
    return connection, due


@pytest.mark.databases("postgresql")
def test_what_falls_due_during_a_transaction_is_claimed(database: Database) -> None:
    """In a long transaction a row is due that was not when the transaction began."""
    engine, table = database.engine(), timed_table(DateTime(timezone=True))
    table.metadata.create_all(engine)
    connection, due = long_transaction(engine, table)
    with connection:
        (job,) = claim_jobs(connection, table, 1)
        assert job.wait_until == due < job.updated_at


@pytest.mark.databases("postgresql")
def test_a_lease_in_a_long_transaction_is_whole(database: Database) -> None:
    """A lease as short as the transaction is old runs from the claim, and is not born expired."""
    engine, table = database.engine(), timed_table(DateTime(timezone=True))
    table.metadata.create_all(engine)
    connection, _ = long_transaction(engine, table)
    with connection:
        age = connection.scalar(sa.text("SELECT clock_timestamp() - now()"))
        before = connection.scalar(sa.select(sa.func.clock_timestamp()))
        (job,) = claim_jobs(connection, table, 1, lease=age)
        assert job.lease_until >= before + age


@pytest.mark.databases("postgresql")
def test_now_is_the_start_of_the_transaction(database: Database) -> None:
    """The twin: by `now()` the row is not due, and the lease has run out when it is written."""
    engine, table = database.engine(), timed_table(DateTime(timezone=True))
    table.metadata.create_all(engine)
    connection, _ = long_transaction(engine, table)
    due = sa.select(table.c.id).where(table.c.wait_until <= sa.func.now())
    with connection:
        assert connection.execute(due).all() == []
        age = connection.scalar(sa.text("SELECT clock_timestamp() - now()"))
        lease_until = table.update().values(lease_until=sa.func.now() + age)
        connection.execute(lease_until)
        expired = sa.select(table.c.id).where(table.c.lease_until < sa.func.clock_timestamp())
        assert connection.scalars(expired).all() == [1]


@pytest.fixture
def in_zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Put the process into a time zone, which is SQLite's local one."""
    zone: str = request.param
    monkeypatch.setenv("TZ", ZONES[zone][0])
    time.tzset()
    yield zone
    monkeypatch.undo()
    time.tzset()


in_both_processes = pytest.mark.parametrize("in_zone", ZONES, indirect=True)


@pytest.mark.parametrize("sense", [None, "utc", "server"])
@in_both_processes
@pytest.mark.databases("sqlite")
def test_what_is_due_on_sqlite(database: Database, in_zone: str, sense: Any) -> None:
    """SQLite's times are UTC unless they are declared to be the process's own."""
    assert in_zone in ZONES
    engine, table = database.engine(), timed_table()
    instant = datetime.now() if sense == "server" else datetime.now(UTC).replace(tzinfo=None)  # noqa: DTZ005
    fill_due(engine, table, instant)
    check_claimed(engine, declared(table, naive_times=sense), instant)


@pytest.mark.databases("sqlite")
def test_what_is_due_this_second_is_claimed_on_sqlite(database: Database) -> None:
    """As SQLAlchemy stores them, a second ago and the beginning of this second are due."""
    engine, table = database.engine(), timed_table()
    table.metadata.create_all(engine)
    this_second = datetime.now(UTC).replace(microsecond=0, tzinfo=None)
    with engine.begin() as connection:
        for row, ago in zip(rows(2), (0, 1), strict=True):
            due = this_second - timedelta(seconds=ago)
            connection.execute(table.insert().values(row | {"wait_until": due}))
    assert ids(claim_jobs(engine, table, 2)) == [1, 2]


@pytest.mark.databases("sqlite")
def test_what_is_written_is_as_long_as_what_is_stored_on_sqlite(database: Database) -> None:
    """Stamps and leases have as many digits as SQLAlchemy's own, so that texts compare as times."""
    engine, table = database.engine(), timed_table()
    fill_due(engine, table, datetime.now(UTC).replace(microsecond=0, tzinfo=None))
    claim_jobs(engine, table, 1, lease=FIVE_HOURS)
    columns = (table.c.wait_until, table.c.updated_at, table.c.lease_until)
    lengths = sa.select(*(sa.func.length(sa.type_coerce(c, sa.Text)) for c in columns))
    with engine.connect() as connection:
        assert connection.execute(lengths.where(table.c.id == 1)).one() == (26, 26, 26)


@pytest.mark.databases("sqlite")
def test_current_timestamp_is_shorter_than_what_is_stored(database: Database) -> None:
    """The twin: at its very time a row is not due, since `20:00:00.000000` is a longer text."""
    engine, table = database.engine(), timed_table()
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        row = rows(1)[0] | {"wait_until": datetime(2024, 1, 1, 20)}  # noqa: DTZ001
        connection.execute(table.insert().values(row))
        # What CURRENT_TIMESTAMP would have been at that time.
        then = sa.func.datetime("2024-01-01T20:00:00")
        assert connection.scalar(sa.select(then)) == "2024-01-01 20:00:00"
        assert (
            connection.execute(sa.select(table.c.id).where(table.c.wait_until <= then)).all() == []
        )


def iso_table(engine: sa.Engine) -> sa.Table:
    """Create a table with Payload's text times: due a minute ago, in a minute, in five hours."""
    table = timed_table(sa.Text)
    table.metadata.create_all(engine)
    instant = datetime.now(UTC)
    with engine.begin() as connection:
        for row, due in zip(rows(3), (-MINUTE, MINUTE, FIVE_HOURS), strict=True):
            text = (instant + due).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            connection.execute(table.insert().values(row | {"wait_until": text}))
    return table


@pytest.mark.databases("sqlite")
def test_text_is_compared_and_written_in_its_own_format(database: Database) -> None:
    """Payload's ISO text is read as it is stored, and stamps and leases are written alike."""
    engine = database.engine()
    table = iso_table(engine)
    (job,) = claim_jobs(engine, declared(table, text_times=ISO), 3, lease=FIVE_HOURS)
    assert job.id == 1
    for text, ahead in ((job.updated_at, timedelta(0)), (job.lease_until, FIVE_HOURS)):
        assert len(text) == len("2024-01-01T20:00:00.000Z")
        assert abs(datetime.fromisoformat(text) - ahead - datetime.now(UTC)) < MINUTE


@pytest.mark.databases("sqlite")
def test_text_of_an_unknown_format_is_refused(database: Database) -> None:
    """Without its format, text is not compared with any clock."""
    engine = database.engine()
    with pytest.raises(AmbiguousTable, match="text_times="):
        JobTable(iso_table(engine), state="processing", due="wait_until")


@pytest.mark.databases("sqlite")
def test_iso_text_is_a_day_off(database: Database) -> None:
    """The twin: what fell due in the morning is not due in the evening, since `T` is after ` `."""
    engine = database.engine()
    table = iso_table(engine)
    with engine.begin() as connection:
        connection.execute(table.update().values(wait_until="2024-01-01T06:00:00.000Z"))
        for then, due in (("2024-01-01 23:59:59", []), ("2024-01-02 00:00:00", [1, 2, 3])):
            query = sa.select(table.c.id).where(table.c.wait_until <= sa.func.datetime(then))
            assert connection.scalars(query).all() == due
