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
    End,
    Fault,
    Outside,
    Row,
    Scenario,
    Step,
    Sweep,
    Table,
)
from tests.model.strategies import UNFITTING

Predicate = Callable[[Scenario, str], bool]


def version_is_not_counted(scenario: Scenario, _: str) -> bool:
    """Return True if the class has a version column, which claims do not count up."""
    return "version" in scenario.mapping


def a_role_is_not_nullable(scenario: Scenario, _: str) -> bool:
    """Return True if a column that a claim or an end clears may not be NULL."""
    said, table = scenario.declaration, scenario.table
    return any(
        (column := table.column(label)) is not None and not column.nullable
        for role, label in said.roles
        if role in {"worker", "lease", "token", "error"}
    )


def a_row_cannot_be_marked(scenario: Scenario, _: str) -> bool:
    """Return True if a trigger or a unique index refuses the mark."""
    hooked = any(row.hooked for row in scenario.rows)
    return (scenario.table.trigger == "refuse" and hooked) or scenario.table.index == "one"


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


def the_state_is_bits(scenario: Scenario, _: str) -> bool:
    """Return True if the state is a BIT(1)."""
    return scenario.table.state.kind == "bit"


def the_state_is_in_the_key(scenario: Scenario, _: str) -> bool:
    """Return True if the state is part of the primary key."""
    return scenario.table.state_in_key


def eager_loading_is_dropped(scenario: Scenario, _: str) -> bool:
    """Return True if a relationship is loaded by `selectin`."""
    return "selectin" in scenario.mapping


def the_state_is_a_domain(scenario: Scenario, _: str) -> bool:
    """Return True if the state is of a DOMAIN."""
    return scenario.table.state.kind == "domain"


def a_ticket_loses_the_key(scenario: Scenario, _: str) -> bool:
    """Return True if a ticket is used: it may lose the key, or find another table."""
    return scenario.has(End, by_ticket=True)


def one_value_of_an_end_is_enough(scenario: Scenario, _: str) -> bool:
    """Return True if an end has several values; one alone is taken for it."""
    return len(scenario.declaration.done) > 1


def a_type_changes_under_a_prepared_statement(scenario: Scenario, database: str) -> bool:
    """Return True if a type changes while the server has a plan that returns it."""
    prepared = any(bind.prepares or bind.on_loop for bind in scenario.binds)
    return database == "postgresql" and prepared and scenario.has(Outside, what="alter")


def an_error_does_not_fit_its_column(scenario: Scenario, _: str) -> bool:
    """Return True if the text of an error may not fit its column."""
    return any(
        isinstance(step, End) and step.error not in {None, "", "it failed"}
        for step in scenario.steps
    )


def a_name_is_taken_for_a_role(scenario: Scenario, _: str) -> bool:
    """Return True if a conventional name belongs to a column of an unfit type."""
    said, table = scenario.declaration, scenario.table
    roles = dict(said.roles)
    return said.inferred and any(
        column.label in UNFITTING and column.label not in roles
        for column in table.others
        if column.label != "order"
    )


def a_row_cannot_be_read(scenario: Scenario, _: str) -> bool:
    """Return True if a row holds what its type cannot read."""
    return any(row.bad for row in scenario.rows)


def an_identity_is_unknown(scenario: Scenario, _: str) -> bool:
    """Return True if a row has a polymorphic identity that no class has."""
    return any(row.identity == "ghost" for row in scenario.rows)


def a_session_reads_elsewhere(scenario: Scenario, _: str) -> bool:
    """Return True if a session sends SELECTs to another engine than writes."""
    return any(bind.routing == "routed" for bind in scenario.binds)


def a_claimed_row_is_free(scenario: Scenario, _: str) -> bool:
    """Return True if the claimed value is one of the free ones."""
    return scenario.declaration.claimed in scenario.declaration.free


def the_mark_is_rewritten(scenario: Scenario, _: str) -> bool:
    """Return True if a trigger vetoes the mark, or writes the state that was there."""
    hooked = any(row.hooked for row in scenario.rows)
    return hooked and scenario.table.trigger in {"rewrite", "veto"}


def a_commit_listener_raises(scenario: Scenario, _: str) -> bool:
    """Return True if a listener to the commit of our own transaction raises."""
    return scenario.has(Fault, what="raise commit")


def more_attempts_than_can_be_counted(scenario: Scenario, _: str) -> bool:
    """Return True if the maximum of attempts is beyond the counter's type."""
    return (scenario.declaration.max_attempts or 0) >= 2**15


def null_is_one_of_the_free_values(scenario: Scenario, _: str) -> bool:
    """Return True if NULL is one of the free values."""
    return "null" in scenario.declaration.free


def a_mark_is_null(scenario: Scenario, _: str) -> bool:
    """Return True if the value of a claimed or ended row is NULL."""
    said = scenario.declaration
    return "null" in {said.claimed, *said.done, *said.failed}


def a_hook_raises_in_autocommit(scenario: Scenario, _: str) -> bool:
    """Return True if an entity's listener raises after the mark in AUTOCOMMIT."""
    return any(
        isinstance(step, Fault)
        and step.what == "raise load"
        and scenario.bind(step.actor).isolation == "AUTOCOMMIT"
        for step in scenario.steps
    )


def a_lock_is_gone_before_the_mark(scenario: Scenario, database: str) -> bool:
    """Return True if AUTOCOMMIT ends a lock before the mark or the DELETE."""
    in_autocommit = [bind for bind in scenario.binds if bind.isolation == "AUTOCOMMIT"]
    return database == "postgresql" and any(
        "do_orm_execute" in bind.listeners or scenario.has(Claim, deletes=True)
        for bind in in_autocommit
    )


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
        "a mapped version_id_col",
        version_is_not_counted,
        example(mapping=("class", "version")),
        "sqlite",
    ),
    Known(
        "trap 27",
        a_role_is_not_nullable,
        example(columns=(column("worker", nullable=False),)),
        "sqlite",
    ),
    Known(
        "a row that cannot be marked",
        a_row_cannot_be_marked,
        example(rows=(Row(hooked=True),), table={"trigger": "refuse"}),
        "postgresql",
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
        "BIT(1)", the_state_is_bits, example(state=column("state", "bit", nullable=False)), "mysql"
    ),
    Known("trap 23", the_state_is_in_the_key, example(table={"state_in_key": True}), "mariadb"),
    Known(
        "entities as a SELECT gives them",
        eager_loading_is_dropped,
        example(bind=Bind("session"), mapping=("class", "selectin")),
        "sqlite",
    ),
    Known(
        "DOMAIN",
        the_state_is_a_domain,
        example(state=column("state", "domain", nullable=False)),
        "postgresql",
    ),
    Known(
        "trap 36",
        a_ticket_loses_the_key,
        example(
            A,
            End("a", "complete", by_ticket=True),
            columns=(TOKEN,),
            keys=(column("key0", "enum", nullable=False),),
        ),
        "mariadb",
    ),
    Known(
        "trap 26, several values of an end",
        one_value_of_an_end_is_enough,
        example(state=STATUS, rows=(Row(), Row(ended=True)), done=("done", "done_at")),
        "mysql",
    ),
    Known(
        "trap 30",
        a_type_changes_under_a_prepared_statement,
        example(A, Outside("alter"), A, bind=Bind(prepares=True), rows=(Row(), Row())),
        "postgresql",
    ),
    Known(
        "trap 37",
        an_error_does_not_fit_its_column,
        example(A, End("a", "fail", error="nul \x00 byte"), columns=(column("error", "text"),)),
        "postgresql",
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
        "trap 22, a value",
        a_row_cannot_be_read,
        example(columns=(column("extra", "instant"),), roles=(), rows=(Row(bad=True),)),
        "postgresql",
    ),
    Known(
        "trap 22, an identity",
        an_identity_is_unknown,
        example(bind=Bind("session"), mapping=("single",), rows=(Row(identity="ghost"),)),
        "sqlite",
    ),
    Known(
        "trap 24, reads that are routed elsewhere",
        a_session_reads_elsewhere,
        example(bind=Bind("sessionmaker", routing="routed"), mapping=("class",)),
        "mysql",
    ),
    Known(
        "trap 26, claimed is free",
        a_claimed_row_is_free,
        example(A, A, free=("free", "claimed"), coherent=False),
        "sqlite",
    ),
    Known(
        "trap 24, a trigger",
        the_mark_is_rewritten,
        example(rows=(Row(hooked=True),), table={"trigger": "rewrite"}),
        "postgresql",
    ),
    Known(
        "a commit listener that raises",
        a_commit_listener_raises,
        example(Fault("a", "raise commit"), A),
        "mysql",
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
    Known(
        "trap 27, a mark that is NULL",
        a_mark_is_null,
        example(claimed="null", coherent=False),
        "mysql",
    ),
    Known(
        "trap 22, a hook",
        a_hook_raises_in_autocommit,
        example(
            Fault("a", "raise load"),
            A,
            bind=Bind("session", isolation="AUTOCOMMIT"),
            mapping=("class",),
        ),
        "sqlite",
    ),
    Known(
        "trap 24, AUTOCOMMIT",
        a_lock_is_gone_before_the_mark,
        example(
            Fault("a", "pause", 1),
            A,
            Claim("b"),
            bind=Bind("session", isolation="AUTOCOMMIT", listeners=("do_orm_execute",)),
            mapping=("class",),
        ),
        "postgresql",
    ),
)


def known_fault(scenario: Scenario, database: str) -> str | None:
    """Return the name of a known fault that a scenario may run into, or None."""
    return next((each.name for each in KNOWN if each.predicate(scenario, database)), None)
