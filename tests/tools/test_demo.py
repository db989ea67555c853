import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from atomic_claim.cli import file_workload, workload
from atomic_claim.testing.database import CommandError, complaint, masked, parse_url
from atomic_claim.testing.results import Call, Counted
from tests.commands import PASSWORD, REPOSITORY, VARIABLES, Command, Ended, address, real
from tests.databases import Database
from tests.guides import GUIDES
from tests.racers import hanging
from tests.waiting import wait_until

pytestmark = pytest.mark.once

typer = pytest.importorskip("typer", reason="the extra 'cli' is not installed")

# The loop shows itself at its first step already, so once would do almost always.
ATTEMPTS = 3
# Two workers are enough to run a job twice, and each has to import what it needs.
FEW = ("--jobs", "400", "--workers", "2")
PATIENCE = 60
SVG = "{http://www.w3.org/2000/svg}"


@contextmanager
def begun(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run the command during the block, in its own process group, as a shell does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "atomic_claim", *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def tables(database: Database) -> list[str]:
    """Return the names of the tables in the database."""
    return sa.inspect(database.engine()).get_table_names()


def table_in_use(database: Database) -> str:
    """Wait until a job of the demo's table is taken, and return the table's name."""
    engine = database.engine(poolclass=NullPool)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for name in sa.inspect(engine).get_table_names():
            with engine.connect() as connection:
                if connection.scalar(sa.text(f"SELECT count(*) FROM {name} WHERE processing")):
                    return name
        time.sleep(0.05)
    raise TimeoutError("the demo has not begun")


def half(*jobs: int, count: int | None = None, name: str = "legacy loop") -> Counted:
    """Build the result of a loop in which two workers ran these jobs in turn."""
    calls = [Call(n % 2, n / 10, n / 10 + 0.05, ((str(job),),)) for n, job in enumerate(jobs)]
    keys = frozenset((str(number + 1),) for number in range(count or len(set(jobs))))
    return Counted(name=name, workers=2, keys=keys, limit=1, calls=calls)


def test_counts_come_from_the_record_of_the_work() -> None:
    """Jobs run more than once, runs beyond the first and jobs never run are told apart."""
    found = half(1, 2, 2, 2, 3, 3, count=5)
    assert found.duplicated == {("2",), ("3",)}
    assert found.claimed - len(found.times) == 3
    assert found.lost == 2
    assert found.claims_per_second == pytest.approx(6 / 0.55)
    assert not found.exact
    assert not half(1, 2, count=3).exact
    assert half(1, 2, 3).exact


def test_the_claim_is_exact_and_the_legacy_loop_is_not(database: Database) -> None:
    """On each database the claim has every job run once; the loop has some run again."""
    url = address(database)
    for _ in range(ATTEMPTS):
        ended = real("demo", *FEW, "--url", url, "--json")
        assert ended.code == 0, ended
        assert ended.err == ""
        figures = json.loads(ended.out)
        assert figures["exact"] is True
        claimed = figures["halves"]["claim_jobs"]
        assert (
            claimed["jobs"] == claimed["times_claimed"] == sum(claimed["claimed_by_worker"]) == 400
        )
        assert claimed["duplicates"] == claimed["extra_runs"] == claimed["lost"] == 0
        legacy = figures["halves"]["legacy_loop"]
        assert legacy["lost"] == 0
        assert legacy["times_claimed"] == 400 + legacy["extra_runs"]
        assert tables(database) == []
        if legacy["duplicates"]:
            break
    else:
        pytest.fail(f"the legacy loop had no duplicates in {ATTEMPTS} runs")


def test_files_are_compared_alike(tmp_path: Path) -> None:
    """With --files both loops work on a folder, no database is asked, and nothing is left."""
    variables = {"TMPDIR": str(tmp_path), "DATABASE_URL": "sqlite:///no/such/file.db"}
    for _ in range(ATTEMPTS):
        ended = real("demo", "--files", *FEW, "--json", env=os.environ | variables)
        assert ended.code == 0, ended
        assert ended.err == ""
        figures = json.loads(ended.out)
        assert (figures["database"], figures["url"]) == ("Directory queue", None)
        assert figures["exact"] is True
        claimed = figures["halves"]["claim_files"]
        assert (
            claimed["jobs"] == claimed["times_claimed"] == sum(claimed["claimed_by_worker"]) == 400
        )
        assert claimed["duplicates"] == claimed["extra_runs"] == claimed["lost"] == 0
        assert list(tmp_path.iterdir()) == []
        if figures["halves"]["legacy_loop"]["duplicates"]:
            break
    else:
        pytest.fail(f"the legacy loop had no duplicates in {ATTEMPTS} runs")


def claimed(lines: Sequence[str]) -> list[str]:
    """Return what the table says of the claim, the second of its columns of figures."""
    names = ("jobs", "times claimed", "duplicates", "extra runs", "lost")
    rows = [next(line for line in lines if line.startswith(f" {name}  ")) for name in names]
    return [row.split()[-1] for row in rows]


def test_the_table_of_files(command: Command) -> None:
    """The table is that of the other demo, in 80 columns."""
    ended = command("demo", "--files", "--jobs", "50", "--workers", "2")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0].startswith("Directory queue: 50 jobs, 2 workers, limit 10")
    assert " ".join(lines).split().count("claim_files") == 1
    assert claimed(lines) == ["50", "50", "0", "0", "0"]
    assert lines[-1].strip() == "claim_files: every job ran exactly once."
    assert all(len(line) <= 80 for line in lines)


def test_files_are_in_no_database(command: Command) -> None:
    """A URL beside --files is refused where it was typed."""
    said = command("demo", "--files", "--url", f"postgresql://ann:{PASSWORD}@h/jobs").refused()
    assert "--files needs no database" in said


def test_exit_code_1_if_files_are_run_twice(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half of claims with duplicates fails this demo, too."""
    monkeypatch.setitem(file_workload.FILE_HALVES, "claim_files", file_workload.legacy_file_loop)
    codes = (command("demo", "--files", *FEW, "--json").code for _ in range(ATTEMPTS))
    assert any(code == 1 for code in codes)


def test_a_worker_that_cannot_claim_files(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A system error in a worker ends the demo with one line, and no files are left behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(file_workload.FILE_HALVES, "legacy loop", refused_loop)
    said = command("demo", "--files", "--jobs", "50").refused()
    assert "No such file or directory" in said
    assert list(tmp_path.iterdir()) == []


def refused_loop(waiting: Path, *_: Any) -> None:
    """Read a file that does not exist."""
    (waiting / "nowhere" / "at all").read_text(encoding="utf-8")


def test_a_folder_is_removed_on_ctrl_c(tmp_path: Path) -> None:
    """Ctrl-C in the middle leaves no files behind."""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with begun("demo", "--files", "--jobs", "8000", env=environment) as process:
        wait_until(lambda: list(tmp_path.glob("*/processing/*")), seconds=PATIENCE)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert Ended(process.returncode, out, err) == Ended(130, "", "atomic-claim: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def words(text: str) -> list[str]:
    """Return the words of a report, with its figures replaced."""
    return re.sub(r"[\d,.]*\d", "0", text).split()


def test_the_default_is_a_temporary_file(tmp_path: Path) -> None:
    """Without a URL the README's table is printed, figures aside, and nothing is left."""
    ended = real("demo", env=os.environ | {"TMPDIR": str(tmp_path)})
    assert ended.code == 0, ended
    assert ended.err == ""
    lines = ended.out.splitlines()
    assert lines[0].startswith(f"SQLite {sqlite3.sqlite_version}: 1,000 jobs, 4 workers, limit 10")
    assert lines[2].split() == ["legacy", "loop", "claim_jobs"]
    assert claimed(lines) == ["1,000", "1,000", "0", "0", "0"]
    assert lines[-1].strip() == "claim_jobs: every job ran exactly once."
    assert all(len(line) <= 80 for line in lines)
    assert list(tmp_path.iterdir()) == []
    (shown,) = re.findall(r"atomic-claim demo\n(.*?)```", GUIDES["README"], re.DOTALL)
    assert words(ended.out) == words(shown)


def test_progress_goes_to_the_terminal(tmp_path: Path) -> None:
    """On a terminal both halves have a bar, which is not on standard output."""
    pty = pytest.importorskip("pty", reason="no terminals to try on this system")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "atomic_claim", "demo", "--jobs", "50", "--workers", "2", "--json"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "TMPDIR": str(tmp_path)},
    )
    os.close(theirs)
    shown = ""
    # At the other side's end Linux says EIO.
    with suppress(OSError), os.fdopen(ours, "rb", buffering=0) as terminal:
        while chunk := terminal.read(10_000):
            shown += chunk.decode(errors="replace")
    out, _ = process.communicate(timeout=PATIENCE)
    assert json.loads(out)["exact"] is True
    assert "legacy loop" in shown
    assert "claim_jobs" in shown
    assert "100%" in shown


def test_the_table_is_dropped_on_ctrl_c(database: Database) -> None:
    """Ctrl-C, which a terminal sends to the workers too, leaves nothing behind."""
    with begun("demo", "--jobs", "8000", "--workers", "2", "--url", address(database)) as process:
        assert table_in_use(database).startswith("atomic_claim_demo_")
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert Ended(process.returncode, out, err) == Ended(130, "", "atomic-claim: interrupted\n")
    assert tables(database) == []


@pytest.mark.databases("sqlite")
def test_the_table_is_dropped_when_killed(database: Database) -> None:
    """The signal by which processes are asked to end leaves nothing behind either."""
    with begun("demo", "--jobs", "8000", "--workers", "2", "--url", address(database)) as process:
        table_in_use(database)
        process.terminate()
        out, err = process.communicate(timeout=PATIENCE)
    assert Ended(process.returncode, out, err) == Ended(143, "", "")
    assert tables(database) == []


def test_the_table_is_dropped_after_an_error(database: Database) -> None:
    """A worker that fails ends the demo by one line, and the table goes all the same."""
    with begun("demo", "--jobs", "8000", "--workers", "2", "--url", address(database)) as process:
        name = table_in_use(database)
        waits = {"connect_args": {"timeout": PATIENCE}} if database.name == "sqlite" else {}
        with database.engine(**waits).begin() as connection:
            connection.execute(sa.text(f"ALTER TABLE {name} RENAME COLUMN subject TO object"))
        out, err = process.communicate(timeout=PATIENCE)
    assert "subject" in Ended(process.returncode, out, err).refused()
    assert tables(database) == []


def losing(engine: sa.Engine, limit: int) -> Sequence[Any]:
    """Claim jobs, and lose one of each claim."""
    return workload.claim(engine, limit)[1:]


def test_exit_code_1_if_jobs_are_lost(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim half that loses jobs fails the demo, and the table says how many."""
    monkeypatch.setitem(workload.HALVES, "claim_jobs", losing)
    ended = command("demo", "--jobs", "30", "--workers", "1")
    assert ended.code == 1
    assert "claim_jobs: 0 of 30 jobs ran more than once, 3 never." in ended.out


def test_exit_code_1_if_jobs_are_run_twice(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim half with duplicates fails the demo."""
    monkeypatch.setitem(workload.HALVES, "claim_jobs", workload.find_then_update)
    assert any(command("demo", *FEW, "--json").code == 1 for _ in range(ATTEMPTS))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "cannot be read"),
        (f"garbage:{PASSWORD}", "cannot be read"),
        (f"postgresql://ann:{PASSWORD}@127.0.0.1:port/jobs", "cannot be read"),
        (f"postgresql://ann:p@{PASSWORD}@127.0.0.1/jobs", "one '@' too many"),
        (f"nonsuch://ann:{PASSWORD}@127.0.0.1/jobs", "'nonsuch'"),
        (f"postgresql+nonsuch://ann:{PASSWORD}@127.0.0.1/jobs", "'postgresql+nonsuch'"),
        (f"mssql+pyodbc://ann:{PASSWORD}@127.0.0.1/jobs", "no backend claims rows on 'mssql'"),
        (f"mssql://ann:{PASSWORD}@127.0.0.1/jobs", "no backend claims rows on 'mssql'"),
        (f"oracle://ann:{PASSWORD}@127.0.0.1/jobs", "no backend claims rows on 'oracle'"),
        (f"postgresql+psycopg://ann:{PASSWORD}@127.0.0.1:1/jobs", "cannot connect to"),
        (f"postgresql://ann@127.0.0.1:1/jobs?password={PASSWORD}", "cannot connect to"),
        (f"postgresql+psycopg://ann:{PASSWORD}@127.0.0.1:1/jobs?nonsuch={PASSWORD}", "nonsuch"),
        (f"mysql+pymysql://ann:{PASSWORD}@127.0.0.1:1/jobs", "cannot connect to"),
        (f"mariadb+pymysql://ann:{PASSWORD}@127.0.0.1:1/jobs", "cannot connect to"),
        (f"mysql+pymysql://ann:{PASSWORD}@127.0.0.1:1/jobs?ssl-mode=x", "ssl-mode"),
        (f"mysql+pymysql://ann:{PASSWORD}@127.0.0.1/jobs?connect_timeout=soon", "soon"),
        (f"mysql+pymysql://ann:{PASSWORD}@127.0.0.1/", "names no database"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:///no/such/file.db", "no SQLite database 'no/such/file.db'"),
    ],
)
def test_wrong_url(command: Command, url: str, said: str) -> None:
    """A URL that leads nowhere gets one line that says so, and shows no password."""
    assert said in command("demo", "--url", url).refused()


@pytest.mark.databases("postgresql", "mysql", "mariadb")
def test_absent_database(database: Database, command: Command) -> None:
    """A database that the server does not have is named."""
    url = database.url.set(database="nonsuch", password=PASSWORD)
    if database.name != "postgresql":
        # Their root has no password, and is asked for it before the database.
        url = url.set(password=None)
    said = command("demo", "--url", url.render_as_string(hide_password=False)).refused()
    assert "nonsuch" in said


@contextmanager
def powerless_user(database: Database) -> Iterator[sa.URL]:
    """Yield the URL of a user who has no privilege but to read."""
    name = f"reader_of_{database.url.database}"[:32]
    user, make, take = name, "ROLE", "REVOKE CREATE ON SCHEMA public FROM PUBLIC"
    password = f"LOGIN PASSWORD '{PASSWORD}'"
    if database.name != "postgresql":
        user, make = f"{name}@'%'", "USER"
        take = f"GRANT SELECT ON {database.url.database}.* TO {user}"
        password = f"IDENTIFIED BY '{PASSWORD}'"
    with database.engine(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.exec_driver_sql(f"CREATE {make} {user} {password}".replace("%", "%%"))
        try:
            connection.exec_driver_sql(take.replace("%", "%%"))
            yield database.url.set(username=name, password=PASSWORD)
        finally:
            connection.exec_driver_sql(f"DROP {make} {user}".replace("%", "%%"))


@pytest.mark.databases("postgresql", "mysql", "mariadb")
def test_no_right_to_create_a_table(database: Database, command: Command) -> None:
    """A user who may not create tables is told so by one line."""
    with powerless_user(database) as url:
        said = command("demo", "--url", url.render_as_string(hide_password=False)).refused()
        assert "cannot make atomic_claim_demo_" in said
        assert "denied" in said
    assert tables(database) == []


@pytest.mark.databases("mysql", "mariadb")
def test_a_table_that_cannot_be_filled(database: Database, command: Command) -> None:
    """The demo makes its rows itself, and names no option that it does not have."""
    with powerless_user(database) as url:
        with database.engine(isolation_level="AUTOCOMMIT").connect() as connection:
            rights = f"GRANT CREATE, INDEX, DROP ON `{url.database}`.* TO {url.username}@`%%`"
            connection.exec_driver_sql(rights)
        said = command("demo", "--url", url.render_as_string(hide_password=False)).refused()
    assert "cannot fill atomic_claim_demo_" in said
    assert "factory" not in said


@pytest.mark.databases("mysql", "mariadb")
def test_wrong_password(database: Database, command: Command) -> None:
    """A server that refuses the password is quoted without it."""
    with powerless_user(database) as url:
        wrong = url.set(password=f"not {PASSWORD}")
        said = command("demo", "--url", wrong.render_as_string(hide_password=False)).refused()
    assert "Access denied" in said


def test_file_that_is_no_database(tmp_path: Path, command: Command) -> None:
    """SQLite's own complaint is passed on."""
    path = tmp_path / "text.db"
    path.write_text("no database " * 100, encoding="utf-8")
    assert "not a database" in command("demo", "--url", f"sqlite:///{path}").refused()


def test_too_old_database(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version without the statement that the claim needs is refused before anything runs."""
    monkeypatch.setattr(sqlite3.dbapi2, "sqlite_version_info", (3, 34, 1))
    assert "SQLite 3.34.1 cannot claim" in command("demo").refused()


def test_missing_driver(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that is not installed is named together with the extra that brings one."""
    monkeypatch.setitem(sys.modules, "pg8000", None)
    said = command("demo", "--url", f"postgresql+pg8000://ann:{PASSWORD}@127.0.0.1/jobs").refused()
    assert "atomic-claim[postgresql]" in said
    for name in ("psycopg", "psycopg2"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "atomic-claim[postgresql]" in command("demo", "--url", "postgresql://h/jobs").refused()
    for name in ("MySQLdb", "pymysql"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "atomic-claim[mysql]" in command("demo", "--url", "mariadb://h/jobs").refused()


@pytest.mark.parametrize(
    ("given", "absent", "drivers"),
    [
        ("mysql://h/jobs", "MySQLdb", {"mysql+pymysql"}),
        ("mariadb://h/jobs", "MySQLdb", {"mariadb+pymysql"}),
        ("mysql+asyncmy://h/jobs", "MySQLdb", {"mysql+pymysql"}),
        ("postgresql://h/jobs", "psycopg2", {"postgresql", "postgresql+psycopg"}),
        ("postgres://h/jobs", "psycopg2", {"postgresql", "postgresql+psycopg"}),
        ("postgresql+asyncpg://h/jobs", "psycopg2", {"postgresql", "postgresql+psycopg"}),
        ("postgresql+psycopg://h/jobs", "psycopg2", {"postgresql+psycopg"}),
        ("sqlite:////jobs.db", "nothing", {"sqlite"}),
        ("sqlite+aiosqlite:////jobs.db", "nothing", {"sqlite"}),
    ],
)
def test_driver_that_is_there(
    given: str, absent: str, drivers: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """URLs as they are pasted lead to a driver that is installed, and stay otherwise the same."""
    monkeypatch.setitem(sys.modules, absent, None)
    found = parse_url(given)
    assert found.drivername in drivers
    assert (found.host, found.database) == (sa.make_url(given).host, sa.make_url(given).database)


@pytest.mark.parametrize("password", ["s3cret", "p@ss/w:rd%", "it's", "a"])
def test_no_message_has_a_password(password: str) -> None:
    """Whatever form a driver's text gives a URL's secrets, they are masked."""
    url = sa.URL.create("postgresql", "ann", password, "h", database="jobs")
    url = url.update_query_dict({"sslpassword": "Tuna-9", "application_name": "banana"})
    text = f"{url.render_as_string(hide_password=False)} password={password} {password!r}"
    said = str(complaint("no", OperationalError("SELECT 1", {}, ValueError(text)), url))
    assert not re.search(rf"(?<!\w){re.escape(password)}(?!\w)", said)
    assert "Tuna-9" not in said
    assert "banana" in said
    assert masked(url) == "postgresql://ann:***@h/jobs"


def test_urls_come_from_the_environment(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """ATOMIC_CLAIM_URL goes before DATABASE_URL, and --url before both."""
    for name in reversed(VARIABLES):
        monkeypatch.setenv(name, f"sqlite:///no/{name}.db")
        assert name in command("demo").refused()
    assert "no/option.db" in command("demo", "--url", "sqlite:///no/option.db").refused()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("picture.pdf", "ends in .svg or .png"),
        ("no/such/folder/picture.svg", "cannot be written"),
        ("folder.svg", "cannot be written"),
    ],
)
def test_picture_that_cannot_be_written(
    name: str, said: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That a picture cannot be written is said before any work is done."""
    monkeypatch.setattr("atomic_claim.cli.demo.run_half", None)
    (tmp_path / "folder.svg").mkdir()
    assert said in command("demo", "--svg", str(tmp_path / name)).refused()


def test_picture_without_matplotlib(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra that draws is named."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = command("demo", "--svg", str(tmp_path / "picture.svg")).refused()
    assert "atomic-claim[plot]" in said


@pytest.mark.parametrize("option", ["--workers", "--jobs", "--limit"])
@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_wrong_number(command: Command, option: str, value: str) -> None:
    """Numbers below one, and what is no number, are usage errors."""
    ended = command("demo", option, value)
    assert ended.code == 2
    assert option in ended.err
    assert "Traceback" not in ended.err


def bars(picture: Path, name: str) -> int:
    """How many bars the picture has in a group."""
    group = ET.parse(picture).find(f".//{SVG}g[@id='{name}']")  # noqa: S314 - our own picture
    return 0 if group is None else len(group.findall(f".//{SVG}path"))


def test_picture_marks_what_was_run_more_than_once(tmp_path: Path) -> None:
    """Each run is a bar, those of a job that was run again are a group of their own, in red."""
    picture = pytest.importorskip("atomic_claim.cli.picture", reason="no matplotlib")
    halves = [half(1, 2, 2, 2, 3), half(1, 2, 3, name="claim_jobs")]
    for path in (tmp_path / "one.svg", tmp_path / "two.svg", tmp_path / "three.png"):
        picture.draw(path, "SQLite 3.40.1", halves)
    one = tmp_path / "one.svg"
    assert bars(one, "legacy-loop-once") == 2
    assert bars(one, "legacy-loop-more-than-once") == 3
    assert bars(one, "claim_jobs-once") == 3
    assert bars(one, "claim_jobs-more-than-once") == 0
    assert picture.MORE_THAN_ONCE in one.read_text(encoding="utf-8")
    assert one.read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert (tmp_path / "three.png").read_bytes().startswith(b"\x89PNG")


def test_picture_of_a_demo(tmp_path: Path) -> None:
    """The picture has as many bars as the figures say."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "demo.svg"
    ended = real("demo", "--jobs", "100", "--workers", "2", "--json", "--svg", str(path))
    assert ended.code == 0, ended
    halves = json.loads(ended.out)["halves"]
    for name, found in halves.items():
        kinds = ("once", "more-than-once")
        drawn = [bars(path, f"{name.replace('legacy_loop', 'legacy-loop')}-{k}") for k in kinds]
        assert sum(drawn) == found["times_claimed"]
        assert drawn[1] == found["extra_runs"] + found["duplicates"]


def test_a_worker_that_hangs(
    database: Database, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the demo with one line, and leaves no table."""
    monkeypatch.setitem(workload.HALVES, "legacy loop", hanging)
    monkeypatch.setattr(workload, "TIMEOUT", 5.0)
    ended = command("demo", "--url", address(database), "--jobs", "4", "--workers", "2")
    assert "the race was not over after 9 seconds: " in ended.refused()
    assert "--timeout" not in ended.err
    assert sa.inspect(database.engine()).get_table_names() == []


@pytest.mark.parametrize("name", ["", "demo", "run", "race", "doctor", "jobs", "sql", "migration"])
def test_help_fits_and_shows_no_type_of_flags(command: Command, name: str) -> None:
    """No flag has a value, --help included, and no line is wider than the terminal."""
    ended = command(*[name] * bool(name), "--help")
    assert (ended.code, ended.err) == (0, "")
    assert "<bool>" not in ended.out
    assert "--help" in ended.out
    assert all(len(line) <= 80 for line in ended.out.splitlines())


def test_version(command: Command) -> None:
    """--version is an option of the program."""
    ended = command("--version")
    assert ended.code == 0
    assert ended.out.startswith("atomic-claim ")


@pytest.mark.parametrize("absent", ["typer", "rich"])
def test_without_the_extra(absent: str) -> None:
    """Where Typer or Rich is missing, one line names the extra."""
    script = (
        f"import sys; sys.modules[{absent!r}] = None; import atomic_claim.__main__ as m; m.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    said = Ended(done.returncode, done.stdout, done.stderr).refused()
    assert "pip install 'atomic-claim[cli]'" in said


def test_workers_need_no_extra() -> None:
    """Neither the core nor what worker processes import loads Typer or Rich."""
    script = (
        "import sys, atomic_claim.cli.workload, atomic_claim.cli.file_workload\n"
        "print(sorted({'typer', 'rich', 'click', 'matplotlib'}.intersection(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_url_without_a_driver_error_is_a_command_error() -> None:
    """An unusable URL raises the error that commands print as one line."""
    with pytest.raises(CommandError, match="no 'nonsuch'"):
        parse_url("nonsuch://h/jobs")
