"""The lines for the model that go with a migration, so that Alembic finds the two alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Table
from sqlalchemy.sql.elements import ColumnClause

from atomic_claim.job_table import JobTable

from .indexes import NeededIndex, Term
from .operations import AddedColumn, Step
from .texts import dialect_of, quoted_literal


def model_lines(given: Any, spec: str, steps: Sequence[Step]) -> list[str]:
    """Render the columns and indexes of a migration as the model has to declare them.

    Args:
        given: what ``--table`` names: a ``Table``, a mapped class or a ``JobTable``.
        spec: how it is named.
        steps: the migration.

    Returns:
        Python source, after ``import sqlalchemy as sa`` and, for a lease,
        ``from sqlalchemy.dialects import mysql``.
    """
    name = spec.rpartition(":")[2] if ":" in spec else "table"
    table = name if isinstance(given, Table) else f"{name}.__table__"
    owner = f"{name}.table.c" if isinstance(given, JobTable) else f"{table}.c"
    lines = []
    for step in steps:
        if isinstance(step.made, AddedColumn):
            column = f"{quoted_literal(step.made.name)}, {step.made.source}, nullable=True"
            lines.append(f"sa.Column({column}),  # in the table")
        elif step.made is not None:
            lines += _of_each(step.made, owner, list(step.up))
    return lines


def _of_each(index: NeededIndex, owner: str, names: Sequence[str]) -> Iterator[str]:
    """Yield the index's line for each database, or one line for those that share it."""
    found: dict[str, list[str]] = {}
    for name in names:
        terms, where = index.parts(dialect_of(name))
        said = [quoted_literal(index.name), *(_source(owner, term) for term in terms)]
        if where:
            text = where.replace(":", r"\:")
            said.append(f"{name}_where=sa.text({quoted_literal(text)})")
        found.setdefault(f"sa.Index({', '.join(said)})", []).append(name)
    for line, those in found.items():
        yield line if len(found) == 1 else f"{line}  # on {', '.join(those)}"


def _source(owner: str, term: Term) -> str:
    found = f"sa.literal_column({quoted_literal(term.text)})"
    if isinstance(term.element, ColumnClause):
        key = str(getattr(term.element, "key", term.element.name))
        found = f"{owner}.{key}" if key.isidentifier() else f"{owner}[{quoted_literal(key)}]"
    calls = {"DESC": ".desc()", "NULLS FIRST": ".nulls_first()", "NULLS LAST": ".nulls_last()"}
    return found + "".join(call for word, call in calls.items() if word in term.suffix)
