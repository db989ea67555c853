"""Trap 1: the planner runs a LIMIT subquery again for every row."""

import pytest
import sqlalchemy as sa

from atomic_claim import claim_jobs
from tests.databases import Database
from tests.jobs import fill, ids, job_table, rows

pytestmark = pytest.mark.databases("postgresql")


def analysed_small(database: Database) -> tuple[sa.Engine, sa.Table]:
    """Create a table that was analysed at one row and has grown to thirty."""
    engine = database.engine()
    table = job_table()
    fill(engine, table, 1)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("ALTER TABLE jobs SET (autovacuum_enabled = off)"))
        connection.execute(sa.text("ANALYZE jobs"))
        connection.execute(table.insert(), rows(29, first=2))
    return engine, table


def test_limit_holds(database: Database) -> None:
    """A claim of one takes one, whatever the planner thinks of the table."""
    engine, table = analysed_small(database)
    assert ids(claim_jobs(engine, table, 1)) == [1]
    assert ids(claim_jobs(engine, table, 3)) == [2, 3, 4]


@pytest.mark.parametrize(
    "form",
    [
        "UPDATE jobs SET processing = true WHERE id IN ({free}) RETURNING id",
        (
            "UPDATE jobs SET processing = true FROM ({free}) AS free WHERE jobs.id = free.id "
            "RETURNING jobs.id"
        ),
    ],
    ids=["in", "from"],
)
def test_the_form_of_most_articles_breaks_it(database: Database, form: str) -> None:
    """The twin: the same limit in a subquery is run once a row, and all thirty are claimed."""
    engine, _ = analysed_small(database)
    free = "SELECT id FROM jobs WHERE NOT processing ORDER BY created_at LIMIT 1 "
    free += "FOR UPDATE SKIP LOCKED"
    with engine.begin() as connection:
        claimed = connection.execute(sa.text(form.format(free=free))).all()
    assert len(claimed) == 30
