"""The plan of the claim's own statement, and the index that it lacks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta

from sqlalchemy import Connection, inspect, text
from sqlalchemy.sql.elements import ColumnClause

from atomic_claim.cli.indexes import NeededIndex, needed_indexes
from atomic_claim.cli.plans import (
    Access,
    Known,
    Unserved,
    accesses,
    as_sent,
    finding_statement,
    fits,
    known_indexes,
    unserved,
)
from atomic_claim.cli.texts import fresh_plan
from atomic_claim.job_table import JobTable
from atomic_claim.plan import ClaimPlan, ClaimRequest
from atomic_claim.sql_elements import OrderTerm

from .findings import Finding, Level, Patient, Reading, listed
from .innodb import HIDDEN, hidden_indexes

CHECK = "plan of the claim"
# The limit of the claim that is explained.
LIMIT = 10
SHOWN_LEASE = timedelta(minutes=5)
SEARCHES = {
    "free": "the search for free rows",
    "expired": "the search for leases that have run out",
    "unleased": "the search for rows that run without a lease",
    "keys": "the search for the first row of each key",
    "running": "the look for rows that run with a key",
    "fair": "the search for the next keys of a turn",
    "claimed": "the look for the row that was claimed last",
}
SORTS = {
    "postgresql": "a Sort",
    "sqlite": "USE TEMP B-TREE FOR ORDER BY",
    "mysql": "Using filesort",
    "mariadb": "Using filesort",
}
ANALYZE = {"mysql": "ANALYZE TABLE", "mariadb": "ANALYZE TABLE"}


def claim_of(job_table: JobTable) -> tuple[ClaimPlan, ClaimRequest]:
    """Build the claim to explain and its options."""
    leased = job_table.lease is not None and job_table.token is not None
    request = ClaimRequest(
        LIMIT,
        worker=None if job_table.worker is None else "doctor",
        lease=SHOWN_LEASE if leased else None,
    )
    return fresh_plan(job_table, request), request


def statement_of(reading: Reading) -> str:
    """Return the SQL of the explained statement as the driver receives it."""
    plan, request = claim_of(reading.job_table)
    connection = reading.patient.connection
    statement = finding_statement(connection, plan)
    return as_sent(connection, statement, request.parameters(token=True))[0]


def plan(reading: Reading) -> Iterator[Finding]:
    """Check by EXPLAIN of the claim's own statement that indexes serve it."""
    connection = reading.patient.connection
    plan, request = claim_of(reading.job_table)
    now = accesses(connection, plan, request, as_it_is=True)
    found = unserved(connection, plan, request)
    known = known_indexes(connection, reading.job_table.table)
    for each in found:
        yield _unserved(reading, each, now, known)
    if not found:
        served = _telling(accesses(connection, plan, request))
        how = [str(access) for access in served if access.index is not None]
        # MySQL and MariaDB may rather scan and sort a few rows.
        how = how or [
            f"few rows are scanned, {name} serves more" for name in _fitting(reading, known)
        ]
        yield Finding(CHECK, Level.FINE, "; ".join(dict.fromkeys(how)))


def _fitting(reading: Reading, known: Mapping[str, Known]) -> Iterator[str]:
    """Yield the names of the existing indexes that match a needed one."""
    for needed in needed_indexes(reading.job_table):
        yield from (name for name, index in known.items() if fits(needed, index))


def _unserved(
    reading: Reading, lacking: Unserved, now: Sequence[Access], known: Mapping[str, Known]
) -> Finding:
    patient, needed = reading.patient, lacking.needed
    how = "; ".join(dict.fromkeys(_described(patient, access) for access in _telling(now)))
    found = f"{SEARCHES[needed.reason]} is served by no index: {how}"
    fix, sql = _cure(patient, needed, known)
    if near := _near(needed, known):
        found += f". There, but of no use to it: {listed(near)}"
    return Finding(
        CHECK,
        Level.PROBLEM,
        found,
        "every claim reads what it does not take, and takes longer the more rows there are",
        fix,
        sql,
    )


def _telling(now: Sequence[Access]) -> Sequence[Access]:
    """Select the accesses that search for jobs, without the lookups by primary key."""
    sorting = [access for access in now if access.sorts]
    looking = [a for a in now if "PRIMARY" not in a.how and not str(a.index).endswith("_pkey")]
    return sorting or looking or now


def _described(patient: Patient, access: Access) -> str:
    how = access.how
    if how in {"Seq Scan", "ALL access"} or re.fullmatch(r"SCAN \S+", how):
        how = f"a scan of the whole table ({how})"
    return f"{how}, then a sort of all it reads ({SORTS[patient.product]})" if access.sorts else how


def _near(needed: NeededIndex, known: Mapping[str, Known]) -> list[str]:
    """Describe the existing indexes on the same columns as the needed one."""
    names = set(needed.chosen_by)
    first = OrderTerm.of(needed.order[0]).element
    if isinstance(first, ColumnClause):
        names.add(first.name)
    return [
        f"{name} ({', '.join(part or 'an expression' for part in index.columns)})"
        + (f" WHERE {index.where}" if index.where else "")
        for name, index in known.items()
        if name != "PRIMARY" and (not names.isdisjoint(index.columns) or index.where)
    ]


def _cure(
    patient: Patient, needed: NeededIndex, known: Mapping[str, Known]
) -> tuple[str, tuple[str, ...]]:
    """Return the advice and the statements that create and analyze the needed index."""
    dialect = patient.dialect
    if (refusal := needed.refusal(dialect)) is not None:
        return refusal, ()
    if patient.product in HIDDEN and (revealed := hidden_indexes(patient).get(needed.name)):
        return f"{needed.name} is there, but hidden from the planner: show it", (revealed,)
    create, drop = needed.create(dialect), needed.drop(dialect)
    if patient.is_partitioned:
        create, drop = (each.replace(" CONCURRENTLY", "") for each in (create, drop))
    analyse = f"{ANALYZE.get(patient.product, 'ANALYZE')} {patient.name}"
    if needed.name not in known:
        if _must_be_analysed(patient, known):
            # Before it, the planner prefers an index on one column to a partial one.
            return "create the index, and let the planner know what it is worth", (create, analyse)
        fix = "create the index that atomic-claim migration writes"
        if patient.is_partitioned:
            fix += "; on a partitioned table writers wait until it is built"
        return fix, (create,)
    if _is_whole(patient, needed, known[needed.name]):
        return f"{needed.name} is there: let the planner know what it is worth", (analyse,)
    fix = f"{needed.name} is there, but is another index, or was not completed: create it again"
    return fix, (drop, create, analyse)


def _must_be_analysed(patient: Patient, known: Mapping[str, Known]) -> bool:
    if patient.product != "sqlite" or not known:
        return False
    connection = patient.connection
    if not inspect(connection).has_table("sqlite_stat1", schema=patient.table.schema):
        return True
    schema = f"{patient.quoted(patient.table.schema)}." if patient.table.schema else ""
    counted = text(f"SELECT count(*) FROM {schema}sqlite_stat1 WHERE tbl = :name")  # noqa: S608
    return not connection.scalar(counted, {"name": patient.table.name})


def _is_whole(patient: Patient, needed: NeededIndex, index: Known) -> bool:
    """Check whether the existing index of that name is valid and matches the needed one."""
    if patient.product == "postgresql" and not _is_valid(patient.connection, patient, needed):
        return False
    terms = [getattr(OrderTerm.of(term).element, "name", None) for term in needed.order]
    ahead = list(needed.leading) if patient.product == "postgresql" else list(needed.equal)
    wanted = [*dict.fromkeys([*(column.name for column in ahead), *terms])]
    where = needed.definition(patient.dialect).partition(" WHERE ")[2]
    return list(index.columns)[: len(wanted)] == wanted and _plain(index.where) == _plain(where)


def _plain(condition: str) -> str:
    """Normalize a condition: drop the casts, parentheses and spaces that databases add."""
    return re.sub(r"::(?:character varying|\w+)|[()\s]", "", condition.lower())


def _is_valid(connection: Connection, patient: Patient, needed: NeededIndex) -> bool:
    """Check whether CREATE INDEX CONCURRENTLY has completed."""
    schema = f"{patient.quoted(patient.table.schema)}." if patient.table.schema else ""
    asked = text("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)")
    found = connection.scalar(asked, {"name": schema + patient.quoted(needed.name)})
    return bool(found)
