"""The benchmarks' command measures, says what it missed, and refuses what it cannot measure."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from atomic_claim import claim_jobs
from tests.benchmarks.__main__ import main
from tests.benchmarks.bare import by_hand
from tests.benchmarks.crew import Caller
from tests.benchmarks.ground import Rows, fill, job_table
from tests.benchmarks.measuring import Line, alternating, in_turns, percentile, typical_rates
from tests.benchmarks.overhead import LOOP, STATEMENTS, Case, measured
from tests.benchmarks.replay import by_core, recorded, replay, steps_of
from tests.benchmarks.showing import write
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
    """Every way has its turn in every round, prepared before it, every second round in reverse."""
    order: list[str] = []
    ways = {"a": lambda: None, "b": lambda: None}
    found = in_turns(ways, rounds=4, calls=3, before=order.append)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert {name: [len(times) for times in turns] for name, turns in found.items()} == {
        "a": [3, 3, 3, 3],
        "b": [3, 3, 3, 3],
    }


def test_alternating() -> None:
    """The ways alternate call by call, after one call of each that is not measured."""
    order: list[str] = []
    ways = {name: lambda name=name: order.append(name) for name in "ab"}
    found = alternating(ways, rounds=2, calls=3, before=lambda: order.append("|"))
    assert "".join(order) == "|abbaabba|abbaabba"
    assert [len(times) for turns in found.values() for times in turns] == [3, 3, 3, 3]
    # One slow call of three does not count.
    assert typical_rates([[0.5, 0.25, 9.0], [2.0]]) == [2.0, 0.5]


def test_targets() -> None:
    """A median below what was asked for is a miss, and so is one above what was allowed."""
    ratios = (0.5, 0.9, 0.8)
    assert Line(**OPTIONS, ratios=ratios).reached is None
    assert Line(**OPTIONS, ratios=ratios, least=0.8).reached is True
    assert Line(**OPTIONS, ratios=ratios, least=0.81).reached is False
    assert Line(**OPTIONS, ratios=ratios, least=0.81, accepted=0.8).reached is True
    assert Line(**OPTIONS, ratios=ratios, least=0.82, accepted=0.81).reached is False
    assert Line(**OPTIONS, ratios=ratios, most=0.79).reached is False
    assert percentile(range(1, 101), 0.99) == 100


@pytest.mark.parametrize(("token", "rich"), [(True, True), (False, False)])
def test_every_way_claims_as_much(database: Database, token: bool, rich: bool) -> None:
    """The library, the driver alone, Core alone and the ORM alone claim whole limits."""
    case = Case(database.engine().dialect.name, rich, token, limit=3, calls=1)
    lines = measured(database.engine(), case, rounds=1)
    names = {line.against for line in lines} | {line.name.partition(": ")[2] for line in lines}
    assert {f"Core alone, {case.mode}", STATEMENTS, LOOP, "claim_jobs by Engine"} <= names
    assert any(name.startswith("bare") for name in names)
    is_postgresql = case.database == "postgresql"
    assert ("claim_jobs by AsyncEngine, asyncpg" in names) == is_postgresql


@pytest.mark.parametrize("limit", [2, 1500])
def test_core_alone_sends_the_same_statements(database: Database, limit: int) -> None:
    """Also where the keys go into several statements."""
    engine, jobs = database.engine(), job_table(token=True)
    fill(engine, jobs, Rows(4 * limit + 1000))
    steps = steps_of(engine.url, lambda own: claim_jobs(own, jobs, limit))
    with recorded(engine) as sent, engine.begin() as connection:
        replay(steps, limit)(by_core(connection))
    assert [step.text for step in sent] == [step.text for step in steps]
    with by_hand(engine.url, steps, limit) as ways:
        [claim, *_] = ways.values()
        claim()
    with engine.connect() as connection:
        claimed = sa.select(sa.func.count()).where(jobs.table.c.processing == sa.true())
        assert connection.scalar(claimed) == 4 * limit


def test_a_guide_gets_the_table(tmp_path: Path) -> None:
    """It replaces what stands between the marks; a guide without marks is refused."""
    guide = tmp_path / "README.md"
    guide.write_text("a\n<!-- figures -->\nold\n<!-- end of figures -->\nb\n", encoding="utf-8")
    line = Line(**OPTIONS, ratios=(0.94,), least=0.95, accepted=0.93)
    write(guide, "2 cores", [line, Line(**OPTIONS | {"name": "for information"}, ratios=(1,))])
    text = guide.read_text(encoding="utf-8")
    assert "old" not in text
    assert "for information" not in text
    assert "| engine | 1,234 claims/s | bare | 0.94 | 0.94-0.94 | ≥ 0.95 (0.93) | PASS |" in text
    guide.write_text("a\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no line <!-- figures -->"):
        write(guide, "2 cores", [line])


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
