"""Checks that a query of the database's catalog makes; they stand in ``catalog.toml``."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import text

from atomic_claim.cli.indexes import needed_indexes

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

    @property
    def parameters(self) -> Set[str]:
        """The names of the query's parameters."""
        return frozenset(text(self.query).compile().params)

    def findings(self, patient: Patient, known: Mapping[str, Any]) -> Iterator[Finding]:
        """Yield a finding for each row, or one that all is well."""
        connection = patient.connection
        if self.needs and not connection.scalar(text(self.needs)):
            return
        given = {name: known[name] for name in self.parameters}
        rows = connection.execute(text(self.query), given).mappings().all()
        for row in rows:
            words = {**row, "table": patient.name}
            found, fix, *sql = (s.format_map(words) for s in (self.found, self.fix, *self.sql))
            run = tuple(statement for statement in sql if statement)
            yield Finding(self.name, Level(self.level), found, self.why, fix, run)
        if not rows and self.level != Level.FINE.value:
            yield Finding(self.name, Level.FINE, "nothing found")


TABLE = Path(__file__).with_name("catalog.toml")


@cache
def all_checks() -> list[CatalogCheck]:
    """Read the checks, which only ``doctor`` needs."""
    return [CatalogCheck(**entry) for entry in tomllib.loads(TABLE.read_text("utf-8"))["check"]]


def of_database(patient: Patient) -> Iterator[Finding]:
    """Make the checks of this database that need nothing to be known of the columns."""
    return _findings(patient, {})


def of_claims(reading: Reading) -> Iterator[Finding]:
    """Make the checks of this database that are about the columns of a claim."""
    written, job_table = reading.written, reading.job_table
    kept = {c.name for c in (*written, job_table.due) if c is not None}
    kept -= {column.name for column in job_table.stamps}
    names = {
        "written": [column.name for column in written],
        "kept": sorted(kept),
        "needed": [needed.name for needed in needed_indexes(job_table)],
    }
    return _findings(reading.patient, {name: json.dumps(each) for name, each in names.items()})


def _findings(patient: Patient, of_columns: Mapping[str, str]) -> Iterator[Finding]:
    table = patient.table
    known: dict[str, Any] = {"name": table.name, "schema": table.schema, "table": patient.name}
    known |= {"age": patient.transaction_after.total_seconds(), **of_columns}
    for check in all_checks():
        about_columns = not check.parameters.isdisjoint(("written", "kept", "needed"))
        if patient.product in check.databases and about_columns == bool(of_columns):
            yield from check.findings(patient, known)
