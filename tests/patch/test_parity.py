"""Run alone, a patched function returns, raises and commits as the original did."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.orm import Session, sessionmaker

from atomic_claim import patch_claims
from tests.databases import Database
from tests.patch import legacy
from tests.patch.legacy import Job, Message
from tests.patch.patched import SHAPES, jobs
from tests.patch.test_shapes import fill

COUNT = 7


def told(call: Callable[[], Any]) -> Any:
    """What a call returned or raised, as plain values."""
    try:
        found = call()
    except legacy.Empty as error:
        return repr(error)
    if isinstance(found, Job):
        return ("job", found.id, found.state)
    if isinstance(found, list):
        return [each if isinstance(each, int) else each.id for each in found]
    return found


CALLS: dict[str, Callable[[Any], Any]] = {
    "A": lambda session: legacy.claim_next(session),
    "B": lambda session: legacy.Channel(session)._get("default"),
    "C": lambda session: legacy.Repository(session).claim_batch(limit=3),
    "C by sessionmaker": lambda maker: legacy.Repository.claim_ids(maker),
    "C by Core": lambda engine: legacy.Repository.claim_rows(engine, 3),
    "E": lambda session: legacy.relay(session, 3),
    "F": lambda session: legacy.send_all(session),
    "F with a state": lambda session: legacy.work_all(session, 3),
    "G": lambda session: legacy.pop(session),
}


def alone(database: Database, shape: str, *, patched: bool) -> tuple[list[Any], int, list[Any]]:
    """What nine calls of a function give, how often they commit, and what is in the table then."""
    engine = database.engine()
    model = SHAPES[shape].model
    fill(engine, model, COUNT)
    commits: list[Any] = []
    maker = sessionmaker(engine)
    sa.event.listen(maker, "after_commit", commits.append)
    binds = {sessionmaker: maker, Session: maker()}
    bind = binds.get(SHAPES[shape].bind, engine)
    with SHAPES[shape].patch() if patched else nullcontext():
        found = [told(lambda: CALLS[shape](bind)) for _ in range(9)]
    counted = len(commits) if isinstance(bind, Session) else -1
    if isinstance(bind, Session):
        bind.close()
    done = {"jobs": "state", "mails": "sent", "events": "published"}.get(model.__tablename__, "id")
    with engine.connect() as connection:
        column = model.__table__.c[done]
        rows = connection.scalars(sa.select(column).order_by(model.__table__.c.id)).all()
    return found, counted, list(rows)


@pytest.mark.parametrize("shape", CALLS)
def test_alone_nothing_differs(database: Database, shape: str) -> None:
    """Return values, exceptions, commits and rows are those of the original."""
    assert alone(database, shape, patched=True) == alone(database, shape, patched=False)


def test_the_entity_is_the_session_s(database: Database) -> None:
    """What is claimed belongs to the caller's session, is fresh, and can be changed on."""
    engine = database.engine()
    fill(engine, Job, 3)
    with Session(engine) as session, SHAPES["A"].patch():
        known = session.get_one(Job, 1)
        job = legacy.claim_next(session)
        assert job is known
        assert "state" not in sa_inspect(job).unloaded
        assert job.state == "running"
        job.state = "done"
        session.commit()
        assert legacy.claim_next(session) is not job
        assert session.get_one(Job, 1).state == "done"


def test_a_commit_of_the_caller_s(database: Database) -> None:
    """Where the original leaves the commit to its caller, so does the claim."""
    engine = database.engine()
    fill(engine, Job, 2)
    with Session(engine) as session:
        with patch_claims("tests.patch.legacy:claim_next", jobs, commit=False):
            assert legacy.claim_next(session).id == 1  # type: ignore[union-attr]
        session.rollback()
        with patch_claims("tests.patch.legacy:claim_next", jobs):
            assert legacy.claim_next(session).id == 1  # type: ignore[union-attr]
        session.rollback()
        assert session.get_one(Job, 1).state == "running"


@pytest.mark.databases("sqlite")
def test_finding_nothing_locks_nothing(database: Database) -> None:
    """A function that found nothing leaves SQLite's write lock to others, as a SELECT does."""
    engine, other = database.engine(), database.engine(connect_args={"timeout": 0})
    fill(engine, Job, 1)
    with Session(engine) as session, SHAPES["A"].patch():
        assert legacy.claim_next(session) is not None
        assert legacy.claim_next(session) is None
        with other.begin() as connection:
            connection.execute(sa.insert(Job).values(id=2, place=2))


def test_pending_work_of_the_caller_is_kept(database: Database) -> None:
    """A claim that finds nothing neither commits nor loses what the caller has begun."""
    engine = database.engine()
    fill(engine, Message, 1)
    with Session(engine) as session, SHAPES["A"].patch():
        session.add(Message(id=2, payload="pending"))
        assert legacy.claim_next(session) is None
        assert session.get_one(Message, 2).payload == "pending"
        session.rollback()
        assert session.get(Message, 2) is None


def test_a_deleted_message_can_be_returned(database: Database) -> None:
    """A dequeued entity is whole, though its row is gone."""
    engine = database.engine()
    fill(engine, Message, 2)
    with (
        Session(engine) as session,
        patch_claims("tests.patch.legacy:pop", Message, delete=True, limit=5),
    ):
        found: Any = legacy.pop(session)
        assert [(message.id, message.payload) for message in found] == [(1, "1"), (2, "2")]
