"""The tables for which the migrations beside this file were made."""

import sqlalchemy as sa
from sqlalchemy import JSON, Boolean, Column, DateTime, Integer, Numeric, String, Table

from atomic_claim import JobTable

metadata = sa.MetaData()

# Payload CMS 3's jobs, with the indexes that Payload makes.
payload_jobs = Table(
    "payload_jobs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("input", JSON),
    Column("completed_at", DateTime(timezone=True), index=True),
    Column("total_tried", Numeric, server_default="0", index=True),
    Column("has_error", Boolean, server_default=sa.false(), index=True),
    Column("error", JSON),
    Column("task_slug", String(100), index=True),
    Column("queue", String(100), server_default="default", index=True),
    Column("wait_until", DateTime(timezone=True), index=True),
    Column("processing", Boolean, server_default=sa.false(), index=True),
    Column("updated_at", DateTime(timezone=True), nullable=False, index=True),
    Column("created_at", DateTime(timezone=True), nullable=False, index=True),
)

# A flag that is set while a job runs, and the time at which it ended.
flagged = Table(
    "flagged_jobs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("processing", Boolean, nullable=False, server_default=sa.false()),
    Column("finished_at", DateTime),
    Column("created_at", DateTime, nullable=False),
)

# A status in words; the highest priority comes first.
with_status = Table(
    "status_jobs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("status", String(20), nullable=False),
    Column("priority", Integer, nullable=False, server_default="0"),
    Column("run_at", DateTime),
    Column("created_at", DateTime, nullable=False),
)
status = JobTable(
    with_status,
    state="status",
    free="waiting",
    claimed="running",
    done="done",
    failed="failed",
    order=[with_status.c.priority.desc(), with_status.c.created_at],
    due="run_at",
)

# A time that is set while a job runs; a worker that dies leaves it set, so leases are added.
locked = Table(
    "locked_jobs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("locked_at", DateTime),
    Column("finished_at", DateTime),
    Column("created_at", DateTime, nullable=False),
)
