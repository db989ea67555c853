"""APScheduler 3: several schedulers on one job store, which each run every job otherwise.

A claim moves the time at which a job is due a minute on. The scheduler that has the job writes the
real one when it has submitted it, which overwrites that; if it dies before, the job is due again.
"""

from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from apscheduler.util import datetime_to_utc_timestamp

from atomic_claim import JobTable, Patch, patch_claims

LEASE = 60.0
BATCH = 5


@lru_cache
def jobs(table: sa.Table) -> JobTable:
    """Declare that a job is free while it has a run time; each call adds its own time limit."""
    return JobTable(
        table,
        free=table.c.next_run_time.is_not(None),
        claimed={"job_state": table.c.job_state},
        order="next_run_time",
    )


def patch() -> Patch:
    """Claim a few jobs per call, so that the other schedulers find some too."""
    return patch_claims(
        "apscheduler.jobstores.sqlalchemy:SQLAlchemyJobStore.get_due_jobs",
        lambda call: jobs(call.self.jobs_t),
        session="self.engine",
        limit=BATCH,
        where=lambda call: call.self.jobs_t.c.next_run_time <= datetime_to_utc_timestamp(call.now),
        values=lambda call: {"next_run_time": datetime_to_utc_timestamp(call.now) + LEASE},
        returns=_reconstituted,
    )


def _reconstituted(rows: Any, call: Any) -> list[Any]:
    return [call.self._reconstitute_job(row.job_state) for row in rows]
