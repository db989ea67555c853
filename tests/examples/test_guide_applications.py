"""The applications of the guides: each does what its guide says."""

import asyncio
import importlib
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from atomic_claim import claim_jobs, complete_jobs, keep_claims
from tests.commands import Command, address
from tests.databases import Database
from tests.guides import GUIDES, PATHS, blocks
from tests.jobs import fill, ids, job_table
from tests.pgbouncer import pgbouncer
from tests.processes import Workspace

pytestmark = pytest.mark.once

PATIENCE = 60
FLASK = PATHS["flask"].parent
SHOWN = [
    (topic, block)
    for topic in ("asyncio_fastapi", "flask", "legacy_app", "worker")
    for language in ("python", "toml")
    for block in blocks(topic, language)
]


@pytest.mark.parametrize(("topic", "block"), SHOWN)
def test_the_guide_shows_the_application(topic: str, block: str) -> None:
    """Each block of code is an exact part of a file beside the guide."""
    folder = PATHS[topic].parent
    files = [*folder.rglob("*.py"), *folder.rglob("*.toml")]
    assert any(block in path.read_text(encoding="utf-8") for path in files)


@pytest.fixture
def fastapi_app(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import the FastAPI application, on the test's database."""
    pytest.importorskip("fastapi")
    url = database.url.set(drivername="postgresql+asyncpg")
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    name = "examples.asyncio_fastapi.app"
    yield importlib.import_module(name)
    del sys.modules[name]


@pytest.mark.databases("postgresql")
def test_fastapi(fastapi_app: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job is done, one that raises is tried again, and one in hand is finished at the stop."""
    httpx = pytest.importorskip("httpx")
    asked_to_stop: list[asyncio.Event] = []
    work = fastapi_app.work

    async def noting(stopped: asyncio.Event) -> None:
        asked_to_stop.append(stopped)
        await work(stopped)

    async def send(job: Any) -> None:
        if "error" in job.payload:
            raise ValueError(job.payload["error"])
        if job.payload["to"] == "bob":
            await asked_to_stop[0].wait()

    monkeypatch.setattr(fastapi_app, "work", noting)
    monkeypatch.setattr(fastapi_app, "send", send)

    async def use(client: Any) -> str:
        async def added(**payload: str) -> str:
            reply = await client.post("/jobs", json=payload)
            assert reply.status_code == 202
            return str(reply.json())

        async def wait_for(key: str, **expected: Any) -> None:
            deadline = time.monotonic() + PATIENCE
            while (found := (await client.get(f"/jobs/{key}")).json()) != expected:
                assert time.monotonic() < deadline, found

        await wait_for(await added(to="ann"), status="done", attempts=1, last_error=None)
        await wait_for(await added(error="no"), status="waiting", attempts=1, last_error="no")
        last = await added(to="bob")
        await wait_for(last, status="running", attempts=1, last_error=None)
        assert (await client.get(f"/jobs/{uuid.uuid4()}")).status_code == 404
        return last

    async def run() -> Any:
        transport = httpx.ASGITransport(fastapi_app.app)
        async with (
            fastapi_app.lifespan(fastapi_app.app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            last = await use(client)
        query = sa.select(fastapi_app.Job.status).where(fastapi_app.Job.id == uuid.UUID(last))
        async with fastapi_app.SESSIONS() as session:
            found = await session.scalar(query)
        await fastapi_app.ENGINE.dispose()
        return found

    assert asyncio.run(run()) is fastapi_app.Status.DONE


@pytest.mark.databases("mysql")
def test_flask(database: Database, tmp_path: Path) -> None:
    """The loop runs patched, on a table that Flask-Migrate makes, and each mail is sent once."""
    pytest.importorskip("flask_migrate")
    for name in ("mailer.py", "mail_table.py", "pyproject.toml"):
        shutil.copy(FLASK / name, tmp_path)
    environment = os.environ | {
        "FLASK_APP": "mailer",
        "FLASK_SQLALCHEMY_DATABASE_URI": database.url.render_as_string(hide_password=False),
        "DATABASE_URL": database.url.render_as_string(hide_password=False),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }

    def run(command: str) -> str:
        assert command in GUIDES["flask"]
        done = subprocess.run(
            [sys.executable, "-m", *command.replace("atomic-claim", "atomic_claim").split()],
            cwd=tmp_path,
            env=environment,
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("flask db init")
    run("flask db migrate")
    run("flask db upgrade")
    run("atomic-claim migration --write")
    run("flask db upgrade")
    engine = database.engine()
    mails = sa.Table("mail", sa.MetaData(), autoload_with=engine)
    assert "mail_claim_free" in {index.name for index in mails.indexes}
    names = ["ann", "bob", "eve"]
    with engine.begin() as connection:
        new = {"status": "new", "created_at": sa.func.now()}
        connection.execute(mails.insert().values(new), [{"recipient": name} for name in names])
    run("atomic-claim doctor")
    assert run("atomic-claim run -- flask send") == "".join(f"mail to {name}\n" for name in names)
    with engine.connect() as connection:
        assert set(connection.scalars(sa.select(mails.c.status))) == {"sent"}


@pytest.mark.databases("postgresql")
def test_production(database: Database, workspace: Workspace, command: Command) -> None:
    """The guide's code and commands run, and claims work through PgBouncer by transaction."""
    (example,) = blocks("production", "python")
    found: dict[str, Any] = {}
    exec(example, found)  # noqa: S102 - the guides are ours
    assert isinstance(found["engine"], sa.Engine)
    table = job_table(
        sa.Column("completed_at", sa.DateTime(timezone=True)),
        sa.Column("lease_until", sa.DateTime(timezone=True)),
        sa.Column("claim_token", sa.String(32)),
    )
    direct = database.engine()
    fill(direct, table, 3)
    (statement,) = blocks("production", "sql")
    with direct.begin() as connection:
        connection.exec_driver_sql(statement)
    with pgbouncer(database, workspace, "transaction") as url:
        options = {"prepare_threshold": None}
        engine = database.engine(url=url, connect_args=options)
        claim = claim_jobs(engine, table, 2, lease=timedelta(minutes=5))
        with keep_claims(engine, claim), engine.begin() as connection:
            assert ids(claim_jobs(connection, table, 2, lease=timedelta(minutes=5))) == [3]
            assert complete_jobs(connection, claim) == 2
        assert ids(claim) == [1, 2]
        engine.dispose()
    (commands,) = blocks("production", "console")
    for line in re.findall(r"^\$ atomic-claim (.*)$", commands, re.MULTILINE):
        arguments = line.replace("app_models:jobs", "jobs").split()
        ended = command(*arguments, "--url", address(database))
        assert ended.code in {0, 1}
        assert ended.err == ""


@pytest.mark.databases("postgresql")
def test_guard(database: Database) -> None:
    """The guide's triggers refuse a second claim with the message that the guide shows."""
    engine = database.engine()
    jobs = job_table(sa.Column("completed_at", sa.DateTime))
    fill(engine, jobs, 1)
    (block,) = blocks("guard", "python")
    exec(block, {"engine": engine, "jobs": jobs})  # noqa: S102 - the guides are ours
    claim = sa.update(jobs).where(jobs.c.id == 1).values(processing=True)
    with engine.begin() as connection:
        connection.execute(claim)
    with pytest.raises(IntegrityError) as refused, engine.begin() as connection:
        connection.execute(claim)
    (shown,) = blocks("guard", "text")
    assert str(refused.value.orig).startswith(shown)
