"""PostgreSQL's locks of exclusive keys: an advisory lock each, until the transaction ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Connection,
    Date,
    Dialect,
    Integer,
    LargeBinary,
    Select,
    Text,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    select,
)
from sqlalchemy.dialects.postgresql import REGCLASS

from atomic_claim.errors import ClaimError, UnsupportedDialect
from atomic_claim.inference import plain_type
from atomic_claim.job_table import JobTable
from atomic_claim.sql_elements import ByKey

from .base import Candidate, KeyLocks, Transaction
from .reading import Key

SCHEMA = "atomic_claim_schema"
TABLE = "atomic_claim_table"
LEVELS = {"read committed", "read uncommitted"}
LEVEL = func.current_setting(literal_column("'transaction_isolation'")).label("level")
# A worker that stops between two statements of a claim would keep its keys until it goes on.
TIMEOUT = "idle_in_transaction_session_timeout"
LONGEST_IDLE = "5s"


def lock_number(job_table: JobTable, key: ColumnElement[Any]) -> ColumnElement[int]:
    """Return the number of a key's lock.

    Keys that differ in case alone share a number, as some do by chance: while one of them is
    locked, the other is passed over, which costs a claim some rows and nothing else.
    """
    type_ = plain_type(job_table.exclusive_by.type)
    text: ColumnElement[Any] = cast(key, Text())
    # What a cast to text makes of these depends on the session's settings.
    if isinstance(type_, Date):
        text = func.encode(func.date_send(key), literal_column("'hex'"))
    elif isinstance(type_, LargeBinary):
        text = func.encode(key, literal_column("'hex'"))
    return func.hashtext(func.lower(text))


def table_number(dialect: Dialect) -> ColumnElement[int]:
    """Return the number of the table in the locks of its keys: a partition has its root's.

    The table is the one that its name means in this session; see :func:`table_name`.
    """
    plan = (bindparam(name, None, Text()) for name in (SCHEMA, TABLE))
    quoted = (func.quote_ident(cast(part, Text())) for part in plan)
    table: ColumnElement[Any] = cast(func.concat_ws(literal_column("'.'"), *quoted), REGCLASS())
    # pg_partition_root() came with version 12, and knows only what is partitioned.
    if (dialect.server_version_info or (12,)) >= (12,):
        table = func.coalesce(func.pg_partition_root(table), table)
    return cast(table, Integer())


def table_name(connection: Connection, job_table: JobTable) -> dict[str, str | None]:
    """Return the parameters of :func:`table_number`."""
    table = job_table.table
    return {SCHEMA: connection.schema_for_object(table), TABLE: table.name}


def require_locks(dialect: Dialect) -> None:
    """Refuse databases whose advisory locks do nothing, such as CockroachDB's."""
    if dialect.name != "postgresql":
        raise UnsupportedDialect(
            f"exclusive_by needs advisory locks, and those of {dialect.name} are not known to "
            "hold: leave exclusive_by out"
        )


class AdvisoryLocks(KeyLocks):
    """An advisory lock for each key."""

    def session(self, job_table: JobTable) -> Sequence[ColumnElement[Any]]:
        return (LEVEL,)

    def check_session(self, job_table: JobTable, found: Sequence[Any]) -> None:
        """Refuse a transaction whose later statements do not see what was committed since."""
        if (level := found[0]) not in LEVELS:
            raise ClaimError(
                f"the transaction is {level.upper()}, where a look for running rows sees an old "
                'snapshot: exclusive_by needs isolation_level="READ COMMITTED"'
            )

    def number(self, job_table: JobTable, key: ColumnElement[Any]) -> ColumnElement[Any]:
        return lock_number(job_table, key)

    def lock(
        self, tx: Transaction, job_table: JobTable, candidates: Sequence[Candidate], wanted: int
    ) -> tuple[Sequence[Candidate], Sequence[Candidate]]:
        numbers = list(dict.fromkeys(each.lock for each in candidates if each.lock is not None))
        if not numbers:
            return candidates, ()
        given = func.unnest(bindparam("numbers", numbers, type_=ARRAY(Integer)))
        number: ColumnElement[int] = given.column_valued("claim_lock")
        table = table_number(tx.connection.dialect)
        locks = select(number).where(func.pg_try_advisory_xact_lock(table, number)).limit(wanted)
        named = table_name(tx.connection, job_table)
        ours = {row[0] for row in tx.connection.execute(locks, named)}
        tried = len(candidates)
        if len(ours) == wanted:
            tried = 1 + max(place for place, each in enumerate(candidates) if each.lock in ours)
        locked = [each for each in candidates[:tried] if each.lock is None or each.lock in ours]
        return locked, candidates[tried:]

    @contextmanager
    def held(self, tx: Transaction, job_table: JobTable, keys: Sequence[Key]) -> Iterator[None]:
        """Lock them in an order of their own, before the UPDATE reads the clock at its start."""
        column = job_table.exclusive_by
        number = lock_number(job_table, column).label("claim_lock")
        of_keys = select(number).where(column.is_not(None)).distinct()

        def build(is_one: ColumnElement[bool]) -> Select[Any]:
            ordered = of_keys.where(is_one).order_by(number).subquery("claim_locks")
            table = table_number(tx.connection.dialect)
            return select(func.pg_advisory_xact_lock(table, *ordered.columns))

        named = table_name(tx.connection, job_table)
        for _, locked in tx.by_key(ByKey(job_table.key, build), keys, named):
            locked.all()
        tx.refuse_autocommit("the locks on the keys would be gone before the rows change")
        yield

    def begin(self, connection: Connection) -> None:
        """Set the timeout after which the server ends a transaction whose worker has stopped."""
        name: ColumnElement[str] = literal_column(f"'{TIMEOUT}'")
        is_off = func.current_setting(name) == literal_column("'0'")
        limited = func.set_config(name, literal_column(f"'{LONGEST_IDLE}'"), literal_column("true"))
        connection.execute(select(case((is_off, limited))))
