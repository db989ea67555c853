"""Patches are honest: what they cannot do is said at once, and undoing leaves nothing."""

import functools
import gc
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import wrapt
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from sqlalchemy import event
from sqlalchemy.orm import Session

from atomic_claim import (
    ClaimError,
    JobTable,
    Patch,
    PatchError,
    claim_reads,
    claims,
    lock_reads,
    patch_claims,
)
from atomic_claim.patch.reads import LISTENERS
from tests.databases import Database
from tests.patch import early, legacy
from tests.patch.legacy import Event, Job, Repository
from tests.patch.patched import SHAPES, jobs, leased, mails
from tests.patch.test_shapes import fill

HERE = "tests.patch.legacy"


def everything() -> dict[Any, int]:
    """Return the ids of all attributes of the legacy modules, their classes and closures."""
    found: dict[Any, int] = {}
    for module in (legacy, early):
        for name, value in vars(module).items():
            found[module.__name__, name] = id(value)
            if isinstance(value, type) and value.__module__ == HERE:
                found |= {(HERE, name, inner): id(each) for inner, each in vars(value).items()}
    waiting = [*vars(legacy).values(), *vars(Repository).values()]
    while waiting:
        function = waiting.pop()
        if (id(function), "wrapped") in found:
            continue
        for depth, cell in enumerate(getattr(function, "__closure__", None) or ()):
            found[id(function), depth] = id(cell.cell_contents)
            waiting.append(cell.cell_contents)
        found[id(function), "wrapped"] = id(getattr(function, "__wrapped__", None))
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_undoing_leaves_no_trace(shape: str) -> None:
    """Every attribute is the same object as before, in classes, modules and closures."""
    before = everything()
    with SHAPES[shape].patch() as patch:
        assert everything() != before
        assert patch.is_installed
    assert everything() == before
    patch.undo()
    assert everything() == before
    assert not patch.is_installed


def test_the_listeners_go_with_the_last_patch() -> None:
    """SQLAlchemy's events are listened to only as long as a patch needs it."""

    def heard() -> list[bool]:
        return [event.contains(target, name, each) for target, name, each, _ in LISTENERS]

    assert not any(heard())
    one, other = SHAPES["E"].patch(), SHAPES["F"].patch()
    one.undo()
    assert all(heard())
    other.undo()
    assert not any(heard())


def test_early_bindings_are_patched() -> None:
    """Names bound by `from module import function`, also under another name, are patched too."""
    original = [legacy.claim_next]
    with patch_claims(f"{HERE}:claim_next", jobs, commit=True):
        assert early.claim_next is legacy.claim_next
        assert early.renamed is legacy.claim_next
        assert legacy.claim_next is not original[0]
    assert early.renamed is original[0]


def test_early_bindings_of_methods_are_named() -> None:
    """A name for a method that a patch of the class cannot reach is named in a warning."""
    early.rows = vars(Repository)["claim_rows"].__func__  # type: ignore[attr-defined]
    try:
        with (
            pytest.warns(UserWarning, match="tests.patch.early.rows"),
            patch_claims(f"{HERE}:Repository.claim_rows", jobs, limit="count"),
        ):
            pass
    finally:
        del early.rows  # type: ignore[attr-defined]


def test_decorators_go_on_working() -> None:
    """The function is replaced inside its decorators, wherever the decorated one is held."""
    held = Repository.claim_batch
    calls = held.calls
    engine = sa.create_engine("sqlite://")
    fill(engine, Job, 3)
    with Session(engine) as session, SHAPES["C"].patch() as patch:
        assert Repository.claim_batch is held
        assert early.claim_batch is held
        repository = Repository(session, "w1")
        assert [job.owner for job in repository.claim_batch(2)] == ["w1", "w1"]
        assert early.claim_batch(repository, limit=5)[0].id == 3
    assert held.calls == calls + 2
    assert (patch.calls, patch.claimed, patch.passed_through) == (2, 3, 0)


@pytest.fixture
def module() -> Iterator[types.ModuleType]:
    """Yield a new module that can be imported during the test."""
    made = types.ModuleType("legacy_of_a_test")
    sys.modules[made.__name__] = made
    yield made
    del sys.modules[made.__name__]


class Base:
    """A class with a claim."""

    def claim(self, session: Session) -> Any:
        """Return a mark of the original method, and the session."""
        return ("original", session)


class Inheriting(Base):
    """A class that inherits it."""


class Overriding(Inheriting):
    """A class that has its own."""

    def claim(self, session: Session) -> Any:
        """Its own."""
        return ("own", session)


def test_an_inherited_method() -> None:
    """It is patched for the class that was named, and the base keeps its own."""
    original = vars(Base)["claim"]
    with pytest.warns(UserWarning, match=r"super\(\): tests.patch.test_patches:Overriding.claim"):
        patch = patch_claims("tests.patch.test_patches:Inheriting.claim", jobs, commit=True)
    with patch:
        assert vars(Base)["claim"] is original
        assert "claim" in vars(Inheriting)
        assert patch.overrides == ("tests.patch.test_patches:Overriding.claim",)
    assert "claim" not in vars(Inheriting)


def test_overrides_are_named() -> None:
    """A subclass's method in place of the patched one is named, and is not patched."""
    with pytest.warns(UserWarning, match="Overriding.claim"):
        patch = patch_claims(Base.claim, jobs, commit=True)
    with patch:
        assert Overriding().claim(None)[0] == "own"  # type: ignore[arg-type]


def test_a_method_of_one_object() -> None:
    """A bound method is patched for its object, and for no other."""
    engine = sa.create_engine("sqlite://")
    fill(engine, Job, 1)
    one, other = legacy.Store(Session(engine)), legacy.Store(Session(engine))
    with patch_claims(one.get_due_jobs, jobs, session="self.session", limit=None, commit=True):
        assert [job.id for job in one.get_due_jobs()] == [1]
        assert not isinstance(other.get_due_jobs(), list)
    assert vars(one) == {"session": one.session}
    for store in (one, other):
        store.session.close()
    engine.dispose()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no such module": (lambda: patch_claims("nowhere.at_all:f", jobs), "no module 'nowhere"),
    "no such function": (
        lambda: patch_claims(f"{HERE}:claim_nxt", jobs),
        "no 'claim_nxt'; did you mean 'claim_next'",
    ),
    "no such method": (
        lambda: patch_claims(f"{HERE}:Repository.claims", jobs),
        "Repository has no 'claims'",
    ),
    "no colon": (lambda: patch_claims(f"{HERE}.claim_next", jobs), "is not a target"),
    "no function": (lambda: patch_claims(f"{HERE}:Work.path", jobs), "expected a function"),
    "a class": (lambda: patch_claims(legacy.Store, jobs), "not a function or a method"),
    "a local function": (lambda: patch_claims(lambda session: session, jobs), "held by no module"),
    "no such parameter": (
        lambda: patch_claims(f"{HERE}:claim_next", jobs, commit=True, limit="size"),
        "limit='size' is not a parameter of tests.patch.legacy:claim_next, .*it has session",
    ),
    "no such path": (
        lambda: patch_claims(f"{HERE}:claim_next", jobs, commit=True, session="db.session"),
        "not a parameter",
    ),
    "no session": (
        lambda: patch_claims(f"{HERE}:Store.get_due_jobs", jobs),
        "none of its parameters is called session",
    ),
    "no such column": (
        lambda: patch_claims(f"{HERE}:claim_next", jobs, commit=True, where={"colour": 1}),
        "colour is not a column",
    ),
    "no such order": (
        lambda: patch_claims(f"{HERE}:claim_next", jobs, commit=True, order_by="-colour"),
        "colour is not a column",
    ),
    "no such value": (
        lambda: patch_claims(f"{HERE}:claim_next", jobs, commit=True, values={"colour": 1}),
        "colour is not a column",
    ),
    "no limit": (
        lambda: patch_claims(f"{HERE}:claim_next", jobs, commit=True, limit=0),
        "at least 1",
    ),
    "no lease column": (
        lambda: patch_claims(f"{HERE}:claim_next", jobs, commit=True, lease=5),
        "a token column",
    ),
    "no worker column": (
        lambda: patch_claims(f"{HERE}:claim_next", jobs, commit=True, worker="w1"),
        "needs a worker column",
    ),
    "no lease": (
        lambda: patch_claims(f"{HERE}:claim_next", leased, commit=True, lease=[5]),
        "a timedelta",
    ),
    "an asynchronous adapter": (
        lambda: patch_claims(
            f"{HERE}:claim_next", jobs, commit=True, returns=legacy.claim_next_async
        ),
        "is a coroutine",
    ),
    "a generator's reads": (lambda: lock_reads(f"{__name__}:everybody", Event), "is a generator"),
    "a lease for nothing": (
        lambda: claim_reads(f"{HERE}:send_all", jobs, lease=5),
        "no lease and no token column",
    ),
    "a final state alone": (
        lambda: claim_reads(f"{HERE}:relay", JobTable(Event, state="published")),
        "its only state is the final one.*at_most_once=True",
    ),
}


def everybody() -> Iterator[int]:
    """Yield one number."""
    yield 1


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_at_once(name: str) -> None:
    """The error comes when the patch is made, says what was found, and nothing is patched."""
    make, message = REFUSED[name]
    before = everything()
    with pytest.raises(PatchError, match=message):
        make()
    assert everything() == before


def test_what_is_no_table_or_session_is_refused_by_name() -> None:
    """Neither a table nor a session can be anything else, and the error says what it is."""
    with pytest.raises(ClaimError, match="5 is not a table"):
        lock_reads(f"{HERE}:claim_next", 5)
    with (
        patch_claims(f"{HERE}:claim_next", jobs, commit=True),
        pytest.raises(ClaimError, match="None is not a bind"),
    ):
        legacy.claim_next(None)  # type: ignore[arg-type]


def test_patching_twice_is_refused() -> None:
    """A second patch of a function, by whatever name, is refused until the first is undone."""
    with patch_claims(f"{HERE}:claim_next", jobs, commit=True):
        for again in (f"{HERE}:claim_next", "tests.patch.early:renamed", legacy.claim_next):
            with pytest.raises(PatchError, match="patched already"):
                patch_claims(again, jobs, commit=True)
    with SHAPES["C"].patch(), pytest.raises(PatchError, match="patched already"):
        patch_claims(Repository.claim_batch, jobs, session="self.session")
    patch_claims(f"{HERE}:claim_next", jobs, commit=True).undo()


def test_undoing_under_other_wrappers() -> None:
    """Wrappers put around a patch, by wrapt or by hand, stay when it goes."""
    original = [legacy.claim_next]
    patch = patch_claims(f"{HERE}:claim_next", jobs, commit=True)
    seen: list[str] = []

    def note(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
        seen.append("wrapt")
        return wrapped(*args, **kwargs)

    outer = wrapt.wrap_function_wrapper(legacy, "claim_next", note)
    inner = legacy.claim_next

    @functools.wraps(inner)
    def by_hand(*args: Any, **kwargs: Any) -> Any:
        seen.append("by hand")
        return inner(*args, **kwargs)

    legacy.claim_next = by_hand  # type: ignore[assignment]
    patch.undo()
    engine = sa.create_engine("sqlite://")
    fill(engine, Job, 1)
    with Session(engine) as session:
        assert legacy.claim_next(session) is not None
    engine.dispose()
    assert (seen, patch.calls) == (["by hand", "wrapt"], 0)
    assert outer.__wrapped__ is original[0]
    legacy.claim_next = original[0]
    assert early.claim_next is original[0]


def test_a_wrapper_taken_off_before_the_patch() -> None:
    """A patched function that another tool puts back after the undo calls the original."""
    original = [legacy.claim_next]
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch = patch_claims(f"{HERE}:claim_next", jobs, commit=True)
        patched = [legacy.claim_next]
        monkeypatch.setattr(legacy, "claim_next", lambda session: session)
        patch.undo()
    assert legacy.claim_next is patched[0]
    engine = sa.create_engine("sqlite://")
    fill(engine, Job, 1)
    with Session(engine) as session:
        # It came back after all, and is a mere passage to the original.
        assert legacy.claim_next(session) is not None
    engine.dispose()
    assert patch.calls == 0
    legacy.claim_next = original[0]


@pytest.fixture
def instrumented() -> Iterator[None]:
    """OpenTelemetry's instrumentation of SQLAlchemy."""
    SQLAlchemyInstrumentor().instrument()
    yield
    SQLAlchemyInstrumentor().uninstrument()
    gc.collect()


@pytest.mark.usefixtures("instrumented")
@pytest.mark.parametrize("shape", ["A", "E", "F", "G"])
def test_under_opentelemetry(database: Database, shape: str) -> None:
    """Engines that are traced by OpenTelemetry are none the worse for it."""
    engine = sa.create_engine(database.url)
    model = SHAPES[shape].model
    fill(engine, model, 3)
    calls: dict[str, Callable[[Session], Any]] = {
        "A": legacy.claim_next,
        "E": legacy.relay,
        "F": legacy.send_all,
        "G": legacy.pop,
    }
    with Session(engine) as session, SHAPES[shape].patch() as patch:
        name = calls[shape].__name__
        getattr(legacy, name)(session)
        assert (patch.calls, patch.claimed) == (1, {"A": 1, "G": 1}.get(shape, 3))
    engine.dispose()


def test_a_module_that_is_yet_to_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its function is patched when it is imported; undone before, it is left alone."""
    for name in ("late_one", "late_two", "late_three"):
        source = "def claim(session):\n    return 'original'\n"
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PatchError, match="there is no module 'late_on'"):
        patch_claims("late_on:claim", jobs)
    patch_claims("late_three:clam", jobs)
    with pytest.raises(PatchError, match="late_three has no 'clam'; did you mean 'claim'"):
        import_module("late_three")
    one, two = (
        patch_claims("late_one:claim", jobs, commit=True),
        patch_claims("late_two:claim", jobs, commit=True),
    )
    assert "not yet imported" in repr(one)
    two.undo()
    import late_one  # type: ignore[import-not-found]  # noqa: PLC0415
    import late_two  # type: ignore[import-not-found]  # noqa: PLC0415

    assert one.is_installed
    assert late_two.claim(None) == "original"
    assert late_one.claim.patch is one
    one.undo()
    assert late_one.claim(None) == "original"


def test_a_late_module_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mismatch that only the import of the module reveals is an error of the import."""
    source = "def claim(db_session):\n    return 'original'\n"
    (tmp_path / "late_three.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    patch_claims("late_three:claim", jobs, session="session")
    with pytest.raises(PatchError, match="session='session' is not a parameter"):
        import late_three  # type: ignore[import-not-found]  # noqa: F401, PLC0415


def test_a_patched_function_looks_like_the_original() -> None:
    """Its name, signature, documentation and kind are the original's."""
    before = inspect.signature(legacy.claim_next)
    with patch_claims(f"{HERE}:claim_next", jobs, commit=True), SHAPES["A async"].patch():
        assert inspect.signature(legacy.claim_next) == before
        assert legacy.claim_next.__name__ == "claim_next"
        assert legacy.claim_next.__doc__ == "Mark the next job and commit."
        assert inspect.iscoroutinefunction(legacy.claim_next_async)


def test_the_decorator() -> None:
    """`claims` does the same to code that may be edited, and keeps the count."""
    engine = sa.create_engine("sqlite://")
    fill(engine, Job, 3)

    class Own:
        @claims(jobs, limit="count", returns="id", commit=True)
        def take(self, session: Session, count: int = 2) -> list[int]:
            raise NotImplementedError

        @staticmethod
        @claims(jobs, commit=True)
        def next(session: Session) -> Job | None:
            raise NotImplementedError

    with Session(engine) as session:
        assert Own().take(session) == [1, 2]
        found = Own.next(session)
        assert found is not None
        assert found.id == 3
        patch: Any = Own.take.patch  # type: ignore[attr-defined]
        assert isinstance(patch, Patch)
        assert (patch.calls, patch.claimed) == (1, 2)
    engine.dispose()


def test_a_call_that_does_not_fit_is_the_original_s_to_refuse() -> None:
    """Too many arguments raise what they always raised."""
    with SHAPES["A"].patch(), pytest.raises(TypeError, match=r"claim_next\(\) takes 1 positional"):
        legacy.claim_next(None, 1)  # type: ignore[call-arg, arg-type]


def test_mails_are_leased_by_the_lease_alone() -> None:
    """A table whose only state is the final one is claimed by its lease, not by that state."""
    engine = sa.create_engine("sqlite://")
    fill(engine, legacy.Mail, 2)
    sent: list[Any] = []

    @event.listens_for(engine, "before_cursor_execute")
    def _(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    with Session(engine) as session, claim_reads(f"{HERE}:send_all", mails):
        legacy.send_all(session)
    # An UPDATE of no row takes SQLite's write lock first.
    updates = (statement for statement in sent if statement.startswith("UPDATE"))
    claim = next(statement for statement in updates if "WHERE 0 = 1" not in statement)
    assert "SET lease_until" in claim
    assert "SET sent" not in claim
    engine.dispose()
