"""Runs a scenario: each actor in a thread of its own, and a check of the table after each step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError

from tests.model import adapter
from tests.model.kinds import INNODB, KINDS, error_text
from tests.model.model import Job, Model
from tests.model.scenario import (
    Actor,
    Bind,
    Claim,
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
)
from tests.model.world import HOUR, HookError, Places, Player, World, is_time, make_engine, moment

PATIENCE: Final = 60
KILLS: Final = ("kill before", "kill after")
RAISES: Final = ("raise commit", "raise load")
SNAPSHOTS: Final = {"REPEATABLE READ", "SERIALIZABLE"}


class Violation(AssertionError):
    """The library did what the model does not allow."""


def run(scenario: Scenario, places: Places) -> None:
    """Run a scenario, and compare each step with the model.

    Raises:
        Violation: a step did something else.
    """
    with narrow(scenario), World(scenario, places) as world:
        Run(world).all_steps()


@contextmanager
def narrow(scenario: Scenario) -> Iterator[None]:
    """Let searches look at few rows first, so that small tables have rows behind those.

    Rows whose lease is over come in claim order only as far as the margin reaches.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atomic_claim.candidates.RIPE", 2)
        patch.setattr("atomic_claim.backends.fair.AHEAD", 2)
        patch.setattr("atomic_claim.backends.mysql.WINDOW", 1)
        if "lease" not in dict(scenario.declaration.roles):
            for module in ("plan", "backends.by_key", "backends.fair"):
                patch.setattr(f"atomic_claim.{module}.MARGIN", 0)
        yield


def excuse(scenario: Scenario, database: str) -> str | None:
    """Return why the library may refuse a scenario's calls, or None if it may not."""
    said, table = scenario.declaration, scenario.table
    by_role = {role: table.column(label) for role, label in said.roles}
    strict = [
        role
        for role in ("worker", "token", "lease", "error", "due")
        if (column := by_role.get(role)) is not None and not column.nullable
    ]
    reasons = {
        "an incoherent declaration": not said.coherent,
        "names in doubt": said.inferred,
        "the state in the key": table.state_in_key,
        "a trigger in the way": table.trigger in {"veto", "refuse", "rewrite"},
        "one running row": table.index == "one",
        "columns that cannot be NULL": bool(strict),
        "columns that the server moves": any(column.moved for column in table.columns),
        "rows that cannot be read": any(r.bad or r.identity == "ghost" for r in scenario.rows),
        "AUTOCOMMIT": any(bind.isolation == "AUTOCOMMIT" for bind in scenario.binds),
        "SERIALIZABLE": database in INNODB
        and any(bind.isolation == "SERIALIZABLE" for bind in scenario.binds),
        "a snapshot beside exclusive keys": database == "postgresql"
        and "exclusive_by" in by_role
        and any(bind.isolation in SNAPSHOTS for bind in scenario.binds),
        "an order that may be NULL": said.inferred and not said.order,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@dataclass
class Waiting:
    """A call that waits for a lock, and what is to be made of its result."""

    future: Future[Any]
    judge: Callable[[Future[Any]], None]


@dataclass
class Run:
    """A scenario that is running."""

    world: World
    model: Model = field(init=False)
    table: Any = field(init=False)
    claims: list[tuple[Claim, adapter.Handed]] = field(default_factory=list)
    open: set[Actor] = field(default_factory=set)
    waiting: dict[Actor, Waiting] = field(default_factory=dict)
    paused: dict[Actor, Waiting] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scenario = self.world.scenario
        self.places = self.world.places
        self.model = Model(self.scenario, self.places.name)
        self.excuse = excuse(self.scenario, self.places.name)
        self.before = self.world.snapshot()

    def fail(self, problem: str, error: BaseException | None = None) -> None:
        """Raise a violation with what happened before."""
        said = "\n".join([problem, *self.log])
        raise Violation(said) from error

    # The steps.

    def all_steps(self) -> None:
        """Declare the table, run all steps, and drain it."""
        try:
            self.table = adapter.declare(self.scenario, self.world.schema)
        except adapter.REFUSAL as error:
            self._judge_refusal("declare", error)
            return
        except Exception as error:  # noqa: BLE001 - it is the violation
            self.fail(f"declare: a raw error: {error!r}", error)
        self.world.open()
        for step in self.scenario.steps:
            self._step(step)
            self._check(repr(step))
        for actor in ("a", "b"):
            self._step(Finish(actor, commits=True))  # type: ignore[arg-type]
        for actor in ("a", "b"):
            self._step(Finish(actor, commits=True))  # type: ignore[arg-type]
        self._check("the end")
        if self.excuse is None:
            self._drain()

    def _step(self, step: Step) -> None:
        """Take a step, and let go on what paused for it."""
        paused = list(self.paused)
        self._take(step)
        for actor in paused:
            call = self.paused.pop(actor)
            self.world.players[actor].resume()
            self.log.append(f"    ({actor} goes on)")
            self._settle(actor, call)
        for actor, call in list(self.waiting.items()):
            del self.waiting[actor]
            self._settle(actor, call)

    def _take(self, step: Step) -> None:
        self.log.append(f"  {step}")
        match step:
            case Claim():
                self._call(
                    step.actor,
                    lambda player: adapter.claim(player, self.world.schema, self.table, step),
                    partial(self._judge_claim, step),
                )
            case End():
                self._end(step)
            case Sweep():
                self._call(
                    step.actor,
                    lambda player: adapter.sweep(player, self.table),
                    partial(self._judge_sweep, step),
                )
            case Requeue():
                self._call(
                    step.actor,
                    lambda player: adapter.requeue(player, self.world.schema, self.table, step),
                    partial(self._judge_requeue, step),
                )
            case Read():
                if not self.scenario.bind(step.actor).is_own:
                    self._call(step.actor, lambda player: player.read(), self._judge_read)
            case Finish():
                self._finish(step)
            case Outside():
                self._outside(step)
            case Fault():
                self.world.players[step.actor].armed = {step.what: step.statement}
            case Elsewhere():
                self._elsewhere(step)

    def _call(
        self, actor: Actor, call: Callable[[Player], Any], judge: Callable[[Future[Any]], None]
    ) -> None:
        """Have an actor do something, and judge it now or once its lock is there."""
        if actor in self.waiting or actor in self.paused:
            self.log.append("    (left out: the actor's call is not over)")
            return
        player = self.world.players[actor]
        self.open.add(actor)
        self._settle(actor, Waiting(player.do(lambda: call(player)), judge))

    def _settle(self, actor: Actor, call: Waiting) -> None:
        """Wait until a call is over, pauses, or waits for a lock by the server's own word."""
        player = self.world.players[actor]
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                call.future.exception(timeout=0.02)
            except TimeoutError:
                if player.paused.is_set():
                    self.log.append("    (pauses)")
                    self.paused[actor] = call
                    return
                if self.places.waiting() > len(self.waiting):
                    self.log.append("    (waits for a lock)")
                    self.waiting[actor] = call
                    return
            else:
                player.armed = {}
                call.judge(call.future)
                if player.killed and not self.scenario.bind(actor).is_own:
                    # Its transaction is gone, though the call may have ended well before.
                    self._roll_back(actor)
                player.killed = False
                return
        self.fail(f"a call hangs for {PATIENCE} s, and waits for no lock")

    def _judge_read(self, future: Future[Any]) -> None:
        if (error := future.exception()) is not None:
            self.log.append(f"    ({error!r:.120})")

    def _finish(self, step: Finish) -> None:
        if step.actor in self.waiting or step.actor in self.paused:
            return
        player = self.world.players[step.actor]
        try:
            player.do(lambda: player.finish(commits=step.commits)).result(PATIENCE)
        except (HookError, DBAPIError) as error:
            # A listener that raises, or a busy SQLite file.
            self.log.append(f"    ({error!r:.80})")
            self._roll_back(step.actor)
        else:
            self.model.finish(step.actor, commits=step.commits)
            self.open.discard(step.actor)
        player.armed = {}

    def _roll_back(self, actor: Actor) -> None:
        player = self.world.players[actor]
        player.do(lambda: player.finish(commits=False)).result(PATIENCE)
        self.model.finish(actor, commits=False)
        self.open.discard(actor)

    def _end(self, step: End) -> None:
        mine = [
            (n, c, h) for n, (c, h) in enumerate(self.claims) if c.actor == step.actor and h.idents
        ]
        if not mine:
            return
        number, _, owned = mine[step.which % len(mine)]
        if step.by_ticket and owned.token is None:
            return
        self._call(
            step.actor,
            lambda player: adapter.end(player, step, owned),
            partial(self._judge_end, step, number, owned),
        )

    def _elsewhere(self, step: Elsewhere) -> None:
        player = self.world.players["a"]
        with self.world.other(3) as engine:
            call = partial(
                adapter.claim,
                player,
                self.world.schema,
                self.table,
                Claim("a", step.limit),
                bind=engine,
            )
            try:
                handed = player.do(call).result(PATIENCE)
            except adapter.REFUSAL as error:
                self._judge_refusal("elsewhere", error)
                return
            except Exception as error:  # noqa: BLE001 - it is the violation
                self.fail(f"elsewhere: a raw error: {error!r}", error)
            if self.excuse is None and len(handed.idents) != min(3, step.limit):
                self.fail(f"elsewhere: {handed.idents} at a limit of {step.limit} of 3")

    def _outside(self, step: Outside) -> None:
        """Change a row that no actor has in hand."""
        if self.places.name == "sqlite" and self.open:
            return
        try:
            self._change(step)
        except OperationalError as error:
            self.log.append(f"    (left out: {error.orig})")

    def _change(self, step: Outside) -> None:
        def pick(*states: str, lease: str | None = None) -> int | None:
            found = [
                ident
                for ident, job in self.model.committed.items()
                if (not states or job.state in states)
                and (lease is None or job.lease == lease)
                and not any(ident in changed for changed in self.model.changed.values())
                # A trigger would act on the write, too.
                and not self._is_hooked(ident)
            ]
            return found[step.place % len(found)] if found else None

        tokens = KINDS[self.scenario.table.state.kind].tokens
        column = self.scenario.table.column("lease")
        if step.what == "insert":
            ident = max(self.before, default=0) + 1
            with self.places.watch.connect() as connection:
                self.world.schema.insert(connection, ident, Row())
            self.model.insert(ident, Row())
        elif step.what == "expire" and column is not None and is_time(column.kind):
            if (ident := pick("running", lease="lasts")) is not None:
                self.world.write(ident, lease=moment(column.kind, -HOUR))
                self.model.change(ident, lease="over")
        elif step.what == "mark" and tokens["claimed"] != "NOW":
            if (ident := pick("free")) is not None:
                self.world.write(ident, state=tokens["claimed"])
                is_old = self.model.committed[ident].aged and self.scenario.declaration.unleased
                lease = "over" if is_old else "none"
                self.model.change(ident, state="running", token="claimed", owner=None, lease=lease)
        elif step.what == "cancel" and "paused" in tokens:
            if (ident := pick("free", "running")) is not None:
                self.world.write(ident, state=tokens["paused"])
                self.model.change(ident, state="other", token="paused", owner=None)
        elif step.what == "note":
            if (ident := pick("running")) is not None:
                self.world.write(ident, note="progress")
                self.model.change(ident, claimed_note=False)
                self.before[ident]["note"] = "progress"
        elif step.what == "delete":
            if (ident := pick("free", "ended")) is not None:
                self._delete(ident)
        elif step.what == "alter" and not self.open - {
            actor for actor in self.open if self.model.is_immediate(actor)
        }:
            self._alter()
        self.before = {
            n: row for n, row in self.world.snapshot().items() if n not in self.before
        } | {n: row for n, row in self.before.items() if n in self.model.committed}

    def _is_hooked(self, ident: int) -> bool:
        """Return True if a trigger stops or rewrites the changes of a job that is there first."""
        rows = self.scenario.rows
        is_first = ident <= len(rows) and rows[ident - 1].hooked
        return is_first and self.scenario.table.trigger != "touch"

    def _delete(self, ident: int) -> None:
        schema = self.world.schema
        with self.places.watch.connect() as connection:
            for child in (schema.lines, schema.subs):
                if child is not None:
                    (key,) = schema.key
                    job = sa.select(key).where(schema.columns["ident"] == ident).scalar_subquery()
                    connection.execute(sa.delete(child).where(child.c.job == job))
            connection.execute(sa.delete(schema.table).where(schema.columns["ident"] == ident))
        del self.model.committed[ident]

    def _alter(self) -> None:
        with self.places.watch.connect() as connection:
            quote = connection.dialect.identifier_preparer
            table = quote.format_table(self.world.schema.table)
            column = quote.quote(self.world.schema.columns["note"].name)
            how = {
                "postgresql": f"ALTER COLUMN {column} TYPE text",
                "sqlite": "ADD COLUMN later INTEGER",
            }.get(self.places.name, f"MODIFY COLUMN {column} VARCHAR(60)")
            statement = f"ALTER TABLE {table} {how}"
            if "later" not in {
                c["name"]
                for c in sa.inspect(connection).get_columns(
                    self.world.schema.table.name, schema=self.world.schema.table.schema
                )
            }:
                connection.exec_driver_sql(statement)

    # What came of them.

    def _is_contended(self, actor: Actor) -> bool:
        """Return True if the database may ask the actor to try again."""
        if self.scenario.bind(actor).isolation in SNAPSHOTS or self.scenario.has(
            Fault, what="pause"
        ):
            return True
        return bool(self.open - {actor}) or (
            self.places.name in INNODB and not self.model.is_immediate(actor)
        )

    def _judge_error(self, actor: Actor, what: str, error: BaseException, *, role: bool) -> None:
        """Accept a refusal, a conflict or what was brought about; anything else is a violation.

        `role`: the table lacks a column or value that the call needs, so it may be refused.
        """
        kills = any(self.scenario.has(Fault, actor=actor, what=what) for what in KILLS)
        armed = kills or any(self.scenario.has(Fault, actor=actor, what=what) for what in RAISES)
        self.log.append(f"    ({type(error).__name__}: {str(error).splitlines()[0]:.120})")
        if isinstance(error, adapter.CONFLICT):
            if not (self._is_contended(actor) or armed):
                self.fail(f"{what}: a conflict with nobody: {error}", error)
        elif isinstance(error, adapter.REFUSAL):
            if not role:
                self._judge_refusal(what, error)
        elif isinstance(error, HookError):
            if not armed:
                self.fail(f"{what}: {error!r}", error)
        elif not (kills and is_lost(error)) and not self._is_refused(actor, error):
            self.fail(f"{what}: a raw error: {error!r:.400}", error)
        self.world.players[actor].armed = {}
        self._roll_back(actor)
        if kills and self.scenario.declaration.label("token") is None:
            self._accept_unknown()

    def _is_refused(self, actor: Actor, error: BaseException) -> bool:
        """Return True if the table's own trigger or index refused a change, and may tell so."""
        table = self.scenario.table
        refuses = table.trigger == "refuse" or table.index == "one"
        is_own = self.scenario.bind(actor).is_own
        return refuses and not is_own and isinstance(error, DBAPIError)

    def _accept_unknown(self) -> None:
        """Take in what an unknown outcome has left, where no token tells whose it is."""
        for ident, row in self.world.snapshot().items():
            job = self.model.committed[ident]
            if row["state"] != self.world.texts.get(job.token or "", row["state"]):
                self.model.change(ident, state="other", token=None)

    def _judge_refusal(self, what: str, error: BaseException) -> None:
        if self.excuse is None:
            self.fail(f"{what}: refused without a reason: {error!r}", error)
        said = str(error)
        names = [column.name for column in self.world.schema.columns.values()]
        names += [self.world.schema.table.name, "AUTOCOMMIT", "SERIALIZABLE", "transaction"]
        names += [f"{role}=" for role in ("free", "claimed", "done", "failed", "attempts")]
        if not any(each in said or repr(each)[1:-1] in said for each in names):
            self.fail(f"{what}: the refusal names neither a column nor a bind: {error!r}", error)

    def _judge_claim(self, step: Claim, future: Future[Any]) -> None:
        said, bind = self.scenario.declaration, self.scenario.bind(step.actor)
        if (error := future.exception()) is not None:
            lacks = step.lease and None in {said.label("lease"), said.label("token")}
            lacks = lacks or (step.worker and said.label("worker") is None)
            self._judge_error(step.actor, "claim", error, role=lacks)
            self.model.lost_turns.add(step.actor)
            return
        handed: adapter.Handed = future.result()
        self.log.append(f"    -> {handed.idents}")
        problems = self.model.claim(
            step.actor, step, handed.idents, len(self.claims), exact=self._is_exact(step)
        )
        if problems:
            self.fail("claim: " + "; ".join(problems))
        has_token = said.label("token") is not None and not step.deletes
        if has_token and handed.idents and handed.token is None:
            self.fail("claim: no token")
        if bind.is_session and self.scenario.mapping[0] != "table" and not bind.on_loop:
            missing = {name for job in handed.jobs for name in adapter.unloaded(job)}
            if missing:
                self.fail(f"claim: not loaded as a SELECT would: {missing}")
        self.claims.append((step, handed))

    def _is_exact(self, step: Claim) -> bool:
        """Return True if nothing may keep a claim from the first jobs in its order."""
        bind = self.scenario.bind(step.actor)
        return not (
            self.excuse is not None
            or self.scenario.has(Fault)
            or (self.model.locks_more and self.open - {step.actor})
            or (bind.isolation in SNAPSHOTS and not bind.is_own)
            or (not bind.is_own and self.places.name in INNODB)
        )

    def _judge_end(
        self, step: End, number: int, owned: adapter.Handed, future: Future[Any]
    ) -> None:
        wanted = owned.idents[:1] if step.only_first or step.by_ticket else owned.idents
        ours = [ident for ident in wanted if self.model.owns(step.actor, number, ident, step.how)]
        error = future.exception()
        if isinstance(error, adapter.LOST):
            if len(ours) == len(wanted):
                self.fail(f"{step.how}: ClaimLost for jobs that it owns: {error}", error)
            if len(error.keys) != len(wanted) - len(ours):
                self.fail(f"{step.how}: lost {error.keys}, owned {ours} of {wanted}", error)
        elif error is not None:
            said = self.scenario.declaration
            lacks = {
                "complete": not said.done,
                "fail": not said.failed,
                "retry": said.label("due") is None,
                "retry now": said.label("due") is None,
                "extend": said.label("lease") is None or said.label("token") is None,
            }.get(step.how, False)
            self._judge_error(step.actor, step.how, error, role=lacks)
            return
        elif len(ours) < len(wanted):
            self.fail(f"{step.how}: no ClaimLost, though it owns only {ours} of {wanted}")
        elif future.result() != len(wanted):
            self.fail(f"{step.how}: {future.result()} changed, expected {len(wanted)}")
        self.log.append(f"    -> {ours}")
        self.model.end(step.actor, step.how, ours, step.error)

    def _judge_sweep(self, step: Sweep, future: Future[Any]) -> None:
        said = self.scenario.declaration
        if (error := future.exception()) is not None:
            lacks = not said.failed or said.max_attempts is None
            spared = self._beside_refused(self.model.spent(step.actor), error)
            if spared is None:
                self._judge_error(step.actor, "sweep", error, role=lacks)
            else:
                self.model.sweep(step.actor, spared)
            return
        spent = self.model.spent(step.actor)
        if future.result() != len(spent) and self.excuse is None and not self.model.locks_more:
            self.fail(f"sweep: {future.result()} marked, expected {spent}")
        if future.result() == len(spent):
            self.model.sweep(step.actor, spent)
        else:
            self._accept_unknown()

    def _judge_requeue(self, step: Requeue, future: Future[Any]) -> None:
        if (error := future.exception()) is not None:
            lacks = not self.scenario.declaration.failed
            spared = self._beside_refused(self.model.failed(step.actor, step), error)
            if spared is None:
                self._judge_error(step.actor, "requeue", error, role=lacks)
            else:
                self.model.requeue(step.actor, spared, keep_error=step.keep_error)
            return
        failed = self.model.failed(step.actor, step)
        if future.result() != len(failed) and self.excuse is None and not self.model.locks_more:
            self.fail(f"requeue: {future.result()} freed, expected {failed}")
        if future.result() == len(failed):
            self.model.requeue(step.actor, failed, keep_error=step.keep_error)
        else:
            self._accept_unknown()

    def _beside_refused(self, idents: list[int], error: BaseException) -> list[int] | None:
        """Return the jobs that were changed although the trigger refuses others.

        None if the error is not about jobs that it refuses.
        """
        found = self.scenario.table.trigger == "refuse" and isinstance(error, adapter.REFUSAL)
        if not found or "the database refused the change of" not in str(error):
            return None
        spared = [ident for ident in idents if not self._is_hooked(ident)]
        if len(spared) == len(idents):
            self.fail(f"no job of {idents} is refused: {error}", error)
        if f"the other {len(spared)} were changed" not in str(error) and not self.model.locks_more:
            self.fail(f"expected the change of {spared} of {idents}: {error}", error)
        self.log.append(f"    -> {spared}")
        return spared

    # What is in the table.

    def _check(self, what: str) -> None:
        """Compare what is committed with the model, column by column."""
        if self.waiting or self.paused:
            return
        now = self.world.snapshot()
        there = {ident: job for ident, job in self.model.committed.items() if job.state != "gone"}
        if set(now) != set(there):
            self.fail(f"{what}: rows {sorted(now)}, expected {sorted(there)}")
        declared = self._declared()
        for ident in there:
            self._take_in_passed_over(ident, now[ident])
        for ident in there:
            job, row, before = self.model.committed[ident], now[ident], self.before[ident]
            for label, text in row.items():
                expected = before[label]
                if label == "note" and job.claimed_note:
                    expected = "claimed"
                if label not in declared and text != expected:
                    self.fail(f"{what}: {label} of {ident} was {expected!r} and is {text!r}")
            self._check_state(what, ident, row["state"])
            label = self.scenario.declaration.label("attempts")
            if label == "attempts" and row[label] not in {None, str(job.attempts)}:
                self.fail(f"{what}: {row[label]} attempts of {ident}, expected {job.attempts}")
            self._check_error(what, job, row)
            if job.owner is not None and job.state == "running":
                handed = self.claims[job.owner][1]
                label = self.scenario.declaration.label("token")
                if label is not None and not self._is_text(row[label], handed.token):
                    self.fail(f"{what}: the token of {ident} is {row[label]!r}, not {handed.token}")
                if "version" in row and row["version"] == before["version"]:
                    self.fail(f"{what}: the version of {ident} was not counted up")

    def _take_in_passed_over(self, ident: int, row: Mapping[str, str | None]) -> None:
        """Accept that a job that cannot be read was freed, and its attempt counted.

        In a transaction of the caller's the further values of the claim stay, too.
        """
        said, job = self.scenario.declaration, self.model.committed[ident]
        if job.sound or job.owner is not None:
            return
        if row["note"] == "claimed":
            self.model.change(ident, claimed_note=True)
        label = said.label("attempts")
        if label is not None and (counted := row[label]) is not None:
            self.model.change(ident, attempts=max(job.attempts, int(counted)))
        if job.lease == "over" and row["state"] == self.world.texts.get(said.free[0]):
            self.model.change(ident, state="free", token=said.free[0], lease="none")

    def _check_error(self, what: str, job: Job, row: Mapping[str, str | None]) -> None:
        column = self.scenario.table.column("error")
        is_known = self.scenario.declaration.label("error") == "error" and self.excuse is None
        if column is None or not is_known:
            return
        text, expected = row["error"], [job.error]
        if column.kind == "json" and text is not None:
            said = json.loads(text)
            text = said["message"] if said else None
        if job.error is not None:
            expected = [error_text(column.kind, job.error, plain=plain) for plain in (False, True)]
        if text not in expected:
            self.fail(f"{what}: the error of {job.ident} is {text!r:.300}, not {expected!r:.300}")

    def _is_text(self, text: str | None, value: str | None) -> bool:
        stored = (value, f"p:{value}", f'"{value}"')
        return text in (*stored, *(str(each).encode().hex().upper() for each in stored))

    def _check_state(self, what: str, ident: int, text: str | None) -> None:
        job, texts = self.model.committed[ident], self.world.texts
        if job.token in {None, "null"}:
            return
        if job.token not in texts:
            self.fail(f"{what}: {ident} was marked with {job.token!r}, which the state cannot hold")
        expected = texts[job.token]
        if self.scenario.table.state.kind == "time state":
            text, expected = str(text is None), str(expected is None)
        if text != expected:
            marked = text == texts.get(self.scenario.declaration.claimed)
            why = " (marked, and not handed out)" if marked and job.state == "free" else ""
            self.fail(f"{what}: the state of {ident} is {text!r}, expected {expected!r}{why}")

    def _declared(self) -> set[str]:
        """Return the labels of the columns that the library may write."""
        said = self.scenario.declaration
        written = {"state", "touched", "version", *said.done, *said.failed}
        return written | {label for role, label in said.roles if role != "order"}

    def _drain(self) -> None:
        """Claim all that is left, which must be all that may be claimed."""
        player = self.world.players["a"]
        engine = make_engine(self.places.here, Bind())
        step = Claim("a", limit=60)
        expected = [job.ident for job in self.model.to_claim("a", step)]
        found: list[int] = []
        try:
            call = partial(adapter.claim, player, self.world.schema, self.table, step, bind=engine)
            # Some jobs may need a claim of their own.
            while more := player.do(call).result(PATIENCE).idents:
                found += more
        except Exception as error:  # noqa: BLE001 - it is the violation
            self.fail(f"drain: {error!r:.300}", error)
        finally:
            engine.dispose()
        if sorted(found) != sorted(expected):
            self.fail(f"drain: {found}, expected {expected}")


def is_lost(error: BaseException) -> bool:
    """Return True if an error tells of a lost connection."""
    while error is not None:
        if isinstance(error, DBAPIError) and (
            error.connection_invalidated or isinstance(error, OperationalError)
        ):
            return True
        if isinstance(error, (ConnectionError, OSError)):
            return True
        error = error.__cause__  # type: ignore[assignment]
    return False
