"""`atomic-claim doctor`: what it finds, where that is so, and that its cures cure."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Boolean, Column, DateTime, Integer, String, Table
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from atomic_claim import JobTable, claim_jobs, complete_jobs, sweep_jobs
from atomic_claim.cli.checks.findings import Reading
from atomic_claim.cli.examination import examine, reading
from atomic_claim.cli.indexes import needed_indexes
from atomic_claim.cli.texts import dialect_of
from atomic_claim.cli.watching import Look, looks
from atomic_claim.job_table import job_table_of
from tests.commands import PASSWORD, REPOSITORY, Command, Ended, address
from tests.databases import Database
from tests.jobs import START, ids, job_table, rows
from tests.statements import sent_by
from tests.waiting import wait_until

pytestmark = pytest.mark.once

INNODB = ("mysql", "mariadb")
SERVERS = ("postgresql", *INNODB)
COMMITTED = "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED"
PLAN = "plan of the claim"
# Of a table without an index, in the database's own words.
SCANS = {
    "sqlite": "SCAN jobs), then a sort of all it reads (USE TEMP B-TREE FOR ORDER BY)",
    "postgresql": "Seq Scan), then a sort of all it reads (a Sort)",
    "mysql": "ALL access), then a sort of all it reads (Using filesort)",
    "mariadb": "ALL access), then a sort of all it reads (Using filesort)",
}


def flags(*more: Any, **options: Any) -> Table:
    """Build a table with a flag for running jobs and one for failed ones."""
    ended = (Column("completed_at", DateTime), Column("has_error", Boolean))
    return job_table(*ended, *more, **options)


jobs = flags()
backwards = JobTable(jobs, state="processing", order=jobs.c.created_at.desc())
rekeyed = JobTable(jobs, state="processing", claimed={"processing": True, "id": 0})
extended = flags(Column("extra", Integer))
statuses = Table(
    "jobs",
    sa.MetaData(),
    Column("id", Integer, primary_key=True),
    Column("status", String(20), nullable=False),
    Column("created_at", DateTime, nullable=False),
    sa.Index("jobs_status", "status"),
)
two_free = JobTable(
    statuses, state="status", free=("new", "again"), claimed="busy", order=statuses.c.created_at
)
retried_jobs = flags(
    Column("run_at", DateTime),
    Column("attempts", Integer),
    Column("lease_until", DateTime),
    Column("claim_token", String(32)),
)
retried = JobTable(
    retried_jobs,
    state="processing",
    done={"completed_at": sa.func.now()},
    failed={"has_error": True},
    order="created_at",
    due="run_at",
    attempts="attempts",
    max_attempts=5,
    lease="lease_until",
    token="claim_token",
    naive_times="utc",
)
stamped = job_table(Column("locked_at", DateTime), Column("updated_at", DateTime))
awkward = Table(
    "it's a 100% :table",
    sa.MetaData(),
    Column("id", Integer, primary_key=True),
    Column("100%", Boolean),
    Column("Done", DateTime),
    Column("created_at", DateTime, nullable=False),
    Column("lease_until", DateTime),
    Column("claim_token", String(32)),
    # For SQLite's planner, which has no statistics.
    sa.Index("by time", "created_at"),
)
leased = JobTable(
    awkward,
    state="100%",
    done={"Done": sa.func.now()},
    order=awkward.c.created_at,
    lease="lease_until",
    token="claim_token",
)
unleased_jobs = flags(
    *(Column(name, DateTime) for name in ("lease_until", "updated_at")),
    Column("claim_token", String(32)),
    Column("attempts", Integer),
)
unleased = JobTable(
    unleased_jobs,
    state="processing",
    failed={"has_error": True},
    attempts="attempts",
    max_attempts=5,
    lease="lease_until",
    token="claim_token",
    stamps="updated_at",
    naive_times="utc",
    unleased=timedelta(hours=1),
)
no_table = object()


class Base(DeclarativeBase):
    """The ground of the mapped classes."""


class Job(Base):
    """A job, with its state."""

    __tablename__ = "jobs"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(10))
    processing: Mapped[bool]
    created_at: Mapped[datetime]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "job"}  # noqa: RUF012


class Mail(Job):
    """A job with columns of its own in a table of its own."""

    __tablename__ = "mails"
    id: Mapped[int] = mapped_column(sa.ForeignKey("jobs.id"), primary_key=True)
    address: Mapped[str] = mapped_column(String(50))
    __mapper_args__ = {"polymorphic_identity": "mail"}  # noqa: RUF012


def doctor(
    command: Command, database: Database, *words: str, table: str = "jobs", **options: str
) -> Ended:
    """Run the doctor on a table; on InnoDB at READ COMMITTED, which it reports as healthy."""
    if database.name in INNODB:
        options = {"init_command": COMMITTED, **options}
    url = database.url.update_query_dict(options).render_as_string(hide_password=False)
    return command("doctor", "--url", url, "--table", table, *words)


def ails(
    command: Command, database: Database, *words: str, table: str = "jobs", **options: str
) -> dict[str, dict[str, Any]]:
    """Return the doctor's findings on the table by the name of the check."""
    ended = doctor(command, database, "--json", *words, table=table, **options)
    assert not ended.err
    said = json.loads(ended.out)
    problems = [each for each in said["findings"] if each["level"] == "problem"]
    assert (ended.code, said["healthy"]) == ((1, False) if problems else (0, True))
    return {each["check"]: each for each in said["findings"]}


def execute(database: Database, statements: Sequence[str]) -> None:
    """Run statements unchanged, each by itself, as a person at a console would."""
    engine = database.engine(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            driver: Any = connection.connection.driver_connection
            driver.cursor().execute(statement)
    engine.dispose()


def printed(text: str) -> list[str]:
    """Return the SQL statements that a user would copy from the screen."""
    return [line.removesuffix(";") for line in text.splitlines() if re.match(r"[A-Z]+ .*;$", line)]


def filled(database: Database, table: Table = jobs, count: int = 50, **values: Any) -> sa.Engine:
    """Create a table of waiting jobs with no indexes but those it declares."""
    engine = database.engine()
    table.create(engine)
    now = datetime.now(UTC).replace(tzinfo=None)
    names = {column.name for column in table.columns}
    given = []
    for row in rows(count, has_error=False, **{"100%": False}):
        created = {"created_at": now + timedelta(seconds=row["id"])}
        given.append({k: v for k, v in (row | created | values).items() if k in names})
    with engine.begin() as connection:
        connection.execute(table.insert(), given)
    if database.name == "sqlite":
        execute(database, ["PRAGMA journal_mode = WAL"])
    return engine


def healthy(database: Database, table: Any = jobs, count: int = 50, **values: Any) -> sa.Engine:
    """Create a table of waiting jobs with the indexes that it needs."""
    engine = filled(database, job_table_of(table).table, count, **values)
    create_indexes(database, job_table_of(table))
    return engine


def create_indexes(database: Database, job_table: JobTable) -> None:
    """Create the indexes that the claims of a declaration need."""
    execute(
        database, [each.create(dialect_of(database.name)) for each in needed_indexes(job_table)]
    )


# --- in general


def test_silent_on_a_healthy_table(database: Database, command: Command) -> None:
    """Where nothing is wrong nothing is said, of a table by its name and of a declared one."""
    engine = healthy(database)
    assert doctor(command, database) == Ended(0, "", "")
    assert doctor(command, database, table="tests.tools.test_doctor:jobs") == Ended(0, "", "")
    # No planner uses an index for so few rows; what it could do with it is what counts.
    with engine.begin() as connection:
        connection.execute(jobs.delete())
    assert doctor(command, database) == Ended(0, "", "")
    ended = doctor(command, database, "--all")
    assert (ended.code, ended.err) == (0, "")
    title = {"sqlite": "SQLite 3", "mysql": "MySQL 9", "mariadb": "MariaDB 1"}
    assert ended.out.startswith(title.get(database.name, "PostgreSQL 1"))
    said = " ".join(ended.out.split())
    assert "jobs: all is well" in said
    assert "state: processing; done: completed_at; failed: has_error; order: created_at" in said
    for words in ("primary key id", "not understood: note", "jobs_claim_free", "stuck rows none"):
        assert words in said


# --- the plan


def test_no_index(database: Database, command: Command) -> None:
    """A scan and a sort are found; the statement on the screen, copied, cures both."""
    filled(database, count=2000)
    plan = ails(command, database)[PLAN]
    assert SCANS[database.name] in plan["found"]
    ended = doctor(command, database)
    assert ended.code == 1
    statements = printed(ended.out)
    assert statements == plan["sql"]
    spec = ("--table", "tests.tools.test_doctor:jobs", "--sql", "--dialect", database.name)
    assert f"{statements[0]};\n" in command("migration", *spec).out
    execute(database, statements)
    assert doctor(command, database) == Ended(0, "", "")


@pytest.mark.parametrize("name", ["almost", "jobs_claim_free"])
def test_an_index_that_cannot_serve(database: Database, command: Command, name: str) -> None:
    """One on another text of the condition, or on the order alone, is named, and is no cure."""
    engine = filled(database, count=2000)
    where = {
        "postgresql": " WHERE processing = false AND completed_at IS NULL AND NOT has_error",
        "sqlite": " WHERE processing = 0 AND completed_at IS NULL AND has_error = 0",
    }.get(database.name, "")
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE INDEX {name} ON jobs (created_at){where}")
    plan = ails(command, database)[PLAN]
    assert f"There, but of no use to it: {name} (created_at)" in plan["found"]
    assert ("has_error" in plan["found"]) is bool(where)
    assert any("DROP" in each for each in plan["sql"]) is (name == "jobs_claim_free")
    execute(database, plan["sql"])
    assert ails(command, database) == {}


@pytest.mark.parametrize("is_old", [True, False])
def test_an_index_of_an_earlier_version(
    database: Database, command: Command, *, is_old: bool
) -> None:
    """One serves as before; doctor notes what passes rows that are not due over."""
    engine = filled(database, retried_jobs, count=2000, attempts=0)
    needed = needed_indexes(retried)
    if is_old:
        needed = [replace(each, passing=()) for each in needed if each.reason != "due"]
    name = "mariadb" if database.name == "mariadb" else engine.dialect.name
    execute(database, [each.create(dialect_of(name)) for each in needed])
    # InnoDB's statistics may still be those of the empty table.
    analyse = "ANALYZE TABLE" if database.name in INNODB else "ANALYZE"
    execute(database, [f"{analyse} {retried_jobs.name}"])
    spec = "tests.tools.test_doctor:retried"
    if is_old:
        found = ails(command, database, table=spec)[PLAN]
        assert found["level"] == "note"
        assert "not due" in found["found"]
        execute(database, found["sql"])
    assert doctor(command, database, table=spec) == Ended(0, "", "")


def words(statement: str) -> str:
    """Return a statement without its limit and without InnoDB's session variables."""
    plain = re.sub(r", @@\w+(, @@?\w+|, 0)?(?=[ \n]+FROM)", "", statement)
    return " ".join(re.sub(r"LIMIT \d+", "LIMIT n", plain).split())


def test_the_plan_is_that_of_the_claim(database: Database, command: Command) -> None:
    """The explained statement is the one that the claim executes, for each declaration."""
    engine = healthy(database)
    hour = timedelta(hours=1)
    texts = {}
    for name in ("jobs", "backwards"):
        given = globals()[name]
        sent = sent_by(engine)
        claim_jobs(engine, given, 10)
        claim = next(each.text for each in sent if "LIMIT" in each.text)
        sent.clear()
        shown = examine(engine, f"tests.tools.test_doctor:{name}", hour, hour)
        explained = [each.text for each in sent if re.match("EXPLAIN(?! UPDATE)", each.text)]
        plain = words(claim)
        assert {words(each).endswith(plain) for each in explained} == {True}
        assert words(str(shown.statement)) == plain
        texts[name] = plain
    assert texts["jobs"] != texts["backwards"]
    plan = ails(command, database, table="tests.tools.test_doctor:backwards")
    assert database.name not in INNODB or "created_at DESC" in plan[PLAN]["sql"][1]
    said = json.loads(
        doctor(command, database, "--json", table="tests.tools.test_doctor:backwards").out
    )
    assert "DESC" in said["statement"]


def test_a_table_with_leases_and_awkward_names(database: Database, command: Command) -> None:
    """Each reason for which a row is free wants an index; the statements bear any name."""
    filled(database, leased.table, count=2000)
    spec = "tests.tools.test_doctor:leased"
    ended = doctor(command, database, table=spec)
    assert ended.code == 1
    statements = printed(ended.out)
    assert len([each for each in statements if "_claim_" in each]) == 2
    assert "the search for leases that have run out" in " ".join(ended.out.split())
    execute(database, statements)
    assert doctor(command, database, table=spec) == Ended(0, "", "")
    with database.engine().begin() as connection:
        few = leased.table.c.id <= 7
        connection.execute(leased.table.update().where(few).values({"100%": None}))
    execute(database, ails(command, database, table=spec)["NULL in a state"]["sql"])
    assert ails(command, database, table=spec) == {}
    # One runs without a lease; of the other it has run out, which brings it back by itself.
    running = leased.table.update().values({"100%": True, "created_at": START})
    with database.engine().begin() as connection:
        connection.execute(running.where(leased.table.c.id <= 2))
        connection.execute(running.where(leased.table.c.id == 2).values(lease_until=START))
    finding = ails(command, database, table=spec)["stuck rows"]
    assert finding["found"].startswith("1 row runs without a lease")
    assert "--add" not in finding["fix"]


@pytest.mark.databases("sqlite", "mariadb")
def test_a_mapped_class_in_several_tables(database: Database, command: Command) -> None:
    """The table that holds the state is the one that is looked at."""
    engine = database.engine()
    Mail.metadata.create_all(engine)
    found = ails(command, database, table="tests.tools.test_doctor:Mail")
    execute(database, found[PLAN]["sql"])
    assert PLAN not in ails(command, database, table="tests.tools.test_doctor:Mail")


@pytest.mark.databases("sqlite")
def test_sqlite_has_to_be_told_what_an_index_is_worth(database: Database, command: Command) -> None:
    """Before ANALYZE it prefers an old index on one column to a purely partial one."""
    filled(database, statuses, 2000, status="new")
    spec = "tests.tools.test_doctor:two_free"
    create, analyse = ails(command, database, table=spec)[PLAN]["sql"]
    execute(database, [create])
    assert ails(command, database, table=spec)[PLAN]["sql"] == [analyse] == ["ANALYZE jobs"]
    execute(database, [analyse])
    assert ails(command, database, table=spec) == {}


@pytest.mark.databases("postgresql")
def test_an_index_that_was_never_finished(database: Database, command: Command) -> None:
    """An index that CREATE INDEX CONCURRENTLY left invalid is dropped before it is rebuilt."""
    engine = healthy(database)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'jobs_claim_free'::regclass"
        )
    plan = ails(command, database)[PLAN]
    assert "was not completed" in plan["fix"]
    assert plan["sql"][0] == "DROP INDEX CONCURRENTLY jobs_claim_free"
    execute(database, plan["sql"])
    assert ails(command, database) == {}


# --- the table


def test_rows_with_null(database: Database, command: Command) -> None:
    """Rows with a NULL are counted if it hides them from every claim or from other queries."""
    table = flags(processing=Column("processing", Boolean))
    engine = healthy(database, table)
    with engine.begin() as connection:
        connection.execute(table.update().where(table.c.id <= 7).values(processing=None))
    assert ids(claim_jobs(engine, table, 3)) == [8, 9, 10]
    finding = ails(command, database)["NULL in a state"]
    assert finding["found"] == "7 rows whose processing is NULL: no claim ever takes them"
    execute(database, finding["sql"])
    with engine.begin() as connection:
        connection.execute(table.update().where(table.c.id <= 2).values(has_error=None))
    finding = ails(command, database)["NULL in a state"]
    assert finding["found"] == "2 rows whose has_error is NULL: the claim takes them"
    assert ids(claim_jobs(engine, table, 1)) == [1]
    execute(database, finding["sql"])
    assert "NULL in a state" not in ails(command, database)
    assert ids(claim_jobs(engine, table, 3)) == [2, 3, 4]


def test_rows_that_look_stuck(database: Database, command: Command) -> None:
    """Rows that were claimed long ago are counted, with the age of the oldest."""
    engine = healthy(database, stamped)
    now = datetime.now(UTC).replace(tzinfo=None)
    with engine.begin() as connection:
        for number, days in ((1, 3), (2, 2), (3, 0)):
            then = now - timedelta(days=days, minutes=1)
            changed = stamped.update().where(stamped.c.id == number)
            connection.execute(changed.values(processing=True, locked_at=then))
    finding = ails(command, database)["stuck rows"]
    assert finding["found"] == "2 rows run without a lease, the oldest claimed 3 days ago"
    later = ails(command, database, "--stuck-after", "30")["stuck rows"]
    assert later["found"].startswith("3 rows run")
    assert ails(command, database, "--stuck-after", str(86400 * 9)) == {}
    words = re.search(r"atomic-claim (.* --release-stuck)", finding["fix"])
    assert words is not None
    ended = command(*words[1].split(), "--yes", "--url", address(database))
    assert (ended.code, ended.err) == (0, "")
    assert ails(command, database) == {}
    assert ids(claim_jobs(engine, stamped, 5)) == [1, 2, 4, 5, 6]
    # Of a loop that writes the state alone.
    with engine.begin() as connection:
        connection.execute(stamped.update().values(processing=True, locked_at=None))
    finding = ails(command, database)["stuck rows"]
    assert (finding["level"], finding["found"]) == (
        "note",
        "50 rows run without a lease; no column says when they were claimed",
    )
    assert finding["sql"] == []


@pytest.mark.databases("sqlite", "mysql")
def test_rows_that_run_since_nobody_knows(database: Database, command: Command) -> None:
    """Without a time of the claim it is a note, by the age of the job."""
    healthy(database, count=3, created_at=START, processing=True)
    finding = ails(command, database)["stuck rows"]
    assert finding["level"] == "note"
    assert re.fullmatch(
        r"3 rows run without a lease, the oldest from [\d,]+ days ago by created_at; "
        "no column says when they were claimed",
        finding["found"],
    )


@pytest.mark.databases("sqlite", "mysql")
def test_spent_rows_that_run_without_a_lease(database: Database, command: Command) -> None:
    """The rows called spent are those that `sweep_jobs` marks as failed."""
    old = {"processing": True, "updated_at": START}
    engine = healthy(database, unleased, 3, attempts=5, **old)
    finding = ails(command, database, table="tests.tools.test_doctor:unleased")["attempts"]
    assert finding["found"] == "3 rows spent"
    assert sweep_jobs(engine, unleased) == 3


def test_foreign_keys_onto_the_table(database: Database, command: Command) -> None:
    """They are found, with the index that they lack; where InnoDB has one, it is the lock."""
    engine = healthy(database)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE logs (id INTEGER PRIMARY KEY, job_id INTEGER, "
            "FOREIGN KEY (job_id) REFERENCES jobs (id) ON DELETE CASCADE)"
        )
    finding = ails(command, database)["foreign keys"]
    assert finding["found"].startswith("logs (job_id)")
    if database.name in INNODB:
        assert "claims pass the job over" in finding["why"]
        return
    execute(database, finding["sql"])
    assert ails(command, database) == {}
    assert "1 onto the table, each with an index" in doctor(command, database, "--all").out


@pytest.mark.databases("mysql", "mariadb")
def test_a_childs_insert_has_claims_pass_its_job_over(database: Database) -> None:
    """A claim skips a job while an INSERT of its child is uncommitted, as the doctor reports."""
    engine = healthy(database)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE logs (id INTEGER PRIMARY KEY, job_id INTEGER, "
            "FOREIGN KEY (job_id) REFERENCES jobs (id))"
        )
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO logs VALUES (1, 1)")
        assert ids(claim_jobs(engine, jobs, 2)) == [2, 3]


def test_without_a_primary_key(database: Database, command: Command) -> None:
    """Every claim is refused; a key is what it takes."""
    engine = database.engine()
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE jobs (processing BOOLEAN NOT NULL, created_at TIMESTAMP NOT NULL)"
        )
    found = ails(command, database)
    assert found["primary key"]["found"] == "none"
    if database.name == "sqlite":
        assert "create a new one" in found["primary key"]["fix"]
        return
    execute(database, found["primary key"]["sql"])
    execute(database, ails(command, database)[PLAN]["sql"])
    assert ails(command, database) == {}


@pytest.mark.databases("postgresql", "mysql", "mariadb")
def test_a_key_beside_columns_of_that_name(database: Database, command: Command) -> None:
    """Where a column has the usual name of a key, the new one gets another."""
    engine = database.engine()
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE jobs (id INTEGER, job_id INTEGER, claim_id INTEGER, id_2 INTEGER, "
            "processing BOOLEAN NOT NULL, created_at TIMESTAMP NOT NULL)"
        )
    execute(database, ails(command, database)["primary key"]["sql"])
    assert "primary key" not in ails(command, database)


@pytest.mark.databases("postgresql", "mysql", "mariadb")
def test_a_key_that_is_only_declared(database: Database, command: Command) -> None:
    """The database is asked, not the declaration."""
    engine = healthy(database)
    drop = "DROP CONSTRAINT jobs_pkey"
    if database.name in INNODB:
        drop = "MODIFY id INTEGER NOT NULL, DROP PRIMARY KEY"
    with engine.begin() as connection:
        connection.exec_driver_sql(f"ALTER TABLE jobs {drop}")
    finding = ails(command, database, table="tests.tools.test_doctor:jobs")["primary key"]
    assert finding["sql"] == ["ALTER TABLE jobs ADD PRIMARY KEY (id)"]
    execute(database, finding["sql"])
    assert ails(command, database, table="tests.tools.test_doctor:jobs") == {}


def test_columns_that_the_database_lacks(database: Database, command: Command) -> None:
    """A migration was not run."""
    healthy(database)
    found = ails(command, database, table="tests.tools.test_doctor:extended")
    assert found["columns"]["found"] == "the database lacks extra"
    execute(database, found["columns"]["sql"])
    assert ails(command, database, table="tests.tools.test_doctor:extended") == {}


@pytest.mark.databases("sqlite")
def test_columns_that_cannot_be_read(database: Database, command: Command) -> None:
    """An ambiguous column is a finding with its declaration; the other checks still run."""
    filled(database, statuses, status="new")
    found = ails(command, database, timeout="0.2")
    assert list(found) == ["meaning of the columns", "busy timeout"]
    assert "which value of 'status' is 'free'?" in str(found)
    assert "JobTable.infer(" in found["meaning of the columns"]["fix"]
    shown = doctor(command, database, "--all", table="jobs", timeout="0.2").out
    assert "the file and its folder can be written" in " ".join(shown.split())


@pytest.mark.databases("sqlite")
def test_a_claim_that_is_refused(database: Database, command: Command) -> None:
    """A declaration that every claim would refuse is found beforehand."""
    healthy(database)
    finding = ails(command, database, table="tests.tools.test_doctor:rekeyed")["claim"]
    assert "part of the primary key" in finding["found"]


# --- PostgreSQL


@pytest.mark.databases("postgresql")
def test_a_table_of_another_schema(database: Database, command: Command) -> None:
    """It is named with its schema, and so do the statements name it."""
    engine = filled(database, count=1)
    with engine.begin() as connection:
        connection.exec_driver_sql('CREATE SCHEMA "Other"')
        connection.exec_driver_sql('ALTER TABLE jobs SET SCHEMA "Other"')
        connection.exec_driver_sql('CREATE TABLE "Other".logs (job int REFERENCES "Other".jobs)')
    assert "no such table" in doctor(command, database).refused()
    found = ails(command, database, table="Other.jobs")
    assert list(found) == ["foreign keys", PLAN]
    execute(database, [*found[PLAN]["sql"], *found["foreign keys"]["sql"]])
    assert doctor(command, database, table="Other.jobs") == Ended(0, "", "")


@pytest.mark.databases("postgresql")
def test_postgresql_isolation(database: Database, command: Command) -> None:
    """A default at which claims conflict is found, and undone where it was set."""
    healthy(database)
    name = database.url.database
    execute(database, [f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'"])
    finding = ails(command, database)["isolation level"]
    assert finding["found"] == "SERIALIZABLE, by database"
    execute(database, finding["sql"])
    assert ails(command, database) == {}
    said = ails(command, database, options="-c default_transaction_isolation=repeatable\\ read")
    assert said["isolation level"]["found"] == "REPEATABLE READ, by client"


def settled(database: Database, engine: sa.Engine) -> None:
    """Have the server count what was done: when a connection ends, if not some seconds later."""
    engine.dispose()
    others = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )
    with database.engine(isolation_level="AUTOCOMMIT").connect() as connection:
        wait_until(lambda: not connection.scalar(others))


@pytest.mark.databases("postgresql")
def test_dead_rows(database: Database, command: Command) -> None:
    """Rows that VACUUM has not come to."""
    engine = healthy(database, count=2000)
    with engine.begin() as connection:
        connection.execute(jobs.update().values(note="changed"))
    settled(database, engine)
    finding = ails(command, database)["dead rows"]
    assert finding["found"] == "2,000 dead rows beside 2,000 live"
    execute(database, finding["sql"])
    assert ails(command, database) == {}


@pytest.mark.databases("postgresql")
def test_a_table_that_was_never_analysed(database: Database, command: Command) -> None:
    """Of one that is no longer small the planner should know something."""
    engine = healthy(database, count=1)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO jobs (id, processing, has_error, created_at) "
            "SELECT g, false, false, now() FROM generate_series(2, 25000) g"
        )
    settled(database, engine)
    finding = ails(command, database)["dead rows"]
    assert "never analysed" in finding["found"]
    execute(database, finding["sql"])
    assert ails(command, database) == {}


@pytest.mark.databases("postgresql")
def test_old_transactions(database: Database, command: Command) -> None:
    """A forgotten snapshot is found by its process, and ended by the cure."""
    engine = healthy(database)
    hanging = database.engine(isolation_level="REPEATABLE READ").connect()
    pid = hanging.scalar(sa.text("SELECT pg_backend_pid()"))
    assert ails(command, database) == {}
    found = ails(command, database, "--transaction-after", "0")
    assert f"pid {pid} (postgres, idle in transaction) for " in str(found)
    execute(database, found["old transactions"]["sql"])
    left = sa.text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid")
    # A transaction would see the same as at its first look for ever.
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        wait_until(lambda: not connection.scalar(left, {"pid": pid}))
    assert ails(command, database, "--transaction-after", "0") == {}
    hanging.invalidate()
    hanging.close()


# --- MySQL and MariaDB


@pytest.mark.databases("mysql", "mariadb")
def test_isolation_of_innodb(database: Database, command: Command) -> None:
    """SERIALIZABLE is a problem, the default is none; the cure is for new connections."""
    engine = healthy(database)
    variable = "transaction_isolation" if database.name == "mysql" else "tx_isolation"
    level = "SET SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE"
    with engine.begin() as connection:
        # Its own reads wait for nobody.
        connection.execute(jobs.update().values(note="held"))
        refused = ails(command, database, init_command=level)["isolation level"]
    assert refused["found"] == "SERIALIZABLE"
    with engine.connect() as connection:
        before = connection.scalar(sa.text(f"SELECT @@GLOBAL.{variable}"))
    assert ails(command, database, init_command="SELECT 1") == {}
    try:
        execute(database, refused["sql"])
        with database.engine().connect() as connection:
            level = str(connection.scalar(sa.text(f"SELECT @@{variable}")))
        assert level.replace("-", " ") == "READ COMMITTED"
    finally:
        execute(database, [f"SET GLOBAL {variable} = '{before}'"])


@pytest.mark.databases("mysql", "mariadb")
def test_a_table_without_row_locks(database: Database, command: Command) -> None:
    """Of another storage engine than InnoDB."""
    healthy(database)
    execute(database, ["ALTER TABLE jobs ENGINE=MyISAM"])
    finding = ails(command, database)["storage engine"]
    assert finding["found"] == "MyISAM"
    execute(database, finding["sql"])
    assert ails(command, database) == {}


@pytest.mark.databases(*SERVERS)
def test_times_without_a_zone(database: Database, command: Command) -> None:
    """A session elsewhere, where the claim would be refused."""
    healthy(database, stamped)
    level = "tx_isolation" if database.name == "mariadb" else "transaction_isolation"
    options = {"init_command": f"SET time_zone = '+09:00', {level} = 'READ-COMMITTED'"}
    if database.name == "postgresql":
        options = {"options": "-c TimeZone=Asia/Tokyo"}
    found = ails(command, database, **options)
    assert list(found) == ["time zone"]
    assert "locked_at, updated_at" in found["time zone"]["found"].replace(
        "updated_at, locked_at", "locked_at, updated_at"
    )


# --- SQLite


@pytest.mark.databases("sqlite")
def test_journal_mode(database: Database, command: Command) -> None:
    """A rollback journal is a note; the file remembers the cure."""
    healthy(database).dispose()
    execute(database, ["PRAGMA journal_mode = DELETE"])
    ended = doctor(command, database)
    assert ended.code == 0
    assert printed(ended.out) == ["PRAGMA journal_mode = WAL"]
    execute(database, printed(ended.out))
    assert doctor(command, database) == Ended(0, "", "")


@pytest.mark.databases("sqlite")
def test_busy_timeout(database: Database, command: Command) -> None:
    """A connection that hardly waits for other writers; the cure is in the URL."""
    healthy(database)
    finding = ails(command, database, timeout="0.2")["busy timeout"]
    assert finding["found"] == "200 ms"
    assert "?timeout=30" in finding["fix"]
    assert ails(command, database, timeout="30") == {}


def test_values_that_are_in_order(database: Database, command: Command) -> None:
    """With --all the settings are shown that are right, and the counts that are low."""
    healthy(database)
    found = json.loads(doctor(command, database, "--json").out)["passed"]
    said = {each["check"]: each["found"] for each in found}
    if database.name == "sqlite":
        assert (said["busy timeout"], said["journal mode"]) == ("5,000 ms", "WAL")
        return
    assert said["isolation level"].replace("-", " ") == "READ COMMITTED"
    if database.name == "postgresql":
        assert re.fullmatch(r"\d+ beside \d+ live", said["dead rows"])
        assert said["autovacuum"] in {"on", "off"}
    else:
        assert (said["strict mode"], said["storage engine"]) == ("on", "InnoDB")


# --- it only reads


def test_its_connection_cannot_write(database: Database) -> None:
    """Whatever it ran, the database would refuse it a change."""
    engine = healthy(database)
    with reading(engine) as connection, pytest.raises(DBAPIError, match=r"(?i)read.?only"):
        connection.execute(jobs.delete())


@contextmanager
def reader(database: Database) -> Iterator[str]:
    """Yield the URL of a user who may only read the table."""
    if database.name == "sqlite":
        # A file that cannot be opened for writing.
        yield f"sqlite:///file:{database.url.database}?mode=ro&uri=true"
        return
    name = f"reader_{database.url.database}"[:32]
    host = "" if database.name == "postgresql" else "@'127.0.0.1'"
    execute(
        database,
        [
            f"CREATE USER {name}{host}"
            + (" PASSWORD " if not host else " IDENTIFIED BY ")
            + f"'{PASSWORD}'",
            f"GRANT SELECT ON jobs TO {name}{host}",
        ],
    )
    url = database.url.set(username=name, password=PASSWORD)
    if host:
        url = url.update_query_dict({"init_command": COMMITTED})
    try:
        yield url.render_as_string(hide_password=False)
    finally:
        execute(database, [f"DROP OWNED BY {name}"] if not host else [])
        execute(database, [f"DROP USER {name}{host}"])


def test_it_only_reads(database: Database, command: Command) -> None:
    """It finds the same with no right but to read, and which right is missing."""
    filled(database, count=2000)
    with reader(database) as url:
        ended = command("doctor", "--url", url, "--table", "jobs")
        assert (ended.code, ended.err) == (1, "")
        assert PASSWORD not in ended.out
        create, *grant = sorted(printed(ended.out), key=lambda each: "GRANT" in each)
        assert len(grant) == (database.name != "sqlite")
        execute(database, [create])
        said = json.loads(command("doctor", "--url", url, "--table", "jobs", "--json").out)
        assert [each["check"] for each in said["findings"]] == ["rights"]
        execute(database, grant)
        writing = url.replace("mode=ro", "mode=rw")
        assert command("doctor", "--url", writing, "--table", "jobs") == Ended(0, "", "")


# --- what it cannot look at


@pytest.mark.databases("sqlite", "postgresql")
def test_what_cannot_be_looked_at(database: Database, command: Command) -> None:
    """No such table, or nothing that is one, is refused by one line."""
    url = ("doctor", "--url", address(database), "--table")
    for table, said in (
        ("nonsuch", "no such table"),
        ("tests.tools.test_doctor:jobs", "the database has no table 'jobs'"),
        ("tests.tools.test_doctor:no_table", "expected a Table, a mapped class or a JobTable"),
        ("tests.tools.test_doctor:nonsuch", "has no 'nonsuch'"),
    ):
        assert said in command(*url, table).refused()


def test_where_nothing_answers(command: Command) -> None:
    """Neither a missing URL nor a dead server has a traceback, or tells the password."""
    assert "Give --url" in command("doctor", "--table", "jobs").refused()
    url = f"postgresql://me:{PASSWORD}@127.0.0.1:1/jobs"
    assert "cannot connect" in command("doctor", "--url", url, "--table", "jobs").refused()


# --- watching


def watched(database: Database, table: Any) -> Iterator[Look]:
    """One look after the other."""
    engine = database.engine()
    with reading(engine) as connection:
        own = job_table_of(table)
        ages = (timedelta(0), timedelta(0))
        yield from looks(Reading(connection, own.table, *ages, job_table=own))


def test_what_is_watched(database: Database) -> None:
    """How many wait, run and come later, how long the oldest has waited, and the claims since."""
    table = job_table(
        Column("run_at", DateTime), Column("attempts", Integer), Column("completed_at", DateTime)
    )
    engine = filled(database, table, 9, run_at=START, created_at=START)
    with engine.begin() as connection:
        later = datetime.now(UTC).replace(tzinfo=None) + timedelta(days=1)
        connection.execute(table.update().where(table.c.id > 7).values(run_at=later))
    seen = watched(database, table)
    first = next(seen)
    assert (first.waiting, first.later, first.running) == (7, 2, 0)
    assert first.claims_per_second is None
    assert first.oldest_waiting is not None
    age = datetime.now(UTC).replace(tzinfo=None) - START
    assert abs(first.oldest_waiting - age.total_seconds()) < 60
    claim = claim_jobs(engine, table, 3)
    second = next(seen)
    assert (second.waiting, second.later, second.running) == (4, 2, 3)
    assert second.claims_per_second is not None
    assert second.claims_per_second > 0
    complete_jobs(engine, claim, unfenced=True)
    third = next(seen)
    assert (third.waiting, third.running, third.claims_per_second) == (4, 0, 0)
    with engine.begin() as connection:
        connection.execute(table.delete())
    assert next(seen).oldest_waiting is None
    seen.close()  # type: ignore[attr-defined]


@pytest.mark.databases("sqlite", "postgresql")
def test_watching_by_the_command(database: Database, command: Command) -> None:
    """A line for each look, for people and for programs."""
    healthy(database, count=3)
    watch = ("--watch", "--interval", "0", "--count", "2")
    ended = doctor(command, database, *watch, "--json")
    assert (ended.code, ended.err) == (0, "")
    assert [json.loads(line)["waiting"] for line in ended.out.splitlines()] == [3, 3]
    ended = doctor(command, database, *watch)
    assert (ended.code, ended.err) == (0, "")
    heading, *lines = ended.out.splitlines()
    assert heading.split() == [
        "time",
        "waiting",
        "later",
        "running",
        "oldest",
        "waiting",
        "claims/s",
    ]
    assert [line.split()[1:4] for line in lines] == [["3", "0", "0"]] * 2
    assert "--count is about --watch" in doctor(command, database, "--count", "2").refused()


@pytest.mark.databases("sqlite")
def test_watching_ends_on_ctrl_c(database: Database) -> None:
    """Neither a traceback nor a complaint, on a terminal and in a pipe."""
    healthy(database, count=3)
    words = [sys.executable, "-m", "atomic_claim", "doctor", "--url", address(database)]
    words += ["--table", "jobs", "--watch", "--interval", "0.1"]
    for more, environment in (["--json"], {}), ([], {"FORCE_COLOR": "1"}):
        process = subprocess.Popen(
            [*words, *more],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        assert process.stdout is not None
        while "3" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=60)
        assert (process.returncode, complaint) == (0, "")


@pytest.mark.databases("sqlite")
def test_what_cannot_be_watched(database: Database, command: Command) -> None:
    """A table that cannot be read is refused, with what to write."""
    filled(database, statuses, status="new")
    said = doctor(command, database, "--watch").refused()
    assert "which value of 'status' is 'free'?" in said
