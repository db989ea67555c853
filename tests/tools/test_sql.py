import json
import re
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, DateTime, Integer, String

from atomic_claim import (
    ClaimError,
    JobTable,
    claim_jobs,
    complete_jobs,
    extend_jobs,
    fail_jobs,
    release_jobs,
)
from atomic_claim.cli.layout import laid_out
from tests.commands import PASSWORD, Command
from tests.databases import NAMES, Database
from tests.jobs import fill, job_table
from tests.statements import sent_by

LEASE = timedelta(minutes=5)


def leased(*key: Any) -> JobTable:
    """Declare a table with every role that a job table can have, the newest job first."""
    table = job_table(
        *key,
        Column("run_at", DateTime(timezone=True)),
        Column("worker", String(20)),
        Column("claim_token", String(32)),
        Column("lease_until", DateTime(timezone=True)),
        Column("attempts", Integer),
    )
    return JobTable(
        table,
        state="processing",
        done={"note": "it's 100% :done"},
        failed={"note": "failed"},
        order=table.c.created_at.desc(),
        due="run_at",
        worker="worker",
        token="claim_token",
        lease="lease_until",
        attempts="attempts",
        naive_times="utc",
    )


jobs = leased()
pairs = leased(Column("tenant", Integer, primary_key=True, default=1))
plain = job_table(name="plain")
keyless = sa.Table("keyless", sa.MetaData(), Column("processing", sa.Boolean))


def words(text: str) -> str:
    """Return a statement without its parameters' names, its white space and its limits."""
    text = re.sub(r"%\(\w+\)s(::\w+)?|(?<![:\w]):[a-z]\w*|%s|\?", "?", text.replace("%%", "%"))
    text = re.sub(r"\(\?(, \?)+\)", "(?)", text)
    text = re.sub(r"LIMIT \d+", "LIMIT n", text)
    return re.sub(r"\s*([()])\s*", r"\1", " ".join(text.split())).rstrip(";")


def shown(command: Command, table: str, *options: str) -> list[dict[str, Any]]:
    """Return the calls that `sql --json` prints for one dialect."""
    ended = command("sql", "--table", f"tests.tools.test_sql:{table}", "--json", *options)
    assert (ended.code, ended.err) == (0, "")
    [calls] = json.loads(ended.out)["dialects"].values()
    return list(calls)


CALLS: dict[str, Callable[[sa.Engine], Any]] = {
    "claim": lambda engine: claim_jobs(engine, jobs, 3, worker="w", lease=LEASE),
    "complete": lambda engine: complete_jobs(engine, CALLS["claim"](engine)),
    "fail": lambda engine: fail_jobs(engine, CALLS["claim"](engine), error="no"),
    "retry": lambda engine: fail_jobs(engine, CALLS["claim"](engine), retry=LEASE),
    "release": lambda engine: release_jobs(engine, CALLS["claim"](engine)),
    "extend": lambda engine: extend_jobs(engine, CALLS["claim"](engine)),
}


@pytest.mark.parametrize(("place", "call"), list(enumerate(CALLS)), ids=CALLS)
def test_what_is_printed_is_what_runs(
    database: Database, command: Command, place: int, call: str
) -> None:
    """Each statement of a call on a real database is among those printed, in their order."""
    engine = database.engine()
    fill(engine, jobs.table, 9)
    CALLS["release"](engine)
    sent = sent_by(engine)
    CALLS[call](engine)
    own = [words(each.text) for each in sent if "jobs" in each.text and "SHOW" not in each.text]
    if call != "claim":
        count = len(sent)
        CALLS["claim"](engine)
        claims = [words(each.text) for each in sent[count:] if "jobs" in each.text]
        assert own[: len(claims)] == claims
        own = own[len(claims) :]
    calls = shown(command, "jobs", "--dialect", database.name, "--limit", "3")
    printed = [words(step["sql"]) for step in calls[place]["steps"]]
    session = re.compile(r", @@\w+(, @@?\w+|, 0)?(, timestampdiff.*? AS skew)?(?= FROM)")
    assert printed == [session.sub("", text) for text in own]


def test_what_is_printed_can_be_run(database: Database, command: Command) -> None:
    """Every statement is one that the database understands, with a key of two columns too."""
    engine = database.engine()
    pairs.table.create(engine)
    values = {"lease": 300.0, "keys": 1, "tenant": 1, "id": 1, "processing": True}
    for call in shown(command, "pairs", "--dialect", database.name):
        assert call["refused"] is None
        with engine.connect() as connection:
            for step in call["steps"]:
                escaped = re.sub(r":(?=done|%)", r"\:", step["sql"])
                statement = sa.text(escaped)
                given = {
                    name: values.get(name, value) for name, value in step["parameters"].items()
                }
                names = set(statement._bindparams)
                connection.execute(statement, {name: given.get(name, 1) for name in names})
            connection.rollback()


def test_text_for_people(command: Command) -> None:
    """Every call has its heading, a sequence its transaction, and every database its part."""
    ended = command("sql", "--table", "tests.tools.test_sql:jobs")
    assert ended.code == 0
    for name in NAMES:
        assert f"-- {name}: jobs\n" in ended.out
    heads = Counter(re.findall(r"^-- (\w+_jobs)\(", ended.out, re.MULTILINE))
    once = dict.fromkeys(("claim_jobs", "complete_jobs", "release_jobs", "extend_jobs"), 4)
    assert heads == {**once, "fail_jobs": 8}
    mysql = ended.out.partition("-- mysql")[2].partition("-- mariadb")[0]
    assert mysql.count("BEGIN;") == mysql.count("COMMIT;") == 6
    assert "BEGIN" not in ended.out.partition("-- mysql")[0]
    assert "IN (:keys)" in mysql
    assert "it's" not in ended.out
    assert "'it''s 100% :done'" in ended.out


def test_what_a_table_cannot_do_is_said(command: Command) -> None:
    """A call that the table has no columns for says so in its place, and the others are there."""
    ended = command("sql", "--table", "tests.tools.test_sql:plain", "--dialect", "sqlite")
    assert ended.code == 0
    assert "-- extend_jobs(engine, claim): not on this table: " in ended.out
    assert "-- fail_jobs(engine, claim, retry=..., unfenced=True): not on" in ended.out
    assert "-- release_jobs(engine, claim, unfenced=True)\nUPDATE plain" in ended.out


@pytest.mark.databases("sqlite")
def test_a_retry_without_a_due_column_is_refused(database: Database) -> None:
    """A table that cannot say when is told so, and what to add."""
    engine = database.engine()
    fill(engine, plain, 1)
    claim = claim_jobs(engine, plain)
    with pytest.raises(ClaimError, match="needs a due column"):
        fail_jobs(engine, claim, retry=True, unfenced=True)


def test_nothing_is_connected_to(command: Command) -> None:
    """The URL only says which dialect, wherever it leads, and its password is not shown."""
    url = f"postgresql://ann:{PASSWORD}@127.0.0.1:1/jobs"
    ended = command("sql", "--table", "tests.tools.test_sql:plain", "--url", url)
    assert ended.code == 0
    assert "-- postgresql: plain" in ended.out
    assert "-- mysql" not in ended.out
    assert PASSWORD not in ended.out


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("tests.tools.test_sql", "write MODULE:NAME"),
        ("no_such_module:jobs", "there is no module 'no_such_module'"),
        ("tests.no_such_module:jobs", "there is no module 'tests.no_such_module'"),
        ("tests.tools.test_sql:nope", "has no 'nope'"),
        ("tests.tools.test_sql:LEASE", "is not a table"),
        ("tests.tools.test_sql:keyless", "has no primary key"),
    ],
)
def test_wrong_table(command: Command, table: str, said: str) -> None:
    """Whatever is not a table is refused by one line."""
    assert said in command("sql", "--table", table).refused()


def test_a_broken_module_is_named(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module of the current directory that cannot be imported is said to be wrong, and where."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_one.py").write_text("\n1 / 0\n", encoding="utf-8")
    (tmp_path / "broken_two.py").write_text("import no_such_package\n", encoding="utf-8")
    said = command("sql", "--table", "broken_one:jobs").refused()
    assert "ZeroDivisionError at" in said
    assert "broken_one.py:2" in said
    assert "no_such_package" in command("sql", "--table", "broken_two:jobs").refused()


def test_wrong_dialect(command: Command) -> None:
    """A database without an atomic claim is refused, and the known ones are named."""
    said = command("sql", "--table", "tests.tools.test_sql:plain", "--dialect", "oracle").refused()
    assert "--dialect oracle: expected one of postgresql, mysql, mariadb, sqlite" in said


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 'a  (SELECT  b'  FROM t",
        "SELECT \"FROM  x\" FROM `WHERE  y` WHERE a = 'it''s  FROM'",
        "SELECT 'a\\'  FROM' FROM t",
    ],
)
def test_layout_keeps_what_is_quoted(sql: str) -> None:
    """White space in strings and names is none to change."""
    quoted = re.findall(r"'[^']*'|\"[^\"]*\"|`[^`]*`", sql)
    assert all(each in laid_out(sql) for each in quoted)
