"""Checks that a query of the database's catalog makes; they stand in ``catalog.toml``."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import text

from atomic_claim.cli.indexes import needed_indexes
from atomic_claim.job_table import JobTable

from .findings import Finding, Level, Patient, Reading


@dataclass(frozen=True)
class CatalogCheck:
    """A query in which every row is something wrong.

    The texts name the row's columns in braces, and the table as ``{table}``.

    Attributes:
        name: what is looked at.
        databases: where.
        query: the query; its parameters are explained in ``catalog.toml``.
        found: what is the case.
        why: why that matters.
        fix: what to do about it.
        sql: what to run.
        level: how much it matters.
        needs: a query that returns something if the check can be made.
    """

    name: str
    databases: Sequence[str]
    query: str
    found: str
    why: str = ""
    fix: str = ""
    sql: Sequence[str] = ()
    level: str = Level.PROBLEM.value
    needs: str = ""

    def findings(self, patient: Patient, known: Mapping[str, Any]) -> Iterator[Finding]:
        """Yield a finding for each row, or one that all is well."""
        query, connection = text(self.query), patient.connection
        wanted = query.compile().params.keys()
        if not wanted <= known.keys() or (self.needs and not connection.scalar(text(self.needs))):
            return
        rows = connection.execute(query, {name: known[name] for name in wanted}).mappings().all()
        for row in rows:
            words = {**row, "table": patient.name}
            found, fix, *sql = (s.format_map(words) for s in (self.found, self.fix, *self.sql))
            run = tuple(statement for statement in sql if statement)
            yield Finding(self.name, Level(self.level), found, self.why, fix, run)
        if not rows and self.level != Level.FINE.value:
            yield Finding(self.name, Level.FINE, "nothing found")


TABLE = Path(__file__).with_name("catalog.toml")
CHECKS = [CatalogCheck(**entry) for entry in tomllib.loads(TABLE.read_text("utf-8"))["check"]]


def catalog(patient: Patient, job_table: JobTable | None) -> Iterator[Finding]:
    """Make the checks of this database, as far as the table is understood."""
    table = patient.table
    known: dict[str, Any] = {"name": table.name, "schema": table.schema, "table": patient.name}
    known["age"] = patient.transaction_after.total_seconds()
    if job_table is not None:
        written = Reading(patient, job_table).written
        kept = {c.name for c in (*written, job_table.due) if c is not None}
        kept -= {column.name for column in job_table.stamps}
        known["written"] = json.dumps([column.name for column in written])
        known["kept"] = json.dumps(sorted(kept))
        known["needed"] = json.dumps([needed.name for needed in needed_indexes(job_table)])
    for check in CHECKS:
        if patient.product in check.databases:
            yield from check.findings(patient, known)
