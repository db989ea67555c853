"""The known faults: for each a scenario that fails, and the predicate that leaves it out.

To cure one is to remove its predicate and its entry: then the machine draws such scenarios again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tests.model.scenario import Column, Declaration, Requeue, Row, Scenario, Sweep, Table

Predicate = Callable[[Scenario, str], bool]


def a_refused_row_stops_a_sweep(scenario: Scenario, _: str) -> bool:
    """Return True if a row that the database refuses may cost a sweep or requeue the others."""
    return scenario.table.trigger == "refuse" and (scenario.has(Sweep) or scenario.has(Requeue))


@dataclass(frozen=True)
class Known:
    """A known fault.

    Attributes:
        trap: its number in the list of traps, or the words for it.
        predicate: what a scenario has that may run into it.
        scenario: one that does, as small as it was shrunk to.
        database: where it does.
    """

    trap: str
    predicate: Predicate
    scenario: Scenario
    database: str

    @property
    def name(self) -> str:
        """Return the name of the fault."""
        return self.predicate.__name__


KNOWN: Final = (
    Known(
        "batches: a row that the database refuses",
        a_refused_row_stops_a_sweep,
        Scenario(
            Table(
                (Column("key0", "integer", nullable=False),),
                Column("state", "status", nullable=False),
                (Column("attempts", "integer"),),
                trigger="refuse",
            ),
            Declaration(
                roles=(("state", "state"), ("attempts", "attempts")),
                done=("done",),
                failed=("failed",),
                max_attempts=2,
            ),
            (Row(attempts=2, hooked=True), Row(attempts=2)),
            (Sweep("a"),),
        ),
        "sqlite",
    ),
)


def known_fault(scenario: Scenario, database: str) -> str | None:
    """Return the name of a known fault that a scenario may run into, or None."""
    return next((each.name for each in KNOWN if each.predicate(scenario, database)), None)
