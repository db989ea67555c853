"""PostgreSQL's locks of exclusive keys: an advisory lock each, until the transaction ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import REGCLASS, array

from atomic_claim.errors import ClaimError, UnsupportedDialect
from atomic_claim.job_table import JobTable
from atomic_claim.sql_elements import ByKey

from .base import KeyLocks, Transaction
from .reading import Candidate, Key, Tried

TABLE = "_atomic_claim_table"
LEVELS = {"read committed", "read uncommitted"}
LEVEL = sa.func.current_setting(sa.literal_column("'transaction_isolation'")).label("level")
# A worker that stops between two statements of a claim would keep its keys until it goes on.
TIMEOUT = "idle_in_transaction_session_timeout"
LONGEST_IDLE = "5s"


def table_number(connection: sa.Connection, table: sa.Table) -> sa.ColumnElement[int]:
    """Return the number of the table in the locks of its keys: a partition has its root's.

    The table is the one that its name means in this session.
    """
    # Not by SQLAlchemy's preparer, which doubles the percent signs of a statement's text.
    parts = [
        part.replace('"', '""')
        for part in (connection.schema_for_object(table), table.name)
        if part
    ]
    name = sa.bindparam(TABLE, ".".join(f'"{part}"' for part in parts), sa.Text())
    found: sa.ColumnElement[Any] = sa.cast(sa.cast(name, sa.Text()), REGCLASS())
    # pg_partition_root() came with version 12, and knows only what is partitioned.
    if (connection.dialect.server_version_info or (12,)) >= (12,):
        found = sa.func.coalesce(sa.func.pg_partition_root(found), found)
    return sa.cast(found, sa.Integer())


def require_locks(dialect: sa.Dialect) -> None:
    """Refuse databases whose advisory locks do nothing, such as CockroachDB's."""
    if dialect.name != "postgresql":
        raise UnsupportedDialect(
            f"exclusive_by needs advisory locks, and those of {dialect.name} are not known to "
            "hold: leave exclusive_by out"
        )


class AdvisoryLocks(KeyLocks):
    """An advisory lock for each key."""

    def check(self, tx: Transaction, job_table: JobTable) -> None:
        require_locks(tx.connection.dialect)
        super().check(tx, job_table)

    def number(self, key: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """Return the number of a key's lock.

        Keys that the database compares as equal share a number, as some others do by chance: while
        one of them is locked, the other is passed over, which costs a claim some rows and nothing
        else.
        """
        return sa.case((key.is_not(None), sa.func.hash_array(array([key]), type_=sa.Integer())))

    def lock(
        self, tx: Transaction, job_table: JobTable, candidates: Sequence[Candidate], wanted: int
    ) -> Tried:
        numbers = list(dict.fromkeys(each.lock for each in candidates if each.lock is not None))
        if not numbers:
            return candidates, ()
        given = sa.func.unnest(sa.bindparam("numbers", numbers, type_=sa.ARRAY(sa.Integer)))
        number: sa.ColumnElement[int] = given.column_valued("claim_lock")
        table = table_number(tx.connection, job_table.table)
        locks = sa.select(number, LEVEL).where(sa.func.pg_try_advisory_xact_lock(table, number))
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
        of_keys = sa.select(number).where(column.is_not(None)).distinct()

        def build(is_one: sa.ColumnElement[bool]) -> sa.Select[Any]:
            ordered = of_keys.where(is_one).order_by(number).subquery("claim_locks")
            table = table_number(tx.connection, job_table.table)
            return sa.select(sa.func.pg_advisory_xact_lock(table, *ordered.columns))

        for _, locked in tx.by_key(ByKey(job_table.key, build), keys):
            locked.all()
        tx.refuse_autocommit("the locks on the keys would be gone before the rows change")
        yield

    def begin(self, connection: sa.Connection) -> None:
        """Set the timeout after which the server ends a transaction whose worker has stopped."""
        name: sa.ColumnElement[str] = sa.literal_column(f"'{TIMEOUT}'")
        is_off = sa.func.current_setting(name) == sa.literal_column("'0'")
        limited = sa.func.set_config(
            name, sa.literal_column(f"'{LONGEST_IDLE}'"), sa.literal_column("true")
        )
        connection.execute(sa.select(sa.case((is_off, limited))))
