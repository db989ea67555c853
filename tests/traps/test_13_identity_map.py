"""Trap 13: what a Session has already loaded, and what it has not yet flushed."""

from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.orm import Session

from atomic_claim import ClaimError, JobTable, claim_jobs
from tests.databases import Database
from tests.jobs import fill, ids, job_table, mapped, taken
from tests.statements import sent_by


def made(database: Database) -> tuple[sa.Engine, Any, JobTable]:
    """Four free jobs whose note is `old`, and the class that they are mapped to."""
    engine, table = database.engine(), job_table()
    fill(engine, table, 4, note="old")
    job = mapped(table)
    return engine, job, JobTable(job, state="processing", order="created_at")


def note(engine: sa.Engine, jobs: JobTable, number: int) -> str:
    """Return the committed note of a job."""
    table = jobs.table
    with engine.connect() as connection:
        return str(connection.scalar(sa.select(table.c.note).where(table.c.id == number)))


def annotate(engine: sa.Engine, jobs: JobTable, number: int, text: str) -> None:
    """Write a job's note behind the Session's back."""
    table = jobs.table
    with engine.begin() as connection:
        connection.execute(table.update().where(table.c.id == number).values(note=text))


@pytest.mark.parametrize("limit", [1, 3])
def test_a_loaded_entity_is_refreshed(database: Database, limit: int) -> None:
    """An entity loaded before is the one that is claimed, and has the state of its row."""
    engine, job, jobs = made(database)
    with Session(engine, expire_on_commit=False) as session:
        known = session.get(job, 1)
        session.commit()
        annotate(engine, jobs, 1, "new")
        assert (known.processing, known.note) == (False, "old")
        claimed = claim_jobs(session, jobs, limit)
        assert claimed[0] is known
        assert sa_inspect(known).unloaded == set()
        assert (known.processing, known.note) == (True, "new")


@pytest.mark.parametrize("limit", [1, 3])
def test_a_pending_entity_is_flushed_and_refreshed(database: Database, limit: int) -> None:
    """One that the claim itself has inserted has the state of its row too."""
    engine, job, jobs = made(database)
    with Session(engine) as session:
        first = datetime(2020, 1, 1)  # noqa: DTZ001 - the column's own
        added = job(id=9, created_at=first, note="mine", processing=False)
        session.add(added)
        claimed = claim_jobs(session, jobs, limit)
        assert claimed[0] is added
        assert (added.processing, added.note) == (True, "mine")
        session.commit()
    assert taken(engine, jobs.table) == [*range(1, limit), 9]


def edit(_: Session, entity: Any) -> None:
    """Change an attribute."""
    entity.note = "mine"


def delete(session: Session, entity: Any) -> None:
    """Mark for deletion."""
    session.delete(entity)


@pytest.mark.parametrize("change", [edit, delete])
@pytest.mark.parametrize("how", ["session", "block"])
def test_unflushed_edits_are_refused(
    database: Database, change: Callable[[Session, Any], None], how: str
) -> None:
    """With autoflush off, whether for good or in a block, nothing is written over them."""
    engine, job, jobs = made(database)
    with Session(engine, autoflush=how == "block") as session:
        known = session.get(job, 1)
        change(session, known)
        sent = sent_by(engine)
        no_autoflush = session.no_autoflush if how == "block" else nullcontext()
        with no_autoflush, pytest.raises(ClaimError, match=r"flush\(\) before claim_jobs"):
            claim_jobs(session, jobs)
        assert sent == []
        assert known in session.dirty or known in session.deleted
        session.flush()
        claimed = claim_jobs(session, jobs)
        if change is edit:
            assert (claimed[0], known.note, known.processing) == (known, "mine", True)
        else:
            assert ids(claimed) == [2]
        session.rollback()
    assert taken(engine, jobs.table) == []


def test_an_edit_that_changes_nothing_is_not_refused(database: Database) -> None:
    """An attribute that was set to what it was has nothing to lose."""
    engine, job, jobs = made(database)
    with Session(engine, autoflush=False) as session:
        known = session.get(job, 1)
        known.note = "old"
        assert known in session.dirty
        assert claim_jobs(session, jobs) == [known]


def test_edits_are_flushed(database: Database) -> None:
    """With autoflush on they are written first, and the claimed entity keeps them."""
    engine, job, jobs = made(database)
    with Session(engine) as session:
        known, other = session.get(job, 1), session.get(job, 3)
        known.note = other.note = "mine"
        assert claim_jobs(session, jobs) == [known]
        assert (known.note, known.processing) == ("mine", True)
        assert (other.note, other.processing) == ("mine", False)
        assert not session.dirty
        session.commit()
    assert note(engine, jobs, 1) == note(engine, jobs, 3) == "mine"
    assert taken(engine, jobs.table) == [1]


def test_other_entities_are_left_alone(database: Database) -> None:
    """Entities that are loaded but not claimed are neither expired nor read again."""
    engine, job, jobs = made(database)
    with Session(engine, expire_on_commit=False) as session:
        others = [session.get(job, number) for number in (2, 3, 4)]
        session.commit()
        annotate(engine, jobs, 2, "new")
        assert ids(claim_jobs(session, jobs)) == [1]
        sent = sent_by(engine)
        assert [(other.processing, other.note) for other in others] == [(False, "old")] * 3
        assert [sa_inspect(other).expired for other in others] == [False] * 3
        assert sent == []


def test_pending_entities_of_other_tables_are_left_alone(database: Database) -> None:
    """With autoflush off, edits of entities that cannot be claimed stay as they are."""
    engine, _, jobs = made(database)
    letters = job_table(name="letters")
    fill(engine, letters, 1, note="old")
    letter = mapped(letters)
    with Session(engine, autoflush=False) as session:
        known = session.get(letter, 1)
        known.note = "mine"
        assert ids(claim_jobs(session, jobs)) == [1]
        assert known in session.dirty
        session.commit()
    with Session(engine) as session:
        assert session.get(letter, 1).note == "mine"
    assert taken(engine, jobs.table) == [1]


def returning(job: Any) -> Any:
    """Build the ORM's own UPDATE … RETURNING of one job."""
    statement = sa.update(job).where(job.id == 1).values(processing=True).returning(job)
    return statement.execution_options(synchronize_session=False)


@pytest.mark.databases("sqlite", "postgresql")
def test_returning_gives_the_old_state(database: Database) -> None:
    """The twin: without `populate_existing` a loaded entity comes back as it was before."""
    engine, job, jobs = made(database)
    with Session(engine) as session:
        known = session.get(job, 1)
        assert session.scalars(returning(job)).one() is known
        assert known.processing is False
        session.commit()
    assert taken(engine, jobs.table) == [1]


@pytest.mark.databases("sqlite", "postgresql")
def test_populate_existing_wipes_edits(database: Database) -> None:
    """The twin: with it, and autoflush off, an edit is gone without a word."""
    engine, job, jobs = made(database)
    with Session(engine, autoflush=False) as session:
        known = session.get(job, 1)
        known.note = "mine"
        session.scalars(returning(job).execution_options(populate_existing=True)).one()
        assert (known.processing, known.note) == (True, "old")
        assert known not in session.dirty
        session.commit()
    assert note(engine, jobs, 1) == "old"
