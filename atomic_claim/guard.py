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
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import CompileError
from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import ColumnClause, TextClause, quoted_name
from sqlalchemy.sql.selectable import SelectBase

from . import predicates
from .backends import backend_for
from .errors import ClaimError, UnsupportedDialect
from .inference import plain_type
from .job_table import JobTable, job_table_of
from .roles import BYTES

# PostgreSQL's, in bytes; MySQL and MariaDB allow 64 characters, SQLite any number.
LONGEST_NAME: Final = 63
# Columns of Payload's payload_jobs, which identify the table.
PAYLOAD: Final = frozenset({"processing", "completed_at", "total_tried", "task_slug"})

RUNNING: Final = "is running already, a second claim is refused"
ENDED: Final = "is not free any more, this claim is refused"
UNNAMED: Final = "is claimed without an owner, which must be written to "

# A BEFORE trigger of PostgreSQL sees the row as it is after its lock was acquired, not as the
# statement found it. Free rows cost no call of the function: the condition is in WHEN.
POSTGRESQL: Final = (
    """
    CREATE FUNCTION {guard}() RETURNS trigger LANGUAGE plpgsql AS $atomic_claim$
    BEGIN
        RAISE EXCEPTION USING
            ERRCODE = 'integrity_constraint_violation',
            MESSAGE = {message},
            HINT = {hint};
    END $atomic_claim$
    """,
    """
    CREATE TRIGGER {name} BEFORE UPDATE OF {state} ON {table} FOR EACH ROW
    WHEN ({is_refused}) EXECUTE PROCEDURE {guard}()
    """,
)
# RAISE in the message makes it an IntegrityError.
SQLITE: Final = """
    CREATE TRIGGER {guard} BEFORE UPDATE OF {state} ON {bare_table}
    FOR EACH ROW BEGIN
        SELECT {message};
    END
    """
# MESSAGE_TEXT holds 128 characters.
MYSQL: Final = """
    CREATE TRIGGER {guard} BEFORE UPDATE ON {table} FOR EACH ROW
    BEGIN
        DECLARE refused VARCHAR(128) CHARACTER SET utf8mb4;
        SET refused = left({message}, 128);
        IF refused IS NOT NULL THEN
            SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = refused;
        END IF;
    END
    """
DROP: Final = ("DROP TRIGGER {guard}",)
TEXTS: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "postgresql": (POSTGRESQL, ("DROP TRIGGER {name} ON {table}", "DROP FUNCTION {guard}()")),
    "sqlite": ((SQLITE,), DROP),
    "mysql": ((MYSQL,), DROP),
    "mariadb": ((MYSQL,), DROP),
}
"""By dialect, what installs the guard and what removes it."""


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


def guard(table: Any, dialect: sa.Dialect, *, full_rows: bool = False) -> Guard:
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
    if not isinstance(dialect, sa.Dialect):
        raise ClaimError(f"{dialect!r} is not a dialect: pass engine.dialect")
    if dialect.name not in TEXTS:
        raise UnsupportedDialect(
            f"no guard exists for {dialect.name!r}, only for PostgreSQL, MySQL, MariaDB and SQLite"
        )
    backend_for(dialect)
    job_table = job_table_of(table, ordered=True)
    _check_payload(job_table.table)
    _check_ends(job_table)
    by_owner = full_rows or dialect.name in {"mysql", "mariadb"}
    if by_owner:
        _check_owner(job_table)
    parts = _Rules(job_table, dialect, by_owner=by_owner).parts()
    upgrade, downgrade = (
        tuple(textwrap.dedent(text).strip().format_map(parts) for text in texts)
        for texts in TEXTS[dialect.name]
    )
    return Guard(upgrade, downgrade)


def _check_payload(table: sa.Table) -> None:
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
            f"nothing marks a row of {job_table.table.fullname!r} as done, so a trigger cannot "
            "tell a completed job from a free one: declare JobTable(done=...). If completed jobs "
            "are deleted, no guard is needed: let the loop check that its UPDATE changed a row"
        )


def _check_owner(job_table: JobTable) -> None:
    """Require a worker or token column that claims can write."""
    name, owners = job_table.table.fullname, _owners(job_table)
    if not owners:
        raise ClaimError(
            f"{name!r} has no worker and no token column, so on MySQL and MariaDB, and where whole "
            "rows are written, a trigger cannot tell progress from a second claim. Add one: ALTER "
            f"TABLE {name} ADD COLUMN worker VARCHAR(64) NULL. Declare it with "
            "JobTable(worker=...), and let every loop write its own name when it claims"
        )
    mapper = job_table.mapper
    if mapper is not None and not any(mapper.columns.contains_column(owner) for owner in owners):
        raise ClaimError(
            f"{mapper.class_.__name__} does not map {_names(owners)}, so its claims do not write "
            "their owner: map the column, and assign it in every claim"
        )


def _owners(job_table: JobTable) -> tuple[sa.Column[Any], ...]:
    """Return the columns that identify the claim that owns a row."""
    return tuple(c for c in (job_table.worker, job_table.token) if c is not None)


def _names(columns: tuple[sa.Column[Any], ...]) -> str:
    return " or ".join(column.name for column in columns)


class _Rules:
    """The conditions under which an UPDATE is refused, on the trigger's rows OLD and NEW."""

    def __init__(self, job_table: JobTable, dialect: sa.Dialect, *, by_owner: bool) -> None:
        self.job_table = job_table
        self.dialect = dialect
        self.by_owner = by_owner
        self.table = job_table.table
        self.owners = _owners(job_table)
        self.old, self.new = (
            self.table.alias(quoted_name(name, quote=False)) for name in ("OLD", "NEW")
        )

    @cached_property
    def deciding(self) -> tuple[sa.Column[Any], ...]:
        """The columns by which a claim marks a row: writing one of them is writing the state."""
        if self.job_table.state is not None:
            return (self.job_table.state,)
        claimed, free = self.job_table.claimed, self.job_table.free
        read = {part.name for part in visitors.iterate(free) if isinstance(part, ColumnClause)}
        return tuple(column for column in claimed if column.name in read) or tuple(claimed)

    def is_marked(self, row: sa.Alias) -> sa.ColumnElement[bool]:
        """Build the condition that a row has the mark of a claim, whether ended or not."""
        claimed = self.job_table.claimed
        marks = list(predicates.bears({column: claimed[column] for column in self.deciding}))
        return self.of(row, sa.and_(*marks) if marks else sa.not_(_sure(self.job_table.free)))

    def has_ended(self, row: sa.Alias) -> sa.ColumnElement[bool]:
        """Build the condition that a column other than the state marks the row as ended."""
        ends = predicates.not_ended(self.job_table)
        return sa.not_(self.of(row, sa.and_(*ends))) if ends else sa.false()

    def was_free(self) -> sa.ColumnElement[bool]:
        """Build the condition that OLD was free; a NULL state is free unless declared otherwise."""
        job_table, free = self.job_table, self.job_table.free
        marks = (job_table.claimed, job_table.done, job_table.failed, job_table.withdrawn)
        state = job_table.state
        if state is not None and state.nullable:
            unsaid = all(mark.get(state, ...) is not None for mark in marks)
            free = sa.or_(free, state.is_(None)) if unsaid else free
        return self.of(self.old, sa.and_(free, *predicates.not_ended(job_table)))

    def is_reclaimed(self) -> sa.ColumnElement[bool]:
        """Build the condition that OLD's lease had expired and NEW is the next claim."""
        branches = predicates.claimable_branches(self.job_table)[1:]
        if not branches:
            return sa.false()
        again, token = predicates.any_of(branches), self.job_table.token
        # Without a token, the next claim must make the row unavailable to all others.
        taken = sa.not_(self.of(self.new, again)) if token is None else self.is_new(token)
        return sa.and_(self.of(self.old, again), taken)

    @cached_property
    def refusals(self) -> tuple[tuple[sa.ColumnElement[bool], str], ...]:
        """The conditions under which the UPDATE is refused, each with its reason."""
        old, new, was_free = self.old, self.new, self.was_free()
        was_running = sa.and_(self.is_marked(old), sa.not_(self.has_ended(old)))
        allowed = [sa.and_(was_running, self.has_ended(new)), self.is_reclaimed()]
        if self.by_owner:
            undone = sa.and_(self.has_ended(old), sa.not_(self.has_ended(new)))
            kept = (self.keeps(owner) for owner in self.owners)
            owned = sa.or_(*(self.names(old, owner) for owner in self.owners))
            allowed.append(sa.and_(self.is_marked(old), sa.not_(undone), owned, *kept))
        second = sa.and_(self.is_marked(new), sa.not_(was_free), sa.not_(sa.or_(*allowed)))
        found = ((sa.and_(second, was_running), RUNNING), (second, ENDED))
        if not self.by_owner:
            return found
        named = [
            self.is_new(owner) if owner is self.job_table.token else self.names(new, owner)
            for owner in self.owners
        ]
        unnamed = sa.and_(self.is_marked(new), was_free, sa.not_(sa.or_(*named)))
        return (*found, (unnamed, UNNAMED + _names(self.owners)))

    def names(self, row: sa.Alias, owner: sa.Column[Any]) -> sa.ColumnElement[bool]:
        """Build the condition that a row has an owner; an empty text is no worker's name."""
        found = row.c[owner.key]
        if owner is self.job_table.worker:
            return sa.and_(found.is_not(None), found != "")
        return found.is_not(None)

    def is_new(self, owner: sa.Column[Any]) -> sa.ColumnElement[bool]:
        """Build the condition that the UPDATE writes another owner."""
        return sa.and_(self.names(self.new, owner), sa.not_(self.keeps(owner)))

    def keeps(self, owner: sa.Column[Any]) -> sa.ColumnElement[bool]:
        """Build the condition that the UPDATE leaves a column identical, whatever its collation."""
        new: Any = self.new.c[owner.key]
        old: Any = self.old.c[owner.key]
        if self.dialect.name != "postgresql":
            new, old = sa.func.hex(new), sa.func.hex(old)
        kept: sa.ColumnElement[bool] = new.is_not_distinct_from(old)
        return kept

    def message(self, reason: str) -> sa.ColumnElement[str]:
        """Build the error message: the job's key and the reason.

        On SQLite, RAISE takes only a constant before 3.47, so the message names no key.
        """
        reason = f" of {self.table.fullname} {reason}"
        if self.dialect.name == "sqlite":
            constant = sa.literal(f"atomic_claim: a job{reason}", sa.Text())
            return sa.func.RAISE(sa.literal_column("ABORT"), constant)
        found: sa.ColumnElement[str] = sa.literal("atomic_claim: job ", sa.Text())
        for place, part in enumerate(self.job_table.key):
            found += sa.literal(", " * (place > 0) + part.name + "=", sa.Text()) + self.key_text(
                part
            )
        return found + sa.literal(reason, sa.Text())

    def key_text(self, part: sa.Column[Any]) -> sa.ColumnElement[str]:
        """Convert a column of the job's key to text, a binary one to hexadecimal."""
        old: Any = self.old.c[part.key]
        if not isinstance(plain_type(part.type), BYTES):
            return sa.cast(old, sa.Text())
        return sa.func.encode(old, "hex") if self.dialect.name == "postgresql" else sa.func.hex(old)

    def hint(self) -> str:
        """Return the hint for the author of a refused UPDATE."""
        state = ", ".join(c.name for c in self.deciding)
        also = f", or keep {_names(self.owners)} as the claim wrote it" if self.by_owner else ""
        return (
            "If this was a claim, look for another job. If it was progress, write it without "
            f"{state}{also}."
        )

    def of(self, row: sa.Alias, condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
        """Translate a condition on the table to one on a trigger's row that is never NULL."""

        def replace(element: Any, **_: Any) -> Any:
            if isinstance(element, (SelectBase, TextClause)):
                said = str(element).split()[0]
                raise self.inexpressible(f"it contains a text or a subquery ({said} …)")
            if not isinstance(element, ColumnClause):
                return None
            if (found := self.table.corresponding_column(element)) is None:
                raise self.inexpressible(f"{element} is no column of the table")
            return row.c[found.key]

        clause: Any = condition
        return _sure(visitors.replacement_traverse(clause, {}, replace))

    def inexpressible(self, why: Any) -> ClaimError:
        """Return the error for a condition that a trigger cannot evaluate on one row."""
        return ClaimError(
            f"a trigger cannot evaluate on one row which jobs of {self.table.fullname!r} are free, "
            f"claimed or ended: {why}. Use only columns of the table and constants in "
            "JobTable(free=...)"
        )

    def parts(self) -> dict[str, str]:
        """Return the parts of the statements as SQL."""
        preparer, name = self.dialect.identifier_preparer, _trigger_name(self.table.name)
        messages = ((condition, self.message(reason)) for condition, reason in self.refusals)
        return {
            "name": preparer.quote(name),
            "guard": preparer.format_table(sa.table(name, schema=self.table.schema)),
            "table": preparer.format_table(self.table),
            "bare_table": preparer.format_table(self.table, use_schema=False),
            "state": ", ".join(preparer.quote(column.name) for column in self.deciding),
            "is_refused": self.sql(sa.or_(*(condition for condition, _ in self.refusals[1:]))),
            "message": self.sql(sa.case(*messages, else_=sa.null())),
            "hint": self.sql(sa.literal(self.hint())),
        }

    def sql(self, clause: sa.ColumnElement[Any]) -> str:
        """Compile a clause to SQL with literal values."""
        try:
            return str(clause.compile(None, self.dialect, compile_kwargs={"literal_binds": True}))
        except CompileError as error:
            raise self.inexpressible(error) from error


def _trigger_name(table_name: str) -> str:
    """Return the name of the guard's trigger and of its function."""
    suffix = "_claim_guard"
    if len((table_name + suffix).encode()) > LONGEST_NAME:
        suffix = f"_{hashlib.sha256(table_name.encode()).hexdigest()[:8]}{suffix}"
        table_name = table_name.encode()[: LONGEST_NAME - len(suffix)].decode(errors="ignore")
    return table_name + suffix


def _sure(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    """Return the condition with NULL counted as false."""
    return sa.func.coalesce(condition, sa.false())
