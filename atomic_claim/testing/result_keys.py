"""Which jobs a user's function handed out, whatever it returns."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import InstanceState

from .database import CommandError
from .results import Key
from .rows import mapper_of, tables_of

# So much of what cannot be read is quoted.
SHOWN = 80
SCALARS = (int, str, bytes, uuid.UUID)


class Reader:
    """Reads the primary keys of jobs from what a function returns.

    Args:
        given: the table, mapped class or ``JobTable``.
        most: more jobs of one call than these are not looked at: some generators never end.
    """

    def __init__(self, given: Any, most: int) -> None:
        tables = tables_of(given)
        self._most = most
        self._tables = frozenset(tables)
        self._key = tuple(tables[0].primary_key.columns)
        self._names: list[list[Any]] = [[each, each.key, each.name] for each in self._key]
        if (mapper := mapper_of(given)) is not None:
            for names, column in zip(self._names, self._key, strict=True):
                names.append(mapper.get_property_by_column(column).key)

    def keys(self, found: Any) -> tuple[Key, ...]:
        """Return the keys of the jobs in the order in which they were handed out.

        Raises:
            CommandError: no primary key can be found in it.
        """
        if found is None or found is False:
            return ()
        jobs = [found] if self._is_one(found) else islice(found, self._most)
        return tuple(map(self._key_of, jobs))

    def _is_one(self, found: Any) -> bool:
        if isinstance(found, (Mapping, sa.Row, *SCALARS)) or _state_of(found) is not None:
            return True
        if isinstance(found, tuple):
            return hasattr(found, "_fields") or (len(found) > 1 and self._is_key(found))
        return not isinstance(found, Iterable)

    def _key_of(self, job: Any) -> Key:
        values = self._values(job)
        if values is None or None in values:
            names = ", ".join(column.name for column in self._key)
            raise CommandError(
                f"it handed out {_short(job)}, in which no primary key ({names}) can be found; "
                "expected entities, rows, dictionaries or keys, one or several: write a function "
                "that returns such, and name it with call="
            )
        return tuple(
            _text(value, column.type) for value, column in zip(values, self._key, strict=True)
        )

    def _values(self, job: Any) -> Sequence[Any] | None:
        state = _state_of(job)
        # Kept when the entity's attributes have expired, and when it has left its session.
        if state is not None and state.identity and self._tables & {*state.mapper.tables}:
            return state.identity
        if isinstance(job, sa.Row):
            return self._of_row(job)
        if isinstance(job, Mapping):
            return self._by_name(job.get)
        if isinstance(job, SCALARS):
            return [job] if len(self._key) == 1 and not isinstance(job, bool) else None
        if isinstance(job, (tuple, list)) and not hasattr(job, "_fields"):
            if self._is_key(job):
                return job
            return self._values(job[0]) if len(job) == 1 else None
        return self._by_name(lambda name: getattr(job, str(name), None))

    def _of_row(self, row: sa.Row[Any]) -> Sequence[Any] | None:
        mapping: Any = row._mapping  # noqa: SLF001 - its documented name
        if (found := self._by_name(mapping.get)) is not None:
            return found
        entities = [each for each in row if _state_of(each) is not None]
        if entities:
            return self._values(entities[0])
        return [row[0]] if len(row) == len(self._key) == 1 else None

    def _by_name(self, get: Callable[[Any], Any]) -> list[Any] | None:
        values = [
            next((found for name in names if (found := get(name)) is not None), None)
            for names in self._names
        ]
        return None if None in values else values

    def _is_key(self, found: Sequence[Any]) -> bool:
        return len(found) == len(self._key) and all(isinstance(each, SCALARS) for each in found)


def _state_of(found: Any) -> InstanceState[Any] | None:
    state = sa.inspect(found, raiseerr=False)
    return state if isinstance(state, InstanceState) else None


def _text(value: Any, type_: Any) -> str:
    # A UUID is written with and without its hyphens.
    if isinstance(value, str) and getattr(type_, "as_uuid", None) is not None:
        with suppress(ValueError):
            return str(uuid.UUID(value))
    return str(value)


def _short(job: Any) -> str:
    text = " ".join(repr(job).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
