"""Checks specific to MySQL and MariaDB."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import String, literal, select, text
from sqlalchemy.exc import DBAPIError

from atomic_claim.backends import backend_for
from atomic_claim.backends.innodb import SKEW

from .findings import Finding, Level, Patient, Question, Reading

VARIABLES = {"mysql": "transaction_isolation", "mariadb": "tx_isolation"}
DENIED = {1142, 1143}
# A column as it is, without ON UPDATE; MariaDB quotes a default itself.
QUOTED_DEFAULT = {
    "mysql": "IF(extra LIKE '%DEFAULT_GENERATED%', column_default, QUOTE(column_default))",
    "mariadb": "column_default",
}
STRICT = Question(
    "strict mode",
    "SELECT @@sql_mode AS mode WHERE @@sql_mode NOT LIKE '%STRICT_%_TABLES%'",
    "off: sql_mode is {mode!r}",
    "a value that a column cannot hold is cut or emptied, a mark or a token too, so that claims "
    "are refused when they read it back",
    "set it in the server's file, and for all new connections:",
    ("SET GLOBAL sql_mode = CONCAT_WS(',', NULLIF(@@GLOBAL.sql_mode, ''), 'STRICT_TRANS_TABLES')",),
)
READ_ONLY = Question(
    "read-only server",
    "SELECT 1 WHERE @@GLOBAL.read_only",
    "read_only is on, as on a replica",
    "a claim writes",
    "give the primary's URL; if this is it:",
    ("SET GLOBAL read_only = OFF",),
)
MOVED = """
    SELECT column_name AS moved, CONCAT('`', REPLACE(column_name, '`', '``'), '` ', column_type,
        IF(is_nullable = 'YES', ' NULL', ' NOT NULL'),
        IF(column_default IS NULL, '', CONCAT(' DEFAULT ', {default}))) AS plain
    FROM information_schema.columns
    WHERE table_schema = COALESCE(:schema, DATABASE()) AND table_name = :name
        AND extra LIKE '%on update%' AND column_name IN {columns}
"""
HIDDEN = {
    "mysql": ("is_visible = 'NO'", "VISIBLE"),
    "mariadb": ("ignored = 'YES'", "NOT IGNORED"),
}
OLD = Question(
    "old transactions",
    """
    SELECT t.trx_mysql_thread_id AS id, p.user AS who,
        TIMESTAMPDIFF(SECOND, t.trx_started, NOW()) AS seconds
    FROM information_schema.innodb_trx t
    JOIN information_schema.processlist p ON p.id = t.trx_mysql_thread_id
    WHERE t.trx_mysql_thread_id <> CONNECTION_ID()
        AND TIMESTAMPDIFF(SECOND, t.trx_started, NOW()) >= :age
    """,
    "connection {id} ({who}) for {seconds} s",
    "InnoDB keeps every version of a row since, so that claims read past more and more of them",
    "find out who forgot to commit, or end it:",
    ("KILL {id}",),
)


def checks(patient: Patient) -> Iterator[Finding]:
    """Check the session, the server and the table's storage engine."""
    yield _isolation(patient)
    yield from _engine(patient)
    yield from STRICT.ask(patient, patient.table.name)
    yield from READ_ONLY.ask(patient, patient.table.name)
    # Without this right the server shows no other sessions.
    rights = "SELECT 1 FROM information_schema.user_privileges WHERE privilege_type = 'PROCESS'"
    if patient.connection.scalar(text(rights)):
        age = patient.transaction_after.total_seconds()
        yield from OLD.ask(patient, patient.table.name, age=age)


def catalog(reading: Reading) -> Iterator[Finding]:
    """Check the right to write, columns that the server moves, and indexes that it ignores."""
    patient, own = reading.patient, reading.job_table
    yield from _rights(reading)
    kept = {c.name for c in (*reading.written, own.due) if c is not None and c not in own.stamps}
    columns = ", ".join(patient.text(literal(name, String())) for name in sorted(kept))
    default = QUOTED_DEFAULT[patient.product]
    moved = Question(
        "columns that the server moves",
        MOVED.replace("{default}", default).replace("{columns}", f"({columns})"),
        "ON UPDATE sets {moved} whenever a row changes",
        "a worker's own writes change the claim: its lease ends, and another worker has the row",
        "leave it to the claim",
        ("ALTER TABLE {table} MODIFY {plain}",),
    )
    yield from moved.ask(patient, patient.table.name)


def hidden_indexes(patient: Patient) -> dict[str, str]:
    """Return the statements that bring back the indexes that the planner is to ignore, by name."""
    condition, word = HIDDEN[patient.product]
    query = text(
        "SELECT DISTINCT index_name FROM information_schema.statistics "  # noqa: S608 - constants
        f"WHERE {condition} AND table_schema = COALESCE(:schema, DATABASE()) AND table_name = :name"
    )
    given = {"schema": patient.table.schema, "name": patient.table.name}
    return {
        name: f"ALTER TABLE {patient.name} ALTER INDEX {patient.quoted(name)} {word}"
        for name in patient.connection.scalars(query, given)
    }


def _rights(reading: Reading) -> Iterator[Finding]:
    """Have an UPDATE explained, for which the server wants the right to run it."""
    patient = reading.patient
    names = [patient.quoted(column.name) for column in reading.written]
    changes = ", ".join(f"{name} = {name}" for name in names)
    update = f"EXPLAIN UPDATE {patient.name} SET {changes} WHERE 1 = 0"  # noqa: S608 - not run
    # Not in the transaction that only reads, which refuses it to everybody.
    with patient.connection.engine.connect() as connection:
        user = str(connection.scalar(text("SELECT CURRENT_USER()")))
        try:
            connection.execute(text(update.replace(":", r"\:")))
        except DBAPIError as error:
            if error.orig is None or error.orig.args[0] not in DENIED:
                raise
        else:
            yield Finding("rights", Level.FINE, "the user may claim")
            return
    name, _, host = user.rpartition("@")
    yield Finding(
        "rights",
        Level.PROBLEM,
        f"{user} may not UPDATE all columns that a claim writes",
        "a claim locks its rows and marks them, so that this user's claims fail",
        "look as the user of the workers, or grant the right:",
        (f"GRANT UPDATE ON {patient.name} TO '{name}'@'{host}'",),
    )


def _isolation(patient: Patient) -> Finding:
    variable = VARIABLES[patient.product]
    level = str(patient.connection.scalar(text(f"SELECT @@{variable}"))).replace("-", " ")
    check = "isolation level"
    if level != "SERIALIZABLE":
        gaps = "; locks of others than claims hold the gaps between rows, and producers wait"
        return Finding(check, Level.FINE, level + (gaps if level == "REPEATABLE READ" else ""))
    return Finding(
        check,
        Level.PROBLEM,
        level,
        "there InnoDB's plain reads wait for the rows that other workers hold, so that a claim is "
        "refused",
        'create_engine(..., isolation_level="READ COMMITTED"), or, for all new connections:',
        (f"SET GLOBAL {variable} = 'READ-COMMITTED'",),
    )


def _engine(patient: Patient) -> Iterator[Finding]:
    asked = text(
        "SELECT engine FROM information_schema.tables "
        "WHERE table_schema = COALESCE(:schema, DATABASE()) AND table_name = :name"
    )
    given = {"schema": patient.table.schema, "name": patient.table.name}
    engine = patient.connection.scalar(asked, given)
    # A view has none.
    if engine is None:
        return
    if engine.lower() == "innodb":
        yield Finding("storage engine", Level.FINE, engine)
        return
    yield Finding(
        "storage engine",
        Level.PROBLEM,
        engine,
        "it has no row locks that a claim could rest on, so that every claim is refused",
        "convert the table",
        (f"ALTER TABLE {patient.name} ENGINE=InnoDB",),
    )


def clock(reading: Reading) -> Iterator[Finding]:
    """Report naive datetime columns if the session's time zone is not UTC."""
    connection = reading.patient.connection
    names = backend_for(connection.dialect).naive_columns(reading.job_table)
    skew = int(connection.scalar(select(SKEW)) or 0) if names else 0
    if skew:
        yield naive_times(names, f"{skew / 3600:+g} h from UTC")


def naive_times(names: list[str], zone: str) -> Finding:
    """Return the finding for naive datetime columns in a session whose time zone is not UTC."""
    return Finding(
        "time zone",
        Level.PROBLEM,
        f"the session's is {zone}, and {', '.join(names)} hold times without one",
        "a job would be due hours too early or too late, so that every claim is refused",
        'say what they hold: JobTable(naive_times="utc") or JobTable(naive_times="server")',
    )
