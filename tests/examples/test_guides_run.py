"""Every block of a guide is run in the order of the page, as a reader would run it."""

import doctest
import re
import shlex
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest
import sqlalchemy as sa

from tests.guides import GUIDES

pytestmark = pytest.mark.once

pytest.importorskip("typer", reason="the extra 'cli' is not installed")

# Guides whose blocks need more than a folder and SQLite, and the test that runs them.
ELSEWHERE: Final = {
    "README": "test_guides.py, tools/test_demo.py",
    "asyncio_fastapi": "test_guide_applications.py",
    "flask": "test_guide_applications.py",
    "guard": "test_guide_applications.py",
    "legacy_app": "test_guide_applications.py, test_legacy_app.py",
    "patching": "patch/test_examples.py",
    "production": "test_guide_applications.py",
    "recipes": "patch/test_recipes.py",
    "rolling_out": "test_rolling_out.py",
    "speed": "project/test_benchmarks.py",
    "worker": "test_guide_applications.py, test_worker_example.py",
}
BLOCK: Final = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What differs from run to run: times, versions, speeds.
VARIABLE: Final = [
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "2026-11-02 08:00:00"),
    (r"^ *\d\d:\d\d:\d\d", "08:00:00"),
    (r"SQLite [\d.]+", "SQLite 3"),
    (r" +$", ""),
]


def steady(text: str) -> str:
    """Return an output with one value for everything that differs from run to run."""
    for pattern, value in VARIABLE:
        text = re.sub(pattern, value, text, flags=re.MULTILINE)
    return text.strip()


def agrees(found: str, shown: str) -> bool:
    """Check an output against what a guide shows, where `...` stands for any lines."""
    parts = re.split(r"^\.\.\.$", steady(shown), flags=re.MULTILINE)
    pattern = ".*".join(re.escape(part) for part in parts)
    return re.fullmatch(pattern, steady(found), re.DOTALL) is not None


class Reader:
    """A reader in an empty folder, who runs one block after the other."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capsys = capsys
        self.names: dict[str, Any] = {"__name__": "guide"}

    def run(self, language: str, text: str) -> None:
        """Run one block, or compare it with what the last one printed."""
        getattr(self, language)(text)

    def python(self, text: str) -> None:
        """Run Python; a first line such as `# jobs.py` names the file that it is."""
        if file := re.match(r"# (\w+\.py)\n", text):
            self.folder.joinpath(file[1]).write_text(text, encoding="utf-8")
        elif text.startswith(">>> "):
            test = doctest.DocTestParser().get_doctest(text, self.names, "guide", None, None)
            said: list[str] = []
            runner = doctest.DocTestRunner(verbose=False)
            assert runner.run(test, out=said.append, clear_globs=False).failed == 0, "".join(said)
            self.names |= test.globs
        else:
            exec(text, self.names)  # noqa: S102 - the guides are ours

    def text(self, text: str) -> None:
        """Compare what Python has printed."""
        found = self.capsys.readouterr().out
        assert agrees(found, text), found

    def toml(self, text: str) -> None:
        """Write the configuration."""
        self.folder.joinpath("pyproject.toml").write_text(text, encoding="utf-8")

    def sql(self, text: str) -> None:
        """Run SQL on the file of the database."""
        with closing(sqlite3.connect(self.folder / "jobs.db")) as connection:
            connection.executescript(text)

    def console(self, text: str) -> None:
        """Run each command, and compare what stands below it."""
        for line, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
            program, *arguments = shlex.split(line)
            start = {"atomic-claim": ["-m", "atomic_claim"], "python": []}[program]
            done = subprocess.run(
                [sys.executable, *start, *arguments],
                cwd=self.folder,
                check=False,
                capture_output=True,
                text=True,
            )
            assert done.stderr == ""
            assert agrees(done.stdout, shown), done.stdout

    def leave(self) -> None:
        """Close what the guide opened, and forget its modules."""
        for value in self.names.values():
            if isinstance(value, sa.Engine):
                value.dispose()
        for path in self.folder.glob("*.py"):
            sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("topic", sorted(set(GUIDES) - set(ELSEWHERE) - {"index"}))
def test_the_guide_runs(
    topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its code runs, and its commands print what stands below them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DATABASE_URL", "sqlite:///jobs.db")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("ATOMIC_CLAIM_URL", raising=False)
    reader = Reader(tmp_path, capsys)
    try:
        for language, text in BLOCK.findall(GUIDES[topic]):
            reader.run(language, text)
    finally:
        reader.leave()


@pytest.mark.parametrize("topic", GUIDES)
def test_every_block_names_its_language(topic: str) -> None:
    """No block is hidden from the tests by a missing language or by indentation."""
    fences = re.findall(r"^( *)```(\w*)", GUIDES[topic], re.MULTILINE)
    assert all(not indent for indent, _ in fences)
    assert all(language for _, language in fences[::2])
    assert all(not language for _, language in fences[1::2])


def test_guides_that_run_elsewhere_are_there() -> None:
    """The list of exceptions names no guide that was renamed, and only tests that are there."""
    assert set(ELSEWHERE) <= set(GUIDES)
    tests = Path(__file__).parent
    for names in ELSEWHERE.values():
        for name in names.split(", "):
            assert any((folder / name).is_file() for folder in (tests, tests.parent)), name


@pytest.mark.parametrize(
    ("found", "shown", "expected"),
    [
        ("1\n2\n3\n", "1\n...\n3\n", True),
        ("1\n2\n3\n", "1\n...\n", True),
        ("1\n2\n3\n", "1\n2\n", False),
        ("at 2024-01-01 00:00:00\n", "at 2026-11-02 08:00:00\n", True),
        ("1 job\n", "2 jobs\n", False),
    ],
)
def test_differences_are_seen(found: str, shown: str, expected: bool) -> None:
    """The twin: an output that differs is seen, and `...` stands for lines alone."""
    assert agrees(found, shown) is expected
