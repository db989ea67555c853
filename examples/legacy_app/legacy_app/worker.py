"""The worker: it takes jobs, sends them, and marks them as done."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from .models import Job


def claim(session: Session, limit: int = 10) -> Sequence[Job]:
    """Find free jobs, then mark them: a second worker finds the same ones in between."""
    query = (
        select(Job)
        .where(Job.processing == False, Job.completed_at == None)  # noqa: E711, E712
        .order_by(Job.created_at)
        .limit(limit)
    )
    jobs = session.scalars(query).all()
    for job in jobs:
        job.processing = True
    session.commit()
    return jobs


def complete(session: Session, job: Job) -> None:
    """Mark a job as done."""
    job.processing = False
    job.completed_at = datetime.now(UTC).replace(tzinfo=None)
    session.commit()


def work(session: Session, send: Callable[[str, str], None], limit: int = 10) -> int:
    """Send what there is to send; the number of mails."""
    sent = 0
    while jobs := claim(session, limit):
        for job in jobs:
            send(job.customer.email, job.subject)
            complete(session, job)
            sent += 1
    return sent
