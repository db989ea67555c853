"""Statements as text: for people to read, and for EXPLAIN."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, Dialect, bindparam, make_url
from sqlalchemy.sql.base import Executable

from atomic_claim.job_table import JobTable
from atomic_claim.plan import ClaimPlan, ClaimRequest, build_plan
from atomic_claim.sql_elements import KEYS, ByKey

DIALECTS = ("postgresql", "mysql", "mariadb", "sqlite")
PREFIX = "_atomic_claim_"
SHOWN_LEASE = timedelta(minutes=5)


def dialect_of(name: str) -> Dialect:
    """Create a dialect without a driver whose SQL is readable: its parameters are ``:named``."""
    # psycopg2's dialect, unlike psycopg's, adds no cast to every parameter.
    url = "postgresql+psycopg2://" if name == "postgresql" else f"{name}://"
    make: Any = make_url(url).get_dialect()
    made: Dialect = make(paramstyle="named")
    return made


def quoted_literal(text: str) -> str:
    """Return a string literal as Python's formatters write it."""
    found = json.dumps(text, ensure_ascii=False)
    return found if ast.literal_eval(found) == text else repr(text)


def literal_text(clause: ColumnElement[Any], dialect: Dialect) -> str:
    """Render an expression on the columns of one table with literal values."""
    options = {"include_table": False, "literal_binds": True}
    return str(clause.compile(dialect=dialect, compile_kwargs=options))


def shown_claim(job_table: JobTable, limit: int, worker: str) -> tuple[ClaimPlan, ClaimRequest]:
    """Build a claim to be shown, under a lease if the table has them, and its options."""
    request = ClaimRequest(
        limit,
        worker=None if job_table.worker is None else worker,
        lease=None if job_table.lease is None or job_table.token is None else SHOWN_LEASE,
    )
    # Not from the cache, which keeps the first claim's limit.
    return build_plan(job_table, request, entities=False), request


def for_keys(statement: Executable | ByKey) -> tuple[Any, dict[str, Any]]:
    """Return the statement for one row whose key is a parameter, and that parameter."""
    if not isinstance(statement, ByKey):
        return statement, {}
    if statement.statement is not None:
        return statement.statement, {KEYS: [None]}
    names = [bindparam(f"{PREFIX}{column.key}", None, column.type) for column in statement.key]
    return statement.of([names])


def rendered(
    statement: Executable | ByKey, dialect: Dialect, given: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Render a statement's SQL with its literals; return it and the remaining parameters.

    The key of one row stands for all: as ``:keys``, or as its columns' names.
    """
    plain, keys = for_keys(statement)
    compiled = plain.compile(dialect=dialect)
    state = compiled.construct_expanded_state({**given, **keys})
    text, parameters = state.statement, dict(state.parameters)
    for name in sorted(parameters, key=len, reverse=True):
        if name.startswith(PREFIX):
            short = name.removeprefix(PREFIX)
            short = "keys" if short.startswith("keys") else short
            text = text.replace(f":{name}", f":{short}")
            parameters[short] = parameters.pop(name)
    parameters.pop("keys", None)
    return text.strip(), parameters
