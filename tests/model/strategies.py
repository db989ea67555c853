"""How scenarios are drawn: mostly what works, now and then something that does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from hypothesis import strategies as st

from tests.model.kinds import INNODB, KEYS, KINDS, NO_MESSAGE, STATES
from tests.model.scenario import (
    Actor,
    Bind,
    Claim,
    Column,
    Declaration,
    Elsewhere,
    End,
    Fault,
    Finish,
    Outside,
    Read,
    Requeue,
    Row,
    Scenario,
    Step,
    Sweep,
    Table,
)
from tests.model.world import NAME_OF, STYLES, UNFIT

# The kinds that a role's column has in most tables, and those that do not fit it.
FITTING: Final[dict[str, tuple[str, ...]]] = {
    "due": ("instant", "naive", "timestamp"),
    "lease": ("instant", "naive", "timestamp"),
    "worker": ("long string", "text", "short string"),
    "token": ("long string", "json text"),
    "attempts": ("integer", "small"),
    "error": ("text", "long string", "short string", "json"),
    "order": ("integer", "instant", "numeric"),
}
UNFITTING: Final[dict[str, tuple[str, ...]]] = {
    "due": ("text", "integer", "date"),
    "lease": ("long string", "date"),
    "worker": ("integer", "uuid", "json", "array"),
    "token": ("short string", "integer", "uuid"),
    "attempts": ("long string", "boolean"),
    "error": ("boolean", "array", "integer"),
    "order": ("long string",),
}
EXTRAS: Final = (
    "integer",
    "instant",
    "naive",
    "date",
    "json",
    "json text",
    "member",
    "uuid text",
    "numeric",
)
ERRORS: Final = (
    None,
    "it failed",
    "",
    "nul \x00 byte",
    "half \ud800 pair",
    "long " * 4000,
    "\U0001f4a5",
    "\U0001f4a5" * 20_000,
    NO_MESSAGE,
)
TENANTS: Final = ("integer", "long string", "uuid", "date")
GROUPS: Final = ("integer", "long string", "uuid", "boolean", "date")
NO_KEYS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {}
SPOILS: Final = ("role", "role", "same", "free", "claimed", "done", "failed", "attempts")
ROLES: Final = ("due", "lease", "worker", "token", "attempts", "error")


def sometimes(draw: Any, of: int = 6) -> bool:
    """Return True once in a while; it shrinks to False."""
    return bool(draw(st.integers(0, of - 1)) == of - 1)


def chosen(draw: Any, names: Any, database: str) -> str:
    """Return the name of a kind that the database has."""
    return str(draw(st.sampled_from([name for name in names if database in KINDS[name].on])))


@st.composite
def tables(
    draw: Any, database: str, shared: Mapping[str, tuple[str, tuple[str, ...]]] = NO_KEYS
) -> tuple[Table, Declaration]:
    """Return a table, and the declaration that fits it.

    Args:
        draw: draws values.
        database: the kind of database.
        shared: the label and the kinds of the column of each role whose values rows share.
    """
    state_kind = chosen(draw, STATES, database)
    in_key = state_kind in {"status", "char", "number", "flag"} and sometimes(draw, 12)
    keys = tuple(
        Column(f"key{n}", chosen(draw, KEYS, database), nullable=False)
        for n in range(draw(st.sampled_from([1, 1, 1, 2, 3])))
    )
    nullable = state_kind == "time state" or (not in_key and sometimes(draw))
    state = Column("state", state_kind, nullable=nullable)
    others: list[Column] = []
    roles: dict[str, str] = {"state": "state"}
    leases = draw(st.booleans())
    for role in ROLES:
        if not (leases and role in {"lease", "token"}) and not draw(st.booleans()):
            continue
        fits = not sometimes(draw, 16)
        kind = chosen(draw, (FITTING if fits else UNFITTING)[role], database)
        moved = (
            role == "lease" and kind == "timestamp" and database in INNODB and sometimes(draw, 3)
        )
        nullable = not moved and not sometimes(draw, 8)
        others.append(Column(role, kind, nullable=nullable, moved=moved))
        if fits or sometimes(draw, 3):
            roles[role] = role
    order: tuple[tuple[str, bool], ...] = ()
    if draw(st.booleans()):
        others.append(
            Column("order", chosen(draw, FITTING["order"], database), draw(st.booleans()))
        )
        order = (("order", draw(st.booleans())), ("ident", draw(st.booleans())))
    tokens = STATES[state_kind].tokens
    done, failed = [], []
    if "done" in tokens and draw(st.booleans()):
        done, failed = ["done"], ["failed"]
    if not done or sometimes(draw):
        others.append(Column("done_at", draw(st.sampled_from(FITTING["due"]))))
        done.append("done_at")
    if not failed:
        others.append(Column("failed_at", "naive"))
        failed.append("failed_at")
    if draw(st.booleans()):
        others.append(Column("extra", chosen(draw, EXTRAS, database), draw(st.booleans())))
    free = ("free", "retry") if "retry" in tokens and sometimes(draw) else ("free",)
    if state.nullable and state_kind != "time state" and sometimes(draw, 4):
        free = (*free, "null")
    if unleased := leases and {"lease", "token"} <= roles.keys() and sometimes(draw, 3):
        others.append(Column("stamp", "instant", nullable=False))
        roles["stamps"] = "stamp"
    for role, (label, kinds) in shared.items():
        others.append(Column(label, draw(st.sampled_from(kinds))))
        roles[role] = label
    fits = dict.fromkeys(roles.values(), True)
    schema = database != "sqlite" and sometimes(draw, 8)
    table = Table(
        keys=keys,
        state=state,
        others=tuple(others),
        state_in_key=in_key,
        names=draw(st.sampled_from(["plain", *STYLES])),
        schema=schema,
        partitioned=in_key and database == "postgresql" and draw(st.booleans()),
        trigger=None if schema else draw(st.sampled_from([None] * 12 + _triggers(database))),
        index=draw(st.sampled_from([None, None, "state", "state"])),
    )
    if "claimed" in tokens and database not in INNODB and not in_key and sometimes(draw, 20):
        table = Table(**vars(table) | {"index": "one"})
    declaration = Declaration(
        roles=tuple(roles.items()),
        free=free,
        done=tuple(done),
        failed=tuple(failed),
        order=order,
        max_attempts=draw(st.sampled_from([None, 2, 3])) if "attempts" in fits else None,
        unleased=unleased,
        max_per_key=draw(st.sampled_from([1, 1, 2])) if "exclusive_by" in shared else 1,
        coherent=all(
            _kind(table, label) in (*FITTING.get(role, ()), state_kind)
            or role in {"stamps", *shared}
            for role, label in roles.items()
        ),
    )
    return table, declaration


def _triggers(database: str) -> list[str]:
    if database == "sqlite":
        return ["touch", "veto", "refuse"]
    return ["touch", "refuse", "rewrite", *(["veto"] if database == "postgresql" else [])]


def _kind(table: Table, label: str) -> str:
    column = table.column(label)
    return column.kind if column is not None else ""


@st.composite
def spoiled(draw: Any, table: Table, said: Declaration) -> Declaration:
    """Return the declaration with one or two of its arguments changed to something else."""
    fields: dict[str, Any] = dict(vars(said))
    tokens = [*STATES[table.state.kind].tokens, "null"]
    # Not what the model could not know the meaning of.
    labels = [column.label for column in table.columns if column.label not in {"order", "extra"}]
    tokens += [*UNFIT, *(NAME_OF + label for label in labels)]
    for _ in range(draw(st.integers(1, 2))):
        match draw(st.sampled_from(SPOILS)):
            case "role":
                role = draw(st.sampled_from(ROLES))
                roles = dict(fields["roles"]) | {role: draw(st.sampled_from(labels))}
                fields["roles"] = tuple(roles.items())
            case "same":
                fields["claimed"] = fields["free"][0]
            case "free":
                fields["free"] = tuple(
                    draw(st.lists(st.sampled_from(tokens), min_size=1, max_size=3))
                )
            case "claimed":
                fields["claimed"] = draw(st.sampled_from(tokens))
            case "done" | "failed" as end:
                fields[end] = (draw(st.sampled_from(tokens)),)
            case "attempts":
                fields["max_attempts"] = draw(st.sampled_from([1, 40_000, 2**31, 2**70]))
    return Declaration(**fields | {"coherent": False})


@st.composite
def inferred(draw: Any, database: str) -> tuple[Table, Declaration]:
    """Return a table with conventional names, of types that fit them or do not."""
    state = draw(st.sampled_from(["flag", "inverted flag", "time state"]))
    others = [
        Column("done_at", draw(st.sampled_from(FITTING["due"]))),
        Column("failed_at", "naive"),
        Column("order", "naive", nullable=False),
    ]
    roles = {"state": "state"}
    for role in ROLES:
        if not draw(st.booleans()):
            continue
        fits = draw(st.booleans())
        kind = chosen(draw, (FITTING if fits else UNFITTING)[role], database)
        others.append(Column(role, kind, nullable=not sometimes(draw)))
        if fits:
            roles[role] = role
    table = Table(
        (Column("key0", "integer", nullable=False),),
        Column("state", state, nullable=state == "time state"),
        tuple(others),
        names="conventional",
    )
    said = Declaration(
        inferred=True,
        roles=tuple(roles.items()),
        done=("done_at",),
        failed=("failed_at",),
        order=(("order", False),),
    )
    return table, said


@st.composite
def binds(draw: Any, database: str, *, mapped: bool, own: bool = False) -> Bind:
    """Return a bind."""
    kinds = ["engine", "engine", "session", "sessionmaker", "connection", "scoped_session"]
    kind = draw(st.sampled_from(["engine", "sessionmaker"] if own else kinds))
    levels = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT", "AUTOCOMMIT"]
    if database == "sqlite":
        levels = ["SERIALIZABLE", "AUTOCOMMIT"]
    on_loop = sometimes(draw, 5)
    is_session = kind in {"session", "sessionmaker", "scoped_session"}
    events = ["begin", "commit", "before_cursor_execute"]
    isolation = draw(st.sampled_from([None, None, *levels]))
    events += ["recipe"] if database == "sqlite" and not (on_loop or isolation) else []
    events += ["do_orm_execute", "do_orm_execute", "after_begin"] if is_session else []
    routing = None
    if is_session and sometimes(draw, 3):
        routing = draw(st.sampled_from(["routed", "by mapper", *(["binds"] if mapped else [])]))
    return Bind(
        kind=kind,
        on_loop=on_loop,
        isolation=isolation,
        isolated_by=draw(st.sampled_from(["engine", "option"])),
        pool=draw(st.sampled_from(["default", "queue", "null"])),
        listeners=tuple(draw(st.lists(st.sampled_from(events), max_size=3, unique=True))),
        routing=routing,
        prepares=database == "postgresql" and not on_loop and draw(st.booleans()),
    )


@st.composite
def rows(
    draw: Any, table: Table, said: Declaration, mapping: tuple[str, ...], database: str
) -> Row:
    """Return a row; most are free."""
    tokens = STATES[table.state.kind].tokens
    others = [*tokens, *(["null"] if table.state.nullable and None not in tokens.values() else [])]
    state = draw(st.sampled_from(others)) if sometimes(draw, 4) else "free"
    extra = table.column("extra")
    spoils = extra is not None and database in KINDS[extra.kind].bad
    identities = {"joined": ("base", "sub"), "single": ("base", "sub")}.get(mapping[0], ("base",))
    return Row(
        state=state,
        due=draw(st.sampled_from(["none", "none", "past", "future"])),
        rank=draw(st.sampled_from([0, 0, 1, 2, None])),
        attempts=draw(st.sampled_from([0, 0, 0, 1, 2])),
        lease=draw(st.sampled_from(["none", "past", "future"])) if state == "claimed" else "none",
        ended="done_at" in said.done and sometimes(draw, 8),
        bad=spoils and sometimes(draw, 12),
        identity="ghost"
        if len(identities) > 1 and sometimes(draw, 12)
        else draw(st.sampled_from(identities)),
        hooked=table.trigger is not None and sometimes(draw, 3),
        aged=said.unleased and draw(st.booleans()),
        group=draw(st.sampled_from([0, 0, 0, 1, None])) if said.label("exclusive_by") else None,
        tenant=draw(st.sampled_from([0, 0, 0, 1, 2, None])) if said.label("fair_by") else None,
    )


class Steps:
    """Draws steps that fit a declaration and the binds of the actors."""

    def __init__(
        self,
        draw: Any,
        database: str,
        said: Declaration,
        binds: tuple[Bind, Bind],
        *,
        deletes: bool,
    ) -> None:
        self.draw = draw
        self.database = database
        self.said = said
        self.binds = binds
        self.deletes = deletes
        self.leases = said.label("lease") is not None and said.label("token") is not None

    def some(self, *, other: bool) -> list[Step]:
        """Return a step, or a few that belong together."""
        actor: Actor = self.draw(st.sampled_from(["a", "b"]))
        partner: Actor = "b" if actor == "a" else "a"
        bind = self.binds["ab".index(actor)]
        statement = self.draw(st.sampled_from([0, 1, 1, 1, 2, 2, 3, 4]))
        match self.draw(st.sampled_from(self._kinds(bind, other=other))):
            case "claim":
                return [self.claim(actor)]
            case "end":
                return [self.end(actor)]
            case "finish":
                return [Finish(actor, commits=self.draw(st.booleans()))]
            case "read":
                return [Read(actor)]
            case "sweep":
                return [Sweep(actor)]
            case "retries":
                return self.retries(actor)
            case "elsewhere":
                return [Elsewhere(self.draw(st.sampled_from([1, 2])))]
            case "again":
                return [self.claim(actor)] * self.draw(st.integers(2, 4))
            case "expire":
                # A lease runs out, another worker comes, and the first one is late.
                first = Claim(actor, self.draw(st.sampled_from([1, 2, 3])), lease=True)
                what = self.draw(st.sampled_from(["expire", "expire", "note"]))
                second = Claim(partner, 30, lease=self.draw(st.booleans()))
                return [first, Finish(actor), Outside(what), second, self.end(actor)]
            case "raise commit" | "raise load" as what:
                return [Fault(actor, what), self.claim(actor)]
            case "kill":
                what = self.draw(st.sampled_from(["kill before", "kill after"]))
                return [Fault(actor, what, statement), self.call(actor), self.claim(partner)]
            case "pause":
                # Between two statements of one actor's call there is a call of the other's.
                return [Fault(actor, "pause", statement), self.call(actor), self.call(partner)]
        what = ["expire", "insert", "delete", "cancel", "mark", "note", "alter"]
        return [Outside(self.draw(st.sampled_from(what)), self.draw(st.integers(0, 3)))]

    def _kinds(self, bind: Bind, *, other: bool) -> list[str]:
        """Return what may be drawn, the more often the more it has found."""
        kinds = ["claim"] * 5 + ["end"] * 3 + ["finish", "finish", "outside", "outside", "read"]
        kinds += ["again"] * 2 + ["pause"] * 4
        if self.said.max_attempts is not None:
            kinds += ["sweep", "sweep"] + ["retries"] * 3
        if self.said.failed:
            kinds += ["retries", "retries"]
        if other:
            kinds += ["elsewhere"]
        if self.leases:
            kinds += ["expire"] * 6
        if not bind.on_loop:
            kinds += ["raise commit"] * bind.is_own + ["raise load"] * bind.is_session
            kinds += ["kill"] * 2 * (self.database != "sqlite")
        return kinds

    def call(self, actor: Actor) -> Step:
        """Return a call of an actor."""
        return self.end(actor) if sometimes(self.draw, 3) else self.claim(actor)

    def retries(self, actor: Actor) -> list[Step]:
        """Return attempts, until none is left perhaps, and what becomes of the job then."""
        how = "retry now" if self.said.label("due") else "release"
        error = self.draw(st.sampled_from(ERRORS)) if self.said.label("error") else None
        once = [Claim(actor), End(actor, how, error=error), Finish(actor)]
        last = self.draw(st.sampled_from([Sweep(actor), Outside("expire"), self.requeue(actor)]))
        return [*once * self.draw(st.sampled_from([0, 0, 1, 2, 3])), last]

    def requeue(self, actor: Actor) -> Requeue:
        """Return a requeue."""
        draw = self.draw
        return Requeue(
            actor,
            limit=draw(st.sampled_from([None, None, 1, 2])),
            where=draw(st.sampled_from([None, None, 2])),
            keep_error=draw(st.booleans()),
        )

    def claim(self, actor: Actor) -> Claim:
        """Return a claim."""
        draw = self.draw
        on_loop = self.binds["ab".index(actor)].on_loop
        if self.deletes and not on_loop and sometimes(draw, 12):
            return Claim(actor, limit=draw(st.sampled_from([1, 2])), deletes=True)
        return Claim(
            actor,
            limit=draw(st.sampled_from([1, 2, 3, 30])),
            lease=self.leases and draw(st.booleans()),
            where=draw(st.sampled_from([None, None, None, 2])),
            backwards=sometimes(draw, 8),
            note=sometimes(draw, 8),
            worker=self.said.label("worker") is not None and draw(st.booleans()),
        )

    def end(self, actor: Actor) -> End:
        """Return the end of a claim, or its extension."""
        draw, said = self.draw, self.said
        how = ["complete", "fail", "release"]
        how += ["retry", "retry now"] if said.label("due") else []
        how += ["extend"] if self.leases else []
        return End(
            actor,
            draw(st.sampled_from(how)),
            which=draw(st.integers(0, 2)),
            only_first=draw(st.booleans()),
            by_ticket=said.label("token") is not None and sometimes(draw, 3),
            error=draw(st.sampled_from(ERRORS)) if said.label("error") else None,
        )


@st.composite
def steps(
    draw: Any,
    database: str,
    said: Declaration,
    binds: tuple[Bind, Bind],
    *,
    other: bool,
    deletes: bool,
) -> list[Step]:
    """Return steps that belong together."""
    return Steps(draw, database, said, binds, deletes=deletes).some(other=other)


@st.composite
def scenarios(draw: Any, database: str) -> Scenario:
    """Return a scenario for a database."""
    exclusive = False
    if sometimes(draw, 8):
        table, said = draw(inferred(database))
    else:
        exclusive = sometimes(draw)
        shared = {"exclusive_by": ("group", GROUPS)} if exclusive else {}
        shared |= {"fair_by": ("tenant", TENANTS)} if sometimes(draw, 4) else {}
        table, said = draw(tables(database, shared))
        if sometimes(draw, 6):
            said = draw(spoiled(table, said))
    mapping: tuple[str, ...] = (
        draw(st.sampled_from(["table", "class", "class", "joined", "single"])),
    )
    single_key = len(table.keys) == 1 and not table.state_in_key
    if mapping[0] == "joined" and (not single_key or table.schema):
        mapping = ("class",)
    if mapping[0] != "table":
        more = ["deferred", "version", *(["selectin"] if single_key and not table.schema else [])]
        mapping += tuple(draw(st.lists(st.sampled_from(more), max_size=2, unique=True)))
    mapped = mapping[0] != "table"
    bind = binds(database, mapped=mapped, own=exclusive)
    two = (draw(bind), draw(bind))
    generic = not table.schema and all(
        "sqlite" in KINDS[column.kind].on and not column.moved for column in table.columns
    )
    # Rows that others refer to cannot be deleted.
    alone = mapping[0] != "joined" and "selectin" not in mapping and not exclusive
    some = steps(database, said, two, other=generic, deletes=alone)
    return Scenario(
        table=table,
        declaration=said,
        rows=tuple(draw(st.lists(rows(table, said, mapping, database), min_size=1, max_size=6))),
        steps=tuple(
            step for together in draw(st.lists(some, min_size=1, max_size=8)) for step in together
        ),
        binds=two,
        mapping=mapping,
    )


@st.composite
def incoherent(draw: Any, database: str) -> Scenario:
    """Return a scenario whose declaration does not mean what its rows mean, claimed twice."""
    table, said = draw(tables(database))
    said = draw(spoiled(table, said))
    mapping = (draw(st.sampled_from(["table", "class"])),)
    lease = {"lease", "token"} <= dict(said.roles).keys() and draw(st.booleans())
    some = st.lists(rows(table, said, mapping, database), min_size=1, max_size=3)
    ends = st.sampled_from(["complete", "fail", "release", "retry now"])
    return Scenario(
        table=table,
        declaration=said,
        rows=tuple(draw(some)),
        steps=(
            Claim("a", 30, lease=lease),
            Claim("b", 30, lease=lease),
            End("a", draw(ends), only_first=draw(st.booleans())),
            Claim("b", 30),
        ),
        mapping=mapping,
    )


@st.composite
def turns(draw: Any, database: str) -> Scenario:
    """Return a scenario of claims that take turns, mostly of a few rows each.

    Nothing else is in their way, so that the model knows where each turn begins.
    """
    roles = {"state": "state", "fair_by": "tenant"}
    others = [Column("tenant", draw(st.sampled_from(TENANTS)))]
    if exclusive := sometimes(draw):
        roles["exclusive_by"] = "group"
        others.append(Column("group", draw(st.sampled_from(GROUPS))))
    if draw(st.booleans()):
        roles |= {role: role for role in ("lease", "token", "attempts")}
        others += [Column("lease", "naive"), Column("token", "long string")]
        others.append(Column("attempts", "integer"))
    state = draw(st.sampled_from(["status", "status", "time state"]))
    table = Table(
        keys=(Column("key0", chosen(draw, KEYS, database), nullable=False),),
        state=Column("state", state, nullable=state == "time state"),
        others=(*others, Column("order", "integer"), Column("done_at", "naive")),
    )
    said = Declaration(
        roles=tuple(roles.items()),
        done=("done_at",),
        order=draw(st.sampled_from([(), (("order", False), ("ident", True))])),
        max_attempts=2 if "attempts" in roles and draw(st.booleans()) else None,
    )
    mapping = (draw(st.sampled_from(["table", "class", "joined"])),)
    bind = binds(database, mapped=mapping[0] != "table", own=exclusive)
    bind = bind.filter(lambda each: each.isolation != "AUTOCOMMIT")
    actors = st.sampled_from([*"aaa", "b"])
    claims = st.builds(
        Claim,
        actor=actors,
        limit=st.sampled_from([1, 1, 1, 2, 3, 30]),
        where=st.sampled_from([None, None, None, 2]),
        lease=st.booleans() if "lease" in roles else st.just(False),
    )
    ends = st.builds(End, actor=actors, how=st.sampled_from(["release", "complete"]))
    outside = st.builds(Outside, st.just("expire"), st.integers(0, 3))
    finish = st.builds(Finish, actor=actors, commits=st.booleans())
    some = st.lists(rows(table, said, mapping, database), min_size=5, max_size=8)
    steps = st.lists(claims | claims | ends | outside | finish, max_size=5)
    few = Claim("a", limit=draw(st.sampled_from([1, 1, 2])))
    return Scenario(
        table=table,
        declaration=said,
        rows=tuple(draw(some)),
        steps=(few, *draw(steps), few, few),
        binds=(draw(bind), draw(bind)),
        mapping=mapping,
    )
