"""The lock of MySQL's and MariaDB's exclusive keys: one for each table, of the server's session."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy import Connection, Table, func, literal_column, select, text
from sqlalchemy.exc import DBAPIError

from atomic_claim.errors import ClaimConflict, ClaimError

# Seconds that a claim waits for those before it, which take some milliseconds each; and for
# which a holder may have been asleep.
PATIENCE = 5
MOST_LENGTH = 64  # of a name, https://dev.mysql.com/doc/refman/8.4/en/locking-functions.html
IN_PROGRESS = 1568  # ER_CANT_CHANGE_TX_CHARACTERISTICS
NEEDS_OWN = (
    "exclusive keys are locked until after the commit, which on MySQL and MariaDB takes a "
    "transaction of the call's own: pass the Engine or the sessionmaker in place of a Session or "
    "Connection"
)
# A proxy may have given the process to another client since.
PROCESS = text(
    "SELECT id FROM information_schema.processlist "
    "WHERE id = :id AND time >= :since AND command LIKE :doing"
)
SINGLE_PRIMARY = "group_replication_single_primary_mode"
# By whether the server is MariaDB.
CLUSTER = {
    True: "SELECT 'wsrep_on', @@wsrep_on",
    False: (
        "SELECT variable_name, variable_value FROM performance_schema.global_variables "
        "WHERE variable_name IN ('wsrep_on', 'group_replication_single_primary_mode')"
    ),
}
SEVERAL_WRITERS = (
    "the server is a node of a cluster with several writable nodes ({said}), whose named locks the "
    "other nodes do not see: exclusive_by cannot hold there; claim without it, or from a server "
    "that stands alone"
)


@contextmanager
def named_lock(connection: Connection, table: Table) -> Iterator[None]:
    """Hold the lock of a table's exclusive keys.

    It is taken in a transaction, and released after that has ended. The transaction is READ
    COMMITTED, so that each look for running rows sees what is committed.
    """
    _refuse_several_writers(connection)
    name = _name(connection, table)
    released = None
    try:
        _acquire(connection, name, table.fullname)
        yield
        # The transaction has been committed, and the lock ends with the session.
        with suppress(DBAPIError):
            released = connection.scalar(select(func.release_lock(name)))
    finally:
        if released != 1:
            end_session(connection)


def end_session(connection: Connection) -> None:
    """End a session that may hold a lock or a setting of ours: it goes back to no pool."""
    if not (connection.invalidated or connection.closed):
        connection.invalidate()


def read_committed(connection: Connection) -> None:
    """Set the isolation level of the transaction that is about to begin, and of no later one."""
    try:
        connection.execute(text("SET TRANSACTION ISOLATION LEVEL READ COMMITTED"))
    except DBAPIError as error:
        if error.orig is None or error.orig.args[:1] != (IN_PROGRESS,):
            raise
        raise ClaimError(
            "a listener to the engine's begin ran a statement before the claim's, and exclusive_by "
            "needs a transaction that starts with READ COMMITTED: remove that statement "
            f"({error.orig})"
        ) from error


def _refuse_several_writers(connection: Connection) -> None:
    is_mariadb: bool = connection.dialect.is_mariadb  # type: ignore[attr-defined]
    found = {name: str(value) for name, value in connection.execute(text(CLUSTER[is_mariadb]))}
    said = f"wsrep_on={found.get('wsrep_on')}"
    if found.get("wsrep_on", "0") in {"0", "OFF"}:
        if found.get(SINGLE_PRIMARY, "ON") == "ON":
            return
        said = f"{SINGLE_PRIMARY}=OFF"
    raise ClaimError(SEVERAL_WRITERS.format(said=said))


def _name(connection: Connection, table: Table) -> str:
    """Return the lock's name, which is case-sensitive on MariaDB while a table's may not be."""
    schema = connection.schema_for_object(table) or connection.scalar(select(func.database()))
    full_name = f"{schema}.{table.name}".lower()
    return f"atomic_claim.{hashlib.sha256(full_name.encode()).hexdigest()}"[:MOST_LENGTH]


def _acquire(connection: Connection, name: str, table: str) -> None:
    holder: Any = None
    for _ in range(2):
        if connection.scalar(select(func.get_lock(name, literal_column(str(PATIENCE))))) == 1:
            return
        holder = connection.scalar(select(func.is_used_lock(name)))
        end(connection, holder, PATIENCE, "Sleep")
    raise ClaimConflict(
        f"the lock of the exclusive keys of {table!r} was not free within {2 * PATIENCE} s; the "
        f"server's connection {holder} holds it: claim again, or KILL {holder} if it is stuck"
    )


def end(connection: Connection, process: Any, seconds: float, doing: str) -> bool:
    """End what a process has done for so long, if the server allows it; False if it does not."""
    asked = {"id": process, "since": int(seconds), "doing": doing}
    if connection.execute(PROCESS, asked).first() is None:
        return False
    # It may have ended since.
    with suppress(DBAPIError):
        connection.execute(text(f"KILL {int(process)}"))
    return True
