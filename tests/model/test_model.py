"""Drawn tables, declarations, binds and steps do what the model says, on each database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings

from tests.conftest import fresh_database
from tests.databases import NAMES
from tests.model.known import KNOWN, Known, known_fault
from tests.model.runner import Violation, run
from tests.model.scenario import Scenario
from tests.model.strategies import scenarios
from tests.model.world import Places

# It draws on the newer SQLAlchemy; what it finds becomes a test that runs on both.
pytestmark = pytest.mark.once

EXAMPLES: Final = {"sqlite": 150, "postgresql": 150, "mysql": 100, "mariadb": 100}


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
    places = shared[name]

    @settings(
        max_examples=EXAMPLES[name],
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(scenarios(name))
    def check(scenario: Scenario) -> None:
        assume(known_fault(scenario, name) is None)
        run(scenario, places)

    check()


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_a_known_fault(
    shared: dict[str, Places], known: Known, request: pytest.FixtureRequest
) -> None:
    """Each known fault is one still, and its predicate leaves its own example out."""
    assert known.predicate(known.scenario, known.database)
    places = shared[known.database]
    request.applymarker(pytest.mark.xfail(reason=known.trap, raises=Violation, strict=True))
    run(known.scenario, places)
