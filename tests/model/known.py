"""The known faults: for each a scenario that fails, and the predicate that leaves it out.

To cure one is to remove its predicate and its entry: then the machine draws such scenarios again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tests.model.scenario import Scenario

Predicate = Callable[[Scenario, str], bool]


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


KNOWN: Final[tuple[Known, ...]] = ()


def known_fault(scenario: Scenario, database: str) -> str | None:
    """Return the name of a known fault that a scenario may run into, or None."""
    return next((each.name for each in KNOWN if each.predicate(scenario, database)), None)
