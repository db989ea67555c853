"""A claim that is made and rolled back, and the triggers that it meets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta

from sqlalchemy import Connection, inspect, select, tuple_
from sqlalchemy.exc import SQLAlchemyError

from atomic_claim import predicates
from atomic_claim.claim import claim_jobs
from atomic_claim.errors import ClaimError
from atomic_claim.guard import guard
from atomic_claim.job_table import JobTable
from atomic_claim.lifecycle import complete_jobs, fail_jobs
from atomic_claim.testing.database import one_line

from .catalog import finding, query
from .findings import Finding, Level, Patient, Reading, listed

NOTHING = "nothing"
LEASE = timedelta(minutes=5)
CREATED = re.compile(r'CREATE TRIGGER (?:[^\s.]+\.)?("[^"]+"|`[^`]+`|\S+)')


def triggers(patient: Patient) -> list[str]:
    """Return the names of the table's triggers that are switched on."""
    given = {"name": patient.table.name, "schema": patient.table.schema, "table": patient.name}
    return list(patient.connection.scalars(query("triggers", patient.product), given))


def guarded(reading: Reading) -> Iterator[Finding]:
    """Compare the table's triggers with those of the guard."""
    try:
        wanted = guard(reading.job_table, reading.dialect)
    except ClaimError as error:
        yield Finding("guard", Level.PROBLEM, str(error), "the table was said to be guarded")
        return
    made = [name.strip('"`') for name in CREATED.findall("\n".join(wanted.upgrade))]
    present = triggers(reading)
    missing = [name for name in made if name not in present]
    if not missing:
        yield Finding("guard", Level.FINE, f"{listed(made)} there")
        return
    # Whatever is left of it goes before.
    drops = (re.sub(r"^DROP (\w+) ", r"DROP \1 IF EXISTS ", each) for each in wanted.downgrade)
    words = {"missing": listed(missing), "are": "is" if len(missing) == 1 else "are"}
    yield finding("no_guard", (*drops, *wanted.upgrade), **words)


def trial(reading: Reading) -> Iterator[Finding]:
    """Claim, complete and fail a job on a connection that may write, and roll it back."""
    # Its transaction is rolled back when it is closed.
    with reading.connection.engine.connect() as connection:
        try:
            said = _refusal(connection, reading.job_table)
        except (ClaimError, SQLAlchemyError) as error:
            said = one_line(error)
    if said is None:
        done = "a job was claimed and ended, and all of it rolled back"
        yield Finding("trial of a claim", Level.FINE, done)
    elif said == NOTHING:
        yield finding("untried")
    else:
        yield _refused(reading, said)


def _refusal(connection: Connection, job_table: JobTable) -> str | None:
    leased = job_table.lease is not None and job_table.token is not None
    claim = claim_jobs(connection, job_table, 1, lease=LEASE if leased else None)
    if not claim:
        waiting = select(1).select_from(job_table.table).where(predicates.claimable(job_table))
        found = connection.execute(waiting.limit(1)).first()
        return NOTHING if found is None else "a row is free, and the claim marks none"
    marked = select(*job_table.key).where(
        tuple_(*job_table.key).in_(claim.keys), predicates.is_running(job_table)
    )
    if len(connection.execute(marked).all()) < len(claim):
        return "the claimed row does not bear the mark afterwards"
    if job_table.done:
        with connection.begin_nested() as savepoint:
            complete_jobs(connection, claim, unfenced=True)
            savepoint.rollback()
    if job_table.failed:
        fail_jobs(connection, claim, error="a trial", unfenced=True)
    return None


def _refused(patient: Patient, said: str) -> Finding:
    """Name the constraint that refused, or else the triggers that may have."""
    checks = inspect(patient.connection).get_check_constraints(
        patient.table.name, schema=patient.table.schema
    )
    named = [str(each["name"]) for each in checks if each["name"] and str(each["name"]) in said]
    if named:
        drop = f"ALTER TABLE {patient.name} DROP CONSTRAINT {patient.quoted(named[0])}"
        # SQLite drops no constraint.
        return finding("constraint", () if patient.product == "sqlite" else (drop,), found=said)
    found = triggers(patient)
    is_postgresql = patient.product == "postgresql"
    drop = f"ALTER TABLE {patient.name} DISABLE TRIGGER" if is_postgresql else "DROP TRIGGER"
    sql = tuple(f"{drop} {patient.quoted(name)}" for name in found)
    return finding("triggers", sql, found=said + (f"; triggers: {listed(found)}" * bool(found)))
