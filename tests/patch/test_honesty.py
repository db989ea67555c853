"""A patch guesses nothing, drops nothing, and is silent about nothing."""

import asyncio
import importlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
    validates,
)

from atomic_claim import JobTable, Patch, PatchError, claim_reads, lock_reads, patch_claims
from atomic_claim.patch.file import load_patches
from tests.databases import Database
from tests.patch.legacy import Event, Job, Run
from tests.patch.patched import jobs
from tests.patch.test_shapes import fill

HERE = __name__


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    """Create an engine with six jobs and six events."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'jobs'}", connect_args={"timeout": 0})
    fill(engine, Job, 6)
    with engine.begin() as connection:
        connection.execute(sa.insert(Event), [{"id": number} for number in range(1, 7)])
    yield engine
    engine.dispose()


def states(engine: sa.Engine) -> list[str]:
    """Return the states of all jobs."""
    with engine.connect() as connection:
        return list(connection.scalars(sa.select(Job.state).order_by(Job.id)))


class Place:
    """Holds what the legacy code of this file reads at run time."""

    engine: Any = None
    table: Any = None
    row: Callable[[int], Any] = staticmethod(lambda _: None)


def take(session: Any = None) -> Any:
    """Never called: a claim stands in its place."""
    raise AssertionError(session)


def take_of(session: Session, queue: str = "default", *rest: Any) -> Any:
    """Never called either; it asks for a queue."""
    raise AssertionError(session, queue, rest)


class Queue:
    """A queue that reaches its session in several ways."""

    def __init__(self, session: Any) -> None:
        self.store = self
        self.held = session
        self.name = "default"
        self.jobs_table = jobs
        self.events_table = Event

    def pop(self) -> Any:
        """Never called: a claim stands in its place."""
        raise AssertionError

    def fresh(self) -> Session:
        """Make a session."""
        return Session(Place.engine)

    def relay(self, session: Session) -> list[int]:
        """Publish all events in one transaction."""
        found = session.scalars(sa.select(Event).where(Event.published.is_(False))).all()
        for event in found:
            Place.row(event.id)
            event.published = True
        session.commit()
        return [event.id for event in found]


def committed(session: Session) -> None:
    """Commit."""
    session.flush()
    session.commit()


def flushed(session: Session) -> None:
    """Leave the commit to its caller."""
    session.flush()


@pytest.mark.parametrize(
    ("function", "proposed"),
    [
        (committed, r"write commit=True, since it commits \(line 4 of it: session.commit\(\)\)"),
        (flushed, "commit=True if it or what it calls commits, else commit=False"),
    ],
)
def test_a_commit_is_never_guessed(function: Any, proposed: str) -> None:
    """In a session of the caller's it has to be said, and the error proposes the value."""
    with pytest.raises(PatchError, match=proposed):
        patch_claims(function, jobs)


def test_a_session_that_only_a_call_shows(
    engine: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """A path may lead to anything: the call raises before it claims, and logs it."""
    with Session(engine) as session, patch_claims(Queue.pop, jobs, session="self.store.held"):
        with pytest.raises(PatchError, match="so say whether it is committed"):
            Queue(session).pop()
        assert "so say whether it is committed" in caplog.text
    assert set(states(engine)) == {"waiting"}


OWN: dict[str, Callable[[sa.Engine], Any]] = {
    "an engine": lambda engine: engine,
    "a sessionmaker": sessionmaker,
    "a factory": lambda engine: lambda: Session(engine),
    "a factory with an optional parameter": lambda engine: (
        lambda other=None: Session(other or engine)
    ),
    "a factory that is given the call": lambda engine: lambda call: Session(call and engine),
    "a connection's": lambda engine: lambda: engine.connect(),
    "a context manager": lambda engine: lambda: scope(engine),
    "a generator": lambda engine: lambda: yielded(engine),
    "a method": lambda _: "self.fresh",
}


@contextmanager
def scope(engine: sa.Engine) -> Iterator[Session]:
    """Yield a session without committing it."""
    with Session(engine) as session:
        yield session


def yielded(engine: sa.Engine) -> Iterator[Session]:
    """Yield a session, as a dependency of a web framework does."""
    with Session(engine) as session:
        yield session


@pytest.mark.parametrize("kind", OWN)
def test_a_session_of_the_patch_s_own(engine: sa.Engine, kind: str) -> None:
    """It is committed and closed, whatever was found, and rolled back if `returns` raises."""
    Place.engine = engine
    fails = [True]

    def number(job: Any) -> int:
        if fails:
            raise ZeroDivisionError(fails.pop())
        return int(job.id)

    with patch_claims(Queue.pop, jobs, session=OWN[kind](engine), returns=number):
        queue = Queue(None)
        with pytest.raises(ZeroDivisionError):
            queue.pop()
        assert set(states(engine)) == {"waiting"}
        assert [queue.pop() for _ in range(8)] == [1, 2, 3, 4, 5, 6, None, None]
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert set(states(engine)) == {"running"}


def test_a_registry_s_session_stays_open(engine: sa.Engine) -> None:
    """The first use of a registry, inside of the call, makes a session that is the caller's."""
    registry = scoped_session(sessionmaker(engine))
    with pytest.raises(PatchError, match="session of the caller's"):
        patch_claims(take, jobs, session=registry, ignore=["session"])
    with patch_claims(take, jobs, session=registry, commit=False, ignore=["session"]):
        found = take()
    assert found in registry()
    assert registry().in_transaction()
    registry.rollback()
    assert states(engine) == ["waiting"] * 6
    registry.remove()


def test_an_asynchronous_registry_s_session_stays_open(engine: sa.Engine) -> None:
    """The session of an ``async_scoped_session``, whose scope is the task, stays open, too."""
    address = engine.url.set(drivername="sqlite+aiosqlite")

    async def call() -> bool:
        own = create_async_engine(address)
        registry = async_scoped_session(async_sessionmaker(own), asyncio.current_task)
        Place.engine = registry
        found = await take_async(None)
        is_open = found in registry() and registry().in_transaction()
        await registry.rollback()
        await registry.remove()
        await own.dispose()
        return is_open

    options: Any = {"ignore": ["session"], "session": lambda: Place.engine}
    with patch_claims(take_async, jobs, commit=False, **options):
        assert asyncio.run(call())
    with patch_claims(take_async, jobs, **options), pytest.raises(PatchError, match="the caller's"):
        asyncio.run(call())
    assert states(engine) == ["waiting"] * 6


def test_its_claim_cannot_be_left_uncommitted(engine: sa.Engine) -> None:
    """`commit=False` would undo the claim."""
    with (
        patch_claims(Queue.pop, jobs, session=lambda: Session(engine), commit=False),
        pytest.raises(PatchError, match="commit=False would undo it"),
    ):
        Queue(None).pop()


def test_deleted_rows_are_given_back_too(engine: sa.Engine) -> None:
    """A row that was taken by a DELETE is there again if `returns` raises."""
    options: dict[str, Any] = {"session": engine, "delete": True, "returns": lambda _: 1 / 0}
    with patch_claims(Queue.pop, jobs, **options), pytest.raises(ZeroDivisionError):
        Queue(None).pop()
    assert len(states(engine)) == 6


def test_what_no_option_reads(engine: sa.Engine) -> None:
    """A parameter is refused when the patch is made, surplus arguments by the call."""
    with pytest.raises(PatchError, match=r"has 'queue', which no option reads.*where={'column'"):
        patch_claims(take_of, jobs, commit=True)
    with pytest.raises(PatchError, match=r"ignore=\['colour'\]"):
        patch_claims(take_of, jobs, commit=True, ignore=("colour",))
    with Session(engine) as session:
        options: dict[str, Any] = {"commit": True, "where": {"queue": "queue"}, "returns": "id"}
        with patch_claims(take_of, jobs, **options):
            assert (take_of(session), take_of(session, "other")) == (1, None)
            with pytest.raises(PatchError, match=r"was given \(5,\) for 'rest'"):
                take_of(session, "default", 5)
        with patch_claims(take_of, jobs, **options | {"ignore": "rest"}):
            assert take_of(session, "default", 5) == 2


def marks_more(session: Session) -> None:
    """Set a column that a claim does not, and write to another table."""
    job = session.get_one(Job, 1)
    job.state = "running"
    job.owner = "somebody"
    session.add(Run(number=job.id))
    session.commit()


def test_what_a_claim_would_not_write() -> None:
    """The columns and tables that the source shows are named in warnings."""
    with (
        pytest.warns(UserWarning, match=r"sets owner, which the claim does not.*values={'owner'"),
        pytest.warns(UserWarning, match=r"writes Run beside jobs.*by lock_reads\(\)"),
    ):
        patch_claims(marks_more, jobs, commit=True).undo()
    with pytest.warns(UserWarning, match="writes Run") as warned:
        patch_claims(marks_more, jobs, commit=True, values={"owner": "w"}).undo()
    assert len(warned) == 1


class Histories(DeclarativeBase):
    """A schema of its own."""


class Watched(Histories):
    """A job whose changes are written down."""

    __tablename__ = "watched"

    id: Mapped[int] = mapped_column(primary_key=True)
    processing: Mapped[bool] = mapped_column(default=False)

    @validates("processing")
    def _written(self, _: str, value: bool) -> bool:
        return value


def test_what_listens_to_a_flush_is_named(engine: sa.Engine) -> None:
    """Events of the mapper and of the session do not run for a claim, which is warned of."""
    Histories.metadata.create_all(engine)
    heard: list[Any] = []
    sa.event.listen(Watched, "before_update", lambda *_: heard.append(1))
    with pytest.warns(UserWarning, match=r"before_update, @validates\('processing'\) does not run"):
        patch = patch_claims(take, Watched, commit=True)
    with patch, Session(engine) as session, lock_reads(Queue.relay, Event):
        assert take(session) is None
        sa.event.listen(session, "before_flush", lambda *_: heard.append(1))
    with patch_claims(take, jobs, commit=True), Session(engine) as session:
        sa.event.listen(session, "before_flush", lambda *_: heard.append(1))
        with pytest.warns(UserWarning, match="what listens to before_flush does not run"):
            take(session)


def test_strings_are_read_from_the_call(engine: sa.Engine) -> None:
    """Paths and parameters within `where`, `values`, `order_by`; `now()`; all else constant."""
    options: dict[str, Any] = {
        "where": {"queue": "self.name", "or": [{"owner": None}, {"owner": "self.name"}]},
        "values": {"owner": "self.name"},
        "order_by": ["-place"],
    }
    with patch_claims(Queue.pop, jobs, session=engine, **options):
        job = Queue(None).pop()
    assert (job.id, job.owner) == (6, "default")
    assert [Queue(None).name for _ in "a"] == ["default"]
    with patch_claims(
        Queue.pop, jobs, session=engine, where={"lease_until": {"less_than": "now()"}}
    ):
        assert Queue(None).pop() is None


def make_session(bind: Any = None) -> Session:
    """Make a session; the parameter is not for the call."""
    return Session(bind or Place.engine)


def only_default(call: Any) -> Any:
    """Return a filter."""
    return {"queue": call.queue}


def described(job: Any, call: Any) -> str:
    """Return a text."""
    return f"{job.id} of {call.queue}"


def test_references_by_their_signature(engine: sa.Engine, tmp_path: Path) -> None:
    """A file's names of objects are used as the objects would be."""
    Place.engine = engine
    path = tmp_path / "patches.toml"
    path.write_text(
        f"""
        [patches."{HERE}:take_of"]
        table = {{ table = "tests.patch.legacy:Job", state = "state", free = "waiting", \
claimed = "running", done = "done" }}
        session = "{HERE}:make_session"
        where = "{HERE}:only_default"
        returns = "{HERE}:described"
        ignore = ["session", "rest"]

        [patches."{HERE}:Queue.pop"]
        table = "self.jobs_table"
        session = "{HERE}:make_session"
        where = {{ queue = "self.name" }}
        order_by = "-place"
        returns = "id"
        """,
        encoding="utf-8",
    )
    one, other = load_patches(path)
    with one, other:
        assert take_of(None) == "1 of default"  # type: ignore[arg-type]
        assert take_of(None, "other") is None  # type: ignore[arg-type]
        assert Queue(None).pop() == 6


ARITIES: dict[str, tuple[dict[str, Any], str]] = {
    "two arguments": ({"limit": lambda a, b: a or b}, r"limit=.* takes b, and is given call"),
    "four arguments": (
        {"returns": lambda a, b, c, d: (a, b, c, d)},
        r"returns=.* takes d, and is given found, call, bind",
    ),
    "a coroutine": ({"returns": asyncio.sleep}, "is a coroutine function"),
}


@pytest.mark.parametrize("name", ARITIES)
def test_arities_are_checked_when_patching(name: str) -> None:
    """A callable that needs more than there is would fail after the claim."""
    options, message = ARITIES[name]
    with pytest.raises(PatchError, match=message):
        patch_claims(take, jobs, commit=True, **options)


def test_an_adapter_may_name_what_it_takes(engine: sa.Engine) -> None:
    """The session is passed by its name, and what is read in it belongs to the claim."""

    def read(job: Any, bind: Any) -> tuple[int, str]:
        return job.id, bind.scalar(sa.select(Job.state).where(Job.id == job.id))

    for session in (engine, sessionmaker(engine), lambda: Session(engine)):
        with patch_claims(Queue.pop, jobs, session=session, returns=read):
            assert Queue(None).pop()[1] == "running"
    assert states(engine).count("running") == 3


async def take_async(session: Any) -> Any:
    """Never called: a claim stands in its place."""
    raise AssertionError(session)


def test_a_coroutine_makes_the_result(tmp_path: Path) -> None:
    """It gets the asynchronous session, and its rows come back if it raises."""
    path = tmp_path / "jobs"
    plain = sa.create_engine(f"sqlite:///{path}")
    fill(plain, Job, 2)

    async def read(job: Any, call: Any, bind: Any) -> tuple[int, str]:
        assert call.session is not None
        state = await bind.scalar(sa.select(Job.state).where(Job.id == job.id))
        return job.id, state

    async def main() -> list[Any]:
        own = create_async_engine(f"sqlite+aiosqlite:///{path}")
        with patch_claims(
            f"{HERE}:take_async", jobs, session=lambda: AsyncSession(own), returns=read
        ):
            found = [await take_async(1)]
        with (
            patch_claims(f"{HERE}:take_async", jobs, session=own, ignore="session", returns=fail),
            suppress(ZeroDivisionError),
        ):
            await take_async(1)
        await own.dispose()
        return found

    async def fail(job: Any) -> None:
        raise ZeroDivisionError(job)

    assert asyncio.run(main()) == [(1, "running")]
    assert states(plain) == ["running", "waiting"]
    plain.dispose()


def test_a_table_that_is_set_later(engine: sa.Engine) -> None:
    """A name that is None when the patch is made is looked up at the first call."""
    Place.table = None
    with patch_claims(Queue.pop, f"{HERE}:Place.table", session=engine) as patch:
        with pytest.raises(PatchError, match="is None: what sets it has not run"):
            Queue(None).pop()
        Place.table = jobs
        assert Queue(None).pop().id == 1
    assert patch.claimed == 1


MODELS = """
import late_library
import sqlalchemy as sa
from sqlalchemy.orm import declarative_base

Base = declarative_base()


class Mail(Base):
    __tablename__ = "late_mails"
    id = sa.Column(sa.Integer, primary_key=True)
    processing = sa.Column(sa.Boolean, default=False, nullable=False)
"""


def test_a_module_that_is_being_imported(
    engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its import of the patched module comes before it defines the table."""
    (tmp_path / "late_library.py").write_text("def take(): pass\n", encoding="utf-8")
    (tmp_path / "late_models.py").write_text(MODELS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    patch = patch_claims("late_library:take", "late_models:Mail", session=engine)
    models = importlib.import_module("late_models")
    models.Base.metadata.create_all(engine)
    assert patch.is_installed
    assert sys.modules["late_library"].take() is None
    patch.undo()


MEMORY = sa.create_engine("sqlite://")
MISSPELT = {
    "session": (f"{HERE}:MEMROY", "'.*:MEMROY' cannot be imported: .* has no attribute 'MEMROY'"),
    "table": (f"{HERE}:jbos", "'.*:jbos' cannot be imported"),
    "where": ("late_halper:where", "No module named 'late_halper'"),
    "returns": (f"{HERE}:Place.rwo", "'.*:Place.rwo' cannot be imported"),
}


@pytest.mark.parametrize("option", MISSPELT)
@pytest.mark.parametrize("module", [HERE, "late_application"])
def test_a_misspelt_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, module: str
) -> None:
    """It is an error when the function is patched, which is when its module has been imported."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "late_application.py").write_text(
        "def take(session=None): pass\n", encoding="utf-8"
    )
    name, message = MISSPELT[option]
    options = {"table": f"{HERE}:jobs", "session": f"{HERE}:MEMORY", "ignore": ["session"]}
    lines = [f"{key} = {value!r}\n" for key, value in {**options, option: name}.items()]
    path = tmp_path / "patches.toml"
    path.write_text(f'[patches."{module}:take"]\n{"".join(lines)}', encoding="utf-8")

    def load() -> None:
        load_patches(path)
        importlib.import_module(module)

    with pytest.raises(PatchError, match=message):
        load()
    sys.modules.pop("late_application", None)


def test_a_named_session_reads_no_parameter(tmp_path: Path) -> None:
    """A parameter that no option reads is refused beside a named session, too."""
    path = tmp_path / "patches.toml"
    path.write_text(
        f'[patches."{HERE}:take_of"]\ntable = "{HERE}:jobs"\nsession = "{HERE}:MEMORY"\n'
        'ignore = ["session"]\n',
        encoding="utf-8",
    )
    with pytest.raises(PatchError, match="has 'queue', which no option reads"):
        load_patches(path)


def test_first_calls_from_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that one thread imports for its first call is waited for by the others."""
    helper = "import threading\nthreading.Event().wait(0.2)\nwhere = lambda call: {'queue': 'q'}\n"
    (tmp_path / "late_helper.py").write_text(helper, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "patches.toml"
    path.write_text(
        f'[patches."{HERE}:take"]\ntable = "{HERE}:jobs"\nsession = "{HERE}:Place.engine"\n'
        'where = "late_helper:where"\nignore = ["session"]\n',
        encoding="utf-8",
    )
    Place.engine = sa.create_engine(f"sqlite:///{tmp_path / 'jobs'}")
    fill(Place.engine, Job, 1)
    found: list[Any] = []

    def call() -> None:
        try:
            found.append(take())
        except PatchError as error:
            found.append(error)

    (patch,) = load_patches(path)
    with patch:
        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [None] * 3
    Place.engine.dispose()


@pytest.mark.databases("sqlite", "postgresql", "mariadb")
@pytest.mark.parametrize("by", ["lock_reads", "claim_reads"])
def test_another_object_for_the_table(database: Database, by: str) -> None:
    """A reflected table is the table that the function reads and changes."""
    engine = database.engine()
    fill(engine, Event, 4)
    table = sa.Table("events", sa.MetaData(), autoload_with=engine)
    if by == "lock_reads":
        made = lock_reads(Queue.relay, table)
    else:
        made = claim_reads(Queue.relay, JobTable(table, state="published"), at_most_once=True)
    with made as patch, Session(engine) as session:
        assert Queue(None).relay(session) == [1, 2, 3, 4]
    assert (patch.claimed, patch.passed_through) == (4, 0)


def test_a_path_to_the_table_of_reads(engine: sa.Engine) -> None:
    """Reads take a table as claims do."""
    with lock_reads(Queue.relay, "self.events_table") as patch, Session(engine) as session:
        assert len(Queue(None).relay(session)) == 6
    assert patch.claimed == 6


def later(session: Session) -> Any:
    """Return the coroutine that does the work."""

    async def work() -> list[int]:
        return Queue(None).relay(session)

    return work()


def lazily(session: Session) -> Any:
    """Return what reads when it is consumed."""
    return map(session.get_one, [Event] * 2, [1, 2])


def test_a_function_that_returns_a_coroutine(engine: sa.Engine) -> None:
    """It is watched until that has ended; what reads even later is refused."""
    with Session(engine) as session, lock_reads(later, Event) as patch:
        assert asyncio.run(later(session)) == [1, 2, 3, 4, 5, 6]
    assert patch.claimed == 6
    with (
        Session(engine) as session,
        lock_reads(lazily, Event),
        pytest.raises(PatchError, match="returned a map, which reads when the call is over"),
    ):
        lazily(session)


def test_a_patch_that_protects_nothing(engine: sa.Engine, caplog: pytest.LogCaptureFixture) -> None:
    """A patch whose calls read nothing of the table is told, at once and at its end."""
    patch = lock_reads(Queue.relay, Job)
    with Session(engine) as session:
        Queue(None).relay(session)
    assert "Queue.relay read nothing of jobs" in caplog.text
    with pytest.warns(UserWarning, match="read nothing of the table"):
        patch.undo()


def test_an_empty_find_gives_the_write_lock_back(engine: sa.Engine) -> None:
    """On SQLite a relay without events does not keep others from writing."""
    with Session(engine) as session, lock_reads(looks, Event):
        assert len(looks(session, 1)) == 6
        session.commit()
        assert looks(session, 99) == []
        with engine.begin() as connection:
            connection.execute(sa.insert(Event).values(id=99))
        assert looks(session, 99) == [99]


def looks(session: Session, least: int) -> list[int]:
    """Find events, and leave the transaction open."""
    return list(session.scalars(sa.select(Event.id).where(sa.or_(Event.id >= least, least == 1))))


LIMITED: dict[str, Callable[[], AbstractContextManager[Patch]]] = {
    "lock_reads": lambda: lock_reads(Queue.relay, Event, limit=2),
    "claim_reads": lambda: claim_reads(
        Queue.relay, JobTable(Event, state="published"), at_most_once=True, limit=2
    ),
}


@pytest.mark.parametrize("by", LIMITED)
def test_a_batch_of_reads(engine: sa.Engine, by: str) -> None:
    """A loop that takes everything takes a few at a time."""
    with LIMITED[by](), Session(engine) as session:
        assert [len(Queue(None).relay(session)) for _ in range(4)] == [2, 2, 2, 0]


def test_aggregates_within_the_loop_pass(engine: sa.Engine) -> None:
    """A count finds no rows, once the function has found its own."""
    left: list[Any] = []
    with Session(engine) as session, lock_reads(Queue.relay, Event, limit=2):
        Place.row = staticmethod(
            lambda _: left.append(session.query(Event).filter_by(published=False).count())
        )
        try:
            Queue(None).relay(session)
        finally:
            Place.row = staticmethod(lambda _: None)
    assert len(left) == 2


def row_by_row(session: Session) -> list[int]:
    """Publish all events, each in its own transaction."""
    done = []
    for event in session.scalars(sa.select(Event).where(Event.published.is_(False))).all():
        Place.row(event.id)
        event.published = True
        session.commit()
        done.append(event.id)
    return done


def test_at_most_once_gives_back_what_a_living_worker_left(engine: sa.Engine) -> None:
    """Rows that were not marked when the work raised are free again, and no others."""

    def fail(number: int) -> None:
        if number == 3:
            raise ZeroDivisionError

    table = JobTable(Event, state="published")
    with Session(engine) as session, claim_reads(row_by_row, table, at_most_once=True):
        Place.row = staticmethod(fail)
        try:
            with pytest.raises(ZeroDivisionError):
                row_by_row(session)
        finally:
            Place.row = staticmethod(lambda _: None)
        session.rollback()
        assert row_by_row(session) == [3, 4, 5, 6]


def swallows(session: Session, *, fails: bool) -> str:
    """Swallow every error, as loops of workers do."""
    with suppress(Exception):
        session.execute(sa.text("SELECT id FROM events"))
    if fails:
        raise LookupError
    return "fine"


def test_a_refusal_that_the_code_swallows(
    engine: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and raised when the call is over, or else attached to what is raised."""
    with (
        caplog.at_level(logging.ERROR),
        Session(engine) as session,
        lock_reads(swallows, Event),
    ):
        with pytest.raises(PatchError, match="by raw SQL"):
            swallows(session, fails=False)
        assert "by raw SQL" in caplog.text
        with pytest.raises(LookupError) as raised:
            swallows(session, fails=True)
        assert "by raw SQL" in raised.value.__notes__[0]
