"""PostgreSQL's locks of exclusive keys: an advisory lock each, until the transaction ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Connection,
    Dialect,
    Integer,
    Select,
    Table,
    Text,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    select,
)
from sqlalchemy.dialects.postgresql import REGCLASS, array

from atomic_claim.errors import ClaimError, UnsupportedDialect
from atomic_claim.job_table import JobTable
from atomic_claim.sql_elements import ByKey

from .base import KeyLocks, Transaction
from .reading import Candidate, Key

TABLE = "atomic_claim_table"
LEVELS = {"read committed", "read uncommitted"}
LEVEL = func.current_setting(literal_column("'transaction_isolation'")).label("level")
# A worker that stops between two statements of a claim would keep its keys until it goes on.
TIMEOUT = "idle_in_transaction_session_timeout"
LONGEST_IDLE = "5s"


def table_number(connection: Connection, table: Table) -> ColumnElement[int]:
    """Return the number of the table in the locks of its keys: a partition has its root's.

    The table is the one that its name means in this session.
    """
    # Not by SQLAlchemy's preparer, which doubles the percent signs of a statement's text.
    parts = [
        part.replace('"', '""')
        for part in (connection.schema_for_object(table), table.name)
        if part
    ]
    name = bindparam(TABLE, ".".join(f'"{part}"' for part in parts), Text())
    found: ColumnElement[Any] = cast(cast(name, Text()), REGCLASS())
    # pg_partition_root() came with version 12, and knows only what is partitioned.
    if (connection.dialect.server_version_info or (12,)) >= (12,):
        found = func.coalesce(func.pg_partition_root(found), found)
    return cast(found, Integer())


def require_locks(dialect: Dialect) -> None:
    """Refuse databases whose advisory locks do nothing, such as CockroachDB's."""
    if dialect.name != "postgresql":
        raise UnsupportedDialect(
            f"exclusive_by needs advisory locks, and those of {dialect.name} are not known to "
            "hold: leave exclusive_by out"
        )


class AdvisoryLocks(KeyLocks):
    """An advisory lock for each key."""

    def number(self, key: ColumnElement[Any]) -> ColumnElement[Any]:
        """Return the number of a key's lock.

        Keys that the database compares as equal share a number, as some others do by chance: while
        one of them is locked, the other is passed over, which costs a claim some rows and nothing
        else.
        """
        return case((key.is_not(None), func.hash_array(array([key]), type_=Integer())))

    def lock(
        self, tx: Transaction, job_table: JobTable, candidates: Sequence[Candidate], wanted: int
    ) -> tuple[Sequence[Candidate], Sequence[Candidate]]:
        numbers = list(dict.fromkeys(each.lock for each in candidates if each.lock is not None))
        if not numbers:
            return candidates, ()
        given = func.unnest(bindparam("numbers", numbers, type_=ARRAY(Integer)))
        number: ColumnElement[int] = given.column_valued("claim_lock")
        table = table_number(tx.connection, job_table.table)
        locks = select(number, LEVEL).where(func.pg_try_advisory_xact_lock(table, number))
        locked = tx.connection.execute(locks.limit(wanted)).all()
        # Elsewhere later statements do not see what was committed since.
        if locked and (level := locked[0].level) not in LEVELS:
            raise ClaimError(
                f"the transaction is {level.upper()}, where a look for running rows sees an old "
                'snapshot: exclusive_by needs isolation_level="READ COMMITTED"'
            )
        ours = {row[0] for row in locked}
        tried = len(candidates)
        if len(ours) == wanted:
            tried = 1 + max(place for place, each in enumerate(candidates) if each.lock in ours)
        found = [each for each in candidates[:tried] if each.lock is None or each.lock in ours]
        return found, candidates[tried:]

    @contextmanager
    def held(self, tx: Transaction, job_table: JobTable, keys: Sequence[Key]) -> Iterator[None]:
        """Lock them in an order of their own, before the UPDATE reads the clock at its start."""
        column = job_table.exclusive_by
        number = self.number(column).label("claim_lock")
        of_keys = select(number).where(column.is_not(None)).distinct()

        def build(is_one: ColumnElement[bool]) -> Select[Any]:
            ordered = of_keys.where(is_one).order_by(number).subquery("claim_locks")
            table = table_number(tx.connection, job_table.table)
            return select(func.pg_advisory_xact_lock(table, *ordered.columns))

        for _, locked in tx.by_key(ByKey(job_table.key, build), keys):
            locked.all()
        tx.refuse_autocommit("the locks on the keys would be gone before the rows change")
        yield

    def begin(self, connection: Connection) -> None:
        """Set the timeout after which the server ends a transaction whose worker has stopped."""
        name: ColumnElement[str] = literal_column(f"'{TIMEOUT}'")
        is_off = func.current_setting(name) == literal_column("'0'")
        limited = func.set_config(name, literal_column(f"'{LONGEST_IDLE}'"), literal_column("true"))
        connection.execute(select(case((is_off, limited))))
