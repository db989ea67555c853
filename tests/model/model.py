"""The effect of every step on the jobs, in plain Python.

A job is free, running, ended, or in none of these states as far as the declaration can tell. A
running job belongs to one claim, or to a worker from before the scenario. Each actor sees the
committed jobs with its own changes on top; jobs that another actor has changed and not committed
are locked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, Literal

from tests.model.kinds import INNODB, KINDS, SPENT
from tests.model.scenario import Actor, Claim, Requeue, Row, Scenario

State = Literal["free", "running", "ended", "other", "gone"]


@dataclass(frozen=True)
class Job:
    """The state of one job.

    Attributes:
        token: what the state column holds, if the scenario tells.
        owner: the number of the claim that the job belongs to.
        lease: `none` (it runs until it is ended), `lasts`, or `over`.
        has_failed: whether it bears the mark of a failed row, and not that of a done one.
        error: the text of its last failure.
        aged: whether it was last changed longer ago than `unleased`.
        group: its exclusive key.
        tenant: its fair key.
        sound: whether the job can be read, and marked without a trigger in the way.
    """

    ident: int
    state: State
    token: str | None
    due: bool = True
    rank: tuple[Any, ...] = ()
    attempts: int = 0
    lease: str = "none"
    owner: int | None = None
    has_failed: bool = False
    error: str | None = None
    aged: bool = False
    group: int | None = None
    tenant: int | None = None
    sound: bool = True
    claimed_note: bool = False


@dataclass
class Model:
    """The jobs, as they are committed and as each actor has changed them.

    Attributes:
        turns: the fair key that an actor's claims with a `where` have served last, if it is known.
    """

    scenario: Scenario
    database: str
    committed: dict[int, Job] = field(default_factory=dict)
    changed: dict[Actor, dict[int, Job]] = field(default_factory=lambda: {"a": {}, "b": {}})
    turns: dict[tuple[Actor, int | None], int | None] = field(default_factory=dict)
    lost_turns: set[Actor] = field(default_factory=set)

    def __post_init__(self) -> None:
        for place, row in enumerate(self.scenario.rows):
            self.insert(place + 1, row)

    # What the rows mean.

    def insert(self, ident: int, row: Row) -> None:
        """Add a job that is committed."""
        said = self.scenario.declaration
        state: State = "other"
        ends = [mapping for mapping in (said.done, said.failed) if mapping]
        if any(all(self._bears(row, end) for end in mapping) for mapping in ends):
            state = "ended"
        elif any(self._same(row.state, token) for token in said.free):
            state = "free"
        elif self._same(row.state, said.claimed):
            state = "running"
        self.committed[ident] = Job(
            ident,
            state,
            row.state,
            due=said.label("due") is None or row.due != "future",
            rank=self._rank(ident, row),
            attempts=row.attempts,
            lease=self._lease(row),
            has_failed=all(self._bears(row, end) for end in said.failed)
            and bool(said.failed)
            and not (said.done and all(self._bears(row, end) for end in said.done)),
            aged=row.aged,
            group=None if said.label("exclusive_by") is None else row.group,
            tenant=None if said.label("fair_by") is None else row.tenant,
            sound=not (row.bad or row.hooked or row.identity == "ghost"),
        )

    def _value(self, token: str) -> Any:
        return KINDS[self.scenario.table.state.kind].tokens.get(token)

    def _same(self, one: str, other: str) -> bool:
        tokens = KINDS[self.scenario.table.state.kind].tokens
        known = {one, other} <= {"null", *tokens}
        return (
            known
            and self._value(one) == self._value(other)
            and (one == "null") == (other == "null")
        )

    def _bears(self, row: Row, end: str) -> bool:
        return row.ended if end == "done_at" else end != "failed_at" and self._same(row.state, end)

    def _lease(self, row: Row) -> str:
        column = self.scenario.table.column("lease")
        if column is None or self.scenario.declaration.label("lease") is None:
            return "none"
        if row.lease == "none":
            lasts = column.nullable and not (row.aged and self.scenario.declaration.unleased)
            return "none" if lasts else "over"
        return "over" if row.lease == "past" else "lasts"

    def _rank(self, ident: int, row: Row) -> tuple[Any, ...]:
        nulls_are_least = self.database != "postgresql"
        found: list[Any] = []
        column = self.scenario.table.column("order")
        for label, descends in self.scenario.declaration.order:
            value: int | None = ident if label == "ident" else row.rank
            if value is None and (column is None or not column.nullable):
                value = 0
            if value is None:
                value = -1000 if nulls_are_least else 1000
            found.append(-value if descends else value)
        return tuple(found) or (ident,)

    # What an actor sees.

    def seen(self, actor: Actor) -> dict[int, Job]:
        """Return the jobs as an actor sees them."""
        return self.committed | self.changed[actor]

    def is_locked(self, actor: Actor, ident: int) -> bool:
        """Return True if the other actor has changed the job and not committed."""
        other: Actor = "b" if actor == "a" else "a"
        return ident in self.changed[other]

    def is_immediate(self, actor: Actor) -> bool:
        """Return True if each call of the actor is committed at once."""
        bind = self.scenario.bind(actor)
        return bind.is_own or bind.isolation == "AUTOCOMMIT"

    def _put(self, actor: Actor, job: Job) -> None:
        target = self.committed if self.is_immediate(actor) else self.changed[actor]
        target[job.ident] = job

    def finish(self, actor: Actor, *, commits: bool) -> None:
        """Commit or roll back."""
        if commits:
            self.committed.update(self.changed[actor])
        self.changed[actor] = {}

    # Claims.

    def is_spent(self, job: Job) -> bool:
        """Return True if the job has had as many claims as it may have."""
        most = self.scenario.declaration.max_attempts
        return most is not None and job.attempts >= most

    def is_claimable(self, job: Job) -> bool:
        """Return True if a claim may take the job."""
        if self.is_spent(job):
            return False
        return (job.state == "free" and job.due) or (job.state == "running" and job.lease == "over")

    def claimable(self, actor: Actor, step: Claim, *, held: bool = False) -> list[Job]:
        """Return the jobs that a claim may take, in its order; `held` adds the other actor's."""
        found = [
            job
            for job in self.seen(actor).values()
            if self.is_claimable(job)
            and (held or not self.is_locked(actor, job.ident))
            and (step.where is None or job.ident > step.where)
        ]
        return sorted(found, key=lambda job: self.place(job, step))

    def place(self, job: Job, step: Claim) -> tuple[Any, ...]:
        """Return where a job comes in the order of a claim."""
        return (-job.ident,) if step.backwards else job.rank

    def claim(
        self, actor: Actor, step: Claim, idents: tuple[int, ...], number: int, *, exact: bool
    ) -> list[str]:
        """Take what was handed out, and return what is wrong with it.

        `exact`: nothing may keep the claim from the first jobs in its order.
        """
        problems = []
        possible = {job.ident: job for job in self.claimable(actor, step)}
        if len(idents) > step.limit:
            problems.append(f"{len(idents)} jobs at a limit of {step.limit}")
        if len(set(idents)) < len(idents):
            problems.append(f"handed out twice in one claim: {idents}")
        for ident in idents:
            if ident not in possible:
                job = self.seen(actor).get(ident)
                locked = " (locked by the other actor)" if self.is_locked(actor, ident) else ""
                problems.append(f"handed out, and not claimable{locked}: {job}")
        places = [self.place(possible[ident], step) for ident in idents if ident in possible]
        if self.scenario.declaration.label("fair_by") is not None:
            handed = [possible[ident] for ident in idents if ident in possible]
            problems += self._turn(actor, step, handed, exact=exact)
        elif places != sorted(places):
            problems.append(f"not in order: {idents}, {places}")
        elif exact:
            wanted = self._in_one_claim(self._with_room(actor, possible.values()), step)
            first = [self.place(job, step) for job in wanted]
            if places != first:
                problems.append(f"not the first jobs: {places} in place of {first}")
        if len(self._with_room(actor, [possible[n] for n in idents if n in possible])) < len(
            idents
        ):
            problems.append(f"more jobs of one key than may run: {idents}")
        for ident in idents:
            if ident in possible:
                self._put(actor, self._claimed(possible[ident], step, number))
        return problems

    def _turn(self, actor: Actor, step: Claim, handed: list[Job], *, exact: bool) -> list[str]:
        """Return what is wrong with jobs that were handed out in a turn."""
        name = (actor, step.where)
        known = exact and actor not in self.lost_turns
        said = self.scenario.declaration
        # By the times of claims, a turn begins behind one that the model does not know.
        known = known and self.scenario.table.state.kind != "time state"
        starts = [self.turns.get(name)] if known else [0, 1, 2, None]
        if not exact:
            self.lost_turns.add(actor)
        elif handed:
            self.lost_turns.discard(actor)
            self.turns[name] = handed[-1].tenant
        if not exact or said.label("exclusive_by") is not None:
            return []
        found = [(job.tenant, self.place(job, step)) for job in handed]
        # A job that the other actor has locked has its place in a turn, and is passed over.
        turns = [
            [each for each in self._in_turn(jobs, start) if not self.is_locked(actor, each.ident)]
            for jobs in (self.claimable(actor, step, held=held) for held in (False, True))
            for start in starts
        ]
        possible = [
            [(job.tenant, self.place(job, step)) for job in self._in_one_claim(turn, step)]
            for turn in turns
        ]
        return [] if found in possible else [f"not a turn: {found} in place of {possible}"]

    def _in_turn(self, jobs: list[Job], start: int | None) -> list[Job]:
        """Put jobs in the order of a turn that begins behind a key, or with the smallest one."""
        first = -1 if start is None else start
        tenants = {job.tenant for job in jobs}
        behind = sorted(key for key in tenants if key is not None and key > first)
        before = sorted(key for key in tenants if key is not None and key <= first)
        order = [*behind, *({None} & tenants), *before]
        by_key = [[job for job in jobs if job.tenant == key] for key in order]
        rounds = zip_longest(*by_key)
        return [job for each in rounds for job in each if job is not None]

    def _in_one_claim(self, jobs: list[Job], step: Claim) -> list[Job]:
        """Return the first of the jobs that one claim may have together."""
        if jobs and self._is_alone(jobs[0], step):
            return jobs[:1]
        return [job for job in jobs if not self._is_alone(job, step)][: step.limit]

    def _is_alone(self, job: Job, step: Claim) -> bool:
        """Return True if the claim would be the last attempt of a job whose worker has died."""
        most = self.scenario.declaration.max_attempts
        is_over = job.state == "running" and job.lease == "over"
        told = most is not None and is_over and step.limit > 1 and not step.deletes
        return told and most is not None and job.attempts + 1 >= most

    def to_claim(self, actor: Actor, step: Claim) -> list[Job]:
        """Return the claimable jobs whose keys have room, in claim order."""
        return self._with_room(actor, self.claimable(actor, step))

    def _with_room(self, actor: Actor, jobs: Iterable[Job]) -> list[Job]:
        """Return the jobs whose keys have room, each after the ones before it."""
        running = Counter(
            job.group
            for job in self.seen(actor).values()
            if job.state == "running" and job.lease != "over"
        )
        found = []
        for job in jobs:
            if job.group is None or running[job.group] < self.scenario.declaration.max_per_key:
                running[job.group] += 1
                found.append(job)
        return found

    def _claimed(self, job: Job, step: Claim, number: int) -> Job:
        if step.deletes:
            return replace(job, state="gone", owner=number)
        return replace(
            job,
            state="running",
            token=self.scenario.declaration.claimed,
            attempts=job.attempts + 1,
            lease="lasts" if step.lease else "none",
            owner=number,
            has_failed=False,
            aged=False,
            claimed_note=job.claimed_note or step.note,
        )

    # The end of a job.

    def owns(self, actor: Actor, number: int, ident: int, how: str) -> bool:
        """Return True if a claim still owns a job; without a token any running job passes."""
        job = self.seen(actor).get(ident)
        if job is None or job.state != "running":
            return False
        if (
            how == "extend"
            and job.lease == "over"
            and self.scenario.declaration.label("exclusive_by")
        ):
            # Its key may be another's by now.
            return False
        return self.scenario.declaration.label("token") is None or job.owner == number

    def end(self, actor: Actor, how: str, idents: Iterable[int], error: str | None = None) -> None:
        """End, extend or give back jobs that the claim owns."""
        said = self.scenario.declaration
        for ident in idents:
            job = self.seen(actor)[ident]
            if how in {"fail", "retry", "retry now"} and error is not None:
                job = replace(job, error=error)
            is_last = how.startswith("retry") and self.is_spent(job) and said.failed
            if how == "extend":
                made = replace(job, lease="lasts")
            elif how in {"complete", "fail"} or is_last:
                ends = said.done if how == "complete" else said.failed
                token = next((end for end in ends if not end.endswith("_at")), None)
                made = replace(
                    job,
                    state="ended",
                    token=token,
                    owner=None,
                    lease="none",
                    has_failed=how != "complete",
                    aged=False,
                )
            else:
                made = replace(
                    job,
                    state="free",
                    token=None if len(said.free) > 1 else said.free[0],
                    owner=None,
                    lease="none",
                    due={"release": job.due, "retry now": True}.get(how, False),
                    aged=False,
                    attempts=max(0, job.attempts - (how == "release")),
                )
            self._put(actor, made)

    def spent(self, actor: Actor) -> list[int]:
        """Return the jobs that a sweep marks as failed."""
        return [
            job.ident
            for job in self.seen(actor).values()
            if self.is_spent(job)
            and not self.is_locked(actor, job.ident)
            and (job.state == "free" or (job.state == "running" and job.lease == "over"))
        ]

    def sweep(self, actor: Actor, idents: Iterable[int]) -> None:
        """Mark spent jobs as failed; the last error stays."""
        for ident in idents:
            self.end(actor, "fail", [ident], self.seen(actor)[ident].error or SPENT)

    def failed(self, actor: Actor, step: Requeue) -> list[int]:
        """Return the jobs that a requeue frees."""
        found = [
            job
            for job in self.seen(actor).values()
            if job.state == "ended"
            and job.has_failed
            and (step.where is None or job.ident > step.where)
        ]
        found.sort(key=lambda job: job.rank)
        return [job.ident for job in found[: step.limit] if not self.is_locked(actor, job.ident)]

    def requeue(self, actor: Actor, idents: Iterable[int], *, keep_error: bool) -> None:
        """Free failed jobs again."""
        for ident in idents:
            job = self.seen(actor)[ident]
            made = replace(
                job,
                state="free",
                token=self.scenario.declaration.free[0],
                attempts=0,
                lease="none",
                has_failed=False,
                aged=False,
                error=job.error if keep_error else None,
            )
            self._put(actor, made)

    # What others do.

    def change(self, ident: int, **fields: Any) -> None:
        """Change a committed job."""
        self.committed[ident] = replace(self.committed[ident], **fields)

    @property
    def locks_more(self) -> bool:
        """Return True if an open transaction may hold jobs that it has not changed."""
        return self.database in INNODB and any(
            not self.is_immediate(actor) for actor in self.changed
        )
