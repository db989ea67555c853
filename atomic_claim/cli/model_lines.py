"""The lines for the model that go with a migration, so that Alembic finds the two alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Table
from sqlalchemy.sql.elements import ColumnClause

from atomic_claim.job_table import JobTable

from .indexes import NeededIndex
from .operations import AddColumn, Operation, Statements
from .texts import dialect_of, quoted_literal


def model_lines(given: Any, spec: str, steps: Sequence[Operation], names: Sequence[str]) -> str:
    """Render the columns and indexes of a migration as the model has to declare them.

    Args:
        given: what ``--table`` names: a ``Table``, a mapped class or a ``JobTable``.
        spec: how it is named.
        steps: the migration.
        names: the databases that are meant.

    Returns:
        Python source, after ``import sqlalchemy as sa`` and, for a lease,
        ``from sqlalchemy.dialects import mysql``.
    """
    name = spec.rpartition(":")[2] if ":" in spec else "table"
    owner = f"{name}.c"
    if isinstance(given, JobTable):
        owner = f"{name}.table.c"
    elif not isinstance(given, Table):
        owner = f"{name}.__table__.c"
    lines = []
    for step in steps:
        if isinstance(step, AddColumn):
            column = f"{quoted_literal(step.name)}, {step.source}, nullable=True"
            lines.append(f"sa.Column({column}),  # in the table")
        elif isinstance(step, Statements) and step.index is not None:
            wanted = [each for each in names if each in step.does]
            lines += _of_each(step.index, owner, wanted)
    return "\n".join(lines)


def _of_each(index: NeededIndex, owner: str, names: Sequence[str]) -> Iterator[str]:
    """Yield the index's line for each database, or one line for those that share it."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_line(index, owner, name), []).append(name)
    for line, those in found.items():
        yield line if len(found) == 1 else f"{line}  # on {', '.join(those)}"


def _line(index: NeededIndex, owner: str, name: str) -> str:
    dialect = dialect_of(name)
    parts, where = index.parts(dialect)
    terms = [quoted_literal(index.name), *(_term(owner, part, name) for part in parts)]
    if where:
        terms.append(f"{name}_where=sa.text({quoted_literal(where.replace(':', chr(92) + ':'))})")
    return f"sa.Index({', '.join(terms)})"


def _term(owner: str, part: tuple[ColumnElement[Any], str], name: str) -> str:
    element, suffix = part
    if isinstance(element, ColumnClause):
        key = getattr(element, "key", None) or element.name
        found = f"{owner}.{key}" if key.isidentifier() else f"{owner}[{quoted_literal(key)}]"
    else:
        text = str(
            element.compile(
                dialect=dialect_of(name),
                compile_kwargs={"include_table": False, "literal_binds": True},
            )
        )
        found = f"sa.literal_column({quoted_literal(text)})"
    methods = {" DESC": ".desc()", " ASC": ".asc()"}
    ends = {" NULLS FIRST": ".nulls_first()", " NULLS LAST": ".nulls_last()"}
    for word, method in (methods | ends).items():
        found += method if word in suffix.upper() else ""
    return found
