"""Checks that a query of the database's catalog makes; they stand in ``catalog.toml``."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import TextClause, text

from atomic_claim.backends import backend_for
from atomic_claim.backends.base import naive_columns
from atomic_claim.backends.postgresql import UTC_NAMES
from atomic_claim.cli.indexes import needed_indexes

from .findings import Finding, Level, Patient, Reading

# The parameters of checks that are made only if the columns are understood.
OF_COLUMNS = ("written", "kept", "needed", "naive")


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
        fine: a query that returns what to show if nothing is wrong.
    """

    name: str
    databases: Sequence[str]
    query: str
    found: str
    why: str = ""
    fix: str = ""
    sql: Sequence[str] = ()
    level: str = Level.PROBLEM
    needs: str = ""
    fine: str = ""

    def findings(self, patient: Patient, known: Mapping[str, Any]) -> Iterator[Finding]:
        """Yield a finding for each row, or one that all is well."""
        connection = patient.connection
        if self.needs and not connection.scalar(text(self.needs)):
            return
        rows = connection.execute(text(self.query), known).mappings().all()
        for row in rows:
            words = {**row, "table": patient.name}
            texts = (self.found, self.why, self.fix, *self.sql)
            found, why, fix, *sql = (each.format_map(words) for each in texts)
            run = tuple(statement for statement in sql if statement)
            yield Finding(self.name, Level(self.level), found, why, fix, run)
        if self.fine and not rows:
            shown = connection.scalar(text(self.fine), known)
            yield Finding(self.name, Level.FINE, str(shown))


@cache
def _table() -> dict[str, Any]:
    """Read the queries, which only ``doctor`` needs."""
    return tomllib.loads(Path(__file__).with_name("catalog.toml").read_text("utf-8"))


def reason(name: str) -> Mapping[str, str]:
    """Return what an index that is needed for a reason serves, as ``search`` and ``serves``."""
    found: dict[str, str] = _table()["reasons"][name]
    return found


def finding(key: str, sql: tuple[str, ...] = (), /, **words: Any) -> Finding:
    """Make a finding of its texts, which name words in braces."""
    texts = _table()["texts"][key]
    said = {name: texts.get(name, "").format_map(words) for name in ("found", "why", "fix")}
    return Finding(texts["name"], Level(texts.get("level", Level.PROBLEM)), **said, sql=sql)


def query(name: str, product: str) -> TextClause:
    """Return the query of this name for a database."""
    return text(_table()["queries"][name][product])


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
        "utc": sorted(UTC_NAMES),
    }
    naive = naive_columns(job_table, backend_for(reading.connection.dialect))
    given = {name: json.dumps(each) for name, each in names.items()}
    return _findings(reading, {**given, "naive": ", ".join(naive)})


def _findings(patient: Patient, of_columns: Mapping[str, str]) -> Iterator[Finding]:
    table = patient.table
    known: dict[str, Any] = {"name": table.name, "schema": table.schema, "table": patient.name}
    known |= {"age": patient.transaction_after.total_seconds(), **of_columns}
    for check in (CatalogCheck(**entry) for entry in _table()["check"]):
        names = text(f"{check.query}; {check.fine}").compile().params.keys()
        about_columns = not names.isdisjoint(OF_COLUMNS)
        if patient.product in check.databases and about_columns == bool(of_columns):
            yield from check.findings(patient, known)
