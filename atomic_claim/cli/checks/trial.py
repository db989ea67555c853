"""A claim that is made and rolled back, and the triggers that it meets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta

from sqlalchemy import Connection, inspect, select, text, tuple_
from sqlalchemy.exc import SQLAlchemyError

from atomic_claim import predicates
from atomic_claim.claim import claim_jobs
from atomic_claim.errors import ClaimError
from atomic_claim.guard import guard
from atomic_claim.job_table import JobTable
from atomic_claim.lifecycle import complete_jobs, fail_jobs
from atomic_claim.testing.database import one_line

from .findings import Finding, Level, Patient, Reading, listed

CHECK = "trial of a claim"
LEASE = timedelta(minutes=5)
TRIGGERS = {
    "postgresql": "SELECT tgname FROM pg_trigger WHERE tgrelid = to_regclass(:table) "
    "AND NOT tgisinternal AND tgenabled <> 'D'",
    "sqlite": "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = :name",
}
OF_INNODB = (
    "SELECT trigger_name FROM information_schema.triggers "
    "WHERE event_object_schema = COALESCE(:schema, DATABASE()) AND event_object_table = :name"
)


def triggers(patient: Patient) -> list[str]:
    """Return the names of the table's triggers that are switched on."""
    query = text(TRIGGERS.get(patient.product, OF_INNODB))
    given = {"name": patient.table.name, "schema": patient.table.schema, "table": patient.name}
    given = {key: value for key, value in given.items() if key in query.compile().params}
    return list(patient.connection.scalars(query, given))


def guarded(reading: Reading) -> Iterator[Finding]:
    """Compare the table's triggers with those of the guard."""
    patient = reading.patient
    try:
        wanted = guard(reading.job_table, patient.dialect)
    except ClaimError as error:
        yield Finding("guard", Level.PROBLEM, str(error), "the table was said to be guarded")
        return
    made = {
        match[1].strip('"`'): each
        for each in wanted.upgrade
        if (match := re.search(r'CREATE TRIGGER (?:[^\s.]+\.)?("[^"]+"|`[^`]+`|\S+)', each))
    }
    present = triggers(patient)
    missing = [name for name in made if name not in present]
    if not missing:
        yield Finding("guard", Level.FINE, f"{listed(list(made))} there")
        return
    # Whatever is left of it goes before.
    left = (each for each in wanted.downgrade if "TRIGGER" not in each or _names(each, present))
    yield Finding(
        "guard",
        Level.PROBLEM,
        f"{listed(missing)} {'is' if len(missing) == 1 else 'are'} gone or switched off",
        "a second claim by a loop without a patch is no longer refused; a migration that creates "
        "the table again drops its triggers",
        "install it again:",
        (*map(_if_exists, left), *wanted.upgrade),
    )


def _names(statement: str, names: list[str]) -> bool:
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", statement) for name in names)


def _if_exists(drop: str) -> str:
    return re.sub(r"^DROP (\w+) ", r"DROP \1 IF EXISTS ", drop)


def trial(reading: Reading) -> Iterator[Finding]:
    """Claim, complete and fail a job on a connection that may write, and roll it back."""
    patient, job_table = reading.patient, reading.job_table
    with patient.connection.engine.connect() as connection:
        said = None
        waiting = select(1).select_from(job_table.table).where(predicates.claimable(job_table))
        try:
            if connection.execute(waiting.limit(1)).first() is None:
                why = "what refuses a claim shows only if there is something to claim"
                yield Finding(CHECK, Level.NOTE, "nothing waits, so nothing was tried", why)
                return
            # Else SQLite would refuse to write after a read, if another has written meanwhile.
            connection.rollback()
            said = _refusal(connection, job_table)
        except (ClaimError, SQLAlchemyError) as error:
            said = one_line(error)
        finally:
            connection.rollback()
    if said is None:
        yield Finding(CHECK, Level.FINE, "a job was claimed and ended, and all of it rolled back")
        return
    yield _refused(patient, said)


def _refusal(connection: Connection, job_table: JobTable) -> str | None:
    leased = job_table.lease is not None and job_table.token is not None
    claim = claim_jobs(connection, job_table, 1, lease=LEASE if leased else None)
    if not claim:
        return "a row is free, and the claim marks none"
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
    why = "every claim meets the same, so that none succeeds"
    if named:
        # SQLite drops no constraint.
        drop = f"ALTER TABLE {patient.name} DROP CONSTRAINT {patient.quoted(named[0])}"
        fix = "have the constraint allow what a claim writes; until then:"
        sql: tuple[str, ...] = () if patient.product == "sqlite" else (drop,)
        return Finding(CHECK, Level.PROBLEM, said, why, fix, sql)
    found = triggers(patient)
    fix = "see what the table's triggers do, and have them let the claim's columns alone"
    disable = {"postgresql": f"ALTER TABLE {patient.name} DISABLE TRIGGER {{0}}"}
    form = disable.get(patient.product, "DROP TRIGGER {0}")
    sql = tuple(form.format(patient.quoted(name)) for name in found)
    if found:
        said += f"; triggers: {listed(found)}"
    return Finding(CHECK, Level.PROBLEM, said, why, fix, sql)
