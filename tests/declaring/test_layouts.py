"""Tables of known queues, on the DDL that the queues make themselves."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from atomic_claim import (
    AmbiguousTable,
    ClaimError,
    JobTable,
    claim_jobs,
    complete_jobs,
    fail_jobs,
    release_jobs,
)
from atomic_claim.layouts import LAYOUTS, layout_of
from tests.databases import Database
from tests.guides import GUIDES
from tests.jobs import ids

FOLDER = Path(__file__).parent.parent / "layouts"
LEASE = timedelta(minutes=5)
DATETIME = {"postgresql": "timestamp(6) without time zone", "sqlite": "datetime(6)"}
# The database's time plus an interval, by what a queue writes.
CLOCKS = {
    "postgresql": "now() + interval '{}'",
    "sqlite": "strftime('%Y-%m-%d %H:%M:%f', 'now', '{}')",
}
ISO = CLOCKS | {"sqlite": "strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '{}')"}
UTC = CLOCKS | {"postgresql": "now() AT TIME ZONE 'utc' + interval '{}'"}


def made(database: Database, name: str, table: str, schema: str | None = None) -> Any:
    """Make the tables of a file, and return an engine and the table as it is reflected."""
    engine = database.engine()
    path = FOLDER / f"{name}_{database.name}.sql"
    path = path if path.exists() else FOLDER / f"{name}.sql"
    script = path.read_text(encoding="utf-8").replace("{datetime}", DATETIME.get(database.name, ""))
    lines = [line for line in script.splitlines() if not line.startswith("--")]
    with engine.begin() as connection:
        for sql in filter(str.strip, "\n".join(lines).split(";")):
            connection.exec_driver_sql(sql)
    return engine, sa.Table(table, sa.MetaData(), autoload_with=engine, schema=schema)


def fill(
    engine: sa.Engine,
    table: sa.Table,
    rows: list[dict[str, Any]],
    clocks: dict[str, str] = CLOCKS,
) -> None:
    """Insert rows of SQL literals; ``{-1 minute}`` stands for the time a minute ago."""
    with engine.begin() as connection:
        for row in rows:
            values = [
                clocks[engine.dialect.name].format(value[1:-1])
                if str(value).startswith("{")
                else str(value)
                for value in row.values()
            ]
            connection.exec_driver_sql(
                f"INSERT INTO {table.fullname} ({', '.join(row)}) VALUES ({', '.join(values)})"
            )


def columns(engine: sa.Engine, table: sa.Table, key: Any, *names: str) -> tuple[Any, ...]:
    """Read columns of one row."""
    found = sa.select(*(table.c[name] for name in names)).where(table.primary_key.columns[0] == key)
    with engine.connect() as connection:
        return tuple(connection.execute(found).one())


@pytest.mark.databases("postgresql", "sqlite")
def test_payload_4(database: Database) -> None:
    """The lease is the state, and a job of a concurrency key that runs is passed over."""
    engine, table = made(database, "payload_4", "payload_jobs")
    ago, later = "{-1 minute}", "{+1 minute}"
    rows: list[dict[str, Any]] = [
        {"queue": "'default'"},
        {"processing_until": later, "processing_token": "'x'", "concurrency_key": "'k'"},
        {"concurrency_key": "'k'"},
        {"completed_at": ago},
        {"has_error": "true"},
        {"wait_until": later},
        {"wait_until": ago, "concurrency_key": "'j'"},
        {"concurrency_key": "'j'"},
    ]
    for number, row in enumerate(rows, 1):
        row |= {"id": number, "task_slug": "'record'", "created_at": f"{{-{60 - number} minute}}"}
    fill(engine, table, rows, ISO)
    with pytest.raises(ClaimError):
        claim_jobs(engine, table, 10)
    claim = claim_jobs(engine, table, 10, lease=LEASE)
    assert ids(claim) == [1, 7]
    assert ids(claim_jobs(engine, table, 10, lease=LEASE)) == []
    complete_jobs(engine, claim[1:])
    assert None not in columns(engine, table, 7, "completed_at", "updated_at")
    release_jobs(engine, claim[:1])
    assert columns(engine, table, 1, "processing_until", "completed_at") == (None, None)
    assert ids(claim_jobs(engine, table, 10, lease=LEASE)) == [1, 8]
    with engine.begin() as connection:
        ago = ISO[database.name].format("-1 minute")
        connection.exec_driver_sql(f"UPDATE payload_jobs SET processing_until = {ago} WHERE id = 2")
    assert ids(claim_jobs(engine, table, 10, lease=LEASE)) == [2]


@pytest.mark.databases("postgresql", "sqlite")
def test_django_tasks_db(database: Database) -> None:
    """The year 9999 means at once, and the order is the queue's own."""
    name = "django_tasks_database_dbtaskresult"
    engine, table = made(database, "django_tasks_db", name)
    never = "'9999-01-01 00:00:00'"
    rows: list[dict[str, Any]] = [
        {"run_after": never},
        {"run_after": "{-1 minute}"},
        {"run_after": "{+1 minute}"},
        {"priority": 5},
        {"status": "'RUNNING'"},
        {"status": "'SUCCESSFUL'", "finished_at": "{-1 minute}"},
        {"status": "'FAILED'"},
    ]
    common = dict.fromkeys(("task_path", "exception_class_path", "traceback"), "''")
    common |= {"args_kwargs": "'null'", "worker_ids": "'[]'", "queue_name": "'q'"} | {"priority": 0}
    common |= {
        "backend_name": "'b'",
        "status": "'READY'",
        "enqueued_at": "{-1 minute}",
        "run_after": never,
    }
    keys = [f"0000000000000000000000000000000{n}" for n in range(1, len(rows) + 1)]
    fill(
        engine,
        table,
        [{"id": f"'{key}'"} | common | row for key, row in zip(keys, rows, strict=True)],
    )
    assert JobTable.infer(table).due is None
    claim = claim_jobs(engine, table, 10)
    assert [str(job.id)[-1] for job in claim] == ["4", "2", "1"]
    assert {job.status for job in claim} == {"RUNNING"}
    assert None not in [job.started_at for job in claim]
    key = claim[0].id
    complete_jobs(engine, claim[:1], unfenced=True)
    assert columns(engine, table, key, "status")[0] == "SUCCESSFUL"
    assert columns(engine, table, key, "finished_at")[0] is not None
    fail_jobs(engine, claim[1:2], error="no", unfenced=True)
    assert columns(engine, table, claim[1].id, "status")[0] == "FAILED"
    release_jobs(engine, claim[2:], unfenced=True)
    assert columns(engine, table, claim[2].id, "status", "started_at") == ("READY", None)
    assert ids(claim_jobs(engine, table, 10)) == [claim[2].id]


@pytest.mark.databases("postgresql")
def test_beanqueue(database: Database) -> None:
    """The worker's column refers to a table of workers, and stays as it was."""
    engine, table = made(database, "beanqueue", "bq_tasks")
    rows: list[dict[str, Any]] = [
        {"created_at": "{-1 minute}"},
        {"created_at": "{-2 minute}", "scheduled_at": "{-1 minute}"},
        {"scheduled_at": "{+1 minute}"},
        *({"state": f"'{state}'"} for state in ("PROCESSING", "DONE", "FAILED")),
    ]
    common = dict.fromkeys(("channel", "module"), "'c'")
    fill(engine, table, [common | {"func_name": f"'{n}'"} | row for n, row in enumerate(rows)])
    claim = claim_jobs(engine, table, 10)
    assert [job.func_name for job in claim] == ["1", "0"]
    assert [(job.state, job.worker_id) for job in claim] == [("PROCESSING", None)] * 2
    complete_jobs(engine, claim[:1], unfenced=True)
    fail_jobs(engine, claim[1:], error="no", unfenced=True)
    assert columns(engine, table, claim[0].id, "state") == ("DONE",)
    assert columns(engine, table, claim[1].id, "state", "error_message") == ("FAILED", "no")


@pytest.mark.databases("postgresql", "sqlite")
def test_delayed_job(database: Database) -> None:
    """The lowest priority comes first, then the earliest time."""
    engine, table = made(database, "delayed_job", "delayed_jobs")
    ago, later = ("{-1 minute}", "{+1 minute}")
    rows: list[dict[str, Any]] = [
        {"run_at": "{-1 minute}"},
        {"run_at": "{-2 minute}"},
        {"priority": -1},
        {"run_at": later},
        {"locked_at": ago, "locked_by": "'host'"},
        {"failed_at": ago},
    ]
    fill(
        engine,
        table,
        [{"id": n, "handler": "''", "run_at": ago} | row for n, row in enumerate(rows, 1)],
        UTC,
    )
    claim = claim_jobs(engine, table, 10, worker="ann")
    assert ids(claim) == [3, 2, 1]
    assert [(job.locked_by, job.attempts) for job in claim] == [("ann", 1)] * 3
    fail_jobs(engine, claim[:1], error="no", unfenced=True)
    assert columns(engine, table, 3, "last_error")[0] == "no"
    assert columns(engine, table, 3, "failed_at")[0] is not None
    release_jobs(engine, claim[1:], unfenced=True)
    assert columns(engine, table, 1, "locked_at", "locked_by") == (None, None)


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize(
    ("name", "table", "schema", "layout"),
    [
        ("pgmq", "q_jobs", "pgmq", "pgmq"),
        ("odoo_queue_job", "queue_job", None, "Odoo queue_job"),
    ],
)
def test_refused(
    database: Database, name: str, table: str, schema: str | None, layout: str
) -> None:
    """A queue that cannot be claimed from is refused with the reason, not read by its names."""
    engine, found = made(database, name, table, schema)
    (known,) = (each for each in LAYOUTS if each.name == layout)
    with pytest.raises(AmbiguousTable) as raised:
        claim_jobs(engine, found, 10)
    assert f"in doubt: this is the table of {layout}, and {known.refused}" in str(raised.value)
    assert str(raised.value).endswith(f"write: JobTable.infer({table}, free=..., claimed=...)")


def test_laravel_by_expressions(database: Database) -> None:
    """The declarations of the guide and of the refusal claim Laravel's jobs by their Unix times."""
    engine, jobs = made(database, "laravel", "jobs")
    (block,) = (block for block in GUIDES["known_queues"].split("```") if "epoch =" in block)
    found: dict[str, Any] = {"jobs": jobs, "JobTable": JobTable}
    if database.name in {"mysql", "mariadb"}:
        block = block.replace(
            'cast(extract("epoch", func.now()), Integer)', "func.unix_timestamp()"
        )
    exec(block.removeprefix("python"), found)  # noqa: S102 - the guides are ours
    with pytest.raises(AmbiguousTable, match=r"table of Laravel, and its times are") as raised:
        claim_jobs(engine, jobs, 10)
    said = eval(str(raised.value).rpartition("write: ")[2], found)  # noqa: S307
    assert str(said.free) == str(found["laravel"].free)
    rows = [{}, {"reserved_at": 1}, {"available_at": 2**31 - 1}, {}]
    common = {"queue": "'q'", "payload": "''", "attempts": 0, "available_at": 1, "created_at": 1}
    fill(engine, jobs, [{"id": n} | common | row for n, row in enumerate(rows, 1)])
    claim = claim_jobs(engine, found["laravel"], 10)
    assert ids(claim) == [1, 4]
    assert [job.attempts for job in claim] == [1, 1]
    assert columns(engine, jobs, 1, "reserved_at")[0] > 1_700_000_000
    assert ids(claim_jobs(engine, said, 10)) == []
    release_jobs(engine, claim, unfenced=True)
    assert ids(claim_jobs(engine, said, 10)) == [1, 4]


def test_a_table_like_laravel_s_with_times_is_not_laravel_s() -> None:
    """The same names with other types are read by their names."""
    names = ("reserved_at", "available_at", "created_at")
    table = sa.Table(
        "jobs",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        *(sa.Column(name, sa.Text) for name in ("queue", "payload")),
        *(sa.Column(name, sa.DateTime) for name in names),
        sa.Column("attempts", sa.Integer),
    )
    assert layout_of(table) is None
    assert JobTable.infer(table).state is table.c.reserved_at


@pytest.mark.once
def test_the_guide_lists_the_layouts() -> None:
    """A row each: what is made of its table, and whether its own workers may run beside ours."""
    for layout in LAYOUTS:
        read = f"refused: {layout.refused}" if layout.refused else "read"
        row = rf"^\| {re.escape(f'{layout.name} | {read}')} \| (yes|no)\b.* \|$"
        assert re.search(row, GUIDES["known_queues"], re.MULTILINE)
