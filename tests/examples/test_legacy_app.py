"""The story that the guide tells of `examples/legacy_app` is what its commands print."""

import re
import runpy
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tomllib
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
    r"^\$ atomic-claim ((?:race|migration) [^\n]*)\n(.*?)^```", STORY, re.DOTALL | re.MULTILINE
)


def words(text: str) -> list[str]:
    """Return the words of a report, with its figures replaced."""
    return re.sub(r"[\d,.]*\d", "0", text).split()


def run(app: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a Python module in the application's folder."""
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=app, capture_output=True, text=True, check=False
    )


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """Copy the application to a folder where it may leave files behind."""
    return Path(shutil.copytree(APP, tmp_path / "app"))


@pytest.mark.parametrize(("command", "shown"), SHOWN, ids=[command for command, _ in SHOWN])
def test_the_guide_shows_what_is_printed(command: str, shown: str, app: Path) -> None:
    """Each command prints the words that the guide shows, and fails as it should."""
    done = run(app, "atomic_claim", *shlex.split(command))
    assert done.stderr == ""
    assert words(done.stdout) == words(shown)
    is_legacy = command.startswith("race") and "--patches" not in command
    assert done.returncode == int(is_legacy)


def test_the_story_has_its_parts() -> None:
    """Before and after the cure there is a race, and between them a migration."""
    assert [command.partition(" ")[0] for command, _ in SHOWN] == ["race", "migration", "race"]


def test_the_doctor_of_the_story(app: Path) -> None:
    """It prints what the guide shows, and nothing once what it says has been done."""
    [shown] = re.findall(
        r"^\$ atomic-claim (doctor [^\n]*)\n(.*?)^```", STORY, re.DOTALL | re.MULTILINE
    )
    assert run(app, "legacy_app").stdout == "0 sent\n"
    done = run(app, "atomic_claim", *shlex.split(shown[0]))
    assert (done.returncode, done.stderr) == (1, "")
    assert words(done.stdout) == words(shown[1])
    cures = [line for line in done.stdout.splitlines() if line.endswith(";")]
    migration = run(app, "atomic_claim", *shlex.split(SHOWN[1][0]))
    assert cures[0] in migration.stdout.splitlines()
    with closing(sqlite3.connect(app / "legacy_app.db")) as connection:
        for cure in cures:
            connection.execute(cure)
    done = run(app, "atomic_claim", *shlex.split(shown[0]))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_patches_are_those_of_the_guide() -> None:
    """The table in the guide is the application's, to the letter."""
    [shown] = re.findall(r"```toml\n(.*?)```", STORY, re.DOTALL)
    source = (APP / "pyproject.toml").read_text(encoding="utf-8")
    assert (
        tomllib.loads(shown)["tool"]["atomic_claim"]
        == tomllib.loads(source)["tool"]["atomic_claim"]
    )


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
