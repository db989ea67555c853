"""The demo's jobs, and the two functions that compete for them.

Nothing here needs Typer or Rich: worker processes import this module.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from atomic_claim.claim import claim_jobs
from atomic_claim.testing.racing import TIMEOUT, race
from atomic_claim.testing.results import Race

# So much work a job is: a few tenths of a millisecond.
ROUNDS = 500
# A name of its own for each demo, which its workers have of its environment.
NAME = os.environ.setdefault("ATOMIC_CLAIM_DEMO", f"atomic_claim_demo_{secrets.token_hex(6)}")
table = sa.Table(
    NAME,
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("subject", sa.String(100), nullable=False),
    sa.Column("processing", sa.Boolean, nullable=False),
    sa.Column("created_at", sa.DateTime, nullable=False),
    sa.Index(f"{NAME}_free", "processing", "created_at"),
)
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Workload:
    """The numbers of jobs and workers, and of jobs that a worker takes at a time."""

    workers: int
    jobs: int
    limit: int


def do_work(subject: str) -> None:
    """Do a job."""
    hashlib.pbkdf2_hmac("sha256", subject.encode(), b"atomic_claim", ROUNDS)


def find_then_update(engine: sa.Engine, limit: int) -> Sequence[Any]:
    """Find free jobs, then mark them one by one, as job queues are often written.

    Like ``updateJobs`` of Payload CMS 3.80 (packages/drizzle/src/updateJobs.ts): between the
    SELECT and the UPDATE, and until that is committed, every other worker finds the same jobs.
    """
    free = sa.select(table).where(table.c.processing == sa.false())
    with engine.connect() as connection:
        found = connection.execute(free.order_by(table.c.created_at).limit(limit)).all()
    with engine.begin() as connection:
        for job in found:
            mark = sa.update(table).where(table.c.id == job.id)
            connection.execute(mark.values(processing=True))
    return _run(found)


def claim(engine: sa.Engine, limit: int) -> Sequence[Any]:
    """Claim free jobs."""
    return _run(claim_jobs(engine, table, limit))


def _run(jobs: Iterable[Any]) -> Sequence[Any]:
    found = list(jobs)
    for job in found:
        do_work(job.subject)
    return found


HALVES: dict[str, Callable[[sa.Engine, int], Sequence[Any]]] = {
    "legacy loop": find_then_update,
    "claim_jobs": claim,
}


def run_half(name: str, workload: Workload, progress: Progress, *, url: str | None) -> Race:
    """Have one function called in as many processes as there are workers, on a new table.

    Args:
        name: which function, of ``HALVES``.
        workload: how much, and by how many.
        progress: told again and again how many jobs were run.
        url: the database; None for a temporary SQLite file.

    Raises:
        CommandError: the table could not be made, or a worker could not work.
    """
    found = race(
        HALVES[name],
        table=f"{__name__}:table",
        url=url,
        workers=workload.workers,
        jobs=workload.jobs,
        limit=workload.limit,
        factory=lambda number: {"subject": f"Mail {number}"},
        # A slow network is no fault, a worker that hangs is one.
        timeout=TIMEOUT + workload.jobs,
        progress=progress,
    )
    return replace(found, name=name)
