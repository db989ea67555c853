"""Tests of the modules that are loaded, and when, each in a fresh interpreter."""

import json
import subprocess
import sys
from textwrap import dedent

import pytest
import sqlalchemy as sa
from sqlalchemy import DateTime
from sqlalchemy.dialects import mysql, oracle, postgresql, sqlite

# For what they register.
import atomic_claim.backends.mysql
import atomic_claim.backends.postgresql
import atomic_claim.backends.sqlite  # noqa: F401
from atomic_claim import claim_statement
from atomic_claim.sql_elements import DatabaseTime

OUTSET = """
    import sys, threading
    import sqlalchemy as sa

    def loaded(*names):
        return [name for name in names if name in sys.modules]

    before = set(sys.modules)
    from atomic_claim import Claim, JobTable, claim_jobs, claim_statement, complete_jobs
"""
TABLE = """
    table = sa.Table(
        "jobs",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("processing", sa.Boolean, nullable=False, default=False),
        sa.Column("completed_at", sa.DateTime),
    )
"""
# A file: each thread has a connection of its own.
DATABASE = """
    engine = sa.create_engine("sqlite:///" + sys.argv[1])
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(table.insert(), [{"processing": False}] * 9)
"""
MAPPED = """
    from sqlalchemy.orm import Session, registry, scoped_session, sessionmaker

    class Job:
        pass

    registry().map_imperatively(Job, table)
    with Session(engine) as session:
        claim = claim_jobs(session, Job, 2)
        assert [type(job) for job in claim] == [Job, Job]
        assert complete_jobs(session, claim, unfenced=True) == 2
        session.commit()
        assert all(job.completed_at for job in claim)
    assert [job.processing for job in claim_jobs(sessionmaker(engine), Job)] == [True]
    scoped = scoped_session(sessionmaker(engine))
    assert [type(job) for job in claim_jobs(scoped, Job)] == [Job]
    scoped.remove()
    assert JobTable(Job, state="processing").entity is Job
"""
# Executes one module only once it is told to; finding it would hold a lock that all imports take.
PAUSE = """
    from importlib.machinery import PathFinder

    half, go = threading.Event(), threading.Event()

    class Pause:
        @staticmethod
        def find_spec(name, path, _=None):
            if name != PAUSED:
                return None
            spec = PathFinder.find_spec(name, path)
            execute = spec.loader.exec_module

            def wait(module):
                half.set()
                go.wait()
                execute(module)

            spec.loader.exec_module = wait
            return spec

    sys.meta_path.insert(0, Pause)
"""
NAMES = ("postgresql", "cockroachdb", "yugabytedb", "mysql", "mariadb", "sqlite")
MODULES = {"cockroachdb": "postgresql", "yugabytedb": "postgresql", "mariadb": "mysql"}
DIALECTS = {"postgresql": postgresql, "mysql": mysql, "sqlite": sqlite, "oracle": oracle}

jobs = sa.Table(
    "jobs",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("processing", sa.Boolean, nullable=False, default=False),
    sa.Column("completed_at", DateTime),
)
CONSTRUCTS = {
    "claim_statement(table, 2)": claim_statement(jobs, 2),
    "sa.select(DatabaseTime(sa.DateTime(), 'utc'))": sa.select(DatabaseTime(DateTime(), "utc")),
}


def run(*parts: str, arguments: tuple[str, ...] = ()) -> str:
    """Run a program that is joined from these parts, each dedented, and return its output."""
    program = "\n".join(map(dedent, parts))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_only_what_every_claim_needs_is_loaded() -> None:
    """Beside SQLAlchemy's core that is none of the ORM, of asyncio, of wrapt, nor a strategy."""
    found = set(run(OUTSET, "print(*set(sys.modules) - before)").split())
    assert "asyncio" not in found
    first_names = {name.partition(".")[0] for name in found}
    assert first_names - sys.stdlib_module_names == {"atomic_claim", "sqlalchemy"}
    assert {name for name in found if name.startswith("sqlalchemy")} == {
        "sqlalchemy.ext",
        "sqlalchemy.ext.compiler",
    }
    own = {name.removeprefix("atomic_claim.") for name in found if name.startswith("atomic_claim.")}
    assert own == {
        "arguments",
        "backends",
        "backends.base",
        "backends.by_key",
        "backends.drivers",
        "backends.fair",
        "backends.reading",
        "backends.recovery",
        "backends.tables",
        "candidates",
        "claim",
        "columns",
        "errors",
        "execution",
        "inference",
        "job_table",
        "layouts",
        "lifecycle",
        "orm",
        "outcomes",
        "plan",
        "predicates",
        "references",
        "roles",
        "sql_elements",
        "state_values",
        "statement",
        "telemetry",
        "tickets",
    }


@pytest.mark.parametrize(
    ("name", "module"),
    [("keep_claims", "atomic_claim.heartbeat"), ("patch_claims", "atomic_claim.patch")],
)
def test_the_rest_is_loaded_when_it_is_asked_for(name: str, module: str) -> None:
    """The twin: a name brings its module, imported or taken as an attribute, and only then."""
    run(
        OUTSET,
        f"""
        assert not loaded({module!r})
        assert {name!r} in dir(sys.modules["atomic_claim"])
        from atomic_claim import {name} as imported
        assert loaded({module!r})
        assert sys.modules["atomic_claim"].{name} is imported
        """,
    )


def test_claims_by_engine_and_connection_load_no_orm(tmp_path: object) -> None:
    """Nor any other database's strategy; what is mapped afterwards is claimed all the same."""
    run(
        OUTSET,
        TABLE,
        DATABASE,
        """
        claims = [claim_jobs(engine, table) for _ in range(4)]
        assert [claim.keys for claim in claims] == [((key,),) for key in range(1, 5)]
        with engine.begin() as connection:
            claim = claim_jobs(connection, table)
            assert complete_jobs(connection, claim, unfenced=True) == 1
        assert loaded("atomic_claim.backends.sqlite")
        assert not loaded(
            "sqlalchemy.orm", "atomic_claim.backends.mysql", "atomic_claim.backends.postgresql"
        )
        """,
        MAPPED,
        arguments=(f"{tmp_path}/jobs.db",),
    )


def test_annotations_are_evaluated_without_the_orm() -> None:
    """A framework may ask for the types of what it is given to call."""
    run(
        OUTSET,
        """
        import atomic_claim, typing

        for name in ("claim_jobs", "complete_jobs", "sweep_jobs", "claim_statement", "keep_claims"):
            typing.get_type_hints(getattr(atomic_claim, name))
        assert not loaded("sqlalchemy.orm")
        """,
    )


def test_what_is_no_bind_is_refused_without_the_orm() -> None:
    """Nothing can be a session there, nor a mapped class."""
    run(
        OUTSET,
        TABLE,
        """
        from atomic_claim import ClaimError

        for given in [(object(), table), (sa.create_engine("sqlite://"), Claim)]:
            try:
                claim_jobs(*given)
            except ClaimError as error:
                print(error)
            else:
                raise AssertionError
        assert not loaded("sqlalchemy.orm")
        """,
    )


def test_a_half_imported_orm_is_not_looked_at(tmp_path: object) -> None:
    """A claim by engine neither waits for another thread's import of the ORM nor trips over it."""
    run(
        OUTSET,
        TABLE,
        DATABASE,
        "PAUSED = 'sqlalchemy.orm.session'",
        PAUSE,
        """
        from importlib import import_module

        thread = threading.Thread(target=import_module, args=["sqlalchemy.orm"], daemon=True)
        thread.start()
        half.wait()
        assert not hasattr(sys.modules["sqlalchemy.orm"], "Session")
        assert claim_jobs(engine, table).keys == ((1,),)
        go.set()
        thread.join()
        """,
        MAPPED,
        arguments=(f"{tmp_path}/jobs.db",),
    )


def compiled(name: str) -> str:
    """Build the lines of a program that create a dialect of a name."""
    module = MODULES.get(name, name)
    return f"""
        from sqlalchemy.dialects import {module} as module

        dialect = module.dialect()
        dialect.name = {name!r}
        """


def test_a_strategy_is_loaded_by_the_first_construct() -> None:
    """The first thing to be compiled is what it would be once all strategies are loaded.

    Each is the first in a child of its own, forked before any strategy was loaded.
    """
    cases = [(name, MODULES.get(name, name), text) for name in NAMES for text in CONSTRUCTS]
    found = run(
        OUTSET,
        TABLE,
        f"""
        import importlib, json, os
        from atomic_claim.sql_elements import DatabaseTime

        def compiled(name, module, construct):
            dialect = importlib.import_module("sqlalchemy.dialects." + module).dialect()
            dialect.name = name
            assert not loaded("atomic_claim.backends." + module)
            text = str(eval(construct).compile(dialect=dialect))
            others = {{"postgresql", "mysql", "sqlite"}} - {{module}}
            assert not loaded(*("atomic_claim.backends." + other for other in others))
            return text

        def in_child(*case):
            source, sink = os.pipe()
            if (child := os.fork()) == 0:
                try:
                    os.write(sink, compiled(*case).encode())
                finally:
                    os._exit(0)
            os.close(sink)
            os.waitpid(child, 0)
            with os.fdopen(source) as file:
                return file.read()

        print(json.dumps([in_child(*case) for case in {cases!r}]))
        """,
    )
    for (name, module, construct), text in zip(cases, json.loads(found), strict=True):
        dialect = DIALECTS[module].dialect()
        dialect.name = name
        assert text == str(CONSTRUCTS[construct].compile(dialect=dialect))


@pytest.mark.parametrize(
    "construct", ["claim_statement(table)", "sa.select(DatabaseTime(sa.DateTime(), 'utc'))"]
)
def test_other_dialects_are_refused_at_first(construct: str) -> None:
    """For them there is no strategy to load."""
    found = run(
        OUTSET,
        TABLE,
        compiled("oracle"),
        f"""
        from atomic_claim import UnsupportedDialect
        from atomic_claim.sql_elements import DatabaseTime

        try:
            {construct}.compile(dialect=dialect)
        except UnsupportedDialect as error:
            print(error)
        """,
    )
    assert "no backend claims rows on 'oracle'" in found


def test_a_half_loaded_strategy_is_waited_for() -> None:
    """Of two threads the second to compile waits until the first has loaded the strategy."""
    run(
        OUTSET,
        TABLE,
        "PAUSED = 'sqlite3'",
        PAUSE,
        compiled("sqlite"),
        """
        import time

        texts = []

        def compile_one():
            texts.append(str(claim_statement(table, 2).compile(dialect=dialect)))

        def is_importing(thread):
            frame = sys._current_frames().get(thread.ident)
            return frame is not None and "importlib" in frame.f_code.co_filename

        threads = [threading.Thread(target=compile_one, daemon=True) for _ in range(2)]
        threads[0].start()
        half.wait()
        assert loaded("atomic_claim.backends.sqlite")
        threads[1].start()
        while threads[1].is_alive() and not is_importing(threads[1]):
            time.sleep(0.001)
        assert not texts
        go.set()
        for thread in threads:
            thread.join()
        assert len(texts) == 2 and texts[0] == texts[1]
        """,
    )


@pytest.mark.once
def test_the_commands_need_no_greenlet() -> None:
    """The extra `cli` alone is enough for every command; asynchronous functions need greenlet."""
    program = "import sys; sys.modules['greenlet'] = None; import atomic_claim.cli.app"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
