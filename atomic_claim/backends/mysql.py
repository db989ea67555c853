"""MySQL and MariaDB."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import filterfalse
from operator import itemgetter
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

from sqlalchemy import (
    ColumnElement,
    Connection,
    Dialect,
    Select,
    Table,
    and_,
    bindparam,
    func,
    literal_column,
    select,
    text,
    true,
    update,
)
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.types import TIMESTAMP, DateTime, Integer, String

from atomic_claim.candidates import Candidates
from atomic_claim.errors import ClaimError, UnsupportedDialect
from atomic_claim.inference import plain_type
from atomic_claim.job_table import JobTable
from atomic_claim.plan import LIMIT, ClaimPlan, ClaimRequest
from atomic_claim.sql_elements import ByKey, DatabaseTime, key_equals, key_in
from atomic_claim.statement import ClaimStatement

from .base import (
    CHUNK,
    Backend,
    Facts,
    Find,
    Key,
    Transaction,
    hinted,
    marked_by_key,
    require,
)
from .by_key import keyed_statements, refuse_view
from .drivers import code_of
from .named_lock import NEEDS_OWN, end_session, named_lock, read_committed

NAMES = ("mysql", "mariadb")
# A hint for "mysql" renders nothing for mariadb://, so both names are said.
HINTS = dict.fromkeys(NAMES, "FORCE INDEX (PRIMARY)")
# https://dev.mysql.com/doc/mysql-errors/8.4/en/server-error-reference.html:
# ER_CHECKREAD, ER_LOCK_WAIT_TIMEOUT, ER_LOCK_DEADLOCK, ER_TRANSACTION_ROLLBACK_DURING_COMMIT.
CONFLICTS = frozenset({1020, 1205, 1213, 3101})
# ER_ERROR_DURING_COMMIT, a conflict if InnoDB's own error is 149 (HA_ERR_LOCK_DEADLOCK).
ERROR_DURING_COMMIT = 1180
# ER_LOCK_NOWAIT of MySQL; MariaDB says ER_LOCK_WAIT_TIMEOUT.
HELD = frozenset({1205, 3572})
# Candidates beyond those that are wanted, which are tried in one statement if the order allows.
WINDOW = 16
# How many locks of a claim that must not skip rows may fail before it puts rows aside.
PATIENCE = 8
# For more keys than fit its memory (8 MB), MySQL's optimiser reads the whole table, and locks it.
MOST_READ = 10_000


# A proxy may have given the process to another client since.
PROCESS = text("SELECT id FROM information_schema.processlist WHERE id = :id AND time >= :since")

SERIALIZABLE = "SERIALIZABLE"
PLAIN_READS_WAIT = (
    "the transaction is SERIALIZABLE, where InnoDB's plain reads wait for the rows that other "
    'workers hold: use isolation_level="READ COMMITTED" or "REPEATABLE READ", at which a claim is '
    "as safe"
)
# What has to be known of a session: its isolation level; and whether the error with which NOWAIT
# fails rolls back all of the transaction, which MySQL's does not.
MYSQL_SESSION = ("@@transaction_isolation", "0")
MARIADB_SESSION = ("@@tx_isolation", "@@innodb_rollback_on_timeout")
# Seconds by which the session's zone is ahead of UTC.
SKEW = func.timestampdiff(text("SECOND"), func.utc_timestamp(), func.now()).label("skew")


class MySQL(Backend):
    """One transaction, in which exactly the rows that are claimed are locked.

    .. code-block:: sql

        SELECT jobs.id FROM jobs WHERE <free and due> ORDER BY jobs.created_at LIMIT 10;
        SELECT jobs.id FROM jobs FORCE INDEX (PRIMARY)
            WHERE jobs.id IN (...) AND <free and due> FOR UPDATE SKIP LOCKED;
        UPDATE jobs FORCE INDEX (PRIMARY) SET processing = true WHERE jobs.id IN (...);
        SELECT ... FROM jobs FORCE INDEX (PRIMARY) WHERE jobs.id IN (...)

    InnoDB locks every index record that a locking statement scans, not only those it returns
    (manual, "Locks Set by Different SQL Statements in InnoDB"), so an ordered locking read hides
    the whole queue from other workers. The candidates are read without locks, and of those that
    others hold the next ones are tried.
    """

    names = NAMES
    hints = HINTS
    ending = "KILL {}"
    has_returning = False
    walks_keys = False
    keyed_needs_own = NEEDS_OWN

    def check(self, dialect: Dialect) -> None:
        if getattr(dialect, "is_mariadb", False):
            # Behind some servers' own version stands what they tell old clients: 5.5.5-10.11.6.
            require(dialect, "MariaDB", (10, 6), "SKIP LOCKED", prefix=(5, 5, 5))
        else:
            require(dialect, "MySQL", (8, 0, 1), "SKIP LOCKED")

    def is_single(self, plan: ClaimPlan) -> bool:
        return False

    def key_lock(self, connection: Connection, table: Table) -> AbstractContextManager[None]:
        _check_engine(connection, table)
        refuse_view(connection, table)
        return named_lock(connection, table)

    def begin_keyed(self, connection: Connection) -> None:
        read_committed(connection)

    def key_session(self, job_table: JobTable) -> Sequence[ColumnElement[Any]]:
        return (SKEW,) if self.naive_columns(job_table) else ()

    def check_key_session(self, job_table: JobTable, found: Sequence[Any]) -> None:
        if any(found):
            self.refuse_skew(job_table, *found)

    def lock(
        self, tx: Transaction, plan: ClaimPlan, params: dict[str, Any], *, deletes: bool = False
    ) -> list[Key]:
        dialect, table, limit = tx.connection.dialect, plan.job_table.table, params[LIMIT]
        if (tx.connection.schema_for_object(table), table.name) not in checked.get(dialect, ()):
            _check_engine(tx.connection, table)
        is_mariadb: bool = dialect.is_mariadb  # type: ignore[attr-defined]
        statements = plan.prepare(InnoDBStatements, self, is_mariadb)
        search = Search(tx, statements, limit)
        width = len(plan.job_table.key)
        key_of = itemgetter(slice(width))
        tried: set[Key] = set()
        # A few more than are wanted, since others may hold the first ones.
        scan_limit = limit + WINDOW
        while True:
            rows, level = self._candidates(search, plan, scan_limit)
            seen = list(map(key_of, rows))
            fresh = list(filterfalse(tried.__contains__, seen))
            tried.update(fresh)
            # In a transaction of the call's own, the gaps are locked for a moment.
            is_brief = tx.own or level != "REPEATABLE-READ"
            lock = search.lock_free if is_brief else search.lock_without_gaps
            while fresh and len(search.taken) < limit:
                del fresh[: lock(fresh, width == 1 and isinstance(fresh[0][0], int))]
            if len(search.taken) == limit or len(rows) < scan_limit:
                break
            # Others hold the head of the queue; all that is read again is keys.
            scan_limit = 4 * scan_limit + WINDOW
        if search.aside:
            search.lock_aside()
        # Rows that were only locked are still free in this transaction's own reads.
        found = list(filter(search.taken.__contains__, seen))
        if search.is_stale and len(found) < limit:
            found += search.lock_latest()[: limit - len(found)]
        return found

    def _candidates(
        self, search: Search, plan: ClaimPlan, scan_limit: int
    ) -> tuple[Sequence[Any], str | None]:
        """Read the first keys in claim order, and the isolation level if that matters.

        Raises:
            ClaimError: the session's settings do not allow a claim.
        """
        tx, statements = search.tx, search.statements
        try:
            rows = tx.execute(statements.candidates, ClaimRequest(scan_limit).parameters()).all()
        except DBAPIError as error:
            if not self.is_conflict(error):
                raise
            if tx.execute(statements.session).one()[0] == SERIALIZABLE:
                raise ClaimError(PLAIN_READS_WAIT) from error
            raise
        tx.refuse_autocommit("the row locks would be gone before the rows are marked")
        if not rows and tx.own and not statements.asks_zone:
            return rows, None
        session = rows[0][len(plan.job_table.key) :] if rows else tx.tuples(statements.session)[0]
        level, rolls_back, *skew = session
        if level == SERIALIZABLE:
            raise ClaimError(PLAIN_READS_WAIT)
        if any(skew):
            self.refuse_skew(plan.job_table, *skew)
        search.may_fail = not rolls_back
        return rows, level

    def lock_read(self, tx: Transaction, find: Find) -> Select[Any]:
        """Lock the keys by a claim's search, and return the SELECT restricted to these keys.

        The SELECT then sees the latest rows, whatever the transaction's snapshot.
        """
        asked = find.statement.params(dict(find.params)) if find.params else find.statement
        limit = bindparam(LIMIT, 1, Integer(), literal_execute=True)
        branch = asked.with_only_columns(*find.key).limit(limit).offset(None)
        plan = ClaimPlan(
            job_table=find.job_table,
            candidates=Candidates((branch,), (), limit, limit, branch),
            conditions=find.conditions or (_reads_row(find.job_table),),
            order=(),
            values={},
            entities=False,
            single=False,
            marks=(),
        )
        keys = self.lock(
            tx, plan, ClaimRequest(min(find.limit or MOST_READ, MOST_READ)).parameters()
        )
        found = find.statement.limit(None).offset(None).where(key_in(find.key, keys))
        if find.alone:
            return hinted(found, find.place, self.hints).with_for_update()
        # MariaDB has no OF, and without it the rows of the other tables would be locked too.
        of_known = not tx.connection.dialect.is_mariadb  # type: ignore[attr-defined]
        return found.with_for_update(of=find.place) if of_known else found

    def statements(self, plan: ClaimPlan) -> Sequence[Executable | ByKey]:
        """Return the claim's statements, with no session variables in the candidates' SELECT."""
        if plan.job_table.exclusive_by is not None:
            return keyed_statements(self, plan)
        lock = plan.prepare(InnoDBStatements, self, False).lock
        return (plan.candidates.select(), lock, *marked_by_key(plan, self))

    def extend(
        self, tx: Transaction, job_table: JobTable, keys: Sequence[Key], changes: Sequence[ByKey]
    ) -> list[Key]:
        """Under the lock of exclusive keys, no extension waits long for its rows."""
        waiting = nullcontext() if job_table.exclusive_by is None else self.limit_wait(tx, 1)
        with waiting:
            return self.change(tx, keys, changes)

    def changes(
        self, job_table: JobTable, guard: ColumnElement[bool], values: Mapping[Any, Any]
    ) -> Sequence[ByKey]:
        key, table = job_table.key, job_table.table
        held = hinted(select(*key), table, self.hints).with_for_update()
        writing = hinted(update(table).values(dict(values)), table, self.hints)
        return ByKey(key, lambda is_one: held.where(is_one, guard)), ByKey(key, writing.where)

    @contextmanager
    def limit_wait(self, tx: Transaction, seconds: float) -> Iterator[None]:
        """In whole seconds, for rows and for tables (``ALTER TABLE`` holds a metadata lock)."""
        names = ("innodb_lock_wait_timeout", "lock_wait_timeout")
        before = tx.connection.execute(select(*(text(f"@@{name}") for name in names))).one()
        try:
            _set_session(tx, dict.fromkeys(names, max(1, round(seconds))))
            yield
        except BaseException:
            # No session goes back to a pool with the short wait.
            if tx.own:
                end_session(tx.connection)
            else:
                with suppress(SQLAlchemyError):
                    _set_session(tx, dict(zip(names, before, strict=True)))
            raise
        _set_session(tx, dict(zip(names, before, strict=True)))

    def facts(self, connection: Connection) -> Facts:
        return Facts((connection.scalar(select(func.connection_id())),))

    def asks_to_end(self, connection: Connection, process: Any, seconds: float) -> bool:
        asked = {"id": process[0], "since": int(seconds)}
        if connection.execute(PROCESS, asked).first() is None:
            return False
        with suppress(DBAPIError):  # It may have ended since.
            connection.execute(text(self.ending.format(process[0])))
        return True

    def is_naive(self, type_: DateTime) -> bool:
        """DATETIME has no zone, whatever was asked for; TIMESTAMP is a point in time."""
        return not isinstance(type_, TIMESTAMP)

    def refuse_skew(self, job_table: JobTable, seconds: Any) -> NoReturn:
        """Refuse naive times in a session that is ahead of UTC by these seconds."""
        self.refuse_naive(job_table, f"{int(seconds) / 3600:+g} h from UTC")

    def is_conflict(self, error: DBAPIError) -> bool:
        code = code_of(error, int)
        return code in CONFLICTS or (code == ERROR_DURING_COMMIT and "149" in str(error.orig))


checked: WeakKeyDictionary[Dialect, set[tuple[str | None, str]]] = WeakKeyDictionary()
"""The schema and name of tables that are known to be InnoDB's, by the dialect of their database."""
ENGINE = text(
    "SELECT engine FROM information_schema.tables "
    "WHERE table_schema = coalesce(:schema, database()) AND table_name = :name"
)


def _check_engine(connection: Connection, table: Table) -> None:
    """Refuse a table that has no row locks."""
    schema = connection.schema_for_object(table)
    # Temporary tables are not listed; no other session reads them.
    engine = connection.scalar(ENGINE, {"schema": schema, "name": table.name})
    if engine is not None and engine.lower() != "innodb":
        raise ClaimError(
            f"the storage engine of {table.fullname!r} is {engine}, which has no row locks that "
            "a claim could rest on: two workers would get the same rows; convert it with "
            f"ALTER TABLE {table.fullname} ENGINE=InnoDB"
        )
    checked.setdefault(connection.dialect, set()).add((schema, table.name))


def _set_session(tx: Transaction, settings: Mapping[str, int]) -> None:
    assignments = ", ".join(f"{name} = {value}" for name, value in settings.items())
    tx.connection.execute(text(f"SET SESSION {assignments}"))


def _reads_row(job_table: JobTable) -> ColumnElement[bool]:
    """Build an always-true condition that is evaluated on the row, not on an index of the key."""
    for column in job_table.table.columns:
        if not column.primary_key:
            return func.coalesce(func.length(column), 0) >= 0
    return true()


class InnoDBStatements:
    """The statements of a search for rows to claim, built once per plan.

    Attributes:
        candidates: reads keys in claim order, and what has to be known of the session.
        session: reads the latter alone.
        asks_zone: whether that includes the session's time zone.
        lock: locks those of the rows that are free and not locked.
        lock_first: the same, but only the first ones in the order of the key.
        lock_all: locks those of the rows that are not locked, and returns whether they are free.
        lock_unless_held: the same, but fails if another transaction has locked one of them.
        latest: a locking read of the keys of each branch of the candidates.
    """

    def __init__(self, plan: ClaimPlan, backend: MySQL, is_mariadb: bool) -> None:
        table, key = plan.job_table.table, plan.job_table.key
        of = table if plan.multi_table else None
        source = plan.source(*plan.key_attributes)
        if plan.multi_table:
            # Else the subclass's table may come first, and MariaDB locks every row of it.
            source = source.prefix_with("STRAIGHT_JOIN")

        def by_key(statement: Select[Any], **how: bool) -> ByKey:
            return ByKey(key, hinted(statement.with_for_update(of=of, **how), table, HINTS).where)

        # What has to be known of the session comes with the candidates, for no further round trip.
        level, rolls_back = MARIADB_SESSION if is_mariadb else MYSQL_SESSION
        session: list[ColumnElement[Any]] = [literal_column(level, String())]
        session.append(literal_column(rolls_back, Integer()))
        self.asks_zone = bool(backend.naive_columns(plan.job_table))
        if self.asks_zone:
            session.append(SKEW)
        self.session = select(*session)
        self.candidates = plan.candidates.select().add_columns(*session)

        free = source.where(*plan.conditions)
        self.lock = by_key(free, skip_locked=True)
        limit = bindparam(LIMIT, 1, Integer(), literal_execute=True)
        first = free.order_by(*plan.key_attributes).limit(limit)
        self.lock_first = by_key(first, skip_locked=True)
        # That it returns whether a row is free is also what makes it read by key: a SELECT of
        # nothing but the key is covered by the index, and then scans all of it, forced or not.
        all_rows = source.add_columns(and_(*plan.conditions))
        self.lock_all = by_key(all_rows, skip_locked=True)
        self.lock_unless_held = by_key(all_rows, nowait=True)
        self.latest = [
            plan.candidates.only_keys(branch).with_for_update(skip_locked=True, of=of)
            for branch in plan.candidates.branches
        ]


@dataclass
class Search:
    """The rows that one search has locked.

    Attributes:
        tx: where it runs.
        statements: its statements.
        limit: how many rows are wanted.
        taken: the keys of the rows that are locked and free.
        may_fail: whether a lock that fails leaves the transaction as it was.
        patience: how many more locks may fail before rows are put aside.
        aside: rows in the order of their keys that are tried again at the end.
        is_stale: whether a candidate was claimed or gone, which shows that the snapshot is old.
    """

    tx: Transaction
    statements: InnoDBStatements
    limit: int
    taken: set[Key] = field(default_factory=set)
    may_fail: bool = False
    patience: int = PATIENCE
    aside: list[list[Key]] = field(default_factory=list)
    is_stale: bool = False

    def lock_free(self, fresh: list[Key], are_numbers: bool) -> int:
        """Lock the first of the candidates, and return how many were tried.

        READ COMMITTED lets go at once of what does not meet the WHERE; a transaction of the
        call's own is over soon.
        """
        wanted = self.limit - len(self.taken)
        window = fresh[: min(wanted + WINDOW, CHUNK)]
        if are_numbers and window == sorted(window):
            # The order of the claim is that of the keys, in Python and in SQL.
            lock = self.statements.lock_first.of(window, {LIMIT: wanted})
        else:
            window = window[:wanted]
            lock = self.statements.lock.of(window)
        self.taken.update(map(tuple, self.tx.execute(*lock)))
        return len(window)

    def lock_without_gaps(self, fresh: list[Key], are_numbers: bool) -> int:
        """Lock likewise in a REPEATABLE READ transaction that may go on for long.

        There SKIP LOCKED locks the gap behind a row that it skips: behind the table's last row,
        no producer could insert until the transaction ends. NOWAIT fails and locks no gap; what
        it had locked before, it takes in the next try. So the rows that are held are found by
        trying fewer, and after some failures the rows behind one are put aside, none locked.
        """
        keys = fresh[: min(self.limit - len(self.taken), CHUNK)]
        tried = ahead = len(keys)
        if are_numbers:
            keys.sort()
        lock = self.statements.lock_unless_held if self.may_fail else self.statements.lock_all
        while keys:
            part = keys[:ahead]
            try:
                rows = self.tx.execute(*lock.of(part)).all()
            except DBAPIError as error:
                if code_of(error, int) not in HELD:
                    raise
                self.patience -= 1
                if len(part) > 1:
                    ahead = len(part) // 2 if self.patience >= 0 else 1
                    continue
                del keys[0]
                if self.patience < 0 and are_numbers:
                    self.aside.append(keys)
                    break
                continue
            for row in rows:
                if row[-1]:
                    self.taken.add(row[:-1])
                else:
                    self.is_stale = True
            if self.may_fail and len(rows) < len(part):
                self.is_stale = True
            del keys[:ahead]
            ahead *= 2
        return tried

    def lock_aside(self) -> None:
        """Lock what was put aside, which is all that is left."""
        self.patience = sys.maxsize
        while self.aside and len(self.taken) < self.limit:
            keys = self.aside.pop(0)
            if rest := keys[self.lock_without_gaps(keys, True) :]:
                self.aside.insert(0, rest)

    def lock_latest(self) -> list[Key]:
        """Lock rows that are newer than the snapshot of the caller's transaction.

        Only a locking read sees them, and it locks what it scans, so this is done only where the
        snapshot has turned out to be old.
        """
        asked = ClaimRequest(self.limit).parameters()
        found = [key for each in self.statements.latest for key in self.tx.tuples(each, asked)]
        return [key for key in found if key not in self.taken]


@compiles(ClaimStatement, *NAMES)
def _claim(element: ClaimStatement, compiler: SQLCompiler, **kw: Any) -> str:
    MySQL().check(compiler.dialect)
    # Text asked for with compile() has no column keys; a statement about to be executed has.
    if compiler.column_keys is not None:
        raise UnsupportedDialect(
            f"one statement cannot return the rows it claims on {compiler.dialect.name}: use "
            "claim_jobs(bind, table, ...), which runs the sequence that can"
        )
    key = tuple(element.table.primary_key)
    claimable = element.candidates.select(
        lock=lambda branch: branch.with_for_update(skip_locked=True)
    ).subquery("claimable")
    claim = update(element.table).values(element.written)
    return compiler.visit_update(claim.where(key_equals(key, tuple(claimable.columns))), **kw)


@compiles(DatabaseTime, *NAMES)
def _now(element: DatabaseTime, compiler: SQLCompiler, **kw: Any) -> str:
    zoned = isinstance(plain_type(element.type), TIMESTAMP) or element.clock == "server"
    sql = "CURRENT_TIMESTAMP(6)" if zoned else "UTC_TIMESTAMP(6)"
    if element.offset is None:
        return sql
    microseconds = f"ROUND(({compiler.process(element.offset, **kw)}) * 1000000)"
    if element.floor and not getattr(plain_type(element.type), "fsp", None):
        # A column without digits of the second rounds what it is given.
        microseconds += " - 500000"
    return f"TIMESTAMPADD(MICROSECOND, {microseconds}, {sql})"
