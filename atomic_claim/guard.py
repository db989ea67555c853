"""A guard inside the database: triggers that refuse a second claim, whoever makes it.

For loops that nobody can patch, and for codebases in another language. A loop that has found a
job which another worker has claimed meanwhile gets an error from its own UPDATE, and does not run
the job a second time.

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
    true,
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
PAYLOAD: Final = frozenset({"processing", "completed_at", "total_tried", "task_slug"})

RUNNING: Final = "is running already, a second claim is refused"
ENDED: Final = "is not free any more, this claim is refused"
UNNAMED: Final = "is claimed without a worker id, which belongs into "
NAMED: Final = "atomic_claim.named"


@dataclass(frozen=True)
class Guard:
    """The statements that install the guard in the database, and those that remove it.

    A percent sign in the name of a table or a column is doubled where the dialect's driver asks
    for that, as ``exec_driver_sql`` needs it; values never contain one.

    Attributes:
        upgrade: statements to execute one by one, each as a whole: it may contain semicolons.
        downgrade: the same for taking it out.
    """

    upgrade: tuple[str, ...]
    downgrade: tuple[str, ...]


def guard(table: Any, dialect: Dialect, *, full_rows: bool = False) -> Guard:
    """Build the triggers that make the database refuse a second claim.

    An UPDATE that writes the mark of a claim is refused, with an error that names the job, where
    the row has ended or is otherwise not free (another worker claimed *and* finished it between
    this one's look and its UPDATE), and where it is running, unless its token changes and its
    lease has run out. Whatever this library does passes.

    An UPDATE of a running row that does not write the state passes. One that writes it again is
    taken for progress only where it also writes the worker column, or the token of a lease, and
    leaves it as it was. On PostgreSQL and SQLite triggers know which columns an UPDATE writes
    (``UPDATE OF``: https://www.postgresql.org/docs/current/sql-createtrigger.html,
    https://www.sqlite.org/lang_createtrigger.html). On MySQL and MariaDB they do not: there two
    claims differ by nothing but the worker that they write, so every claim has to write its own
    worker, or a token, and is refused otherwise.

    What is not an UPDATE is not seen: ``REPLACE`` deletes and inserts. A migration that makes the
    table anew, as Alembic's batch mode does on SQLite, drops its triggers.

    Args:
        table: a ``Table``, a mapped class or a :class:`JobTable` that says what ``done`` is.
        dialect: whose SQL is wanted: ``engine.dialect``, or ``postgresql.dialect()``.
        full_rows: whether somebody writes whole rows, the state among them, when only some other
            column changed, as Payload does, or Django's ``save()``. Of Payload's own table it is
            known.

    Returns:
        The statements. On MySQL with a binary log, ``CREATE TRIGGER`` needs the right to it
        (``log_bin_trust_function_creators``, or SUPER).

    Raises:
        UnsupportedDialect: there is no guard for this database.
        AmbiguousTable: the columns cannot be read with certainty.
        ClaimError: the table cannot be guarded there; the message says why, and what would help.
    """
    if not isinstance(dialect, Dialect):
        raise ClaimError(f"{dialect!r} is not a dialect: pass engine.dialect")
    write = WRITERS.get(dialect.name)
    if write is None:
        raise UnsupportedDialect(
            f"a guard is not known for {dialect.name!r}; known are those of PostgreSQL, MySQL, "
            "MariaDB and SQLite"
        )
    backend_for(dialect)
    job_table = job_table_of(table, ordered=True)
    _check_ends(job_table)
    _check_writers(job_table, full_rows=full_rows)
    if dialect.name in {"mysql", "mariadb"}:
        _check_worker(job_table)
    return write(_Rules(job_table, dialect))


def _check_ends(job_table: JobTable) -> None:
    if not job_table.done:
        raise ClaimError(
            f"nothing says how a finished job of {job_table.table.fullname!r} is marked, so one "
            "that another worker has claimed and finished cannot be told from one that waits: say "
            "it with JobTable(done=...). Where finished jobs are deleted there is nothing to "
            "guard: the second worker's UPDATE finds no row, and its loop has to look at how many "
            "rows it changed"
        )


def _check_writers(job_table: JobTable, *, full_rows: bool) -> None:
    """Refuse a writer of whole rows whose progress would look like a second claim."""
    names = {column.name for column in job_table.table.columns}
    if not (full_rows or names >= PAYLOAD) or _tells_apart(job_table):
        return
    whose = "by what was said" if full_rows else "as Payload does"
    raise ClaimError(
        f"whole rows of {job_table.table.fullname!r} are written ({whose}), the state among them, "
        "so a worker's progress looks like a second claim of the same job, and the guard would "
        "refuse it: have every worker write its own id when it claims, into a column that its "
        "whole rows contain, and name it with JobTable(worker=...)"
    )


def _tells_apart(job_table: JobTable) -> bool:
    """Check whether a worker or lease token column identifies the owner's UPDATEs."""
    leased = job_table.token is not None and job_table.lease is not None
    return job_table.worker is not None or leased


def _check_worker(job_table: JobTable) -> None:
    if job_table.worker is None:
        raise ClaimError(
            f"{job_table.table.fullname!r} has no worker column that is known, and triggers of "
            "MySQL and MariaDB cannot tell which columns an UPDATE writes (they have no UPDATE OF "
            "column): progress, above all that of writers of full rows such as Payload, would "
            "look like a second claim. Have every loop write its own worker id when it claims, "
            "and name the column with JobTable(worker=...), or add one: ALTER TABLE "
            f"{job_table.table.fullname} ADD COLUMN worker VARCHAR(64) NULL"
        )


class _Rules:
    """When an UPDATE is refused, in terms of the trigger's rows OLD and NEW."""

    def __init__(self, job_table: JobTable, dialect: Dialect) -> None:
        self.job_table = job_table
        self.dialect = dialect
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
    def was_to_be_had_again(self) -> ColumnElement[bool]:
        """Build the condition that OLD's lease had expired and NEW is the next claim."""
        again = [
            and_(*conditions) for conditions, _ in predicates.claimable_branches(self.job_table)[1:]
        ]
        if not again:
            return false()
        # Without a token, what the next claim writes has to take the row away from all others.
        taken = not_(self.of(self.new, or_(*again)))
        return and_(
            self.of(self.old, or_(*again)),
            taken if self.job_table.token is None else self.changes_token,
        )

    @cached_property
    def changes_token(self) -> ColumnElement[bool]:
        """Build the condition that the UPDATE writes a new token, as this library's claims do."""
        if self.job_table.token is None:
            return false()
        new, old = self.both(self.job_table.token)
        return and_(new.is_not(None), new.is_distinct_from(old))

    @cached_property
    def takes(self) -> ColumnElement[bool]:
        """Build the condition that NEW has the mark of a claim and OLD was not free."""
        return and_(self.is_marked(self.new), not_(self.was_free))

    @cached_property
    def is_excused(self) -> ColumnElement[bool]:
        """Build the condition that such an UPDATE ends the job or reclaims an expired lease."""
        ends_it = and_(self.was_running, self.has_ended(self.new))
        return or_(ends_it, self.was_to_be_had_again)

    @cached_property
    def claims(self) -> ColumnElement[bool]:
        """Build the condition that the UPDATE, if it writes the state, makes a forbidden claim.

        That is to say: unless it is the progress of the one who runs the job.
        """
        return and_(self.takes, not_(self.is_excused))

    @cached_property
    def may_be_progress(self) -> ColumnElement[bool]:
        """Build the condition that a claimed row stays claimed and no ended row is reset."""
        undone = and_(self.has_ended(self.old), not_(self.has_ended(self.new)))
        return and_(self.is_marked(self.old), not_(undone))

    @property
    def proofs(self) -> list[tuple[Column[Any], ColumnElement[bool]]]:
        """Columns that show, if the UPDATE writes them and this holds, that it is progress."""
        worker, token, lease = self.job_table.worker, self.job_table.token, self.job_table.lease
        known = and_(self.may_be_progress, self.keeps(worker), self.keeps(token))
        found = []
        if worker is not None:
            found.append((worker, and_(known, self.names_worker(self.old))))
        if token is not None and lease is not None:
            # A token outlives its claim; only a lease shows that it belongs to the row's owner.
            leased = [row.c[lease.name].is_not(None) for row in (self.old, self.new)]
            found.append((token, and_(known, self.old.c[token.name].is_not(None), *leased)))
        return found

    def keeps(self, column: Column[Any] | None) -> ColumnElement[bool]:
        """Build the condition that the UPDATE leaves a column identical, whatever its collation."""
        if column is None:
            return true()
        new, old = self.both(column)
        if self.dialect.name != "postgresql":
            new, old = func.hex(new), func.hex(old)
        return new.is_not_distinct_from(old)

    def names_worker(self, row: TableClause) -> ColumnElement[bool]:
        """Build the condition that a row has a worker's name."""
        worker = self.job_table.worker
        assert worker is not None
        found = row.c[worker.name]
        return and_(found.is_not(None), found != "") if is_text(worker) else found.is_not(None)

    def message(self, what: str | None = None) -> ColumnElement[str]:
        """Build the error message: the job's key and the reason."""
        found: ColumnElement[str] = literal("atomic_claim: job ", Text())
        for place, part in enumerate(self.key):
            found += literal(", " * (place > 0) + part.name + "=", Text()) + self.key_text(part)
        return found + literal(f" of {self.table.fullname} {what or ''}", Text())

    def short_message(self, what: str) -> ColumnElement[str]:
        """Build the error message, cut to MySQL's limit."""
        found: ColumnElement[str] = func.left(self.message(what), LONGEST_MESSAGE)
        return found

    def key_text(self, part: Column[Any]) -> ColumnElement[str]:
        """Convert a column of the job's key to text, a binary one to hexadecimal."""
        old: Any = self.old.c[part.name]
        if not isinstance(plain_type(part.type), (LargeBinary, BINARY, VARBINARY)):
            return cast(old, Text())
        return func.encode(old, "hex") if self.dialect.name == "postgresql" else func.hex(old)

    def both(self, column: Column[Any]) -> tuple[ColumnElement[Any], ColumnElement[Any]]:
        """Return a column of NEW and of OLD."""
        return self.new.c[column.name], self.old.c[column.name]

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
                raise self.inexpressible(f"{str(part).split()[0]!r} begins a text or a subquery")
        clause: Any = condition
        return _sure(visitors.replacement_traverse(clause, {}, replace))

    def inexpressible(self, why: Any) -> ClaimError:
        """Return the error for a condition that a trigger cannot evaluate on one row."""
        return ClaimError(
            f"what is free, claimed or ended in {self.table.fullname!r} cannot be said of one row "
            f"in a trigger: {why}. Use the table's own columns and constants alone in "
            "JobTable(free=...), and a column of its own for whatever else keeps a job from running"
        )

    # --- as text

    def sql(self, clause: ColumnElement[Any]) -> str:
        """Compile a clause to SQL with literal values."""
        compiler: Any = _plain_compiler(self.dialect)
        try:
            return str(compiler(self.dialect, clause, compile_kwargs={"literal_binds": True}))
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
    """Build a function, and one trigger for each column that the guard watches.

    An UPDATE that writes the worker's column and leaves it as it is says whose it is, and is
    heard before the last trigger judges: triggers fire in the order of their names
    (https://www.postgresql.org/docs/current/trigger-definition.html). They see the row as it was
    when its lock was got, not as the statement had found it. What a claim of a free job does not
    get past stands in WHEN, where it costs no call of the function; it is short, since the server
    reads it anew for every statement.
    """
    function, table = rules.schema + rules.name(), rules.full_name
    who, takes = rules.sql(rules.message()), rules.sql(rules.takes)
    named = [
        (f"_1_named_{place}", rules.quoted(proof.name), rules.sql(holds))
        for place, (proof, holds) in enumerate(rules.proofs, 1)
    ]
    triggers = [*named, ("_2_judge", rules.state, "")]
    says = "".join(_postgresql_proof(suffix, holds) for suffix, _, holds in named)
    what = rules.sql(case((rules.was_running, literal(RUNNING)), else_=literal(ENDED)))
    body = f"""
    CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $atomic_claim$
    DECLARE
        who text := {who};
    BEGIN
        IF {rules.sql(rules.is_excused)} THEN
            RETURN NEW;
        END IF;{says}
        RAISE EXCEPTION USING
            ERRCODE = 'integrity_constraint_violation',
            MESSAGE = who || {what},
            HINT = {rules.sql(literal(_hint(rules)))};
    END $atomic_claim$
    """
    made = [
        f"CREATE TRIGGER {rules.name(suffix)} BEFORE UPDATE OF {columns} ON {table} "
        f"FOR EACH ROW WHEN ({takes}) EXECUTE PROCEDURE {function}('{suffix}')"
        for suffix, columns, _ in triggers
    ]
    dropped = [f"DROP TRIGGER {rules.name(suffix)} ON {table}" for suffix, *_ in triggers]
    return Guard((_text(body), *made), (*dropped, f"DROP FUNCTION {function}()"))


def _postgresql_proof(suffix: str, holds: str) -> str:
    """Keep what the trigger of a column has seen, until the last trigger asks for it."""
    return f"""
        IF TG_ARGV[0] = '{suffix}' THEN
            PERFORM set_config('{NAMED}', who, true) WHERE {holds};
            RETURN NEW;
        ELSIF TG_ARGV[0] = '_2_judge' AND {holds}
            AND current_setting('{NAMED}', true) = who
        THEN
            RETURN NEW;
        END IF;"""


def _hint(rules: _Rules) -> str:
    """Return the hint for the author of a refused UPDATE."""
    state = ", ".join(c.name for c in rules.deciding)
    proofs = " or ".join(column.name for column, _ in rules.proofs)
    also = f", or together with {proofs} as the claim left it" if proofs else ""
    return (
        "If this was a claim, look for another job. If it was progress, write it without "
        f"{state}{also}."
    )


def _sqlite(rules: _Rules) -> Guard:
    """One trigger, or several with a table for their notes.

    RAISE takes no message but a constant before SQLite 3.47, and a file with another one could not
    be opened by an older SQLite. What is wrong with a path of JSON is quoted in full, so the
    message goes that way; RAISE has the whole statement undone.
    """
    if rules.proofs:
        return _sqlite_with_notes(rules)
    refusal, abort = _sqlite_refusal(rules)
    made = f"""
    CREATE TRIGGER {rules.schema}{rules.name()} BEFORE UPDATE OF {rules.state} ON {rules.bare_name}
    FOR EACH ROW WHEN {rules.sql(rules.claims)} BEGIN
        SELECT {refusal};
        SELECT {abort};
    END
    """
    return Guard((_text(made),), (f"DROP TRIGGER {rules.schema}{rules.name()}",))


def _sqlite_with_notes(rules: _Rules) -> Guard:
    """Triggers that note which columns an UPDATE writes, and one that judges and wipes the notes.

    Several triggers of one kind fire in no certain order, but all BEFORE an UPDATE precede those
    AFTER it (https://www.sqlite.org/lang_createtrigger.html), and a row's come before the next
    row's. So the table of notes is empty whenever no UPDATE is under way.
    """
    refusal, abort = _sqlite_refusal(rules)
    table, schema, notes = rules.bare_name, rules.schema, rules.name()
    keys = {f"key_{place}": f"OLD.{rules.quoted(c.name)}" for place, c in enumerate(rules.key, 1)}
    same = " AND ".join(f"{name} IS {key}" for name, key in keys.items())
    into = f"INSERT INTO {notes} VALUES"
    note = f"SELECT 1 FROM {notes} WHERE {same} AND written"  # noqa: S608 - quoted names
    guilty = f"EXISTS ({note} = 'state') AND NOT EXISTS ({note} = 'name')"
    noting = [("_state", rules.state, rules.claims, "state")]
    for place, (proof, holds) in enumerate(rules.proofs, 1):
        condition = and_(rules.claims, holds)
        noting.append((f"_name_{place}", rules.quoted(proof.name), condition, "name"))
    written = ", ".join(dict.fromkeys(columns for _, columns, _, _ in noting))
    made = [
        f"CREATE TRIGGER {schema}{rules.name(suffix)} BEFORE UPDATE OF {columns} ON {table} "
        f"FOR EACH ROW WHEN {rules.sql(condition)} BEGIN "
        f"{into} ('{kind}', {', '.join(keys.values())}); END"
        for suffix, columns, condition, kind in noting
    ]
    judge = f"""
    CREATE TRIGGER {schema}{rules.name("_judge")} AFTER UPDATE OF {written} ON {table}
    FOR EACH ROW WHEN {rules.sql(rules.claims)} BEGIN
        SELECT {refusal} WHERE {guilty};
        SELECT {abort} WHERE {guilty};
        DELETE FROM {notes} WHERE {same};
    END
    """  # noqa: S608 - quoted names
    suffixes = [*(suffix for suffix, *_ in noting), "_judge"]
    return Guard(
        (f"CREATE TABLE {schema}{notes} (written, {', '.join(keys)})", *made, _text(judge)),
        (
            *(f"DROP TRIGGER {schema}{rules.name(suffix)}" for suffix in suffixes),
            f"DROP TABLE {schema}{notes}",
        ),
    )


def _sqlite_refusal(rules: _Rules) -> tuple[str, str]:
    """Return an expression that fails with our message, and a RAISE in case it does not."""
    what = case((rules.was_running, RUNNING), else_=ENDED)
    refusal = f"json_extract('{{}}', {rules.sql(rules.message() + what)})"
    return refusal, "RAISE(ABORT, 'atomic_claim: this claim is refused')"


def _mysql(rules: _Rules) -> Guard:
    """Build a trigger on every UPDATE of the table; the worker column identifies claims."""
    worker, token = rules.job_table.worker, rules.job_table.token
    assert worker is not None
    same = and_(rules.may_be_progress, rules.keeps(worker), rules.keeps(token))
    claims = and_(rules.claims, not_(same))
    named = or_(rules.names_worker(rules.new), rules.changes_token)
    refused = case(
        (and_(claims, rules.was_running), rules.short_message(RUNNING)),
        (claims, rules.short_message(ENDED)),
        (
            and_(rules.is_marked(rules.new), rules.was_free, not_(named)),
            rules.short_message(UNNAMED + worker.name),
        ),
        else_=null(),
    )
    trigger = rules.schema + rules.name()
    made = f"""
    CREATE TRIGGER {trigger} BEFORE UPDATE ON {rules.full_name} FOR EACH ROW
    BEGIN
        DECLARE refused VARCHAR({LONGEST_MESSAGE}) CHARACTER SET utf8mb4;
        SET refused = {rules.sql(refused)};
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
    """Wrap a condition so that NULL counts as false."""
    return func.coalesce(condition, false())


def _text(sql: str) -> str:
    return textwrap.dedent(sql).strip()


def _plain_compiler(dialect: Dialect) -> Any:
    """Return a compiler whose literals have no percent signs, which some drivers want doubled."""
    base: Any = dialect.statement_compiler

    class Plain(base):  # type: ignore[misc]
        def render_literal_value(self, value: Any, type_: Any) -> str:
            return _without_percent(super().render_literal_value(value, type_), dialect)

    return Plain


def _without_percent(text: str, dialect: Dialect) -> str:
    if "%" not in text or not text.startswith("'") or dialect.name == "sqlite":
        return text
    value = text[1:-1].replace("''", "'")
    if dialect.identifier_preparer._double_percents:  # noqa: SLF001 - it doubled them
        value = value.replace("%%", "%")
    if dialect.name == "postgresql":
        escaped = value.replace("\\", "\\\\").replace("'", "''").replace("%", r"\x25")
        return f"E'{escaped}'"
    # MySQL's own sign for a backslash, unless the server's mode says otherwise.
    if getattr(dialect, "_backslash_escapes", True):
        value = value.replace("\\\\", "\\")
    return f"_utf8mb4 X'{value.encode().hex()}'"
