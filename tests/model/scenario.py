"""The data of one example: plain frozen dataclasses, whose `repr` is the Python that makes them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

Actor = Literal["a", "b"]


class Printed:
    """A dataclass whose `repr` leaves out what has its default."""

    def __repr__(self) -> str:
        said = [
            f"{each.name}={value!r}"
            for each in fields(self)  # type: ignore[arg-type]
            if (value := getattr(self, each.name)) != each.default
        ]
        return f"{type(self).__name__}({', '.join(said)})"


@dataclass(frozen=True, repr=False)
class Column(Printed):
    """A column of the job table.

    Attributes:
        label: what it is for, such as `lease`; the name is made of it by the table's style.
        kind: the name of its type in `kinds.KINDS`.
        nullable: whether NULL may be stored in it.
        moved: whether the server sets it by ON UPDATE (MySQL and MariaDB).
    """

    label: str
    kind: str
    nullable: bool = True
    moved: bool = False


@dataclass(frozen=True, repr=False)
class Table(Printed):
    """A job table.

    Attributes:
        keys: the columns of the primary key; the state comes last if it is one of them.
        state: the column that says whether a job is free.
        others: all other columns that a declaration may name, and extra ones.
        names: the style of the columns' names.
        schema: whether it is in a schema of its own.
        partitioned: whether it is partitioned by the state (PostgreSQL; the state is in the key).
        trigger: a trigger that runs before each UPDATE: it `touch`es a column, or for the rows
            that are hooked it `veto`es the change, `refuse`s it with an error, or `rewrite`s the
            state to what it was.
        index: an index on the state, or a unique one that lets `one` row run at a time.
    """

    keys: tuple[Column, ...]
    state: Column
    others: tuple[Column, ...] = ()
    state_in_key: bool = False
    names: str = "plain"
    schema: bool = False
    partitioned: bool = False
    trigger: str | None = None
    index: str | None = None

    @property
    def columns(self) -> tuple[Column, ...]:
        """All columns that are drawn."""
        return (*self.keys, self.state, *self.others)

    def column(self, label: str) -> Column | None:
        """Return the column with a label, if the table has it."""
        return next((column for column in self.columns if column.label == label), None)


@dataclass(frozen=True, repr=False)
class Declaration(Printed):
    """The arguments of a `JobTable`, by label and token.

    Attributes:
        inferred: whether nothing is declared, and the names are to be read.
        roles: columns by role, such as `("lease", "lease")`.
        free: the tokens of the free states.
        claimed: the token of the claimed state.
        done: a token of the state, or the label of a time column, or both; likewise `failed`.
        order: labels, with whether they descend.
        max_attempts: how many claims a row may have.
        unleased: whether rows that run without a lease are free after `world.HOUR`.
        max_per_key: how many rows of one exclusive key may run.
        coherent: whether it was drawn so that it means what the rows mean.
    """

    inferred: bool = False
    roles: tuple[tuple[str, str], ...] = ()
    free: tuple[str, ...] = ("free",)
    claimed: str = "claimed"
    done: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    order: tuple[tuple[str, bool], ...] = ()
    max_attempts: int | None = None
    unleased: bool = False
    max_per_key: int = 1
    coherent: bool = True

    def label(self, role: str) -> str | None:
        """Return the label of the column that has a role."""
        return dict(self.roles).get(role)


@dataclass(frozen=True, repr=False)
class Bind(Printed):
    """How an actor reaches the database.

    Attributes:
        kind: `engine`, `connection`, `session`, `scoped_session` or `sessionmaker`.
        on_loop: whether it is the asynchronous twin.
        isolation: the level, if one is set.
        isolated_by: whether by `create_engine` or by execution options.
        pool: `queue` (of one connection), `null`, or the default.
        listeners: events that are listened to without doing anything; `recipe` stands for those
            by which SQLAlchemy's documentation has pysqlite begin transactions.
        routing: how a session finds its engine, if not by one bind.
        prepares: whether psycopg prepares a statement when it is first executed.
    """

    kind: str = "engine"
    on_loop: bool = False
    isolation: str | None = None
    isolated_by: str = "engine"
    pool: str = "default"
    listeners: tuple[str, ...] = ()
    routing: str | None = None
    prepares: bool = False

    @property
    def is_own(self) -> bool:
        """Return True if each call is a transaction of its own."""
        return self.kind in {"engine", "sessionmaker"}

    @property
    def is_session(self) -> bool:
        """Return True if a mapped class gives entities."""
        return self.kind in {"session", "scoped_session", "sessionmaker"}


@dataclass(frozen=True, repr=False)
class Row(Printed):
    """A job that is there at the beginning.

    Attributes:
        state: the token of its state, or `null`.
        due: `none` (NULL, or long ago where NULL cannot be), `past` or `future`.
        rank: where it comes in the order.
        attempts: how often it has been claimed.
        lease: `none`, `past` or `future`.
        ended: whether the time of its end is set.
        bad: whether its extra column holds what cannot be read.
        identity: the polymorphic identity: `base`, `sub` or `ghost`, which no class has.
        hooked: whether the trigger acts on it.
        aged: whether it was last changed long ago.
        group: its exclusive key; None is NULL.
        tenant: its fair key; None is NULL.
    """

    state: str = "free"
    due: str = "none"
    rank: int | None = 0
    attempts: int = 0
    lease: str = "none"
    ended: bool = False
    bad: bool = False
    identity: str = "base"
    hooked: bool = False
    aged: bool = False
    group: int | None = None
    tenant: int | None = None


@dataclass(frozen=True, repr=False)
class Claim(Printed):
    """Claim rows, with what the arguments are called; `deletes` takes them by DELETE."""

    actor: Actor
    limit: int = 1
    lease: bool = False
    where: int | None = None
    backwards: bool = False
    note: bool = False
    worker: bool = False
    deletes: bool = False


@dataclass(frozen=True, repr=False)
class End(Printed):
    """End, extend or give back a claim, or one of its jobs.

    Attributes:
        how: `complete`, `fail`, `retry`, `retry now`, `release` or `extend`.
        error: the text; `kinds.NO_MESSAGE` is an exception without one.
    """

    actor: Actor
    how: str
    which: int = 0
    only_first: bool = False
    by_ticket: bool = False
    error: str | None = None


@dataclass(frozen=True, repr=False)
class Read(Printed):
    """Read the table in the actor's transaction."""

    actor: Actor


@dataclass(frozen=True, repr=False)
class Finish(Printed):
    """Commit or roll back the actor's transaction."""

    actor: Actor
    commits: bool = True


@dataclass(frozen=True, repr=False)
class Sweep(Printed):
    """Mark as failed what has spent its attempts."""

    actor: Actor


@dataclass(frozen=True, repr=False)
class Requeue(Printed):
    """Free failed jobs again."""

    actor: Actor
    limit: int | None = None
    where: int | None = None
    keep_error: bool = True


@dataclass(frozen=True, repr=False)
class Outside(Printed):
    """A change by an outside writer, to the row at a place: `expire`, `insert`, `delete`, `cancel`.

    Also `mark` (a legacy claim), `note` (a progress write) and `alter` (a column's type).
    """

    what: str
    place: int = 0


@dataclass(frozen=True, repr=False)
class Fault(Printed):
    """Something that happens during the actor's next call.

    `kill before` and `kill after` end its connection beside one of its statements, counted from
    nought; `pause` has the next step happen before that statement; `raise commit` and `raise load`
    have a listener raise.
    """

    actor: Actor
    what: str
    statement: int = 0


@dataclass(frozen=True, repr=False)
class Elsewhere(Printed):
    """A claim and its completion in another database with the same declaration."""

    limit: int = 2


Step = Claim | End | Read | Finish | Sweep | Requeue | Outside | Fault | Elsewhere


@dataclass(frozen=True, repr=False)
class Scenario(Printed):
    """One example.

    Attributes:
        mapping: `table`, `class`, `joined` or `single` inheritance, and what the class has more:
            `deferred`, `selectin`, `version`.
    """

    table: Table
    declaration: Declaration
    rows: tuple[Row, ...]
    steps: tuple[Step, ...]
    binds: tuple[Bind, Bind] = (Bind(), Bind())
    mapping: tuple[str, ...] = ("table",)

    def bind(self, actor: Actor) -> Bind:
        """Return an actor's bind."""
        return self.binds["ab".index(actor)]

    def has(self, kind: type[Any], **fields: Any) -> bool:
        """Return True if one of the steps is of a kind and has these fields."""
        return any(
            isinstance(step, kind) and all(getattr(step, k) == v for k, v in fields.items())
            for step in self.steps
        )
