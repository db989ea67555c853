"""The same names for asynchronous sessions, connections and engines.

Each function takes what its synchronous twin takes, and is awaited. The bind is an
``AsyncSession``, ``async_scoped_session``, ``AsyncConnection``, ``AsyncEngine`` or
``async_sessionmaker``. It runs the twin's own code beside the event loop, as SQLAlchemy does it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, Unpack, overload

from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.util import await_only, greenlet_spawn

from . import claim as _claim
from . import lifecycle as _lifecycle
from .claim import Claim, ClaimOptions
from .errors import ClaimError
from .heartbeat import LONGEST_END, Beat, Keeper, OnLost, prepared_beat
from .orm import async_types, sync_bind

__all__ = [
    "claim_jobs",
    "complete_jobs",
    "extend_jobs",
    "fail_jobs",
    "keep_claims",
    "release_jobs",
    "requeue_jobs",
    "sweep_jobs",
]

AsyncSessions = AsyncSession | async_scoped_session[Any] | async_sessionmaker[Any]
AsyncBind = AsyncSessions | AsyncConnection | AsyncEngine
J = TypeVar("J")
P = ParamSpec("P")
R = TypeVar("R")


def _twin(
    function: Callable[Concatenate[Any, P], R],
) -> Callable[Concatenate[AsyncBind, P], Coroutine[Any, Any, R]]:
    """Return the asynchronous twin of a function, with its other arguments."""

    @wraps(function, assigned=("__name__", "__qualname__"))
    async def twin(bind: AsyncBind, /, *args: P.args, **options: P.kwargs) -> R:
        found: R = await greenlet_spawn(partial(function, _checked(bind), *args, **options))
        return found

    summary = (function.__doc__ or "").partition("\n")[0]
    twin.__doc__ = f"{summary}\n\nSee :func:`atomic_claim.{function.__name__}`."
    return twin


class _ClaimJobs(Protocol):
    """The types of :func:`claim_jobs`: a mapped class by session gives its entities."""

    @overload
    async def __call__(
        self, bind: AsyncSessions, table: type[J], limit: int = 1, **options: Unpack[ClaimOptions]
    ) -> Claim[J]: ...
    @overload
    async def __call__(
        self, bind: AsyncBind, table: Any, limit: int = 1, **options: Unpack[ClaimOptions]
    ) -> Claim[Any]: ...


claim_jobs: _ClaimJobs = _twin(_claim.claim_jobs)  # type: ignore[assignment]
complete_jobs = _twin(_lifecycle.complete_jobs)
fail_jobs = _twin(_lifecycle.fail_jobs)
release_jobs = _twin(_lifecycle.release_jobs)
extend_jobs = _twin(_lifecycle.extend_jobs)
sweep_jobs = _twin(_lifecycle.sweep_jobs)
requeue_jobs = _twin(_lifecycle.requeue_jobs)


@asynccontextmanager
async def keep_claims(
    bind: AsyncEngine | async_sessionmaker[Any],
    claim: Claim[Any],
    *,
    every: timedelta | None = None,
    on_lost: OnLost | None = None,
) -> AsyncIterator[Keeper]:
    """Extend the leases of a claim from a task while the block runs.

    See :func:`atomic_claim.keep_claims`; ``on_lost`` is called from the task.
    """
    beat: Beat = await greenlet_spawn(prepared_beat, _checked(bind), claim, every)
    stopped = asyncio.get_running_loop().create_future()

    def wait(seconds: float) -> bool:
        await_only(asyncio.wait([stopped], timeout=seconds))
        return stopped.done()

    run = greenlet_spawn(beat.keep, wait, on_lost)
    task = asyncio.create_task(run, name="atomic_claim.keep_claims")
    try:
        yield beat
    finally:
        beat.stop()
        stopped.set_result(None)
        # To cancel a beat would lose its connection in the middle of a transaction.
        await asyncio.wait([task], timeout=LONGEST_END)
        task.cancel()
    beat.raise_crash()


def _checked(bind: Any) -> Any:
    """Return the synchronous bind behind an asynchronous one; raise for any other object."""
    if not isinstance(bind, async_types()):
        raise ClaimError(
            f"{bind!r} is not an asynchronous bind: pass an AsyncSession, AsyncConnection, "
            "AsyncEngine or async_sessionmaker (the synchronous ones go to atomic_claim itself)"
        )
    return sync_bind(bind)
