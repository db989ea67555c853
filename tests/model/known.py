"""The known faults: for each a scenario that fails, and the predicate that leaves it out.

To cure one is to remove its predicate and its entry: then the machine draws such scenarios again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tests.model.scenario import (
    Bind,
    Claim,
    Column,
    Declaration,
    Row,
    Scenario,
    Step,
    Sweep,
    Table,
)
from tests.model.strategies import UNFITTING

Predicate = Callable[[Scenario, str], bool]


def a_role_is_not_nullable(scenario: Scenario, _: str) -> bool:
    """Return True if a column that a claim or an end clears may not be NULL."""
    said, table = scenario.declaration, scenario.table
    return any(
        (column := table.column(label)) is not None and not column.nullable
        for role, label in said.roles
        if role in {"worker", "lease", "token", "error"}
    )


def a_column_does_not_fit_its_role(scenario: Scenario, _: str) -> bool:
    """Return True if a role has a column of a type that does not fit it."""
    said, table = scenario.declaration, scenario.table
    return any(
        (column := table.column(label)) is not None and column.kind in UNFITTING.get(role, ())
        for role, label in said.roles
    )


def an_end_is_another_state(scenario: Scenario, _: str) -> bool:
    """Return True if the value of an end is that of a free or claimed row."""
    said = scenario.declaration
    return not {*said.done, *said.failed}.isdisjoint({*said.free, said.claimed})


def roles_share_a_column(scenario: Scenario, _: str) -> bool:
    """Return True if two roles have one column, or a role has a column of the key."""
    said = scenario.declaration
    ends = [end for end in (*said.done, *said.failed) if end.endswith("_at")]
    labels = [*(label for _, label in said.roles), *ends]
    return len(set(labels)) < len(labels) or any(label.startswith("key") for label in labels)


def one_value_of_an_end_is_enough(scenario: Scenario, _: str) -> bool:
    """Return True if an end has several values; one alone is taken for it."""
    return len(scenario.declaration.done) > 1


def a_name_is_taken_for_a_role(scenario: Scenario, _: str) -> bool:
    """Return True if a conventional name belongs to a column of an unfit type."""
    said, table = scenario.declaration, scenario.table
    roles = dict(said.roles)
    return said.inferred and any(
        column.label in UNFITTING and column.label not in roles
        for column in table.others
        if column.label != "order"
    )


def more_attempts_than_can_be_counted(scenario: Scenario, _: str) -> bool:
    """Return True if the maximum of attempts is beyond the counter's type."""
    return (scenario.declaration.max_attempts or 0) >= 2**15


def null_is_one_of_the_free_values(scenario: Scenario, _: str) -> bool:
    """Return True if NULL is one of the free values."""
    return "null" in scenario.declaration.free


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


KEY: Final = Column("key0", "integer", nullable=False)
ENDS: Final = (Column("done_at", "instant"), Column("failed_at", "naive"))
FLAG: Final = Column("state", "flag", nullable=False)
A: Final = Claim("a")


def example(
    *steps: Step,
    state: Column = FLAG,
    columns: tuple[Column, ...] = (),
    keys: tuple[Column, ...] = (KEY,),
    rows: tuple[Row, ...] = (Row(),),
    bind: Bind | None = None,
    mapping: tuple[str, ...] = ("table",),
    roles: tuple[tuple[str, str], ...] | None = None,
    table: dict[str, Any] | None = None,
    **said: Any,
) -> Scenario:
    """Return a scenario of one actor on a plain table, but for what is said."""
    if roles is None:
        roles = tuple((column.label, column.label) for column in columns)
    return Scenario(
        Table(keys, state, (*columns, *ENDS), **table or {}),
        Declaration(
            roles=(("state", "state"), *roles),
            **{"done": ("done_at",), "failed": ("failed_at",)} | said,
        ),
        rows,
        steps or (A,),
        (bind or Bind(), Bind()),
        mapping,
    )


def column(label: str, kind: str = "long string", **more: Any) -> Column:
    """Return a column."""
    return Column(label, kind, **more)


STATUS: Final = column("state", "status", nullable=False)
TOKEN: Final = column("token")
KNOWN: Final = (
    Known(
        "trap 27",
        a_role_is_not_nullable,
        example(
            columns=(column("lease", "instant", nullable=False),), bind=Bind(kind="connection")
        ),
        "sqlite",
    ),
    Known(
        "trap 26, types of roles",
        a_column_does_not_fit_its_role,
        example(columns=(column("attempts"),), coherent=False),
        "postgresql",
    ),
    Known(
        "trap 26, an end that fresh rows bear",
        an_end_is_another_state,
        example(done=("free",), coherent=False),
        "sqlite",
    ),
    Known(
        "trap 26, pairs of roles",
        roles_share_a_column,
        example(roles=(("attempts", "key0"),), coherent=False),
        "sqlite",
    ),
    Known(
        "trap 26, several values of an end",
        one_value_of_an_end_is_enough,
        example(state=STATUS, rows=(Row(), Row(ended=True)), done=("done", "done_at")),
        "mysql",
    ),
    Known(
        "trap 28",
        a_name_is_taken_for_a_role,
        example(
            columns=(column("token", "json text"), column("order", "naive", nullable=False)),
            roles=(),
            table={"names": "conventional"},
            inferred=True,
            order=(("order", False),),
        ),
        "sqlite",
    ),
    Known(
        "trap 26, max_attempts",
        more_attempts_than_can_be_counted,
        example(
            A,
            Sweep("a"),
            columns=(column("attempts", "integer"),),
            max_attempts=2**70,
            coherent=False,
        ),
        "sqlite",
    ),
    Known(
        "free=(None, ...)",
        null_is_one_of_the_free_values,
        example(
            state=column("state", "status"),
            rows=(Row(), Row(state="null")),
            free=("free", "null"),
        ),
        "postgresql",
    ),
)


def known_fault(scenario: Scenario, database: str) -> str | None:
    """Return the name of a known fault that a scenario may run into, or None."""
    return next((each.name for each in KNOWN if each.predicate(scenario, database)), None)
