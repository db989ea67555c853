"""Claims handed to the driver's cursor rather than to SQLAlchemy's connection.

Of what SQLAlchemy does around a statement, half of a short claim's time, all but the text and the
types is for those who listen. Where nobody does, nobody can tell the difference.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import CursorResult, Dialect, Engine, Result, Row, Select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.compiler import SQLCompiler

from atomic_claim.plan import LEASE, LIMIT, SCAN_LIMIT, TOKEN, WORKER, ClaimPlan
from atomic_claim.sql_elements import KEYS

from .base import KeyedRows, Transaction, row_maker

OURS = frozenset({LIMIT, SCAN_LIMIT, TOKEN, WORKER, LEASE, KEYS})
# The limit is part of the text, and how many keys there are; so many texts are kept.
MOST_TEXTS = 100
# Of so many engines is remembered how their drivers claim some plan.
MOST_DIALECTS = 16
Process = Callable[[Any], Any]
Params = Mapping[str, Any]


def is_watched(engine: Engine) -> bool:
    """Check whether an engine is subclassed or has listeners, execution options or logging."""
    # https://docs.sqlalchemy.org/en/20/core/events.html, but for two phases and savepoints.
    of_engine, of_dialect = engine.dispatch, engine.dialect.dispatch
    return bool(
        of_engine.engine_connect
        or of_engine.begin
        or of_engine.commit
        or of_engine.rollback
        or of_engine.before_execute
        or of_engine.after_execute
        or of_engine.before_cursor_execute
        or of_engine.after_cursor_execute
        or of_dialect.do_execute
        or of_dialect.handle_error
        or engine.get_execution_options()
        or engine.logger.isEnabledFor(logging.INFO)
        # Whoever makes engines of another kind has a reason to see what they execute.
        or type(engine) is not Engine
    )


class Failed(Exception):
    """The driver has refused a statement, or it is not known yet: nothing is claimed.

    So the claim may be tried again, on the same connection, for all that SQLAlchemy does about an
    error. If the connection is lost, nothing can succeed on it.
    """


@dataclass
class Learned:
    """The direct claim of some parts on a dialect's driver, as far as it has been learned.

    Attributes:
        claim: does it on a connection of the driver's own, or raises ``Failed``; None until it is
            known how.
        seen: whether SQLAlchemy has done it before.
        fits: whether all statements that are known can be executed directly.
        statements: the statements it takes, as far as they are known.
    """

    claim: Callable[[PoolProxiedConnection, Params], KeyedRows] | None = None
    seen: bool = False
    fits: bool = True
    statements: MutableMapping[Executable, Direct | None] = field(default_factory=WeakKeyDictionary)


def learned_of(plan: ClaimPlan, dialect: Dialect) -> Learned:
    """Return the ``Learned`` of these parts for a dialect, and create it if it is missing."""
    known: dict[Dialect, Learned] = plan.prepare("learned", lambda _: {})
    if (found := known.get(dialect)) is None:
        # Threads may be doing the same.
        for oldest in list(known)[: len(known) - MOST_DIALECTS + 1]:
            known.pop(oldest, None)
        found = known[dialect] = Learned()
    return found


def learn(
    tx: Transaction,
    plan: ClaimPlan,
    result: Result[Any],
    claim: Callable[[ClaimPlan, Direct, PoolProxiedConnection, Params], KeyedRows],
) -> None:
    """Learn from a claim of one statement how to do without SQLAlchemy.

    Not from the first: parts that are made anew for every claim are better off with SQLAlchemy.
    """
    if not (tx.unheard and tx.single) or not isinstance(result, CursorResult):
        return
    learned = learned_of(plan, tx.dialect)
    if not learned.seen:
        learned.seen = True
    elif learned.claim is None:
        direct = Direct(result, tuple(plan.job_table.table.columns), tx.dialect)
        if direct.fits:
            learned.claim = partial(claim, plan, direct)


class Text(NamedTuple):
    """The text for one limit and number of keys, and its parameters.

    Attributes:
        text: what the driver executes.
        fixed: the parameters that are the same each time.
        ours: the names of the others, and what makes the driver's values of them.
        keys: the names of a list of keys, and what makes the driver's values of them.
        places: in which order the driver wants them, if not by name.
    """

    text: str
    fixed: dict[str, Any]
    ours: Sequence[tuple[str, Process | None]]
    keys: tuple[Sequence[str], Process | None]
    places: Sequence[str] | None


class Direct:
    """A statement as a dialect's driver takes it, and its rows as SQLAlchemy gives them.

    Args:
        result: what SQLAlchemy has made of the statement before.
        columns: what it returns; what more it returns is the backend's, and raw.
        dialect: the database's.

    Attributes:
        fits: whether nothing has to be asked at every execution but what is ours.
    """

    def __init__(self, result: CursorResult[Any], columns: Sequence[Any], dialect: Dialect) -> None:
        compiled = result.context.compiled
        assert isinstance(compiled, SQLCompiler)
        others = [bind for name, bind in compiled.binds.items() if name not in OURS]
        asks = any(bind.callable or bind.expanding for bind in others)
        # Python's own onupdate is called for every execution.
        self.fits = not (asks or compiled.update_prefetch)
        self.compiled = compiled
        self.dialect = dialect
        # It makes a list of values of one parameter, in less time than of many.
        self.takes_lists = dialect.driver == "pymysql"
        # Not the statement's own: SQLAlchemy may have compiled an equal one with other values.
        given = result.context.compiled_parameters[0]
        self.fixed = {name: value for name, value in given.items() if name not in OURS}
        self.writers = {
            name: writer
            for name, bind in compiled.binds.items()
            if (writer := bind.type.dialect_impl(dialect).bind_processor(dialect)) is not None
        }
        self.make: Callable[[Any], Any] = row_maker(result, columns) if columns else tuple
        self.types = [column.type.dialect_impl(dialect) for column in columns]
        # None until the driver has said what it returns; empty if that is as it should be.
        self.readers: list[Process | None] | None = None
        self.texts: dict[tuple[int | None, int | None, int], Text] = {}

    def fetch(self, pooled: PoolProxiedConnection, params: Params) -> Sequence[Any]:
        """Claim, and return what the driver does.

        Raises:
            Failed: the driver has refused the statement.
            DBAPIError: what was claimed cannot be read.
        """
        driver: Any = pooled.driver_connection
        failure: Any = self.dialect.loaded_dbapi.Error
        cursor = driver.cursor()
        try:
            try:
                cursor.execute(*self._asked(params))
            except failure as error:
                raise Failed from error
            try:
                return self._fetched(cursor)
            except failure as error:
                # These rows are claimed already: they must not be followed by others.
                raise DBAPIError.instance(
                    None, None, error, failure, dialect=self.dialect
                ) from error
        finally:
            cursor.close()

    def execute(self, cursor: Any, params: Params) -> Iterable[tuple[Any, ...]]:
        """Execute by a cursor, and return what it does, if anything."""
        cursor.execute(*self._asked(params))
        return self._read(self._fetched(cursor)) if self.types else ()

    def found(self, plan: ClaimPlan, fetched: Sequence[Any]) -> KeyedRows:
        """Convert the driver's rows to SQLAlchemy rows, each with its key."""
        make, key_of = self.make, plan.key_of
        return [(key_of(row), make(row)) for row in self._read(fetched)]

    def _fetched(self, cursor: Any) -> Sequence[Any]:
        fetched: Sequence[Any] = cursor.fetchall()
        if self.readers is None:
            readers = [
                type_.result_processor(self.dialect, what[1])
                for type_, what in zip(self.types, cursor.description, strict=False)
            ]
            more = len(cursor.description) > len(self.types)
            self.readers = readers if more or any(readers) else []
        return fetched

    def _read(self, fetched: Sequence[Any]) -> Iterable[tuple[Any, ...]]:
        if not self.readers or not fetched:
            return fetched
        columns = zip(self.readers, zip(*fetched, strict=True), strict=False)
        read = [values if reader is None else map(reader, values) for reader, values in columns]
        return zip(*read, strict=True)

    def _asked(self, params: Params) -> tuple[str, Any]:
        """Return the SQL text and the driver's parameters for one execution."""
        keys: Sequence[Any] = params.get(KEYS, ())
        count = min(len(keys), 1) if self.takes_lists else len(keys)
        shape = (params.get(LIMIT), params.get(SCAN_LIMIT), count)
        if (known := self.texts.get(shape)) is None:
            if len(self.texts) >= MOST_TEXTS:
                self.texts.clear()
            known = self.texts[shape] = self._text(params)
        text, fixed, ours, (names, writer), places = known
        values = fixed.copy()
        for name, process in ours:
            values[name] = params[name] if process is None else process(params[name])
        if keys:
            written = [writer(key) for key in keys] if writer else keys
            if self.takes_lists:
                values[KEYS] = written
            else:
                values.update(zip(names, written, strict=True))
        return text, values if places is None else [values[name] for name in places]

    def _text(self, params: Params) -> Text:
        given = {**self.fixed, **params}
        if self.takes_lists and KEYS in given:
            given[KEYS] = given[KEYS][:1]
        state = self.compiled.construct_expanded_state(given, escape_names=False)
        keys, text = state.parameter_expansion.get(KEYS, []), state.statement
        if self.takes_lists and keys:
            text = text.replace(f"(%({keys[0]})s)", f"%({KEYS})s")
        writers, places = self.writers, state.positiontup
        escaped = self.compiled.escaped_bind_names if places is None else {}
        fixed = {
            escaped.get(name, name): value
            if (writer := writers.get(name)) is None
            else writer(value)
            for name, value in state.parameters.items()
            if name not in OURS.union(keys)
        }
        ours = [(name, writers.get(name)) for name in state.parameters if name in OURS]
        return Text(text, fixed, ours, (keys, writers.get(KEYS)), places)


@dataclass(frozen=True)
class OnDriver:
    """A transaction of our own on a connection of the driver's own.

    Attributes:
        dialect: the database's.
        pooled: the connection.
        cursor: the driver's.
        learned: the statements that can be executed.
    """

    dialect: Dialect
    pooled: PoolProxiedConnection
    cursor: Any
    learned: Learned
    own: bool = True
    in_autocommit: bool = False

    def rows(self, statement: Executable, params: Params | None = None) -> Sequence[Row[Any]]:
        """Execute, and return the rows."""
        direct = self._direct(statement)
        return [direct.make(row) for row in direct.execute(self.cursor, params or {})]

    def tuples(self, statement: Executable, params: Params | None = None) -> list[tuple[Any, ...]]:
        """Execute, and return the rows as plain tuples."""
        return list(self._direct(statement).execute(self.cursor, params or {}))

    def write(self, statement: Executable, params: Params | None = None) -> None:
        """Execute what returns no rows."""
        self._direct(statement).execute(self.cursor, params or {})

    def _direct(self, statement: Executable) -> Direct:
        direct = self.learned.statements.get(statement)
        if direct is None or not direct.fits:
            raise Failed
        return direct

    def entities(self, statement: Executable, params: Params | None = None) -> Sequence[Any]:
        """There is no session that could have any."""
        raise Failed


@dataclass(frozen=True, kw_only=True)
class Learning(Transaction):
    """A transaction of our own, from whose statements is learned how to do without SQLAlchemy."""

    learned: Learned

    def rows(self, statement: Executable, params: Params | None = None) -> Sequence[Row[Any]]:
        result = self.connection.execute(statement, params)
        statements = self.learned.statements
        if statement not in statements:
            statements[statement] = None
        elif statements[statement] is None:
            columns = tuple(statement.selected_columns) if isinstance(statement, Select) else ()
            statements[statement] = direct = Direct(result, columns, self.dialect)
            self.learned.seen = True
            self.learned.fits = self.learned.fits and direct.fits
        return result.all() if result.returns_rows else []

    def write(self, statement: Executable, params: Params | None = None) -> None:
        self.rows(statement, params)
