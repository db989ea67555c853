"""Drawn tables, declarations, binds and steps do what the model says, on each database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Final

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis.strategies import SearchStrategy

from tests.conftest import fresh_database
from tests.databases import NAMES
from tests.model.known import KNOWN, known_fault
from tests.model.runner import Violation, run
from tests.model.scenario import (
    Bind,
    Claim,
    Column,
    Declaration,
    Outside,
    Row,
    Scenario,
    Sweep,
    Table,
)
from tests.model.strategies import incoherent, scenarios, turns
from tests.model.world import Places

# It draws on the newer SQLAlchemy; what it finds becomes a test that runs on both.
pytestmark = pytest.mark.once

EXAMPLES: Final = {"sqlite": 90, "postgresql": 90, "mysql": 60, "mariadb": 60}
TURNS: Final = dict.fromkeys(NAMES, 40)
INCOHERENT: Final = dict.fromkeys(NAMES, 20)


@pytest.fixture(scope="module")
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Places]]:
    """Yield the databases that all scenarios of a kind share, each made when it is asked for."""
    with ExitStack() as left:

        class Shared(dict[str, Places]):
            def __missing__(self, name: str) -> Places:
                here, elsewhere, other = (
                    left.enter_context(fresh_database(each, request.config, tmp_path_factory))
                    for each in (name, name, "sqlite")
                )
                self[name] = Places(here, elsewhere, other)
                left.callback(self[name].watch.dispose)
                return self[name]

        yield Shared()


@pytest.mark.parametrize("name", NAMES)
def test_the_model_holds(shared: dict[str, Places], name: str) -> None:
    """Whatever is drawn, each step does what the model allows."""
    check(scenarios(name), shared[name], EXAMPLES[name])


@pytest.mark.parametrize("name", NAMES)
def test_incoherent_declarations(shared: dict[str, Places], name: str) -> None:
    """Each is refused, or hands out nothing twice, and nothing that has ended."""
    check(incoherent(name), shared[name], INCOHERENT[name])


@pytest.mark.parametrize("name", NAMES)
def test_turns(shared: dict[str, Places], name: str) -> None:
    """Each claim takes the first rows of a turn that goes on where the last one ended."""
    check(turns(name), shared[name], TURNS[name])


def spent(*rows: Row, trigger: str | None = None) -> Scenario:
    """Return a sweep of a table without a lease, whose rows are given."""
    state = Column("state", "status", nullable=False)
    said = Declaration(
        roles=(("state", "state"), ("attempts", "attempts")), failed=("failed",), max_attempts=2
    )
    table = Table(
        (Column("key0", "integer", nullable=False),),
        state,
        (Column("attempts", "integer"),),
        trigger=trigger,
    )
    return Scenario(table, said, rows, (Sweep("a"),))


def test_what_has_no_lease_is_swept(shared: dict[str, Places]) -> None:
    """A sweep of a table without a lease marks spent rows."""
    run(spent(Row(attempts=2), Row()), shared["sqlite"])


@pytest.mark.parametrize("name", NAMES)
def test_a_refused_row_does_not_stop_a_sweep(shared: dict[str, Places], name: str) -> None:
    """The other rows are marked, whose change the trigger does not refuse."""
    rows = (Row(attempts=2, hooked=True), Row(attempts=2), Row(attempts=2))
    run(spent(*rows, trigger="refuse"), shared[name])


def test_a_turn_beside_an_open_claim(shared: dict[str, Places]) -> None:
    """A tenant's first row, which an open claim has locked, keeps its place in the turn."""
    scenario = Scenario(
        Table(
            (Column("key0", "integer", nullable=False),),
            Column("state", "status", nullable=False),
            (Column("tenant", "integer"),),
        ),
        Declaration(roles=(("state", "state"), ("fair_by", "tenant"))),
        (Row(tenant=0), Row(tenant=1), Row(tenant=0)),
        (Claim("a"), Claim("b", limit=3)),
        (Bind("connection"), Bind("engine")),
    )
    run(scenario, shared["postgresql"])


@pytest.mark.parametrize("trigger", ["veto", "refuse"])
def test_another_program_writes_what_no_trigger_stops(
    shared: dict[str, Places], trigger: str
) -> None:
    """The rows on which the trigger acts are left to the library."""
    scenario = spent(Row(hooked=True), trigger=trigger)
    run(replace(scenario, steps=(Outside("mark"), Outside("mark"))), shared["sqlite"])


def check(strategy: SearchStrategy[Scenario], places: Places, examples: int) -> None:
    """Run scenarios of a strategy, always the same ones."""

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def holds(scenario: Scenario) -> None:
        assume(known_fault(scenario, places.name) is None)
        run(scenario, places)

    holds()


def test_the_known_faults(shared: dict[str, Places]) -> None:
    """Each known fault is one still, and its predicate leaves its own example out."""
    for known in KNOWN:
        assert known.predicate(known.scenario, known.database)
        with pytest.raises(Violation):
            run(known.scenario, shared[known.database])
