"""Layouts of known queues, recognised by the columns of their tables.

A layout says what conventional names leave open or get wrong: ``run_after`` is the year 9999 where
a task of django-tasks-db is due at once. A queue that a ``JobTable`` cannot claim from as the queue
itself does is refused with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, Table, and_, literal_column, or_
from sqlalchemy.types import Integer

from .inference import EXPRESSION, NOW, Reading, default_text, is_text, plain_type, read_columns
from .sql_elements import DatabaseTime, InlineLiteral

if TYPE_CHECKING:
    from sqlalchemy.orm import Mapper

STRFTIME = re.compile(r"strftime\(\s*'([^']+)'\s*,\s*'now'\s*\)")


@dataclass(frozen=True)
class Layout:
    """The table of a known queue.

    Attributes:
        name: the queue, with the versions whose table this is.
        columns: names of columns that together tell the table from others.
        roles: the arguments of ``JobTable`` that differ from what the names say, or functions of
            the columns by name that return them.
        refused: why no ``JobTable`` can claim from it as it stands, or empty.
        proposed: the arguments of ``JobTable.infer`` that can, as source; ``jobs`` is the table.
        integers: those of the columns that have to be integers.
    """

    name: str
    columns: str
    roles: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""
    proposed: Mapping[str, str] = field(default_factory=lambda: {"free": "...", "claimed": "..."})
    integers: str = ""

    def fits(self, table: Table) -> bool:
        """Check whether a table has the columns of this layout."""
        types = {column.name: plain_type(column.type) for column in table.columns}
        return types.keys() >= {*self.columns.split()} and all(
            isinstance(types[name], Integer) for name in self.integers.split()
        )


def _is_ready(columns: Mapping[str, Column[Any]]) -> Any:
    """Build the condition of django-tasks-db, where the year 9999 stands for no time at all."""
    due, status = columns["run_after"], columns["status"]
    past, never = DatabaseTime(due.type, "utc"), literal_column("'9998-12-30'", due.type)
    return and_(status == InlineLiteral("READY", status.type), or_(due <= past, due > never))


# Payload's errors are JSON, and it runs one job of a concurrency key at a time.
PAYLOAD = {"error": None, "exclusive_by": lambda columns: columns.get("concurrency_key")}
LAYOUTS = (
    Layout(
        "Payload 4",
        "task_slug completed_at has_error total_tried wait_until processing_until processing_token",
        {
            "state": "processing_until",
            "free": None,
            "claimed": NOW,
            "lease": "processing_until",
            "token": "processing_token",
            **PAYLOAD,
        },
    ),
    Layout(
        "Payload 3",
        "task_slug completed_at has_error total_tried wait_until processing",
        PAYLOAD,
    ),
    Layout(
        "django-tasks-db",
        "status run_after enqueued_at started_at finished_at task_path backend_name worker_ids",
        {
            "state": "status",
            "free": _is_ready,
            "claimed": {"status": "RUNNING", "started_at": NOW},
            "released": {"status": "READY", "started_at": None},
            "done": {"status": "SUCCESSFUL", "finished_at": NOW},
            "failed": {"status": "FAILED", "finished_at": NOW},
            "due": None,
            "order": lambda columns: (columns["priority"].desc(), "run_after", "enqueued_at"),
            "naive_times": "utc",
        },
    ),
    Layout(
        "BeanQueue",
        "state channel module func_name kwargs scheduled_at error_message worker_id",
    ),
    Layout(
        "delayed_job",
        "handler priority attempts run_at locked_at locked_by failed_at last_error",
        {"order": ("priority", "run_at"), "naive_times": "utc"},
    ),
    Layout(
        "pgmq",
        "msg_id read_ct enqueued_at vt message",
        refused="no column for a token tells whose a message is: use pgmq.read() and pgmq.delete()",
    ),
    Layout(
        "Laravel",
        "queue payload attempts reserved_at available_at created_at",
        refused="its times are integers, where epoch is the present one: func.unix_timestamp() on "
        "MySQL and MariaDB, elsewhere cast(extract('epoch', func.now()), Integer)",
        proposed={
            "free": "jobs.c.reserved_at.is_(None) & (jobs.c.available_at <= epoch)",
            "claimed": "{'reserved_at': epoch}",
            "released": "{'reserved_at': None}",
            "order": "'id'",
        },
        integers="reserved_at available_at created_at",
    ),
    Layout(
        "Odoo queue_job",
        "uuid state eta channel model_name method_name date_enqueued date_started max_retries",
        refused="Odoo's runner keeps the capacity of channels and wakes the jobs that wait for it",
    ),
)


def layout_of(table: Table) -> Layout | None:
    """Return the known queue whose table this is, if it is one."""
    return next((layout for layout in LAYOUTS if layout.fits(table)), None)


def read_table(
    table: Table, mapper: Mapper[Any] | None, given: Mapping[str, Any], *, ordered: bool
) -> Reading:
    """Read a table by conventional names and, if it is known, by its layout.

    The arguments are those of :func:`~atomic_claim.inference.read_columns`.
    """
    layout = layout_of(table)
    columns = {column.name: column for column in table.columns}
    known: dict[str, Any] = {"text_times": time_format(table.columns)}
    for role, value in layout.roles.items() if layout is not None else ():
        known[role] = value(columns) if callable(value) else value
    reading = read_columns(table, mapper, {**known, **given}, ordered=ordered)
    if layout is not None:
        reading.layout = layout.name
        if layout.refused and EXPRESSION not in reading.settled:
            reading.problems = [f"this is the table of {layout.name}, and {layout.refused}"]
            own = f"{table.name}." if table.name.isidentifier() else "table."
            proposed = {role: said.replace("jobs.", own) for role, said in layout.proposed.items()}
            reading.proposed = proposed
    # What was not declared to mark an end together holds a row back each on its own.
    ends = [reading.arguments.get(role) for role in ("done", "failed") if role not in given]
    held = {c: v for e in ends if isinstance(e, Mapping) and len(e) > 1 for c, v in e.items()}
    held.pop(reading.arguments.get("state"), None)
    if held:
        reading.arguments["withdrawn"] = {**held, **reading.arguments.get("withdrawn", {})}
    return reading


def time_format(columns: Iterable[Column[Any]]) -> str | None:
    """Return the ``strftime`` format that the text columns' SQLite defaults share, or None."""
    defaults = {default_text(column) for column in columns if is_text(column)}
    formats = {match.group(1) for each in defaults if (match := STRFTIME.fullmatch(each))}
    if not defaults.isdisjoint({"current_timestamp", "datetime('now')"}):
        formats.add("%Y-%m-%d %H:%M:%S")
    return formats.pop() if len(formats) == 1 else None
