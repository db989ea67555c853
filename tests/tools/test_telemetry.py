"""Events, log records and OpenTelemetry's metrics of claims and of their ends."""

import logging
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import Column, String
from sqlalchemy.orm import Session, deferred, registry, sessionmaker

from atomic_claim import (
    ClaimConflict,
    ClaimError,
    ClaimLost,
    JobTable,
    claim_jobs,
    complete_jobs,
    fail_jobs,
    keep_claims,
    release_jobs,
    requeue_jobs,
    sweep_jobs,
)
from atomic_claim.claim import dequeue_jobs
from atomic_claim.execution import Statements
from atomic_claim.heartbeat import Beat
from atomic_claim.opentelemetry import instrument_opentelemetry
from atomic_claim.telemetry import (
    Claimed,
    Ended,
    Event,
    Lost,
    Requeued,
    Retried,
    Swept,
    subscribe,
)
from tests.counting import PRECISE
from tests.databases import Database
from tests.jobs import START, fill, hurried, job_table, mapped
from tests.project.test_walks import walk
from tests.statements import sent_by

pytestmark = pytest.mark.once

HOUR = timedelta(hours=1)
ON_ALL = pytest.mark.databases("sqlite", "postgresql", "mysql", "mariadb")
ON_SQLITE = pytest.mark.databases("sqlite")


def declared(*more: Any) -> JobTable:
    """Declare a table with a column for every role that events depend on."""
    table = job_table(
        Column("state", String(10), nullable=False, server_default="waiting"),
        Column("run_at", PRECISE),
        Column("claimed_at", PRECISE),
        Column("claim_token", String(32)),
        Column("lease_until", PRECISE),
        Column("attempts", sa.Integer, nullable=False, server_default="0"),
        Column("worker", String(20)),
        *more,
    )
    return JobTable(
        table,
        state="state",
        free="waiting",
        claimed={"state": "running", "claimed_at": sa.func.now()},
        done="done",
        failed="failed",
        due="run_at",
        order="created_at",
        token="claim_token",
        lease="lease_until",
        attempts="attempts",
        max_attempts=3,
        worker="worker",
    )


@pytest.fixture
def events() -> Iterator[list[Event]]:
    """Collect the events of a test."""
    found: list[Event] = []
    unsubscribe = subscribe(found.append)
    yield found
    unsubscribe()


def without_times(events: list[Event]) -> list[Event]:
    """Return the events; of claims only what does not depend on the clock."""
    return [
        Claimed(each.table, each.keys, (), each.worker, each.unreadable, 0)
        if isinstance(each, Claimed)
        else each
        for each in events
    ]


def live(engine: sa.Engine, jobs: JobTable) -> None:
    """Take jobs through every kind of end."""
    claim = claim_jobs(engine, jobs, 4, worker="w1", lease=HOUR)
    complete_jobs(engine, claim[:1])
    fail_jobs(engine, claim[1:2])
    fail_jobs(engine, claim[2:3], retry=HOUR)
    release_jobs(engine, claim[3:])
    with pytest.raises(ClaimLost):
        complete_jobs(engine, claim[:1])
    requeue_jobs(engine, jobs)
    with engine.begin() as connection:
        connection.execute(jobs.table.update().values(attempts=3))
    sweep_jobs(engine, jobs)
    assert not claim_jobs(engine, jobs)


@ON_ALL
def test_a_job_s_life(database: Database, events: list[Event]) -> None:
    """Every step of a job is an event with its keys; what changes nothing is none."""
    engine, jobs = database.engine(), declared()
    fill(engine, jobs.table, 4)
    live(engine, jobs)
    assert without_times(events) == [
        Claimed("jobs", ((1,), (2,), (3,), (4,)), (), "w1", (), 0),
        Ended("jobs", ((1,),), ("done",)),
        Ended("jobs", ((2,),), ("failed",)),
        Ended("jobs", ((3,),), ("retried",)),
        Ended("jobs", ((4,),), ("released",)),
        Lost("jobs", ((1,),)),
        Requeued("jobs", ((2,),)),
        Swept("jobs", ((2,), (3,), (4,))),
        Claimed("jobs", (), (), None, (), 0),
    ]
    with pytest.raises(FrozenInstanceError):
        events[0].table = "others"  # type: ignore[misc]


@ON_ALL
def test_the_statements_are_the_same(database: Database) -> None:
    """With a subscriber nothing else is sent than without."""
    found = []
    for subscribed in (False, True):
        engine, jobs = database.engine(), declared()
        fill(engine, jobs.table, 4)
        sent = sent_by(engine)
        unsubscribe = subscribe(lambda _: None) if subscribed else lambda: None
        live(engine, jobs)
        unsubscribe()
        found.append([each.text for each in sent])
        jobs.table.drop(engine)
    assert found[0] == found[1]


@ON_SQLITE
def test_without_a_subscriber_nothing_is_called(database: Database) -> None:
    """A claim and its end go through no function of telemetry, unless DEBUG is logged."""
    engine, jobs = database.engine(), declared()
    fill(engine, jobs.table, 4)

    def claim() -> None:
        complete_jobs(engine, claim_jobs(engine, jobs))

    assert not [name for name in walk(claim) if name.startswith("/telemetry.py")]
    unsubscribe = subscribe(lambda _: None)
    assert [name for name in walk(claim) if name.startswith("/telemetry.py")]
    unsubscribe()
    assert not [name for name in walk(claim) if name.startswith("/telemetry.py")]


@ON_ALL
@pytest.mark.parametrize("kind", ["rows", "entities"])
def test_waits(database: Database, events: list[Event], kind: str) -> None:
    """A row waits since it was due, or else created, until the claim time that it shows."""
    engine, jobs = database.engine(), declared()
    fill(engine, jobs.table, 2)
    with engine.begin() as connection:
        now = connection.scalar(sa.select(jobs.now(jobs.table.c.run_at)))
        due = jobs.table.update().where(jobs.table.c.id == 1).values(run_at=now - HOUR)
        connection.execute(due)
    if kind == "entities":
        jobs = replace(jobs, table=mapped(jobs.table))
        claim_jobs(sessionmaker(engine), jobs, 2, lease=HOUR)
    else:
        claim_jobs(engine, jobs, 2, lease=HOUR)
    [event] = events
    assert isinstance(event, Claimed)
    first, second = event.waits
    assert first is not None
    assert HOUR <= first < 2 * HOUR
    assert second is not None
    assert START + second >= now - timedelta(minutes=2)
    assert event.seconds > 0


@ON_SQLITE
@pytest.mark.parametrize("naive_times", [None, "utc"])
def test_a_wait_that_a_row_does_not_show(
    database: Database, events: list[Event], naive_times: Any
) -> None:
    """Without a claim time it is this process's clock that counts, if the zone is known."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 1)
    claim_jobs(engine, JobTable(table, state="processing", naive_times=naive_times))
    [event] = events
    assert isinstance(event, Claimed)
    assert [wait is None for wait in event.waits] == [naive_times is None]


@ON_SQLITE
def test_what_is_not_loaded_is_not_read(database: Database, events: list[Event]) -> None:
    """A deferred or unmapped time of an entity is left out, without a statement for it."""
    engine, table = database.engine(), job_table(Column("claimed_at", sa.DateTime))
    fill(engine, table, 2)
    properties = {"created_at": deferred(table.c.created_at)}
    entity: Any = (
        registry()
        .map_imperatively(
            type("Job", (), {}), table, properties=properties, exclude_properties=["claimed_at"]
        )
        .class_
    )
    jobs = JobTable(entity, state="processing")
    with Session(engine) as session:
        [job] = claim_jobs(session, jobs)
        assert "created_at" not in vars(job)
        dequeue_jobs(session, jobs)
    assert [each.waits for each in events if isinstance(each, Claimed)] == [(None,), (None,)]


@ON_SQLITE
def test_a_callback_that_raises(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """The claim is handed out all the same, and other subscribers are called."""
    engine, jobs = database.engine(), declared()
    fill(engine, jobs.table, 1)
    seen: list[Event] = []

    def fail(event: Event) -> None:
        raise ZeroDivisionError(type(event).__name__)

    ends = [subscribe(fail), subscribe(seen.append), subscribe(seen.append)]
    try:
        claim = claim_jobs(engine, jobs, lease=HOUR)
        ends[1]()
        assert complete_jobs(engine, claim) == 1
    finally:
        for end in ends:
            end()
    assert list(map(type, seen)) == [Claimed, Claimed, Ended]
    assert "ZeroDivisionError: Claimed" in caplog.text
    assert "ZeroDivisionError: Ended" in caplog.text


@ON_SQLITE
def test_the_log(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """Claims and ends are logged at DEBUG, what needs attention at WARNING, by keys."""
    engine, jobs = database.engine(), declared()
    fill(engine, jobs.table, 4, note="secret")
    with caplog.at_level(logging.DEBUG, "atomic_claim"):
        live(engine, jobs)
    found = [(each.levelname, each.getMessage().partition("(")[0]) for each in caplog.records]
    assert found == [
        ("DEBUG", "Claimed"),
        *[("DEBUG", "Ended")] * 4,
        ("WARNING", "Lost"),
        ("DEBUG", "Requeued"),
        ("WARNING", "Swept"),
        ("DEBUG", "Claimed"),
    ]
    assert "Lost(table='jobs', keys=((1,),))" in caplog.text
    assert "secret" not in caplog.text


@ON_ALL
def test_a_row_that_cannot_be_read_is_logged_without_its_value(
    database: Database, events: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    """The event names its key, and the log its key and the error's class."""
    kinds = sa.Enum("mail", "film", native_enum=False, length=10)
    engine, jobs = database.engine(), declared(Column("kind", kinds))
    fill(engine, jobs.table, 2, kind="mail")
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE jobs SET kind = 'fax' WHERE id = 1")
    claim_jobs(engine, jobs, 2, lease=HOUR)
    assert without_times(events) == [Claimed("jobs", ((2,),), (), None, ((1,),), 0)]
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == "row (1,) of jobs cannot be read: LookupError"


@ON_SQLITE
def test_a_row_is_lost_once(database: Database, events: list[Event]) -> None:
    """The end of a job does not report again what ``keep_claims`` has reported."""
    engine, jobs = database.engine(), declared()
    fill(engine, jobs.table, 2)
    claim = claim_jobs(engine, jobs, 2, lease=HOUR)
    with keep_claims(engine, claim, every=timedelta(minutes=30)) as keeper:
        with engine.begin() as connection:
            taken = jobs.table.update().where(jobs.table.c.id == 1)
            connection.execute(taken.values(claim_token="another's"))
        assert isinstance(keeper, Beat)
        assert keeper.once() == ((1,),)
        with pytest.raises(ClaimLost):
            complete_jobs(engine, claim)
    assert [each.keys for each in events if isinstance(each, Lost)] == [((1,),)]


@ON_SQLITE
def test_a_transaction_that_runs_again(database: Database, events: list[Event]) -> None:
    """Each try but the last is an event."""
    tries: list[int] = []

    def run(_: object) -> int:
        tries.append(1)
        if len(tries) < 3:
            raise ClaimConflict("another transaction was in the way")
        return len(tries)

    with hurried():
        assert Statements(database.engine(), declared(), run).execute() == 3
    assert events == [Retried("jobs", (), 1, False), Retried("jobs", (), 2, False)]


def metrics(reader: InMemoryMetricReader) -> dict[str, dict[tuple[str, ...], Any]]:
    """Return each metric's points by their attributes that differ, without the common ones."""
    data: Any = reader.get_metrics_data()
    found: dict[str, dict[tuple[str, ...], Any]] = {}
    for resource in data.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                points = found.setdefault(metric.name, {})
                for point in metric.data.data_points:
                    outcome = point.attributes.get("atomic_claim.outcome")
                    value = getattr(point, "value", getattr(point, "count", None))
                    points[(outcome,) if outcome else ()] = value
    return found


@ON_ALL
def test_opentelemetry(database: Database) -> None:
    """The metrics and spans of a life, and the gauges before and after."""
    engine, jobs = database.engine(), declared()
    fill(engine, jobs.table, 4)
    reader, exporter = InMemoryMetricReader(), InMemorySpanExporter()
    tracing = TracerProvider()
    tracing.add_span_processor(SimpleSpanProcessor(exporter))
    meters = MeterProvider([reader])
    stop = instrument_opentelemetry(meters, tracing, {engine: [jobs]})
    before = metrics(reader)
    assert before["atomic_claim.queue.depth"] == {(): 4}
    years = (datetime.now() - START).days // 365  # noqa: DTZ005
    assert before["atomic_claim.queue.oldest_age"][()] > years * 364 * 86_400
    live(engine, jobs)
    stop()
    claim_jobs(engine, jobs)
    after = metrics(reader)
    assert after.pop("atomic_claim.queue.oldest_age") == {(): 0.0}
    assert after == {
        "atomic_claim.queue.depth": {(): 0},
        "messaging.client.operation.duration": {(): 2},
        "atomic_claim.job.wait": {(): 4},
        "messaging.client.consumed.messages": {(): 4},
        "atomic_claim.jobs.ended": {
            (each,): 1 for each in ("done", "failed", "retried", "released")
        },
        "atomic_claim.jobs.lost": {(): 1},
        "atomic_claim.jobs.swept": {(): 3},
        "atomic_claim.jobs.requeued": {(): 1},
    }
    [span] = exporter.get_finished_spans()
    attributes = dict(span.attributes or {})
    assert span.name == "claim jobs"
    assert attributes["messaging.batch.message_count"] == 4
    assert attributes["messaging.client.id"] == "w1"
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.start_time < span.end_time


def test_tables_are_given_by_engine() -> None:
    """Anything else as a key is refused."""
    with pytest.raises(ClaimError, match="expected an Engine"):
        instrument_opentelemetry(tables={"sqlite://": []})  # type: ignore[dict-item]
