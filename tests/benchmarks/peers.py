"""The claim beside those of other packages, each on its own table, as its documentation uses it.

A first job is enqueued by the package itself; the others are copies of its row, made by the
database, since some packages would take minutes. What is measured is the claim alone, and nothing
is completed. A package that claims one job a call is measured so beside any limit.
"""

import asyncio
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import count
from queue import Empty
from typing import Any
from uuid import uuid4

import sqlalchemy as sa

from atomic_claim import claim_jobs
from tests.benchmarks.crew import Caller, Crew, Share, Task, doubled, rate
from tests.benchmarks.ground import Ground, Rows, fill, free_all, job_table
from tests.benchmarks.loops import engine_of
from tests.benchmarks.measuring import Line, ratios
from tests.benchmarks.replay import steps_of

FIGURE = "peers"
ENGINE = "claim_jobs by Engine"
SESSION = "claim_jobs by Session, entities"
LEASED = "claim_jobs by Engine, with a lease"
OURS = (ENGINE, SESSION, LEASED)
BARE = "bare psycopg"
LEASES = "bench_leases"
HERE = "tests.benchmarks.peers"
LOOPS = "tests.benchmarks.loops"


@dataclass(frozen=True)
class Peer:
    """Another package.

    Attributes:
        name: what it is called.
        table: the table of its jobs.
        enqueue: enqueues one job by the package's own means; makes its tables if need be.
        opener: opens its claim in a process.
        batches: whether it claims several at once.
        key: the primary key of its table.
    """

    name: str
    table: str
    enqueue: Callable[[str], None]
    opener: str
    batches: bool = False
    key: str = "id"


def measure(
    ground: Ground,
    *,
    rounds: int,
    workers: Sequence[int] = (1, 4, 8),
    limits: Sequence[int] = (1, 50),
    seconds: float = 1.0,
    rows: int = 60_000,
) -> Iterator[list[Line]]:
    """Jobs per second against each of them, in PostgreSQL."""
    engine, jobs = ground.engine("postgresql"), job_table(token=True)
    leases = job_table(LEASES, lease=True)
    url = engine.url.render_as_string(hide_password=False)
    fill(engine, jobs, Rows(rows))
    fill(engine, leases, Rows(rows))

    def refill() -> None:
        free_all(engine, jobs)

    refills = {}
    for peer in PEERS:
        peer.enqueue(url)
        refills[peer.name] = _refilling(engine, peer, rows)
    with Crew(max(workers)) as crew:
        for limit in limits:
            [step] = steps_of(engine.url, partial(claim_jobs, table=jobs, limit=limit))
            ways: dict[str, tuple[Task, Callable[[], None]]] = {
                ENGINE: (Task(f"{LOOPS}:by_engine", (url, limit, True)), refill),
                SESSION: (Task(f"{LOOPS}:by_session", (url, limit, True)), refill),
                LEASED: (
                    Task(f"{LOOPS}:by_engine_with_lease", (url, limit, LEASES)),
                    partial(free_all, engine, leases),
                ),
                BARE: (Task(f"{LOOPS}:by_psycopg", (url, limit, step.text)), refill),
            }
            for peer in PEERS:
                task = Task(f"{HERE}:{peer.opener}", (url, limit))
                name = peer.name if limit == 1 or peer.batches else f"{peer.name}, one by one"
                ways[name] = task, refills[peer.name]
            for size in workers:
                yield _measured(crew, ways, size=size, limit=limit, rounds=rounds, seconds=seconds)


def _measured(
    crew: Crew,
    ways: dict[str, tuple[Task, Callable[[], None]]],
    *,
    size: int,
    limit: int,
    rounds: int,
    seconds: float,
) -> list[Line]:
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    twice = dict.fromkeys(ways, 0)
    for turn in range(rounds):
        for name in list(ways) if turn % 2 else reversed(list(ways)):
            task, refill = ways[name]
            refill()
            shares = crew.run([task] * size, seconds)
            speeds[name].append(rate(shares))
            twice[name] += doubled(shares)
            if not speeds[name][-1]:
                raise RuntimeError(f"{name} claimed nothing: {[share.errors for share in shares]}")
    what = f"limit {limit}, {size} worker{'s' if size > 1 else ''}"
    return [
        Line(
            FIGURE,
            f"{ours}, {what}",
            sorted(speeds[ours])[rounds // 2],
            "jobs/s",
            name,
            ratios(speeds[ours], speeds[name]),
            least=1 if ours == ENGINE and name != BARE else None,
            note=f"{name}: {sorted(speeds[name])[rounds // 2]:,.0f} jobs/s"
            + (f", {twice[name]} twice" if twice[name] else ""),
        )
        for ours in OURS
        for name in ways
        if name not in OURS
    ]


def _refilling(engine: sa.Engine, peer: Peer, rows: int) -> Callable[[], None]:
    """Return what fills the peer's table with copies of the row that it wrote itself."""
    quote = engine.dialect.identifier_preparer.quote
    table, original = quote(peer.table), quote(f"bench_{peer.table}")
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP TABLE IF EXISTS {original}")
        connection.exec_driver_sql(f"CREATE TABLE {original} AS SELECT * FROM {table} LIMIT 1")
        columns = [
            quote(column["name"])
            for column in sa.inspect(connection).get_columns(peer.table)
            if column["name"] != peer.key
        ]
    listed = ", ".join(columns)
    automatic = engine.execution_options(isolation_level="AUTOCOMMIT")

    def refill() -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"TRUNCATE {table} CASCADE")
            connection.exec_driver_sql(
                f"INSERT INTO {table} ({quote(peer.key)}, {listed}) OVERRIDING SYSTEM VALUE "
                f"SELECT number, {listed} FROM {original}, generate_series(1, {rows}) AS number"
            )
        with automatic.connect() as connection:
            connection.exec_driver_sql(f"VACUUM ANALYZE {table}")

    return refill


class Awaiter:
    """A worker whose claim is awaited, on a loop that is kept."""

    def __init__(
        self,
        runner: asyncio.Runner,
        claim: Callable[[], Awaitable[Sequence[Any]]],
    ) -> None:
        self.runner = runner
        self.claim = claim

    def run(self, begin: float, seconds: float) -> Share:
        """Claim from then on for so long, or until nothing is left."""
        return self.runner.run(self._run(begin, seconds))

    async def _run(self, begin: float, seconds: float) -> Share:
        share = Share()
        await asyncio.sleep(max(0, begin - time.monotonic()))
        while (called := time.monotonic()) < begin + seconds:
            jobs = await self.claim()
            if not jobs:
                break
            share.jobs += jobs
            share.times.append(time.monotonic() - called)
            share.seconds = time.monotonic() - begin
        return share


def _plain(url: str) -> str:
    return sa.make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


# kombu: https://docs.celeryq.dev/projects/kombu/en/stable/userguide/simple.html
def kombu_enqueue(url: str) -> None:
    """Put one message by kombu's SimpleQueue."""
    from kombu import Connection  # noqa: PLC0415

    with Connection(f"sqlalchemy+{url}") as connection, connection.SimpleQueue("bench") as queue:
        queue.put({"job": 1})


def open_kombu(url: str, _: int) -> Caller:
    """``SimpleQueue.get``."""
    from kombu import Connection  # noqa: PLC0415

    connection = Connection(f"sqlalchemy+{url}")
    queue: Any = connection.SimpleQueue("bench", no_ack=True)
    tags = count()
    process = uuid4().hex

    def claim() -> Sequence[Any]:
        try:
            queue.get(block=False)
        except Empty:
            return []
        # The messages are copies, so what tells them apart is made here.
        return [(process, next(tags))]

    return Caller(claim)


# procrastinate: https://procrastinate.readthedocs.io/en/stable/
def _procrastinate(url: str) -> Any:
    import procrastinate  # noqa: PLC0415

    connector = procrastinate.PsycopgConnector(conninfo=_plain(url), min_size=1, max_size=1)
    app = procrastinate.App(connector=connector)

    @app.task(name="bench", queue="bench")
    def task(job: int) -> None: ...

    return app


def procrastinate_enqueue(url: str) -> None:
    """Make the schema, and defer one job."""

    async def run() -> None:
        app = _procrastinate(url)
        async with app.open_async():
            if not await app.check_connection_async():
                await app.schema_manager.apply_schema_async()
            await app.tasks["bench"].defer_async(job=1)

    asyncio.run(run())


def open_procrastinate(url: str, _: int) -> Awaiter:
    """Call ``JobManager.fetch_job``, as Procrastinate's worker does for every job."""
    runner, app = asyncio.Runner(), _procrastinate(url)

    async def begin() -> int:
        await app.open_async()
        number: int = await app.job_manager.register_worker()
        return number

    worker = runner.run(begin())

    async def claim() -> Sequence[Any]:
        job = await app.job_manager.fetch_job(queues=["bench"], worker_id=worker)
        return [] if job is None else [job.id]

    return Awaiter(runner, claim)


# pgqueuer: https://pgqueuer.readthedocs.io/
async def _pgqueuer(url: str) -> Any:
    import psycopg  # noqa: PLC0415
    from pgqueuer.db import PsycopgDriver  # noqa: PLC0415
    from pgqueuer.queries import Queries  # noqa: PLC0415

    connection = await psycopg.AsyncConnection.connect(_plain(url), autocommit=True)
    return Queries(PsycopgDriver(connection)), connection


def pgqueuer_enqueue(url: str) -> None:
    """Make the schema, and enqueue one job."""

    async def run() -> None:
        queries, connection = await _pgqueuer(url)
        if not await queries.schema_is_installed():
            await queries.install()
        await queries.enqueue(["bench"], [b"1"], [0])
        await connection.close()

    asyncio.run(run())


def open_pgqueuer(url: str, limit: int) -> Awaiter:
    """Call ``Queries.dequeue``, as PgQueuer's queue manager does for every batch."""
    from pgqueuer.ports.repository import EntrypointExecutionParameter  # noqa: PLC0415

    runner, manager = asyncio.Runner(), uuid4()
    queries, _ = runner.run(_pgqueuer(url))
    entrypoints = {"bench": EntrypointExecutionParameter(concurrency_limit=0)}

    async def claim() -> Sequence[Any]:
        jobs = await queries.dequeue(
            batch_size=limit,
            entrypoints=entrypoints,
            queue_manager_id=manager,
            global_concurrency_limit=None,
            heartbeat_timeout=timedelta(seconds=30),
        )
        return [job.id for job in jobs]

    return Awaiter(runner, claim)


# alchemical-queues, as its description on the package index has it.
def alchemical_enqueue(url: str) -> None:
    """Make the tables, and put one job."""
    from alchemical_queues import AlchemicalQueues  # noqa: PLC0415

    queues = AlchemicalQueues(sa.create_engine(url))
    queues.create_all()
    queues.get_task_queue("bench").put(1)


def open_alchemical(url: str, _: int) -> Caller:
    """``get`` of its task queue, whose jobs come back if they are not ended."""
    from alchemical_queues import AlchemicalQueues  # noqa: PLC0415

    warnings.simplefilter("ignore", ResourceWarning)
    queue: Any = AlchemicalQueues(engine_of(url)).get_task_queue("bench")

    def claim() -> Sequence[Any]:
        entry = queue.get()
        return [] if entry is None else [entry.entry_id]

    return Caller(claim)


PEERS = (
    Peer("pgqueuer", "pgqueuer", pgqueuer_enqueue, "open_pgqueuer", batches=True),
    Peer("procrastinate", "procrastinate_jobs", procrastinate_enqueue, "open_procrastinate"),
    Peer("kombu", "kombu_message", kombu_enqueue, "open_kombu"),
    Peer(
        "alchemical-queues",
        "AlchemicalQueue",
        alchemical_enqueue,
        "open_alchemical",
        key="entry_id",
    ),
)
