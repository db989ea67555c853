"""Faults of a table that `atomic-claim doctor` finds, and whose cures cure."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, DateTime, Integer, String, Table

from atomic_claim import JobTable, claim_jobs
from atomic_claim.guard import guard
from tests.commands import PASSWORD, Command
from tests.databases import NAMES, Database
from tests.jobs import START, ids
from tests.tools.test_doctor import (
    COMMITTED,
    INNODB,
    ails,
    create_indexes,
    doctor,
    execute,
    filled,
    healthy,
    reader,
    settled,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.once

WORDS = ("waiting", "running", "done", "failed")


def table_of(**columns: Column[Any]) -> Table:
    """Build the table of jobs, some of whose columns differ from what is declared."""
    own: dict[str, Column[Any]] = {
        "id": Column("id", Integer, primary_key=True),
        "status": Column("status", String(20), nullable=False),
        "attempts": Column("attempts", Integer, nullable=False),
        "run_at": Column("run_at", DateTime, nullable=False),
        "created_at": Column("created_at", DateTime, nullable=False),
        "lease_until": Column("lease_until", DateTime),
        "claim_token": Column("claim_token", String(32)),
        "worker": Column("worker", String(50)),
    }
    return Table("jobs", sa.MetaData(), *(own | columns).values())


def meaning(table: Table, free: Any = "waiting") -> JobTable:
    """Say what the columns mean."""
    return JobTable(
        table,
        state="status",
        free=free,
        claimed="running",
        done="done",
        failed="failed",
        due="run_at",
        order="created_at",
        attempts="attempts",
        max_attempts=5,
        lease="lease_until",
        token="claim_token",
        worker="worker",
        naive_times="utc",
    )


declared = meaning(table_of())
two_free = meaning(table_of(), ("waiting", "queued"))
enumerated = meaning(
    table_of(status=Column("status", sa.Enum(*WORDS, name="words"), nullable=False))
)
zoned = meaning(table_of(run_at=Column("run_at", DateTime(timezone=True), nullable=False)))


@dataclass(frozen=True)
class Fault:
    """A fault, where it can be, and by which check it is found.

    Attributes:
        check: the check.
        found: what is said.
        stored: the types and nullability that columns have in the database.
        sql: the statements that make the fault, or by database's name.
        undo: what is run after the test, for what belongs to the whole server.
        databases: where it can be.
        table: the declaration.
        options: the doctor's options.
        cured: the declaration that cures it where no statement does.
        values: of the rows.
    """

    check: str
    found: str
    stored: Mapping[str, tuple[Any, bool]] = field(default_factory=dict)
    sql: Sequence[str] | Mapping[str, Sequence[str]] = ()
    undo: Sequence[str] = ()
    databases: Sequence[str] = NAMES
    table: str = "declared"
    options: Sequence[str] = ()
    cured: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


ROW_TRIGGER = {
    name: f"CREATE TRIGGER meddling BEFORE UPDATE ON jobs FOR EACH ROW {body}"
    for name, body in {
        "postgresql": "EXECUTE FUNCTION meddle()",
        "mysql": "SET NEW.status = OLD.status",
        "mariadb": "SET NEW.status = OLD.status",
    }.items()
}
AFTER_TRIGGER = (
    "CREATE TRIGGER meddling AFTER UPDATE ON jobs FOR EACH ROW WHEN (NEW.status = 'running') "
)


def function(body: str) -> str:
    """Return the statement that makes a trigger function of PostgreSQL's."""
    return f"CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$"


MOVING = "ON UPDATE CURRENT_TIMESTAMP"
REWRITES = "UPDATE jobs SET status = 'waiting' WHERE id = NEW.id"
NULL_STATUS = {"status": (String(20), True)}
FAULTS = {
    "NULL state": Fault(
        "NULL in a state",
        "3 rows whose status is NULL",
        NULL_STATUS,
        ["UPDATE jobs SET status = NULL WHERE id <= 3"],
    ),
    "NULL attempts": Fault(
        "NULL in a state",
        "3 rows whose attempts is NULL",
        {"attempts": (Integer, True)},
        ["UPDATE jobs SET attempts = NULL WHERE id <= 3"],
    ),
    "NULL due": Fault(
        "NULL in a state",
        "3 rows whose run_at is NULL",
        {"run_at": (DateTime, True)},
        ["UPDATE jobs SET run_at = NULL WHERE id <= 3"],
    ),
    "nullable": Fault("types of the columns", "status is NULL, declared NOT NULL", NULL_STATUS),
    "NOT NULL": Fault(
        "types of the columns",
        "lease_until is NOT NULL, declared NULL",
        {"lease_until": (DateTime, False)},
        values={"lease_until": START},
    ),
    "length": Fault(
        "types of the columns",
        "claim_token has 10 characters, declared with 32",
        sql={
            "postgresql": ["ALTER TABLE jobs ALTER claim_token TYPE varchar(10)"],
            "mysql": ["ALTER TABLE jobs MODIFY claim_token varchar(10)"],
            "mariadb": ["ALTER TABLE jobs MODIFY claim_token varchar(10)"],
        },
        databases=("postgresql", *INNODB),
    ),
    "type": Fault(
        "types of the columns",
        "claim_token is INTEGER",
        {"claim_token": (Integer, True)},
    ),
    "zone": Fault(
        "types of the columns",
        "run_at is TIMESTAMP WITHOUT TIME ZONE, declared as TIMESTAMP WITH TIME ZONE",
        databases=("postgresql",),
        table="zoned",
    ),
    "enum": Fault(
        "types of the columns",
        "status lacks failed",
        {"status": (sa.Enum(*WORDS[:3], name="words"), False)},
        databases=("postgresql", *INNODB),
        table="enumerated",
    ),
    "misspelt": Fault(
        "values of the state",
        "2 rows with ' Waiting '",
        sql=["UPDATE jobs SET status = ' Waiting ' WHERE id <= 2"],
    ),
    "unknown": Fault(
        "values of the state",
        "50 rows with 'queued'",
        sql=["UPDATE jobs SET status = 'queued'"],
        cured="two_free",
    ),
    "read-only transactions": Fault(
        "read-only transactions",
        "ON, by database",
        databases=("postgresql",),
        sql=["ALTER DATABASE {database} SET default_transaction_read_only = on"],
    ),
    "autovacuum": Fault(
        "autovacuum",
        "off for jobs",
        sql=["ALTER TABLE jobs SET (autovacuum_enabled = off)"],
        databases=("postgresql",),
    ),
    "autovacuum of the server": Fault(
        "autovacuum",
        "off for the whole server",
        sql=["ALTER SYSTEM SET autovacuum = off", "SELECT pg_reload_conf()"],
        undo=["ALTER SYSTEM RESET autovacuum", "SELECT pg_reload_conf()"],
        databases=("postgresql",),
    ),
    "slot": Fault(
        "replication slots",
        "no client reads from left_over",
        sql=["SELECT pg_create_physical_replication_slot('left_over', true)"],
        undo=["SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"],
        databases=("postgresql",),
    ),
    "unfinished": Fault(
        "unfinished indexes",
        "left_over",
        sql=[
            "CREATE INDEX left_over ON jobs (worker)",
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'left_over'::regclass",
        ],
        databases=("postgresql",),
    ),
    "strict mode": Fault(
        "strict mode",
        "off: sql_mode is ''",
        sql=["SET GLOBAL sql_mode = ''"],
        undo=["SET GLOBAL sql_mode = DEFAULT"],
        databases=INNODB,
    ),
    "read-only server": Fault(
        "read-only server",
        "read_only is on",
        sql=["SET GLOBAL read_only = ON"],
        undo=["SET GLOBAL read_only = OFF"],
        databases=INNODB,
    ),
    "moved lease": Fault(
        "columns that the server moves",
        "ON UPDATE sets lease_until whenever a row changes",
        sql=[f"ALTER TABLE jobs MODIFY lease_until DATETIME NULL DEFAULT NULL {MOVING}"],
        databases=INNODB,
    ),
    "moved due": Fault(
        "columns that the server moves",
        "ON UPDATE sets run_at whenever a row changes",
        sql=[
            f"ALTER TABLE jobs MODIFY run_at DATETIME NOT NULL DEFAULT CURRENT_TIMESTAMP {MOVING}"
        ],
        databases=INNODB,
    ),
    "hidden index": Fault(
        "plan of the claim",
        "the search for free rows is served by no index",
        sql={
            "mysql": ["ALTER TABLE jobs ALTER INDEX jobs_claim_free INVISIBLE"],
            "mariadb": ["ALTER TABLE jobs ALTER INDEX jobs_claim_free IGNORED"],
        },
        databases=INNODB,
    ),
    "constraint": Fault(
        "trial of a claim",
        "never",
        sql=["ALTER TABLE jobs ADD CONSTRAINT never_running CHECK (status <> 'running')"],
        databases=("postgresql", *INNODB),
        options=["--try"],
    ),
    "constraint on the end": Fault(
        "trial of a claim",
        "never",
        sql=["ALTER TABLE jobs ADD CONSTRAINT never_done CHECK (status <> 'done')"],
        databases=("postgresql", *INNODB),
        options=["--try"],
    ),
    "veto": Fault(
        "trial of a claim",
        "triggers: meddling",
        sql=[function("RETURN NULL;"), ROW_TRIGGER["postgresql"]],
        databases=("postgresql",),
        options=["--try"],
    ),
    "rewriting trigger": Fault(
        "trial of a claim",
        "triggers: meddling",
        sql={
            "postgresql": [
                function("NEW.status = OLD.status; RETURN NEW;"),
                ROW_TRIGGER["postgresql"],
            ],
            "mysql": [ROW_TRIGGER["mysql"]],
            "mariadb": [ROW_TRIGGER["mariadb"]],
            "sqlite": [f"{AFTER_TRIGGER}BEGIN {REWRITES}; END"],
        },
        options=["--try"],
    ),
    "trigger behind": Fault(
        "trial of a claim",
        "triggers: meddling",
        sql=[
            function(f"{REWRITES}; RETURN NULL;"),
            f"{AFTER_TRIGGER}EXECUTE FUNCTION meddle()",
        ],
        databases=("postgresql",),
        options=["--try"],
    ),
    "guard": Fault("guard", "gone or switched off", options=["--guarded"]),
    "spent": Fault(
        "attempts",
        "4 rows spent",
        sql=[
            "UPDATE jobs SET attempts = 5 WHERE id <= 4",
            "UPDATE jobs SET status = 'running', lease_until = '2020-01-01' WHERE id = 4",
        ],
    ),
}


def of(*databases: str) -> list[str]:
    """Return the names of the faults that are in exactly these databases."""
    return [name for name, fault in FAULTS.items() if tuple(fault.databases) == databases]


def cure(database: Database, command: Command, name: str) -> None:
    """Make a fault, have it found, apply the cure unchanged, and look again."""
    fault = FAULTS[name]
    own: JobTable = globals()[fault.table]
    columns = {
        key: Column(key, type_, nullable=null) for key, (type_, null) in fault.stored.items()
    }
    due = datetime.now(UTC).replace(tzinfo=None) - timedelta(minutes=1)
    values = {"status": "waiting", "attempts": 0, "run_at": due, **fault.values}
    filled(database, table_of(**columns), 50, **values)
    create_indexes(database, own)
    statements = fault.sql
    if isinstance(statements, Mapping):
        statements = statements[database.name]
    spec = f"tests.tools.test_faults:{fault.table}"
    guards = guard(own, database.engine().dialect) if "--guarded" in fault.options else None
    try:
        execute(database, [s.format(database=database.url.database) for s in statements])
        said = ails(command, database, *fault.options, table=spec)
        assert fault.check in said, said
        finding = said[fault.check]
        assert fault.found in finding["found"]
        assert finding["why"]
        assert finding["fix"]
        if fault.cured is not None:
            spec = f"tests.tools.test_faults:{fault.cured}"
        elif not finding["sql"]:
            # SQLite changes no column.
            assert database.name == "sqlite"
            assert "batch_alter_table" in finding["fix"]
            return
        execute(database, finding["sql"])
        left = ails(command, database, *fault.options, table=spec)
        assert fault.check not in left, left
        # What was cured stays so.
        if guards is not None:
            execute(database, guards.downgrade[:1])
            assert fault.check in ails(command, database, *fault.options, table=spec)
    finally:
        execute(database, fault.undo)


@pytest.mark.parametrize("name", of(*NAMES))
def test_cures_everywhere(database: Database, command: Command, name: str) -> None:
    """Each fault that every database can have is found, and its cure cures it."""
    cure(database, command, name)


@pytest.mark.databases("postgresql", *INNODB)
@pytest.mark.parametrize("name", of("postgresql", *INNODB))
def test_cures_on_servers(database: Database, command: Command, name: str) -> None:
    """Each fault that servers can have is found, and its cure cures it."""
    cure(database, command, name)


@pytest.mark.databases(*INNODB)
@pytest.mark.parametrize("name", of(*INNODB))
def test_cures_on_innodb(database: Database, command: Command, name: str) -> None:
    """Each fault that MySQL and MariaDB can have is found, and its cure cures it."""
    cure(database, command, name)


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize("name", of("postgresql"))
def test_cures_on_postgresql(database: Database, command: Command, name: str) -> None:
    """Each fault that PostgreSQL can have is found, and its cure cures it."""
    cure(database, command, name)


def waiting(database: Database, **more: Any) -> sa.Engine:
    """Create a table that is in order, whose rows are due."""
    due = datetime.now(UTC).replace(tzinfo=None) - timedelta(minutes=1)
    values = {"status": "waiting", "attempts": 0, "run_at": due, **more}
    return healthy(database, declared, **values)


@pytest.mark.databases("postgresql")
def test_rows_that_a_policy_hides(database: Database, command: Command) -> None:
    """Row-level security is found by the user it applies to; a policy for that user cures it."""
    engine = waiting(database)
    execute(database, ["ALTER TABLE jobs ENABLE ROW LEVEL SECURITY"])
    with reader(database) as url:
        name = str(sa.make_url(url).username)
        execute(database, [f"GRANT SELECT, UPDATE ON jobs TO {name}"])
        words = ("doctor", "--table", "tests.tools.test_faults:declared", "--json", "--url", url)
        said = json.loads(command(*words).out)["findings"]
        assert [each["check"] for each in said] == ["row-level security"]
        workers = sa.create_engine(url)
        assert not claim_jobs(workers, declared, 3)
        execute(database, said[0]["sql"])
        assert json.loads(command(*words).out)["findings"] == []
        assert ids(claim_jobs(workers, declared, 3)) == [1, 2, 3]
        workers.dispose()
    engine.dispose()


worded = meaning(
    table_of(
        status=Column(
            "status", sa.Enum("it's", *WORDS, name="Words", schema="Other"), nullable=False
        )
    )
)


@pytest.mark.databases("postgresql")
def test_an_awkward_enum(database: Database, command: Command) -> None:
    """The statement that adds a member bears any schema, name and member."""
    execute(database, ['CREATE SCHEMA "Other"'])
    stored = sa.Enum(*WORDS, name="Words", schema="Other")
    table = table_of(status=Column("status", stored, nullable=False))
    filled(database, table, 3, status="waiting", attempts=0, run_at=START)
    spec = "tests.tools.test_faults:worded"
    found = ails(command, database, table=spec)["types of the columns"]
    assert found["found"] == "status lacks it's"
    execute(database, found["sql"])
    assert "types of the columns" not in ails(command, database, table=spec)


@pytest.mark.databases(*INNODB)
def test_the_right_of_an_awkward_user(database: Database, command: Command) -> None:
    """The statement that grants the right bears any name of a user."""
    waiting(database)
    name = "it's\\me"
    quoted = "'it''s\\\\me'@'%'"
    execute(
        database,
        [
            f"CREATE USER {quoted} IDENTIFIED BY '{PASSWORD}'",
            f"GRANT SELECT ON jobs TO {quoted}",
        ],
    )
    url = database.url.set(username=name, password=PASSWORD)
    url = url.update_query_dict({"init_command": COMMITTED})
    words = ("doctor", "--table", "tests.tools.test_faults:declared", "--json")
    words += ("--url", url.render_as_string(hide_password=False))
    try:
        (found,) = json.loads(command(*words).out)["findings"]
        assert found["check"] == "rights"
        execute(database, found["sql"])
        assert json.loads(command(*words).out)["findings"] == []
    finally:
        execute(database, [f"DROP USER {quoted}"])


@pytest.mark.databases(*INNODB)
def test_a_transaction_that_holds_back_the_purge(database: Database, command: Command) -> None:
    """It is found with the connection that holds it, and the cure ends it."""
    waiting(database)
    hanging = database.engine(isolation_level="REPEATABLE READ").connect()
    hanging.execute(sa.text("SELECT * FROM jobs")).all()
    number = hanging.scalar(sa.text("SELECT CONNECTION_ID()"))
    spec = "tests.tools.test_faults:declared"
    found = ails(command, database, "--transaction-after", "0", table=spec)["old transactions"]
    assert f"connection {number} (root)" in found["found"]
    execute(database, found["sql"])
    hanging.invalidate()
    hanging.close()
    wait_until(lambda: not ails(command, database, "--transaction-after", "0", table=spec))


def test_a_view(database: Database, command: Command) -> None:
    """A view is named as one, and the table behind it is what to give."""
    waiting(database)
    execute(database, ["CREATE VIEW open_jobs AS SELECT * FROM jobs"])
    found = ails(command, database, table="open_jobs")["primary key"]
    assert (found["found"], found["sql"]) == ("this is a view", [])
    assert "primary key" not in ails(command, database, table="jobs")


def test_leases_that_ended_long_ago(database: Database, command: Command) -> None:
    """Rows that any worker could take are a sign that no worker asks; a claim cures it."""
    engine = waiting(database, status="running", lease_until=START, claim_token="x" * 32)
    spec = "tests.tools.test_faults:declared"
    found = ails(command, database, table=spec)["leases"]
    assert found["found"] == "50 rows whose lease ended more than 1 hour ago"
    assert len(claim_jobs(engine, declared, 50, lease=timedelta(minutes=5))) == 50
    assert ails(command, database, table=spec) == {}


@pytest.mark.databases("postgresql")
def test_a_partitioned_table(database: Database, command: Command) -> None:
    """Its plan is read through the partitions, and its index is made as it can be made there."""
    engine = database.engine()
    columns = "id bigint, created_at timestamptz, processing boolean NOT NULL, "
    columns += "completed_at timestamptz, PRIMARY KEY (id, created_at)"
    times = "timestamptz '2026-02-01' + g * interval '5 minutes'"
    months = [f"2026-{month:02}-01" for month in (1, 6, 12)]
    statements = [
        f"CREATE TABLE jobs ({columns}) PARTITION BY RANGE (created_at)",
        *(
            f"CREATE TABLE jobs_{place} PARTITION OF jobs FOR VALUES FROM ('{a}') TO ('{b}')"
            for place, (a, b) in enumerate(itertools.pairwise(months))
        ),
        f"INSERT INTO jobs SELECT g, {times}, false FROM generate_series(1, 60000) g",
    ]
    execute(database, statements)
    settled(database, engine)
    found = ails(command, database)
    assert set(found) == {"plan of the claim", "dead rows"}
    assert "CONCURRENTLY" not in str(found["plan of the claim"]["sql"])
    assert "writers wait" in found["plan of the claim"]["fix"]
    execute(database, [*found["plan of the claim"]["sql"], *found["dead rows"]["sql"]])
    assert ails(command, database) == {}
    said = doctor(command, database, "--all").out
    assert "Index Scan using jobs_claim_free" in said
    execute(database, ["ALTER TABLE jobs_0 SET (autovacuum_enabled = off)"])
    found = ails(command, database)
    assert found["autovacuum"]["found"] == "off for jobs_0"
    execute(database, found["autovacuum"]["sql"])
    assert ails(command, database) == {}


@pytest.mark.databases("sqlite", "mariadb")
def test_nothing_to_try(database: Database, command: Command) -> None:
    """An empty queue is no proof that claims succeed, and is said to be none."""
    waiting(database, status="done")
    found = ails(command, database, "--try", table="tests.tools.test_faults:declared")
    assert found["trial of a claim"]["found"] == "nothing waits, so nothing was tried"
