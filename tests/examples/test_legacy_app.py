"""The story that the guide tells of `examples/legacy_app` is what its commands print."""

import os
import re
import runpy
import shlex
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from tests.commands import REPOSITORY
from tests.guides import GUIDES

pytestmark = pytest.mark.once

pytest.importorskip("typer", reason="the extra 'cli' is not installed")

APP = REPOSITORY / "examples" / "legacy_app"
STORY = GUIDES["legacy_app"]
SHOWN = re.findall(
    r"^\$ atomic-claim ((?:race|doctor|run) [^\n]*)\n(.*?)^```", STORY, re.DOTALL | re.MULTILINE
)


def words(text: str) -> str:
    """Return a report with its figures replaced and without its layout."""
    return " ".join(re.sub(r"[\d,.]*\d", "0", text).split())


def agrees(found: str, shown: str) -> bool:
    """Check a report against the guide's, where `...` stands for any lines."""
    parts = re.split(r"^\.\.\.$", shown, flags=re.MULTILINE)
    pattern = ".*".join(re.escape(words(part)) for part in parts)
    return re.fullmatch(pattern, words(found), re.DOTALL) is not None


def run(app: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a Python module in the application's folder."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=app,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """Copy the application to a folder where it may leave files behind."""
    return Path(shutil.copytree(APP, tmp_path / "app"))


@pytest.mark.parametrize(("command", "shown"), SHOWN, ids=[command for command, _ in SHOWN])
def test_the_guide_shows_what_is_printed(command: str, shown: str, app: Path) -> None:
    """Each command prints what the guide shows, and fails as it should."""
    run(app, "legacy_app")
    done = run(app, "atomic_claim", *shlex.split(command))
    assert done.stderr == ""
    assert agrees(done.stdout, shown), done.stdout
    is_legacy = command.startswith(("race", "doctor")) and "--patches" not in command
    assert done.returncode == int(is_legacy)


def test_the_story_has_its_parts() -> None:
    """There is a race before and after the cure, then the program and the check of its database."""
    assert [command.split()[0] for command, _ in SHOWN] == ["race", "race", "run", "doctor"]


def test_the_doctor_of_the_story(app: Path) -> None:
    """It prints nothing once the SQL that it prints has been run."""
    (arguments,) = (shlex.split(command) for command, _ in SHOWN if command.startswith("doctor"))
    run(app, "legacy_app")
    cures = [
        line
        for line in run(app, "atomic_claim", *arguments).stdout.splitlines()
        if line.endswith(";")
    ]
    with closing(sqlite3.connect(app / "legacy_app.db")) as connection:
        for cure in cures:
            connection.execute(cure)
    done = run(app, "atomic_claim", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_its_own_tests_pass(app: Path) -> None:
    """They do as it was written, and with its function patched, whose proof is among them."""
    legacy = run(app, "pytest", "-q", "tests/test_worker.py")
    assert legacy.returncode == 0, legacy
    patched = run(app, "atomic_claim", "run", "--", sys.executable, "-m", "pytest", "-q")
    assert patched.returncode == 0, patched


def test_the_program_is_patched(app: Path) -> None:
    """By its patches it sends every mail once."""
    models = runpy.run_path(str(app / "legacy_app" / "models.py"))
    engine = sa.create_engine(f"sqlite:///{app}/legacy_app.db")
    models["Base"].metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        ann = models["Customer"](email="ann@example.org")
        session.add_all(models["Job"](customer=ann, subject=word) for word in ("One", "Two"))
    engine.dispose()
    done = run(app, "atomic_claim", "run", "--", sys.executable, "-m", "legacy_app")
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "'One' to ann@example.org",
        "'Two' to ann@example.org",
        "2 sent",
    ]
