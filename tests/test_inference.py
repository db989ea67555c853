"""Inference of roles from the columns' names, and errors in place of guesses."""

import enum
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Boolean, Column, DateTime, Enum, Integer, MetaData, String, Table, Text
from sqlalchemy.ext.automap import automap_base
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from atomic_claim import (
    AmbiguousTable,
    ClaimError,
    JobTable,
    claim_jobs,
    inference,
    predicates,
)
from tests.databases import Database
from tests.jobs import START, fill, ids, job_table, mapped

PAYLOAD = Path(__file__).parent / "payload"


def table_of(*columns: Column[Any], **options: Any) -> Table:
    """Build a table with a key and these columns."""
    return Table("jobs", MetaData(), Column("id", Integer, primary_key=True), *columns, **options)


def processing() -> Column[Any]:
    """Build the state column of most tables here."""
    return Column("processing", Boolean, nullable=False)


def refusal(table: Any) -> str:
    """Return the message of the error that refuses a table, which names every column."""
    with pytest.raises(AmbiguousTable) as raised:
        JobTable.infer(table)
    message = str(raised.value)
    assert "cannot be read with certainty" in message
    return message


# --- conventional names


@pytest.mark.parametrize("name", sorted(inference.CLAIMED_FLAGS))
def test_flags_that_mark_what_is_claimed(name: str) -> None:
    """A boolean by one of these names is false while a row is free."""
    table = table_of(Column(name, Boolean, nullable=False))
    roles = JobTable.infer(table)
    assert roles.state is table.c[name]
    assert str(roles.free) == f"jobs.{name} = false"
    assert [(column.name, str(value)) for column, value in roles.claimed.items()] == [
        (name, "true")
    ]


@pytest.mark.parametrize("name", sorted(inference.FREE_FLAGS))
def test_flags_that_mark_what_is_free(name: str) -> None:
    """A boolean by one of these names is the other way round."""
    table = table_of(Column(name, Boolean, nullable=False))
    roles = JobTable.infer(table)
    assert str(roles.free) == f"jobs.{name} = true"
    assert [str(value) for value in roles.claimed.values()] == ["false"]


@pytest.mark.parametrize("name", sorted(inference.CLAIMED_TIMES))
def test_times_of_a_claim(name: str) -> None:
    """A nullable time by one of these names is NULL while a row is free."""
    table = table_of(Column(name, DateTime))
    roles = JobTable.infer(table)
    assert str(roles.free) == f"jobs.{name} IS NULL"
    assert list(roles.claimed) == [table.c[name]]


@pytest.mark.parametrize("name", sorted(inference.STATUSES))
def test_statuses_of_an_enum(name: str) -> None:
    """An Enum by one of these names says itself what its values mean."""
    table = table_of(Column(name, Enum("queued", "active", "done", "failed", name="status")))
    roles = JobTable.infer(table)
    found = {
        role: [value.value for value in getattr(roles, role).values()]
        for role in ("claimed", "done", "failed")
    }
    assert found == {"claimed": ["active"], "done": ["done"], "failed": ["failed"]}


@pytest.mark.parametrize(
    ("role", "name"),
    [(role, name) for role, names in inference.ROLES_BY_NAME.items() for name in names],
)
def test_roles_by_name(role: str, name: str) -> None:
    """Times, workers, tokens, counters and texts of errors are known by these names."""
    types: dict[str, Any] = {"due": DateTime, "order": DateTime, "lease": DateTime}
    types |= {"attempts": Integer}
    more = [Column("lease_until", DateTime)] if name == "token" else []
    table = table_of(processing(), Column(name, types.get(role, String(50))), *more)
    expected = (table.c[name],) if role == "order" else table.c[name]
    assert getattr(JobTable.infer(table), role) == expected


@pytest.mark.parametrize(
    ("role", "names", "type_"),
    [
        ("done", inference.DONE_TIMES, DateTime),
        ("done", inference.DONE_FLAGS, Boolean),
        ("failed", inference.FAILED_TIMES, DateTime),
        ("failed", inference.FAILED_FLAGS, Boolean),
        ("withdrawn", inference.WITHDRAWN_TIMES, DateTime),
        ("withdrawn", inference.WITHDRAWN_FLAGS, Boolean),
    ],
)
def test_ends(role: str, names: frozenset[str], type_: Any) -> None:
    """Each of these columns takes a row out of the queue once it is set."""
    for name in sorted(names):
        table = table_of(processing(), Column(name, type_))
        roles = JobTable.infer(table)
        assert list(getattr(roles, role)) == [table.c[name]]
        test = f"jobs.{name} IS NULL" if type_ is DateTime else f"jobs.{name} IS NOT true"
        assert test in str(predicates.is_free(roles))


@pytest.mark.parametrize("name", inference.STAMPS)
def test_stamps(name: str) -> None:
    """A stamp is set by every claim, unless the column does so by itself."""
    table = table_of(processing(), Column(name, DateTime))
    assert JobTable.infer(table).stamps == (table.c[name],)
    table = table_of(processing(), Column(name, DateTime, onupdate=sa.func.now()))
    assert JobTable.infer(table).stamps == ()


def test_a_time_beside_a_flag() -> None:
    """A claim's time beside a flag or status is the mark's stamp, not another state."""
    table = table_of(processing(), Column("locked_at", DateTime))
    roles = JobTable.infer(table)
    assert roles.state is table.c.processing
    assert list(roles.claimed) == [table.c.processing, table.c.locked_at]
    assert "locked_at" not in str(predicates.is_free(roles))


def test_a_status_beside_ends() -> None:
    """A finished row gets both the status and the time."""
    status = Column("status", Enum("new", "running", "done", name="status"), nullable=False)
    table = table_of(status, Column("finished_at", DateTime))
    assert set(JobTable.infer(table).done) == {table.c.status, table.c.finished_at}


def test_a_token_alone_is_no_fence() -> None:
    """A column named just "token" is often a credential, and is not taken for a role."""
    assert JobTable.infer(table_of(processing(), Column("token", String(50)))).token is None


class Status(enum.Enum):
    """A status by its members' names."""

    Pending = 1
    InProgress = 2
    IN_PROGRESS = 3
    Done = 4


def test_an_enum_by_its_members() -> None:
    """Members are known by their names, in whatever case."""
    roles = JobTable.infer(table_of(Column("status", Enum(Status), nullable=False)))
    assert [value.value for value in roles.claimed.values()] == [Status.IN_PROGRESS]
    assert [value.value for value in roles.done.values()] == [Status.Done]


class Base(DeclarativeBase):
    """The classes of this file."""


class Renamed(Base):
    """Only the attributes have conventional names."""

    __tablename__ = "renamed"

    number: Mapped[int] = mapped_column("id", primary_key=True)
    processing: Mapped[bool] = mapped_column("c1")
    run_at: Mapped[datetime | None] = mapped_column("c2")
    created_at: Mapped[datetime] = mapped_column("c3")


def test_attributes_of_a_class() -> None:
    """A mapped class is read by its attributes as well; its bare table is not."""
    roles = JobTable.infer(Renamed)
    columns = Renamed.__table__.c
    assert (roles.state, roles.due, roles.order) == (columns.c1, columns.c2, (columns.c3,))
    assert roles.entity is Renamed
    assert "c1" in refusal(Renamed.__table__)


# --- refusals

REFUSALS: dict[str, tuple[Callable[[], list[Column[Any]]], tuple[str, ...]]] = {
    "a status of strings": (
        lambda: [Column("status", String(10)), Column("created_at", DateTime), Column("x", Text)],
        (
            "understood: state: status; order: created_at",
            "not understood: x",
            "'status' is a status whose values nobody named",
            "write: JobTable(table, state='status', free=<...>, claimed=<...>)",
        ),
    ),
    "a status of numbers": (
        lambda: [Column("state", Integer)],
        ("'state' is a status whose values nobody named", "state='state', free=<...>"),
    ),
    "a status without a value for what runs": (
        lambda: [Column("status", Enum("new", "done", name="status"))],
        ("which value of 'status' (new, done) is 'claimed'?", "claimed=<...>"),
    ),
    "a status with two values for what waits": (
        lambda: [Column("status", Enum("new", "queued", "running", name="status"))],
        ("which value of 'status' (new, queued, running) is 'free'?", "free=<...>"),
    ),
    "a priority": (
        lambda: [processing(), Column("priority", Integer), Column("created_at", DateTime)],
        (
            "understood: state: processing",
            "'priority' has no natural direction",
            "order=[table.c.priority.desc(), ...]",
            "state='processing'",
            "order=<...>",
        ),
    ),
    "two flags": (
        lambda: [processing(), Column("locked", Boolean, nullable=False)],
        (
            "several columns could be the state (",
            "'processing'",
            "'locked'",
            'state="<column>"',
            "not understood: processing, locked",
        ),
    ),
    "a flag and a status": (
        lambda: [processing(), Column("status", String(10))],
        ("several columns could be the state ('processing', 'status')",),
    ),
    "two times of a claim": (
        lambda: [Column("locked_at", DateTime), Column("claimed_at", DateTime)],
        ("several columns could be the state", "'locked_at'", "'claimed_at'"),
    ),
    "no state": (
        lambda: [Column("name", String(50)), Column("created_at", DateTime)],
        (
            "no column says whether a job is claimed",
            "understood: order: created_at",
            "not understood: name",
            'state="<column>"',
        ),
    ),
    "a time of a claim that is never empty": (
        lambda: [Column("locked_at", DateTime, nullable=False)],
        ("no column says whether a job is claimed",),
    ),
    "a flag of strings": (
        lambda: [Column("processing", String(5))],
        ("no column says whether a job is claimed", "not understood: processing"),
    ),
    "two times that are due": (
        lambda: [processing(), Column("run_at", DateTime), Column("eta", DateTime)],
        ("several columns could be 'due' ('run_at', 'eta')", "due=..."),
    ),
    "two workers": (
        lambda: [processing(), Column("worker", Text), Column("locked_by", Text)],
        ("several columns could be 'worker' ('worker', 'locked_by')",),
    ),
    "two leases": (
        lambda: [processing(), Column("lease_until", DateTime), Column("locked_until", DateTime)],
        ("several columns could be 'lease' ('lease_until', 'locked_until')",),
    ),
    # Left alone, a column that says when a row is due or over would let the row be claimed.
    "a number as due time": (
        lambda: [processing(), Column("run_at", sa.BigInteger)],
        ("'run_at'", "due="),
    ),
    "a number as time of completion": (
        lambda: [processing(), Column("completed_at", sa.BigInteger)],
        ("'completed_at'", "done="),
    ),
    "a time of completion that is never empty": (
        lambda: [processing(), Column("completed_at", DateTime, nullable=False)],
        ("'completed_at'", "done="),
    ),
    "a flag of completion in words": (
        lambda: [processing(), Column("done", String(5))],
        ("'done'", "done="),
    ),
    "a flag of failure in numbers": (
        lambda: [processing(), Column("has_error", Integer)],
        ("'has_error'", "failed="),
    ),
    "a number as time of deletion": (
        lambda: [processing(), Column("deleted_at", sa.BigInteger)],
        ("'deleted_at'", "withdrawn="),
    ),
}


@pytest.mark.parametrize("shape", REFUSALS)
def test_refusals(shape: str) -> None:
    """The message lists what was understood, what was not, and what to write."""
    columns, words = REFUSALS[shape]
    message = refusal(table_of(*columns()))
    for word in ("understood: ", "not understood: ", "write: JobTable(table, ", *words):
        assert word in message


def test_what_the_message_says_to_write_is_accepted() -> None:
    """Filled in, the declaration of the message is one that the table is claimed by."""
    table = table_of(
        Column("status", String(10)), Column("created_at", DateTime), Column("run_at", DateTime)
    )
    written = refusal(table).rpartition("write: ")[2]
    for place, value in (("free=<...>", "'new'"), ("claimed=<...>", "'busy'")):
        written = written.replace(place, f"{place.partition('=')[0]}={value}")
    roles = eval(written, {"JobTable": JobTable, "table": table})  # noqa: S307
    assert (roles.state, roles.due) == (table.c.status, table.c.run_at)


def test_text_as_due_time_without_a_format() -> None:
    """Text in a conventionally named column is no time until its format is said."""
    table = table_of(processing(), Column("run_at", String(30)))
    with pytest.raises(AmbiguousTable, match="text_times="):
        JobTable.infer(table)


@pytest.mark.parametrize(
    ("default", "form"),
    [
        ("CURRENT_TIMESTAMP", "%Y-%m-%d %H:%M:%S"),
        ("(datetime('now'))", "%Y-%m-%d %H:%M:%S"),
        ("(strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))", "%Y-%m-%dT%H:%M:%fZ"),
    ],
)
def test_the_format_of_text_is_its_default_s(default: str, form: str) -> None:
    """The default of one text column tells in which format all of them hold times."""
    created = Column("created_at", Text, server_default=sa.text(default))
    table = table_of(processing(), Column("run_at", Text), created)
    assert JobTable.infer(table).text_times == form


def test_two_formats_of_text() -> None:
    """Defaults that contradict each other tell nothing."""
    table = table_of(
        processing(),
        Column("run_at", Text, server_default=sa.text("(strftime('%Y', 'now'))")),
        Column("created_at", Text, server_default=sa.text("CURRENT_TIMESTAMP")),
    )
    with pytest.raises(AmbiguousTable, match="text_times="):
        JobTable.infer(table)


# --- declarations of the table itself


def test_a_declaration_in_the_table_s_info() -> None:
    """A dictionary in `table.info` goes before the names, with columns by name."""
    declared = {"state": "status", "free": "n", "claimed": "r", "order": ["priority", "id"]}
    table = table_of(
        Column("status", String(1)),
        Column("priority", Integer),
        processing(),
        info={"atomic_claim": declared},
    )
    roles = JobTable.infer(table)
    assert roles.state is table.c.status
    assert roles.order == (table.c.priority, table.c.id)
    assert JobTable.infer(mapped(table)).state is table.c.status


def test_a_job_table_in_the_table_s_info() -> None:
    """A JobTable in `table.info` is the one that is meant."""
    table = table_of(processing(), Column("locked", Boolean))
    roles = JobTable(table, state="locked")
    table.info["atomic_claim"] = roles
    assert JobTable.infer(table) is roles


def test_a_wrong_declaration_in_the_table_s_info() -> None:
    """A declaration that cannot be meant is refused as any other."""
    table = table_of(processing(), info={"atomic_claim": {"state": "nope"}})
    with pytest.raises(ClaimError, match="state=nope is not a column"):
        JobTable.infer(table)


def test_the_same_for_the_same_table() -> None:
    """A table is read once; each table and each class has its own meaning."""
    table, other = table_of(processing()), table_of(processing())
    job = mapped(table)
    assert JobTable.infer(table) is JobTable.infer(table)
    assert JobTable.infer(job) is JobTable.infer(job)
    assert JobTable.infer(table) is not JobTable.infer(other)
    assert JobTable.infer(table) is not JobTable.infer(job)
    assert JobTable.infer(table).entity is None


def test_what_was_read_dies_with_the_table() -> None:
    """No registry keeps a table, or what was read of it, alive."""
    table = table_of(processing())
    watched = weakref.ref(JobTable.infer(table))
    del table
    gc.collect()
    assert watched() is None


READ = """
from sqlalchemy import *
from atomic_claim import JobTable, predicates
flags = [Column(name, Boolean, nullable=False) for name in ("processing", "done", "failed")]
times = [Column(name, DateTime) for name in ("completed_at", "failed_at", "finished_at")]
key = Column("id", Integer, primary_key=True)
roles = JobTable.infer(Table("jobs", MetaData(), key, *flags, *times))
print(predicates.is_free(roles), roles.shape)
"""


def test_every_process_reads_alike() -> None:
    """Neither the text of the claim nor the shape in a ticket depends on Python's hash seed."""
    read = {
        subprocess.run(
            [sys.executable, "-c", READ],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in "123456"
    }
    assert len(read) == 1


def test_it_tells_what_it_has_read() -> None:
    """The repr names the table and the columns that have a role."""
    table = table_of(processing(), Column("run_at", DateTime), Column("worker", Text))
    expected = "<JobTable('jobs', state='processing', due='run_at', worker='worker')>"
    assert repr(JobTable.infer(table)) == expected


# --- tables as a database has them


def test_reflected(database: Database) -> None:
    """A table that is read from the database is understood like the one it was made from."""
    engine = database.engine()
    made = table_of(
        Column("processing", Boolean, nullable=False, server_default=sa.false()),
        Column("completed_at", DateTime),
        Column("has_error", Boolean, server_default=sa.false()),
        Column("run_at", DateTime),
        Column("created_at", DateTime, nullable=False),
        Column("attempts", Integer, nullable=False, server_default="0"),
        Column("worker", String(20)),
        Column("name", String(50)),
    )
    made.metadata.create_all(engine)
    table = Table("jobs", MetaData(), autoload_with=engine)
    roles = JobTable.infer(table)
    assert repr(roles) == repr(JobTable.infer(made))
    assert [c.name for c in roles.done] == ["completed_at"]
    assert [c.name for c in roles.failed] == ["has_error"]
    with engine.begin() as connection:
        values: list[dict[str, Any]] = [
            {"id": 1, "completed_at": START},
            {"id": 2, "has_error": True},
            {"id": 3, "processing": True},
            {"id": 4, "run_at": datetime(9000, 1, 1)},  # noqa: DTZ001
            {"id": 5, "has_error": None},
            {"id": 6, "run_at": START},
        ]
        for each in values:
            connection.execute(made.insert(), {"created_at": START} | each)
    assert sorted(ids(claim_jobs(engine, table, 10, worker="ann"))) == [5, 6]


PAYLOAD_NOW = {
    "postgresql": "now() + {} * interval '1 minute'",
    "sqlite": "strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '{} minutes')",
}
# How many minutes ago each row was created, what else it sets, and whether it is to be claimed.
PAYLOAD_ROWS: list[tuple[int, str, bool]] = [
    (10, "queue = 'default'", True),
    (90, "wait_until = {ago}", True),
    (80, "has_error = NULL", True),
    (70, "wait_until = {ago}, has_error = NULL, queue = NULL", True),
    (60, "completed_at = {ago}", False),
    (50, "has_error = true", False),
    (45, "has_error = true, completed_at = {ago}", False),
    (40, "processing = true", False),
    (30, "processing = NULL", False),
    (20, "wait_until = {later}", False),
    (25, "total_tried = 3", True),
]
CLAIMABLE = [
    number
    for minutes, number, claimable in sorted(
        (
            (minutes, number, claimable)
            for number, (minutes, _, claimable) in enumerate(PAYLOAD_ROWS, 1)
        ),
        reverse=True,
    )
    if claimable
]


@pytest.fixture
def payload(database: Database) -> sa.Engine:
    """Payload's own tables, with rows of all kinds, the ids not in created order."""
    engine = database.engine()
    now = PAYLOAD_NOW[database.name]
    with engine.begin() as connection:
        script = (PAYLOAD / f"{database.name}.sql").read_text(encoding="utf-8")
        for sql in filter(str.strip, script.split(";")):
            connection.exec_driver_sql(sql)
        for number, (minutes, change, _) in enumerate(PAYLOAD_ROWS, 1):
            created = now.format(-minutes)
            changed = change.format(ago=now.format(-1), later=now.format(1))
            connection.exec_driver_sql(
                "INSERT INTO payload_jobs (id, task_slug, created_at, updated_at) "
                f"VALUES ({number}, 'record', {created}, {created})"
            )
            connection.exec_driver_sql(f"UPDATE payload_jobs SET {changed} WHERE id = {number}")
    return engine


on_payloads_databases = pytest.mark.databases("postgresql", "sqlite")


@on_payloads_databases
@pytest.mark.parametrize("limit", [1, 3, 10])
def test_payload_is_claimed_by_inference_alone(payload: sa.Engine, limit: int) -> None:
    """Of Payload's jobs, those that Payload would run are claimed, in the order of creation."""
    table = Table("payload_jobs", MetaData(), autoload_with=payload)
    claimed: list[int] = []
    while found := claim_jobs(payload, table, limit):
        assert len(found) <= limit
        claimed += ids(found)
    assert claimed == CLAIMABLE
    with payload.connect() as connection:
        running = connection.scalars(sa.select(table.c.id).where(table.c.processing == sa.true()))
        assert set(running) == {*CLAIMABLE, 8}


@on_payloads_databases
@pytest.mark.parametrize("kind", [Session, sessionmaker], ids=["session", "sessionmaker"])
def test_payload_as_classes(payload: sa.Engine, kind: Any) -> None:
    """Payload's jobs are also claimed as entities of classes that SQLAlchemy reflects."""
    base = automap_base()
    base.prepare(autoload_with=payload)
    bind = kind(payload)
    claimed = claim_jobs(bind, base.classes.payload_jobs, 10)
    assert ids(claimed) == CLAIMABLE
    assert all(job.processing for job in claimed)
    if kind is Session:
        bind.close()


@on_payloads_databases
def test_payload_s_stamp_is_in_its_own_format(payload: sa.Engine) -> None:
    """`updated_at` becomes now, written as Payload writes it; of other rows it stays as it was."""
    table = Table("payload_jobs", MetaData(), autoload_with=payload)
    claim_jobs(payload, table, 10)
    now = PAYLOAD_NOW[payload.dialect.name].format(0)
    query = (
        "SELECT id, CAST(updated_at AS TEXT), CAST(now AS TEXT), updated_at <= now, "
        f"updated_at > created_at FROM payload_jobs, (SELECT {now} AS now) AS clock"
    )
    with payload.connect() as connection:
        for number, written, now, past, stamped in connection.exec_driver_sql(query):
            assert past
            assert bool(stamped) is (number in CLAIMABLE)
            if payload.dialect.name == "sqlite":
                assert [c.isdigit() for c in written] == [c.isdigit() for c in now]


@on_payloads_databases
def test_payload_s_own_defaults(payload: sa.Engine) -> None:
    """A job that Payload has just queued, with nothing but defaults, is free and due."""
    with payload.begin() as connection:
        connection.exec_driver_sql("DELETE FROM payload_jobs")
        connection.exec_driver_sql("INSERT INTO payload_jobs (id, task_slug) VALUES (1, 'record')")
    table = Table("payload_jobs", MetaData(), autoload_with=payload)
    (job,) = claim_jobs(payload, table, 10)
    assert (job.id, job.queue, bool(job.has_error), bool(job.processing)) == (
        1,
        "default",
        False,
        True,
    )


@on_payloads_databases
def test_payload_s_queues(payload: sa.Engine) -> None:
    """A worker of one queue takes its jobs only."""
    table = Table("payload_jobs", MetaData(), autoload_with=payload)
    assert ids(claim_jobs(payload, table, 10, where=table.c.queue.is_(None))) == [4]
    assert ids(claim_jobs(payload, table, 10, where=table.c.queue == "mail")) == []


def test_an_order_in_the_call_settles_a_priority(database: Database) -> None:
    """Where the call says what comes first, the direction of `priority` is no question."""
    engine, table = database.engine(), job_table(Column("priority", Integer, nullable=False))
    fill(engine, table, 3, priority=0)
    with engine.begin() as connection:
        connection.execute(table.update().where(table.c.id == 2).values(priority=9))
    for expected in (2, 1):
        with pytest.raises(AmbiguousTable, match="'priority' has no natural direction"):
            claim_jobs(engine, table, 3)
        order = [table.c.priority.desc(), table.c.id]
        assert ids(claim_jobs(engine, table, 1, order_by=order)) == [expected]
