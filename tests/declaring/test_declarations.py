"""A JobTable that cannot hold is refused when it is declared; what is accepted holds."""

import enum
from collections.abc import Callable
from datetime import timedelta
from itertools import combinations
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, DateTime, Integer, String
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import ProgrammingError

from atomic_claim import (
    ClaimError,
    JobTable,
    claim_jobs,
    complete_jobs,
    extend_jobs,
    fail_jobs,
    predicates,
    release_jobs,
)
from atomic_claim.plan import ClaimRequest, claim_plan
from atomic_claim.roles import MAY_SHARE, USES
from tests.databases import Database
from tests.guides import GUIDES
from tests.jobs import fill, ids, job_table

once = pytest.mark.once
LEASE = timedelta(minutes=5)
NOW = sa.func.now()


class Status(enum.Enum):
    """States whose names differ from their values."""

    PENDING = "pending"
    RUNNING = "running"
    ENDED = "ended"


def table_of(*columns: Any) -> sa.Table:
    """Build a table of a key and these columns."""
    return sa.Table("jobs", sa.MetaData(), Column("id", Integer, primary_key=True), *columns)


# Pairs of roles


@once
@pytest.mark.parametrize(
    ("one", "other"), [pair for pair in combinations(USES, 2) if pair != ("state", "claimed")]
)
def test_pairs_of_roles(one: str, other: str) -> None:
    """Two roles need two columns, except where one column has a meaning for both."""
    counts = not {one, other}.isdisjoint({"attempts", "max_attempts"})
    table = table_of(
        Column("shared", Integer if counts else String(64)),
        Column("status", String(20)),
        Column("tries", Integer),
    )
    roles: dict[str, Any] = {"state": "status", "free": "a", "claimed": "b"}
    roles |= {"text_times": "%Y-%m-%d %H:%M:%f", "attempts": "tries"}
    roles |= {one: "shared", other: "shared"}
    if "claimed" in {one, other}:
        roles["claimed"] = {"status": "b", "shared": 1 if counts else "b"}
    if roles["state"] == "shared":
        roles["free"], roles["claimed"] = (0, 1) if counts else ("a", "b")
    if {one, other} == {"state", "lease"}:
        del roles["free"], roles["claimed"]
    if frozenset({one, other}) in MAY_SHARE:
        JobTable(table, **roles)
        return
    with pytest.raises(ClaimError, match=r"are one column, 'shared', but|'shared' is|shared is"):
        JobTable(table, **roles)


@once
def test_the_guide_shows_the_pairs() -> None:
    """The tables of the guide are those of the code."""
    guide = GUIDES["declaring_tables"]
    for role, use in USES.items():
        assert f"| `{role}` | {use} |" in guide
    for pair, meaning in MAY_SHARE.items():
        names = ", ".join(f"`{role}`" for role in USES if role in pair)
        assert f"| {names} | {meaning} |" in guide


# Declarations that are refused

STATUS = {"state": "status", "free": "new", "claimed": "run"}
Roles = Callable[[sa.Table], dict[str, Any]]


def full_table() -> sa.Table:
    """Build a table with a column for nearly everything."""
    return table_of(
        Column("status", String(10)),
        Column("kind", sa.Enum(Status)),
        Column("size", sa.SmallInteger),
        Column("owner", String(40)),
        Column("owner_id", Integer),
        Column("must", String(10), nullable=False),
        Column("locked_at", DateTime, nullable=False),
        Column("flag", sa.Boolean),
        Column("finished_at", DateTime),
        Column("touched_at", DateTime, onupdate=sa.func.now()),
        Column("moved_at", DateTime, server_default=sa.text("now() ON UPDATE now()")),
        Column("half", Integer, sa.Computed("size / 2")),
        Column("tags", postgresql.ARRAY(sa.Text)),
        Column("tiny", mysql.TINYINT(unsigned=True)),
        Column("extra", sa.JSON),
        Column("domain", postgresql.DOMAIN("stage", String(10))),
        Column("bit", mysql.BIT(1)),
        Column("bits", postgresql.BIT(1)),
        Column("d", Integer, default=0),
        Column("e", Integer, server_default="0"),
        Column("hidden", sa.Boolean, server_default=sa.true()),
        Column("stage", String(10), server_default=sa.text("'new'::character varying")),
        Column("made_at", DateTime, server_default=NOW),
        Column("draft", sa.Boolean, default=True),
    )


REFUSED: dict[str, tuple[dict[str, Any] | Roles, str]] = {
    "claimed is free": ({**STATUS, "claimed": "new"}, "a claimed row would count as free"),
    "claimed is among the free": (
        {**STATUS, "free": ("new", "run")},
        "a claimed row would count as free",
    ),
    "claimed is done": ({**STATUS, "done": "run"}, "a claimed row would count as done"),
    "claimed is failed": ({**STATUS, "failed": "run"}, "a claimed row would count as failed"),
    "free is done": ({**STATUS, "done": "new"}, "a free row would count as done"),
    "free is failed": ({**STATUS, "failed": "new"}, "a free row would count as failed"),
    "done is failed": (
        {**STATUS, "done": "end", "failed": "end"},
        "a done row would count as failed",
    ),
    "claimed is withdrawn": ({**STATUS, "withdrawn": {"status": "run"}}, "count as withdrawn"),
    "released is claimed": ({**STATUS, "released": "run"}, "a released row would count as claimed"),
    "released is not free": ({**STATUS, "released": "held"}, "'held' to jobs.status, which is not"),
    "free is a set": ({**STATUS, "free": {"new", "old"}}, "write a tuple"),
    "free is nothing": ({**STATUS, "free": ()}, "no row would ever be claimed"),
    "free without the mark": (
        lambda t: {"free": t.c.owner == "", "claimed": {"status": "new"}},
        "depends on no column that a claim writes",
    ),
    "done by a column's name": (
        {**STATUS, "done": "finished_at"},
        "write done={'status': 'finished_at'} for the value, or done={'finished_at': ...}",
    ),
    "free by a column's name": ({**STATUS, "free": "owner"}, r"write free=('owner',) for the"),
    "a value that is too long": ({**STATUS, "done": "accomplished"}, "strings of up to 10"),
    "a number in a string": ({**STATUS, "free": 0}, "free has 0 in 'status'"),
    "a string in a number": ({"state": "size", "free": "a", "claimed": 1}, "integers up to 32767"),
    "a number beyond its type": ({"state": "size", "free": 0, "claimed": 40_000}, "up to 32767"),
    "an enum's value": (
        {"state": "kind", "free": "pending", "claimed": "RUNNING"},
        "holds 'PENDING', 'RUNNING', 'ENDED' ('PENDING' is the name of that member)",
    ),
    "no value of the enum": (
        {"state": "kind", "free": "PENDING", "claimed": "WORKING"},
        "and holds 'PENDING', 'RUNNING', 'ENDED': write the value as it stands",
    ),
    "NULL in NOT NULL": ({"state": "must", "free": None, "claimed": "run"}, "is NOT NULL"),
    "a time that is never NULL": ({"state": "locked_at"}, "free has NULL in 'locked_at'"),
    "a state that moves": (
        {"state": "touched_at"},
        "state='touched_at' is changed by every UPDATE of its row",
    ),
    "a lease that moves": ({**STATUS, "lease": "moved_at"}, "lease='moved_at' is changed by"),
    "a due time that moves": ({**STATUS, "due": "touched_at"}, "due='touched_at' is changed by"),
    "a worker of numbers": ({**STATUS, "worker": "owner_id"}, "expected a string, since it gets"),
    "an error flag": ({**STATUS, "error": "flag"}, "expected a string or JSON"),
    "attempts in words": ({**STATUS, "attempts": "owner"}, "expected an integer"),
    "a computed counter": ({**STATUS, "attempts": "half"}, "'half', which the database computes"),
    "a computed state": ({"state": "half", "free": 0, "claimed": 1}, "GENERATED"),
    "a computed end": ({**STATUS, "done": {"half": 1}}, "done writes 'half'"),
    "an array": ({"state": "tags", "free": "a", "claimed": "b"}, "expected one value"),
    "JSON": ({"state": "extra", "free": "a", "claimed": "b"}, "expected one value"),
    "NULL is free, and is claimed": (
        {**STATUS, "claimed": None, "null_is_free": True},
        "a claimed row would count as free",
    ),
    "a flag's 1 is true": (
        {"state": "flag", "free": True, "claimed": 1},
        "a claimed row would count as free",
    ),
    "a member and its name": (
        {"state": "kind", "free": Status.PENDING, "claimed": "PENDING"},
        "a claimed row would count as free",
    ),
    "a text with NUL": ({**STATUS, "claimed": "a\0"}, "without NUL and surrogates"),
    "a text with a surrogate": ({**STATUS, "done": "a\udc80"}, "without NUL and surrogates"),
    "a number in a domain of texts": (
        {"state": "domain", "free": "new", "claimed": 5},
        "claimed has 5 in 'domain'",
    ),
    "a maximum beyond its type": (
        {**STATUS, "attempts": "size", "max_attempts": 32_768},
        "counts to 32767, so no row would ever be spent",
    ),
    "a maximum beyond an unsigned type": (
        {**STATUS, "attempts": "tiny", "max_attempts": 256},
        "counts to 255",
    ),
    "a claim that writes the counter": (
        {**STATUS, "attempts": "size", "claimed": {"status": "run", "size": 1}},
        "attempts counts the claims and claimed marks a claimed row, beside the state",
    ),
    "a text in MySQL's bit": (
        {"state": "bit", "free": "0", "claimed": "1"},
        "'1' in 'bit', which is BIT(length=1) and holds integers and booleans",
    ),
    "withdrawn by a default": ({**STATUS, "withdrawn": {"d": 0}}, "has 0 in 'd', which is the col"),
    "withdrawn by a server's default": ({**STATUS, "withdrawn": {"e": 0}}, "no fresh row would"),
    "withdrawn by a flag's default": (
        {**STATUS, "withdrawn": {"hidden": True}},
        "has True in 'hidden', which is the column's default",
    ),
    "withdrawn by a text's default": (
        {**STATUS, "withdrawn": {"stage": "new"}},
        "has 'new' in 'stage', which is the column's default",
    ),
    "withdrawn by a time's default": (
        {**STATUS, "withdrawn": {"made_at": NOW}},
        "has func.now() in 'made_at', which is the column's default",
    ),
    "unleased beyond all times": (
        {**STATUS, "lease": "finished_at", "stamps": "locked_at", "unleased": timedelta.max},
        "after the year 9999",
    ),
}


@once
@pytest.mark.parametrize("declaration", REFUSED)
def test_refused_declarations(declaration: str) -> None:
    """Refuse before there is a database, with the cure."""
    given, words = REFUSED[declaration]
    table = full_table()
    with pytest.raises(ClaimError) as raised:
        JobTable(table, **(given if isinstance(given, dict) else given(table)))
    assert words in str(raised.value)


@once
@pytest.mark.parametrize(
    "roles",
    [
        {**STATUS, "free": (None, "new")},
        {**STATUS, "done": {"status": "end"}, "failed": {"status": "end", "flag": True}},
        {**STATUS, "released": "late", "free": ("new", "late")},
        {**STATUS, "attempts": "tiny", "max_attempts": 255},
        {"state": "kind", "free": Status.PENDING, "claimed": "RUNNING", "done": "ENDED"},
        {"state": "flag", "done": {"flag": False, "finished_at": NOW}},
        {"state": "flag", "free": 0, "claimed": 1},
        {"state": "domain", "free": "new", "claimed": "run"},
        {**STATUS, "free": ("owner",)},
        {**STATUS, "done": {"status": "owner"}},
        {"state": "bit", "free": 0, "claimed": True},
        {"state": "bits", "free": "0", "claimed": "1"},
        {**STATUS, "withdrawn": {"draft": True}},
        {**STATUS, "withdrawn": {"d": 1, "e": 1, "hidden": False, "stage": "old", "flag": True}},
    ],
    ids=",".join,
)
def test_accepted_declarations(roles: dict[str, Any]) -> None:
    """The twin: what resembles the refused ones and holds is accepted."""
    JobTable(full_table(), **roles)


@once
def test_text_times_in_the_servers_zone() -> None:
    """`naive_times` says what a text means, as it does for a time."""
    table = table_of(Column("status", String(10)), Column("run_at", String(30)))
    said = {**STATUS, "due": "run_at", "text_times": "%Y-%m-%d %H:%M:%S"}
    for zone, expected in (("server", True), ("utc", False), (None, False)):
        jobs = JobTable(table, naive_times=zone, **said)  # type: ignore[arg-type]
        sql = str(predicates.claimable(jobs).compile(dialect=sqlite.dialect()))
        assert ("'localtime'" in sql) is expected


# Declarations that hold


def test_null_beside_other_free_values(database: Database) -> None:
    """NULL may be one of several free values; the first is written on release."""
    table = table_of(Column("status", String(10)))
    engine = database.engine()
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        states = (None, "late", "end")
        connection.execute(
            table.insert(), [{"id": n, "status": s} for n, s in enumerate(states, 1)]
        )
    jobs = JobTable(table, state="status", free=("late", None), claimed="run")
    claim = claim_jobs(engine, jobs, 5)
    assert ids(claim) == [1, 2]
    release_jobs(engine, claim, unfenced=True)
    with engine.connect() as connection:
        query = sa.select(table.c.status).order_by(table.c.id)
        assert connection.scalars(query).all() == ["late", "late", "end"]


@once
@pytest.mark.parametrize(
    ("free", "claimed"),
    [
        (True, "false"),
        ((True, None), "false"),
        (False, "true"),
        ((False, None), "true"),
        (sa.and_(sa.column("flag").is_(None), sa.column("id") < 9), "true"),
    ],
    ids=str,
)
def test_the_mark_of_a_flag(free: Any, claimed: str) -> None:
    """A claim writes the value that is not free, whether it is declared or inferred."""
    table = table_of(Column("flag", sa.Boolean))
    for declared in (JobTable, JobTable.infer):
        jobs = declared(table, state="flag", free=free)
        assert str(jobs.claimed[table.c.flag]) == claimed


@once
@pytest.mark.parametrize(
    "claimed", [True, sa.true(), {"flag": sa.true()}], ids=["bool", "SQL", "dict"]
)
def test_the_free_value_of_a_flag(claimed: Any) -> None:
    """The value that is free is the one that no claim writes, in whichever form it is given."""
    table = table_of(Column("flag", sa.Boolean, nullable=False))
    assert str(JobTable(table, state="flag", claimed=claimed).free) == "jobs.flag = false"


@once
@pytest.mark.parametrize(("state", "mark"), [("flag", "true"), ("locked_at", "CURRENT_TIMESTAMP")])
def test_a_mark_that_leaves_out_the_state(state: str, mark: str) -> None:
    """A mapping is completed by the value of the state that its type tells."""
    table = table_of(
        *(Column("flag", sa.Boolean), Column("locked_at", DateTime), Column("note", String(9)))
    )
    claimed = JobTable(table, state=state, claimed={"note": "x"}).claimed
    assert {column.name: str(value) for column, value in claimed.items()} == {
        state: mark,
        "note": "'x'",
    }


class Inverted(sa.TypeDecorator[bool]):
    """A flag that is stored as its contrary."""

    impl = sa.Boolean
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:  # noqa: ARG002
        """Write the contrary."""
        return None if value is None else not value

    def process_result_value(self, value: Any, dialect: Any) -> Any:  # noqa: ARG002
        """Read the contrary."""
        return None if value is None else not value


class MinusOne(sa.TypeDecorator[bool]):
    """A flag in an INTEGER column, where true is -1."""

    impl = sa.Integer
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:  # noqa: ARG002
        """Write -1 for true."""
        return None if value is None else -int(value)

    def process_result_value(self, value: Any, dialect: Any) -> Any:  # noqa: ARG002
        """Read true only from -1."""
        return None if value is None else value == -1


@pytest.mark.parametrize("type_", [Inverted(), MinusOne()], ids=lambda type_: type(type_).__name__)
def test_flags_of_a_type_that_converts(database: Database, type_: Any) -> None:
    """A flag is compared and written as its type stores it, in the state and in an end."""
    zero = None if isinstance(type_, Inverted) else "0"
    flags = [Column(name, type_, server_default=zero) for name in ("processing", "done")]
    table, engine = table_of(*flags), database.engine()
    table.metadata.create_all(engine)
    fresh = {"processing": False, "done": False}
    with engine.begin() as connection:
        rows = [fresh, fresh, {**fresh, "processing": True}, {**fresh, "done": True}]
        connection.execute(table.insert(), [{"id": n, **r} for n, r in enumerate(rows, 1)])
    jobs = JobTable(table, state="processing", done={"done": True})
    claim = claim_jobs(engine, jobs, 5)
    assert [(row.id, row.processing) for row in claim] == [(1, True), (2, True)]
    assert complete_jobs(engine, claim[:1], unfenced=True) == 1
    assert release_jobs(engine, claim[1:], unfenced=True) == 1
    assert ids(claim_jobs(engine, jobs, 5)) == [2]


def reflected_jobs(engine: sa.Engine, *statements: str) -> sa.Table:
    """Execute statements that create the table of jobs, and reflect it."""
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    return sa.Table("jobs", sa.MetaData(), autoload_with=engine)


@pytest.mark.databases("postgresql")
def test_columns_of_domains(database: Database) -> None:
    """A reflected domain has the roles that the type beneath it has."""
    engine = database.engine()
    table = reflected_jobs(
        engine,
        "CREATE DOMAIN flag AS boolean",
        "CREATE DOMAIN moment AS timestamptz",
        "CREATE DOMAIN word AS varchar(32)",
        "CREATE TABLE jobs (id int PRIMARY KEY, processing flag NOT NULL)",
        "ALTER TABLE jobs ADD completed_at moment, ADD lease_until moment",
        "ALTER TABLE jobs ADD claim_token word, ADD worker word",
        "INSERT INTO jobs VALUES (1, false), (2, true)",
    )
    claim = claim_jobs(engine, table, 5, lease=LEASE, worker="w")
    assert (ids(claim), claim[0].worker) == ([1], "w")
    assert extend_jobs(engine, claim) == complete_jobs(engine, claim) == 1


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize("role", ["state", "exclusive_by"])
def test_a_domain_of_an_enum(database: Database, role: str) -> None:
    """PostgreSQL compares no such column with anything, so it is refused where it is declared."""
    engine = database.engine()
    table = reflected_jobs(
        engine,
        "CREATE TYPE stage AS ENUM ('new', 'run')",
        "CREATE DOMAIN stage_of_a_job AS stage",
        "CREATE TABLE jobs (id int PRIMARY KEY, processing boolean, stage stage_of_a_job)",
    )
    others = {"state": "processing", "free": "new", "claimed": "run"}
    if role == "exclusive_by":
        others |= {"free": False, "claimed": True}
    with pytest.raises(ClaimError, match=r"; expected (one value|an integer)"):
        JobTable(table, **{**others, role: "stage"})
    with engine.connect() as connection, pytest.raises(ProgrammingError, match="does not exist"):
        connection.execute(sa.select(table).where(table.c.stage == "new"))


def test_an_end_of_several_values(database: Database) -> None:
    """A row has ended if it bears all values of the mapping: fresh rows bear one of them."""
    table = job_table(Column("finished_at", DateTime), Column("attempts", Integer, default=0))
    engine = database.engine()
    fill(engine, table, 3, attempts=0)
    done = {"processing": False, "finished_at": NOW, "attempts": 0}
    jobs = JobTable(table, state="processing", done=done, attempts="attempts", naive_times="utc")
    assert complete_jobs(engine, claim_jobs(engine, jobs, 2), unfenced=True) == 2
    assert ids(claim_jobs(engine, jobs, 5)) == [3]


@pytest.mark.parametrize("null", [None, sa.null()], ids=["None", "SQL"])
def test_an_end_that_clears_a_column(database: Database, null: Any) -> None:
    """NULL is a value of an end like any other: a row that bears it, too, has ended."""
    table = job_table(Column("finished_at", DateTime), Column("queue", String(9)))
    engine = database.engine()
    fill(engine, table, 2, queue="mail")
    fill(engine, table, 1, first=3)
    done = {"finished_at": NOW, "queue": null}
    jobs = JobTable(table, state="processing", done=done, naive_times="utc")
    assert complete_jobs(engine, claim_jobs(engine, jobs, 1), unfenced=True) == 1
    claim = claim_jobs(engine, jobs, 5)
    assert ids(claim) == [2, 3]
    assert release_jobs(engine, claim, unfenced=True) == 2
    routed = JobTable(table, state="processing", withdrawn={"queue": null})
    assert ids(claim_jobs(engine, routed, 5)) == [2]


NULLABLE = (True, False)


def leased_table(*, nullable: bool) -> sa.Table:
    """Build a table whose lease, token and worker may or may not be NULL."""
    zero = None if nullable else "1970-01-02 00:00:00"
    text = None if nullable else ""
    return job_table(
        Column("finished_at", DateTime),
        Column("lease_until", DateTime, nullable=nullable, server_default=zero),
        Column("claim_token", String(32), nullable=nullable, server_default=text),
        Column("worker", String(20), nullable=nullable, server_default=text),
    )


@pytest.mark.parametrize("nullable", NULLABLE)
@pytest.mark.parametrize("state", ["processing", "lease_until"])
def test_columns_that_are_not_null(database: Database, state: str, *, nullable: bool) -> None:
    """A lease ends now, and a worker is empty, where NULL cannot be; the lease may be the state."""
    table = leased_table(nullable=nullable)
    engine = database.engine()
    fill(engine, table, 4)
    jobs = JobTable(
        table,
        state=state,
        done={"finished_at": NOW},
        lease="lease_until",
        token="claim_token",
        worker="worker",
        naive_times="utc",
    )
    if not nullable or state == "lease_until":
        with pytest.raises(ClaimError, match=r"lease_until holds the lease and .* needs lease="):
            claim_jobs(engine, jobs)
    first = claim_jobs(engine, jobs, 2, lease=LEASE, worker="ann")
    assert ids(first) == [1, 2]
    second = claim_jobs(engine, jobs, 5, lease=LEASE, worker="bob")
    assert ids(second) == [3, 4]
    assert extend_jobs(engine, first) == 2
    assert complete_jobs(engine, first) == 2
    assert claim_jobs(engine, jobs, 5, lease=LEASE) == []
    assert release_jobs(engine, second, [second[1]]) == 1
    with engine.begin() as connection:
        past = {"lease_until": sa.text("'2020-01-01 00:00:00'")}
        connection.execute(table.update().where(table.c.id == 3).values(past))
    assert {claim_jobs(engine, jobs, lease=LEASE)[0].id for _ in range(2)} == {3, 4}


@pytest.mark.databases("mysql", "mariadb")
def test_a_released_lease_is_over_at_once(database: Database) -> None:
    """A lease that is the state ends now, however the column rounds the fraction of the second."""
    table, engine = leased_table(nullable=False), database.engine()
    fill(engine, table, 1)
    jobs = JobTable(
        table, state="lease_until", lease="lease_until", token="claim_token", naive_times="utc"
    )
    with engine.connect() as connection:
        connection.exec_driver_sql("SET timestamp = 1700000000.75")
        assert release_jobs(connection, claim_jobs(connection, jobs, lease=LEASE)) == 1
        assert ids(claim_jobs(connection, jobs, lease=LEASE)) == [1]
        connection.exec_driver_sql("SET timestamp = DEFAULT")


def test_a_worker_that_is_not_named(database: Database) -> None:
    """A claim that names no worker leaves the column as it is."""
    table = job_table(Column("owner", String(20)))
    engine = database.engine()
    fill(engine, table, 1, owner="ann")
    jobs = JobTable(table, state="processing", worker="owner")
    assert claim_jobs(engine, jobs)[0].owner == "ann"


def test_a_counter_at_its_end(database: Database) -> None:
    """A claim leaves a counter at the end of its type where it is."""
    table = job_table(Column("attempts", sa.SmallInteger))
    engine = database.engine()
    fill(engine, table, 1, attempts=32_767)
    fill(engine, table, 1, first=2, attempts=None)
    jobs = JobTable(table, state="processing", attempts="attempts")
    assert [job.attempts for job in claim_jobs(engine, jobs, 5)] == [32_767, 1]


def test_times_beyond_the_range(database: Database) -> None:
    """A lease or a delay that no database can store is refused, and nothing is written."""
    table = leased_table(nullable=True)
    engine = database.engine()
    fill(engine, table, 1)
    roles = {"lease": "lease_until", "token": "claim_token", "due": "finished_at"}
    jobs = JobTable(table, state="processing", naive_times="utc", **roles)  # type: ignore[arg-type]
    far = timedelta(days=3_650_000)
    with pytest.raises(ClaimError, match=r"lease is .* after the year 9999"):
        claim_jobs(engine, jobs, lease=far)
    claim = claim_jobs(engine, jobs, lease=LEASE)
    with pytest.raises(ClaimError, match=r"lease is .* after the year 9999"):
        extend_jobs(engine, claim, lease=far)
    with pytest.raises(ClaimError, match=r"retry is .* after the year 9999"):
        fail_jobs(engine, claim, retry=far)
    assert leased_rows(engine, table) == 1


def leased_rows(engine: sa.Engine, table: sa.Table) -> int:
    """Count the rows that are claimed and have a lease."""
    claimed = sa.and_(table.c.processing == sa.true(), table.c.lease_until.is_not(None))
    with engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).where(claimed)) or 0


@once
def test_the_check_of_a_lease_allows_for_rounding() -> None:
    """A lease without fractions is stored rounded, so the time that it must exceed is not."""
    table = table_of(
        Column("processing", sa.Boolean, nullable=False),
        Column("lease_until", postgresql.TIMESTAMP(timezone=True, precision=0)),
        Column("claim_token", String(32)),
    )
    jobs = JobTable(table, state="processing", lease="lease_until", token="claim_token")
    request = ClaimRequest(1, lease=timedelta(seconds=0.1))
    plan = claim_plan(jobs, request, entities=False)
    compiled = str(plan.fault().compile(dialect=postgresql.dialect()))  # type: ignore[no-untyped-call]
    assert "+ 0.5" not in compiled
    marked = str(plan.values[table.c.lease_until].compile(dialect=postgresql.dialect()))  # type: ignore[no-untyped-call]
    assert "+ 0.5" in marked
