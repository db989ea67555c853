"""A program is patched from a file, its source as it is."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atomic_claim import PatchError
from atomic_claim.patch.file import find_file, load_patches, read_file
from tests.patch import legacy

pytestmark = pytest.mark.once

APP = """
import multiprocessing
import subprocess
import sys

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

engine = sa.create_engine("sqlite:///" + __file__ + ".db")


class Base(DeclarativeBase):
    pass


class Job(Base):
    __tablename__ = "jobs"
    id: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str] = mapped_column(sa.String(10), default="new")
    priority: Mapped[int] = mapped_column(default=0)


class Queue:
    def __init__(self, session):
        self.session = session

    def take(self, count=2):
        jobs = self.session.query(Job).filter(Job.status == "new").limit(count).all()
        for job in jobs:
            job.status = "busy"
        self.session.commit()
        return jobs


def work(name):
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all(Job(priority=number) for number in range(3))
        session.commit()
        found = Queue(session).take()
        print(name, type(found).__name__, [job.priority for job in found], flush=True)


def main():
    work("main")
    if "child" in sys.argv:
        subprocess.run([sys.executable, __file__], check=True)
    if "spawn" in sys.argv:
        process = multiprocessing.get_context("spawn").Process(target=work, args=["spawned"])
        process.start()
        process.join()


if __name__ == "__main__":
    main()
"""
PATCHES = """
[project]
name = "app"

[tool.atomic_claim.patches."legacy_app:Queue.take"]
session = "self.session"
limit = "count"
commit = true
table = { table = "legacy_app:Job", state = "status", free = "new", claimed = "busy", \
done = "done", order = ["-priority"] }
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """Create a legacy application whose only change is the patches in its pyproject.toml."""
    (tmp_path / "legacy_app.py").write_text(APP, encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(PATCHES, encoding="utf-8")
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    source = "from legacy_app import work\nwork('package')\n"
    (package / "__main__.py").write_text(source, encoding="utf-8")
    return tmp_path


def run(app: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command by `atomic-claim run` in the application's folder."""
    script = Path(sys.executable).with_name("atomic-claim")
    environment = {name: value for name, value in os.environ.items() if "PYTHONPATH" not in name}
    return subprocess.run(
        [script, "run", "--", *command],
        cwd=app,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_script_and_its_children(app: Path) -> None:
    """The functions of the main module itself are patched, in the processes it starts, too."""
    done = run(app, sys.executable, "legacy_app.py", "child", "spawn")
    assert done.stderr == ""
    assert done.stdout.split("\n") == [
        "main list [2, 1]",
        "main list [2, 1]",
        "spawned list [2, 1]",
        "",
    ]


@pytest.mark.parametrize("module", ["package"])
def test_a_module(app: Path, module: str) -> None:
    """`python -m` runs a module or a package, which may import what is patched."""
    done = run(app, sys.executable, "-m", module)
    assert done.stderr == ""
    assert done.stdout.endswith(" list [2, 1]\n")


def test_a_console_script(app: Path) -> None:
    """The script of an installed package, found on the PATH, runs with the patches too."""
    script = app / "bin" / "worker"
    script.parent.mkdir()
    source = f"#!{sys.executable}\nfrom legacy_app import work\nwork('script')\n"
    script.write_text(source, encoding="utf-8")
    script.chmod(0o755)
    path = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
    done = run(app, "worker", PATH=path, PYTHONPATH=str(app))
    assert (done.stdout, done.stderr) == ("script list [2, 1]\n", "")


FLASK = """
import flask

app = flask.Flask("console")


@app.cli.command("take")
def take():
    from legacy_app import work

    work("flask")
"""
GUNICORN = """
import os
import signal


def post_worker_init(worker):
    try:
        from legacy_app import work

        work("gunicorn")
    finally:
        os.kill(os.getppid(), signal.SIGTERM)
"""
CELERY = """
import os
import signal

from celery import Celery
from celery.signals import worker_ready
from legacy_app import work

folder = os.path.dirname(os.path.abspath(__file__))
app = Celery("console", broker="filesystem://")
app.conf.worker_redirect_stdouts = False
app.conf.broker_transport_options = {
    "data_folder_in": folder, "data_folder_out": folder, "control_folder": folder + "/control",
}


@app.task
def take():
    try:
        work("celery")
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


@worker_ready.connect
def send(**_):
    take.delay()
"""
SCRIPTS: dict[str, tuple[str, str, list[str]]] = {
    "flask": (FLASK, "console.py", ["--app", "console", "take"]),
    "gunicorn": (
        GUNICORN,
        "gunicorn.conf.py",
        ["--workers", "1", "--bind", "unix:console.socket", "console:app"],
    ),
    "celery": (
        CELERY,
        "console.py",
        ["--app", "console", "worker", "--pool", "solo", "--without-gossip", "--without-mingle"],
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_console_scripts_of_servers(app: Path, name: str) -> None:
    """They find modules of the working directory, and so do the patches, in their workers too."""
    pytest.importorskip(name, reason=f"{name} is not installed")
    source, file, arguments = SCRIPTS[name]
    (app / "console.py").write_text(FLASK, encoding="utf-8")
    (app / file).write_text(source, encoding="utf-8")
    (app / "control").mkdir()
    script = Path(sys.executable).with_name(name)
    done = run(app, str(script), *arguments, HOME=str(app))
    assert f"{name} list [2, 1]\n" in done.stdout, done.stderr
    assert "atomic-claim:" not in done.stderr


def test_another_sitecustomize_is_kept(app: Path) -> None:
    """The one that was there before runs as it did, and the exit code is the program's."""
    other = app / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text("print('theirs')", encoding="utf-8")
    program = "import sitecustomize, sys; print(sitecustomize.__file__); sys.exit(3)"
    done = run(app, sys.executable, "-c", program, PYTHONPATH=str(other))
    # Once by the command's own Python, and once by the program's.
    assert done.stdout == f"theirs\ntheirs\n{other / 'sitecustomize.py'}\n"
    assert done.returncode == 3


WRONG: dict[str, tuple[Callable[[str], str], str]] = {
    "no such function": (
        lambda text: text.replace("Queue.take", "Queue.tak"),
        "__main__:Queue.tak does not exist: Queue has no 'tak'; did you mean 'take'?",
    ),
    "no such module": (
        lambda text: text.replace('"legacy_app:Queue', '"legacy_ap:Queue'),
        "there is no module 'legacy_ap' on this Python's path",
    ),
    "no such parameter": (
        lambda text: text.replace('limit = "count"', 'limit = "size"'),
        "limit='size' is not a parameter of __main__:Queue.take",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_one_line(app: Path, name: str) -> None:
    """An invalid patch is reported in one line; the program does not run, the exit code is 2."""
    change, message = WRONG[name]
    (app / "pyproject.toml").write_text(change(PATCHES), encoding="utf-8")
    done = run(app, sys.executable, "legacy_app.py")
    assert done.stderr.startswith("atomic-claim: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert (done.returncode, done.stdout) == (2, "")


def test_a_function_never_defined(app: Path) -> None:
    """A name that no line of the main module has defined by its end is an error then."""
    wrong = PATCHES.replace("legacy_app:Queue.take", "legacy_app:wrok")
    (app / "pyproject.toml").write_text(wrong, encoding="utf-8")
    done = run(app, sys.executable, "legacy_app.py")
    assert "__main__:wrok does not exist" in done.stderr
    assert "did you mean 'work'?" in done.stderr
    assert done.returncode == 2


def test_an_unknown_command(app: Path) -> None:
    """A command that is not there is an error of one line, too."""
    done = run(app, "no-such-command")
    assert done.stderr == "atomic-claim: there is no command 'no-such-command' on the PATH\n"
    assert done.returncode == 2


def test_all_kinds_in_a_file_of_its_own(tmp_path: Path) -> None:
    """A file other than pyproject.toml may say just [patches]; `by` names the kind."""
    path = tmp_path / "patches.toml"
    path.write_text(
        """
        [patches."tests.patch.legacy:Channel._get"]
        table = { table = "tests.patch.legacy:Job", state = "state", free = "waiting", \
claimed = { state = "running" }, done = "done" }
        session = "self.session"
        empty = "tests.patch.legacy:Empty"
        returns = "id"
        when = "queue"
        commit = true

        [patches."tests.patch.legacy:relay"]
        by = "lock_reads"
        table = "tests.patch.legacy:Event"

        [patches."tests.patch.legacy:send_all"]
        by = "claim_reads"
        table = { table = "tests.patch.legacy:Mail", state = "sent", lease = "lease_until", \
token = "claim_token", naive_times = "utc" }
        lease = 30
        """,
        encoding="utf-8",
    )
    before = [legacy.relay, legacy.send_all]
    patches = load_patches(path)
    assert [patch.is_installed for patch in patches] == [True] * 3
    for patch in patches:
        patch.undo()
    assert [legacy.relay, legacy.send_all] == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tool.other]", "has no"),
        ("[", "is not TOML"),
        ("[patches]", "holds no patch"),
        ("[patches.'m:f']\nlimits = 3", "has 'limits'; expected"),
        ("[patches]\n'm:f' = 3", "expected a table of options"),
        ("[patches.'m.f']\ntable = 'm:T'", "is not a target"),
        ("[patches.'m:f']\nby = 'magic'", "expected one of patch_claims, lock_reads, claim_reads"),
        ("[patches.'m:f']\nlimit = 3", "table is None; expected 'package.models:Job'"),
        ("[patches.'m:f']\ntable = 'a b'", "expected 'package.models:Job', or a path"),
        ("[patches.'m:f']\ntable = { table = 'm:T', colour = 1 }", "has 'colour'"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, text: str, message: str) -> None:
    """A file is refused before anything is patched or imported."""
    path = tmp_path / "patches.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PatchError, match=message):
        read_file(path)
    with pytest.raises(PatchError, match="cannot be read"):
        read_file(tmp_path / "nowhere.toml")


def test_the_nearest_file(app: Path) -> None:
    """A pyproject.toml without patches is passed by on the way up."""
    (app / "package" / "pyproject.toml").write_text("[project]\n", encoding="utf-8")
    assert find_file(app / "package") == app / "pyproject.toml"
    found: Any = find_file(Path("/"))
    assert found is None


def test_a_patch_that_fails_takes_the_others_back(tmp_path: Path) -> None:
    """Either all patches of a file are made, or none."""
    path = tmp_path / "patches.toml"
    path.write_text(
        """
        [patches."tests.patch.legacy:relay"]
        by = "lock_reads"
        table = "tests.patch.legacy:Event"

        [patches."tests.patch.legacy:nothing"]
        by = "lock_reads"
        table = "tests.patch.legacy:Event"
        """,
        encoding="utf-8",
    )
    before = legacy.relay
    with pytest.raises(PatchError, match="has no 'nothing'"):
        load_patches(path)
    assert legacy.relay is before
