"""The only calls of the library that the model test makes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import inspect as sa_inspect

import atomic_claim
from atomic_claim import (
    AmbiguousTable,
    ClaimConflict,
    ClaimError,
    ClaimLost,
    JobTable,
    aio,
)
from atomic_claim.claim import dequeue_jobs
from tests.model.kinds import NO_MESSAGE
from tests.model.scenario import Claim, End, Requeue, Scenario
from tests.model.world import HOUR, Player, Schema

LEASE: Final = timedelta(hours=1)
WORKER: Final = "me"
REFUSAL: Final = ClaimError
CONFLICT: Final = ClaimConflict
LOST: Final = ClaimLost
AMBIGUOUS: Final = AmbiguousTable


@dataclass
class Handed:
    """The result of a claim.

    Attributes:
        claim: the library's object.
        idents: the `ident` of each job, in order.
        unreadable: how many rows it says it could not read.
        token: the token that its rows bear.
        jobs: the entities or rows.
    """

    claim: Any
    idents: tuple[int, ...]
    unreadable: int
    token: str | None
    jobs: tuple[Any, ...]


def declare(scenario: Scenario, schema: Schema) -> Any:
    """Declare the job table, or have it inferred."""
    said = scenario.declaration
    columns = schema.columns
    if said.inferred:
        return JobTable.infer(schema.target)
    arguments: dict[str, Any] = {role: columns[label] for role, label in said.roles}
    free = [schema.token(token) for token in said.free]
    arguments["free"] = free[0] if len(free) == 1 else tuple(free)
    claimed = schema.token(said.claimed)
    arguments["claimed"] = sa.func.now() if claimed == "NOW" else claimed
    for role, ends in (("done", said.done), ("failed", said.failed)):
        mapping = {
            columns[end] if end in columns else columns[arguments["state"].name and "state"]: (
                sa.func.now() if end in columns else schema.token(end)
            )
            for end in ends
        }
        if mapping:
            arguments[role] = mapping
    if said.order:
        arguments["order"] = [
            columns[label].desc() if descends else columns[label] for label, descends in said.order
        ]
    if said.max_attempts is not None:
        arguments["max_attempts"] = said.max_attempts
    if said.unleased:
        arguments["unleased"] = HOUR
    if said.max_per_key > 1:
        arguments["max_per_key"] = said.max_per_key
    return JobTable(schema.target, naive_times="utc", **arguments)


def claim(player: Player, schema: Schema, table: Any, step: Claim, bind: Any = None) -> Handed:
    """Claim rows, by the actor's bind or another one."""
    columns = schema.columns
    options: dict[str, Any] = {}
    if step.lease:
        options["lease"] = LEASE
    if step.where is not None:
        options["where"] = columns["ident"] > step.where
    if step.backwards:
        options["order_by"] = columns["ident"].desc()
    if step.note:
        options["values"] = {columns["note"]: "claimed"}
    if step.worker:
        options["worker"] = WORKER
    given = player.object if bind is None else bind
    on_loop = bind is None and player.bind.on_loop
    found = player.awaited(
        lambda: (dequeue_jobs if step.deletes else _module(on_loop).claim_jobs)(
            given, table, step.limit, **options
        )
    )
    return handed(found, schema)


def handed(found: Any, schema: Schema) -> Handed:
    """Read the result of a claim."""
    return Handed(
        found,
        tuple(ident_of(job, schema) for job in found),
        len(getattr(found, "unreadable", ())),
        found.token,
        tuple(found),
    )


def ident_of(job: Any, schema: Schema) -> int:
    """Return the `ident` of an entity or a row."""
    if isinstance(job, sa.Row):
        return int(job._mapping[schema.columns["ident"]])
    return int(job.ident)


def end(player: Player, step: End, owned: Handed) -> Any:
    """End, extend or give back a claim or its first job."""
    held: Any = owned.claim
    jobs = list(owned.jobs)[:1] if step.only_first else None
    if step.by_ticket:
        ticket = json.loads(json.dumps(held.ticket(owned.jobs[0])))
        held, jobs = atomic_claim.Claim.from_ticket(held.table, ticket), None
    error = ValueError() if step.error == NO_MESSAGE else step.error
    name, options = {
        "complete": ("complete_jobs", {}),
        "fail": ("fail_jobs", {"error": error}),
        "retry": ("fail_jobs", {"error": error, "retry": LEASE}),
        "retry now": ("fail_jobs", {"error": error, "retry": timedelta(0)}),
        "release": ("release_jobs", {}),
        "extend": ("extend_jobs", {"lease": LEASE}),
    }[step.how]
    if step.how != "extend":
        options["unfenced"] = owned.token is None
    module = _module(player.bind.on_loop)
    return player.awaited(lambda: getattr(module, name)(player.object, held, jobs, **options))


def sweep(player: Player, table: Any) -> Any:
    """Mark as failed what has spent its attempts."""
    return player.awaited(lambda: _module(player.bind.on_loop).sweep_jobs(player.object, table))


def requeue(player: Player, schema: Schema, table: Any, step: Requeue) -> Any:
    """Free failed jobs again."""
    where = None if step.where is None else schema.columns["ident"] > step.where
    options = {"where": where, "limit": step.limit, "keep_error": step.keep_error}
    module = _module(player.bind.on_loop)
    return player.awaited(lambda: module.requeue_jobs(player.object, table, **options))


def unloaded(job: Any) -> set[str]:
    """Return the attributes of an entity that a SELECT would have loaded, and the claim has not."""
    state = sa_inspect(job)
    eager = {
        prop.key for prop in state.mapper.relationships if prop.lazy in {"selectin", "subquery"}
    }
    return eager.intersection(state.unloaded)


def _module(on_loop: bool) -> Any:
    return aio if on_loop else atomic_claim
