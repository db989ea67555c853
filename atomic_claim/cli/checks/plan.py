"""The plan of the claim's own statement, and the index that it lacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sqlalchemy.sql.elements import ColumnClause

from atomic_claim.cli.indexes import NeededIndex, needed_indexes
from atomic_claim.cli.plans import (
    Access,
    Known,
    accesses,
    explained,
    finding_statement,
    fits,
    known_indexes,
    passes_slowly,
    unserved,
)
from atomic_claim.cli.texts import shown_claim
from atomic_claim.sql_elements import OrderTerm

from .catalog import finding, reason
from .findings import Finding, Level, Reading, listed

# The limit of the claim that is explained.
LIMIT = 10
ANALYZE = {"mysql": "ANALYZE TABLE", "mariadb": "ANALYZE TABLE"}
SHOW = {"mysql": "VISIBLE", "mariadb": "NOT IGNORED"}


def statement_of(reading: Reading) -> str:
    """Return the SQL of the explained statement as the driver receives it."""
    plan, request = shown_claim(reading.job_table, LIMIT, "doctor")
    connection = reading.connection
    statement = finding_statement(connection, plan)
    return explained(connection, statement, request.parameters(token=True))[0]


def plan(reading: Reading) -> Iterator[Finding]:
    """Check by EXPLAIN of the claim's own statement that indexes serve it."""
    connection = reading.connection
    plan, request = shown_claim(reading.job_table, LIMIT, "doctor")
    now = accesses(connection, plan, request, as_it_is=True)
    lacking = unserved(connection, plan, request)
    known = known_indexes(connection, reading.job_table.table)
    for needed in lacking:
        fix, sql = _cure(reading, needed, known)
        near = listed(_near(needed, known))
        yield finding(
            "unserved",
            sql,
            search=reason(needed.reason)["search"],
            how="; ".join(dict.fromkeys(map(str, _telling(now)))),
            near=near and f". There, but of no use to it: {near}",
            fix=fix,
        )
    if lacking:
        return
    if (slow := passes_slowly(connection, reading.job_table)) is not None:
        fix, sql = _cure(reading, slow, known)
        yield finding("not_due", sql, name=slow.name, fix=fix)
    served = _telling(accesses(connection, plan, request))
    how_served = [str(access) for access in served if access.index is not None]
    # MySQL and MariaDB may rather scan and sort a few rows.
    how_served = how_served or [
        f"few rows are scanned, {name} serves more"
        for needed in needed_indexes(reading.job_table)
        for name, index in known.items()
        if fits(needed, index, connection)
    ]
    yield Finding("plan of the claim", Level.FINE, "; ".join(dict.fromkeys(how_served)))


def _telling(now: Sequence[Access]) -> Sequence[Access]:
    """Select the accesses that search for jobs, without the lookups by primary key."""
    sorting = [access for access in now if access.sorts]
    looking = [a for a in now if "PRIMARY" not in a.how and not str(a.index).endswith("_pkey")]
    return sorting or looking or now


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
    reading: Reading, needed: NeededIndex, known: Mapping[str, Known]
) -> tuple[str, tuple[str, ...]]:
    """Return the advice and the statements that create and analyze the needed index."""
    dialect, product, name = reading.dialect, reading.product, needed.name
    if (refusal := needed.refusal(dialect)) is not None:
        return refusal, ()
    create, drop = needed.create(dialect), needed.drop(dialect)
    if reading.is_partitioned:
        create, drop = (each.replace(" CONCURRENTLY", "") for each in (create, drop))
    analyse = f"{ANALYZE.get(product, 'ANALYZE')} {reading.name}"
    own = known.get(name)
    if own is None and known and product == "sqlite":
        # Before it, SQLite's planner prefers an index on one column to a partial one.
        return "create the index, and let the planner know what it is worth", (create, analyse)
    if own is None:
        fix = "create the index that atomic-claim migration writes"
        if reading.is_partitioned:
            fix += "; on a partitioned table writers wait until it is built"
        return fix, (create,)
    if not own.is_usable and product in SHOW:
        show = f"ALTER TABLE {reading.name} ALTER INDEX {reading.quoted(name)} {SHOW[product]}"
        return f"{name} is there, but hidden from the planner: show it", (show,)
    if fits(needed, own, reading.connection):
        return f"{name} is there: let the planner know what it is worth", (analyse,)
    fix = f"{name} is there, but is another index, or was not completed: create it again"
    return fix, (drop, create, analyse)
