"""The right to claim, where no query of a catalog tells whether a user has it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import literal, text
from sqlalchemy.exc import DBAPIError

from atomic_claim.cli.indexes import INNODB

from .catalog import finding
from .findings import Finding, Level, Patient, Reading

CHECK = "rights"
DENIED = {1142, 1143}


def of_file(patient: Patient) -> Iterator[Finding]:
    """Check that SQLite may write the file and its folder."""
    if patient.product != "sqlite":
        return
    url = patient.connection.engine.url
    path = patient.connection.exec_driver_sql("PRAGMA database_list").fetchall()[0][2]
    opened = url.query.get("mode") == "ro" or url.query.get("immutable") in ("1", "true")
    if not opened and os.access(path, os.W_OK) and os.access(Path(path).parent, os.W_OK):
        yield Finding(CHECK, Level.FINE, "the file and its folder can be written")
        return
    said = "the URL opens the file for reading" if opened else f"{path} cannot be written"
    yield finding("file_rights", found=said)


def of_update(reading: Reading) -> Iterator[Finding]:
    """Check the right to write by EXPLAIN of an UPDATE, which requires it."""
    if reading.product not in INNODB:
        return
    names = [reading.quoted(column.name) for column in reading.written]
    changes = ", ".join(f"{name} = {name}" for name in names)
    update = f"EXPLAIN UPDATE {reading.name} SET {changes} WHERE 1 = 0"  # noqa: S608 - not run
    # Not in the transaction that only reads, which refuses it to everybody.
    with reading.connection.engine.connect() as connection:
        user = str(connection.scalar(text("SELECT CURRENT_USER()")))
        try:
            connection.execute(text(update.replace(":", r"\:")))
        except DBAPIError as error:
            if error.orig is None or error.orig.args[0] not in DENIED:
                raise
        else:
            yield Finding(CHECK, Level.FINE, f"{user} may claim")
            return
    name, _, host = user.rpartition("@")
    grantee = "@".join(reading.text(literal(part)) for part in (name, host))
    grant = f"GRANT UPDATE ON {reading.name} TO {grantee}"
    yield finding("update_rights", (grant,), user=user)
