"""A claim of one statement, handed to the driver's cursor rather than to SQLAlchemy's.

Of what SQLAlchemy does around a statement, half of a short claim's time, all but the text and the
types is for those who listen. Where nobody does, nobody can tell the difference.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import CursorResult, Dialect, Engine, Result
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.compiler import SQLCompiler

from atomic_claim.statement import LEASE, LIMIT, REACH, TOKEN, WORKER, ClaimParts

from .base import Found, Work, row_maker

OURS = frozenset({LIMIT, REACH, TOKEN, WORKER, LEASE})
# The limit is part of the text; so many texts are kept.
MOST_TEXTS = 100
Process = Callable[[Any], Any]


def is_watched(engine: Engine) -> bool:
    """Whether anybody hears of an engine's statements, or has options for them."""
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
    )


def direct_of(work: Work, parts: ClaimParts) -> Direct | None:
    """How to claim these parts by the driver's own cursor; None where SQLAlchemy has to do it."""
    if not work.direct:
        return None
    found = _known(parts).get(work.connection.dialect)
    return found if found is not None and found.fits else None


def note(work: Work, parts: ClaimParts, result: Result[Any]) -> None:
    """Learn from a claim that SQLAlchemy has executed how to do it directly.

    Not from the first: parts that are made anew for every claim are better off with SQLAlchemy.
    """
    known, dialect = _known(parts), work.connection.dialect
    if not work.direct or known.get(dialect) is not None or not isinstance(result, CursorResult):
        return
    known[dialect] = Direct(parts, result, dialect) if dialect in known else None


def _known(parts: ClaimParts) -> WeakKeyDictionary[Dialect, Direct | None]:
    return parts.prepare("direct", lambda _: WeakKeyDictionary())


class Text(NamedTuple):
    """The text for one limit, and its parameters: what is the same each time, what is ours.

    ``places`` says in which order the driver wants them, if not by name.
    """

    text: str
    fixed: dict[str, Any]
    ours: list[tuple[str, Process | None]]
    places: Sequence[str] | None


class Direct:
    """The one statement as a dialect's driver takes it, and its rows as SQLAlchemy gives them.

    Attributes:
        fits: whether nothing has to be asked at every execution but what is ours.
    """

    def __init__(self, parts: ClaimParts, result: CursorResult[Any], dialect: Dialect) -> None:
        compiled = result.context.compiled
        assert isinstance(compiled, SQLCompiler)
        others = [bind for name, bind in compiled.binds.items() if name not in OURS]
        self.fits = not any(bind.callable or bind.expanding for bind in others)
        self.compiled = compiled
        self.dialect = dialect
        self.key_of = parts.key_of
        # Not the statement's own: SQLAlchemy may have compiled an equal one with other values.
        given = result.context.compiled_parameters[0]
        self.fixed = {name: value for name, value in given.items() if name not in OURS}
        columns = tuple(parts.job_table.table.columns)
        # What more is returned is the strategy's, and raw.
        self.make = row_maker(result, columns)
        self.types = [column.type.dialect_impl(dialect) for column in columns]
        self.readers: list[Process | None] | None = None
        self.texts: dict[int, Text] = {}

    def fetch(self, work: Work, params: Mapping[str, Any]) -> Sequence[Any] | None:
        """Claim, and return what the driver does; None if it has to be tried by SQLAlchemy.

        A statement that fails has claimed nothing, so it may be executed again, for all that
        SQLAlchemy does about an error. If it took its connection with it, it cannot be.
        """
        driver: Any = work.connection.connection.driver_connection
        failure: Any = self.dialect.loaded_dbapi.Error
        text, values = self._asked(params)
        cursor = driver.cursor()
        try:
            try:
                cursor.execute(text, values)
            except failure:
                return None
            try:
                fetched: Sequence[Any] = cursor.fetchall()
            except failure as error:
                # These rows are claimed already: they must not be followed by others.
                raise DBAPIError.instance(
                    None, None, error, failure, dialect=self.dialect
                ) from error
            if self.readers is None:
                self.readers = [
                    type_.result_processor(self.dialect, what[1])
                    for type_, what in zip(self.types, cursor.description, strict=False)
                ]
            return fetched
        finally:
            cursor.close()

    def found(self, fetched: Sequence[Any]) -> Found:
        """The keys and the rows of what the driver has returned."""
        if any(self.readers or ()):
            columns = zip(self.readers or (), zip(*fetched, strict=True), strict=False)
            read = [values if reader is None else map(reader, values) for reader, values in columns]
            fetched = list(zip(*read, strict=True))
        make, key_of = self.make, self.key_of
        return [(key_of(row), make(row)) for row in fetched]

    def _asked(self, params: Mapping[str, Any]) -> tuple[str, Any]:
        """The text and the parameters of one execution."""
        limit = params[LIMIT]
        if limit not in self.texts:
            if len(self.texts) >= MOST_TEXTS:
                self.texts.clear()
            self.texts[limit] = self._text(params)
        known = self.texts[limit]
        values = known.fixed.copy()
        for name, process in known.ours:
            values[name] = params[name] if process is None else process(params[name])
        return known.text, values if known.places is None else [values[n] for n in known.places]

    def _text(self, params: Mapping[str, Any]) -> Text:
        state = self.compiled.construct_expanded_state({**self.fixed, **params})
        processes: Any = state.processors
        fixed = {
            name: value if (process := processes.get(name)) is None else process(value)
            for name, value in state.parameters.items()
            if name not in OURS
        }
        ours = [(name, processes.get(name)) for name in state.parameters if name in OURS]
        return Text(state.statement, fixed, ours, state.positiontup)
