"""How many functions of ours one plain operation passes through."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, String
from sqlalchemy.orm import Session

import atomic_claim
from atomic_claim import JobTable, claim_jobs, complete_jobs
from tests.databases import Database
from tests.jobs import fill, job_table, mapped

pytestmark = pytest.mark.once
ON_POSTGRESQL = pytest.mark.databases("postgresql")

PACKAGE = str(Path(atomic_claim.__file__).parent)
MOST = 15
MOST_BY_SESSION = 30
LONGEST = 40


def walk(call: Callable[[], object]) -> dict[str, int]:
    """Return the distinct functions of ours in a call, properties too, and their lines of code."""
    found: dict[str, int] = {}

    def note(frame: Any, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            lines = {line for *_, line in code.co_lines()}
            name = f"{code.co_filename.removeprefix(PACKAGE)} {code.co_qualname}"
            found[name] = len(lines - {None, code.co_firstlineno})

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found


def filled(database: Database) -> tuple[sa.Engine, JobTable]:
    """Create free jobs in a table with a token."""
    engine = database.engine()
    table = job_table(Column("claim_token", String(32)), Column("done_at", sa.DateTime))
    fill(engine, table, 60)
    done = {"done_at": sa.func.now()}
    return engine, JobTable(table, state="processing", token="claim_token", done=done)


@ON_POSTGRESQL
def test_a_claim_by_engine(database: Database) -> None:
    """The seventh of seven equal claims."""
    engine, jobs = filled(database)
    for _ in range(6):
        claim_jobs(engine, jobs, 2)
    check(walk(lambda: claim_jobs(engine, jobs, 2)))


@ON_POSTGRESQL
def test_a_completion_by_engine(database: Database) -> None:
    """The seventh of seven equal completions."""
    engine, jobs = filled(database)
    claims = [claim_jobs(engine, jobs, 2) for _ in range(7)]
    for claim in claims[:6]:
        complete_jobs(engine, claim)
    check(walk(lambda: complete_jobs(engine, claims[6])))


@pytest.mark.parametrize("entities", [False, True], ids=["rows", "entities"])
@pytest.mark.databases("mysql", "mariadb")
def test_a_claim_by_session(database: Database, entities: bool) -> None:
    """The seventh of seven equal claims, each in a transaction of a session's own."""
    engine, jobs = filled(database)
    if entities:
        jobs = replace(jobs, table=mapped(jobs.table))

    def claim() -> None:
        with Session(engine) as session:
            assert len(claim_jobs(session, jobs, 2)) == 2
            session.commit()

    for _ in range(6):
        claim()
    check(walk(claim), MOST_BY_SESSION)


def check(found: dict[str, int], most: int = MOST) -> None:
    """Check how many there are, and how long each is."""
    listed = "\n".join(f"{lines:3} {name}" for name, lines in sorted(found.items()))
    assert len(found) <= most, listed
    assert max(found.values()) <= LONGEST, listed
    # For pytest -rP.
    print(f"{len(found)} functions\n{listed}")  # noqa: T201 - what was found
