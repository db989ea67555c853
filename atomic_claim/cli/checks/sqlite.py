"""Checks specific to SQLite that no query makes."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .findings import Finding, Level, Patient


def checks(patient: Patient) -> Iterator[Finding]:
    """Check the database file and the driver's connection."""
    yield _transactions(patient)
    yield _rights(patient)


def _rights(patient: Patient) -> Finding:
    url = patient.connection.engine.url
    path = patient.connection.exec_driver_sql("PRAGMA database_list").fetchall()[0][2]
    opened = url.query.get("mode") == "ro" or url.query.get("immutable") in ("1", "true")
    if not opened and os.access(path, os.W_OK) and os.access(Path(path).parent, os.W_OK):
        return Finding("rights", Level.FINE, "the file and its folder can be written")
    return Finding(
        "rights",
        Level.PROBLEM,
        "the URL opens the file for reading" if opened else f"{path} cannot be written",
        "a claim writes the file, and its log beside it",
        "take mode=ro out of the URL, or look as the user of the workers, with the right to write "
        "the file and its folder",
    )


def _transactions(patient: Patient) -> Finding:
    driver: Any = patient.connection.connection.driver_connection
    check = "transaction mode"
    legacy = getattr(sqlite3, "LEGACY_TRANSACTION_CONTROL", None)
    autocommit = getattr(driver, "autocommit", legacy)
    if not isinstance(driver, sqlite3.Connection):
        return Finding(check, Level.FINE, f"that of {type(driver).__module__}")
    if autocommit == legacy:
        begin = driver.isolation_level
        if begin is None:
            return Finding(check, Level.FINE, "autocommit, except after a BEGIN")
        said = f"BEGIN {begin}".strip()
        return Finding(
            check,
            Level.FINE,
            f"sqlite3's legacy mode: {said} before an INSERT, UPDATE, DELETE or REPLACE; a SELECT "
            "and a statement that starts with WITH are in no transaction (the claim sees to that)",
        )
    if autocommit:
        return Finding(check, Level.FINE, "autocommit")
    return Finding(
        check,
        Level.NOTE,
        "autocommit=False: the first SELECT begins a transaction",
        "one that has read cannot become a writer once another connection has written: a claim "
        "after a read fails at once with 'database is locked', whatever the busy timeout",
        "claim as the first statement of a transaction, or by Engine or sessionmaker",
    )
