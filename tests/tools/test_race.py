import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from atomic_claim.testing import Race, RaceError, race
from atomic_claim.testing.arguments import Offer, planned
from atomic_claim.testing.result_keys import Reader
from atomic_claim.testing.results import Call
from tests import racers
from tests.commands import PASSWORD, REPOSITORY, Command, Ended, address
from tests.databases import Database
from tests.racers import Base, Letter, Repository, jobs
from tests.waiting import wait_until

pytestmark = pytest.mark.once

WORKERS = 4
LIMIT = 10
JOBS = "tests.racers:jobs"


def small(target: str, **options: Any) -> Race:
    """Run a race on the plain job table, as small as possible."""
    return race(f"tests.racers:{target}", **{"table": JOBS, "jobs": 60, "workers": 3, **options})


def tables(database: Database) -> list[str]:
    """Return the names of the tables in the database."""
    return sa.inspect(database.engine()).get_table_names()


def test_the_legacy_function_races_for_sure_and_the_claim_does_not(database: Database) -> None:
    """The first jobs go to every worker, without luck; by claim_jobs each goes to one.

    The rows satisfy all that the table asks for, and nothing is left.
    """
    options: Any = {"table": "tests.racers:Letter", "url": address(database), "jobs": 200}
    found = race("tests.racers:legacy", workers=WORKERS, limit=LIMIT, **options)
    assert sum(times == WORKERS for times in found.times.values()) >= LIMIT
    assert found.duplicates >= LIMIT
    assert (found.jobs, found.lost, found.over_limit, found.stuck) == (200, 0, 0, 0)
    assert not found.exact
    assert found.blocked is not None
    cured = race("atomic_claim:claim_jobs", workers=WORKERS, limit=LIMIT, **options)
    assert cured.exact
    assert (cured.jobs, cured.claimed, cured.duplicates) == (200, 200, 0)
    assert 0 < cured.p50 <= cured.p99
    assert cured.met > 0
    assert cured.seconds > 0
    assert tables(database) == []


@pytest.mark.databases("postgresql", "mysql", "mariadb")
def test_time_spent_waiting_for_locks(database: Database) -> None:
    """Workers wait for each other's locks, and the server says for how long."""
    found = small("waiting_for_locks", url=address(database), jobs=20)
    assert found.duplicates == 0
    assert found.blocked is not None
    assert found.blocked > 0.02


def test_time_spent_waiting_for_the_file() -> None:
    """On SQLite the workers themselves tell."""
    found = small("find_and_mark")
    assert found.duplicates >= LIMIT
    assert found.blocked is not None
    assert 0 < found.blocked < found.workers * found.seconds


def test_a_late_worker_is_waited_for() -> None:
    """Before the first write: else the others would be through before it finds anything."""
    found = small("late", jobs=20, workers=2)
    assert found.times.most_common(LIMIT)[-1][1] == 2


def test_a_lock_that_no_database_knows_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meeting does not wait without end for workers that wait outside of the database."""
    monkeypatch.setenv("RACERS_FOLDER", str(tmp_path))
    assert small("with_file_lock", jobs=20, workers=2).exact


def test_too_many_are_found() -> None:
    """A call that hands out more than the limit is counted, all else being well."""
    found = small("greedy", limit=5)
    assert found.over_limit == 10
    assert (found.duplicates, found.lost) == (0, 0)
    assert not found.exact


def test_lost_jobs_are_found() -> None:
    """A function that claims more than it returns loses jobs."""
    found = small("forgetful")
    assert (found.duplicates, found.lost, found.over_limit) == (0, 30, 0)
    assert found.limit is None
    assert not found.exact


def test_jobs_of_killed_workers() -> None:
    """Without a lease they stay stuck; with one they come back."""
    stuck = small("cured", kill=True, workers=4, limit=5, patience=0.1)
    assert (stuck.killed, stuck.stuck, stuck.lost, stuck.duplicates) == (2, 10, 0, 0)
    assert not stuck.exact
    leased = small("with_lease", kill=True, workers=2, limit=5, patience=30)
    assert (leased.killed, len(leased.held), leased.stuck) == (1, 5, 0)


def test_an_existing_table(database: Database) -> None:
    """It is refused, unless told otherwise; then what was there is there afterwards."""
    engine = database.engine()
    jobs.metadata.create_all(engine)
    with engine.begin() as connection:
        row = {"created_at": sa.func.now(), "processing": True}
        connection.execute(jobs.insert().values(row))
    with pytest.raises(RaceError, match=r"holds a table 'jobs' already.*use_existing_table=True"):
        small("cured", url=address(database))
    found = small("cured", url=database.url, use_existing_table=True, jobs=20)
    assert (found.jobs, found.exact) == (20, True)
    with engine.connect() as connection:
        assert connection.scalars(sa.select(jobs.c.id)).all() == [1]


def test_a_check_needs_a_factory() -> None:
    """A constraint that cannot be interpreted is named in the error, and a factory helps."""
    options: Any = {"table": "tests.racers:checked", "jobs": 12, "workers": 2}
    with pytest.raises(RaceError, match=r"has the CHECK size BETWEEN 3 AND 9.*factory="):
        race("tests.racers:claim_checked", **options)
    for factory in ("tests.racers:sized", racers.all_sized):
        found = race(racers.claim_checked, factory=factory, **options)
        assert (found.claimed, found.exact) == (12, True)
    with pytest.raises(RaceError, match=r"factory= failed: ZeroDivisionError at .*test_race"):
        race("tests.racers:claim_checked", factory=lambda _: 1 // 0, **options)
    with pytest.raises(RaceError, match="factory= gave"):
        race("tests.racers:claim_checked", factory=lambda _: 3, **options)


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("one_by_one", {}),
        ("of_its_own", {}),
        ("Repository.take", {}),
        ("strange", {"call": "tests.racers:for_the_north"}),
        ("by_coroutine", {}),
        ("by_generator", {}),
        ("by_connection", {}),
    ],
)
def test_targets_of_all_sorts(target: str, options: dict[str, Any]) -> None:
    """A sessionmaker, an engine of its own, a method, and an adapter for what cannot be told."""
    found = small(target, jobs=20, workers=2, **options)
    assert (found.claimed, found.exact) == (20, True)


def test_an_asynchronous_function_races(database: Database, command: Command) -> None:
    """By its table's name in the database, whose other rows stay as they are."""
    engine = database.engine()
    jobs.create(engine)
    words = ("--url", address(database), "--table", "jobs", "--jobs", "20", "--workers", "2")
    options = (*words, "--limit", "5", "--use-existing-table")
    ended = command("race", "tests.racers:legacy_by_coroutine", *options, "--json")
    assert (ended.code, ended.err) == (1, "")
    assert json.loads(ended.out)["duplicates"] >= 5
    assert command("race", "tests.racers:by_coroutine", *options).code == 0
    assert "--use-existing-table" in command("race", "tests.racers:cured", *words).refused()
    assert tables(database) == ["jobs"]


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("nonsuch:claim", (), "there is no module 'nonsuch'"),
        ("tests.racers", (), "expected MODULE:NAME"),
        ("tests.racers:nonsuch", (), "has no 'nonsuch'"),
        ("tests.racers:Letter.id", (), "expected a function"),
        ("tests.racers:cured", ("--table", "jobs"), "is a name in a database: give --url"),
        ("tests.racers:cured", ("--table", "tests.racers:only_elsewhere"), "with --url"),
        ("tests.racers:strange", (), "takes tenant: str"),
        ("tests.racers:failing", (), "nonsuch"),
        ("tests.racers:broken", (), "handed out nothing: TypeError at"),
        ("tests.racers:leaving", (), "ended before its time, with exit code 7"),
        ("tests.racers:blind", (), "handed out none of 20 jobs"),
        ("tests.racers:mute", (), "no primary key (id) can be found"),
        ("tests.racers:mistaken", (), "'job "),
        ("tests.racers:cured", ("--table", "tests.racers:nonsuch"), "has no 'nonsuch'"),
        ("tests.racers:cured", ("--table", "tests.racers:cured"), "expected a Table"),
        ("tests.racers:cured", ("--factory", "nonsuch"), "expected MODULE:NAME"),
        ("tests.racers:cured", ("--call", "tests.racers:nonsuch"), "has no 'nonsuch'"),
        ("tests.racers:cured", ("--patches", "nonsuch.toml"), "cannot be read"),
        ("tests.racers:cured", ("--kill", "--workers", "1"), "two or more"),
        ("tests.racers:cured", ("--svg", "race.pdf"), "ends in .svg or .png"),
        ("tests.racers:cured", ("--url", "sqlite://"), "in memory"),
        ("tests.racers:cured", ("--url", f"mysql://ann:{PASSWORD}@127.0.0.1:1/j"), "cannot conn"),
        ("tests.racers:blocked", ("--timeout", "4"), "2 of 2 workers are in a call"),
    ],
)
def test_what_cannot_be_raced(
    command: Command, target: str, options: Sequence[str], said: str
) -> None:
    """One line says what is wrong, and the exit code is 2."""
    table = () if "--table" in options else ("--table", JOBS)
    workers = () if "--workers" in options else ("--workers", "2")
    ended = command("race", target, *table, "--jobs", "20", *workers, *options)
    assert said in ended.refused()


def test_another_database_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function with an engine of its own for another database is stopped before it asks that."""
    other = sa.create_engine(f"sqlite:///{tmp_path}/other.db")
    jobs.metadata.create_all(other)
    with other.begin() as connection:
        row = {"id": 7, "created_at": sa.func.now(), "processing": False}
        connection.execute(jobs.insert().values(row))
    monkeypatch.setenv("RACERS_ELSEWHERE", f"sqlite:///{tmp_path}/other.db")
    with pytest.raises(RaceError, match=r"works on sqlite:.*other\.db.*DATABASE_URL"):
        small("elsewhere")
    with other.connect() as connection:
        assert connection.scalars(sa.select(jobs.c.processing)).all() == [False]


@pytest.mark.parametrize("target", ["endless", "never_ending"])
def test_a_target_without_end(target: str, command: Command) -> None:
    """It is stopped when it is clear that it has none, and fails the check."""
    ended = command("race", f"tests.racers:{target}", "--table", JOBS, "--jobs", "20", "--json")
    assert (ended.code, ended.err) == (1, "")
    figures = json.loads(ended.out)
    assert figures["endless"] is True
    assert figures["duplicates"] > 0


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize(("target", "said"), [("failing", "nonsuch"), ("telling", "***@")])
def test_no_password_is_printed(
    database: Database, command: Command, target: str, said: str
) -> None:
    """A target that fails is quoted without the URL's password."""
    url = database.url.set(password=PASSWORD)
    ended = command(
        "race", f"tests.racers:{target}", "--table", JOBS, "--jobs", "5", "--workers", "1",
        "--url", url.render_as_string(hide_password=False),
    )  # fmt: skip
    assert said in ended.refused()
    assert tables(database) == []


def test_two_targets_side_by_side(tmp_path: Path, command: Command) -> None:
    """Both are in the table, in the figures and in the picture; one that races fails the check."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "race.svg"
    arguments = ("race", "tests.racers:find_and_mark", "--table", JOBS, "--jobs", "40")
    compared = ("--compare", "tests.racers:cured", "--workers", "2")
    ended = command(*arguments, *compared, "--svg", str(picture), "--json")
    assert (ended.code, ended.err) == (1, "")
    figures = json.loads(ended.out)
    assert figures["duplicates"] >= LIMIT
    assert figures["compare"]["target"] == "tests.racers:cured"
    assert figures["compare"]["exact"] is True
    assert figures["url"] is None
    drawn = picture.read_text(encoding="utf-8")
    for name in ("find_and_mark-more-than-once", "cured-once"):
        assert f'id="tests.racers:{name}"' in drawn


def test_the_table_is_printed(command: Command) -> None:
    """With one target, and with killed workers, in 80 columns."""
    arguments = ("race", "tests.racers:cured", "--table", JOBS, "--jobs", "20", "--limit", "3")
    ended = command(*arguments, "--workers", "2", "--kill", "--patience", "0")
    assert (ended.code, ended.err) == (1, "")
    lines = ended.out.splitlines()
    assert re.fullmatch(r"SQLite \S+: 20 jobs, 2 workers, limit 3", lines[0])
    rows = {line[:24].strip(): line[24:].strip() for line in lines if line.startswith(" ")}
    assert rows["stuck"] == "3"
    assert rows["duplicates"] == rows["over the limit"] == rows["lost"] == "0"
    assert "tests.racers:cured: 3 are stuck" in lines[-1]


def gone(pid: int) -> bool:
    """Return True if the process no longer exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # A process whose parent has not noticed its end yet is none either.
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"


HANGING_DEMO = """
from atomic_claim.__main__ import main
from atomic_claim.cli.workload import HALVES
from tests.racers import hanging
HALVES["legacy loop"] = hanging
main()
"""


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "atomic_claim", "race", "tests.racers:blocked", "--table", JOBS],
        ["-c", HANGING_DEMO, "demo", "--workers", str(WORKERS)],
    ],
    ids=["race", "demo"],
)
def test_workers_die_with_their_parent(words: Sequence[str], tmp_path: Path) -> None:
    """No worker is left behind when the command is killed, even by SIGKILL."""
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=REPOSITORY,
        env=os.environ | {"RACERS_FOLDER": str(tmp_path)},
        # A pipe would be open for as long as an orphan is.
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: len(list(tmp_path.iterdir())) == WORKERS, seconds=60)
        process.send_signal(signal.SIGKILL)
        pids = {int(pid) for path in tmp_path.iterdir() for pid in path.name.split("-")}
        assert len(pids) > WORKERS
        wait_until(lambda: all(map(gone, pids - {process.pid})), seconds=20)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_command_cleans_up_on_ctrl_c(database: Database, tmp_path: Path) -> None:
    """Ctrl-C leaves neither a table nor a worker, although one holds a lock."""
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "atomic_claim", "race", "tests.racers:blocked"),
            *("--table", JOBS, "--workers", "2", "--url", address(database)),
        ],
        cwd=REPOSITORY,
        env=os.environ | {"RACERS_FOLDER": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2, seconds=60)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert Ended(process.returncode, out, err) == Ended(130, "", "atomic-claim: interrupted\n")
    assert tables(database) == []


class TestWhatItIsGiven:
    """Arguments are found by names and annotations."""

    @pytest.mark.parametrize(
        "parameters",
        [
            "session", "db", "s: Session", "x: 'sqlalchemy.orm.Session | None'", "db_session, /",
            "engine", "bind: Engine", "x: sa.Engine", "conn", "c: 'Connection'",
            "session_factory", "Session: 'sessionmaker[Session]'", "x: 'scoped_session[Session]'",
            "session, limit", "session, *, batch_size=5", "session, worker_id, table",
            "session, tenant='north', *args, **options",
        ],
    )  # fmt: skip
    def test_known(self, parameters: str) -> None:
        """Each of these can be called."""
        names: Any = {"sa": sa, "Session": Session, "Engine": sa.Engine}
        exec(f"def claim({parameters}): return locals()", names)  # noqa: S102 - made above
        plan = planned(names["claim"], "claim")
        engine = sa.create_engine("sqlite://")
        with Offer(engine, 3, "w1", jobs).opened() as give:
            given = plan.call(give)
        kinds = {"session": Session, "db": Session, "s": Session, "engine": sa.Engine}
        assert all(isinstance(given[name], kinds[name]) for name in kinds if name in given)
        assert given.get("limit", given.get("batch_size", 3)) == 3
        assert given.get("table", jobs) is jobs
        assert plan.takes_limit is bool({"limit", "batch_size"} & set(given))

    def test_a_method_gets_its_object(self) -> None:
        """An object of the class is made, in the way in which functions are called."""
        plan = planned(Repository.take, "take", Repository)
        assert plan.takes_limit
        engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
        jobs.metadata.create_all(engine)
        with Offer(engine, 3, "w1", jobs).opened() as give:
            assert list(plan.call(give)) == []

    @pytest.mark.parametrize("parameters", ["x", "session, tenant"])
    def test_unknown(self, parameters: str) -> None:
        """An argument that cannot be inferred is an error that mentions `call=`."""
        names: Any = {}
        exec(f"def claim({parameters}): pass", names)  # noqa: S102 - made above
        with pytest.raises(RaceError, match="call="):
            planned(names["claim"], "claim")


class TestWhatItReturns:
    """Jobs are found in whatever is returned."""

    @pytest.mark.parametrize(
        ("found", "keys"),
        [
            (None, []),
            ([], []),
            (False, []),
            (7, [7]),
            ("7", [7]),
            ([7, 8], [7, 8]),
            ({7}, [7]),
            ((7, 8), [7, 8]),
            ({"id": 7, "note": "x"}, [7]),
            ([{"id": 7}, {"id": 8}], [7, 8]),
            (SimpleNamespace(id=7), [7]),
            (iter([7, 7]), [7, 7]),
            ((number for number in range(10**9)), list(range(50))),
        ],
    )
    def test_of_a_table(self, found: Any, keys: list[int]) -> None:
        """Keys, dictionaries, objects, one or several; an endless iterator is cut."""
        assert Reader(jobs, 50).keys(found) == tuple((str(key),) for key in keys)

    def test_rows_and_entities(self) -> None:
        """Keys are read from rows and from attached, expired or detached entities."""
        engine = sa.create_engine("sqlite://")
        Base.metadata.create_all(engine)
        reader = Reader(Letter, 50)
        with Session(engine) as session, session.begin():
            session.execute(sa.insert(Letter), [letter(1), letter(2)])
        with Session(engine) as session:
            letters = session.scalars(sa.select(Letter)).all()
            assert reader.keys(letters) == (("1",), ("2",))
            session.expire_all()
            assert reader.keys(letters[0]) == (("1",),)
            rows = session.execute(sa.select(Letter, Letter.code)).all()
            assert reader.keys(rows) == (("1",), ("2",))
            columns = session.execute(sa.select(Letter.code, Letter.id))
            assert reader.keys(columns) == (("1",), ("2",))
            assert reader.keys(session.execute(sa.select(Letter.id)).first()) == (("1",),)
            assert reader.keys(session.execute(sa.select(Letter.__table__)).mappings().first()) == (
                ("1",),
            )
        assert reader.keys(letters[1]) == (("2",),)

    def test_pairs(self) -> None:
        """Of a key of two columns a tuple is one job, and a list of them several."""
        pairs = sa.Table(
            "pairs",
            sa.MetaData(),
            sa.Column("tenant", sa.String(5), primary_key=True),
            sa.Column("id", sa.Integer, primary_key=True),
        )
        reader = Reader(pairs, 50)
        assert reader.keys(("a", 1)) == (("a", "1"),)
        assert reader.keys([("a", 1), ("b", 2)]) == (("a", "1"), ("b", "2"))
        with pytest.raises(RaceError, match=r"tenant, id"):
            reader.keys([1, 2])

    @pytest.mark.parametrize("found", [True, [object()], [None], {"key": 7}, 7.5])
    def test_no_job(self, found: Any) -> None:
        """A result that is no job is quoted in the error."""
        with pytest.raises(RaceError, match=re.escape("no primary key (id)")):
            Reader(jobs, 50).keys(found)


def letter(number: int) -> dict[str, Any]:
    """Return the values of a letter."""
    return {
        "id": number, "account_id": number, "state": racers.State.WAITING, "kind": "parcel",
        "number": number, "code": str(number), "ref": racers.uuid.uuid4(), "body": {}, "price": 1,
        "order": "x", "created_at": racers.datetime(2024, 1, 1), "run_at": None,
    }  # fmt: skip


def test_figures_come_from_the_record() -> None:
    """Every count is made of the calls alone, and the wait for each other is left out."""
    keys = frozenset((str(number),) for number in range(6))
    calls = [
        Call(0, 0.0, 1.0, (("0",), ("1",)), waited=0.5),
        Call(1, 0.0, 1.5, (("1",), ("2",), ("2",)), waited=0.5),
        Call(0, 1.0, 1.2, (("7",),)),
    ]
    found = Race(
        name="m:f", target="m:f", database="SQLite", url=None, workers=2, keys=keys, limit=2,
        calls=calls, met=0.5, killed=1, held=frozenset([("4",)]),
    )  # fmt: skip
    assert (found.claimed, found.duplicates, found.lost, found.stuck) == (5, 2, 2, 1)
    assert found.over_limit == 1
    assert found.seconds == pytest.approx(1.0)
    assert found.claims_per_second == pytest.approx(5.0)
    assert (found.p50, found.p99) == (pytest.approx(0.5), pytest.approx(1.0))
    assert "duplicates=2" in repr(found)


def test_the_helper_needs_no_extra() -> None:
    """Neither a test suite nor a worker loads what the commands need."""
    script = (
        "import sys, atomic_claim.testing.workers\n"
        "print(sorted({'typer', 'rich', 'click', 'matplotlib'}.intersection(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_what_no_other_process_can_import() -> None:
    """A function within a function is refused by the helper."""

    def inner(session: Session) -> None: ...

    with pytest.raises(RaceError, match="other processes cannot import"):
        race(inner, table=JOBS)
