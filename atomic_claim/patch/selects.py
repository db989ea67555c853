"""Analysis of a legacy SELECT: whether it finds jobs, and whether its rows can be locked."""

# SQLAlchemy lets a SELECT be built by public names and not be asked what it was built of.
# ruff: noqa: SLF001

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql import visitors
from sqlalchemy.sql.annotation import _deep_deannotate
from sqlalchemy.sql.elements import BindParameter, ColumnClause, FunctionFilter, Over, WithinGroup
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import Alias, FromClause, TextualSelect

from atomic_claim.backends import Find
from atomic_claim.errors import PatchError
from atomic_claim.job_table import JobTable

Refusal = Callable[[str], PatchError]
# fmt: off
AGGREGATES = frozenset(
    {
        "aggregate_strings", "any_value", "array_agg", "avg", "bit_and", "bit_or", "bool_and",
        "bool_or", "count", "every", "group_concat", "json_agg", "json_arrayagg",
        "json_group_array", "json_object_agg", "json_objectagg", "jsonb_agg", "jsonb_object_agg",
        "max", "median", "min", "mode", "stddev", "string_agg", "sum", "total", "var_pop",
        "variance"
    }
)
# fmt: on


def mentions(statement: Any, table: sa.TableClause) -> bool:
    """Check whether any part of a statement uses the table."""
    return any(is_table(element, table) for element in visitors.iterate(statement))


def is_table(element: Any, table: sa.TableClause) -> bool:
    """Check whether it is the table, or another object for it, as a reflected one."""
    return (
        isinstance(element, sa.TableClause)
        and element.name == table.name
        and element.schema == table.schema
    )


def names(sql: str, table: sa.TableClause) -> bool:
    """Check whether raw SQL names the table."""
    return re.search(rf"(?<![\w$]){re.escape(table.name)}(?![\w$])", sql, re.IGNORECASE) is not None


def is_read(sql: str) -> bool:
    """Check whether raw SQL returns rows, as no plain INSERT, UPDATE or DELETE does."""
    plain = re.sub(r"(?s)^(\s|--[^\n]*\n|/\*.*?\*/)*", "", sql).upper()
    return not plain.startswith(("INSERT", "UPDATE", "DELETE", "REPLACE")) or "RETURNING" in plain


def find_of(
    job_table: JobTable, statement: Any, params: Mapping[str, Any], target: str, *, counts: bool
) -> Find | None:
    """Analyze the SELECT as one that finds jobs; return None if it finds none.

    Args:
        job_table: the table of the jobs.
        statement: the SELECT, which mentions the table.
        params: what is passed with it.
        target: the function that executes it, for messages.
        counts: whether an aggregate may pass, since the function has found its rows already.

    Raises:
        PatchError: it speaks of the table, and cannot be locked.
    """
    table = job_table.table
    refuse = partial(_refusal, target, table)
    if not isinstance(statement, sa.Select):
        raise refuse("a UNION" if isinstance(statement, sa.CompoundSelect) else "raw SQL")
    aggregate = _aggregate(statement)
    if aggregate and counts:
        return None
    if any(isinstance(element, TextualSelect) for element in visitors.iterate(statement)):
        raise refuse("raw SQL")
    if statement._distinct:
        raise refuse("DISTINCT")
    if aggregate:
        raise refuse(aggregate)
    for column in statement.inner_columns:
        if any(isinstance(each, (Over, WithinGroup)) for each in visitors.iterate(column)):
            raise refuse("a window")
    # SQLAlchemy 2.1 keeps with the statement what Select.params() was given.
    params = {**(getattr(statement, "_params", None) or {}), **params}
    froms = statement.get_final_froms()
    places = [place for each in froms for place in _places(each, table, False, refuse)]
    if not places:
        raise refuse("the table in a subquery alone")
    if len(places) > 1:
        raise refuse("the table several times")
    (place,) = places
    if missing := [each.name for each in job_table.key if each.key not in place.columns]:
        raise refuse(f"a table object that has no {', '.join(missing)}")
    alone = len(froms) == 1 and _is(froms[0], place)
    return Find(
        job_table=job_table,
        statement=statement,
        place=table if _is(place, table) else place,
        limit=_limit(statement, params, refuse),
        conditions=tuple(
            adapted(condition, place, table)
            for condition in statement._where_criteria
            if speaks_only_of(condition, place)
        ),
        alone=alone,
        params=params,
    )


def _aggregate(statement: sa.Select[Any]) -> str:
    """Name the aggregate that makes rows of the SELECT no rows of a table, or return ""."""
    if statement._group_by_clauses or statement._having_criteria:
        return "GROUP BY"
    for column in statement.inner_columns:
        elements = list(visitors.iterate(column))
        if any(isinstance(each, Over) for each in elements):
            continue
        for each in elements:
            if isinstance(each, FunctionFilter):
                return "an aggregate"
            if isinstance(each, FunctionElement) and _function(each) in AGGREGATES:
                return f"the aggregate {_function(each)}()"
    return ""


def _refusal(target: str, table: sa.Table, what: str) -> PatchError:
    return PatchError(
        f"{target} reads {table.fullname!r} by a SELECT with {what}, whose rows cannot be locked: "
        "read the rows themselves in it, or do this outside of the patched function"
    )


def _is(element: Any, other: Any) -> bool:
    """Check whether both are the same table; the ORM's annotated copies compare by ``==``."""
    return element is other or bool(element == other)


def _function(element: FunctionElement[Any]) -> str:
    return str(getattr(element, "name", "")).lower()


def _places(
    element: FromClause, table: sa.Table, nullable: bool, refuse: Refusal
) -> Iterator[FromClause]:
    """Return the table's places in a FROM, itself or by an alias."""
    if isinstance(element, sa.Join):
        nullable = nullable or element.full
        yield from _places(element.left, table, nullable, refuse)
        yield from _places(element.right, table, nullable or element.isouter, refuse)
        return
    if is_table(element.element if isinstance(element, Alias) else element, table):
        if nullable:
            raise refuse("the table on the nullable side of an outer join")
        yield element
    elif mentions(element, table):
        raise refuse("the table in a subquery")


def _limit(statement: sa.Select[Any], params: Mapping[str, Any], refuse: Refusal) -> int | None:
    clause = statement._limit_clause
    if clause is None:
        clause = statement._fetch_clause
    if clause is None:
        return None
    value = None
    if isinstance(clause, BindParameter):
        value = params.get(clause.key, clause.effective_value)
    if not isinstance(value, int):
        raise refuse(f"the LIMIT {clause}, which is no number")
    return value


def speaks_only_of(condition: Any, place: FromClause) -> bool:
    """Check whether a condition uses only columns of one table or alias."""
    return all(
        element.table is not None and _is(element.table, place)
        for element in visitors.iterate(condition)
        if isinstance(element, ColumnClause)
    )


def adapted(clause: Any, place: FromClause, table: FromClause) -> Any:
    """Rewrite a clause on an alias, or on another object of its table, to one on the table."""
    if _is(place, table):
        return clause
    columns = {column.name: column for column in table.columns}
    # The ORM's annotations keep the columns of an aliased class from being replaced.
    return visitors.replacement_traverse(
        _deep_deannotate(clause),
        {},
        lambda element, **_: (
            columns.get(element.name)
            if isinstance(element, ColumnClause) and _is(element.table, place)
            else None
        ),
    )


def baked(clause: Any, params: Mapping[str, Any]) -> Any:
    """Insert the values of the parameters passed with the statement into a clause."""
    if not params:
        return clause

    def replace(element: Any, **_: Any) -> Any:
        if not isinstance(element, BindParameter) or element.key not in params:
            return None
        value = params[element.key]
        return sa.bindparam(
            None, value, type_=element.type, unique=True, expanding=element.expanding
        )

    return visitors.replacement_traverse(clause, {}, replace)


def conjuncts(statement: sa.Select[Any] | sa.Update | sa.Delete) -> tuple[Any, ...]:
    """Return the conditions of a statement that must all hold."""
    return statement._where_criteria


def with_criteria(statement: sa.Update | sa.Delete, *conditions: Any) -> sa.Update | sa.Delete:
    """Return the UPDATE or DELETE with other conditions."""
    found = statement.where()
    found._where_criteria = conditions
    return found


def with_conditions(statement: sa.Select[Any], *conditions: Any) -> sa.Select[Any]:
    """Return the SELECT with other conditions and without a limit."""
    found = statement.limit(None).offset(None)
    found._where_criteria = ()
    return found.where(*conditions)
