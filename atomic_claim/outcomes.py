"""The values that free a claimed row, for every operation that does."""

from __future__ import annotations

from typing import Any

from sqlalchemy import null

from .errors import ClaimError
from .job_table import JobTable

Values = dict[Any, Any]


def common_values(job_table: JobTable) -> Values:
    """Return the values common to all outcomes: clear the lease, set the stamps."""
    values: Values = {column: job_table.now(column) for column in job_table.stamps}
    if (lease := job_table.lease) is not None:
        # A lease that cannot be NULL ends now.
        values[lease] = null() if lease.nullable else job_table.now(lease)
    # The token stays: after a lost reply it tells whose change it was.
    return values | job_table.next_version


def freeing(job_table: JobTable) -> Values:
    """Return the values that free a row; the attempt stays counted.

    Raises:
        ClaimError: the declaration does not say how a row becomes free again.
    """
    if not job_table.released:
        raise ClaimError(
            f"nothing says how a row of {job_table.table.fullname!r} becomes free again: say it "
            "with JobTable(released={column: value})"
        )
    values = {**common_values(job_table), **job_table.released}
    if (worker := job_table.worker) is not None:
        values[worker] = null() if worker.nullable else ""
    return values
