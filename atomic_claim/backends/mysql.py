"""MySQL and MariaDB."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import filterfalse, islice
from operator import itemgetter
from typing import Any, NoReturn

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.types import TIMESTAMP, DateTime, Integer

from atomic_claim.candidates import Candidates
from atomic_claim.errors import ClaimError
from atomic_claim.inference import plain_type
from atomic_claim.job_table import JobTable
from atomic_claim.plan import LIMIT, ClaimPlan, ClaimRequest
from atomic_claim.sql_elements import ByKey, DatabaseTime, key_equals, key_in
from atomic_claim.statement import ClaimStatement

from .base import Backend, Find, KeyLocks, Transaction, naive_columns, refuse_naive
from .by_key import statements_of
from .drivers import code_of
from .fair import FairSearch, in_one_claim
from .innodb import HINTS, NAMES, SKEW, InnoDBStatements, Search
from .named_lock import NEEDS_OWN, end, end_session, named_lock, read_committed
from .reading import Candidate, Key
from .tables import check_once, hinted

# https://dev.mysql.com/doc/mysql-errors/8.4/en/server-error-reference.html:
# ER_CHECKREAD, ER_LOCK_WAIT_TIMEOUT, ER_LOCK_DEADLOCK, ER_TRANSACTION_ROLLBACK_DURING_COMMIT.
CONFLICTS = frozenset({1020, 1205, 1213, 3101})
# ER_ERROR_DURING_COMMIT, a conflict if InnoDB's own error is 149 (HA_ERR_LOCK_DEADLOCK).
ERROR_DURING_COMMIT = 1180
# For more keys than fit its memory (8 MB), MySQL's optimiser reads the whole table, and locks it.
MOST_READ = 10_000

# Candidates read beyond those that are wanted: others may hold the first ones.
WINDOW = 16


SERIALIZABLE = "SERIALIZABLE"
PLAIN_READS_WAIT = (
    "the transaction is SERIALIZABLE, where InnoDB's plain reads wait for the rows that other "
    'workers hold: use isolation_level="READ COMMITTED" or "REPEATABLE READ", at which a claim is '
    "as safe"
)


class NamedLocks(KeyLocks):
    """A named lock of the table, around a transaction of the call's own."""

    needs_own = NEEDS_OWN

    def check(self, tx: Transaction, job_table: JobTable) -> None:
        super().check(tx, job_table)
        check_once(tx.connection, job_table.table, _check_table)
        naive = naive_columns(job_table, tx.backend)
        if naive and (skew := tx.connection.scalar(sa.select(SKEW))):
            _refuse_skew(job_table, tx.backend, skew)

    def lock_table(self, tx: Transaction, job_table: JobTable) -> None:
        if tx.outlasting is not None:
            tx.outlasting.enter_context(named_lock(tx.connection, job_table.table))
            tx.outlasting = None

    def held(
        self, tx: Transaction, job_table: JobTable, keys: Sequence[Key]
    ) -> AbstractContextManager[None]:
        """Wait for no row for long, while other claims wait for the lock of the keys."""
        return tx.backend.limit_wait(tx, 1)

    def begin(self, connection: sa.Connection) -> None:
        read_committed(connection)


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
    required = {  # noqa: RUF012
        "mysql": ("MySQL", (8, 0, 1), "SKIP LOCKED"),
        "mariadb": ("MariaDB", (10, 6), "SKIP LOCKED"),
    }
    conflicts = CONFLICTS
    random = "rand()"
    hints = HINTS
    ending = "KILL {}"
    has_returning = False
    walks_keys = False
    key_locks = NamedLocks()

    def lock(self, tx: Transaction, plan: ClaimPlan, params: dict[str, Any]) -> list[Key]:
        limit = params[LIMIT]
        check_once(tx.connection, plan.job_table.table, _check_table)
        is_mariadb: bool = tx.connection.dialect.is_mariadb  # type: ignore[attr-defined]
        statements = plan.prepare(InnoDBStatements, self, is_mariadb)
        search = Search(tx, statements, limit)
        width = len(plan.job_table.key)
        key_of = itemgetter(slice(width))
        alone, tried = set[Key](), set[Key]()
        # A few more than are wanted, since others may hold the first ones.
        scan_limit, turn, read = limit + WINDOW, None, list[Candidate]()
        if plan.job_table.fair_by is not None:
            # A row costs a probe.
            scan_limit, turn = limit, plan.prepare(FairSearch, self).turn(tx, limit)
        while True:
            rows, may_lock_gaps = self._candidates(search, plan, scan_limit, read, turn)
            seen = list(map(key_of, rows))
            if statements.tells_alone:
                alone.update(key_of(row) for row in rows if row[width])
            fresh = list(filterfalse(tried.__contains__, seen))
            tried.update(fresh)
            lock = search.lock_free if may_lock_gaps else search.lock_without_gaps
            for part in in_one_claim(fresh, alone.__contains__) if alone else [fresh]:
                if alone and search.taken and (part[0] in alone or search.taken & alone):
                    continue
                while part and len(search.taken) < limit:
                    del part[: lock(part, width == 1 and isinstance(part[0][0], int))]
            is_full = len(search.taken) == limit or bool(search.taken & alone)
            is_cut = len(rows) == scan_limit
            if is_full or not (is_cut or (turn is None and search.goes_farther())):
                break
            # Others hold the head of the queue; all that is read again is keys.
            if is_cut:
                scan_limit += limit if turn is not None else 3 * scan_limit + WINDOW
        if search.aside:
            search.lock_aside()
        # Rows that were only locked are still free in this transaction's own reads.
        found = list(filter(search.taken.__contains__, seen))
        if turn is not None:
            taken = [each for each in read if each.row in search.taken]
            plan.prepare(FairSearch, self).remember(tx, taken)
        if search.is_stale and not is_full:
            found += search.lock_latest()[: limit - len(found)]
        return found

    def _candidates(
        self,
        search: Search,
        plan: ClaimPlan,
        scan_limit: int,
        read: list[Candidate],
        turn: Iterator[Candidate] | None,
    ) -> tuple[Sequence[Any], bool]:
        """Read the first keys in claim order, and tell whether gaps may be locked.

        Raises:
            ClaimError: the session's settings do not allow a claim.
        """
        tx, statements = search.tx, search.statements
        rows: Sequence[Any]
        try:
            if turn is None:
                asked = ClaimRequest(scan_limit).parameters()
                rows = tx.execute(statements.candidates[search.step], asked).all()
                if rows and rows[0][statements.width - 1]:
                    # They would be too many to sort.
                    search.step += 1
                    rows = tx.execute(statements.candidates[search.step], asked).all()
                elif search.step == 0 and (at := statements.free_at) is not None:
                    # Before rows behind the last free one there may be others.
                    rows = rows[: max((n for n, row in enumerate(rows, 1) if row[at]), default=0)]
            else:
                read += islice(turn, scan_limit - len(read))
                rows = [(*each.row, each.alone)[: statements.width] for each in read]
        except DBAPIError as error:
            if not self.is_conflict(error):
                raise
            if tx.execute(statements.session).one()[0] == SERIALIZABLE:
                raise ClaimError(PLAIN_READS_WAIT) from error
            raise
        tx.refuse_autocommit("the row locks would be gone before the rows are marked")
        if not rows and tx.own and not statements.asks_zone:
            return rows, True
        # Rows of a turn come without it.
        session = (rows and rows[0][statements.width :]) or tx.tuples(statements.session)[0]
        level, rolls_back, *skew = session
        if level == SERIALIZABLE:
            raise ClaimError(PLAIN_READS_WAIT)
        if any(skew):
            _refuse_skew(plan.job_table, self, skew[0])
        # In a transaction of the call's own, the gaps are locked for a moment.
        is_brief = tx.own or level != "REPEATABLE-READ"
        search.is_stale |= bool(rolls_back) and not is_brief
        return rows, is_brief or bool(rolls_back)

    def lock_read(self, tx: Transaction, find: Find) -> sa.Select[Any]:
        """Lock the keys by a claim's search, and return the SELECT restricted to these keys.

        The SELECT then sees the latest rows, whatever the transaction's snapshot.
        """
        asked = find.statement.params(dict(find.params)) if find.params else find.statement
        limit = sa.bindparam(LIMIT, 1, Integer(), literal_execute=True)
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
        lock = plan.prepare(InnoDBStatements, self, False).lock
        return statements_of(self, plan, plan.candidates.steps()[0].select_with_flags(), lock)

    def changes(
        self, job_table: JobTable, guard: sa.ColumnElement[bool], values: Mapping[Any, Any]
    ) -> Sequence[ByKey]:
        key, table = job_table.key, job_table.table
        held = hinted(sa.select(*key), table, self.hints).with_for_update()
        writing = hinted(sa.update(table).values(dict(values)), table, self.hints)
        return ByKey(key, lambda is_one: held.where(is_one, guard)), ByKey(key, writing.where)

    @contextmanager
    def limit_wait(self, tx: Transaction, seconds: float) -> Iterator[None]:
        """Limit it in whole seconds, for rows and for tables (locked by ``ALTER TABLE``)."""
        names = ("innodb_lock_wait_timeout", "lock_wait_timeout")
        before = tx.connection.execute(sa.select(*(sa.text(f"@@{name}") for name in names))).one()
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

    def process(self, connection: sa.Connection) -> tuple[Any, str | None]:
        return (connection.scalar(sa.select(sa.func.connection_id())),), None

    def asks_to_end(self, connection: sa.Connection, process: Any, seconds: float) -> bool:
        return end(connection, process[0], seconds, "%")

    def is_naive(self, type_: DateTime) -> bool:
        """DATETIME has no zone, whatever was asked for; TIMESTAMP is a point in time."""
        return not isinstance(type_, TIMESTAMP)

    def is_conflict(self, error: DBAPIError) -> bool:
        at_commit = code_of(error, int) == ERROR_DURING_COMMIT and "149" in str(error.orig)
        return at_commit or super().is_conflict(error)

    def compile_claim(self, element: ClaimStatement, compiler: SQLCompiler, **kw: Any) -> str:
        """Render what a person may read; it is not executed."""
        # Text asked for with compile() has no column keys; a statement about to be executed has.
        if compiler.column_keys is not None:
            return super().compile_claim(element, compiler, **kw)
        key = tuple(element.table.primary_key)
        claimable = element.candidates.select(
            lock=lambda branch: branch.with_for_update(skip_locked=True)
        ).subquery("claimable")
        claim = sa.update(element.table).values(element.written)
        return compiler.visit_update(claim.where(key_equals(key, tuple(claimable.columns))), **kw)

    def compile_time(self, element: DatabaseTime, compiler: SQLCompiler, **kw: Any) -> str:
        type_ = plain_type(element.type)
        local = isinstance(type_, TIMESTAMP) or element.clock == "server"
        if element.offset is None:
            return "CURRENT_TIMESTAMP(6)" if local else "UTC_TIMESTAMP(6)"
        microseconds = f"ROUND(({compiler.process(element.offset, **kw)}) * 1000000)"
        if not getattr(type_, "fsp", None):
            # A column without fractions: MySQL rounds what it is given, MariaDB truncates.
            microseconds += " - 500000" if element.floor else " + 999999"
        utc = f"TIMESTAMPADD(MICROSECOND, {microseconds}, UTC_TIMESTAMP(6))"
        if not local:
            return utc
        of_zone = f"CONVERT_TZ({utc}, '+00:00', @@session.time_zone)"
        by_wall = f"TIMESTAMPADD(MICROSECOND, {microseconds}, CURRENT_TIMESTAMP(6))"
        return f"{'GREATEST' if element.later else 'LEAST'}({of_zone}, {by_wall})"


FACTS = sa.text(
    "SELECT t.engine, s.column_name FROM information_schema.tables t "
    "LEFT JOIN information_schema.statistics s ON s.table_schema = t.table_schema "
    "AND s.table_name = t.table_name AND s.index_name = 'PRIMARY' "
    "WHERE t.table_schema = coalesce(:schema, database()) AND t.table_name = :name"
)


def _check_table(connection: sa.Connection, table: sa.Table, schema: str | None) -> None:
    """Refuse a table that has no row locks, or whose rows are not locked by the declared key."""
    found = connection.execute(FACTS, {"schema": schema, "name": table.name}).all()
    if not found:
        # Temporary tables are not listed; no other session reads them.
        return
    engine, primary = found[0][0], [name for _, name in found if name is not None]
    key = {column.name.lower() for column in table.primary_key}
    if engine is not None and engine.lower() != "innodb":
        raise ClaimError(
            f"the storage engine of {table.fullname!r} is {engine}, which has no row locks that "
            "a claim could rest on: two workers would get the same rows; convert it with "
            f"ALTER TABLE {table.fullname} ENGINE=InnoDB"
        )
    if not primary or not key.issuperset(map(str.lower, primary)):
        raise ClaimError(
            f"a claim locks rows by the primary key, which is {sorted(key)!r} in the Table of "
            f"{table.fullname!r} and {primary!r} in the database: declare the one that is there, "
            "add it, or declare the table that a view reads"
        )


def _refuse_skew(job_table: JobTable, backend: Backend, seconds: Any) -> NoReturn:
    """Refuse naive times in a session that is ahead of UTC by these seconds, or behind it."""
    refuse_naive(job_table, backend, f"{int(seconds) / 3600:+g} h from UTC")


def _set_session(tx: Transaction, settings: Mapping[str, int]) -> None:
    assignments = ", ".join(f"{name} = {value}" for name, value in settings.items())
    tx.connection.execute(sa.text(f"SET SESSION {assignments}"))


def _reads_row(job_table: JobTable) -> sa.ColumnElement[bool]:
    """Build an always-true condition that is evaluated on the row, not on an index of the key."""
    for column in job_table.table.columns:
        if not column.primary_key:
            return sa.func.coalesce(sa.func.length(column), 0) >= 0
    return sa.true()
