"""Trap 12: RETURNING has no order, and only the database knows its collation."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column

from atomic_claim import JobTable, claim_jobs
from tests.databases import Database
from tests.jobs import START, bound, ids, job_table, mapped, rows

# What is another's than the code points'; of MySQL and MariaDB it is the default.
COLLATIONS = {"postgresql": "und-x-icu", "sqlite": "NOCASE"}
BINARY = {"postgresql": "C", "sqlite": "BINARY"}
SEVEN: list[dict[str, Any]] = [
    {"name": "_d", "place": 3, "kind": "low"},
    {"name": "a", "place": None, "kind": "high"},
    {"name": "B", "place": 1, "kind": "mid"},
    {"name": "c", "place": 2, "kind": "low"},
    {"name": None, "place": 1, "kind": "mid"},
    {"name": "A", "place": 2, "kind": "high"},
    {"name": "b", "place": None, "kind": "low"},
]

by_rows_and_entities = pytest.mark.parametrize("kind", ["engine", "session"])


def collation_of(database: Database, engine: sa.Engine) -> str | None:
    """Return a collation that differs from code point order, or None if there is none."""
    found = COLLATIONS.get(database.name)
    if database.name == "postgresql":
        query = sa.text("SELECT count(*) FROM pg_collation WHERE collname = :name")
        with engine.connect() as connection:
            # PostgreSQL may have been built without ICU.
            return found if connection.scalar(query, {"name": found}) else None
    return found


def need_a_collation(database: Database, engine: sa.Engine) -> None:
    """Skip the test on a PostgreSQL that has no other order than the code points'."""
    if database.name == "postgresql" and collation_of(database, engine) is None:
        pytest.skip("this PostgreSQL was built without ICU's collations")


def filled(database: Database) -> tuple[sa.Engine, sa.Table]:
    """Seven free rows in a disorder of their own for each column."""
    engine = database.engine()
    table = job_table(
        Column("name", sa.String(20, collation=collation_of(database, engine))),
        Column("place", sa.Integer),
        Column("kind", sa.Enum("low", "high", "mid", name="kinds")),
        Column("attempts", sa.Integer, nullable=False),
        Column("updated_at", sa.DateTime),
        mysql_charset="utf8mb4",
        mariadb_charset="utf8mb4",
    )
    table.metadata.create_all(engine)
    refill(engine, table)
    return engine, table


def refill(engine: sa.Engine, table: sa.Table) -> None:
    """Put the rows back as they were."""
    values = [
        row
        | some
        | {
            "created_at": START + timedelta(days=row["id"] % 3),
            "updated_at": START - timedelta(days=row["id"]),
            "attempts": 9 - row["id"],
        }
        for row, some in zip(rows(7), SEVEN, strict=True)
    ]
    with engine.begin() as connection:
        connection.execute(table.delete())
        connection.execute(table.insert(), values)


def select_six(engine: sa.Engine, table: sa.Table, order: list[Any]) -> list[int]:
    """Return the ids of the first six free rows in the order of a SELECT."""
    query = sa.select(table.c.id).where(table.c.processing == sa.false())
    with engine.connect() as connection:
        return list(connection.scalars(query.order_by(*order).limit(6)))


def claim_six(
    engine: sa.Engine, table: sa.Table, kind: str, order: list[Any] | None = None, **declared: Any
) -> list[int]:
    """Return the ids of six claimed rows in order; roll back the caller's transaction."""
    given = mapped(table) if kind == "session" else table
    values = declared.pop("values", None)
    job_table = JobTable(given, state="processing", **declared)
    with bound(engine, kind) as bind:
        return ids(claim_jobs(bind, job_table, 6, order_by=order, values=values))


def least_of_kind(table: sa.Table) -> Any:
    """Build an order term that is a subquery."""
    other = table.alias()
    query = sa.select(sa.func.min(other.c.place)).where(other.c.kind == table.c.kind)
    return query.scalar_subquery()


ORDERS: dict[str, Callable[[sa.Table], list[Any]]] = {
    "text": lambda table: [table.c.name],
    "text, descending": lambda table: [table.c.name.desc()],
    "lower": lambda table: [sa.func.lower(table.c.name)],
    "lower, descending": lambda table: [sa.func.lower(table.c.name).desc()],
    "time, then text": lambda table: [table.c.created_at.desc(), table.c.name],
    "with NULLs": lambda table: [table.c.place],
    "with NULLs, descending": lambda table: [table.c.place.desc()],
    "NULLs apart": lambda table: [table.c.place.is_(None), table.c.place.desc()],
    "enum": lambda table: [table.c.kind.desc(), table.c.place],
    "case": lambda table: [sa.case((table.c.name == "c", 0), else_=1), table.c.id.desc()],
    "sum": lambda table: [(table.c.place + table.c.attempts).desc()],
    "names": lambda _: [sa.desc("place"), "created_at"],
    "subquery": lambda table: [least_of_kind(table).desc()],
}
PLACES_OF_NULLS: dict[str, Callable[[sa.Table], list[Any]]] = {
    "first": lambda table: [table.c.place.nulls_first()],
    "last": lambda table: [table.c.place.nulls_last()],
    "descending, first": lambda table: [table.c.place.desc().nulls_first()],
    "descending, last": lambda table: [table.c.place.desc().nulls_last()],
    "text, first": lambda table: [sa.nulls_first(table.c.name)],
    "text, last": lambda table: [sa.nulls_last(table.c.name.desc())],
}


def check_orders(
    database: Database, kind: str, orders: dict[str, Callable[[sa.Table], list[Any]]]
) -> None:
    """Compare claims with SELECTs, both by the name of the order."""
    engine, table = filled(database)
    found, expected = {}, {}
    for name, order in orders.items():
        refill(engine, table)
        terms = [*order(table), table.c.id]
        expected[name] = select_six(engine, table, terms)
        found[name] = claim_six(engine, table, kind, terms)
    assert found == expected


@by_rows_and_entities
def test_claims_come_in_the_order_of_a_select(database: Database, kind: str) -> None:
    """Whatever the order is made of, it is the database's own."""
    check_orders(database, kind, ORDERS)


@by_rows_and_entities
@pytest.mark.databases("sqlite", "postgresql")
def test_nulls_are_where_they_are_said_to_be(database: Database, kind: str) -> None:
    """NULLS FIRST and NULLS LAST are kept where the database knows them."""
    check_orders(database, kind, PLACES_OF_NULLS)


@by_rows_and_entities
def test_a_collation_said_in_the_order_is_kept(database: Database, kind: str) -> None:
    """A collation that only the claim names is kept; it orders the same texts differently."""
    engine, table = filled(database)
    need_a_collation(database, engine)
    binary = table.c.name.collate(BINARY.get(database.name, "utf8mb4_bin"))
    terms = [binary.desc(), table.c.id]
    expected = select_six(engine, table, terms)
    assert expected != select_six(engine, table, [table.c.name.desc(), table.c.id])
    assert claim_six(engine, table, kind, terms) == expected


def stamped(table: sa.Table) -> dict[str, Any]:
    """Order by the column that the claim stamps."""
    return {"order": [table.c.updated_at], "stamps": table.c.updated_at}


def counted(table: sa.Table) -> dict[str, Any]:
    """Order by the column that counts the claims."""
    return {"order": [table.c.attempts], "attempts": table.c.attempts}


def overwritten(table: sa.Table) -> dict[str, Any]:
    """Order by a column that the call's values overwrite."""
    return {"order": [table.c.place, table.c.id], "values": {"place": 0}}


def turned_round(table: sa.Table) -> dict[str, Any]:
    """Order by a column whose order the call's values reverse."""
    return {"order": [table.c.attempts], "values": {"attempts": -table.c.attempts}}


def renamed(table: sa.Table) -> dict[str, Any]:
    """Order by an expression over a column that the call writes."""
    return {"order": [sa.func.lower(table.c.name), table.c.id], "values": {"name": "x"}}


def reread(table: sa.Table) -> dict[str, Any]:
    """Order by a subquery over a column that the call writes."""
    return {"order": [least_of_kind(table), table.c.id], "values": {"place": 0}}


@by_rows_and_entities
def test_the_claim_may_change_what_it_is_ordered_by(database: Database, kind: str) -> None:
    """The order is that of the rows as they were before the claim."""
    engine, table = filled(database)
    found, expected = {}, {}
    for how in (stamped, counted, overwritten, turned_round, renamed, reread):
        refill(engine, table)
        declared = how(table)
        expected[how.__name__] = select_six(engine, table, declared["order"])
        found[how.__name__] = claim_six(engine, table, kind, **declared)
    assert found == expected


@pytest.mark.parametrize(
    ("column", "stored"),
    [
        ("amount", "2 - id / 1000.0"),
        (
            "created_at",
            "substr('2024-01-01 00:00:00.000000', 1, CASE id WHEN 1 THEN 26 ELSE 19 END)",
        ),
    ],
    ids=["digits", "length"],
)
@pytest.mark.databases("sqlite")
def test_what_is_stored_decides(database: Database, column: str, stored: str) -> None:
    """Where Python reads as equal what SQLite tells apart, SQLite's order holds."""
    engine, table = database.engine(), job_table(Column("amount", sa.Numeric(10, 2)))
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(table.insert(), rows(2))
        connection.exec_driver_sql(f"UPDATE jobs SET {column} = {stored}")
        assert len(set(connection.scalars(sa.select(table.c[column])))) == 1
    order = [table.c[column]]
    assert select_six(engine, table, order) == [2, 1]
    assert claim_six(engine, table, "engine", order) == [2, 1]


@pytest.mark.databases("sqlite", "postgresql")
def test_returning_has_another_order(database: Database) -> None:
    """The twin: UPDATE ... RETURNING gives rows as they are stored, not as they are asked for."""
    engine, table = filled(database)
    free = sa.select(table.c.id).where(table.c.processing == sa.false())
    free = free.order_by(table.c.attempts).limit(6)
    claim = table.update().where(table.c.id.in_(free)).values(processing=True)
    assert select_six(engine, table, [table.c.attempts]) == [7, 6, 5, 4, 3, 2]
    with engine.begin() as connection:
        assert list(connection.scalars(claim.returning(table.c.id))) == [2, 3, 4, 5, 6, 7]


def test_what_the_claim_wrote_tells_no_order(database: Database) -> None:
    """The twin: once `updated_at` is stamped, it no longer tells the order."""
    engine, table = filled(database)
    assert select_six(engine, table, [table.c.updated_at]) == [7, 6, 5, 4, 3, 2]
    with engine.begin() as connection:
        connection.execute(table.update().values(updated_at=datetime(2024, 2, 2)))  # noqa: DTZ001
        found = connection.execute(sa.select(table.c.id, table.c.updated_at)).all()
    assert ids(sorted(found, key=lambda row: row.updated_at)) != [7, 6, 5, 4, 3, 2, 1]


def test_python_sorts_otherwise(database: Database) -> None:
    """The twin: `sorted` puts `B` before `_d` and `a`; the database puts `a` before `B`."""
    engine, table = filled(database)
    need_a_collation(database, engine)
    query = sa.select(table.c.name).where(table.c.id <= 4)
    with engine.connect() as connection:
        found = list(connection.scalars(query.order_by(table.c.name)))
    assert sorted(found) == ["B", "_d", "a", "c"]
    assert found in (["_d", "a", "B", "c"], ["a", "B", "c", "_d"])
