"""Checks specific to PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, Engine, text

from atomic_claim.backends import backend_for
from atomic_claim.backends.postgresql import UTC_NAMES

from .findings import Finding, Level, Patient, Reading, age, count
from .innodb import naive_times

# Autovacuum comes at a fifth of the rows; at twice that it does not keep up.
DEAD_SHARE = 0.4
FEWEST_DEAD = 1000
# So much of a table has to be empty before it is worth telling, and so many bytes.
EMPTY_SHARE = 0.75
FEWEST_EMPTY = 8 * 2**20
# Bytes of a row's header and its pointer, as they are aligned.
ROW_HEADER = 28
UNANALYSED = 2**20


def checks(patient: Patient) -> Iterator[Finding]:
    """Check the session, the table and other sessions' transactions and lock waits."""
    yield _isolation(patient)
    yield _dead_rows(patient)
    yield from _bloat(patient)
    yield from _transactions(patient)
    yield from _lock_waits(patient)


def _rows(patient: Patient, query: str, **given: Any) -> list[Any]:
    given["name"] = patient.name
    return list(patient.connection.execute(text(query), given))


def _isolation(patient: Patient) -> Finding:
    query = (
        "SELECT setting, source, current_database(), current_user FROM pg_settings "
        "WHERE name = 'default_transaction_isolation'"
    )
    level, source, database, user = patient.connection.execute(text(query)).one()
    check = "isolation level"
    if level == "read committed":
        return Finding(check, Level.FINE, level.upper())
    owner = f"DATABASE {patient.quoted(database)}"
    if "user" in source:
        owner = f"ROLE {patient.quoted(user)}"
        if "database" in source:
            owner += f" IN DATABASE {patient.quoted(database)}"
    sql: tuple[str, ...] = (f"ALTER {owner} SET default_transaction_isolation = 'read committed'",)
    fix = "begin transactions at READ COMMITTED; for all new connections:"
    if source in {"client", "session", "environment variable"}:
        fix, sql = "take default_transaction_isolation out of the connection's options", ()
    return Finding(
        check,
        Level.PROBLEM,
        f"{level.upper()}, by {source}",
        "SKIP LOCKED raises 'could not serialize access' once another worker has committed; a "
        "claim in your transaction is a ClaimConflict, one of its own is tried again",
        fix,
        sql,
    )


def _dead_rows(patient: Patient) -> Finding:
    query = """
        SELECT COALESCE(n_live_tup, 0), COALESCE(n_dead_tup, 0),
            COALESCE(last_analyze, last_autoanalyze) IS NULL, pg_relation_size(relid)
        FROM pg_stat_all_tables WHERE relid = to_regclass(:name)
    """
    live, dead, never_analysed, size = [*_rows(patient, query), (0, 0, False, 0)][0]
    found = f"{count(dead, 'dead row')} beside {live:,} live"
    if dead >= FEWEST_DEAD and dead > DEAD_SHARE * live:
        return Finding(
            "dead rows",
            Level.PROBLEM,
            found,
            "every claim and every end of a job leaves a dead row, and claims read past them to "
            "the first job until VACUUM has been",
            "have it vacuumed, and see to it that nothing holds VACUUM back",
            (f"VACUUM (ANALYZE) {patient.name}",),
        )
    if never_analysed and size > UNANALYSED:
        return Finding(
            "dead rows",
            Level.NOTE,
            f"{found}; the table was never analysed",
            "the planner guesses how many rows are free, and VACUUM is never due by itself",
            "analyse it",
            (f"ANALYZE {patient.name}",),
        )
    return Finding("dead rows", Level.FINE, found)


def _bloat(patient: Patient) -> Iterator[Finding]:
    """How much of the table's file is empty, by the planner's statistics."""
    query = """
        SELECT pg_relation_size(c.oid) AS size,
            c.reltuples * (:header + SUM(s.avg_width * (1 - s.null_frac))) AS needed
        FROM pg_class c
        JOIN pg_namespace n ON n.oid = c.relnamespace
        JOIN pg_stats s ON s.schemaname = n.nspname AND s.tablename = c.relname
        WHERE c.oid = to_regclass(:name) AND NOT s.inherited
        GROUP BY c.oid, c.reltuples
    """
    for size, needed in _rows(patient, query, header=ROW_HEADER):
        empty = max(0, size - needed)
        found = f"{_size(size)}, of which about {_size(empty)} are empty"
        if empty < FEWEST_EMPTY or empty < EMPTY_SHARE * size:
            yield Finding("bloat", Level.FINE, found)
            continue
        yield Finding(
            "bloat",
            Level.PROBLEM,
            found,
            "whatever reads the whole table reads the empty pages too, and VACUUM alone does not "
            "give them back",
            "write the table anew, when nobody needs it (pg_repack does it beside the workers):",
            (f"VACUUM (FULL, ANALYZE) {patient.name}",),
        )


def _size(size: float) -> str:
    return f"{size / 2**20:,.1f} MB"


def _transactions(patient: Patient) -> Iterator[Finding]:
    """Report transactions whose old snapshot prevents VACUUM from removing dead rows."""
    query = """
        SELECT pid, COALESCE(NULLIF(application_name, ''), usename), state,
            EXTRACT(EPOCH FROM clock_timestamp() - xact_start)
        FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid()
            AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)
            AND query NOT LIKE 'autovacuum:%'
            AND xact_start <= clock_timestamp() - make_interval(secs => :age)
        ORDER BY xact_start
    """
    limit = patient.transaction_after.total_seconds()
    found = _rows(patient, query, age=limit)
    if not found:
        said = f"none has been open for {age(limit)}"
        if not _sees_others(patient):
            said += ", of this user's own; others are shown to members of pg_read_all_stats"
        yield Finding("old transactions", Level.FINE, said)
        return
    said = "; ".join(f"pid {pid} ({who}, {state}) for {age(s)}" for pid, who, state, s in found)
    yield Finding(
        "old transactions",
        Level.PROBLEM,
        said,
        "VACUUM keeps every row that died since, so that claims read past more and more of them",
        "find out who forgot to commit, or end them (idle_in_transaction_session_timeout does it "
        "by itself)",
        tuple(f"SELECT pg_terminate_backend({pid})" for pid, *_ in found),
    )


def _sees_others(patient: Patient) -> bool:
    """Check whether the user may see the activity of other users' sessions."""
    # There since PostgreSQL 10.
    roles = "SELECT oid FROM pg_roles WHERE rolname = 'pg_read_all_stats'"
    [found] = _rows(patient, f"SELECT pg_has_role(({roles}), 'USAGE')")
    return bool(found[0])


def _lock_waits(patient: Patient) -> Iterator[Finding]:
    query = """
        SELECT a.pid, COALESCE(NULLIF(a.application_name, ''), a.usename),
            pg_blocking_pids(a.pid), EXTRACT(EPOCH FROM clock_timestamp() - a.query_start)
        FROM pg_stat_activity a
        WHERE cardinality(pg_blocking_pids(a.pid)) > 0 AND EXISTS (
            SELECT FROM pg_locks l WHERE l.pid = a.pid AND l.relation = to_regclass(:name)
        )
        ORDER BY a.query_start
    """
    found = _rows(patient, query)
    if not found:
        yield Finding("lock waits", Level.FINE, "none now")
        return
    waits = [
        f"pid {pid} ({who}) waits for {', '.join(f'pid {other}' for other in others)}"
        # Hidden from other users, but for members of pg_read_all_stats.
        + ("" if seconds is None else f" since {age(seconds)}")
        for pid, who, others, seconds in found
    ]
    waiting = {pid for pid, *_ in found}
    blocking = sorted({other for _, _, others, _ in found for other in others} - waiting)
    yield Finding(
        "lock waits",
        Level.PROBLEM,
        "; ".join(waits),
        "a claim waits for nobody's row, so these are loops that mark rows which others hold, or a "
        "migration that nobody gets past",
        "let the transactions end that are waited for, or end them",
        tuple(f"SELECT pg_terminate_backend({pid})" for pid in blocking if pid),
    )


def clock(reading: Reading) -> Iterator[Finding]:
    """Report naive datetime columns if the session's time zone is not UTC."""
    connection = reading.patient.connection
    names = backend_for(connection.dialect).naive_columns(reading.job_table)
    zone = str(connection.scalar(text("SELECT current_setting('TimeZone')")))
    if names and zone.lower() not in UTC_NAMES:
        yield naive_times(names, zone)


def pooling(engine: Engine) -> Iterator[Finding]:
    """Report a pooler that assigns server sessions per transaction, such as PgBouncer.

    No connection tells. But of two that are open at once, both to the server, neither has the
    other's process, and none its own process changed.
    """
    with engine.connect() as one, engine.connect() as other:
        seen = [_process(one), _process(other), _process(one)]
    if seen[0] == seen[2] != seen[1]:
        return
    yield Finding(
        "connection pooling",
        Level.NOTE,
        "a pooler hands out the server's sessions by transaction, as PgBouncer's "
        "pool_mode=transaction does",
        "what a session is told does not last, and a statement that a driver has prepared may not "
        "be there in the next transaction; a claim of its own is one transaction, and safe",
        "have psycopg prepare nothing: create_engine(..., connect_args={'prepare_threshold': "
        "None}, poolclass=NullPool); or let the pooler do it (PgBouncer 1.21 and later: "
        "max_prepared_statements = 200)",
    )


def _process(connection: Connection) -> int:
    """Return the server process id of a transaction, and end the transaction."""
    found = connection.scalar(text("SELECT pg_backend_pid()"))
    connection.rollback()
    return int(found or 0)
