import json
import re
import shlex
import shutil
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib import import_module, invalidate_caches
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Boolean, Column, DateTime, Integer, String, Table
from sqlalchemy.exc import DBAPIError

from atomic_claim import JobTable, claim_jobs
from atomic_claim.cli.indexes import needed_indexes
from atomic_claim.cli.plans import explained, finding_statement, unserved
from atomic_claim.cli.texts import dialect_of
from atomic_claim.job_table import job_table_of
from atomic_claim.plan import ClaimRequest, build_plan
from examples.migrations import tables
from tests.commands import REPOSITORY, Command, address
from tests.databases import Database
from tests.jobs import START, ids

migration = pytest.importorskip("alembic.runtime.migration", reason="no Alembic")
operations = pytest.importorskip("alembic.operations", reason="no Alembic")
alembic = pytest.importorskip("alembic")
config = pytest.importorskip("alembic.config")
pytest.importorskip("alembic.command")

LEASE = timedelta(minutes=5)
# The revisions beside the tables that they were made for.
EXAMPLES: dict[str, Any] = {
    "payload_jobs": tables.payload_jobs,
    "boolean_flag": tables.flagged,
    "status": tables.status,
    "lease_columns": tables.locked,
}
# Those that differ from database to database, and rows enough for the planners.
ROWS = 2000

metadata = sa.MetaData()
awkward = Table(
    "it's a table",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("select", String(20), nullable=False),
    Column("Created", DateTime, nullable=False),
    Column("worker", String(20)),
)
quoted = JobTable(
    awkward, state="select", free="it's :free, 100%", claimed="taken", order=awkward.c.Created
)
served = Table(
    "served",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("processing", Boolean, nullable=False),
    Column("created_at", DateTime),
    sa.Index("served_jobs", "processing", "created_at"),
)
leased = Table(
    "leased",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("processing", Boolean, nullable=False),
    Column("lease_until", DateTime),
    Column("claim_token", String(32)),
    Column("attempts", String(3)),
)
texts = Table(
    "texts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("kind", sa.Text, nullable=False),
)
texts_of_kind = JobTable(texts, state="kind", free="free", claimed="taken")
guarded = Table(
    "guarded",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("processing", Boolean, nullable=False),
    Column("worker", String(20)),
    Column("finished_at", DateTime),
    Column("created_at", DateTime, nullable=False),
)
guarded_words = JobTable(
    awkward,
    state="select",
    free="it's :free, 100%",
    claimed="taken;",
    done="done",
    worker="worker",
    order=awkward.c.Created,
)
finished = tables.flagged
deleted = JobTable(served, state="processing")
rested = Table(
    "rested",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("processing", Boolean, nullable=False),
    Column("created_at", DateTime, nullable=False),
    Column("run_at", DateTime),
    Column("due_at", DateTime, nullable=False),
    Column("due_text", sa.Text),
    Column("attempts", Integer, nullable=False),
    Column("tries", Integer),
    Column("most", Integer),
    Column("lease_until", DateTime),
    Column("claim_token", String(32)),
)
WITH_LEASE: dict[str, Any] = {"lease": "lease_until", "token": "claim_token"}
RETRIED: dict[str, Any] = {"due": "run_at", "attempts": "attempts", "max_attempts": 5}
by_expression = JobTable(
    Table(
        "owned",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("owner", String(20), nullable=False),
        Column("tries", Integer, nullable=False),
    ),
    free=(sa.column("owner") == "") & (sa.column("tries") < 5),
    claimed={"owner": "taken"},
    order=sa.func.lower(sa.column("owner")),
)


def example(name: str) -> ModuleType:
    """Import a revision of the examples."""
    return import_module(f"examples.migrations.{name}")


def migrate(engine: sa.Engine, revision: ModuleType, direction: str) -> None:
    """Run a revision as Alembic does, in a transaction that it may leave."""
    with engine.connect() as connection:
        context = migration.MigrationContext.configure(connection)
        with context.begin_transaction(), operations.Operations.context(context):
            getattr(revision, direction)()


def schema_of(engine: sa.Engine, table: Table) -> tuple[list[str], list[str]]:
    """Return the names of the columns and indexes in the database."""
    inspector = sa.inspect(engine)
    columns = [column["name"] for column in inspector.get_columns(table.name)]
    return columns, sorted(str(index["name"]) for index in inspector.get_indexes(table.name))


def fill(engine: sa.Engine, job_table: JobTable) -> None:
    """Insert rows that have ended, and fewer that are free."""
    table: Table = job_table.table
    now = {column.name: START for column in table.columns if isinstance(column.type, DateTime)}
    needed = {name for name in now if not table.columns[name].nullable}
    values = {**dict.fromkeys(needed, START), **plain(job_table.released)}
    ended = plain(job_table.done)
    rows = [{"id": n, **values, **(ended if n > 50 else {})} for n in range(1, ROWS + 1)]
    for row in rows:
        row["created_at"] = START + timedelta(minutes=row["id"])
    for kind in (rows[:50], rows[50:]):
        with engine.begin() as connection:
            connection.execute(table.insert(), kind)
    analyse(engine, table)


def plain(values: Any) -> dict[str, Any]:
    """Convert the values that are written to columns to plain Python values."""
    found = {}
    for column, value in values.items():
        if isinstance(value, (sa.sql.elements.True_, sa.sql.elements.False_)):
            value = isinstance(value, sa.sql.elements.True_)  # noqa: PLW2901
        elif value is not None:
            value = getattr(value, "value", START)  # noqa: PLW2901
        found[column.name] = value
    return found


def analyse(engine: sa.Engine, table: Table) -> None:
    """Bring the planner's statistics up to date."""
    words = "ANALYZE TABLE" if engine.dialect.name in {"mysql", "mariadb"} else "ANALYZE"
    with engine.begin() as connection:
        connection.exec_driver_sql(f"{words} {table.name}")


def missing(engine: sa.Engine, given: Any) -> list[str]:
    """For which reasons EXPLAIN of the claim shows no fitting index."""
    job_table = job_table_of(given)
    leased = job_table.lease is not None and job_table.token is not None
    ask = ClaimRequest(10, lease=LEASE if leased else None)
    with engine.connect() as connection:
        found = unserved(connection, build_plan(job_table, ask, entities=False), ask)
    return [each.reason for each in found]


def after(engine: sa.Engine, given: Any) -> Any:
    """Declare the table with the columns that a migration added, as an application does."""
    table: Table = job_table_of(given).table
    reflected = Table(table.name, sa.MetaData(), autoload_with=engine)
    added = [column for column in reflected.columns if column.name not in table.columns]
    if not added:
        return given
    declared = table.to_metadata(sa.MetaData())
    for column in added:
        declared.append_column(Column(column.name, column.type))
    return declared


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_up_down_and_up(database: Database, name: str) -> None:
    """Every revision brings its indexes into use, takes them away, and brings them again."""
    engine, given, revision = database.engine(), EXAMPLES[name], example(name)
    job_table = job_table_of(given)
    job_table.table.create(engine)
    fill(engine, job_table)
    before = schema_of(engine, job_table.table)
    assert missing(engine, given) == ["free"]
    migrate(engine, revision, "upgrade")
    assert schema_of(engine, job_table.table) != before
    assert missing(engine, after(engine, given)) == []
    assert ids(claim_jobs(engine, after(engine, given), 3, lease=LEASE if name[0] == "l" else None))
    migrate(engine, revision, "downgrade")
    assert schema_of(engine, job_table.table) == before
    migrate(engine, revision, "upgrade")
    analyse(engine, job_table.table)
    assert missing(engine, after(engine, given)) == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_what_the_command_writes(
    command: Command, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each example equals the output of the command in its docstring."""
    monkeypatch.chdir(REPOSITORY)
    path = REPOSITORY / "examples" / "migrations" / f"{name}.py"
    text = path.read_text(encoding="utf-8")
    said = re.search(r"^Made by: atomic-claim (.*)$", text, re.MULTILINE)
    assert said is not None
    ended = command(*shlex.split(said[1]))
    assert ended.code == 0
    assert ended.err.startswith("# For the model")
    assert ended.out == text


@pytest.mark.parametrize("payload", ["postgresql", "sqlite"])
def test_payloads_own_table(
    request: pytest.FixtureRequest, payload: str, command: Command, tmp_path: Path
) -> None:
    """The table as Payload makes it is served by what is generated from its reflection."""
    from tests.conftest import fresh_database  # noqa: PLC0415 - the fixture has no table's name

    factory = request.getfixturevalue("tmp_path_factory")
    with fresh_database(payload, request.config, factory) as database:
        engine = database.engine()
        script = REPOSITORY / "tests" / "payload" / f"{payload}.sql"
        run(engine, script.read_text(encoding="utf-8"))
        module = tmp_path / f"own_{payload}.py"
        module.write_text(
            "import sqlalchemy as sa\n"
            f"engine = sa.create_engine({engine.url.render_as_string(hide_password=False)!r})\n"
            "jobs = sa.Table('payload_jobs', sa.MetaData(), autoload_with=engine)\n"
            "engine.dispose()\n",
            encoding="utf-8",
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(tmp_path))
            table = import_module(f"own_{payload}").jobs
            assert missing(engine, table) == ["free"]
            ended = command(
                "migration", "--table", f"own_{payload}:jobs", "--sql", "--dialect", payload
            )
        run(engine, ended.out)
        assert missing(engine, table) == []


def run(engine: sa.Engine, script: str) -> None:
    """Run plain SQL as a person at a console would."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in statements(script):
            driver: Any = connection.connection.driver_connection
            driver.cursor().execute(statement)


def statements(script: str) -> Iterator[str]:
    """Split a script into statements as the databases' own clients do.

    A string between dollars is one to psql, sqlite3 knows where a trigger ends, and mysql goes by
    DELIMITER.
    """
    statement, end = "", ";"
    for line in script.splitlines(keepends=True):
        if line.startswith("DELIMITER "):
            end = line.removeprefix("DELIMITER ").strip()
        elif statement or not line.startswith("--"):
            statement += line
            if "BEGIN" in statement and end == ";" and "$" not in statement:
                is_open = not sqlite3.complete_statement(statement)
            else:
                is_open = statement.count("$atomic_claim$") % 2 == 1
            if statement.rstrip().endswith(end) and not is_open:
                yield statement.strip().removesuffix(end)
                statement = ""
    assert not statement.strip()


def test_awkward_names_and_values(database: Database, command: Command) -> None:
    """Quotes, colons and percent signs come through Alembic and through plain SQL."""
    engine = database.engine()
    awkward.create(engine)
    with engine.begin() as connection:
        connection.execute(
            awkward.insert(), [{"id": 1, "select": "it's :free, 100%", "Created": START}]
        )
    spec = ("--table", "tests.tools.test_migration:quoted", "--dialect", database.name)
    namespace = revision_of(command("migration", *spec).out)
    migrate(engine, namespace, "upgrade")
    assert missing(engine, quoted) == []
    assert ids(claim_jobs(engine, quoted)) == [1]
    migrate(engine, namespace, "downgrade")
    assert missing(engine, quoted) == ["free"]
    run(engine, command("migration", *spec, "--sql").out)
    assert missing(engine, quoted) == []


def second_claim(engine: sa.Engine, given: Any) -> None:
    """Mark one job from two workers that both found it and do not check it again."""
    job_table = job_table_of(given)
    table: Table = job_table.table
    mark = table.update().where(table.c.id == 1).values(plain(job_table.claimed))
    for worker in ("a", "b"):
        with engine.begin() as connection:
            connection.execute(mark.values(worker=worker))


REFUSED = r"atomic_claim: (job id=1|a job) of .* is running already"


def revision_of(text: str) -> ModuleType:
    """Execute a revision and return it as a module."""
    namespace = ModuleType("revision")
    exec(text, namespace.__dict__)  # noqa: S102 - our own text
    return namespace


def free_again(engine: sa.Engine, given: Any) -> None:
    """One job that waits."""
    job_table = job_table_of(given)
    table: Table = job_table.table
    times = [c.name for c in table.columns if isinstance(c.type, DateTime) and not c.nullable]
    with engine.begin() as connection:
        connection.execute(table.delete())
        row = {"id": 1, **plain(job_table.released), **dict.fromkeys(times, START)}
        connection.execute(table.insert(), [row])


@pytest.mark.parametrize("name", ["guarded", "guarded_words"])
def test_the_guard_up_down_and_up(database: Database, command: Command, name: str) -> None:
    """It refuses a second claim while it is there, and leaves nothing behind."""
    engine, given = database.engine(), globals()[name]
    table: Table = job_table_of(given).table
    table.create(engine)
    spec = ("--table", f"tests.tools.test_migration:{name}", "--guard", "--dialect", database.name)
    ended = command("migration", *spec, "--add", "lease,token")
    assert ended.code == 0
    revision = revision_of(ended.out)
    before = schema_of(engine, table)
    for _ in range(2):
        migrate(engine, revision, "upgrade")
        free_again(engine, given)
        with pytest.raises(DBAPIError, match=REFUSED):
            second_claim(engine, given)
        migrate(engine, revision, "downgrade")
        assert schema_of(engine, table) == before
        free_again(engine, given)
        second_claim(engine, given)
    assert sa.inspect(engine).get_table_names() == [table.name]


def test_the_guard_knows_the_columns_that_come_with_it(
    database: Database, command: Command
) -> None:
    """A lease that has run out is taken over, in any zone; one that has not is refused to all."""
    engine = database.engine()
    guarded.create(engine)
    spec = ("--table", "tests.tools.test_migration:guarded", "--guard", "--dialect", database.name)
    ended = command("migration", *spec, "--add", "lease,token")
    migrate(engine, revision_of(ended.out), "upgrade")
    free_again(engine, guarded)
    jobs = Table("guarded", sa.MetaData(), autoload_with=engine)
    words = {"mysql": "SET time_zone = '+09:00'", "mariadb": "SET time_zone = '+09:00'"}
    with engine.connect() as connection:
        if words.get(database.name):
            connection.exec_driver_sql(words[database.name])
        assert ids(claim_jobs(connection, jobs, lease=LEASE, worker="a")) == [1]
        assert ids(claim_jobs(connection, jobs, lease=LEASE, worker="b")) == []
        past = START if database.name != "postgresql" else START.replace(tzinfo=UTC)
        connection.execute(jobs.update().values(lease_until=past))
        assert ids(claim_jobs(connection, jobs, lease=LEASE, worker="b")) == [1]
        connection.commit()
        with pytest.raises(DBAPIError, match=REFUSED):
            connection.execute(jobs.update().values(processing=True, worker="c"))


def test_the_guard_as_plain_sql(database: Database, command: Command) -> None:
    """A database's own client makes it of what is printed, and undoes it by the comments."""
    engine = database.engine()
    awkward.create(engine)
    spec = (
        "--table",
        "tests.tools.test_migration:guarded_words",
        "--guard",
        "--dialect",
        database.name,
    )
    script = command("migration", *spec, "--sql").out
    run(engine, script)
    free_again(engine, guarded_words)
    with pytest.raises(DBAPIError, match=REFUSED):
        second_claim(engine, guarded_words)
    _, _, undone = script.partition("-- To undo it:\n")
    run(engine, undone.replace("-- ", ""))
    free_again(engine, guarded_words)
    second_claim(engine, guarded_words)


def test_the_guard_of_writers_of_whole_rows(command: Command) -> None:
    """They are told of by an option, which stands in the revision."""
    spec = ("--table", "tests.tools.test_migration:guarded", "--guard", "--full-rows")
    ended = command("migration", *spec)
    assert ended.code == 0
    assert "tests.tools.test_migration:guarded --guard --full-rows\n" in ended.out


def test_how_indexes_are_built(command: Command) -> None:
    """Every database builds them while others write, in the form that its claim can use."""
    ended = command("migration", "--table", "examples.migrations.tables:payload_jobs", "--sql")
    where = "processing = false AND completed_at IS NULL AND has_error IS NOT true"
    for index, terms in (
        ("free", "created_at, wait_until"),
        ("due", "wait_until NULLS FIRST, created_at"),
    ):
        name = f"payload_jobs_claim_{index}"
        created = f"CONCURRENTLY {name} ON payload_jobs ({terms}) WHERE {where};\n"
        assert f"CREATE INDEX {created}" in ended.out
    columns = "(processing, completed_at, created_at, wait_until)"
    assert ended.out.count(f"{columns}, ALGORITHM=INPLACE, LOCK=NONE;\n") == 2
    where = "processing = 0 AND completed_at IS NULL AND has_error IS NOT 1"
    assert f"{columns} WHERE {where};" in ended.out


def resting(**roles: Any) -> JobTable:
    """Declare the table of jobs that rest until they are due, or forever."""
    roles = {"order": "created_at", "naive_times": "utc", **roles}
    return JobTable(rested, state="processing", **roles)


@pytest.mark.parametrize(
    ("roles", "terms"),
    [
        (RETRIED, "created_at, run_at, attempts"),
        ({"due": "due_at"}, "created_at, due_at"),
        ({"attempts": "tries", "max_attempts": 5}, "created_at, tries"),
        ({"attempts": "attempts", "max_attempts": "most"}, "created_at, most, attempts"),
        # A column stands in an index once.
        (
            RETRIED | {"order": [rested.c.attempts.desc(), rested.c.run_at.desc(), "id"]},
            "attempts DESC, run_at DESC, id",
        ),
        (WITH_LEASE, "created_at"),
    ],
)
def test_what_passes_rows_over_stands_behind_the_order(roles: dict[str, Any], terms: str) -> None:
    """Rows that are not due or have spent their attempts are told by the index, where it helps."""
    [free, *_] = needed_indexes(resting(**roles))
    assert free.definition(dialect_of("postgresql")).startswith(f"ON rested ({terms})")
    for name in ("sqlite", "mysql"):
        assert f"({', '.join(('processing', terms))})" in free.definition(dialect_of(name))


def test_long_texts_stand_in_no_index() -> None:
    """A time that is a text of any length stays in its row, except on SQLite."""
    jobs = resting(due="due_text", text_times="%Y-%m-%d", **WITH_LEASE)
    [free, *_] = needed_indexes(jobs)
    assert "(created_at) WHERE" in free.definition(dialect_of("postgresql"))
    assert "(processing, created_at)" in free.definition(dialect_of("mysql"))
    assert "(processing, created_at, due_text)" in free.definition(dialect_of("sqlite"))


def test_what_is_passed_over_is_not_read(database: Database) -> None:
    """The index tells which rows are free, and an earlier version's index serves too."""
    engine, jobs = database.engine(), resting(**RETRIED, **WITH_LEASE)
    rested.create(engine)
    row = {"processing": False, "created_at": START, "due_at": START, "attempts": 0}
    later = {"run_at": datetime.now() + timedelta(days=365)}  # noqa: DTZ005 - far from any zone's
    with engine.begin() as connection:
        given = [row | (later if n > 50 else {"run_at": None}) for n in range(ROWS)]
        connection.execute(rested.insert(), given)
    for is_old in (True, False):
        for needed in needed_indexes(jobs):
            if is_old and needed.reason == "due":
                continue
            index = replace(needed, passing=()) if is_old else needed
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                if not is_old and needed.reason != "due":
                    connection.exec_driver_sql(index.drop(engine.dialect))
                connection.exec_driver_sql(index.create(engine.dialect))
        analyse(engine, rested)
        assert missing(engine, jobs) == []
        assert passes_over(engine, jobs) is not is_old


def passes_over(engine: sa.Engine, jobs: JobTable) -> bool:
    """Return True if the plan of a claim's search skips rows within the index."""
    ask = ClaimRequest(1, lease=LEASE)
    parts = build_plan(jobs, ask, entities=False)
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
            connection.exec_driver_sql("SET LOCAL enable_bitmapscan = off")
        statement = finding_statement(connection, parts)
        _, rows = explained(connection, statement, ask.parameters(token=True))
    said = " ".join(str(dict(row)) for row in rows)
    passed = "rested_claim_due"
    marks = rf"{passed}|COVERING INDEX|Using index(?! condition)"
    return re.search(marks, said) is not None


def test_what_cannot_be_in_an_index_is_left_out(command: Command) -> None:
    """A term compared with a parameter leads the index; other varying terms are left out."""
    spec = ("--table", "tests.tools.test_migration:by_expression", "--sql", "--json", "--dialect")
    for name in ("postgresql", "sqlite", "mysql"):
        found = json.loads(command("migration", *spec, name).out)["sql"][name]
        assert "(owner, (lower(owner)))" in found
        assert "WHERE" not in found


def test_columns_are_nullable_and_come_first(command: Command) -> None:
    """All databases get the columns before the indexes, and no row has to be rewritten."""
    spec = ("--table", "examples.migrations.tables:locked", "--add", "lease,token,attempts")
    text = command("migration", *spec, "--sql", "--json").out
    for name, found in json.loads(text)["sql"].items():
        lines = list(statements(found))
        assert ["ADD COLUMN" in line for line in lines] == [True, True, True, False, False], name
        assert "NOT NULL" not in "".join(lines[:3])
        assert "lease_until" in lines[4]


def test_what_is_there_is_not_made_again(command: Command) -> None:
    """An index that the table declares is left out, where it is the one that serves."""
    spec = ("--table", "tests.tools.test_migration:served", "--sql")
    ended = command("migration", *spec, "--dialect", "mysql")
    assert ended.err == "atomic-claim: nothing to migrate: the table declares it all\n"
    assert "CREATE INDEX CONCURRENTLY" in command("migration", *spec).out
    # That of an earlier version has nothing behind the order.
    jobs = JobTable(rested.to_metadata(sa.MetaData()), state="processing", order="id", due="due_at")
    [free, _] = needed_indexes(jobs)
    for columns in (("id",), ("id", "due_at")):
        declared = sa.Index("declared", *(jobs.table.c[name] for name in ("processing", *columns)))
        assert free.is_declared(dialect_of("mysql"))
        jobs.table.indexes.discard(declared)
    assert not free.is_declared(dialect_of("mysql"))


MODEL = """
import sqlalchemy as sa
from sqlalchemy.dialects import mysql
metadata = sa.MetaData()
table = jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("processing", sa.Boolean, nullable=False),
    sa.Column("completed_at", sa.DateTime(timezone=True)),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
{columns})
{indexes}
import atomic_claim
declared = atomic_claim.JobTable(
    jobs, state="processing", done={{"completed_at": sa.func.now()}},
    order=[jobs.c.priority.desc(), jobs.c.created_at], naive_times="utc",
)
"""
ENV = """
import sqlalchemy as sa
from alembic import context
import job_models
engine = sa.create_engine({url!r})
with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=job_models.metadata)
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield the folder of a program with a model, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("job_models", None)


def write_model(folder: Path, lines: Sequence[str] = ()) -> None:
    """Write the model, with the lines that the command printed for it."""
    columns = "".join(f"    {line}\n" for line in lines if line.startswith("sa.Column"))
    indexes = "\n".join(line for line in lines if line.startswith("sa.Index"))
    text = MODEL.format(columns=columns, indexes=indexes)
    (folder / "job_models.py").write_text(text, encoding="utf-8")
    sys.modules.pop("job_models", None)
    invalidate_caches()


def start_project(folder: Path, database: Database, flask: bool = False) -> Any:
    """Make a project of Alembic's, or one as Flask-Migrate keeps it, with its first revision."""
    home = folder / "migrations"
    (home / "versions").mkdir(parents=True)
    template = Path(alembic.__file__).parent / "templates" / "generic" / "script.py.mako"
    shutil.copy(template, home)
    url = database.url.render_as_string(hide_password=False)
    (home / "env.py").write_text(ENV.format(url=url), encoding="utf-8")
    path = (home if flask else folder) / "alembic.ini"
    said = "" if flask else "script_location = migrations\n"
    path.write_text(f"[alembic]\n{said}file_template = made_%%(rev)s\n", encoding="utf-8")
    made = config.Config(path)
    made.set_main_option("script_location", str(home))
    write_model(folder)
    alembic.command.revision(made, "first", autogenerate=True)
    alembic.command.upgrade(made, "head")
    return made


@pytest.mark.parametrize("flask", [False, True])
def test_the_model_agrees_afterwards(
    database: Database, command: Command, project: Path, *, flask: bool
) -> None:
    """With the printed lines in the model, Alembic finds nothing to change."""
    address(database)
    made = start_project(project, database, flask)
    spec = ("--table", "job_models:declared", "--dialect", database.name)
    ended = command("migration", *spec, "--add", "lease,token", "--write")
    assert (ended.code, ended.err) == (0, "")
    path, *lines = ended.out.splitlines()
    assert Path(path).parent.name == "versions"
    assert Path(path).name.startswith("made_")
    alembic.command.upgrade(made, "head")
    write_model(project, [line.replace("declared.table.c", "jobs.c") for line in lines])
    alembic.command.check(made)
    script = alembic.command.revision(made, "next", autogenerate=True)
    assert "op." not in str(Path(script.path).read_text(encoding="utf-8")).partition("def ")[2]
    alembic.command.downgrade(made, "base")


def test_a_revision_of_no_project(command: Command, project: Path) -> None:
    """Without a project, or in one with several heads, nothing is written."""
    spec = ("--table", "job_models:declared", "--write")
    write_model(project)
    assert "there is no alembic.ini here" in command("migration", *spec).refused()
    assert "--config no.ini" in command("migration", *spec, "--config", "no.ini").refused()
    (project / "migrations" / "versions").mkdir(parents=True)
    template = Path(alembic.__file__).parent / "templates" / "generic" / "script.py.mako"
    shutil.copy(template, project / "migrations")
    (project / "alembic.ini").write_text("[alembic]\nscript_location = migrations\n")
    for name in ("one", "two"):
        text = f"revision = {name!r}\ndown_revision = None\n"
        (project / "migrations" / "versions" / f"{name}.py").write_text(text, encoding="utf-8")
    assert "ultiple heads" in command("migration", *spec).refused()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("served", "--add", "guard"), "--add guard: expected some of lease, token, attempts"),
        (("leased", "--add", "lease"), "has it already, as 'lease_until'"),
        (("leased", "--add", "attempts"), "not known to be its attempts"),
        (("served", "--write", "--sql"), "leave out --sql"),
        (("texts_of_kind", "--dialect", "mysql"), "make it a VARCHAR(n)"),
        (("by_expression", "--dialect", "mariadb"), "MariaDB has no indexes on expressions"),
        (("deleted", "--guard"), "nothing marks a row of 'served' as done"),
        (("finished", "--guard"), "guard the others: --dialect postgresql --dialect sqlite"),
        (("finished", "--guard", "--dialect", "mysql"), "has no worker and no token column"),
        (
            ("finished", "--guard", "--full-rows", "--dialect", "sqlite"),
            "where whole rows are written",
        ),
        (("served", "--full-rows"), "add --guard"),
    ],
)
def test_what_cannot_be_migrated(command: Command, arguments: tuple[str, ...], said: str) -> None:
    """Whatever cannot be done is refused by one line that says why."""
    table, *options = arguments
    spec = ("--table", f"tests.tools.test_migration:{table}")
    assert said in command("migration", *spec, *options).refused()
