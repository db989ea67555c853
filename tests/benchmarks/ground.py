"""The databases, and the tables in them: as large as asked for, filled by the database itself."""

import enum
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Final

import sqlalchemy as sa
from sqlalchemy import Column
from sqlalchemy.dialects import mysql

from atomic_claim import JobTable
from atomic_claim.cli.indexes import needed_indexes
from tests.databases import KINDS, Database, SQLiteDatabase
from tests.jobs import mapped
from tests.processes import Workspace
from tests.servers import DatabaseServer, MariaDB, MySQL, PostgreSQL

NAMES: Final = ("postgresql", "mysql", "mariadb", "sqlite")
THOUSAND: Final = 1000
START: Final = datetime(2024, 1, 1)  # noqa: DTZ001 - the columns are without a zone
PRECISE: Final = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
MOST_ATTEMPTS: Final = 5
ORDERS: Final = {
    "creation": ["created_at"],
    "priority": ["priority", "created_at"],
    "time": ["run_at", "created_at"],
}
# So many rows of successive places have one priority.
PER_PRIORITY: Final = 100


class ShippedPostgreSQL(PostgreSQL):
    """PostgreSQL with autovacuum and commits as shipped, but not waiting for the disk."""

    OPTIONS: ClassVar[dict[str, str]] = {
        name: value
        for name, value in PostgreSQL.OPTIONS.items()
        if name not in {"autovacuum", "synchronous_commit", "full_page_writes"}
    } | {"shared_buffers": "512MB", "max_wal_size": "4GB"}


class LargeMySQL(MySQL):
    """MySQL with room for millions of rows."""

    OPTIONS: ClassVar[list[str]] = [*MySQL.OPTIONS, "--innodb-buffer-pool-size=1G"]


class LargeMariaDB(MariaDB):
    """MariaDB with room for millions of rows."""

    OPTIONS: ClassVar[list[str]] = [*MariaDB.OPTIONS, "--innodb-buffer-pool-size=1G"]


SERVERS: Final[dict[str, type[DatabaseServer]]] = {
    "postgresql": ShippedPostgreSQL,
    "mysql": LargeMySQL,
    "mariadb": LargeMariaDB,
}


@dataclass
class Ground:
    """The databases of one run, started when first asked for.

    Attributes:
        urls: addresses of databases to use instead, by kind.
        only: the kinds to measure; all of them if there is none.
    """

    urls: dict[str, str] = field(default_factory=dict)
    only: Sequence[str] = ()
    _stack: ExitStack = field(default_factory=ExitStack)
    _found: dict[str, sa.URL] = field(default_factory=dict)
    _workspace: Workspace | None = None

    def __enter__(self) -> "Ground":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def kinds(self, *possible: str) -> list[str]:
        """Return the possible kinds that are to be measured."""
        return [name for name in possible or NAMES if not self.only or name in self.only]

    def url(self, name: str) -> sa.URL:
        """Return the URL of a database of this kind, which is created on first use."""
        if name not in self._found:
            self._found[name] = self._made(name)
        return self._found[name]

    def engine(self, name: str, **options: Any) -> sa.Engine:
        """Create an engine for a kind of database and dispose of it at the end."""
        made = sa.create_engine(self.url(name), **options)
        self._stack.callback(made.dispose)
        return made

    def version(self, name: str) -> str:
        """Return the kind and the version of the database."""
        query = "SELECT sqlite_version()" if name == "sqlite" else "SELECT version()"
        with self.engine(name).connect() as connection:
            return f"{name} {connection.exec_driver_sql(query).scalar_one()}".split(" on ")[0]

    def _made(self, name: str) -> sa.URL:
        if name in self.urls:
            return sa.make_url(self.urls[name])
        made: Database
        if name == "sqlite":
            made = SQLiteDatabase(Path(self._stack.enter_context(TemporaryDirectory())))
        else:
            if self._workspace is None:
                self._workspace = self._stack.enter_context(Workspace())
            made = KINDS[name][1](SERVERS[name](self._workspace))
        return self._stack.enter_context(made).url


class Kind(enum.Enum):
    """The values of the rich table's Enum column."""

    mail = "m"
    report = "r"


def job_table(
    name: str = "bench_jobs",
    *,
    lease: bool = False,
    keys: bool = False,
    token: bool = False,
    rich: bool = False,
    order: str = "creation",
    nullable: bool = True,
) -> JobTable:
    """Build a job table.

    Args:
        name: the table's name.
        lease: adds the columns for a lease, a token among them.
        keys: adds a column of exclusive keys, ``customer_id``.
        token: adds a token column without a lease.
        rich: adds a JSON and an Enum column, and gives the times a zone where there is one.
        order: one of :data:`ORDERS`; ``time`` needs a lease.
        nullable: whether the due column of a table with a lease may be NULL.
    """
    time = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
    time = time if rich else PRECISE
    more = [
        Column("run_at", PRECISE, nullable=nullable),
        Column("worker", sa.String(40)),
        Column("claim_token", sa.String(32)),
        Column("lease_until", PRECISE),
        Column("attempts", sa.Integer, nullable=False, default=0),
    ]
    table = sa.Table(
        name,
        sa.MetaData(),
        Column("id", sa.Integer, primary_key=True),
        Column("processing", sa.Boolean, nullable=False, default=False),
        Column("completed_at", time),
        Column("created_at", time, nullable=False),
        Column("payload", sa.JSON if rich else sa.String(50)),
        *([Column("kind", sa.Enum(Kind, name=f"{name}_kind"))] if rich else []),
        *([Column("claim_token", sa.String(32))] if token else []),
        *([Column("customer_id", sa.Integer)] if keys else []),
        *([Column("priority", sa.Integer, nullable=False)] if order == "priority" else []),
        *(more if lease else []),
    )
    roles: dict[str, Any] = {"state": "processing", "order": ORDERS[order]}
    if lease:
        roles |= {
            "due": "run_at",
            "worker": "worker",
            "token": "claim_token",
            "lease": "lease_until",
            "attempts": "attempts",
            "max_attempts": MOST_ATTEMPTS,
        }
    if token:
        roles |= {"token": "claim_token"}
    if keys:
        roles |= {"exclusive_by": "customer_id"}
    done = {"completed_at": sa.func.now()}
    return JobTable(table, done=done, naive_times="utc", **roles)


def with_class(jobs: JobTable) -> JobTable:
    """Declare a class mapped to the table of another declaration without a lease."""
    return JobTable(
        mapped(jobs.table),
        state="processing",
        order="created_at",
        token=jobs.token,
        done={"completed_at": sa.func.now()},
        naive_times="utc",
    )


@dataclass(frozen=True)
class Rows:
    """The content of a table.

    Attributes:
        count: the number of rows that are free or done.
        free: the percentage of them that are free; the others are done.
        timed: the number of them, the first ones, that have a time, which has come, if it may
            be NULL.
        not_due: the number of further rows that come first and are not due for a year.
        running: the number of further rows that run.
        spent: the number of further rows that have had all their attempts.
        done: the number of further rows that are done.
        keys: the number of customers, to which the rows belong in turn. Of the running rows one
            belongs to every tenth of them, from the first on.
    """

    count: int
    free: int = 100
    timed: int = 0
    not_due: int = 0
    running: int = 0
    spent: int = 0
    done: int = 0
    keys: int = 1

    @property
    def all(self) -> int:
        """How many rows there are altogether."""
        return self.count + self.not_due + self.running + self.spent + self.done


def fill(engine: sa.Engine, jobs: JobTable, rows: Rows) -> None:
    """Drop and create the table, with the indexes that ``atomic-claim migration`` writes."""
    table = jobs.table
    with engine.begin() as connection:
        table.drop(connection, checkfirst=True)
        table.create(connection)
    with numbers(engine) as digits:
        for first in range(0, rows.all, THOUSAND * THOUSAND):
            values = _values(engine.dialect, jobs, rows, digits, first)
            columns = [table.c[name] for name in values]
            thousands, ones = digits
            place = first + thousands.c.n * THOUSAND + ones.c.n
            both = thousands.join(ones, sa.true())
            found = sa.select(*values.values()).select_from(both).where(place < rows.all)
            with engine.begin() as connection:
                connection.execute(table.insert().from_select(columns, found))
    if engine.dialect.name == "postgresql":
        # What producers insert comes behind.
        with engine.begin() as connection:
            sequence = sa.func.pg_get_serial_sequence(table.name, "id")
            connection.execute(sa.select(sa.func.setval(sequence, rows.all)))
    add_indexes(engine, jobs)


def free_all(engine: sa.Engine, jobs: JobTable, *, kept: int = 0) -> None:
    """Free every running row but the first `kept` ones, so that each turn finds the same table."""
    table = jobs.table
    columns = {"claim_token": None, "lease_until": None, "worker": None, "attempts": 0}
    values = {name: value for name, value in columns.items() if name in table.c}
    free = table.update().values(processing=False, **values)
    with engine.begin() as connection:
        connection.execute(free.where(table.c.processing == sa.true(), table.c.id > kept))
    if engine.dialect.name == "postgresql":
        automatic = engine.execution_options(isolation_level="AUTOCOMMIT")
        with automatic.connect() as connection:
            connection.exec_driver_sql(f"VACUUM ANALYZE {table.name}")


def add_indexes(engine: sa.Engine, jobs: JobTable) -> None:
    """Add the claim's indexes, and let the planner know the table."""
    quoted = engine.dialect.identifier_preparer.format_table(jobs.table)
    analyse = {"postgresql": f"VACUUM ANALYZE {quoted}", "sqlite": "ANALYZE"}
    automatic = engine.execution_options(isolation_level="AUTOCOMMIT")
    with automatic.connect() as connection:
        for index in needed_indexes(jobs):
            connection.exec_driver_sql(index.create(engine.dialect))
        connection.exec_driver_sql(analyse.get(engine.dialect.name, f"ANALYZE TABLE {quoted}"))


@contextmanager
def numbers(engine: sa.Engine) -> Iterator[tuple[Any, Any]]:
    """Yield two aliases of a table that holds the numbers below 1,000."""
    table = sa.Table(
        "bench_numbers",
        sa.MetaData(),
        Column("n", sa.Integer, primary_key=True, autoincrement=False),
    )
    table.metadata.drop_all(engine)
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(table.insert(), [{"n": number} for number in range(THOUSAND)])
    try:
        yield table.alias("thousands"), table.alias("ones")
    finally:
        table.metadata.drop_all(engine)


def _values(
    dialect: sa.Dialect, jobs: JobTable, rows: Rows, digits: tuple[Any, Any], first: int
) -> dict[str, Any]:
    """Build the expression of each column from the row's place in the order."""
    thousands, ones = digits
    place = first + thousands.c.n * THOUSAND + ones.c.n
    due, running = rows.not_due, rows.not_due + rows.running
    spent = running + rows.spent
    ahead = spent + rows.done
    # Of each hundred, the free ones are spread over all.
    is_done = (place >= spent) & ((place < ahead) | ((place * 37) % 100 >= rows.free))
    found = {
        "id": place + 1,
        "processing": (place >= due) & (place < running),
        "completed_at": sa.case((is_done, sa.literal(START, PRECISE)), else_=sa.null()),
        "created_at": _later(dialect, place),
        "payload": sa.literal("a payload of some length"),
    }
    if "kind" in jobs.table.c:
        found["payload"] = sa.literal({"to": "someone@example.org", "tries": [1, 2]}, sa.JSON)
        found["kind"] = sa.literal(Kind.report, jobs.table.c.kind.type)
    if "priority" in jobs.table.c:
        # The same in the first row behind, however many come before it.
        found["priority"] = sa.func.floor((place - ahead) / sa.literal(float(PER_PRIORITY)))
    if "customer_id" in jobs.table.c:
        found["customer_id"] = sa.case((found["processing"], 10 * place), else_=place) % rows.keys
    if jobs.lease is None:
        return found
    year = datetime.now(UTC).replace(tzinfo=None) + timedelta(days=365)
    never, runs = sa.literal(year, PRECISE), found["processing"]
    times = [(place < due, never)]
    if not jobs.table.c.run_at.nullable:
        times.append((sa.true(), found["created_at"]))
    elif rows.timed:
        times.append(((place >= ahead) & (place < ahead + rows.timed), found["created_at"]))
    return found | {
        "run_at": sa.case(*times, else_=sa.null()),
        "lease_until": sa.case((runs, never), else_=sa.null()),
        "claim_token": sa.case((runs, "0" * 32), else_=sa.null()),
        "attempts": sa.case(
            (runs, 1), ((place >= running) & (place < spent), MOST_ATTEMPTS), else_=0
        ),
    }


def _later(dialect: sa.Dialect, place: Any) -> Any:
    """Build the time `place` seconds after the start, in the form the column stores."""
    if dialect.name == "postgresql":
        return sa.literal(START, sa.DateTime) + place * sa.text("interval '1 second'")
    if dialect.name == "sqlite":
        return sa.func.datetime(str(START), sa.cast(place, sa.String) + " seconds") + ".000000"
    return sa.func.timestampadd(sa.text("SECOND"), place, sa.literal(START, sa.DateTime))
