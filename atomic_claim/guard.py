"""Triggers that make the database refuse a second claim of a job, from any program.

They protect loops that cannot be patched, and programs in other languages. A loop that found a
job which another worker has claimed in the meantime gets an error from its own UPDATE, and does
not run the job a second time.

.. code-block:: sql

    CREATE TRIGGER jobs_claim_guard BEFORE UPDATE OF processing ON jobs FOR EACH ROW
        WHEN (<NEW bears the mark of a claim, and OLD is not free>)
        EXECUTE PROCEDURE jobs_claim_guard()
"""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from sqlalchemy import (
    BINARY,
    VARBINARY,
    Column,
    ColumnElement,
    Dialect,
    LargeBinary,
    Table,
    TableClause,
    Text,
    and_,
    case,
    cast,
    column,
    false,
    func,
    literal,
    not_,
    null,
    or_,
)
from sqlalchemy import table as sa_table
from sqlalchemy.exc import CompileError
from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import (
    ColumnClause,
    False_,
    Null,
    TextClause,
    True_,
    quoted_name,
)
from sqlalchemy.sql.selectable import SelectBase

from . import predicates
from .backends import backend_for
from .errors import ClaimError, UnsupportedDialect
from .inference import is_text, plain_type
from .job_table import JobTable, job_table_of
from .sql_elements import DatabaseTime, InlineLiteral

# PostgreSQL's, in bytes; MySQL and MariaDB allow 64 characters, SQLite any number.
LONGEST_NAME: Final = 63
# MySQL's MESSAGE_TEXT, in characters.
LONGEST_MESSAGE: Final = 128
# Columns of Payload's payload_jobs, which identify the table.
PAYLOAD: Final = frozenset({"processing", "completed_at", "total_tried", "task_slug"})

RUNNING: Final = "is running already, a second claim is refused"
ENDED: Final = "is not free any more, this claim is refused"
UNNAMED: Final = "is claimed without an owner, which must be written to "


@dataclass(frozen=True)
class Guard:
    """The statements that install the triggers in the database, and those that remove them.

    A percent sign is doubled where the dialect's driver requires it in ``exec_driver_sql``.

    Attributes:
        upgrade: statements to execute one by one, each as a whole: it may contain semicolons.
        downgrade: the statements that remove the triggers.
    """

    upgrade: tuple[str, ...]
    downgrade: tuple[str, ...]


def guard(table: Any, dialect: Dialect, *, full_rows: bool = False) -> Guard:
    """Build the triggers that make the database refuse a second claim.

    An UPDATE that writes the mark of a claim is refused, with an error that names the table, if
    the row has ended or is not free for another reason, or if it is running, unless its lease has
    expired and its token changes. All calls of this library pass.

    On PostgreSQL and SQLite a trigger sees which columns an UPDATE writes (``UPDATE OF``:
    https://www.postgresql.org/docs/current/sql-createtrigger.html,
    https://www.sqlite.org/lang_createtrigger.html), so an UPDATE of a running row passes if it
    does not write the state, and is refused if it does. On MySQL and MariaDB, and with
    ``full_rows``, a claim and the progress of a running job differ only in the owner: the UPDATE
    of a running row passes if it leaves the worker and the token as they are. There **every claim
    must write its own worker or a new token**; a claim of a free row that writes neither is
    refused. A second claim that leaves both as they are is not recognised.

    The loop must claim in one transaction, and roll it back after the error: in autocommit the
    rows that it marked before the error stay claimed.

    Triggers see UPDATE only: ``REPLACE`` deletes and inserts. A migration that recreates the
    table, as Alembic's batch mode does on SQLite, drops its triggers.

    Args:
        table: a ``Table``, a mapped class or a :class:`JobTable` with ``done``.
        dialect: the dialect of the database: ``engine.dialect``, or ``postgresql.dialect()``.
        full_rows: True if whole rows are written, including the state, when only another column
            changed, as Django's ``save()`` does.

    Returns:
        The statements. On MySQL with a binary log, ``CREATE TRIGGER`` needs the right to it
        (``log_bin_trust_function_creators``, or SUPER).

    Raises:
        UnsupportedDialect: there is no guard for this database.
        AmbiguousTable: the columns cannot be read with certainty.
        ClaimError: the table cannot be guarded; the message has the reason and the cure.
    """
    if not isinstance(dialect, Dialect):
        raise ClaimError(f"{dialect!r} is not a dialect: pass engine.dialect")
    write = WRITERS.get(dialect.name)
    if write is None:
        raise UnsupportedDialect(
            f"no guard exists for {dialect.name!r}, only for PostgreSQL, MySQL, MariaDB and SQLite"
        )
    backend_for(dialect)
    job_table = job_table_of(table, ordered=True)
    _check_payload(job_table.table)
    _check_ends(job_table)
    by_owner = full_rows or write is _mysql
    if by_owner:
        _check_owner(job_table)
    return write(_Rules(job_table, dialect, by_owner=by_owner))


def _check_payload(table: Table) -> None:
    """Refuse Payload's table: its loop neither rolls back nor claims in one transaction."""
    if {column.name for column in table.columns} >= PAYLOAD:
        raise ClaimError(
            f"{table.fullname!r} is a table of Payload, whose loop does not survive a refused "
            "UPDATE: on SQLite it runs in autocommit, so the rows it marked before the error stay "
            "claimed; on PostgreSQL it does not roll back, and its pool fills with aborted "
            "transactions. Replace the loop by claim_jobs instead"
        )


def _check_ends(job_table: JobTable) -> None:
    if not job_table.done:
        raise ClaimError(
            f"finished jobs of {job_table.table.fullname!r} have no mark, so the guard cannot tell "
            "one that another worker has claimed and finished from one that waits: declare "
            "JobTable(done=...). If finished jobs are deleted, no guard is needed: the second "
            "worker's UPDATE changes no row, which its loop has to check"
        )


def _check_owner(job_table: JobTable) -> None:
    """Require a worker or token column that claims can write."""
    name, owners = job_table.table.fullname, _owners(job_table)
    if not owners:
        raise ClaimError(
            f"{name!r} has no worker and no token column, by which a trigger could tell the "
            "progress of a running job from a second claim where whole rows are written, and on "
            "MySQL and MariaDB, which have no UPDATE OF. Let every loop write its own worker id "
            "when it claims, and declare the column with JobTable(worker=...), after ALTER TABLE "
            f"{name} ADD COLUMN worker VARCHAR(64) NULL"
        )
    mapper = job_table.mapper
    if mapper is not None and not any(mapper.columns.contains_column(owner) for owner in owners):
        raise ClaimError(
            f"{mapper.class_.__name__} does not map {_names(owners)}, so its claims do not write "
            "their owner: map the column, and assign it in every claim"
        )


def _owners(job_table: JobTable) -> tuple[Column[Any], ...]:
    """Return the columns that identify the claim that owns a row."""
    return tuple(c for c in (job_table.worker, job_table.token) if c is not None)


def _names(columns: tuple[Column[Any], ...]) -> str:
    return " or ".join(column.name for column in columns)


class _Rules:
    """The conditions under which an UPDATE is refused, on the trigger's rows OLD and NEW."""

    def __init__(self, job_table: JobTable, dialect: Dialect, *, by_owner: bool) -> None:
        self.job_table = job_table
        self.dialect = dialect
        self.by_owner = by_owner
        self.owners = _owners(job_table)
        self.table: Table = job_table.table
        self.key = job_table.key
        self.old = _row("OLD", self.table)
        self.new = _row("NEW", self.table)

    @cached_property
    def deciding(self) -> tuple[Column[Any], ...]:
        """The columns by which a claim marks a row: writing one of them is writing the state."""
        if self.job_table.state is not None:
            return (self.job_table.state,)
        claimed, free = self.job_table.claimed, self.job_table.free
        read = {part.name for part in visitors.iterate(free) if isinstance(part, ColumnClause)}
        return tuple(column for column in claimed if column.name in read) or tuple(claimed)

    def is_marked(self, row: TableClause) -> ColumnElement[bool]:
        """Build the condition that a row has the mark of a claim, whether ended or not."""
        found = [(c, self.job_table.claimed[c]) for c in self.deciding]
        marks = [
            c.is_not(None) if isinstance(value, DatabaseTime) else c == value
            for c, value in found
            if value is None
            or isinstance(value, (DatabaseTime, InlineLiteral, Null, True_, False_))
        ]
        return self.of(row, and_(*marks) if marks else not_(_sure(self.job_table.free)))

    def has_ended(self, row: TableClause) -> ColumnElement[bool]:
        """Build the condition that a column other than the state marks the row as ended."""
        ends = predicates.not_ended(self.job_table)
        return not_(self.of(row, and_(*ends))) if ends else false()

    @cached_property
    def was_free(self) -> ColumnElement[bool]:
        """Build the condition that OLD was free; a NULL state is free unless declared otherwise."""
        job_table, free = self.job_table, self.job_table.free
        marks = (job_table.claimed, job_table.done, job_table.failed, job_table.withdrawn)
        state = job_table.state
        if state is not None and state.nullable:
            unsaid = all(mark.get(state, ...) is not None for mark in marks)
            free = or_(free, state.is_(None)) if unsaid else free
        return self.of(self.old, and_(free, *predicates.not_ended(job_table)))

    @cached_property
    def was_running(self) -> ColumnElement[bool]:
        """Build the condition that OLD was claimed and had not ended."""
        return and_(self.is_marked(self.old), not_(self.has_ended(self.old)))

    @cached_property
    def is_reclaimed(self) -> ColumnElement[bool]:
        """Build the condition that OLD's lease had expired and NEW is the next claim."""
        again = [
            and_(*conditions) for conditions, _ in predicates.claimable_branches(self.job_table)[1:]
        ]
        if not again:
            return false()
        token = self.job_table.token
        # Without a token, the next claim must make the row unavailable to all others.
        taken = not_(self.of(self.new, or_(*again))) if token is None else self.has_new(token)
        return and_(self.of(self.old, or_(*again)), taken)

    def has_new(self, owner: Column[Any]) -> ColumnElement[bool]:
        """Build the condition that the UPDATE writes another owner."""
        return and_(self.new.c[owner.name].is_not(None), not_(self.keeps(owner)))

    @cached_property
    def is_progress(self) -> ColumnElement[bool]:
        """Build the condition that the UPDATE has the owner of the running row."""
        if not self.by_owner:
            return false()
        undone = and_(self.has_ended(self.old), not_(self.has_ended(self.new)))
        kept = [self.keeps(owner) for owner in self.owners]
        return and_(self.is_marked(self.old), not_(undone), self.has_owner(self.old), *kept)

    @cached_property
    def refusals(self) -> tuple[tuple[ColumnElement[bool], str], ...]:
        """The conditions under which the UPDATE is refused, each with its reason."""
        ends = and_(self.was_running, self.has_ended(self.new))
        allowed = or_(ends, self.is_reclaimed, self.is_progress)
        second = and_(self.is_marked(self.new), not_(self.was_free), not_(allowed))
        found = ((and_(second, self.was_running), RUNNING), (second, ENDED))
        if not self.by_owner:
            return found
        new_token = [self.has_new(owner) for owner in self.owners if owner is self.job_table.token]
        unnamed = not_(or_(self.names_worker(self.new), *new_token))
        claims = and_(self.is_marked(self.new), self.was_free, unnamed)
        return (*found, (claims, UNNAMED + _names(self.owners)))

    @property
    def is_refused(self) -> ColumnElement[bool]:
        """Build the condition that the UPDATE is refused."""
        return or_(*(condition for condition, _ in self.refusals[1:]))

    def keeps(self, owner: Column[Any]) -> ColumnElement[bool]:
        """Build the condition that the UPDATE leaves a column identical, whatever its collation."""
        new: Any = self.new.c[owner.name]
        old: Any = self.old.c[owner.name]
        if self.dialect.name != "postgresql":
            new, old = func.hex(new), func.hex(old)
        kept: ColumnElement[bool] = new.is_not_distinct_from(old)
        return kept

    def has_owner(self, row: TableClause) -> ColumnElement[bool]:
        """Build the condition that a row has a worker or a token."""
        tokens = [row.c[c.name].is_not(None) for c in self.owners if c is self.job_table.token]
        return or_(self.names_worker(row), *tokens)

    def names_worker(self, row: TableClause) -> ColumnElement[bool]:
        """Build the condition that a row has a worker's name."""
        worker = self.job_table.worker
        if worker is None:
            return false()
        found = row.c[worker.name]
        return and_(found.is_not(None), found != "") if is_text(worker) else found.is_not(None)

    def message(self, reason: str) -> ColumnElement[str]:
        """Build the error message: the job's key and the reason."""
        found: ColumnElement[str] = literal("atomic_claim: job ", Text())
        for place, part in enumerate(self.key):
            found += literal(", " * (place > 0) + part.name + "=", Text()) + self.key_text(part)
        return found + literal(f" of {self.table.fullname} {reason}", Text())

    @property
    def messages(self) -> ColumnElement[str]:
        """Build the error message of an UPDATE, or NULL if it is not refused."""
        refusals = [(condition, self.message(reason)) for condition, reason in self.refusals]
        return case(*refusals, else_=null())

    def constant(self, reason: str) -> ColumnElement[str]:
        """Build the error message without the job's key."""
        return literal(f"atomic_claim: a job of {self.table.fullname} {reason}", Text())

    def key_text(self, part: Column[Any]) -> ColumnElement[str]:
        """Convert a column of the job's key to text, a binary one to hexadecimal."""
        old: Any = self.old.c[part.name]
        if not isinstance(plain_type(part.type), (LargeBinary, BINARY, VARBINARY)):
            return cast(old, Text())
        return func.encode(old, "hex") if self.dialect.name == "postgresql" else func.hex(old)

    def of(self, row: TableClause, condition: ColumnElement[bool]) -> ColumnElement[bool]:
        """Translate a condition on the table to one on a trigger's row that is never NULL."""

        def replace(element: Any, **_: Any) -> Any:
            if not isinstance(element, ColumnClause):
                return None
            if (found := self.table.corresponding_column(element)) is None:
                raise self.inexpressible(f"{element} is no column of the table")
            return row.c[found.name]

        for part in visitors.iterate(condition):
            if isinstance(part, (SelectBase, TextClause)):
                raise self.inexpressible(
                    f"it contains a text or a subquery ({str(part).split()[0]} …)"
                )
        clause: Any = condition
        return _sure(visitors.replacement_traverse(clause, {}, replace))

    def inexpressible(self, why: Any) -> ClaimError:
        """Return the error for a condition that a trigger cannot evaluate on one row."""
        return ClaimError(
            f"a trigger cannot evaluate on one row which jobs of {self.table.fullname!r} are free, "
            f"claimed or ended: {why}. Use only columns of the table and constants in "
            "JobTable(free=...)"
        )

    # --- as text

    def sql(self, clause: ColumnElement[Any]) -> str:
        """Compile a clause to SQL with literal values."""
        try:
            return str(clause.compile(None, self.dialect, compile_kwargs={"literal_binds": True}))
        except CompileError as error:
            raise self.inexpressible(error) from error

    def quoted(self, name: str) -> str:
        """Quote a name for this dialect."""
        return self.dialect.identifier_preparer.quote(name)

    def name(self, suffix: str = "") -> str:
        """Return the quoted name of the guard's trigger or of another of its objects."""
        table_name, suffix = self.table.name, f"_claim_guard{suffix}"
        if len((table_name + suffix).encode()) > LONGEST_NAME:
            suffix = f"_{hashlib.sha256(table_name.encode()).hexdigest()[:8]}{suffix}"
            table_name = table_name.encode()[: LONGEST_NAME - len(suffix)].decode(errors="ignore")
        return self.quoted(table_name + suffix)

    @property
    def schema(self) -> str:
        """The schema's name and a dot, if it is said."""
        if self.table.schema is None:
            return ""
        return self.dialect.identifier_preparer.quote_schema(self.table.schema) + "."

    @property
    def full_name(self) -> str:
        """The table's name, with its schema."""
        return self.dialect.identifier_preparer.format_table(self.table)

    @property
    def bare_name(self) -> str:
        """The table's name without its schema."""
        return self.quoted(self.table.name)

    @property
    def state(self) -> str:
        """The columns that an UPDATE of the state writes."""
        return ", ".join(self.quoted(c.name) for c in self.deciding)


def _postgresql(rules: _Rules) -> Guard:
    """Build a function that raises the error, and the trigger that calls it.

    A BEFORE trigger sees the row as it is after its lock was acquired, not as the statement found
    it. Free rows cost no call of the function: the condition is in WHEN.
    """
    function, trigger = rules.schema + rules.name(), f"{rules.name()} ON {rules.full_name}"
    body = f"""
    CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $atomic_claim$
    BEGIN
        RAISE EXCEPTION USING
            ERRCODE = 'integrity_constraint_violation',
            MESSAGE = {rules.sql(rules.messages)},
            HINT = {rules.sql(literal(_hint(rules)))};
    END $atomic_claim$
    """
    made = (
        f"CREATE TRIGGER {rules.name()} BEFORE UPDATE OF {rules.state} ON {rules.full_name} "
        f"FOR EACH ROW WHEN ({rules.sql(rules.is_refused)}) EXECUTE PROCEDURE {function}()"
    )
    return Guard((_text(body), made), (f"DROP TRIGGER {trigger}", f"DROP FUNCTION {function}()"))


def _hint(rules: _Rules) -> str:
    """Return the hint for the author of a refused UPDATE."""
    state = ", ".join(c.name for c in rules.deciding)
    also = f", or keep {_names(rules.owners)} as the claim wrote it" if rules.by_owner else ""
    return (
        "If this was a claim, look for another job. If it was progress, write it without "
        f"{state}{also}."
    )


def _sqlite(rules: _Rules) -> Guard:
    """Build one trigger, whose error is an ``IntegrityError``.

    RAISE takes only a constant message before SQLite 3.47, so the error names no key.
    """
    trigger = rules.schema + rules.name()
    raises = [
        f"WHEN {rules.sql(condition)} THEN RAISE(ABORT, {rules.sql(rules.constant(reason))})"
        for condition, reason in rules.refusals
    ]
    made = f"""
    CREATE TRIGGER {trigger} BEFORE UPDATE OF {rules.state} ON {rules.bare_name}
    FOR EACH ROW BEGIN
        SELECT CASE {" ".join(raises)} END;
    END
    """
    return Guard((_text(made),), (f"DROP TRIGGER {trigger}",))


def _mysql(rules: _Rules) -> Guard:
    """Build a trigger on every UPDATE of the table."""
    trigger = rules.schema + rules.name()
    made = f"""
    CREATE TRIGGER {trigger} BEFORE UPDATE ON {rules.full_name} FOR EACH ROW
    BEGIN
        DECLARE refused VARCHAR({LONGEST_MESSAGE}) CHARACTER SET utf8mb4;
        SET refused = {rules.sql(func.left(rules.messages, LONGEST_MESSAGE))};
        IF refused IS NOT NULL THEN
            SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = refused;
        END IF;
    END
    """  # noqa: S608 - quoted names
    return Guard((_text(made),), (f"DROP TRIGGER {trigger}",))


WRITERS: Final[Mapping[str, Callable[[_Rules], Guard]]] = {
    "postgresql": _postgresql,
    "sqlite": _sqlite,
    "mysql": _mysql,
    "mariadb": _mysql,
}


def _row(name: str, table: Table) -> TableClause:
    """Build a trigger's row with the table's columns."""
    columns = [column(c.name, c.type) for c in table.columns]
    return sa_table(quoted_name(name, quote=False), *columns)


def _sure(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    """Return the condition with NULL counted as false."""
    return func.coalesce(condition, false())


def _text(sql: str) -> str:
    return textwrap.dedent(sql).strip()
