"""The rules of the one road: one bind, one transaction, nothing lost, a mark that is checked."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, String
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    reconstructor,
    relationship,
    sessionmaker,
)

from atomic_claim import (
    ClaimError,
    JobTable,
    UnsupportedDialect,
    backends,
    claim_jobs,
    claim_statement,
    extend_jobs,
)
from atomic_claim.backends.sqlite import SQLite
from atomic_claim.plan import MARGIN
from tests.databases import Database, end_connection
from tests.jobs import OWN, bound, fill, ids, job_table, mapped, taken

SERVERS = pytest.mark.databases("postgresql", "mysql", "mariadb")


# One bind.


class Base(DeclarativeBase):
    """Jobs with lines that a SELECT loads."""


class Job(Base):
    """A job; its lines are loaded by a second SELECT."""

    __tablename__ = "jobs"

    id: Mapped[int] = mapped_column(primary_key=True)
    processing: Mapped[bool] = mapped_column(default=False)
    lines: Mapped[list["Line"]] = relationship(lazy="selectin")


class Line(Base):
    """A line of a job."""

    __tablename__ = "lines"

    id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[int] = mapped_column(sa.ForeignKey("jobs.id"))


def routed(writes: sa.Engine, reads: sa.Engine) -> type[Session]:
    """Return the session class of SQLAlchemy's recipe, which sends reads to another engine."""

    class Routed(Session):
        def get_bind(self, mapper: Any = None, clause: Any = None) -> Any:  # noqa: ARG002 - the recipe's
            if self._flushing or isinstance(clause, (sa.Update, sa.Delete, sa.Insert)):
                return writes
            return reads

    return Routed


def with_lines(database: Database) -> tuple[sa.Engine, sa.Engine]:
    """Create jobs with a line each, and an engine to a database that has the tables only."""
    writes = database.engine()
    reads = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool)
    for engine in (writes, reads):
        Base.metadata.create_all(engine)
    with Session(writes) as session:
        session.add_all([Job(id=n, lines=[Line(id=10 * n)]) for n in range(1, 5)])
        session.commit()
    return writes, reads


@pytest.mark.parametrize("kind", ["session", "sessionmaker"])
def test_reads_are_not_routed_elsewhere(database: Database, kind: str) -> None:
    """Rows and their relationships are read where they were claimed, and nothing stays shadowed."""
    writes, reads = with_lines(database)
    session_class = routed(writes, reads)
    if kind == "sessionmaker":
        claimed = claim_jobs(sessionmaker(class_=session_class), Job, 2)
        assert [[line.id for line in job.lines] for job in claimed] == [[10], [20]]
    else:
        with session_class() as session:
            claimed = claim_jobs(session, Job, 2)
            assert [[line.id for line in job.lines] for job in claimed] == [[10], [20]]
            assert "get_bind" not in vars(session)
            assert session.get_bind() is reads
            session.commit()
    assert ids(claim_jobs(writes, Job.__table__, 4)) == [3, 4]


def test_bind_arguments_alone_do_not_hold(database: Database) -> None:
    """The twin: they reach the SELECT of the jobs, and the lines come from the empty database."""
    writes, reads = with_lines(database)
    lines = []

    class Ignoring(routed(writes, reads)):  # type: ignore[misc]
        def get_bind(self, mapper: Any = None, clause: Any = None, bind: Any = None) -> Any:
            return bind or super().get_bind(mapper, clause)

    with Ignoring() as session, writes.connect() as connection:
        query = sa.select(Job).order_by(Job.id).limit(1)
        found = session.scalars(query, bind_arguments={"bind": connection}).one()
        lines += found.lines
    assert (found.id, lines) == (1, [])


def test_a_sharded_session_is_refused(database: Database) -> None:
    """Its statements go to several databases."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 1)
    names = ("shard_chooser", "identity_chooser", "execute_chooser")
    choosers: dict[str, Any] = dict.fromkeys(names, lambda *_: "one")
    session = ShardedSession(shards={"one": engine}, **choosers)
    with session, pytest.raises(ClaimError, match="ShardedSession"):
        claim_jobs(session, table)


@pytest.mark.parametrize("token", ["claim_token", None])
@pytest.mark.parametrize("kind", ["connection", "engine", "sessionmaker"])
@pytest.mark.databases("postgresql")
def test_inherited_tables_that_share_keys_are_refused(
    database: Database, kind: str, token: str | None
) -> None:
    """Rows of a table and of one that INHERITS it may have one key, and nothing is claimed."""
    engine, table = database.engine(), job_table(Column("claim_token", String(32)))
    fill(engine, table, 2)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE more () INHERITS (jobs)")
        connection.exec_driver_sql("INSERT INTO more SELECT * FROM ONLY jobs WHERE id = 1")
    jobs = JobTable(table, state="processing", token=token, order="id")
    with bound(engine, kind) as bind:
        with pytest.raises(ClaimError, match=r"several rows of 'jobs' have the key \(1,\)"):
            claim_jobs(bind, jobs, 2)
        if hasattr(bind, "commit"):
            bind.commit()
    assert taken(engine, table) == []


def test_concrete_inheritance_is_refused() -> None:
    """A row's class is told by its table, so the class has several tables to claim from."""

    class Shapes(DeclarativeBase):
        pass

    class Plain(Shapes):
        __tablename__ = "plain"
        id: Mapped[int] = mapped_column(primary_key=True)
        processing: Mapped[bool]

    class Special(Plain):
        __tablename__ = "special"
        __mapper_args__: ClassVar[dict[str, Any]] = {"concrete": True}
        id: Mapped[int] = mapped_column(primary_key=True)
        processing: Mapped[bool]

    for each in (Plain, Special):
        with pytest.raises(ClaimError, match=f"{each.__name__} has concrete table inheritance"):
            JobTable(each, state="processing")
    assert JobTable(Special.__table__, state="processing").entity is None


@SERVERS
def test_a_driver_that_is_not_known(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs BEGIN and COMMIT, and is refused where AUTOCOMMIT would not be safe."""
    engine, table = database.engine(), job_table(Column("claim_token", String(32)))
    fill(engine, table, 4)
    dialect = type(engine.dialect)

    def silent(*_: object) -> bool:
        raise NotImplementedError

    monkeypatch.setattr(dialect, "detect_autocommit_setting", silent)
    monkeypatch.setattr(dialect, "driver", "invented")
    begun = []
    sa.event.listen(engine, "begin", begun.append)
    if database.name == "postgresql":
        assert ids(claim_jobs(engine, table, 2)) == [1, 2]
        assert begun
    with engine.connect() as connection, pytest.raises(ClaimError, match="'invented'"):
        claim_jobs(connection, JobTable(table, state="processing"))


# A mark that is checked.


def trigger(database: Database, body: str) -> None:
    """Create a trigger that runs before each UPDATE of a row whose note is `hooked`."""
    with database.engine().begin() as connection:
        if database.name == "postgresql":
            connection.exec_driver_sql(
                "CREATE FUNCTION on_update() RETURNS trigger LANGUAGE plpgsql AS "
                f"$$ BEGIN IF new.note = 'hooked' THEN {body} END IF; RETURN new; END $$"
            )
            connection.exec_driver_sql(
                "CREATE TRIGGER hook BEFORE UPDATE ON jobs "
                "FOR EACH ROW EXECUTE FUNCTION on_update()"
            )
        elif database.name == "sqlite":
            connection.exec_driver_sql(
                "CREATE TRIGGER hook BEFORE UPDATE ON jobs WHEN new.note = 'hooked' "
                f"BEGIN {body} END"
            )
        else:
            connection.exec_driver_sql(
                "CREATE TRIGGER hook BEFORE UPDATE ON jobs FOR EACH ROW "
                f"BEGIN IF new.note = 'hooked' THEN {body} END IF; END"
            )


def hooked(database: Database) -> tuple[sa.Engine, JobTable]:
    """Create three free jobs in a table with a token; the trigger acts on the second."""
    engine, table = database.engine(), job_table(Column("claim_token", String(32)))
    fill(engine, table, 3)
    with engine.begin() as connection:
        connection.execute(table.update().where(table.c.id == 2).values(note="hooked"))
    return engine, JobTable(table, state="processing", token="claim_token")


REWRITES = {
    "postgresql": "new.processing := false;",
    "mysql": "SET new.processing = false;",
    "mariadb": "SET new.processing = false;",
}
VETOES = {"postgresql": "RETURN NULL;", "sqlite": "SELECT RAISE(IGNORE);"}


@pytest.mark.parametrize("kind", ["connection", "session", "engine", "sessionmaker"])
@SERVERS
def test_a_trigger_that_rewrites_the_mark(database: Database, kind: str) -> None:
    """The claim fails by name of the condition, and marks nothing."""
    engine, jobs = hooked(database)
    trigger(database, REWRITES[database.name])
    with bound(engine, kind) as bind:
        with pytest.raises(ClaimError, match=r"jobs\.processing = "):
            claim_jobs(bind, jobs, 3)
        if hasattr(bind, "commit"):
            bind.commit()
    assert taken(engine, jobs.table) == []


@pytest.mark.parametrize("stored", ["reverse(new.claim_token)", "NULL", "'another'"])
@pytest.mark.parametrize("kind", ["connection", "session", "engine", "sessionmaker"])
@SERVERS
def test_a_trigger_that_changes_the_token(database: Database, kind: str, stored: str) -> None:
    """Rows that bear another token than the claim's are found by their keys, and freed."""
    engine, jobs = hooked(database)
    change = (
        "new.claim_token := {};" if database.name == "postgresql" else "SET new.claim_token = {};"
    )
    trigger(database, change.format(stored))
    with bound(engine, kind) as bind:
        with pytest.raises(ClaimError, match="does not bear the mark"):
            claim_jobs(bind, jobs, 3)
        if hasattr(bind, "commit"):
            bind.commit()
    assert taken(engine, jobs.table) == []


@pytest.mark.parametrize("limit", [1, 3])
@pytest.mark.parametrize("kind", ["connection", "engine", "sessionmaker"])
@pytest.mark.databases("postgresql", "sqlite")
def test_a_trigger_that_vetoes_the_mark(database: Database, kind: str, limit: int) -> None:
    """A row that is found and not marked fails the claim."""
    engine, jobs = hooked(database)
    trigger(database, VETOES[database.name])
    where = jobs.table.c.id > 1
    with bound(engine, kind) as bind:
        with pytest.raises(ClaimError, match="look for a trigger"):
            claim_jobs(bind, jobs, limit, where=where)
        if hasattr(bind, "commit"):
            bind.commit()
    assert taken(engine, jobs.table) in ([], [3] if kind == "connection" else [])


@pytest.mark.parametrize("claimed", ["running", "x"])
@pytest.mark.databases("mysql", "mariadb")
def test_a_server_that_cuts_values(database: Database, claimed: str) -> None:
    """Without strict mode an ENUM stores '' for what it lacks, and a short column cuts a token."""
    engine = database.engine(connect_args={"init_command": "SET sql_mode = ''"})
    kinds = "ENUM('new', 'x')"
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE TABLE jobs (id INT PRIMARY KEY, state {kinds}, claim_token VARCHAR(8))"
        )
        connection.exec_driver_sql("INSERT INTO jobs VALUES (1, 'new', NULL)")
    table = sa.Table(
        "jobs",
        sa.MetaData(),
        Column("id", sa.Integer, primary_key=True),
        Column("state", String(10)),
        Column("claim_token", String(32)),
    )
    token = "claim_token" if claimed == "x" else None
    jobs = JobTable(table, state="state", free="new", claimed=claimed, token=token)
    with pytest.raises(ClaimError, match="does not bear the mark"):
        claim_jobs(engine, jobs)
    with engine.connect() as connection:
        assert connection.scalar(sa.select(table.c.state)) == "new"


def test_a_declaration_that_leaves_a_row_claimable(database: Database) -> None:
    """The claim says so, and marks nothing."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 2)
    free = sa.or_(table.c.processing.is_(False), table.c.id > 0)
    jobs = JobTable(table, free=free, claimed={"processing": True})
    with pytest.raises(ClaimError, match="claimable right after it was claimed"):
        claim_jobs(engine, jobs)
    assert taken(engine, table) == []


# Nothing is lost.


def test_a_hook_that_raises(database: Database) -> None:
    """An entity whose reconstructor raises is told, and the others are handed out."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 3)

    class Picky(DeclarativeBase):
        pass

    class Hooked(Picky):
        __table__ = table.to_metadata(Picky.metadata)

        @reconstructor
        def check(self) -> None:
            if self.id == 2:
                raise ZeroDivisionError

    found = claim_jobs(sessionmaker(engine), Hooked, 3)
    assert (ids(found), found.unreadable) == ([1, 3], ((2,),))
    assert taken(engine, table) == [1, 3]


@pytest.mark.parametrize("kind", ["session", "engine"])
def test_rows_that_cannot_be_read_are_passed_over_ten_times(database: Database, kind: str) -> None:
    """A queue whose head cannot be read goes on; one of nothing else is an empty claim."""
    kinds = sa.Enum("mail", native_enum=False, length=10)
    engine, table = database.engine(), job_table(Column("kind", kinds))
    fill(engine, table, 4, kind="mail")
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE jobs SET kind = 'fax' WHERE id < 4")
    found = claim_jobs(sessionmaker(engine) if kind == "session" else engine, table)
    assert (ids(found), found.unreadable) == ([4], ((1,), (2,), (3,)))
    again = claim_jobs(engine, table, 5)
    assert (ids(again), again.unreadable) == ([], ((1,), (2,), (3,)))
    assert taken(engine, table) == [4]


def checked(database: Database, **roles: Any) -> tuple[sa.Engine, JobTable]:
    """Create three free jobs whose mark a CHECK refuses while their size is 3."""
    table = job_table(
        Column("size", sa.Integer),
        Column("kind", sa.Enum("mail", native_enum=False, length=10)),
        Column("attempts", sa.Integer, nullable=False, server_default="0"),
        Column("claim_token", String(32)),
        Column("customer", sa.Integer),
        sa.CheckConstraint("size < 3 OR processing = false"),
    )
    engine = database.engine()
    fill(engine, table, 3, size=3, kind="mail")
    with engine.begin() as connection:
        connection.execute(table.update().values(customer=table.c.id))
    return engine, JobTable(table, state="processing", **roles)


@pytest.mark.parametrize("roles", [{}, {"token": "claim_token"}, {"exclusive_by": "customer"}])
@pytest.mark.parametrize("kind", OWN)
def test_rows_whose_mark_is_refused(database: Database, kind: str, roles: dict[str, Any]) -> None:
    """They are passed over while others are handed out; then the claim raises, and names one."""
    engine, jobs = checked(database, **roles)
    table, this = jobs.table, jobs.table.c.id
    with bound(engine, kind) as bind:
        for limit in (1, 5):
            with pytest.raises(
                ClaimError, match=r"of 3 .* handed out: \(1,\) .* marked "
            ) as raised:
                claim_jobs(bind, jobs, limit)
            assert isinstance(raised.value.__cause__, sa.exc.DBAPIError)
        with engine.begin() as connection:
            connection.execute(table.update().where(this == 2).values(size=1))
        found = claim_jobs(bind, jobs, 3)
    assert (ids(found), found.unreadable) == ([2], ((1,), (3,)))
    assert taken(engine, table) == [2]


@pytest.mark.parametrize("roles", [{}, {"token": "claim_token"}, {"exclusive_by": "customer"}])
@pytest.mark.parametrize("kind", OWN)
def test_attempts_beside_a_refused_mark(
    database: Database, kind: str, roles: dict[str, Any]
) -> None:
    """A claim that raises has counted the attempt of a row that cannot be read."""
    engine, jobs = checked(database, attempts="attempts", max_attempts=2, **roles)
    table, this = jobs.table, jobs.table.c.id
    with engine.begin() as connection:
        connection.execute(table.update().where(this == 1).values(size=1))
        connection.exec_driver_sql("UPDATE jobs SET kind = 'fax' WHERE id = 1")
    with bound(engine, kind) as bind:
        for _ in range(2):
            with pytest.raises(ClaimError, match=r"of 3 .*: \(2,\) cannot be marked"):
                claim_jobs(bind, jobs, 3)
    with engine.connect() as connection:
        found = connection.execute(sa.select(table.c.attempts).order_by(this)).scalars().all()
    assert found == [2, 0, 0]


@pytest.mark.parametrize("kind", OWN)
def test_rows_that_cannot_be_read_are_retired_by_a_claim_that_raises(
    database: Database, kind: str
) -> None:
    """A claim gives up after ten rows, but their attempts are counted, so the next one goes on."""
    attempts = Column("attempts", sa.Integer, nullable=False, server_default="0")
    kinds = sa.Enum("mail", native_enum=False, length=10)
    engine, table = database.engine(), job_table(attempts, Column("kind", kinds))
    fill(engine, table, 12, kind="mail")
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE jobs SET kind = 'fax' WHERE id < 12")
    jobs = JobTable(table, state="processing", attempts="attempts", max_attempts=1)
    with bound(engine, kind) as bind:
        with pytest.raises(ClaimError, match=r"none of 10 .* \(1,\) cannot be read \('fax' is not"):
            claim_jobs(bind, jobs)
        found = claim_jobs(bind, jobs)
    assert (ids(found), found.unreadable) == ([12], ((11,),))
    assert taken(engine, table) == [12]


@pytest.mark.databases("postgresql")
def test_a_type_that_changes_under_a_prepared_statement(database: Database) -> None:
    """Trap 30: the connection is given up, and the claim made on another one."""
    engine = database.engine(pool_size=1, max_overflow=0)
    table = job_table(Column("claim_token", String(32)))
    fill(engine, table, 40)
    for _ in range(8):
        claim_jobs(engine, table)
    statement = sa.select(table).order_by(table.c.id).limit(1)
    automatic = database.engine(isolation_level="AUTOCOMMIT", pool_size=1, max_overflow=0)
    for _ in range(8):
        with automatic.connect() as connection:
            connection.execute(statement).all()
    with database.engine().begin() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs ALTER note TYPE varchar(200)")
    assert ids(claim_jobs(engine, table, 2)) == [9, 10]
    # The twin: a plain statement in AUTOCOMMIT fails each time.
    for _ in range(3):
        with automatic.connect() as connection, pytest.raises(sa.exc.NotSupportedError):
            connection.execute(statement).all()


# An outcome that is unknown.


@SERVERS
def test_a_lost_commit_without_a_token(database: Database) -> None:
    """The error says that the outcome is unknown; with a token it is found out."""
    engine, table = database.engine(), job_table(Column("claim_token", String(32)))
    fill(engine, table, 4)
    admin = database.engine(isolation_level="AUTOCOMMIT")

    def kill(connection: sa.Connection) -> None:
        if not killed:
            killed.append(True)
            end_connection(admin, connection.connection.driver_connection)

    for token, expected in ((None, []), ("claim_token", [1, 2])):
        killed: list[bool] = []
        jobs = JobTable(table, state="processing", token=token)
        sa.event.listen(engine, "commit", kill)
        if token is None:
            with pytest.raises(sa.exc.DBAPIError, match="outcome is unknown"):
                claim_jobs(engine, jobs, 2)
        else:
            assert ids(claim_jobs(engine, jobs, 2)) == expected
        sa.event.remove(engine, "commit", kill)
        assert taken(engine, table) == expected


# A backend of another package.


class Invented(SQLite):
    """A backend for a dialect that no package of ours knows."""

    names = ("invented",)


class Unlocked(Invented):
    """The same without locks of exclusive keys."""

    key_locks = backends.Backend.key_locks


class Inheriting(Invented):
    """The same with the claim that every backend has."""

    claim = backends.Backend.claim


class InventedDialect(SQLiteDialect_pysqlite):
    """SQLite by another name."""

    name = "invented"
    supports_statement_cache = True


@contextmanager
def registered(
    database: Database, monkeypatch: pytest.MonkeyPatch, backend: type[Invented] = Invented
) -> Iterator[sa.Engine]:
    """Create an engine of the invented dialect, whose backend an entry point registers."""

    class Point:
        def load(self) -> type[Invented]:
            return backend

    def points(*, group: str, name: str) -> list[Point]:
        assert (group, name) == ("atomic_claim.backends", "invented")
        return [Point()]

    sa.dialects.registry.register("invented", __name__, "InventedDialect")
    engine = sa.create_engine(database.url.set(drivername="invented"))
    with pytest.raises(UnsupportedDialect, match="'invented'"):
        claim_jobs(engine, job_table())
    with monkeypatch.context() as patch:
        patch.setattr(backends, "BACKENDS", {})
        patch.setattr(backends, "entry_points", points)
        yield engine
    engine.dispose()


@pytest.mark.databases("sqlite")
def test_a_backend_by_entry_point(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dialect that is not known is refused, until a package registers its backend."""
    table = job_table()
    fill(database.engine(), table, 2)
    with registered(database, monkeypatch) as engine:
        assert ids(claim_jobs(engine, table)) == [1]
        assert ids(claim_jobs(sessionmaker(engine), mapped(table), 2)) == [2]
    assert taken(database.engine(), table) == [1, 2]


@pytest.mark.databases("sqlite")
def test_a_backend_renders_its_clock(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease is compared and written by the backend of the other package, in the construct too."""
    table = job_table(Column("claim_token", String(32)), Column("lease_until", sa.DateTime))
    fill(database.engine(), table, 3)
    jobs = JobTable(table, state="processing", token="claim_token", lease="lease_until")
    with registered(database, monkeypatch) as engine:
        assert ids(claim_jobs(engine, jobs, 2, lease=timedelta(minutes=1))) == [1, 2]
        with engine.begin() as connection:
            assert ids(connection.execute(claim_statement(jobs)).all()) == [3]
    assert taken(database.engine(), table) == [1, 2, 3]


@pytest.mark.databases("sqlite")
def test_a_backend_without_locks_of_keys(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim by exclusive keys is refused, by each bind, and an extension too."""
    lease = timedelta(minutes=1)
    table = job_table(
        Column("customer", sa.Integer),
        Column("claim_token", String(32)),
        Column("lease_until", sa.DateTime),
    )
    fill(database.engine(), table, 2, customer=1)
    jobs = JobTable(
        table,
        state="processing",
        token="claim_token",
        lease="lease_until",
        exclusive_by="customer",
    )
    claim = claim_jobs(database.engine(), jobs, lease=lease)
    with registered(database, monkeypatch, Unlocked) as engine, engine.connect() as connection:
        for bind in (engine, sessionmaker(engine), connection, Session(connection)):
            with pytest.raises(UnsupportedDialect, match="'invented' has no key_locks"):
                claim_jobs(bind, jobs)
            with pytest.raises(UnsupportedDialect, match="'invented' has no key_locks"):
                extend_jobs(bind, claim, lease=lease)
    assert taken(database.engine(), table) == [1]


@pytest.mark.databases("sqlite")
def test_a_backend_that_inherits_its_claim(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exclusive keys are searched and locked for every backend alike."""
    table = job_table(Column("customer", sa.Integer))
    fill(database.engine(), table, 2, customer=1)
    jobs = JobTable(table, state="processing", exclusive_by="customer")
    with registered(database, monkeypatch, Inheriting) as engine:
        assert ids(claim_jobs(engine, jobs, 2)) == [1]
        assert ids(claim_jobs(engine, jobs, 2)) == []
    assert taken(database.engine(), table) == [1]


# What an attack found.


def with_kind(database: Database, count: int, *bad: int) -> tuple[sa.Engine, sa.Table]:
    """Create free jobs; those with the numbers of `bad` cannot be read."""
    kinds = sa.Enum("mail", native_enum=False, length=10)
    engine = database.engine()
    table = job_table(
        Column("kind", kinds), Column("claim_token", String(32)), Column("k", sa.Integer)
    )
    fill(engine, table, count, kind="mail")
    with engine.begin() as connection:
        connection.execute(table.update().values(k=table.c.id))
        for number in bad:
            connection.exec_driver_sql(f"UPDATE jobs SET kind = 'fax' WHERE id = {number}")
    return engine, table


@pytest.mark.parametrize("kind", ["connection", "session", "engine", "sessionmaker"])
def test_the_head_of_the_queue_cannot_be_read(database: Database, kind: str) -> None:
    """A claim of one row takes the next one, by each bind."""
    engine, table = with_kind(database, 3, 1)
    with bound(engine, kind) as bind:
        for expected in (2, 3):
            found = claim_jobs(bind, table)
            assert (ids(found), found.unreadable) == ([expected], ((1,),))
        if hasattr(bind, "commit"):
            bind.commit()
    assert taken(engine, table) == [2, 3]


@pytest.mark.parametrize("token", ["claim_token", None])
@pytest.mark.databases("postgresql", "sqlite")
def test_rows_of_an_earlier_round_are_handed_out(database: Database, token: str | None) -> None:
    """A claim by exclusive keys in several rounds loses none of the first round's rows."""
    engine, table = with_kind(database, 520, 510)
    jobs = JobTable(table, state="processing", exclusive_by="k", token=token, order="id")
    with engine.connect() as connection:
        found = claim_jobs(connection, jobs, 515)
        connection.commit()
    assert found.unreadable == ((510,),)
    assert len(found) >= 500
    assert taken(engine, table) == ids(found)


@pytest.mark.parametrize("kind", OWN)
def test_unreadable_rows_of_an_earlier_batch_are_told(database: Database, kind: str) -> None:
    """A claim by exclusive keys tells all that it passed over, whatever batch they were in."""
    count = 1 + MARGIN
    engine, table = with_kind(database, count + 2, *range(1, count + 1))
    jobs = JobTable(table, state="processing", exclusive_by="k", order="id")
    with bound(engine, kind) as bind:
        found = claim_jobs(bind, jobs)
    assert ids(found) == [count + 1]
    assert found.unreadable == tuple((number,) for number in range(1, count + 1))
    assert taken(engine, table) == ids(found)


@pytest.mark.parametrize("kind", ["connection", "session", "engine", "sessionmaker"])
@pytest.mark.parametrize("token", ["claim_token", None])
@SERVERS
def test_a_mark_that_becomes_another_value_is_undone(
    database: Database, kind: str, token: str | None
) -> None:
    """Neither free nor claimed: the claim fails, and its other rows are free again."""
    flag = Column("processing", sa.Boolean, nullable=True)
    engine = database.engine()
    table = job_table(Column("claim_token", String(32)), processing=flag)
    fill(engine, table, 3)
    with engine.begin() as connection:
        connection.execute(table.update().where(table.c.id == 2).values(note="hooked"))
    if database.name == "postgresql":
        body = "IF new.processing THEN new.processing := NULL; END IF;"
    else:
        body = "SET new.processing = IF(new.processing, NULL, new.processing);"
    trigger(database, body)
    jobs = JobTable(table, state="processing", token=token)
    with bound(engine, kind) as bind:
        with pytest.raises(ClaimError, match="does not bear the mark"):
            claim_jobs(bind, jobs, 3)
        if hasattr(bind, "commit"):
            bind.commit()
    with engine.connect() as connection:
        free = sa.select(table.c.id).where(table.c.processing == sa.false()).order_by(table.c.id)
        assert connection.scalars(free).all() == [1, 2, 3]


@pytest.mark.databases("postgresql")
def test_a_trigger_that_raises(database: Database) -> None:
    """Psycopg has it as a ProgrammingError; the row is passed over all the same."""
    engine, jobs = hooked(database)
    trigger(database, "RAISE EXCEPTION 'no';")
    found = claim_jobs(engine, jobs, 3)
    assert (ids(found), found.unreadable) == ([1, 3], ((2,),))


@pytest.mark.databases("postgresql")
def test_autocommit_set_by_a_listener_is_kept(database: Database) -> None:
    """A claim by engine leaves the connection in the AUTOCOMMIT that it was in."""
    engine, jobs = database.engine(pool_size=1), hooked(database)[1]

    @sa.event.listens_for(engine, "connect")
    def automatic(connection: Any, _: object) -> None:
        connection.autocommit = True

    assert ids(claim_jobs(engine, jobs, 2)) == [1, 2]
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        assert driver.autocommit


def test_hooks_reach_their_own_database(database: Database) -> None:
    """A hook of an entity writes by the session, to the engine that the session has for it."""
    writes, reads = with_lines(database)
    audit = sa.Table("audit", sa.MetaData(), Column("job", sa.Integer))
    audit.create(reads)

    class Routed(Session):
        def get_bind(self, *_: Any, clause: Any = None, **__: Any) -> Any:
            return reads if getattr(clause, "table", None) is audit else writes

    def note(job: Job, context: Any) -> None:
        context.session.execute(audit.insert().values(job=job.id))

    sa.event.listen(Job, "load", note)
    try:
        found = claim_jobs(sessionmaker(class_=Routed), Job, 2)
    finally:
        sa.event.remove(Job, "load", note)
    assert (ids(found), found.unreadable) == ([1, 2], ())
    with reads.connect() as connection:
        assert connection.scalars(sa.select(audit.c.job)).all() == [1, 2]


@pytest.mark.databases("postgresql")
def test_an_interrupt_frees_what_was_committed(database: Database) -> None:
    """In AUTOCOMMIT the rows are freed by token, on another connection."""
    engine, table = database.engine(), job_table(Column("claim_token", String(32)))
    fill(engine, table, 3)
    claim_jobs(engine, table)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    sa.event.listen(engine, "after_cursor_execute", interrupt, once=True)
    with pytest.raises(KeyboardInterrupt):
        claim_jobs(engine, table, 2)
    assert taken(engine, table) == [1]
