"""Every shape of legacy code, drained by four processes: patched, and as it is."""

import multiprocessing
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.claim.test_aio import DRIVERS
from tests.databases import Database
from tests.jobs import START
from tests.patch.legacy import Base, Job, Run
from tests.patch.patched import KILLED, SHAPES, Order, prepare, undone, work

WORKERS = 4
JOBS = 150
PATIENCE = 120
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.patch.patched", "psycopg", "pymysql", "aiosqlite"])


def fill(engine: sa.Engine, model: Any, count: int) -> None:
    """Recreate the tables with a number of rows to be done."""
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    more: dict[str, Any] = {"payload": ""} if model.__tablename__ == "messages" else {}
    rows = [{"id": number, **more} for number in range(1, count + 1)]
    for row in rows:
        if model is Job:
            row["place"] = row["id"]
        if "payload" in row:
            row["payload"] = str(row["id"])
    with engine.begin() as connection:
        connection.execute(sa.insert(model), rows)


def end_leases(engine: sa.Engine, model: Any) -> None:
    """Have the time pass that a dead worker's leases last."""
    if (column := model.__table__.c.get("lease_until")) is not None:
        with engine.begin() as connection:
            over = sa.update(model).where(column.is_not(None)).values(lease_until=START)
            connection.execute(over)


def address(database: Database, shape: str) -> str:
    """Return the database's URL for a worker of a shape; set SQLite to WAL mode."""
    url = database.url
    if SHAPES[shape].on_loop:
        url = url.set(drivername=DRIVERS[database.name][0])
    if database.name == "sqlite":
        with database.engine().connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
    return url.render_as_string(hide_password=False)


def drain(
    database: Database, shape: str, folder: Path, *, patched: bool = True, jobs: int = JOBS
) -> list[int]:
    """Have four processes drain a table; what their work wrote down."""
    engine = database.engine()
    prepare(engine)
    fill(engine, SHAPES[shape].model, jobs)
    url = address(database, shape)
    folder.mkdir()
    dying = 0 if patched and shape in KILLED else None
    start = None if dying is not None else CONTEXT.Barrier(WORKERS)
    workers = []
    for number in range(WORKERS):
        dies_at = 3 if number == dying else None
        order = Order(shape, url, folder / str(number), patched, dies_at)
        workers.append(CONTEXT.Process(target=work, args=(order, start), daemon=True))
    for number, worker in enumerate(workers):
        worker.start()
        if number == dying:
            # Alone, since the first one to come may have the whole table in hand.
            worker.join(PATIENCE)
            end_leases(engine, SHAPES[shape].model)
    for worker in workers:
        worker.join(PATIENCE)
    codes = [worker.exitcode for worker in workers]
    expected = [-signal.SIGKILL if number == dying else 0 for number in range(WORKERS)]
    if patched:
        assert codes == expected
    with engine.connect() as connection:
        ran = list(connection.scalars(sa.select(Run.number)))
    for path in folder.iterdir():
        ran += [int(line) for line in path.read_text(encoding="ascii").split()]
    return ran


# Variants of a shape, whose SQL is that of the shape itself: two databases are enough.
VARIANTS = ("C by sessionmaker", "C by Core", "E by Core", "F with a state")


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in VARIANTS])
def test_every_job_runs_once(database: Database, shape: str, tmp_path: Path) -> None:
    """Four processes run each of the jobs once, though one is killed in the middle of its loop."""
    check_drain(database, shape, tmp_path)


@pytest.mark.databases("sqlite", "postgresql")
@pytest.mark.parametrize("shape", VARIANTS)
def test_so_do_the_variants(database: Database, shape: str, tmp_path: Path) -> None:
    """The same, however the legacy code is written."""
    check_drain(database, shape, tmp_path)


def check_drain(database: Database, shape: str, tmp_path: Path) -> None:
    """Drain a table, and compare what the work wrote down."""
    ran = drain(database, shape, tmp_path / "runs")
    assert {job: times for job, times in Counter(ran).items() if times > 1} == {}
    assert sorted(ran) == list(range(1, JOBS + 1))
    if SHAPES[shape].model is not Job:
        assert undone(database.engine(), SHAPES[shape].model) == 0


# What one step of each legacy function looks like between the steps of another worker's.
@pytest.mark.databases("sqlite", "postgresql")
@pytest.mark.parametrize("shape", ["A", "D", "E", "F", "G"])
def test_as_it_is_jobs_run_again(database: Database, shape: str, tmp_path: Path) -> None:
    """The twin: drained the same way, but not patched, jobs run several times or calls fail."""
    for attempt in range(8):
        ran = drain(database, shape, tmp_path / f"runs {attempt}", patched=False, jobs=60)
        if len(ran) > len(set(ran)):
            break
    else:
        pytest.fail("eight drains without a job that ran twice")
