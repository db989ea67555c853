"""The same names for asynchronous sessions, connections and engines.

Each function takes what its synchronous twin takes, and is awaited. The bind is an
``AsyncSession``, ``async_scoped_session``, ``AsyncConnection``, ``AsyncEngine`` or
``async_sessionmaker``. It runs the twin's own code beside the event loop, as SQLAlchemy does it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar, overload

from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.util import greenlet_spawn

from . import claim as _claim
from . import lifecycle as _lifecycle
from .claim import Claim
from .errors import ClaimError
from .execution import async_types, patiently, sync_bind
from .heartbeat import LONGEST_END, Beat, Keeper, OnLost, prepared_beat
from .lifecycle import Held

__all__ = [
    "claim_jobs",
    "complete_jobs",
    "extend_jobs",
    "fail_jobs",
    "keep_claims",
    "release_jobs",
    "sweep_jobs",
]

AsyncBind = (
    AsyncSession
    | async_scoped_session[Any]
    | AsyncConnection
    | AsyncEngine
    | async_sessionmaker[Any]
)
J = TypeVar("J")
R = TypeVar("R")


@overload
async def claim_jobs(
    bind: AsyncSession | async_scoped_session[Any] | async_sessionmaker[Any],
    table: type[J],
    limit: int = 1,
    *,
    where: Any = None,
    order_by: Any = None,
    values: Mapping[Any, Any] | None = None,
    worker: str | None = None,
    lease: timedelta | None = None,
) -> Claim[J]: ...
@overload
async def claim_jobs(
    bind: AsyncBind,
    table: Any,
    limit: int = 1,
    *,
    where: Any = None,
    order_by: Any = None,
    values: Mapping[Any, Any] | None = None,
    worker: str | None = None,
    lease: timedelta | None = None,
) -> Claim[Any]: ...
async def claim_jobs(
    bind: AsyncBind,
    table: Any,
    limit: int = 1,
    *,
    where: Any = None,
    order_by: Any = None,
    values: Mapping[Any, Any] | None = None,
    worker: str | None = None,
    lease: timedelta | None = None,
) -> Claim[Any]:
    """Claim free rows; see :func:`atomic_claim.claim_jobs`."""
    return await _run(
        _claim.claim_jobs,
        bind,
        table,
        limit,
        where=where,
        order_by=order_by,
        values=values,
        worker=worker,
        lease=lease,
    )


async def complete_jobs(
    bind: AsyncBind, claim: Held, jobs: Iterable[Any] | None = None, *, unfenced: bool = False
) -> int:
    """Mark claimed jobs as done; see :func:`atomic_claim.complete_jobs`."""
    return await _run(_lifecycle.complete_jobs, bind, claim, jobs, unfenced=unfenced)


async def fail_jobs(
    bind: AsyncBind,
    claim: Held,
    jobs: Iterable[Any] | None = None,
    *,
    retry: bool | timedelta = False,
    error: str | BaseException | None = None,
    unfenced: bool = False,
) -> int:
    """Mark claimed jobs as failed, or free them for later; see :func:`atomic_claim.fail_jobs`."""
    return await _run(
        _lifecycle.fail_jobs, bind, claim, jobs, retry=retry, error=error, unfenced=unfenced
    )


async def release_jobs(
    bind: AsyncBind, claim: Held, jobs: Iterable[Any] | None = None, *, unfenced: bool = False
) -> int:
    """Give claimed jobs back; see :func:`atomic_claim.release_jobs`."""
    return await _run(_lifecycle.release_jobs, bind, claim, jobs, unfenced=unfenced)


async def extend_jobs(
    bind: AsyncBind,
    claim: Held,
    jobs: Iterable[Any] | None = None,
    *,
    lease: timedelta | None = None,
) -> int:
    """Prolong the leases of claimed jobs; see :func:`atomic_claim.extend_jobs`."""
    return await _run(_lifecycle.extend_jobs, bind, claim, jobs, lease=lease)


async def sweep_jobs(bind: AsyncBind, table: Any) -> int:
    """Mark as failed what has spent its attempts; see :func:`atomic_claim.sweep_jobs`."""
    return await _run(_lifecycle.sweep_jobs, bind, table)


@asynccontextmanager
async def keep_claims(
    bind: AsyncEngine | async_sessionmaker[Any],
    claim: Held,
    *,
    every: timedelta | None = None,
    on_lost: OnLost | None = None,
) -> AsyncIterator[Keeper]:
    """Extend the leases of a claim from a task while the block runs.

    See :func:`atomic_claim.keep_claims`; ``on_lost`` is called from the task.
    """
    beat: Beat = await greenlet_spawn(patiently, prepared_beat, _checked(bind), claim, every)
    stopped = asyncio.Event()

    async def run() -> None:
        try:
            while not await _is_set(stopped, beat.pause()):
                if (lost := await greenlet_spawn(beat.once)) and on_lost is not None:
                    on_lost(lost)
        finally:
            if not stopped.is_set():
                beat.give_up()

    task = asyncio.create_task(run(), name="atomic_claim.keep_claims")
    try:
        yield beat.keeper
    finally:
        beat.stop()
        stopped.set()
        # To cancel a beat would lose its connection in the middle of a transaction.
        _, late = await asyncio.wait([task], timeout=LONGEST_END)
        for each in late:
            each.cancel()


async def _is_set(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event so long, and tell whether it came."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


async def _run(function: Callable[..., R], bind: Any, *args: Any, **options: Any) -> R:
    return await greenlet_spawn(patiently, function, _checked(bind), *args, **options)


def _checked(bind: Any) -> Any:
    """Return the synchronous bind behind an asynchronous one; raise for any other object."""
    if not isinstance(bind, async_types()):
        raise ClaimError(
            f"{bind!r} is not an asynchronous bind: pass an AsyncSession, AsyncConnection, "
            "AsyncEngine or async_sessionmaker (the synchronous ones go to atomic_claim itself)"
        )
    return sync_bind(bind)
