"""The benchmarks' command measures, says what it missed, and refuses what it cannot measure."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.benchmarks.__main__ import main
from tests.benchmarks.crew import Caller
from tests.benchmarks.ground import Rows, fill, job_table
from tests.benchmarks.measuring import Line, in_turns, percentile
from tests.benchmarks.overhead import by_hand
from tests.databases import Database

pytestmark = pytest.mark.once

OPTIONS: dict[str, Any] = {
    "figure": "overhead",
    "name": "engine",
    "value": 1234.5,
    "unit": "claims/s",
    "against": "bare",
}


@pytest.mark.parametrize("least", [0.8, 0.81])
def test_figures_are_shown(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    least: float,
) -> None:
    """A figure is printed, written with every round's ratio, and drawn; a miss is said."""
    line = Line(**OPTIONS, ratios=(0.5, 0.9, 0.8), least=least)
    monkeypatch.setattr("tests.benchmarks.overhead.measure", lambda *_, **__: iter([[line]]))
    document, chart = tmp_path / "figures.json", tmp_path / "figures.svg"
    given = ["overhead", "--json", str(document), "--svg", str(chart)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *given])
    missed = least > line.ratio
    assert main() == missed
    said = capsys.readouterr()
    assert "0.80   0.50-0.90" in said.out
    assert ("missed: overhead: engine, 0.80" in said.err) == missed
    [written] = json.loads(document.read_text(encoding="utf-8"))["lines"]
    assert written["ratios"] == [0.5, 0.9, 0.8]
    assert written["reached"] is not missed
    assert "overhead: engine / bare" in chart.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["speed"], "speed: expected one of overhead, legacy"),
        (["overhead", "--rounds", "4"], "4: expected at least 5"),
        (["overhead", "--databases", "oracle"], "oracle: expected of postgresql"),
        (["overhead", "--url", "oracle://scott:tiger@host"], "--url oracle: expected one of"),
        (["growth", "--rows", "100"], "--rows 100: 10 % of them are free"),
    ],
)
def test_what_cannot_be_measured(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    """It is refused in a line that says what was expected, without a password."""
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    try:
        status: Any = main()
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    said = capsys.readouterr().err
    assert complaint in " ".join(said.split())
    assert "tiger" not in said


def test_turns() -> None:
    """Every way has its turn in every round, prepared anew, every second round in reverse."""
    order: list[str] = []
    ways = {"a": lambda: None, "b": lambda: None}
    found = in_turns(ways, rounds=4, calls=3, before=order.append)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert {name: [len(times) for times in turns] for name, turns in found.items()} == {
        "a": [3, 3, 3, 3],
        "b": [3, 3, 3, 3],
    }


def test_targets() -> None:
    """A median below what was asked for is a miss, and so is one above what was allowed."""
    ratios = (0.5, 0.9, 0.8)
    assert Line(**OPTIONS, ratios=ratios).reached is None
    assert Line(**OPTIONS, ratios=ratios, least=0.8).reached is True
    assert Line(**OPTIONS, ratios=ratios, least=0.81).reached is False
    assert Line(**OPTIONS, ratios=ratios, most=0.79).reached is False
    assert percentile(range(1, 101), 0.99) == 100


@pytest.mark.databases("mysql", "mariadb")
def test_the_sequence_by_hand(database: Database) -> None:
    """It claims as many as the library does, of more keys too than go into one statement."""
    engine, jobs = database.engine(), job_table()
    for limit in (1, 1500):
        fill(engine, jobs, Rows(3 * limit))
        with by_hand(engine, jobs, limit) as ways:
            for claim in ways.values():
                claim()
        with engine.connect() as connection:
            claimed = sa.select(sa.func.count()).where(jobs.table.c.processing == sa.true())
            assert connection.scalar(claimed) == 3 * limit


def test_a_worker_counts_what_reached_it() -> None:
    """Errors are counted by name and number, and what was claimed is kept."""
    answers = iter([[1, 2], KeyError(3), [4], []])

    def claim() -> list[int]:
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    share = Caller(claim).run(0, float("inf"))
    assert share.jobs == [1, 2, 4]
    assert share.errors == {"KeyError 3": 1}
