"""The recipes for installed packages, each in one process; `examples.recipes.measure` has more."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from atomic_claim.patch.file import read_file
from examples import recipes
from tests.databases import Database

pytestmark = pytest.mark.databases("sqlite", "postgresql")


def url_of(database: Database) -> str:
    """Return the database's URL with its password."""
    return database.url.render_as_string(hide_password=False)


@pytest.mark.databases("sqlite")
def test_the_measurement_s_table(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each database as it is and patched, of medians and, where they differ, the ends."""
    from examples.recipes import measure  # noqa: PLC0415

    seconds = iter([3.0, 0.5, 1.0, 0.5, 2.0, 0.5])

    def measured(name: str, _: str, *, patched: bool) -> Any:
        assert name == "apso"
        extra = 0 if patched else 5
        return measure.Figures(400, 400 + extra, extra, 0, (100, 100), 1, 2, next(seconds))

    monkeypatch.setattr(measure, "measure", measured)
    lines = measure.table("apso", [url_of(database)], 3).splitlines()
    assert [len(line.split("|")) for line in lines] == [9, 9, 9, 9]
    assert lines[2].endswith(", as it is | 405 | 5 | 0 | 1.0 | 2.0 | 2.0 (1.0 to 3.0) |")
    assert lines[3].endswith(", patched | 400 | 0 | 0 | 1.0 | 2.0 | 0.5 |")


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
def test_kombu(database: Database) -> None:
    """A message goes to one channel, and another's is not waited for."""
    pytest.importorskip("kombu", reason="kombu is not installed")
    from examples.recipes import measure  # noqa: PLC0415

    measure.kombu_fill(url_of(database), 5)
    with measure.patch("kombu") as patch:
        assert measure.kombu_work(url_of(database), []) == [0, 1, 2, 3, 4]
        assert (patch.calls, patch.claimed) == (6, 5)
    for engine, _ in measure.kombu_engines().values():
        engine.dispose()


def test_apscheduler(database: Database) -> None:
    """Each due job goes to one of two stores, a few per call, and is due again once updated."""
    pytest.importorskip("apscheduler", reason="APScheduler is not installed")
    from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore  # noqa: PLC0415
    from apscheduler.schedulers.background import BackgroundScheduler  # noqa: PLC0415

    from examples.recipes import measure  # noqa: PLC0415

    stores = [SQLAlchemyJobStore(engine=database.engine()) for _ in range(2)]
    scheduler = BackgroundScheduler(jobstores={"default": stores[0]}, timezone="UTC")
    scheduler.start(paused=True)
    for number in range(8):
        scheduler.add_job(measure.tick, "interval", seconds=1, args=[number], id=str(number))
    stores[1].start(scheduler, "other")
    now = datetime.now(UTC) + timedelta(seconds=30)
    with measure.patch("apscheduler"):
        found: list[Any] = [job for _ in range(2) for s in stores for job in s.get_due_jobs(now)]
        assert sorted(int(job.id) for job in found) == list(range(8))
        stores[1].update_job(found[0])
        assert [job.id for job in stores[0].get_due_jobs(now)] == [found[0].id]
    scheduler.shutdown()


def test_apso(database: Database) -> None:
    """An event is delivered once, and the relay's own loop goes on as it did."""
    pytest.importorskip("apso_domain_events", reason="apso-domain-events is not installed")
    from examples.recipes import measure  # noqa: PLC0415

    measure.apso_fill(url_of(database), 25)
    with measure.patch("apso") as patch:
        assert sorted(measure.apso_work(url_of(database), [])) == list(range(25))
        assert patch.claimed == 25
    with database.engine().connect() as connection:
        left = sa.text("SELECT count(*) FROM events WHERE status <> 'published'")
        assert connection.scalar(left) == 0


@pytest.mark.databases("postgresql")
@pytest.mark.filterwarnings("ignore:what listens to after_update:UserWarning")
def test_bean_queue(database: Database) -> None:
    """A dispatch hands out as many tasks as it was asked for, as a query."""
    pytest.importorskip("bq", reason="beanqueue is not installed")
    from bq.db.base import Base  # type: ignore[import-not-found]  # noqa: PLC0415
    from bq.models import Task, Worker  # type: ignore[import-not-found]  # noqa: PLC0415
    from bq.services.dispatch import DispatchService  # type: ignore[import-not-found]  # noqa: PLC0415

    engine = database.engine()
    Base.metadata.create_all(engine)
    file = Path(recipes.__file__).with_name("recipes.toml")
    (entry,) = [each for each in read_file(file) if each.target.startswith("bq.")]
    with Session(engine) as session, entry.apply():
        worker = Worker(name="worker", channels=["default"])
        names = {"channel": "default", "module": "m", "func_name": "f"}
        session.add_all([worker, *(Task(**names) for _ in range(3))])
        session.flush()
        service = DispatchService(session)
        found = [service.dispatch(["default"], worker.id, limit=2).all() for _ in range(3)]
        assert [len(tasks) for tasks in found] == [2, 1, 0]
        assert {task.worker_id for tasks in found for task in tasks} == {worker.id}
