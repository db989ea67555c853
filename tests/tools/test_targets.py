"""Tables of known queues, by their names alone, and the table of the patches."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Command, address
from tests.databases import Database
from tests.declaring.test_layouts import made
from tests.racers import jobs

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
