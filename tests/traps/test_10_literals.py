"""Trap 10: a partial index is lost to a state that is a parameter, under a generic plan."""

import enum
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, Index, String

from atomic_claim import JobTable, claim_jobs, claim_statement
from tests.databases import Database
from tests.jobs import BINDS, bound, fill, ids, job_table, mapped, rows
from tests.statements import sent_by

on_postgresql = pytest.mark.databases("postgresql")

AWKWARD = [
    "it's",
    'a "b" c',
    "back\\slash",
    "end\\",
    "\\' OR 1 = 1 -- ",
    "100%",
    "%s",
    "%(limit)s",
    "%%",
    ":free",
    "?",
    "{}",
    "[POSTCOMPILE_limit]",
    " ",
    "über\N{SNOWMAN}",
]


class Kind(enum.Enum):
    """States whose names differ from their values, which are what is stored."""

    FREE = "it's 100% free\\"
    TAKEN = 'ta"k%sen'
    DONE = "done"


def queue(database: Database) -> tuple[sa.Engine, sa.Table, JobTable]:
    """Twenty thousand waiting jobs with an index partial on their state, for generic plans."""
    engine = database.engine(connect_args={"prepare_threshold": 0})

    @sa.event.listens_for(engine, "connect")
    def _(connection: Any, _record: object) -> None:
        connection.execute("SET plan_cache_mode = force_generic_plan")
        connection.commit()

    table = job_table(
        Column("state", String(10), nullable=False),
        Column("worker", String(20)),
        Column("claim_token", String(32)),
    )
    waiting = Index("jobs_waiting", table.c.created_at, postgresql_where=sa.text("state = 'w'"))
    table.append_constraint(waiting)
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO jobs (id, processing, created_at, state) "
            "SELECT n, false, timestamp '2024-01-01' + n * interval '1 minute', 'w' "
            "FROM generate_series(1, 20000) AS n"
        )
        connection.exec_driver_sql("ANALYZE jobs")
    jobs = JobTable(
        table,
        state="state",
        free="w",
        claimed="r",
        order="created_at",
        worker="worker",
        token="claim_token",
    )
    return engine, table, jobs


def generic_plan(connection: sa.Connection, beginning: str) -> str:
    """Return the generic plan of the only prepared statement that begins with this text."""
    known = connection.exec_driver_sql(
        "SELECT name, cardinality(parameter_types), generic_plans, custom_plans "
        "FROM pg_prepared_statements WHERE statement LIKE %s",
        (beginning + "%",),
    )
    name, parameters, generic, custom = known.one()
    assert parameters > 0
    assert (generic > 0, custom) == (True, 0)
    # A generic plan is the same whatever the values are.
    nulls = ", ".join(["NULL"] * parameters)
    plan = connection.exec_driver_sql(f'EXPLAIN (COSTS OFF) EXECUTE "{name}" ({nulls})')
    return "\n".join(plan.scalars())


@on_postgresql
@pytest.mark.parametrize("limit", [1, 10])
def test_a_generic_plan_uses_the_partial_index(database: Database, limit: int) -> None:
    """Prepared and planned without its parameters, the claim still reads by the index."""
    engine, _, jobs = queue(database)
    with engine.connect() as connection:
        for first in (1, 1 + limit):
            claimed = claim_jobs(connection, jobs, limit, worker="alice")
            assert ids(claimed) == list(range(first, first + limit))
        plan = generic_plan(connection, "WITH claimable")
    assert "using jobs_waiting on jobs" in plan
    assert "Seq Scan on jobs" not in plan


@on_postgresql
def test_a_parameter_loses_the_partial_index(database: Database) -> None:
    """The twin: the same queue asked for by a parameter is read and sorted as a whole."""
    engine, table, _ = queue(database)
    waiting = sa.select(table.c.id).where(table.c.state == "w").order_by(table.c.created_at)
    with engine.connect() as connection:
        query = waiting.limit(1).with_for_update(skip_locked=True, key_share=True)
        assert connection.scalar(query) == 1
        plan = generic_plan(connection, "SELECT jobs.id")
    assert "jobs_waiting" not in plan
    assert "Seq Scan on jobs" in plan
    assert "Sort" in plan


@pytest.mark.parametrize("kind", BINDS)
def test_declared_values_are_no_parameters(database: Database, kind: str) -> None:
    """Declared values are literals in every statement; values given by call are parameters."""
    engine = database.engine()
    table = job_table(Column("state", String(20)))
    fill(engine, table, 2, state="waiting for it")
    given = mapped(table) if kind.startswith("session") else table
    jobs = JobTable(given, state="state", free="waiting for it", claimed="taken by us")
    sent = sent_by(engine)
    with bound(engine, kind) as bind:
        [job] = claim_jobs(bind, jobs, where=table.c.id > 1, values={"note": "by call"})
        assert (job.id, job.note) == (2, "by call")
    texts = "\n".join(text for text, _ in sent)
    parameters = repr([parameters for _, parameters in sent])
    assert "'waiting for it'" in texts
    assert "'taken by us'" in texts
    assert "by call" not in texts
    assert "by call" in parameters
    assert "waiting for it" not in parameters
    assert "taken by us" not in parameters


def test_declared_values_are_in_the_cache_key() -> None:
    """Two tables' statements have one key if they declare the same, and two if they do not."""
    table = job_table(Column("state", String(20)), Column("tries", sa.Integer))

    def key(free: Any = "w", claimed: Any = "r", most: int = 3) -> Any:
        jobs = JobTable(
            table,
            state="state",
            free=free,
            claimed=claimed,
            attempts="tries",
            max_attempts=most,
        )
        found = claim_statement(jobs, 2)._generate_cache_key()
        assert found is not None
        return found.key

    assert key() == key()
    others = [key(free="x"), key(claimed="x"), key(most=4), key(free=("w", "x"))]
    assert len({key(), *others}) == 5


def claimed_once(engine: sa.Engine, jobs: JobTable, expected: Any) -> None:
    """Claim by row and by entity: of two jobs only the free one, and it is then as declared."""
    table = jobs.table
    for given in (table, mapped(table)):
        with engine.begin() as connection:
            connection.execute(table.update().values(state=expected[0]).where(table.c.id == 2))
        as_given = JobTable(given, state="state", free=expected[0], claimed=expected[1])
        with bound(engine, "sessionmaker") as maker:
            [job] = claim_jobs(maker, as_given, 5)
            assert (job.id, job.state) == (2, expected[1])
            assert claim_jobs(maker, as_given, 5) == []
    with engine.connect() as connection:
        assert list(connection.scalars(sa.select(table.c.state).order_by(table.c.id))) == [
            expected[2],
            expected[1],
        ]


DIALECTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "sqlite": [("sqlite", {})],
    "postgresql": [
        ("postgresql+psycopg", {}),
        ("postgresql+psycopg2", {}),
        ("postgresql+psycopg", {"options": "-c standard_conforming_strings=off"}),
    ],
    "mysql": [
        ("mysql+pymysql", {}),
        ("mysql+pymysql", {"init_command": "SET sql_mode = 'NO_BACKSLASH_ESCAPES'"}),
    ],
    "mariadb": [
        ("mariadb+pymysql", {}),
        ("mysql+pymysql", {}),
        ("mariadb+pymysql", {"init_command": "SET sql_mode = 'NO_BACKSLASH_ESCAPES'"}),
    ],
}


def engines(database: Database) -> list[sa.Engine]:
    """Every way to quote a string that the database and its drivers have."""
    return [
        database.engine(drivername=name, connect_args=arguments)
        for name, arguments in DIALECTS[database.name]
    ]


def test_awkward_strings_are_quoted(database: Database) -> None:
    """Quotes, backslashes, percent signs and other characters with a meaning in SQL or a driver."""
    table = job_table(
        Column("state", String(40)), mysql_charset="utf8mb4", mariadb_charset="utf8mb4"
    )
    for engine in engines(database):
        fill(engine, table, 2, state="other")
        for place, free in enumerate(AWKWARD):
            # Not the neighbour: a space more or less is nothing to some collations.
            claimed = AWKWARD[place - 2]
            jobs = JobTable(table, state="state", free=free, claimed=claimed)
            claimed_once(engine, jobs, (free, claimed, "other"))
        table.metadata.drop_all(engine)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("stored", ["names", "values"])
def test_enums_are_rendered_as_they_are_stored(
    database: Database, native: bool, stored: str
) -> None:
    """A member is written by its name or its value, whichever the column's type says."""
    options: dict[str, Any] = {} if stored == "names" else {"values_callable": values_of}
    type_ = sa.Enum(Kind, native_enum=native, name="kinds", length=40, **options)
    table = job_table(Column("state", type_))
    for engine in engines(database):
        fill(engine, table, 2, state=Kind.DONE)
        jobs = JobTable(table, state="state", free=Kind.FREE, claimed=Kind.TAKEN)
        claimed_once(engine, jobs, (Kind.FREE, Kind.TAKEN, Kind.DONE))
        table.metadata.drop_all(engine)


def values_of(kinds: Any) -> list[str]:
    """Return the stored values of an enumeration's members."""
    return [kind.value for kind in kinds]


class Upper(sa.TypeDecorator[str]):
    """A string that is stored in capitals."""

    impl = String(40)
    cache_ok = True

    def process_bind_param(self, value: Any, _dialect: object) -> Any:
        """Write capitals."""
        return None if value is None else value.upper()

    def process_result_value(self, value: Any, _dialect: object) -> Any:
        """Read small letters."""
        return None if value is None else value.lower()


def test_a_type_of_the_users_own_is_asked(database: Database) -> None:
    """Declared values go through the column's type, as a parameter would."""
    table = job_table(Column("state", Upper()))
    for engine in engines(database):
        fill(engine, table, 2, state="done")
        jobs = JobTable(table, state="state", free="it's 100%", claimed="r\\")
        claimed_once(engine, jobs, ("it's 100%", "r\\", "done"))
        with engine.connect() as connection:
            stored = connection.scalars(sa.text("SELECT state FROM jobs ORDER BY id"))
            assert list(stored) == ["DONE", "R\\"]
        table.metadata.drop_all(engine)


def test_an_unquoted_value_would_be_noticed(database: Database) -> None:
    """The twin: a value put between quotes as it is breaks the statement, or finds nothing."""
    engine, table = database.engine(), job_table(Column("state", String(40)))
    table.metadata.create_all(engine)
    free = "it's 100%"
    with engine.begin() as connection:
        connection.execute(table.insert(), rows(1, state=free))
        query = sa.select(table.c.id).where(sa.literal_column(f"'{free}'") == table.c.state)
        with pytest.raises(sa.exc.DBAPIError):
            connection.execute(query)
