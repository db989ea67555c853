"""Inference of roles from the columns' names, and errors in place of guesses."""

import enum
import gc
import os
import re
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
from sqlalchemy.dialects import mysql
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
from atomic_claim.patch.tables import declared
from tests.databases import Database
from tests.jobs import START, fill, ids, job_table, mapped

PAYLOAD = Path(__file__).parent.parent / "payload"


def table_of(*columns: Column[Any], **options: Any) -> Table:
    """Build a table with a key and these columns."""
    return Table("jobs", MetaData(), Column("id", Integer, primary_key=True), *columns, **options)


def processing() -> Column[Any]:
    """Build the state column of most tables here."""
    return Column("processing", Boolean, nullable=False)


def created() -> Column[Any]:
    """Build the column of the order."""
    return Column("created_at", DateTime)


def ends() -> list[Column[Any]]:
    """Build the columns of a row that is done, failed or withdrawn."""
    return [
        Column("completed_at", DateTime),
        Column("has_error", Boolean),
        Column("deleted_at", DateTime),
    ]


LATER = datetime(9000, 1, 1)  # noqa: DTZ001


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
    [
        (kind.role, name)
        for kind in inference.KINDS
        if kind.role not in {"state", "stamps", *inference.END_TIMES}
        for name in kind.names
    ],
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
        *((role, names, DateTime) for role, names in inference.END_TIMES.items()),
        *((role, names, Boolean) for role, names in inference.END_FLAGS.items()),
        ("failed", ("error",), Boolean),
    ],
)
def test_ends(role: str, names: tuple[str, ...], type_: Any) -> None:
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
            "which value of 'status' is 'free'?",
            "which value of 'status' is 'claimed'?",
            "write: JobTable.infer(jobs, free=..., claimed=...)",
        ),
    ),
    "a status of numbers": (
        lambda: [Column("state", Integer)],
        ("which value of 'state' is 'free'?", "infer(jobs, free=..., claimed=...)"),
    ),
    "a status without a value for what runs": (
        lambda: [Column("status", Enum("new", "done", name="status"))],
        ("which value of 'status' (new, done) is 'claimed'?", "infer(jobs, claimed=...)"),
    ),
    "a status with two values for what waits": (
        lambda: [Column("status", Enum("new", "queued", "running", name="status"))],
        ("which value of 'status' (new, queued, running) is 'free'?", "infer(jobs, free=...)"),
    ),
    "a priority": (
        lambda: [processing(), Column("priority", Integer), Column("created_at", DateTime)],
        (
            "understood: state: processing",
            "'priority' has no natural direction",
            "order=[table.c.priority.desc(), ...]",
            "write: JobTable.infer(jobs, order=[...])",
        ),
    ),
    "two flags": (
        lambda: [processing(), Column("locked", Boolean, nullable=False)],
        (
            "several columns could be 'state' (",
            "'processing'",
            "'locked'",
            "write: JobTable.infer(jobs, state=...)",
            "not understood: processing, locked",
        ),
    ),
    "a flag and a status": (
        lambda: [processing(), Column("status", String(10))],
        ("several columns could be 'state' ('processing', 'status')",),
    ),
    "two times of a claim": (
        lambda: [Column("locked_at", DateTime), Column("claimed_at", DateTime)],
        ("several columns could be 'state'", "'locked_at'", "'claimed_at'"),
    ),
    "no state": (
        lambda: [Column("name", String(50)), Column("created_at", DateTime)],
        (
            "no column says whether a job is claimed",
            "understood: order: created_at",
            "not understood: name",
            "write: JobTable.infer(jobs, state=...)",
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
    for word in ("understood: ", "not understood: ", "write: JobTable.infer(jobs, ", *words):
        assert word in message


def status(*values: str) -> Column[Any]:
    """Build a status column, an Enum of these values, or a string without any."""
    type_ = Enum(*values, name="status") if values else String(10)
    return Column("status", type_, nullable=False)


NEW, BUSY = {"status": "new"}, {"status": "busy"}
ENDED: list[dict[str, Any]] = [
    {"completed_at": START},
    {"has_error": True},
    {"deleted_at": START},
]
# The columns; what a free row has; what rows have that must not be handed out; what only the
# caller can know, by argument.
PROPOSALS: dict[str, tuple[Callable[[], list[Column[Any]]], Any, list[Any], dict[str, str]]] = {
    "a priority": (
        lambda: [processing(), *ends(), Column("priority", Integer), created()],
        {},
        ENDED,
        {"order": "[jobs.c.priority.desc()]"},
    ),
    "a status of strings": (
        lambda: [status(), *ends(), Column("priority", Integer)],
        NEW,
        [{"status": "done"}, *ENDED],
        {"free": "'new'", "claimed": "'busy'", "order": "['priority']"},
    ),
    "a status with two values for what waits": (
        lambda: [status("new", "queued", "running", "done"), *ends()],
        NEW,
        [{"status": "done"}, *ENDED],
        {"free": "('new', 'queued')"},
    ),
    "a status without a value for what runs": (
        lambda: [status("new", "busy", "done"), *ends()],
        NEW,
        [{"status": "done"}, *ENDED],
        {"claimed": "'busy'"},
    ),
    "two flags": (
        lambda: [processing(), Column("locked", Boolean), *ends()],
        {},
        ENDED,
        {"state": "'processing'"},
    ),
    "a flag and a status": (
        lambda: [Column("processing", Boolean, default=False), status(), *ends()],
        NEW,
        [{"status": "done"}, *ENDED],
        {"state": "'status'", "free": "'new'", "claimed": "'busy'"},
    ),
    "no state": (
        lambda: [Column("stage", String(10)), *ends(), created()],
        {"stage": "new"},
        [{"stage": "done"}, *ENDED],
        {"state": "'stage'", "free": "'new'", "claimed": "'busy'"},
    ),
    "a flag of strings": (
        lambda: [Column("processing", String(5)), *ends()],
        {"processing": "no"},
        [{"processing": "yes"}, *ENDED],
        {"state": "'processing'", "free": "'no'", "claimed": "'yes'"},
    ),
    "flags that hold a row back": (
        lambda: [processing(), Column("paused", Boolean), Column("enabled", Boolean), *ends()],
        {"enabled": True},
        [{"paused": True}, {"enabled": False}, *ENDED],
        {},
    ),
    "a time that holds a row back": (
        lambda: [processing(), Column("retry_at", DateTime), *ends()],
        {},
        [{"retry_at": LATER}, *ENDED],
        {},
    ),
    "a time at which a row expires": (
        lambda: [processing(), Column("expires_at", DateTime), *ends()],
        {"expires_at": LATER},
        [{"expires_at": START}, *ENDED],
        {"free": "sa.and_(~jobs.c.processing, jobs.c.expires_at > sa.func.now())"},
    ),
    "a word that holds a row back": (
        lambda: [processing(), Column("enabled", String(1)), *ends()],
        {"enabled": "y"},
        [{"enabled": "n"}, *ENDED],
        {"free": "sa.and_(~jobs.c.processing, jobs.c.enabled == 'y')"},
    ),
    "two times that are due": (
        lambda: [processing(), Column("run_at", DateTime), Column("eta", DateTime), *ends()],
        {"eta": LATER},
        [{"run_at": LATER}, *ENDED],
        {"due": "'run_at'"},
    ),
    "a number as time of completion": (
        lambda: [processing(), Column("finished_at", sa.BigInteger), *ends()],
        {},
        [{"finished_at": 1}, *ENDED],
        {"free": "sa.and_(~jobs.c.processing, jobs.c.finished_at.is_(None))"},
    ),
    "a flag of failure in numbers": (
        lambda: [processing(), Column("failed", Integer), *ends()[::2]],
        {},
        [{"failed": 1}, *ENDED[::2]],
        {"failed": "{'failed': 1}"},
    ),
    "a table of Laravel's": (
        lambda: [
            *(Column(name, Text) for name in ("queue", "payload")),
            *(Column(f"{name}_at", Integer) for name in ("reserved", "available", "created")),
            Column("attempts", Integer),
            *ends(),
        ],
        {"available_at": 1},
        [{"reserved_at": 1}, {"available_at": 2**40}, *ENDED],
        {},
    ),
}


@pytest.mark.parametrize("shape", PROPOSALS)
def test_the_proposal_of_the_message_is_complete(shape: str) -> None:
    """Filled in, the call of the message hands out what is free, and nothing that has ended."""
    columns, free, ended, filled = PROPOSALS[shape]
    # Laravel's message says what `epoch` is on each database.
    known = {"JobTable": JobTable, "sa": sa, "epoch": 2**30}
    jobs = table_of(*columns())
    said, told = ["JobTable.infer(jobs)"], None
    while told is None:
        try:
            told = eval(said[-1], {**known, "jobs": jobs})  # noqa: S307
        except AmbiguousTable as error:
            said.append(str(error).rpartition("write: ")[2])
        for role, value in filled.items():
            said[-1] = re.sub(rf"\b{role}=(\[\.\.\.\]|\.\.\.)", f"{role}={value}", said[-1])
        assert said.count(said[-1]) == 1
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    jobs.metadata.create_all(engine)
    with engine.begin() as connection:
        for each in [free, *({**free, **end} for end in ended)]:
            connection.execute(jobs.insert(), {"processing": False} | each)
    assert ids(claim_jobs(engine, told, 10)) == [1]


def test_the_message_names_the_class_and_keeps_what_was_given() -> None:
    """The proposed call can be copied: it has the class, and the arguments given so far."""
    job = mapped(table_of(Column("state", String(9)), Column("status", String(9))))
    with pytest.raises(AmbiguousTable) as raised:
        JobTable.infer(job, state="status", free=("new", "again"), worker=None)
    assert str(raised.value).endswith(
        f"write: JobTable.infer({job.__name__}, state='status', free=..., worker=None, claimed=...)"
    )


# --- what a name alone does not make


@pytest.mark.parametrize(
    "column",
    [
        Column("worker_id", Integer, sa.ForeignKey("people.id")),
        Column("worker_id", String(9), sa.ForeignKey("people.id")),
        Column("worker_id", Integer),
        Column("claimed_by", sa.ARRAY(Text)),
        Column("locked_by", Text, nullable=False),
        Column("lock_token", sa.LargeBinary),
        Column("lock_token", String(31)),
        Column("claim_token", mysql.SET("a" * 32)),
        Column("attempts", Integer, sa.ForeignKey("people.id")),
        Column("attempts", String(9)),
        Column("last_error", sa.JSON),
        Column("error", sa.JSON),
        Column("created", Boolean),
        Column("updated_at", Integer),
        Column("locked", Boolean, sa.Computed("processing")),
        Column("locked_at", DateTime, sa.Computed("run")),
    ],
    ids=lambda column: f"{column.name} {column.type!r}",
)
def test_a_column_that_only_has_the_name_means_nothing(column: Column[Any]) -> None:
    """A type, a foreign key or a computed default that does not fit leaves the column alone."""
    table = table_of(processing(), column._copy())
    roles = JobTable.infer(table)
    assert (roles.worker, roles.token, roles.attempts, roles.error) == (None, None, None, None)
    assert (roles.order, roles.stamps) == ((), ())
    assert roles.state is table.c.processing
    assert list(roles.claimed) == [table.c.processing]


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (Column("completed", Integer, sa.ForeignKey("people.id")), "a foreign key"),
        (Column("done", Boolean, sa.Computed("processing")), "generated"),
        (Column("run_at", DateTime, sa.Computed("processing")), "generated"),
        (Column("locked", String(5)), "yes or no"),
        (Column("completed_at", DateTime, default=sa.func.now()), "with a default"),
        (Column("failed_at", DateTime, server_default=sa.func.now()), "with a default"),
    ],
    ids=lambda given: getattr(given, "name", ""),
)
def test_a_column_that_could_hold_a_row_back_is_in_doubt(column: Column[Any], said: str) -> None:
    """Where ignoring a column could hand out rows that must not run, it is not ignored."""
    message = refusal(table_of(processing(), column._copy()))
    assert repr(column.name) in message
    assert said in message


def test_a_doubt_of_a_time_keeps_the_free_value() -> None:
    """A proposed call keeps the value of a free row that the caller gave."""
    table = table_of(
        Column("status", String(10)), Column("completed_at", DateTime, default=sa.func.now())
    )
    with pytest.raises(AmbiguousTable, match=r"write: .*free='new', claimed='busy'.*done=\.\.\."):
        JobTable.infer(table, free="new", claimed="busy")


@pytest.mark.parametrize("type_", [Boolean, DateTime, Integer], ids=lambda type_: type_.__name__)
def test_names_that_hold_a_row_back(type_: Any) -> None:
    """Beside a state each of these is in doubt, whatever its type, until something is said."""
    for name in (name for names in inference.HELD.values() for name in names):
        table = table_of(processing(), Column(name, type_))
        assert f"{name!r} may hold a row back" in refusal(table)
        assert JobTable.infer(table, withdrawn={}).withdrawn == {}


# --- overrides


def test_an_override_settles_a_doubt_and_keeps_the_rest() -> None:
    """Whatever else was understood stays as it was."""
    table = table_of(
        *(status(), *ends(), Column("priority", Integer), Column("locked_at", DateTime)),
        *(Column("run_at", DateTime), Column("worker", Text), Column("finished_at", DateTime)),
    )
    roles = JobTable.infer(
        table, free="new", claimed="busy", done="done", order=[table.c.priority.desc()]
    )
    assert (roles.state, roles.due, roles.worker) == (
        table.c.status,
        table.c.run_at,
        table.c.worker,
    )
    assert list(roles.claimed) == [table.c.status, table.c.locked_at]
    assert set(roles.done) == {table.c.status, table.c.completed_at, table.c.finished_at}
    assert (list(roles.failed), list(roles.withdrawn)) == (
        [table.c.has_error],
        [table.c.deleted_at],
    )
    assert [str(term) for term in roles.order] == ["jobs.priority DESC"]


def test_a_mapping_is_all_that_is_written() -> None:
    """An end that is given as a mapping is not added to; what withdraws a row is."""
    table = table_of(processing(), *ends(), Column("locked_at", DateTime), Column("hold", Boolean))
    roles = JobTable.infer(
        table,
        claimed={"processing": True},
        done={"completed_at": sa.func.now()},
        withdrawn={"hold": True},
    )
    assert list(roles.claimed) == [table.c.processing]
    assert list(roles.done) == [table.c.completed_at]
    assert list(roles.withdrawn) == [table.c.deleted_at, table.c.hold]


def test_an_override_takes_a_column_s_role_away() -> None:
    """None says that a column of that name means nothing."""
    table = table_of(processing(), Column("worker", Text), Column("error", Text))
    roles = JobTable.infer(table, worker=None)
    assert (roles.worker, roles.error) == (None, table.c.error)
    assert JobTable.infer(table).worker is table.c.worker


@pytest.mark.parametrize("named", ["name", "column", "attribute"])
def test_an_override_by_name_column_or_attribute(named: str) -> None:
    """A state is found however it is named, and its enum's values are read."""
    table = table_of(processing(), status("new", "running", "done"))
    job = mapped(table)
    given = {"name": "status", "column": table.c.status, "attribute": job.status}[named]
    roles = JobTable.infer(job, state=given)
    assert (roles.state, str(roles.free)) == (table.c.status, "jobs.status = 'new'")


def test_an_override_of_a_parent_s_column() -> None:
    """In joined inheritance the table that has the given state is the one that is read."""

    class Own(DeclarativeBase):
        """The classes of this test."""

    class Job(Own):
        """The state is here."""

        __tablename__ = "jobs"
        id: Mapped[int] = mapped_column(primary_key=True)
        stage: Mapped[str]
        run_at: Mapped[datetime | None]

    class Mail(Job):
        """It has nothing to say of its own."""

        __tablename__ = "mails"
        id: Mapped[int] = mapped_column(sa.ForeignKey("jobs.id"), primary_key=True)
        text: Mapped[str]

    roles = JobTable.infer(Mail, state="stage", free="new", claimed="busy")
    assert (roles.table.name, roles.due) == ("jobs", Job.__table__.c.run_at)
    with pytest.raises(ClaimError, match="state=nope is not a column"):
        JobTable.infer(Mail, state="nope", free="new", claimed="busy")


# A table as a file of patches names it.
MAIL = table_of(status(), *ends(), Column("priority", Integer), Column("run_at", DateTime))


def test_a_file_of_patches_takes_the_same() -> None:
    """The arguments of a table in TOML settle what is in doubt, and the rest is read."""
    options = {"free": "new", "claimed": "busy", "order": "-priority"}
    roles = declared(MAIL, options)
    assert (roles.state, roles.due) == (MAIL.c.status, MAIL.c.run_at)
    assert list(roles.withdrawn) == [MAIL.c.deleted_at]
    assert [str(term) for term in roles.order] == ["jobs.priority DESC"]


def test_overrides_of_a_declaration_in_the_table_s_info() -> None:
    """They go before a dictionary there; a JobTable there is complete."""
    declared = {"state": "status", "free": "n", "claimed": "r"}
    table = table_of(status(), Column("run_at", DateTime), info={"atomic_claim": declared})
    assert str(JobTable.infer(table, free="w").free) == "jobs.status = 'w'"
    table.info["atomic_claim"] = JobTable(table, **declared)
    with pytest.raises(ClaimError, match="leave out the overrides"):
        JobTable.infer(table, free="w")


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
print(predicates.is_free(roles))
"""


def test_every_process_reads_alike() -> None:
    """The text of the claim does not depend on Python's hash seed."""
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
            {"id": 4, "run_at": LATER},
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
