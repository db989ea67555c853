"""Every form in which an option of a patch can be given."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from atomic_claim import PatchError, patch_claims
from atomic_claim.patch.calls import Options, bound_call
from atomic_claim.patch.targets import loaded
from tests.jobs import START
from tests.patch import legacy
from tests.patch.legacy import Job
from tests.patch.patched import jobs, leased
from tests.patch.test_shapes import fill

HERE = __name__
SAID: dict[str, Any] = {"commit": True, "ignore": ("session", "limit", "sort", "where", "more")}


def find(
    session: Any = None, limit: int = 2, *, sort: Any = None, where: Any = None, **more: Any
) -> Any:
    """Return the arguments of the call, as the original of a legacy function."""
    assert session is not None
    return ("original", limit, sort, where, more)


@pytest.fixture
def session() -> Iterator[Session]:
    """Yield a session with six jobs, three of them in another queue."""
    engine = sa.create_engine("sqlite://")
    fill(engine, Job, 6)
    with Session(engine) as session:
        session.execute(sa.update(Job).where(Job.id % 2 == 0).values(queue="even"))
        session.commit()
        yield session
    engine.dispose()


GIVEN: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "left out": ({}, {}, 1),
    "a constant of one": ({"limit": 1}, {}, 1),
    "a constant": ({"limit": 3}, {}, [1, 2, 3]),
    "a parameter's default": ({"limit": "limit"}, {}, [1, 2]),
    "a parameter": ({"limit": "limit"}, {"limit": 4}, [1, 2, 3, 4]),
    "a parameter of one": ({"limit": "limit"}, {"limit": 1}, [1]),
    "nothing wanted": ({"limit": "limit"}, {"limit": 0}, []),
    "all": ({"limit": None}, {}, [1, 2, 3, 4, 5, 6]),
    "a callable": ({"limit": lambda call: call["limit"] + 1}, {"limit": 2}, [1, 2, 3]),
    "a path into keywords": ({"limit": "more.size"}, {"size": 3}, [1, 2, 3]),
    "a dictionary": ({"limit": None, "where": {"queue": "even"}}, {}, [2, 4, 6]),
    "a dictionary of a parameter": (
        {"limit": None, "where": "where"},
        {"where": {"queue": "even", "id": [2, 3, 4]}},
        [2, 4],
    ),
    "operators": (
        {"limit": None, "where": "where"},
        {
            "where": {
                "or": [{"id": {"less_than": 2}}, {"and": [{"id": {"greater_than_equal": 5}}]}],
                "owner": {"exists": False},
                "queue": {"not_equals": "even"},
            }
        },
        [1, 5],
    ),
    "an expression": ({"limit": None, "where": Job.id > 4}, {}, [5, 6]),
    "no filter this time": ({"limit": 2, "where": "where"}, {}, [1, 2]),
    "descending": ({"limit": 2, "order_by": "-place"}, {}, [6, 5]),
    "a sort of a parameter": (
        {"limit": 2, "order_by": "sort"},
        {"sort": "queue,-place"},
        [5, 3],
    ),
    "a sort expression": ({"limit": 2, "order_by": Job.place.desc()}, {}, [6, 5]),
    "no sort this time": ({"limit": 2, "order_by": "sort"}, {}, [1, 2]),
    "an attribute": ({"limit": 2, "returns": "id"}, {}, [1, 2]),
    "an attribute of one": ({"returns": "queue"}, {}, "default"),
    "an adapter": ({"limit": 2, "returns": lambda found: [job.id for job in found]}, {}, [1, 2]),
    "an adapter with the call": (
        {"limit": "limit", "returns": lambda found, call: (len(found), call.limit)},
        {"limit": 9},
        (6, 9),
    ),
    "a call that is none of ours": (
        {"when": "not where"},
        {"where": 5},
        ("original", 2, None, 5, {}),
    ),
    "a call that is ours": ({"when": "not where"}, {}, 1),
    "decided by a callable": (
        {"when": lambda call: "id" not in call["more"]},
        {"id": 3},
        ("original", 2, None, None, {"id": 3}),
    ),
}


@pytest.mark.parametrize("name", GIVEN)
def test_options(session: Session, name: str) -> None:
    """An option's value is that of the call, whatever the form."""
    options, arguments, expected = GIVEN[name]
    with patch_claims(f"{HERE}:find", jobs, **SAID | options):
        found = find(session, **arguments)
    if isinstance(found, Job):
        found = found.id
    elif isinstance(found, list):
        found = [each if isinstance(each, int) else each.id for each in found]
    assert found == expected


def test_values_and_worker(session: Session) -> None:
    """Data of the call is written with the claim; what repeats the mark is left out."""
    data = {"state": "running", "owner": "w1"}
    with patch_claims(f"{HERE}:find", jobs, **SAID, values=lambda call: call["more"]["data"]):
        job = find(session, data=data)
    assert (job.state, job.owner) == ("running", "w1")


@pytest.mark.parametrize("lease", [timedelta(seconds=30), 30, "more.seconds"])
def test_a_lease(session: Session, lease: Any) -> None:
    """A lease is a timedelta or seconds, and its token is written."""
    with patch_claims(f"{HERE}:find", leased, **SAID, lease=lease):
        job = find(session, seconds=30)
    assert job.lease_until is not None
    assert len(job.claim_token) == 32


@pytest.mark.parametrize(
    ("empty", "expected"),
    [(None, None), ("nothing", "nothing"), (lambda call: call.limit, 2), (0, 0)],
)
def test_nothing_found(session: Session, empty: Any, expected: Any) -> None:
    """The result of a call without a job is a given value, or computed from the call."""
    session.execute(sa.delete(Job))
    with patch_claims(f"{HERE}:find", jobs, **SAID, empty=empty):
        assert find(session) == expected


@pytest.mark.parametrize("empty", [legacy.Empty, legacy.Empty("gone")])
def test_nothing_found_raises(session: Session, empty: Any) -> None:
    """An exception, or a class of it, is raised."""
    session.execute(sa.delete(Job))
    with patch_claims(f"{HERE}:find", jobs, **SAID, empty=empty), pytest.raises(legacy.Empty):
        find(session)


def test_sessions(session: Session) -> None:
    """Whatever makes a session will do: a maker, a registry, a context manager, an engine."""
    engine: Any = session.get_bind()
    maker = sessionmaker(engine)
    registry = scoped_session(maker)

    @contextmanager
    def scope() -> Iterator[Session]:
        with maker.begin() as opened:
            yield opened

    for given in (maker, registry, scope, engine, lambda call: call["more"]["db"]):
        with patch_claims(f"{HERE}:find", jobs, **SAID, session=given, returns="id"):
            assert find(db=maker) in range(1, 7)
    registry.remove()
    assert session.scalar(sa.select(sa.func.count()).where(Job.state == "running")) == 5


def test_an_asynchronous_session_in_a_function(session: Session) -> None:
    """A function that is no coroutine cannot wait for one."""
    from sqlalchemy.ext.asyncio import AsyncSession  # noqa: PLC0415

    with (
        patch_claims(f"{HERE}:find", jobs, **SAID, session=AsyncSession()),
        pytest.raises(PatchError, match="only a coroutine can use"),
    ):
        find(session)


def test_a_path_that_leads_nowhere(session: Session) -> None:
    """It is an error of the call that names the path."""
    with (
        patch_claims(f"{HERE}:find", jobs, **SAID, limit="sort.size"),
        pytest.raises(PatchError, match=r"limit='sort.size' of .* leads nowhere"),
    ):
        find(session, sort=3)


def numbers(session: Session) -> Iterator[Job]:
    """Yield all jobs, as a legacy generator."""
    yield from session.query(Job)


def test_a_generator_stays_one(session: Session) -> None:
    """A function that yields its jobs still does."""
    with patch_claims(f"{HERE}:numbers", jobs, commit=True, limit=2, returns="id"):
        found = numbers(session)
        assert inspect.isgenerator(found)
        assert list(found) == [1, 2]


def test_the_state_of_another_table_holds(session: Session) -> None:
    """A dead worker's row is claimed only if what another table says of it holds."""
    accounts = sa.table("accounts", sa.column("job_id"), sa.column("state"))
    session.execute(sa.text("CREATE TABLE accounts (job_id INTEGER, state TEXT)"))
    found = [{"job_id": 1, "state": "closed"}, {"job_id": 2, "state": "open"}]
    session.execute(sa.insert(accounts), found)
    session.execute(sa.update(Job).values(state="running", lease_until=START))
    session.commit()
    where = [
        Job.state == "waiting",
        sa.exists().where(accounts.c.job_id == Job.id, accounts.c.state == "open"),
    ]
    with patch_claims(find, leased, where=where, lease=60, returns="id", **SAID, limit=None):
        assert find(session) == [2]


def test_what_a_string_means() -> None:
    """A parameter's name is read from the call; another string is refused or a constant."""
    signature = inspect.signature(find)
    options = Options(loaded(find))
    call = bound_call(signature, None, ("s",), {"sort": "x"})
    assert call is not None
    assert options.reading("worker", "sort").read(call) == "x"
    constant = options.reading("worker", "bob", lambda _: True)
    assert constant.read(call) == "bob"
    with pytest.raises(PatchError, match=f"is not a parameter of {HERE}:find"):
        options.reading("limit", "bob")
    with pytest.raises(AttributeError, match="has no argument 'colour'"):
        _ = call.colour
