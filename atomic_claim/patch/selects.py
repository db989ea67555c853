"""Analysis of a legacy SELECT: whether it finds jobs, and whether its rows can be locked."""

# SQLAlchemy lets a SELECT be built by public names and not be asked what it was built of.
# ruff: noqa: SLF001

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    CompoundSelect,
    Delete,
    Join,
    Select,
    Table,
    TableClause,
    Update,
    bindparam,
)
from sqlalchemy.sql import visitors
from sqlalchemy.sql.annotation import _deep_deannotate
from sqlalchemy.sql.elements import (
    BindParameter,
    ColumnClause,
    FunctionFilter,
    Over,
    WithinGroup,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import Alias, FromClause, TextualSelect

from atomic_claim.backends import Find
from atomic_claim.errors import PatchError
from atomic_claim.job_table import JobTable

AGGREGATES = frozenset(
    {
        "aggregate_strings",
        "any_value",
        "array_agg",
        "avg",
        "bit_and",
        "bit_or",
        "bool_and",
        "bool_or",
        "count",
        "every",
        "group_concat",
        "json_agg",
        "json_arrayagg",
        "json_group_array",
        "json_object_agg",
        "json_objectagg",
        "jsonb_agg",
        "jsonb_object_agg",
        "max",
        "median",
        "min",
        "mode",
        "stddev",
        "string_agg",
        "sum",
        "total",
        "var_pop",
        "variance",
    }
)


def mentions(statement: Any, table: Table) -> bool:
    """Check whether any part of a statement uses the table."""
    return any(
        isinstance(element, TableClause) and _is(element, table)
        for element in visitors.iterate(statement)
    )


def names(sql: str, table: Table) -> bool:
    """Check whether raw SQL names the table."""
    return re.search(rf"(?<![\w$]){re.escape(table.name)}(?![\w$])", sql, re.IGNORECASE) is not None


def is_read(sql: str) -> bool:
    """Check whether raw SQL returns rows, as no plain INSERT, UPDATE or DELETE does."""
    plain = re.sub(r"(?s)^(\s|--[^\n]*\n|/\*.*?\*/)*", "", sql).upper()
    return not plain.startswith(("INSERT", "UPDATE", "DELETE", "REPLACE")) or "RETURNING" in plain


def find_of(
    job_table: JobTable, statement: Any, params: Mapping[str, Any], target: str
) -> Find | None:
    """Analyze the SELECT as one that finds jobs; return None if it does not use the table.

    Raises:
        PatchError: it speaks of the table, and cannot be locked.
    """
    table = job_table.table
    if not mentions(statement, table):
        return None
    refuse = _Refusal(target, table)
    if not isinstance(statement, Select):
        raise refuse.of("a UNION" if isinstance(statement, CompoundSelect) else "raw SQL")
    if any(isinstance(element, TextualSelect) for element in visitors.iterate(statement)):
        raise refuse.of("raw SQL")
    if statement._distinct:
        raise refuse.of("DISTINCT")
    if statement._group_by_clauses or statement._having_criteria:
        raise refuse.of("GROUP BY")
    for column in statement.inner_columns:
        for element in visitors.iterate(column):
            if isinstance(element, (Over, WithinGroup, FunctionFilter)):
                raise refuse.of("a window or an aggregate")
            if isinstance(element, FunctionElement) and _function(element) in AGGREGATES:
                raise refuse.of(f"the aggregate {_function(element)}()")
    # SQLAlchemy 2.1 keeps with the statement what Select.params() was given.
    params = {**(getattr(statement, "_params", None) or {}), **params}
    froms = statement.get_final_froms()
    places = [place for each in froms for place in _places(each, table, False, refuse)]
    if not places:
        raise refuse.of("the table in a subquery alone")
    if len(places) > 1:
        raise refuse.of("the table several times")
    (place,) = places
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


@dataclass(frozen=True)
class _Refusal:
    target: str
    table: Table

    def of(self, what: str) -> PatchError:
        return PatchError(
            f"{self.target} reads {self.table.fullname!r} by a SELECT with {what}, whose rows "
            "cannot be locked: read the rows themselves in it, or do this outside of the patched "
            "function"
        )


def _is(element: Any, other: Any) -> bool:
    """Check whether both are the same table; the ORM's annotated copies compare by ``==``."""
    return element is other or bool(element == other)


def _function(element: FunctionElement[Any]) -> str:
    return str(getattr(element, "name", "")).lower()


def _places(
    element: FromClause, table: Table, nullable: bool, refuse: _Refusal
) -> Iterator[FromClause]:
    """Where the table stands in a FROM, itself or by an alias."""
    if isinstance(element, Join):
        yield from _places(element.left, table, nullable or element.full, refuse)
        yield from _places(
            element.right, table, nullable or element.full or element.isouter, refuse
        )
        return
    is_alias = isinstance(element, Alias) and _is(element.element, table)
    if _is(element, table) or is_alias:
        if nullable:
            raise refuse.of("the table on the nullable side of an outer join")
        yield element
    elif mentions(element, table):
        raise refuse.of("the table in a subquery")


def _limit(statement: Select[Any], params: Mapping[str, Any], refuse: _Refusal) -> int | None:
    clause = statement._limit_clause
    if clause is None:
        clause = statement._fetch_clause
    if clause is None:
        return None
    value = None
    if isinstance(clause, BindParameter):
        value = params.get(clause.key, clause.effective_value)
    if not isinstance(value, int):
        raise refuse.of(f"the LIMIT {clause}, which is no number")
    return value


def speaks_only_of(condition: Any, place: FromClause) -> bool:
    """Check whether a condition uses only columns of one table or alias."""
    return all(
        element.table is not None and _is(element.table, place)
        for element in visitors.iterate(condition)
        if isinstance(element, ColumnClause)
    )


def adapted(clause: Any, place: FromClause, table: Table) -> Any:
    """Rewrite a clause on an alias to one on its table."""
    if _is(place, table):
        return clause
    # The ORM's annotations keep the columns of an aliased class from being replaced.
    return visitors.replacement_traverse(
        _deep_deannotate(clause),
        {},
        lambda element, **_: (
            table.columns[element.key]
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
        return bindparam(None, value, type_=element.type, unique=True, expanding=element.expanding)

    return visitors.replacement_traverse(clause, {}, replace)


def conjuncts(statement: Select[Any] | Update | Delete) -> tuple[Any, ...]:
    """Return the conditions of a statement that must all hold."""
    return statement._where_criteria


def order_terms(statement: Select[Any]) -> tuple[Any, ...]:
    """Return the ORDER BY terms of a SELECT."""
    return tuple(statement._order_by_clauses)


def with_criteria(statement: Update | Delete, *conditions: Any) -> Update | Delete:
    """Return the UPDATE or DELETE with other conditions."""
    found = statement.where()
    found._where_criteria = conditions
    return found


def with_conditions(statement: Select[Any], *conditions: Any) -> Select[Any]:
    """Return the SELECT with other conditions and without a limit."""
    found = statement.limit(None).offset(None)
    found._where_criteria = ()
    return found.where(*conditions)
