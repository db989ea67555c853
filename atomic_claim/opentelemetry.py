"""OpenTelemetry metrics and spans of claims; needs the extra ``otel``.

Attributes and names follow OpenTelemetry's semantic conventions for messaging and databases where
these have a name: https://opentelemetry.io/docs/specs/semconv/messaging/
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from opentelemetry.metrics import Meter, MeterProvider, Observation, get_meter_provider
from opentelemetry.trace import SpanKind, Tracer, TracerProvider, get_tracer_provider
from sqlalchemy import Engine, func, select

from . import predicates
from .errors import ClaimError
from .job_table import JobTable, job_table_of
from .telemetry import Claimed, Ended, Event, Lost, Requeued, Retried, Swept, subscribe

__all__ = ["instrument_opentelemetry"]

NAME = "atomic_claim"
# Waits last from milliseconds to days; the SDK's own boundaries are for milliseconds.
CALLS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
COUNTERS: Mapping[type[Event], tuple[str, str]] = {
    Claimed: ("messaging.client.consumed.messages", "{message}"),
    Ended: ("atomic_claim.jobs.ended", "{job}"),
    Lost: ("atomic_claim.jobs.lost", "{job}"),
    Swept: ("atomic_claim.jobs.swept", "{job}"),
    Requeued: ("atomic_claim.jobs.requeued", "{job}"),
    Retried: ("atomic_claim.transaction.retries", "{retry}"),
}
Look = Callable[[Any], Iterator[Observation]]
WAITS = (0.01, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 21_600, 86_400)


def instrument_opentelemetry(
    meter_provider: MeterProvider | None = None,
    tracer_provider: TracerProvider | None = None,
    tables: Mapping[Engine, Iterable[Any]] | None = None,
) -> Callable[[], object]:
    """Send the events of this process to OpenTelemetry. Call it once in each process.

    Args:
        meter_provider: where metrics go; the global one if left out.
        tracer_provider: where spans go; the global one if left out.
        tables: by ``Engine``, each ``Table``, mapped class or :class:`JobTable` whose depth and
            oldest age are observed. Each collection runs two SELECTs a table, on a connection of
            the engine's pool; one process is enough for that.

    Returns:
        A function without arguments that ends the spans, counters and histograms. OpenTelemetry
        keeps the gauges for as long as the meter provider.

    Raises:
        ClaimError: a key of ``tables`` is no ``Engine``.
    """
    meter = (meter_provider or get_meter_provider()).get_meter(NAME)
    tracer = (tracer_provider or get_tracer_provider()).get_tracer(NAME)
    depths, ages = list[Look](), list[Look]()
    for engine, named in (tables or {}).items():
        if not isinstance(engine, Engine):
            raise ClaimError(f"tables has the key {engine!r}; expected an Engine")
        for table in named:
            job_table = job_table_of(table, ordered=True)
            depths.append(_look(engine, job_table, int, func.count()))
            if columns := job_table.prepare(predicates.waiting_since):
                since = columns[0] if len(columns) == 1 else func.coalesce(*columns)
                first = func.min(since, type_=columns[0].type)
                ages.append(_look(engine, job_table, _age, first, job_table.now(columns[0])))
    for looks, unit, name, description in (
        (depths, "{job}", "atomic_claim.queue.depth", "Jobs that can be claimed now."),
        (ages, "s", "atomic_claim.queue.oldest_age", "Wait of the oldest of these jobs."),
    ):
        meter.create_observable_gauge(name, looks, unit, description)
    return subscribe(Instruments(meter, tracer))


def _look(engine: Engine, job_table: JobTable, value: Callable[..., float], *columns: Any) -> Look:
    """Make a gauge's callback, which yields a value of the rows that can be claimed."""
    query = select(*columns).select_from(job_table.table).where(predicates.claimable(job_table))
    name = job_table.table.fullname
    attributes = {
        "messaging.system": NAME,
        "messaging.destination.name": name,
        "db.collection.name": name,
        "db.system.name": engine.dialect.name,
    }

    def look(_: object) -> Iterator[Observation]:
        with engine.connect() as connection:
            found = connection.execute(query).one()
        yield Observation(value(*found), attributes)

    return look


def _age(first: datetime | None, now: datetime) -> float:
    """Return how many seconds the row that has waited longest has waited; 0 if there is none."""
    return 0.0 if first is None else max(0.0, (now - first).total_seconds())


class Instruments:
    """A subscriber that records events as metrics and spans."""

    def __init__(self, meter: Meter, tracer: Tracer) -> None:
        self.tracer = tracer
        self.duration = meter.create_histogram(
            "messaging.client.operation.duration",
            "s",
            "Duration of a claim.",
            explicit_bucket_boundaries_advisory=CALLS,
        )
        self.wait = meter.create_histogram(
            "atomic_claim.job.wait",
            "s",
            "Time from when a job was due, or else created, until it was claimed.",
            explicit_bucket_boundaries_advisory=WAITS,
        )
        self.counters = {
            kind: meter.create_counter(name, unit, str(kind.__doc__).partition("\n")[0])
            for kind, (name, unit) in COUNTERS.items()
        }
        self.unreadable = meter.create_counter(
            "atomic_claim.jobs.unreadable", "{job}", "Jobs that claims passed over."
        )

    def __call__(self, event: Event) -> None:
        """Record an event."""
        known = {"messaging.system": NAME, "messaging.destination.name": event.table}
        counter = self.counters[type(event)]
        if isinstance(event, Ended):
            for outcome in event.outcomes:
                counter.add(1, known | {"atomic_claim.outcome": outcome})
        elif isinstance(event, Retried):
            cause = "disconnect" if event.disconnected else "conflict"
            counter.add(1, known | {"error.type": cause})
        elif isinstance(event, Claimed):
            known |= {"messaging.operation.name": "claim", "messaging.operation.type": "receive"}
            self._record_claim(event, known)
        else:
            counter.add(len(event.keys), known)

    def _record_claim(self, event: Claimed, known: dict[str, Any]) -> None:
        self.duration.record(event.seconds, known)
        for wait in event.waits:
            if wait is not None:
                self.wait.record(wait.total_seconds(), known)
        if event.unreadable:
            self.unreadable.add(len(event.unreadable), known)
        if not (number := len(event.keys)):
            return
        self.counters[Claimed].add(number, known)
        said = {"messaging.batch.message_count": number, "db.collection.name": event.table}
        if event.worker is not None:
            said |= {"messaging.client.id": event.worker}
        ended, name = time.time_ns(), f"claim {event.table}"
        began = ended - int(event.seconds * 1e9)
        span = self.tracer.start_span(name, None, SpanKind.CLIENT, known | said, start_time=began)
        span.end(ended)
