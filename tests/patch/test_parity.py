"""Run alone, a patched function returns, raises and commits as the original did."""

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from atomic_claim import Patch, patch_claims
from tests.claim.test_aio import DRIVERS
from tests.databases import Database
from tests.patch import legacy
from tests.patch.legacy import Job, Message
from tests.patch.patched import LEASE, SHAPES, jobs, leased
from tests.patch.test_shapes import fill

COUNT = 7


def told(call: Callable[[], Any]) -> Any:
    """Return the result or the exception of a call as plain values."""
    try:
        return plain(call())
    except legacy.Empty as error:
        return repr(error)


def plain(found: Any) -> Any:
    """Convert a result to a form that can be compared."""
    if isinstance(found, Job):
        return ("job", found.id, found.state)
    if isinstance(found, list):
        return [each if isinstance(each, int) else each.id for each in found]
    return found


def found_and_marked(session: Session) -> list[int]:
    """D: find what is due, and mark each job later."""
    store = legacy.Store(session)
    found = [(job.id, job) for job in store.get_due_jobs()]
    for _, job in found:
        store.update_job(job)
    return [key for key, _ in found]


async def found_and_marked_async(session: AsyncSession) -> list[int]:
    """Find jobs with a coroutine and mark them in its caller."""
    found = await legacy.AsyncRepository(session).get_due_jobs()
    for job in found:
        job.state = "running"
    await session.commit()
    return [job.id for job in found]


CALLS: dict[str, Callable[[Any], Any]] = {
    "A": lambda session: legacy.claim_next(session),
    "B": lambda session: legacy.Channel(session)._get("default"),
    "C": lambda session: legacy.Repository(session).claim_batch(limit=3),
    "C by sessionmaker": lambda maker: legacy.Repository.claim_ids(maker),
    "C by Core": lambda engine: legacy.Repository.claim_rows(engine, 3),
    "D": found_and_marked,
    "E": lambda session: legacy.relay(session, 3),
    "E by Core": lambda engine: legacy.relay_rows(engine, 3),
    "F": lambda session: legacy.send_all(session),
    "F with a state": lambda session: legacy.work_all(session, 3),
    "G": lambda session: legacy.pop(session),
    "A async": lambda session: legacy.claim_next_async(session),
    "B async": lambda session: legacy.AsyncRepository(session).get("default"),
    "C async": lambda session: legacy.AsyncRepository(session).claim_batch(3),
    "D async": found_and_marked_async,
    "E async": lambda session: legacy.relay_async(session, 3),
    "F async": lambda session: legacy.send_all_async(session),
    "G async": lambda engine: legacy.pop_async(engine),
}
# The original finds without a limit and without a commit; a claim has to have one.
FINDS: dict[str, Callable[[], Patch]] = {
    "D": lambda: patch_claims(
        legacy.Store.get_due_jobs,
        leased,
        session="self.session",
        limit=None,
        lease=LEASE,
        commit=True,
    ),
    "D async": lambda: patch_claims(
        legacy.AsyncRepository.get_due_jobs,
        leased,
        session="self.session",
        limit=None,
        lease=LEASE,
        commit=True,
    ),
}


@dataclass
class Seen:
    """Observed results of the calls of a function.

    Attributes:
        found: what they returned and raised.
        commits: how often their session committed, or else the connections of their engine.
        rows: what is in the table then.
    """

    found: list[Any]
    commits: int
    rows: list[Any]


def alone(database: Database, shape: str, *, patched: bool) -> Seen:
    """Call a function nine times without concurrent workers and record the results."""
    engine = database.engine()
    model = SHAPES[shape].model
    fill(engine, model, COUNT)
    with FINDS.get(shape, SHAPES[shape].patch)() if patched else nullcontext():
        if SHAPES[shape].on_loop:
            found, commits = asyncio.run(called_async(database, shape))
        else:
            found, commits = called(engine, shape)
    done = {"jobs": "state", "mails": "sent", "events": "published"}.get(model.__tablename__, "id")
    with engine.connect() as connection:
        column = model.__table__.c[done]
        rows = connection.scalars(sa.select(column).order_by(model.__table__.c.id)).all()
    return Seen(found, commits, list(rows))


def is_nothing(found: Any) -> bool:
    """Check whether a call found no job: how a transaction without a change ends is not seen."""
    return not found or found == repr(legacy.Empty())


def called(engine: sa.Engine, shape: str) -> tuple[list[Any], int]:
    """Call a function nine times; return its results and the number of commits."""
    commits: list[Any] = []
    maker = sessionmaker(engine)
    bind = {sessionmaker: maker, Session: maker()}.get(SHAPES[shape].bind, engine)
    if isinstance(bind, Session):
        sa.event.listen(bind, "after_commit", commits.append)
    else:
        sa.event.listen(engine, "commit", commits.append)
    found = []
    for _ in range(9):
        before = len(commits)
        found.append(told(lambda: CALLS[shape](bind)))
        if is_nothing(found[-1]):
            del commits[before:]
    if isinstance(bind, Session):
        bind.close()
    return found, len(commits)


async def called_async(database: Database, shape: str) -> tuple[list[Any], int]:
    """Call a coroutine function nine times; return its results and the number of commits."""
    commits: list[Any] = []
    engine = create_async_engine(database.url.set(drivername=DRIVERS[database.name][0]))
    bind: Any = engine
    if SHAPES[shape].model is Message:
        sa.event.listen(engine.sync_engine, "commit", commits.append)
    else:
        # What a coroutine returns must not have to be loaded again.
        bind = AsyncSession(engine, expire_on_commit=False)
        sa.event.listen(bind.sync_session, "after_commit", commits.append)
    found = []
    for _ in range(9):
        before = len(commits)
        try:
            found.append(plain(await CALLS[shape](bind)))
        except legacy.Empty as error:
            found.append(repr(error))
        if is_nothing(found[-1]):
            del commits[before:]
    if isinstance(bind, AsyncSession):
        await bind.close()
    await engine.dispose()
    return found, len(commits)


@pytest.mark.parametrize("shape", CALLS)
def test_alone_nothing_differs(database: Database, shape: str) -> None:
    """Return values, exceptions, commits and rows are those of the original."""
    original, patched = (alone(database, shape, patched=each) for each in (False, True))
    if shape in FINDS:
        # The find that found something commits its claim.
        original.commits += sum(1 for found in original.found if found)
    assert patched == original
    assert original.found != original.found[:1] * 9


def test_the_entity_is_the_session_s(database: Database) -> None:
    """The claimed entity belongs to the caller's session, is fresh, and can be changed further."""
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
        with patch_claims("tests.patch.legacy:claim_next", jobs, commit=True):
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
        patch_claims("tests.patch.legacy:pop", Message, delete=True, limit=5, commit=True),
    ):
        found: Any = legacy.pop(session)
        assert [(message.id, message.payload) for message in found] == [(1, "1"), (2, "2")]
