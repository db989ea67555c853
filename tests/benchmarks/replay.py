"""The statements of a claim, recorded, and executed again without the library."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from atomic_claim.plan import TOKEN
from atomic_claim.sql_elements import KEYS
from tests.benchmarks.measuring import check_whole


@dataclass(frozen=True)
class Step:
    """One statement of a claim.

    Attributes:
        element: the SQLAlchemy construct that the library executes, built before.
        params: the parameters that it is executed with.
        text: the SQL that reaches the driver.
        values: the parameters that reach the driver.
        kind: what the statement is for; several of one kind share the keys among them.
    """

    element: Any
    params: dict[str, Any]
    text: str
    values: Any
    kind: str

    @property
    def keys(self) -> int:
        """The number of keys that the statement is executed with."""
        return len(self.params.get(KEYS, ()))

    @property
    def returns_rows(self) -> bool:
        """Return True if the statement returns rows."""
        return self.kind != "mark" or "RETURNING" in self.text


Execute = Callable[[Step, dict[str, Any]], Sequence[Any]]
"""Executes a step with the parameters that differ from the recorded ones, and returns its rows."""


@contextmanager
def recorded(engine: sa.Engine) -> Iterator[list[Step]]:
    """Yield a list that collects the statements of an engine until the block ends."""
    found: list[Step] = []
    elements: list[tuple[Any, dict[str, Any]]] = []

    def constructed(_conn: Any, element: Any, many: Any, params: Any, _options: Any) -> None:
        elements.append((element, dict(params or (many[0] if many else {}))))

    def sent(_conn: Any, _cursor: Any, text: str, values: Any, *_: Any) -> None:
        element, params = elements[-1]
        found.append(Step(element, params, text, values, _kind(text, params)))

    listeners = {"before_execute": constructed, "before_cursor_execute": sent}
    for name, listener in listeners.items():
        event.listen(engine, name, listener)
    try:
        yield found
    finally:
        for name, listener in listeners.items():
            event.remove(engine, name, listener)


def steps_of(url: sa.URL, claim: Callable[[sa.Engine], Any]) -> list[Step]:
    """Return the statements of the second of two claims on an engine of their own."""
    engine = sa.create_engine(url)
    claim(engine)
    with recorded(engine) as found:
        claim(engine)
    engine.dispose()
    return found


def replay(steps: Sequence[Step], limit: int) -> Callable[[Execute], None]:
    """Return a claim that executes the steps in order, and hands the keys from one to the next.

    Args:
        steps: the statements of a claim of `limit` rows.
        limit: the number of rows that each execution has to return.
    """
    parts = [list(group) for _, group in groupby(steps, key=lambda step: step.kind)]
    has_token = any(TOKEN in step.params for step in steps)

    def claim(execute: Execute) -> None:
        given = {TOKEN: secrets.token_hex(16)} if has_token else {}
        found: list[Any] = []
        for part in parts:
            left = iter([_key(row) for row in found]) if part[0].keys else iter(())
            rows: list[Any] = []
            for step in part:
                more = {KEYS: list(islice(left, step.keys))} if step.keys else {}
                rows += execute(step, given | more)
            found = rows or found
        check_whole(found, limit)

    return claim


def by_core(connection: sa.Connection) -> Execute:
    """Execute the constructs by SQLAlchemy Core."""

    def execute(step: Step, given: dict[str, Any]) -> Sequence[Any]:
        result = connection.execute(step.element, step.params | given)
        return result.all() if step.returns_rows else ()

    return execute


def by_orm(session: Any) -> Execute:
    """Execute the constructs by a session, which makes its entities of what they return."""

    def execute(step: Step, given: dict[str, Any]) -> Sequence[Any]:
        result = session.execute(step.element, step.params | given)
        rows: Sequence[Any] = result.unique().all() if step.returns_rows else ()
        return rows

    return execute


def _key(row: Any) -> Any:
    """Return the key of a row, whose first column is the key or an entity."""
    return getattr(row[0], "id", row[0])


def _kind(text: str, params: dict[str, Any]) -> str:
    if text.startswith("UPDATE"):
        return "mark"
    if KEYS not in params:
        return "find"
    return "lock" if "FOR UPDATE" in text else "read"
