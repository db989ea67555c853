"""APScheduler 3: several schedulers on one job store, which each run every job otherwise.

A claim moves the time at which a job is due a minute on. The scheduler that has the job writes the
real one when it has submitted it, which overwrites that; if it dies before, the job is due again.
"""

from typing import Any

import sqlalchemy as sa
from apscheduler.util import datetime_to_utc_timestamp

from atomic_claim import JobTable, Patch, patch_claims

LEASE = 60.0
BATCH = 5


def jobs(table: sa.Table, now: float) -> JobTable:
    """Declare that a job is free once its run time has come; a claim puts the time off."""
    return JobTable(
        table,
        free=table.c.next_run_time <= now,
        claimed={"next_run_time": sa.literal(now + LEASE)},
        order="next_run_time",
    )


def patch() -> Patch:
    """Claim a few jobs per call, so that the other schedulers find some too."""
    return patch_claims(
        "apscheduler.jobstores.sqlalchemy:SQLAlchemyJobStore.get_due_jobs",
        lambda call: jobs(call.self.jobs_t, datetime_to_utc_timestamp(call.now)),
        session="self.engine",
        limit=BATCH,
        returns=_reconstituted,
    )


def _reconstituted(rows: Any, call: Any) -> list[Any]:
    return [call.self._reconstitute_job(row.job_state) for row in rows]
