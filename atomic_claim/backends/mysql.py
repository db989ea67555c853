"""MySQL and MariaDB."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
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

from atomic_claim.errors import ClaimError, UnsupportedDialect
from atomic_claim.inference import plain_type
from atomic_claim.job_table import JobTable
from atomic_claim.plan import LIMIT, Candidates, ClaimPlan, ClaimRequest
from atomic_claim.sql_elements import ByKey, DatabaseTime, RandomFraction, key_equals, key_in
from atomic_claim.statement import ClaimStatement

from .base import (
    Backend,
    Facts,
    Find,
    Key,
    KeyedRows,
    Mark,
    Transaction,
    chunks,
    hinted,
    mark_and_load,
    marking_by_key,
    reading_by_key,
    refuse_autocommit,
    require,
)
from .by_key import VIEW, keyed_statements
from .drivers import code_of
from .named_lock import NEEDS_OWN, end_session, named_lock, read_committed

NAMES = ("mysql", "mariadb")
# https://dev.mysql.com/doc/mysql-errors/8.4/en/server-error-reference.html:
# ER_CHECKREAD, ER_LOCK_WAIT_TIMEOUT, ER_LOCK_DEADLOCK, ER_TRANSACTION_ROLLBACK_DURING_COMMIT.
CONFLICTS = frozenset({1020, 1205, 1213, 3101})
# ER_ERROR_DURING_COMMIT, a conflict if InnoDB's own error is 149 (HA_ERR_LOCK_DEADLOCK).
ERROR_DURING_COMMIT = 1180
# ER_LOCK_NOWAIT of MySQL; MariaDB says ER_LOCK_WAIT_TIMEOUT.
HELD = frozenset({1205, 3572})
# Optimisers give up on ranges of very many keys and read the whole index instead.
CHUNK = 1000
# So many candidates more than are wanted are read, and tried in one statement if the order allows.
WINDOW = 16
# So often a claim that must not skip looks for the very rows that others hold.
PATIENCE = 8
# For more keys than fit its memory (8 MB), MySQL's optimiser reads the whole table, and locks it.
MOST_READ = 10_000


# A proxy may have given the process to another client since.
PROCESS = text("SELECT id FROM information_schema.processlist WHERE id = :id AND time >= :since")

SERIALIZABLE = (
    "the transaction is SERIALIZABLE, where InnoDB's plain reads wait for the rows that other "
    'workers hold: use isolation_level="READ COMMITTED" or "REPEATABLE READ", at which a claim is '
    "as safe"
)
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
    # A hint for "mysql" renders nothing for mariadb://, so both names are said.
    hints = dict.fromkeys(NAMES, "FORCE INDEX (PRIMARY)")
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

    def claim(self, tx: Transaction, plan: ClaimPlan, params: dict[str, Any]) -> KeyedRows:
        return self.claim_by_steps(tx, plan, params, mark_and_load)

    def claim_by_steps(
        self, tx: Transaction, plan: ClaimPlan, params: dict[str, Any], mark: Mark
    ) -> KeyedRows:
        return mark(tx, plan, self.lock(tx, plan, params), params)

    def key_lock(self, connection: Connection, table: Table) -> AbstractContextManager[None]:
        _check_engine(connection, table, view=VIEW)
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
        _check_engine(tx.connection, plan.job_table.table)
        return _Search(self, tx, self._prepared(plan, tx), params[LIMIT]).keys()

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
        marked = (plan.prepare(marking_by_key, self), plan.prepare(reading_by_key, self))
        lock = plan.prepare(MySQLStatements, self).lock
        return (plan.candidates.select(), lock, *marked)

    def _prepared(self, plan: ClaimPlan, tx: Transaction) -> MySQLStatements:
        mariadb: bool = tx.dialect.is_mariadb  # type: ignore[attr-defined]
        return plan.prepare(MariaDBStatements if mariadb else MySQLStatements, self)

    def change(
        self,
        tx: Transaction,
        keys: Sequence[Key],
        changes: Sequence[ByKey],
        params: Mapping[str, Any] | None = None,
    ) -> list[Key]:
        """No RETURNING here: what the guard holds for is locked and read, then written."""
        changed: list[Key] = []
        hold, write = changes
        for chunk in chunks(keys, CHUNK):
            found = list(map(tuple, tx.execute(*hold.of(chunk, params))))
            refuse_autocommit(self, tx, "the row locks would be gone before the rows are changed")
            if found:
                tx.execute(*write.of(found))
            changed += found
        return changed

    def extend(
        self,
        tx: Transaction,
        job_table: JobTable,
        keys: Sequence[Key],
        changes: Sequence[ByKey],
        params: Mapping[str, Any] | None = None,
    ) -> list[Key]:
        """Under the lock of exclusive keys, no extension waits long for its rows."""
        waiting = nullcontext() if job_table.exclusive_by is None else self.limit_wait(tx, 1)
        with waiting:
            return self.change(tx, keys, changes, params)

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
        code = self.code(error)
        return code in CONFLICTS or (code == ERROR_DURING_COMMIT and "149" in str(error.orig))

    def code(self, error: DBAPIError) -> int | None:
        """Return the server's error number, or None if there is none."""
        found: int | None = code_of(error, int)
        return found


checked: WeakKeyDictionary[Dialect, set[tuple[str | None, ...]]] = WeakKeyDictionary()
"""The tables that are known to be InnoDB's, by the dialect of their database."""


ENGINE = text(
    "SELECT table_type, engine FROM information_schema.tables "
    "WHERE table_schema = coalesce(:schema, database()) AND table_name = :name"
)


def _check_engine(connection: Connection, table: Table, *, view: str | None = None) -> None:
    """Refuse a table that has no row locks; asked once for each dialect object of SQLAlchemy's.

    ``view`` is the reason to refuse a view, if there is one.
    """
    schema = connection.schema_for_object(table)
    known = checked.setdefault(connection.dialect, set())
    if (schema, table.name, view) in known:
        return
    asked = {"schema": schema, "name": table.name}
    # Temporary tables are not listed; no other session reads them.
    kind, engine = connection.execute(ENGINE, asked).one_or_none() or (None, None)
    if view is not None and kind == "VIEW":
        raise ClaimError(view.format(table.fullname))
    if engine is not None and engine.lower() != "innodb":
        raise ClaimError(
            f"the storage engine of {table.fullname!r} is {engine}, which has no row locks that "
            "a claim could rest on: two workers would get the same rows; convert it with "
            f"ALTER TABLE {table.fullname} ENGINE=InnoDB"
        )
    known.add((schema, table.name, view))


def _set_session(tx: Transaction, settings: Mapping[str, int]) -> None:
    assignments = ", ".join(f"{name} = {value}" for name, value in settings.items())
    tx.connection.execute(text(f"SET SESSION {assignments}"))


def _reads_row(job_table: JobTable) -> ColumnElement[bool]:
    """Build an always-true condition that is evaluated on the row, not on an index of the key."""
    for column in job_table.table.columns:
        if not column.primary_key:
            return func.coalesce(func.length(column), 0) >= 0
    return true()


class MySQLStatements:
    """The statements of the sequence, built once per plan."""

    LEVEL = "@@transaction_isolation"
    # MariaDB's NOWAIT fails with the error after which this rolls everything back.
    ROLLS_BACK = "0"

    def __init__(self, plan: ClaimPlan, backend: MySQL) -> None:
        self.plan = plan
        self.asks_zone = bool(backend.naive_columns(plan.job_table))
        self.table = plan.job_table.table
        self.key = plan.job_table.key
        # What has to be known of the session comes with the candidates, for no further round trip.
        self.session: list[ColumnElement[Any]] = [
            literal_column(self.LEVEL, String()),
            literal_column(self.ROLLS_BACK, Integer()),
        ]
        if self.asks_zone:
            self.session.append(SKEW)
        self.asking = select(*self.session)
        self.candidates = plan.candidates.select().add_columns(*self.session)
        self.latest = [
            plan.candidates.only_keys(branch).with_for_update(skip_locked=True, of=self.lock_of)
            for branch in plan.candidates.branches
        ]

        # Locks those of the rows that are still free and that nobody holds.
        self.lock = self._by_key(self._locking(skip_locked=True).where(*plan.conditions))
        # The same, but only the first ones in the order of the key.
        self.lock_first = self._by_key(
            self._locking(skip_locked=True)
            .where(*plan.conditions)
            .order_by(*plan.key_attributes)
            .limit(bindparam(LIMIT, 1, Integer(), literal_execute=True))
        )
        # Locks those of the rows that nobody holds, and tells whether they are still free. This
        # is also what makes it read by key: a SELECT of nothing but the key is covered by the
        # index, and then scans all of it, forced or not.
        free = and_(*plan.conditions)
        self.lock_all = self._by_key(self._locking(skip_locked=True).add_columns(free))
        # The same, or it fails if somebody holds one of the rows.
        self.lock_unless_held = self._by_key(self._locking(nowait=True).add_columns(free))

    @property
    def lock_of(self) -> Any:
        """The table whose rows are locked, where a mapped class has several."""
        return self.table if self.plan.multi_table else None

    def _locking(self, **how: bool) -> Select[Any]:
        source = self.plan.source(*self.plan.key_attributes)
        if self.plan.multi_table:
            # Else the subclass's table may come first, and MariaDB locks every row of it.
            source = source.prefix_with("STRAIGHT_JOIN")
        return source.with_for_update(of=self.lock_of, **how)

    def _by_key(self, statement: Select[Any]) -> ByKey:
        return ByKey(self.key, hinted(statement, self.table, MySQL.hints).where)


class MariaDBStatements(MySQLStatements):
    """The same statements, with MariaDB's names of the session's variables."""

    LEVEL = "@@tx_isolation"
    ROLLS_BACK = "@@innodb_rollback_on_timeout"


class _Search:
    """One search for rows to claim; all that it finds, it has locked."""

    def __init__(
        self, backend: MySQL, tx: Transaction, statements: MySQLStatements, limit: int
    ) -> None:
        self.backend = backend
        self.tx = tx
        self.statements = statements
        self.limit = limit
        self.repeatable = False
        self.may_fail = False
        self.stale = False
        self.taken: set[Key] = set()
        self.tried: set[Key] = set()
        self.patience = PATIENCE
        self.aside: list[list[Key]] = []

    def keys(self) -> list[Key]:
        """Up to ``limit`` free rows that nobody else holds, in claim order."""
        seen: list[Key] = []
        # A few more than are wanted, since others may hold the first ones.
        scan_limit = self.limit + WINDOW
        while len(self.taken) < self.limit:
            seen = self._read_candidates(scan_limit)
            fresh = [key for key in seen if key not in self.tried]
            while fresh and len(self.taken) < self.limit:
                self._lock(fresh)
                fresh = [key for key in fresh if key not in self.tried]
            if len(seen) < scan_limit:
                break
            # Others hold the head of the queue; all that is read again is keys.
            scan_limit = 4 * scan_limit + 16
        self._take_from_aside()
        # Rows that we only locked are still free in our own reads, so the last one has them all.
        found = [key for key in seen if key in self.taken]
        if len(found) < self.limit and self.repeatable and not self.tx.own:
            newer = [key for key in self._read_latest() if key not in self.taken]
            found += newer[: self.limit - len(found)]
        return found

    def _take_from_aside(self) -> None:
        """Lock what was passed over, which is all that is left."""
        self.patience = sys.maxsize
        while self.aside and len(self.taken) < self.limit:
            wanted = self.limit - len(self.taken)
            keys, *self.aside = self.aside
            if keys[wanted:]:
                self.aside.insert(0, keys[wanted:])
            self._lock_without_gaps(keys[:wanted])

    def _read_candidates(self, scan_limit: int) -> list[Key]:
        try:
            rows = self.tx.tuples(self.statements.candidates, ClaimRequest(scan_limit).parameters())
        except DBAPIError as error:
            if self.backend.is_conflict(error) and self._ask()[0] == "SERIALIZABLE":
                raise ClaimError(SERIALIZABLE) from error
            raise
        why = "the row locks would be gone before the rows are marked"
        refuse_autocommit(self.backend, self.tx, why)
        if not rows and self.tx.own and not self.statements.asks_zone:
            return []
        width = len(self.statements.key)
        self._learn(rows[0][width:] if rows else self._ask())
        return [row[:width] for row in rows]

    def _learn(self, said: Sequence[Any]) -> None:
        """Take in what the session says of itself, and refuse what a claim cannot rest on."""
        if said[0] == "SERIALIZABLE":
            raise ClaimError(SERIALIZABLE)
        if said[2:] and said[2]:
            self.backend.refuse_skew(self.statements.plan.job_table, said[2])
        self.repeatable = said[0] == "REPEATABLE-READ"
        self.may_fail = not said[1]

    def _ask(self) -> Sequence[Any]:
        [said] = self.tx.tuples(self.statements.asking)
        return said

    def _lock(self, fresh: list[Key]) -> None:
        """Lock the first of the candidates, as many as are still wanted."""
        wanted = self.limit - len(self.taken)
        if self.repeatable and not self.tx.own:
            self.tried.update(keys := fresh[: min(wanted, CHUNK)])
            if self.may_fail:
                self._lock_without_gaps(keys)
            else:
                self._sort_out(self.tx.rows(*self.statements.lock_all.of(keys)))
            return
        # READ COMMITTED lets go at once of what does not meet the WHERE; ours is over soon.
        window = fresh[: min(wanted + WINDOW, CHUNK)]
        if _ascends(window):
            lock = self.statements.lock_first.of(window, {LIMIT: wanted})
        else:
            window = window[:wanted]
            lock = self.statements.lock.of(window)
        found = self.tx.tuples(*lock)
        self.taken.update(found)
        # What comes behind the last row that was wanted has not been looked at.
        enough = len(found) == wanted
        self.tried.update(window[: window.index(found[-1]) + 1] if enough else window)

    def _lock_without_gaps(self, keys: list[Key]) -> None:
        """Lock in a REPEATABLE READ transaction that may go on for long.

        There SKIP LOCKED locks the gap behind a row that it skips: behind the table's last row,
        no producer could insert until the transaction ends. NOWAIT fails and locks no gap; what
        it had locked before, it takes in the next try. So the rows that are held are found by
        halving, and after some failures passed over together with their neighbours.
        """
        if self._lock_unless_held(keys):
            return
        self.patience -= 1
        if len(keys) == 1:
            return
        if self.patience < 0 and _are_numbers(keys):
            self._lock_up_to_the_held(sorted(keys))
            return
        middle = len(keys) // 2
        self._lock_without_gaps(keys[:middle])
        self._lock_without_gaps(keys[middle:])

    def _lock_up_to_the_held(self, keys: list[Key]) -> None:
        """Of rows in the key's order, some of them held, lock those before the first that is.

        The ones behind it are put aside; no failure has locked any of them.
        """
        ahead = 1
        while keys:
            if self._lock_unless_held(keys[:ahead]):
                keys = keys[ahead:]
            else:
                if keys[ahead:]:
                    self.aside.append(keys[ahead:])
                keys = keys[:ahead] if ahead > 1 else []
            ahead = max(1, len(keys) // 2)

    def _lock_unless_held(self, keys: list[Key]) -> bool:
        try:
            rows = self.tx.rows(*self.statements.lock_unless_held.of(keys))
        except DBAPIError as error:
            if self.backend.code(error) not in HELD:
                raise
            return False
        self._sort_out(rows)
        return True

    def _sort_out(self, rows: Iterable[Any]) -> None:
        for row in rows:
            if row[-1]:
                self.taken.add(tuple(row)[:-1])
            else:
                self.stale = True

    def _read_latest(self) -> list[Key]:
        """Rows newer than the snapshot that the caller's REPEATABLE READ transaction reads from.

        Only a locking read sees them, and it locks what it scans; so it is made only when
        candidates turned out to be claimed or gone, which shows that the snapshot is old.
        """
        if not self.stale and not self._some_are_gone():
            return []
        return [
            tuple(row)
            for latest in self.statements.latest
            for row in self.tx.rows(latest, ClaimRequest(self.limit).parameters())
        ]

    def _some_are_gone(self) -> bool:
        left = list(self.tried - self.taken)
        if not left or not self.may_fail:
            return False
        try:
            found = [
                row
                for chunk in chunks(left, CHUNK)
                for row in self.tx.rows(*self.statements.lock_unless_held.of(chunk))
            ]
        except DBAPIError as error:
            if self.backend.code(error) not in HELD:
                raise
            return False
        return len(found) < len(left)


def _ascends(keys: Sequence[Key]) -> bool:
    """Check whether claim order is also the order of the keys in the database."""
    return _are_numbers(keys) and list(keys) == sorted(keys)


def _are_numbers(keys: Sequence[Key]) -> bool:
    """Check whether all keys are single integers, which compare alike in Python and SQL."""
    return all(len(key) == 1 and isinstance(key[0], int) for key in keys)


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


@compiles(RandomFraction, *NAMES)
def _random(_: RandomFraction, __: SQLCompiler, **___: Any) -> str:
    return "rand()"


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
