"""Measurement of the packages with several workers, before and after the patch.

    python -m examples.recipes.measure kombu postgresql+psycopg://user@host/database
    python -m examples.recipes.measure --runs 5 apscheduler sqlite:///jobs.sqlite postgresql+...

Prints a Markdown table: of each figure the median, and where they differ the least and the most.
The tables that the package makes are created again, and dropped in the end.
"""

import argparse
import asyncio
import logging
import multiprocessing
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from atomic_claim import Patch
from atomic_claim.patch.file import read_file

QUEUE = "work"
FILE = Path(__file__).with_name("recipes.toml")


@dataclass(frozen=True)
class Figures:
    """Results of one measurement.

    Attributes:
        jobs: how many jobs there were.
        runs: how many runs there were.
        extra: how many of them were one too many.
        lost: how many jobs had no run.
        workers: how many runs each worker had.
        p50: the median of a call, in milliseconds.
        p99: the 99th percentile of a call.
        seconds: how long all of it took.
    """

    jobs: int
    runs: int
    extra: int
    lost: int
    workers: tuple[int, ...]
    p50: float
    p99: float
    seconds: float


Column = tuple[str, Callable[[Figures], float], str]
RUNS: list[Column] = [
    ("runs", lambda figures: figures.runs, ",.0f"),
    ("too many", lambda figures: figures.extra, ",.0f"),
    ("jobs without a run", lambda figures: figures.lost, ",.0f"),
]
SHARES: list[Column] = [
    ("fewest by a worker", lambda figures: figures.workers[0], ",.0f"),
    ("most by a worker", lambda figures: figures.workers[-1], ",.0f"),
]
TIMES: list[Column] = [
    ("a call, median, ms", lambda figures: figures.p50, ".1f"),
    ("a call, p99, ms", lambda figures: figures.p99, ".1f"),
    ("all of it, s", lambda figures: figures.seconds, ".1f"),
]


def engine_of(url: str) -> sa.Engine:
    """Create an engine whose SQLite waits for other writers."""
    arguments = {"timeout": 60} if url.startswith("sqlite") else {}
    return sa.create_engine(url, connect_args=arguments)


def kombu_fill(url: str, count: int) -> None:
    """Publish messages."""
    channel = _channel(url)
    for number in range(count):
        channel._put(QUEUE, {"body": number})
    channel.session.close()


def _channel(url: str) -> Any:
    from kombu import Connection  # noqa: PLC0415

    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    connection = Connection(f"sqlalchemy+{url}", transport_options=options)
    return connection.default_channel


def kombu_engines() -> dict[str, Any]:
    """Return the engines that kombu keeps, with their session factories."""
    from kombu.transport.sqlalchemy import Channel  # noqa: PLC0415

    return Channel._engines


def kombu_work(url: str, took: list[float]) -> list[Any]:
    """Receive until the queue is empty."""
    from queue import Empty  # noqa: PLC0415

    channel, found = _channel(url), []
    # Connects, and makes the tables, which is not what is measured.
    channel._size(QUEUE)
    while True:
        began = time.perf_counter()
        try:
            message = channel._get(QUEUE)
        except Empty:
            break
        took.append(time.perf_counter() - began)
        found.append(message["body"])
    channel.session.close()
    return found


def apso_fill(url: str, count: int) -> None:
    """Put events into the outbox."""
    from apso_domain_events.model import DomainEvent  # noqa: PLC0415

    engine = engine_of(url)
    DomainEvent.metadata.create_all(engine)
    with engine.begin() as connection:
        rows = [{"id": str(number), "type": "made", "payload": {}} for number in range(count)]
        connection.execute(sa.insert(DomainEvent), rows)
    engine.dispose()


def apso_work(url: str, took: list[float]) -> list[Any]:
    """Relay until nothing is left."""
    from apso_domain_events.relay import DomainEventRelay  # noqa: PLC0415
    from sqlalchemy.orm import sessionmaker  # noqa: PLC0415

    found: list[Any] = []

    class Destination:
        def deliver(self, event: Any) -> None:
            found.append(int(event.id))

    engine = engine_of(url)
    relay = DomainEventRelay(sessionmaker(engine), [Destination()])  # type: ignore[list-item]
    while True:
        began = time.perf_counter()
        if not relay.process_pending(10):
            break
        took.append(time.perf_counter() - began)
    engine.dispose()
    return found


def tick(number: int) -> None:
    """Do nothing; an event of the scheduler tells which worker ran the job."""


def apscheduler_fill(url: str, count: int) -> None:
    """Add interval jobs by a scheduler that is paused."""
    scheduler, engine = _scheduler(url)
    scheduler.start(paused=True)
    for number in range(count):
        scheduler.add_job(
            tick, "interval", seconds=1, args=[number], id=str(number), misfire_grace_time=60
        )
    scheduler.shutdown()
    engine.dispose()


def _scheduler(url: str) -> Any:
    from apscheduler.executors.debug import DebugExecutor  # noqa: PLC0415
    from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore  # noqa: PLC0415
    from apscheduler.schedulers.background import BackgroundScheduler  # noqa: PLC0415

    engine = engine_of(url)
    # Jobs run within the scheduler's own thread, so that what is counted is what it submitted.
    scheduler = BackgroundScheduler(
        jobstores={"default": SQLAlchemyJobStore(engine=engine)},
        executors={"default": DebugExecutor()},
        timezone="UTC",
        jobstore_retry_interval=0.2,
    )
    scheduler._max_wakeup = 0.2
    return scheduler, engine


SECONDS = 6.5


def apscheduler_work(url: str, took: list[float]) -> list[Any]:
    """Schedule for some seconds; a worker that sleeps looks again five times a second."""
    import threading  # noqa: PLC0415

    from apscheduler.events import EVENT_JOB_EXECUTED  # noqa: PLC0415

    fired: list[Any] = []
    scheduler, engine = _scheduler(url)
    scheduler.add_listener(
        lambda event: fired.append((event.job_id, event.scheduled_run_time)), EVENT_JOB_EXECUTED
    )
    scheduler.start()
    ended = time.monotonic() + SECONDS
    while (left := ended - time.monotonic()) > 0:
        began = time.perf_counter()
        scheduler.wakeup()
        took.append(time.perf_counter() - began)
        threading.Event().wait(min(0.2, left))
    scheduler.shutdown()
    engine.dispose()
    return fired


def _storage(url: str) -> Any:
    from dbjobq.storage.sqlalchemy_storage import SQLAlchemyStorage  # type: ignore[import-not-found]  # noqa: PLC0415

    drivers = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg"}
    given = sa.make_url(url)
    address = given.set(drivername=drivers[given.get_backend_name()])
    return SQLAlchemyStorage(address.render_as_string(hide_password=False))


def dbjobq_fill(url: str, count: int) -> None:
    """Enqueue jobs whose type is their number."""

    async def fill() -> None:
        storage = _storage(url)
        await storage.initialize()
        for number in range(count):
            await storage.enqueue(str(number), "{}")
        await storage.close()

    asyncio.run(fill())


def dbjobq_work(url: str, took: list[float]) -> list[Any]:
    """Dequeue and complete until nothing is left."""

    async def work() -> list[Any]:
        storage, found = _storage(url), []
        while True:
            began = time.perf_counter()
            if (job := await storage.dequeue()) is None:
                break
            took.append(time.perf_counter() - began)
            found.append(int(job.type))
            await storage.complete(job.id)
        await storage.close()
        return found

    return asyncio.run(work())


def _mails(url: str) -> tuple[Any, Any, Any]:
    """Return an application with a table of mails, its database and the table's class."""
    from flask import Flask  # noqa: PLC0415
    from flask_mail import Mail  # type: ignore[import-not-found]  # noqa: PLC0415
    from flask_mailalchemy.model import EmailMixin  # type: ignore[import-not-found]  # noqa: PLC0415
    from flask_sqlalchemy import SQLAlchemy  # noqa: PLC0415

    app = Flask(__name__)
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    app.config.update(
        SQLALCHEMY_DATABASE_URI=url, SQLALCHEMY_ENGINE_OPTIONS=options, MAIL_SUPPRESS_SEND=True
    )
    database: Any = SQLAlchemy(app)
    Mail(app)
    # What the package asks of Flask-SQLAlchemy 2.
    database.db = database
    mail = type("Email", (EmailMixin, database.Model), {})
    return app, database, mail


def mailalchemy_fill(url: str, count: int) -> None:
    """Schedule mails whose subject is their number."""
    app, database, mail = _mails(url)
    with app.app_context():
        database.create_all()
        for number in range(count):
            address = {"sender_address": "a@localhost", "recipient": "b@localhost"}
            database.session.add(mail(subject=str(number), message_txt="", **address))
        database.session.commit()


def mailalchemy_work(url: str, took: list[float]) -> list[Any]:
    """Send what is scheduled, as a turn of its worker does, until nothing is left."""
    from flask_mail import email_dispatched  # noqa: PLC0415

    app, database, mail = _mails(url)
    sent: list[Any] = []

    def note(message: Any, **_: Any) -> None:
        sent.append(int(message.subject))

    email_dispatched.connect(note)
    with app.app_context():
        while mail.scheduled().count():
            database.session.rollback()
            began = time.perf_counter()
            mail.send_scheduled()
            took.append(time.perf_counter() - began)
    return sent


@dataclass(frozen=True)
class Recipe:
    """A package to measure: the patched function, the rows, and one worker's loop."""

    target: str
    fill: Callable[[str, int], None]
    work: Callable[[str, list[float]], list[Any]]
    tables: tuple[str, ...]
    workers: int
    jobs: int
    columns: list[Column]


RECIPES = {
    "kombu": Recipe(
        "kombu.transport.sqlalchemy:Channel._get",
        kombu_fill,
        kombu_work,
        ("kombu_message", "kombu_queue"),
        8,
        400,
        RUNS + TIMES,
    ),
    "apso": Recipe(
        "apso_domain_events.relay:DomainEventRelay.process_pending",
        apso_fill,
        apso_work,
        ("events",),
        4,
        400,
        RUNS + TIMES,
    ),
    "dbjobq": Recipe(
        "dbjobq.storage.sqlalchemy_storage:SQLAlchemyStorage.dequeue",
        dbjobq_fill,
        dbjobq_work,
        ("jobs", "schedules"),
        4,
        200,
        RUNS + TIMES,
    ),
    "mailalchemy": Recipe(
        "flask_mailalchemy.model:EmailMixin.send_scheduled",
        mailalchemy_fill,
        mailalchemy_work,
        ("email",),
        4,
        100,
        RUNS + TIMES,
    ),
    "apscheduler": Recipe(
        "apscheduler.jobstores.sqlalchemy:SQLAlchemyJobStore.get_due_jobs",
        apscheduler_fill,
        apscheduler_work,
        ("apscheduler_jobs",),
        4,
        50,
        RUNS + SHARES,
    ),
}


def patch(name: str) -> Patch:
    """Make the patch of a recipe."""
    (entry,) = [each for each in read_file(FILE) if each.target == RECIPES[name].target]
    return entry.apply()


def _drop(url: str, tables: tuple[str, ...]) -> None:
    engine = engine_of(url)
    with engine.begin() as connection:
        for table in tables:
            connection.exec_driver_sql(f"DROP TABLE IF EXISTS {table}")
    engine.dispose()


def _worker(name: str, url: str, patched: bool, start: Any, results: Any) -> None:
    logging.disable(logging.WARNING)
    recipe = RECIPES[name]
    took: list[float] = []
    context = patch(name) if patched else None
    with context or nullcontext():
        start.wait(60)
        results.put((recipe.work(url, took), took))


def measure(name: str, url: str, *, patched: bool) -> Figures:
    """Start the package's workers on a table of jobs."""
    recipe = RECIPES[name]
    _drop(url, recipe.tables)
    # In a process of its own, since kombu never disposes its engines.
    context = multiprocessing.get_context("spawn")
    filling = context.Process(target=recipe.fill, args=(url, recipe.jobs))
    filling.start()
    filling.join()
    start, results = context.Barrier(recipe.workers + 1), context.Queue()
    workers = [
        context.Process(target=_worker, args=(name, url, patched, start, results))
        for _ in range(recipe.workers)
    ]
    for worker in workers:
        worker.start()
    start.wait(60)
    began = time.perf_counter()
    found = [results.get(timeout=120) for _ in workers]
    seconds = time.perf_counter() - began
    for worker in workers:
        worker.join()
    _drop(url, recipe.tables)
    runs = Counter(run for ran, _ in found for run in ran)
    took = sorted(each * 1000 for _, times in found for each in times)
    # Of an interval job, each time at which it is due counts as one of its own.
    names = {str(run[0] if isinstance(run, tuple) else run) for run in runs}
    return Figures(
        recipe.jobs,
        runs.total(),
        sum(times - 1 for times in runs.values()),
        sum(1 for number in range(recipe.jobs) if str(number) not in names),
        tuple(sorted(len(ran) for ran, _ in found)),
        statistics.median(took),
        took[int(len(took) * 0.99)] if took else 0.0,
        seconds,
    )


def table(name: str, urls: list[str], runs: int) -> str:
    """Measure on each database in turn, as it is and patched, and put it into a table."""
    recipe = RECIPES[name]
    lines = [
        f"| {recipe.workers} workers, {recipe.jobs} jobs | "
        + " | ".join(heading for heading, _, _ in recipe.columns),
        "|---" * (len(recipe.columns) + 1),
    ]
    for url in urls:
        found: dict[bool, list[Figures]] = {False: [], True: []}
        for _ in range(runs):
            for patched, figures in found.items():
                figures.append(measure(name, url, patched=patched))
        for patched, figures in found.items():
            cells = [
                _cell([read(each) for each in figures], how) for _, read, how in recipe.columns
            ]
            what = "patched" if patched else "as it is"
            lines.append(" | ".join([f"| {server_of(url)}, {what}", *cells]))
    return "\n".join(f"{line} |" if " " in line else f"{line}|" for line in lines)


def _cell(values: list[float], how: str) -> str:
    """Format the median, with the least and the greatest value if they differ."""
    least, middle, most = (
        format(each, how) for each in (min(values), statistics.median(values), max(values))
    )
    return middle if least == most else f"{middle} ({least} to {most})"


def server_of(url: str) -> str:
    """Return the database's name and version."""
    engine = engine_of(url)
    with engine.connect() as connection:
        version = ".".join(map(str, connection.dialect.server_version_info or ()))
    engine.dispose()
    names = {"postgresql": "PostgreSQL", "sqlite": "SQLite", "mysql": "MySQL", "mariadb": "MariaDB"}
    return f"{names.get(engine.dialect.name, engine.dialect.name)} {version}"


def main() -> None:
    """Measure a recipe before and after."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("urls", nargs="+", metavar="url", help="a database, as an SQLAlchemy URL")
    parser.add_argument("--runs", type=int, default=1, help="how often each is measured (1)")
    given = parser.parse_args()
    print(table(given.recipe, given.urls, given.runs))
    print(
        f"\n{given.runs} runs of each in turn; SQLAlchemy {sa.__version__}, "
        f"Python {platform.python_version()}, {os.cpu_count()} cores"
    )


if __name__ == "__main__":
    main()
