"""A job table whose trigger counts its completions."""

from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import Column, DateTime, Integer, String, Text
from sqlalchemy.dialects import mysql

from atomic_claim import JobTable
from tests.jobs import fill, job_table

# MySQL's and MariaDB's DATETIME is whole seconds long, unless one asks for more.
PRECISE: Final = DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")

# Whatever leaves a row done counts, so that a change of a row that was done already shows too.
TRIGGERS: Final = {
    "sqlite": [
        """
        CREATE TRIGGER count_completions AFTER UPDATE ON jobs WHEN NEW.done_at IS NOT NULL BEGIN
            INSERT INTO completions (job_id, token) VALUES (NEW.id, NEW.claim_token);
        END
        """
    ],
    "postgresql": [
        """
        CREATE FUNCTION count_completion() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO completions (job_id, token) VALUES (NEW.id, NEW.claim_token);
            RETURN NULL;
        END $$
        """,
        """
        CREATE TRIGGER count_completions AFTER UPDATE ON jobs FOR EACH ROW
            WHEN (NEW.done_at IS NOT NULL) EXECUTE FUNCTION count_completion()
        """,
    ],
    "mysql": [
        """
        CREATE TRIGGER count_completions AFTER UPDATE ON jobs FOR EACH ROW
            INSERT INTO completions (job_id, token)
            SELECT NEW.id, NEW.claim_token FROM (SELECT 1) AS one WHERE NEW.done_at IS NOT NULL
        """
    ],
}
TRIGGERS["mariadb"] = TRIGGERS["mysql"]


def counted_jobs(*more: Any) -> JobTable:
    """Build the usual job table with all lease columns and no limit on the attempts."""
    table = job_table(
        Column("done_at", DateTime),
        Column("failed_at", DateTime),
        Column("run_at", PRECISE),
        Column("worker", String(20)),
        Column("claim_token", String(32)),
        Column("lease_until", PRECISE),
        Column("attempts", Integer, nullable=False, default=0),
        Column("last_error", Text),
        *more,
    )
    sa.Table(
        "completions",
        table.metadata,
        Column("id", Integer, primary_key=True),
        Column("job_id", Integer, nullable=False),
        Column("token", String(32)),
    )
    return JobTable(
        table,
        state="processing",
        done={"done_at": sa.func.now()},
        failed={"failed_at": sa.func.now()},
        due="run_at",
        order="created_at",
        worker="worker",
        token="claim_token",
        lease="lease_until",
        attempts="attempts",
        error="last_error",
    )


def make_counted(engine: sa.Engine, count: int) -> JobTable:
    """Create a table with `count` free jobs and the trigger that counts completions."""
    jobs = counted_jobs()
    fill(engine, jobs.table, count)
    with engine.begin() as connection:
        for statement in TRIGGERS[engine.dialect.name]:
            connection.execute(sa.text(statement))
    return jobs


def completions(engine: sa.Engine) -> list[tuple[int, str]]:
    """Every completion that was ever committed: the job, and the token that its row bore."""
    with engine.connect() as connection:
        found = connection.execute(sa.text("SELECT job_id, token FROM completions ORDER BY id"))
        return [(number, token) for number, token in found]


def undone(engine: sa.Engine, jobs: JobTable) -> int:
    """How many jobs are left to be done, as everybody can see them."""
    with engine.connect() as connection:
        left = sa.select(sa.func.count()).where(jobs.table.c.done_at.is_(None))
        return connection.execute(left).scalar_one()
