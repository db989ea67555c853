"""The same SQL by the driver alone, on one open connection."""

import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import psycopg
import pymysql
import sqlalchemy as sa

from atomic_claim.plan import TOKEN
from atomic_claim.sql_elements import KEYS
from tests.benchmarks.measuring import Way
from tests.benchmarks.replay import Step, replay

BOUND = "bare psycopg, bound LIMIT"
LITERAL = "bare psycopg, literal LIMIT"


@contextmanager
def by_hand(url: sa.URL, steps: Sequence[Step], limit: int) -> Iterator[Mapping[str, Way]]:
    """Yield ways to claim with the driver of a database alone; each claim is committed.

    On PostgreSQL it is in autocommit if the claim has a token, as the library's own is.
    """
    makers = {"postgresql": _postgresql, "sqlite": _sqlite}
    with makers.get(url.get_backend_name(), _mysql)(url, steps, limit) as found:
        yield found


@contextmanager
def _postgresql(url: sa.URL, steps: Sequence[Step], limit: int) -> Iterator[Mapping[str, Way]]:
    [step] = steps
    bound = step.text.replace(f"LIMIT {limit}", "LIMIT %(bench_limit)s")
    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    claim = replay(steps, limit)
    with psycopg.connect(plain, autocommit=TOKEN in step.params) as connection:

        def run(text: str, more: dict[str, Any]) -> None:
            def execute(step: Step, given: dict[str, Any]) -> Sequence[Any]:
                with connection.cursor() as cursor:
                    cursor.execute(text, step.values | given | more)
                    return cursor.fetchall()

            claim(execute)
            if not connection.autocommit:
                connection.commit()

        yield {
            BOUND: lambda: run(bound, {"bench_limit": limit}),
            LITERAL: lambda: run(step.text, {}),
        }


@contextmanager
def _sqlite(url: sa.URL, steps: Sequence[Step], limit: int) -> Iterator[Mapping[str, Way]]:
    """Yield the same statements, whose keys and token are found in the recorded parameters."""
    claim = replay(steps, limit)
    with closing(sqlite3.connect(url.database or "", isolation_level=None)) as connection:

        def execute(step: Step, given: dict[str, Any]) -> Sequence[Any]:
            changed = dict(zip(step.params.get(KEYS, ()), given.get(KEYS, ()), strict=True))
            if TOKEN in step.params:
                changed[step.params[TOKEN]] = given[TOKEN]
            values = [changed.get(value, value) for value in step.values]
            return connection.execute(step.text, values).fetchall()

        def run() -> None:
            connection.execute("BEGIN")
            claim(execute)
            connection.execute("COMMIT")

        yield {"bare sqlite3": run}


@contextmanager
def _mysql(url: sa.URL, steps: Sequence[Step], limit: int) -> Iterator[Mapping[str, Way]]:
    """Yield the same sequence, whose keys are one parameter that PyMySQL expands."""
    claim = replay(steps, limit)
    texts = {
        step.text: re.sub(r"IN \(%\(.*?\)s\)", f"IN %({KEYS})s", step.text, flags=re.DOTALL)
        for step in steps
    }
    connection = pymysql.connect(
        host=url.host or "",
        port=url.port or 3306,
        user=url.username,
        password=str(url.password or ""),
        database=url.database,
    )
    with closing(connection), connection.cursor() as cursor:

        def execute(step: Step, given: dict[str, Any]) -> Sequence[Any]:
            cursor.execute(texts[step.text], {**step.values, **given})
            return cursor.fetchall()

        def run() -> None:
            connection.begin()
            claim(execute)
            connection.commit()

        yield {"bare PyMySQL": run}
