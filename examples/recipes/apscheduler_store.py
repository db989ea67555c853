"""APScheduler 3: several schedulers on one job store, which each run every job otherwise.

A claim moves the time at which a job is due a minute on. The scheduler that has the job writes the
real one when it has submitted it, which overwrites that; if it dies before, the job is due again.
"""

from typing import Any

import sqlalchemy as sa
from apscheduler.util import datetime_to_utc_timestamp

from atomic_claim import JobTable


def jobs(call: Any) -> JobTable:
    """Declare that a job is free once its run time has come; a claim puts the time off."""
    table, now = call.self.jobs_t, datetime_to_utc_timestamp(call.now)
    later = {"next_run_time": sa.literal(now + 60)}
    free = table.c.next_run_time <= now
    return JobTable(table, free=free, claimed=later, order="next_run_time")


def reconstituted(rows: Any, call: Any) -> list[Any]:
    """Return the jobs of the rows."""
    return [call.self._reconstitute_job(row.job_state) for row in rows]
