"""Which arguments a user's function wants, found by the names and annotations of its parameters."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, orm

from .database import CommandError, asynchronous

if TYPE_CHECKING:
    from sqlalchemy.ext import asyncio as sa_asyncio

# The longer names first: `sessionmaker[Session]` is no session.
ANNOTATIONS = (
    ("async_sessionmaker", re.compile(r"\basync_sessionmaker\b|\bCallable\b.*\bAsyncSession\b")),
    ("async_session", re.compile(r"\bAsyncSession\b")),
    ("async_engine", re.compile(r"\bAsyncEngine\b")),
    ("async_connection", re.compile(r"\bAsyncConnection\b")),
    ("sessionmaker", re.compile(r"\bsessionmaker\b|\bCallable\b.*\bSession\b")),
    ("scoped_session", re.compile(r"\bscoped_session\b")),
    ("session", re.compile(r"\bSession\b")),
    ("engine", re.compile(r"\bEngine\b")),
    ("connection", re.compile(r"\bConnection\b")),
)
NAMES: Mapping[str, tuple[str, ...]] = {
    "session": ("session", "db_session", "dbsession", "sess", "s", "db"),
    "sessionmaker": (
        *("session_factory", "sessionmaker", "make_session", "session_maker", "sessions"),
        *("Session", "SessionLocal", "new_session"),
    ),
    "scoped_session": ("scoped_session",),
    "engine": ("engine", "bind", "db_engine", "eng"),
    "connection": ("connection", "conn", "db_connection", "con"),
    "limit": (
        *("limit", "n", "count", "batch", "batch_size", "size", "max_jobs", "number", "amount"),
        *("how_many", "num", "max_items", "max_rows", "chunk_size", "batchsize", "k"),
    ),
    "worker": ("worker", "worker_id", "worker_name", "owner", "locked_by", "claimed_by"),
    "table": ("table", "model", "job_table", "job_class", "entity"),
    "target": ("target", "function", "claim"),
}
ROLES = {name: role for role, names in NAMES.items() for name in names}
# What an asynchronous function is given by these names without an annotation.
ASYNCHRONOUS = frozenset({"session", "sessionmaker", "engine", "connection"})
# These are passed only where they are needed: a default stands for something else.
ONLY_IF_NEEDED = frozenset({"worker", "table", "target"})
KINDS_WITHOUT_NAMES = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Offer:
    """The values that a function can receive as arguments.

    Attributes:
        engine: the database of the race.
        limit: how many jobs one call may hand out.
        worker: the worker's name.
        table: the table, mapped class or ``JobTable`` of the race.
        target: the function that an adapter is to call.
        loop: the event loop of all calls, since connections cannot change theirs.
    """

    engine: Engine
    limit: int
    worker: str
    table: Any
    target: Any = None
    loop: asyncio.Runner = field(default_factory=asyncio.Runner)

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], Any]]:
        """Give each thing by its role; what was begun in it is committed at the end.

        An exception rolls it back.
        """
        given: dict[str, Any] = {}
        with ExitStack() as stack:

            def give(role: str) -> Any:
                if role not in given and role in OPENED:
                    given[role] = found = self.awaited(OPENED[role](self))
                    stack.callback(lambda: self.awaited(found.close()))
                return given[role] if role in given else getattr(self, role)

            yield give
            for each in given.values():
                self.awaited(each.commit())

    def awaited(self, found: Any) -> Any:
        """Return what a call returned; of an asynchronous one, what it returns or yields."""
        if inspect.isasyncgen(found):
            found = _collected(found)
        return self.loop.run(found) if inspect.iscoroutine(found) else found

    def close(self) -> None:
        """Close the connections of asynchronous functions, and their event loop."""
        if "async_engine" in vars(self):
            self.loop.run(self.async_engine.dispose())
        self.loop.close()

    @cached_property
    def async_engine(self) -> sa_asyncio.AsyncEngine:
        """Create an engine with an asynchronous driver for the same database."""
        # Needs greenlet, which only asynchronous functions have to have.
        from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415

        return create_async_engine(asynchronous(self.engine.url))

    @cached_property
    def async_sessionmaker(self) -> sa_asyncio.async_sessionmaker[sa_asyncio.AsyncSession]:
        """Sessions of the asynchronous engine."""
        from sqlalchemy.ext.asyncio import async_sessionmaker  # noqa: PLC0415 - as above

        return async_sessionmaker(self.async_engine)

    @cached_property
    def sessionmaker(self) -> orm.sessionmaker[orm.Session]:
        """Sessions of the engine."""
        return orm.sessionmaker(self.engine)


# These are committed and closed after each call.
OPENED: Mapping[str, Callable[[Offer], Any]] = {
    "session": lambda offer: offer.sessionmaker(),
    "scoped_session": lambda offer: orm.scoped_session(offer.sessionmaker),
    "connection": lambda offer: offer.engine.connect(),
    "async_session": lambda offer: offer.async_sessionmaker(),
    "async_connection": lambda offer: offer.async_engine.connect().start(),
}


async def _collected(found: AsyncIterator[Any]) -> list[Any]:
    return [each async for each in found]


@dataclass(frozen=True)
class Plan:
    """The arguments with which a function is called.

    Attributes:
        function: it.
        roles: what each of its parameters is to be given.
        of: how the object is made whose method it is, if it is one.
    """

    function: Callable[..., Any]
    roles: Sequence[tuple[inspect.Parameter, str]]
    of: Plan | None = None

    @property
    def takes_limit(self) -> bool:
        """Check whether the function receives the maximum number of jobs."""
        own = any(role == "limit" for _, role in self.roles)
        return own or (self.of is not None and self.of.takes_limit)

    def call(self, give: Callable[[str], Any]) -> Any:
        """Call it with what it wants."""
        positional = [] if self.of is None else [self.of.call(give)]
        named = {}
        for parameter, role in self.roles:
            if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
                positional.append(give(role))
            else:
                named[parameter.name] = give(role)
        return self.function(*positional, **named)


def planned(function: Any, name: str, owner: Any = None, *, adapter: bool = False) -> Plan:
    """Find out how a function is to be called.

    Args:
        function: the function, method or callable object.
        name: what it is called in messages.
        owner: the class or module that holds it; a method of a class gets an object of it.
        adapter: whether it can be given the target.

    Raises:
        CommandError: it cannot be called, or it cannot be told what a parameter wants.
    """
    if not callable(function):
        raise CommandError(f"{name} is {function!r}; expected a function")
    waits = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise CommandError(
            f"{name} does not say which arguments it takes: name a function that calls it with "
            "call="
        ) from None
    maker = None
    if _needs_object(function, owner):
        maker = planned(owner, f"{owner.__name__}, the class of {name},", adapter=adapter)
        parameters = parameters[1:]
    named = [each for each in parameters if each.kind not in KINDS_WITHOUT_NAMES]
    roles = [(each, _role(each, adapter=adapter, asynchronous=waits)) for each in named]
    unknown = [str(each) for each, role in roles if role is None and each.default is each.empty]
    if unknown:
        raise CommandError(
            f"{name} takes {', '.join(unknown)}, and what that is to be given cannot be told by "
            "name or annotation (known are a session, sessionmaker, engine, connection, limit, "
            "worker and table): write a function that takes what is known, and name it with call=; "
            "as its parameter `target` it is given the one that is raced"
        )
    return Plan(function, [(each, role) for each, role in roles if role is not None], maker)


def _needs_object(function: Any, owner: Any) -> bool:
    """Check whether the function is a method that needs an instance of its class."""
    if not isinstance(owner, type):
        return False
    stored = inspect.getattr_static(owner, getattr(function, "__name__", ""), None)
    return not isinstance(stored, (staticmethod, classmethod)) and not inspect.ismethod(function)


def _role(parameter: inspect.Parameter, *, adapter: bool, asynchronous: bool) -> str | None:
    annotation = parameter.annotation
    if annotation is not parameter.empty:
        bases = " ".join(each.__name__ for each in getattr(annotation, "__mro__", ()))
        text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        for role, pattern in ANNOTATIONS:
            if pattern.search(bases or text):
                return role
    by_name = ROLES.get(parameter.name)
    has_default = parameter.default is not parameter.empty
    if (by_name == "target" and not adapter) or (by_name in ONLY_IF_NEEDED and has_default):
        return None
    return f"async_{by_name}" if asynchronous and by_name in ASYNCHRONOUS else by_name
