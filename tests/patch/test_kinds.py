"""Less common kinds of functions, which returned, committed and left free what they did before."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.orm.exc import StaleDataError

from atomic_claim import JobTable, Patch, PatchError, claim_reads, lock_reads, patch_claims
from tests.databases import Database
from tests.patch import kinds, legacy
from tests.patch.legacy import Job, Mail, Work
from tests.patch.patched import jobs, leased
from tests.patch.test_shapes import fill

HERE = "tests.patch.kinds"
Kind = tuple[Callable[[], Patch], Callable[[Any], Any]]


def in_context(made: AbstractContextManager[Any]) -> Any:
    """Enter a context and return the id of its job, or None if there is no job."""
    with made as found:
        return None if found is None else found.id


def ids(found: Any) -> list[int]:
    """Return the ids of jobs."""
    return [job.id for job in found]


KINDS: dict[str, Kind] = {
    "a generator": (
        lambda: patch_claims(f"{HERE}:stream", jobs, commit=True),
        lambda session: ids(kinds.stream(session)),
    ),
    "a generator that is left": (
        lambda: patch_claims(f"{HERE}:stream", jobs, commit=True),
        lambda session: ids(islice(kinds.stream(session), 2)),
    ),
    "a generator of a batch": (
        lambda: patch_claims(f"{HERE}:stream_batch", jobs, commit=True, limit="size"),
        lambda session: ids(kinds.stream_batch(session, 3)),
    ),
    "a generator of a batch that is left": (
        lambda: patch_claims(f"{HERE}:stream_batch", jobs, commit=True, limit="size"),
        lambda session: ids(islice(kinds.stream_batch(session, 3), 2)),
    ),
    "a generator of pages": (
        lambda: patch_claims(
            f"{HERE}:stream_pages", jobs, commit=True, limit=None, ignore=["size"]
        ),
        lambda session: ids(kinds.stream_pages(session, 3)),
    ),
    "a generator that runs as it is": (
        lambda: claim_reads(f"{HERE}:stream_whole", leased),
        lambda session: ids(kinds.stream_whole(session)),
    ),
    "a context": (
        lambda: patch_claims(f"{HERE}:next_job", jobs, commit=True),
        lambda session: in_context(kinds.next_job(session)),
    ),
    "a context that runs as it is": (
        lambda: claim_reads(f"{HERE}:whole_job", leased),
        lambda session: in_context(kinds.whole_job(session)),
    ),
    "a partial function": (
        lambda: patch_claims(
            f"{HERE}:claim_default", jobs, commit=True, returns="id", where={"queue": "queue"}
        ),
        lambda session: kinds.claim_default(session),
    ),
    "an object that is called": (
        lambda: patch_claims(f"{HERE}:claimer", jobs, commit=True, limit=3),
        lambda session: ids(kinds.claimer(session)),
    ),
    "a property": (
        lambda: patch_claims(f"{HERE}:Service.upcoming", jobs, commit=True, session="self.session"),
        lambda session: getattr(kinds.Service(session).upcoming, "id", None),
    ),
    "a commit by a method": (
        lambda: patch_claims(
            f"{HERE}:Service.by_method", jobs, commit=True, session="self.session"
        ),
        lambda session: getattr(kinds.Service(session).by_method(), "id", None),
    ),
    "a commit by a function": (
        lambda: patch_claims(
            f"{HERE}:Service.by_function", jobs, commit=True, session="self.session"
        ),
        lambda session: getattr(kinds.Service(session).by_function(), "id", None),
    ),
    "a commit by a context": (
        lambda: patch_claims(
            f"{HERE}:Service.by_context", jobs, commit=True, session="self.session"
        ),
        lambda session: getattr(kinds.Service(session).by_context(), "id", None),
    ),
    "a session by a method": (
        lambda: patch_claims(f"{HERE}:Service.by_scope", jobs, session="self.scope", returns="id"),
        lambda session: kinds.Service(session).by_scope(),
    ),
}


def shown(kind: Kind, folder: Path, *, patched: bool) -> tuple[list[Any], list[str]]:
    """Call a claim nine times; return the results with whether each committed, and the states."""
    patch, call = kind
    engine = sa.create_engine(f"sqlite:///{folder / str(patched)}")
    fill(engine, Job, 7)
    found: list[Any] = []
    commits: list[Any] = []
    with Session(engine) as session, patch() if patched else nullcontext():
        sa.event.listen(session, "after_commit", commits.append)
        for _ in range(9):
            commits.clear()
            result = call(session)
            # A claim ends the transaction that it has begun, even if it found nothing.
            found.append((result, bool(result and commits)))
    with engine.connect() as connection:
        states = list(connection.scalars(sa.select(Job.state).order_by(Job.id)))
    engine.dispose()
    return found, states


@pytest.mark.parametrize("name", KINDS)
def test_alone_nothing_differs(name: str, tmp_path: Path) -> None:
    """Return values, commits and rows are those of the original."""
    original = shown(KINDS[name], tmp_path, patched=False)
    assert shown(KINDS[name], tmp_path, patched=True) == original
    assert original[0][0][0] != original[0][-1][0]


@pytest.mark.parametrize("name", KINDS)
def test_undoing_leaves_no_trace(name: str) -> None:
    """The same objects are there again, in the module and in its classes."""

    def everything() -> dict[Any, int]:
        found = {key: id(value) for key, value in vars(kinds).items()}
        found |= {(key, "class"): id(value) for key, value in vars(kinds.Service).items()}
        for function in (kinds.next_job, kinds.whole_job):
            found |= {(id(c),): id(c.cell_contents) for c in function.__closure__ or ()}  # type: ignore[attr-defined]
        return found

    before = everything()
    with KINDS[name][0]():
        assert everything() != before
    assert everything() == before


def run_async(call: Callable[[AsyncSession], Awaitable[Any]], folder: Path) -> list[str]:
    """Call a coroutine with a session, and tell what is in the table then."""
    path = folder / "jobs"
    engine = sa.create_engine(f"sqlite:///{path}")
    fill(engine, Job, 4)

    async def main() -> None:
        own = create_async_engine(f"sqlite+aiosqlite:///{path}")
        async with AsyncSession(own, expire_on_commit=False) as session:
            await call(session)
        await own.dispose()

    asyncio.run(main())
    with engine.connect() as connection:
        states = list(connection.scalars(sa.select(Job.state).order_by(Job.id)))
    engine.dispose()
    return states


def test_an_asynchronous_generator(tmp_path: Path) -> None:
    """It claims when the next job is asked for."""

    async def call(session: AsyncSession) -> None:
        found = kinds.stream_async(session)
        assert [(await anext(found)).id for _ in range(2)] == [1, 2]
        await found.aclose()  # type: ignore[attr-defined]

    with patch_claims(f"{HERE}:stream_async", jobs, commit=True) as patch:
        assert run_async(call, tmp_path) == ["running", "running", "waiting", "waiting"]
    assert patch.claimed == 2


def test_an_asynchronous_context_runs_as_it_is(tmp_path: Path) -> None:
    """A job whose context ends is done, and a job whose context fails is free again."""

    async def call(session: AsyncSession) -> None:
        async with kinds.whole_job_async(session) as job:
            assert job is not None
        with pytest.raises(ZeroDivisionError):
            async with kinds.whole_job_async(session):
                raise ZeroDivisionError
        await session.rollback()

    with claim_reads(f"{HERE}:whole_job_async", leased) as patch:
        assert run_async(call, tmp_path) == ["done", *["waiting"] * 3]
    assert (patch.calls, patch.claimed) == (2, 2)


def test_an_object_whose_call_is_a_coroutine(tmp_path: Path) -> None:
    """It is patched as one, and commits as it did."""

    async def call(session: AsyncSession) -> None:
        assert await kinds.async_claimer(session) == 1

    with patch_claims(f"{HERE}:async_claimer", jobs, commit=True, returns="id"):
        assert run_async(call, tmp_path) == ["running", *["waiting"] * 3]


LEFT_OUT: dict[str, tuple[str, str]] = {
    "marks after its yield": (
        "stream_whole",
        r"goes on after its yield \(line 7 of it: job.state\).*claim_reads\(\)",
    ),
    "a context that marks in the end": ("whole_job", r"goes on after its yield.*claim_reads\(\)"),
    "never ends": ("stream_forever", r"never ends by itself \(line 3 of it\).*claim_reads\(\)"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_is_warned_of(name: str) -> None:
    """The warning comes when the patch is made, and names what will do."""
    function, message = LEFT_OUT[name]
    with (
        pytest.warns(UserWarning, match=message),
        patch_claims(f"{HERE}:{function}", jobs, commit=True),
    ):
        pass


def test_a_generator_loses_its_locks() -> None:
    """A consumer's commit between two rows would let go of them."""
    with pytest.raises(PatchError, match=r"is a generator.*claim_reads\(\)"):
        lock_reads(f"{HERE}:stream", Job)


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Path]:
    """Where the work writes down what it did."""
    Work.path, before = tmp_path / "runs", Work.path
    Work.path.touch()
    yield Work.path
    Work.path = before


def test_a_mark_that_asks_whether_the_row_is_free(database: Database, record: Path) -> None:
    """A row that was claimed for the loop is free to it, until it has marked the row as done."""
    engine = database.engine()
    fill(engine, Job, 5)
    again = sa.update(Job).where(Job.id == 1, Job.state == "waiting").values(state="running")
    with claim_reads(f"{HERE}:work_if_free", leased) as patch, Session(engine) as session:
        assert kinds.work_if_free(session, 3) == 3
        assert kinds.work_if_free(session, 3) == 2
        assert session.execute(again).rowcount == 0  # type: ignore[attr-defined]
    assert record.read_text(encoding="ascii").split() == ["1", "2", "3", "4", "5"]
    assert patch.claimed == 5


def test_a_mark_that_asks_so_without_a_lease(database: Database, record: Path) -> None:
    """The same by Core, where the claim has written the final state itself."""
    engine = database.engine()
    fill(engine, Mail, 3)
    table = JobTable(Mail, state="sent")
    with (
        claim_reads(f"{HERE}:send_if_unsent", table, at_most_once=True),
        Session(engine) as session,
    ):
        assert kinds.send_if_unsent(session) == 3
    assert record.read_text(encoding="ascii").split() == ["1", "2", "3"]


class Versions(DeclarativeBase):
    """A schema of its own, since all others are made and dropped together."""


class Versioned(Versions):
    """A job whose mapper counts its versions, so that unseen changes are not overwritten."""

    __tablename__ = "versioned"

    id: Mapped[int] = mapped_column(primary_key=True)
    processing: Mapped[bool] = mapped_column(default=False)
    version: Mapped[int] = mapped_column()
    __mapper_args__: ClassVar[Any] = {"version_id_col": version}


def take_versioned(session: Session) -> Versioned | None:
    """Claim the next job (shape A)."""
    query = sa.select(Versioned).where(Versioned.processing.is_(False)).order_by(Versioned.id)
    job = session.scalars(query.limit(1)).first()
    if job is not None:
        job.processing = True
        session.commit()
    return job


@pytest.mark.parametrize("patched", [False, True])
def test_the_version_of_a_claimed_row(database: Database, patched: bool) -> None:
    """A session that loaded the row before the claim cannot overwrite it."""
    engine = database.engine()
    Versions.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Versioned(id=1))
        session.commit()
    patch = (
        patch_claims(f"{__name__}:take_versioned", Versioned, commit=True)
        if patched
        else nullcontext()
    )
    with patch, Session(engine) as session, Session(engine, expire_on_commit=False) as other:
        known = other.get_one(Versioned, 1)
        other.commit()
        job = take_versioned(session)
        assert job is not None
        assert job.version == 2
        session.commit()
        known.processing = True
        with pytest.raises(StaleDataError):
            other.commit()
        job.processing = False
        session.commit()
        assert job.version == 3


@pytest.mark.databases("sqlite")
def test_a_loop_that_marks_nothing_is_told(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """A loop that finds its rows taken goes round in vain, which is logged with the cure."""
    engine = database.engine()
    fill(engine, Job, 2)
    by_lease = JobTable(
        Job,
        state="lease_until",
        done={"state": "done"},
        order="place",
        lease="lease_until",
        token="claim_token",
        naive_times="utc",
    )
    with (
        Session(engine) as session,
        caplog.at_level(logging.WARNING),
        claim_reads(f"{HERE}:looks_again", leased),
    ):
        assert kinds.looks_again(session) == 2
        assert "leave the state to it: JobTable(..., state=<the lease column>)" in caplog.text
        session.rollback()
    caplog.clear()
    with Session(engine) as session, claim_reads(f"{HERE}:looks_again", by_lease) as patch:
        assert kinds.looks_again(session) == 2
        assert kinds.looks_again(session) == 0
        assert set(session.scalars(sa.select(legacy.Job.state))) == {"done"}
    assert (caplog.text, patch.claimed) == ("", 2)
