"""Checks specific to PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, Engine, text

from atomic_claim.backends import backend_for
from atomic_claim.backends.postgresql import UTC_NAMES
from atomic_claim.cli.indexes import needed_indexes

from .findings import Finding, Level, Patient, Question, Reading, age, count
from .innodb import naive_times

# Autovacuum comes at a fifth of the rows; at twice that it does not keep up.
DEAD_SHARE = 0.4
FEWEST_DEAD = 1000
UNANALYSED = 2**20
# The table and, if it is partitioned, all that it consists of.
PARTS = """
    WITH RECURSIVE part(oid) AS (
        SELECT to_regclass(:name)::oid UNION
        SELECT i.inhrelid FROM pg_inherits i JOIN part ON i.inhparent = part.oid
    )
"""
QUESTIONS = (
    Question(
        "rights",
        """
        SELECT current_user AS person, quote_ident(current_user) AS role, privilege
        FROM unnest(ARRAY['SELECT', 'UPDATE']) privilege
        WHERE NOT has_table_privilege(to_regclass(:name), privilege) AND EXISTS (
            SELECT FROM unnest(CAST(:written AS text[])) c
            WHERE NOT has_column_privilege(to_regclass(:name), c, privilege)
        )
        """,
        "{person} may not {privilege} all columns that a claim writes",
        "a claim locks its rows and marks them, so that this user's claims fail",
        "look as the user of the workers, or grant the right:",
        ("GRANT {privilege} ON {table} TO {role}",),
    ),
    Question(
        "row-level security",
        """
        SELECT current_user AS person, quote_ident(current_user) AS role
        WHERE row_security_active(to_regclass(:name)) AND NOT EXISTS (
            SELECT FROM pg_policy p
            WHERE p.polrelid = to_regclass(:name) AND p.polpermissive AND p.polcmd = '*'
                AND pg_get_expr(p.polqual, p.polrelid) = 'true'
                AND (0 = ANY (p.polroles) OR current_user::regrole = ANY (p.polroles))
        )
        """,
        "it applies to {person}, and no policy shows that user every row",
        "a row that a policy hides is never claimed, and nothing says so",
        "show the workers all rows, or have them claim as the table's owner:",
        ("CREATE POLICY atomic_claim_workers ON {table} TO {role} USING (true)",),
    ),
    Question(
        "replica",
        "SELECT 1 WHERE pg_is_in_recovery()",
        "the server is a replica, and takes no writes",
        "a claim writes",
        "give the primary's URL",
    ),
    Question(
        "autovacuum",
        PARTS  # noqa: S608 - a constant
        + """
        SELECT c.oid::regclass AS part FROM part JOIN pg_class c USING (oid)
        WHERE EXISTS (
            SELECT FROM unnest(c.reloptions) o
            WHERE o ~* '^autovacuum_enabled=(off|false|no|0|f|n)$'
        )
        """,
        "off for {part}",
        "every claim and every end of a job leaves a dead row, and nothing removes them",
        "switch it on",
        ("ALTER TABLE {part} RESET (autovacuum_enabled)",),
    ),
    Question(
        "autovacuum",
        "SELECT 1 WHERE NOT current_setting('autovacuum')::boolean",
        "off for the whole server",
        "every claim and every end of a job leaves a dead row, and nothing removes them",
        "switch it on",
        ("ALTER SYSTEM SET autovacuum = on", "SELECT pg_reload_conf()"),
    ),
    Question(
        "old transactions",
        """
        SELECT gid, owner, quote_literal(gid) AS quoted FROM pg_prepared_xacts
        WHERE database = current_database()
            AND prepared <= clock_timestamp() - make_interval(secs => :age)
        """,
        "prepared transaction {gid} of {owner}",
        "VACUUM keeps every row that died since, so that claims read past more and more of them",
        "find out who forgot to end it, or roll it back:",
        ("ROLLBACK PREPARED {quoted}",),
    ),
    Question(
        "replication slots",
        """
        SELECT slot_name, quote_literal(slot_name) AS quoted FROM pg_replication_slots
        WHERE NOT active AND NOT temporary AND (restart_lsn IS NOT NULL OR xmin IS NOT NULL)
        """,
        "nobody reads from {slot_name}",
        "it keeps the log, and with a snapshot the dead rows too, until the disk is full",
        "start its reader again, or drop the slot:",
        ("SELECT pg_drop_replication_slot({quoted})",),
    ),
    Question(
        "unfinished indexes",
        """
        SELECT c.oid::regclass AS index FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
        WHERE i.indrelid = to_regclass(:name) AND NOT i.indisvalid AND c.relkind = 'i'
            AND NOT c.relname = ANY (CAST(:needed AS text[]))
        """,
        "{index}",
        "every claim writes it, and no query reads it",
        "drop it, or build it again:",
        ("DROP INDEX CONCURRENTLY {index}",),
    ),
)


def checks(patient: Patient) -> Iterator[Finding]:
    """Check the session, the table and other sessions' transactions."""
    yield _setting(
        patient,
        "isolation level",
        "isolation",
        "read committed",
        "SKIP LOCKED raises 'could not serialize access' once another worker has committed; a "
        "claim in your transaction is a ClaimConflict, one of its own is tried again",
    )
    yield _setting(patient, "read-only transactions", "read_only", "off", "a claim writes")
    yield _dead_rows(patient)
    yield from _transactions(patient)


def catalog(reading: Reading) -> Iterator[Finding]:
    """Ask the catalog what stands in the way of the claim."""
    patient = reading.patient
    given = {
        "written": [column.name for column in reading.written],
        "needed": [needed.name for needed in needed_indexes(reading.job_table)],
        "age": patient.transaction_after.total_seconds(),
    }
    for question in QUESTIONS:
        yield from question.ask(patient, patient.name, **given)


def _rows(patient: Patient, query: str, **given: Any) -> list[Any]:
    given["name"] = patient.name
    return list(patient.connection.execute(text(query), given))


def _setting(patient: Patient, check: str, suffix: str, wanted: str, why: str) -> Finding:
    """Check a default of transactions, and say where it was set."""
    name = f"default_transaction_{suffix}"
    query = (
        "SELECT setting, source, current_database(), current_user FROM pg_settings "
        "WHERE name = :setting"
    )
    asked = patient.connection.execute(text(query), {"setting": name})
    value, source, database, user = asked.one()
    if value == wanted:
        return Finding(check, Level.FINE, value.upper())
    owner = f"DATABASE {patient.quoted(database)}"
    if "user" in source:
        owner = f"ROLE {patient.quoted(user)}"
        if "database" in source:
            owner += f" IN DATABASE {patient.quoted(database)}"
    sql: tuple[str, ...] = (f"ALTER {owner} SET {name} = '{wanted}'",)
    if suffix == "read_only":
        sql = (f"SET {name} = off", *sql)
    fix = f"begin transactions with {name} = {wanted!r}; for all new connections:"
    if source in {"client", "session", "environment variable"}:
        fix, sql = f"take {name} out of the connection's options", ()
    return Finding(check, Level.PROBLEM, f"{value.upper()}, by {source}", why, fix, sql)


def _dead_rows(patient: Patient) -> Finding:
    query = (
        PARTS  # noqa: S608 - a constant
        + """
        SELECT COALESCE(SUM(n_live_tup), 0), COALESCE(SUM(n_dead_tup), 0),
            BOOL_OR(COALESCE(last_analyze, last_autoanalyze) IS NULL
                AND pg_relation_size(relid) > :large)
        FROM pg_stat_all_tables JOIN part ON part.oid = relid
    """
    )
    [(some, gone, never_analysed)] = _rows(patient, query, large=UNANALYSED)
    live, dead = int(some), int(gone)
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
    if never_analysed:
        return Finding(
            "dead rows",
            Level.NOTE,
            f"{found}; the table was never analysed",
            "the planner guesses how many rows are free, and VACUUM is never due by itself",
            "analyse it",
            (f"ANALYZE {patient.name}",),
        )
    return Finding("dead rows", Level.FINE, found)


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
