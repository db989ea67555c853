"""Tables of known queues, by their names alone, and the table of the patches."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Command, address
from tests.databases import Database
from tests.declaring.test_layouts import made
from tests.racers import jobs, unread

LAYOUTS = {
    "payload_4": "payload_jobs",
    "delayed_job": "delayed_jobs",
    "django_tasks_db": "django_tasks_database_dbtaskresult",
}
COMMANDS = (("jobs", "--waiting"), ("jobs", "--failed"), ("migration",), ("sql",))


def said(command: Command, *words: str) -> Any:
    """Return what a command prints as JSON."""
    ended = command(*words, "--json")
    assert not ended.err, ended
    assert ended.code in {0, 1}, ended
    return json.loads(ended.out)


@pytest.mark.databases("sqlite", "postgresql")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_name_alone_is_enough(database: Database, command: Command, layout: str) -> None:
    """Each command reads the table, and the doctor is silent once the migration has run."""
    name = LAYOUTS[layout]
    engine, _ = made(database, layout, name)
    words = ("--table", name, "--url", address(database))
    for each in COMMANDS:
        assert said(command, *each, *words)["table"] == name
    checks = [each["check"] for each in said(command, "doctor", *words)["findings"]]
    assert not {"meaning of the columns", "claim", "types of the columns"} & {*checks}
    sql = said(command, "migration", "--sql", *words)["sql"][database.name]
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for line in sql.splitlines():
            if not line.startswith("--"):
                connection.exec_driver_sql(line)
    found = said(command, "doctor", *words)
    assert not [each for each in found["findings"] if each["level"] == "problem"]


@pytest.mark.databases("sqlite", "postgresql", "mysql")
def test_a_layout_that_is_refused(database: Database, command: Command) -> None:
    """Each command says in one line why, and which declaration to give in place of the name."""
    made(database, "laravel", "jobs")
    words = ("--table", "jobs", "--url", address(database))
    (finding,) = (
        each
        for each in said(command, "doctor", *words)["findings"]
        if each["check"] == "meaning of the columns"
    )
    assert "this is the table of Laravel, and its times are integers" in finding["found"]
    lines = [command(*each, *words).refused() for each in COMMANDS]
    assert {*lines} == {
        f"atomic-claim: --table jobs: {finding['found']}; {finding['fix']}\n",
    }
    assert "a JobTable.infer(jobs, free=jobs.c.reserved_at.is_(None) &" in finding["fix"]


@pytest.mark.once
@pytest.mark.databases("sqlite", "postgresql")
@pytest.mark.parametrize("name", ["tests.racers:unread", "unread"])
def test_the_table_is_declared_by_a_patch(
    database: Database,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """The declaration that stands in a patch holds for every command that takes its table."""
    unread.create(database.engine())
    url = ("--url", address(database))
    assert "JobTable.infer(unread, free=" in command("sql", "--table", name, *url).refused()
    entry = (
        '[tool.atomic_claim.patches."app:claim"]\n'
        f'table = {{table = "{name}", free = "new", claimed = "busy", order = "-created_at", '
        'done = {status = "done", created_at = "now()"}}\n'
    )
    tmp_path.joinpath("pyproject.toml").write_text(entry, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for each in (("jobs", "--waiting"), ("migration",), ("sql",), ("doctor",)):
        assert said(command, *each, *url)["table"] == "unread"
    assert "status = 'busy'" in command("sql", *url).out
    assert "created_at DESC" in command("migration", "--sql", *url).out
    assert command("doctor", "--watch", "--count", "1", "--json", *url).code == 0
    race = ("race", "atomic_claim:claim_jobs", "--jobs", "20", "--workers", "2", "--json")
    found = said(command, *race, *url, "--use-existing-table")
    assert (found["jobs"], found["exact"]) == (20, True)


@pytest.mark.once
@pytest.mark.databases("sqlite")
def test_the_table_is_left_out(
    database: Database, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command takes the one that the patches of the nearest pyproject.toml name."""
    jobs.create(database.engine())
    monkeypatch.chdir(tmp_path)
    url = ("--url", address(database))
    race = ("race", "atomic_claim:claim_jobs")
    listing = (("jobs", "--waiting"), ("migration",), ("sql",), ("doctor",))
    for each in (*listing, race):
        assert "which table? Give --table" in command(*each, *url).refused()
    entry = '[tool.atomic_claim.patches."app:claim"]\ntable = "tests.racers:jobs"\n'
    tmp_path.joinpath("pyproject.toml").write_text(entry, encoding="utf-8")
    for each in listing:
        assert said(command, *each, *url)["table"] == "jobs"
    assert "--use-existing-table" in command(*race, *url).refused()
